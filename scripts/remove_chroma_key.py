#!/usr/bin/env python3
"""Turn a flat key colour into true alpha.

    remove_chroma_key.py --input frog.png --out frog-cut.png --auto-key border --unmix
    remove_chroma_key.py --input shots/*.png --out-dir cut --auto-key border --unmix --json
    remove_chroma_key.py --input logo.png --out logo.webp --soft-matte --despill

--unmix takes every pixel for a mixture of subject and key colour and recovers the alpha and the
subject's own colour; it needs no tuning. Without it, alpha is a function of the distance to the key
colour: hard at --tolerance, or soft between the two thresholds of --soft-matte.

Exit codes: 0 every requested image is on disk · 1 at least one image is missing · 2 refused before
anything was done · 130 interrupted.

The file, from top to bottom:
   1   limits and defaults, as tables
   2   words and failures
   3   records
   4   command line: a new option is a row of a table
   5   preflight: a new refusal is a sentence of a generator
   6   read: any still picture as 8-bit planes
   7   key colour: named, or measured at the corners or the border
   8   planes and masks
   9   matte by colour distance, as recorded
  10   unmixing
  11   edge: contract and feather
  12   self-check: a new warning is a sentence of a generator
  13   write
  14   report
  15   run
  16   main
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["pillow>=11", "numpy>=1.26"]
# ///

from __future__ import annotations

import argparse
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
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

__version__ = "0.2.0"


class Lazy:
    """A module that is loaded when something of it is first asked for.

    PEP 810 gives Python 3.15 a statement for this, which then replaces the class.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:  # noqa: ANN401
        return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
    import json
    from collections.abc import Callable, Iterator, Sequence
    from concurrent import futures

    import numpy as np
    import PIL
    from numpy.typing import NDArray
    from PIL import Image, ImageCms, ImageFilter, ImageOps

    U8: TypeAlias = NDArray[np.uint8]
    F32: TypeAlias = NDArray[np.float32]
    Mask: TypeAlias = NDArray[np.bool_]
    Planes: TypeAlias = tuple[U8, ...]  # red, green, blue
    Colour: TypeAlias = tuple[int, int, int]
else:
    futures, json, np, PIL = map(Lazy, ("concurrent.futures", "json", "numpy", "PIL"))
    Image, ImageCms = map(Lazy, ("PIL.Image", "PIL.ImageCms"))
    ImageFilter, ImageOps = map(Lazy, ("PIL.ImageFilter", "PIL.ImageOps"))

# No matrix is multiplied here, and starting OpenBLAS's threads takes longer than keying a picture.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# ── 1 · Limits and defaults, as tables ────────────────────────────────────────────────────────────

DEFAULT_KEY_COLOUR = "#00ff00"
DEFAULT_TOLERANCE = 12
DEFAULT_TRANSPARENT_THRESHOLD = 12
DEFAULT_OPAQUE_THRESHOLD = 96
MAX_EDGE_CONTRACT = 16
MAX_EDGE_FEATHER = 64
AUTO_KEYS = ("none", "corners", "border")  # the first of each is the default
SUBJECTS = ("auto", "opaque", "translucent")
OUTPUT_FORMATS = {".png": "PNG", ".webp": "WEBP"}
DRAWING_FORMATS = {"EPS", "WMF", "EMF"}  # Pillow would start Ghostscript for the first
EXIF_ORIENTATION = 0x0112

# ── 2 · Words and failures ────────────────────────────────────────────────────────────────────────


def hex_colour(key: Colour) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*key)


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
    """Alpha follows from unmixing; `subject` is what the areas that share the key's hue are."""

    subject: str = SUBJECTS[0]


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
    key_hued_pixels: int  # inner ones that share the key's hue


class SelfCheck(NamedTuple):
    """What the program thinks of its work: counts of pixels, shares from 0 to 1, levels of 255."""

    transparent: int
    partial: int
    opaque: int
    border_uniform: float
    border_spread: float
    corners_transparent: int
    residual_spill: float
    key_hued: float
    sides_cut: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class Done(NamedTuple):
    """A picture that is on disk."""

    job: Job
    size: tuple[int, int]
    key: Colour
    check: SelfCheck


class Failed(NamedTuple):
    """A picture that is not."""

    job: Job
    reason: str


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
    """A row of the tables below."""

    flags: str  # the last one names the attribute of `Arguments`
    help: str
    values: tuple[str, ...] | int | str = ""  # choices, largest number or a word; none of a switch
    convert: Callable[..., Any] = str
    default: Any = None  # of choices it is the first, of numbers 0 or the method's
    several: bool = False  # at least one value


FILE_OPTIONS = (
    Option(
        "--input", "the pictures to cut out; several need --out-dir", "PATH", Path, several=True
    ),
    Option("--out", "the cut-out, .png or .webp", "PATH", Path),
    Option("--out-dir", "write DIR/<input stem>.png", "DIR", Path),
    Option("--force", "replace existing outputs"),
    Option("--json", "print one JSON object a line per picture instead of text"),
)
KEY_OPTIONS = (
    Option("--key-color", "the colour to remove", "#RRGGBB", as_colour, DEFAULT_KEY_COLOUR),
    Option("--auto-key", "measure the key colour at the corners or border instead", AUTO_KEYS),
)
UNMIX_OPTIONS = (
    Option("--unmix", "recover alpha and the subject's own colour; no tuning"),
    Option(
        "--subject", "what areas that share the key's hue are; auto judges by the picture", SUBJECTS
    ),
)
MATTE_OPTIONS = (
    Option("--tolerance", "hard matte: up to this distance is transparent", 255, as_whole_number),
    Option("--soft-matte", "a ramp between two thresholds"),
    Option("--transparent-threshold", "soft matte: transparent up to here", 255, as_real_number),
    Option("--opaque-threshold", "soft matte: opaque from here", 255, as_real_number),
    Option("--spill-cleanup --despill", "cap the key's channels in pixels that are not opaque"),
)
EDGE_OPTIONS = (
    Option(
        "--edge-contract", "choke the matte by so many pixels", MAX_EDGE_CONTRACT, as_whole_number
    ),
    Option("--edge-feather", "blur the matte with this radius", MAX_EDGE_FEATHER, as_real_number),
)
OPTION_GROUPS = {
    "files": FILE_OPTIONS,
    "key colour": KEY_OPTIONS,
    "unmixing (recommended, with --auto-key border)": UNMIX_OPTIONS,
    "matte by colour distance (not with --unmix)": MATTE_OPTIONS,
    "edge": EDGE_OPTIONS,
}
# What --help shows and argparse does not fill in, so that it can be told which are given.
METHOD_DEFAULTS = {**UnmixMethod._field_defaults, **MatteMethod._field_defaults}


