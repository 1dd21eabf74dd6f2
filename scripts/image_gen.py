#!/usr/bin/env python3
"""Make and edit images with OpenAI's GPT Image models.

    image_gen.py generate --prompt "A lighthouse on a basalt cliff" --out lighthouse.png
    image_gen.py edit --image room.png --mask wall.png --prompt "Paint the wall sage green"
    image_gen.py generate-batch --input jobs.jsonl --out-dir output/imagegen/batch

Add --dry-run to see what would be sent: it needs no key, no network and no package. Everything
that can be known beforehand is checked before the first request, for every job; an image that was
paid for is written before anything else happens to it.

Exit codes: 0 every requested image is on disk (in a dry run: would be valid), 1 at least one image
is missing, 2 refused before anything was sent, 3 submitted to the Batch API and not finished, 130
interrupted.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=3.54", "pillow>=11"]
# ///

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import asyncio
    from collections.abc import (
        AsyncIterator,
        Callable,
        Container,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from concurrent.futures import ThreadPoolExecutor
    from contextlib import ExitStack
    from io import FileIO
    from typing import BinaryIO, Literal, NoReturn

    from openai import AsyncAPIResponse
    from openai.types import Batch
    from PIL import Image

# The records are named tuples: importing dataclasses alone would double the time of a dry run.


# ---------------------------------------------------------------- 1. defaults and limits, as tables

DEFAULT_MODEL = "gpt-image-2"
DEFAULT_SIZE = "auto"
DEFAULT_QUALITY = "medium"
DEFAULT_FORMAT = "png"
DEFAULT_OUT = "output/imagegen/output"
DEFAULT_DOWNSCALE_SUFFIX = "-web"
DEFAULT_CONCURRENCY = 5
DEFAULT_ATTEMPTS = 3
DEFAULT_TIMEOUT = 600.0
DEFAULT_MAX_WAIT = 600.0

MAX_PROMPT_CHARACTERS = 32_000
MAX_N = 10
MAX_IMAGES = 16
MAX_IMAGE_BYTES = 50 * 1024 * 1024
MAX_MASK_BYTES = 4 * 1024 * 1024  # the SDK's figure; the API may take more, so it is a warning
MAX_JOBS = 500
MAX_BATCH_API_JOBS = 50_000
MAX_CONCURRENCY = 25
MAX_ATTEMPTS = 10
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
MIN_SECRET = 8  # characters; a shorter key is a stand-in, and may be part of any word
MAX_DIGITS = 18
MAX_COPY_PIXELS = 64_000_000  # eight times the largest image the API makes
COPY_QUALITY = 90  # of downscaled JPEG and WebP
COPY_LEVEL = 4  # zlib's, of downscaled PNG: a photograph in half the time of level 6, as small
MAX_SHEET_IMAGES = 5_000

# Free sizes, from the guide of gpt-image-2 (the SDK's types repeat it for 2.5).
EDGE_STEP = 16
MAX_EDGE = 3840
MAX_ASPECT = 3
MIN_PIXELS = 655_360
MAX_PIXELS = 8_294_400
EXPERIMENTAL_PIXELS = 2560 * 1440

BACKGROUNDS = ("transparent", "opaque", "auto")
MODERATIONS = ("auto", "low")
FIDELITIES = ("low", "high")
COMPLEXITIES = ("low", "medium", "high")
SHUT_DOWN_NOTICE_DAYS = 90

# Lowest and highest value of each number; frames are rounded to 10 ms and capped by the API.
RANGES = {
    "n": (1, MAX_N),
    "output_compression": (0, 100),
    "frame_count": (2, 16),
    "frame_duration_ms": (1, 655_350),
    "partial_images": (1, 3),
}


class ImageFormat(NamedTuple):
    """What an output format can do."""

    suffixes: tuple[str, ...]
    content_type: str
    is_input: bool = True  # the API also takes it as an input image
    has_alpha: bool = False
    compresses: bool = False
    animates: bool = False
    streams: bool = True
    masks: bool = True
    downscales: bool = True
    max_n: int = MAX_N


FORMATS = {
    "png": ImageFormat((".png",), "image/png", has_alpha=True),
    "jpeg": ImageFormat((".jpg", ".jpeg"), "image/jpeg", compresses=True),
    "webp": ImageFormat((".webp",), "image/webp", has_alpha=True, compresses=True),
    "gif": ImageFormat(
        (".gif",), "image/gif", is_input=False, animates=True, streams=False, masks=False
    ),
    "svg": ImageFormat(
        (".svg",),
        "image/svg+xml",
        is_input=False,
        streams=False,
        masks=False,
        downscales=False,
        max_n=1,
    ),
}
PICTURE_FORMATS = tuple(name for name, row in FORMATS.items() if row.is_input)
SUFFIX_FORMATS = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes}


class ModelFamily(NamedTuple):
    """What the models of one prefix take; dated snapshots follow their family."""

    prefix: str
    qualities: tuple[str, ...] = ("low", "medium", "high", "auto")
    formats: tuple[str, ...] = PICTURE_FORMATS
    sizes: tuple[str, ...] = ()  # empty: free sizes within the limits above
    transparent: bool = True
    markup: bool = False
    fidelities: tuple[str, ...] = ()  # as documented; empty: input_fidelity has to be left out
    models: tuple[str, ...] = ()  # where no model has the plain name of the family
    shut_down: str = ""  # ISO date
    successor: str = ""


OLD_SIZES = ("1024x1024", "1536x1024", "1024x1536", "auto")
NEW_QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto")
SUCCESSOR = "gpt-image-2.5-sunburst or gpt-image-2.5-flare"

# Newest first: a model that no row knows gets the rules of the first row.
MODEL_FAMILIES = (
    ModelFamily(
        "gpt-image-2.6",
        NEW_QUALITIES,
        tuple(FORMATS),
        markup=True,
        models=("gpt-image-2.6-sunburst", "gpt-image-2.6-flare"),
    ),
    ModelFamily(
        "gpt-image-2.5",
        NEW_QUALITIES,
        tuple(FORMATS),
        markup=True,
        models=("gpt-image-2.5-sunburst", "gpt-image-2.5-flare"),
    ),
    ModelFamily("gpt-image-2", transparent=False),
    ModelFamily(
        "gpt-image-1.5",
        sizes=OLD_SIZES,
        fidelities=FIDELITIES,
        shut_down="2026-12-01",
        successor=SUCCESSOR,
    ),
    ModelFamily(
        "gpt-image-1-mini",
        sizes=OLD_SIZES,
        fidelities=("low",),
        shut_down="2026-12-01",
        successor=SUCCESSOR,
    ),
    ModelFamily(
        "gpt-image-1",
        sizes=OLD_SIZES,
        fidelities=FIDELITIES,
        shut_down="2026-10-23",
        successor=SUCCESSOR,
    ),
)

# JSONL key (and flag), label in the prompt, help; the order is that of the prompt.
PROMPT_SECTIONS = (
    ("use_case", "Use case: {}", "what the image is for, e.g. product-mockup"),
    ("prompt", "Primary request: {}", ""),
    ("scene", "Scene/background: {}", "where it is"),
    ("subject", "Subject: {}", "who or what it shows"),
    ("style", "Style/medium: {}", "photo, gouache, line art …"),
    ("composition", "Composition/framing: {}", "angle, framing, free space"),
    ("lighting", "Lighting/mood: {}", "light and mood"),
    ("palette", "Color palette: {}", "colours"),
    ("materials", "Materials/textures: {}", "surfaces"),
    ("text", 'Text (verbatim): "{}"', "words to appear in the image, letter by letter"),
    ("constraints", "Constraints: {}", "what has to hold"),
    ("negative", "Avoid: {}", "what must not appear"),
)
PROMPT_FIELDS = tuple(key for key, _, _ in PROMPT_SECTIONS if key != "prompt")

EXIT_CODES = """\
exit codes:
  0    every requested image is on disk (dry run: the request would be valid)
  1    at least one requested image is missing
  2    refused before anything was sent
  3    submitted to the Batch API, not finished (--no-wait)
  130  interrupted"""


# ----------------------------------------------------------------------------- 2. expected failures


class ImageGenError(Exception):
    """A failure that is no bug of this program; its text is for the user."""


class UsageError(ImageGenError):
    """What was asked for cannot be done as asked; nothing has been sent."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Failure(NamedTuple):
    """Why a job has no image, as it appears under "error" in --json."""

    kind: str
    message: str
    code: str | None = None
    retryable: bool = False
    maybe_billed: bool = False


class JobError(ImageGenError):
    """One job fails; the others go on."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


# --------------------------------------------------------------------------------------- 3. records


class ImageRequest(NamedTuple):
    """One request; the fields named in PAYLOAD_KEYS are sent under their own names."""

    title: str  # the prompt as the user wrote it
    prompt: str  # the prompt as it is sent
    model: str = DEFAULT_MODEL
    n: int = 1
    size: str = DEFAULT_SIZE
    quality: str = DEFAULT_QUALITY
    background: str | None = None
    output_format: str = DEFAULT_FORMAT
    output_compression: int | None = None
    moderation: str | None = None
    complexity: str | None = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    partial_images: int | None = None
    safety_identifier: str | None = None
    input_fidelity: str | None = None
    image: tuple[str, ...] = ()
    mask: str | None = None
    markup: str | None = None

    @property
    def endpoint(self) -> str:
        """The path of the API that serves the request."""
        return "/v1/images/edits" if self.image else "/v1/images/generations"

    @property
    def payload(self) -> dict[str, Any]:
        """The parameters that are sent, without the files."""
        values = {key: getattr(self, key) for key in PAYLOAD_KEYS}
        values["stream"] = True if self.partial_images else None
        return {key: value for key, value in values.items() if value is not None}

    @property
    def files(self) -> tuple[str, ...]:
        """All input files."""
        return (*self.image, *filter(None, (self.mask, self.markup)))


NOT_SENT = ("title", "image", "mask", "markup")
PAYLOAD_KEYS = tuple(key for key in ImageRequest._fields if key not in NOT_SENT)


class RunOptions(NamedTuple):
    """How the jobs are run, whatever they ask for."""

    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    force: bool = False
    skip_existing: bool = False
    fail_fast: bool = False
    keep_partials: bool = False
    batch_api: bool = False
    no_wait: bool = False
    cancel: bool = False
    resumes: str | None = None  # the run of the folder that goes on
    submitted: bool = False  # all of it, so that the input images are not needed any more
    out_dir: str | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    max_attempts: int = DEFAULT_ATTEMPTS
    max_wait: float = DEFAULT_MAX_WAIT
    timeout: float = DEFAULT_TIMEOUT
    downscale_max_dim: int | None = None
    downscale_suffix: str = DEFAULT_DOWNSCALE_SUFFIX
    contact_sheet: str | None = None


def place_of(line: int) -> str:
    """Return how a message about a line begins."""
    return f"line {line}: " if line else ""


class Draft(NamedTuple):
    """A request and the name it asked for."""

    number: int
    line: int  # of the JSONL file, 0 for a single command
    request: ImageRequest
    folder: str
    name: str | None  # None: image_1, image_2 …


class Output(NamedTuple):
    """One image to be written, its downscaled copy, and what a stream shows before it is done."""

    path: str
    copy: str | None = None
    partials: tuple[str, ...] = ()
    replace: bool = False
    replace_copy: bool = False
    collected: bool = False  # it may have been written before, from the same answer


class Job(NamedTuple):
    """A request with its files: all that it stands for, and those that are still missing."""

    number: int
    line: int
    request: ImageRequest
    outputs: tuple[Output, ...]
    missing: tuple[Output, ...]

    @property
    def where(self) -> str:
        """Where the job comes from, as messages begin."""
        return place_of(self.line)


class Picture(NamedTuple):
    """What the head and the tail of an image file say."""

    format: str
    width: int
    height: int
    alpha: bool
    whole: bool
    turned: bool = False  # a photograph stored on its side

    @property
    def size(self) -> str:
        """The size as the API writes it."""
        return f"{self.width}x{self.height}"


class Saved(NamedTuple):
    """An image on disk."""

    path: str
    bytes: int
    width: int
    height: int
    format: str
    alpha: bool


class Delivery(NamedTuple):
    """What has come of a job so far."""

    images: tuple[Saved, ...] = ()
    copies: tuple[Saved, ...] = ()
    partials: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    attempts: int = 0
    seconds: float = 0.0
    request_id: str | None = None
    usage: dict[str, Any] | None = None
    size: str | None = None
    quality: str | None = None


class Done(NamedTuple):
    """All images of the job are on disk."""

    job: Job
    delivery: Delivery


class Failed(NamedTuple):
    """At least one image of the job is missing; those that came are in the delivery."""

    job: Job
    delivery: Delivery
    failure: Failure


class Skipped(NamedTuple):
    """Nothing was sent: the files are there already, or (with a failure) the run had to stop."""

    job: Job
    delivery: Delivery
    failure: Failure | None = None


Outcome = Done | Failed | Skipped


# ---------------------------------------------------------------------------------- 4. command line
# One converter for the flag and the JSONL key of an option: both accept and refuse the same values.


def received(value: object) -> str:
    """Return a value as an error message quotes it: as JSON, and short."""
    quoted = json.dumps(value, ensure_ascii=False, default=str)
    return quoted if len(quoted) <= 80 else f"{quoted[:60]}… ({len(quoted):,} characters)"


def listing(values: Iterable[str]) -> str:
    """Return values as a sentence lists them."""
    return ", ".join(values)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def text(value: object) -> str:
    """Accept a string that can be sent."""
    if not isinstance(value, str):
        raise argparse.ArgumentTypeError(f"has to be a string, not {received(value)}")
    if "\0" in value:
        raise argparse.ArgumentTypeError(f"must not contain a NUL character: {received(value)}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise argparse.ArgumentTypeError(
            "is not valid text (bytes that are not UTF-8, or half a pair)"
        )
    return value


def words(value: object) -> str:
    """Accept a string; blanks at its ends do not count."""
    return text(value).strip()


def whole_number(value: object) -> int:
    """Accept an integer, or digits."""
    if isinstance(value, str) and re.fullmatch(rf"[+-]?[0-9]{{1,{MAX_DIGITS}}}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise argparse.ArgumentTypeError(f"has to be a whole number, not {received(value)}")


def seconds(value: str) -> float:
    """Accept a positive number of seconds."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) or float(value) == 0:
        raise argparse.ArgumentTypeError(f"has to be a positive number of seconds, not {value!r}")
    return float(value)


def image_format(value: object) -> str:
    """Accept the name of a format in any case; jpg means jpeg."""
    name = text(value).lower()
    return "jpeg" if name == "jpg" else name


def visible(value: object) -> str:
    """Accept a name that can stand in one line of output."""
    name = text(value)
    if not name:
        raise argparse.ArgumentTypeError("is empty; give a name")
    if not name.isprintable():
        raise argparse.ArgumentTypeError(f"must not hold control characters: {received(name)}")
    return name


def path(value: object) -> str:
    """Accept a path, with ~ for the home directory."""
    return os.path.expanduser(visible(value))


def paths(value: object) -> tuple[str, ...]:
    """Accept a path or a list of them."""
    if value == []:
        raise argparse.ArgumentTypeError("is an empty list; give a path, or leave it out")
    return tuple(path(item) for item in (value if isinstance(value, list) else [value]))


def file_name(value: object) -> str:
    """Accept a file name; the directories in it are dropped."""
    name = os.path.basename(visible(value).rstrip("/"))
    if name.strip(" ") in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"has to be a file name, not {received(value)}")
    return name


def elsewhere(explanation: str) -> Callable[[str], NoReturn]:
    """Make the converter of a flag that this subcommand does not have."""

    def refuse(_value: str) -> NoReturn:
        raise argparse.ArgumentTypeError(explanation)

    return refuse


class RequestOption(NamedTuple):
    """A parameter of a request: --its-flag and its JSONL key."""

    key: str
    convert: Callable[[object], Any]
    metavar: str
    help: str


