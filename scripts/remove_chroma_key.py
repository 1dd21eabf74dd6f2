#!/usr/bin/env python3
"""Turn a flat key colour into true alpha.

    remove_chroma_key.py --input frog.png --out frog-cut.png --auto-key border --unmix
    remove_chroma_key.py --input shots/*.png --out-dir cut --auto-key border --unmix --json
    remove_chroma_key.py --input logo.png --out logo.webp --unmix --preview logo-look.png
    remove_chroma_key.py --inspect cut/*.png

--unmix takes every pixel for a mixture of subject and key colour and recovers the alpha and the
subject's own colour; it needs no tuning. Without it, alpha is a function of the distance to the key
colour: hard at --tolerance, or soft between the two thresholds of --soft-matte.

Exit codes: 0 every requested image is on disk; 1 at least one image is missing, or with --strict
or --inspect bad; 2 refused before anything was done; 130 interrupted.

The file, from top to bottom; a section uses only what stands above it:

    1  limits and defaults, as tables
    2  words and failures
    3  records                         what one section hands to the next
    4  command line                    a new option is a row of a table
    5  preflight                       a new refusal is a sentence of a generator
    6  read                            any still picture as 8-bit planes
    7  key colour                      named, or measured at the corners or the border
    8  planes and masks
    9  matte by colour distance        its pixels are recorded, and never change
   10  unmixing                        the model, with one pixel worked out by hand
   10a the backdrop, and q             how much of a pixel is not key
   10b the mixture                     its chroma sharpened where it was stored coarsely
   10c the ground                      what is background, though not quite the key
   10d areas in the key's hue          opaque, or glow, shade, glass
   10e certain pixels                  those that are subject alone
   10f the others                      coloured light, and edges
   10g all of it
   11  edge                            contract and feather
   12  self-check
   12a measures                        a new one is a field of a record in 3, too
   12b complaints                      a new warning is a sentence of a generator
   13  inspection                      of pictures that should be transparent already
   14  preview                         the cut-out on four grounds, and its edge enlarged
   15  write
   16  report
   17  signals
   18  run                             one process, or one for each core
   19  main
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["pillow>=11", "numpy>=1.26"]
# ///

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib
import math
import os
import re
import struct
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

__version__ = "0.2.0"

if sys.version_info < (3, 11):  # noqa: UP036 - all of this file is read by 3.8, too
    found = "{} is {}.{}.{}".format(sys.executable or "this", *sys.version_info[:3])
    sys.stderr.write(f"Error: remove_chroma_key.py needs Python 3.11 or newer; {found}\n")
    raise SystemExit(2)


class Lazy:
    """A module that is loaded when something of it is first asked for.

    PEP 810 gives Python 3.15 a statement for this, which then replaces the class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import glob
    import json
    import multiprocessing
    import signal
    import threading
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from multiprocessing import connection
    from multiprocessing.process import BaseProcess
    from typing import NoReturn, TypeAlias

    import numpy as np
    import PIL
    from numpy.typing import NDArray
    from PIL import Image, ImageCms, ImageFilter, ImageOps

    U8: TypeAlias = NDArray[np.uint8]
    F32: TypeAlias = NDArray[np.float32]
    Mask: TypeAlias = NDArray[np.bool_]
    Places: TypeAlias = NDArray[np.intp]  # of pixels, in the flattened picture
    Planes: TypeAlias = tuple[U8, ...]  # red, green, blue
    Colour: TypeAlias = tuple[int, int, int]
else:
    glob, json, signal, threading = map(Lazy, ("glob", "json", "signal", "threading"))
    multiprocessing, connection = map(Lazy, ("multiprocessing", "multiprocessing.connection"))
    np, PIL = map(Lazy, ("numpy", "PIL"))
    Image, ImageCms = map(Lazy, ("PIL.Image", "PIL.ImageCms"))
    ImageFilter, ImageOps = map(Lazy, ("PIL.ImageFilter", "PIL.ImageOps"))

# No matrix is multiplied here, and starting OpenBLAS's threads takes longer than keying a picture.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ── 1 · Limits and defaults, as tables ────────────────────────────────────────────────────────────

DEFAULT_KEY_COLOUR = (0, 255, 0)
DEFAULT_TOLERANCE = 12
DEFAULT_TRANSPARENT_THRESHOLD = 12
DEFAULT_OPAQUE_THRESHOLD = 96
MAX_EDGE_CONTRACT = 16
MAX_EDGE_FEATHER = 64
VERDICTS = ("good", "look", "bad")  # from the best to the worst
AUTO_KEYS = ("none", "corners", "border")  # the first of each is the default
SUBJECTS = ("auto", "opaque", "translucent")
ENCLOSED = ("auto", "remove", "keep")
OUTPUT_FORMATS = {".png": "PNG", ".webp": "WEBP"}
PREVIEW_FORMATS = {**OUTPUT_FORMATS, ".jpg": "JPEG", ".jpeg": "JPEG"}
DRAWING_FORMATS = {"EPS", "WMF", "EMF"}  # Pillow would start Ghostscript for the first
EXIF_ORIENTATION = 0x0112
INSTALL = f"{sys.executable or 'python3'} -m pip install"
PACKAGES = {"numpy": ("numpy", "1.26"), "PIL.Image": ("pillow", "11.0")}  # as in the block above

# ── 2 · Words and failures ────────────────────────────────────────────────────────────────────────


def hex_colour(key: Colour) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*key)


def shown(text: str) -> str:
    """Show control characters instead of obeying them; names of files may hold any."""
    parts = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(parts)