class Arguments(argparse.Namespace):
    """What argparse makes of the tables above, beside what `given` finds of a MatteMethod."""

    input: list[Path]
    out: Path | None
    out_dir: Path | None
    force: bool
    json: bool
    key_color: Colour
    auto_key: str
    unmix: bool
    subject: str | None
    edge_contract: int
    edge_feather: float


class Parser(argparse.ArgumentParser):
    """An argument parser that raises what `main` prints like every other error."""

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse cannot read."""
        raise UsageError(f"{message}; see {self.prog} --help")


def add_group(parser: Parser, title: str, options: Sequence[Option]) -> None:
    """Add the options of a table under their title."""
    group = parser.add_argument_group(title)
    for option in options:
        name = option.flags.split()[-1].removeprefix("--").replace("-", "_")
        takes: dict[str, Any] = {"dest": name, "help": option.help}
        values, default = option.values, option.default
        if not values:
            takes |= {"action": "store_true"}
        elif isinstance(values, tuple):
            takes |= {"choices": values}
            default = values[0]
        elif isinstance(values, int):
            convert = functools.partial(option.convert, most=values)
            takes |= {"type": convert, "metavar": f"0-{values}"}
            default = METHOD_DEFAULTS.get(name, 0)
        else:
            takes |= {"type": option.convert, "metavar": values}
        if default is not None:
            takes["help"] += f" (default {default})"
            takes["default"] = None if name in METHOD_DEFAULTS else default
        if option.several:
            takes |= {"action": "extend", "nargs": "+", "required": True}
        group.add_argument(*option.flags.split(), **takes)


def build_parser() -> Parser:
    """All options in their groups; the module docstring without its map is the help text."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="remove_chroma_key.py",
        description=summary,
        epilog=details.partition("The file, from top to bottom:")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    for title, options in OPTION_GROUPS.items():
        add_group(parser, title, options)
    return parser


def given(arguments: Arguments, names: Sequence[str]) -> dict[str, Any]:
    """Those of the values that the command line has."""
    values = {name: getattr(arguments, name) for name in names}
    return {key: value for key, value in values.items() if value is not None and value is not False}


def method_from(arguments: Arguments) -> MatteMethod | UnmixMethod:
    """Choose the method and fill in its defaults."""
    method = UnmixMethod if arguments.unmix else MatteMethod
    return method(**given(arguments, method._fields))


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
        )
        for source in arguments.input
    ]


# ── 5 · Preflight ─────────────────────────────────────────────────────────────────────────────────


def check_options(arguments: Arguments) -> Iterator[str]:
    """Options that contradict each other."""
    received = given(arguments, MatteMethod._fields)
    if arguments.unmix and received:
        flags = ", ".join("--" + name.replace("_", "-") for name in received)
        yield f"{flags} shapes the matte that --unmix replaces; leave out one or the other"
    if arguments.subject and not arguments.unmix:
        yield f"--subject {arguments.subject} needs --unmix; add it or leave --subject out"
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
    elif arguments.out is not None and len(arguments.input) > 1:
        yield f"--out takes one input, received {len(arguments.input)}; use --out-dir DIR"


def check_source(source: Path) -> Iterator[str]:
    """Find out that the only input is none; among several it is one failure of many."""
    # For a name that no file can have, os.path says no, and Path raises.
    if os.path.isdir(source):
        yield f"{source} is a directory; give picture files"
    elif not os.path.exists(source):
        yield f"{source} does not exist; check the path"
    elif not os.path.isfile(source):
        yield f"{source} is no regular file; give picture files"


def check_target(job: Job) -> Iterator[str]:
    """Find why an output could not be written."""
    target = job.target
    if target.suffix.lower() not in OUTPUT_FORMATS:
        yield f"{target} ends in {target.suffix or 'nothing'!r}; only .png and .webp keep alpha"
    if os.path.isdir(target):
        yield f"{target} is a directory; give a file name"
    elif os.path.lexists(target) and not job.force:
        yield f"{target} exists; choose another name or add --force"
    above = next((folder for folder in target.parents if os.path.exists(folder)), None)
    if above is not None and not os.path.isdir(above):
        yield f"{above} is no directory, so {target} cannot be written; choose another place"


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


def check_packages() -> Iterator[str]:
    """Load the packages, before any worker process needs them, or name one that is not there."""
    try:
        for name in ("numpy", "PIL.Image"):
            importlib.import_module(name)
    except ModuleNotFoundError as missing:
        yield f"{missing.name} is not installed; run: python -m pip install pillow numpy"


def refuse(problems: Iterator[str]) -> None:
    """Raise one UsageError for all problems, if there is any."""
    if found := list(problems):
        raise UsageError(*found)


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

# Recorded, as the matte of section 9: other values would give other pixels.
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


def key_of(planes: Planes, job: Job) -> Colour:
    """Take the named key colour, or the median per channel of the corners or the border."""
    if job.auto_key == "none":
        return job.key_colour
    samples = corner_samples(planes) if job.auto_key == "corners" else border_samples(planes)
    red, green, blue = np.rint(np.median(samples, axis=0)).astype(int).tolist()
    return red, green, blue