REQUEST_OPTIONS = (
    RequestOption("model", text, "MODEL", f"a GPT Image model (default: {DEFAULT_MODEL})"),
    RequestOption("n", whole_number, "N", f"variants of the image, 1-{MAX_N} (default: 1)"),
    RequestOption(
        "size",
        text,
        "WxH",
        f"auto, or edges that are multiples of {EDGE_STEP} up to {MAX_EDGE}; gpt-image-1* has "
        f"{', '.join(OLD_SIZES[:-1])} (default: {DEFAULT_SIZE})",
    ),
    RequestOption(
        "quality",
        text,
        "QUALITY",
        f"low, medium, high, auto; xhigh and max from 2.5 on (default: {DEFAULT_QUALITY})",
    ),
    RequestOption(
        "background",
        text,
        "BACKGROUND",
        "transparent, opaque or auto; gpt-image-2 has no transparent (default: not sent)",
    ),
    RequestOption(
        "output_format",
        image_format,
        "FORMAT",
        "png, jpeg (jpg) or webp; gif and svg from 2.5 on (default: the suffix of the name, "
        f"else {DEFAULT_FORMAT})",
    ),
    RequestOption(
        "output_compression", whole_number, "0-100", "jpeg and webp only (default: not sent)"
    ),
    RequestOption("moderation", text, "LEVEL", "auto or low (default: not sent)"),
    RequestOption(
        "complexity",
        text,
        "LEVEL",
        "low, medium or high: how much the model plans (default: not sent)",
    ),
    RequestOption("frame_count", whole_number, "2-16", "frames of a gif (default: the API's 9)"),
    RequestOption(
        "frame_duration_ms", whole_number, "MS", "time of each gif frame (default: the API's 200)"
    ),
    RequestOption(
        "partial_images",
        whole_number,
        "1-3",
        "stream, and write this many drafts as NAME.partial-N.EXT while the image is made",
    ),
    RequestOption(
        "safety_identifier", text, "ID", "a stable, hashed id of your end user (default: not sent)"
    ),
)
EDIT_OPTIONS = (
    RequestOption("image", paths, "FILE", f"an input image; up to {MAX_IMAGES}, the order is kept"),
    RequestOption(
        "mask", path, "FILE", "a PNG with alpha: where it is 0, the first image is edited"
    ),
    RequestOption(
        "markup",
        path,
        "FILE",
        "a transparent PNG over the first image that guides the edit; from 2.5 on, without mask",
    ),
    RequestOption(
        "input_fidelity",
        text,
        "LEVEL",
        "low or high; gpt-image-1* only, newer models always use high",
    ),
)
JOB_OPTIONS = {option.key: option for option in (*REQUEST_OPTIONS, *EDIT_OPTIONS)}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width; asking the terminal for its own costs every run an import of shutil."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints end like every other refusal."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        if "expected one argument" in message:
            message += "; a value that begins with a dash is given as --flag=VALUE"
        raise UsageError([f"{message} ({self.prog} --help lists what is accepted)"])


def flag(key: str) -> str:
    """Return the flag of a JSONL key."""
    return "--" + key.replace("_", "-")


def add_option(group: argparse._ArgumentGroup, option: RequestOption) -> None:
    """Add the flag of a request's parameter."""
    group.add_argument(
        flag(option.key), type=option.convert, metavar=option.metavar, help=option.help
    )


def add_prompt_options(parser: Parser) -> None:
    """Add the prompt itself."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", type=text, metavar="TEXT", help="what to make")
    group.add_argument(
        "--prompt-file", type=path, metavar="FILE", help="read the prompt from a file, - for stdin"
    )


def add_prompt_fields(parser: Parser) -> None:
    """Add the labelled lines of the prompt."""
    group = parser.add_argument_group(
        "prompt fields", "each adds a labelled line to the prompt that is sent"
    )
    for key, _, explanation in PROMPT_SECTIONS:
        if key in PROMPT_FIELDS:
            group.add_argument(flag(key), type=words, metavar="TEXT", help=explanation)
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="send the labelled lines; --no-augment sends the prompt alone (default: --augment)",
    )


def add_request_options(parser: Parser) -> None:
    """Add what every request can say about its images."""
    group = parser.add_argument_group("image")
    for option in REQUEST_OPTIONS:
        add_option(group, option)


def add_edit_options(parser: Parser) -> None:
    """Add the inputs of an edit."""
    group = parser.add_argument_group("input images")
    for option in EDIT_OPTIONS:
        if option.key == "image":
            group.add_argument(
                "--image",
                type=path,
                action="append",
                required=True,
                metavar=option.metavar,
                help=option.help,
            )
        else:
            add_option(group, option)


def add_output_options(parser: Parser, *, batch: bool) -> argparse._ArgumentGroup:
    """Add where the images go."""
    group = parser.add_argument_group("output")
    if not batch:
        group.add_argument(
            "--out",
            type=path,
            metavar="PATH",
            help=f"file, or folder if it ends with / or exists (default: {DEFAULT_OUT}.<format>)",
        )
    group.add_argument(
        "--out-dir",
        type=path,
        metavar="DIR",
        required=batch,
        help="folder for all images"
        if batch
        else "folder for image_1.<format>, image_2.<format> …",
    )
    group.add_argument(
        "--downscale-max-dim",
        type=whole_number,
        metavar="PIXELS",
        help="also write a copy whose longer edge is at most this",
    )
    group.add_argument(
        "--downscale-suffix",
        type=text,
        metavar="SUFFIX",
        default=DEFAULT_DOWNSCALE_SUFFIX,
        help=f"what the copy's name adds (default: {DEFAULT_DOWNSCALE_SUFFIX})",
    )
    group.add_argument(
        "--keep-partials",
        action="store_true",
        help="keep the drafts of --partial-images when the image is there",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace files that exist")
    existing.add_argument(
        "--skip-existing",
        action="store_true",
        help="ask only for images that are not there yet: the same command resumes a run",
    )
    return group


def add_batch_options(parser: Parser) -> None:
    """Add what only a batch has."""
    group = parser.add_argument_group("batch")
    group.add_argument(
        "--input",
        type=path,
        metavar="FILE",
        required=True,
        help="JSONL, one job a line: an object, a string or plain text; at most "
        f"{MAX_JOBS}, {MAX_BATCH_API_JOBS:,} with --batch-api",
    )
    group.add_argument(
        "--concurrency",
        type=whole_number,
        metavar="N",
        default=DEFAULT_CONCURRENCY,
        help=f"requests in flight, 1-{MAX_CONCURRENCY} (default: {DEFAULT_CONCURRENCY})",
    )
    group.add_argument(
        "--fail-fast", action="store_true", help="send nothing more after the first failed job"
    )
    group = parser.add_argument_group(
        "Batch API", "OpenAI's queue: half the price, limits of its own, answers within 24 hours"
    )
    group.add_argument(
        "--batch-api",
        action="store_true",
        help=f"submit up to {MAX_BATCH_API_JOBS:,} jobs there and wait for them; the same command "
        "run again goes on where it was",
    )
    group.add_argument(
        "--no-wait",
        action="store_true",
        help="submit, collect what is finished, and leave with exit code 3 if some is not",
    )
    group.add_argument(
        "--cancel",
        action="store_true",
        help="cancel what this folder has submitted, and collect what is finished",
    )
    for name, explanation in (
        ("--prompt", "is no option of generate-batch: write each prompt as a line of --input"),
        (
            "--prompt-file",
            "is no option of generate-batch: give that file as --input, a prompt a line",
        ),
        (
            "--out",
            'is no option of generate-batch: give --out-dir, and "out" in a job for its name',
        ),
    ):
        parser.add_argument(name, type=elsewhere(explanation), help=argparse.SUPPRESS)


def add_run_options(parser: Parser) -> None:
    """Add how the run behaves."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be sent, and send nothing"
    )
    group.add_argument(
        "--json", action="store_true", help="one JSON object a line on stdout for each job"
    )
    group.add_argument("--quiet", action="store_true", help="errors only on stderr")
    group.add_argument(
        "--max-attempts",
        type=whole_number,
        metavar="N",
        default=DEFAULT_ATTEMPTS,
        help=f"requests for a job when the network or the server fails, 1-{MAX_ATTEMPTS} "
        f"(default: {DEFAULT_ATTEMPTS})",
    )
    group.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        default=DEFAULT_TIMEOUT,
        help=f"for one request (default: {DEFAULT_TIMEOUT:.0f})",
    )
    group.add_argument(
        "--max-wait",
        type=seconds,
        metavar="SECONDS",
        default=DEFAULT_MAX_WAIT,
        help=f"a job waits this long for the rate limit (default: {DEFAULT_MAX_WAIT:.0f})",
    )


class Command(NamedTuple):
    """A subcommand, as its help shows it."""

    help: str
    example: str


COMMANDS = {
    "generate": Command(
        "make an image from a prompt",
        '{} generate --prompt "A red kite over dunes" --size 1536x1024 --out kite.png',
    ),
    "edit": Command(
        "change or combine images",
        '{} edit --image room.png --prompt "Only paint the wall sage green" --out green.png',
    ),
    "generate-batch": Command(
        "run many jobs from a JSONL file",
        "{} generate-batch --input jobs.jsonl --out-dir kites --concurrency 10",
    ),
}


def add_options(parser: Parser, name: str) -> None:
    """Add all options of a subcommand, from the same groups for all three."""
    batch = name == "generate-batch"
    if batch:
        add_batch_options(parser)
    else:
        add_prompt_options(parser)
    if name == "edit":
        add_edit_options(parser)
    add_request_options(parser)
    add_prompt_fields(parser)
    output = add_output_options(parser, batch=batch)
    if batch:
        output.add_argument(
            "--contact-sheet",
            type=path,
            metavar="FILE",
            help="also write one image of labelled thumbnails of the whole batch",
        )
    add_run_options(parser)


