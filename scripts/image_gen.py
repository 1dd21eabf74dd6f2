#!/usr/bin/env python3
"""Make and edit images with OpenAI's GPT Image models.

    image_gen.py generate --prompt "A lighthouse on a basalt cliff" --out lighthouse.png
    image_gen.py edit --image room.png --mask wall.png --prompt "Paint the wall sage green"
    image_gen.py generate-batch --input jobs.jsonl --out-dir output/imagegen/batch

Add --dry-run to see what would be sent: it needs no key, no network and no package. Everything
that can be known beforehand is checked before the first request, for every job; an image that was
paid for is written before anything else happens to it.

exit codes:
  0    every requested image is on disk (dry run: the request would be valid)
  1    at least one requested image is missing; repeating the command can help
  2    refused before anything was sent
  3    submitted to the Batch API, not finished (--no-wait)
  4    at least one requested image is missing; repeating the command unchanged helps none
  130  interrupted

The file, from top to bottom; a section uses only what stands above it:

    1  limits, formats, model families     a new model, format, limit or prompt field is a row here
    2  words and failures                  how values are quoted; what is raised
    3  records                             what one section hands to the next
    4  command line                        a new flag or JSONL key is a row here, and a field in 3
    5  requests                            flags and lines of JSONL become jobs
    6  image files by their own bytes      what they say, from their heads to their ends
    7  plan of outputs                     names, and what is there already, by the manifest
    7a cost                                tokens beforehand and afterwards, and their dollars
    7b masks                               what they edit, by their pixels
    8  preflight                           a new check is a generator of sentences
    9  dry run                             the payloads as they are printed
   10  send                                a new error code of the API is a row of VERDICT_BY_CODE
   11  decode and post-process             from an answer to images, and smaller copies of them
   12  write, and what is on disk          the only functions that create files to stay
   13  report                              what is printed, and the exit code
   13a contact sheet
   14  run                                 from a job to its outcome, many at once
   15  run, through the Batch API          a new stage of a shard is a Stage, with its STEPS; an
                                           error code that may pass, one of PASSING_CODES
   16  main
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=3.54", "pillow>=11"]
# ///

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import re
import sys
import time
import unicodedata
from contextlib import (
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from datetime import date, datetime, timezone
from enum import Enum
from itertools import chain, count
from math import ceil, log
from typing import TYPE_CHECKING, Any, NamedTuple, cast

__version__ = "0.2.0"

if sys.version_info < (3, 11):  # noqa: UP036 - all that stands above is read by 3.8, too
    found = "{} is {}.{}.{}".format(sys.executable or "this", *sys.version_info[:3])
    sys.stderr.write(f"Error: image_gen.py needs Python 3.11 or newer; {found}\n")
    raise SystemExit(2)


class Lazy:
    """A module that is loaded when something of it is first asked for.

    PEP 810 gives Python 3.15 a statement for this, which then replaces the class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401
        return getattr(importlib.import_module(self._name), attribute)


# A dry run uses none of these: it starts in a fifth of the time, and works without the packages.
if TYPE_CHECKING:
    import asyncio
    import binascii
    import difflib
    import fcntl
    import filecmp
    import hashlib
    import html
    import ipaddress
    import logging
    import random
    import resource
    import shlex
    import shutil
    import signal
    import socket
    import stat
    import subprocess
    import tempfile
    import threading
    import traceback
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Container,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from concurrent import futures
    from email import utils as email_utils
    from importlib import metadata
    from importlib import util as importlib_util
    from typing import BinaryIO, Literal, NoReturn, TypeAlias, TypeVar
    from urllib import parse as urls

    import httpcore2
    import httpx2
    import jiter
    import openai
    from PIL import (
        ExifTags,
        Image,
        ImageChops,
        ImageDraw,
        ImageFilter,
        ImageFont,
        ImageOps,
        ImageSequence,
        PngImagePlugin,
    )

    Existing: TypeAlias = Literal["refuse", "keep", "replace"]
    # Of an image: just made, made before from this very request, not in the manifest, edited since
    Origin: TypeAlias = Literal["new", "made", "unknown", "changed"]
    Status: TypeAlias = Literal["done", "skipped", "stale", "submitted", "not_sent", "failed"]
    Action: TypeAlias = Literal["retry", "wait", "fail", "stop model", "stop run"]
    Slot: TypeAlias = tuple[int, str]
    OnDraft: TypeAlias = Callable[[object], Awaitable[None]]
    T = TypeVar("T")
else:
    asyncio, binascii, difflib, fcntl = map(Lazy, ("asyncio", "binascii", "difflib", "fcntl"))
    filecmp, hashlib, html, httpx2 = map(Lazy, ("filecmp", "hashlib", "html", "httpx2"))
    ipaddress, jiter, logging, openai = map(Lazy, ("ipaddress", "jiter", "logging", "openai"))
    random, resource, signal, tempfile = map(Lazy, ("random", "resource", "signal", "tempfile"))
    traceback, email_utils, urls = map(Lazy, ("traceback", "email.utils", "urllib.parse"))
    futures, importlib_util = map(Lazy, ("concurrent.futures", "importlib.util"))
    httpcore2, metadata = map(Lazy, ("httpcore2", "importlib.metadata"))
    shlex, shutil, socket = map(Lazy, ("shlex", "shutil", "socket"))
    stat, subprocess, threading = map(Lazy, ("stat", "subprocess", "threading"))
    ExifTags, Image, ImageDraw = map(Lazy, ("PIL.ExifTags", "PIL.Image", "PIL.ImageDraw"))
    ImageFilter, ImageFont = map(Lazy, ("PIL.ImageFilter", "PIL.ImageFont"))
    ImageChops, ImageOps = map(Lazy, ("PIL.ImageChops", "PIL.ImageOps"))
    ImageSequence, PngImagePlugin = map(Lazy, ("PIL.ImageSequence", "PIL.PngImagePlugin"))

# The records are named tuples: importing dataclasses alone would double the time of a dry run.


# ── 1 · Limits, formats, model families ───────────────────────────────────────────────────────────

DEFAULT_MODEL = "gpt-image-2"
DEFAULT_SIZE = "auto"
DEFAULT_QUALITY = "medium"
DEFAULT_FORMAT = "png"
DEFAULT_OUT = "output/imagegen/output"

MAX_PROMPT_CHARACTERS = 32_000
MAX_N = 10
MAX_IMAGES = 16
MAX_IMAGE_BYTES = 50 * 1024 * 1024
MAX_MASK_BYTES = 4 * 1024 * 1024  # the SDK's figure; the API may take more, so it is a warning
MAX_JOBS = 500
OLDEST = {"openai": "3.54", "pillow": "11.0"}  # versions; as in the block of the dependencies
MAX_BATCH_API_JOBS = 50_000
MAX_LINE_BYTES = 16 * 1024 * 1024  # of a file of jobs, or a manifest; a prompt needs a hundredth
MAX_LINES = 1_000_000
MAX_CONCURRENCY = 25
MAX_ATTEMPTS = 10
MAX_NAME_BYTES = 255
MAX_SLUG_BYTES = 180  # of the part of an automatic name that is made of the prompt
MAX_PATH_BYTES = 4095
LONGEST_ADDITION = len("-alt-9999.damaged")  # to the name of an image; a long one is cut for it
WINDOWS_CHARACTERS = '< > : " | ? *'
WINDOWS_REFUSES = re.compile(
    r'[<>:"|?*\x00-\x1f]|[ .]$|'
    r"^(con|prn|aux|nul|con(in|out)\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?$",
    re.IGNORECASE,
)
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of a text
MIN_SECRET = 8  # characters; a shorter key is a stand-in, and may be part of any word
MAX_ANSWER_BYTES = 64 * 1024 * 1024  # for each image, unpacked; raw 4K pixels are half of it
MAX_ERROR_BYTES = 1024 * 1024
MAX_REDIRECTS = 3  # of a GET for an image that an answer names
MAX_DIGITS = 18
MAX_COPY_PIXELS = 64_000_000  # eight times the largest image the API makes
COPY_QUALITY = 90  # of downscaled JPEG and WebP
COPY_LEVEL = 4  # zlib's, of downscaled PNG: a photograph in half the time of level 6, as small
MAX_SHEET_IMAGES = 5_000
SEAM_PIXELS = 2  # between a kept input and what was edited
MATCHING = 0.01  # so much may two aspects differ that fit each other
ASPECT_WEIGHT = 20  # against area, where a size has to match an input
# In the metadata of copies and contact sheets (Software): they may be made anew.
DERIVED_MARK = b"image_gen.py (derived)"
MANIFEST_NAME = ".image_gen-made.jsonl"  # in the folder of a batch: what made its images
LOCK_NAME = ".image_gen.lock"  # the same: who works there, where the system has no locks

# Free sizes, from the guide of gpt-image-2 (the SDK's types repeat it for 2.5).
EDGE_STEP = 16
MAX_EDGE = 3840
MAX_ASPECT = 3
MIN_PIXELS = 655_360
MAX_PIXELS = 8_294_400
EXPERIMENTAL_PIXELS = 2560 * 1440

# Of a gif, whose frames share one sheet: most frames, and the edge of a square that users saw work.
GIF_EDGES = ((9, 960), (12, 816), (16, 720))

BACKGROUNDS = ("transparent", "opaque", "auto")
MODERATIONS = ("auto", "low")
FIDELITIES = ("low", "high")
MASK_EDITS = ("transparent", "white", "black")  # what a mask marks as the part to be edited
COMPLEXITIES = ("low", "medium", "high")
SHUT_DOWN_NOTICE_DAYS = 90

# Lowest and highest value of each number; frames are rounded to 10 ms and capped by the API.
RANGES = {
    "n": (1, MAX_N),
    "output_compression": (0, 100),
    "frame_count": (2, 16),
    "frame_duration_ms": (20, 655_350),
    "partial_images": (1, 3),
    "concurrency": (1, MAX_CONCURRENCY),
    "max_attempts": (1, MAX_ATTEMPTS),
}


class ImageFormat(NamedTuple):
    """What an output format can do."""

    suffixes: tuple[str, ...]
    content_type: str
    is_picture: bool = True  # it may be an input, be streamed, and be edited by a mask
    has_alpha: bool = False
    compresses: bool = False
    animates: bool = False
    downscales: bool = True
    max_n: int = MAX_N


FORMATS = {
    "png": ImageFormat((".png",), "image/png", has_alpha=True),
    "jpeg": ImageFormat((".jpg", ".jpeg"), "image/jpeg", compresses=True),
    "webp": ImageFormat((".webp",), "image/webp", has_alpha=True, compresses=True),
    "gif": ImageFormat((".gif",), "image/gif", is_picture=False, animates=True),
    "svg": ImageFormat((".svg",), "image/svg+xml", is_picture=False, downscales=False, max_n=1),
}
UNMADE_SUFFIXES = (".ico", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".pdf", ".psd")
PICTURE_FORMATS = tuple(name for name, row in FORMATS.items() if row.is_picture)
SUFFIX_FORMATS = {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes}


class ModelFamily(NamedTuple):
    """What the models of one prefix take; dated snapshots follow their family."""

    prefix: str
    qualities: tuple[str, ...] = ("low", "medium", "high", "auto")
    formats: tuple[str, ...] = PICTURE_FORMATS
    sizes: tuple[str, ...] = ()  # empty: free sizes within the limits above
    transparent: bool | None = True  # None: the API decides
    markup: bool = False
    fidelities: tuple[str, ...] = ()  # as documented; empty: input_fidelity has to be left out
    variants: tuple[str, ...] = ()  # where no model has the plain name of the family
    cells: tuple[int, ...] = ()  # along the longer edge, for each quality; see output_tokens
    priced: bool = True  # by PRICES
    shut_down: str = ""  # ISO date

    @property
    def models(self) -> tuple[str, ...]:
        """The names of its models."""
        return tuple(f"{self.prefix}-{name}" for name in self.variants) or (self.prefix,)


OLD_SIZES = ("1024x1024", "1536x1024", "1024x1536", "auto")
QUALITIES = ("low", "medium", "high", "xhigh", "max", "auto")
VARIANTS = ("sunburst", "flare")

old_family = functools.partial(ModelFamily, sizes=OLD_SIZES, priced=False)

# Newest first: a model that no row knows gets the rules of the first row. Of two prefixes that fit,
# the upper one counts.
MODEL_FAMILIES = (
    ModelFamily(
        "gpt-image-2.6",
        QUALITIES,
        tuple(FORMATS),
        transparent=None,
        markup=True,
        variants=VARIANTS,
    ),
    ModelFamily(
        "gpt-image-2.5",
        QUALITIES,
        tuple(FORMATS),
        markup=True,
        variants=VARIANTS,
        cells=(16, 24, 48, 64, 96),
    ),
    ModelFamily("gpt-image-2", transparent=False, cells=(16, 48, 96)),
    old_family("gpt-image-1.5", fidelities=FIDELITIES, shut_down="2026-12-01"),
    old_family("gpt-image-1-mini", fidelities=("low",), shut_down="2026-12-01"),
    old_family("gpt-image-1", fidelities=FIDELITIES, shut_down="2026-10-23"),
)
# Dollars for a million tokens, the same for all families that are priced; to be looked up at
# openai.com/api/pricing. Cached input is cheaper, and no answer tells it apart.
PRICES_DATE = "2026-11-25"
PRICES = {"text in": 5.0, "image in": 8.0, "image out": 30.0}
BATCH_API_SHARE = 0.5  # of the prices
# What nobody has a formula for is bounded: the most that users were billed for an input image, the
# least bytes of a prompt in a token, and what a draft adds (guide of image generation, streaming).
INPUT_IMAGE_DOLLARS = 0.0176
PROMPT_BYTES = 3
DRAFT_TOKENS = 100
# Where the free sizes have their fewest and their most tokens, whatever the quality.
EXTREME_SIZES = (*((width, 480) for width in range(1376, 1441, EDGE_STEP)), (2880, 2880))

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


def model_family(model: str) -> ModelFamily | None:
    """Return the row of a model: its name, or more behind a dash; a vendor may stand first."""
    name = model.rpartition("/")[2]
    for family in MODEL_FAMILIES:
        if f"{name}-".startswith(f"{family.prefix}-"):
            return family
    return None


def days_left(family: ModelFamily) -> float:
    """Return how many days a family's models are still served; negative when it is over."""
    if not family.shut_down:
        return float("inf")
    today = datetime.now(timezone.utc).date()  # noqa: UP017 - Python 3.8 has no other name for it
    return (date.fromisoformat(family.shut_down) - today).days


def models_with(able: Callable[[ModelFamily], bool]) -> str:
    """List the models of the families that can do something, newest first, and their ends."""
    return ", ".join(
        f"{name} until {row.shut_down}" if row.shut_down else name
        for row in MODEL_FAMILIES
        if able(row) and days_left(row) >= 0
        for name in row.models
    )


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


def edges_of(size: str) -> tuple[int, int] | None:
    """Return width and height of a size; None for one that is not given in numbers."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    return (int(found[1]), int(found[2])) if found else None


def name_format(name: str | None) -> str | None:
    """Return the image format that a file name promises."""
    return SUFFIX_FORMATS.get(os.path.splitext(name or "")[1].lower())


# ── 2 · Words and failures ────────────────────────────────────────────────────────────────────────


def redacted(text: str) -> str:
    """Return a text without the key, and without any part of it that is long enough to tell."""
    secret = os.environ.get("OPENAI_API_KEY", "").strip()
    for start in range(len(secret) - MIN_SECRET + 1):
        end = start + MIN_SECRET
        while secret[start:end] in text:
            while end < len(secret) and secret[start : end + 1] in text:
                end += 1
            text = text.replace(secret[start:end], "[key]")
            end = start + MIN_SECRET
    return text


def received(value: object) -> str:
    """Return a value as an error message quotes it: as JSON, and short."""
    quoted = redacted(json.dumps(value, ensure_ascii=False, default=str))
    return quoted if len(quoted) <= 80 else f"{quoted[:60]}… ({len(quoted):,} characters)"


def one_line(message: object) -> str:
    """Return a message of the other side so that it can stand in one line of ours."""
    text = redacted(str(message)[:MAX_ERROR_BYTES])
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 600 else line[:600] + "…"


def is_visible(name: str) -> bool:
    """Tell whether a name can stand in a line: no control characters, nor those that turn it."""
    odd = (c for c in name if not c.isprintable())
    bad = ("Cc", "Cs", "Zl", "Zp")
    return all(unicodedata.category(c) not in bad and c not in TURNING for c in odd)


def dollars(amount: float) -> str:
    """Return an amount to the cent, a small one to the tenth of it."""
    return f"${amount:,.2f}" if amount >= 1 else f"${amount:.3f}".removesuffix("0")


def enough(amount: float) -> str:
    """Return an amount that is to be given, or can be: not less than it is."""
    steps = 100 if amount >= 1 else 1000
    return dollars(ceil(amount * steps - 1e-6) / steps)


def listing(values: Iterable[str]) -> str:
    """Return values as a sentence lists them."""
    return ", ".join(values)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"{hours}{minutes % 60} min {rest} s"


def at_line(number: int) -> str:
    """Return how a message about a line of the JSONL file begins; 0 is no line."""
    return f"line {number}: " if number else ""


def now() -> str:
    """Return the time as files keep it: UTC, ISO 8601, to the second."""
    time_now = datetime.now(timezone.utc)  # noqa: UP017 - Python 3.8 reads it, too
    return sys.intern(time_now.isoformat(timespec="seconds"))


def mapping(value: object) -> dict[str, Any]:
    """Return an object of the other side's JSON, an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def whole_number(value: object) -> int | None:
    """Return a number of the other side, None where something else stands."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return cast("int", value) if is_whole and 0 <= cast("int", value) < 2**63 else None


def strict(value: object) -> Any:  # noqa: ANN401 - as JSON has them
    """Return a value of the other side as every reader of JSON takes it: without NaN and halves."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text, parse_constant=lambda _: None)


class ImageGenError(Exception):
    """A failure that is no bug of this program; its text is for the user."""


class UsageError(ImageGenError):
    """What was asked for cannot be done as asked; nothing has been sent."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Notice(str):
    """What preflight only warns of; any other string that it finds is a problem."""

    __slots__ = ()


class Failure(NamedTuple):
    """Why a job has no image, as it appears under "error" in --json."""

    kind: str
    message: str
    code: str | None = None
    retryable: bool = False
    maybe_billed: bool = False
    behind: str = ""  # the kind of failure for which this job was not done

    @property
    def cause(self) -> str:
        """What kind of failure has to be mended."""
        return self.behind or self.kind


class JobError(ImageGenError):
    """One job fails; action says what that means for the others: by itself, nothing."""

    def __init__(self, failure: Failure, action: Action = "fail") -> None:
        self.failure = failure
        self.action = action
        super().__init__(failure.message)


class StoppedError(ImageGenError):
    """Nothing more is to be sent for this job, for a reason that lies outside of it."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


def bad_answer(explanation: str) -> JobError:
    """Return the error for an answer that came, was paid for, and is of no use."""
    return JobError(Failure("bad_answer", explanation, maybe_billed=True))


# ── 3 · Records ───────────────────────────────────────────────────────────────────────────────────
#
#  Arguments ──► RunOptions                     how the command behaves
#       └──────► ImageRequest ──► Job ──► Plan  what is asked for, and its names on disk
#                          Entry ──┘ │          what the folder remembers of its images
#                       Exchange, Delivery      what has come of it so far
#                                    │
#                     Done | Failed | Skipped   how it has ended
#
# A draft is what the API calls a partial image; a shard, the jobs that become one batch there.


class Part(NamedTuple):
    """An input file, and what it is sent as."""

    role: str
    path: str
    mask_edits: str = MASK_EDITS[0]

    @property
    def is_converted(self) -> bool:
        """Whether something is sent that is made of the file."""
        return self.mask_edits != MASK_EDITS[0]


class ImageRequest(NamedTuple):
    """One request; the fields named in PAYLOAD_KEYS are sent under their own names."""

    title: str  # the prompt as the user wrote it
    fields: Mapping[str, str] = {}  # what else the prompt has, by PROMPT_FIELDS
    augment: bool = True
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
    image: Sequence[str] = ()
    mask: str | None = None
    mask_edits: str = MASK_EDITS[0]
    keep_unmasked: bool = False
    markup: str | None = None

    @property
    def prompt(self) -> str:
        """The prompt as it is sent; composed anew, so that tens of thousands fit into memory."""
        return compose_prompt(self.title, self.fields, augment=self.augment)

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
    def parts(self) -> tuple[Part, ...]:
        """All that is sent of its input files, in their order."""
        images = (Part("image", name) for name in self.image)
        mask = (Part("mask", name, self.mask_edits) for name in [self.mask] if name)
        markup = (Part("markup", name) for name in [self.markup] if name)
        return (*images, *mask, *markup)

    @property
    def files(self) -> tuple[str, ...]:
        """All input files."""
        return tuple(part.path for part in self.parts)


EDITING = ("image", "mask", "mask_edits", "keep_unmasked", "markup")
NOT_SENT = ("title", "fields", "augment", *EDITING)
PAYLOAD_KEYS = ("prompt", *(key for key in ImageRequest._fields if key not in NOT_SENT))


class RunOptions(NamedTuple):
    """How the jobs are run, whatever they ask for; the defaults of the flags stand here only."""

    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    force: bool = False
    skip_existing: bool = False
    remake: bool = False
    only: str | None = None
    fail_fast: bool = False
    keep_partials: bool = False
    batch_api: bool = False
    no_wait: bool = False
    cancel: bool = False
    max_cost: float | None = None
    out_dir: str | None = None
    concurrency: int = 5
    max_attempts: int = 3
    max_wait: float = 600.0
    timeout: float = 600.0
    downscale_max_dim: int | None = None
    downscale_suffix: str = "-web"
    downscale_format: str | None = None
    contact_sheet: str | None = None

    @property
    def existing(self) -> Existing:
        """What is done about a file that is there already."""
        return "replace" if self.force else "keep" if self.resumes else "refuse"

    @property
    def resumes(self) -> bool:
        """Whether images that are there count."""
        return self.skip_existing or self.remake

    @property
    def price_share(self) -> float:
        """What of the prices is paid."""
        return BATCH_API_SHARE if self.batch_api else 1.0


DEFAULTS = ImageRequest._field_defaults | RunOptions._field_defaults


class Derived(NamedTuple):
    """A file that is made of an image on disk."""

    path: str
    kind: Literal["copy", "kept"]  # downscaled; with the unmasked part of the input
    of: str  # the path that was planned for what it is made of
    format: str | None = None  # of a copy; None: as what it is made of
    replace: bool = False  # whatever stands under the name


class Output(NamedTuple):
    """One image to be written, what is made of it, and what a stream shows before it is done."""

    path: str
    planned: str = ""  # the path that was asked for; its image may lie elsewhere
    derived: tuple[Derived, ...] = ()
    drafts: tuple[str, ...] = ()
    origin: Origin | None = None  # it is there
    source: str = ""  # it is there under this path, and gets its own
    stale: str = ""  # what else the image under its name was made from
    archive: str = ""  # the new name of that image when it is made again
    needed: bool = False  # the archived image belongs to another job
    replace: bool = False  # whatever stands under the name
    mend: bool = False  # an empty or cut-off file under the name, if it still is
    collected: bool = False  # it may have been written before, from the same answer


class Job(NamedTuple):
    """A request with the files it stands for; the plan fills in the last two."""

    number: int
    line: int  # of the JSONL file, 0 for a single command
    request: ImageRequest
    folder: str
    name: str | None  # as asked for; None: image_1, image_2 …
    automatic: bool = False  # the name is made of the job's number and prompt
    asked: Mapping[str, Any] = {}  # what makes its images, prompt and input files by their SHA-256
    digest: str = ""  # of that; empty where it cannot be told
    outputs: tuple[Output, ...] = ()
    missing: tuple[Output, ...] = ()  # those that are to be asked for
    stale: str = ""  # what is said of images that were made from another request

    @property
    def where(self) -> str:
        """Where the job comes from, as messages begin."""
        return at_line(self.line)

    @property
    def wanted(self) -> ImageRequest:
        """The request for the images that are missing."""
        return self.request._replace(n=len(self.missing))


class Entry(NamedTuple):
    """A line of a folder's manifest: an image, and what made it."""

    name: str  # in the folder
    digest: str  # of the request
    asked: Mapping[str, Any]  # what it is the digest of
    prompt: str  # as the user wrote it
    model: str
    image: str = ""  # names the image, however many files have it
    sha256: str = ""
    bytes: int = 0
    mtime: int = 0  # nanoseconds
    request_id: str | None = None
    usage: Mapping[str, Any] | None = None  # of the whole answer, beside its first image
    cost_usd: float | None = None  # the same
    time: str = ""
    temporary: str = ""  # the file's name until it has got its own
    kept: bool = False  # it has another file, or another image its place: no job looks for it
    void: bool = False  # the line before is not so: the name was taken

    def under(self, name: str, temporary: str) -> Entry:
        """Return the entry of the image for a name that it is about to get."""
        name, temporary = map(os.path.basename, (name, temporary))
        return self._replace(name=name, temporary=temporary)


class Memory(NamedTuple):
    """What a folder remembers by its manifest."""

    entries: dict[str, Entry]  # by name
    spent: float  # dollars, over all runs


class Plan(NamedTuple):
    """What a command is about to do."""

    jobs: tuple[Job, ...]
    to_send: tuple[Job, ...] = ()  # those that are to be paid for
    others: tuple[Job, ...] = ()  # that --only leaves out
    memory: Memory | None = None  # of the folder of a batch
    problems: tuple[tuple[int, str], ...] = ()  # of reading them, by line
    sheet: Output | None = None  # the contact sheet
    existing: Existing = "refuse"  # what is done about files that are there
    submitted: bool = False  # the Batch API has all of it: nothing is to be sent, inputs included


class Picture(NamedTuple):
    """What the bytes of an image file say, from its head to its end."""

    format: str
    width: int
    height: int
    alpha: bool
    whole: bool
    orientation: int = 1  # how it is stored, as EXIF has it
    tail: int = 0  # bytes behind its end
    active: bool = False  # an SVG that runs or loads something
    oddity: str = ""  # what the API takes badly: CMYK, more than 8 bits, an animation

    @property
    def edges(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def size(self) -> str:
        """The size as the API writes it."""
        return f"{self.width}x{self.height}"

    @property
    def upright(self) -> Picture:
        """The picture as it is seen."""
        on_its_side = self.orientation > 4
        return self._replace(width=self.height, height=self.width) if on_its_side else self


class Saved(NamedTuple):
    """An image on disk."""

    path: str
    bytes: int
    width: int
    height: int
    format: str
    alpha: bool
    origin: Origin = "new"


class Delivery(NamedTuple):
    """What has come of a job so far; each step fills in its part."""

    images: Mapping[str, Saved] = {}  # by the path that was planned
    kept: tuple[Saved, ...] = ()
    copies: tuple[Saved, ...] = ()
    drafts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    failure: Failure | None = None
    held_back: bool = False  # the run stopped before anything was sent for the job
    maybe_billed: bool = False  # by an attempt that has brought nothing
    attempts: int = 0
    seconds: float = 0.0
    request_id: str | None = None
    usage: dict[str, Any] | None = None
    cost_usd: float | None = None  # of all its answers; None: unknown
    size: str | None = None
    quality: str | None = None


class Done(NamedTuple):
    """All images of the job are on disk."""

    job: Job
    delivery: Delivery
    failure: None = None
    status: Status = "done"


class Failed(NamedTuple):
    """At least one image of the job is missing; those that came are in the delivery."""

    job: Job
    delivery: Delivery
    failure: Failure
    status: Status = "failed"


class Skipped(NamedTuple):
    """Nothing was sent: the files are there already, or the failure says why not."""

    job: Job
    delivery: Delivery
    failure: Failure | None = None

    @property
    def status(self) -> Status:
        """How the job has ended, in a word."""
        kind = self.failure.kind if self.failure else "skipped"
        return cast("Status", kind if kind in ("skipped", "stale", "submitted") else "not_sent")


Outcome = Done | Failed | Skipped


# ── 4 · Command line ──────────────────────────────────────────────────────────────────────────────
# One converter for the flag and the JSONL key of an option: both accept and refuse the same values.


def as_text(value: object) -> str:
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


def as_words(value: object) -> str:
    """Accept a string; blanks at its ends do not count."""
    return as_text(value).strip()


def as_whole_number(value: object) -> int:
    """Accept an integer, or digits."""
    if isinstance(value, str) and re.fullmatch(rf"[+-]?[0-9]{{1,{MAX_DIGITS}}}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise argparse.ArgumentTypeError(f"has to be a whole number, not {received(value)}")


def as_seconds(value: object) -> float:
    """Accept a positive number of seconds."""
    digits = str(value)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", digits) or float(digits) == 0:
        raise argparse.ArgumentTypeError(f"has to be a positive number of seconds, not {value!r}")
    return float(digits)


def as_dollars(value: object) -> float:
    """Accept an amount of dollars."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", str(value)):
        raise argparse.ArgumentTypeError(f"has to be dollars, as 2.50, not {received(value)}")
    return float(str(value))


def as_format(value: object) -> str:
    """Accept the name of a format in any case; jpg means jpeg."""
    name = as_text(value).lower()
    return "jpeg" if name == "jpg" else name


def as_visible(value: object) -> str:
    """Accept a name that can stand in one line of output."""
    name = as_text(value)
    if not name:
        raise argparse.ArgumentTypeError("is empty; give a name")
    if not is_visible(name):
        raise argparse.ArgumentTypeError(f"must not hold control characters: {received(name)}")
    return name


def as_path(value: object) -> str:
    """Accept a path, with ~ for the home directory."""
    return os.path.expanduser(as_visible(value))


def as_target(value: object) -> str:
    """Accept a path to write to."""
    if value == "-":
        raise argparse.ArgumentTypeError(
            "cannot be standard output, which names files; give a name"
        )
    return as_path(value)


def as_paths(value: object) -> list[str]:
    """Accept a path or a list of them."""
    if value == []:
        raise argparse.ArgumentTypeError("is an empty list; give a path, or leave it out")
    return [as_path(item) for item in (value if isinstance(value, list) else [value])]


def as_switch(value: object) -> bool:
    """Accept true and false, as JSON has them."""
    if not isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"has to be true or false, not {received(value)}")
    return value


def as_file_name(value: object) -> str:
    """Accept a file name; the directories in it are dropped."""
    name = os.path.basename(as_visible(value).rstrip("/"))
    if name.strip(" ") in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"has to be a file name, not {received(value)}")
    return name


class Option(NamedTuple):
    """A flag; in IMAGE and INPUTS it is a JSONL key as well."""

    usage: str  # the flag and what stands for its value
    convert: Callable[[object], Any] | None  # None: a switch
    help: str
    default: str = ""  # as the help tells it, where DEFAULTS does not
    exclusive: bool = False  # at most one such flag of its group is accepted
    more: Mapping[str, Any] = {}  # what else argparse is told

    @property
    def flag(self) -> str:
        """The flag alone."""
        return self.usage.split(" ")[0]

    @property
    def key(self) -> str:
        """The JSONL key of the flag."""
        return self.flag[2:].replace("-", "_")

    @property
    def shown(self) -> bool:
        """Whether --help lists it."""
        return self.help != argparse.SUPPRESS


def flag(key: str) -> str:
    """Return the flag of a JSONL key."""
    return "--" + key.replace("_", "-")


def elsewhere(usage: str, instead: str, command: str = "generate-batch") -> Option:
    """Return a flag of the other subcommands, which is refused here with the way that is right."""

    def refuse(_value: object) -> NoReturn:
        raise argparse.ArgumentTypeError(f"is no option of {command}: {instead}")

    return Option(usage, refuse, argparse.SUPPRESS, more={"nargs": "?", "const": ""})


PROMPT = (
    Option("--prompt TEXT", as_text, "what to make"),
    Option("--prompt-file FILE", as_path, "read the prompt from a file, - for stdin"),
)
INPUTS = (
    Option(
        "--image FILE",
        as_paths,
        f"an input image; up to {MAX_IMAGES}, the order is kept",
        more={"action": "extend", "required": True},
    ),
    Option(
        "--mask FILE", as_path, "where it is transparent, the first image is edited; of its size"
    ),
    Option(
        "--mask-edits PARTS",
        as_text,
        "what of the mask is edited: transparent, or the white or black parts of a grey picture",
    ),
    Option(
        "--keep-unmasked",
        None,
        "also write NAME-kept.png: the first image itself, but for what the mask edits",
    ),
    Option(
        "--markup FILE",
        as_path,
        "a transparent PNG over the first image that guides the edit; from 2.5 on, without mask",
    ),
    Option(
        "--input-fidelity LEVEL",
        as_text,
        "low or high; gpt-image-1* only, newer models always use high",
    ),
)
IMAGE = (
    Option("--model MODEL", as_text, "a GPT Image model"),
    Option("--n N", as_whole_number, f"variants of the image, 1-{MAX_N}"),
    Option(
        "--size WxH",
        as_text,
        f"auto, or edges that are multiples of {EDGE_STEP} up to {MAX_EDGE}; gpt-image-1* has "
        f"{listing(OLD_SIZES[:-1])}; match: nearest to the first input image",
    ),
    Option("--quality QUALITY", as_text, "low, medium, high, auto; xhigh and max from 2.5 on"),
    Option(
        "--background BACKGROUND",
        as_text,
        "transparent, opaque or auto; gpt-image-2 has no transparent",
        "not sent",
    ),
    Option(
        "--output-format FORMAT",
        as_format,
        "png, jpeg (jpg) or webp; gif and svg from 2.5 on",
        f"the suffix of the name, else {DEFAULT_FORMAT}",
    ),
    Option("--output-compression 0-100", as_whole_number, "jpeg and webp only", "not sent"),
    Option("--moderation LEVEL", as_text, "auto or low", "not sent"),
    Option(
        "--complexity LEVEL", as_text, "low, medium or high: how much the model plans", "not sent"
    ),
    Option("--frame-count 2-16", as_whole_number, "frames of a gif", "the API's 9"),
    Option("--frame-duration-ms MS", as_whole_number, "time of each gif frame", "the API's 200"),
    Option(
        "--partial-images 1-3",
        as_whole_number,
        "stream, and write this many drafts as NAME.partial-N.EXT while the image is made",
    ),
    Option("--safety-identifier ID", as_text, "a stable, hashed id of your end user", "not sent"),
)
JOB_OPTIONS = {option.key: option for option in (*IMAGE, *INPUTS)}
FIELDS = (
    *(Option(f"{flag(key)} TEXT", as_words, what) for key, _, what in PROMPT_SECTIONS if what),
    Option(
        "--augment",
        None,
        "send the labelled lines; --no-augment sends the prompt alone",
        "--augment",
        more={"action": argparse.BooleanOptionalAction},
    ),
)
FILES = (
    Option(
        "--downscale-max-dim PIXELS",
        as_whole_number,
        "also write a copy whose longer edge is at most this",
    ),
    Option("--downscale-suffix SUFFIX", as_text, "what the copy's name adds"),
    Option(
        "--downscale-format FORMAT", as_format, "png, jpeg or webp for the copy", "as the image"
    ),
    Option(
        "--contact-sheet FILE",
        as_target,
        "also write one image of labelled thumbnails of all images",
    ),
    Option("--keep-partials", None, "keep the drafts of --partial-images when the image is there"),
    Option("--force", None, "replace files that exist", exclusive=True),
    Option(
        "--skip-existing",
        None,
        "ask only for images that are not there yet: the same command resumes a run; "
        "generate-batch compares what made them, the others go by name",
        exclusive=True,
    ),
)
OUTPUT = (
    Option(
        "--out PATH",
        as_target,
        "file, or folder if it ends with / or exists",
        f"{DEFAULT_OUT}.<format>",
    ),
    Option("--out-dir DIR", as_target, "folder for image_1.<format>, image_2.<format> …"),
    *FILES,
)
BATCH_OUTPUT = (
    Option("--out-dir DIR", as_target, "folder for all images", more={"required": True}),
    *FILES,
    Option(
        "--remake",
        None,
        "as --skip-existing, and make those again that were made from another request; the old "
        "ones are kept as NAME-old-1.EXT",
    ),
)
BATCH = (
    Option(
        "--input FILE",
        as_path,
        "JSONL (- for stdin), one job a line: an object, a string or plain text; at most "
        f"{MAX_JOBS}, {MAX_BATCH_API_JOBS:,} with --batch-api",
        more={"required": True},
    ),
    Option(
        "--only JOBS",
        as_visible,
        "these jobs alone: numbers (3,7-9) or file names; with --remake they are made again",
    ),
    Option("--concurrency N", as_whole_number, f"requests in flight, 1-{MAX_CONCURRENCY}"),
    Option("--fail-fast", None, "send nothing more after the first failed job"),
    elsewhere("--prompt", "write each prompt as a line of --input"),
    elsewhere("--prompt-file", "give that file as --input, a prompt a line"),
    elsewhere("--out", 'give --out-dir, and "out" in a job for its name'),
    *(elsewhere(option.usage, f'write "{option.key}" into the jobs') for option in INPUTS),
)
FOR_EDITS = tuple(elsewhere(option.usage, "use edit", "generate") for option in INPUTS)
BATCH_API = (
    Option(
        "--batch-api",
        None,
        f"submit up to {MAX_BATCH_API_JOBS:,} jobs there and wait for them; the same command run "
        "again goes on where it was",
    ),
    Option(
        "--no-wait",
        None,
        "submit, collect what is finished, and leave with exit code 3 if some is not",
    ),
    Option("--cancel", None, "cancel what this folder has submitted, and collect what is finished"),
)
RUN = (
    Option("--dry-run", None, "print what would be sent, and send nothing"),
    Option("--json", None, "one JSON object a line on stdout for each job"),
    Option("--quiet", None, "errors only on stderr"),
    Option(
        "--max-cost USD",
        as_dollars,
        "spend no more than this in this run; needs a size and a quality other than auto",
    ),
    Option(
        "--max-attempts N",
        as_whole_number,
        f"requests for a job when the network or the server fails, 1-{MAX_ATTEMPTS}",
    ),
    Option("--timeout SECONDS", as_seconds, "for one request"),
    Option("--max-wait SECONDS", as_seconds, "a job waits this long for the rate limit"),
)


# What other programs call a flag of this one, or why there is none.
MEANT = {
    **dict.fromkeys(("--format", "--type"), ("--output-format",)),
    **dict.fromkeys(
        ("--output", "--out-file", "-o", "--name", "--filename", "--file-name"),
        ("--out", "--out-dir"),
    ),
    **dict.fromkeys(
        (
            "--width",
            "--height",
            "--resolution",
            "--aspect",
            "--aspect-ratio",
            "--ar",
            "--dimensions",
        ),
        ("--size",),
    ),
    **dict.fromkeys(("--count", "--num", "--number", "--num-images"), ("--n",)),
    **dict.fromkeys(("--workers", "--parallel", "--threads", "--jobs"), ("--concurrency",)),
    **dict.fromkeys(("--budget", "--max-price", "--cost"), ("--max-cost",)),
    **dict.fromkeys(("--retries", "--max-retries"), ("--max-attempts",)),
    **dict.fromkeys(("--transparent", "--alpha"), ("--background",)),
    **dict.fromkeys(("--overwrite", "--yes", "-y", "-f"), ("--force",)),
    **dict.fromkeys(("--resume", "--continue"), ("--skip-existing",)),
    **dict.fromkeys(("--file", "-i"), ("--input", "--image", "--prompt-file")),
    "--images": ("--image", "--n"),
    "--negative-prompt": ("--negative",),
    "-p": ("--prompt", "--input"),
    "--remake": ("--force",),
    "--input": "give a picture by edit --image, a prompt by --prompt-file",
    "--wait": "--batch-api waits, unless --no-wait is given",
    "--seed": "the API has none; make variants with --n",
    "--api-key": "set OPENAI_API_KEY in the environment",
    "--key": "set OPENAI_API_KEY in the environment",
}
BATCH_KEYS = '\nkeys of a JSON object ("fields" may hold those of the last line):\n' + "".join(
    f"  {', '.join(keys)}\n"
    for keys in (
        ("prompt", "out", *(option.key for option in IMAGE[:7])),
        [option.key for option in IMAGE[7:]],
        [option.key for option in INPUTS],
        PROMPT_FIELDS,
    )
)
# The groups of --help, in its order.
SINGLE = {"image": IMAGE, "prompt fields": FIELDS, "output": OUTPUT, "run": RUN}
DESCRIPTIONS = {
    "prompt fields": "each adds a labelled line to the prompt that is sent",
    "Batch API": "OpenAI's queue: half the price, limits of its own, answers within 24 hours",
}


class Command(NamedTuple):
    """A subcommand, as its help shows it."""

    help: str
    usage: str
    example: str
    groups: Mapping[str, tuple[Option, ...]]
    more: str = ""  # at the end of its help


COMMANDS = {
    "generate": Command(
        "make an image from a prompt",
        "--prompt TEXT [--out PATH]",
        '{} generate --prompt "A red kite over dunes" --size 1536x1024 --out kite.png',
        {"prompt": (*PROMPT, *FOR_EDITS), **SINGLE},
    ),
    "edit": Command(
        "change or combine images",
        "--image FILE --prompt TEXT [--out PATH]",
        '{} edit --image room.png --prompt "Only paint the wall sage green" --out green.png',
        {"prompt": PROMPT, "input images": INPUTS, **SINGLE},
    ),
    "generate-batch": Command(
        "run many jobs from a JSONL file",
        "--input FILE --out-dir DIR",
        "{} generate-batch --input jobs.jsonl --out-dir kites --concurrency 10",
        {"batch": BATCH, "Batch API": BATCH_API, **SINGLE, "output": BATCH_OUTPUT},
        BATCH_KEYS,
    ),
}
# How the keys of a JSONL line are read; "fields" may hold PROMPT_FIELDS as well.
JOB_KEYS: Mapping[str, Callable[[object], Any]] = {
    **{key: option.convert for key, option in JOB_OPTIONS.items() if option.convert},
    **dict.fromkeys(("prompt", *PROMPT_FIELDS), as_words),
    "keep_unmasked": as_switch,
    "out": as_file_name,
}
# --help quotes the docstring of this file.
SUMMARY, MANUAL = (__doc__ or "\n\n").split("\n\n", 1)
EXIT_CODES = MANUAL[MANUAL.find("exit codes:") : MANUAL.find("\n\nThe file")]


def options_of(command: str) -> list[Option]:
    """Return the flags of a subcommand, those included that its help does not list."""
    return [option for group in COMMANDS[command].groups.values() for option in group]


def guess(flag_name: str, command: str) -> str:
    """Say which flag of a subcommand was probably meant, if one was."""
    name = flag_name.lower().replace("_", "-")
    known = [option.flag for option in options_of(command) if option.shown]
    told = MEANT.get(name, ())
    if isinstance(told, str):
        return told
    begun = [each for each in known if each.startswith(name) and len(name) > 4]
    alike = difflib.get_close_matches(name, set(known) - {"--force"}, n=1, cutoff=0.75)
    meant = [*(each for each in told if each in known), *begun, *alike]
    return f"did you mean {meant[0]}?" if meant else "no such flag"


def check_words(words: Sequence[str], program: str) -> None:
    """Refuse what argparse would refuse without a way on. Raises a UsageError."""
    first = words[0] if words else "--help"
    if first not in COMMANDS and first not in ("-h", "--help", "--version"):
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        hint = "; flags stand behind it" if first.startswith("-") else hint
        said = redacted(first)[:40]
        raise UsageError(f"the first word has to be {' or '.join(COMMANDS)}, not {said!r}{hint}")
    if first in COMMANDS:
        every = options_of(first)
        valued = {option.flag for option in every if option.convert}
        known = {*(option.flag for option in every), "-h", "--help", "--augment", "--no-augment"}
        for before, word in itertools.pairwise(words):
            name = word.partition("=")[0]
            if (
                word.startswith("-")
                and len(word) > 1
                and name not in known
                and before not in valued
            ):
                page = f"{program} {first} --help lists what is accepted"
                raise UsageError(f"unknown {received(name)}: {guess(name, first)} ({page})")


class Arguments(argparse.Namespace):
    """The parsed command line; what is not given stays as it is here or in RunOptions."""

    command: str
    prompt: str | None = None
    prompt_file: str | None = None
    input: str
    out: str | None = None
    out_dir: str | None = None
    batch_api: bool = False

    @property
    def options(self) -> RunOptions:
        """What concerns the run."""
        given = {key: value for key, value in vars(self).items() if key in RunOptions._fields}
        return RunOptions(**given)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints end like every other refusal."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        # One width: asking the terminal for its own costs every run an import of shutil.
        formatter = functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100
        )
        settings |= {"formatter_class": formatter, "argument_default": argparse.SUPPRESS}
        super().__init__(allow_abbrev=False, **settings)

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ANN401
        """Print a page of help; where stdout takes no more, say so instead of a traceback."""
        try:
            print(message, end="", file=file, flush=True)
        except OSError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            if not isinstance(error, BrokenPipeError):  # a reader that has seen enough
                raise UsageError(f"stdout takes no more: {error.strerror}") from None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401
        """Parse the command line; what is not known is refused with what was probably meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0]
            known = [option.flag for option in options_of(parsed.command) if option.shown]
            hint = f"did you mean {known[0]}?"
            if name_format(word):
                hint = (
                    "did you mean --out?"
                    if "--image" not in known
                    else "repeat --image for each file"
                )
            self.error(f"unknown {received(word)}: {hint}", parsed.command)
        return parsed

    def error(self, message: str, command: str = "") -> NoReturn:
        """Raise instead of leaving the process."""
        if "expected one argument" in message:
            message += "; a value that begins with a dash is given as --flag=VALUE"
        program = f"{self.prog} {command}".strip()
        raise UsageError(f"{message.strip()} ({program} --help lists what is accepted)")

    def add_group(self, title: str, options: Iterable[Option]) -> None:
        """Add the flags of a group."""
        group = self.add_argument_group(title, DESCRIPTIONS.get(title))
        exclusive = any(option.exclusive for option in options)
        either = group.add_mutually_exclusive_group() if exclusive else group
        for option in options:
            metavar = option.usage.partition(" ")[2]
            kind: dict[str, Any] = {"action": "store_true"}
            if option.convert:
                kind = {"type": option.convert, "metavar": metavar}
            default = str(option.default or DEFAULTS.get(option.key) or "").removesuffix(".0")
            told = f" (default: {default})" if default and option.shown else ""
            explanation = option.help + told
            add = either.add_argument if option.exclusive else group.add_argument
            add(option.flag, help=explanation, **{**kind, **option.more})


def build_parser(only: str | None = None) -> Parser:
    """Build the command line; with the options of one subcommand only, to start faster."""
    parser = Parser(description=SUMMARY, epilog=EXIT_CODES)
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            usage=f"%(prog)s {command.usage} [options]",
            epilog="\n".join(
                ["example:", "  " + command.example.format(parser.prog), command.more, EXIT_CODES]
            ),
        )
        for title, options in command.groups.items() if only in (None, name) else ():
            sub.add_group(title, options)
    return parser