def spill_channels(key: Colour) -> tuple[int, ...]:
    """Channels that the key colour lights up: (1,) for green, (0, 2) for magenta, () for black."""
    floor = max(SPILL_CHANNEL_MIN, max(key) - SPILL_CHANNEL_SLACK)
    return tuple(channel for channel in range(3) if key[channel] >= floor)


# ── 8 · Planes and masks ──────────────────────────────────────────────────────────────────────────

EDGE_WIDTH = 3  # pixels from the background to the end of an antialiased edge


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


def dilate(mask: Mask, reach: int) -> Mask:
    """Grow a mask by `reach` pixels in each direction, in doubling steps."""
    for axis in (0, 1):
        margin = [(reach, reach) if axis == along else (0, 0) for along in (0, 1)]
        grown = np.pad(mask, margin)
        lines = grown.swapaxes(0, axis)
        covered = 1
        while covered < 2 * reach + 1:
            shift = min(covered, 2 * reach + 1 - covered)
            lines[:-shift] |= lines[shift:]
            covered += shift
        mask = lines[: mask.shape[axis]].swapaxes(0, axis)
    return mask


def smoothstep(x: NDArray[Any]) -> NDArray[Any]:
    """Rise smoothly from 0 to 1 between 0 and 1."""
    ramp = np.clip(x, 0, 1)
    smooth: NDArray[Any] = ramp * ramp * (3 - 2 * ramp)
    return smooth


# ── 9 · Matte by colour distance, as recorded ─────────────────────────────────────────────────────

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
    """Alpha by distance to the key colour, exactly as recorded."""
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
    return Cutout(planes, alpha, key, matched, key_hued_pixels=int(np.count_nonzero(key_hued)))


# ── 10 · Unmixing ─────────────────────────────────────────────────────────────────────────────────
#
# Every pixel is a mixture C = a·F + (1 - a)·K. With D(C) the height of the key's channel above
# another one, q = 1 - D(C)/D(K) is linear in it: q = a·q_F. Alpha is q where the subject lacks the
# key's hue (q_F = 1), and C - K projected on F - K where a certain subject colour F is near.

HUE_CONTRAST = 64  # a key without two channels that far apart has no hue to unmix by
GREY_KEY_REACH = 96  # then, what is that far from the key is subject
NOISE_REACH = 24  # border pixels farther from the key are subject, not noise
FAINT = 20  # up to there a pixel is background or too faint to be an edge
SEARCH_RADII = (6, 4, 2)  # where certain subject colours are looked for, in pixels
CERTAIN_Q = 0.97  # above, a pixel away from the edges is certainly subject
SHARES_HUE = 0.9  # below, an opaque pixel is reported to share the key's hue
CELL = 4  # areas are judged by blocks of 4x4 pixels
EVEN_LEVELS = 5  # hundredths of q, in the flat middle of a thin stroke
PLATEAU_SHARE = 0.6  # pixels at the rim of an opaque area have at least that much of its q
STROKE_TINT = 14  # channels farther apart are no grey that a plain mixture explains
EVEN_Q = 0.25  # q varies more than that only where edges cross a cell
NEUTRAL = 40  # channels that near each other are grey
DARK = 80  # a see-through colour that dark is a shadow and says nothing about the subject
FLAT_STEP = 1.5  # neighbouring cells of one flat colour differ by less
CHROMA_NOISE = 5  # variance that quantisation adds to the chroma of a JPEG


class Backdrop(NamedTuple):
    """The key as this picture shows it; deviations are standard deviations in levels.

    `grain` is the deviation from pixel to pixel, `spread` that from the key, drift included;
    up to `threshold` from the key everything is background.
    """

    key: F32
    grain: float
    spread: float
    threshold: int


class Cells(NamedTuple):
    """Blocks of the picture, (rows, columns): mean colour, q, and what borders on background."""

    colour: F32
    q: F32
    q_range: F32
    q_high: F32
    solid: Mask
    ring: Mask


class Verdict(NamedTuple):
    """What cells with the key's hue are, and whether the picture is see-through.

    `opaque_from` is the least q, in hundredths, of pixels that belong to an opaque area; 255 where
    there is none. Strokes too thin for a cell `may_be_opaque`.
    """

    opaque_from: U8
    may_be_opaque: Mask
    see_through: bool


def cut_by_unmixing(picture: Picture, key: Colour, method: UnmixMethod) -> Cutout:
    """Recover alpha and straight colour of a picture of mixtures."""
    backdrop = measure_backdrop(picture.planes, key)
    distance = key_distance(picture.planes, key)
    background = distance <= backdrop.threshold
    faint = distance <= max(backdrop.threshold, FAINT)
    colour = np.stack(picture.planes, dtype=np.float32)
    subsampled = has_subsampled_chroma(picture.planes)
    if subsampled:
        colour = sharpen_chroma(colour)
    q = key_free_share(colour, backdrop)
    inner = ~dilate(faint, EDGE_WIDTH)
    verdict = judge_cells(cells_of(colour, q, faint, backdrop), backdrop, method.subject)
    levels = np.clip(q * np.float32(100), 0, 200).astype(np.uint8)
    even, ridge = texture_of(levels)
    key_hued = inner & (q < 1) & (levels >= enlarge(verdict.opaque_from, q.shape))
    even &= ~dilate(faint, 2) & (q < CERTAIN_Q) & enlarge(verdict.may_be_opaque, q.shape)
    key_hued.reshape(-1)[tinted(colour, q, backdrop, np.flatnonzero(even))] = True
    certain = (inner & (q >= CERTAIN_Q)) | (ridge & (q >= 1)) | key_hued
    alpha = np.clip(q, 0, 1)
    alpha[key_hued] = 1
    vague = ~(certain | background)
    if verdict.see_through:
        thin_out(alpha, colour, backdrop, np.flatnonzero(vague))
    fit_edges(
        alpha, colour, backdrop, certain, np.flatnonzero(vague & dilate(certain, SEARCH_RADII[0]))
    )
    if subsampled:
        alpha = settle(alpha)
    alpha[background] = 0
    planes, matte = straight(picture.planes, colour, alpha, backdrop)
    if picture.alpha is not None:
        matte = np.rint(matte * (picture.alpha / 255.0)).astype(np.uint8)
        planes = blank_where(planes, matte == 0)
    return Cutout(
        planes=planes,
        alpha=matte,
        key=key,
        matched=bool(background.any()),
        key_hued_pixels=int(np.count_nonzero(key_hued & (q < SHARES_HUE))),
    )