def say(line: str) -> None:
    """Print a line on stderr; where nobody can read it the work goes on."""
    try:
        print(shown(line), file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def put(text: str) -> str:
    """Print on stdout, and return why it takes no more; a reader that has gone has seen enough."""
    try:
        print(text, flush=True)
    except OSError as error:
        # Otherwise the interpreter would try, and complain, once more at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        has_gone = isinstance(error, BrokenPipeError)
        return "" if has_gone else f"stdout takes no more: {error.strerror}"
    return ""


class ChromaKeyError(Exception):
    """Something a user can do something about; its text is one sentence for the user."""


class UsageError(ChromaKeyError):
    """The request is refused as a whole, for every reason in `problems`."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


# ── 3 · Records ───────────────────────────────────────────────────────────────────────────────────


class MatteMethod(NamedTuple):
    """Alpha follows from the distance to the key colour; the fields are named like the flags."""

    tolerance: int = DEFAULT_TOLERANCE
    soft_matte: bool = False
    transparent_threshold: float = DEFAULT_TRANSPARENT_THRESHOLD
    opaque_threshold: float = DEFAULT_OPAQUE_THRESHOLD
    despill: bool = False


class UnmixMethod(NamedTuple):
    """Alpha follows from unmixing.

    `subject` is what the areas that share the key's hue are, `enclosed` what becomes of background
    that the subject encloses.
    """

    subject: str = SUBJECTS[0]
    enclosed: str = ENCLOSED[0]


class Job(NamedTuple):
    """One picture to cut out."""

    source: Path
    target: Path
    force: bool
    key_colour: Colour
    auto_key: str
    method: MatteMethod | UnmixMethod
    edge_contract: int
    edge_feather: float
    preview: Path | None = None


class Inspection(NamedTuple):
    """One picture to look at, which should be transparent already."""

    source: Path


class Picture(NamedTuple):
    """A decoded input: three uint8 planes, its own alpha if it has any, and its RGB profile."""

    planes: Planes
    alpha: U8 | None
    icc_profile: bytes | None


class Cutout(NamedTuple):
    """What a method makes of a picture: straight colour and alpha, for the key it was told."""

    planes: Planes
    alpha: U8
    key: Colour
    matched: bool  # some pixel has the key colour
    key_hued: Mask  # inner pixels that share the key's hue


class Coverage(NamedTuple):
    """What a matte covers, in pixels, and where it meets the border."""

    transparent: int
    partial: int
    opaque: int
    corners_transparent: int
    sides_cut: tuple[str, ...]

    @property
    def pixels(self) -> int:
        """All of them."""
        return self.transparent + self.partial + self.opaque


class SelfCheck(NamedTuple):
    """What the program thinks of its work: shares from 0 to 1, levels of 255."""

    coverage: Coverage
    border_uniform: float
    border_spread: float
    border: str
    framed: Colour | None
    residual_spill: float
    rim_tint: float
    opaque_key: float
    key_hued: float
    see_through: float
    verdict: str = VERDICTS[0]
    warnings: tuple[str, ...] = ()


class AlphaCheck(NamedTuple):
    """What the program thinks of a picture that somebody else has cut out."""

    coverage: Coverage
    has_alpha: bool
    patterned: bool
    haze: float
    key_left: Colour | None
    rim_tint: float
    verdict: str = VERDICTS[0]
    warnings: tuple[str, ...] = ()


class File(NamedTuple):
    """What is to be written."""

    path: Path
    data: bytes


class Done(NamedTuple):
    """A picture that is cut out: first as files in memory, and then on disk."""

    job: Job
    size: tuple[int, int]
    key: Colour
    check: SelfCheck
    files: tuple[File, ...] = ()


class Inspected(NamedTuple):
    """A picture that was looked at."""

    job: Inspection
    size: tuple[int, int]
    check: AlphaCheck


class Failed(NamedTuple):
    """A picture with which nothing could be done."""

    job: Job | Inspection
    reason: str


if TYPE_CHECKING:
    Task: TypeAlias = Job | Inspection
    Outcome: TypeAlias = Done | Inspected | Failed


# ── 4 · Command line ──────────────────────────────────────────────────────────────────────────────


def as_colour(text: str) -> Colour:
    """Convert `#rrggbb` or `rrggbb`."""
    if not re.fullmatch(r"#?[0-9a-fA-F]{6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no colour; give #rrggbb, as in #00ff00")
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red, green, blue


def as_whole_number(text: str, *, most: int) -> int:
    """Convert an integer from 0 to `most`."""
    number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {most}")
    return number


def as_real_number(text: str, *, most: float) -> float:
    """Convert a number from 0 to `most`."""
    number = math.nan
    with contextlib.suppress(ValueError):
        number = float(text)
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {most:g}")
    return number


class Option(NamedTuple):
    """A flag."""

    usage: str  # the flag, its other spellings, and what stands for its value
    convert: Callable[[str], Any] | None  # None: a switch
    help: str
    default: object = ""  # as the help tells it; what is not given gets its value in a record
    more: Mapping[str, Any] = {}  # what else argparse is told


as_level = functools.partial(as_real_number, most=255)

FILES = (
    Option(
        "--input PATH",
        Path,
        "the pictures to cut out; several need --out-dir",
        more={"action": "extend", "nargs": "+"},
    ),
    Option("--out PATH", Path, "the cut-out, .png or .webp"),
    Option("--out-dir DIR", Path, "write DIR/<input stem>.png"),
    Option("--preview FILE", Path, "also a picture of the cut-out on four grounds, edge enlarged"),
    Option(
        "--inspect FILE",
        Path,
        "only judge pictures that are transparent already; takes no other flag but --json",
        more={"action": "extend", "nargs": "+"},
    ),
    Option("--force", None, "replace existing outputs"),
    Option("--json", None, "print one JSON object a line per picture instead of text"),
    Option("--strict", None, "a cut-out that the self-check calls bad is a failure, too"),
)
KEY = (
    Option(
        "--key-color #RRGGBB", as_colour, "the colour to remove", hex_colour(DEFAULT_KEY_COLOUR)
    ),
    Option(
        "--auto-key",
        str,
        "measure the key colour at the corners or border instead",
        AUTO_KEYS[0],
        more={"choices": AUTO_KEYS},
    ),
)
UNMIX = (
    Option("--unmix", None, "recover alpha and the subject's own colour; no tuning"),
    Option(
        "--subject",
        str,
        "what areas that share the key's hue are; auto judges by the picture",
        SUBJECTS[0],
        more={"choices": SUBJECTS},
    ),
    Option(
        "--enclosed",
        str,
        "background that the subject encloses; auto keeps it where the key has no hue, as white",
        ENCLOSED[0],
        more={"choices": ENCLOSED},
    ),
)
MATTE = (
    Option(
        "--tolerance 0-255",
        functools.partial(as_whole_number, most=255),
        "hard matte: up to this distance is transparent",
        DEFAULT_TOLERANCE,
    ),
    Option("--soft-matte", None, "a ramp between two thresholds"),
    Option(
        "--transparent-threshold 0-255",
        as_level,
        "soft matte: transparent up to here",
        DEFAULT_TRANSPARENT_THRESHOLD,
    ),
    Option(
        "--opaque-threshold 0-255",
        as_level,
        "soft matte: opaque from here",
        DEFAULT_OPAQUE_THRESHOLD,
    ),
    Option(
        "--spill-cleanup --despill",
        None,
        "cap the key's channels in pixels that are not opaque",
        more={"dest": "despill"},
    ),
)
EDGE = (
    Option(
        f"--edge-contract 0-{MAX_EDGE_CONTRACT}",
        functools.partial(as_whole_number, most=MAX_EDGE_CONTRACT),
        "choke the matte by so many pixels",
        0,
    ),
    Option(
        f"--edge-feather 0-{MAX_EDGE_FEATHER}",
        functools.partial(as_real_number, most=MAX_EDGE_FEATHER),
        "blur the matte with this radius",
        0,
    ),
)
# The groups of --help, in its order.
GROUPS = {
    "files": FILES,
    "key colour": KEY,
    "unmixing (recommended, with --auto-key border)": UNMIX,
    "matte by colour distance (not with --unmix)": MATTE,
    "edge": EDGE,
}


class Arguments(argparse.Namespace):
    """The parsed command line; what is not given stays as it is here or in a method's record."""

    input: list[Path] | None = None
    inspect: list[Path] | None = None
    out: Path | None = None
    out_dir: Path | None = None
    preview: Path | None = None
    force: bool = False
    json: bool = False
    strict: bool = False
    key_color: Colour = DEFAULT_KEY_COLOUR
    auto_key: str = AUTO_KEYS[0]
    unmix: bool = False
    subject: str | None = None
    enclosed: str | None = None
    edge_contract: int = 0
    edge_feather: float = 0.0


class Parser(argparse.ArgumentParser):
    """An argument parser that raises what `main` prints like every other error."""

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse cannot read."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:  # noqa: ANN401, ARG002
        """Print a page of help; where stdout takes no more, say so instead of a traceback."""
        if problem := put(message.removesuffix("\n")):
            raise UsageError(problem)

    def add_group(self, title: str, options: Iterable[Option]) -> None:
        """Add the flags of a group."""
        group = self.add_argument_group(title)
        for option in options:
            words = option.usage.split(" ")
            flags = [word for word in words if word.startswith("--")]
            kind: dict[str, Any] = {"action": "store_true"}
            if option.convert:
                metavar = words[-1] if len(words) > len(flags) else None
                kind = {"type": option.convert, "metavar": metavar}
            default = "" if option.default == "" else f" (default {option.default})"
            group.add_argument(*flags, help=option.help + default, **kind, **option.more)


def build_parser() -> Parser:
    """Build the command line; its help is the module docstring without the map."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="remove_chroma_key.py",
        description=summary,
        epilog=details.partition("The file, from top to bottom")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for title, options in GROUPS.items():
        parser.add_group(title, options)
    return parser


def method_from(arguments: Arguments) -> MatteMethod | UnmixMethod:
    """Choose the method; what is not given keeps its default."""
    method = UnmixMethod if arguments.unmix else MatteMethod
    given = {key: value for key, value in vars(arguments).items() if key in method._fields}
    return method(**given)


def expanded(paths: Iterable[Path]) -> Iterator[Path]:
    """Give what a wildcard stands for that the shell has left alone, as that of Windows does."""
    for path in paths:
        is_wildcard = glob.has_magic(str(path)) and not os.path.lexists(path)
        found = sorted(glob.glob(str(path))) if is_wildcard else []
        yield from map(Path, found or [str(path)])


def jobs_from(arguments: Arguments) -> list[Job]:
    """One job per input; preflight has seen to it that there is a name or a folder for it."""
    return [
        Job(
            source=source,
            target=arguments.out or Path(arguments.out_dir or "", f"{source.stem}.png"),
            force=arguments.force,
            key_colour=arguments.key_color,
            auto_key=arguments.auto_key,
            method=method_from(arguments),
            edge_contract=arguments.edge_contract,
            edge_feather=arguments.edge_feather,
            preview=arguments.preview,
        )
        for source in expanded(arguments.input or [])
    ]


# ── 5 · Preflight ─────────────────────────────────────────────────────────────────────────────────


def check_options(arguments: Arguments) -> Iterator[str]:
    """Options that contradict each other."""
    received = [name for name in MatteMethod._fields if name in vars(arguments)]
    if arguments.unmix and received:
        flags = ", ".join("--" + name.replace("_", "-") for name in received)
        yield f"{flags} shapes the matte that --unmix replaces; leave out one or the other"
    for flag, value in (("--subject", arguments.subject), ("--enclosed", arguments.enclosed)):
        if value and not arguments.unmix:
            yield f"{flag} {value} needs --unmix; add it or leave {flag} out"
    method = method_from(arguments)
    if isinstance(method, MatteMethod) and method.soft_matte:
        low, high = method.transparent_threshold, method.opaque_threshold
        if low >= high:
            yield (
                f"--transparent-threshold {low:g} is not below --opaque-threshold {high:g}; "
                "lower the first or raise the second"
            )
    if (arguments.out is None) == (arguments.out_dir is None):
        yield "give either --out PATH (one input) or --out-dir DIR (any number)"


def check_number(arguments: Arguments, number: int) -> Iterator[str]:
    """Find flags that do not go together with so many inputs."""
    if not number:
        yield "the following arguments are required: --input (or --inspect)"
    if arguments.out is not None and arguments.out_dir is None and number > 1:
        yield f"--out takes one input, received {number}; use --out-dir DIR"
    if arguments.preview is not None and number > 1:
        yield f"--preview takes one input, received {number}; run them one by one"


def check_inspection(arguments: Arguments) -> Iterator[str]:
    """Find flags that have no sense where nothing is made."""
    others = [name for name in vars(arguments) if name not in {"inspect", "json", "strict"}]
    if others:
        flags = ", ".join("--" + name.replace("_", "-") for name in others)
        yield f"--inspect makes nothing and takes no key; leave out {flags}"


def check_source(source: Path) -> Iterator[str]:
    """Find out that the only input is none; among several it is one failure of many."""
    # For a name that no file can have, os.path says no, and Path raises.
    if os.path.isdir(source):
        yield f"{source} is a directory; give picture files"
    elif not os.path.exists(source):
        yield f"{source} does not exist; check the path"
    elif not os.path.isfile(source):
        yield f"{source} is no regular file; give picture files"


def check_place(path: Path, *, force: bool) -> Iterator[str]:
    """Find why a file could not be written there."""
    if os.path.isdir(path):
        yield f"{path} is a directory; give a file name"
    elif os.path.lexists(path) and not force:
        yield f"{path} exists; choose another name or add --force"
    above = next((folder for folder in path.parents if os.path.exists(folder)), None)
    if above is not None and not os.path.isdir(above):
        yield f"{above} is no directory, so {path} cannot be written; choose another place"


def check_target(job: Job) -> Iterator[str]:
    """Find why an output could not be written."""
    target = job.target
    if target.suffix.lower() not in OUTPUT_FORMATS:
        yield f"{target} ends in {target.suffix or 'nothing'!r}; only .png and .webp keep alpha"
    yield from check_place(target, force=job.force)


def check_preview(job: Job, preview: Path) -> Iterator[str]:
    """Find why a preview could not be written."""
    if preview.suffix.lower() not in PREVIEW_FORMATS:
        *others, last = PREVIEW_FORMATS
        accepted = f"{', '.join(others)} and {last} are accepted"
        yield f"--preview {preview} ends in {preview.suffix or 'nothing'!r}; {accepted}"
    if os.path.realpath(preview) in map(os.path.realpath, (job.source, job.target)):
        yield f"--preview {preview} is the input or the cut-out; choose another name"
    else:
        yield from check_place(preview, force=job.force)


def check_files(jobs: Sequence[Job]) -> Iterator[str]:
    """Find inputs and outputs that cannot work, whatever the pictures hold."""
    if len(jobs) == 1:
        yield from check_source(jobs[0].source)
    inputs = {os.path.realpath(job.source): job.source for job in jobs}
    outputs: dict[str, Job] = {}
    for job in jobs:
        real_target = os.path.realpath(job.target)
        if real_target in inputs:
            yield f"{job.target} is the input {inputs[real_target]}; choose another output"
        elif real_target in outputs:
            yield (
                f"{job.source} and {outputs[real_target].source} would both become {job.target}; "
                "rename one or run them apart"
            )
        else:
            yield from check_target(job)
        outputs[real_target] = job
        if job.preview is not None:
            yield from check_preview(job, job.preview)


def numbers_of(version: str) -> list[int]:
    """Return the first two numbers of a version, which compare as versions do."""
    return [int(number) for number in re.findall("[0-9]+", version)[:2]]


def check_packages() -> Iterator[str]:
    """Load the packages, before any worker process needs them, or name what is amiss."""
    for module, (package, least) in PACKAGES.items():
        top = module.partition(".")[0]
        try:
            importlib.import_module(module)
            version: str = sys.modules[top].__version__
        except ModuleNotFoundError as missing:
            missed = package if missing.name == top else missing.name
            yield f"{missed} is not installed; run: {INSTALL} pillow numpy"
        except ImportError as damage:
            remedy = f"run: {INSTALL} --force-reinstall {package}"
            yield f"{package} cannot be loaded ({damage}); {remedy}"
        else:
            if numbers_of(version) < numbers_of(least):
                needed = f"{package} is {version}, and {least} or newer is needed"
                yield f"{needed}; run: {INSTALL} '{package}>={least}'"


def refuse(problems: Iterable[str]) -> None:
    """Raise one UsageError for all problems, if there is any."""
    if found := list(problems):
        raise UsageError(*found)


def planned(arguments: Arguments) -> Sequence[Task]:
    """List what is to be done, or refuse all of it."""
    jobs = jobs_from(arguments)
    looks = [Inspection(path) for path in expanded(arguments.inspect or [])]
    if arguments.inspect is not None:
        refuse(check_inspection(arguments))
        refuse(check_source(looks[0].source) if len(looks) == 1 else ())
    else:
        refuse([*check_options(arguments), *check_number(arguments, len(jobs))])
        refuse(check_files(jobs))
    refuse(check_packages())
    return looks or jobs


# ── 6 · Read ──────────────────────────────────────────────────────────────────────────────────────


def through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to sRGB with LittleCMS, or leave the picture to Pillow's plain conversion."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
        stored = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, stored, srgb, outputMode="RGB") or image
    return image


def to_rgb(image: Image.Image) -> tuple[Image.Image, bytes | None]:
    """RGB or RGBA with the same look, and the profile that still describes it."""
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.rint(np.asarray(image).astype(np.float64) / 257.0)  # Pillow would clip at 255
        return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).convert("RGB"), None
    profile = image.info.get("icc_profile")
    # A profile of another colour space (CMYK, grey, Lab) says nothing about RGB values.
    if profile is not None and profile[16:20] != b"RGB ":
        image, profile = through_profile(image, profile), None
    if image.mode in {"La", "RGBa"}:
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    has_alpha = image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info
    return image.convert("RGBA" if has_alpha else "RGB"), profile


def picture_from(image: Image.Image) -> Picture:
    """Upright 8-bit planes of an opened picture."""
    if image.format in DRAWING_FORMATS:
        raise ChromaKeyError(f"{image.format} is a drawing and has no pixels; export it as PNG")
    frames = getattr(image, "n_frames", 1)
    # An MPO is a photograph with a second view or a thumbnail behind it, no animation.
    if frames > 1 and image.format != "MPO":
        raise ChromaKeyError(
            f"{frames} frames; only still pictures are accepted, save the frame you want as PNG"
        )
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:  # the camera was not held upright
        image = ImageOps.exif_transpose(image)
    flat, profile = to_rgb(image)
    red, green, blue, *alpha = (np.asarray(plane) for plane in flat.split())
    return Picture((red, green, blue), alpha[0] if alpha else None, profile)


def read_picture(path: Path) -> Picture:
    """Decode a still picture of any mode, upright, as 8-bit RGB planes."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for its writer
        raise ChromaKeyError("no regular file; give picture files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return picture_from(image)
    except (ChromaKeyError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
        raise ChromaKeyError(f"more than {limit} pixels; scale the picture down first") from error
    except PIL.UnidentifiedImageError as error:
        raise ChromaKeyError("no picture that Pillow can read; give PNG, JPEG or WebP") from error
    except OSError as error:
        reason = error.strerror or error
        raise ChromaKeyError(f"cannot be read ({reason}); make it again") from error
    # Decoders answer damage with SyntaxError, struct.error, ValueError, IndexError and more.
    except Exception as error:
        raise ChromaKeyError(f"a damaged picture ({error}); make it again") from error


# ── 7 · Key colour ────────────────────────────────────────────────────────────────────────────────

# The matte of section 9 is recorded: without --unmix, what it gives for an input and options is
# never to change by a pixel, since pictures that are made again must match those of before. These
# values are part of it.
CORNER_SIDE = 12
BORDER_DEPTH = 6
BORDER_POSITIONS = 256
SPILL_CHANNEL_MIN = 128
SPILL_CHANNEL_SLACK = 16


def pixels_of(planes: Planes, *areas: tuple[slice, slice]) -> U8:
    """Collect the pixels of some areas, shape (n, 3)."""
    found = [np.concatenate([plane[area].ravel() for area in areas]) for plane in planes]
    return np.stack(found, axis=-1)


def border_samples(planes: Planes) -> U8:
    """Sample a band along each side, shape (n, 3)."""
    height, width = planes[0].shape
    step = max(1, min(width, height) // BORDER_POSITIONS)
    depth = min(BORDER_DEPTH, height, width)
    top, bottom = np.s_[:depth, ::step], np.s_[height - depth :, ::step]
    left, right = np.s_[::step, :depth], np.s_[::step, width - depth :]
    return pixels_of(planes, top, bottom, left, right)


def corner_samples(planes: Planes) -> U8:
    """Take a square in each corner, shape (n, 3)."""
    height, width = planes[0].shape
    side = min(CORNER_SIDE, height, width)
    top, bottom = slice(side), slice(height - side, None)
    left, right = slice(side), slice(width - side, None)
    return pixels_of(planes, (top, left), (top, right), (bottom, left), (bottom, right))


def is_unseen(alpha: U8 | None, take: Callable[[Planes], U8]) -> bool:
    """Tell whether most of some samples are transparent already."""
    return alpha is not None and not np.median(take((alpha,)))


def key_of(picture: Picture, job: Job) -> Colour:
    """Take the named key colour, or the median per channel of the corners or the border."""
    if job.auto_key == "none":
        return job.key_colour
    take = corner_samples if job.auto_key == "corners" else border_samples
    if is_unseen(picture.alpha, take):
        place = "border is" if job.auto_key == "border" else "corners are"
        raise ChromaKeyError(
            f"its {place} transparent already, so there is no key to measure; use it as it is, or "
            "name the key with --key-color"
        )
    samples = take(picture.planes)
    if picture.alpha is not None and isinstance(job.method, UnmixMethod):
        samples = samples[take((picture.alpha,))[:, 0] > 0]  # what nobody sees has no say
    red, green, blue = np.rint(np.median(samples, axis=0)).astype(int).tolist()
    return red, green, blue


def spill_channels(key: Colour) -> tuple[int, ...]:
    """Channels that the key colour lights up: (1,) for green, (0, 2) for magenta, () for black."""
    floor = max(SPILL_CHANNEL_MIN, max(key) - SPILL_CHANNEL_SLACK)
    return tuple(channel for channel in range(3) if key[channel] >= floor)


# ── 8 · Planes and masks ──────────────────────────────────────────────────────────────────────────

EDGE_WIDTH = 3  # pixels from the background to the end of an antialiased edge; 2: -0.6 dB, see 10
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def key_distance(planes: Planes, key: Colour) -> U8:
    """Largest absolute difference of a channel to the key colour."""
    pairs = zip(planes, np.array(key, np.uint8), strict=True)
    distances = [np.maximum(plane, level) - np.minimum(plane, level) for plane, level in pairs]
    largest: U8 = functools.reduce(np.maximum, distances)
    return largest


def key_strength_and_rest(planes: Planes, channels: tuple[int, ...]) -> tuple[U8, U8]:
    """Weakest of the key's channels and strongest of the others (0 where there is none)."""
    nothing = [np.zeros_like(planes[0])]
    strength = [planes[channel] for channel in channels] or nothing
    rest = [planes[channel] for channel in range(3) if channel not in channels] or nothing
    return functools.reduce(np.minimum, strength), functools.reduce(np.maximum, rest)


def blank_where(planes: Planes, empty: Mask) -> Planes:
    """Black wherever nothing is to be seen."""
    return tuple(np.where(empty, np.uint8(0), plane) for plane in planes)


def around(field: NDArray[Any], extreme: np.ufunc, reach: int = 1) -> NDArray[Any]:
    """Maximum or minimum over a square of 2·reach + 1 pixels, in doubling steps."""
    for axis in (0, 1):
        margin = [(reach, reach) if axis == along else (0, 0) for along in (0, 1)]
        lines = np.pad(field, margin, mode="edge").swapaxes(0, axis)
        covered = 1
        while covered < 2 * reach + 1:
            shift = min(covered, 2 * reach + 1 - covered)
            lines = extreme(lines[:-shift], lines[shift:])
            covered += shift
        field = lines.swapaxes(0, axis)
    return field


def dilate(mask: Mask, reach: int) -> Mask:
    """Grow a mask by `reach` pixels in each direction."""
    return around(mask, np.logical_or, reach)


def blocks(plane: NDArray[Any], combine: np.ufunc, size: int) -> NDArray[Any]:
    """Combine every whole block of size x size pixels; there is always at least one."""
    short = [max(0, size - length) for length in plane.shape]
    if any(short):
        plane = np.pad(plane, [(0, missing) for missing in short], mode="edge")
    height, width = (length - length % size for length in plane.shape)
    rows = functools.reduce(combine, [plane[offset:height:size] for offset in range(size)])
    columns = [rows[:, offset:width:size] for offset in range(size)]
    cells: NDArray[Any] = functools.reduce(combine, columns)
    return cells


def window_sum(plane: NDArray[Any], reach: int, *, at_edge: bool = False) -> NDArray[Any]:
    """Sum over a square of 2·reach + 1 pixels; beyond the edge there is nothing, or the edge."""
    size, (height, width) = 2 * reach + 1, plane.shape
    wide = np.pad(plane, reach, mode="edge" if at_edge else "constant")
    rows = functools.reduce(np.add, [wide[shift : shift + height] for shift in range(size)])
    total = functools.reduce(np.add, [rows[:, shift : shift + width] for shift in range(size)])
    return np.asarray(total)


def smoothstep(x: NDArray[Any]) -> NDArray[Any]:
    """Rise smoothly from 0 to 1 between 0 and 1."""
    ramp = np.clip(x, 0, 1)
    smooth: NDArray[Any] = ramp * ramp * (3 - 2 * ramp)
    return smooth


class Parts(NamedTuple):
    """Connected parts of a mask, diagonals included, as runs along the rows.

    Runs that touch in neighbouring rows are one part (Rosenfeld and Pfaltz 1966); they are joined
    all at once, each part to the lowest number that it touches, until nothing changes.
    """

    starts: Places  # of the runs, in the flattened picture
    ends: Places
    part: Places  # the part of each run
    number: int
    shape: tuple[int, int]

    def sizes(self) -> Places:
        """Count the pixels of each part."""
        return np.bincount(self.part, self.ends - self.starts, self.number).astype(np.intp)

    def largest(self, field: NDArray[Any]) -> NDArray[Any]:
        """Find the maximum of a field, which is nowhere negative, over each part."""
        most = np.zeros(self.number, field.dtype)
        if self.number:
            within = np.stack([self.starts, self.ends], axis=1).ravel()
            by_run = np.maximum.reduceat(np.append(field, field.dtype.type(0)), within)[::2]
            np.maximum.at(most, self.part, by_run)
        return most

    def sums(self, field: NDArray[Any]) -> NDArray[np.float64]:
        """Add up a field over each part."""
        places, part = self.places(np.ones(self.number, np.bool_))
        return np.bincount(part, field.reshape(-1)[places], self.number).astype(np.float64)

    def at_border(self) -> Mask:
        """Tell which parts reach the border of the picture."""
        height, width = self.shape
        first, last = self.starts % width, (self.ends - 1) % width
        outer = (first == 0) | (last == width - 1)
        outer |= (self.starts < width) | (self.starts >= (height - 1) * width)
        return np.bincount(self.part, outer, self.number) > 0

    def places(self, chosen: Mask) -> tuple[Places, Places]:
        """List the pixels of the chosen parts, and the part of each."""
        runs = np.flatnonzero(chosen[self.part])
        lengths = self.ends[runs] - self.starts[runs]
        before = np.cumsum(lengths) - lengths
        inner = np.arange(lengths.sum()) - np.repeat(before, lengths)
        return inner + np.repeat(self.starts[runs], lengths), np.repeat(self.part[runs], lengths)

    def mask(self, chosen: Mask) -> Mask:
        """Draw the chosen parts."""
        drawn = np.zeros(self.shape, np.bool_)
        drawn.reshape(-1)[self.places(chosen)[0]] = True
        return drawn


def parts_of(mask: Mask) -> Parts:
    """Find the connected parts of a mask."""
    width, wide = mask.shape[1], np.pad(mask, ((0, 0), (0, 1)))  # so that no run goes on below
    turns = np.flatnonzero(np.diff(wide.reshape(-1), prepend=False))
    starts, ends, stride = turns[::2], turns[1::2], width + 1
    first = np.searchsorted(ends, starts + stride, side="left")
    touched = np.searchsorted(starts, ends + stride, side="right") - first
    above = np.repeat(np.arange(starts.size), touched)
    below = np.arange(above.size) + np.repeat(first - np.cumsum(touched) + touched, touched)
    root = np.arange(starts.size)
    while (apart := root[above] != root[below]).any():
        above, below = above[apart], below[apart]
        pair = root[above], root[below]
        np.minimum.at(root, np.maximum(*pair), np.minimum(*pair))
        while (root[root] != root).any():
            root = root[root]
    names, part = np.unique(root, return_inverse=True)
    rows = starts // stride
    return Parts(starts - rows, ends - rows, part, names.size, mask.shape)


def enlarge(cells: NDArray[Any], shape: tuple[int, ...], size: int) -> NDArray[Any]:
    """Every cell as size x size pixels, the last ones stretched or cut to fill `shape`."""
    height, width = shape
    rows = np.minimum(np.arange(height) // size, cells.shape[0] - 1)
    columns = np.minimum(np.arange(width) // size, cells.shape[1] - 1)
    enlarged: NDArray[Any] = cells[:, columns][rows]
    return enlarged


# ── 9 · Matte by colour distance ──────────────────────────────────────────────────────────────────

# The dominance of the key's channels is the colour difference of Petro Vlahos, and capping them his
# rule against spill: on green, no pixel is greener than the larger of red and blue.
KEY_LIKE_DISTANCE = 32
KEY_LIKE_DOMINANCE = 16
HAZE_ALPHA = 8
DESPILL_ALPHA = 252


def distance_alpha(distance: U8, low: float, high: float) -> U8:
    """Smoothstep from 0 at `low` to 255 at `high`, through a table of the 256 distances."""
    levels = np.arange(256, dtype=np.float64)
    smooth = np.rint(255.0 * smoothstep((levels - low) / (high - low)))
    table = np.where(levels <= low, 0, np.where(levels >= high, 255, smooth)).astype(np.uint8)
    return table[distance]


def dominance_alpha(strength: U8, rest: U8, key: Colour) -> U8:
    """How far the key's channels stand out, through a table of (strength, rest)."""
    levels = np.arange(256, dtype=np.float64)
    dominance = levels[:, None] - levels
    share = np.minimum(1.0, dominance / np.maximum(1.0, max(key) - levels))
    table = np.where(dominance <= 0, 255, np.rint(255.0 * (1.0 - share))).astype(np.uint8)
    return table[strength, rest]


def capped(planes: Planes, channels: tuple[int, ...], cap: U8) -> Planes:
    """No channel of the key above `cap`; a key with every channel lit has no hue to take away."""
    if len(channels) == len(planes):
        return planes
    return tuple(
        np.minimum(plane, cap) if channel in channels else plane
        for channel, plane in enumerate(planes)
    )


def cut_by_distance(picture: Picture, key: Colour, method: MatteMethod) -> Cutout:
    """Alpha by distance to the key colour; its pixels are recorded (section 7)."""
    channels = spill_channels(key)
    distance = key_distance(picture.planes, key)
    strength, rest = key_strength_and_rest(picture.planes, channels)
    dominance = strength.astype(np.int16) - rest
    key_like = (distance <= KEY_LIKE_DISTANCE) | (dominance >= KEY_LIKE_DOMINANCE)
    if not channels:
        key_like[...] = True
    alpha = np.where(distance <= method.tolerance, np.uint8(0), np.uint8(255))
    if method.soft_matte:
        soft = distance_alpha(distance, method.transparent_threshold, method.opaque_threshold)
        limit = dominance_alpha(strength, rest, key) if channels else np.uint8(255)
        alpha = np.where(key_like, np.minimum(soft, limit), alpha)
    if picture.alpha is not None:
        alpha = np.rint(alpha * (picture.alpha / 255.0)).astype(np.uint8)
    alpha[alpha <= HAZE_ALPHA] = 0
    matched = bool((alpha == 0).any())
    planes = picture.planes
    if method.despill:
        spilled = key_like & (alpha < DESPILL_ALPHA)
        cap = np.where(spilled, np.maximum(rest, 1) - np.uint8(1), np.uint8(255))
        planes = capped(planes, channels, cap)
    planes = blank_where(planes, alpha == 0)
    key_hued = (dominance >= KEY_LIKE_DISTANCE) & ~dilate(distance <= KEY_LIKE_DISTANCE, EDGE_WIDTH)
    return Cutout(planes, alpha, key, matched, key_hued)


# ── 10 · Unmixing ─────────────────────────────────────────────────────────────────────────────────
#
# A pixel of an edge, of glass or of a shadow is a mixture of the subject's colour F and the key K:
#
#     C = a·F + (1 - a)·K
#
# C and K are known, F and a are not: three equations, one a channel, for four unknowns. Something
# must be known of F beforehand (Smith and Blinn 1996, "Blue Screen Matting"), one of two things:
#
# F lacks the key's hue. Let D(C) be how far a channel of C that the key lights up stands above one
# that it does not, as in the colour difference key of Petro Vlahos; of several such pairs the one
# counts in which C is least like the key. q = 1 - D(C)/D(K) is 0 for the key and linear: q = a·q_F.
# A grey F has D(F) = 0, hence q_F = 1 and a = q. So has any F whose lit channel (of several, the
# weaker) is exactly as bright as the brighter of the unlit ones; most colours have q_F above 1.
#
# F is a colour nearby. Over the few pixels from one that is certainly subject to the background, F
# and K hardly change. That makes a an affine function of C (Levin, Lischinski and Weiss 2008, "A
# Closed-Form Solution to Natural Image Matting"), the projection of C on the line from K to F:
# a = (C - K)·(F - K) / |F - K|².
#
# One pixel by hand, half of it covered by a reddish brown:
#
#     K = (8, 248, 8)    F = (200, 80, 40)    a = 0.5    C = (104, 164, 24)
#     D(K) = 248 - 8 = 240     above red as well as above blue
#     D(C) = 164 - 104 = 60    above red; above blue it would be 164 - 24 = 140
#     q    = 1 - 60/240 = 0.75
#
# That is too much, for this F is the opposite of green: q_F = 1 - (80 - 200)/240 = 1.5. With a = q
# its colour would be K + (C - K)/q = (136, 136, 29), an olive. With the brown found nearby:
#
#     C - K = (96, -84, 16)    F - K = (192, -168, 32)
#     a     = (96·192 + 84·168 + 16·32) / (192² + 168² + 32²) = 33056 / 66112 = 0.5
#     F     = K + (C - K)/a = (200, 80, 40)
#
# The thresholds were measured on composites of known alpha: 13 photographs and drawings (line art,
# thin frames, hair, glass, glow, shadow, the key's hue) on #00ff00, #ff00ff, #0000ff and #04f90b;
# clean, with noise (deviation 2), as JPEG (quality 90, 4:2:0), with a drift of the key by 8, and on
# backgrounds as image models paint them: 208 in all, and 24 more on grey keys. After a threshold
# stands what other values cost (-) or gain (+): dB of PSNR where alpha is partial (mean 35.2), or
# holes, the share of opaque pixels that come out below 245 (0.7 %). "Alike" is within 0.05 dB.

# ── 10a · The backdrop, and q ─────────────────────────────────────────────────────────────────────

HUE_CONTRAST = 64  # a key without two channels that far apart has no hue; 40, 100: alike
GREY_KEY_DISTANCE = 96  # then, what is that far from the key is subject; 64, 128: -0.5, -0.3 dB
NOISE_DISTANCE = 24  # border pixels farther from the key are subject, not noise; 16, 36: alike
NOISE_PERCENTILE = 99  # of the rest, so many are background; 97, 99.7: alike …
NOISE_MARGIN = 1.15  # … with some to spare; 1.5: -0.1 dB, but a fourth less haze
LEAST_NOISE = 2  # levels, on a clean key too; 4: -0.3 dB, most of it in line art and glass
FAINT = 20  # up to there a pixel is too faint to be an edge; 14, 28: -0.1, -0.5 dB
UNEVEN = 0.3  # levels of deviation; a steadier background was composed, and all else is subject
SMOOTH_SHARE = 0.72  # of the farther variance; painted grounds have up to 0.52, white noise 1
SMOOTH_LAG, SMOOTH_DEPTH = 4, 2  # pixels apart, and from the border; the outermost are odd
LEAST_ALPHA = 0.02  # no colour is recovered from less; 0.01, 0.04: +0.1, -0.8 dB on clean ones


class Backdrop(NamedTuple):
    """The key as this picture shows it; figures in levels."""

    key: F32
    grain: float = 0  # standard deviation from pixel to pixel
    deviation: float = 4  # standard deviation from the key, drift included
    farthest: int = 8  # up to there from the key everything is background
    is_painted: bool = False  # by an image model, and not composed or photographed


def has_smooth_noise(planes: Planes, key: F32) -> bool:
    """Tell whether neighbours along the border differ less than pixels that are farther apart."""
    depth = min(SMOOTH_DEPTH, *(length - 1 for length in planes[0].shape))
    near, far = [], []
    for turn in range(4):
        line = np.stack([np.rot90(plane, turn)[depth] for plane in planes], axis=1) - key
        line = line[np.abs(line).max(axis=1) < NOISE_DISTANCE]
        near.append(np.square(np.diff(line, axis=0)).ravel())
        far.append(np.square(line[SMOOTH_LAG:] - line[:-SMOOTH_LAG]).ravel())
    means = [np.concatenate(of).sum() / max(1, sum(map(len, of))) for of in (near, far)]
    return bool(means[0] < SMOOTH_SHARE * means[1])


def measure_backdrop(planes: Planes, key: Colour) -> Backdrop:
    """Measure the border pixels that are key colour."""
    exact_key = np.array(key, np.float32)
    differences = border_samples(planes) - exact_key
    distances = np.abs(differences).max(axis=-1)
    is_key = distances < NOISE_DISTANCE
    of_key = differences[is_key]
    if not of_key.size:
        return Backdrop(exact_key)
    steps = np.diff(of_key, axis=0)  # of two pixels, so their variance is twice that of one
    grain = float(np.sqrt(np.square(steps).mean() / 2)) if steps.size else 0
    deviation = float(np.sqrt(np.square(of_key).mean()))
    margin = NOISE_MARGIN * float(np.percentile(distances[is_key], NOISE_PERCENTILE))
    farthest = max(LEAST_NOISE, int(margin))
    corners = tuple(plane[[0, 0, -1, -1], [0, -1, 0, -1]] for plane in planes)
    is_painted = bool(key_distance(corners, key).min() > farthest) or has_smooth_noise(
        planes, exact_key
    )
    return Backdrop(exact_key, grain, deviation, farthest, is_painted and deviation > UNEVEN)


def lit_channels(key: Colour | F32) -> tuple[int, ...]:
    """Channels above the middle of the key's range: (0, 2) for a magenta of any tint."""
    middle = (min(key) + max(key)) / 2
    return tuple(channel for channel in range(3) if key[channel] > middle)


def hue_pairs(key: F32) -> list[tuple[int, int]]:
    """Channel pairs (lit, unlit) whose difference tells the key's hue; none for a grey key."""
    lit = lit_channels(key)
    return [(high, low) for high in lit for low in range(3) if key[high] - key[low] >= HUE_CONTRAST]


def key_free_share(colour: F32, key: F32) -> F32:
    """Compute q of colours (3, ...): 0 is the key, 1 lacks its hue, above 1 is the opposite hue."""
    pairs = hue_pairs(key)
    if not pairs:  # only brightness tells
        distance: F32 = np.abs(colour - key.reshape(-1, *[1] * (colour.ndim - 1))).max(axis=0)
        return distance / np.float32(GREY_KEY_DISTANCE)
    share = np.full(colour.shape[1:], np.inf, np.float32)
    for high, low in pairs:
        part = colour[high] - colour[low]
        part *= np.float32(1 / (key[high] - key[low]))
        np.minimum(share, part, out=share)
    return np.subtract(np.float32(1), share, out=share)


def unmixed_colour(colour: F32, alpha: F32, key: F32) -> F32:
    """F = K + (C - K)/a for colours (3, ...), within 0 to 255."""
    key = key.reshape(-1, *[1] * alpha.ndim)
    return np.clip(key + (colour - key) / np.maximum(alpha, np.float32(LEAST_ALPHA)), 0, 255)


# ── 10b · The mixture ─────────────────────────────────────────────────────────────────────────────
#
# A JPEG stores chroma at half the resolution of luma, and libjpeg doubles it with a triangle filter
# ("fancy upsampling": 3/4 of the nearer value, 1/4 of the next). Then the step inside a pair of
# pixels is the mean of the steps before and after it, and one pixel on, the same rule fails. But
# between two colours chroma is a linear function of luma, so the detail that the one lost can be
# had from the other: by a guided filter (He, Sun and Tang 2013) whose guide is luma, with slopes
# from small windows at half the resolution, damped where more than two colours meet: +1.2 dB.

SAMPLE_LINES = 128  # rows and columns, at least, that are looked at; 64, 256: alike
STEEP_STEP = 12  # a smaller step of chroma says nothing; 8, 18: alike
RULE_MISFIT = 10  # levels by which a step may miss the rule; 6, 15: one, four JPEGs are not found
RULE_SHARE = 3  # one step in that many keeps it; JPEGs have 0.40 and more; 2: three are not found
RULE_CONTRAST = 1.25  # times as many as out of phase; JPEGs 1.4 and more, others up to 1.1
RULE_STEPS = 32  # fewer say nothing; 16, 64: alike
CHROMA_NOISE = 5  # variance that quantisation adds to chroma; 2, 12: alike
TRUST_FROM, TRUST_RAMP = 0.5, 0.45  # of the squared correlation; from 0.3, 0.7: alike
GUIDE_REACH = 2  # pixels of half the resolution; 1, 3: alike


class Mixture(NamedTuple):
    """A picture of mixtures: colours C (3, h, w) in levels, and what their q (h, w) says."""

    colour: F32
    q: F32
    background: Mask
    faint: Mask  # background, or too faint to be an edge
    backdrop: Backdrop
    is_sharpened: bool

    def colours_at(self, places: Places) -> F32:
        """Colours (3, n) of some pixels."""
        return self.colour.reshape(3, -1).take(places, axis=1)


def has_doubled_steps(lines: Planes) -> bool:
    """Test the rule along the rows: does it fit clearly better inside pairs than across them?"""
    kept = np.zeros((2, 2), np.int64)
    red, green, blue = (plane.astype(np.int16) for plane in lines)
    for chroma in (red - green, blue - green):
        steps = np.diff(chroma, axis=1)
        misfit = np.abs(2 * steps[:, 1:-1] - steps[:, :-2] - steps[:, 2:])
        steep = (np.abs(steps[:, 1:-1]) > STEEP_STEP) | (np.abs(steps[:, :-2]) > STEEP_STEP)
        for phase in (0, 1):
            misfits = misfit[:, 1 - phase :: 2][steep[:, 1 - phase :: 2]]
            kept[phase] += (np.count_nonzero(misfits <= RULE_MISFIT), misfits.size)
    (inside, of_inside), (across, of_across) = kept.tolist()
    is_kept: bool = RULE_SHARE * inside > of_inside >= RULE_STEPS
    return is_kept and inside * of_across > RULE_CONTRAST * across * of_inside


def has_subsampled_chroma(planes: Planes) -> bool:
    """Tell whether chroma was doubled along both axes; else no phase is told from the other."""
    sparse = np.s_[:: max(1, min(planes[0].shape) // SAMPLE_LINES)]
    rows = tuple(plane[sparse] for plane in planes)
    columns = tuple(plane[:, sparse].T for plane in planes)
    return has_doubled_steps(rows) and has_doubled_steps(columns)


def halve(plane: F32) -> F32:
    """Average 2x2 pixels; a last odd row or column stands for itself."""
    odd_rows, odd_columns = (length % 2 for length in plane.shape)
    even = np.pad(plane, ((0, odd_rows), (0, odd_columns)), mode="edge")
    return blocks(even, np.add, 2) * np.float32(0.25)


def double(plane: F32, shape: tuple[int, int]) -> F32:
    """Twice the size with weights 3/4 and 1/4, cut to `shape`."""
    for axis in (0, 1):
        lines = plane.swapaxes(0, axis)
        wide = np.pad(lines, ((1, 1), (0, 0)), mode="edge")
        pairs = np.stack([0.75 * lines + 0.25 * wide[:-2], 0.75 * lines + 0.25 * wide[2:]], axis=1)
        plane = pairs.reshape(2 * len(lines), -1).swapaxes(0, axis)
    return plane[: shape[0], : shape[1]]


def box_mean(plane: F32) -> F32:
    """Average over a square of 2·GUIDE_REACH + 1 pixels."""
    share = np.float32(1 / (2 * GUIDE_REACH + 1) ** 2)
    return window_sum(plane, GUIDE_REACH, at_edge=True) * share


def chroma_slopes(luma: F32, chromas: Sequence[F32]) -> Iterator[F32]:
    """How steeply each chroma follows luma around a pixel, as far as they are correlated."""
    luma_mean = box_mean(luma)
    luma_variance = box_mean(luma * luma) - luma_mean * luma_mean + np.float32(CHROMA_NOISE)
    for chroma in chromas:
        mean = box_mean(chroma)
        covariance = box_mean(chroma * luma) - mean * luma_mean
        variance = box_mean(chroma * chroma) - mean * mean + np.float32(CHROMA_NOISE)
        correlation = covariance * covariance / (luma_variance * variance)
        trust = np.clip((correlation - TRUST_FROM) / TRUST_RAMP, 0, 1)
        yield box_mean(covariance / luma_variance * trust)


def sharpen_chroma(colour: F32) -> F32:
    """Add to the half-resolution chroma the detail that the full-resolution luma has."""
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # as JPEG has it (ITU-R BT.601)
    coarse = halve(luma)
    detail = luma - double(coarse, luma.shape)
    chromas = [red - green, blue - green]
    slopes = chroma_slopes(coarse, [halve(chroma) for chroma in chromas])
    red_green, blue_green = (
        chroma + enlarge(slope, luma.shape, 2) * detail
        for chroma, slope in zip(chromas, slopes, strict=True)
    )
    green = luma - 0.299 * red_green - 0.114 * blue_green
    sharpened: F32 = np.stack([green + red_green, green, green + blue_green])
    return np.clip(sharpened, 0, 255, out=sharpened)


# ── 10c · The ground ──────────────────────────────────────────────────────────────────────────────
#
# An image model paints the key unevenly: a little noise everywhere, blotches of 4 to 12 levels next
# to the subject, single pixels and corners 12 to 34 levels off at the border, and small areas that
# the subject encloses up to 28 levels off (medians of 250 pictures of 15 projects). None of it is
# to be seen in a cut-out. What was composed or photographed has faint hair instead. A true shadow
# or glow fades as far down, but is wide and smooth: a veil.
# Values without a figure were chosen on 15 painted pictures and the 208 composites together.

CELL = 4  # pixels; 3: alike, but 0.5 % more holes; 6, 8: -0.5, -1.1 dB
GROUND_DISTANCE = 48  # levels from the key; farther is no ground at all
LEAST_POCKET = 40  # pixels of an enclosed area, without its rim; 16: -1 dB in leaves
POCKET_LIMITS = ((200, 36), (1000, 15), (math.inf, 7))  # pixels, levels: the medians and a quarter
POCKET_GAPS = (1, 3, 5)  # half the pixels of a gap that is closed; 1 alone: a third more haze
# Areas, too small to be told by their mean, that are off the key without being enclosed:
FAINT_FROM, FAINT_DISTANCE = 4, 34  # levels from the key; to 30: more haze; to 38: -0.1 dB
FLAT_LEVELS = 1.75  # levels, and a grain, by which an island goes up and down; 1: a tenth more haze
MOST_ISLAND = 200  # pixels; 100: alike
GROUND_STEP, TOP_GROUND = 10, 15  # levels that are more than noise, and those of the ground
MOST_HIGHER = 2  # neighbours of a pixel that is no edge; 1: +0.1 dB, a tenth more haze
WIDE_REACH = 3  # pixels around one that are faint where a veil is; 4: alike; none: -0.4 dB
BLOTCH_GRAINS = 5  # the blotches, in grains of the border …
BLOTCH_LEVELS = 12  # … and at least, if painted; 15: -0.1 dB in webs; none: a tenth more haze
LOSSY_GRAIN = 1.8  # levels, at least, of a JPEG, whose edges ring; 2.5: -0.1 dB in JPEGs
EDGE_FROM = 30  # levels from the key; beside such a pixel a faint one is its edge; 24: more haze
VEIL_REACH = 2  # cells around one that are averaged, which blotches hardly survive
VEIL_GRAINS = 3  # a deeper mean is a veil …
VEIL_DEPTH = 5  # … if it is that many times deeper somewhere; 4: blotches are veils; 6: alike
SPECK_ALPHA = 0.25  # what is connected and nowhere above it is no subject


def level_pockets(colour: F32, distance: U8, key: F32, gap: int) -> None:
    """Give areas that are enclosed, but for gaps of 2·`gap` pixels, the border's key, in place.

    The ground is off by the mean of C - K, and a pixel by 1 - a of that, with q for a.
    """
    parts = parts_of(around(distance <= GROUND_DISTANCE, np.logical_and, gap))
    sizes = parts.sizes()
    places, part = parts.places(~parts.at_border() & (sizes >= LEAST_POCKET))
    mixed = colour.reshape(3, -1)[:, places]
    sums = [np.bincount(part, channel, parts.number) for channel in mixed - key[:, None]]
    offsets = (np.stack(sums) / np.maximum(sizes, 1)).astype(np.float32)
    pixels, levels = np.array(POCKET_LIMITS).T
    offsets *= np.abs(offsets).max(axis=0) <= levels[np.searchsorted(pixels, sizes)]
    offset = offsets[:, part]
    mixed = mixed - (1 - np.clip(key_free_share(mixed - offset, key), 0, 1)) * offset
    colour.reshape(3, -1)[:, places] = mixed
    distance.reshape(-1)[places] = np.rint(np.abs(mixed - key[:, None]).max(axis=0))


def squares(field: NDArray[Any], combine: np.ufunc) -> NDArray[Any]:
    """Combine 2x2 pixels around each corner that four of them share."""
    pairs = combine(field[1:], field[:-1])
    fours: NDArray[Any] = combine(pairs[:, 1:], pairs[:, :-1])
    return fours


def islands_of(colour: F32, distance: U8, grain: float) -> Mask:
    """Find small areas that are flat, though not quite the key: edges are steep, veils wide."""
    flat = squares((distance > FAINT_FROM) & (distance <= FAINT_DISTANCE), np.logical_and)
    for plane in colour:
        flat &= squares(plane, np.maximum) - squares(plane, np.minimum) <= FLAT_LEVELS + grain
    parts = parts_of(squares(np.pad(flat, 1), np.logical_or))
    return parts.mask(~parts.at_border() & (parts.sizes() <= MOST_ISLAND))


def tops_of(distance: U8) -> Mask:
    """Find faint pixels that stand above the ground, and hardly below any neighbour: no edge."""
    places = np.flatnonzero((distance > GROUND_STEP) & (distance <= FAINT_DISTANCE))
    rows, columns = np.divmod(places, distance.shape[1])
    wide = np.pad(distance.astype(np.int16), 1, mode="edge")
    stride, levels = wide.shape[1], wide.reshape(-1)
    centres = (rows + 1) * stride + columns + 1
    lower, higher = np.zeros((2, places.size), np.int8)
    for down, right in DIRECTIONS:
        neighbour = levels[centres + down * stride + right]
        step = neighbour - levels[centres]
        lower += (step < -GROUND_STEP) & (neighbour < TOP_GROUND)
        higher += step > GROUND_STEP
    tops = np.zeros(distance.shape, np.bool_)
    tops.reshape(-1)[places[(higher <= MOST_HIGHER) & (lower > higher)]] = True
    return tops


def window_mean(cells: F32, weight: F32) -> F32:
    """Weighted average over squares of 2·VEIL_REACH + 1 cells."""
    sums, weights = (window_sum(field, VEIL_REACH) for field in (cells * weight, weight))
    mean: F32 = np.divide(sums, np.maximum(weights, 1), dtype=np.float32)
    return mean


def veil_of(colour: F32, distance: U8, backdrop: Backdrop) -> Mask:
    """Find the pixels of the ground that a shadow or a glow covers."""
    ground = blocks(distance, np.maximum, CELL) <= GROUND_DISTANCE
    inner = ground & ~dilate(~ground, 1)
    depth = np.zeros(ground.shape, np.float32)
    for plane, level in zip(colour, backdrop.key, strict=True):
        offset = blocks(plane, np.add, CELL) * np.float32(1 / CELL**2) - level
        np.maximum(depth, np.abs(window_mean(offset, inner.astype(np.float32))), out=depth)
    depth *= inner
    least = max(LEAST_NOISE, VEIL_GRAINS * backdrop.grain)
    parts = parts_of(depth > least)
    deep = parts.mask(parts.largest(depth) > VEIL_DEPTH * least)
    return enlarge(dilate(deep, 1), distance.shape, CELL)


def find_background(colour: F32, distance: U8, backdrop: Backdrop, *, lossy: bool) -> Mask:
    """Find the pixels that are nothing but ground: blotches count, edges and veils do not."""
    grain = max(backdrop.grain, LOSSY_GRAIN if lossy else 0)
    subject = veil_of(colour, distance, backdrop._replace(grain=grain))
    subject |= dilate(distance > EDGE_FROM, 1)
    blotches = np.float32(backdrop.farthest + BLOTCH_GRAINS * grain)
    blotches = max(blotches, np.float32(BLOTCH_LEVELS if backdrop.is_painted else 0))
    background: Mask = distance <= np.where(subject, np.float32(backdrop.farthest), blotches)
    if backdrop.is_painted:
        is_faint = (distance > GROUND_STEP) & (distance <= GROUND_DISTANCE)
        wide = dilate(around(is_faint, np.logical_and, WIDE_REACH), WIDE_REACH + 1)
        background |= ~wide & (islands_of(colour, distance, grain) | tops_of(distance))
    return background


def drop_specks(alpha: F32) -> None:
    """Remove what is connected to nothing that is more than faint."""
    parts = parts_of(alpha > 0)
    alpha.reshape(-1)[parts.places(parts.largest(alpha) < SPECK_ALPHA)[0]] = 0


def mixture_of(planes: Planes, key: Colour) -> Mixture:
    """Take a picture for mixtures with its key."""
    backdrop, distance = measure_backdrop(planes, key), key_distance(planes, key)
    colour, is_subsampled = np.stack(planes, dtype=np.float32), has_subsampled_chroma(planes)
    if is_subsampled:
        colour = sharpen_chroma(colour)
    for gap in POCKET_GAPS if backdrop.is_painted else ():
        level_pockets(colour, distance, backdrop.key, gap)
    background = find_background(colour, distance, backdrop, lossy=is_subsampled)
    q = key_free_share(colour, backdrop.key)
    faint = background | (distance <= max(backdrop.farthest, FAINT))
    return Mixture(colour, q, background, faint, backdrop, is_subsampled)


# ── 10d · Areas in the key's hue ──────────────────────────────────────────────────────────────────
#
# They are opaque (a frog) or see-through (glass, glow, shadow). One pixel cannot tell; what does is
# how an object meets the background: crisply, or fading into it. So cells of some pixels are
# judged: a plateau of cells of one colour is opaque, unless its like fades in the ring of cells
# along the background, as glow (light of some colour) or shade (grey): one verdict an object. Glass
# with a crisp rim is told by its shading. Last, areas of like colour become one thing or the other
# as wholes, and a glint on a pane is none of its own.

CERTAIN_Q = 0.98  # above, what is away from the edges is certainly subject; 0.97, 1: -0.1, -0.2 dB
EVEN_Q = 0.25  # q varies more than that only where edges cross a cell; 0.4: -0.7 dB
SAME_COLOUR = 20  # levels between neighbouring cells of a plateau; 14: alike; 28: -0.1 dB
FAR = 71  # levels from the key; nearer, only what is flat is a plateau; 68: blots; 80: holes
BODY_MEAN, BODY_Q = 0.95, 0.85  # of q around a cell, and of a pixel of it, that is opaque
LIKE_CELLS = 6  # of 3x3, itself included, make the core of a plateau; 5: -0.1 dB; 7: alike
CORE_WEIGHT = 28  # of 81, the core cells in 5x5, the nearer the heavier; 20: -0.3 dB; 36: alike
AREA_SHARE = 0.75  # of an area of like colour are plateaus, or none is; 0.6: -0.2 dB in drawn glass
LARGE_AREA = 90  # cells; smaller ones are thin and have few cells of a core; 40: arms get holes
GLINT_SHARE = 0.12  # of a hued area is no body; 0: -0.2 dB in drawn glass; 0.15: bodies get holes
PLATEAU_SHARE = 0.6  # of a plateau's q is the least that pixels beside it have; 0.45, 0.75: alike
RING_REACH = 3  # cells from the background to the end of the ring; 2: alike; 4: 0.2 % more holes
FLAT_STEP = 1.5  # levels between cells of one flat colour; 1: 0.4 % more holes; 2.25: -0.5 dB
GRAIN_STEP = 0.35  # … and that much of the grain; 0.25, 0.5: alike; 0: 0.4 % more holes
LEAST_FADE = 0.03  # q of a cell that fades; only tiny pictures need it
# The largest q of a cell that is glow or shade, and of the 5x5 around it (3x3: 0.8 % more holes).
FAINT_GLOW_Q, FAINT_GLOW_AROUND = 0.25, 0.6  # needed by one piece of glass
STEEP_GLOW_Q, STEEP_GLOW_AROUND = 0.45, 0.85  # q 0.35: +0.1 dB; around 0.95: 0.2 % more holes
STEEP_GLOW_RISE = 1.25  # from a cell to the largest around it; 1.1, 1.5: alike
SHADE_Q, SHADE_AROUND = 0.6, 0.8  # q 0.75: -0.1 dB, 0.7 % more holes; around 0.95: 0.2 %
SOFT_STEP, SOFT_SHARE = 0.08, 0.5  # of q, from pixel to pixel, beside a shade; crisp rims have more
PANE_Q, PANE_LEVEL, PANE_COLOUR = 0.35, 200, 60  # thin white is clear glass; q 0.5: alike
NEUTRAL = 40  # levels between the channels of a shade; 25, 60: alike
DARK = 80  # levels; glow that is darker may be a shadow, no light; 50, 120: alike
LEAST_CELLS = 8  # fewer are no evidence; 4, 16: alike
OBJECT_RING = 40  # cells; an object with fewer is taken for what the picture is; 8, 100: alike
FADING_SHARE = 0.01  # of the ring is evidence that the like of it is see-through; 0.02: alike
CLEAR_SHARE = 0.03  # of the ring, bright, that all of the picture is; 0.06: +0.1 dB
COLOUR_BINS = 8  # of each channel; those beside a common one are alike; 16: -0.1 dB
COMMON_SHARE, COMMON_CELLS = 0.02, 3  # of the evidence are a common colour; half, double: alike
# Behind crisp rims, measured on drawn panes, bottles, lenses, jars and gems of 15 colours on nine
# keys, and on bodies of as many colours.
SHADING_LAG = 2  # cells apart; the steps between them are shading; 1, 3: alike
BLACK = 16  # levels; what would be darker is paint, as (0, 128, 0) on green; 8, 40: alike
BODY_FROM = 0.2  # of slope and q, less the share of hued cells; bodies have 0.28, but mint less
HUED_SHARE = 0.2  # of the cells of an object; less is no evidence; 0.1, 0.35: alike


class Cells(NamedTuple):
    """Blocks of the picture, (rows, columns)."""

    colour: F32  # mean
    q: F32  # of the mean
    q_range: F32
    q_high: F32
    q_step: F32  # the largest, from pixel to pixel
    solid: Mask  # no background in it, nor in a neighbour; within two: -0.4 dB
    ring: Mask  # those of them that are near the background
    objects: Parts  # of what is not all background


class HuedAreas(NamedTuple):
    """What the cells are: opaque in spite of the key's hue, or see-through."""

    opaque_from: U8  # least q, in hundredths, of pixels of an opaque area; 255 where none is
    may_be_opaque: Mask  # as strokes that are too thin for a cell
    body: Mask  # opaque all around, though its q goes up and down
    see_through: Mask


def cells_of(mixture: Mixture) -> Cells:
    """Reduce the picture to what areas are judged by."""
    sums = np.stack([blocks(plane, np.add, CELL) for plane in mixture.colour])
    means = sums * np.float32(1 / CELL**2)
    low, high = (blocks(mixture.q, extreme, CELL) for extreme in (np.minimum, np.maximum))
    steps = np.zeros_like(mixture.q)
    np.abs(np.diff(mixture.q, axis=0), out=steps[1:])
    np.maximum(steps[:, 1:], np.abs(np.diff(mixture.q, axis=1)), out=steps[:, 1:])
    step = blocks(steps, np.maximum, CELL)
    holds_background = blocks(mixture.faint, np.logical_or, CELL)
    solid = ~dilate(holds_background, 1)
    ring = solid & dilate(holds_background, RING_REACH)
    objects = parts_of(blocks(~mixture.background, np.logical_or, CELL))
    q = key_free_share(means, mixture.backdrop.key)
    return Cells(means, q, high - low, high, step, solid, ring, objects)


def part_of_plateau(colour: F32, hued: Mask) -> Mask:
    """Cells in or beside a patch of several cells whose colour changes slowly."""
    height, width = hued.shape
    wide_colour = np.pad(colour, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide_hued = np.pad(hued, 1)
    likes = np.zeros(hued.shape, np.int16)
    for down, right in np.ndindex(3, 3):
        window = np.s_[down : down + height, right : right + width]
        step = np.abs(wide_colour[(..., *window)] - colour).max(axis=0)
        likes += wide_hued[window] & (step < SAME_COLOUR)
    core = hued & (likes >= LIKE_CELLS)
    core &= window_sum(window_sum(core.astype(np.int16), 1), 1) >= CORE_WEIGHT
    return dilate(core, 1)


def opaque_bar(q: F32, plateau: Mask) -> U8:
    """Set the bar beside a plateau at a share of its q, so that a shadow there stays a shadow."""
    lowest = around(np.where(plateau, q, np.float32(np.inf)), np.minimum)
    # A subject purer than the key has q below 0, for which the least bar is low enough.
    bar = np.where(lowest < np.inf, np.rint(100 * PLATEAU_SHARE * np.maximum(lowest, 0)), 255)
    return bar.astype(np.uint8)


def steepest_step(colour: F32, solid: Mask) -> F32:
    """Find the largest difference of any channel to a solid cell above, below, left or right."""
    steepest = np.zeros(solid.shape, np.float32)
    for axis in (0, 1):
        lines, inner = steepest.swapaxes(0, axis), solid.swapaxes(0, axis)
        step = np.abs(np.diff(colour.swapaxes(1, 1 + axis), axis=1)).max(axis=0)
        step *= inner[1:] & inner[:-1]
        np.maximum(lines[1:], step, out=lines[1:])
        np.maximum(lines[:-1], step, out=lines[:-1])
    return steepest


def fading_cells(cells: Cells, unmixed: F32, is_flat: Mask) -> tuple[Mask, Mask]:
    """Find the cells of the ring that fade into the background, as glow and as shade."""
    q, q_around = cells.q, around(cells.q_high, np.maximum, 2)
    fades = cells.ring & ~is_flat & (q > LEAST_FADE)
    faint_glow = (q < FAINT_GLOW_Q) & (q_around < FAINT_GLOW_AROUND)
    rises = q_around > STEEP_GLOW_RISE * q
    steep_glow = (q < STEEP_GLOW_Q) & (q_around < STEEP_GLOW_AROUND) & rises
    shade = (q < SHADE_Q) & (q_around < SHADE_AROUND) & (np.ptp(unmixed, axis=0) < NEUTRAL)
    is_soft = around(cells.q_step, np.maximum, RING_REACH) < SOFT_STEP + SOFT_SHARE * q
    return fades & (faint_glow | steep_glow), fades & shade & is_soft


def objects_with(cells: Cells, evidence: Mask, least_share: float) -> Mask:
    """Find the objects of whose ring enough is evidence; small ones are what the picture is."""
    objects = cells.objects
    found, ring = objects.sums(evidence), objects.sums(cells.ring)
    in_picture = found.sum() >= max(LEAST_CELLS, least_share * ring.sum())
    in_object = found >= np.maximum(LEAST_CELLS, least_share * ring)
    return objects.mask(np.where(ring >= OBJECT_RING, in_object, in_picture))


def glass_of(cells: Cells, unmixed: F32, plateau: Mask, key: F32, flat_step: float) -> Mask:
    """Find the objects that the key shines through, though their rims are crisp.

    A body's shading scales all channels of its colour. Behind glass there is (1 - a)·K in the lit
    ones, which follow the others less, and fall where those rise because the glass is denser.
    """
    lit = list(lit_channels(key))
    unlit = [channel for channel in range(3) if channel not in lit]
    hued = plateau & (unmixed.max(axis=0) > BLACK)
    follows, varies, shading = np.zeros((3, *hued.shape), np.float32)
    for axis in (0, 1):
        colour, inner = cells.colour.swapaxes(1, 1 + axis), hued.swapaxes(0, axis)
        step = colour[:, SHADING_LAG:] - colour[:, :-SHADING_LAG]
        step *= inner[SHADING_LAG:] & inner[:-SHADING_LAG]
        step *= np.abs(step).max(axis=0) < SAME_COLOUR
        strength, rest = step[lit].mean(axis=0), step[unlit].mean(axis=0)
        for field, product in (
            (follows, strength * rest),
            (varies, rest * rest),
            (shading, strength * strength + rest * rest),
        ):
            field.swapaxes(0, axis)[SHADING_LAG:] += product
    sums = cells.objects.sums
    number = sums(hued)
    slope = sums(follows) / np.maximum(sums(varies), 1)
    opacity = sums(cells.q * hued) / np.maximum(number, 1)
    share = number / np.maximum(sums(cells.solid), 1)
    is_body = slope + opacity - share > BODY_FROM  # glass is seldom less than most of an object
    is_shaded = sums(shading) > number * flat_step**2
    is_known = is_shaded & (number >= OBJECT_RING) & (share > HUED_SHARE)
    return cells.objects.mask(~is_body & is_known)


def similar(colour: F32, evidence: Mask) -> Mask:
    """Find cells with a colour that is common in the evidence, give or take a bin of colours."""
    bins = (colour / (256 // COLOUR_BINS)).astype(np.intp).clip(0, COLOUR_BINS - 1)
    code = (bins[0] * COLOUR_BINS + bins[1]) * COLOUR_BINS + bins[2]
    counts = np.bincount(code[evidence], minlength=COLOUR_BINS**3)
    common = counts >= max(COMMON_CELLS, COMMON_SHARE * counts.sum())
    common = np.pad(common.reshape([COLOUR_BINS] * 3), 1)
    for axis in range(3):
        common = common | np.roll(common, 1, axis) | np.roll(common, -1, axis)
    alike: Mask = common[1:-1, 1:-1, 1:-1].reshape(-1)[code]
    return alike


def body_of(cells: Cells) -> Mask:
    """Find the cells around which the subject is as good as opaque on the whole."""
    opacity = window_mean(np.clip(cells.q, 0, 1), cells.solid.astype(np.float32))
    return cells.solid & ~cells.ring & (opacity >= BODY_MEAN)


def as_wholes(areas: Mask, chosen: Mask) -> Mask:
    """Choose all of a large connected area or nothing, as most of it is, so that none is torn."""
    parts = parts_of(areas)
    sizes = parts.sizes()
    large = parts.mask(sizes >= LARGE_AREA)
    return (chosen & ~large) | parts.mask(parts.sums(chosen) >= AREA_SHARE * sizes)


def without_glints(areas: Mask, chosen: Mask) -> Mask:
    """Leave out what is chosen of a connected area where that is little: a glint on glass."""
    parts = parts_of(areas)
    return chosen & ~parts.mask(parts.sums(chosen) < GLINT_SHARE * parts.sizes())


def judge_areas(cells: Cells, backdrop: Backdrop, subject: str) -> HuedAreas:
    """Find where the subject is opaque in spite of its hue, and where it is see-through."""
    nowhere, everywhere = np.zeros_like(cells.solid), np.ones_like(cells.solid)
    if subject == "translucent":
        return HuedAreas(opaque_bar(cells.q, nowhere), nowhere, nowhere, everywhere)
    hued = cells.solid & (cells.q < CERTAIN_Q) & (cells.q_range < EVEN_Q)
    step = steepest_step(cells.colour, cells.solid)
    flat_step = FLAT_STEP + GRAIN_STEP * backdrop.grain
    is_flat, key = step < flat_step, backdrop.key
    is_far = np.abs(cells.colour - key[:, None, None]).max(axis=0) > FAR
    even = hued & (is_flat | is_far)
    plateau = even & part_of_plateau(cells.colour, even) if even.any() else nowhere
    body = body_of(cells)
    if subject == "opaque" or not even.any():
        return HuedAreas(opaque_bar(cells.q, plateau), everywhere, body, nowhere)
    unmixed = unmixed_colour(cells.colour, cells.q, key)
    glow, shade = fading_cells(cells, unmixed, is_flat)
    fading = glow | shade
    level, colour_left = unmixed.max(axis=0), np.ptp(unmixed, axis=0)
    fades = objects_with(cells, fading, FADING_SHARE)
    is_clear = fades & objects_with(cells, glow & (level > DARK), CLEAR_SHARE)
    if hue_pairs(key):
        is_clear |= glass_of(cells, unmixed, plateau, key, flat_step)
    kept = ~is_clear & ~(fades & similar(unmixed, fades & fading))
    is_pane = (cells.q < PANE_Q) & (level > PANE_LEVEL) & (colour_left < PANE_COLOUR)
    opaque = kept & ~is_pane
    chosen = without_glints(hued, as_wholes(hued & (step < SAME_COLOUR), plateau & opaque))
    return HuedAreas(opaque_bar(cells.q, chosen), opaque, body & kept, is_clear)


# ── 10e · Certain pixels ──────────────────────────────────────────────────────────────────────────

EVEN_HUNDREDTHS = 5  # of q, in the flat middle of a thin stroke; 3: 0.1 % more holes; 8: -0.2 dB
STROKE_DISTANCE = 2  # pixels from the background to such a middle; 1, 3: -0.3, +0.1 dB
STROKE_DOUBT = 3  # deviations of the backdrop, divided by q, by which that colour may be wrong
STROKE_REACH = 12  # … and at most; a soft shadow is wider; 6: 0.3 % more holes where hues are alike
SEAM_DEPTH = 20  # hundredths of q below the most in 5x5; deeper is a gap that closes; none: -0.1 dB
STROKE_COLOUR = 14  # levels between channels that are no grey; 8: -0.1 dB; 24: alike


def certain_pixels(mixture: Mixture, areas: HuedAreas) -> tuple[Mask, Mask]:
    """All pixels that are certainly subject, and those of them that share the key's hue."""
    q, inner = mixture.q, ~dilate(mixture.faint, EDGE_WIDTH)
    hundredths = np.clip(q * np.float32(100), 0, 200).astype(np.uint8)
    hued = inner & (q < 1) & (hundredths >= enlarge(areas.opaque_from, q.shape, CELL))
    highest, lowest = around(hundredths, np.maximum), around(hundredths, np.minimum)
    summit, near = around(highest, np.maximum), dilate(mixture.faint, STROKE_REACH)
    hued &= ~near | (hundredths + np.uint8(SEAM_DEPTH) >= np.minimum(summit, 100))
    even = (highest - lowest <= EVEN_HUNDREDTHS) & (q < CERTAIN_Q)
    even &= ~dilate(mixture.faint, STROKE_DISTANCE) & near
    strokes = np.flatnonzero(even & enlarge(areas.may_be_opaque, q.shape, CELL))
    colours, key = mixture.colours_at(strokes), mixture.backdrop.key
    unmixed = unmixed_colour(colours, q.reshape(-1)[strokes], key)  # grey where q is alpha
    doubt = mixture.backdrop.deviation / np.maximum(q.reshape(-1)[strokes], LEAST_ALPHA)
    is_coloured = np.ptp(unmixed, axis=0) > STROKE_COLOUR + STROKE_DOUBT * doubt
    is_far = np.abs(colours - key[:, None]).max(axis=0) > FAR
    hued.reshape(-1)[strokes[is_coloured & is_far]] = True
    ridge = hundredths >= summit - np.minimum(summit, 1)  # the most in 5x5, or a hundredth less
    hued |= enlarge(areas.body, q.shape, CELL) & (q >= BODY_Q) & (q < 1)
    return (inner & (q >= CERTAIN_Q)) | (ridge & (q >= 1)) | hued, hued


# ── 10f · The others ──────────────────────────────────────────────────────────────────────────────
#
# An edge pixel looks in eight directions for pixels that are certainly subject, and takes the one
# whose line to the key it lies nearest to; a pixel of distance costs as much as a level, for the
# nearest colour is the likeliest. (Such rays and costs are those of Gastal and Oliveira 2010,
# "Shared Sampling for Real-Time Alpha Matting", who sample the background as well.)

LIGHT_COLOUR, LIGHT_RAMP = 5, 25  # levels between channels; 10, 40: +0.1, +0.2, the worst -0.2 dB
DULL_SATURATION, SATURATION_RAMP = 0.25, 0.4  # of dust; from 0.35, 0.5: -0.1, -0.4 dB in glass
DULL_LEVEL, DULL_RAMP = 180, 50  # levels of its brightest channel; from 150: +0.1 dB, pink dust
LILAC = 5  # levels of magenta; 12: alike
LIGHT_LEVEL = 0.95  # of the way to full in the brightest channel; 0.9: -0.1 dB; 1: alike
SEARCH_RADII = (6, 4, 3, 2)  # pixels, the nearest last; without 3: alike; 5, 3, 2: -6 dB in orbs
PLAIN_LEEWAY = 2  # levels between channels that rounding makes; 0, 4: alike
HUE_DOUBT = 40  # levels, where F has all of the key's hue; 25, 60: alike; 0: +0.1 dB
GREY_KEY_DOUBT = 255  # levels, where the key has no hue; 160, 400: alike
FREE_COST = 0.5  # levels that rounding costs; 0, 1: alike


def light_share(plain: F32, doubt: NDArray[Any]) -> F32:
    """How likely light is, from 0 to 1, where q for alpha gives a colour (3, n).

    Grey has no other alpha, and dust and smoke are dull: dark, and with little colour. But lilac is
    a rare dust, and what a yellow light looks like on blue.
    """
    colour_left, level = np.ptp(plain, axis=0), plain.max(axis=0)
    is_coloured = smoothstep((colour_left - LIGHT_COLOUR - doubt) / LIGHT_RAMP)
    is_vivid = smoothstep((colour_left / np.maximum(level, 1) - DULL_SATURATION) / SATURATION_RAMP)
    is_bright = smoothstep((level - DULL_LEVEL) / DULL_RAMP)
    is_lilac = np.minimum(plain[0], plain[2]) - plain[1] > LILAC
    share: F32 = is_coloured * np.where(is_lilac, 1, np.maximum(is_vivid, is_bright))
    return share


def thin_out(alpha: F32, mixture: Mixture, places: Places) -> None:
    """Take the least alpha whose colour can be shown, unless the colour is grey.

    For q to be its alpha, a colour's lit channel (of several, the weaker) would have to be exactly
    as bright as the brighter unlit one; light is likelier to have a full channel. GIMP's "Color to
    Alpha" takes the least for all pixels.
    """
    q, mixed = alpha.reshape(-1)[places], mixture.colours_at(places)
    key = mixture.backdrop.key[:, None]
    brighter = ((mixed - key) / np.maximum(255 - key, 1)).max(axis=0)
    darker = ((key - mixed) / np.maximum(key, 1)).max(axis=0)
    least = np.minimum(np.maximum(brighter / np.float32(LIGHT_LEVEL), darker), q)
    doubt = mixture.backdrop.deviation / np.maximum(q, np.float32(LEAST_ALPHA))
    weight = light_share(unmixed_colour(mixed, q, mixture.backdrop.key), doubt)
    alpha.reshape(-1)[places] = q + (least - q) * weight


def rays_from(places: Places, certain: Mask) -> Iterator[tuple[Places, F32, Places]]:
    """Look in each direction for the nearest certain pixels.

    Yields which of the places found one, how far away in pixels, and where.
    """
    width, margin = certain.shape[1], max(SEARCH_RADII)
    padded, (rows, columns) = np.pad(certain, margin), np.divmod(places, width)
    centres = (rows + margin) * padded.shape[1] + columns + margin
    for down, right in DIRECTIONS:
        reach, ahead = np.zeros(places.size, np.intp), down * padded.shape[1] + right
        for radius in SEARCH_RADII:
            np.copyto(reach, radius, where=padded.reshape(-1)[centres + radius * ahead])
        found = np.flatnonzero(reach)
        steps = reach[found]
        distance = steps * np.float32(math.hypot(down, right))
        yield found, distance, places[found] + steps * (down * width + right)


def project(mixed: F32, energy: F32, foreground: F32) -> tuple[F32, F32]:
    """Alpha on the line f = F - K, and |m - a·f|² = m·m - a·(2·m·f - a·f·f), with m = C - K."""
    along = np.einsum("ci,ci->i", mixed, foreground)
    length = np.maximum(np.einsum("ci,ci->i", foreground, foreground), 1)
    alpha = np.clip(along / length, 0, 1)
    return alpha, energy - alpha * (2 * along - alpha * length)


def best_foregrounds(mixture: Mixture, certain: Mask, places: Places) -> tuple[F32, F32, Places]:
    """Alpha by the certain colour of least cost around each pixel, that cost, and its place."""
    key = mixture.backdrop.key[:, None]
    mixed = mixture.colours_at(places) - key
    energy = np.einsum("ci,ci->i", mixed, mixed)
    best_alpha, best_cost = np.zeros_like(energy), np.full_like(energy, np.inf)
    best_source = places.copy()
    for found, distance, source in rays_from(places, certain):
        foreground = mixture.colours_at(source) - key
        alpha, misfit = project(mixed.take(found, axis=1), energy[found], foreground)
        cost = np.sqrt(np.maximum(misfit, 0)) + distance
        better = cost < best_cost[found]
        chosen = found[better]
        best_alpha[chosen], best_cost[chosen] = alpha[better], cost[better]
        best_source[chosen] = source[better]
    return best_alpha, best_cost, best_source


def fit_edges(alpha: F32, mixture: Mixture, certain: Mask, places: Places) -> None:
    """Move edge pixels from alpha q towards that by the best of the certain colours around them.

    q is exact for grey. The more colour it leaves, and the more of the key's hue F has, the less it
    is to be believed; and least where the key has no hue.
    """
    key, noise = mixture.backdrop.key, mixture.backdrop.deviation
    plain = alpha.reshape(-1)[places]
    fitted, cost, source = best_foregrounds(mixture, certain, places)
    colour_left = np.ptp(unmixed_colour(mixture.colours_at(places), plain, key), axis=0)
    hue_shared = 1 - np.minimum(key_free_share(mixture.colours_at(source), key), 1)
    doubt = noise + (HUE_DOUBT * hue_shared if hue_pairs(key) else GREY_KEY_DOUBT)
    leeway = np.square(plain * (PLAIN_LEEWAY + colour_left) + doubt)
    excess = np.square(np.maximum(cost - (FREE_COST + noise), 0))
    weight = leeway / (leeway + excess)
    alpha.reshape(-1)[places] = plain + (fitted - plain) * weight


# ── 10g · All of it ───────────────────────────────────────────────────────────────────────────────

OPEN_ALPHAS = (0.5, 0.98)  # below, a pixel is a way: through thin lines the first leads less often
ENCLOSED_RIM = 2  # pixels between an enclosed area and what is certainly around it
SETTLE_FROM, SETTLE_RAMP = 0.88, 0.075  # without: +0.4 dB in JPEGs, but 2 % more holes
LIGHT_RIM = 8  # levels by which most of it is brighter; painted rims have 12, composites up to 4
SHARES_HUE = 0.9  # q; below, an opaque pixel is reported to share the key's hue


def alpha_of(mixture: Mixture, certain: Mask, hued: Mask, see_through: Mask) -> F32:
    """Take q, or 1 where a subject shares the hue; thin out see-through cells; fit the edges."""
    alpha = np.clip(mixture.q, 0, 1)
    alpha[hued] = 1
    vague = ~(certain | mixture.background)
    if see_through.any():
        thin_out(alpha, mixture, np.flatnonzero(vague & enlarge(see_through, vague.shape, CELL)))
    fit_edges(alpha, mixture, certain, np.flatnonzero(vague & dilate(certain, max(SEARCH_RADII))))
    alpha[mixture.background] = 0
    if mixture.backdrop.deviation > UNEVEN:
        drop_specks(alpha)
    return alpha


def fill_enclosed(alpha: F32) -> None:
    """Make opaque what no way leads to from the border: a white eye on white, with its rim."""
    for least in OPEN_ALPHAS:
        parts = parts_of(alpha < least)
        outside = parts.at_border()
        enclosed = dilate(parts.mask(~outside), ENCLOSED_RIM)
        alpha[enclosed & ~dilate(parts.mask(outside), ENCLOSED_RIM)] = 1


def settle(alpha: F32) -> F32:
    """Lift what lossy compression has left slightly short of opaque."""
    lifted: F32 = alpha + (1 - alpha) * np.clip((alpha - SETTLE_FROM) / SETTLE_RAMP, 0, 1)
    return lifted


def straight(planes: Planes, mixture: Mixture, alpha: F32) -> tuple[Planes, U8]:
    """8-bit straight colour and alpha; what the model calls opaque keeps the input's very values.

    Not so what was only settled to opaque, and the rim in coarse chroma: either shows the key.
    """
    mixed_share = np.rint(alpha * 255).astype(np.uint8)
    is_mixed, matte = (mixed_share > 0) & (mixed_share < 255), mixed_share
    if mixture.is_sharpened:
        is_mixed |= (mixed_share == 255) & dilate(mixture.background, EDGE_WIDTH)
        matte = np.rint(settle(alpha) * 255).astype(np.uint8)
    places = np.flatnonzero(is_mixed)
    mixed, shares = mixture.colours_at(places), alpha.reshape(-1)[places]
    unmixed = np.rint(unmixed_colour(mixed, shares, mixture.backdrop.key)).astype(np.uint8)
    straight_planes = blank_where(planes, matte == 0)
    for plane, values in zip(straight_planes, unmixed, strict=True):
        plane.reshape(-1)[places] = values
    return straight_planes, matte


def cap_rim(planes: Planes, matte: U8) -> None:
    """Let a light rim that a model painted be no brighter than what lies behind it, in place.

    Against its key such a rim is no fault; on a dark ground it is a bright broken line.
    """
    empty = matte == 0
    near = dilate(empty, EDGE_WIDTH)
    places = np.flatnonzero(~empty & near)
    brightest, is_open = np.zeros((3, places.size), np.uint8), np.ones(places.size, np.bool_)
    for found, _, source in rays_from(places, (matte == 255) & ~near):
        is_open[found] = False
        for levels, plane in zip(brightest, planes, strict=True):
            levels[found] = np.maximum(levels[found], plane.reshape(-1)[source])
    brightest[:, is_open] = 255  # nothing solid is behind them
    rim = np.stack([plane.reshape(-1)[places] for plane in planes])
    lighter = rim.mean(axis=0) - brightest.mean(axis=0)
    is_mixed = matte.reshape(-1)[places] < 255
    if is_mixed.any() and np.median(lighter[is_mixed]) > LIGHT_RIM:
        for plane, levels in zip(planes, np.minimum(rim, brightest), strict=True):
            plane.reshape(-1)[places] = levels


def cut_by_unmixing(picture: Picture, key: Colour, method: UnmixMethod) -> Cutout:
    """Recover alpha and straight colour of a picture of mixtures."""
    mixture = mixture_of(picture.planes, key)
    areas = judge_areas(cells_of(mixture), mixture.backdrop, method.subject)
    certain, hued = certain_pixels(mixture, areas)
    alpha = alpha_of(mixture, certain, hued, areas.see_through)
    kept = {"auto": not hue_pairs(mixture.backdrop.key), "keep": True, "remove": False}
    if kept[method.enclosed]:
        fill_enclosed(alpha)
    planes, matte = straight(picture.planes, mixture, alpha)
    if mixture.backdrop.is_painted:
        cap_rim(planes, matte)
    if picture.alpha is not None:
        matte = np.rint(matte * (picture.alpha / 255.0)).astype(np.uint8)
        planes = blank_where(planes, matte == 0)
    matched = bool(mixture.background.any())
    return Cutout(planes, matte, key, matched, hued & (mixture.q < SHARES_HUE))


# ── 11 · Edge ─────────────────────────────────────────────────────────────────────────────────────


def bleed_colour(planes: Planes, alpha: U8, blur: ImageFilter.GaussianBlur) -> Planes:
    """Give what the feather will uncover the colour of its surroundings instead of black."""
    weight = np.asarray(Image.fromarray(alpha).filter(blur)).astype(np.float32)
    bled = []
    for plane in planes:  # premultiplied (Porter and Duff 1984), colours can be averaged
        premultiplied = np.rint(plane * (alpha / np.float32(255))).astype(np.uint8)
        blurred = np.asarray(Image.fromarray(premultiplied).filter(blur))
        colour = np.minimum(np.rint(blurred * (255 / np.maximum(weight, 1))), 255)
        bled.append(np.where(alpha == 0, colour.astype(np.uint8), plane))
    return tuple(bled)


def contract_and_feather(cutout: Cutout, job: Job) -> Cutout:
    """Choke the matte with 3x3 minimum filters, then blur it."""
    if not job.edge_contract and not job.edge_feather:
        return cutout
    is_unmixed = isinstance(job.method, UnmixMethod)
    planes, matte = cutout.planes, Image.fromarray(cutout.alpha)
    for _ in range(job.edge_contract):
        matte = matte.filter(ImageFilter.MinFilter(3))
    if job.edge_feather:
        blur = ImageFilter.GaussianBlur(job.edge_feather)
        if is_unmixed:
            planes = bleed_colour(planes, np.asarray(matte), blur)
        matte = matte.filter(blur)
    alpha = np.asarray(matte)
    if is_unmixed:
        planes = blank_where(planes, alpha == 0)
    return cutout._replace(planes=planes, alpha=alpha)


# ── 12 · Self-check ───────────────────────────────────────────────────────────────────────────────
#
# Beside the composites, the limits were measured on 15 painted pictures and 10 drawn ones, whose
# cut-outs were looked at, and on the same pictures cut out badly on purpose: as glass, by an older
# version that left veils, and by the plain mattes.

# ── 12a · Measures ────────────────────────────────────────────────────────────────────────────────

FLAT_BORDER_DISTANCE = 40  # levels from the key; of the composites' borders 99 % are within 10
FLAT_BORDER_SHARE = 0.6  # the rest may be a subject that leaves the picture; composites have 1
SPREAD_PERCENTILE = 90  # for the report alone
LEAST_SHARE = 0.002  # less removed or left is nothing; composites have at least 0.3 and 0.1
SPILL_LIMIT = 4  # levels; good ones have up to 2.4
RIM_WIDTH, RIM_INSIDE = 2, (4, 8)  # pixels from the background: the rim, and what is behind it
RIM_LIMIT, RIM_BAD = 16, 40  # levels; good ones have up to 10, hard mattes from 58
NEAR_KEY, OPAQUE_KEY_SHARE = 48, 0.0005  # levels from it; no good one has any, a hard matte 0.003
HUE_REACH = 8  # pixels from an opaque area in the key's hue, where edges are so by right
KEY_HUED_SHARE = 0.05  # of what is visible; good ones with areas of several parts have up to 0.04
CRISP_PART, CRISP_PARTIAL = 0.9, 0.25  # one area is that much of them, with so few partial pixels
GROUND_LEVELS = 24  # levels from the key, around a pixel that is ground for the interior …
INTERIOR_REACH = 6  # … which begins so many pixels farther
SOLID_ALPHA, SEE_THROUGH_SHARE = 224, 0.03  # are below there; good bodies have up to 0.02
CUT_SHARE = 0.01  # of a side; composites have 0
FRAME_SHARE = 0.12  # of the shorter side is the widest frame
FRAME_RIM = 2  # pixels of a soft edge inside it
FRAME_FLAT = 0.9  # of what adjoins it is opaque and of one colour
PATTERN_DEPTH = 2  # pixels from the border, where its tones are looked at
PATTERN_SPLIT = 0.85  # of the variance is between two tones; noise has 0.64, a slow drift 0.75 …
PATTERN_LEVELS, PATTERN_SHARE = 8, 0.2  # … which are so far apart, and the rarer so common …
PATTERN_TURNS = 16  # … and follow each other so often around the picture


def key_tint(planes: Planes, key: Colour) -> U8:
    """How far the key's channels stand above the others; nowhere where the key has no hue."""
    channels = lit_channels(key)
    if not channels or len(channels) == len(planes):
        return np.zeros_like(planes[0])
    strength, rest = key_strength_and_rest(planes, channels)
    tint: U8 = np.maximum(strength, rest) - rest
    return tint


def rim_tint(planes: Planes, alpha: U8, key: Colour) -> float:
    """By how many levels of the key the rim is above what lies a few pixels behind it."""
    empty = alpha == 0
    rim = ~empty & dilate(empty, RIM_WIDTH)
    inside = (alpha >= SOLID_ALPHA) & dilate(empty, RIM_INSIDE[1]) & ~dilate(empty, RIM_INSIDE[0])
    tint = key_tint(planes, key) * (alpha / np.float32(255))
    means = [float(tint[area].mean()) if area.any() else 0.0 for area in (rim, inside)]
    return max(0.0, means[0] - means[1])


def spill_level(cutout: Cutout) -> float:
    """Mean key tint that shows in partial pixels away from what has it itself, levels of 255."""
    alpha = cutout.alpha
    own_tint = dilate(cutout.key_hued & (alpha == 255), HUE_REACH)
    partly = np.flatnonzero((alpha > 0) & (alpha < 255) & ~own_tint)
    partial_planes = tuple(plane.reshape(-1)[partly] for plane in cutout.planes)
    tint = key_tint(partial_planes, cutout.key)
    return float((tint * (alpha.reshape(-1)[partly] / 255.0)).sum() / max(1, partly.size))


def opaque_key_share(cutout: Cutout) -> float:
    """Share of the visible pixels that are as good as opaque, and of the key colour."""
    if not hue_pairs(np.array(cutout.key, np.float32)):  # white eyes are kept on white
        return 0.0
    left = (cutout.alpha >= SOLID_ALPHA) & (key_distance(cutout.planes, cutout.key) <= NEAR_KEY)
    return float(left.sum() / max(1, np.count_nonzero(cutout.alpha)))


def see_through_share(picture: Picture, cutout: Cutout) -> float:
    """Share of the visible pixels that are not solid far from any edge: glass, or an eaten body."""
    is_ground = key_distance(picture.planes, cutout.key) <= GROUND_LEVELS
    ground = around(is_ground, np.logical_and)  # single pixels are noise
    wide = np.pad(ground, 1, constant_values=True)  # and outside of the picture all is ground
    inner = ~dilate(wide, INTERIOR_REACH + 1)[1:-1, 1:-1]
    thin = inner & (cutout.alpha < SOLID_ALPHA)
    if picture.alpha is not None:
        thin &= picture.alpha > 0  # what was transparent already is no subject
    return float(thin.sum() / max(1, np.count_nonzero(thin | (cutout.alpha > 0))))


def is_crisp(hued: Mask, alpha: U8) -> bool:
    """Tell whether what shares the key's hue is one opaque area, which comes out well."""
    parts = parts_of(hued)
    sizes = parts.sizes()
    if not sizes.size or sizes.max() < CRISP_PART * sizes.sum():
        return False
    near = alpha[dilate(parts.mask(sizes == sizes.max()), HUE_REACH)]
    return float(((near > 0) & (near < 255)).mean()) < CRISP_PARTIAL


def coverage_of(alpha: U8) -> Coverage:
    """Count what a matte covers."""
    transparent = alpha.size - int(np.count_nonzero(alpha))
    opaque = int(np.count_nonzero(alpha == 255))
    corners = alpha[[0, 0, -1, -1], [0, -1, 0, -1]]
    sides = {"top": alpha[0], "right": alpha[:, -1], "bottom": alpha[-1], "left": alpha[:, 0]}
    return Coverage(
        transparent=transparent,
        partial=alpha.size - transparent - opaque,
        opaque=opaque,
        corners_transparent=int(np.count_nonzero(corners == 0)),
        sides_cut=tuple(side for side, line in sides.items() if (line > 127).mean() > CUT_SHARE),
    )


def is_patterned(planes: Planes) -> bool:
    """Tell whether two tones alternate along the border, as in a painted checkerboard.

    The tones are parted where the variance between them is largest (Otsu 1979).
    """
    grey = np.rint(sum(plane.astype(np.float32) for plane in planes) / 3).astype(np.intp)
    depth = min(PATTERN_DEPTH, *(length - 1 for length in grey.shape))
    lines = grey[depth], grey[:, -1 - depth], grey[-1 - depth, ::-1], grey[::-1, depth]
    ring = np.concatenate(lines)
    counts = np.bincount(ring, minlength=256) / ring.size
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = np.maximum(1 - below, 1e-9)
    between = np.square(sums[-1] * below - sums) / (np.maximum(below, 1e-9) * above)
    limit = int(between.argmax())
    is_light = ring > limit
    share = min(is_light.mean(), 1 - is_light.mean())
    if share < PATTERN_SHARE or between[limit] < PATTERN_SPLIT * ring.var():
        return False
    step = ring[is_light].mean() - ring[~is_light].mean()
    return bool(step > PATTERN_LEVELS and np.count_nonzero(np.diff(is_light)) >= PATTERN_TURNS)


def colour_in_frame(planes: Planes, alpha: U8) -> Colour | None:
    """Find the flat colour with a hue that fills the picture up to a narrow straight frame."""
    visible = alpha >= SOLID_ALPHA
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    height, width = alpha.shape
    margins = top, height - 1 - bottom, left, width - 1 - right
    if not 0 < min(margins) <= max(margins) <= FRAME_SHARE * min(height, width):
        return None
    inner = np.s_[top + FRAME_RIM : bottom - FRAME_RIM, left + FRAME_RIM : right - FRAME_RIM]
    samples = border_samples(tuple(plane[inner] for plane in planes))
    colour = np.median(samples, axis=0)
    is_flat = np.abs(samples - colour).max(axis=1) <= FLAT_BORDER_DISTANCE
    solid = border_samples((visible[inner].astype(np.uint8),))[:, 0] > 0
    if (is_flat & solid).mean() < FRAME_FLAT or not hue_pairs(colour):
        return None
    red, green, blue = np.rint(colour).astype(int).tolist()
    return red, green, blue


# ── 12b · Complaints ──────────────────────────────────────────────────────────────────────────────

CUT_OUT = "cut it out with --auto-key border --unmix"


class Complaint(NamedTuple):
    """What is probably wrong and what to do about it, and the verdict that follows from it."""

    verdict: str
    sentence: str


def about_input(picture: Picture) -> Iterator[Complaint]:
    """Find out that there was nothing to do."""
    if is_unseen(picture.alpha, border_samples):
        what = (
            "its border was transparent already; unless the key was left inside, use it as it was"
        )
        yield Complaint("look", what)


def about_key(check: SelfCheck, cutout: Cutout) -> Iterator[Complaint]:
    """Find out that the key colour is none."""
    key, coverage = hex_colour(cutout.key), check.coverage
    if not cutout.matched:
        yield Complaint("bad", f"no pixel matched the key colour {key}; try --auto-key border")
    elif coverage.transparent < LEAST_SHARE * coverage.pixels:
        what = f"next to nothing was removed for the key colour {key}"
        yield Complaint("bad", f"{what}; try --auto-key border")
    if coverage.pixels - coverage.transparent < LEAST_SHARE * coverage.pixels:
        what = f"next to nothing is left; is {key} the colour of the subject?"
        yield Complaint("bad", what)


BORDER_FAULTS = {
    "pattern": Complaint(
        "bad",
        "the border is a pattern of two tones, as of a painted checkerboard; make the picture "
        "again on one flat colour",
    ),
    "uneven": Complaint(
        "bad",
        "only {uniform:.0%} of the border is near {key}, so the background is no flat colour; make "
        "the picture again on a flat one",
    ),
    "frame": Complaint(
        "bad", "the border is a frame of {key} around a flat {inner}; crop it off, and cut that out"
    ),
    "no hue": Complaint(
        "look",
        "the background {key} has no hue, so what the subject has of its brightness may be lost; "
        "make the picture again, or edit a photograph, onto #00ff00 or #ff00ff",
    ),
}


def border_kind(picture: Picture, cutout: Cutout, uniform: float) -> tuple[str, Colour | None]:
    """Say what the border is, and what stands inside if it is a frame."""
    inner = colour_in_frame(picture.planes, cutout.alpha)
    kinds = {
        "pattern": is_patterned(picture.planes),
        "uneven": uniform < FLAT_BORDER_SHARE,
        "frame": inner is not None,
        "no hue": not hue_pairs(np.array(cutout.key, np.float32)),
        "flat": True,
    }
    return next(kind for kind, is_so in kinds.items() if is_so), inner


def about_border(check: SelfCheck, cutout: Cutout) -> Iterator[Complaint]:
    """Find out that the background is no flat colour, or that the subject is not clear of it."""
    if check.border in BORDER_FAULTS:
        verdict, sentence = BORDER_FAULTS[check.border]
        inner = hex_colour(check.framed or cutout.key)
        values = {"key": hex_colour(cutout.key), "inner": inner, "uniform": check.border_uniform}
        yield Complaint(verdict, sentence.format(**values))
    yield from about_edges(check.coverage)


def about_brightness(check: SelfCheck, cutout: Cutout) -> Iterator[Complaint]:
    """Find out that the subject was lost, since it is as bright as a key without a hue."""
    if check.border == "no hue" and check.coverage.partial > check.coverage.opaque:
        what = f"most of the subject was lost, being as bright as the {hex_colour(cutout.key)}"
        yield Complaint("bad", f"{what} around it; make the picture again on a colour")


def about_edges(coverage: Coverage) -> Iterator[Complaint]:
    """Find out that what is seen touches the border."""
    space = "make it again with space around the subject"
    if coverage.sides_cut:
        what = f"the subject is cut by the {' and '.join(coverage.sides_cut)} of the picture"
        yield Complaint("look", f"{what}; {space}")
    elif coverage.corners_transparent < 4:
        what = f"only {coverage.corners_transparent} of the four corners are empty"
        yield Complaint("look", f"{what}; {CUT_OUT}, or {space}")


def about_rim(level: float, key: Colour) -> Iterator[Complaint]:
    """Find out that the edge has more of the key colour than what lies behind it."""
    if level > RIM_LIMIT:
        what = f"its edge has {level:.0f} levels more of {hex_colour(key)} than what is behind it"
        verdict = "bad" if level > RIM_BAD else "look"
        yield Complaint(verdict, f"{what}; {CUT_OUT}, or add --edge-contract 1")


def about_subject(check: SelfCheck, cutout: Cutout) -> Iterator[Complaint]:
    """Find out that the subject was kept or removed in the wrong places."""
    key, again = hex_colour(cutout.key), "make it again on another key colour"
    if check.residual_spill > SPILL_LIMIT:
        what = f"{check.residual_spill:.0f} levels of {key} shine through the edges"
        yield Complaint("look", f"{what}; use --unmix, or {again}")
    if check.opaque_key > OPAQUE_KEY_SHARE:
        what = f"{check.opaque_key:.2%} of what is left is opaque and nearly {key}"
        yield Complaint("look", f"{what}; if it is background, use --unmix, or {again}")
    if check.see_through > SEE_THROUGH_SHARE:
        what = f"{check.see_through:.0%} of the subject is see-through away from its edges"
        no_glass = "if it is no glass, smoke, glow or shadow, use --unmix with --subject opaque"
        yield Complaint("look", f"{what}; {no_glass}")
    if check.key_hued > KEY_HUED_SHARE and not is_crisp(cutout.key_hued, cutout.alpha):
        what = f"{check.key_hued:.0%} of the subject shares the hue of {key}; {again}"
        yield Complaint("look", f"{what}, or if it is glass use --unmix with --subject translucent")


def worst(found: Iterable[Complaint]) -> str:
    """Give the worst verdict."""
    return max([VERDICTS[0], *(each.verdict for each in found)], key=VERDICTS.index)


def self_check(picture: Picture, cutout: Cutout) -> SelfCheck:
    """Measure what tells a good cut-out from a bad one."""
    alpha = cutout.alpha
    off_key = np.abs(border_samples(picture.planes) - np.array(cutout.key, np.int16)).max(axis=-1)
    uniform = float((off_key <= FLAT_BORDER_DISTANCE).mean())
    border, framed = border_kind(picture, cutout, uniform)
    check = SelfCheck(
        coverage_of(alpha),
        border_uniform=uniform,
        border_spread=float(np.percentile(off_key, SPREAD_PERCENTILE)),
        border=border,
        framed=framed,
        residual_spill=spill_level(cutout),
        rim_tint=rim_tint(cutout.planes, alpha, cutout.key),
        opaque_key=opaque_key_share(cutout),
        key_hued=float(cutout.key_hued.sum() / max(1, np.count_nonzero(alpha))),
        see_through=see_through_share(picture, cutout),
    )
    found = [*about_input(picture), *about_key(check, cutout), *about_border(check, cutout)]
    found += [*about_brightness(check, cutout), *about_subject(check, cutout)]
    found += about_rim(check.rim_tint, cutout.key)
    return check._replace(verdict=worst(found), warnings=tuple(each.sentence for each in found))


# ── 13 · Inspection ───────────────────────────────────────────────────────────────────────────────
#
# Of a picture that should be transparent already nothing is known but itself. The limits were
# measured on 13 originals with their own alpha, and on the cut-outs of section 12, good and bad.

LIKELY_KEYS = ((0, 255, 0), (255, 0, 255), (0, 0, 255))
KEY_LEFT_DISTANCE = 40  # levels from such a key, in opaque pixels …
KEY_LEFT_SHARE = 0.005  # … that are at least so many of the visible ones
FAINT_ALPHA, ISLAND_ALPHA = 32, 64  # haze is faint at the border, or nowhere more than an island
HAZE_SHARE = 0.0002  # of all pixels; cut-outs have up to 0.00004, with veils from 0.0004


def haze_share(alpha: U8) -> float:
    """Share of the pixels that are faint and belong to nothing, or reach the border."""
    visible, faint = parts_of(alpha > 0), parts_of((alpha > 0) & (alpha <= FAINT_ALPHA))
    haze = visible.mask(visible.largest(alpha) < ISLAND_ALPHA) | faint.mask(faint.at_border())
    return float(haze.mean())


def key_left_in(picture: Picture, alpha: U8) -> tuple[Colour | None, float]:
    """Find a key colour that was left over, and how far it tints the rim."""
    tints = {key: rim_tint(picture.planes, alpha, key) for key in LIKELY_KEYS}
    key = max(LIKELY_KEYS, key=tints.__getitem__)
    if tints[key] > RIM_LIMIT:
        return key, tints[key]
    visible = int(np.count_nonzero(alpha))
    for key in LIKELY_KEYS:
        left = (alpha >= SOLID_ALPHA) & (key_distance(picture.planes, key) <= KEY_LEFT_DISTANCE)
        if left.sum() > KEY_LEFT_SHARE * visible:
            return key, tints[key]
    return None, max(tints.values())


def about_alpha(check: AlphaCheck) -> Iterator[Complaint]:
    """Find out that next to nothing is transparent, or next to nothing else."""
    coverage, pixels = check.coverage, check.coverage.pixels
    remedy = CUT_OUT if check.key_left else "make it again on a flat key colour and cut it out"
    if coverage.opaque == pixels:
        what = "its alpha is opaque everywhere" if check.has_alpha else "it has no alpha"
        yield Complaint("bad", f"{what}; {remedy}")
    elif coverage.transparent < LEAST_SHARE * pixels:
        yield Complaint("bad", f"next to nothing of it is transparent; {remedy}")
    elif pixels - coverage.transparent < LEAST_SHARE * pixels:
        yield Complaint("bad", "next to nothing of it is visible; make it again")
    else:
        yield from about_edges(coverage)
    if check.patterned:
        yield Complaint(
            "bad", f"a checkerboard is painted where it should be transparent; {remedy}"
        )


def about_leftovers(check: AlphaCheck) -> Iterator[Complaint]:
    """Find out that something of the background was left."""
    if check.haze > HAZE_SHARE:
        yield Complaint(
            "look",
            f"a haze covers {check.haze:.2%} of it beside the subject, if that is no soft edge, "
            f"smoke or glow: look at it, or {CUT_OUT}",
        )
    if check.key_left is not None:
        yield from about_rim(check.rim_tint, check.key_left)
    if check.key_left is not None and check.rim_tint <= RIM_LIMIT:
        what = f"parts of it have the key colour {hex_colour(check.key_left)}"
        yield Complaint("look", f"{what}; if they are background, cut it out again")


def alpha_check(picture: Picture) -> AlphaCheck:
    """Judge a picture that should be transparent already."""
    alpha = np.full_like(picture.planes[0], 255) if picture.alpha is None else picture.alpha
    key, level = key_left_in(picture, alpha)
    check = AlphaCheck(
        coverage_of(alpha),
        has_alpha=picture.alpha is not None,
        patterned=not is_unseen(alpha, border_samples) and is_patterned(picture.planes),
        haze=haze_share(alpha),
        key_left=key,
        rim_tint=level,
    )
    found = [*about_alpha(check), *about_leftovers(check)]
    return check._replace(verdict=worst(found), warnings=tuple(each.sentence for each in found))


# ── 14 · Preview ──────────────────────────────────────────────────────────────────────────────────
#
# Two rows of four tiles, on black, white, a checkerboard and a ground as uneven as a photograph:
# above the whole cut-out, below the part of its edge where most is to be seen, enlarged. Veils show
# on black, dark rims on white, holes on the checkerboard, and key colour on the last.

TILE, GAP = 384, 8  # pixels; four tiles are as wide as most viewers show
ZOOM = 6
CHECK = 16  # pixels of a square
OCTAVES = (3, 6, 12, 24, 48, 96)  # blots along a side of the uneven ground, the weaker the smaller
BLOT_LEVELS = 60  # of the largest
LANDSCAPE = ((110, 150, 205), (235, 205, 165), (120, 95, 70), (40, 55, 35))  # from top to bottom
TINTED = 16  # levels of key colour that the eye sees at an edge …
TINTED_WEIGHT = 4  # … and is to be led to


def uneven_ground() -> U8:
    """Blots of all sizes between a sky and a soil, always the same."""
    random, blots = np.random.default_rng(1), np.zeros((TILE, TILE), np.float32)
    for number in OCTAVES:
        octave = Image.fromarray(random.normal(0, 1, (number, number)).astype(np.float32))
        blots += np.asarray(octave.resize((TILE, TILE), Image.Resampling.BICUBIC)) / number**0.5
    heights = np.linspace(0, 1, TILE)
    places = np.linspace(0, 1, len(LANDSCAPE))
    colours = [np.interp(heights, places, levels) for levels in zip(*LANDSCAPE, strict=True)]
    ground = np.stack(colours, axis=-1)[:, None] + BLOT_LEVELS * blots[..., None]
    return np.clip(ground, 0, 255).astype(np.uint8)


def grounds() -> list[Image.Image]:
    """Draw what the cut-out is laid on."""
    rows, columns = np.indices((TILE, TILE)) // CHECK
    checkerboard = np.where((rows + columns) % 2, np.uint8(160), np.uint8(224))
    flat = [np.full((TILE, TILE, 3), level, np.uint8) for level in (0, 255)]
    drawn = [*flat, np.stack([checkerboard] * 3, axis=-1), uneven_ground()]
    return [Image.fromarray(ground).convert("RGBA") for ground in drawn]


def busiest_window(cutout: Cutout, side: int) -> tuple[int, int]:
    """Top and left of the square that shows most of an edge, above all where it has a tint."""
    alpha, step = cutout.alpha, side // 4
    edge = around(alpha, np.maximum) != around(alpha, np.minimum)
    tinted = edge & (alpha > 0) & (key_tint(cutout.planes, cutout.key) > TINTED)
    cells = blocks(edge + TINTED_WEIGHT * tinted.astype(np.int64), np.add, step)
    height, width = (min(4, length) for length in cells.shape)
    sums = np.lib.stride_tricks.sliding_window_view(cells, (height, width)).sum(axis=(2, 3))
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(top) * step, int(left) * step


def fitted(image: Image.Image) -> Image.Image:
    """Scale to a tile; what is smaller than that by a whole number."""
    scale = min(TILE / length for length in image.size)
    if scale < 1:
        image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
        return image
    width, height = (int(scale) * length for length in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST)


def preview_of(cutout: Cutout) -> Image.Image:
    """Lay the whole cut-out and its busiest edge on each ground."""
    whole = Image.fromarray(np.stack([*cutout.planes, cutout.alpha], axis=-1))
    side = TILE // ZOOM
    top, left = busiest_window(cutout, side)
    detail = whole.crop((left, top, left + side, top + side))
    sheet = Image.new("RGB", (4 * TILE + 5 * GAP, 2 * TILE + 3 * GAP), (128, 128, 128))
    drawn = grounds()
    for row, image in enumerate((fitted(whole), fitted(detail))):
        middle = (TILE - image.width) // 2, (TILE - image.height) // 2
        for column, ground in enumerate(drawn):
            tile = ground.copy()
            tile.alpha_composite(image, middle)
            place = GAP + column * (TILE + GAP), GAP + row * (TILE + GAP)
            sheet.paste(tile.convert("RGB"), place)
    return sheet


def preview_files(cutout: Cutout, preview: Path | None) -> tuple[File, ...]:
    """Encode the preview, if one is wanted."""
    if preview is None:
        return ()
    buffer = BytesIO()
    preview_of(cutout).save(buffer, PREVIEW_FORMATS[preview.suffix.lower()])
    return (File(preview, buffer.getvalue()),)


# ── 15 · Write ────────────────────────────────────────────────────────────────────────────────────


def png(pixels: U8, profile: bytes | None) -> bytes:
    """Encode RGBA (h, w, 4) as PNG, in half of Pillow's time at about the size of its default."""
    height, width = pixels.shape[:2]
    lines = pixels.reshape(height, 4 * width)
    filtered = np.empty((height, 4 * width + 1), np.uint8)
    filtered[:, 0] = 2  # Up; Pillow tries five filters on every row, which suits cut-outs no better
    filtered[0, 1:] = lines[0]
    np.subtract(lines[1:], lines[:-1], out=filtered[1:, 1:])
    deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)),
        *([(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))] if profile else []),
        (b"IDAT", deflate.compress(filtered.data) + deflate.flush()),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def encode(cutout: Cutout, target: Path, profile: bytes | None) -> bytes:
    """PNG or lossless WebP of straight RGBA."""
    pixels = np.stack([*cutout.planes, cutout.alpha], axis=-1)
    if OUTPUT_FORMATS[target.suffix.lower()] == "PNG":
        return png(pixels, profile)
    buffer, settings = BytesIO(), {"lossless": True, "exact": True, "method": 4}
    Image.fromarray(pixels).save(buffer, "WEBP", icc_profile=profile or b"", **settings)
    return buffer.getvalue()


def write_new(target: Path, data: bytes, *, force: bool) -> None:
    """Put `data` at `target` whole or not at all; without `force` never in place of a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.urandom(4).hex()}.tmp")  # also beside the longest of names
    try:
        with temporary.open("xb") as file:
            file.write(data)
        if not force:  # claim the name, by a hard link or where there are none by an empty file
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise
            except OSError:
                target.open("xb").close()
        if force or not target.samefile(temporary):
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


# ── 16 · Report ───────────────────────────────────────────────────────────────────────────────────


def text_lines(outcome: Outcome) -> list[str]:
    """Say what was written, in words that programs which read them rely on."""
    if isinstance(outcome, Failed):
        return []
    if isinstance(outcome, Inspected):
        return [shown(f"Inspected {outcome.job.source}: {outcome.check.verdict}")]
    coverage, preview = outcome.check.coverage, outcome.job.preview
    return [
        shown(f"Wrote {outcome.job.target}"),
        f"Key color: {hex_colour(outcome.key)}",
        f"Transparent pixels: {coverage.transparent}/{coverage.pixels}",
        f"Partially transparent pixels: {coverage.partial}/{coverage.pixels}",
        *([shown(f"Wrote {preview}")] if preview else []),
    ]


def as_json(fields: Mapping[str, object]) -> str:
    """JSON in characters that stdout can carry and a terminal does not obey."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(fields, ensure_ascii=not is_unicode)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def coverage_fields(coverage: Coverage) -> dict[str, object]:
    """Tell a matte in shares."""
    return {
        "transparent": round(coverage.transparent / coverage.pixels, 4),
        "partial": round(coverage.partial / coverage.pixels, 4),
        "opaque": round(coverage.opaque / coverage.pixels, 4),
        "corners_transparent": coverage.corners_transparent,
    }


def check_fields(check: SelfCheck | AlphaCheck) -> dict[str, object]:
    """Tell how all checks end."""
    return {
        "touches_border": list(check.coverage.sides_cut),
        "verdict": check.verdict,
        "warnings": list(check.warnings),
    }


def fields_of(outcome: Outcome) -> dict[str, object]:
    """Give one object for one picture."""
    job = outcome.job
    if isinstance(outcome, Failed):
        return {"input": str(job.source), "output": None, "error": outcome.reason}
    width, height = outcome.size
    if isinstance(outcome, Inspected):
        return {
            "input": str(job.source),
            "width": width,
            "height": height,
            "alpha": outcome.check.has_alpha,
            **coverage_fields(outcome.check.coverage),
            "haze": round(outcome.check.haze, 4),
            "key_left": outcome.check.key_left and hex_colour(outcome.check.key_left),
            **check_fields(outcome.check),
        }
    check, preview = outcome.check, outcome.job.preview
    return {
        "input": str(job.source),
        "output": str(outcome.job.target),
        "preview": preview and str(preview),
        "width": width,
        "height": height,
        "key_color": hex_colour(outcome.key),
        "border_uniform": round(check.border_uniform, 4),
        "border_spread": round(check.border_spread, 1),
        "border": check.border,
        **coverage_fields(check.coverage),
        "residual_spill": round(check.residual_spill, 2),
        "rim_tint": round(check.rim_tint, 2),
        "opaque_key": round(check.opaque_key, 4),
        "key_hued": round(check.key_hued, 4),
        "see_through": round(check.see_through, 4),
        **check_fields(check),
    }


ADVICE = {
    "look": "look at it on a dark and on a light ground",
    "bad": "do not use it as it is",
}


class Report:
    """Tells each outcome as it comes in; the exit code is 1 once a picture is missing."""

    def __init__(self, *, as_json: bool, strict: bool) -> None:
        self.as_json, self.strict = as_json, strict
        self.exit_code = 0

    def add_check(self, name: str, check: SelfCheck | AlphaCheck, *, strict: bool) -> None:
        """Tell what a check found, and its verdict unless that is good."""
        for warning in check.warnings:
            say(f"Warning: {name}: {warning}")
        is_failure = strict and check.verdict == VERDICTS[-1]
        if is_failure:
            self.exit_code = 1
        if check.verdict in ADVICE:
            kind = "Error" if is_failure else "Warning"
            say(f"{kind}: {name}: verdict {check.verdict}: {ADVICE[check.verdict]}")

    def add(self, outcome: Outcome) -> None:
        """Tell one outcome."""
        if isinstance(outcome, Failed):
            self.exit_code = 1
            say(f"Error: {outcome.job.source}: {outcome.reason}")
        else:
            strict = self.strict or isinstance(outcome, Inspected)
            self.add_check(str(outcome.job.source), outcome.check, strict=strict)
        for line in [as_json(fields_of(outcome))] if self.as_json else text_lines(outcome):
            if problem := put(line):
                self.exit_code = 1
                say(f"Error: {problem}; the work is done all the same")


# ── 17 · Signals ──────────────────────────────────────────────────────────────────────────────────

ENDING_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, the system's, a terminal that closes


def ending_signals() -> list[signal.Signals]:
    """List the signals that end a run; one that is ignored from the start, by nohup, stays so."""
    known = [getattr(signal, name) for name in ENDING_SIGNALS if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def interrupt(*_: object) -> NoReturn:
    """End the run in order, once: what is heard while it ends changes nothing."""
    for number in ending_signals():
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def signals_taken() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does."""
    before = {}
    with contextlib.suppress(ValueError):  # only the main thread has signals
        for number in ending_signals():
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        before.clear()  # the process is about to end, and a second signal is not to kill it
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keep signals back for a moment; a worker that is starting could not take them yet."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ── 18 · Run ──────────────────────────────────────────────────────────────────────────────────────

JOBS_AHEAD = 4  # for each worker; few finished pictures wait in memory for a slow one before them


def cut_out(picture: Picture, job: Job) -> Done:
    """Cut one picture out, in memory."""
    key = key_of(picture, job)
    if isinstance(job.method, UnmixMethod):
        cutout = cut_by_unmixing(picture, key, job.method)
    else:
        cutout = cut_by_distance(picture, key, job.method)
    cutout = contract_and_feather(cutout, job)
    made = File(job.target, encode(cutout, job.target, picture.icc_profile))
    files = (*preview_files(cutout, job.preview), made)
    height, width = cutout.alpha.shape
    return Done(job, (width, height), key, self_check(picture, cutout), files)


def outcome_of(job: Task) -> Outcome:
    """Do one job, but for the writing; every expected failure becomes an outcome."""
    try:
        picture = read_picture(job.source)
        if isinstance(job, Job):
            return cut_out(picture, job)
        height, width = picture.planes[0].shape
        return Inspected(job, (width, height), alpha_check(picture))
    except ChromaKeyError as error:
        return Failed(job, str(error))
    except MemoryError:
        return Failed(job, "too large for the memory; scale the picture down first")


def written(outcome: Outcome) -> Outcome:
    """Write what came out, so that workers may be ended at any time."""
    if not isinstance(outcome, Done):
        return outcome
    for path, data in outcome.files:
        try:
            with signals_held():  # so that no temporary file stays
                write_new(path, data, force=outcome.job.force)
        except FileExistsError:
            return Failed(outcome.job, f"{path} appeared meanwhile; add --force to replace it")
        except OSError as error:
            return Failed(outcome.job, f"{path} cannot be written: {error.strerror or error}")
    return outcome._replace(files=())


def end_with(sentinel: int) -> None:
    """End this worker when the program is gone, however it ended."""
    connection.wait([sentinel])
    os._exit(1)


def work(link: connection.Connection) -> None:
    """Do the jobs that come over the link; signals are for the program to take."""
    for number in ending_signals():
        signal.signal(number, signal.SIG_IGN)
    if program := multiprocessing.parent_process():
        watch = threading.Thread(target=end_with, args=(program.sentinel,), daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads; the link ends, too
            watch.start()
    with contextlib.suppress(OSError):  # the program went away while this was sent
        while True:
            link.send(outcome_of(link.recv()))


class Workers:
    """Processes that have a job each, and take another when they have sent its outcome."""

    def __init__(self, jobs: Sequence[Task], number: int) -> None:
        self.jobs, self.number = jobs, number
        self.upcoming = collections.deque(range(len(jobs)))
        self.processes: list[BaseProcess] = []
        self.idle: list[connection.Connection] = []
        self.busy: dict[connection.Connection, int] = {}
        self.finished: dict[int, Outcome] = {}

    def start(self) -> None:
        """Start a worker, if the system has room for one."""
        with contextlib.suppress(OSError):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=work, args=(theirs,), daemon=True)
            with signals_held():
                process.start()
            theirs.close()  # so that the link ends with the worker
            self.processes.append(process)
            self.idle.append(ours)

    def hand_out(self, limit: int) -> None:
        """Give every idle worker a job that is below the limit."""
        while self.idle and self.upcoming and self.upcoming[0] < limit:
            link = self.idle.pop()
            self.busy[link] = self.upcoming.popleft()
            with contextlib.suppress(OSError):  # a dead one is found out when it should answer
                link.send(self.jobs[self.busy[link]])

    def collect(self) -> None:
        """Wait for outcomes, and put another worker in the place of one that died."""
        ready = connection.wait(self.busy)
        for link in [link for link in self.busy if link in ready]:
            turn = self.busy.pop(link)
            try:
                self.finished[turn] = link.recv()
                self.idle.append(link)
            except (EOFError, OSError):
                reason = "its worker process died (out of memory?)"
                self.finished[turn] = Failed(self.jobs[turn], reason)
                self.start()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the outcomes in the order of the jobs."""
        for _ in range(self.number):
            self.start()
        for turn, job in enumerate(self.jobs):
            limit = turn + JOBS_AHEAD * self.number
            self.hand_out(limit)
            while turn not in self.finished and self.busy:
                self.collect()
                self.hand_out(limit)
            if turn not in self.finished:  # there is no worker
                self.upcoming.popleft()
                self.finished[turn] = outcome_of(job)
            yield self.finished.pop(turn)

    def end(self) -> None:
        """End all of them at once; they have nothing that would have to be put away."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def run_jobs(jobs: Sequence[Task]) -> Generator[Outcome]:
    """Yield the outcomes in the order of the jobs; several pictures share the cores."""
    on_all = not hasattr(os, "sched_getaffinity")
    cores = (os.cpu_count() or 1) if on_all else len(os.sched_getaffinity(0))
    number = min(cores, len(jobs))
    if number == 1:
        yield from map(written, map(outcome_of, jobs))
        return
    workers = Workers(jobs, number)
    try:
        yield from map(written, workers.outcomes())
    finally:
        workers.end()


# ── 19 · Main ─────────────────────────────────────────────────────────────────────────────────────


def run_command(arguments: Arguments) -> int:
    """Refuse or run, and return the exit code."""
    jobs = planned(arguments)
    report = Report(as_json=arguments.json, strict=arguments.strict)
    with contextlib.closing(run_jobs(jobs)) as outcomes:
        for outcome in outcomes:
            report.add(outcome)
    return report.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run the command line, and return the exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if argv is None and sys.getfilesystemencoding() == "ascii":  # names would be half pairs
        again = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execv(sys.executable, again)  # noqa: S606 - itself
    try:
        with signals_taken():
            return run_command(build_parser().parse_args(argv, Arguments()))
    except UsageError as error:
        for problem in error.problems:
            say(f"Error: {problem}")
        return 2
    except KeyboardInterrupt:
        say("Error: interrupted; what was already written stays")
        return 130


if __name__ == "__main__":
    sys.exit(main())