def build_parser(only: str | None = None) -> Parser:
    """Build the command line; with the options of one subcommand only, to start faster."""
    parser = Parser(
        description="Make and edit images with OpenAI's GPT Image models.",
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example:\n  {command.example.format(parser.prog)}\n\n{EXIT_CODES}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        if only in (None, name):
            add_options(sub, name)
    return parser


def run_options(arguments: Mapping[str, Any]) -> RunOptions:
    """Pick what concerns the run out of the parsed command line."""
    return RunOptions(**{key: arguments[key] for key in RunOptions._fields if key in arguments})


# -------------------------------------------------------------------------------------- 5. requests


def compose_prompt(prompt: str, fields: Mapping[str, str], *, augment: bool) -> str:
    """Return the prompt as it is sent: one labelled line for each given field."""
    if not augment:
        return prompt
    values = {**fields, "prompt": prompt}
    return "\n".join(
        label.format(values[key])
        for key, label, _ in PROMPT_SECTIONS
        if key == "prompt" or values.get(key)
    )


def name_format(name: str | None) -> str | None:
    """Return the image format that a file name promises."""
    return SUFFIX_FORMATS.get(os.path.splitext(name or "")[1].lower())


def request_from_options(values: Mapping[str, Any], name: str | None) -> ImageRequest:
    """Build the request of a job from flags and keys, by key; None means not given."""
    given = {key: values[key] for key in JOB_OPTIONS if values.get(key) is not None}
    given.setdefault("output_format", name_format(name) or DEFAULT_FORMAT)
    fields = {key: values[key] for key in PROMPT_FIELDS if values.get(key)}
    title = (values.get("prompt") or "").strip()
    prompt = compose_prompt(title, fields, augment=values["augment"])
    return ImageRequest(title=title, prompt=prompt, **given)


def read_file(name: str, what: str) -> bytes:
    """Read a whole input file; - is standard input."""
    if name == "-" and sys.stdin is None:
        raise UsageError([f"{what} - cannot be read: standard input is closed"])
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError([f"{what} {name} cannot be read: {error.strerror or error}"]) from None


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """Return the prompt of a single command."""
    if prompt is not None and prompt_file is not None:
        raise UsageError(["--prompt and --prompt-file are both given; give one of them"])
    if prompt_file is None:
        if prompt is None:
            raise UsageError(["no prompt: give --prompt TEXT or --prompt-file FILE (- for stdin)"])
        return prompt
    try:
        content = read_file(prompt_file, "--prompt-file").decode("utf-8-sig")
        return text(content.replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        raise UsageError([f"--prompt-file {prompt_file} is not UTF-8: {error.reason}"]) from None
    except argparse.ArgumentTypeError as error:
        raise UsageError([f"--prompt-file {prompt_file} {error}"]) from None


def single_draft(values: dict[str, Any]) -> Draft:
    """Read the one job of generate or edit."""
    out, out_dir = values["out"], values["out_dir"]
    if out_dir is None and out is not None and (out.endswith(os.sep) or os.path.isdir(out)):
        out_dir = out
    folder, name = (out_dir, None) if out_dir else os.path.split(out or DEFAULT_OUT)
    values["prompt"] = read_prompt(values["prompt"], values["prompt_file"])
    return Draft(1, 0, request_from_options(values, name), folder, name)


def no_constant(name: str) -> NoReturn:
    """Refuse NaN and the infinities, which JSON does not have."""
    raise ValueError(f"{name} is no JSON value")


def json_number(digits: str) -> int | float:
    """Read a number of any length; Python would refuse to convert the longest to an int."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that gives one key twice: which of the two was meant?"""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {received(key)} is given twice")
        found[key] = value
    return found


def parse_job_line(line: str | UnicodeDecodeError) -> dict[str, Any]:
    """Return the keys of one job: an object, a JSON string, or plain text as its prompt."""
    if isinstance(line, UnicodeDecodeError):
        raise ImageGenError(f"is not UTF-8 ({line.reason} at byte {line.start})")
    try:
        job = json.loads(
            line,
            parse_constant=no_constant,
            parse_int=json_number,
            object_pairs_hook=no_duplicates,
        )
    except RecursionError:
        raise ImageGenError("is nested too deeply") from None
    except ValueError as error:
        if line.startswith("{"):
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at column {error.colno}"
            raise ImageGenError(f"is not valid JSON: {reason}") from None
        job = line
    if isinstance(job, str):
        return {"prompt": job}
    if isinstance(job, dict):
        return job
    raise ImageGenError(f"has to be an object, a string or plain text, not {received(job)}")


def unknown_keys(keys: Iterable[str], known: Sequence[str]) -> Iterator[str]:
    """Yield a complaint about the keys that nobody reads, with those that were probably meant."""
    unknown = [key for key in keys if key not in known]
    if unknown:
        from difflib import get_close_matches

        hints = []
        for key in unknown[:3]:
            close = get_close_matches(key[:40].lower().replace("-", "_"), known, n=1)
            hints.append(
                received(key) + (f" (did you mean {received(close[0])}?)" if close else "")
            )
        if len(unknown) > len(hints):
            hints.append(f"{len(unknown) - len(hints):,} more")
        yield f"unknown key {listing(hints)}; known are {listing(sorted(known))}"


def convert_job(job: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the given keys of a job, converted as the flags are, and what is wrong with them."""
    converters: dict[str, Callable[[object], Any]] = {
        **{key: option.convert for key, option in JOB_OPTIONS.items()},
        **dict.fromkeys(PROMPT_FIELDS, words),
        "prompt": words,
        "out": file_name,
    }
    fields = {} if job.get("fields") is None else job["fields"]
    problems = []
    if not isinstance(fields, dict):
        problems.append(f'"fields" has to be an object, not {received(fields)}')
        fields = {}
    problems += unknown_keys(fields, PROMPT_FIELDS)
    problems += unknown_keys(job, (*converters, "fields"))
    given = {key: value for key, value in fields.items() if key in PROMPT_FIELDS}
    given |= {key: value for key, value in job.items() if key in converters and value is not None}
    converted: dict[str, Any] = {}
    for key, value in given.items():
        try:
            if value is not None:
                converted[key] = converters[key](value)
        except argparse.ArgumentTypeError as error:
            problems.append(f"{received(key)} {error}")
            if key == "prompt":
                converted[key] = "(refused)"  # so that it is not called missing as well
    return converted, problems


def slugify(title: str) -> str:
    """Make a file name of a prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", title[:80].lower()).strip("-")
    return slug[:60].strip("-") or "job"


def job_lines(content: bytes) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yield the number and the content of each line that holds a job."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            stripped = line.decode().strip()
        except UnicodeDecodeError as error:
            yield number, error
        else:
            if stripped and not stripped.startswith("#"):
                yield number, stripped


def read_jobs(values: dict[str, Any]) -> tuple[list[Draft], list[tuple[int, str]]]:
    """Read the jobs of a batch, and the problems of lines, by line number."""
    source = values["input"]
    lines = list(job_lines(read_file(source, "--input")))
    if not lines:
        raise UsageError([f"--input {source} holds no job; write one a line"])
    most = MAX_BATCH_API_JOBS if values["batch_api"] else MAX_JOBS
    if len(lines) > most:
        hint = "" if values["batch_api"] else f"; --batch-api takes {MAX_BATCH_API_JOBS:,}"
        raise UsageError(
            [f"--input {source} holds {len(lines):,} jobs; accepted are {most:,}{hint}"]
        )
    drafts = []
    problems = []
    for number, (line_number, line) in enumerate(lines, start=1):
        try:
            job, wrong = convert_job(parse_job_line(line))
        except ImageGenError as error:
            problems.append((line_number, str(error)))
            continue
        problems += [(line_number, problem) for problem in wrong]
        request = request_from_options({**values, "prompt": None, **job}, job.get("out"))
        name = job.get("out") or f"{number:03d}-{slugify(request.title)}"
        drafts.append(Draft(number, line_number, request, values["out_dir"], name))
    return drafts, problems


# ------------------------------------------------------------------------------- 6. plan of outputs


def downscaled_path(original: str, suffix: str) -> str:
    """Return the path of the downscaled copy of an image."""
    stem, extension = os.path.splitext(original)
    return stem + (suffix if suffix[:1] in ("-", "_") else f"-{suffix}") + extension


def plan_names(draft: Draft) -> Iterator[str]:
    """Yield the paths of a job's images."""
    request, name = draft.request, draft.name
    stem, extension = os.path.splitext(name or "")
    if name_format(name) is None:
        stem, extension = name or "", f".{request.output_format}"
    for variant in range(1, request.n + 1):
        if name is None:
            number = f"image_{variant}"
        else:
            number = stem if request.n == 1 else f"{stem}-{variant}"
        yield os.path.join(draft.folder, number + extension)


def partial_paths(original: str, count: int) -> tuple[str, ...]:
    """Return the paths of the drafts of a streamed image."""
    stem, extension = os.path.splitext(original)
    most = RANGES["partial_images"][1]
    return tuple(f"{stem}.partial-{number}{extension}" for number in range(1, min(count, most) + 1))


def plan_outputs(draft: Draft, options: RunOptions) -> Job:
    """Say which files a job makes. Looks at the disk for --skip-existing only; creates nothing."""
    outputs = []
    missing = []
    names = plan_names(draft) if 1 <= draft.request.n <= MAX_N else iter(())
    for name in names:
        copy = None
        if options.downscale_max_dim is not None:
            copy = downscaled_path(name, options.downscale_suffix)
        output = Output(
            path=name,
            copy=copy,
            partials=partial_paths(name, draft.request.partial_images or 0),
            replace=options.force,
            replace_copy=options.force or options.skip_existing,
        )
        if not (options.skip_existing and os.path.isfile(name)):
            missing.append(output)
        elif (picture := probe_file(name)) is None or not picture.whole:
            output = output._replace(replace=True)
            missing.append(output)
        outputs.append(output)
    request = draft.request
    if options.skip_existing:
        request = request._replace(n=len(missing))
    return Job(draft.number, draft.line, request, tuple(outputs), tuple(missing))


# ------------------------------------------------------------------- image files by their own bytes
# Not with Pillow: a dry run judges masks and inputs too, and needs no package.


def probe(file: BinaryIO) -> Picture | None:
    """Read format, size, alpha and wholeness of an image; None if it is none of FORMATS."""
    head = file.read(30).ljust(30, b"\0")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 12))
    tail = file.read()
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        width, height = big_endian(head[16:20]), big_endian(head[20:24])
        alpha = head[25] in (4, 6) or png_has_transparency_chunk(file)
        return Picture("png", width, height, alpha, tail[4:] == b"IEND\xaeB`\x82")
    if head.startswith(b"\xff\xd8\xff"):
        width, height, turned = jpeg_head(file)
        whole = width > 0 and tail.rstrip(b"\0").endswith(b"\xff\xd9")
        return Picture("jpeg", width, height, alpha=False, whole=whole, turned=turned)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        width, height, alpha = webp_size(head)
        return Picture("webp", width, height, alpha, size >= little_endian(head[4:8]) + 8)
    if head.startswith((b"GIF87a", b"GIF89a")):
        width, height = little_endian(head[6:8]), little_endian(head[8:10])
        return Picture("gif", width, height, gif_is_transparent(file), tail.endswith(b";"))
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE")):
        return svg_picture(file)
    return None


def probe_file(name: str) -> Picture | None:
    """Probe a file on disk."""
    try:
        with open(name, "rb") as file:
            return probe(file)
    except OSError:
        return None


def big_endian(data: bytes) -> int:
    """Read a number of PNG or JPEG."""
    return int.from_bytes(data, "big")


def little_endian(data: bytes) -> int:
    """Read a number of WebP."""
    return int.from_bytes(data, "little")


def png_has_transparency_chunk(file: BinaryIO) -> bool:
    """Look for tRNS, which stands before the first IDAT (PNG specification, 11.3.2)."""
    file.seek(8)
    while len(chunk := file.read(8)) == 8 and chunk[4:] not in (b"IDAT", b"IEND"):
        if chunk[4:] == b"tRNS":
            return True
        file.seek(big_endian(chunk[:4]) + 4, os.SEEK_CUR)
    return False


def jpeg_head(file: BinaryIO) -> tuple[int, int, bool]:
    """Read width, height, and whether the picture is stored on its side (ITU T.81, B.1.1)."""
    turned = False
    file.seek(2)
    while file.read(1) == b"\xff":
        while (marker := file.read(1)) == b"\xff":  # any number of fill bytes
            continue
        length = big_endian(file.read(2))
        if not marker or length < 2:
            break
        # SOF0 to SOF15, without DHT, JPG and DAC
        if marker[0] in range(0xC0, 0xD0) and marker[0] not in (0xC4, 0xC8, 0xCC):
            frame = file.read(5)
            return big_endian(frame[3:5]), big_endian(frame[1:3]), turned
        segment = file.tell()
        if marker == b"\xe1":
            turned = turned or exif_turns(file.read(length - 2))
        file.seek(segment + length - 2)
    return 0, 0, turned


def exif_turns(segment: bytes) -> bool:
    """Tell whether an APP1 segment's Orientation (tag 0x0112) is 5 to 8, a quarter turn."""
    order: Literal["little", "big"] = "little" if segment[6:8] == b"II" else "big"
    tag, kind = (number.to_bytes(2, order) for number in (0x0112, 3))
    found = re.search(re.escape(tag + kind) + rb".{4}(..)", segment, re.DOTALL)
    return (
        segment.startswith(b"Exif\0\0")
        and found is not None
        and int.from_bytes(found[1], order) in range(5, 9)
    )


def webp_size(head: bytes) -> tuple[int, int, bool]:
    """Read width, height and alpha of the three kinds of WebP (RFC 9649, section 2)."""
    if head[12:16] == b"VP8X":
        return (
            little_endian(head[24:27]) + 1,
            little_endian(head[27:30]) + 1,
            bool(head[20] & 0x10),
        )
    if head[12:16] == b"VP8L":
        bits = little_endian(head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    return little_endian(head[26:28]) & 0x3FFF, little_endian(head[28:30]) & 0x3FFF, False


def gif_is_transparent(file: BinaryIO) -> bool:
    """Look for a graphic control extension with its transparency flag (GIF89a, section 23)."""
    file.seek(0)
    blocks = re.findall(rb"\x21\xf9\x04([\x00-\xff])", file.read())
    return any(flags[0] & 1 for flags in blocks)


def svg_picture(file: BinaryIO) -> Picture | None:
    """Read the size that an SVG's root element gives in numbers, 0 where it gives none."""
    file.seek(0)
    content = file.read().decode("utf-8", "replace")
    root = re.search(r"<svg\b[^>]*>", content)
    if root is None:
        return None
    width, height = (
        int(match[1])
        if (match := re.search(rf'\s{edge}="([0-9]{{1,6}})(\.[0-9]*)?(px)?"', root[0]))
        else 0
        for edge in ("width", "height")
    )
    return Picture("svg", width, height, alpha=True, whole=content.rstrip().endswith("</svg>"))


# ------------------------------------------------------------------------------------- 7. preflight
# Generators of findings: a fatal one is reported with all the others, before any request.


class Finding(NamedTuple):
    """Something to tell before a request: a problem, or (not fatal) a warning."""

    text: str
    fatal: bool = True


def model_family(model: str) -> ModelFamily | None:
    """Return the row of a model: its name, or its name with a dash and more."""
    for family in MODEL_FAMILIES:
        if f"{model}-".startswith(f"{family.prefix}-"):
            return family
    return None


def days_left(family: ModelFamily) -> float:
    """Return how many days a family's models are still served; negative when it is over."""
    from datetime import UTC, date, datetime

    if not family.shut_down:
        return float("inf")
    return (date.fromisoformat(family.shut_down) - datetime.now(UTC).date()).days


def models_with(able: Callable[[ModelFamily], bool]) -> str:
    """List the models of the families that can do something, newest first, and their ends."""
    return listing(
        f"{name} until {row.shut_down}" if row.shut_down else name
        for row in MODEL_FAMILIES
        if able(row) and days_left(row) >= 0
        for name in row.models or (row.prefix,)
    )


def check_size(request: ImageRequest, family: ModelFamily) -> Iterator[Finding]:
    """Check the size against the list of the family, or against the rules of free sizes."""
    size = request.size
    if family.sizes:
        if size not in family.sizes:
            yield Finding(
                f"size {received(size)}: {request.model} makes {listing(family.sizes)} only"
            )
        return
    if size == "auto":
        return
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if not match:
        yield Finding(f"size {received(size)} has to be auto or WIDTHxHEIGHT, e.g. 1536x1024")
        return
    width, height = int(match[1]), int(match[2])
    if width % EDGE_STEP or height % EDGE_STEP:
        near = "x".join(
            str(max(1, round(edge / EDGE_STEP)) * EDGE_STEP) for edge in (width, height)
        )
        yield Finding(f"size {size}: both edges have to be multiples of {EDGE_STEP}, e.g. {near}")
    if max(width, height) > MAX_EDGE:
        yield Finding(f"size {size}: the longer edge can be at most {MAX_EDGE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield Finding(f"size {size}: the longer edge can be at most {MAX_ASPECT} times the shorter")
    if not MIN_PIXELS <= width * height <= MAX_PIXELS:
        yield Finding(
            f"size {size} has {width * height:,} pixels; accepted are "
            f"{MIN_PIXELS:,} to {MAX_PIXELS:,}"
        )
    elif width * height > EXPERIMENTAL_PIXELS:
        yield Finding(f"size {size}: above 2560x1440 pixels the API is experimental", fatal=False)


def check_transparency(request: ImageRequest, family: ModelFamily) -> Iterator[Finding]:
    """Check that the model can make a transparent background."""
    if request.background == "transparent" and not family.transparent:
        able = models_with(lambda row: row.transparent)
        yield Finding(
            f"background transparent is not supported by {request.model}; use a --model that has "
            f"it ({able}), or ask for a flat key colour and cut it out with remove_chroma_key.py"
        )


def check_format(request: ImageRequest, options: RunOptions) -> Iterator[Finding]:
    """Check that the output format can do what else is asked for."""
    asked = FORMATS.get(request.output_format)
    if asked is None:
        return
    for what, given, ability in (
        ("background transparent", request.background == "transparent", "has_alpha"),
        ("output_compression", request.output_compression is not None, "compresses"),
        ("frame_count", request.frame_count is not None, "animates"),
        ("frame_duration_ms", request.frame_duration_ms is not None, "animates"),
        ("partial_images", request.partial_images is not None, "streams"),
        ("mask", request.mask is not None, "masks"),
    ):
        if given and not getattr(asked, ability):
            able = [name for name, row in FORMATS.items() if getattr(row, ability)]
            yield Finding(
                f"{what} needs output_format {' or '.join(able)}, not {request.output_format}"
            )
    if options.downscale_max_dim is not None and not asked.downscales:
        yield Finding(f"--downscale-max-dim: {request.output_format} has no pixels to downscale")
    if asked.max_n < request.n <= MAX_N:
        yield Finding(f"n {request.n}: {request.output_format} is made one at a time")


def check_fidelity(request: ImageRequest, family: ModelFamily) -> Iterator[Finding]:
    """Check input_fidelity, which the newer families do not have."""
    fidelity = request.input_fidelity
    if fidelity is None:
        return
    if not request.image:
        yield Finding("input_fidelity is for edits: give an image with it")
    if not family.fidelities:
        yield Finding(f"input_fidelity: leave it out, {request.model} always uses high fidelity")
    elif fidelity in FIDELITIES and fidelity not in family.fidelities:
        yield Finding(
            f"input_fidelity {fidelity}: {listing(family.fidelities)} is documented for "
            f"{request.model}; it is sent as it is",
            fatal=False,
        )


def check_model(request: ImageRequest) -> Iterator[Finding]:
    """Check the model, and what its family can do."""
    if not re.fullmatch(r"gpt-image-[0-9A-Za-z][0-9A-Za-z._:-]*", request.model):
        yield Finding(
            f"model {received(request.model)} is no GPT Image model; "
            f"use one whose name begins with gpt-image-, e.g. {DEFAULT_MODEL}"
        )
        return
    family = model_family(request.model)
    if family is None:
        family = MODEL_FAMILIES[0]
        yield Finding(
            f"model {request.model} is not known here; it is checked by the rules of "
            f"{family.prefix}, and the API decides",
            fatal=False,
        )
    elif request.model == family.prefix and family.models:
        yield Finding(
            f"model {request.model} is a family; its models are {listing(family.models)}",
            fatal=False,
        )
    yield from check_shut_down(request.model, family)
    quality, output_format = request.quality, request.output_format
    if quality not in family.qualities:
        able = models_with(lambda row: quality in row.qualities)
        yield Finding(
            f"quality {received(quality)}: {request.model} has {listing(family.qualities)}"
            + (f"; models with it: {able}" if able else "")
        )
    if output_format in FORMATS and output_format not in family.formats:
        able = models_with(lambda row: output_format in row.formats)
        yield Finding(
            f"output_format {output_format}: {request.model} makes {listing(family.formats)}; "
            f"models with it: {able}"
        )
    yield from check_size(request, family)
    yield from check_transparency(request, family)
    yield from check_fidelity(request, family)
    if request.markup is not None and not family.markup:
        able = models_with(lambda row: row.markup)
        yield Finding(f"markup is not supported by {request.model}; models with it: {able}")


def check_shut_down(model: str, family: ModelFamily) -> Iterator[Finding]:
    """Warn of a model that is gone, or will be soon."""
    days = days_left(family)
    if days < SHUT_DOWN_NOTICE_DAYS:
        ends = "was shut down on" if days < 0 else "shuts down on"
        yield Finding(
            f"model {model} {ends} {family.shut_down}; use {family.successor}", fatal=False
        )


def check_prompt(request: ImageRequest) -> Iterator[Finding]:
    """Check that there is a prompt, and not too much of it."""
    if not request.title:
        yield Finding("the prompt is missing or empty")
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        yield Finding(
            f"the prompt has {len(request.prompt):,} characters with its labelled lines; "
            f"at most {MAX_PROMPT_CHARACTERS:,} are accepted"
        )


def check_request(request: ImageRequest, options: RunOptions) -> Iterator[Finding]:
    """Check all that can be judged without looking at the disk."""
    yield from check_prompt(request)
    for key, accepted in (
        ("background", BACKGROUNDS),
        ("output_format", FORMATS),
        ("moderation", MODERATIONS),
        ("complexity", COMPLEXITIES),
        ("input_fidelity", FIDELITIES),
    ):
        value = getattr(request, key)
        if value is not None and value not in accepted:
            yield Finding(f"{key} {received(value)}: accepted are {listing(accepted)}")
    for key, (low, high) in RANGES.items():
        number = getattr(request, key)
        if number is not None and not low <= number <= high:
            yield Finding(f"{key} {number}: accepted are {low} to {high:,}")
    if request.partial_images and request.n > 1:
        yield Finding(
            f"partial_images with n {request.n}: a stream does not say which image it shows"
        )
    for key in ("partial_images", "markup"):
        if options.batch_api and getattr(request, key):
            yield Finding(f"{key} cannot be sent through --batch-api; leave it out")
    yield from check_format(request, options)
    yield from check_model(request)


def check_draft(draft: Draft, options: RunOptions) -> Iterator[Finding]:
    """Check a request, and that its name does not promise another format than it asks for."""
    request = draft.request
    yield from check_request(request, options)
    promised, wanted = name_format(draft.name), request.output_format
    if promised not in (None, wanted) and wanted in FORMATS:
        stem = os.path.splitext(draft.name or "")[0]
        yield Finding(
            f"the name {draft.name} says {promised}, output_format says {wanted}: "
            f"call it {stem}.{wanted}, or ask for output_format {promised}"
        )


class InputFile(NamedTuple):
    """What preflight learns of an input file."""

    problem: str | None
    bytes: int = 0
    picture: Picture | None = None


def inspect_input(name: str) -> InputFile:
    """Look at an input image or mask."""
    try:
        size = os.path.getsize(name)
        if not os.path.isfile(name):
            return InputFile("is a folder" if os.path.isdir(name) else "is no regular file")
        with open(name, "rb") as file:
            picture = probe(file)
    except OSError as error:
        return InputFile(f"cannot be read: {error.strerror or error}")
    if size >= MAX_IMAGE_BYTES:
        return InputFile(f"has {size:,} bytes; it has to be smaller than {MAX_IMAGE_BYTES:,}")
    if picture is None or not FORMATS[picture.format].is_input:
        return InputFile("is no PNG, JPEG or WebP file by its first bytes")
    if not picture.width * picture.height:
        return InputFile(f"has no size: the head of the {picture.format} file is damaged")
    return InputFile(None, size, picture)


def check_inputs(request: ImageRequest, inspect: Callable[[str], InputFile]) -> Iterator[Finding]:
    """Check the input images and the mask."""
    if len(request.image) > MAX_IMAGES:
        yield Finding(f"{len(request.image)} input images; at most {MAX_IMAGES} are accepted")
    for name in request.image:
        file = inspect(name)
        if file.problem:
            yield Finding(f"image {name} {file.problem}")
        elif file.picture and not file.picture.whole:
            yield Finding(f"image {name} does not end as a {file.picture.format} does", fatal=False)
    for key, overlay in (("mask", request.mask), ("markup", request.markup)):
        if overlay is not None:
            yield from check_overlay(key, overlay, request, inspect)
    if request.markup is not None and request.mask is not None:
        yield Finding("mask and markup cannot be combined; give one of them")


def check_overlay(
    key: str, name: str, request: ImageRequest, inspect: Callable[[str], InputFile]
) -> Iterator[Finding]:
    """Check a mask or a markup, which lie over the first image."""
    if not request.image:
        yield Finding(f"{key} is for edits: give an image with it")
        return
    overlay, first = inspect(name), inspect(request.image[0])
    if overlay.picture is None:
        yield Finding(f"{key} {name} {overlay.problem}")
        return
    if not overlay.picture.alpha:
        yield Finding(f"{key} {name} has no alpha channel; it has to be a transparent PNG")
    if first.picture:
        stored = first.picture
        upright = stored._replace(width=stored.height, height=stored.width)
        # A photograph may be stored on its side. The API wants a markup that is drawn upright, and
        # does not say which way it wants a mask.
        wanted = upright if stored.turned and key == "markup" else stored
        size = overlay.picture.size
        if size != wanted.size:
            yield Finding(
                f"{key} {name} is {size}, the first image {wanted.size}; both need one size",
                fatal=not (stored.turned and key == "mask" and size == upright.size),
            )
    if overlay.picture.format != "png":
        yield Finding(f"{key} {name} is no PNG; the API documents PNG only", fatal=False)
    if key == "mask" and overlay.bytes > MAX_MASK_BYTES:
        yield Finding(
            f"mask {name} has {overlay.bytes:,} bytes; the SDK documents less than "
            f"{MAX_MASK_BYTES:,}",
            fatal=False,
        )


def check_run(options: RunOptions) -> Iterator[Finding]:
    """Check the options of the run."""
    for key, value, limit in (
        ("concurrency", options.concurrency, MAX_CONCURRENCY),
        ("max-attempts", options.max_attempts, MAX_ATTEMPTS),
    ):
        if not 1 <= value <= limit:
            yield Finding(f"--{key} {value}: accepted are 1 to {limit}")
    if options.downscale_max_dim is not None:
        yield from check_downscaling(options.downscale_max_dim, options.downscale_suffix)
    sheet = options.contact_sheet
    if sheet is not None and name_format(sheet) not in PICTURE_FORMATS:
        yield Finding(f"--contact-sheet {sheet}: the name has to end with .png, .jpg or .webp")
    other_concurrency = options.concurrency != DEFAULT_CONCURRENCY
    for key, given, for_batch_api in (
        ("no-wait", options.no_wait, True),
        ("cancel", options.cancel, True),
        ("concurrency", other_concurrency, False),
        ("fail-fast", options.fail_fast, False),
    ):
        if given and options.batch_api and not for_batch_api:
            yield Finding(f"--{key} means nothing with --batch-api", fatal=False)
        elif given and for_batch_api and not options.batch_api:
            yield Finding(f"--{key} needs --batch-api")


def check_downscaling(max_dim: int, suffix: str) -> Iterator[Finding]:
    """Check the size and the name of the downscaled copies."""
    if max_dim < 1:
        yield Finding(f"--downscale-max-dim {max_dim}: accepted are 1 and more")
    if not suffix:
        yield Finding(
            "--downscale-suffix is empty: the copy would overwrite the original; "
            f"give a suffix such as {DEFAULT_DOWNSCALE_SUFFIX}"
        )
    elif "/" in suffix or os.sep in suffix:
        yield Finding(f"--downscale-suffix {suffix}: no path separator, please")


def check_folder(folder: str) -> Iterator[Finding]:
    """Check that files can be made in a folder, which may be made first."""
    existing = folder or "."
    while not os.path.lexists(existing) and os.path.dirname(existing) != existing:
        existing = os.path.dirname(existing) or "."
    if not os.path.isdir(existing):
        yield Finding(f"{existing} is a file; a folder is needed for the images")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(f"folder {existing} is not writable")


def same_file(name: str) -> str:
    """Return one spelling for one file, also on disks that do not tell A from a."""
    from unicodedata import normalize

    return normalize("NFC", os.path.realpath(name)).lower()


class Target(NamedTuple):
    """A file that the run will write, or (an image that is there) keep."""

    job: Job | None
    name: str
    replace: bool
    what: str
    is_draft: bool = False


def targets(jobs: Sequence[Job], options: RunOptions) -> Iterator[Target]:
    """Yield every file of a run."""
    for job in jobs:
        for output in job.outputs:
            kept = output not in job.missing
            yield Target(job, output.path, output.replace or kept, f"{job.where}the image")
            if output.copy:
                what = f"{job.where}the downscaled copy"
                yield Target(job, output.copy, output.replace_copy, what)
            for name in output.partials:
                what = f"{job.where}a partial image"
                yield Target(job, name, output.replace_copy, what, is_draft=True)
    if options.contact_sheet:
        replace = options.force or options.skip_existing
        yield Target(None, options.contact_sheet, replace, "the contact sheet")


def check_target(target: Target) -> Iterator[Finding]:
    """Check that a file can be made under a name."""
    name = target.name
    if os.path.isdir(name):
        yield Finding(f"{name} is a folder; an image is to be written there")
    elif os.path.lexists(name) and not target.replace:
        other = "replace it too" if target.is_draft else "keep it"
        yield Finding(
            f"{name} exists; choose another name, --force to replace it, "
            f"or --skip-existing to {other}"
        )
    elif any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in name.split(os.sep)):
        yield Finding(f"a name of over {MAX_NAME_BYTES} bytes: {received(name)}")
    elif len(os.fsencode(os.path.abspath(name))) > MAX_PATH_BYTES:
        yield Finding(f"a path of over {MAX_PATH_BYTES:,} bytes: {received(name)}")


def check_outputs(jobs: Sequence[Job], options: RunOptions) -> Iterator[tuple[Job | None, Finding]]:
    """Check that every file can be made, and that no two are the same."""
    inputs = {same_file(name) for job in jobs for name in job.request.files}
    taken: dict[str, str] = {}
    folders: dict[str, Job | None] = {}
    for target in targets(jobs, options):
        job, name, what = target.job, target.name, target.what
        key = same_file(name)
        if key in inputs:
            yield job, Finding(f"{name} is an input image; it cannot be written as well")
        elif key in taken:
            yield job, Finding(f"{name} would be written twice: as {what} and as {taken[key]}")
        else:
            yield from ((job, finding) for finding in check_target(target))
        taken.setdefault(key, what)
        folders.setdefault(os.path.dirname(name), job)
    for folder, job in folders.items():
        yield from ((job, finding) for finding in check_folder(folder))
    images = sum(len(job.outputs) for job in jobs)
    if options.contact_sheet and images > MAX_SHEET_IMAGES:
        yield None, Finding(f"--contact-sheet holds {MAX_SHEET_IMAGES:,} images, not {images:,}")


def is_base_url(value: str) -> bool:
    """Tell whether a URL names a host to ask, and a port that exists."""
    from urllib.parse import urlsplit

    try:
        url = urlsplit(value)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def check_environment(*, pillow: bool) -> Iterator[Finding]:
    """Check the key and the packages, which only a live run needs."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        yield Finding("OPENAI_API_KEY is not set; export OPENAI_API_KEY=…, or use --dry-run")
    elif not key.isascii() or not key.isprintable() or " " in key:
        yield Finding(
            "OPENAI_API_KEY holds white space or characters that no key has; copy it again"
        )
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        value = os.environ.get(name, "")
        if not value.isascii() or (value and not value.isprintable()):
            yield Finding(f"{name} holds characters that no header can carry: {received(value)}")
    base_url = os.environ.get("OPENAI_BASE_URL", "")
    if base_url and not is_base_url(base_url):
        yield Finding(f"OPENAI_BASE_URL {received(base_url)} has to begin with https:// and a host")
    from importlib.util import find_spec

    for module, package, needed in (("openai", "openai", True), ("PIL", "pillow", pillow)):
        if needed and find_spec(module) is None:
            yield Finding(
                f"the package {package} is missing: {sys.executable or 'python3'} -m pip install "
                f"{package}  (or run the script with uv run)"
            )


def preflight(
    drafts: Sequence[Draft],
    jobs: Sequence[Job],
    options: RunOptions,
    problems: Iterable[tuple[int, str]],
) -> list[str]:
    """Check everything that can be known before the first request; return the warnings.

    Raises a UsageError with all problems of all jobs, the given ones of the reader included.
    """
    import functools

    inspect = functools.cache(inspect_input)
    found = [(line, Finding(problem)) for line, problem in problems]
    found += [(0, finding) for finding in check_run(options)]
    for draft in drafts:
        found += [(draft.line, finding) for finding in check_draft(draft, options)]
        if not options.submitted:
            found += [(draft.line, finding) for finding in check_inputs(draft.request, inspect)]
    if options.keep_partials and not any(draft.request.partial_images for draft in drafts):
        notice = "--keep-partials means nothing without --partial-images"
        found.append((0, Finding(notice, fatal=False)))
    found += [(job.line if job else 0, finding) for job, finding in check_outputs(jobs, options)]
    if not options.dry_run:
        pillow = options.downscale_max_dim is not None or options.contact_sheet is not None
        found += [(0, finding) for finding in check_environment(pillow=pillow)]
    found.sort(key=lambda entry: entry[0])
    if any(finding.fatal for _, finding in found):
        raise UsageError(folded((line, finding.text) for line, finding in found if finding.fatal))
    return folded((line, finding.text) for line, finding in found)


def folded(findings: Iterable[tuple[int, str]]) -> list[str]:
    """Return each text once, with the lines that it concerns."""
    lines: dict[str, list[int]] = {}
    for line, finding in findings:
        if line not in lines.setdefault(finding, []):
            lines[finding].append(line)
    return [place_of(places[0]) + finding + others(places[1:]) for finding, places in lines.items()]


def others(lines: Sequence[int]) -> str:
    """Name further lines, the first ten of them."""
    if not lines:
        return ""
    more = f" and {len(lines) - 10:,} more" if len(lines) > 10 else ""
    return f" (also line{'' if len(lines) == 1 else 's'} {listing(map(str, lines[:10]))}{more})"


# --------------------------------------------------------------------------------------- 8. dry run


def document(job: Job, *, numbered: bool) -> dict[str, Any]:
    """Return what would be sent for a job, and the files that it would make."""
    shown: dict[str, Any] = {
        **job.request.payload,
        "endpoint": job.request.endpoint,
        "outputs": [output.path for output in job.missing],
        "outputs_downscaled": [output.copy for output in job.missing if output.copy] or None,
    }
    if job.request.image:
        shown["image"] = list(job.request.image)
    for key in ("mask", "markup"):
        if name := getattr(job.request, key):
            shown[key] = name
    if numbered:
        shown["job"] = job.number
    return shown


def batch_line(job: Job, file_ids: Mapping[str, str]) -> dict[str, Any]:
    """Return the line of a job for the Batch API; file_ids says what stands for an input file."""
    request = job.request
    body = request.payload
    if request.image:
        body["images"] = [{"file_id": file_ids[name]} for name in request.image]
    if request.mask:
        body["mask"] = {"file_id": file_ids[request.mask]}
    custom_id = f"job-{job.number}"
    return {"custom_id": custom_id, "method": "POST", "url": request.endpoint, "body": body}


def show_job(job: Job, options: RunOptions, *, numbered: bool) -> str:
    """Return what a dry run prints for a job."""
    if options.batch_api:
        return as_json(batch_line(job, {name: f"upload of {name}" for name in job.request.files}))
    return as_json(document(job, numbered=numbered), indent=None if options.json else 2)


def as_json(value: object, *, indent: int | None = None) -> str:
    """Return JSON with sorted keys, in characters that stdout can carry."""
    unicode_ = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=not unicode_)


# ------------------------------------------------------------------------------------------ 9. send

NO_MONEY_CODES = (
    "insufficient_quota",
    "credit_balance_exhausted",
    "billing_hard_limit_reached",
    "organization_usage_limit_exceeded",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
)
# What an answer means: what to do about it, and the kind of failure. The code, if known, decides.
VERDICT_BY_CODE = {
    **dict.fromkeys(NO_MONEY_CODES, ("stop run", "quota")),
    "moderation_blocked": ("fail", "moderation"),
    "model_not_found": ("stop model", "unknown_model"),
    "rate_limit_exceeded": ("wait", "rate_limit"),
    "slow_down": ("wait", "rate_limit"),
    "server_error": ("retry", "server"),
}
VERDICT_BY_STATUS = {
    401: ("stop run", "authentication"),
    403: ("stop model", "permission"),
    404: ("stop model", "unknown_model"),
    408: ("retry", "timeout"),
    409: ("retry", "conflict"),
    429: ("wait", "rate_limit"),
}
REMEDIES = {
    "quota": "add credit or raise the limit of the account",
    "authentication": "check OPENAI_API_KEY",
    "permission": "ask for access to the model, or choose another with --model",
    "unknown_model": "choose another with --model",
    "moderation": "change the prompt or the input image",
}
# Gateways that lost the answer of a server that may have done the work.
LOST_ANSWER_STATUSES = (502, 504)
# What the HTTP API takes and the SDK's method has no argument for (SDK 3.54, images.edit).
EXTRA_BODY_KEYS = ("moderation",)

BACK_OFF_SECONDS = 0.5
MAX_BACK_OFF_SECONDS = 30.0
LEAST_ADVICE_SECONDS = 0.01  # "now", or a date that has passed by our clock, is no advice
CONNECT_SECONDS = 20.0
# The first requests leave one after the other, so that a small limit shows before all are out.
RAMP_SECONDS = 0.003
# A pace that was learnt from a refusal grows by this share with each request the server takes.
PACE_GROWTH = 0.005


class StoppedError(JobError):
    """Nothing more is to be sent for this job, for a reason that lies outside of it."""


class Verdict(NamedTuple):
    """What to do about an error: "retry", "wait", "fail", "stop model" or "stop run"."""

    action: str
    failure: Failure
    advised: float | None = None  # seconds that the server asks to wait
    request_id: str | None = None


def one_line(message: object) -> str:
    """Return a message of the other side so that it can stand in one line of ours."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(message)).split())
    return line if len(line) <= 600 else line[:600] + "…"


def parse_seconds(value: str) -> float | None:
    """Read a number of seconds, or an HTTP date as the seconds until then."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    try:
        number = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)
        except (ValueError, OverflowError):
            return None
        return max(0.0, until.total_seconds())
    return number if 0 <= number < float("inf") else None


def parse_duration(value: str) -> float | None:
    """Read 6m0s, 1.5s or 120ms, as x-ratelimit-reset-* has them; seconds."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    number = r"[0-9]+(?:\.[0-9]+)?"
    if not re.fullmatch(rf"(?:{number}(?:ms|h|m|s))+", value):
        return None
    parts = re.findall(rf"({number})(ms|h|m|s)", value)
    return sum(float(amount) * units[unit] for amount, unit in parts)


def advised_delay(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the server asks to wait, by the first header that says it."""
    milliseconds = parse_seconds(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    delay = parse_seconds(headers.get("retry-after", ""))
    if delay is not None:
        return delay
    kinds = ("requests", "tokens")
    spent = [kind for kind in kinds if headers.get(f"x-ratelimit-remaining-{kind}") == "0"]
    resets = [
        parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in spent or kinds
    ]
    return max((reset for reset in resets if reset is not None), default=None)


def judge(
    status: int, said: object, request_id: str | None = None, advised: float | None = None
) -> Verdict:
    """Judge an error that the API answered with; said is its error object, or what came instead.

    An error inside a stream or a batch has no status of its own: 0.
    """
    fields = said if isinstance(said, dict) else {"message": said}
    code, kind_of_error = fields.get("code"), fields.get("type")
    by_code = VERDICT_BY_CODE.get(str(code)) or VERDICT_BY_CODE.get(str(kind_of_error))
    server = ("retry", "server") if status >= 500 else ("fail", "invalid_request")
    action, kind = by_code or VERDICT_BY_STATUS.get(status, server)
    remedy = f" ({REMEDIES[kind]})" if kind in REMEDIES else ""
    request = f" [{request_id}]" if request_id else ""
    message = one_line(fields.get("message") or "no explanation")
    number = f", HTTP {status}" if status else ""
    failure = Failure(
        kind,
        f"{kind.replace('_', ' ')}{number}: {message}{remedy}{request}",
        str(code or status or "") or None,
        retryable=action in ("retry", "wait"),
        maybe_billed=status in LOST_ANSWER_STATUSES,
    )
    return Verdict(action, failure, advised, request_id)


def classify(error: Exception) -> Verdict:
    """Judge what the SDK raised for one request."""
    import httpx2
    import openai

    if isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError):
        status = error.status_code if isinstance(error, openai.APIStatusError) else 0
        response = getattr(error, "response", None)
        headers = response.headers if response is not None else {}
        said = error.body if isinstance(error.body, dict) else error.body or error.message
        return judge(status, said, headers.get("x-request-id"), advised_delay(headers))
    cause = error.__cause__ or error
    unsent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
    hopeless = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL)
    late = isinstance(error, (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError))
    reason = one_line(cause) or type(cause).__name__
    failure = Failure(
        "timeout" if late else "connection",
        "no answer in time" if late else f"the connection failed: {reason}",
        retryable=not isinstance(cause, hopeless),
        maybe_billed=not isinstance(cause, (*unsent, *hopeless)),
    )
    return Verdict("retry" if failure.retryable else "fail", failure)


def retry_delay(verdict: Verdict, attempt: int) -> float:
    """Return the seconds to wait: as the server says, else exponential with full jitter."""
    import random

    if verdict.advised is not None and verdict.advised >= LEAST_ADVICE_SECONDS:
        return verdict.advised
    ceiling = min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2.0 ** (attempt - 1))
    return random.uniform(0.0, ceiling)


class Halt:
    """Whether anything more may be sent, for the run and for each model."""

    def __init__(self) -> None:
        import asyncio

        self.changed = asyncio.Event()
        self.run: Failure | None = None
        self.models: dict[str, Failure] = {}

    def stop_run(self, failure: Failure) -> None:
        """Send nothing more."""
        self.run = self.run or failure
        self.changed.set()

    def check(self, job: Job | None = None) -> None:
        """Raise StoppedError if nothing, or this job, is to be sent any more."""
        failure = self.run or (job and self.models.get(job.request.model))
        if failure is not None:
            raise StoppedError(failure)

    async def sleep(self, duration: float) -> None:
        """Sleep, but no longer than the run goes on."""
        import asyncio

        try:
            await asyncio.wait_for(self.changed.wait(), max(0.0, duration))
        except TimeoutError:
            return


def gave_up(last: Failure) -> JobError:
    """Return the error of what has waited long enough, for the last reason that it had."""
    message = f"gave up, --max-wait is spent: {last.message}"
    return JobError(last._replace(message=message, retryable=True))


class Exchange:
    """What happens between a job and the API, kept up while it happens."""

    def __init__(self, max_wait: float) -> None:
        self.started: float | None = None  # when the job got its slot
        self.attempts = 0  # requests, without those that were refused for the rate
        self.requests = 0  # those included
        self.patience = max_wait  # seconds left to wait for the rate limit
        self.request_id: str | None = None
        self.partials: list[str] = []  # drafts that a stream has left on disk
        self.maybe_billed = False
        self.untouched = False  # the run stopped before anything was sent for this job
        self.last: Failure | None = None

    def gave_up(self) -> JobError:
        """Return the error of a job that waited long enough."""
        return gave_up(self.last or Failure("rate_limit", "rate limit"))


class RateGate:
    """What all requests of a run pass: a pause for all, and then the pace that the server takes.

    The server tells when to come back and not how fast to go on. So the gate counts: the requests
    that were taken between two pauses, over the time until the server takes requests again, are the
    pace. A pace that is too slow grows, one that is too fast is refused and counted anew.
    """

    def __init__(self, halt: Halt, notify: Callable[[float], None]) -> None:
        import asyncio

        self.halt = halt
        self.notify = notify
        self.clock = asyncio.get_running_loop().time
        self.line = asyncio.Lock()
        self.interval = RAMP_SECONDS
        self.next_at = self.opened_at = 0.0
        self.paused_at = self.resume_at = 0.0  # the last pause
        self.paused_before = 0.0  # seconds of all pauses but the last
        self.period = 0  # counts the pauses
        self.sent = self.refused = 0
        self.paced = False

    @property
    def paused(self) -> float:
        """How many seconds the run has been paused so far."""
        return self.paused_before + min(self.clock(), self.resume_at) - self.paused_at

    async def admit(self, job: Job, exchange: Exchange) -> int:
        """Wait for this job's turn; return the period in which it is sent.

        Raises a JobError when the pauses exceed what the job has patience for.
        """
        paused = self.paused
        async with self.line:
            while (delay := max(self.resume_at, self.next_at) - self.clock()) > 0:
                self.halt.check(job)
                if self.paused - paused + self.resume_at - self.clock() > exchange.patience:
                    raise exchange.gave_up()
                await self.halt.sleep(delay)
            self.halt.check(job)
            exchange.patience -= self.paused - paused
            now = self.clock()
            if self.sent == 0:
                self.opened_at = now
            elif self.refused:
                self.period += 1
                self.opened_at, self.sent, self.refused = now, 0, 0
            self.sent += 1
            self.next_at = now + self.interval
            return self.period

    def taken(self) -> None:
        """Note that the server answered a request with an image."""
        self.interval = self.interval / (1 + PACE_GROWTH) if self.paced else 0.0

    def refuse(self, period: int, delay: float) -> None:
        """Pause all jobs for so many seconds, and learn the pace of the period that ends."""
        now = self.clock()
        if period < self.period:  # answered late: the pause it asks for has been made
            return
        if now >= self.resume_at:
            self.paused_before = self.paused
            self.paused_at = self.resume_at = now
        if not self.refused:
            self.notify(delay)
        self.refused += 1
        self.paced = True
        self.resume_at = max(self.resume_at, now + delay)
        taken = max(1, self.sent - self.refused)
        self.interval = (self.resume_at - self.opened_at) / taken


class Spool:
    """The raw body of an answer, outside the heap: some 4K answers at once would fill it."""

    def __init__(self) -> None:
        import tempfile

        self._file: FileIO | None
        self._rest = bytearray()
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError:
            self._file = None

    def write(self, chunk: bytes) -> None:
        """Append; what the disk for temporary files does not take stays in memory."""
        written = 0
        if self._file is not None and not self._rest:
            try:
                written = self._file.write(chunk)
            except OSError:
                written = 0
        self._rest += chunk[written:]

    def read(self) -> bytes:
        """Return everything, once."""
        head = b""
        if self._file is not None:
            self._file.seek(0)
            head = self._file.read()
        self.close()
        return head + self._rest if self._rest else head

    def close(self) -> None:
        """Drop the file."""
        if self._file is not None:
            self._file.close()


def upload(stack: ExitStack, name: str, sent_name: str) -> tuple[str, BinaryIO, str]:
    """Open a file part; its name and content type are those of its bytes, whatever its suffix."""
    file = stack.enter_context(open(name, "rb"))  # noqa: SIM115
    picture = probe(file)
    file.seek(0)
    kind = picture.format if picture else DEFAULT_FORMAT
    return f"{sent_name}.{kind}", file, FORMATS[kind].content_type


def sdk_arguments(request: ImageRequest, stack: ExitStack) -> dict[str, Any]:
    """Return a request as the arguments of the SDK's method, with the files opened."""
    arguments = request.payload
    if request.image:
        extra = {key: arguments.pop(key) for key in EXTRA_BODY_KEYS if key in arguments}
        images = [
            upload(stack, name, f"image_{number}")
            for number, name in enumerate(request.image, start=1)
        ]
        # One image goes out as "image", several as "image[]".
        arguments["image"] = images[0] if len(images) == 1 else images
        for key in ("mask", "markup"):
            if name := getattr(request, key):
                arguments[key] = upload(stack, name, key)
        arguments["extra_body"] = extra or None
    return arguments


async def follow_stream(
    response: AsyncAPIResponse[Any], job: Job, run: Run, exchange: Exchange
) -> bytes:
    """Write the drafts of a streamed image as they arrive; return its end as a plain answer is."""
    import asyncio

    import httpx2
    import openai

    loop = asyncio.get_running_loop()
    output = job.missing[0]
    drafts = list(output.partials)
    try:
        async for event in await response.parse():
            kind = str(getattr(event, "type", ""))
            if kind == "error":
                body = event.model_dump()
                raise openai.APIError(str(body.get("message")), response.http_request, body=body)
            if kind.endswith(".completed"):
                data = [{"b64_json": event.b64_json}]
                return json.dumps({**event.model_dump(exclude={"b64_json"}), "data": data}).encode()
            if kind.endswith(".partial_image") and drafts:
                saved = await loop.run_in_executor(
                    run.savers, save_partial, drafts[0], event.b64_json, output.replace_copy
                )
                if saved is not None:
                    del drafts[0]
                    exchange.partials.append(saved)
                    run.report.note(f"{job.where}draft {len(exchange.partials)}: {saved}")
    except (ValueError, AttributeError, TypeError) as error:
        raise bad_answer(f"the stream is damaged: {one_line(error)}") from None
    raise httpx2.RemoteProtocolError("the stream ended before the image")


async def post(job: Job, run: Run, exchange: Exchange) -> Spool:
    """Send one request; return the raw body of its answer."""
    import asyncio
    from contextlib import ExitStack

    request = job.request
    images = run.client.images.with_streaming_response
    method = images.edit if request.image else images.generate
    async with asyncio.timeout(run.options.timeout):
        with ExitStack() as stack:
            try:
                arguments = sdk_arguments(request, stack)
            except OSError as error:  # it was there at preflight
                exchange.attempts -= 1
                message = f"an input image cannot be read any more: {one_line(error)}"
                raise JobError(Failure("input", message)) from None
            async with method(**arguments) as response:
                exchange.request_id = response.headers.get("x-request-id")
                # A gateway may answer the request for a stream as if none were asked for.
                streams = "event-stream" in response.headers.get("content-type", "")
                spool = Spool()
                try:
                    if streams:
                        spool.write(await follow_stream(response, job, run, exchange))
                    else:
                        async for chunk in response.iter_bytes():
                            spool.write(chunk)
                except BaseException:
                    spool.close()
                    raise
                return spool


async def recover(job: Job, run: Run, exchange: Exchange, verdict: Verdict, period: int) -> None:
    """Wait until the request can be sent again, or raise the JobError that ends the job."""
    failure, options = verdict.failure, run.options
    exchange.last = failure
    exchange.request_id = verdict.request_id or exchange.request_id
    delay = retry_delay(verdict, exchange.requests)
    if verdict.action == "wait" and not exchange.partials:
        exchange.attempts -= 1
        run.gate.refuse(period, delay)
        return
    if verdict.action == "stop run":
        run.halt.stop_run(failure)
    elif verdict.action == "stop model":
        run.halt.models.setdefault(job.request.model, failure)
    if exchange.partials:  # the image was half made: another request would be paid for again
        drafts = listing(exchange.partials)
        message = f"{failure.message}; what had come is kept: {drafts}"
        raise JobError(failure._replace(message=message, maybe_billed=True))
    if verdict.action != "retry" or exchange.attempts >= options.max_attempts:
        raise JobError(failure)
    if delay > exchange.patience:
        raise exchange.gave_up()
    exchange.maybe_billed |= failure.maybe_billed
    billed = "; it may have been billed" if failure.maybe_billed else ""
    run.report.note(
        f"{job.where}{failure.message}{billed}; "
        f"attempt {exchange.attempts + 1} of {options.max_attempts} in {delay:.1f} s"
    )
    await run.halt.sleep(delay)


async def send(job: Job, run: Run, exchange: Exchange) -> Spool:
    """Send a job's request until it is answered, or raise a JobError. The only retry layer."""
    import httpx2
    import openai

    while True:
        period = await run.gate.admit(job, exchange)
        exchange.attempts += 1
        exchange.requests += 1
        try:
            spool = await post(job, run, exchange)
        except (openai.APIError, httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            await recover(job, run, exchange, classify(error), period)
        else:
            run.gate.taken()
            return spool


# ---------------------------------------------------------------------- 10. decode and post-process


def bad_answer(explanation: str) -> JobError:
    """Return the error for an answer that came, was paid for, and is of no use."""
    return JobError(Failure("bad_answer", explanation, maybe_billed=True))


def parse_answer(body: bytes) -> dict[str, Any]:
    """Return the JSON of an answer that has a list of images."""
    import jiter  # the SDK's own parser: ten times as fast on the long strings of an answer

    try:
        answer = jiter.from_json(body)
    except ValueError:
        start = one_line(body[:80].decode("utf-8", "replace"))
        raise bad_answer(f"the answer is no JSON ({len(body):,} bytes): {start}") from None
    return checked_answer(answer)


def checked_answer(answer: object) -> dict[str, Any]:
    """Return an answer that has a list of images."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(answer, dict) or not isinstance(data, list) or not data:
        raise bad_answer("the answer holds no image")
    return answer


def decode_image(item: object) -> bytes:
    """Return the bytes of one image of an answer."""
    import binascii

    encoded = item.get("b64_json") if isinstance(item, dict) else None
    if not isinstance(encoded, str):
        raise bad_answer("an image of the answer has no b64_json")
    try:
        return binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as error:
        raise bad_answer(f"an image of the answer is not valid base64: {error}") from None


def differences(request: ImageRequest, picture: Saved) -> Iterator[str]:
    """Yield where an image is not what was asked for."""
    if picture.format != request.output_format:
        yield f"asked for {request.output_format}, got {picture.format}"
    size = f"{picture.width}x{picture.height}"
    if request.size not in ("auto", size) and picture.format != "svg":
        yield f"asked for {request.size}, got {size}"
    if request.background == "transparent" and not picture.alpha:
        yield "asked for a transparent background, got an image without alpha"


def scaled(image: Image.Image, max_dim: int) -> Image.Image:
    """Return an image whose longer edge is max_dim, in a mode that resizing and saving keep."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    scale = max_dim / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Pillow resizes premultiplied, so that colour under alpha 0 does not bleed into the edge.
    return image.resize(size, Image.Resampling.LANCZOS)


def on_white(image: Image.Image) -> Image.Image:
    """Return an image without alpha."""
    from PIL import Image

    if image.mode not in ("LA", "RGBA"):
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def joined_gif(frames: Iterable[tuple[Image.Image, int]], loop: int | None) -> bytes:
    """Return an animation of frames and their times in ms.

    Each frame is written by Pillow as a picture of its own, and its global colour table turned into
    a local one (GIF89a, sections 18 to 21): Pillow's animations merge frames that look the same.
    """
    import io

    parts = []
    for number, (frame, time) in enumerate(frames):
        buffer = io.BytesIO()
        options = {"loop": loop} if loop is not None and number == 0 else {}
        frame.save(buffer, "GIF", duration=time, disposal=2, **options)
        content = buffer.getvalue().removesuffix(b";")
        if number:
            depth = content[10] & 7
            end = 13 + 3 * 2 ** (depth + 1)
            table, rest = content[13:end], content[end:]
            descriptor = rest.index(b",", 8 if rest.startswith(b"\x21\xf9") else 0)
            local = bytes([0x80 | depth]) + table
            content = rest[: descriptor + 9] + local + rest[descriptor + 10 :]
        parts.append(content)
    return b"".join(parts) + b";"


def downscale(content: bytes, original: Saved, max_dim: int) -> bytes:
    """Return a copy whose longer edge is at most max_dim, in the same format.

    An image that is small enough is returned as it is. A GIF keeps its frames and their times.
    Raises what Pillow raises for an image that it cannot read, a ValueError for one too large.
    """
    if max(original.width, original.height) <= max_dim:
        return content
    if original.width * original.height > MAX_COPY_PIXELS:
        raise ValueError(
            f"{original.width}x{original.height} has more than the {MAX_COPY_PIXELS:,} pixels "
            "that are downscaled here"
        )
    import io

    from PIL import Image, ImageOps, ImageSequence

    options: dict[str, Any] = {}
    with Image.open(io.BytesIO(content)) as source:
        if original.format == "gif":
            frames = ImageSequence.Iterator(source)
            timed = [
                (scaled(frame.convert("RGBA"), max_dim), frame.info.get("duration", 0))
                for frame in frames
            ]
            return joined_gif(timed, source.info.get("loop"))
        profile = source.info.get("icc_profile")
        if profile and source.mode != "CMYK":
            options["icc_profile"] = profile
        ImageOps.exif_transpose(source, in_place=True)
        copy = scaled(source, max_dim)
    if original.format == "jpeg":
        copy = on_white(copy)
        options["quality"] = COPY_QUALITY
    elif original.format == "webp":
        options |= {"quality": COPY_QUALITY, "exact": True}
    else:
        options["compress_level"] = COPY_LEVEL
    buffer = io.BytesIO()
    copy.save(buffer, original.format.upper(), **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------- 11. write


def free_names(name: str) -> Iterator[str]:
    """Yield the name itself, then names beside it."""
    yield name
    stem, extension = os.path.splitext(name)
    number = 1
    while True:
        yield f"{stem}-alt-{number}{extension}"
        number += 1


def holds(name: str, content: bytes) -> bool:
    """Tell whether a file has this very content, as after a collection that was interrupted."""
    try:
        if os.path.getsize(name) != len(content):
            return False
        with open(name, "rb") as file:
            return file.read() == content
    except OSError:
        return False


def write_file(
    name: str, content: bytes, *, replace: bool, reuse: bool = False, sync: bool = False
) -> str:
    """Write a whole file or none, and return its name.

    Without replace, a file that stands there already is kept, even if it came a moment ago: the new
    one goes beside it, under the first free name; with reuse, a file that has this very content is
    taken for it. With sync, the content outlives a power cut. Raises OSError.
    """
    import secrets

    folder = os.path.dirname(name)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".image_gen-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, name)
            return name
        for candidate in free_names(name):
            try:
                place(temporary, candidate)
            except FileExistsError:
                if not (reuse and holds(candidate, content)):
                    continue
            return candidate
        raise AssertionError
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def remove_files(names: list[str]) -> None:
    """Remove files that this run has written; empties the list."""
    while names:
        try:
            os.unlink(names.pop())
        except OSError:
            continue


def place(temporary: str, name: str) -> None:
    """Give a finished file its name, unless the name is taken (FileExistsError)."""
    try:
        os.link(temporary, name)
    except FileExistsError:
        raise
    except OSError:  # no hard links here, as on FAT: reserve the name, then rename onto it
        with open(name, "xb"):
            os.replace(temporary, name)


def rescue(name: str, content: bytes) -> str | None:
    """Save a paid image somewhere when its own place takes it no more."""
    import tempfile

    try:
        folder = os.path.join(tempfile.gettempdir(), "image_gen-rescued")
        return write_file(os.path.join(folder, os.path.basename(name)), content, replace=False)
    except OSError:
        return None


def save_image(output: Output, content: bytes) -> Saved:
    """Write one original, byte for byte as it came; what is no whole image is kept beside it."""
    import io

    if not content:
        raise bad_answer("an image of the answer is empty")
    picture = probe(io.BytesIO(content))
    sound = picture is not None and picture.whole
    planned = output.path if sound else f"{output.path}.damaged"
    try:
        name = write_file(
            planned, content, replace=output.replace and sound, reuse=output.collected
        )
    except OSError as error:
        saved = rescue(planned, content)
        where = f"it was saved as {saved}" if saved else "it is lost"
        message = f"{planned} could not be written ({error.strerror or error}); {where}"
        raise JobError(Failure("write", message, maybe_billed=True)) from None
    if picture is None or not picture.whole:
        what = "cut off" if picture else "none that is known here"
        raise bad_answer(
            f"an image of the answer is {what}; its {len(content):,} bytes are kept as {name}"
        )
    return Saved(name, len(content), picture.width, picture.height, picture.format, picture.alpha)


def save_partial(name: str, encoded: str, replace: bool) -> str | None:  # noqa: FBT001
    """Write a draft of a streamed image; one that cannot be written is not worth a failure."""
    try:
        return write_file(name, decode_image({"b64_json": encoded}), replace=replace)
    except (JobError, OSError):
        return None


class Landing(NamedTuple):
    """What an answer has left on disk: images by the path they were planned for."""

    images: Mapping[str, Saved] = {}
    warnings: tuple[str, ...] = ()
    failure: Failure | None = None
    answer: Mapping[str, Any] = {}


def save_answer(job: Job, answer: dict[str, Any]) -> Landing:
    """Decode the images of an answer one by one, and write each. Runs in a worker thread."""
    data = answer.pop("data")
    images: dict[str, Saved] = {}
    warnings: list[str] = []
    failures: list[Failure] = []
    surplus = len(data) - len(job.missing)
    if surplus > 0:
        warnings.append(f"{surplus} more images than asked for; saved beside the others")
    elif surplus < 0:
        failures.append(
            Failure("bad_answer", f"asked for {len(job.missing)} images, got {len(data)}")
        )
    for index in range(len(data)):
        output = job.missing[min(index, len(job.missing) - 1)]
        if index >= len(job.missing):
            output = output._replace(replace=False, collected=False)
        item, data[index] = data[index], None
        try:
            saved = save_image(output, decode_image(item))
        except JobError as error:
            failures.append(error.failure)
            continue
        warnings += [f"{saved.path}: {text_}" for text_ in differences(job.request, saved)]
        if index < len(job.missing):
            images[output.path] = saved
            if saved.path != output.path:
                warnings.append(
                    f"{output.path} has appeared meanwhile and is kept; saved as {saved.path}"
                )
    worst = next((failure for failure in failures if failure.kind == "write"), None)
    failure = worst or (failures[0] if failures else None)
    return Landing(images, tuple(warnings), failure, answer)


def save_copy(original: Saved, name: str, max_dim: int, *, replace: bool) -> Saved | None:
    """Write the downscaled copy of an original that is on disk. Runs in a worker thread."""
    try:
        with open(original.path, "rb") as file:
            content = file.read()
        small = downscale(content, original, max_dim)
        return saved_file(write_file(name, small, replace=replace))
    except Exception as error:  # noqa: BLE001 - Pillow meets damage with many kinds
        message = f"{name}: no downscaled copy ({one_line(error)}); the original is kept"
        raise JobError(Failure("downscale", message)) from None


def saved_file(name: str) -> Saved | None:
    """Describe an image that is on disk, if it is whole."""
    picture = probe_file(name)
    if picture is None or not picture.whole:
        return None
    size = os.path.getsize(name)
    return Saved(name, size, picture.width, picture.height, picture.format, picture.alpha)


# --------------------------------------------------------------------------------------- 12. report


def redacted(text_: str) -> str:
    """Return a text without the key, whoever quotes it."""
    secret = os.environ.get("OPENAI_API_KEY", "")
    return text_.replace(secret, "[key]") if len(secret) >= MIN_SECRET else text_


def tell(line: str) -> None:
    """Print one line on stderr; control characters are shown, not obeyed."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in redacted(line))
    write_stderr("".join(shown) + "\n")


def write_stderr(text_: str) -> None:
    """Write on stderr; a reader that has gone does not end a paid run."""
    try:
        sys.stderr.write(text_)
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def record(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as a line of --json; references/cli.md documents it."""
    job, delivery = outcome.job, outcome.delivery
    failure = None if isinstance(outcome, Done) else outcome.failure
    return {
        "job": job.number,
        "status": type(outcome).__name__.lower(),
        "prompt": job.request.prompt,
        "endpoint": job.request.endpoint,
        "model": job.request.model,
        "outputs": [image._asdict() for image in delivery.images],
        "outputs_downscaled": [image._asdict() for image in delivery.copies],
        "partials": list(delivery.partials),
        "attempts": delivery.attempts,
        "seconds": round(delivery.seconds, 3),
        "request_id": delivery.request_id,
        "usage": delivery.usage,
        "size": delivery.size,
        "quality": delivery.quality,
        "warnings": list(delivery.warnings),
        "error": failure and failure._asdict(),
    }


def duration(seconds_: float) -> str:
    """Return seconds as people say them."""
    if round(seconds_, 1) < 60:
        return f"{seconds_:.1f} s"
    minutes, rest = divmod(round(seconds_), 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min {rest} s"


class Report:
    """Everything that is printed while jobs run, and the exit code."""

    def __init__(self, total: int, options: RunOptions) -> None:
        import time

        self.total = total
        self.options = options
        self.clock = time.monotonic
        self.started = self.clock()
        self.terminal = sys.stderr.isatty() and not options.quiet
        self.counts = {Done: 0, Failed: 0, Skipped: 0}
        self.images = self.tokens = self.in_flight = 0
        self.incomplete = False
        self.not_sent = 0
        self.interrupted = False
        self.unfinished = False
        self.waiting_until = 0.0
        self.stdout_open = True

    def add(self, outcome: Outcome) -> None:
        """Report the end of a job."""
        job, delivery = outcome.job, outcome.delivery
        self.counts[type(outcome)] += 1
        tokens = (delivery.usage or {}).get("total_tokens")
        self.tokens += tokens if isinstance(tokens, int) else 0
        for warning in delivery.warnings:
            self.warn(f"{job.where}{warning}")
        if not isinstance(outcome, Skipped):
            self.images += len(delivery.images)
        if self.options.json:
            self.result(json.dumps(record(outcome)))
        elif not isinstance(outcome, Skipped):
            for image in (*delivery.images, *delivery.copies):
                self.result(f"Wrote {image.path}")
        done = f"[{sum(self.counts.values())}/{self.total}]"
        if isinstance(outcome, Done):
            names = listing([image.path for image in delivery.images])
            took = f"{duration(delivery.seconds)} " if delivery.seconds else ""
            self.note(f"{done} {took}{names}")
        elif outcome.failure is None:
            self.note(f"{done} {job.where}skipped, its files are there")
        else:
            self.incomplete = True
            self.not_sent += isinstance(outcome, Skipped)
            if isinstance(outcome, Failed):
                self.error(f"{job.where}{outcome.failure.message}")
        self.status()

    def close(self, halted: Failure | None, resume: str = "") -> None:
        """Print what remains to be said at the end of the run."""
        done, failed, skipped = self.counts.values()
        if halted is not None and self.not_sent:
            self.error(f"{counted(self.not_sent, 'job')} not done: {halted.message}")
        elapsed = duration(self.clock() - self.started)
        self.note(
            f"{counted(self.total, 'job')}: {done} done, {failed} failed, {skipped} skipped; "
            f"{counted(self.images, 'image')}, {counted(self.tokens, 'token')}, {elapsed}"
        )
        if self.interrupted or self.unfinished or (self.incomplete and (resume or self.total > 1)):
            force = " instead of --force" if self.options.force else ""
            again = resume or f"To resume, repeat the command with --skip-existing{force}."
            (self.say if self.interrupted else self.note)(again)

    @property
    def exit_code(self) -> int:
        """Return 130 when interrupted, 3 when batches go on, else 1 when an image is missing."""
        if self.interrupted:
            return 130
        return 3 if self.unfinished else int(self.incomplete)

    def result(self, text_: str) -> None:
        """Print on stdout; a reader that has gone does not end a paid run."""
        self.clear()
        if self.stdout_open:
            try:
                print(redacted(text_), flush=True)
            except OSError as error:
                self.stdout_open = False
                if not isinstance(error, BrokenPipeError):
                    self.incomplete = True
                    self.error(f"stdout takes no more: {error.strerror}; the images are saved")
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def say(self, line: str) -> None:
        """Print a line on stderr."""
        self.clear()
        tell(line)

    def note(self, line: str) -> None:
        """Print progress."""
        if not self.options.quiet:
            self.say(line)

    def warn(self, line: str) -> None:
        """Print a warning."""
        if not self.options.quiet:
            self.say(f"Warning: {line}")

    def error(self, line: str) -> None:
        """Print an error."""
        self.say(f"Error: {line}")

    def paused(self, delay: float) -> None:
        """Tell of a pause for the rate limit, once for all jobs."""
        self.waiting_until = self.clock() + delay
        self.note(
            f"rate limit: all jobs wait {delay:.1f} s, then go on at the pace that is accepted"
        )

    def clear(self) -> None:
        """Take the status line off the terminal."""
        if self.terminal:
            write_stderr("\r\x1b[K")

    def status(self) -> None:
        """Show how the run stands, on a terminal."""
        done = sum(self.counts.values())
        if not self.terminal or done == self.total:
            return
        now = self.clock()
        parts = [f"{done}/{self.total} done", f"{self.in_flight} in flight"]
        if self.counts[Failed]:
            parts.append(f"{self.counts[Failed]} failed")
        if self.waiting_until > now:
            parts.append(f"rate limit: {self.waiting_until - now:.0f} s")
        if done:
            left = (now - self.started) / done * (self.total - done)
            parts.append(f"about {duration(left)} left")
        write_stderr("\r\x1b[K" + " · ".join(parts))


def contact_sheet(outcomes: Sequence[Outcome], suffix_format: str) -> bytes:
    """Draw labelled thumbnails of all images, in job order; jobs without an image are marked."""
    import io

    from PIL import Image, ImageDraw, ImageFont

    cells = [
        (outcome, image)
        for outcome in sorted(outcomes, key=lambda outcome: outcome.job.number)
        for image in (outcome.delivery.images or (None,))
    ]
    columns = next(k for k in range(1, len(cells) + 1) if k * k >= len(cells))
    rows = -(-len(cells) // columns)
    edge, label, gap = (256 if columns <= 12 else 128), 20, 8
    sheet = Image.new(
        "RGB", (columns * (edge + gap) + gap, rows * (edge + label + gap) + gap), "#f4f4f4"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for position, (outcome, image) in enumerate(cells):
        left = gap + position % columns * (edge + gap)
        top = gap + position // columns * (edge + label + gap)
        thumbnail = image and thumbnail_of(image, edge)
        if thumbnail:
            offset = ((edge - thumbnail.width) // 2, (edge - thumbnail.height) // 2)
            sheet.paste(thumbnail, (left + offset[0], top + offset[1]), thumbnail)
        else:
            unmade = "not sent" if isinstance(outcome, Skipped) else "failed"
            state = "no preview" if image else unmade
            draw.rectangle((left, top, left + edge, top + edge), "#ffe5e5", "#c00000")
            draw.text((left + 8, top + 8), state, "#c00000", font)
        name = os.path.basename(image.path) if image else outcome.job.request.title
        caption = one_line(f"{outcome.job.number} {name[:80]}")
        while draw.textlength(caption, font) > edge and len(caption) > 1:
            caption = caption[:-2] + "…"
        draw.text((left, top + edge + 3), caption, "#202020", font)
    buffer = io.BytesIO()
    sheet.save(buffer, suffix_format.upper())
    return buffer.getvalue()


def thumbnail_of(image: Saved, edge: int) -> Image.Image | None:
    """Return a small picture of an image on disk, or None where Pillow cannot read it."""
    from PIL import Image, ImageOps

    if image.width * image.height > MAX_COPY_PIXELS:
        return None
    try:
        with Image.open(image.path) as source:
            source.draft("RGB", (edge, edge))
            picture = ImageOps.exif_transpose(source).convert("RGBA")
    except Exception:  # noqa: BLE001 - Pillow meets damage with many kinds
        return None
    picture.thumbnail((edge, edge))
    return picture


# ------------------------------------------------------------------------------------------ 13. run


class Run:
    """What the jobs of a run share."""

    def __init__(
        self,
        options: RunOptions,
        report: Report,
        savers: ThreadPoolExecutor,
        copiers: ThreadPoolExecutor,
    ) -> None:
        import asyncio

        import httpx2
        import openai

        self.options = options
        self.report = report
        self.savers, self.copiers = savers, copiers
        self.halt = Halt()
        self.gate = RateGate(self.halt, report.paused)
        self.slots = asyncio.Semaphore(options.concurrency)
        # Answers that wait for a worker are open files; this bounds them.
        self.backlog = asyncio.Semaphore(3 * options.concurrency)
        self.sending: set[asyncio.Task[Any] | None] = set()
        self.aborted = False  # by a second signal: no more copies
        timeout = httpx2.Timeout(options.timeout, connect=min(options.timeout, CONNECT_SECONDS))
        try:
            self.client = openai.AsyncOpenAI(max_retries=0, timeout=timeout)
        except (ValueError, ImportError, OSError, httpx2.InvalidURL, openai.OpenAIError) as error:
            problem = (
                "the HTTP client cannot be set up by the environment (proxies, certificates): "
            )
            raise UsageError([problem + one_line(error)]) from None

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count the current task among those that an interruption waits for, or drops."""
        import asyncio

        task = asyncio.current_task()
        self.sending.add(task)
        self.report.in_flight = len(self.sending)
        try:
            yield
        finally:
            self.sending.discard(task)
            self.report.in_flight = len(self.sending)

    def failed(self, job: Job, failure: Failure) -> None:
        """Stop the run if this failure of a job asks for it."""
        if failure.kind == "write":  # images that cannot be saved should not be bought
            self.halt.stop_run(failure)
        elif self.options.fail_fast:
            reason = f"--fail-fast, {job.where}{failure.message}"
            self.halt.stop_run(Failure("fail_fast", reason, retryable=True))

    def interrupt(self) -> None:
        """Take a signal: send nothing more; at the second one, drop what is in flight."""
        if not self.report.interrupted:
            self.report.interrupted = True
            self.halt.stop_run(Failure("interrupted", "interrupted", retryable=True))
            if self.report.in_flight:
                self.report.note(
                    f"Interrupted: {counted(self.report.in_flight, 'request')} in flight will be "
                    "waited for, being paid for; interrupt again to drop them"
                )
            return
        self.aborted = True
        for task in filter(None, self.sending):
            task.cancel()


async def exchange_images(job: Job, run: Run, exchange: Exchange) -> Landing:
    """Send a job and save what comes. Holds a slot for the network call only."""
    import asyncio

    loop = asyncio.get_running_loop()
    async with run.slots:
        exchange.started = loop.time()
        try:
            with run.in_flight():
                spool = await send(job, run, exchange)
        except JobError as error:
            run.failed(job, error.failure)  # before the slot is free for another job
            raise
    landing = await loop.run_in_executor(
        run.savers, lambda: save_answer(job, parse_answer(spool.read()))
    )
    if landing.failure is None and not run.options.keep_partials:
        remove_files(exchange.partials)
    return landing


async def landing_of(job: Job, run: Run, exchange: Exchange) -> Landing:
    """Exchange a job for its images, or for the reason why there are none."""
    import asyncio

    if not job.missing:
        return Landing()
    try:
        landing = await exchange_images(job, run, exchange)
    except StoppedError as error:
        exchange.untouched = exchange.attempts == 0
        return Landing(failure=error.failure if exchange.untouched else exchange.last)
    except JobError as error:
        landing = Landing(failure=error.failure)
    except asyncio.CancelledError:
        landing = Landing(
            failure=Failure(
                "interrupted", "dropped while in flight", retryable=True, maybe_billed=True
            )
        )
    if landing.failure is not None:
        run.failed(job, landing.failure)
    return landing


def images_on_disk(job: Job, landing: Landing) -> Iterator[tuple[Output, Saved]]:
    """Yield the images of a job: those that came now, and those that were there before."""
    missing = {output.path for output in job.missing}
    for output in job.outputs:
        image = landing.images.get(output.path)
        if image is None and output.path not in missing:
            image = saved_file(output.path)
        if image is not None:
            yield output, image


def newer_copy(name: str, original: str) -> Saved | None:
    """Describe the copy of an image, if it is whole and was made after it."""
    try:
        return saved_file(name) if os.path.getmtime(name) >= os.path.getmtime(original) else None
    except OSError:
        return None


async def make_copies(
    images: Iterable[tuple[Output, Saved]], landing: Landing, run: Run
) -> tuple[list[Saved], Failure | None]:
    """Write the downscaled copies that are not there yet; a failure keeps the originals."""
    import asyncio
    from functools import partial

    loop = asyncio.get_running_loop()
    max_dim = run.options.downscale_max_dim
    copies: list[Saved] = []
    failure: Failure | None = None
    for output, image in images:
        if output.copy is None or max_dim is None or run.aborted:
            continue
        fresh = output.path in landing.images and not output.collected
        copy = None if fresh else newer_copy(output.copy, image.path)
        try:
            copy = copy or await loop.run_in_executor(
                run.copiers,
                partial(save_copy, image, output.copy, max_dim, replace=output.replace_copy),
            )
        except JobError as error:
            failure = failure or error.failure
        else:
            copies += filter(None, [copy])
    return copies, failure


async def settle(job: Job, landing: Landing, exchange: Exchange, run: Run) -> Outcome:
    """Make the copies of a job whose images have landed, and return its outcome."""
    import asyncio

    images = list(images_on_disk(job, landing))
    copies, copy_failure = await make_copies(images, landing, run)
    now = asyncio.get_running_loop().time()
    warnings = list(landing.warnings)
    if exchange.maybe_billed:
        warnings.append("an earlier attempt may have been billed without an image")
    usage = landing.answer.get("usage")
    if isinstance(usage, dict) and (svg_usage := landing.answer.get("svg_usage")):
        usage = {**usage, "svg_usage": svg_usage}
    delivery = Delivery(
        images=tuple(image for _, image in images),
        copies=tuple(copies),
        partials=tuple(exchange.partials),
        warnings=tuple(warnings),
        attempts=exchange.attempts,
        seconds=0.0 if exchange.started is None else now - exchange.started,
        request_id=exchange.request_id,
        usage=usage if isinstance(usage, dict) else None,
        size=landing.answer.get("size"),
        quality=landing.answer.get("quality"),
    )
    failure = landing.failure or copy_failure
    if copy_failure is not None:
        run.failed(job, copy_failure)
    if failure is None:
        return Done(job, delivery) if landing.images else Skipped(job, delivery)
    failure = failure._replace(maybe_billed=failure.maybe_billed or exchange.maybe_billed)
    return (Skipped if exchange.untouched else Failed)(job, delivery, failure)


async def run_job(job: Job, run: Run) -> Outcome:
    """Do all that a job needs and return its outcome."""
    exchange = Exchange(run.options.max_wait)
    async with run.backlog:
        landing = await landing_of(job, run, exchange)
        return await settle(job, landing, exchange, run)


async def outcome_of(job: Job, run: Run) -> Outcome:
    """Run a job; a bug in this program must not take the images of the other jobs along."""
    try:
        return await run_job(job, run)
    except Exception as error:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        return Failed(job, Delivery(), Failure("internal", f"a bug in image_gen: {error!r}"))


def catch_signals(run: Run) -> Callable[[], None]:
    """Let Ctrl-C and SIGTERM end the run in order; return what restores the handlers."""
    import asyncio
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop = asyncio.get_running_loop()
    names = (signal.SIGINT, signal.SIGTERM)
    before = [
        signal.signal(name, lambda *_: loop.call_soon_threadsafe(run.interrupt)) for name in names
    ]

    def restore() -> None:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)

    return restore


async def keep_status(report: Report) -> None:
    """Keep the status line of a terminal up to date."""
    import asyncio

    while report.terminal:
        await asyncio.sleep(0.5)
        report.status()


@asynccontextmanager
async def running(options: RunOptions, report: Report) -> AsyncIterator[Run]:
    """Set up what a run needs, and take it down again."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    # Originals have workers of their own: no paid image waits in a queue behind downscaling.
    cores = os.cpu_count()
    with ThreadPoolExecutor(cores) as savers, ThreadPoolExecutor(cores) as copiers:
        run = Run(options, report, savers, copiers)
        restore = catch_signals(run)
        status = asyncio.create_task(keep_status(report))
        try:
            async with run.client:
                yield run
        finally:
            status.cancel()
            restore()


async def run_jobs(jobs: Sequence[Job], options: RunOptions, report: Report) -> list[Outcome]:
    """Run all jobs, as many at once as asked for, and report each as it ends."""
    import asyncio

    outcomes = []
    async with running(options, report) as run:
        tasks = [asyncio.create_task(outcome_of(job, run)) for job in jobs]
        for task in asyncio.as_completed(tasks):
            outcome = await task
            outcomes.append(outcome)
            report.add(outcome)
    report.close(run.halt.run or next(iter(run.halt.models.values()), None))
    return outcomes


def write_contact_sheet(
    name: str, outcomes: Sequence[Outcome], options: RunOptions, report: Report
) -> None:
    """Write the contact sheet; without it the run has failed."""
    try:
        sheet = contact_sheet(outcomes, name_format(name) or DEFAULT_FORMAT)
        replace = options.force or options.skip_existing
        name = write_file(name, sheet, replace=replace)
    except (OSError, ValueError, MemoryError) as error:
        report.incomplete = True
        report.error(f"--contact-sheet {name}: {one_line(error)}")
        return
    if options.json:
        report.note(f"contact sheet {name}")
    else:
        report.result(f"Wrote {name}")


# ------------------------------------------------------------------ 13b. run, through the Batch API
# Jobs are submitted in files of lines, and their answers come as files of lines within a day. What
# has been submitted stands in a state file in the out dir, written before and after each step, so
# that the same command goes on where a process died, and no job is submitted twice.

STATE_NAME = ".image_gen-batch.json"
STATE_VERSION = 1
MAX_BATCH_LINES = 50_000
MAX_BATCH_BYTES = 200_000_000
POLL_SECONDS = 5.0
MAX_POLL_SECONDS = 60.0
ENDED = ("completed", "failed", "expired", "cancelled")
RUN_KEY, SHARD_KEY = "image_gen_run", "image_gen_shard"  # of a batch's metadata
LIST_MARGIN_SECONDS = 3600  # clocks differ
LINES_AT_ONCE = 4  # a line holds all images of a job, so this bounds the memory
# What a batch says of a request or of itself, and that may go well at another time.
PASSING_CODES = ("batch_expired", "batch_cancelled", "token_limit_exceeded")


class Shard(NamedTuple):
    """One batch: some jobs of one endpoint and one model, and how far it has got."""

    numbers: tuple[int, ...]
    endpoint: str
    file_id: str | None = None
    creating: bool = False  # a request to create it may have been sent
    batch_id: str | None = None
    settled: bool = False


class BatchState:
    """What a folder has submitted; every change is on disk before the next step."""

    def __init__(self, folder: str, content: Mapping[str, Any]) -> None:
        self.path = os.path.join(folder, STATE_NAME)
        self.run: str = content["run"]
        self.started: int = content["started"]
        # By job number: a digest of what it asks for, and which of its variants were submitted.
        self.digests = {int(number): str(digest) for number, digest in content["digests"].items()}
        self.variants = {int(number): list(these) for number, these in content["variants"].items()}
        self.uploads: dict[str, str] = dict(content["uploads"])  # file ids by sha256
        self.shards = [
            Shard(**{**shard, "numbers": tuple(shard["numbers"])}) for shard in content["shards"]
        ]
        self.planned: bool = content["planned"]
        self.force: bool = content["force"]

    @property
    def submitted(self) -> bool:
        """Whether every batch exists."""
        return self.planned and all(shard.batch_id or shard.settled for shard in self.shards)

    @property
    def untouched(self) -> bool:
        """Whether no batch can exist."""
        return not any(shard.creating or shard.batch_id for shard in self.shards)

    @property
    def finished(self) -> bool:
        """Whether nothing remains to be submitted or collected."""
        return self.planned and all(shard.settled for shard in self.shards)

    def save(self) -> None:
        """Write the state."""
        content = {
            "version": STATE_VERSION,
            "run": self.run,
            "started": self.started,
            "digests": self.digests,
            "variants": self.variants,
            "uploads": self.uploads,
            "shards": [shard._asdict() for shard in self.shards],
            "planned": self.planned,
            "force": self.force,
        }
        write_file(self.path, json.dumps(content).encode(), replace=True, sync=True)

    def change(self, index: int, **values: object) -> None:
        """Note how far a shard has got."""
        self.shards[index] = self.shards[index]._replace(**values)  # type: ignore[arg-type]
        self.save()


def load_state(folder: str) -> BatchState | None:
    """Read the state of a folder."""
    name = os.path.join(folder, STATE_NAME)
    try:
        with open(name, "rb") as file:
            content = json.load(file)
        if content["version"] != STATE_VERSION:
            raise UsageError([f"{name} was written by another version of this program"])
        return BatchState(folder, content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError([f"{name} cannot be read ({one_line(error)}); move it away"]) from None


def new_state(
    folder: str, jobs: Sequence[Job], options: RunOptions, uploads: Mapping[str, str]
) -> BatchState:
    """Begin a run for what is missing."""
    import secrets
    import time

    submitted = {
        job.number: [job.outputs.index(output) for output in job.missing]
        for job in jobs
        if job.missing
    }
    content = {
        "run": secrets.token_hex(8),
        "started": int(time.time()),
        "digests": job_digests(jobs),
        "variants": submitted,
        "uploads": uploads,
        "shards": [],
        "planned": not submitted,
        "force": options.force,
    }
    state = BatchState(folder, content)
    if submitted:
        state.save()
    return state


def file_digest(name: str) -> str:
    """Return the SHA-256 of a file."""
    import hashlib

    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def job_digests(jobs: Iterable[Job]) -> dict[int, str]:
    """Return a digest of all that each job asks for, however much of it is on disk already.

    A job whose input images are gone has an empty one.
    """
    import functools
    import hashlib

    digest_of = functools.cache(file_digest)
    digests = {}
    for job in jobs:
        request = job.request._replace(n=len(job.outputs))
        names = [os.path.basename(output.path) for output in job.outputs]
        try:
            files = [digest_of(name) for name in request.files]
        except OSError:
            digests[job.number] = ""
            continue
        asked = json.dumps([request.endpoint, request.payload, files, names], sort_keys=True)
        digests[job.number] = hashlib.sha256(asked.encode()).hexdigest()[:24]
    return digests


def changed_jobs(state: BatchState, jobs: Sequence[Job]) -> str:
    """Say how jobs differ from what a run has submitted; empty if they do not."""
    if len(jobs) != len(state.digests):
        return f"there are {counted(len(jobs), 'job')} instead of {len(state.digests):,}"
    digests = job_digests(jobs)
    changed = [
        job for job in jobs if digests[job.number] not in ("", state.digests.get(job.number))
    ]
    if not changed:
        return ""
    return f"{counted(len(changed), 'job')} changed, first that of {changed[0].where.strip(': ')}"


def continued(options: RunOptions, jobs: Sequence[Job]) -> RunOptions:
    """Return the options with which a folder's run goes on, if it has one and the jobs are its own.

    A run goes on until it is finished; after that its command finds it finished, unless it asks for
    a new one by --force or --skip-existing. What a run has written is no obstacle to its going on.
    """
    state = load_state(options.out_dir or ".") if options.batch_api else None
    if options.batch_api and options.cancel and (state is None or state.finished):
        problem = f"--cancel: {options.out_dir} has nothing submitted that is not collected"
        raise UsageError([problem])
    if state is None:
        return options
    changed = changed_jobs(state, jobs)
    again = options.force or options.skip_existing
    if (state.finished and (changed or again)) or (state.untouched and changed):
        return options
    if changed:
        problem = (
            f"the jobs are not those that {options.out_dir} has submitted and not collected "
            f"({changed}): go on with the former --input, take another --out-dir, or end that run "
            "with --cancel and the former --input; to give up its images, delete "
            f"{state.path}"
        )
        raise UsageError([problem])
    return options._replace(
        skip_existing=not state.force,
        force=state.force,
        resumes=state.run,
        submitted=state.submitted,
    )


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep a second process out of a folder, for as long as this one lives."""
    try:
        import fcntl
    except ImportError:  # Windows has no locks of folders
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError([f"{folder} cannot be used: {one_line(error)}"]) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError([f"another process works on {folder}; wait for it, or end it"]) from None
    except OSError:  # a network disk without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def open_state(folder: str, jobs: Sequence[Job], options: RunOptions) -> BatchState:
    """Go on with the run of a folder, or begin one; the folder is locked by now."""
    state = load_state(folder)
    if options.resumes is None:
        if state is not None and not state.finished and not state.untouched:
            raise UsageError([f"another process has begun a run in {folder}; repeat the command"])
        return new_state(folder, jobs, options, state.uploads if state else {})
    if state is None or state.run != options.resumes:
        raise UsageError([f"another process has begun a run in {folder}; repeat the command"])
    return state


def encoded_line(job: Job, file_ids: Mapping[str, str]) -> bytes:
    """Return a job's line of a batch."""
    return json.dumps(batch_line(job, file_ids), ensure_ascii=False).encode() + b"\n"


def plan_shards(jobs: Iterable[Job], file_ids: Mapping[str, str]) -> list[Shard]:
    """Fill as few batches as the limits allow; a batch has one endpoint and one model."""
    shards: list[tuple[str, list[int]]] = []
    filling: dict[tuple[str, str], tuple[list[int], int]] = {}
    for job in jobs:
        key = (job.request.endpoint, job.request.model)
        size = len(encoded_line(job, file_ids))
        numbers, filled = filling.get(key, ([], MAX_BATCH_BYTES))
        if filled + size > MAX_BATCH_BYTES or len(numbers) >= MAX_BATCH_LINES:
            numbers, filled = [], 0
            shards.append((job.request.endpoint, numbers))
        numbers.append(job.number)
        filling[key] = numbers, filled + size
    return [Shard(tuple(numbers), endpoint) for endpoint, numbers in shards]


class Result(NamedTuple):
    """One line of an output or error file, with the images of it that are on disk now."""

    custom_id: str
    job: Job | None  # None: no job of this batch
    landing: Landing
    request_id: str | None = None
    executed: bool = True


def object_of(value: object) -> dict[str, Any]:
    """Return an object of an answer, an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def read_result(
    line: bytes, waiting: dict[str, Job], known: Container[str], folder: str
) -> Result | None:
    """Save what a line of an output or error file holds. Runs in a worker thread.

    Takes the line's job out of waiting; None stands for a job whose result has come before. Raises
    a ValueError for a line that is none, as at the end of a file that was cut off.
    """
    try:
        content = object_of(json.loads(line))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str):
        raise ValueError("no custom_id")  # noqa: TRY004
    job = waiting.pop(custom_id, None)
    if job is None and custom_id in known:
        return None
    response, error = object_of(content.get("response")), object_of(content.get("error"))
    request_id = str(response.get("request_id") or "") or None
    if not response:
        code = str(error.get("code") or "batch_error")
        message = one_line(error.get("message") or "the batch has no answer for this job")
        failure = Failure(code, message, code, retryable=code in PASSING_CODES)
        return Result(custom_id, job, Landing(failure=failure), executed=False)
    body, status = response.get("body"), response.get("status_code")
    if status != 200:
        said = object_of(body).get("error") or error or body
        verdict = judge(status if isinstance(status, int) else 0, said)
        return Result(custom_id, job, Landing(failure=verdict.failure), request_id)
    try:
        answer = checked_answer(body)
        landing = save_answer(job or stray_job(custom_id, folder, len(answer["data"])), answer)
    except JobError as problem:
        landing = Landing(failure=problem.failure)
    return Result(custom_id, job, landing, request_id)


def stray_job(custom_id: str, folder: str, count: int) -> Job:
    """Stand in for the job of a result that nobody asked for here: it may have been paid for."""
    names = [f"unmatched-{slugify(custom_id)}-{number}.png" for number in range(1, count + 1)]
    outputs = tuple(Output(os.path.join(folder, name), collected=True) for name in names)
    return Job(0, 0, ImageRequest(custom_id, custom_id), outputs, outputs)


def judge_call(error: Exception) -> Verdict:
    """Judge an error of the calls that are not about one image."""
    import openai

    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return Verdict("fail", Failure("disk", f"the disk failed: {one_line(error)}"))
    verdict = classify(error)
    if isinstance(error, openai.APIStatusError) and verdict.action == "stop model":
        said = object_of(error.body).get("message") or error.message
        message = f"the Batch API, HTTP {error.status_code}: {one_line(said)}"
        return Verdict("fail", verdict.failure._replace(kind="batch_api", message=message))
    return verdict


class BatchRun:
    """A run through the Batch API: its steps, from top to bottom."""

    def __init__(self, run: Run, state: BatchState, jobs: Mapping[int, Job], folder: str) -> None:
        self.run = run
        self.state = state
        self.jobs = jobs
        self.folder = folder
        # To ask again is harmless in every call but the creation of a batch.
        self.retrying = run.client.with_options(max_retries=run.options.max_attempts - 1)
        self.refused: dict[int, Failure] = {}  # shards that could not be submitted
        self.shown: dict[int, str] = {}

    def asked(self, index: int) -> dict[str, Job]:
        """Return the jobs of a shard by custom_id, with the outputs that were submitted."""
        found = {}
        for number in self.state.shards[index].numbers:
            job = self.jobs[number]
            outputs = tuple(
                job.outputs[variant]._replace(collected=True)
                for variant in self.state.variants[number]
            )
            request = job.request._replace(n=len(outputs))
            found[f"job-{number}"] = job._replace(request=request, missing=outputs)
        return found

    async def submit(self) -> None:
        """Create the batches that do not exist yet; a refused one does not stop the others."""
        import httpx2
        import openai

        if not self.state.planned:
            jobs = [self.jobs[number] for number in self.state.variants]
            file_ids = await self.upload_inputs(jobs)
            self.state.shards = plan_shards(jobs, file_ids)
            self.state.planned = True
            self.state.save()
        for index, shard in enumerate(self.state.shards):
            if shard.settled or shard.batch_id:
                continue
            try:
                if shard.file_id is None:
                    jobs = list(self.asked(index).values())
                    file_id = await self.upload_lines(index, jobs, await self.upload_inputs(jobs))
                    self.state.change(index, file_id=file_id)
                await self.create(index)
            except (openai.APIError, httpx2.HTTPError) as error:
                verdict = judge_call(error)
                self.refused[index] = verdict.failure
                if verdict.action == "stop run":
                    return
            except StoppedError:
                raise
            except JobError as error:
                self.refused[index] = error.failure

    async def upload_inputs(self, jobs: Iterable[Job]) -> dict[str, str]:
        """Upload each distinct input image once; return the file ids by path."""
        from contextlib import ExitStack

        file_ids = {}
        uploads = self.state.uploads
        for name in dict.fromkeys(name for job in jobs for name in job.request.files):
            digest = file_digest(name)
            if digest not in uploads:
                self.run.halt.check()
                with ExitStack() as stack:
                    part = upload(stack, name, "input")
                    uploaded = await self.retrying.files.create(file=part, purpose="vision")
                uploads[digest] = uploaded.id
                # A lost note of an upload costs an upload; a note of each of thousands, hours.
                if len(uploads) < 100 or len(uploads) % 100 == 0:
                    self.state.save()
            file_ids[name] = uploads[digest]
        return file_ids

    async def upload_lines(
        self, index: int, jobs: Iterable[Job], file_ids: Mapping[str, str]
    ) -> str:
        """Upload the jobs of a shard, one a line, and return the file's id."""
        import tempfile

        self.run.halt.check()
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for job in jobs:
                file.write(encoded_line(job, file_ids))
            file.seek(0)
            name = f"image_gen-{self.state.run}-{index}.jsonl"
            lines = cast("BinaryIO", file)
            uploaded = await self.retrying.files.create(
                file=(name, lines, "application/jsonl"), purpose="batch"
            )
        return uploaded.id

    async def create(self, index: int) -> None:
        """Create a batch, once: after a doubtful attempt, look first whether it exists."""
        import httpx2
        import openai

        run, attempts, requests, patience = self.run, 0, 0, self.run.options.max_wait
        while True:
            shard = self.state.shards[index]
            batch_id = await self.find(index) if shard.creating else None
            if batch_id is not None:
                break
            run.halt.check()
            self.state.change(index, creating=True)
            try:
                batch = await run.client.batches.create(
                    input_file_id=shard.file_id or "",
                    endpoint=shard.endpoint,  # type: ignore[arg-type]
                    completion_window="24h",
                    metadata={RUN_KEY: self.state.run, SHARD_KEY: str(index)},
                )
            except (openai.APIError, httpx2.HTTPError) as error:
                verdict = judge_call(error)
                attempts += verdict.action == "retry"
                self.state.change(index, creating=verdict.action == "retry")
                requests += 1
                delay = retry_delay(verdict, requests)
                patience -= delay
                hopeless = verdict.action not in ("retry", "wait")
                if hopeless or attempts >= run.options.max_attempts:
                    raise
                if patience < 0:
                    raise gave_up(verdict.failure) from None
                run.report.note(f"{verdict.failure.message}; again in {delay:.1f} s")
                await run.halt.sleep(delay)
            else:
                batch_id = batch.id
                break
        self.state.change(index, batch_id=batch_id)
        run.report.note(f"batch {batch_id}: {counted(len(shard.numbers), 'job')} submitted")

    async def find(self, index: int) -> str | None:
        """Look for a batch whose creation was not answered, by its metadata."""
        async for batch in self.retrying.batches.list(limit=100):
            metadata = batch.metadata or {}
            if (metadata.get(RUN_KEY), metadata.get(SHARD_KEY)) == (self.state.run, str(index)):
                return batch.id
            if batch.created_at < self.state.started - LIST_MARGIN_SECONDS:
                return None
        return None

    async def cancel(self) -> None:
        """Cancel what is not settled; what was never created is settled by that."""
        import httpx2
        import openai

        self.state.planned = True
        for index, shard in enumerate(self.state.shards):
            if shard.settled:
                continue
            batch_id = shard.batch_id or (await self.find(index) if shard.creating else None)
            self.state.change(index, batch_id=batch_id, settled=batch_id is None)
            if batch_id is not None:
                try:
                    await self.retrying.batches.cancel(batch_id)
                    self.run.report.note(f"batch {batch_id}: cancelling")
                except openai.ConflictError:  # it has ended by itself, and is collected as it is
                    continue
                except (openai.APIError, httpx2.HTTPError) as error:
                    said = judge_call(error).failure.message
                    self.run.report.error(f"batch {batch_id} is not cancelled: {said}")
        self.state.save()

    async def collect(self) -> AsyncIterator[Outcome]:
        """Poll until all batches have ended; yield the outcomes of each as it ends."""
        import httpx2
        import openai

        delay, silent_since = 0.0, None
        halt, options, clock = self.run.halt, self.run.options, self.run.gate.clock
        shards = enumerate(self.state.shards)
        left = [index for index, shard in shards if shard.batch_id and not shard.settled]
        while left:
            await halt.sleep(delay)
            delay = min(MAX_POLL_SECONDS, max(POLL_SECONDS, delay * 1.5))
            for index in list(left):
                halt.check()
                try:
                    batch_id = self.state.shards[index].batch_id or ""
                    batch = await self.retrying.batches.retrieve(batch_id)
                    silent_since = None
                except (openai.APIError, httpx2.HTTPError) as error:
                    verdict = judge_call(error)
                    silent_since = silent_since or clock()
                    lasting = clock() - silent_since > options.max_wait
                    if verdict.action == "stop run" or lasting:
                        raise
                    if verdict.action in ("retry", "wait") and not options.no_wait:
                        self.run.report.note(f"{verdict.failure.message}; the batches go on")
                        continue
                    left.remove(index)
                    async for outcome in self.give_up(index, verdict.failure):
                        yield outcome
                    continue
                self.show(index, batch)
                if batch.status in ENDED:
                    left.remove(index)
                    async for outcome in self.collect_shard(index, batch):
                        yield outcome
            if options.no_wait:
                return

    async def give_up(
        self, index: int, failure: Failure, waiting: Mapping[str, Job] | None = None
    ) -> AsyncIterator[Outcome]:
        """Fail the jobs of a batch that the API does not give out; the others go on."""
        way_on = f"; if it stays so, delete {self.state.path} and repeat with --skip-existing"
        failure = failure._replace(message=failure.message + way_on, maybe_billed=True)
        for job in (self.asked(index) if waiting is None else waiting).values():
            yield await settle(job, Landing(failure=failure), Exchange(0.0), self.run)

    def show(self, index: int, batch: Batch) -> None:
        """Tell how a batch stands, when that has changed."""
        done = batch.request_counts
        counts = f", {done.completed}/{done.total} done, {done.failed} failed" if done else ""
        line = f"batch {batch.id}: {batch.status}{counts}"
        if self.shown.get(index) != line:
            self.shown[index] = line
            self.run.report.note(line)

    async def collect_shard(self, index: int, batch: Batch) -> AsyncIterator[Outcome]:
        """Save all results of an ended batch, join them to their jobs, and name what is missing."""
        import httpx2
        import openai

        waiting = self.asked(index)
        known = frozenset(waiting)
        whole = True
        try:
            for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
                async for outcome in self.results(file_id, waiting, known):
                    if isinstance(outcome, ValueError):
                        whole = False
                    elif isinstance(outcome, BaseException):
                        raise outcome
                    elif outcome is not None:
                        # What could not be written is still there to be fetched once more.
                        lost = isinstance(outcome, Failed) and outcome.failure.kind == "write"
                        whole &= not lost
                        yield outcome
        except (openai.APIError, httpx2.HTTPError) as error:
            async for outcome in self.give_up(index, judge_call(error).failure, waiting):
                yield outcome
            return
        if whole and (batch.status != "completed" or not waiting):
            self.state.change(index, settled=True)
        failure_of = self.missing_results(index, batch)
        for job in waiting.values():
            landing = Landing(failure=failure_of(job.number))
            yield await settle(job, landing, Exchange(0.0), self.run)

    def missing_results(self, index: int, batch: Batch) -> Callable[[int], Failure]:
        """Return what says why a job has no line in the files of its batch."""
        if batch.status == "completed":
            lost = Failure(
                "bad_answer",
                f"batch {batch.id} has no result for this job; repeat the command to fetch it once "
                f"more, or delete {self.state.path} and submit it anew with --skip-existing",
                retryable=True,
                maybe_billed=True,
            )
            return lambda _number: lost
        numbers = self.state.shards[index].numbers
        own: dict[int, tuple[str, str | None]] = {}
        general = []
        errors = (batch.errors.data if batch.errors else None) or []
        for error in errors:
            said = one_line(error.message or error.code)
            if error.line and error.line <= len(numbers):
                own[numbers[error.line - 1]] = said, error.code
                said = f"job {numbers[error.line - 1]}: {said}"
            general.append(said)
        status = f"batch_{batch.status}"
        first = next((error.code for error in errors if error.code), status)
        everything = "; ".join(general[:3]), first

        def failure_of(number: int) -> Failure:
            said, code = own.get(number, everything)
            message = f"batch {batch.id} {batch.status}" + (f": {said}" if said else "")
            passing = bool({status, code} & {*PASSING_CODES})
            return Failure(status, message, code or status, retryable=passing)

        return failure_of

    async def results(
        self, file_id: str, waiting: dict[str, Job], known: Container[str]
    ) -> AsyncIterator[Outcome | BaseException | None]:
        """Save the results of a file, some at a time; yield what each line has come to."""
        import asyncio
        import tempfile

        pending: set[asyncio.Task[Outcome | None]] = set()
        with tempfile.TemporaryFile(dir=self.folder) as file:
            await self.download(file_id, cast("BinaryIO", file))
            file.seek(0)
            try:
                for line in filter(bytes.strip, file):
                    self.run.halt.check()
                    pending.add(asyncio.create_task(self.result(line, waiting, known)))
                    if len(pending) >= LINES_AT_ONCE:
                        ended, pending = await asyncio.wait(
                            pending, return_when=asyncio.FIRST_COMPLETED
                        )
                        for task in ended:
                            yield task.exception() or task.result()
            finally:
                rest = await asyncio.gather(*pending, return_exceptions=True)
            for outcome in rest:
                yield outcome

    async def download(self, file_id: str, file: BinaryIO) -> None:
        """Stream a file to disk, from its begin again when the connection breaks."""
        import httpx2
        import openai

        attempts = 0
        while True:
            try:
                contents = self.retrying.files.with_streaming_response
                async with contents.content(file_id) as response:
                    async for chunk in response.iter_bytes():
                        self.run.halt.check()
                        file.write(chunk)
            except (openai.APIError, httpx2.HTTPError) as error:
                verdict = judge_call(error)
                attempts += 1
                if verdict.action != "retry" or attempts >= self.run.options.max_attempts:
                    raise
                file.seek(0)
                file.truncate()
                await self.run.halt.sleep(retry_delay(verdict, attempts))
            else:
                return

    async def result(
        self, line: bytes, waiting: dict[str, Job], known: Container[str]
    ) -> Outcome | None:
        """Save the images of a line, and their copies; raise a ValueError if it is none."""
        import asyncio

        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self.run.savers, read_result, line, waiting, known, self.folder
            )
        except ValueError:
            raise
        except Exception as error:
            import traceback

            traceback.print_exc()  # a bug must not take the results of the other jobs along
            raise ValueError(repr(error)) from error
        if found is None:
            return None
        if found.job is None:
            kept = listing(image.path for image in found.landing.images.values())
            self.run.report.warn(
                f"a result for {one_line(found.custom_id)}, which is no job of its batch"
                f"{f'; kept as {kept}' if kept else ''}"
            )
            return None
        exchange = Exchange(0.0)
        exchange.attempts, exchange.request_id = int(found.executed), found.request_id
        outcome = await settle(found.job, found.landing, exchange, self.run)
        if isinstance(outcome, Failed) and outcome.failure.kind == "write":
            self.run.failed(outcome.job, outcome.failure)
        return outcome

    def unsettled(
        self, job: Job, shards: Mapping[int, int], halted: Failure | None
    ) -> tuple[Job, Landing, Exchange]:
        """Return what is to be said of a job that no batch has settled in this process."""
        exchange = Exchange(0.0)
        index = shards.get(job.number)
        shard = None if index is None else self.state.shards[index]
        collected = shard is not None and shard.settled and shard.batch_id is not None
        if not job.missing or (collected and all(saved_file(item.path) for item in job.outputs)):
            return job._replace(missing=()), Landing(), exchange
        failure = halted or Failure(
            "cancelled", "cancelled before it was submitted", retryable=True
        )
        exchange.untouched = not collected
        if index is not None and index in self.refused:
            exchange.untouched = False
            failure = self.refused[index]
        elif shard is not None and collected:
            failure = Failure(
                "batch_ended", f"batch {shard.batch_id} is collected; its image is not on disk"
            )
        elif shard is not None and shard.batch_id:
            failure = Failure("submitted", f"in batch {shard.batch_id}", retryable=True)
        return job, Landing(failure=failure), exchange


async def run_batches(jobs: Sequence[Job], options: RunOptions, report: Report) -> list[Outcome]:
    """Submit what is missing through the Batch API, wait, collect, and report each job."""
    import asyncio

    import httpx2
    import openai

    folder = options.out_dir or "."
    outcomes: dict[int, Outcome] = {}
    halted: Failure | None = None
    with locked(folder):
        try:
            state = open_state(folder, jobs, options)
        except OSError as error:
            problem = f"the state of the run cannot be written to {folder}: {one_line(error)}"
            raise UsageError([problem]) from None
        async with running(options, report) as run:
            run.sending.add(asyncio.current_task())  # a second signal ends it at once
            batches = BatchRun(run, state, {job.number: job for job in jobs}, folder)
            try:
                await (batches.cancel() if options.cancel else batches.submit())
                async for outcome in batches.collect():
                    outcomes[outcome.job.number] = outcome
                    report.add(outcome)
            except JobError as error:
                halted = error.failure
            except (openai.APIError, httpx2.HTTPError, OSError) as error:
                halted = judge_call(error).failure
            except asyncio.CancelledError:
                halted = Failure("interrupted", "interrupted", retryable=True)
            run.sending.clear()
            shards = {number: i for i, row in enumerate(state.shards) for number in row.numbers}
            for job in jobs:
                if job.number not in outcomes:
                    outcome = await settle(*batches.unsettled(job, shards, halted), run)
                    outcomes[job.number] = outcome
                    report.add(outcome)
    report.unfinished = options.no_wait and halted is None and not state.finished
    report.close(halted, how_to_go_on(state))
    return list(outcomes.values())


def how_to_go_on(state: BatchState) -> str:
    """Say what the next command is."""
    if state.finished:
        return "To submit what is missing, repeat the command with --skip-existing."
    if state.untouched:
        return "To go on, repeat the command."
    return "To collect the images, repeat the command; to stop the batches, add --cancel to it."


# ----------------------------------------------------------------------------------------- 14. main


def read_drafts(
    arguments: dict[str, Any], *, batch: bool
) -> tuple[list[Draft], list[tuple[int, str]]]:
    """Read the jobs; what is wrong with them is reported with all other problems."""
    try:
        os.getcwd()
        return read_jobs(arguments) if batch else ([single_draft(arguments)], [])
    except UsageError as error:
        return [], [(0, problem) for problem in error.problems]
    except FileNotFoundError:
        raise UsageError(["the current directory is gone; change to another"]) from None


def run_command(arguments: dict[str, Any]) -> int:
    """Read the jobs, plan and check them all, then print them or run them."""
    options = run_options(arguments)
    batch = arguments["command"] == "generate-batch"
    drafts, problems = read_drafts(arguments, batch=batch)
    jobs = [plan_outputs(draft, options) for draft in drafts]
    resumed = continued(options, jobs)
    if resumed != options:
        options, jobs = resumed, [plan_outputs(draft, resumed) for draft in drafts]
    report = Report(len(jobs), options)
    for warning in preflight(drafts, jobs, options, problems):
        report.warn(warning)
    if options.dry_run:
        for job in jobs:
            if options.submitted:
                report.note(f"{job.where}nothing to send, it is submitted already")
            elif job.missing:
                report.result(show_job(job, options, numbered=batch))
            else:
                report.note(f"{job.where}nothing to send, its files are there")
        return 0
    import asyncio
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        # Until the run takes the signals over, SIGTERM ends the program as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = run_batches if options.batch_api else run_jobs
    outcomes = asyncio.run(run(jobs, options, report))
    if options.contact_sheet is not None:
        try:
            write_contact_sheet(options.contact_sheet, outcomes, options, report)
        except KeyboardInterrupt:
            report.interrupted = True
            report.error("interrupted; the images are saved, the contact sheet is not written")
    return report.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        words_given = sys.argv[1:] if argv is None else argv
        only = words_given[0] if words_given and words_given[0] in COMMANDS else None
        return run_command(vars(build_parser(only).parse_args(argv)))
    except UsageError as error:
        for problem in error.problems:
            tell(f"Error: {problem}")
        return 2
    except KeyboardInterrupt:
        tell("Interrupted before anything was sent.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