def measure_backdrop(planes: Planes, key: Colour) -> Backdrop:
    """Measure the border pixels that are key colour."""
    difference = border_samples(planes) - np.array(key, np.float32)
    distance = np.abs(difference).max(axis=-1)
    of_key = difference[distance < NOISE_REACH]
    if not of_key.size:
        return Backdrop(key=np.array(key, np.float32), grain=0, spread=4, threshold=8)
    reach = 1.15 * float(np.percentile(distance[distance < NOISE_REACH], 99))
    return Backdrop(
        key=np.array(key, np.float32),
        grain=float(np.sqrt(np.square(np.diff(of_key, axis=0)).mean() / 2))
        if len(of_key) > 1
        else 0,
        spread=float(np.sqrt(np.square(of_key).mean())),
        threshold=max(2, int(reach)),
    )


def hue_pairs(key: F32) -> list[tuple[int, int]]:
    """Channel pairs (lit, unlit) whose difference tells the key's hue; none for a grey key."""
    lit = [channel for channel in range(3) if key[channel] >= key.max() - SPILL_CHANNEL_SLACK]
    return [(high, low) for high in lit for low in range(3) if key[high] - key[low] >= HUE_CONTRAST]


def key_free_share(colour: F32, backdrop: Backdrop) -> F32:
    """Compute q of colours (3, ...): 0 is the key, 1 lacks its hue, above 1 is the opposite hue."""
    key = backdrop.key
    pairs = hue_pairs(key)
    if not pairs:
        # Without a hue, only brightness tells: far from the key is subject.
        offset: F32 = np.abs(colour - key.reshape(-1, *[1] * (colour.ndim - 1))).max(axis=0)
        return offset / np.float32(GREY_KEY_REACH)
    share = np.full(colour.shape[1:], np.inf, np.float32)
    for high, low in pairs:
        part = colour[high] - colour[low]
        part *= np.float32(1 / (key[high] - key[low]))
        np.minimum(share, part, out=share)
    return np.subtract(np.float32(1), share, out=share)


def texture_of(levels: U8) -> tuple[Mask, Mask]:
    """Pixels with a 3x3 neighbourhood of one q (in hundredths), and those with the most in 5x5."""
    highest, lowest = levels, levels
    for axis in (0, 1):
        highest = extreme_of_three(highest, axis, np.maximum)
        lowest = extreme_of_three(lowest, axis, np.minimum)
    even = highest - lowest <= EVEN_LEVELS
    for axis in (0, 1):
        highest = extreme_of_three(highest, axis, np.maximum)
    return even, levels >= highest - np.minimum(highest, 1)


def extreme_of_three(field: U8, axis: int, extreme: np.ufunc) -> U8:
    """Minimum or maximum of each pixel and its two neighbours along an axis."""
    found = field.copy()
    lines, wider = field.swapaxes(0, axis), found.swapaxes(0, axis)
    extreme(wider[1:], lines[:-1], out=wider[1:])
    extreme(wider[:-1], lines[1:], out=wider[:-1])
    return found