# ── 5 · Requests ──────────────────────────────────────────────────────────────────────────────────


def request_from_options(values: Mapping[str, Any]) -> ImageRequest:
    """Build the request of a job from flags and keys, by key; None means not given."""
    given = {key: values[key] for key in JOB_OPTIONS if values.get(key) is not None}
    given.setdefault("output_format", name_format(values.get("out")) or DEFAULT_FORMAT)
    fields = {key: values[key] for key in PROMPT_FIELDS if values.get(key)}
    title = (values.get("prompt") or "").strip()
    return ImageRequest(sys.intern(title), fields, values.get("augment", True), **given)


@contextmanager
def opened(name: str, what: str) -> Iterator[BinaryIO]:
    """Open an input file; - is standard input."""
    if name == "-" and sys.stdin is None:
        raise UsageError(f"{what} - cannot be read: standard input is closed")
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{what} {name} cannot be read: {error.strerror or error}") from None


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """Return the prompt of a single command."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file are both given; give one of them")
    if prompt_file is None:
        if prompt is None:
            raise UsageError("no prompt: give --prompt TEXT or --prompt-file FILE (- for stdin)")
        return prompt
    try:
        with opened(prompt_file, "--prompt-file") as file:
            content = file.read(MAX_LINE_BYTES)
        if len(content) == MAX_LINE_BYTES:
            most = f"at most {MAX_PROMPT_CHARACTERS:,} characters are accepted"
            raise UsageError(f"--prompt-file {prompt_file} is no prompt, it is too long; {most}")
        text = content.decode("utf-8-sig")
        return as_text(text.replace("\r\n", "\n").replace("\r", "\n"))
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {prompt_file} is not UTF-8: {error.reason}") from None
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--prompt-file {prompt_file} {error}") from None


def read_single(arguments: Arguments) -> Job:
    """Read the one job of generate or edit."""
    out, out_dir = arguments.out, arguments.out_dir
    if out_dir is None and out is not None and (out.endswith(os.sep) or os.path.isdir(out)):
        out_dir = out
    folder, name = (out_dir, None) if out_dir else os.path.split(out or DEFAULT_OUT)
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    request = request_from_options({**vars(arguments), "prompt": prompt, "out": name})
    return Job(1, 0, request, folder, name)


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


def parse_job_line(line: str | ImageGenError) -> dict[str, Any]:
    """Return the keys of one job: an object, a JSON string, or plain text as its prompt."""
    if isinstance(line, ImageGenError):
        raise line
    try:
        job = json.loads(
            line, parse_constant=no_constant, parse_int=json_number, object_pairs_hook=no_duplicates
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
    way = "; write each of its entries as a line" if isinstance(job, list) else ""
    raise ImageGenError(f"has to be an object, a string or plain text, not {received(job)}{way}")


def unknown_keys(keys: Iterable[str], known: Sequence[str]) -> Iterator[str]:
    """Yield a complaint about the keys that nobody reads, with those that were probably meant."""
    unknown = [key for key in keys if key not in known]
    hints = []
    for key in unknown[:3]:
        name = key[:40].lower().replace("-", "_")
        told = MEANT.get(flag(name), ())
        meant = [each[2:] for each in told if each[2:] in known] if isinstance(told, tuple) else []
        meant += difflib.get_close_matches(name, known, n=1)
        hints.append(received(key) + (f" (did you mean {received(meant[0])}?)" if meant else ""))
    if len(unknown) > len(hints):
        hints.append(f"{len(unknown) - len(hints):,} more")
    if unknown:
        yield f"unknown key {listing(hints)}; known are {listing(sorted(known))}"


def convert_job(job: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the given keys of a job, converted as the flags are, and what is wrong with them."""
    fields = {} if job.get("fields") is None else job["fields"]
    problems = []
    if not isinstance(fields, dict):
        problems.append(f'"fields" has to be an object, not {received(fields)}')
        fields = {}
    problems += unknown_keys(fields, PROMPT_FIELDS)
    problems += unknown_keys(job, (*JOB_KEYS, "fields"))
    given = {key: value for key, value in fields.items() if key in PROMPT_FIELDS}
    given |= {key: value for key, value in job.items() if key in JOB_KEYS and value is not None}
    converted: dict[str, Any] = {}
    for key, value in given.items():
        try:
            if value is not None:
                converted[key] = JOB_KEYS[key](value)
        except argparse.ArgumentTypeError as error:
            problems.append(f"{received(key)} {error}")
            if key == "prompt":
                converted[key] = "(refused)"  # so that it is not called missing as well
    return converted, problems


def slugify(title: str) -> str:
    """Make a file name of a prompt; of its own script's letters where it has no others."""
    slug = re.sub(r"[^a-z0-9]+", "-", title[:80].lower()).strip("-")
    if not slug and any(map(str.isalnum, title[:80])):
        composed = unicodedata.normalize("NFC", title[:80]).lower()
        kept = (c if unicodedata.category(c)[0] in "LMN" else "-" for c in composed)
        slug = re.sub("-+", "-", re.sub("[\ufe00-\ufe0f]", "", "".join(kept))).strip("-")
    short = slug[:60].encode()[:MAX_SLUG_BYTES].decode(errors="ignore")
    return short.strip("-") or "job"