def tinted(colour: F32, q: F32, backdrop: Backdrop, where: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of the pixels whose colour, unmixed with alpha q, would not be grey."""
    mixed, shares = colour.reshape(3, -1).take(where, axis=1), q.reshape(-1)[where]
    is_tinted: Mask = np.ptp(unmixed_colour(mixed, shares, backdrop), axis=0) > STROKE_TINT
    return where[is_tinted]


# A lossy picture stores chroma at half the resolution of luma. Between any two colours, though,
# chroma is a linear function of luma, so the detail that the one lost can be had from the other.


def has_subsampled_chroma(planes: Planes) -> bool:
    """Tell whether chroma was doubled with weights 1/4 and 3/4, as decoders of 4:2:0 JPEG do.

    Then the step inside a pair of pixels is the mean of the steps before and after it, and one
    pixel on the same rule fails. A picture without subsampling cannot tell the phases apart.
    """
    sparse = np.s_[:: max(1, min(planes[0].shape) // 128)]
    return all(
        has_doubled_steps([plane.astype(np.int16) for plane in lines])
        for lines in (
            [plane[sparse] for plane in planes],
            [plane[:, sparse].T for plane in planes],
        )
    )


def has_doubled_steps(lines: list[NDArray[np.int16]]) -> bool:
    """Test the rule along the rows: does it fit clearly better inside pairs than across them?"""
    fits = np.zeros((2, 2), np.int64)
    red, green, blue = lines
    for chroma in (red - green, blue - green):
        steps = np.diff(chroma, axis=1)
        misfit = np.abs(2 * steps[:, 1:-1] - steps[:, :-2] - steps[:, 2:])
        is_edge = (np.abs(steps[:, 1:-1]) > 12) | (np.abs(steps[:, :-2]) > 12)
        for phase in (0, 1):
            at_edge = misfit[:, 1 - phase :: 2][is_edge[:, 1 - phase :: 2]]
            fits[phase] += (np.count_nonzero(at_edge <= 10), at_edge.size)
    (inside, inside_of), (across, across_of) = fits.tolist()
    # Measured: at least 0.40 of 0.18 on JPEG, at most 0.37 of 0.36 elsewhere.
    return 3 * inside > inside_of >= 32 and inside * across_of > 1.25 * across * inside_of


def sharpen_chroma(colour: F32) -> F32:
    """Add to the half-resolution chroma the detail that the full-resolution luma has."""
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    coarse = halve(luma)
    detail = luma - double(coarse, luma.shape)
    mean = box_mean(coarse)
    variance = box_mean(coarse * coarse) - mean * mean + np.float32(CHROMA_NOISE)
    chroma = []
    for plane in (red - green, blue - green):
        small = halve(plane)
        small_mean = box_mean(small)
        covariance = box_mean(small * coarse) - small_mean * mean
        spread = box_mean(small * small) - small_mean * small_mean + np.float32(CHROMA_NOISE)
        # The squared correlation says how far two colours alone explain the neighbourhood.
        trust = np.clip((covariance * covariance / (variance * spread) - 0.5) / 0.45, 0, 1)
        slope = box_mean(covariance / variance * trust)
        chroma.append(plane + enlarge(slope, luma.shape, 2) * detail)
    green = luma - 0.299 * chroma[0] - 0.114 * chroma[1]
    sharpened: F32 = np.stack([green + chroma[0], green, green + chroma[1]])
    return np.clip(sharpened, 0, 255, out=sharpened)


def halve(plane: F32) -> F32:
    """Average 2x2 pixels; a last odd row or column stands for itself."""
    height, width = plane.shape
    if height % 2 or width % 2:
        plane = np.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge")
    rows = plane[::2] + plane[1::2]
    means = rows[:, ::2] + rows[:, 1::2]
    means *= np.float32(0.25)
    return means


def double(plane: F32, shape: tuple[int, int]) -> F32:
    """Twice the size with weights 3/4 and 1/4, cut to `shape`."""
    for axis in (0, 1):
        ends = np.take(plane, [0], axis), np.take(plane, [-1], axis)
        before = np.concatenate([ends[0], plane.take(range(plane.shape[axis] - 1), axis)], axis)
        after = np.concatenate([plane.take(range(1, plane.shape[axis]), axis), ends[1]], axis)
        pair = np.stack([0.75 * plane + 0.25 * before, 0.75 * plane + 0.25 * after], axis + 1)
        size = list(plane.shape)
        size[axis] *= 2
        plane = pair.reshape(size)
    return plane[: shape[0], : shape[1]]


def box_mean(plane: F32, reach: int = 2) -> F32:
    """Average over a square of 2·reach + 1 pixels."""
    size = 2 * reach + 1
    padded = np.pad(plane, reach, mode="edge")
    height, width = plane.shape
    rows = padded[:height].copy()
    for shift in range(1, size):
        rows += padded[shift : shift + height]
    total = rows[:, :width].copy()
    for shift in range(1, size):
        total += rows[:, shift : shift + width]
    total *= np.float32(1 / size**2)
    return total


def enlarge(cells: NDArray[Any], shape: tuple[int, ...], size: int = CELL) -> NDArray[Any]:
    """Every cell as size x size pixels, the last ones stretched or cut to fill `shape`."""
    height, width = shape
    rows = np.minimum(np.arange(height) // size, cells.shape[0] - 1)
    columns = np.minimum(np.arange(width) // size, cells.shape[1] - 1)
    enlarged: NDArray[Any] = cells[:, columns][rows]
    return enlarged


# Areas that share the key's hue are opaque (a frog) or see-through (glass, glow, shadow). One pixel
# cannot tell; what does is how the subject meets the background: crisply, or fading into it.


def blocks(plane: NDArray[Any], combine: np.ufunc) -> NDArray[Any]:
    """Combine every whole block of CELL x CELL pixels; there is always at least one."""
    short = [max(0, CELL - size) for size in plane.shape]
    if any(short):
        plane = np.pad(plane, [(0, missing) for missing in short], mode="edge")
    height, width = (size - size % CELL for size in plane.shape)
    rows = plane[0:height:CELL]
    for offset in range(1, CELL):
        rows = combine(rows, plane[offset:height:CELL])
    cells = rows[:, 0:width:CELL]
    for offset in range(1, CELL):
        cells = combine(cells, rows[:, offset:width:CELL])
    return cells


def cells_of(colour: F32, q: F32, faint: Mask, backdrop: Backdrop) -> Cells:
    """Reduce the picture to what areas are judged by."""
    means = np.stack([blocks(plane, np.add) for plane in colour]) * np.float32(1 / CELL**2)
    holds_background = blocks(faint, np.logical_or)
    solid = ~dilate(holds_background, 1)
    high = blocks(q, np.maximum)
    return Cells(
        colour=means,
        q=key_free_share(means, backdrop),
        q_range=high - blocks(q, np.minimum),
        q_high=high,
        solid=solid,
        ring=solid & dilate(holds_background, 3),
    )


def judge_cells(cells: Cells, backdrop: Backdrop, subject: str) -> Verdict:
    """Find where the subject is opaque in spite of its hue, and whether it is see-through."""
    nowhere, everywhere = np.zeros_like(cells.solid), np.ones_like(cells.solid)
    clear = Verdict(
        opaque_from=least_level(cells.q, nowhere), may_be_opaque=nowhere, see_through=True
    )
    if subject == "translucent":
        return clear
    hued = cells.solid & (cells.q < CERTAIN_Q) & (cells.q_range < EVEN_Q)
    plateau = hued & part_of_plateau(cells.colour, hued) if hued.any() else nowhere
    opaque = Verdict(
        opaque_from=least_level(cells.q, plateau), may_be_opaque=everywhere, see_through=False
    )
    if subject == "opaque" or not hued.any():
        return opaque
    unmixed = unmixed_colour(cells.colour, cells.q, backdrop)
    is_neutral = np.ptp(unmixed, axis=0) < NEUTRAL
    slope = steepest_step(cells.colour, cells.solid)
    fades = cells.ring & (slope >= FLAT_STEP + 0.35 * backdrop.grain) & (cells.q > 0.03)
    surrounding = widest(cells.q_high, 2)
    faint_glow = (cells.q < 0.25) & (surrounding < 0.6)
    steep_glow = (cells.q < 0.45) & (surrounding < 0.85) & (surrounding > 1.25 * cells.q)
    glow = fades & (faint_glow | steep_glow)
    shade = fades & is_neutral & (cells.q < 0.6) & (surrounding < 0.8)
    evidence = glow | shade
    ring_size = np.count_nonzero(cells.ring)
    if np.count_nonzero(evidence) < max(8, 0.01 * ring_size):
        return opaque
    if np.count_nonzero(glow & (unmixed.max(axis=0) > DARK)) >= max(8, 0.03 * ring_size):
        return clear
    unlike = ~similar(unmixed, evidence)
    return Verdict(
        opaque_from=least_level(cells.q, plateau & unlike), may_be_opaque=unlike, see_through=False
    )


def least_level(q: F32, plateau: Mask) -> U8:
    """Set the bar beside a plateau at a share of its q, so that a shadow there stays a shadow."""
    lowest = -widest(np.where(plateau, -q, np.float32(-9)), 1)
    return np.where(lowest < 2, np.rint(100 * PLATEAU_SHARE * lowest), 255).astype(np.uint8)


def part_of_plateau(colour: F32, hued: Mask) -> Mask:
    """Cells in or beside a patch of several cells whose colour changes slowly."""
    height, width = hued.shape
    wide_colour = np.pad(colour, ((0, 0), (1, 1), (1, 1)), mode="edge")
    wide_hued = np.pad(hued, 1)
    likes = np.zeros(hued.shape, np.int16)
    for down in range(3):
        for right in range(3):
            window = np.s_[down : down + height, right : right + width]
            step = np.abs(wide_colour[:, *window] - colour).max(axis=0)
            likes += wide_hued[window] & (step < 20)
    core = hued & (likes > 5)  # the cell itself is one of the six
    core &= count_near(count_near(core)) >= 28
    return dilate(core, 1)


def count_near(field: NDArray[Any]) -> NDArray[np.int16]:
    """Count in each 3x3 neighbourhood."""
    wide = np.pad(field.astype(np.int16), 1)
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    counts: NDArray[np.int16] = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return counts


def widest(field: F32, reach: int) -> F32:
    """Take the maximum over a square of 2·reach + 1 cells."""
    for axis in (0, 1):
        lines = field.swapaxes(0, axis)
        padded = np.pad(lines, ((reach, reach), (0, 0)), mode="edge")
        steps = [padded[shift : shift + len(lines)] for shift in range(2 * reach + 1)]
        field = np.maximum.reduce(steps).swapaxes(0, axis)
    return field


def steepest_step(colour: F32, solid: Mask) -> F32:
    """Find the largest difference of any channel to a solid cell above, below, left or right."""
    step = np.zeros(solid.shape, np.float32)
    down = np.abs(np.diff(colour, axis=1)).max(axis=0) * (solid[1:] & solid[:-1])
    right = np.abs(np.diff(colour, axis=2)).max(axis=0) * (solid[:, 1:] & solid[:, :-1])
    for part, change in ((step[1:], down), (step[:-1], down)):
        np.maximum(part, change, out=part)
    for part, change in ((step[:, 1:], right), (step[:, :-1], right)):
        np.maximum(part, change, out=part)
    return step


def unmixed_colour(colour: F32, alpha: F32, backdrop: Backdrop) -> F32:
    """F = K + (C - K) / a for colours (3, ...), within 0 to 255."""
    key = backdrop.key.reshape(-1, *[1] * alpha.ndim)
    return np.clip(key + (colour - key) / np.maximum(alpha, np.float32(0.02)), 0, 255)


def similar(colour: F32, evidence: Mask) -> Mask:
    """Find cells with a colour that is common in the evidence, give or take 32 levels."""
    bins = (colour / 32).astype(np.intp).clip(0, 7)
    code = (bins[0] * 8 + bins[1]) * 8 + bins[2]
    counts = np.bincount(code[evidence], minlength=512).reshape(8, 8, 8)
    common = np.pad(counts >= max(3, 0.02 * counts.sum()), 1)
    for axis in range(3):
        common = common | np.roll(common, 1, axis) | np.roll(common, -1, axis)
    alike: Mask = common[1:-1, 1:-1, 1:-1].reshape(-1)[code]
    return alike


def thin_out(alpha: F32, colour: F32, backdrop: Backdrop, where: NDArray[np.intp]) -> None:
    """Coloured light: take the least alpha whose colour can be shown, unless the colour is grey.

    For q to be the alpha of a colour that is not grey, that colour would have to be exactly as
    bright in the key's channel as in another; that its brightest channel is near full is likelier.
    """
    q = np.minimum(alpha.reshape(-1)[where], 1)
    mixed = colour.reshape(3, -1).take(where, axis=1)
    key = backdrop.key[:, None]
    light = ((mixed - key) / np.maximum(255 - key, 1)).max(axis=0)
    least = ((key - mixed) / np.maximum(key, 1)).max(axis=0)
    tint = np.ptp(unmixed_colour(mixed, q, backdrop), axis=0)
    doubt = backdrop.spread / np.maximum(q, np.float32(0.02))
    weight = smoothstep((tint - 5 - doubt) / 25)
    target = np.minimum(np.maximum(light / np.float32(0.95), least), q)
    alpha.reshape(-1)[where] = q + (target - q) * weight


# Edges: the pixels between certain subject and background.


def fit_edges(
    alpha: F32, colour: F32, backdrop: Backdrop, certain: Mask, where: NDArray[np.intp]
) -> None:
    """Project vague pixels on the line from the key to the best certain colour around them."""
    width = certain.shape[1]
    margin = SEARCH_RADII[0]
    padded = np.pad(certain, margin)
    row, column = np.divmod(where, width)
    inside = (row + margin) * padded.shape[1] + column + margin
    lookup, pixels = padded.reshape(-1), colour.reshape(3, -1)
    mixed = pixels.take(where, axis=1) - backdrop.key[:, None]
    energy = np.einsum("ci,ci->i", mixed, mixed)
    best = np.full(where.size, np.inf, np.float32)
    fitted = np.zeros(where.size, np.float32)
    sample = where.copy()
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)):
        reach = np.zeros(where.size, np.intp)
        for radius in SEARCH_RADII:
            hit = lookup[inside + radius * (down * padded.shape[1] + right)]
            np.copyto(reach, radius, where=hit)
        found = np.flatnonzero(reach)
        steps = reach[found]
        source = where[found] + steps * (down * width + right)
        subject = pixels.take(source, axis=1) - backdrop.key[:, None]
        along = np.einsum("ci,ci->i", mixed.take(found, axis=1), subject)
        length = np.maximum(np.einsum("ci,ci->i", subject, subject), 1)
        share = np.clip(along / length, 0, 1)
        misfit = energy[found] - share * (2 * along - share * length)
        penalty = steps * np.float32(math.hypot(down, right))  # the nearest colour is the likeliest
        residual = np.sqrt(np.maximum(misfit, 0)) + penalty
        better = residual < best[found]
        best[found[better]] = residual[better]
        fitted[found[better]] = share[better]
        sample[found[better]] = source[better]
    plain = alpha.reshape(-1)[where]
    tint = np.ptp(unmixed_colour(mixed + backdrop.key[:, None], plain, backdrop), axis=0)
    hue_shared = 1 - np.minimum(key_free_share(pixels.take(sample, axis=1), backdrop), 1)
    # Plain unmixing is exact for grey. The more tint it leaves, and the more of the key's hue the
    # subject has, the less it is to be believed; and least where the key has no hue.
    doubt = backdrop.spread + (40 * hue_shared if hue_pairs(backdrop.key) else 255)
    leeway = np.square(plain * (2 + tint) + doubt)
    excess = np.square(np.maximum(best - (0.5 + backdrop.spread), 0))
    weight = leeway / (leeway + excess)
    alpha.reshape(-1)[where] = plain + (fitted - plain) * weight


def settle(alpha: F32) -> F32:
    """Make opaque what lossy compression left slightly short of it."""
    rise: F32 = np.clip((alpha - 0.88) / 0.075, 0, 1)
    return alpha + (1 - alpha) * rise


def straight(planes: Planes, colour: F32, alpha: F32, backdrop: Backdrop) -> tuple[Planes, U8]:
    """8-bit straight colour and alpha; opaque pixels keep the very values of the input."""
    matte = np.rint(alpha * 255).astype(np.uint8)
    partial = np.flatnonzero((matte > 0) & (matte < 255))
    mixed = colour.reshape(3, -1).take(partial, axis=1)
    unmixed = unmixed_colour(mixed, alpha.reshape(-1)[partial], backdrop)
    straight_planes = blank_where(planes, matte == 0)
    for plane, values in zip(straight_planes, np.rint(unmixed).astype(np.uint8), strict=True):
        plane.reshape(-1)[partial] = values
    return straight_planes, matte


# ── 11 · Edge ─────────────────────────────────────────────────────────────────────────────────────


def bleed_colour(planes: Planes, alpha: U8, blur: ImageFilter.GaussianBlur) -> Planes:
    """Give what the feather will uncover the colour of its surroundings instead of black."""
    weight = np.asarray(Image.fromarray(alpha).filter(blur)).astype(np.float32)
    bled = []
    for plane in planes:
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

FLAT_BORDER_DISTANCE = 40  # levels from the key
FLAT_BORDER_SHARE = 0.6  # the rest may be a subject that leaves the picture
SPREAD_PERCENTILE = 90  # for the report alone
LEAST_SHARE = 0.002  # less removed or left is nothing
KEY_HUED_SHARE = 0.01
CUT_SHARE = 0.01  # of a side


def spill_level(cutout: Cutout) -> float:
    """Mean key tint that shows in partially transparent pixels, levels of 255."""
    planes, alpha, channels = cutout.planes, cutout.alpha, spill_channels(cutout.key)
    partly = np.flatnonzero((alpha > 0) & (alpha < 255))
    if not channels or len(channels) == len(planes) or not partly.size:
        return 0.0
    partial_planes = tuple(plane.reshape(-1)[partly] for plane in planes)
    strength, rest = key_strength_and_rest(partial_planes, channels)
    excess = np.maximum(strength, rest) - rest
    return float((excess * (alpha.reshape(-1)[partly] / 255.0)).mean())


def complaints(check: SelfCheck, cutout: Cutout) -> Iterator[str]:
    """Say what is probably wrong, and what to do about it."""
    key = hex_colour(cutout.key)
    pixels = check.transparent + check.partial + check.opaque
    if not cutout.matched:
        yield f"no pixel matched the key colour {key}; try --auto-key border"
    elif check.transparent < LEAST_SHARE * pixels:
        yield f"next to nothing was removed for the key colour {key}; try --auto-key border"
    if pixels - check.transparent < LEAST_SHARE * pixels:
        yield f"next to nothing is left; is {key} the colour of the subject?"
    if check.border_uniform < FLAT_BORDER_SHARE:
        yield (
            f"only {check.border_uniform:.0%} of the border is near {key}, so the background is no "
            "flat colour; make the picture again on a flat one"
        )
    if check.key_hued > KEY_HUED_SHARE:
        yield (
            f"{check.key_hued:.0%} of the subject shares the hue of {key} and is kept opaque; if "
            "it is glass add --subject translucent, better make it again on another key colour"
        )
    if check.sides_cut:
        cut = " and ".join(check.sides_cut)
        yield f"the subject is cut by the {cut} of the picture; make it again with space around it"


def self_check(picture: Picture, cutout: Cutout) -> SelfCheck:
    """Measure what tells a good cut-out from a bad one."""
    alpha = cutout.alpha
    off_key = np.abs(border_samples(picture.planes) - np.array(cutout.key, np.int16)).max(axis=-1)
    transparent = alpha.size - int(np.count_nonzero(alpha))
    opaque = int(np.count_nonzero(alpha == 255))
    corners = alpha[[0, 0, -1, -1], [0, -1, 0, -1]]
    sides = {"top": alpha[0], "right": alpha[:, -1], "bottom": alpha[-1], "left": alpha[:, 0]}
    check = SelfCheck(
        transparent=transparent,
        partial=alpha.size - transparent - opaque,
        opaque=opaque,
        border_uniform=float((off_key <= FLAT_BORDER_DISTANCE).mean()),
        border_spread=float(np.percentile(off_key, SPREAD_PERCENTILE)),
        corners_transparent=int(np.count_nonzero(corners == 0)),
        residual_spill=spill_level(cutout),
        key_hued=cutout.key_hued_pixels / max(1, alpha.size - transparent),
        sides_cut=tuple(side for side, line in sides.items() if (line > 127).mean() > CUT_SHARE),
    )
    return check._replace(warnings=tuple(complaints(check, cutout)))


# ── 13 · Write ────────────────────────────────────────────────────────────────────────────────────


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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
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


# ── 14 · Report ───────────────────────────────────────────────────────────────────────────────────


def tell(line: str) -> None:
    """Print a result; neither an odd file name nor a reader that went away stops the work."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # Otherwise the interpreter would try, and complain, once more at its end.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def text_lines(outcome: Done | Failed) -> list[str]:
    """Say what was written, in the recorded words."""
    if isinstance(outcome, Failed):
        return []
    pixels = outcome.size[0] * outcome.size[1]
    return [
        f"Wrote {outcome.job.target}",
        f"Key color: {hex_colour(outcome.key)}",
        f"Transparent pixels: {outcome.check.transparent}/{pixels}",
        f"Partially transparent pixels: {outcome.check.partial}/{pixels}",
    ]


def json_line(outcome: Done | Failed) -> str:
    """One object for one picture."""
    job = outcome.job
    if isinstance(outcome, Failed):
        failure = {"input": str(job.source), "output": None, "error": outcome.reason}
        return json.dumps(failure, ensure_ascii=False)
    check, (width, height) = outcome.check, outcome.size
    pixels = width * height
    fields = {
        "input": str(job.source),
        "output": str(job.target),
        "width": width,
        "height": height,
        "key_color": hex_colour(outcome.key),
        "border_uniform": round(check.border_uniform, 4),
        "border_spread": round(check.border_spread, 1),
        "transparent": round(check.transparent / pixels, 4),
        "partial": round(check.partial / pixels, 4),
        "opaque": round(check.opaque / pixels, 4),
        "corners_transparent": check.corners_transparent,
        "residual_spill": round(check.residual_spill, 2),
        "key_hued": round(check.key_hued, 4),
        "touches_border": list(check.sides_cut),
        "warnings": list(check.warnings),
    }
    return json.dumps(fields, ensure_ascii=False)


class Report:
    """Tells each outcome as it comes in; the exit code is 1 once a picture is missing."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.exit_code = 0

    def add(self, outcome: Done | Failed) -> None:
        """Tell one outcome."""
        if isinstance(outcome, Failed):
            self.exit_code = 1
            print(f"Error: {outcome.job.source}: {outcome.reason}", file=sys.stderr)
        else:
            for warning in outcome.check.warnings:
                print(f"Warning: {outcome.job.source}: {warning}", file=sys.stderr)
        for line in [json_line(outcome)] if self.as_json else text_lines(outcome):
            tell(line)


# ── 15 · Run ──────────────────────────────────────────────────────────────────────────────────────


def run_job(job: Job) -> Done | Failed:
    """Cut one picture out; every expected failure becomes an outcome."""
    try:
        picture = read_picture(job.source)
        key = key_of(picture.planes, job)
        if isinstance(job.method, UnmixMethod):
            cutout = cut_by_unmixing(picture, key, job.method)
        else:
            cutout = cut_by_distance(picture, key, job.method)
        cutout = contract_and_feather(cutout, job)
        check = self_check(picture, cutout)
        write_new(job.target, encode(cutout, job.target, picture.icc_profile), force=job.force)
    except ChromaKeyError as error:
        return Failed(job, str(error))
    except FileExistsError:
        return Failed(job, f"{job.target} appeared meanwhile; add --force to replace it")
    except OSError as error:
        return Failed(job, f"{job.target} cannot be written: {error.strerror or error}")
    except MemoryError:
        return Failed(job, "too large for the memory; scale the picture down first")
    height, width = cutout.alpha.shape
    return Done(job, (width, height), key, check)


def run_jobs(jobs: Sequence[Job]) -> Iterator[Done | Failed]:
    """Yield the outcomes in the order of the jobs; several pictures share the cores."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = min(cores, len(jobs))
    if workers == 1:
        yield from map(run_job, jobs)
        return
    with futures.ProcessPoolExecutor(workers) as pool:
        pending = [(job, pool.submit(run_job, job)) for job in jobs]
        try:
            for job, future in pending:
                try:
                    yield future.result()
                except futures.BrokenExecutor:
                    yield Failed(job, "its worker process died (out of memory?)")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# ── 16 · Main ─────────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, refuse or run, and return the exit code."""
    try:
        arguments = build_parser().parse_args(argv, Arguments())
        refuse(check_options(arguments))
        jobs = jobs_from(arguments)
        refuse(check_files(jobs))
        refuse(check_packages())
        report = Report(as_json=arguments.json)
        for outcome in run_jobs(jobs):
            report.add(outcome)
    except UsageError as error:
        for problem in error.problems:
            print(f"Error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Error: interrupted; what was already written stays", file=sys.stderr)
        return 130
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