# A byte order mark, zero-width characters and the like, which files that were joined have.
INVISIBLE = re.compile(
    r"^[\s\x00-\x1f\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufffe]+"
)


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; one that would fill the memory comes in pieces."""
    return iter(functools.partial(file.readline, MAX_LINE_BYTES), b"")


def job_lines(file: Iterable[bytes]) -> Iterator[tuple[int, str | ImageGenError]]:
    """Yield the number of each line that holds a job, and its content or what is wrong with it."""
    for number, line in enumerate(file, start=1):
        if len(line) == MAX_LINE_BYTES or number > MAX_LINES:
            most = f"{MAX_LINES:,} lines of {MAX_LINE_BYTES:,} bytes are read at most"
            yield number, ImageGenError(f"is too much: {most}")
            return
        try:
            stripped = INVISIBLE.sub("", line.decode()).rstrip()
        except UnicodeDecodeError as error:
            way = (
                "if it is of Windows: iconv -f CP1252 -t UTF-8 (Chinese: GB18030, Japanese: CP932)"
            )
            said = f"is not UTF-8 ({error.reason} at byte {error.start}); {way}"
            yield number, ImageGenError(said)
        else:
            if stripped and not stripped.startswith("#"):
                yield number, stripped


BINARY = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP|PK\x03\x04|%PDF-|\x1f\x8b", re.DOTALL
)
FENCE = re.compile(r"\s*(```|~~~)\w*$")
BULLET = re.compile(r"\s*([-*+•]|\d{1,3}[.)])\s+\S|\s*[\d０-９]{1,3}[、．]")
TABLE_RULE = re.compile(r"\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)+\|?$")
TABLE_ROW = re.compile(r"\|.*\|.*\|$")
YAML_KEY = re.compile(r"""\s*(- +)?["']?([A-Za-z_-]+)["']?:(\s|$)""")
TOML_KEY = re.compile(r"""()["']?([A-Za-z_-]+)["']? ?= ?["'\[\d]""")
LIST_BEGINS = re.compile(r"(\w+ +)?[\w.]+( *:[^=]*)? *= *[\[({]$")
QUOTED_ROW = re.compile(r"""("([^"]|"")*"[,;\t|])+("([^"]|"")*"|[^"]*)$""")
# Words by which the head of a table is known, whatever its language.
TABLE_WORDS = re.compile(
    r"(.*[_ ])?prompts?([_ (/].*)?|text|descri\w*|beschreib\w*|caption|titel|title|motiv|"
    r"(file|datei)?name|id|nr\.?|no\.?|size|image|提示词?|描述|编号",
    re.IGNORECASE,
)
SAMPLE = 1_000  # lines by which a file is judged, and bytes of each


class Shape:
    """What a file looks like as a whole; one odd line proves nothing."""

    def __init__(self) -> None:
        self.head = b""
        self.lines: list[str] = []  # those that are not empty
        self.is_utf8 = True

    def read(self, file: BinaryIO) -> Iterator[bytes]:
        """Pass lines on, and remember how they look."""
        for line in bounded_lines(file):
            self.head = self.head or line[:SAMPLE]
            text = line[:SAMPLE].decode(errors="replace").lstrip("\ufeff\u200b").rstrip()
            if text.strip() and len(self.lines) < SAMPLE:
                self.lines.append(text)
                self.is_utf8 &= "\ufffd" not in text[:-1] or "\ufffd".encode() in line
            yield line

    @property
    def encoding(self) -> str:
        """Which UTF-16 it is, by its mark or by where its zero bytes are; empty if it is none."""
        if self.head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
            return "UTF-32"
        if self.head.startswith((b"\xff\xfe", b"\xfe\xff")):
            return "UTF-16"
        even, odd = self.head[::2].count(0), self.head[1::2].count(0)
        if 4 * max(even, odd) < len(self.head) or 8 * min(even, odd) > len(self.head):
            return ""
        return "UTF-16BE" if even > odd else "UTF-16LE"

    @property
    def separator(self) -> str:
        """What stands most often between the fields of the first line, were it a head."""
        return max(";\t|,", key=self.lines[0].count)

    @property
    def is_json(self) -> bool:
        """Whether it is one value of JSON, over several lines."""
        first, last = self.lines[0], self.lines[-1]
        begins = first == "{" or re.fullmatch(r"""\[\s*(["{\[].*[,\[{])?""", first) is not None
        parts = sum(
            line.endswith(("[", "]", "{", "}", ",")) or line.startswith(",") for line in self.lines
        )
        ends = last.endswith(("]", "}"))
        return begins and ends and parts > 0.6 * len(self.lines)

    @property
    def is_csv(self) -> bool:
        """Whether it is a table with separators: its head tells, or quotes around its fields."""
        first, separator = self.lines[0], self.separator
        fields = [field.strip(' "') for field in first.split(separator)]
        if first.startswith(("sep=", "#,")) or first.strip(' "').lower() in ("prompt", "prompts"):
            return True
        quoted = sum(QUOTED_ROW.match(line) is not None for line in self.lines)
        alike = sum(line.count(separator) >= len(fields) - 1 for line in self.lines[1:])
        head = len(fields) > 1 and all(len(field) <= 30 for field in fields)
        head = head and f"{separator} " not in first and any(map(TABLE_WORDS.fullmatch, fields))
        return (head and 2 * alike >= len(self.lines) - 1) or quoted > 0.8 * len(self.lines)

    def has_keys(self, key: re.Pattern[str], begins: str) -> bool:
        """Tell whether it has keys of jobs, each in a line, and a beginning or little else."""
        found = list(filter(None, map(key.match, self.lines)))
        keys = {match[2].lower().replace("-", "_") for match in found}
        told = re.fullmatch(begins, self.lines[0]) is not None or any(match[1] for match in found)
        known = bool(keys & {"prompt", "prompts", "jobs"})
        return known and (told or len(found) > 0.6 * len(self.lines))

    @property
    def is_list(self) -> bool:
        """Whether it is a list of Markdown, with headings or a few sentences around it."""
        bullets = sum(BULLET.match(line) is not None for line in self.lines)
        headed = self.lines[0].startswith("#")
        rest = [line for line in self.lines if not line.startswith(("#", " ", "\t"))]
        return bullets >= (1 if headed else 2) and 2 * bullets >= len(rest)

    @property
    def is_text(self) -> bool:
        """Whether it begins as files of text do."""
        return BINARY.match(self.head) is None and 4 * self.head.count(0) <= len(self.head)

    @property
    def is_table(self) -> bool:
        """Whether it is a table of Markdown: by its rule, or its head and most of its lines."""
        head = any(map(TABLE_WORDS.fullmatch, map(str.strip, self.lines[0].strip("|").split("|"))))
        rows = sum(TABLE_ROW.match(line) is not None for line in self.lines)
        ruled = any(map(TABLE_RULE.match, self.lines))
        return ruled or (head and rows > 0.6 * len(self.lines))

    def is_list_of(self, quote: str) -> bool:
        """Tell whether it is a list of a program's strings in such quotes."""
        strings = [line for line in self.lines if line.lstrip().startswith(quote)]
        if LIST_BEGINS.match(self.lines[0]) and self.lines[-1].lstrip().startswith(("]", ")", "}")):
            return bool(strings)
        return self.lines == strings and any(line.endswith(f"{quote},") for line in strings)


# What a file may be that is no list of jobs, how it is known, and the command that makes one of it;
# the first that fits counts.
JOBS_IN = (
    "j = d if isinstance(d, list) else [d] if 'prompt' in d else "
    "d.get('jobs', d.get('prompts', d)); j = j if isinstance(j, list) else j.values()"
)
TO_OTHER = "< {} > {}"
TO_JSONL = f'{JOBS_IN}; [print(json.dumps(e, ensure_ascii=False)) for e in j]" {TO_OTHER}'
LIST_ITEM = r"(?m)^\s*(?:[-*+•]|\d+[.)、．])\s*(?:\[[ xX]\] )?(.*(?:\n[ \t]+[^-*+•\d\s].*)*)"
LIST_WAY = (
    f"python -c \"import re; [print(*e.split()) for e in re.findall(r'{LIST_ITEM}', "
    f"open(0, encoding='utf-8-sig').read())]\" {TO_OTHER}"
)
CSV_ROW = "{{k.strip().lower(): v for k, v in r.items() if k and v}}"
CSV_ROWS = "csv.DictReader(open(0, encoding='utf-8-sig'), delimiter='{separator}')"
CSV_WAY = (
    f'python -c "import csv, json; [print(json.dumps({CSV_ROW}, ensure_ascii=False)) for r in '
    f'{CSV_ROWS}]" {TO_OTHER}'
)
FOREIGN_FILES: Mapping[str, tuple[Callable[[Shape], bool], str]] = {
    "UTF-16 or UTF-32": (
        lambda shape: bool(shape.encoding),
        "iconv -f {encoding} -t UTF-8 {} > {}",
    ),
    "no text": (lambda shape: not shape.is_text, "give a file of prompts"),
    "lines that end with CR": (
        lambda shape: b"\r" in shape.head and b"\n" not in shape.head,
        "tr '\\r' '\\n' < {} > {}",
    ),
    "text in another encoding": (lambda shape: not shape.is_utf8, ""),  # its lines say so
    "a script": (lambda shape: re.match(rb"#! ?/", shape.head) is not None, "give prompts instead"),
    "a code fence": (
        lambda shape: sum(FENCE.match(line) is not None for line in shape.lines) > 1,
        "sed -n '/^ *```/,/^ *```/p; /^ *~~~/,/^ *~~~/p' {} | grep -Ev '```|~~~' > {}",
    ),
    "JSON over several lines": (
        lambda shape: shape.is_json,
        f"python -c \"import json; d = json.load(open(0, encoding='utf-8-sig')); {TO_JSONL}",
    ),
    "a list of a program": (
        lambda shape: shape.is_list_of('"'),
        r"""grep -oE '"([^"\]|\\.)*"' {} > {}""",  # JSON has such strings, too
    ),
    "a list in single quotes": (
        lambda shape: shape.is_list_of("'"),
        """grep -oE "'[^']*'" {} | tr -d "'" > {}""",
    ),
    "a Markdown table": (
        lambda shape: shape.is_table,
        "write its prompts into a file, one a line",
    ),
    "HTML or XML": (
        lambda shape: re.match(r"<(!DOCTYPE|html|\?xml|svg)", shape.lines[0]) is not None,
        "write its prompts into a file, one a line",
    ),
    "TOML": (
        lambda shape: shape.has_keys(TOML_KEY, r"\[\[?[\w.]+\]?\]"),
        f'python -c "import json, tomllib; d = tomllib.loads(open(0).read()); {TO_JSONL}',
    ),
    "YAML": (
        lambda shape: shape.has_keys(YAML_KEY, "---|(prompts|jobs):"),
        f'python -c "import json, yaml; d = yaml.safe_load(open(0)); {TO_JSONL}  # has PyYAML',
    ),
    "a Markdown list": (lambda shape: shape.is_list, LIST_WAY),
    "CSV": (lambda shape: shape.is_csv, CSV_WAY),
}


OF_ONE_LINE = ("UTF-16 or UTF-32", "no text", "lines that end with CR", "a script", "HTML or XML")


def refuse_foreign(shape: Shape, source: str) -> None:
    """Raise a UsageError for a file that is no list of jobs, with the way to one."""
    for what, (is_it, way) in FOREIGN_FILES.items() if shape.lines else ():
        if (len(shape.lines) > 1 or what in OF_ONE_LINE) and is_it(shape):
            if not way:
                return
            suffix = "txt" if "list" in what else "jsonl"
            targets = (f"{os.path.splitext(source)[0]}-jobs{n or ''}.{suffix}" for n in count())
            target = next(name for name in targets if not os.path.lexists(name))
            names = ("FILE", "jobs.jsonl") if source == "-" else (source, target)
            facts = {"separator": shape.separator.replace("\t", "\\t"), "encoding": shape.encoding}
            command = way.format(*map(shlex.quote, names), **facts)
            wanted = "a job a line is wanted, a prompt or a JSON object"
            plain = "(lines that are prompts as they stand: write each as a JSON string)"
            raise UsageError(f"--input {source} looks like {what}; {wanted} {plain}: {command}")


def read_job(
    number: int, line_number: int, line: str | ImageGenError, flags: Mapping[str, Any]
) -> tuple[Job, list[str]]:
    """Read a job of a batch, and what is wrong with its line."""
    try:
        given, wrong = convert_job(parse_job_line(line))
    except ImageGenError as error:
        given, wrong = {"prompt": "(refused)"}, [str(error)]
    request = request_from_options({**flags, **given})
    automatic = f"{number:03d}-{slugify(request.title)}"
    name = given.get("out", automatic)
    job = Job(number, line_number, request, flags.get("out_dir") or "", name)
    return job._replace(automatic=name is automatic), wrong


def read_batch(arguments: Arguments) -> tuple[list[Job], list[tuple[int, str]]]:
    """Read the jobs of a batch, and the problems of lines, by line number."""
    source, flags = arguments.input, {**vars(arguments), "prompt": None}
    most = MAX_BATCH_API_JOBS if arguments.batch_api else MAX_JOBS
    if arguments.options.only is not None:  # which says how many of them
        most = sys.maxsize
    jobs: list[Job] = []
    problems: list[tuple[int, str]] = []
    number = 0
    with opened(source, "--input") as file:
        shape = Shape()
        for number, (line_number, line) in enumerate(job_lines(shape.read(file)), start=1):
            if number <= most:
                job, wrong = read_job(number, line_number, line, flags)
                jobs.append(job)
                problems += [(line_number, problem) for problem in wrong]
    refuse_foreign(shape, source)
    if not number:
        raise UsageError(f"--input {source} holds no job; write one a line")
    if number > most:
        hint = "" if arguments.batch_api else f"; --batch-api takes {MAX_BATCH_API_JOBS:,}"
        raise UsageError(f"--input {source} holds {number:,} jobs; accepted are {most:,}{hint}")
    return jobs, problems


def read_jobs(arguments: Arguments) -> tuple[list[Job], list[tuple[int, str]]]:
    """Read the jobs; what is wrong with them is reported with all other problems."""
    try:
        os.getcwd()
        if arguments.command == "generate-batch":
            return read_batch(arguments)
        return [read_single(arguments)], []
    except UsageError as error:
        return [], [(0, problem) for problem in error.problems]
    except FileNotFoundError:
        raise UsageError("the current directory is gone; change to another") from None


# ── 6 · Image files by their own bytes ────────────────────────────────────────────────────────────
# Not with Pillow: a dry run judges masks and inputs too, and needs no package.


big_endian = functools.partial(int.from_bytes, byteorder="big")  # PNG and JPEG
little_endian = functools.partial(int.from_bytes, byteorder="little")  # WebP and GIF

MAX_CHUNKS = 1_000_000  # of a PNG; one of 64 MB, written in pieces of 64 bytes, has as many
MAX_SVG_HEAD = 64 * 1024
MAX_EXIF_BYTES = 64 * 1024
DEEP = "of more than 8 bits a channel"
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
SVG_BEGINS = (b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE")
# What a browser would run or load: elements, event handlers, references that leave the file.
SVG_ACTIVE = re.compile(
    rb"<(?:script|foreignobject|iframe)\b|\son[a-z]+\s*=|href\s*=\s*[\"'](?!#|data:image)",
    re.IGNORECASE,
)


def png_layout(file: BinaryIO) -> tuple[int, set[bytes], int]:
    """Walk the chunks to IEND; return its end (0: none), their kinds, and the orientation.

    PNG specification, 5.3 and 11.3.
    """
    at, kinds, orientation = 8, set(), 1
    for _ in range(MAX_CHUNKS):
        file.seek(at)
        chunk = file.read(8)
        if len(chunk) < 8:
            break
        kind, length = chunk[4:], big_endian(chunk[:4])
        kinds.add(kind)
        if kind == b"eXIf":
            orientation = exif_orientation(file.read(min(length, MAX_EXIF_BYTES)))
        at += 12 + length
        if kind == b"IEND":
            return at, kinds, orientation
    return 0, kinds, orientation


def jpeg_layout(content: bytes) -> tuple[int, int, int, int, str]:
    """Walk the segments to EOI; return width, height, orientation, the end, and an oddity.

    ITU T.81, B.1.1: FF00 is data, D0 to D7 stand inside of a scan, FF may be repeated.
    """
    width, height, orientation, at, oddity = 0, 0, 0, 2, ""
    while found := JPEG_MARKER.search(content, at):
        marker, at = found[1][0], found.end()
        if marker == 0xD9:
            return width, height, orientation or 1, at, oddity
        length = big_endian(content[at : at + 2])
        if length < 2:
            break
        # SOF0 to SOF15, without DHT, JPG and DAC
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (big_endian(content[at + k : at + k + 2]) for k in (3, 5))
            bits, channels = content[at + 2 : at + 3], content[at + 7 : at + 8]
            oddity = "CMYK" if channels == b"\4" else DEEP if bits > b"\x08" else ""
        elif marker == 0xE1 and content.startswith(b"Exif\0\0", at + 2):
            orientation = orientation or exif_orientation(content[at + 8 : at + length])
        at += length
    return width, height, orientation or 1, 0, oddity


def exif_orientation(tiff: bytes) -> int:
    """Return the Orientation (tag 0x0112) of the first directory of EXIF; 1 if it has none.

    TIFF 6.0, section 2: the directory's entries have 12 bytes, the value of a short at the eighth.
    """
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    start = number(4, 4)
    for at in range(start + 2, start + 2 + 12 * number(start), 12):
        if number(at) == 0x0112:
            return number(at + 8) if number(at + 8) in range(1, 9) else 1
    return 1


def webp_orientation(content: bytes) -> int:
    """Return the Orientation of a WebP's EXIF; 1 if it has none (RFC 9649, section 2.3)."""
    at = 12
    while chunk := content[at : at + 8]:
        length = little_endian(chunk[4:])
        if chunk[:4] == b"EXIF":
            return exif_orientation(content[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    return 1


def webp_size(head: bytes) -> tuple[int, int, bool]:
    """Read width, height and alpha of the three kinds of WebP (RFC 9649, section 2)."""
    if head[12:16] == b"VP8X":
        width, height = (little_endian(head[at : at + 3]) + 1 for at in (24, 27))
        return width, height, bool(head[20] & 0x10)
    if head[12:16] == b"VP8L":
        bits = little_endian(head[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    return little_endian(head[26:28]) & 0x3FFF, little_endian(head[28:30]) & 0x3FFF, False


def gif_layout(content: bytes) -> tuple[bool, int]:
    """Walk the blocks to the trailer; return whether a frame is transparent, and the end.

    GIF89a, 18 to 27: a colour table follows where its flag is set, sub-blocks end with a zero.
    """

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    padded, transparent = content + bytes(16), False
    at = 13 + table(padded[10])
    while at < len(content):
        if padded[at] == 0x3B:
            return transparent, at + 1
        if padded[at] == 0x21:
            transparent = transparent or (padded[at + 1] == 0xF9 and bool(padded[at + 3] & 1))
            at += 2
        elif padded[at] == 0x2C:
            at += 11 + table(padded[at + 9])
        else:
            break
        while at < len(content) and padded[at]:
            at += padded[at] + 1
        at += 1
    return transparent, 0


def svg_picture(content: bytes) -> Picture | None:
    """Read the size that an SVG's root element gives in numbers, 0 where it gives none."""
    root = re.search(rb"<svg\b[^<>]*>", content[:MAX_SVG_HEAD])
    if root is None:
        return None
    sizes = (rb'\s%s="([0-9]{1,6})(\.[0-9]*)?(px)?"' % edge for edge in (b"width", b"height"))
    width, height = (int(found[1]) if (found := re.search(size, root[0])) else 0 for size in sizes)
    end = content.rfind(b"</svg>") + len(b"</svg>")
    whole = end >= root.end()
    tail = len(content[end:].strip()) if whole else 0
    active = re.search(SVG_ACTIVE, content) is not None
    return Picture("svg", width, height, alpha=True, whole=whole, tail=tail, active=active)


def whole_of(file: BinaryIO) -> bytes:
    """Return all that a file holds."""
    file.seek(0)
    return file.read()


def probe(file: BinaryIO) -> Picture | None:
    """Read format, size, alpha and wholeness of an image; None if it is none of FORMATS."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(30).ljust(30, b"\0")
    width, height, orientation, end, oddity = 0, 0, 1, 0, ""
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        kind, width, height = "png", big_endian(head[16:20]), big_endian(head[20:24])
        end, chunks, orientation = png_layout(file)
        alpha = b"tRNS" in chunks or head[25] in (4, 6)
        oddity = "animated" if b"acTL" in chunks else DEEP if head[24] > 8 else ""
    elif size > MAX_ANSWER_BYTES:  # it would have to be read, and is nothing that was made
        return None
    elif head.startswith(b"\xff\xd8\xff"):
        kind, alpha = "jpeg", False
        width, height, orientation, end, oddity = jpeg_layout(whole_of(file))
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        kind, end = "webp", little_endian(head[4:8]) + 8
        width, height, alpha = webp_size(head)
        extended = head[20] if head[12:16] == b"VP8X" else 0
        oddity = "animated" if extended & 2 else ""
        orientation = webp_orientation(whole_of(file)) if extended & 8 else 1
    elif head.startswith((b"GIF87a", b"GIF89a")):
        kind, width, height = "gif", little_endian(head[6:8]), little_endian(head[8:10])
        alpha, end = gif_layout(whole_of(file))
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(SVG_BEGINS):
        return svg_picture(whole_of(file))
    else:
        return None
    whole = 0 < end <= size and width > 0
    tail = size - end if whole else 0
    return Picture(kind, width, height, alpha, whole, orientation, tail, oddity=oddity)


def probe_file(name: str) -> Picture | None:
    """Probe a file on disk; None for what is no file, as a pipe, which would be waited for."""
    with suppress(OSError):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                return probe(file)
    return None


# ── 7 · Plan of outputs ───────────────────────────────────────────────────────────────────────────


def beside(path: str, suffix: str) -> str:
    """Return the path of a file that belongs to an image: its name with a suffix."""
    stem, extension = os.path.splitext(path)
    return stem + suffix + extension


def with_format(path: str, kind: str | None) -> str:
    """Return a path whose name ends as one of a format does."""
    if kind not in FORMATS or kind == name_format(path):
        return path
    return os.path.splitext(path)[0] + FORMATS[kind].suffixes[0]


def with_room(path: str) -> str:
    """Return a path whose name can be added to: a very long one is cut."""
    folder, name = os.path.split(path)
    stem, extension = os.path.splitext(name)
    room = MAX_NAME_BYTES - LONGEST_ADDITION - len(os.fsencode(extension))
    if len(os.fsencode(stem)) <= room:
        return path
    return os.path.join(folder, os.fsencode(stem)[:room].decode("utf-8", "ignore") + extension)


def free_names(name: str) -> Iterator[str]:
    """Yield the name itself, then names beside it."""
    yield name
    yield from (beside(with_room(name), f"-alt-{number}") for number in count(1))


def old_names(name: str) -> Iterator[str]:
    """Yield the names for an image that another takes the place of."""
    yield from (beside(with_room(name), f"-old-{number}") for number in count(1))


def plan_names(job: Job) -> Iterator[str]:
    """Yield the paths of a job's images."""
    request, name = job.request, job.name
    stem, extension = os.path.splitext(name or "")
    if name_format(name) is None:
        stem, extension = name or "", f".{request.output_format}"
    for variant in range(1, request.n + 1):
        if name is None:
            number = f"image_{variant}"
        else:
            number = stem if request.n == 1 else f"{stem}-{variant}"
        yield os.path.join(job.folder, number + extension)


def derived_of(path: str, request: ImageRequest, options: RunOptions) -> Iterator[Derived]:
    """Yield what is made of an image at a path, each behind what it is made of."""
    suffix, kept = options.downscale_suffix, with_format(beside(path, "-kept"), "png")
    dashed = suffix if suffix.startswith(("-", "_")) else f"-{suffix}"
    wanted = None if request.output_format == "gif" else options.downscale_format
    if request.keep_unmasked:
        yield Derived(kept, "kept", path)
    for original in (path, kept) if request.keep_unmasked else (path,):
        if options.downscale_max_dim is not None:
            yield Derived(with_format(beside(original, dashed), wanted), "copy", original, wanted)


def output_at(path: str, planned: str, job: Job, options: RunOptions) -> Output:
    """Return the output of a job whose image lies, or will lie, at a path."""
    drafts = min(job.request.partial_images or 0, RANGES["partial_images"][1])
    return Output(
        path,
        planned,
        derived=tuple(derived_of(path, job.request, options)),
        drafts=tuple(beside(path, f".partial-{n}") for n in range(1, drafts + 1)),
    )


def fit(edges: tuple[int, int], others: tuple[int, int]) -> bool:
    """Tell whether two pictures have one aspect, as near as makes no difference."""
    return abs(edges[0] * others[1] / (edges[1] * others[0]) - 1) <= MATCHING + 1e-9


@functools.cache  # of the inputs of a command, which many jobs may share
def nearest_size(wanted: tuple[int, int], sizes: Sequence[str]) -> str:
    """Return the size that is nearest to an aspect and an area: one of some, or a free one.

    A deviation in aspect weighs more than one in area, since it cannot be mended afterwards.
    """
    known: list[tuple[int, int]] = [*filter(None, map(edges_of, sizes))]
    aspect = min(MAX_ASPECT, max(1 / MAX_ASPECT, wanted[0] / wanted[1]))
    for width in () if sizes else range(EDGE_STEP, MAX_EDGE + 1, EDGE_STEP):
        step = int(width / aspect / EDGE_STEP)
        known += [(width, (step + more) * EDGE_STEP) for more in (-1, 0, 1, 2)]

    def distance(size: tuple[int, int]) -> tuple[bool, float]:
        width, height = size
        deviation = abs(log(width / height / aspect))
        growth = abs(log(width * height / wanted[0] / wanted[1]))
        return not fit(size, wanted), ASPECT_WEIGHT * deviation + growth

    legal = [
        edges
        for edges in known
        if 0 < max(edges) <= min(MAX_EDGE, MAX_ASPECT * min(edges))
        and MIN_PIXELS <= edges[0] * edges[1] <= MAX_PIXELS
    ]
    return "{}x{}".format(*min(legal, key=distance))


def match_size(job: Job, look: Callable[[str], Picture | None]) -> Job:
    """Give a job that asks for the size of its first input image the nearest that can be made."""
    request = job.request
    if request.size != "match" or not request.image:
        return job
    picture = look(request.image[0])
    if picture is None or not picture.width * picture.height:  # preflight says so
        return job
    family = model_family(request.model) or MODEL_FAMILIES[0]
    size = nearest_size(picture.upright.edges, family.sizes)
    return job._replace(request=request._replace(size=size))


def plan_outputs(job: Job, options: RunOptions) -> Job:
    """Name the files that a job makes, without looking whether they are there."""
    names = plan_names(job) if 1 <= job.request.n <= MAX_N else ()
    return job._replace(outputs=tuple(output_at(path, path, job, options) for path in names))


def is_remnant(name: str, kind: str) -> bool:
    """Tell whether a file is what a writing leaves that was broken off: empty, or cut off."""
    if not os.path.isfile(name):
        return False
    picture = probe_file(name)
    cut_off = picture is not None and picture.format == kind and not picture.whole
    return cut_off or os.path.getsize(name) == 0


def is_derived(name: str, original: str | None = None) -> bool:
    """Tell whether this program has made a copy or a contact sheet: it has its mark, or is empty.

    A copy of an original that was small enough is that original.
    """
    if not os.path.isfile(name):
        return False
    with suppress(OSError), open(name, "rb") as file:
        content = file.read(MAX_ANSWER_BYTES)
        if not content or DERIVED_MARK in content:
            return True
        return original is not None and same_content(name, original)
    return False


def same_content(name: str, other: str) -> bool:
    """Tell whether two files hold the same."""
    try:
        return filecmp.cmp(name, other, shallow=False)
    except OSError:
        return False


def may_derive(name: str, existing: Existing, original: str | None = None) -> bool:
    """Tell whether a copy or a contact sheet may take the place of a file."""
    return existing == "replace" or (existing == "keep" and is_derived(name, original))


def find_by_name(output: Output, kind: str) -> Output:
    """Say of an image that no manifest knows whether it is there, by its name and its bytes."""
    seen = probe_file(output.path)
    if seen is not None and seen.whole and seen.format == kind:
        return output._replace(origin="unknown")
    return output._replace(mend=is_remnant(output.path, kind))


def find_missing(job: Job, options: RunOptions, claims: Claims | None) -> Job:
    """Say which images of a job are to be asked for, and what they may replace."""
    outputs = []
    for planned in job.outputs:
        output = planned
        if claims is not None:
            output = claims.find(job, planned, options)
        elif options.existing == "keep":
            output = find_by_name(planned, job.request.output_format)
        derived = tuple(
            each._replace(replace=may_derive(each.path, options.existing, each.of))
            for each in output.derived
        )
        replace = options.existing == "replace"
        outputs.append(output._replace(replace=replace, derived=derived))
    stale = [output for output in outputs if output.stale]
    missing = [output for output in outputs if not output.origin and not stale]
    return job._replace(outputs=tuple(outputs), missing=tuple(missing), stale=stale_sentence(stale))


# What the folder of a batch has, and for whom. Its manifest says of each image what it was made
# from; the digest of that is what a job asks for. A job gets, in this order,
#
#   1  the image under its own name, if it has been made from this very request;
#   2  any other that has been, and that no job has got by 1: lines have moved, or n is another.
#      Under an automatic name it stays where it is; one that was asked for, it gets as well;
#   3  whatever is there under its name that the manifest does not know.
#
# Anything else under its name was made from another request: it belongs to another job, so that an
# automatic name gives way, or it is stale, and stays until --remake.

DIGEST_VERSION = 1
TEMPORARY_NAME = r"(\.image_gen-([0-9a-f]{12})([0-9a-f]{64})?\.tmp)?"
UNDIGESTED = ("n", "stream", "partial_images", "safety_identifier")  # they change no image


def state_of(name: str) -> tuple[Any, ...]:
    """Return a file's name and state, which says whether it is still the same.

    Raises OSError, also for what is no file.
    """
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{name} is no file")
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return os.path.abspath(name), *state


@functools.cache
def digest_of_state(name: str, *_state: int) -> str:
    """Return the SHA-256 of a file, whose state says when it has to be read again."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(name: str) -> str:
    """Return the SHA-256 of a file. Raises OSError, also for what is none."""
    return digest_of_state(*state_of(name))


def with_digest(job: Job, known: Mapping[str, str]) -> Job:
    """Say what makes the images of a job, in full and as a digest.

    Known are the SHA-256 of input files as they were sent, should they be gone.
    """
    request = job.request
    asked = {key: value for key, value in request.payload.items() if key not in UNDIGESTED}
    asked["endpoint"] = request.endpoint
    asked["prompt"] = hashlib.sha256(request.prompt.encode()).hexdigest()
    try:
        for part in request.parts:
            digest = known.get(part.path) or file_digest(part.path)
            asked.setdefault(part.role, []).append(digest)
            if part.is_converted:
                asked["mask_edits"] = part.mask_edits
    except (OSError, ValueError):  # preflight says so
        return job._replace(asked={}, digest="")
    content = json.dumps(asked, sort_keys=True).encode()
    digest = f"{DIGEST_VERSION}-{hashlib.sha256(content).hexdigest()}"
    return job._replace(asked=asked, digest=digest)


def read_entry(line: bytes) -> Entry | None:
    """Read a line of a manifest; None for one that is torn, foreign, or of another version."""
    with suppress(ValueError, TypeError, RecursionError):
        fields = mapping(json.loads(line))
        entry = Entry(**{key: fields[key] for key in Entry._fields if key in fields})
        entry = entry._replace(usage=None, prompt=sys.intern(entry.prompt))  # as the job has it
        cost = entry.cost_usd or 0.0
        texts = (entry.name, entry.temporary, entry.prompt, entry.sha256, entry.image)
        numbers = (entry.bytes, entry.mtime)
        if (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(number, int) for number in numbers)
            and cost is not True
            and 0 <= cost < 1e9
            and isinstance(entry.asked, dict)
            and str(entry.digest).startswith(f"{DIGEST_VERSION}-")
            and is_visible(entry.name)
            and os.path.basename(entry.name) == entry.name
            and re.fullmatch(TEMPORARY_NAME, entry.temporary)
        ):
            return entry
    return None


def add_to(memory: Memory, entry: Entry) -> Memory:
    """Let a folder remember one thing more; the last word on a name counts."""
    cost, former = entry.cost_usd or 0.0, memory.entries.get(entry.name)
    if entry.void:
        cost = -cost if memory.entries.pop(entry.name, None) else 0.0
    elif entry.name:
        if former and former.image == entry.image:  # a line that was merged in twice
            cost = 0.0
        memory.entries[entry.name] = entry._replace(usage=None, cost_usd=None)
    return memory._replace(spent=memory.spent + cost)


def read_manifest(folder: str) -> Memory:
    """Return what a folder remembers."""
    name, memory = os.path.join(folder, MANIFEST_NAME), Memory({}, 0.0)
    with suppress(OSError):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                for entry in filter(None, map(read_entry, bounded_lines(file))):
                    memory = add_to(memory, entry)
    return memory


def origin_of(folder: str, entry: Entry) -> Origin | None:
    """Tell whether the image of an entry is there, and still as it was made."""
    path = os.path.join(folder, entry.name)
    if entry.temporary and not os.path.lexists(path):  # its writing was broken off at the end
        path = os.path.join(folder, entry.temporary)
    with suppress(OSError):
        found = os.stat(path)
        if found.st_size == entry.bytes and (
            found.st_mtime_ns == entry.mtime or file_digest(path) == entry.sha256
        ):
            return "made"
        seen = probe_file(path)
        return "changed" if seen and seen.whole else None
    return None


def difference(entry: Entry, job: Job) -> str:
    """Say in which of its parts an image was made from another request than that of a job."""
    keys = dict.fromkeys((*job.asked, *entry.asked))
    other = [key for key in keys if entry.asked.get(key) != job.asked.get(key)]
    return listing(key for key in other if key != "endpoint") or "line"


def stale_sentence(stale: Sequence[Output]) -> str:
    """Say of images that were made from other requests what they are, and what can be done."""
    if not stale:
        return ""
    first, many = stale[0], len(stale) > 1
    name, archive = os.path.basename(first.path), os.path.basename(first.archive)
    more = f" and {len(stale) - 1} more" if many else ""
    were, them, ones = ("were", "them", "ones") if many else ("was", "it", "one")
    way = f"makes {them} again"
    if first.source:
        way = f"puts {os.path.basename(first.source)} there, which was made from this one"
    return (
        f"{name}{more} {were} made from another {first.stale}; --remake {way} and keeps the old "
        f"{ones} as {archive}{' and so on' if many else ''}"
    )


class Claims:
    """Which images of a folder belong to which slots of jobs; each of them to one at most.

    A slot is a job's number and the path that was planned for an image of it.
    """

    def __init__(self, jobs: Sequence[Job], entries: Mapping[str, Entry], folder: str) -> None:
        self.entries = entries
        self.folder = folder
        self.origins = {
            name: origin
            for name, entry in entries.items()
            if (origin := origin_of(self.folder, entry))
        }
        self.reserved = {output.planned for job in jobs for output in job.outputs}
        self.owners: dict[str, Slot] = {}  # of the images, by their ids
        self.paths: dict[Slot, str] = {}  # of the images that are there
        self.claim(jobs)

    def claim(self, jobs: Sequence[Job]) -> None:
        """Give each image to one slot, and each slot one image at most."""
        slots = [((job.number, output.planned), job) for job in jobs for output in job.outputs]
        spare: dict[str, list[str]] = {}
        for slot, job in sorted(slots, key=lambda item: self.is_kept(item[0])):
            self.take(slot, job, os.path.basename(slot[1]))
        for name in self.origins:
            if not self.entries[name].kept:
                spare.setdefault(self.entries[name].digest, []).append(name)
        for slot, job in slots:
            names = spare.get(job.digest, [])
            while slot not in self.paths and names:
                self.take(slot, job, names.pop(0))

    def is_kept(self, slot: Slot) -> bool:
        """Tell whether what lies under a slot's name has its place elsewhere."""
        entry = self.entries.get(os.path.basename(slot[1]))
        return entry is not None and entry.kept

    def image_of(self, name: str) -> str:
        """Return what names the image of a file."""
        return self.entries[name].image or name

    def take(self, slot: Slot, job: Job, name: str) -> None:
        """Give a slot an image, if it is there, is of its request, and nobody's so far."""
        fits = name in self.origins and self.entries[name].digest == job.digest
        if fits and self.owners.setdefault(self.image_of(name), slot) == slot:
            self.paths[slot] = os.path.join(self.folder, name)

    def is_anothers(self, slot: Slot) -> bool:
        """Tell whether the image under a slot's name belongs to another one."""
        name = os.path.basename(slot[1])
        return name in self.origins and self.owners.get(self.image_of(name), slot) != slot

    def free(self, names: Iterable[str], content_of: str | None = None) -> str:
        """Return the first name that is no file's or job's, or has the content of another one."""
        for name in names:
            if content_of and same_content(name, content_of):
                return name
            if name not in self.reserved and not os.path.lexists(name):
                self.reserved.add(name)
                return name
        raise AssertionError("names are endless")

    def archive(self, path: str) -> str:
        """Return the name by which what stands under a path is kept, if anything does.

        A run that was killed may have got as far as that.
        """
        return self.free(old_names(path), path) if os.path.exists(path) else ""

    def find(self, job: Job, output: Output, options: RunOptions) -> Output:
        """Say where an image of a job is, or where it will be, and what stands there now."""
        slot = job.number, output.planned
        planned, claimed = output.planned, self.paths.get(slot)
        if options.existing == "refuse":  # also what has moved
            return output_at(claimed or planned, planned, job, options)
        path = planned
        if claimed and (job.automatic or claimed == planned):
            path = claimed
        elif job.automatic and self.is_anothers(slot):
            path = self.free(free_names(planned))
        needed = path == planned and self.is_anothers(slot)
        output = output_at(path, planned, job, options)._replace(needed=needed)
        origin = self.origins.get(os.path.basename(claimed)) if claimed else None
        if options.remake and options.only is not None:  # also what is not stale
            return output._replace(archive=self.archive(path))
        if claimed == path:
            return output._replace(origin=origin)
        if os.path.basename(path) in self.origins:
            output = output._replace(source=claimed or "", origin=origin)
            return self.find_other(job, output, options)
        if not claimed:
            return find_by_name(output, job.request.output_format)
        if os.path.lexists(path):  # and nobody knows what it is
            return output_at(claimed, planned, job, options)._replace(origin=origin)
        return output._replace(source=claimed, origin=origin)

    def find_other(self, job: Job, output: Output, options: RunOptions) -> Output:
        """Say what is to be done about a name whose image was made from another request."""
        if not job.digest:  # who can tell?
            return output._replace(origin="unknown")
        output = output._replace(archive=self.archive(output.path))
        if options.remake:
            return output
        entry = self.entries[os.path.basename(output.path)]
        return output._replace(stale=difference(entry, job), origin=None)


def select_jobs(jobs: Sequence[Job], only: str, paths: Mapping[Slot, str]) -> set[int]:
    """Return the numbers of the jobs that --only means: by number, range, or name of an image.

    Paths says where images are that do not lie where they were planned. Raises a UsageError for
    what means no job.
    """
    slots = [(job.number, output.planned) for job in jobs for output in job.outputs]
    named = {job.name or "": job.number for job in jobs}
    named |= {os.path.basename(path): number for number, path in slots}
    named |= {os.path.basename(path): number for (number, _), path in paths.items()}
    chosen: set[int] = set()
    for part in [only] if only in named else map(str.strip, only.split(",")):
        span = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        low, high = (int(span[1]), int(span[2] or span[1])) if span else (0, 0)
        meant = {*range(max(1, low), min(high, len(jobs)) + 1)}
        meant |= {named[part]} if part in named else set()
        if not meant:
            close = difflib.get_close_matches(part, named, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(
                f"--only {received(part)} matches no job{hint}; accepted are numbers from 1 to "
                f"{len(jobs)}, as 3,7-9, and file names of the images"
            )
        chosen |= meant
    return chosen


# ── 7a · Cost ─────────────────────────────────────────────────────────────────────────────────────


def output_tokens(width: int, height: int, cells: int) -> int:
    """Return the tokens of an image, by the number of cells along its longer edge.

    As OpenAI's own calculator has it; halves are rounded to even.
    """
    rows = round(cells * min(width, height) / max(width, height))
    return -(-cells * rows * (2_000_000 + width * height) // 4_000_000)


def tokens_between(request: ImageRequest) -> tuple[int, int] | None:
    """Return the fewest and the most output tokens of a request; None where no formula is known."""
    family = model_family(request.model)
    size = edges_of(request.size)
    if family is None or request.output_format not in PICTURE_FORMATS:
        return None
    sizes = [size] if size else EXTREME_SIZES
    counts = [
        output_tokens(*edges, cells)
        for quality, cells in zip(family.qualities, family.cells, strict=False)
        for edges in sizes
        if request.quality in (quality, "auto")
    ]
    if not counts:
        return None
    drafts = DRAFT_TOKENS * (request.partial_images or 0)
    return request.n * min(counts) + drafts, request.n * max(counts) + drafts


def bound_of(request: ImageRequest, options: RunOptions) -> float:
    """Return the most that a request can cost, in dollars; 0 where no formula is known."""
    _, most = tokens_between(request) or (0, 0)
    words = -(-len(request.prompt.encode()) // PROMPT_BYTES)
    tokens = most * PRICES["image out"] + words * PRICES["text in"]
    whole = tokens / 1_000_000 + INPUT_IMAGE_DOLLARS * len(request.files)
    return whole * options.price_share if most else 0.0


def bound_of_all(jobs: Iterable[Job], options: RunOptions) -> float:
    """Return the most that the missing images of jobs can cost, in dollars."""
    return sum(bound_of(job.wanted, options) for job in jobs)


def cost_of(
    request: ImageRequest, usage: Mapping[str, Any] | None, options: RunOptions
) -> float | None:
    """Return what an answer has cost by the tokens that it tells, in dollars; None: unknown."""
    family = model_family(request.model)
    if not usage or family is None or not family.priced or "svg_usage" in usage:
        return None  # the model that writes an SVG has prices of its own
    told = mapping(usage.get("input_tokens_details"))
    text = told.get("text_tokens", None if request.files else usage.get("input_tokens"))
    images, output = told.get("image_tokens"), usage.get("output_tokens")
    # Gateways that do not count say zero where something must have been.
    counts = (text, images or (None if request.files else 0), output or None)
    known = [number for number in map(whole_number, counts) if number is not None]
    if len(known) < len(counts):
        return None
    whole = sum(number * price for number, price in zip(known, PRICES.values(), strict=True))
    return round(whole / 1_000_000 * options.price_share, 9)


def exceeds(amount: float, cap: float | None) -> bool:
    """Tell whether an amount is more than a cap, by more than sums of floats are off."""
    return cap is not None and amount > cap + 1e-9


def estimate(jobs: Iterable[Job], options: RunOptions) -> str:
    """Say what the images of jobs are about to cost; empty if there are none."""
    least = most = images = 0
    unknown: dict[str, int] = {}
    for request in (job.wanted for job in jobs):
        tokens = tokens_between(request)
        if tokens is None:
            is_picture = request.output_format in PICTURE_FORMATS
            what = request.model if is_picture else request.output_format
            unknown[what] = unknown.get(what, 0) + request.n
        else:
            least, most, images = least + tokens[0], most + tokens[1], images + request.n
    said = []
    if images:
        price = PRICES["image out"] / 1_000_000 * options.price_share
        costs = dict.fromkeys((dollars(least * price), dollars(most * price)))
        tokens_said = dict.fromkeys((f"{least:,}", f"{most:,}"))
        half = " at half price" if options.batch_api else ""
        why = ", as size or quality is auto" if least < most else ""
        said.append(
            f"about {' to '.join(costs)} for {counted(images, 'image')} "
            f"({' to '.join(tokens_said)} output tokens{half}{why}; prices of {PRICES_DATE}); "
            "prompts and input images come on top"
        )
    for what, number in unknown.items():
        said.append(f"no estimate for {counted(number, 'image')} of {what}: no formula is known")
    return "; ".join(said)


# ── 7b · Masks ────────────────────────────────────────────────────────────────────────────────────


class MaskLook(NamedTuple):
    """What a mask does, by its pixels."""

    share: float  # of the picture that is edited: alpha below half
    least: int  # alpha, 0 to 255


def has_pillow() -> bool:
    """Tell whether pictures can be read; a dry run does without."""
    return importlib_util.find_spec("PIL") is not None


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of 8 bits a channel; Pillow would cut off what 16 bits of grey have more."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 257)).convert("L")


def mask_alpha(path: str, mask_edits: str) -> Image.Image:
    """Return the alpha of a mask, mode L: 0 where it edits. Raises what Pillow raises.

    What is transparent in a mask whose white or black parts edit is neither.
    """
    with Image.open(path) as mask:
        if mask_edits == MASK_EDITS[0]:
            return mask.convert("RGBA").getchannel("A")
        grey = eight_bits(mask)
        if mask.has_transparency_data:
            ground = Image.new("RGBA", mask.size, "black" if mask_edits == "white" else "white")
            grey = Image.alpha_composite(ground, mask.convert("RGBA"))
        grey = grey.convert("L")
    return ImageOps.invert(grey) if mask_edits == "white" else grey


@functools.cache
def look_of_state(mask_edits: str, name: str, *_state: int) -> MaskLook | str:
    """Measure a mask, whose state says when that has to be done again; or say why not."""
    picture = probe_file(name)
    if picture is not None and picture.width * picture.height > MAX_COPY_PIXELS:
        return f"it has more than {MAX_COPY_PIXELS:,} pixels"
    try:
        alpha = mask_alpha(name, mask_edits)
    except Exception as error:  # noqa: BLE001 - Pillow meets damage with many kinds
        return one_line(error)
    least = cast("int", alpha.getextrema()[0])
    return MaskLook(sum(alpha.histogram()[:128]) / (alpha.width * alpha.height), least)


def look_at_mask(request: ImageRequest) -> MaskLook | str:
    """Measure the mask of a request, or say why that is not done."""
    if not has_pillow():
        return "the package pillow is missing"
    try:
        return look_of_state(request.mask_edits, *state_of(request.mask or ""))
    except OSError as error:
        return one_line(error)


def mask_hint(request: ImageRequest) -> str:
    """Say what each --mask-edits does with a mask without alpha, what edits less of it first."""
    with suppress(Exception):
        greys = mask_alpha(request.mask or "", "black").histogram()
        shares = {"white": sum(greys[192:]) / sum(greys), "black": sum(greys[:64]) / sum(greys)}
        (one, less), (other, more) = sorted(shares.items(), key=lambda item: item[1])
        if less + more > 0.9 and less:
            edits = f"{flag('mask_edits')} {one} edits {percent(less)} of the image"
            return f"it is black and white: {edits}, {flag('mask_edits')} {other} {percent(more)}"
    return f"if its white or black parts are meant, add {flag('mask_edits')} white or black"


@functools.lru_cache(maxsize=4)  # the jobs of a batch often have one
def mask_of_state(mask_edits: str, name: str, *_state: int) -> bytes:
    """Return a mask as the API wants it: a PNG whose alpha is 0 where it edits."""
    alpha, buffer = mask_alpha(name, mask_edits), io.BytesIO()
    mask = Image.new("RGBA", alpha.size)
    mask.putalpha(alpha)
    mask.save(buffer, "PNG", compress_level=COPY_LEVEL)
    return buffer.getvalue()


def percent(share: float) -> str:
    """Return a share as people read it; a small one is not nothing."""
    return f"{share:.0%}" if share in (0, 1) or 0.01 <= share < 0.995 else f"{share:.2%}"


def shares_of(jobs: Iterable[Job]) -> str:
    """Say how much of their images the masks of jobs will edit; empty if no mask is measured."""
    looks = [look_at_mask(job.request) for job in jobs if job.request.mask]
    shares = sorted(look.share for look in looks if isinstance(look, MaskLook))
    if not shares:
        return ""
    span = " to ".join(dict.fromkeys(percent(share) for share in (shares[0], shares[-1])))
    jobs_said = f", in {counted(len(shares), 'job')}" if len(shares) > 1 else ""
    return f"masks: {span} of the image will be edited{jobs_said}"


# ── 8 · Preflight ─────────────────────────────────────────────────────────────────────────────────
# Generators of sentences: a problem, reported with all the others before any request, or a Notice.


def check_ranges(values: ImageRequest | RunOptions, spell: Callable[[str], str]) -> Iterator[str]:
    """Check the numbers among the values; spell gives a field the name that the user knows."""
    for key, (low, high) in RANGES.items():
        number = getattr(values, key, None)
        if number is not None and not low <= number <= high:
            yield f"{spell(key)} {number}: accepted are {low} to {high:,}"


def check_gif_area(request: ImageRequest, area: int) -> Iterator[str]:
    """Warn of what users saw refused: OpenAI gives no numbers."""
    frames = request.frame_count or 9
    edge = next((edge for most, edge in GIF_EDGES if frames <= most), GIF_EDGES[-1][1])
    if area > edge * edge:
        seen = f"a gif of {frames} frames was refused above {edge}x{edge}"
        yield Notice(f"size {request.size}: {seen}; the API decides")


def size_of_aspect(aspect: str) -> str:
    """Return a free size of an aspect as 16:9, about as large as 1536x1536; "" if it is none."""
    found = re.fullmatch(r"([1-9][0-9]{0,3})[:/]([1-9][0-9]{0,3})", aspect)
    if found is None:
        return ""
    width, height = int(found[1]), int(found[2])
    scale = 1536 / (width * height) ** 0.5
    return nearest_size((round(width * scale), round(height * scale)), ())


def check_size(request: ImageRequest, family: ModelFamily) -> Iterator[str]:
    """Check the size against the list of the family, or against the rules of free sizes."""
    size = request.size
    if family.sizes:
        if size not in family.sizes:
            yield f"size {received(size)}: {request.model} makes {listing(family.sizes)} only"
        return
    if size == "auto":
        return
    edges = edges_of(size)
    if edges is None:
        example = size_of_aspect(size) or "1536x1024"
        yield f"size {received(size)} has to be auto, match or WIDTHxHEIGHT, e.g. {example}"
        return
    width, height = edges
    if width % EDGE_STEP or height % EDGE_STEP:
        near = nearest_size(edges, ())
        yield f"size {size}: both edges have to be multiples of {EDGE_STEP}, e.g. {near}"
    if max(width, height) > MAX_EDGE:
        yield f"size {size}: the longer edge can be at most {MAX_EDGE}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        yield f"size {size}: the longer edge can be at most {MAX_ASPECT} times the shorter"
    if not MIN_PIXELS <= width * height <= MAX_PIXELS:
        yield (
            f"size {size} has {width * height:,} pixels; accepted are "
            f"{MIN_PIXELS:,} to {MAX_PIXELS:,}"
        )
    elif width * height > EXPERIMENTAL_PIXELS:
        yield Notice(f"size {size}: above 2560x1440 pixels the API is experimental")


def check_format(request: ImageRequest, options: RunOptions) -> Iterator[str]:
    """Check that the output format can do what else is asked for."""
    asked = FORMATS.get(request.output_format)
    if asked is None:
        return
    for what, given, ability in (
        ("background transparent", request.background == "transparent", "has_alpha"),
        ("output_compression", request.output_compression is not None, "compresses"),
        ("frame_count", request.frame_count is not None, "animates"),
        ("frame_duration_ms", request.frame_duration_ms is not None, "animates"),
        ("partial_images", request.partial_images is not None, "is_picture"),
        ("mask", request.mask is not None, "is_picture"),
    ):
        if given and not getattr(asked, ability):
            able = [name for name, row in FORMATS.items() if getattr(row, ability)]
            yield f"{what} needs output_format {' or '.join(able)}, not {request.output_format}"
    wanted = options.downscale_format
    if wanted is not None and wanted not in PICTURE_FORMATS:
        yield f"--downscale-format {received(wanted)}: accepted are {listing(PICTURE_FORMATS)}"
    if options.downscale_max_dim is not None and not asked.downscales:
        yield f"--downscale-max-dim: {request.output_format} has no pixels to downscale"
    if asked.max_n < request.n <= MAX_N:
        yield f"n {request.n}: {request.output_format} is made one at a time"


def check_abilities(request: ImageRequest, family: ModelFamily) -> Iterator[str]:
    """Check that the models of the family can do what is asked for."""
    model, quality, asked_format = request.model, request.quality, request.output_format
    able: Callable[[ModelFamily], bool]
    for able, refusal in (
        (
            lambda row: quality in row.qualities,
            f"quality {received(quality)}: {model} has {listing(family.qualities)}",
        ),
        (
            lambda row: asked_format not in FORMATS or asked_format in row.formats,
            f"output_format {asked_format}: {model} makes {listing(family.formats)}",
        ),
        (lambda row: row.markup or request.markup is None, f"markup is not supported by {model}"),
    ):
        if not able(family):
            models = models_with(able)
            yield refusal + (f"; models with it: {models}" if models else "")
    if request.background == "transparent" and family.transparent is None:
        yield Notice(
            f"background transparent: {model} is not known to have it; look at the alpha of what "
            "comes (remove_chroma_key.py --inspect)"
        )
    elif request.background == "transparent" and not family.transparent:
        models = models_with(lambda row: row.transparent is True)
        models += f"; perhaps {models_with(lambda row: row.transparent is None)}"
        yield (
            f"background transparent is not supported by {model}; use a --model that has it "
            f"({models}), or ask for a flat key colour and cut it out with remove_chroma_key.py"
        )


def check_fidelity(request: ImageRequest, family: ModelFamily) -> Iterator[str]:
    """Check input_fidelity, which the newer families do not have."""
    fidelity = request.input_fidelity
    if fidelity is None:
        return
    if not request.image:
        yield "input_fidelity is for edits: give an image with it"
    if not family.fidelities:
        yield f"input_fidelity: leave it out, {request.model} always uses high fidelity"
    elif fidelity in FIDELITIES and fidelity not in family.fidelities:
        yield Notice(
            f"input_fidelity {fidelity}: {listing(family.fidelities)} is documented for "
            f"{request.model}; it is sent as it is"
        )


def check_model(request: ImageRequest) -> Iterator[str]:
    """Check the model, and what its family can do."""
    model = request.model
    if not re.fullmatch(r"([\w.-]+/)*gpt-image-[0-9A-Za-z][0-9A-Za-z._:-]*", model):
        yield (
            f"model {received(model)} is no GPT Image model; "
            f"use one whose name begins with gpt-image-, e.g. {DEFAULT_MODEL}"
        )
        return
    family = model_family(model)
    if family is None:
        family = MODEL_FAMILIES[0]
        yield Notice(
            f"model {model} is not known here; it is checked by the rules of {family.prefix}, and "
            "the API decides"
        )
    elif model.rpartition("/")[2] == family.prefix and family.variants:
        yield Notice(f"model {model} is a family; its models are {listing(family.models)}")
    days = days_left(family)
    if days < SHUT_DOWN_NOTICE_DAYS:
        ends = "was shut down on" if days < 0 else "shuts down on"
        successors = listing(name for row in MODEL_FAMILIES for name in row.models if row.variants)
        yield Notice(f"model {model} {ends} {family.shut_down}; use one of {successors}")
    yield from check_abilities(request, family)
    edges = edges_of(request.size)
    if request.output_format == "gif" and edges:
        yield from check_gif_area(request, edges[0] * edges[1])
    elif request.size != "match":  # which the first image would have decided
        yield from check_size(request, family)
    yield from check_fidelity(request, family)


def check_request(job: Job, options: RunOptions) -> Iterator[str]:
    """Check all that can be judged without looking at the disk."""
    request = job.request
    if not request.title:
        yield "the prompt is missing or empty"
    if len(request.prompt) > MAX_PROMPT_CHARACTERS:
        yield (
            f"the prompt has {len(request.prompt):,} characters with its labelled lines; "
            f"at most {MAX_PROMPT_CHARACTERS:,} are accepted"
        )
    for key, accepted in (
        ("background", BACKGROUNDS),
        ("output_format", FORMATS),
        ("moderation", MODERATIONS),
        ("complexity", COMPLEXITIES),
        ("input_fidelity", FIDELITIES),
        ("mask_edits", MASK_EDITS),
    ):
        value = getattr(request, key)
        if value is not None and value not in accepted:
            yield f"{key} {received(value)}: accepted are {listing(accepted)}"
    yield from check_ranges(request, str)
    if request.partial_images and request.n > 1:
        yield f"partial_images with n {request.n}: a stream does not say which image it shows"
    for key in ("partial_images", "markup"):
        if options.batch_api and getattr(request, key):
            yield f"{key} cannot be sent through --batch-api; leave it out"
    yield from check_format(request, options)
    yield from check_model(request)
    promised, wanted = name_format(job.name), request.output_format
    stem, suffix = os.path.splitext(job.name or "")
    if suffix.lower() in UNMADE_SUFFIXES and wanted in FORMATS:
        yield f"the name {job.name}: no {suffix} is made; call it {stem}.{wanted}, and convert that"
    if promised not in (None, wanted) and wanted in FORMATS:
        yield (
            f"the name {job.name} says {promised}, output_format says {wanted}: "
            f"call it {stem}.{wanted}, or ask for output_format {promised}"
        )


class InputFile(NamedTuple):
    """What preflight learns of an input file."""

    name: str
    problem: str | None = None
    bytes: int = 0
    picture: Picture | None = None


def inspect_input(name: str) -> InputFile:
    """Look at an input image or mask."""
    try:
        size = os.path.getsize(name)
        if not os.path.isfile(name):
            return InputFile(name, "is a folder" if os.path.isdir(name) else "is no regular file")
        with open(name, "rb") as file:
            picture = probe(file)
    except OSError as error:
        if re.match("https?://", name):
            return InputFile(name, "is an address; download it, and give the file")
        return InputFile(name, f"cannot be read: {error.strerror or error}")
    if size >= MAX_IMAGE_BYTES:
        problem = f"has {size:,} bytes; it has to be smaller than {MAX_IMAGE_BYTES:,}"
    elif picture is not None and picture.format == "svg":
        problem = "is an SVG; render it to PNG first"
    elif picture is None or not FORMATS[picture.format].is_picture:
        problem = "is no PNG, JPEG or WebP file by its first bytes"
    elif not picture.width * picture.height:
        problem = f"has no size: the head of the {picture.format} file is damaged"
    else:
        return InputFile(name, bytes=size, picture=picture)
    return InputFile(name, problem)


def check_inputs(request: ImageRequest, inspect: Callable[[str], InputFile]) -> Iterator[str]:
    """Check the input images and the mask."""
    if len(request.image) > MAX_IMAGES:
        yield f"{len(request.image)} input images; at most {MAX_IMAGES} are accepted"
    for name in request.image:
        file = inspect(name)
        if file.problem:
            several = "; repeat --image for each file" if "," in name else ""
            yield f"image {name} {file.problem}{several}"
        elif file.picture and not file.picture.whole:
            yield Notice(f"image {name} does not end as a {file.picture.format} does")
        elif file.picture and file.picture.oddity:
            way = "give one frame" if file.picture.oddity == "animated" else "convert it to RGB"
            yield Notice(f"image {name} is {file.picture.oddity}; the API may refuse it: {way}")
    for role, name, _ in request.parts[len(request.image) :]:
        if request.image:
            yield from check_overlay(role, inspect(name), inspect(request.image[0]), request)
        else:
            yield f"{role} is for edits: give an image with it"
    yield from check_aspect(request, inspect)
    if request.markup is not None and request.mask is not None:
        yield "mask and markup cannot be combined; give one of them"


def check_overlay_size(
    key: str, called: str, size: str, first: Picture, request: ImageRequest
) -> Iterator[str]:
    """Check that an overlay has the size of the first image, which may be stored on its side.

    The API wants a markup that is drawn upright, and does not say which way it wants a mask.
    """
    stored, seen = first.size, first.upright.size
    wanted = seen if key == "markup" else stored
    if key == "mask" and size == seen != stored:
        one_size = "the API may want both in one size: save the image upright"
        yield Notice(f"{called} is {size}, the first image is stored turned; {one_size}")
    elif size != wanted:
        yield f"{called} is {size}, the first image {wanted}; both need one size"
    elif key == "mask" and size == seen and first.orientation > 1 and request.keep_unmasked:
        yield Notice(f"{called} counts as drawn upright, the first image is stored turned")


def check_overlay(
    key: str, overlay: InputFile, first: InputFile, request: ImageRequest
) -> Iterator[str]:
    """Check a mask or a markup, which lie over the first image."""
    called = f"{key} {overlay.name}"
    if overlay.picture is None:
        yield f"{called} {overlay.problem}"
        return
    if key == "markup" and not overlay.picture.alpha:
        yield f"{called} has no alpha channel; it has to be a transparent PNG"
    if first.picture:
        yield from check_overlay_size(key, called, overlay.picture.size, first.picture, request)
    if key == "mask":
        yield from check_mask(called, overlay.picture, request)
    if key == "mask" and request.mask_edits != MASK_EDITS[0]:
        return  # what is sent is made of it
    if overlay.picture.format != "png":
        yield Notice(f"{called} is no PNG; the API documents PNG only")
    if key == "mask" and overlay.bytes > MAX_MASK_BYTES:
        yield Notice(
            f"{called} has {overlay.bytes:,} bytes; the SDK documents less than {MAX_MASK_BYTES:,}"
        )


def check_mask(called: str, picture: Picture, request: ImageRequest) -> Iterator[str]:
    """Check that a mask edits something, and not all of the image."""
    look, part = look_at_mask(request), request.mask_edits
    by_alpha = part == MASK_EDITS[0]
    if by_alpha and not picture.alpha:
        what = "has no alpha channel, and what is transparent in it is edited"
        yield f"{called} {what}; {mask_hint(request)}"
    elif isinstance(look, str):
        harmless = by_alpha and not request.keep_unmasked
        finding = Notice if harmless or not has_pillow() else str
        yield finding(f"{called} is not measured: {look}")
    elif by_alpha and look.least == 255:
        what = "nothing would be edited, it is opaque everywhere"
        yield f"{called}: {what}; {mask_hint(request)}"
    elif look.share == 0 and (request.keep_unmasked or not by_alpha):
        yield f"{called}: nothing would be edited, it is nowhere more than half {part}"
    elif look.share == 0:
        yield Notice(f"{called} is nowhere more than half {part}: little may be edited")
    elif look.share == 1:
        yield Notice(f"{called} protects nothing: all of the image will be edited")


def check_aspect(request: ImageRequest, inspect: Callable[[str], InputFile]) -> Iterator[str]:
    """Check that an edit can come back in the aspect of its first image, and be laid over it."""
    stored = inspect(request.image[0]).picture if request.image else None
    if request.keep_unmasked and not (request.image and request.mask):
        yield "keep_unmasked needs an image and a mask: what the mask protects is kept"
    if request.mask_edits != MASK_EDITS[0] and not request.mask:
        yield f"mask_edits {received(request.mask_edits)}: give a mask with it"
    if request.size == "match" and not request.image:
        yield "size match is for edits: it is nearest to the first input image"
    if stored is None or (request.size != "auto" and not request.keep_unmasked):
        return
    picture, name = stored.upright, request.image[0]
    sizes = (model_family(request.model) or MODEL_FAMILIES[0]).sizes
    nearest, edges = nearest_size(picture.edges, sizes), edges_of(request.size)
    asked = edges_of(nearest)
    usual = filter(None, map(edges_of, OLD_SIZES))  # what auto often comes to
    hint = f"{flag('size')} match asks for {nearest}"
    if asked and not fit(asked, picture.edges):
        model = " or take a model with free sizes" if sizes else ""
        hint = f"no size of {request.model} has it, crop the input{model}"
        edges = edges or asked  # auto would not fit either
    other = f"has another aspect than {name} ({picture.size}); {hint}"
    if edges and request.keep_unmasked and not fit(edges, picture.edges):
        yield f"keep_unmasked: size {request.size} {other}"
    elif request.size == "auto" and (
        request.keep_unmasked or not any(fit(each, picture.edges) for each in usual)
    ):
        lost = ", and there is no kept picture then" if request.keep_unmasked else ""
        yield Notice(
            f"size auto may come back in another aspect than {name} ({picture.size}){lost}; {hint}"
        )
    pixels = picture.width * picture.height
    for fault, found in (
        ("is cut off at its end; give a whole image", not picture.whole),
        (
            f"is {picture.oddity}; convert it to RGB of 8 bits first",
            picture.oddity in ("CMYK", DEEP),
        ),
        (f"has more than {MAX_COPY_PIXELS:,} pixels; give a smaller one", pixels > MAX_COPY_PIXELS),
    ):
        if request.keep_unmasked and found:
            yield f"keep_unmasked: {name} {fault}"


def check_run(options: RunOptions) -> Iterator[str]:
    """Check the options of the run."""
    yield from check_ranges(options, flag)
    max_dim, suffix = options.downscale_max_dim, options.downscale_suffix
    if max_dim is not None and max_dim < 1:
        yield f"--downscale-max-dim {max_dim}: accepted are 1 and more"
    if max_dim is not None and not suffix:
        yield (
            "--downscale-suffix is empty: the copy would overwrite the original; "
            f"give a suffix such as {DEFAULTS['downscale_suffix']}"
        )
    elif max_dim is not None and ("/" in suffix or os.sep in suffix):
        yield f"--downscale-suffix {suffix}: no path separator, please"
    if options.downscale_format is not None and max_dim is None:
        yield "--downscale-format needs --downscale-max-dim"
    if options.remake and options.force:
        yield "--remake and --force are both given; --remake keeps what --force replaces"
    sheet = options.contact_sheet
    if sheet is not None and name_format(sheet) not in PICTURE_FORMATS:
        yield f"--contact-sheet {sheet}: the name has to end with .png, .jpg or .webp"
    for key, given, for_batch_api in (
        ("no-wait", options.no_wait, True),
        ("cancel", options.cancel, True),
        ("concurrency", options.concurrency != DEFAULTS["concurrency"], False),
        ("fail-fast", options.fail_fast, False),
    ):
        if given and options.batch_api and not for_batch_api:
            yield Notice(f"--{key} means nothing with --batch-api")
        elif given and for_batch_api and not options.batch_api:
            yield f"--{key} needs --batch-api"


def check_bound(request: ImageRequest) -> Iterator[str]:
    """Check that it is known beforehand what a request can cost at most."""
    family = model_family(request.model)
    needs = "--max-cost has to know the most that it costs"
    for key in ("size", "quality"):
        if getattr(request, key) == "auto":
            yield f"{key} auto: {needs}; give {flag(key)}"
    if request.output_format not in PICTURE_FORMATS:
        yield f"output_format {request.output_format}: {needs}, and no formula is known"
    elif family is None or not family.cells:
        models = models_with(lambda row: bool(row.cells))
        yield f"model {request.model}: {needs}, and no formula is known; models with it: {models}"


def check_cost(plan: Plan, options: RunOptions) -> Iterator[tuple[int, str]]:
    """Check that --max-cost can hold, and allows all that would be sent."""
    cap = options.max_cost
    if cap is None:
        return
    problems = [(job.line, said) for job in plan.to_send for said in check_bound(job.request)]
    yield from problems
    bound = bound_of_all(plan.to_send, options)
    if exceeds(bound, cap) and not problems:
        images = counted(sum(len(job.missing) for job in plan.to_send), "image")
        most = f"{images} can cost {enough(bound)} with prompts and input images"
        way_on = "raise it, or ask for fewer, smaller or plainer ones (--quality low)"
        yield 0, f"--max-cost {cap:.9g}: {most} (prices of {PRICES_DATE}); {way_on}"


def check_folder(folder: str) -> Iterator[str]:
    """Check that files can be made in a folder, which may be made first."""
    above = folder or "."
    while not os.path.lexists(above) and os.path.dirname(above) != above:
        above = os.path.dirname(above) or "."
    if not os.path.isdir(above):
        yield f"{above} is a file; a folder is needed for the images"
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"folder {above} is not writable"


def same_file(name: str) -> str:
    """Return one spelling for one file, also on disks that do not tell A from a, or ß from ss."""
    decomposed = unicodedata.normalize("NFD", os.path.realpath(name))
    return unicodedata.normalize("NFC", decomposed.casefold())


class Target(NamedTuple):
    """A file that the run will write, or (an image that is there) keep."""

    line: int
    name: str
    replace: bool
    what: str
    kind: str = ""  # a key of STRANGERS; a draft is none, and takes a free name
    moved: bool = False  # it was asked for under another name


# What --skip-existing says of a file that is not what is expected under its name.
STRANGERS = {
    "image": "is no whole {}; move it away, choose another name, or --force to replace it",
    "copy": "is no copy of this program's; give another --downscale-suffix, or move it away",
    "kept": "is no kept picture of this program's; move it away, or choose another name",
    "sheet": "is no contact sheet of this program's; give another --contact-sheet, or move it away",
}


DERIVED = {"copy": "downscaled copy", "kept": "kept picture"}


def targets(plan: Plan) -> Iterator[Target]:
    """Yield every file of a run."""
    for job in plan.jobs:
        for output in job.outputs:
            replace = output.replace or output.mend or bool(output.archive)
            replace = replace or output not in job.missing
            moved = output.path != output.planned and (output.origin or plan.existing == "refuse")
            yield Target(
                job.line, output.path, replace, f"{job.where}the image", "image", bool(moved)
            )
            if output.archive:
                former = f"{job.where}the former image"
                yield Target(job.line, output.archive, replace=True, what=former)
            for each in output.derived:
                what = f"{job.where}the {DERIVED[each.kind]}"
                yield Target(job.line, each.path, each.replace, what, each.kind)
            for name in output.drafts:
                yield Target(job.line, name, replace=True, what=f"{job.where}a partial image")
    if plan.sheet:
        yield Target(0, plan.sheet.path, plan.sheet.replace, "the contact sheet", "sheet")


def check_target(target: Target, plan: Plan) -> Iterator[str]:
    """Check that a file can be made under a name."""
    name = target.name
    parts = os.path.abspath(name).split(os.sep)
    stranger = os.path.lexists(name) and not target.replace
    if os.path.isdir(name):
        yield f"{name} is a folder; an image is to be written there"
    elif stranger and plan.submitted:
        return  # what is paid for is saved beside it
    elif stranger:
        yield f"{name} {STRANGERS[target.kind].format(name_format(name) or DEFAULT_FORMAT)}"
    elif any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in parts):
        yield f"a name of over {MAX_NAME_BYTES} bytes: {received(name)}"
    elif len(os.fsencode(os.path.abspath(name))) > MAX_PATH_BYTES - LONGEST_ADDITION:
        yield f"a path of over {MAX_PATH_BYTES - LONGEST_ADDITION:,} bytes: {received(name)}"
    elif os.name == "nt" and any(re.search(WINDOWS_REFUSES, part) for part in parts[1:]):
        yield f"{name}: Windows has no such name; leave out {WINDOWS_CHARACTERS}, CON, NUL and such"


def is_in_the_way(target: Target, plan: Plan) -> bool:
    """Tell whether a file stands under a name that nobody has said what to do about."""
    if target.replace or plan.existing != "refuse" or plan.submitted:
        return False
    return os.path.lexists(target.name) and not os.path.isdir(target.name)


def check_in_the_way(there: Sequence[Target]) -> Iterator[tuple[int, str]]:
    """Refuse files that exist, each kind of them in one sentence."""
    for moved, one, many in (
        (
            False,
            "exists; choose another name, --force to replace it, or --skip-existing to keep it",
            "exist; choose other names, --force to replace them, or --skip-existing to keep them",
        ),
        (
            True,
            "was made from this very request; --skip-existing takes it, --force makes another one",
            "were made from these requests; --skip-existing takes them, --force makes other ones",
        ),
    ):
        first = [target for target in there if target.moved is moved]
        names = listing(target.name for target in first[:3])
        more = f" and {len(first) - 3:,} more" if len(first) > 3 else ""
        if len(first) == 1:
            yield first[0].line, f"{names} {one}"
        elif first:
            yield 0, f"{names}{more} {many}"


def check_outputs(plan: Plan) -> Iterator[tuple[int, str]]:
    """Check that every file can be made, and that no two are the same; yields lines as well."""
    inputs = {same_file(name) for job in plan.jobs for name in job.request.files}
    taken: dict[str, str] = {}
    folders: dict[str, int] = {}
    in_the_way: list[Target] = []
    for target in targets(plan):
        line, name, what = target.line, target.name, target.what
        key = same_file(name)
        if key in inputs:
            yield line, f"{name} is an input image; it cannot be written as well"
        elif key in taken and not target.moved:
            yield line, f"{name} would be written twice: as {what} and as {taken[key]}"
        elif is_in_the_way(target, plan):
            in_the_way.append(target)
        else:
            yield from ((line, finding) for finding in check_target(target, plan))
        if not target.moved:
            taken.setdefault(key, what)
        folders.setdefault(os.path.dirname(name), line)
    yield from check_in_the_way(in_the_way)
    for folder, line in folders.items():
        yield from ((line, finding) for finding in check_folder(folder))
    images = sum(len(job.outputs) for job in plan.jobs)
    if plan.sheet and images > MAX_SHEET_IMAGES:
        yield 0, f"--contact-sheet holds {MAX_SHEET_IMAGES:,} images, not {images:,}"


def has_host(value: str) -> bool:
    """Tell whether an address names a host to ask, and a port that exists."""
    try:
        url = urls.urlsplit(value if "://" in value else f"//{value}")
        return bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def check_base_url(value: str | None) -> Iterator[str]:
    """Check OPENAI_BASE_URL, which may hold secrets: what is refused is not always shown."""
    if value is None:
        return
    authority = re.split("[/?#]", value.partition("://")[2] or value)[0]
    shown = "is not shown, for it may hold a password: it" if "@" in value else received(value)
    if "@" in authority:
        yield "OPENAI_BASE_URL holds a user or a password; give the key in OPENAI_API_KEY instead"
    elif not value.strip():
        yield "OPENAI_BASE_URL is set and empty; unset it, or give the address of the API"
    elif value != value.strip():
        yield "OPENAI_BASE_URL begins or ends with white space; take it away"
    elif not value.lower().startswith(("http://", "https://")) or not has_host(value):
        yield f"OPENAI_BASE_URL {shown} has to begin with https:// and a host"
    elif value.lower().startswith("http:") and not is_loopback(urls.urlsplit(value).hostname or ""):
        yield Notice(
            "OPENAI_BASE_URL begins with http://: the key, the prompts and the images cross the "
            "network in clear; use https://"
        )


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_packages(*, pillow: bool) -> Iterator[str]:
    """Check that the packages are there, and new enough."""
    for module, package in (("openai", "openai"), ("PIL", "pillow"))[: 1 + pillow]:
        least = OLDEST[package]
        try:
            found = importlib_util.find_spec(module) is not None
            version = metadata.version(package) if found else "missing"
        except metadata.PackageNotFoundError:
            continue  # it came in another way than by pip, and says no version
        if not found or numbers_of(version) < numbers_of(least):
            yield (
                f"the package {package} is {version}; {least} or newer is needed: "
                f"{sys.executable or 'python3'} -m pip install '{package}>={least}'  "
                "(or run the script with uv run)"
            )


def numbers_of(version: str) -> list[int]:
    """Return the first two numbers of a version, which compare as versions do."""
    return [int(number) for number in re.findall("[0-9]+", version)[:2]]


def check_environment(*, pillow: bool) -> Iterator[str]:
    """Check the key and the packages, which only a live run needs."""
    secret = os.environ.get("OPENAI_API_KEY", "")
    if not secret:
        yield "OPENAI_API_KEY is not set; export OPENAI_API_KEY=…, or use --dry-run"
    elif not secret.isascii() or not secret.isprintable() or " " in secret:
        yield "OPENAI_API_KEY holds white space or characters that no key has; copy it again"
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        value = os.environ.get(name, "")
        if not value.isascii() or (value and not value.isprintable()):
            yield f"{name} holds characters that no header can carry: {received(value)}"
    yield from check_base_url(os.environ.get("OPENAI_BASE_URL"))
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        if (path := os.environ.get(name)) and not os.path.exists(path):
            yield f"{name} names {path}, which is not there; unset it, or name the certificates"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for spelled in (name, name.lower()):
            if (proxy := os.environ.get(spelled)) and not has_host(proxy):
                yield f"{spelled} names no host, or a port that does not exist"
    yield from check_packages(pillow=pillow)


def folded(findings: Iterable[tuple[int, str]]) -> list[str]:
    """Return each text once, with the lines that it concerns."""
    lines: dict[str, dict[int, None]] = {}
    for line, finding in findings:
        lines.setdefault(finding, {})[line] = None
    sentences = []
    for finding, (first, *rest) in lines.items():
        more = f" and {len(rest) - 10:,} more" if len(rest) > 10 else ""
        named = f"line{'' if len(rest) == 1 else 's'} {listing(map(str, rest[:10]))}{more}"
        sentences.append(at_line(first) + finding + (f" (also {named})" if rest else ""))
    return sentences


def preflight(plan: Plan, options: RunOptions) -> list[str]:
    """Check everything that can be known before the first request; return the warnings.

    Raises a UsageError with all problems of all jobs, those of the reader included.
    """
    inspect = functools.cache(inspect_input)
    found = list(plan.problems)
    found += [(0, finding) for finding in check_run(options)]
    for job in plan.jobs:
        found += [(job.line, finding) for finding in check_request(job, options)]
        if not plan.submitted:
            found += [(job.line, finding) for finding in check_inputs(job.request, inspect)]
    if options.keep_partials and not any(job.request.partial_images for job in plan.jobs):
        found.append((0, Notice("--keep-partials means nothing without --partial-images")))
    found += [*check_outputs(plan), *check_cost(plan, options)]
    if not options.dry_run:
        pillow = options.downscale_max_dim is not None or plan.sheet is not None
        pillow |= any(
            job.request.keep_unmasked or job.request.mask_edits != MASK_EDITS[0]
            for job in plan.jobs
        )
        found += [(0, finding) for finding in check_environment(pillow=pillow)]
    found.sort(key=lambda entry: entry[0])
    problems = [(line, finding) for line, finding in found if not isinstance(finding, Notice)]
    if problems:
        raise UsageError(*folded(problems))
    return folded(found)


# ── 9 · Dry run ───────────────────────────────────────────────────────────────────────────────────


def document(job: Job) -> dict[str, Any]:
    """Return what would be sent for a job, and the files that it would make."""
    request = job.wanted
    derived = [each for output in job.missing for each in output.derived]
    shown: dict[str, Any] = {
        **request.payload,
        "endpoint": request.endpoint,
        "outputs": [output.path for output in job.missing],
        "outputs_downscaled": [each.path for each in derived if each.kind == "copy"] or None,
    }
    if request.keep_unmasked:
        shown["outputs_kept"] = [each.path for each in derived if each.kind == "kept"]
    if request.image:
        shown["image"] = request.image
    for key in ("mask", "markup"):
        if name := getattr(request, key):
            shown[key] = name
    if job.line:  # of a batch
        shown["job"] = job.number
    return shown


def as_json(value: object, *, indent: int | None = None) -> str:
    """Return JSON with sorted keys, in characters that stdout can carry."""
    is_unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    return json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=not is_unicode)


# ── 10 · Send ─────────────────────────────────────────────────────────────────────────────────────
#
#   slot ──► RateGate.admit ──► post ──► a raw answer ─────────────────────────────► Spool
#                 ▲              │
#                 │              └──► an error ──► Verdict ──► wait: all jobs pause at the gate ──┐
#                 │                                        ├─► retry: this job backs off ─────────┤
#                 │                                        └─► fail, stop model, stop run: JobError
#                 └───────────────────────────────────────────────────────────────────────────────┘
#
# An answer without an image comes back with a Verdict, too, when section 11 has read it (recover).
# Patience is the only retry rule: the SDK's own retries are off, so that one layer counts.

NO_MONEY_CODES = (
    "insufficient_quota",
    "credit_balance_exhausted",
    "billing_hard_limit_reached",
    "organization_usage_limit_exceeded",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "insufficient_user_quota",  # as relays call it
)
# What an answer means: what to do about it, and the kind of failure. The code, if known, decides.
VERDICT_BY_CODE: Mapping[str, tuple[Action, str]] = {
    **dict.fromkeys(NO_MONEY_CODES, ("stop run", "quota")),
    "moderation_blocked": ("fail", "moderation"),
    "model_not_found": ("stop model", "unknown_model"),
    "rate_limit_exceeded": ("wait", "rate_limit"),
    "slow_down": ("wait", "rate_limit"),
    "server_error": ("retry", "server"),
}
VERDICT_BY_STATUS: Mapping[int, tuple[Action, str]] = {
    400: ("fail", "invalid_request"),
    401: ("stop run", "authentication"),
    402: ("stop run", "quota"),
    403: ("stop model", "permission"),
    404: ("stop run", "address"),  # a model that is not there has its code
    408: ("retry", "timeout"),
    409: ("retry", "conflict"),
    429: ("wait", "rate_limit"),
}
VERDICT_BY_SERIES: Mapping[int, tuple[Action, str]] = {  # from this status on
    200: ("fail", "server"),  # an error object in an answer, a stream or a batch
    300: ("stop run", "address"),  # a redirect that is not followed
    400: ("fail", "refused"),
    500: ("retry", "server"),
}
REMEDIES = {
    "address": "check OPENAI_BASE_URL",
    "quota": "add credit or raise the limit of the account",
    "authentication": "check OPENAI_API_KEY",
    "permission": "ask for access to the model, or choose another with --model",
    "unknown_model": "choose another with --model",
    "moderation": "report it, ask whoever wants the image, or change the job",
}
# Gateways that lost the answer of a server that may have done the work.
LOST_ANSWER_STATUSES = (502, 504, 520, 524)
# Where an error explains itself, as OpenAI, FastAPI, JSON:API and gateways have it.
EXPLANATION_KEYS = ("message", "msg", "detail", "error", "errors", "title", "reason", "description")
# What the HTTP API takes and the SDK's method has no argument for (SDK 3.54, images.edit).
EXTRA_BODY_KEYS = ("moderation",)

BACK_OFF_SECONDS = 0.5
MAX_BACK_OFF_SECONDS = 30.0
LEAST_ADVICE_SECONDS = 0.01  # "now", or a date that has passed by our clock, is no advice
CONNECT_SECONDS = 20.0
READ_BYTES = 256 * 1024  # at once from a connection
SPOOL_BYTES = READ_BYTES  # of an answer that stay in memory
UNREACHABLE = "a sandbox or a proxy may refuse it, see references/codex-network.md"
SNIFFED = 16  # bytes of an answer; no packed one begins with as many letters
PLAIN = re.compile(rb"(\xef\xbb\xbf)?[\t\n\r -~]*|(\x89PNG|\xff\xd8\xff|RIFF|GIF8).*", re.DOTALL)
BUDGET_SECONDS = 0.05  # from one look at what is left of --max-cost to the next
LEAST_DOUBTS = 3  # requests that may have been billed for nothing before the run gets careful
# The first requests leave one after the other, so that a small limit shows before all are out.
RAMP_SECONDS = 0.003
# A pace that was learnt from a refusal grows by this share with each request the server takes.
PACE_GROWTH = 0.005


class Verdict(NamedTuple):
    """What to do about an error."""

    action: Action
    failure: Failure
    advised: float | None = None  # seconds that the server asks to wait
    request_id: str | None = None


def parse_seconds(value: str, now: str | None = None) -> float | None:
    """Read a number of seconds, or an HTTP date as the seconds since another, the answer's own."""
    try:
        number = float(value)
    except ValueError:
        then, since = (email_utils.parsedate_tz(text or "") for text in (value, now))
        if then is None:
            return None
        with suppress(ValueError, OverflowError):
            start = email_utils.mktime_tz(since) if since else time.time()
            return max(0.0, email_utils.mktime_tz(then) - start)
        return None
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
    delay = parse_seconds(headers.get("retry-after", ""), headers.get("date"))
    if delay is not None:
        return delay
    kinds = ("requests", "tokens")
    spent = [kind for kind in kinds if headers.get(f"x-ratelimit-remaining-{kind}") == "0"]
    resets = [
        parse_duration(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in spent or kinds
    ]
    return max((reset for reset in resets if reset is not None), default=None)


def explanation(said: object, depth: int = 8) -> str:
    """Return the words in which an error explains itself, "" if there are none, or too deep."""
    if said is None or isinstance(said, bool) or not depth:
        return ""
    if isinstance(said, dict):
        found = (explanation(said.get(key), depth - 1) for key in EXPLANATION_KEYS)
        return next(filter(None, found), "")
    if isinstance(said, list):
        return "; ".join(filter(None, (explanation(each, depth - 1) for each in said)))
    text = str(said).strip()
    if not text.startswith("<"):
        return text
    title = re.search(r"<title[^<>]*>([^<]*)", text, re.IGNORECASE)
    return html.unescape(title[1] if title else re.sub(r"<[^<>]*>", " ", text)).strip()


class ErrorAnswer(Exception):  # noqa: N818 - an answer, which is judged
    """What the API answers with instead of an image: an error status, or a redirect."""

    def __init__(self, status: int, body: object, headers: Mapping[str, str], asked: str) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.asked = asked  # method and address
        super().__init__(f"HTTP {status}")


def judge(answer: ErrorAnswer) -> Verdict:
    """Judge an error that the API answered with."""
    status, body, headers = answer.status, answer.body, answer.headers
    fields = mapping(body)
    error = mapping(fields.get("error")) or mapping(fields.get("detail")) or fields
    code, kind_of_error = error.get("code"), error.get("type")
    if status < 300 and re.fullmatch("[45][0-9][0-9]", str(code)):
        status = int(str(code))  # a gateway that answers 200 and means something else
    by_code = VERDICT_BY_CODE.get(str(code)) or VERDICT_BY_CODE.get(str(kind_of_error))
    series = max(key for key in VERDICT_BY_SERIES if key <= max(200, status))
    action, kind = by_code or VERDICT_BY_STATUS.get(status) or VERDICT_BY_SERIES[series]
    if kind in ("invalid_request", "permission") and not (code or kind_of_error):
        kind = "refused"  # by a gateway, which may mean anything
    if headers.get("x-should-retry") == "false" and action in ("retry", "wait"):
        action = "fail"
    request_id = headers.get("x-request-id")
    said = explanation(body) or (json.dumps(body) if body else "no explanation")
    parts = [
        f"{kind.replace('_', ' ')}{f', HTTP {status}' if status >= 300 else ''}: ",
        f"{answer.asked}: " if kind == "address" else "",
        one_line(said),
        f" ({REMEDIES[kind]})" if kind in REMEDIES else "",
        f" [{one_line(request_id)}]" if request_id else "",
    ]
    failure = Failure(
        kind,
        "".join(parts),
        str(code or (status if status >= 300 else "")) or None,
        retryable=action in ("retry", "wait"),
        maybe_billed=status in LOST_ANSWER_STATUSES,
    )
    return Verdict(action, failure, advised_delay(headers), request_id)


def verdict_of(error: Exception) -> Verdict:
    """Judge what came of one request that brought no answer, or an error."""
    cause = error.__cause__ or error
    if isinstance(cause, ErrorAnswer):
        return judge(cause)
    if isinstance(error, openai.APIError) and not isinstance(error, openai.APIConnectionError):
        return judge(ErrorAnswer(200, error.body or error.message, {}, ""))
    unsent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
    hopeless = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.TooManyRedirects)
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
    if verdict.advised is not None and verdict.advised >= LEAST_ADVICE_SECONDS:
        return verdict.advised
    ceiling = min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2.0 ** min(attempt - 1, 16))
    return random.uniform(0.0, ceiling)


class Patience:
    """How often, and for how long, one thing is tried again.

    A failure of the network or the server uses up an attempt; a refusal for the rate does not. Both
    are waited out, and what is waited is taken from the seconds.
    """

    def __init__(self, options: RunOptions, *, endless: bool = False) -> None:
        self.max_attempts = float("inf") if endless else options.max_attempts
        self.seconds = options.max_wait  # left to wait
        self.attempts = 0  # requests, without those that were refused for the rate
        self.requests = 0  # those included
        self.last: Failure | None = None

    def begin(self) -> None:
        """Count a request that is about to be sent."""
        self.attempts += 1
        self.requests += 1

    def after(self, verdict: Verdict) -> float:
        """Return the seconds to wait before the next request; a JobError if there is to be none."""
        self.last = verdict.failure
        if verdict.action == "wait":
            self.attempts -= 1
        elif verdict.action != "retry" or self.attempts >= self.max_attempts:
            raise JobError(verdict.failure, verdict.action)
        return retry_delay(verdict, self.requests)

    def allow(self, seconds: float) -> None:
        """Raise a JobError if it would be too long to wait for so many seconds."""
        if seconds > self.seconds:
            last = self.last or Failure("rate_limit", "rate limit")
            message = f"gave up, --max-wait is spent: {last.message}"
            raise JobError(last._replace(message=message, retryable=True))

    def spend(self, seconds: float) -> None:
        """Take what is waited from what is left, where it is allowed."""
        self.allow(seconds)
        self.seconds -= seconds


class Halt:
    """Whether anything more may be sent: to any model, and to each."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.reason: Failure | None = None
        self.models: dict[str, Failure] = {}

    def stop_all(self, failure: Failure) -> None:
        """Send nothing more."""
        self.reason = self.reason or failure
        self.changed.set()

    def check(self, job: Job | None = None) -> None:
        """Raise StoppedError if nothing, or this job, is to be sent any more."""
        failure = self.reason or (job and self.models.get(job.request.model))
        if failure is not None:
            raise StoppedError(failure)

    async def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than anything may be sent."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), max(0.0, seconds))


class RateGate:
    """What all requests of a run pass: a pause for all, and then the pace that the server takes.

    The server tells when to come back and not how fast to go on. So the gate counts: the requests
    that were taken between two pauses, over the time until the server takes requests again, are the
    pace. A pace that is too slow grows, one that is too fast is refused and counted anew.
    """

    def __init__(self, halt: Halt, max_wait: float, notify: Callable[[float], None]) -> None:
        self.halt = halt
        self.max_wait = max_wait
        self.notify = notify
        self.clock = asyncio.get_running_loop().time
        self.turn = asyncio.Lock()
        self.interval = RAMP_SECONDS
        self.next_at = self.opened_at = 0.0
        self.paused_at = self.resume_at = 0.0  # the last pause
        self.paused_before = 0.0  # seconds of all pauses but the last
        self.paused_when_taken = 0.0  # the same of all, when a request was last taken
        self.period = 0  # counts the pauses
        self.sent = self.refused = 0
        self.paced = False

    @property
    def paused(self) -> float:
        """How many seconds the run has been paused so far."""
        return self.paused_before + min(self.clock(), self.resume_at) - self.paused_at

    async def admit(self, job: Job, patience: Patience) -> int:
        """Wait for this job's turn; return the period in which it is sent.

        Raises a JobError when the pauses exceed what the job has patience for.
        """
        paused = self.paused
        async with self.turn:
            while (delay := max(self.resume_at, self.next_at) - self.clock()) > 0:
                patience.allow(self.paused - paused + self.resume_at - self.clock())
                self.halt.check(job)
                await self.halt.sleep(delay)
            self.halt.check(job)
            patience.seconds -= self.paused - paused  # however long its turn took to come
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
        """Note that the server took a request."""
        self.paused_when_taken = self.paused
        self.interval = self.interval / (1 + PACE_GROWTH) if self.paced else 0.0

    def refuse(self, period: int, delay: float) -> None:
        """Pause all jobs for so many seconds, and learn the pace of the period that ends."""
        now = self.clock()
        if period < self.period:  # answered late: the pause it asks for has been made
            return
        if now >= self.resume_at:
            self.paused_before = self.paused
            self.paused_at = self.resume_at = now
        if not self.refused and delay <= self.max_wait:
            self.notify(delay)
        self.refused += 1
        self.paced = True
        self.resume_at = max(self.resume_at, now + delay)
        taken = max(1, self.sent - self.refused)
        self.interval = (self.resume_at - self.opened_at) / taken
        if self.paused + self.resume_at - now - self.paused_when_taken > self.max_wait:
            message = "rate limit: nothing at all was accepted for --max-wait"
            self.halt.stop_all(Failure("rate_limit", message, retryable=True))


class Budget:
    """What a command has spent, may have spent, and may still spend, in dollars.

    A request is held at the most it can cost until its answer tells what it did cost; if none comes
    and it may have been billed, for good. So --max-cost holds whatever happens.
    """

    def __init__(self, options: RunOptions, halt: Halt) -> None:
        self.options = options
        self.halt = halt
        self.spent = 0.0  # with what may have been spent
        self.open: dict[object, float] = {}  # by request in flight
        self.turn = asyncio.Lock()

    @property
    def committed(self) -> float:
        """What is spent, or held for what is in flight."""
        return self.spent + sum(self.open.values())

    def take(self, key: object, bound: float) -> bool:
        """Hold an amount for a request, if that much may still be spent."""
        if exceeds(self.committed + bound, self.options.max_cost):
            return False
        self.open[key] = bound
        return True

    def refusal(self, bound: float) -> Failure:
        """Return why a request is not sent."""
        cap, more = f"--max-cost {self.options.max_cost:.9g}", enough(bound)
        spent = dollars(self.committed)
        return Failure("max_cost", f"{cap} allows no {more} more: {spent} may be spent")

    async def admit(self, key: object, job: Job) -> None:
        """Wait until a request may be sent, or stop the run if what is in flight changes nothing.

        Whoever waits first is sent first, so that what is left goes to the jobs in their order.
        """
        bound = bound_of(job.wanted, self.options)
        async with self.turn:
            while not self.take(key, bound):
                if not self.open:
                    self.halt.stop_all(self.refusal(bound))
                self.halt.check(job)
                await self.halt.sleep(BUDGET_SECONDS)

    def settle(self, key: object, cost: float | None = None) -> None:
        """Note what a request in flight has cost; None: what was held for it may be spent."""
        bound = self.open.pop(key, None)
        if bound is not None:
            self.spent += bound if cost is None else cost


class Spool:
    """The raw body of an answer, outside the heap: some 4K answers at once would fill it."""

    def __init__(self) -> None:
        self.size = 0
        self.broken: Verdict | None = None  # why it may not be all
        self._file: io.FileIO | None = None
        self._rest = bytearray()
        self._is_full = False

    def write(self, chunk: bytes) -> None:
        """Append; what the disk for temporary files does not take stays in memory."""
        self._rest += chunk
        self.size += len(chunk)
        if len(self._rest) < SPOOL_BYTES or self._is_full:
            return
        with suppress(OSError):
            self._file = self._file or tempfile.TemporaryFile(buffering=0)
            del self._rest[: self._file.write(self._rest)]
        self._is_full = len(self._rest) > 0

    def read(self) -> bytes:
        """Return everything that has come."""
        head = b""
        if self._file is not None:
            self._file.seek(0)
            head = self._file.read()
        return head + self._rest if self._rest else head

    def close(self) -> None:
        """Drop the file."""
        if self._file is not None:
            self._file.close()


class EventReader:
    """What a stream of server-sent events says, as far as it has come (HTML standard, 9.2.6)."""

    def __init__(self) -> None:
        self.line = bytearray()
        self.data: list[bytes] = []
        self.behind_cr = False  # a line feed does not end another line

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of the events that a piece of the stream completes."""
        begin = 0
        chunk = chunk[1:] if self.behind_cr and chunk.startswith(b"\n") else chunk
        self.behind_cr = chunk.endswith(b"\r")
        chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        while (end := chunk.find(b"\n", begin)) >= 0:
            line = bytes(self.line + chunk[begin:end])
            self.line.clear()
            begin = end + 1
            if line.startswith(b"data:"):
                self.data.append(line[5:].strip())
            elif not line:
                yield from self.event()
        self.line += chunk[begin:]

    def event(self) -> Iterator[dict[str, Any]]:
        """Yield the event whose lines have been read, if it is an object."""
        data, self.data = b"\n".join(self.data), []
        with suppress(ValueError):
            event = jiter.from_json(data)
            if isinstance(event, dict):
                yield event


class Unpacker:
    """The decoder of an answer, which passes on what is not packed, whatever its label says."""

    def __init__(self, decoder: Any) -> None:  # noqa: ANN401 - of the HTTP library
        self.decoder = decoder
        self.head = b""  # until it is long enough to tell
        self.is_packed: bool | None = None

    def decode(self, data: bytes, least: int = SNIFFED) -> Iterator[bytes]:
        """Yield what a piece of the body unpacks to."""
        if self.is_packed is None:
            self.head = data = self.head + data
            if len(data) < least:
                return
            self.is_packed = PLAIN.fullmatch(data[:SNIFFED]) is None
        yield from self.decoder.decode(data) if self.is_packed else (data,)

    def flush(self) -> Iterator[bytes]:
        """Yield what is left."""
        if self.is_packed is None:
            yield from self.decode(b"", least=0)
        yield from self.decoder.flush() if self.is_packed else ()


async def unlabel(response: httpx2.Response) -> None:
    """Let an answer be read whose label of a compression is wrong, as some proxies leave it."""
    if "content-encoding" in response.headers:
        with suppress(AttributeError):  # private, and there is no other way; since httpx2 2.12
            decoder: Any = Unpacker(response._get_content_decoder())  # noqa: SLF001
            response._decoder = decoder  # noqa: SLF001


def file_part(stack: ExitStack, part: Part, name: str) -> tuple[str, BinaryIO, str]:
    """Open a file to be sent; its name and content type are those of its bytes, not its suffix.

    Raises an OSError for what it is not any more: a pipe would hold up all that is in flight.
    """
    path = part.path
    if part.is_converted:
        try:
            content = mask_of_state(part.mask_edits, *state_of(path))
        except Exception as error:  # noqa: BLE001 - Pillow meets damage with many kinds
            raise OSError(f"{path} is no mask any more: {error}") from None
        return f"{name}.png", io.BytesIO(content), FORMATS["png"].content_type
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file any more")
    file = stack.enter_context(os.fdopen(descriptor, "rb"))
    picture = probe(file)
    file.seek(0)
    if picture is None:
        raise OSError(f"{path} is no image any more")
    return f"{name}.{picture.format}", file, FORMATS[picture.format].content_type


def sdk_arguments(request: ImageRequest, stack: ExitStack) -> dict[str, Any]:
    """Return an edit as the arguments of the SDK's method, with the files opened."""
    arguments = request.payload
    extra = {key: arguments.pop(key) for key in EXTRA_BODY_KEYS if key in arguments}
    images = []
    for number, part in enumerate(request.parts, start=1):
        if part.role == "image":
            images.append(file_part(stack, part, f"image_{number}"))
        else:
            arguments[part.role] = file_part(stack, part, part.role)
    # One image goes out as "image", several as "image[]".
    arguments["image"] = images[0] if len(images) == 1 else images
    arguments["extra_body"] = extra or None
    return arguments


class Exchange:
    """What happens between a job and the API, kept up while it happens."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.started: float | None = None  # when the job got its slot
        self.period = 0  # of the rate gate, in which its request was sent
        self.request_id: str | None = None
        self.drafts: list[str] = []  # what a stream has left on disk
        self.sent = False  # a request has come through: it may have been billed, or was refused
        self.maybe_billed = False
        self.cost_usd: float | None = None  # of its answers so far

    def pay(self, cost: float | None) -> None:
        """Add what an answer has cost, if that is known."""
        if cost is not None:
            self.cost_usd = cost + (self.cost_usd or 0.0)


def api_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """Return what the SDK and the HTTP library below it raise for a call that did not succeed."""
    return openai.APIError, httpx2.HTTPError, httpx2.StreamError, ErrorAnswer, *more


def origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Return what two addresses of one server have in common."""
    return url.scheme, url.host, url.port


async def first_bytes(response: httpx2.Response, most: int) -> bytes:
    """Return so many bytes of a body, unpacked, or all if there are fewer."""
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk[: most - len(body)]
        if len(body) >= most:
            break
    return bytes(body)


async def refuse_answer(response: httpx2.Response) -> None:
    """Raise an ErrorAnswer for what is no answer to read: an error, or a redirect elsewhere.

    Only a redirect that repeats the request (307, 308) at the same origin is followed: the prompt
    and the account's ids would go elsewhere, or a GET would ask for something else.
    """
    status, request = response.status_code, response.request
    asked = f"{request.method} {request.url.copy_with(query=None)}"
    if response.has_redirect_location:
        target = response.headers["location"]
        with suppress(httpx2.InvalidURL):
            if status in (307, 308) and origin(request.url.join(target)) == origin(request.url):
                return
        said = f"redirected to {one_line(target)}, which is not followed"
        raise ErrorAnswer(status, said, response.headers, asked)
    if response.is_success:
        return
    body = await first_bytes(response, MAX_ERROR_BYTES)
    try:
        said = jiter.from_json(body)
    except ValueError:
        said = body.decode("utf-8", "replace")
    raise ErrorAnswer(status, said, response.headers, asked)


async def is_fetched(url: httpx2.URL, base: httpx2.URL) -> bool:
    """Tell whether an image may be fetched: from the API's own origin, or by https from the public.

    An answer must not send this machine to its neighbours.
    """
    if origin(url) == origin(base):
        return True
    if url.scheme != "https" or not url.host:
        return False
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.host, url.port or 443)
    except (OSError, UnicodeError):  # no name service, as behind a proxy; else no connection comes
        return True
    return all(ipaddress.ip_address(address[0]).is_global for *_, address in found)


class Channel:
    """The way to the API, which all requests of a run share: one client, one stop, one pace."""

    def __init__(
        self,
        options: RunOptions,
        note: Callable[[str], None],
        on_pause: Callable[[float], None],
        workers: futures.Executor,
    ) -> None:
        self.options = options
        self.note = note
        self.workers = workers
        self.halt = Halt()
        self.gate = RateGate(self.halt, options.max_wait, on_pause)
        self.budget = Budget(options, self.halt)
        self.on_wire = 0  # requests that are being answered just now
        self.reached = False  # something has come from the other side
        self.told: set[str] = set()  # attempts at reaching it that have been reported
        self.doubts = 0  # requests since the last image that may have been billed for none
        self.most_doubts = max(LEAST_DOUBTS, options.concurrency)
        self.one_by_one = asyncio.Lock()
        self.timeout = httpx2.Timeout(
            options.timeout, connect=min(options.timeout, CONNECT_SECONDS)
        )
        # 64 KiB, as the HTTP library has it, cost a run of 4K images a sixth more time.
        httpcore2.AsyncHTTP11Connection.READ_NUM_BYTES = READ_BYTES
        try:
            self.client = openai.AsyncOpenAI(
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(
                    timeout=self.timeout, event_hooks={"response": [self.on_answer]}
                ),
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL, openai.OpenAIError) as error:
            problem = "the HTTP client cannot be set up by the environment (proxies, certificates)"
            raise UsageError(f"{problem}: {one_line(error)}") from None

    async def prepare(self, work: Callable[..., T], *arguments: object) -> T:
        """Read and convert input files, in a thread: it may take seconds."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work, *arguments)

    async def on_answer(self, response: httpx2.Response) -> None:
        """Take note of an answer's head."""
        self.reached = True
        await unlabel(response)
        await refuse_answer(response)

    async def send(self, job: Job, exchange: Exchange, on_draft: OnDraft) -> Spool:
        """Send a job's request until something comes, or raise the error that ends the job."""
        while True:
            async with self.one_by_one if self.doubts >= self.most_doubts else nullcontext():
                exchange.period = await self.admit(job, exchange)
                try:
                    spool = await self.post(job.wanted, exchange, on_draft)
                except api_errors(OSError) as error:
                    await self.recover(job, exchange, verdict_of(error))
                else:
                    self.gate.taken()
                    return spool

    async def admit(self, job: Job, exchange: Exchange) -> int:
        """Wait until a job's request may be sent, for its cost and for the rate limit."""
        await self.budget.admit(exchange, job)
        try:
            return await self.gate.admit(job, exchange.patience)
        except BaseException:
            self.budget.settle(exchange, 0.0)
            raise

    async def post(self, request: ImageRequest, exchange: Exchange, on_draft: OnDraft) -> Spool:
        """Send one request; return the raw body of its answer, also of one that breaks off."""
        images = self.client.images.with_streaming_response
        method = images.edit if request.image else images.generate
        spool = Spool()
        self.on_wire += 1
        try:
            with ExitStack() as stack:
                try:
                    arguments = (
                        await self.prepare(sdk_arguments, request, stack)
                        if request.image
                        else request.payload
                    )
                except OSError as error:  # it was there at preflight
                    message = f"an input image cannot be read any more: {one_line(error)}"
                    raise JobError(Failure("input", message)) from None
                self.halt.check()
                exchange.patience.begin()
                async with asyncio.timeout(self.options.timeout), method(**arguments) as response:
                    exchange.request_id = response.headers.get("x-request-id")
                    await self.receive(response, request, spool, on_draft)
        except api_errors(OSError) as error:
            if not spool.size:
                spool.close()
                raise
            spool.broken = verdict_of(error)
        except BaseException:
            spool.close()
            raise
        finally:
            self.on_wire -= 1
        return spool

    async def receive(
        self,
        response: openai.AsyncAPIResponse[Any],
        request: ImageRequest,
        spool: Spool,
        on_draft: OnDraft,
    ) -> None:
        """Take in an answer, to its end or to the event that says that the image is complete."""
        kind = response.headers.get("content-type", "")
        reader = EventReader() if request.partial_images or "event-stream" in kind else None
        most = (request.n + (request.partial_images or 0)) * MAX_ANSWER_BYTES
        async for chunk in response.iter_bytes():
            spool.write(chunk)
            if spool.size > most:
                message = f"the answer has more than {most:,} bytes"
                spool.broken = Verdict("fail", Failure("bad_answer", message, maybe_billed=True))
                return
            for event in reader.feed(chunk) if reader else ():
                event_type = str(event.get("type"))
                if event_type.endswith(".completed"):
                    return
                if event_type.endswith(".partial_image"):
                    await on_draft(event.get("b64_json"))

    async def recover(self, job: Job, exchange: Exchange, verdict: Verdict) -> None:
        """Wait until the request can be sent again, or raise the error that ends the job."""
        failure, patience = verdict.failure, exchange.patience
        self.budget.settle(exchange, None if failure.maybe_billed else 0.0)
        exchange.request_id = verdict.request_id or exchange.request_id
        exchange.sent = exchange.sent or self.reached or failure.maybe_billed
        if not exchange.sent:
            self.halt.check(job)
        self.heed(job, verdict)
        if exchange.drafts:
            message = f"{failure.message}; what had come is kept: {listing(exchange.drafts)}"
            failure = failure._replace(message=message, maybe_billed=True)
        if failure.maybe_billed:
            self.doubt(failure)
        if exchange.drafts:  # the image was half made: another request would be paid for again
            raise JobError(failure)
        try:
            delay = patience.after(verdict)
        except JobError:
            if exchange.sent:
                raise
            host = httpx2.URL(self.client.base_url).host
            message = f"no connection to {host} came about ({failure.message}); {UNREACHABLE}"
            self.halt.stop_all(failure._replace(message=message))
            raise StoppedError(failure._replace(message=message)) from None
        if verdict.action == "wait":
            self.gate.refuse(exchange.period, delay)
            return
        patience.spend(delay)
        exchange.maybe_billed |= failure.maybe_billed
        attempt = f"attempt {patience.attempts + 1} of {patience.max_attempts}"
        if self.reached or attempt not in self.told:  # while nobody answers, once for all jobs
            self.told.add(attempt)
            billed = "; it may have been billed" if failure.maybe_billed else ""
            self.note(f"{job.where}{failure.message}{billed}; {attempt} in {delay:.1f} s")
        await self.halt.sleep(delay)

    def heed(self, job: Job, verdict: Verdict) -> None:
        """Send nothing more, to any model or to one, where the verdict says so."""
        if verdict.action == "stop run":
            self.halt.stop_all(verdict.failure)
        elif verdict.action == "stop model":
            self.halt.models.setdefault(job.request.model, verdict.failure)

    def doubt(self, failure: Failure) -> None:
        """Count a request that may have been billed for nothing; be careful, then stop the run."""
        self.doubts += 1
        since = f"{self.doubts} requests in a row may have been billed without an image"
        if self.doubts == self.most_doubts:
            self.note(f"{since}; going on with one request at a time")
        elif self.doubts >= self.most_doubts + LEAST_DOUBTS:
            failure = failure._replace(message=f"{since}, the last one: {failure.message}")
            self.halt.stop_all(failure)
            raise JobError(failure)

    async def fetch_image(self, address: str) -> bytes:
        """GET an image that an answer names instead of bringing it, again and again if need be.

        Without the key, cookies or a password of the account: whoever answers there is a stranger.
        """
        patience = Patience(self.options)
        while True:
            patience.begin()
            try:
                async with asyncio.timeout(self.options.timeout):
                    return await self.get(address)
            except api_errors(OSError, httpx2.InvalidURL) as error:
                said = verdict_of(error).failure.message
                if isinstance(error, ErrorAnswer):  # whose remedies are those of the API
                    said = f"HTTP {error.status}"
                failure = Failure("bad_answer", said, maybe_billed=True)
                delay = patience.after(Verdict("retry", failure))
                patience.spend(delay)
                await self.halt.sleep(delay)

    async def get(self, address: str) -> bytes:
        """GET an image once, through a few redirects."""
        url, base = httpx2.URL(address), httpx2.URL(self.client.base_url)
        hooks = {"response": [unlabel]}
        async with httpx2.AsyncClient(timeout=self.timeout, event_hooks=hooks) as client:
            for _ in range(1 + MAX_REDIRECTS):
                if not await is_fetched(url, base):
                    raise bad_answer(f"it is not fetched from {origin(url)[1]} for safety's sake")
                async with client.stream("GET", url) as response:
                    if response.has_redirect_location:
                        url = url.join(response.headers["location"])
                        continue
                    await refuse_answer(response)
                    content = await first_bytes(response, MAX_ANSWER_BYTES + 1)
                    if len(content) > MAX_ANSWER_BYTES:
                        raise bad_answer(f"it has more than {MAX_ANSWER_BYTES:,} bytes")
                    return content
        raise bad_answer(f"it is more than {MAX_REDIRECTS} redirects away")


# ── 11 · Decode and post-process ──────────────────────────────────────────────────────────────────
#
#   body ─┬─► load_json: JSON, also with something behind it ─► items_of ─┐
#         ├─► events_of: a stream of events ─► items_of ──────────────────┼─► Answer ─► save_answer
#         └─► salvaged: whatever is whole in anything else ───────────────┘
#
# An item is base64, an address whose image is fetched (bring, in section 14), or bytes.


class Answer(NamedTuple):
    """What the body of an answer holds, in whatever shape it came."""

    items: list[Any]  # what stands for each image; a string, or an object that has one
    fields: dict[str, Any]  # usage, size, quality
    raw: Callable[[], bytes]
    verdict: Verdict  # what to do if it brings no image
    broken: bool  # it did not come to its end


# Kinds of failures after which the body of an answer is kept: nobody else will read it.
UNREADABLE = ("bad_answer", "connection", "timeout")
# How a stream of events begins, whatever its content type says.
EVENT_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")
# What relays call a task that makes the image later.
TASK_KEYS = ("id", "task_id", "job_id", "poll_url", "status_url")
FINISHED = ("", "success", "succeeded", "complete", "completed", "done", "finished", "ok")
# What repeats the request, or tells of an error; and where addresses are.
ASKED_KEYS = ("input", "inputs", "request", "params", "parameters", "error", "errors", "detail")
ADDRESS_KEYS = ("url", "image_url", "image", "result", "output", "data")
# Where services have their images, and how these begin: data URLs, and PNG, JPEG, WebP and GIF.
KEYED_STRING = re.compile(
    rb'"(?:b64_json|b64|base64|image_base64|result|data|image|url|image_url)"'
    rb'\s*:\s*("(?:[^"\\]++|\\.)*+")'
)
IMAGE_BEGINS = re.compile(r"\s*(?:(?i:data:image/)|iVBORw0KGgo|/9j/|UklGR|R0lGOD)")
DATA_URL = re.compile(r"data:image\\?/[a-z+.-]+;base64,[\w+/=\\-]+", re.ASCII)


def load_json(body: bytes) -> Any:  # noqa: ANN401
    """Return the first JSON value of a body; None if it is none, or is not whole."""
    try:
        # The SDK's own parser: ten times as fast on the long strings of an answer.
        return jiter.from_json(body)
    except ValueError:  # it is stricter, too: bytes behind the end, half a surrogate pair
        with suppress(ValueError, RecursionError):
            text = body.removeprefix(b"\xef\xbb\xbf").decode(errors="replace")
            return json.JSONDecoder().raw_decode(text.lstrip())[0]
    return None


def items_of(body: Mapping[str, Any]) -> list[Any]:
    """Return what stands for the images in an answer, or in an event that says it is complete."""
    for key in ("data", "images"):
        if isinstance(found := body.get(key), list) and any(map(encoded_in, found)):
            return found
        if encoded_in(found):
            return [found]
    found = encoded_in(body)  # an address beside an error, or of a task, is that of a page
    is_image = found is not None and not (is_address(found) and (error_in(body) or is_task(body)))
    return [body] if is_image else []


def error_in(fields: Mapping[str, Any]) -> object:
    """Return what an answer gives as its error."""
    return fields.get("error") or fields.get("detail") or fields.get("errors")


def is_task(fields: Mapping[str, Any]) -> bool:
    """Tell whether an answer is a task that makes the image later, as relays have them."""
    status = str(fields.get("status") or "").lower()
    return status not in FINISHED and any(key in fields for key in TASK_KEYS)


def is_address(encoded: object) -> bool:
    """Tell whether what stands for an image is an address at which it is."""
    return isinstance(encoded, str) and re.match("https?://", encoded, re.IGNORECASE) is not None


def encoded_in(item: object) -> str | bytes | None:
    """Return what an item of an answer holds: base64, an address, or bytes that were fetched."""
    if isinstance(item, (str, bytes)):
        return item
    fields = mapping(item)
    found = (fields.get(key) for key in ("b64_json", "url"))
    return next(
        (each for each in found if isinstance(each, str) and each not in ("", "null")), None
    )


def strings_in(parsed: object) -> Iterator[tuple[str, str]]:
    """Yield the strings of a value of JSON and their keys, but for what repeats the request."""
    left = [("", parsed)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += [item for item in reversed(value.items()) if item[0] not in ASKED_KEYS]
        elif isinstance(value, list):
            left += [(key, each) for each in reversed(value)]
        elif isinstance(value, str):
            yield key, value


def images_in(parsed: object) -> list[str]:
    """Return the images of an answer of an unknown shape, each once.

    That is the strings that begin as images do, however deep; else addresses under usual keys, or
    data URLs, as in a text.
    """
    strings = list(strings_in(parsed))
    images = [text for _, text in strings if IMAGE_BEGINS.match(text)]
    if not images:
        images = [text for key, text in strings if key in ADDRESS_KEYS and is_address(text)]
    images = images or [url for _, text in strings for url in DATA_URL.findall(text)]
    return list({text.rpartition("base64,")[2]: text for text in images}.values())


def salvaged(body: bytes) -> list[str]:
    """Return the images of a body that is broken: whole strings under usual keys, or data URLs.

    A page of HTML has pictures, too, which nobody has asked for.
    """
    texts = [text for text in map(load_json, KEYED_STRING.findall(body)) if isinstance(text, str)]
    images = [*filter(IMAGE_BEGINS.match, texts)] or [*filter(is_address, texts)]
    if not images and not body.lstrip().startswith(b"<"):
        images = DATA_URL.findall(body.decode("latin-1"))
    return images


def events_of(body: bytes) -> dict[str, Any]:
    """Return what a whole stream of events says, in the shape of a plain answer."""
    events = [
        event
        for event in EventReader().feed(body + b"\n\n")
        if not str(event.get("type")).endswith(".partial_image")
    ]
    last = [event for event in events if str(event.get("type")).endswith(".completed")] or events
    answer = {key: value for event in last for key, value in event.items()}
    for event in events:
        if event.get("type") == "error":
            answer["error"] = mapping(event.get("error")) or event
    return answer | {"data": [item for event in last for item in items_of(event)]}


def read_answer(body: bytes, raw: Callable[[], bytes], broken: Verdict | None = None) -> Answer:
    """Find what stands for the images in a body: JSON, events, an image, or whole parts of them."""
    parsed = load_json(body)
    search: Callable[[], list[str]] = functools.partial(images_in, parsed)
    if parsed is None and EVENT_BEGINS.match(body):
        parsed, search = events_of(body), list  # its drafts are no images
        early = httpx2.RemoteProtocolError("the stream ended before the image")
        broken = broken or (None if parsed["data"] else verdict_of(early))
    elif parsed is None:
        text = body[:MAX_ERROR_BYTES].decode("utf-8", "replace").strip() or "it is empty"
        picture = probe(io.BytesIO(body))
        is_picture = picture is not None and picture.format != "svg"  # a page may hold one
        parsed = {"message": text, "data": [body] if is_picture else []}
        search = functools.partial(salvaged, body)
    return answer_of(parsed, search, raw, broken)


def answer_of(
    parsed: object,
    search: Callable[[], list[str]],
    raw: Callable[[], bytes],
    broken: Verdict | None = None,
) -> Answer:
    """Find what stands for the images in a value of JSON, or else search for them.

    But not in errors and tasks, which may show the input, or the address of a page.
    """
    fields = parsed if isinstance(parsed, dict) else {"data": parsed}
    error, items = error_in(fields), items_of(fields)
    if not (items or error or is_task(fields)):
        items = search()
    if error and not items:
        verdict = judge(ErrorAnswer(200, {"error": error}, {}, ""))
    elif broken:  # what has come of it is not asked for again
        verdict = broken._replace(action="fail") if items else broken
    else:
        said = "" if items else unusable(fields)
        verdict = Verdict("fail", Failure("bad_answer", said, maybe_billed=True))
    return Answer(items, fields, raw, verdict, broken is not None)


def unusable(fields: Mapping[str, Any]) -> str:
    """Say what an answer is that brings no image."""
    if is_task(fields):
        task = {key: fields[key] for key in ("status", *TASK_KEYS) if key in fields}
        return (
            f"the answer is a task and no image: {one_line(json.dumps(task))}; ask its service for "
            "the image, or use an address that answers with it"
        )
    said = one_line(explanation(fields) or json.dumps(fields))
    return f"the answer holds no image: {said if len(said) <= 160 else said[:160] + '…'}"


def decode_item(item: object) -> bytes:
    """Return the bytes of one image of an answer."""
    if isinstance(item, JobError):  # it was to be fetched
        raise item
    encoded = encoded_in(item)
    if encoded is None:
        raise bad_answer("an image of the answer is neither base64 nor an address")
    return decode_image(encoded)


def decode_image(encoded: str | bytes) -> bytes:
    """Return the bytes of one image: base64, as careless servers write it too, or a data URL."""
    if isinstance(encoded, bytes):
        return encoded
    is_url = re.match(r"\s*data:", encoded, re.IGNORECASE)
    head, comma, rest = encoded.partition(",") if is_url else ("", "", encoded)
    if comma and not head.lower().endswith(";base64"):
        return urls.unquote_to_bytes(rest)
    rest = urls.unquote(rest) if comma and "%" in rest else rest
    with suppress(ValueError):
        return binascii.a2b_base64(rest, strict_mode=True)
    letters = re.sub(r"[^A-Za-z0-9+/]", "", rest.replace("-", "+").replace("_", "/"))
    try:
        return binascii.a2b_base64(letters + "=" * (-len(letters) % 4))
    except ValueError as error:
        raise bad_answer(f"an image of the answer is not valid base64: {error}") from None


def differences(request: ImageRequest, picture: Picture) -> Iterator[str]:
    """Yield where an image is not what was asked for, or what one would expect."""
    if picture.tail:
        yield f"{counted(picture.tail, 'byte')} behind the end of the image; kept as they came"
    if picture.active:
        yield "the svg runs scripts or loads from elsewhere: look at it before it is published"
    if picture.format != request.output_format:
        yield f"asked for {request.output_format}, got {picture.format}"
    if request.size not in ("auto", picture.size) and picture.format != "svg":
        yield f"asked for {request.size}, got {picture.size}"
    if request.background == "transparent" and not picture.alpha:
        yield "asked for a transparent background, got an image that is opaque everywhere"


def is_opaque(file: BinaryIO | str, seen: Picture | Saved, request: ImageRequest) -> bool:
    """Tell whether no pixel of an image is transparent that was to be, where Pillow can say so."""
    expected = request.background == "transparent" and seen.alpha and has_pillow()
    if not expected or seen.width * seen.height > MAX_COPY_PIXELS:
        return False
    with suppress(Exception), Image.open(file) as picture:
        return picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    return False


def scaled_size(width: int, height: int, max_dim: int) -> tuple[int, int]:
    """Return the size of a copy whose longer edge is at most max_dim."""
    scale = min(1.0, max_dim / max(width, height, 1))
    return max(1, round(width * scale)), max(1, round(height * scale))


def scaled(image: Image.Image, max_dim: int) -> Image.Image:
    """Return an image whose longer edge is max_dim, in a mode that resizing and saving keep."""
    image = eight_bits(image)
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    # Pillow resizes premultiplied, so that colour under alpha 0 does not bleed into the edge.
    return image.resize(scaled_size(*image.size, max_dim), Image.Resampling.LANCZOS)


def encoded_picture(
    picture: Image.Image,
    kind: str,
    made_of: str = "",
    **options: Any,  # noqa: ANN401
) -> bytes:
    """Return a picture that this program has made, with its mark, in an image format."""
    mark = DERIVED_MARK.decode()
    if kind == "gif":
        options["comment"] = mark
    elif kind == "png":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        info.add_text("Software", mark)
        if made_of:
            info.add_text("Source", made_of)
    else:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Software] = mark
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def downscale(content: bytes, original: Saved, max_dim: int, kind: str | None = None) -> bytes:
    """Return a copy whose longer edge is at most max_dim, in its own format or another one.

    An image that is small enough is returned as it is. Frames of a GIF that look the same become
    one, which is shown as long.
    Raises what Pillow raises for an image that it cannot read, a ValueError for one too large.
    """
    kind = kind or original.format
    if max(original.width, original.height) <= max_dim and original.format == kind:
        return content
    if original.width * original.height > MAX_COPY_PIXELS:
        raise ValueError(
            f"{original.width}x{original.height} has more than the {MAX_COPY_PIXELS:,} pixels "
            "that are downscaled here"
        )
    options: dict[str, Any] = {}
    with Image.open(io.BytesIO(content)) as source:
        profile = source.info.get("icc_profile")
        if profile and source.mode != "CMYK":
            options["icc_profile"] = profile
        if kind == "gif":
            frames = [
                (scaled(frame.convert("RGBA"), max_dim), frame.info.get("duration", 0))
                for frame in ImageSequence.Iterator(source)
            ]
            (copy, *others), times = zip(*frames, strict=True)
            options |= {"save_all": True, "append_images": others, "duration": times, "disposal": 2}
            options |= {"loop": source.info["loop"]} if "loop" in source.info else {}
        else:
            ImageOps.exif_transpose(source, in_place=True)
            copy = scaled(source, max_dim)
    if kind == "jpeg":
        if copy.mode in ("LA", "RGBA"):
            white = Image.new("RGBA", copy.size, "white")
            copy = Image.alpha_composite(white, copy.convert("RGBA")).convert("RGB")
        options["quality"] = COPY_QUALITY
    elif kind == "webp":
        options |= {"quality": COPY_QUALITY, "exact": True}
    elif kind == "png":
        options["compress_level"] = COPY_LEVEL
    return encoded_picture(copy, kind, **options)


# How a picture is set upright, by its EXIF.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image as it is seen."""
    name = TURNS.get(orientation)
    return image.transpose(Image.Transpose[name]) if name else image


def orientation_of(path: str) -> int:
    """Return how a picture is stored."""
    picture = probe_file(path)
    return picture.orientation if picture else 1


# The kept picture: the input where the mask protects it, the answer where it edits, and between
# them, inside of the edited part, a seam in which the answer gains with each pixel:
#
#   distance from the protected part     0     1     2     3 and more
#   share of the answer                  0    1/3   2/3    1


def seam(alpha: Image.Image) -> Image.Image:
    """Return how much of the answer a kept picture has, by the alpha of its mask; both mode L."""
    edited = alpha.point(lambda value: 255 * (value < 128))
    weight = Image.new("L", alpha.size)
    for step in range(1, SEAM_PIXELS + 2):
        weight.paste(round(255 * step / (SEAM_PIXELS + 1)), mask=edited)
        edited = edited.filter(ImageFilter.MinFilter(3))
    return weight


def blend(source: Image.Image, drawn: Image.Image, weight: Image.Image) -> Image.Image:
    """Lay one picture over another of its size and mode, as much as a weight of mode L says.

    In RGBA the colours that nobody sees do not bleed into the seam: they are premultiplied there,
    and where the source is transparent, there is nothing to lead over from.
    """
    if source.mode == "RGB":
        return Image.composite(drawn, source, weight)
    seen = source.getchannel("A").point(lambda value: 255 * (value > 0))
    edited = weight.point(lambda value: 255 * (value > 0))
    weight = Image.composite(weight, edited, seen)
    mixed = Image.composite(drawn.convert("RGBa"), source.convert("RGBa"), weight).convert("RGBA")
    mixed = ImageChops.lighter(mixed, ImageChops.darker(source, drawn))
    mixed = ImageChops.darker(mixed, ImageChops.lighter(source, drawn))
    mixed.paste(source, mask=ImageOps.invert(edited))
    mixed.paste(drawn, mask=weight.point(lambda value: 255 * (value == 255)))
    return mixed


def keep_unmasked(original: Saved, request: ImageRequest) -> bytes:
    """Return the first input image, upright, with an answer where the mask edits; as PNG.

    A mask that has the size of the upright picture is upright; any other lies as the picture is
    stored. Raises what Pillow raises, a JobError for an answer of another aspect.
    """
    path, mask = request.image[0], request.mask or ""
    made_of = kept_digest(original, request)
    orientation, own = orientation_of(path), orientation_of(mask)
    with Image.open(path) as stored, Image.open(original.path) as answer:
        source = upright(stored, orientation)
        if not fit(answer.size, source.size):
            sizes = "the answer is {}x{}, the input {}x{}".format(*answer.size, *source.size)
            message = f"no kept picture of {original.path} ({sizes}); the answer is there"
            raise JobError(Failure("keep", message))
        alphas = source.has_transparency_data or answer.has_transparency_data
        mode = "RGBA" if alphas else "RGB"
        drawn = eight_bits(answer).convert(mode).resize(source.size, Image.Resampling.LANCZOS)
        profile = stored.info.get("icc_profile") or b""
        source = source.convert(mode)
    alpha = upright(mask_alpha(mask, request.mask_edits), own)
    if alpha.size != source.size:
        alpha = upright(alpha, orientation)
    fits = profile and profile[16:20] not in (b"GRAY", b"CMYK")  # the picture is RGB
    options = {"compress_level": COPY_LEVEL, "icc_profile": profile if fits else None}
    return encoded_picture(blend(source, drawn, seam(alpha)), "png", made_of, **options)


def kept_digest(original: Saved, request: ImageRequest) -> str:
    """Return a digest of all that a kept picture is made of. Raises OSError."""
    names = (original.path, request.image[0], request.mask or "")
    facts = (*map(file_digest, names), request.mask_edits)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


# ── 12 · Write, and what is on disk ───────────────────────────────────────────────────────────────


def place(temporary: str, name: str) -> None:
    """Give a finished file its name, unless the name is taken (FileExistsError)."""
    if os.name == "nt":
        os.rename(temporary, name)  # which never replaces there
        return
    try:
        os.link(temporary, name)
    except FileExistsError:
        raise
    except OSError:  # no hard links here, as on FAT: reserve the name, then rename onto it
        with open(name, "xb"):
            pass
        try:
            os.replace(temporary, name)
        except OSError:
            os.unlink(name)
            raise


def sync_folder(folder: str) -> None:
    """Let the names in a folder outlive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: str) -> list[str]:
    """Make a folder and those above it, to stay; return what was made, the innermost first."""
    made, above = [], os.path.abspath(folder or ".")
    while not os.path.lexists(above):
        made.append(above)
        above = os.path.dirname(above)
    os.makedirs(folder or ".", exist_ok=True)
    for name in made:
        sync_folder(os.path.dirname(name))
    return made


def temporary_name(folder: str, digest: str = "") -> str:
    """Return a name for a file that is to get its own; an image tells what it was made from."""
    told = digest.rpartition("-")[2]
    return os.path.join(folder, f".image_gen-{os.urandom(6).hex()}{told}.tmp")


@contextmanager
def written(folder: str, content: bytes, *, sync: bool = False, digest: str = "") -> Iterator[str]:
    """Write a whole file under a temporary name, which goes in the end. Raises OSError."""
    make_folder(folder)
    temporary = temporary_name(folder, digest)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def linked(path: str) -> Iterator[str]:
    """Give a file a second, temporary name, which goes in the end: a link, else a copy."""
    temporary = temporary_name(os.path.dirname(path))
    try:
        try:
            os.link(path, temporary)
        except OSError:  # no hard links here
            shutil.copy2(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)


# The manifest knows of an image before its name does, so that a run that is killed in between
# neither loses it nor lets anybody take it for another:
#
#   temporary file, synced ──► line with both names, synced ──► the name ──► folder synced
#
# The next run gives the name to a temporary file that is as its line says (finish_images), and to
# one that is not in the manifest yet the name of a job for which it was made (take_up_images): the
# temporary name tells the digest of the request.


class Manifest:
    """The manifest of a folder, to be added to by many threads."""

    def __init__(self, folder: str, memory: Memory) -> None:
        self.folder = folder
        self.path = os.path.join(folder, MANIFEST_NAME)
        self.memory = memory
        self.lock = threading.Lock()
        self.problem = ""  # what it could not be told

    def prove(self) -> None:
        """Raise a UsageError if nothing can be added."""
        reason = "" if os.path.isfile(self.path) or not os.path.lexists(self.path) else "is no file"
        try:
            with open(self.path if not reason else os.devnull, "ab"):
                pass
        except OSError as error:
            reason = f"cannot be written: {error.strerror or error}"
        if reason:
            raise UsageError(f"{self.path} {reason}; move it away, and names count instead")

    def append(self, *entries: Entry) -> None:
        """Add entries that outlive a power cut; where that fails, an image is worth more."""
        lines = b"".join(json.dumps(entry._asdict()).encode() + b"\n" for entry in entries)
        with self.lock:
            for entry in entries:
                self.memory = add_to(self.memory, entry._replace(temporary=""))
            try:
                with open(self.path, "ab+") as file:
                    end = file.seek(0, os.SEEK_END)
                    file.seek(max(0, end - 1))
                    torn = file.read() not in (b"", b"\n")
                    file.write(b"\n" * torn + lines)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.problem = f"{self.path}: {error.strerror or error}"

    def entry_of(self, path: str) -> Entry | None:
        """Return what is known of an image."""
        return self.memory.entries.get(os.path.basename(path))


class Note(NamedTuple):
    """What a manifest will say of an image once it is on disk."""

    manifest: Manifest
    entry: Entry  # but for its name and, until it is about an image, the content

    def about(self, content: bytes) -> Note:
        """Return the note on an image."""
        sha256, image = hashlib.sha256(content).hexdigest(), os.urandom(6).hex()
        return self._replace(
            entry=self.entry._replace(image=image, sha256=sha256, bytes=len(content), time=now())
        )

    def entry_for(self, file: str, name: str) -> Entry:
        """Return the entry of the image, which is or will be under a name."""
        return self.entry._replace(mtime=os.stat(file).st_mtime_ns).under(name, file)

    @contextmanager
    def written(self, temporary: str, name: str) -> Iterator[None]:
        """Add the entry of an image that gets its name meanwhile; else take it back."""
        entry, former = self.entry_for(temporary, name), self.manifest.entry_of(name)
        self.manifest.append(entry)
        try:
            yield
        except OSError:
            self.manifest.append(entry._replace(void=True), *filter(None, [former]))
            raise

    def confirm(self, name: str) -> None:
        """Add the entry of an image that has its name already, unless that is known."""
        former = self.manifest.entry_of(name)
        if former is None or former.digest != self.entry.digest:
            self.manifest.append(self.entry_for(name, name)._replace(temporary=""))


def settle(
    temporary: str,
    names: Iterator[str],
    *,
    replace: bool = False,
    reuse: bool = False,
    note: Note | None = None,
) -> str:
    """Give a file the first of the names that is free, and return it.

    With replace, the first name is taken in any case; with reuse, a file that has this very content
    is taken for it. The note is written before the name is given.
    """
    for name in names:
        if os.path.lexists(name) and not replace:
            if reuse and same_content(temporary, name):
                if note:
                    note.confirm(name)
                return name
            continue
        with suppress(FileExistsError):  # in this very moment
            with note.written(temporary, name) if note else nullcontext():
                (os.replace if replace else place)(temporary, name)
            return name
    raise AssertionError("names are endless")


def take_over(moves: Sequence[tuple[Output, str, Entry]], manifest: Manifest) -> None:
    """Give temporary files their names; what stands there is kept by a name for old ones.

    Names may change places, and a run may be killed at any point. So each step is done for all of
    them before the next: all links, all lines, all names. Raises OSError.
    """
    with ExitStack() as stack:
        archives: list[tuple[Output, str]] = []
        lines: list[Entry] = []
        for output, _, _ in moves:
            if output.archive and os.path.exists(output.path):
                second = stack.enter_context(linked(output.path))
                archives.append((output, second))
                if former := manifest.entry_of(output.path):
                    kept = former._replace(kept=not output.needed, usage=None)
                    lines.append(kept.under(output.archive, second))
        for output, temporary, entry in moves:
            lines.append(entry._replace(kept=False).under(output.path, temporary))
        manifest.append(*lines)
        for output, second in archives:
            settle(second, chain([output.archive], old_names(output.path)), reuse=True)
        for output, temporary, _ in moves:
            (os.replace if output.archive else place)(temporary, output.path)


def finish_images(manifest: Manifest) -> None:
    """Give their names to images whose run was killed when only that was left to do."""
    found = [entry for entry in manifest.memory.entries.values() if entry.temporary]
    left = set(os.listdir(manifest.folder or ".")) if found else set()
    for entry in found:
        temporary, path = (
            os.path.join(manifest.folder, name) for name in (entry.temporary, entry.name)
        )
        if entry.temporary in left and file_digest(temporary) == entry.sha256:
            foreign = os.path.exists(path) and os.path.getsize(path) > 0
            if foreign and not same_content(temporary, path):
                with linked(path) as second:
                    settle(second, old_names(path), reuse=True)
            os.replace(temporary, path)
            remove_files([temporary])  # where both are one file, as links are
            sync_folder(manifest.folder)


def adopt_images(plan: Plan, manifest: Manifest) -> None:
    """Link images that lie under other names to those that their jobs ask for. Raises OSError."""
    outputs = [output for job in plan.jobs for output in job.outputs]
    with ExitStack() as stack:
        moves = [
            (output, stack.enter_context(linked(output.source)), entry._replace(usage=None))
            for output in outputs
            if output.origin and (entry := manifest.entry_of(output.source))
        ]
        if moves:
            take_over(moves, manifest)
            given = {os.path.basename(output.path) for output, _, _ in moves}
            left = [entry for _, _, entry in moves if entry.name not in given]
            manifest.append(*(entry._replace(kept=True) for entry in left))
            sync_folder(manifest.folder)


def write_file(name: str, content: bytes, *, replace: bool, sync: bool = False) -> str:
    """Write a whole file or none, and return its name.

    Without replace, a file that stands there already is kept, even if it came a moment ago: the new
    one goes beside it, under the first free name. With sync, the content outlives a power cut.
    Raises OSError.
    """
    folder = os.path.dirname(name)
    with written(folder, content, sync=sync) as temporary:
        name = settle(temporary, free_names(name), replace=replace)
    if sync:
        sync_folder(folder)
    return name


def remove_files(names: Iterable[str]) -> None:
    """Remove files that this run has written."""
    for name in names:
        with suppress(OSError):
            os.unlink(name)


def rescue(name: str, content: bytes) -> str | None:
    """Save what was paid for somewhere when its own place takes it no more."""
    plain = f"image_gen-rescued-{re.sub('[^A-Za-z0-9._-]', '_', os.path.basename(name))[-100:]}"
    for folder in (os.path.dirname(name), ".", None, os.path.expanduser("~")):
        with suppress(OSError):
            safe = tempfile.mkdtemp(prefix="image_gen-") if folder is None else folder
            return write_file(os.path.join(safe, plain), content, replace=False, sync=True)
    return None


def unwritten(target: str, content: bytes, error: OSError) -> JobError:
    """Return the error for what could not be written under its name, after a try elsewhere."""
    saved = rescue(target, content)
    where = f"it was saved as {saved}" if saved else "it is lost"
    message = f"{target} could not be written ({error.strerror or error}); {where}"
    return JobError(Failure("write", message, maybe_billed=True))


def save_image(
    output: Output, content: bytes, request: ImageRequest, names: Iterator[str], note: Note | None
) -> tuple[Saved, list[str]]:
    """Write one original, byte for byte as it came; what is no whole image is kept beside it.

    The bytes are on disk before they are looked at. Returns what is to be said of the image, too.
    """
    if not content:
        raise bad_answer("an image of the answer is empty")
    target, digest = output.path, note.entry.digest if note else ""
    try:
        with written(os.path.dirname(target), content, sync=True, digest=digest) as temporary:
            picture = probe(io.BytesIO(content))
            if picture is None or not picture.whole:
                target = f"{with_room(target)}.damaged"
                name = settle(temporary, free_names(target), replace=False, reuse=output.collected)
                what = "cut off" if picture else "none that is known here"
                kept = f"its {len(content):,} bytes are kept as {name}"
                raise bad_answer(f"an image of the answer is {what}; {kept}")
            name = give_name(temporary, output, request, names, note and note.about(content))
    except OSError as error:
        raise unwritten(target, content, error) from None
    if is_opaque(io.BytesIO(content), picture, request):
        picture = picture._replace(alpha=False)
    saved = Saved(name, len(content), picture.width, picture.height, picture.format, picture.alpha)
    return saved, [f"{name}: {surprise}" for surprise in differences(request, picture)]


def give_name(
    temporary: str, output: Output, request: ImageRequest, names: Iterator[str], note: Note | None
) -> str:
    """Give an image its name; what stands there is kept beside it, or replaced, or left alone."""
    path, reuse = output.path, output.collected
    if reuse and same_content(temporary, path):
        return settle(temporary, names, reuse=True, note=note)
    replace = output.replace or (output.mend and is_remnant(path, request.output_format))
    if note and output.archive and os.path.exists(path):
        take_over([(output, temporary, note.entry_for(temporary, path))], note.manifest)
        return path
    return settle(temporary, names, replace=replace, reuse=reuse, note=note)


def keep_answer(path: str, raw: Callable[[], bytes]) -> str:
    """Keep the body of an answer that has not brought the image of this path; say where."""
    body = redacted(raw().decode("latin-1")).encode("latin-1")
    target = f"{with_room(path)}.answer"
    if not body:
        return ""
    try:
        return f"; the answer is kept as {write_file(target, body, replace=False, sync=True)}"
    except OSError as error:
        return f"; {unwritten(target, body, error).failure.message}"


def save_draft(name: str, encoded: object) -> str | None:
    """Write a draft of a streamed image; one that cannot be written is not worth a failure."""
    if not isinstance(encoded, str):
        return None
    try:
        return write_file(name, decode_image(encoded), replace=False)
    except (JobError, OSError):
        return None


def usage_of(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the tokens that an answer says it has used, those of an SVG among them."""
    usage, svg_usage = strict(answer.get("usage")), strict(answer.get("svg_usage"))
    if not isinstance(usage, dict):
        return None
    return {**usage, "svg_usage": svg_usage} if svg_usage else usage


def save_items(
    job: Job, items: list[Any], note: Note | None
) -> tuple[dict[str, Saved], list[str], list[Failure]]:
    """Write each item of an answer as an image; return warnings and failures, too."""
    images: dict[str, Saved] = {}
    warnings: list[str] = []
    failures: list[Failure] = []
    asked = len(job.missing)
    surplus = free_names(job.missing[-1].path)  # each goes on where the one before has ended
    for index in range(len(items)):
        item, items[index] = items[index], None  # an image that is written needs no memory
        output = job.missing[min(index, asked - 1)]
        if index >= asked:
            output = output._replace(replace=False, mend=False, archive="", collected=False)
        try:
            content = decode_item(item)
            names = surplus if index >= asked else free_names(output.path)
            saved, surprises = save_image(output, content, job.request, names, note)
        except JobError as error:
            failures.append(error.failure)
            continue
        note = note and note._replace(entry=note.entry._replace(usage=None, cost_usd=None))
        warnings += surprises
        if index < asked:
            images[output.path] = saved
            if saved.path != output.path:
                warnings.append(
                    f"{output.path} has appeared meanwhile and is kept; saved as {saved.path}"
                )
    if note and note.entry.cost_usd is not None:  # no image has told it
        note.manifest.append(note.entry)
    if len(items) > asked:
        warnings.append(f"{len(items) - asked} more images than asked for; saved beside the others")
    return images, warnings, failures


def note_on(job: Job, delivery: Delivery, manifest: Manifest | None) -> Note | None:
    """Return what a manifest is to say of the images of an answer."""
    if manifest is None or not job.digest:
        return None
    entry = Entry("", job.digest, job.asked, job.request.title, job.request.model)
    entry = entry._replace(usage=delivery.usage, cost_usd=delivery.cost_usd)
    return Note(manifest, entry._replace(request_id=delivery.request_id))


def is_left_behind(path: str) -> bool:
    """Tell whether a temporary file can be that of an image: no link, pipe, or giant."""
    found = os.lstat(path)
    return stat.S_ISREG(found.st_mode) and found.st_size <= MAX_ANSWER_BYTES


def take_up_images(jobs: Iterable[Job], manifest: Manifest) -> Iterator[str]:
    """Name images whose run was killed before the manifest knew of them. Raises OSError.

    One that was made for no such job keeps the digest of its request: its own list finds it.
    """
    known = {entry.temporary for entry in manifest.memory.entries.values()}
    made_from: dict[str, list[Job]] = {}
    for job in jobs:
        made_from.setdefault(job.digest, []).append(job)
    for name in sorted(os.listdir(manifest.folder or ".")):
        path, found = os.path.join(manifest.folder, name), re.fullmatch(TEMPORARY_NAME, name)
        if not found or not found[3] or name in known or not is_left_behind(path):
            continue
        with open(path, "rb") as file:
            content = file.read()
        picture, digest = probe(io.BytesIO(content)), f"{DIGEST_VERSION}-{found[3]}"
        suffix = picture.format if picture else "image"
        rescued = os.path.join(manifest.folder, f"image_gen-rescued-{found[2]}.{suffix}")
        own = made_from.get(digest, [])
        planned = [output.planned for job in own for output in job.outputs] or [rescued]
        names: Iterator[str] = chain(planned, free_names(planned[0]))
        note = note_on(own[0], Delivery(), manifest) if own else None
        note = note or Note(manifest, Entry("", digest, {}, "", ""))
        whole = picture is not None and picture.whole
        if content:
            names = names if whole else free_names(f"{with_room(planned[0])}.damaged")
            kept = settle(path, names, note=note.about(content) if whole else None)
            yield f"an image of a run that was killed is now {kept}"
        remove_files([path])


def save_answer(
    job: Job, answer: Answer, delivery: Delivery, manifest: Manifest | None, options: RunOptions
) -> Delivery:
    """Save what an answer brings; what brings less than was asked for is kept as it came, too.

    The delivery says how it came. Runs in a worker thread.
    """
    asked, came = len(job.missing), len(answer.items)
    usage = usage_of(answer.fields)
    delivery = delivery._replace(usage=usage, cost_usd=cost_of(job.request, usage, options))
    images, warnings, failures = save_items(job, answer.items, note_on(job, delivery, manifest))
    for folder in dict.fromkeys(os.path.dirname(image.path) for image in images.values()):
        sync_folder(folder)
    if not came:
        failures.append(answer.verdict.failure)
    elif came < asked:
        why = f": {answer.verdict.failure.message}" if answer.broken else ""
        failures.append(Failure("bad_answer", f"asked for {asked} images, got {came}{why}"))
    failures.sort(key=lambda failure: failure.kind != "write")  # first what stops the run
    failure = failures[0] if failures else None
    if failure and any(each.kind in UNREADABLE for each in failures):
        path = next((item.path for item in job.missing if item.path not in images), "image")
        message = f"{failure.message}{keep_answer(path, answer.raw)}"
        failure = failure._replace(message=message, maybe_billed=True)
    return delivery._replace(
        images=images,
        warnings=tuple(warnings),
        failure=failure,
        size=strict(answer.fields.get("size")),
        quality=strict(answer.fields.get("quality")),
    )


def saved_file(name: str) -> Saved | None:
    """Describe an image that is on disk, if it is whole."""
    picture = probe_file(name)
    if picture is None or not picture.whole:
        return None
    size = os.path.getsize(name)
    return Saved(name, size, picture.width, picture.height, picture.format, picture.alpha)


def is_copy(copy: Saved | None, original: Saved, max_dim: int) -> bool:
    """Tell whether a file is the copy of an original: marked, as large, and not older."""
    if copy is None or not is_derived(copy.path, original.path):
        return False
    size = scaled_size(original.width, original.height, max_dim)
    fits = (copy.width, copy.height) in (size, size[::-1])  # a turned photograph is set upright
    return fits and os.path.getmtime(copy.path) >= os.path.getmtime(original.path)


def is_kept(kept: Saved | None, original: Saved, request: ImageRequest) -> bool:
    """Tell whether a file is the kept picture of an original, and of what else is there now."""
    if kept is None or not is_derived(kept.path):
        return False
    try:
        made_of = kept_digest(original, request)
    except OSError:  # an input is gone: it cannot be made again
        return True
    with open(kept.path, "rb") as file:
        return made_of.encode() in file.read(MAX_MASK_BYTES)


def save_derived(
    derived: Derived, original: Saved, request: ImageRequest, max_dim: int, *, remake: bool
) -> Saved:
    """Write what is made of an image that is on disk. Runs in a worker thread."""
    name, keeps = derived.path, derived.kind == "kept"
    try:
        there = None if remake else saved_file(name)
        fits = is_kept(there, original, request) if keeps else is_copy(there, original, max_dim)
        if there and fits:
            return there
        if keeps:
            made = keep_unmasked(original, request)
        else:
            with open(original.path, "rb") as file:
                made = downscale(file.read(), original, max_dim, derived.format)
        name = write_file(name, made, replace=derived.replace)
        return saved_file(name) or Saved(name, len(made), 0, 0, "png", alpha=False)
    except Exception as error:  # Pillow meets damage with many kinds
        if remake and derived.replace and is_derived(name):  # of the former image
            remove_files([name])
        if isinstance(error, JobError):
            raise
        message = f"{name}: no {DERIVED[derived.kind]} ({one_line(error)}); the original is kept"
        raise JobError(Failure("downscale", message)) from None


def images_on_disk(job: Job, came: Mapping[str, Saved]) -> dict[str, Saved]:
    """Return the images of a job by path: those that came now, and those that were there before."""
    missing = {output.path for output in job.missing}
    found = dict(came)
    for output in job.outputs:
        if output.path not in missing and not output.stale and (image := saved_file(output.path)):
            alpha = image.alpha and not is_opaque(image.path, image, job.request)
            found[output.path] = image._replace(alpha=alpha, origin=output.origin or "unknown")
    return {output.path: found[output.path] for output in job.outputs if output.path in found}


def is_gone(process: object) -> bool:
    """Tell whether a process of this machine has ended."""
    if os.name == "nt":  # where a process cannot be asked; but it keeps its lock file open
        return True
    try:
        os.kill(int(str(process)), 0)
    except (ValueError, OverflowError, PermissionError):
        return False
    except OSError:
        return True
    return False


def drop_stale_lock(path: str) -> None:
    """Remove a lock file whose process has ended; raise a UsageError if it has not."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:  # its process has just ended
        return
    owner = mapping(load_json(content))
    host, process, since = (owner.get(key, "unknown") for key in ("host", "process", "since"))
    with suppress(OSError):  # Windows refuses to move what is open
        if host == socket.gethostname() and is_gone(process):
            stale = f"{path}.{os.urandom(6).hex()}"
            os.rename(path, stale)
            with open(stale, "rb") as file:
                if file.read() != content:  # of another who took it over in this very moment
                    os.rename(stale, path)
                    return
            os.unlink(stale)
            return
    raise UsageError(
        f"another process works here: {process} on {host}, since {since}; wait for it, or end it; "
        f"if it has ended, delete {path}"
    )


def hold_lock_file(folder: str, stack: ExitStack) -> None:
    """Keep others out by a file that says who is here, until the stack ends."""
    path = os.path.join(folder, LOCK_NAME)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": now()}
    with written(folder, json.dumps(owner).encode()) as temporary:
        while True:
            try:
                place(temporary, path)
                break
            except FileExistsError:
                drop_stale_lock(path)
    stack.callback(remove_files, [path])
    stack.enter_context(open(path, "rb"))  # noqa: SIM115 - until the stack ends


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Keep a second process out of a folder, which is made, and goes again upon a refusal.

    By the system's lock, which ends with its process, however that ends; where there is none, as
    on Windows and some network disks, by a lock file.
    """
    made: list[str] = []
    with ExitStack() as stack:
        with suppress(OSError):  # preflight says what is wrong with the folder
            made = make_folder(folder)
            try:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                drop_stale_lock(os.path.join(folder, LOCK_NAME))  # of a host without locks
            except BlockingIOError:
                problem = f"another process works on {folder}; wait for it, or end it"
                raise UsageError(problem) from None
            except (OSError, ImportError):
                hold_lock_file(folder, stack)
        try:
            yield
        except UsageError:
            stack.close()
            for name in made:
                with suppress(OSError):
                    os.rmdir(name)
            raise


# ── 13 · Report ───────────────────────────────────────────────────────────────────────────────────


def write_stderr(message: str) -> None:
    """Write on stderr; a reader that has gone does not end a paid run."""
    try:
        sys.stderr.write(message)
        sys.stderr.flush()
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def tell(line: str) -> None:
    """Print one line on stderr; control characters are shown, not obeyed."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in redacted(line))
    write_stderr("".join(shown) + "\n")


ERROR_KEYS = tuple(key for key in Failure._fields if key != "behind")


def as_record(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as a line of --json; references/cli.md documents it."""
    job, delivery, failure = outcome.job, outcome.delivery, outcome.failure
    strange = any(image.origin == "unknown" for image in delivery.images.values())
    look = look_at_mask(job.request) if job.request.mask else None

    def facts(files: Iterable[Saved]) -> list[dict[str, Any]]:
        kept = (file._asdict().items() for file in files)
        return [{key: value for key, value in items if key != "origin"} for items in kept]

    return {
        "job": job.number,
        "line": job.line,
        "status": outcome.status,
        "title": job.request.title,
        "prompt": None if strange else job.request.prompt,
        "endpoint": job.request.endpoint,
        "model": job.request.model,
        "planned": [output.planned for output in job.outputs],
        "outputs": [image._asdict() for image in delivery.images.values()],
        "outputs_kept": facts(delivery.kept),
        "outputs_downscaled": facts(delivery.copies),
        "mask_share": round(look.share, 6) if isinstance(look, MaskLook) else None,
        "partials": list(delivery.drafts),
        "attempts": delivery.attempts,
        "seconds": round(delivery.seconds, 3),
        "request_id": delivery.request_id,
        "usage": delivery.usage,
        "cost_usd": delivery.cost_usd,
        "size": delivery.size,
        "quality": delivery.quality,
        "warnings": list(delivery.warnings),
        "error": failure and {key: getattr(failure, key) for key in ERROR_KEYS},
    }


# Failures that repeating the command unchanged does not mend. Whatever else fails may pass.
LASTING = (
    *("moderation", "invalid_request", "unknown_model", "permission", "authentication", "quota"),
    *("input", "stale", "batch_ended", "max_cost", "keep"),
)
# When it makes sense to repeat the command, after what is not mended by time alone.
CONDITIONS = {
    "moderation": "after the refused job has been changed or removed",
    "invalid_request": "after the job has been changed",
    "input": "after the input image has been put back",
    "unknown_model": "with another model",
    "permission": "with access to the model, or another one",
    "authentication": "with another OPENAI_API_KEY",
    "quota": "after topping up",
    "stale": "to make stale images again",
    "batch_ended": "to submit what is missing anew",
    "max_cost": "with --max-cost ",  # and how much
    "address": "with another OPENAI_BASE_URL",
    "write": "after mending the folder, and moving rescued images to their names",
    "keep": "with --size match or another size of the input's aspect",
    "bad_answer": "to pay for an answer once more",
}
STATUSES: tuple[Status, ...] = ("done", "skipped", "stale", "submitted", "not_sent", "failed")
PROGRESS_SECONDS = 10.0  # between two lines, where there is no terminal


class Report:
    """Everything that is printed while jobs run, and the exit code."""

    def __init__(self, total: int, options: RunOptions) -> None:
        self.total = total
        self.options = options
        self.clock = time.monotonic
        self.started = self.clock()
        self.terminal = sys.stderr.isatty() and not options.quiet
        self.counts: dict[tuple[Status, str], int] = {}  # by status, and the cause of it
        self.left: dict[str, list[Job]] = {}  # by what has to happen first
        self.unsent: dict[str, int] = {}  # by the reason, in words
        self.failed: list[tuple[int, str]] = []  # lines, and why; not told yet
        self.images = self.tokens = self.in_flight = 0
        self.cost = 0.0  # dollars
        self.uncosted = 0  # jobs that may have cost more than is known
        self.folder_cost = 0.0  # dollars, of all runs in the folder
        self.incomplete = False  # and repeating the command can help
        self.interrupted = False
        self.unfinished = False
        self.waiting_until = 0.0
        self.told_of_pause = -PROGRESS_SECONDS
        self.stdout_open = True

    @property
    def ended(self) -> int:
        """How many jobs have ended."""
        return sum(self.counts.values())

    def count_of(self, wanted: Status) -> int:
        """Return how many jobs have ended like this, for whatever cause."""
        return sum(number for (status, _), number in self.counts.items() if status == wanted)

    def add(self, outcome: Outcome) -> None:
        """Report the end of a job."""
        job, delivery, failure = outcome.job, outcome.delivery, outcome.failure
        status, cause = outcome.status, failure.cause if failure else ""
        self.counts[status, cause] = self.counts.get((status, cause), 0) + 1
        tokens = mapping(delivery.usage).get("total_tokens")
        self.tokens += tokens if isinstance(tokens, int) else 0
        self.cost += delivery.cost_usd or 0.0
        for warning in delivery.warnings:
            self.warn(f"{job.where}{warning}")
        if status not in ("skipped", "stale"):
            new = sum(image.origin == "new" for image in delivery.images.values())
            self.images += new
            paid = new > 0 or (failure is not None and failure.maybe_billed)
            self.uncosted += delivery.maybe_billed or (paid and delivery.cost_usd is None)
        if failure:
            self.left.setdefault(CONDITIONS.get(cause, ""), []).append(job)
            self.incomplete |= cause not in LASTING
        self.tell_end(outcome)
        if status == "not_sent" and failure:
            self.unsent[failure.message] = self.unsent.get(failure.message, 0) + 1
        elif failure and status != "submitted":
            self.failed.append((job.line, failure.message))
            if not self.options.batch_api:  # whose batches refuse thousands in the same words
                self.tell_failed()
        self.status()

    def tell_failed(self) -> None:
        """Print why jobs have failed that were not told yet."""
        for said in folded(self.failed):
            self.error(said)
        self.failed.clear()

    def tell_end(self, outcome: Outcome) -> None:
        """Print what a job has brought: on stdout, and on a terminal as progress."""
        delivery = outcome.delivery
        images = [image.path for image in delivery.images.values()]
        derived = (file.path for file in (*delivery.kept, *delivery.copies))
        wrote = [f"Wrote {path}" for path in (*images, *derived)]
        if isinstance(outcome, Skipped):
            wrote = []
        if self.options.json:
            wrote = [json.dumps(as_record(outcome), allow_nan=False)]
        for line in wrote:
            self.result(line)
        for output in outcome.job.missing if isinstance(outcome, Done) else ():
            if output.archive:
                self.note(f"{output.path}: the former image is kept as {output.archive}")
        seen = not self.options.json and sys.stdout.isatty()  # each path once
        if self.terminal and isinstance(outcome, Done) and not seen:
            self.note(f"[{self.ended}/{self.total}] {duration(delivery.seconds)} {listing(images)}")

    def close(self, resume: str = "", halted: Failure | None = None) -> None:
        """Print what remains to be said at the end of the run."""
        self.tell_failed()
        for reason, number in self.unsent.items():
            self.error(f"{counted(number, 'job')} not sent: {reason}")
        if halted and (waiting := self.count_of("submitted")):
            self.error(f"{counted(waiting, 'job')} not collected: {halted.message}")
        by_status = sorted(self.counts.items(), key=lambda item: STATUSES.index(item[0][0]))
        ends = listing(
            f"{number} {status.replace('_', ' ')}"
            + ("" if cause in ("", status) else f" ({cause})")
            for (status, cause), number in by_status
        )
        elapsed = duration(self.clock() - self.started)
        so_far = f"; this folder so far: {dollars(self.folder_cost)}" if self.folder_cost else ""
        self.note(
            f"{counted(self.total, 'job')}: {ends}; "
            f"{counted(self.images, 'image')}, {counted(self.tokens, 'token')}, "
            f"{self.spending}, {elapsed}{so_far}"
        )
        for line in self.ways_on(resume):
            (self.say if self.interrupted else self.note)(line)

    @property
    def spending(self) -> str:
        """What the run has cost, as far as it is known."""
        unknown = f"{counted(self.uncosted, 'job')} of unknown cost"
        if not self.uncosted:
            return dollars(self.cost)
        return f"{dollars(self.cost)} and {unknown}" if self.cost else unknown

    def ways_on(self, resume: str) -> Iterator[str]:
        """Say how to get what is missing, and under which condition."""
        options = self.options
        made_anew = options.force or (options.only is not None and options.remake)
        for condition, jobs in sorted(self.left.items()):
            again = "repeat the command" + (" without --cancel" if options.cancel else "")
            if not options.remake and not resume:
                again += " with --skip-existing"
            in_batch = any(job.line for job in jobs)
            if condition in (CONDITIONS["stale"], CONDITIONS["keep"]):
                again = f"repeat the command with {'--remake' if in_batch else '--force'}"
            elif made_anew:  # the former images are there, and would be taken for these
                numbers = ",".join(str(job.number) for job in jobs if job.line)
                again = "repeat the command" + (f" with --only {numbers}" if numbers else "")
            when = condition[:1].upper() + condition[1:]
            if condition == CONDITIONS["max_cost"]:
                when += enough(bound_of_all(jobs, options))[1:]
            for_these = f"{when}: {again} ({counted(len(jobs), 'job')})."
            yield for_these if condition else resume or f"To resume, {again}."

    @property
    def exit_code(self) -> int:
        """Return the exit code; where several would do, the one that asks for a repetition."""
        if self.interrupted:
            return 130
        if self.unfinished:
            return 3
        return 1 if self.incomplete else 4 if self.left else 0

    def result(self, message: str) -> None:
        """Print on stdout; a reader that has gone does not end a paid run."""
        self.clear()
        if self.stdout_open:
            try:
                print(redacted(message), flush=True)
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
        self.note(f"Warning: {line}")

    def error(self, line: str) -> None:
        """Print an error."""
        self.say(f"Error: {line}")

    def paused(self, delay: float) -> None:
        """Tell of a pause for the rate limit, once for all jobs; of the next ones now and then."""
        now = self.clock()
        self.waiting_until = now + delay
        if self.terminal or (delay >= 0.05 and now - self.told_of_pause >= PROGRESS_SECONDS):
            self.told_of_pause = now
            then = "then go on at the pace that is accepted"
            self.note(f"rate limit: all jobs wait {delay:.1f} s, {then}")

    def clear(self) -> None:
        """Take the status line off the terminal."""
        if self.terminal:
            write_stderr("\r\x1b[K")

    def status(self) -> None:
        """Show how the run stands, on a terminal."""
        if self.terminal and self.ended < self.total:
            write_stderr("\r\x1b[K" + self.standing)

    def progress(self) -> None:
        """Print how the run stands, where there is no terminal."""
        if not self.terminal and 1 < self.total > self.ended:
            self.note(self.standing)

    @property
    def standing(self) -> str:
        """How the run stands, in a line."""
        now, done = self.clock(), self.ended
        parts = [f"{done}/{self.total} done", f"{self.in_flight} in flight"]
        if failed := self.count_of("failed"):
            parts.append(f"{failed} failed")
        if self.waiting_until > now:
            parts.append(f"rate limit: {self.waiting_until - now:.0f} s")
        if done:
            left = (now - self.started) / done * (self.total - done)
            parts.append(f"about {duration(left)} left")
        return " · ".join(parts)


# ── 13a · Contact sheet ───────────────────────────────────────────────────────────────────────────


def thumbnail_of(image: Saved, edge: int) -> Image.Image | None:
    """Return a small picture of an image on disk, or None where Pillow cannot read it."""
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


# Where the fonts of many scripts are, on systems without fontconfig.
SYSTEM_FONTS = (
    "/System/Library/Fonts/Supplemental/Arial Unicode.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "C:/Windows/Fonts/arialuni.ttf",
    "C:/Windows/Fonts/msyh.ttc",
    "C:/Windows/Fonts/seguisym.ttf",
)
CAPTION_PIXELS = 12


class Captions:
    """The fonts of a contact sheet: Pillow's own, and for what it lacks, those of the system."""

    def __init__(self) -> None:
        self.fonts: list[Any] = [ImageFont.load_default(CAPTION_PIXELS)]
        self.sought: set[str] = set()  # characters for which fonts have been looked for

    def lacks(self, font: Any, text: str) -> list[str]:  # noqa: ANN401
        """Return the characters that a font draws as it draws what does not exist."""
        nothing = bytes(font.getmask("\U0010fffe"))
        seen = (c for c in dict.fromkeys(text) if not c.isspace())
        return [c for c in seen if bytes(font.getmask(c)) == nothing]

    def font_files(self, characters: Sequence[str]) -> Iterator[str]:
        """Yield files that may have characters."""
        codes = " ".join(f"{ord(c):x}" for c in characters)
        with suppress(OSError, subprocess.SubprocessError):
            command = ["fc-match", "--format=%{file}", f":charset={codes}"]
            yield os.fsdecode(subprocess.run(command, capture_output=True, timeout=5).stdout)
        yield from SYSTEM_FONTS

    def choose(self, text: str) -> tuple[str, Any]:
        """Return a text with the font that can draw it, else one that shows escapes."""
        for font in self.fonts:
            if not self.lacks(font, text):
                return text, font
        missing = self.lacks(self.fonts[0], text)
        names = () if self.sought.issuperset(missing) else self.font_files(missing)
        self.sought.update(missing)
        for name in names:
            with suppress(OSError):
                font = ImageFont.truetype(name, CAPTION_PIXELS)
                if not self.lacks(font, text):
                    self.fonts.append(font)
                    return text, font
        shown = (c.encode("unicode_escape").decode() if c in missing else c for c in text)
        return "".join(shown), self.fonts[0]


def contact_sheet(outcomes: Sequence[Outcome], suffix_format: str) -> bytes:
    """Draw labelled thumbnails of all images, in job order; jobs without an image are marked."""
    cells: list[tuple[Outcome, Saved | None]] = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.job.number):
        images = outcome.delivery.images.values()
        cells += [(outcome, image) for image in images] or [(outcome, None)]
    columns = next(k for k in range(1, len(cells) + 1) if k * k >= len(cells))
    rows = -(-len(cells) // columns)
    edge, label, gap = (256 if columns <= 12 else 128), 20, 8
    size = (columns * (edge + gap) + gap, rows * (edge + label + gap) + gap)
    sheet = Image.new("RGB", size, "#f4f4f4")
    draw = ImageDraw.Draw(sheet)
    captions = Captions()
    for position, (outcome, image) in enumerate(cells):
        left = gap + position % columns * (edge + gap)
        top = gap + position // columns * (edge + label + gap)
        thumbnail = image and thumbnail_of(image, edge)
        if thumbnail:
            offset = ((edge - thumbnail.width) // 2, (edge - thumbnail.height) // 2)
            sheet.paste(thumbnail, (left + offset[0], top + offset[1]), thumbnail)
        else:
            state = "no preview" if image else outcome.status.replace("_", " ")
            draw.rectangle((left, top, left + edge, top + edge), "#ffe5e5", "#c00000")
            draw.text((left + 8, top + 8), state, "#c00000", captions.fonts[0])
        name = os.path.basename(image.path) if image else outcome.job.request.title
        caption, font = captions.choose(one_line(f"{outcome.job.number} {name[:80]}"))
        while draw.textlength(caption, font) > edge and len(caption) > 1:
            caption = caption[:-2] + "…"
        draw.text((left, top + edge + 3), caption, "#202020", font)
    return encoded_picture(sheet, suffix_format)


def write_contact_sheet(output: Output, outcomes: Sequence[Outcome], report: Report) -> None:
    """Write the contact sheet; without it the run has failed."""
    name = output.path
    try:
        sheet = contact_sheet(outcomes, name_format(name) or DEFAULT_FORMAT)
        name = write_file(name, sheet, replace=output.replace)
    except (OSError, ValueError, MemoryError) as error:
        report.incomplete = True
        report.error(f"--contact-sheet {name}: {one_line(error)}")
        return
    if report.options.json:
        report.note(f"contact sheet {name}")
    else:
        report.result(f"Wrote {name}")


# ── 14 · Run ──────────────────────────────────────────────────────────────────────────────────────
#
# What bounds a run, from the outside in:
#
#   backlog    jobs whose answer may wait for a worker (an open file each): 3 x --concurrency
#   slots      requests on the wire: --concurrency
#   savers     threads that decode and write originals; no paid image waits behind a copy,
#   copiers    so these have threads of their own, and so have the
#   converters of input files: no request waits behind a copy either


WORKERS = min(16, os.cpu_count() or 1)  # threads that save, as many that make copies, or convert
DESCRIPTORS = 16  # of the process, its event loop, a name look-up and a module that is loaded
PROOF_BYTES = 64 * 1024


def manifest_of(plan: Plan, options: RunOptions) -> Manifest | None:
    """Return the manifest of a run's folder, if it has one."""
    return None if plan.memory is None else Manifest(options.out_dir or "", plan.memory)


class Run:
    """What the jobs of a run share."""

    def __init__(self, plan: Plan, report: Report, *pools: futures.Executor) -> None:
        self.options = options = report.options
        self.report = report
        self.manifest = manifest_of(plan, options)
        self.savers, self.copiers, converters = pools
        self.channel = Channel(options, report.note, report.paused, converters)
        self.halt = self.channel.halt
        self.clock = asyncio.get_running_loop().time
        self.slots = asyncio.Semaphore(options.concurrency)
        self.backlog = asyncio.Semaphore(3 * options.concurrency)
        self.sending: set[asyncio.Task[Any] | None] = set()
        self.aborted = False  # by a second signal: no more copies

    async def in_saver(self, work: Callable[..., T], *arguments: object) -> T:
        """Do work in a thread of those that write originals."""
        return await asyncio.get_running_loop().run_in_executor(self.savers, work, *arguments)

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count the current task among those that an interruption waits for, or drops."""
        task = asyncio.current_task()
        self.sending.add(task)
        try:
            yield
        finally:
            self.sending.discard(task)

    def bug(self, error: Exception, kept: str = "") -> Failure:
        """Stop the run for what nobody has foreseen, and print one traceback."""
        failure = Failure(
            "internal", f"a bug in image_gen: {error!r}{kept}", maybe_billed=bool(kept)
        )
        if self.halt.reason is None or self.halt.reason.kind != "internal":
            write_stderr(redacted("".join(traceback.format_exception(error))))
        self.halt.stop_all(failure)
        return failure

    def heed(self, job: Job, failure: Failure) -> None:
        """Stop the run if this failure of a job asks for it."""
        if failure.kind == "write":  # images that cannot be saved should not be bought
            self.halt.stop_all(failure)
        elif self.options.fail_fast and not self.options.batch_api:
            reason = f"--fail-fast, {job.where}{failure.message}"
            behind = failure.kind
            self.halt.stop_all(Failure("fail_fast", reason, retryable=True, behind=behind))

    def interrupt(self) -> None:
        """Take a signal: send nothing more; at the second one, drop what is in flight."""
        if self.report.interrupted:
            self.aborted = True
            for task in filter(None, self.sending):
                task.cancel()
            return
        self.report.interrupted = True
        self.halt.stop_all(Failure("interrupted", "interrupted", retryable=True))
        if on_wire := self.channel.on_wire:
            self.report.note(
                f"Interrupted: {counted(on_wire, 'request')} in flight will be "
                "waited for, being paid for; interrupt again to drop them"
            )


async def keep_draft(job: Job, run: Run, exchange: Exchange, encoded: object) -> None:
    """Write a draft that a stream has brought, if there is a name left for it."""
    output, count = job.missing[0], len(exchange.drafts)
    if count == len(output.drafts):
        return
    saved = await run.in_saver(save_draft, output.drafts[count], encoded)
    if saved is not None:
        exchange.drafts.append(saved)
        run.report.note(f"{job.where}draft {count + 1}: {saved}")


def read_spool(spool: Spool) -> Answer:
    """Read the body of an answer."""
    return read_answer(spool.read(), spool.read, spool.broken)


def heed_error(job: Job, run: Run, spool: Spool) -> Answer | None:
    """Stop what an answer says is over, whatever its status; return it if it is small enough."""
    if spool.size < MAX_ERROR_BYTES:
        with suppress(Exception):  # a bug shows where the answer is read to be saved
            answer = read_spool(spool)
            if not answer.items:
                run.channel.heed(job, answer.verdict)
            return answer
    return None


async def fetch(job: Job, run: Run, exchange: Exchange) -> tuple[Spool, Answer | None]:
    """Return the answer to a job's request, read if it is small. Holds a slot, for the network."""
    async with run.slots:
        exchange.started = run.clock()
        try:
            with run.in_flight():
                on_draft = functools.partial(keep_draft, job, run, exchange)
                spool = await run.channel.send(job, exchange, on_draft)
                return spool, heed_error(job, run, spool)  # before the slot is free again
        except JobError as error:
            run.heed(job, error.failure)  # before the slot is free for another job
            raise


async def bring(
    job: Job, read: Callable[[], Answer], came: Delivery, run: Run
) -> tuple[Delivery, Verdict]:
    """Read an answer and save what it holds, or first fetch the images that it only names."""
    save = functools.partial(save_answer, delivery=came, manifest=run.manifest, options=run.options)

    def save_at_once() -> tuple[Answer, list[int], Delivery | None]:
        answer = read()  # and written in the same breath: no other answer waits unpacked
        named = [n for n, item in enumerate(answer.items) if is_address(encoded_in(item))]
        for index in reversed(named[MAX_N:]):  # more than a request can ask for
            del answer.items[index]
        del named[MAX_N:]
        return answer, named, None if named else save(job, answer)

    answer, named, delivery = await run.in_saver(save_at_once)
    for index in named:
        address = str(encoded_in(answer.items[index]))
        try:
            with run.in_flight():
                answer.items[index] = await run.channel.fetch_image(address)
        except JobError as error:
            message = f"the image at {address} was not fetched: {error.failure.message}"
            answer.items[index] = bad_answer(message)
    if delivery is None:
        delivery = await run.in_saver(save, job, answer)
    return delivery, answer.verdict


async def exchange_once(job: Job, run: Run, exchange: Exchange) -> tuple[Delivery, Verdict]:
    """Send a job's request, and save what the answer brings."""
    spool, answer = await fetch(job, run, exchange)
    try:
        came = Delivery(request_id=exchange.request_id)
        return await bring(job, lambda: answer or read_spool(spool), came, run)
    except asyncio.CancelledError:
        keep_answer(job.missing[0].path, spool.read)  # it names images that are paid for
        raise
    except Exception as error:  # noqa: BLE001 - a bug must neither lose an answer nor buy the next
        kept = keep_answer(job.missing[0].path, spool.read)
        raise JobError(run.bug(error, kept)) from None
    finally:
        spool.close()


async def deliver(job: Job, run: Run, exchange: Exchange) -> Delivery:
    """Exchange a job for its images, or for the reason why there are none."""
    try:
        while True:
            delivery, verdict = await exchange_once(job, run, exchange)
            exchange.pay(delivery.cost_usd)
            run.channel.budget.settle(exchange, delivery.cost_usd)
            if delivery.images or delivery.failure is None:
                run.channel.doubts = 0
                break
            await run.channel.recover(job, exchange, verdict._replace(failure=delivery.failure))
    except StoppedError as error:
        run.channel.budget.settle(exchange, 0.0)
        if not (exchange.patience.attempts and exchange.sent):
            unbilled = error.failure._replace(maybe_billed=False)
            return Delivery(failure=unbilled, held_back=True)
        last = exchange.patience.last
        if last and error.failure.kind == "max_cost":
            message = f"{last.message}; not sent again: {error.failure.message}"
            last = last._replace(message=message, behind="max_cost")
        return Delivery(failure=last)
    except JobError as error:
        run.channel.budget.settle(exchange, None if error.failure.maybe_billed else 0.0)
        run.heed(job, error.failure)
        return Delivery(failure=error.failure)
    except asyncio.CancelledError:  # by a second signal
        run.channel.budget.settle(exchange)
        lost = Failure("interrupted", "dropped while in flight", retryable=True, maybe_billed=True)
        run.heed(job, lost)
        return Delivery(failure=lost)
    if delivery.failure is not None:
        run.heed(job, delivery.failure)
    elif not run.options.keep_partials:
        remove_files(exchange.drafts)
        exchange.drafts.clear()
    return delivery


def with_history(delivery: Delivery, exchange: Exchange) -> Delivery:
    """Add to what an answer has brought what went before it."""
    doubt = "an earlier attempt may have been billed without an image"
    return delivery._replace(
        warnings=(*delivery.warnings, doubt) if exchange.maybe_billed else delivery.warnings,
        drafts=tuple(exchange.drafts),
        maybe_billed=exchange.maybe_billed,
        attempts=exchange.patience.attempts,
        request_id=exchange.request_id,
        cost_usd=exchange.cost_usd,
    )


async def make_copies(job: Job, delivery: Delivery, came: Container[str], run: Run) -> Delivery:
    """Write what is made of the images and not there yet; a failure keeps the originals."""
    loop = asyncio.get_running_loop()
    max_dim, failure = run.options.downscale_max_dim or 0, delivery.failure
    there, made = dict(delivery.images), {kind: list[Saved]() for kind in DERIVED}
    for output in job.outputs:
        remake = bool(output.source) or (output.path in came and not output.collected)
        for derived in output.derived:
            if derived.of not in there or run.aborted:
                continue
            original = there[derived.of]
            write = functools.partial(
                save_derived, derived, original, job.request, max_dim, remake=remake
            )
            try:
                there[derived.path] = await loop.run_in_executor(run.copiers, write)
                made[derived.kind].append(there[derived.path])
            except JobError as error:
                run.heed(job, error.failure)
                failure = failure or error.failure
    copies, kept = tuple(made["copy"]), tuple(made["kept"])
    return delivery._replace(kept=kept, copies=copies, failure=failure)


async def conclude(job: Job, delivery: Delivery, run: Run) -> Outcome:
    """Make the copies of a job whose images are on disk, and return its outcome."""
    came, loop = delivery.images, asyncio.get_running_loop()
    images = await loop.run_in_executor(run.copiers, images_on_disk, job, came)
    delivery = await make_copies(job, delivery._replace(images=images), came, run)
    failure = delivery.failure
    if failure is None:
        return Done(job, delivery) if came else Skipped(job, delivery)
    failure = failure._replace(maybe_billed=failure.maybe_billed or delivery.maybe_billed)
    return (Skipped if delivery.held_back else Failed)(job, delivery, failure)


def at_rest(job: Job) -> Delivery:
    """Return what there is of a job that nothing is sent for."""
    if not job.stale:
        return Delivery()
    return Delivery(failure=Failure("stale", job.stale), held_back=True)


async def run_job(job: Job, run: Run) -> Outcome:
    """Do all that a job needs and return its outcome."""
    exchange = Exchange(Patience(run.options))
    try:
        async with run.backlog:
            if job.missing and job.digest and job.request.files:
                job = with_digest(job, {})  # as its input files are now
            delivery = await deliver(job, run, exchange) if job.missing else at_rest(job)
            outcome = await conclude(job, with_history(delivery, exchange), run)
    except Exception as error:  # noqa: BLE001 - a bug must not take the other jobs' images along
        return Failed(job, Delivery(), run.bug(error))
    seconds = 0.0 if exchange.started is None else run.clock() - exchange.started
    return outcome._replace(delivery=outcome.delivery._replace(seconds=seconds))


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a run in order: Ctrl-C, the system's, and a terminal that closes.

    One that was ignored from the start, as by nohup, stays ignored.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [each for each in known if signal.getsignal(each) is not signal.SIG_IGN]


@contextmanager
def signals_taken(run: Run) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the run in order."""
    loop = asyncio.get_running_loop()
    before = {}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        run.report.note(f"Ctrl-C is ignored here (as after &); to stop: kill -TERM {os.getpid()}")
    with suppress(ValueError):  # only the main thread has signals
        for name in ending_signals():
            before[name] = signal.signal(name, lambda *_: loop.call_soon_threadsafe(run.interrupt))
    try:
        yield
    finally:
        for name, handler in before.items():  # a third one is no news
            signal.signal(name, signal.SIG_IGN if run.report.interrupted else handler)


def load_modules(plan: Plan) -> None:
    """Load what is first needed when an answer has come: it may not load any more by then."""
    # The SDK first: whoever is interrupted while it loads must not come back to half of it.
    needed = [openai, httpx2, httpcore2, binascii, email_utils, filecmp, html, ipaddress, jiter]
    needed += [random, stat, tempfile]
    if plan.sheet is not None or any(output.derived for job in plan.jobs for output in job.outputs):
        needed += [ExifTags, Image, ImageDraw, ImageFilter, ImageFont, ImageOps, ImageSequence]
        needed += [ImageChops, PngImagePlugin]
    try:
        for module in needed:
            getattr(module, "__name__")  # noqa: B009 - which loads it
        if Image in needed:
            Image.init()  # the plug-ins of the formats
    except ImportError as error:
        raise UsageError(f"a package is damaged: {one_line(error)}; install it anew") from None


def prove_folders(plan: Plan, options: RunOptions) -> None:
    """Write a file into each folder of the images, and remove it: a full disk shows here."""
    paths = [output.path for job in plan.jobs for output in job.missing]
    made: list[str] = []
    for folder in dict.fromkeys(map(os.path.dirname, paths)):
        try:
            made[:0] = make_folder(folder)
            with written(folder, bytes(PROOF_BYTES), sync=True):
                pass
            if manifest := manifest_of(plan, options):
                manifest.prove()
        except OSError as error:
            for name in made:
                with suppress(OSError):
                    os.rmdir(name)
            problem = f"nothing can be written in {folder or '.'}: {error.strerror or error}"
            raise UsageError(f"{problem}; make room there, or choose another folder") from None


def fit_concurrency(plan: Plan, options: RunOptions) -> int:
    """Return how many requests the file descriptors allow at once, after asking for more of them.

    Each takes a connection, its input files, and the bodies of three answers (see the backlog).
    """
    each = 4 + max((len(job.request.files) for job in plan.jobs), default=0)
    own = DESCRIPTORS + 4 * WORKERS
    wanted = own + each * options.concurrency
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except ImportError:  # Windows has no such limit
        return options.concurrency
    if soft in range(wanted):
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if soft < own + each:
            raise UsageError(f"{soft} open files are allowed; raise it: ulimit -n {own + each}")
    return options.concurrency if soft not in range(wanted) else (soft - own) // each


async def start_threads(*pools: futures.Executor) -> None:
    """Start all threads: where no more are allowed, that shows here and not at the first image."""
    go_on = threading.Event()
    try:
        for pool in pools:
            for _ in range(WORKERS):
                pool.submit(go_on.wait)
        await asyncio.get_running_loop().run_in_executor(None, go_on.is_set)  # for name look-ups
    except RuntimeError:
        problem = f"no thread can be started, {3 * WORKERS + 1} are needed (ulimit -u, pids limit)"
        raise UsageError(problem) from None
    finally:
        go_on.set()


def blot(record: logging.LogRecord) -> bool:
    """Take the key out of what the SDK logs (OPENAI_LOG)."""
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


@asynccontextmanager
async def running(plan: Plan, report: Report) -> AsyncIterator[Run]:
    """Set up what a run needs, all of it before the first request, and take it down again."""

    async def keep_status() -> None:
        while True:
            await asyncio.sleep(0.5 if report.terminal else PROGRESS_SECONDS)
            report.in_flight = run.channel.on_wire
            report.status()
            if not report.options.batch_api:  # whose batches tell how they stand
                report.progress()

    concurrency = fit_concurrency(plan, report.options)
    if concurrency < report.options.concurrency:
        report.warn(f"--concurrency {concurrency}: more would need more open files (ulimit -n)")
        report.options = report.options._replace(concurrency=concurrency)
    load_modules(plan)
    prove_folders(plan, report.options)
    pool = functools.partial(futures.ThreadPoolExecutor, WORKERS)
    with pool() as savers, pool() as copiers, pool() as converters:
        await start_threads(savers, copiers, converters)
        run = Run(plan, report, savers, copiers, converters)
        for handler in logging.getLogger().handlers:
            handler.addFilter(blot)
        status = asyncio.create_task(keep_status())
        try:
            with signals_taken(run):
                async with run.channel.client:
                    yield run
        finally:
            status.cancel()
        if run.manifest and run.manifest.problem:
            said = "it will not know some images of this run"
            report.warn(f"the manifest takes no more, {said}: {run.manifest.problem}")
        report.folder_cost = run.manifest.memory.spent if run.manifest else 0.0


async def run_jobs(plan: Plan, report: Report) -> list[Outcome]:
    """Run all jobs, as many at once as asked for, and report each as it ends."""
    outcomes = []
    async with running(plan, report) as run:
        tasks = [asyncio.create_task(run_job(job, run)) for job in plan.jobs]
        for task in asyncio.as_completed(tasks):
            outcome = await task
            outcomes.append(outcome)
            report.add(outcome)
    report.close()
    return outcomes


# ── 15 · Run, through the Batch API ───────────────────────────────────────────────────────────────
#
# Jobs are submitted in shards: files of lines, each of which becomes a batch that is answered by
# files of lines within a day. How far each shard has got stands in a state file in the out dir,
# written before and after each step, so that the same command goes on where a process died, and no
# job is submitted twice. A shard is in one of six stages:
#
#          upload_lines            create              create or look_for     collect_shard
#   PLANNED ───────────► UPLOADED ─────────► CREATING ────────────────► CREATED ─────────► SETTLED
#      │       ◄───────   │    ▲              │    │                       all it made is on disk
#      │    file is gone  │    └──────────────┘    │
#      │                  │        refused         │
#      └──────────────────┴────────────────────────┴──► DROPPED
#                  --cancel, and no batch is found
#
# CREATING is the doubtful one: a request to create the batch may have been sent and not answered.
# It is left by looking for the batch in the list of all, by run and shard in its metadata, for a
# minute, and only if it is not there by asking once more. Should both appear in the end, one is a
# twin: it is cancelled, and what it has made by then is saved beside the other's images.
#
# The shards of a run are chosen once its input images are uploaded; it is finished when each is
# SETTLED or DROPPED. Times of the server are compared with times of the server only.

STATE_NAME = ".image_gen-batch.json"
STATE_VERSION = 1
MAX_STATE_BYTES = 256 * 1024 * 1024  # many times that of 50,000 jobs
MAX_BATCH_LINES = 50_000
MAX_BATCH_BYTES = 200_000_000
POLL_SECONDS = 5.0
MAX_POLL_SECONDS = 60.0
LOOK_SECONDS = 60.0  # for a batch whose creation was not answered
FIRST_LOOK_SECONDS = 1.0  # from one look to the next, at first
LAG_SECONDS = 300.0  # a server of theirs may not know a new batch for so long
CLOCK_MARGIN_SECONDS = 60  # between two of their servers
PENDING_SECONDS = 2 * 24 * 3600  # a batch that is older has ended
ENDED = ("completed", "failed", "expired", "cancelled")
STOPPING = (*ENDED, "cancelling")
# Of a batch's metadata: its run and shard, and digests of the jobs and of the folder.
RUN_KEY, SHARD_KEY = "image_gen_run", "image_gen_shard"
JOBS_KEY, FOLDER_KEY = "image_gen_jobs", "image_gen_folder"
MAX_PAST = 1000  # batches of former runs that a state remembers
TIDY_SECONDS = 10.0  # for the deletion of a file
CALLS_AT_ONCE = 8  # uploads and deletions of files
LINES_AT_ONCE = 4  # a line holds all images of a job, so these bound the memory
LINE_BYTES_AT_ONCE = 64 * 1024 * 1024
# What a batch says of a request or of itself, and that may go well at another time.
PASSING_CODES = ("batch_expired", "batch_cancelled", "token_limit_exceeded")


class OddAnswerError(Exception):
    """What came with a status of success is no answer of the Batch API."""

    def __init__(self, wanted: str, body: object) -> None:
        text = body if isinstance(body, str) else json.dumps(body, default=repr)
        said = one_line(explanation(text))[:100] or "nothing"
        super().__init__(f"{wanted} was asked for, and the answer is {said}")


class OtherRangeError(Exception):
    """Another part of a file came than was asked for."""


def is_id(value: object) -> bool:
    """Tell whether a value can be an id of the API, and part of an address."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w.:-]{0,199}", value) is not None


class StoredFile(NamedTuple):
    """What the API says of an uploaded file."""

    id: str
    created_at: int | None  # by the server's clock

    @classmethod
    def read(cls, value: object) -> StoredFile:
        """Check an answer."""
        fields = mapping(value)
        if not is_id(fields.get("id")):
            raise OddAnswerError("a file", value)
        return cls(fields["id"], whole_number(fields.get("created_at")))


class Batch(NamedTuple):
    """What the API says of a batch, as far as it makes sense."""

    id: str
    status: str
    input_file: str
    files: tuple[str, ...]  # of output and of errors
    counts: tuple[int, int, int] | None  # total, completed, failed
    errors: tuple[tuple[int, str, str | None], ...]  # line or 0, words, code
    created_at: int | None
    metadata: Mapping[str, Any]

    @classmethod
    def read(cls, value: object, batch_id: str = "") -> Batch:
        """Check an answer; the id is known where the batch was asked for by it."""
        fields = mapping(value)
        own_id, status = fields.get("id") or batch_id, fields.get("status")
        if not is_id(own_id) or batch_id not in ("", own_id) or not isinstance(status, str):
            raise OddAnswerError("a batch", value)
        counts = mapping(fields.get("request_counts"))
        numbers = [whole_number(counts.get(key)) for key in ("total", "completed", "failed")]
        total, completed, failed = (number or 0 for number in numbers)
        errors = []
        listed = mapping(fields.get("errors")).get("data")
        for error in map(mapping, listed if isinstance(listed, list) else ()):
            code = error.get("code")
            said = one_line(explanation(error.get("message")) or code or "no explanation")
            known = code if isinstance(code, str) else None
            errors.append((whole_number(error.get("line")) or 0, said, known))
        return cls(
            own_id,
            one_line(status)[:40],
            fields["input_file_id"] if is_id(fields.get("input_file_id")) else "",
            tuple(
                fields[key] for key in ("output_file_id", "error_file_id") if is_id(fields.get(key))
            ),
            None if None in numbers else (total, completed, failed),
            tuple(errors),
            whole_number(fields.get("created_at")),
            mapping(fields.get("metadata")),
        )


class Page(NamedTuple):
    """A page of the list of batches, the newest first."""

    batches: tuple[Batch, ...]
    has_more: bool

    @classmethod
    def read(cls, value: object) -> Page:
        """Check an answer; an entry that is no batch is passed over."""
        fields = mapping(value)
        if not isinstance(fields.get("data"), list):
            raise OddAnswerError("a list of batches", value)
        batches = []
        for entry in fields["data"]:
            with suppress(OddAnswerError):
                batches.append(Batch.read(entry))
        return cls(tuple(batches), fields.get("has_more") is True)


class Stage(Enum):
    """How far a shard has got."""

    PLANNED = "its jobs are chosen"
    UPLOADED = "its file of lines is on the server"
    CREATING = "a request to create its batch may have been sent"
    CREATED = "its batch exists"
    SETTLED = "what its batch has made is on disk"
    DROPPED = "cancelled before it had a batch"


# Where each stage may lead: the arrows of the diagram.
STEPS = {
    Stage.PLANNED: (Stage.UPLOADED, Stage.DROPPED),
    Stage.UPLOADED: (Stage.CREATING, Stage.CREATED, Stage.PLANNED, Stage.DROPPED),
    Stage.CREATING: (Stage.CREATED, Stage.UPLOADED, Stage.DROPPED),
    Stage.CREATED: (Stage.SETTLED,),
}


class Shard:
    """One batch: some jobs of one endpoint and one model, and how far it has got."""

    def __init__(self, index: int, numbers: Sequence[int], endpoint: str) -> None:
        self.index = index
        self.numbers = tuple(numbers)
        self.endpoint = endpoint
        self.stage = Stage.PLANNED
        self.file_id: str | None = None
        self.batch_id: str | None = None
        self.twins: list[str] = []  # other batches of the same jobs
        self.asked_at = 0.0  # when its creation was last asked for, by our clock
        self.attempts = 0  # at creating it
        self.file_time: int | None = None  # when its lines were uploaded, by the server's clock
        self.known = False  # this process has seen that they are there
        self.refusal: Failure | None = None  # why it could not be submitted, this time
        self.told = ""  # the last line about its batch

    @classmethod
    def read(cls, index: int, content: Mapping[str, Any]) -> Shard:
        """Read a shard of a state file. Raises what is raised by content that is none."""
        shard = cls(index, [int(number) for number in content["numbers"]], str(content["endpoint"]))
        shard.file_id, shard.batch_id = content["file_id"], content["batch_id"]
        shard.twins = list(content.get("twins", ()))
        shard.asked_at = float(content.get("asked_at", 0))
        shard.attempts = int(content.get("attempts", 1))
        shard.file_time = whole_number(content.get("file_time"))
        ids = (shard.file_id, shard.batch_id, *shard.twins)
        if not all(value is None or is_id(value) for value in ids):
            raise ValueError("an id that is none")
        if content["settled"]:
            shard.stage = Stage.SETTLED if shard.batch_id else Stage.DROPPED
        elif shard.batch_id:
            shard.stage = Stage.CREATED
        elif content["creating"]:
            shard.stage = Stage.CREATING
        elif shard.file_id:
            shard.stage = Stage.UPLOADED
        return shard

    @property
    def content(self) -> dict[str, Any]:
        """The shard as it stands in the state file, which keeps the fields of its first version."""
        return {
            "numbers": self.numbers,
            "endpoint": self.endpoint,
            "file_id": self.file_id,
            "creating": self.stage in (Stage.CREATING, Stage.CREATED, Stage.SETTLED),
            "batch_id": self.batch_id,
            "settled": self.stage in (Stage.SETTLED, Stage.DROPPED),
            "twins": self.twins,
            "asked_at": self.asked_at,
            "file_time": self.file_time,
            "attempts": self.attempts,
        }

    @property
    def batch_ids(self) -> list[str]:
        """All batches of its jobs, its own first."""
        return [self.batch_id, *self.twins] if self.batch_id else []


class Submission:
    """What a folder has submitted, and not collected yet; every change is on disk at once."""

    def __init__(self, folder: str, content: Mapping[str, Any]) -> None:
        if content["version"] != STATE_VERSION:
            raise ValueError("it was written by another version of this program")
        self.path = os.path.join(folder, STATE_NAME)
        self.id = str(content["run"])
        self.account = str(content.get("account", ""))
        # By job number: a digest of what it asks for, and which of its variants were submitted.
        self.digests = {int(number): str(digest) for number, digest in content["digests"].items()}
        shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # for most jobs have the same
        self.variants = {}
        for number, variants in content["variants"].items():
            these = tuple(range(MAX_N)[variant] for variant in variants)
            self.variants[int(number)] = shared.setdefault(these, these)
        self.uploads: dict[str, str] = dict(content["uploads"])  # file ids by sha256
        self.sources: dict[str, str] = dict(content.get("sources", {}))  # sha256 of input files
        self.past = list(map(str, content.get("past", ())))  # batches of former runs, settled
        self.shards = [Shard.read(*numbered) for numbered in enumerate(content["shards"])]
        self.sharded: bool = content["planned"]
        # What it does about files that are there; its own images are no obstacle to its going on.
        self.force: bool = content["force"]
        self.remake: bool = content.get("remake", False)
        self.only: str | None = content.get("only")
        self.is_new = False  # nothing of it is on disk
        numbers = [number for shard in self.shards for number in shard.numbers]
        if self.sharded and sorted(numbers) != sorted(self.variants):
            raise ValueError("its shards are not those of its jobs")
        if not self.variants.keys() <= self.digests.keys() or not all(
            map(is_id, self.uploads.values())
        ):
            raise ValueError("its parts do not fit together")

    def are_all(self, *stages: Stage) -> bool:
        """Tell whether the shards are chosen, and have got so far."""
        return self.sharded and all(shard.stage in stages for shard in self.shards)

    @property
    def batch_ids(self) -> list[str]:
        """All its batches."""
        return [batch_id for shard in self.shards for batch_id in shard.batch_ids]

    @property
    def submitted(self) -> bool:
        """Whether every batch exists."""
        return self.are_all(Stage.CREATED, Stage.SETTLED, Stage.DROPPED)

    @property
    def unasked(self) -> bool:
        """Whether no batch can exist."""
        return all(shard.stage in (Stage.PLANNED, Stage.UPLOADED) for shard in self.shards)

    @property
    def finished(self) -> bool:
        """Whether nothing remains to be submitted or collected."""
        return self.are_all(Stage.SETTLED, Stage.DROPPED)

    def to_send(self, jobs: Iterable[Job]) -> tuple[Job, ...]:
        """Return the jobs that have no batch yet, with the images that were to be submitted."""
        ended = (Stage.CREATED, Stage.SETTLED, Stage.DROPPED)
        gone = {n for shard in self.shards if shard.stage in ended for n in shard.numbers}
        left = self.variants.keys() - gone
        return tuple(
            job._replace(missing=tuple(job.outputs[n] for n in self.variants[job.number]))
            for job in jobs
            if job.number in left
        )

    def planning(self, options: RunOptions) -> RunOptions:
        """Return the options that its jobs are planned by: what began it says what is replaced."""
        if self.is_new:
            return options
        return options._replace(
            force=self.force, skip_existing=not self.force, remake=self.remake, only=self.only
        )

    def save(self) -> None:
        """Write the state."""
        content = {
            "version": STATE_VERSION,
            "run": self.id,
            "account": self.account,
            "started": 0,  # of the first version, which reads it
            "digests": self.digests,
            "variants": self.variants,
            "uploads": self.uploads,
            "sources": self.sources,
            "past": self.past,
            "shards": [shard.content for shard in self.shards],
            "planned": self.sharded,
            "force": self.force,
            "remake": self.remake,
            "only": self.only,
        }
        write_file(self.path, json.dumps(content).encode(), replace=True, sync=True)

    def advance(self, shard: Shard, stage: Stage) -> None:
        """Take a shard along an arrow of the diagram; the only function that changes a stage."""
        if stage not in STEPS.get(shard.stage, ()):
            raise AssertionError(f"no step leads from {shard.stage} to {stage}")
        shard.stage = stage
        self.save()


def load_submission(folder: str) -> Submission | None:
    """Read the state of a folder."""
    name = os.path.join(folder, STATE_NAME)
    if not os.path.lexists(name):
        return None
    if not os.path.isfile(name):
        raise UsageError(f"{name} is no file; move it away")
    try:
        with open(name, "rb") as file:
            return Submission(folder, json.loads(file.read(MAX_STATE_BYTES)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{name} cannot be read ({one_line(error)}); move it away: batches that wait for the "
            "same jobs are found without it"
        ) from None


def refuse_beside_batches(folder: str, former: Submission | None) -> None:
    """Raise a UsageError if a folder waits for batches: a live run would pay for their images."""
    if former is not None and not former.finished:
        raise UsageError(
            f"{folder} has submitted a batch that is not collected: add --batch-api to collect it, "
            "or --batch-api --cancel to end it"
        )


def account_digest(run_id: str) -> str:
    """Return a digest, for one run alone, of the account that the environment names."""
    base_url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    names = ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID")
    facts = [run_id, base_url, *(os.environ.get(name, "") for name in names)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def folder_digest(folder: str) -> str:
    """Return a digest that tells a folder of this machine from others."""
    place = f"{socket.gethostname()}\0{os.path.realpath(folder or '.')}"
    return hashlib.sha256(os.fsencode(place)).hexdigest()[:32]


def new_submission(folder: str, former: Submission | None, options: RunOptions) -> Submission:
    """Make the state of a run that has not begun; it keeps what a former run has uploaded."""
    run_id = os.urandom(8).hex()
    content: dict[str, Any] = {
        "version": STATE_VERSION,
        "run": run_id,
        "account": account_digest(run_id),
        "digests": {},
        "variants": {},
        "uploads": former.uploads if former else {},
        "past": [*former.past, *former.batch_ids][-MAX_PAST:] if former else [],
        "shards": [],
        "planned": False,
        "force": options.force,
        "remake": options.remake,
        "only": options.only,
    }
    submission = Submission(folder, content)
    submission.is_new = True
    return submission


def part_digest(part: Part) -> str:
    """Return a digest of an input file as it is sent."""
    digest = file_digest(part.path)
    return f"{digest}-{part.mask_edits}" if part.is_converted else digest


def job_digests(jobs: Iterable[Job], *, before_scripts: bool = False) -> dict[int, str]:
    """Return a digest of all that each job asks for, however much of it is on disk already.

    A job whose input images are gone has an empty one. Before names had letters of other scripts,
    the automatic ones of their prompts had the word job in their place.
    """
    digests = {}
    for job in jobs:
        request = job.request
        names = [os.path.basename(output.planned) for output in job.outputs]
        if before_scripts and job.automatic and not (job.name or "").isascii():
            names = [name.replace(job.name or "", f"{job.number:03d}-job") for name in names]
        try:
            files = [part_digest(part) for part in request.parts]
        except OSError:
            digests[job.number] = ""
            continue
        asked = json.dumps([request.endpoint, request.payload, files, names], sort_keys=True)
        digests[job.number] = hashlib.sha256(asked.encode()).hexdigest()[:24]
    return digests


def changed_jobs(submission: Submission, jobs: Sequence[Job]) -> str:
    """Say how jobs differ from what a run has submitted; empty if they do not."""
    if {job.number for job in jobs} != set(submission.digests):
        if submission.only is not None:
            return f"it was begun with --only {submission.only}"
        return f"there are {counted(len(jobs), 'job')} instead of {len(submission.digests):,}"
    changed = list(jobs)
    for before_scripts in (False, True):
        digests = job_digests(changed, before_scripts=before_scripts)
        changed = [
            job
            for job in changed
            if digests[job.number] not in ("", submission.digests[job.number])
            or any(n >= len(job.outputs) for n in submission.variants.get(job.number, ()))
        ]
    if not changed:
        return ""
    return f"{counted(len(changed), 'job')} changed, first that of {changed[0].where.strip(': ')}"


def open_submission(
    former: Submission | None, jobs: Sequence[Job] | None, options: RunOptions
) -> Submission:
    """Return the run of a folder that goes on, if the jobs are its own, or a new one.

    A run goes on until it is finished; after that its command finds it finished, unless it asks for
    a new one by --force or --skip-existing. Jobs that could not be read (None) are not compared.
    """
    folder = options.out_dir or "."
    if options.cancel and (former is None or former.finished):
        raise UsageError(f"--cancel: {folder} has nothing submitted that is not collected")
    if former is None:
        return new_submission(folder, None, options)
    changed = "" if jobs is None else changed_jobs(former, jobs)
    again = options.force or options.resumes
    if (former.finished and (changed or again)) or (former.unasked and changed):
        return new_submission(folder, former, options)
    if changed:
        raise UsageError(
            f"the jobs are not those that {folder} has submitted and not collected ({changed}): "
            "go on with the former --input, take another --out-dir, or end that run with --cancel "
            "and the former --input"
        )
    strange = former.account not in ("", account_digest(former.id))
    if strange and former.unasked and not options.cancel:
        return new_submission(folder, None, options)
    if strange and not (former.finished or former.unasked or options.dry_run):
        raise UsageError(
            f"{folder} was submitted with another OPENAI_BASE_URL, OPENAI_ORG_ID or "
            "OPENAI_PROJECT_ID; set what was set then, and repeat the command"
        )
    return former


def begin(submission: Submission, jobs: Sequence[Job]) -> None:
    """Note which images a new run is about to submit."""
    submission.variants = {
        job.number: tuple(job.outputs.index(output) for output in job.missing)
        for job in jobs
        if job.missing
    }
    submission.digests = job_digests(jobs)
    submission.sources = {name: file_digest(name) for job in jobs for name in job.request.files}
    submission.sharded = not submission.variants
    if submission.variants:
        submission.save()


def batch_line(job: Job, file_ids: Mapping[Part, str]) -> dict[str, Any]:
    """Return the line of a job for the Batch API; file_ids says what stands for an input file."""
    request = job.wanted
    body = request.payload
    for part in request.parts:
        sent = {"file_id": file_ids[part]}
        if part.role == "image":
            body.setdefault("images", []).append(sent)
        else:
            body[part.role] = sent
    custom_id = f"job-{job.number}"
    return {"custom_id": custom_id, "method": "POST", "url": request.endpoint, "body": body}


def encoded_line(job: Job, file_ids: Mapping[Part, str]) -> bytes:
    """Return the same as it stands in the file."""
    return json.dumps(batch_line(job, file_ids), ensure_ascii=False).encode() + b"\n"


def plan_shards(jobs: Iterable[Job], file_ids: Mapping[Part, str]) -> list[Shard]:
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
    return [Shard(index, numbers, url) for index, (url, numbers) in enumerate(shards)]


def stray_job(custom_id: str, folder: str, count: int) -> Job:
    """Stand in for the job of a result that nobody asked for here: it may have been paid for."""
    names = [f"unmatched-{slugify(custom_id)}-{number}.png" for number in range(1, count + 1)]
    outputs = tuple(Output(os.path.join(folder, name), collected=True) for name in names)
    request = ImageRequest(custom_id)
    return Job(0, 0, request, folder, None, outputs=outputs, missing=outputs)


def number_in(custom_id: str) -> int:
    """Return the number of the job that a line is about; 0 if it is none of ours."""
    found = re.fullmatch(r"job-([1-9][0-9]{0,8})", custom_id)
    return int(found[1]) if found else 0


class Result(NamedTuple):
    """What a line of an output or error file brings."""

    custom_id: str
    delivery: Delivery  # so far
    answer: Answer | None = None  # whose images are to be saved
    is_done: bool = True  # whatever came of it


def read_result(file: Spool) -> Result:
    """Read a line of an output or error file. Runs in a worker thread.

    Raises a ValueError for a line that is none, as at the end of a file that was cut off.
    """
    line = mapping(load_json(file.read()))
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str):
        raise ValueError("no custom_id")  # noqa: TRY004
    response, error = mapping(line.get("response")), mapping(line.get("error"))
    if not response:
        code = str(error.get("code") or "batch_error")
        message = one_line(error.get("message") or "the batch has no answer for this job")
        failure = batch_failure(code, code, message)
        return Result(custom_id, Delivery(failure=failure), is_done=not code.startswith("batch_"))
    body, status = response.get("body"), response.get("status_code")
    sent = Delivery(attempts=1, request_id=str(response.get("request_id") or "") or None)
    number = status if isinstance(status, int) else 200
    if number < 300:
        answer = answer_of(body, functools.partial(images_in, body), file.read)
    else:  # bytes of an image where one is expected count, whatever the status is
        answer = answer_of(mapping(body), list, file.read)
        answer.items[:] = [item for item in answer.items if not is_address(encoded_in(item))]
    if not answer.items and status != 200:
        failure = judge(ErrorAnswer(number, body if mapping(body) else error, {}, "")).failure
        if failure.kind == "address":  # that of the batch was right
            failure = failure._replace(kind="invalid_request", message=one_line(explanation(body)))
        return Result(custom_id, sent._replace(failure=failure))
    return Result(custom_id, sent, answer)


def batch_failure(kind: str, code: str, message: str) -> Failure:
    """Return the failure of a job that its batch has not done, by a code that may be known."""
    known = VERDICT_BY_CODE.get(code)
    passing = bool({kind, code} & {*PASSING_CODES})
    return Failure(known[1] if known else kind, message, code, retryable=passing)


def judge_call(error: Exception) -> Verdict:
    """Judge an error of the calls that are not about one image."""
    verdict, answer = verdict_of(error), error.__cause__ or error
    if isinstance(error, OtherRangeError):
        said = "another part of a file came than was asked for"
        return Verdict("retry", Failure("bad_answer", said, retryable=True))
    if isinstance(error, OddAnswerError):
        said = f"the Batch API answers oddly: {error}; a proxy, or a portal to sign in at?"
        return Verdict("retry", Failure("bad_answer", said, retryable=True))
    if isinstance(answer, ErrorAnswer) and answer.status in (403, 404):
        said = explanation(answer.body) or "no explanation"
        message = f"the Batch API, HTTP {answer.status}: {one_line(said)}"
        code = str(answer.status)
        failure = verdict.failure._replace(kind="batch_api", message=message, code=code)
        return Verdict("fail", failure)
    return verdict


def is_refused(error: Exception) -> bool:
    """Tell whether an error proves that no batch was created."""
    cause = error.__cause__ or error
    if isinstance(cause, ErrorAnswer):
        return cause.status < 500 and cause.status not in (408, 409)
    failure = verdict_of(error).failure
    return failure.kind == "connection" and not failure.maybe_billed


def is_unknown(error: JobError) -> bool:
    """Tell whether a call has failed as the API does not know what it is about."""
    return (error.failure.kind, error.failure.code) == ("batch_api", "404")


def is_recent(shard: Shard) -> bool:
    """Tell whether a batch was asked for some minutes ago at most, by another process."""
    return 0 <= time.time() - shard.asked_at < LAG_SECONDS


class Collection:
    """What a batch has brought in this process."""

    def __init__(self, batch_id: str, numbers: Iterable[int]) -> None:
        self.batch_id = batch_id
        self.numbers = frozenset(numbers)
        self.done = False  # nothing of it is left to fetch
        self.lacking: float | None = None  # since when it is known that something is
        self.offsets: dict[str, int] = {}  # of the line that comes next, in each of its files
        self.lines: set[str] = set()  # the custom_ids that have been read
        self.answered: set[str] = set()  # those of requests that were done
        self.later: list[tuple[Result, Spool]] = []  # further lines of theirs
        self.places: set[int] = set()  # hashes of those of the lines that have been taken

    def has_all(self, batch: Batch) -> bool:
        """Tell whether the lines account for what the batch says it has done.

        Counts of none, as lagging servers and some gateways have them, say nothing.
        """
        if batch.status == "failed" or len(self.lines) >= len(self.numbers):
            return True
        if batch.status == "completed" or batch.counts is None:
            return False
        return len(self.answered) >= batch.counts[1] + batch.counts[2]


class BatchClient:
    """What a run asks of the Batch API: its steps, from top to bottom."""

    def __init__(self, run: Run, submission: Submission, jobs: Sequence[Job]) -> None:
        self.run = run
        self.api = run.channel.client
        self.submission = submission
        self.jobs = {job.number: job for job in jobs}
        self.folder = os.path.dirname(submission.path)
        self.ended: dict[int, str] = {}  # jobs whose end is reported, and the batch of their images
        self.outcomes: list[Outcome] | None = None  # if they are wanted
        self.collections: dict[str, Collection] = {}  # by batch
        self.batches: dict[str, Batch] = {}  # as they ended
        self.failed: dict[int, Delivery] = {}  # jobs that have an error, if no image comes
        self.sent_at: dict[int, float] = {}  # when creations were asked for, by shard
        self.seen_at: dict[str, float] = {}  # when batches were last seen
        self.stopped: set[str] = set()  # twins that were cancelled
        self.known_files: set[str] = set()  # that have been asked for, or uploaded, just now
        self.troubles: dict[str, tuple[str, str | None]] = {}  # the last one, by batch

    # calls

    async def within(self, work: Awaitable[T], seconds: float) -> T:
        """Wait for something, for so many seconds (TimeoutError), and no longer than the run."""
        task = asyncio.ensure_future(work)
        halted = asyncio.ensure_future(self.run.halt.changed.wait())
        try:
            await asyncio.wait((task, halted), timeout=seconds, return_when="FIRST_COMPLETED")
            if not task.done():
                self.run.halt.check()
                raise TimeoutError
            return task.result()
        finally:
            task.cancel()
            halted.cancel()

    async def once(self, make: Callable[[], Awaitable[Any]], read: Callable[[Any], T]) -> T:
        """Make a call, and check its answer."""
        self.run.halt.check()
        answer = await self.within(make(), self.run.options.timeout)
        value = load_json(answer.content)
        if value is None:
            value = answer.content[:MAX_ERROR_BYTES].decode("utf-8", "replace")
        return read(value)

    async def call(
        self,
        make: Callable[[], Awaitable[Any]],
        read: Callable[[Any], T],
        gives_up_on: Container[str] = (),
    ) -> T:
        """Make a call that may be repeated without harm, until it is answered."""
        patience = Patience(self.run.options)
        while True:
            patience.begin()
            try:
                return await self.once(make, read)
            except api_errors(OddAnswerError, TimeoutError) as error:
                if (failure := judge_call(error).failure).kind in gives_up_on:
                    raise JobError(failure) from None
                await self.wait(patience, error)
                self.run.halt.check()

    async def wait(self, patience: Patience, error: Exception) -> None:
        """Wait until a call that failed can be made again, or raise the JobError that ends it."""
        verdict = judge_call(error)
        if verdict.failure.code == "404" and self.is_new:  # a replica lags
            verdict = verdict._replace(action="retry")
        delay = patience.after(verdict)
        patience.spend(delay)
        self.run.report.note(f"{verdict.failure.message}; again in {delay:.1f} s")
        await self.run.halt.sleep(delay)

    @property
    def is_new(self) -> bool:
        """Whether a batch was created, or asked for, by this process some minutes ago at most."""
        return self.run.clock() - max(self.sent_at.values(), default=-LAG_SECONDS) < LAG_SECONDS

    async def together(self, work: Callable[[T], Awaitable[None]], items: Iterable[T]) -> None:
        """Do something for each of the items, some at a time."""
        queue = iter(items)

        async def worker() -> None:
            for item in queue:
                await work(item)

        workers = [asyncio.create_task(worker()) for _ in range(CALLS_AT_ONCE)]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()

    # submit

    def asked(self, numbers: Iterable[int]) -> Iterator[Job]:
        """Yield jobs with the outputs that were submitted."""
        for number in numbers:
            job = self.jobs[number]
            outputs = tuple(output._replace(collected=True) for output in job.outputs)
            missing = tuple(outputs[variant] for variant in self.submission.variants[number])
            yield job._replace(outputs=outputs, missing=missing)

    def asked_job(self, custom_id: str, collection: Collection) -> Job | None:
        """Return the job of a line; None if its batch was not asked for it."""
        number = number_in(custom_id)
        return next(self.asked([number])) if number in collection.numbers else None

    async def submit(self) -> None:
        """Create the batches that do not exist yet; a refused one does not stop the others."""
        submission = self.submission
        if not submission.sharded:
            jobs = [self.jobs[number] for number in submission.variants]
            submission.shards = plan_shards(jobs, await self.upload_inputs(jobs))
            submission.sharded = True
            submission.save()
        for shard in submission.shards:
            try:
                if shard.stage is Stage.UPLOADED and not await self.know_files(shard):
                    shard.file_id = None
                    submission.advance(shard, Stage.PLANNED)
                if shard.stage is Stage.PLANNED:
                    await self.upload_lines(shard)
                if shard.stage in (Stage.UPLOADED, Stage.CREATING):
                    await self.create(shard)
            except JobError as error:
                failure, stops = error.failure, error.action == "stop run"
                if not self.run.channel.reached:
                    failure = failure._replace(message=f"{failure.message}; {UNREACHABLE}")
                for refused in submission.shards[shard.index :] if stops else [shard]:
                    refused.refusal = failure
                if stops:
                    return

    async def find_file(self, file_id: str, gives_up_on: Container[str] = ()) -> StoredFile | None:
        """Ask for an uploaded file; None if the API does not know it."""
        retrieve = functools.partial(self.api.files.with_raw_response.retrieve, file_id)
        try:
            return await self.call(retrieve, StoredFile.read, gives_up_on)
        except JobError as error:
            if is_unknown(error):
                return None
            raise

    async def know_file(self, shard: Shard) -> bool:
        """Look whether the API has the lines of a shard, unless that is known."""
        if not shard.known and (file := await self.find_file(shard.file_id or "")):
            shard.known, shard.file_time = True, file.created_at
        return shard.known

    async def know_files(self, shard: Shard) -> bool:
        """Look whether the API has all that the batch of a shard is made of."""
        if shard.known:
            return True
        before = dict(self.submission.uploads)
        await self.upload_inputs(self.jobs[number] for number in shard.numbers)
        return self.submission.uploads == before and await self.know_file(shard)

    async def upload_inputs(self, jobs: Iterable[Job]) -> dict[Part, str]:
        """Upload each distinct input image once; return the file ids by what they are sent as."""
        uploads, known = self.submission.uploads, self.known_files
        parts = dict.fromkeys(part for job in jobs for part in job.request.parts)
        digests = {part: part_digest(part) for part in parts}

        async def upload(digest: str) -> None:
            file_id = uploads.get(digest)
            if file_id and file_id not in known and not await self.find_file(file_id):
                del uploads[digest]
            if digest not in uploads:
                upload = functools.partial(self.upload_input, sources[digest])
                uploads[digest] = (await self.call(upload, StoredFile.read)).id
                # A lost note of an upload costs an upload; a note of each of thousands, hours.
                if len(uploads) < 100 or len(uploads) % 100 == 0:
                    self.submission.save()
            known.add(uploads[digest])

        sources = {digest: part for part, digest in digests.items()}
        await self.together(upload, sources)
        return {part: uploads[digest] for part, digest in digests.items()}

    async def upload_input(self, part: Part) -> Any:  # noqa: ANN401
        """Upload an input image."""
        with ExitStack() as stack:
            file = await self.run.channel.prepare(file_part, stack, part, "input")
            return await self.api.files.with_raw_response.create(file=file, purpose="vision")

    async def upload_lines(self, shard: Shard) -> None:
        """Upload the jobs of a shard, one a line."""
        jobs = list(self.asked(shard.numbers))
        file_ids = await self.upload_inputs(jobs)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for job in jobs:
                file.write(encoded_line(job, file_ids))
            name = f"image_gen-{self.submission.id}-{shard.index}.jsonl"

            async def upload() -> Any:  # noqa: ANN401
                file.seek(0)
                part = (name, cast("BinaryIO", file), "application/jsonl")
                return await self.api.files.with_raw_response.create(file=part, purpose="batch")

            file_on_server = await self.call(upload, StoredFile.read)
        shard.file_id, shard.file_time, shard.known = *file_on_server, True
        self.submission.advance(shard, Stage.UPLOADED)

    def metadata(self, shard: Shard) -> dict[str, str]:
        """Return what tells a shard's batch from others: its run, or its jobs and its folder."""
        numbered = [
            (number, self.submission.digests[number], self.submission.variants[number])
            for number in shard.numbers
        ]
        return {
            RUN_KEY: self.submission.id,
            SHARD_KEY: str(shard.index),
            JOBS_KEY: hashlib.sha256(json.dumps(numbered).encode()).hexdigest(),
            FOLDER_KEY: folder_digest(self.folder),
        }

    async def create(self, shard: Shard) -> None:
        """Create a batch, once: after a doubtful attempt, look first whether it exists."""
        advance, patience = self.submission.advance, Patience(self.run.options)
        metadata = self.metadata(shard)
        create = functools.partial(
            self.api.batches.with_raw_response.create,
            endpoint=shard.endpoint,  # type: ignore[arg-type]
            completion_window="24h",
            metadata=metadata,
        )
        while shard.stage is not Stage.CREATED:
            if shard.stage is Stage.CREATING and not await self.look_for(shard):
                advance(shard, Stage.UPLOADED)
            if shard.stage is Stage.UPLOADED and not shard.attempts:
                await self.adopt(shard, metadata)
            if shard.batch_id:
                break
            self.run.halt.check()
            patience.begin()
            shard.attempts += 1
            shard.asked_at = time.time()
            held = self.hold(shard)
            advance(shard, Stage.CREATING)
            self.sent_at[shard.index] = self.run.clock()
            ask = functools.partial(create, input_file_id=shard.file_id or "")
            try:
                shard.batch_id = (await self.once(ask, Batch.read)).id
            except api_errors(OddAnswerError, TimeoutError) as error:
                if is_refused(error):
                    advance(shard, Stage.UPLOADED)
                    self.run.channel.budget.settle(held, 0.0)
                await self.wait(patience, error)
            else:
                advance(shard, Stage.CREATED)
        await self.find_twins(shard)
        jobs = counted(len(shard.numbers), "job")
        self.run.report.note(f"batch {shard.batch_id}: {jobs} submitted")

    def hold(self, shard: Shard) -> tuple[int, int]:
        """Hold what a batch can cost, or raise a JobError; each try at creating it counts."""
        budget, key = self.run.channel.budget, (shard.index, shard.attempts)
        bound = bound_of_all(self.asked(shard.numbers), self.run.options)
        if not budget.take(key, bound):
            raise JobError(budget.refusal(bound))
        return key

    # look for batches

    async def listing(self, since: float) -> list[Batch]:
        """List the batches that were created since a time of the server's clock, or all."""
        found: dict[str, Batch] = {}
        after: Any = openai.omit
        while True:
            ask = functools.partial(self.api.batches.with_raw_response.list, limit=100, after=after)
            page = await self.call(ask, Page.read)
            fresh = {batch.id: batch for batch in page.batches if batch.id not in found}
            found |= fresh
            times = [batch.created_at for batch in page.batches if batch.created_at is not None]
            if not page.has_more or max(times, default=since) < since:
                return list(found.values())
            if not fresh:
                message = "the list of batches repeats itself, so that nothing can be looked up"
                raise JobError(Failure("bad_answer", message, retryable=True))
            after = page.batches[-1].id

    async def matches(self, shard: Shard) -> list[str]:
        """Return the ids of all batches of a shard, the first that was created first.

        A key of another account sees none, and the uploaded file neither: a JobError says so.
        """
        wanted = self.submission.id, str(shard.index)
        batches = await self.listing((shard.file_time or 0) - CLOCK_MARGIN_SECONDS)
        if not batches and not await self.know_file(shard):
            message = (
                "the API knows neither the batch that may exist nor what was uploaded for it; was "
                "it submitted with another key? Set that, and repeat the command"
            )
            raise JobError(Failure("batch_api", message, retryable=True))
        return [
            batch.id
            for batch in reversed(batches)
            if (batch.metadata.get(RUN_KEY), batch.metadata.get(SHARD_KEY)) == wanted
        ]

    async def look_for(self, shard: Shard) -> bool:
        """Look for the batch of a creation without an answer, for a minute since it was sent."""
        passed = time.time() - shard.asked_at  # for all that another process can know
        if shard.index in self.sent_at:
            passed = self.run.clock() - self.sent_at[shard.index]
        delay, end = FIRST_LOOK_SECONDS, self.run.clock() + LOOK_SECONDS - passed
        while True:
            if found := await self.matches(shard):
                shard.batch_id, *shard.twins = found
                self.submission.advance(shard, Stage.CREATED)
                return True
            left = end - self.run.clock()
            if passed < 0 or left <= 0:
                return False
            if delay == FIRST_LOOK_SECONDS:
                self.run.report.note(f"looking for its batch for {left:.0f} s, before another try")
            await self.run.halt.sleep(min(delay, left))
            self.run.halt.check()
            delay = min(10.0, 2 * delay)

    async def adopt(self, shard: Shard, metadata: Mapping[str, str]) -> None:
        """Go on with a batch of these jobs that waits already, as after the state was deleted."""
        since = (shard.file_time or PENDING_SECONDS) - PENDING_SECONDS
        own = {*self.submission.past, *self.submission.batch_ids}
        found: list[str] = []
        try:
            batches = await self.listing(since)
        except JobError as error:
            if error.failure.kind != "batch_api":  # else there is no such list
                raise
            self.run.report.warn(f"no list of batches to look at: {error.failure.message}")
            return
        for batch in reversed(batches):
            said = batch.metadata
            same = said.get(JOBS_KEY) == metadata[JOBS_KEY]
            here = said.get(FOLDER_KEY) == metadata[FOLDER_KEY]
            pending = batch.status not in STOPPING
            waits = pending or (batch.status == "completed" and not self.submission.force)
            if batch.id in own or said.get(RUN_KEY) == self.submission.id:
                continue
            if same and waits and (here or (not pending and await self.is_uncollected(batch))):
                where = "" if here else " elsewhere, and has its files (--force submits them anew)"
                self.run.report.note(
                    f"batch {batch.id} was submitted for these jobs{where}, going on"
                )
                found.append(batch.id)
            elif pending and (same or here) and not self.submission.force:
                self.refuse_beside(batch, same=same)
            elif here and waits:
                self.run.report.warn(f"batch {batch.id} of this folder may not be collected")
        if found:
            shard.batch_id, *shard.twins = found
            self.sent_at[shard.index] = self.run.clock()
            self.submission.advance(shard, Stage.CREATED)

    async def is_uncollected(self, batch: Batch) -> bool:
        """Tell whether a batch has its input file: whoever has collected it deletes that (tidy)."""
        if not batch.input_file:
            return False
        return await self.find_file(batch.input_file, gives_up_on=("batch_api",)) is not None

    def refuse_beside(self, batch: Batch, *, same: bool) -> NoReturn:
        """Refuse to submit what another batch may be doing already."""
        whose = "was submitted from this folder for other jobs, and is not collected: collect it"
        if same:
            whose = "does these jobs already, for another folder or machine: collect it there"
        message = f"batch {batch.id} {whose} by the former --input, cancel it, or add --force"
        if not self.submission.unasked:
            raise JobError(Failure("batch_api", message))
        remove_files([self.submission.path])
        raise UsageError(message)

    async def find_twins(self, shard: Shard) -> None:
        """Cancel what else was created for the jobs of a shard; what it has made is collected."""
        try:
            found = await self.matches(shard)
        except JobError as error:
            self.run.report.note(f"twins were not looked for: {error.failure.message}")
            return
        for batch_id in found:
            if batch_id not in shard.batch_ids:
                shard.twins.append(batch_id)
                self.submission.save()
                self.run.report.warn(f"batch {batch_id} is a twin of {shard.batch_id}")
        for batch_id in shard.twins:
            if batch_id not in self.stopped and await self.cancel_batch(batch_id):
                self.stopped.add(batch_id)

    # cancel

    async def cancel(self) -> None:
        """Cancel the batches that are not settled, and drop the shards that have none."""
        submission = self.submission
        if not submission.sharded:
            submission.sharded, submission.variants = True, {}
        for shard in submission.shards:
            try:
                if shard.stage is Stage.CREATING and not await self.look_for(shard):
                    submission.advance(shard, Stage.DROPPED)
                elif shard.stage is Stage.CREATED:
                    for batch_id in shard.batch_ids:
                        await self.cancel_batch(batch_id)
                elif Stage.DROPPED in STEPS.get(shard.stage, ()):
                    submission.advance(shard, Stage.DROPPED)
            except JobError as error:
                shard.refusal = error.failure
                self.run.report.error(f"not cancelled: {error.failure.message}")
        submission.save()

    async def cancel_batch(self, batch_id: str) -> bool:
        """Ask for the end of a batch; one that has ended by itself is collected as it is."""
        cancel = functools.partial(self.api.batches.with_raw_response.cancel, batch_id)
        read = functools.partial(Batch.read, batch_id=batch_id)
        try:
            await self.call(cancel, read, gives_up_on=("conflict",))
        except JobError as error:
            said = error.failure.message
            with suppress(JobError):
                batch = await self.look(batch_id)
                if batch.status in STOPPING:
                    return True
                said += f"; it is {batch.status}"
            self.run.report.error(f"batch {batch_id} is not cancelled: {said}")
            return False
        self.run.report.note(f"batch {batch_id}: cancelling")
        return True

    # collect

    async def look(self, batch_id: str, *, waits: bool = False) -> Batch:
        """Return how a batch stands; whoever waits asks once, as it is asked again anyway."""
        retrieve = functools.partial(self.api.batches.with_raw_response.retrieve, batch_id)
        read = functools.partial(Batch.read, batch_id=batch_id)
        return await (self.once if waits else self.call)(retrieve, read)

    async def poll(self, shard: Shard, batch_id: str) -> Batch | None:
        """Return how a batch stands, and tell it when it has changed; None if nobody knows.

        Whoever waits is not put off by hours without an answer.
        """
        try:
            batch = await self.look(batch_id, waits=not self.run.options.no_wait)
        except api_errors(JobError, OddAnswerError, TimeoutError) as error:
            failed = error
            if not isinstance(failed, JobError):
                verdict = judge_call(error)
                failed = JobError(verdict.failure, verdict.action)
            seen = self.run.clock() - self.seen_at.get(batch_id, -LAG_SECONDS) < LAG_SECONDS
            lags = is_unknown(failed) and (seen or self.is_new or is_recent(shard))
            if not (lags or failed.failure.retryable):
                raise failed from None
            kind = failed.failure.kind, failed.failure.code
            if kind != self.troubles.get(batch_id):  # hours of it are told once
                self.troubles[batch_id] = kind
                self.run.report.note(f"{failed.failure.message}; the batches go on")
            return None
        counts = ", {1}/{0} done, {2} failed".format(*batch.counts) if batch.counts else ""
        line = f"batch {batch.id}: {batch.status}{counts}"
        if line != shard.told:
            shard.told = line
            self.run.report.note(line)
        self.troubles.pop(batch_id, None)
        self.seen_at[batch_id] = self.run.clock()
        return batch

    async def collect(self) -> None:
        """Poll until all batches have ended, and collect each as it ends."""
        options, delay = self.run.options, 0.0
        left = [shard for shard in self.submission.shards if shard.stage is Stage.CREATED]
        while left:
            await self.run.halt.sleep(delay)
            delay = min(MAX_POLL_SECONDS, max(POLL_SECONDS, delay * 1.5))
            for shard in list(left):
                self.run.halt.check()
                if await self.visit(shard) or options.no_wait:
                    left.remove(shard)
        if self.submission.finished:
            await self.tidy()

    async def visit(self, shard: Shard) -> bool:
        """Look at the batches of a shard, and collect them; tell whether that is all for now."""
        if shard.attempts > 1 or shard.twins:  # what got lost may have come through since
            await self.find_twins(shard)
        for batch_id in shard.batch_ids:
            if batch_id not in self.collections:
                self.collections[batch_id] = Collection(batch_id, shard.numbers)
            collection = self.collections[batch_id]
            if collection.done:
                continue
            try:
                batch = await self.poll(shard, batch_id)
                if batch is None or batch.status not in ENDED:
                    return False
                await self.collect_batch(batch, collection)
            except JobError as error:
                if error.action == "stop run":
                    raise
                if batch_id in shard.twins:  # which holds up nothing
                    collection.done = True
                    self.run.report.warn(f"batch {batch_id}: {error.failure.message}")
                    continue
                await self.fail_all(shard, error)
                return True
            if not collection.done:
                return await self.give_up(shard, batch, collection)
        await self.fail_rest(shard)
        self.submission.advance(shard, Stage.SETTLED)
        return True

    async def collect_batch(self, batch: Batch, collection: Collection) -> None:
        """Save all results of a batch that has ended, as far as they can be had."""
        self.batches[batch.id] = batch
        for file_id in batch.files:
            await self.collect_file(file_id, collection)
        while collection.later:
            await self.take(*collection.later.pop(), collection)
        self.run.halt.check()
        collection.done = collection.has_all(batch)

    async def give_up(self, shard: Shard, batch: Batch, collection: Collection) -> bool:
        """Tell whether what a batch lacks has been waited for long enough; its jobs fail then."""
        options, now = self.run.options, self.run.clock()
        if collection.lacking is None:
            collection.lacking = now
            results = counted(len(collection.lines), "result")
            self.run.report.note(f"batch {batch.id}: only {results} so far; asking again")
        collection.offsets.clear()  # a range may have been another one
        if now - collection.lacking < options.max_wait:
            return False
        collection.done = options.cancel or batch.status == "cancelled"  # and not to be had
        await self.fail_rest(shard)
        if collection.done:
            self.submission.advance(shard, Stage.SETTLED)
        return True

    async def lines_of(self, file_id: str, offset: int) -> AsyncGenerator[tuple[Spool, bool]]:
        """Download a file from an offset on, line by line; tell whether each has its end."""
        content = self.api.files.with_streaming_response.content
        headers = {"accept-encoding": "identity"}  # so that offsets are those of the file
        if offset:
            headers["range"] = f"bytes={offset}-"
        clock, seconds = self.run.clock, self.run.options.timeout
        end = clock() + seconds
        async with AsyncExitStack() as stack:
            response = await self.within(
                stack.enter_async_context(content(file_id, extra_headers=headers)), seconds
            )
            start = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            first = int(start[1]) if start else offset if response.status_code == 206 else 0
            if first > offset:
                raise OtherRangeError
            behind = offset - first  # was read before
            chunks, line = response.iter_bytes(), Spool()
            stack.callback(lambda: line.close())  # noqa: PLW0108 - the last one, which nobody got
            while chunk := await self.within(anext(chunks, b""), end - clock()):
                chunk, behind = chunk[behind:], max(0, behind - len(chunk))
                *ended, rest = chunk.split(b"\n")
                for part in ended:
                    line.write(part)
                    whole, line = line, Spool()
                    yield whole, True
                    end = clock() + seconds
                line.write(rest)
            whole, line = line, Spool()
            if whole.size:
                yield whole, False

    async def collect_file(self, file_id: str, collection: Collection) -> None:
        """Save the results of a file, line by line as it comes; a break is gone on behind."""
        offsets, patience = collection.offsets, Patience(self.run.options)
        work: dict[asyncio.Task[None], int] = {}
        while True:
            patience.begin()
            try:
                async with contextlib.aclosing(
                    self.lines_of(file_id, offsets.get(file_id, 0))
                ) as lines:
                    async for line, is_whole in lines:
                        await self.make_room(work, line.size)
                        self.run.halt.check()
                        start = offsets.get(file_id, 0)
                        place = hash((file_id, start, line.size))
                        if place in collection.places:
                            line.close()
                        else:
                            take = self.take_line(line, collection, is_whole=is_whole)
                            work[asyncio.create_task(take)] = line.size
                        if is_whole:
                            collection.places.add(place)
                            offsets[file_id] = start + line.size + 1
                            patience = Patience(self.run.options)
            except api_errors(OtherRangeError, TimeoutError) as error:
                cause = error.__cause__ or error
                if isinstance(cause, ErrorAnswer) and cause.status in (404, 416):
                    return  # not there yet, or all of it is read
                if isinstance(error, OtherRangeError):
                    del offsets[file_id]
                await self.wait(patience, error)
            else:
                return
            finally:
                await asyncio.gather(*work)

    async def make_room(self, work: dict[asyncio.Task[None], int], size: int) -> None:
        """Wait until one more line fits into the memory."""
        while len(work) >= LINES_AT_ONCE or (
            work and sum(work.values()) + size > LINE_BYTES_AT_ONCE
        ):
            ended, _ = await asyncio.wait(work, return_when="FIRST_COMPLETED")
            for task in ended:
                del work[task]
                task.result()

    async def take_line(self, line: Spool, collection: Collection, *, is_whole: bool) -> None:
        """Read a line, and save what it brings."""
        try:
            result = await self.run.in_saver(read_result, line)
        except (ValueError, RecursionError):
            name = os.path.join(self.folder, f"unreadable-{collection.batch_id}")
            if is_whole and line.read().strip():
                self.run.report.warn(f"a line is no result{keep_answer(name, line.read)}")
            line.close()
            return
        if result.custom_id not in collection.lines:
            collection.lines.add(result.custom_id)
            await self.take(result, line, collection)
        elif self.ended.get(number_in(result.custom_id)) == collection.batch_id:
            line.close()
        else:
            collection.later.append((result, line))  # which of them has the image?

    async def take(self, result: Result, line: Spool, collection: Collection) -> None:
        """Save what a result brings; an error counts only if no image comes."""
        custom_id, delivery, answer, is_done = result
        job = self.asked_job(custom_id, collection)
        if is_done:
            collection.answered.add(custom_id)
        try:
            if job is None:
                await self.take_stray(result)
            elif answer is None:
                self.failed.setdefault(job.number, delivery)
            elif self.ended.get(job.number) != collection.batch_id:
                await self.take_images(job, answer, delivery, collection)
        except Exception as error:  # noqa: BLE001 - the results stay with the API, to be fetched anew
            collection.lines.discard(custom_id)
            collection.answered.discard(custom_id)
            self.run.bug(error)
        finally:
            line.close()

    async def take_images(
        self, job: Job, answer: Answer, delivery: Delivery, collection: Collection
    ) -> None:
        """Save the images of a job."""
        saved, _ = await bring(job, lambda: answer, delivery, self.run)
        is_unwritten = saved.failure is not None and saved.failure.kind == "write"
        if is_unwritten and saved.failure:  # it is still there to be fetched once more
            collection.lines.discard(f"job-{job.number}")
            collection.answered.discard(f"job-{job.number}")
            self.run.heed(job, saved.failure)
        if self.ended.get(job.number):
            kept = listing(image.path for image in saved.images.values())
            self.run.report.warn(f"{job.where}a twin has made it, too; kept as {kept}")
        elif saved.images or is_unwritten:
            self.ended[job.number] = collection.batch_id
            await self.conclude(job, saved)
        else:
            self.failed[job.number] = saved

    async def take_stray(self, result: Result) -> None:
        """Save what a result brings that nobody has asked for here."""
        custom_id, delivery, answer, _ = result
        if answer is not None:
            job = stray_job(custom_id, self.folder, max(1, len(answer.items)))
            delivery, _ = await bring(job, lambda: answer, delivery, self.run)
        kept = listing(image.path for image in delivery.images.values())
        self.run.report.warn(
            f"a result for {received(custom_id)}, which is no job of its batch"
            f"{f'; kept as {kept}' if kept else ''}"
        )

    async def fail_rest(self, shard: Shard) -> None:
        """Report the jobs of a shard whose batches have brought no image."""
        batch = self.batches.get(shard.batch_id or "")
        failures = self.failures_without_result(shard, batch) if batch else {}
        unknown = Failure("batch_api", f"batch {shard.batch_id} says nothing of this job")
        for job in self.asked(shard.numbers):
            if job.number not in self.ended:
                lost = Delivery(failure=failures.get(job.number, unknown))
                await self.conclude(job, self.failed.get(job.number, lost))

    def failures_without_result(self, shard: Shard, batch: Batch) -> dict[int, Failure]:
        """Say for each job why the files of its batch have no line for it, should that be so."""
        if batch.status == "completed":
            message = f"batch {batch.id} has no result for this job"
            if not self.collections[batch.id].done:
                message = f"batch {batch.id} has not given all its results"
            lost = Failure("batch_api", message, retryable=True, maybe_billed=True)
            return dict.fromkeys(shard.numbers, lost)
        status = f"batch_{batch.status}"
        own: dict[int, tuple[str, str | None]] = {}  # what is said of a line, and its code
        general: list[str] = []
        for line, said, code in batch.errors:
            if 0 < line <= len(shard.numbers):
                number = shard.numbers[line - 1]
                own[number] = said, code
                said = f"job {number}: {said}"  # noqa: PLW2901
            general.append(said)
        first = next((code for _, _, code in batch.errors if code), status)
        failures = {}
        for number in shard.numbers:
            said, code = own.get(number, ("; ".join(general[:3]), first))
            message = f"batch {batch.id} {batch.status}" + (f": {said}" if said else "")
            failures[number] = batch_failure(status, code or status, message)
        return failures

    async def fail_all(self, shard: Shard, error: JobError) -> None:
        """Fail the jobs of a batch that the API does not give out; the others go on."""
        way_on = "was it submitted with another key? Set that, and repeat the command"
        if not is_unknown(error):
            way_on = "repeat the command"
        message = f"{error.failure.message}; {way_on}"
        failure = error.failure._replace(message=message, maybe_billed=True)
        for job in self.asked(shard.numbers):
            if job.number not in self.ended:
                await self.conclude(job, Delivery(failure=failure))

    async def tidy(self) -> None:
        """Delete what a run has uploaded, once all of it is settled."""
        submission, left = self.submission, set(self.submission.uploads.values())
        left |= {shard.file_id for shard in submission.shards if shard.file_id}

        async def delete(file_id: str) -> None:
            remove = self.api.files.with_raw_response.delete(file_id)
            await self.within(remove, TIDY_SECONDS)
            left.discard(file_id)

        if left:
            # Once, for it costs nothing if they stay; the next run of the folder may try again.
            with suppress(*api_errors(TimeoutError)):
                await self.together(delete, tuple(left))
            kept = {digest: name for digest, name in submission.uploads.items() if name in left}
            submission.uploads = kept
            for shard in submission.shards:
                shard.file_id = shard.file_id if shard.file_id in left else None
            submission.save()

    # report

    async def conclude(self, job: Job, delivery: Delivery) -> Outcome:
        """Report the outcome of a job."""
        outcome = await conclude(job, delivery, self.run)
        self.ended.setdefault(job.number, "")
        if self.outcomes is not None:
            self.outcomes.append(outcome)
        self.run.report.add(outcome)
        return outcome

    async def conclude_rest(self, halted: Failure | None) -> None:
        """Report the jobs that no batch has settled in this process."""
        shards = {number: shard for shard in self.submission.shards for number in shard.numbers}
        for number, job in self.jobs.items():
            if number not in self.ended:
                await self.conclude(*self.rest_of(job, shards.get(number), halted))

    def rest_of(
        self, job: Job, shard: Shard | None, halted: Failure | None
    ) -> tuple[Job, Delivery]:
        """Say what has become of a job whose batch was not collected now."""
        stage, batch_id = (shard.stage, shard.batch_id) if shard else (None, None)
        collected = stage is Stage.SETTLED
        if not job.missing or (collected and all(saved_file(item.path) for item in job.outputs)):
            return job._replace(missing=()), at_rest(job)
        if shard and shard.refusal and not batch_id:
            return job, Delivery(failure=shard.refusal, held_back=True)
        if collected:
            message = f"batch {batch_id} is collected: it brought no image, or that is gone"
            return job, Delivery(failure=Failure("batch_ended", message))
        if batch_id:
            behind = halted.cause if halted else ""
            waits = f"in batch {batch_id}"
            reason = Failure("submitted", waits, retryable=True, behind=behind)
        elif stage is Stage.DROPPED or self.run.options.cancel:
            message = "cancelled before it was submitted"
            reason = Failure("cancelled", message, retryable=True)
        else:
            message = "it was not submitted, for its image was there then"
            reason = halted or Failure("batch_ended", message, retryable=True)
        return job, Delivery(failure=reason, held_back=True)


async def run_batches(plan: Plan, submission: Submission, report: Report) -> list[Outcome]:
    """Submit what is missing through the Batch API, wait, collect, and report each job."""
    options, halted = report.options, None
    async with running(plan, report) as run:
        try:
            if submission.is_new:
                begin(submission, plan.jobs)
        except OSError as error:
            problem = f"the state of the run cannot be written to {options.out_dir}"
            raise UsageError(f"{problem}: {one_line(error)}") from None
        run.sending.add(asyncio.current_task())  # a second signal ends it at once
        client = BatchClient(run, submission, plan.jobs)
        client.outcomes = [] if plan.sheet else None
        try:
            await (client.cancel() if options.cancel else client.submit())
            await client.collect()
        except (JobError, StoppedError) as error:
            halted = error.failure
        except OSError as error:
            halted = Failure("disk", f"the disk failed: {one_line(error)}")
        except asyncio.CancelledError:
            report.interrupted = True  # also by Ctrl-C before the run took the signals over
            halted = Failure("interrupted", "interrupted", retryable=True)
        run.sending.clear()
        await client.conclude_rest(halted)
    waits = any(shard.stage is Stage.CREATED for shard in submission.shards)
    report.unfinished = options.no_wait and halted is None and waits
    report.close(how_to_go_on(submission), halted)
    return client.outcomes or []


def how_to_go_on(submission: Submission) -> str:
    """Say what the next command is."""
    if submission.finished:
        return ""  # what is missing can be submitted anew, as after any run
    if not any(shard.stage in (Stage.CREATING, Stage.CREATED) for shard in submission.shards):
        return "To go on, repeat the command."
    return "To collect the images, repeat the command; to stop the batches, add --cancel to it."


# ── 16 · Main ─────────────────────────────────────────────────────────────────────────────────────


def sum_up(plan: Plan) -> str:
    """Return a sentence on what a folder has of what is asked for."""
    origins = [output.origin for job in plan.jobs for output in job.outputs if output.origin]
    doubts = listing(
        f"{counted(origins.count(origin), 'image')} {what}"
        for origin, what in (("unknown", "not in the manifest"), ("changed", "edited since"))
        if origin in origins
    )
    stale = sum(bool(job.stale) for job in plan.jobs)
    again = sum(any(output.archive for output in job.missing) for job in plan.jobs)
    missing = sum(bool(job.missing) for job in plan.jobs) - again
    there = len(plan.jobs) - stale - again - missing
    return (
        f"{counted(len(plan.jobs), 'job')}: {there} there{f' ({doubts})' if doubts else ''}, "
        f"{f'{again} to be made again' if again else f'{stale} stale'}, {missing} missing"
    )


def print_dry_run(plan: Plan, report: Report) -> None:
    """Print what would be sent, a document for each job."""
    options = report.options
    if plan.submitted:
        report.note("nothing to send, it is submitted already")
        return
    for job in plan.jobs:
        if job.stale:
            report.warn(f"{job.where}{job.stale}")
        elif not job.missing and plan.memory is None:
            report.note("nothing to send, its files are there")
        elif job.missing and options.batch_api:
            uploads = {part: f"upload of {part.path}" for part in job.request.parts}
            report.result(as_json(batch_line(job, uploads)))
        elif job.missing:
            report.result(as_json(document(job), indent=None if options.json else 2))


def all_outcomes(plan: Plan, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes of a run, and what there is of the jobs that --only left out."""
    others = (Skipped(job, Delivery(images_on_disk(job, {}))) for job in plan.others)
    return [*outcomes, *others]


def run_plan(plan: Plan, submission: Submission | None, report: Report) -> int:
    """Run what has been checked, and return the exit code."""
    with suppress(ValueError):  # only the main thread has signals
        # Until the run takes them over, each of them ends the program as Ctrl-C does.
        for name in ending_signals():
            signal.signal(name, signal.default_int_handler)
    work = run_batches(plan, submission, report) if submission else run_jobs(plan, report)
    try:
        outcomes = asyncio.run(work)
        if plan.sheet is not None and not report.unfinished:
            write_contact_sheet(plan.sheet, all_outcomes(plan, outcomes), report)
    except KeyboardInterrupt:
        if not report.ended:  # the run had not taken the signals over
            raise
        report.interrupted = True
        sheet = ", the contact sheet is not written" if plan.sheet else ""
        report.error(f"interrupted; the images are saved{sheet}")
    return report.exit_code


@contextmanager
def refusing(folder: str) -> Iterator[None]:
    """Refuse the command where the images of a folder cannot be put in order."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"nothing can be done in {folder or '.'}: {one_line(error)}") from None


def recall(
    jobs: Sequence[Job], former: Submission | None, options: RunOptions
) -> tuple[list[Job], Memory]:
    """Return jobs with what makes their images, and what the folder remembers of its images.

    Images of a run that was killed get their names, which is said whatever comes of this one.
    """
    folder = options.out_dir or ""
    memory = read_manifest(folder)
    if options.dry_run and not memory.entries:  # nothing to compare with
        return list(jobs), memory
    sent = former.sources if former and not former.finished else {}
    digested = [with_digest(job, sent) for job in jobs]
    if not options.dry_run:
        with refusing(folder):
            manifest = Manifest(folder, memory)
            finish_images(manifest)
            for said in take_up_images(() if options.force else digested, manifest):
                tell(f"Warning: {said}")
    return digested, memory


def plan_command(arguments: Arguments, options: RunOptions) -> tuple[Plan, Submission | None]:
    """Read the jobs, choose those that are meant, and find what is there of their images."""
    read, problems = read_jobs(arguments)
    look = functools.cache(probe_file)
    jobs = [plan_outputs(match_size(job, look), options) for job in read]
    memory = claims = submission = former = None
    chosen = {job.number for job in jobs}
    if arguments.command == "generate-batch":
        former = load_submission(options.out_dir or ".")
        jobs, memory = recall(jobs, former, options)
        claims = Claims(jobs, memory.entries, options.out_dir or "")
    if options.only is not None and jobs:
        chosen = select_jobs(jobs, options.only, claims.paths if claims else {})
        if len(chosen) > (MAX_BATCH_API_JOBS if options.batch_api else MAX_JOBS):
            raise UsageError(f"--only means {len(chosen):,} jobs; accepted are {MAX_JOBS:,}")
        lines = {job.line for job in jobs if job.number not in chosen}
        problems = [problem for problem in problems if problem[0] not in lines]
    if options.batch_api:
        meant = [job for job in jobs if job.number in chosen]
        submission = open_submission(former, None if problems else meant, options)
        options = submission.planning(options)
    elif memory is not None:
        refuse_beside_batches(options.out_dir or ".", former)
    claims = None if options.existing == "replace" else claims
    as_they_are = options._replace(remake=False, skip_existing=options.resumes)
    found = [
        find_missing(job, options if job.number in chosen else as_they_are, claims) for job in jobs
    ]
    sheet = options.contact_sheet
    chosen_jobs = tuple(job for job in found if job.number in chosen)
    to_send = tuple(job for job in chosen_jobs if job.missing)
    if submission is not None and not submission.is_new:
        to_send = submission.to_send(chosen_jobs)
    plan = Plan(
        jobs=chosen_jobs,
        to_send=() if options.cancel else to_send,
        others=tuple(job for job in found if job.number not in chosen),
        memory=memory,
        problems=tuple(problems),
        sheet=Output(sheet, replace=may_derive(sheet, options.existing)) if sheet else None,
        existing=options.existing,
        submitted=submission is not None and submission.submitted,
    )
    return plan, submission


def run_command(arguments: Arguments) -> int:
    """Plan the jobs and check them all, then print them or run them."""
    options = arguments.options
    with ExitStack() as stack:
        if arguments.command == "generate-batch" and not options.dry_run:
            stack.enter_context(locked(options.out_dir or "."))
        plan, submission = plan_command(arguments, options)
        report = Report(len(plan.jobs), options)
        warnings = preflight(plan, options)
        for said in filter(None, (estimate(plan.to_send, options), shares_of(plan.to_send))):
            report.note(said)
        for warning in warnings:
            report.warn(warning)
        if plan.memory is not None and plan.existing == "keep":
            report.note(sum_up(plan))
        elif plan.memory is None and not plan.to_send and not options.dry_run:
            names = listing(output.path for output in plan.jobs[0].outputs)
            report.note(f"{names}: there by name; what it was made from is not compared")
        if options.dry_run:
            print_dry_run(plan, report)
            return report.exit_code
        if manifest := manifest_of(plan, options):
            with refusing(manifest.folder):
                adopt_images(plan, manifest)
        return run_plan(plan, submission, report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if argv is None and sys.getfilesystemencoding() == "ascii":  # names would fail
        again = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execv(sys.executable, again)  # noqa: S606 - itself
    words = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser(words[0] if words and words[0] in COMMANDS else None)
        check_words(words, parser.prog)
        return run_command(parser.parse_args(words, Arguments()))
    except UsageError as error:
        for problem in error.problems:
            tell(f"Error: {problem}")
        return 2
    except KeyboardInterrupt:
        tell("Interrupted before anything was sent.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
