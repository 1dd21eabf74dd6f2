# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.10", "openai>=3.54", "pillow>=11", "pydantic>=2.7"]
# ///
"""A loopback Image API: a real HTTP server for tests, benchmarks and trials without a key.

As a program it runs a command against itself and returns the command's exit code:

    python tests/images_api.py -- python scripts/image_gen.py generate --prompt "A red fox"
    python tests/images_api.py --latency 0.5 --limit 20/2 --log requests.jsonl -- COMMAND …
    python tests/images_api.py          (serves until Ctrl-C and prints two export lines)

As a library it runs in a thread with its own event loop:

    with ImagesAPI(latency=0.2, limit=RateLimit(admitted=20, window=2.0)) as api:
        api.script(rate_limited(retry_after=0.1), server_error())   # the next two requests
        api.script_for("gore", moderation_blocked())                # a prompt that contains "gore"
        ...                                                         # a client at api.base_url
        assert [request.status for request in api.requests] == [429, 500, 200]

`script_route("POST /v1/batches", answer_lost())` scripts any other route, and `plan_batch` says how
the next batch goes: polls find its states one after the other. `hold` and `release` keep requests
in flight for as long as a test needs.

Each body is validated against the parameter types of the installed openai package and against what
the API documents; a wrong one is answered with 400 and uses up no scripted reply. The pictures say
on their face that they are placeholders. No key is ever recorded, printed or sent on.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import dataclasses
import hashlib
import html as markup_text
import io
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

try:
    from aiohttp import BodyPartReader, web
    from openai.types import ImageEditParams, ImageGenerateParams, ImageModel
    from openai.types.image_edit_params import ImageEditParamsBase
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from pydantic import ConfigDict, TypeAdapter, ValidationError
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    sys.exit(
        f"Error: the package {missing.name} is missing; install what this server needs with: "
        "python -m pip install aiohttp openai pillow pydantic"
    )

Json = dict[str, Any]

# Seconds after which a wait for an event counts as hanging, however busy the machine may be.
PATIENCE = 120.0

IMAGES = "POST /v1/images/"
GENERATIONS = "POST /v1/images/generations"
EDITS = "POST /v1/images/edits"
STORED = "GET /stored/{name}"

# ---------------------------------------------------------------------------------------------
# Records: what came in and what goes out
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One file part of a multipart body."""

    field: str
    filename: str | None
    content_type: str
    data: bytes = dataclasses.field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it arrived; `status` and `ended` stay None until its answer begins.

    `ended` moves on to the answer's end. A client that goes away, or a connection that breaks
    before the answer, leaves `status` None.
    """

    method: str
    path: str
    route: str
    request_id: str
    headers: Mapping[str, str]
    key_as_expected: bool
    query: Mapping[str, str]
    parameters: Mapping[str, str]
    body: Json
    files: tuple[Upload, ...]
    started: float
    status: int | None = None
    ended: float | None = None

    @property
    def prompt(self) -> str:
        return str(self.body.get("prompt", ""))

    @property
    def is_for_images(self) -> bool:
        return self.route.startswith(IMAGES)

    def log_line(self) -> str:
        kept = ("method", "path", "request_id", "status", "body", "key_as_expected")
        line = {name: getattr(self, name) for name in kept}
        line["files"] = [
            {"field": f.field, "filename": f.filename, "content_type": f.content_type}
            | {"bytes": len(f.data), "sha256": f.sha256}
            for f in self.files
        ]
        line["seconds"] = None if self.ended is None else round(self.ended - self.started, 3)
        return json.dumps(line)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is sent: faults are changes of these fields, and `send` alone knows the connection."""

    status: int = 200
    chunks: Iterable[bytes] = ()
    length: int | None = None  # None: chunked transfer encoding
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: float = 0.0  # seconds between two chunks
    breaks_after: int | None = None  # bytes of the body; 0 closes before the status line
    never: bool = False

    @classmethod
    def of(cls, *chunks: bytes, status: int = 200) -> Self:
        return cls(status=status, chunks=chunks, length=sum(map(len, chunks)))

    def whole(self) -> bytes:
        return b"".join(self.chunks)


Ordinary = Callable[[], Awaitable[Answer]]
"""Computes, when it is awaited, the answer that a request gets when nothing is scripted."""

Reply = Callable[[Ordinary], Awaitable[Answer]]
"""A scripted answer: it may use the ordinary one, change it, or never ask for it."""


# ---------------------------------------------------------------------------------------------
# Failures that the API answers with
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error document with its status: a scripted reply, and what a refused request gets."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def document(self) -> Json:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def answer(self) -> Answer:
        body = json.dumps(self.document).encode()
        return replace(Answer.of(body, status=self.status), headers=self.headers)

    async def __call__(self, _: Ordinary) -> Answer:
        return self.answer


class RefusedError(Exception):
    """Raised by an endpoint whose request the API would refuse."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def refused(message: str, param: str | None = None, code: str | None = None) -> RefusedError:
    return RefusedError(Failure(status=400, message=message, param=param, code=code))


def invalid(param: str, problem: str) -> RefusedError:
    return refused(f"Invalid value: '{param}' {problem}.", param, "invalid_value")


def status(
    number: int,
    message: str = "The loopback server was told to fail.",
    *,
    code: str | None = None,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> Failure:
    return Failure(status=number, message=message, code=code, kind=kind, headers=headers or {})


def moderation_blocked(message: str = "Your request was rejected by the safety system.") -> Failure:
    kind = "image_generation_user_error"
    return Failure(status=400, message=message, kind=kind, code="moderation_blocked")


def unauthorized() -> Failure:
    return status(401, "Incorrect API key provided.", code="invalid_api_key")


def forbidden(message: str = "Your organization must be verified to use this model.") -> Failure:
    return status(403, message)


def unknown_model(model: str = "gpt-image-9") -> Failure:
    message = f"The model '{model}' does not exist or you do not have access to it."
    return replace(status(404, message, code="model_not_found"), param="model")


def insufficient_quota(code: str = "insufficient_quota") -> Failure:
    message = "You exceeded your current quota, please check your plan and billing details."
    return status(429, message, code=code, kind="insufficient_quota")


def server_error(number: int = 500, *, headers: Mapping[str, str] | None = None) -> Failure:
    return status(number, "The server had an error.", kind="server_error", headers=headers)


# ---------------------------------------------------------------------------------------------
# Rate limits
# ---------------------------------------------------------------------------------------------

HeaderForm = Literal[
    "retry-after", "retry-after-seconds", "retry-after-ms", "http-date", "reset", "none"
]

# Rounded up, since a client that comes a millisecond early is refused once more.
RETRY_HEADERS: dict[HeaderForm, Callable[[float], dict[str, str]]] = {
    "retry-after": lambda wait: {"retry-after": f"{math.ceil(wait * 1000) / 1000:.3f}"},
    "retry-after-seconds": lambda wait: {"retry-after": str(math.ceil(wait))},
    "retry-after-ms": lambda wait: {"retry-after-ms": str(math.ceil(wait * 1000))},
    "http-date": lambda wait: {
        "retry-after": formatdate(math.ceil(time.time() + wait), usegmt=True)
    },
    "reset": lambda wait: {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": f"{math.ceil(wait * 1000)}ms",
    },
    "none": lambda _: {},
}


def rate_limited(
    retry_after: float | None = None,
    *,
    form: HeaderForm = "retry-after",
    code: str = "rate_limit_exceeded",
    headers: Mapping[str, str] | None = None,
) -> Failure:
    """A 429 that means slow down; `form` says in which header `retry_after` (seconds) stands."""
    waiting = {} if retry_after is None else RETRY_HEADERS[form](retry_after)
    message = "Rate limit reached for images per minute."
    return status(429, message, code=code, kind="requests", headers={**waiting, **(headers or {})})


@dataclass(kw_only=True)
class RateLimit:
    """Admits so many requests in each window and refuses the others at once.

    `fixed` windows follow each other from the first request on, and `Retry-After` gives the time to
    the next one; a refused request can only fall into a window that is full already. In a `sliding`
    window the last `window` seconds count, and with `count_refused` the refused requests of that
    time as well, so that a client that keeps asking starves itself.
    """

    admitted: int
    window: float
    kind: Literal["fixed", "sliding"] = "fixed"
    count_refused: bool = True
    headers: HeaderForm = "retry-after"
    refused: int = 0
    admitted_times: list[float] = field(default_factory=list)
    _counted: deque[float] = field(default_factory=deque, repr=False)

    def wait(self, now: float) -> float | None:
        """Counts a request; None admits it, else the seconds after which to ask again."""
        if self.kind == "fixed" and self.admitted_times:
            first = self.admitted_times[0]
            opened = first + (now - first) // self.window * self.window
        else:
            opened = now - self.window
        while self._counted and self._counted[0] < opened:
            self._counted.popleft()
        if len(self._counted) < self.admitted:
            self._counted.append(now)
            self.admitted_times.append(now)
            return None
        self.refused += 1
        if self.count_refused:
            self._counted.append(now)
        if self.kind == "fixed":
            return opened + self.window - now
        return self._counted[-self.admitted] + self.window - now


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

PictureStyle = Literal["placeholder", "flat", "noise"]


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that decides the bytes of a picture."""

    style: PictureStyle
    width: int
    height: int
    output_format: str
    transparent: bool
    compression: int
    frames: int
    frame_ms: int
    caption: str


# Flat and noisy pictures have no caption, so that all requests of a benchmark share them.
@lru_cache(maxsize=256)
def picture(look: Look, index: int) -> bytes:
    """The image as base64 text."""
    if look.output_format == "svg":
        return base64.b64encode(svg(look, index))
    frames = [DRAW[look.style](look, index, frame) for frame in range(look.frames)]
    return base64.b64encode(encoded(frames, look))


def encoded(frames: list[Image.Image], look: Look) -> bytes:
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 1},
        "jpeg": {"quality": look.compression},
        "webp": {"quality": look.compression, "method": 0},
        "gif": {"save_all": True, "append_images": frames[1:], "loop": 0}
        | {"duration": round(look.frame_ms, -1)},
    }
    file = io.BytesIO()
    frames[0].save(file, format=look.output_format, **options[look.output_format])
    return file.getvalue()


def colour_of(text: str) -> tuple[int, int, int]:
    red, green, blue = hashlib.sha256(text.encode()).digest()[:3]
    return 40 + red // 3, 40 + green // 3, 40 + blue // 3


def draw_placeholder(look: Look, index: int, frame: int) -> Image.Image:
    width, height = look.width, look.height
    colour = colour_of(f"{index} {look.caption}")
    ground = (*colour, 0) if look.transparent else colour
    image = Image.new("RGBA" if look.transparent else "RGB", (width, height), ground)
    pen = ImageDraw.Draw(image)
    unit = max(8, min(width, height) // 24)
    columns = max(8, int(width / unit * 1.5))
    lines = ["OFFLINE PLACEHOLDER", f"{width}x{height} {look.output_format}, image {index + 1}"]
    for paragraph in look.caption.splitlines():
        lines += textwrap.wrap(paragraph, columns) or [""]
    fitting = max(2, int(height / (unit * 1.4)) - 3)
    panel = (unit, unit, width - unit, height - unit)
    pen.rectangle(panel, fill=colour, outline="white", width=max(1, unit // 8))
    text = "\n".join(lines[:fitting])
    pen.multiline_text((2 * unit, 2 * unit), text, fill="white", font=font(unit))
    pen.rectangle((0, height - unit // 2, width * (frame + 1) // look.frames, height), fill="white")
    return image


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_flat(look: Look, index: int, frame: int) -> Image.Image:
    size, colour = (look.width, look.height), colour_of(f"{index} {frame}")
    if not look.transparent:
        return Image.new("RGB", size, colour)
    image = Image.new("RGBA", size, (*colour, 0))
    image.paste((*colour, 255), (0, 0, look.width // 2, look.height))
    return image


def draw_noise(look: Look, _index: int, _frame: int) -> Image.Image:
    """Noise of 20 levels: about 15 MB as a PNG of 3840x2160."""
    mode = "RGBA" if look.transparent else "RGB"
    noise = os.urandom(look.width * look.height * len(mode))
    return Image.frombytes(mode, (look.width, look.height), noise).point(lambda v: v // 13 * 13)


DRAW: dict[PictureStyle, Callable[[Look, int, int], Image.Image]] = {
    "placeholder": draw_placeholder,
    "flat": draw_flat,
    "noise": draw_noise,
}


def svg(look: Look, index: int) -> bytes:
    caption = markup_text.escape(look.caption)
    red, green, blue = colour_of(f"{index} {look.caption}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{look.width}" height="{look.height}" '
        f'viewBox="0 0 {look.width} {look.height}"><rect width="100%" height="100%" '
        f'fill="rgb({red},{green},{blue})"/><text x="32" y="64" fill="white" font-size="32">'
        f"OFFLINE PLACEHOLDER {look.width}x{look.height} {caption}</text></svg>\n"
    ).encode()


def bomb_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A whole, valid PNG of some 50 kB that unpacks to more pixels than Pillow accepts."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * height))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---------------------------------------------------------------------------------------------
# Reading a request: fields, files and references
# ---------------------------------------------------------------------------------------------

EDIT_HINTS = get_type_hints(ImageEditParamsBase)
INTEGER_FIELDS = {name for name, hint in EDIT_HINTS.items() if int in get_args(hint)}
FILE_FIELDS = ("image", "image[]", "mask", "markup")
MAX_IMAGE_BYTES = 50_000_000
MAX_DATA_URL_CHARACTERS = 20_971_520
SIGNATURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


async def read_body(request: web.Request) -> tuple[Json, tuple[Upload, ...]]:
    """The JSON body, or the fields of a multipart body with the types that JSON would have."""
    if request.method != "POST":
        return {}, ()
    if request.content_type == "multipart/form-data":
        return await read_multipart(request)
    data = await request.read()
    if not data and "images" not in request.path:
        return {}, ()
    try:
        body = json.loads(data, parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError):
        body = None
    if request.content_type != "application/json" or not isinstance(body, dict):
        raise refused("We could not parse the JSON body of your request.")
    return body, ()


def refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


async def read_multipart(request: web.Request) -> tuple[Json, tuple[Upload, ...]]:
    body: Json = {}
    files: list[Upload] = []
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise refused("We could not parse the multipart body of your request.")
        data = bytes(await part.read())
        if part.filename is None and part.name not in FILE_FIELDS:
            set_field(body, part.name, data.decode(errors="replace"))
            continue
        content_type = part.headers.get("content-type", "application/octet-stream")
        files.append(
            Upload(field=part.name, filename=part.filename, content_type=content_type, data=data)
        )
    return body, tuple(files)


def set_field(body: Json, name: str, text: str) -> None:
    """Sets a form field; `svg[model]` stands for a key of an object."""
    *parents, key = re.findall(r"[^\[\]]+", name) or [name]
    for parent in parents:
        body = body.setdefault(parent, {})
    if key in body:
        raise refused(f"Duplicate parameter: '{name}'.", key, "duplicate_parameter")
    if key in INTEGER_FIELDS and re.fullmatch(r"-?\d{1,9}", text):
        body[key] = int(text)
    elif key == "stream":
        body[key] = {"true": True, "false": False}.get(text, text)
    else:
        body[key] = text


def uploaded_images(files: tuple[Upload, ...]) -> Json:
    """The images, the mask and the markup of an edit from the parts of a form."""
    found: Json = {"image": []}
    for upload in files:
        name = upload.field.removesuffix("[]")
        if upload.field not in FILE_FIELDS:
            raise refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        check_image(upload.data, upload.content_type, name)
        if name == "image" and (upload.field == "image[]" or not found["image"]):
            found["image"].append(upload.data)
        elif name not in found:
            found[name] = upload.data
        else:
            raise refused(f"Duplicate parameter: '{name}'.", name, "duplicate_parameter")
    return counted_images(found)


def referred_images(references: object, body: Json, load_file: Callable[[str], bytes]) -> Json:
    """The same from the references of a JSON body."""
    entries = references if isinstance(references, list) else []
    found: Json = {"image": [referred_image(entry, load_file) for entry in entries]}
    names = [name for name in ("mask", "markup") if body.get(name) is not None]
    return counted_images(found | {name: referred_image(body[name], load_file) for name in names})


def counted_images(found: Json) -> Json:
    if not found["image"]:
        code = "missing_required_parameter"
        raise refused("Missing required parameter: 'image'.", "image", code)
    if len(found["image"]) > 16:
        raise refused("At most 16 images are accepted.", "image", "too_many_images")
    return found


def referred_image(reference: object, load_file: Callable[[str], bytes]) -> bytes:
    match reference:
        case {"file_id": str(file_id), **rest} if not rest:
            data = load_file(file_id)
        case {"image_url": str(url), **rest} if not rest and len(url) <= MAX_DATA_URL_CHARACTERS:
            data = data_of(url)
        case _:
            raise invalid("images", "takes {'file_id': …} or {'image_url': …} below 20 MB")
    check_image(data, content_type_of(data), "images")
    return data


def content_type_of(data: bytes) -> str:
    types = [name for name, signature in SIGNATURES.items() if signature.match(data)]
    return types[0] if types else "application/octet-stream"


def data_of(url: str) -> bytes:
    found = re.fullmatch(r"data:image/[a-z]+;base64,(.*)", url, re.DOTALL)
    with contextlib.suppress(binascii.Error):
        if found:
            return base64.b64decode(found[1], validate=True)
    raise refused("The image_url cannot be fetched.", "images", "invalid_image_url")


def check_image(data: bytes, content_type: str, param: str) -> None:
    signature = SIGNATURES.get(content_type)
    if signature is None:
        message = f"Invalid file '{param}': {content_type} is none of {', '.join(SIGNATURES)}."
        raise refused(message, param, "unsupported_file_mimetype")
    if len(data) >= MAX_IMAGE_BYTES:
        raise refused(f"Invalid file '{param}': too large.", param, "file_too_large")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        signature = None
    if signature is None or not signature.match(data):
        raise refused(f"Invalid image file in '{param}'.", param, "invalid_image_file")


# ---------------------------------------------------------------------------------------------
# Validation: what the API takes
# ---------------------------------------------------------------------------------------------

STRICT = ConfigDict(arbitrary_types_allowed=True, extra="forbid", strict=True)
PARAMETERS: dict[str, TypeAdapter[Any]] = {
    GENERATIONS: TypeAdapter(ImageGenerateParams, config=STRICT),
    EDITS: TypeAdapter(ImageEditParams, config=STRICT),
}
MODELS = set(get_args(ImageModel)) - {"dall-e-2", "dall-e-3", "gpt-image-1"}  # these are shut down
MINI = "gpt-image-1-mini"
FIXED_SIZES = ("auto", "1024x1024", "1536x1024", "1024x1536")
# The grid of tokens that a picture is made of: its longer edge, by quality; 2.5 has its own.
GRID = {"low": 16, "medium": 48, "high": 96}
GRID_OF_2_5 = {"low": 16, "medium": 24, "high": 48, "xhigh": 64, "max": 96}
TOKENS_OF_AN_INPUT = 1024
MILLION = 1e6


@dataclass(frozen=True, kw_only=True)
class Order:
    """A validated body with the API's defaults in place of what is not given."""

    edit: bool
    prompt: str
    model: str = "gpt-image-2"
    n: int = 1
    size: str = "auto"
    quality: str = "auto"
    background: str = "auto"
    output_format: str = "png"
    output_compression: int | None = None
    moderation: str = "auto"
    input_fidelity: str | None = None
    complexity: str | None = None
    stream: bool = False
    partial_images: int = 0
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    svg: Json | None = None
    safety_identifier: str | None = None
    user: str | None = None
    style: str | None = None
    response_format: str | None = None
    images: tuple[bytes, ...] = field(default=(), repr=False)
    mask: bytes | None = field(default=None, repr=False)
    markup: bytes | None = field(default=None, repr=False)

    @property
    def is_first_generation(self) -> bool:
        return self.model.startswith("gpt-image-1")

    @property
    def is_newest(self) -> bool:
        return self.model.startswith(("gpt-image-2.5", "gpt-image-2.6"))


Problems = Iterator[tuple[str, str]]  # (parameter, what is wrong with it)


def size_problems(o: Order) -> Problems:
    if o.is_first_generation:
        if o.size not in FIXED_SIZES:
            yield "size", f"must be one of {', '.join(FIXED_SIZES)} for this model"
    elif o.size != "auto" and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", o.size):
        yield "size", "must be auto or WIDTHxHEIGHT"
    elif o.size != "auto":
        width, height = map(int, o.size.split("x"))
        if width % 16 or height % 16:
            yield "size", "must have edges that are multiples of 16"
        if max(width, height) > 3 * min(width, height):
            yield "size", "must have a ratio of at most 3:1"
        if o.output_format == "gif":  # the frames share one sheet, of about nine such squares
            if width * height > 960 * 960:
                yield "size", "must be smaller for a gif"
        elif max(width, height) > 3840 or not 655_360 <= width * height <= 8_294_400:
            yield "size", "must have 655,360 to 8,294,400 pixels and edges of at most 3840"


def model_problems(o: Order) -> Problems:
    unsupported = {
        "quality": o.quality in {"standard", "hd"}
        or (o.quality in {"xhigh", "max"} and not o.is_newest),
        "input_fidelity": o.input_fidelity is not None
        and (not o.is_first_generation or (o.input_fidelity, o.model) == ("high", MINI)),
        "output_format": o.output_format in {"gif", "svg"} and o.is_first_generation,
        "markup": o.markup is not None and not o.is_newest,
        "response_format": o.response_format is not None,
        "style": o.style is not None,
    }
    yield from (
        (name, "is not supported by this model") for name, bad in unsupported.items() if bad
    )


def range_problems(o: Order) -> Problems:
    if not o.prompt.strip() or len(o.prompt) > 32_000:
        yield "prompt", "must have 1 to 32,000 characters"
    ranges = {
        "n": (1, 10),
        "output_compression": (0, 100),
        "partial_images": (0, 3),
        "frame_count": (2, 16),
        "frame_duration_ms": (1, 655_350),
    }
    for name, (low, high) in ranges.items():
        value = getattr(o, name)
        if value is not None and not low <= value <= high:
            yield name, f"must be from {low} to {high}"


def combination_problems(o: Order) -> Problems:
    needed_formats = {
        "output_compression": (o.output_compression is not None, {"jpeg", "webp"}),
        "background": (o.background == "transparent", {"png", "webp"}),
        "frame_count": (o.frame_count is not None, {"gif"}),
        "frame_duration_ms": (o.frame_duration_ms is not None, {"gif"}),
        "svg": (o.svg is not None, {"svg"}),
        "stream": (o.stream, {"png", "jpeg", "webp"}),
        "mask": (o.mask is not None, {"png", "jpeg", "webp", "svg"}),
        "n": (o.n > 1, {"png", "jpeg", "webp", "gif"}),
    }
    for name, (is_given, formats) in needed_formats.items():
        if is_given and o.output_format not in formats:
            yield name, f"is not supported with output_format {o.output_format}"
    if o.partial_images and not o.stream:
        yield "partial_images", "needs stream"
    if o.markup and o.mask:
        yield "markup", "cannot be combined with mask"


def overlay_problems(o: Order) -> Problems:
    """The mask and the markup lie on the first image."""
    for name, data in {"mask": o.mask, "markup": o.markup}.items():
        if data is None:
            continue
        with Image.open(io.BytesIO(data)) as overlay, Image.open(io.BytesIO(o.images[0])) as first:
            if overlay.format != "PNG" or not overlay.has_transparency_data:
                yield name, "must be a PNG with an alpha channel"
            if overlay.size not in {first.size, ImageOps.exif_transpose(first).size}:
                yield name, "must have the size of the first image"


def problems(o: Order) -> Problems:
    yield from range_problems(o)
    yield from size_problems(o)
    yield from model_problems(o)
    yield from combination_problems(o)
    yield from overlay_problems(o)


def check_types(route: str, body: Json) -> None:
    """The SDK's own parameter types judge the body; the first problem is put as the API puts it."""
    branch = "Streaming" if body.get("stream") is True else "NonStreaming"
    try:
        PARAMETERS[route].validate_python(body)
    except ValidationError as error:
        problems = [e for e in error.errors() if str(e["loc"][0]).endswith(f"Params{branch}")]
    else:
        return
    problem = problems[0]
    name = str(problem["loc"][1])
    texts = {
        "missing": ("missing_required_parameter", f"Missing required parameter: '{name}'."),
        "extra_forbidden": ("unknown_parameter", f"Unknown parameter: '{name}'."),
        "literal_error": (
            "invalid_value",
            f"Invalid value for '{name}': expected {problem.get('ctx', {}).get('expected')}.",
        ),
    }
    other = ("invalid_type", f"Invalid type for '{name}': {problem['msg']}.")
    code, message = texts.get(problem["type"], other)
    raise refused(message, name, code)


def order_from(
    route: str, body: Json, files: tuple[Upload, ...], load_file: Callable[[str], bytes]
) -> Order:
    """The validated order of a request for images, or RefusedError."""
    given = dict(body)
    if route == EDITS:
        # The SDK's type of an edit lacks `moderation`, which the HTTP API takes.
        moderation = given.pop("moderation", None)
        if moderation not in (None, "auto", "low"):
            raise invalid("moderation", "must be auto or low")
        references = given.pop("images", None)
        given |= uploaded_images(files) if files else referred_images(references, body, load_file)
    check_types(route, given)
    images = tuple(given.pop("image", ()))
    order = Order(
        edit=route == EDITS,
        images=images,
        **{name: value for name, value in given.items() if value is not None},
    )
    if order.model not in MODELS:
        raise RefusedError(unknown_model(order.model))
    for param, problem in problems(order):
        raise invalid(param, problem)
    return order


# ---------------------------------------------------------------------------------------------
# Ordinary answers
# ---------------------------------------------------------------------------------------------


def look_of(order: Order, style: PictureStyle, auto_size: str) -> Look:
    size = auto_size if order.size == "auto" else order.size
    width, height = map(int, size.split("x"))
    return Look(
        style=style,
        width=width,
        height=height,
        output_format=order.output_format,
        transparent=order.background == "transparent",
        compression=100 if order.output_compression is None else order.output_compression,
        frames=order.frame_count or 9 if order.output_format == "gif" else 1,
        frame_ms=order.frame_duration_ms or 200,
        caption=order.prompt if style == "placeholder" else "",
    )


def settings_of(order: Order, look: Look) -> Json:
    identifier = order.safety_identifier or order.user
    return {
        "background": "transparent" if look.transparent else "opaque",
        "output_format": look.output_format,
        "quality": "medium" if order.quality == "auto" else order.quality,
        "size": f"{look.width}x{look.height}",
    } | ({"safety_identifier": identifier} if identifier else {})


def drawn_tokens(order: Order, look: Look) -> int:
    """Tokens of one picture, as OpenAI's calculator has them; for 2.6 nobody knows them."""
    quality = "medium" if order.quality == "auto" else order.quality
    columns = (GRID if f"{order.model}-".startswith("gpt-image-2-") else GRID_OF_2_5).get(quality)
    columns = columns or {**GRID_OF_2_5, **GRID}[quality]
    long, short = max(look.width, look.height), min(look.width, look.height)
    share = Fraction(2_000_000 + look.width * look.height, 4_000_000)
    return math.ceil(columns * round(columns * Fraction(short, long)) * share)


def usage_of(order: Order, look: Look, pictures: int, noise: float = 1.0) -> Json:
    text = len(order.prompt) // 4 + 1
    seen = TOKENS_OF_AN_INPUT * len(order.images)
    drawn = math.floor(pictures * drawn_tokens(order, look) * noise)
    return {
        "input_tokens": text + seen,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + seen + drawn,
    }


def price_of(usage: Json) -> float:
    """Dollars, by the prices of 2026-11-25."""
    details = usage["input_tokens_details"]
    inputs = 5 * details["text_tokens"] + 8 * details["image_tokens"]
    return float((inputs + 30 * usage["output_tokens"]) / MILLION)


def images_document(order: Order, look: Look, usage: Json | None = None) -> list[bytes]:
    """An ImagesResponse in pieces, since json.dumps would copy 20 MB for each 4K picture."""
    head = {"created": int(time.time()), **settings_of(order, look)}
    head["usage"] = usage or usage_of(order, look, order.n)
    if look.output_format == "svg":
        tokens = {"input_tokens": 100, "output_tokens": 200, "reasoning_tokens": 0}
        model = (order.svg or {}).get("model", "gpt-6-astra")
        head["svg_usage"] = {"model": model, **tokens, "total_tokens": 300}
    pieces = [json.dumps(head).encode()[:-1], b',"data":[']
    for index in range(order.n):
        pieces += [b',{"b64_json":"' if index else b'{"b64_json":"', picture(look, index), b'"}']
    return [*pieces, b"]}"]


def stream_events(order: Order, look: Look, usage: Json) -> list[bytes]:
    """For each picture its partial images, then the completed one, as server-sent events."""
    kind = "image_edit" if order.edit else "image_generation"
    shared = {"created_at": int(time.time()), **settings_of(order, look)}
    identifier = shared.pop("safety_identifier", None)
    usage = {key: value for key, value in usage.items() if key != "output_tokens_details"}
    events: list[bytes] = []
    for index in range(order.n):
        drafts = order.partial_images
        looks = [replace(look, caption=f"draft {d + 1} of {drafts}") for d in range(drafts)]
        for draft, partial_look in enumerate(looks):
            event = {"type": f"{kind}.partial_image", "partial_image_index": draft, **shared}
            events.append(sent_event(event, picture(partial_look, index)))
        event = {"type": f"{kind}.completed", "usage": usage, **shared}
        event |= {"safety_identifier": identifier} if identifier else {}
        events.append(sent_event(event, picture(look, index)))
    return events


def sent_event(event: Json, base64_text: bytes) -> bytes:
    document = json.dumps(event | {"b64_json": base64_text.decode()})
    return f"event: {event['type']}\ndata: {document}\n\n".encode()


# ---------------------------------------------------------------------------------------------
# Scripted replies: faults as changes of the ordinary answer
# ---------------------------------------------------------------------------------------------


def changed(change: Callable[[Answer], Answer]) -> Reply:
    async def reply(ordinary: Ordinary) -> Answer:
        return change(await ordinary())

    return reply


def always(answer: Answer) -> Reply:
    async def reply(_: Ordinary) -> Answer:
        return answer

    return reply


def answered(
    body: bytes,
    *,
    number: int = 200,
    content_type: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """A body as it is, whatever was asked for."""
    answer = Answer.of(body, status=number)
    return always(replace(answer, content_type=content_type, headers=headers or {}))


def ok() -> Reply:
    """The ordinary answer, for a place in a script where nothing is wrong."""
    return changed(lambda answer: answer)


def delayed(seconds: float, reply: Reply | None = None) -> Reply:
    async def late(ordinary: Ordinary) -> Answer:
        await asyncio.sleep(seconds)
        return await (reply or ok())(ordinary)

    return late


def connection_closed() -> Reply:
    """The connection closes and nothing was done."""
    return always(Answer(breaks_after=0))


def answer_lost() -> Reply:
    """The work is done (a batch is made, say) and the connection closes before the answer."""
    return changed(lambda answer: replace(answer, breaks_after=0))


def answer_cut(share: float = 0.5) -> Reply:
    """The connection closes in the middle of the body."""
    return changed(lambda answer: replace(answer, breaks_after=int((answer.length or 0) * share)))


def stream_cut(events: int) -> Reply:
    """The connection closes after so many events of a stream."""

    def cut(answer: Answer) -> Answer:
        chunks = list(answer.chunks)
        return replace(answer, chunks=chunks, breaks_after=sum(map(len, chunks[:events])))

    return changed(cut)


def no_answer() -> Reply:
    """The connection stays open and silent until the client goes."""
    return always(Answer(never=True))


def slow_body(seconds: float, pieces: int = 10) -> Reply:
    def slowed(answer: Answer) -> Answer:
        body = answer.whole()
        step = max(1, math.ceil(len(body) / pieces))
        chunks = [body[start : start + step] for start in range(0, len(body), step)]
        return replace(answer, chunks=chunks, pause=seconds / pieces)

    return changed(slowed)


def html(number: int = 502) -> Reply:
    page = f"<html><body><h1>{number} Bad Gateway</h1></body></html>".encode()
    return always(replace(Answer.of(page, status=number), content_type="text/html"))


def document(change: Callable[[Json], object]) -> Reply:
    """The ordinary answer's JSON after `change` has worked on it in place."""

    def rewritten(answer: Answer) -> Answer:
        content: Json = json.loads(answer.whole())
        change(content)
        return replace(answer, **vars(Answer.of(json.dumps(content).encode())))

    return changed(rewritten)


def base64_texts(change: Callable[[str], str]) -> Reply:
    def rewrite(content: Json) -> None:
        content["data"] = [{"b64_json": change(entry["b64_json"])} for entry in content["data"]]

    return document(rewrite)


def image_bytes(change: Callable[[bytes], bytes]) -> Reply:
    return base64_texts(lambda text: base64.b64encode(change(base64.b64decode(text))).decode())


def redrawn(image_format: str | None = None, size: tuple[int, int] | None = None) -> Reply:
    """The pictures in another format or size than asked for."""

    def redraw(data: bytes) -> bytes:
        file = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            copy = image.resize(size or image.size).convert("RGB")
            copy.save(file, format=image_format or image.format)
        return file.getvalue()

    return image_bytes(redraw)


def wrong_base64() -> Reply:
    return base64_texts(lambda text: "%%% this is no base64 %%%" + text)


def not_an_image() -> Reply:
    return image_bytes(lambda _: b"These bytes are no image.")


def truncated_image() -> Reply:
    return image_bytes(lambda data: data[: len(data) // 2])


def decompression_bomb() -> Reply:
    return image_bytes(lambda _: bomb_png())


def no_data() -> Reply:
    return document(lambda content: content.pop("data"))


def empty_data() -> Reply:
    return document(lambda content: content.update(data=[]))


def fewer_images(count: int = 1) -> Reply:
    return document(lambda content: content.update(data=content["data"][:count]))


def more_images(extra: int = 1) -> Reply:
    return document(lambda content: content["data"].extend(content["data"][:1] * extra))


def huge_extra(megabytes: int = 20) -> Reply:
    return document(lambda content: content.update(extra="x" * megabytes * 1_000_000))


@dataclass(kw_only=True)
class Rule:
    """Replies for a route, or all below it if it ends with a slash, and for matching prompts."""

    route: str
    replies: deque[Reply]
    repeat: bool = False  # the last reply stays
    prompt: Callable[[str], bool] | None = None

    def matches(self, route: str, prompt: str) -> bool:
        is_below = self.route.endswith("/") and route.startswith(self.route)
        if not self.replies or not (is_below or route == self.route):
            return False
        return self.prompt is None or self.prompt(prompt)

    def take(self) -> Reply:
        return self.replies[0] if self.repeat and len(self.replies) == 1 else self.replies.popleft()


# ---------------------------------------------------------------------------------------------
# Files and batches
# ---------------------------------------------------------------------------------------------

Lines = Iterable[bytes]
PURPOSES = {"assistants", "batch", "evals", "fine-tune", "user_data", "vision"}
FINAL_STATES = {"failed", "completed", "expired", "cancelled"}


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """An uploaded or produced file; what a batch produced is made anew for each download."""

    id: str
    filename: str
    purpose: str
    created_at: int
    length: int
    content: Callable[[], Lines] = field(repr=False)

    @property
    def document(self) -> Json:
        facts = {name: getattr(self, name) for name in ("id", "filename", "purpose", "created_at")}
        return facts | {"object": "file", "bytes": self.length, "status": "processed"}


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a batch goes: each poll finds the next state, the last one stays.

    Of the requests the first `share` is executed; `cancelled_share` if the batch is cancelled. With
    `errors` (as `batch_error` makes them) the validation fails. `output` may spoil the output file.
    """

    states: tuple[str, ...] = ("in_progress", "finalizing", "completed")
    share: float = 1.0
    cancelled_share: float = 0.5
    errors: tuple[Json, ...] = ()
    output: Callable[[Lines], Lines] = lambda lines: lines


def batch_error(code: str, message: str, line: int | None = None) -> Json:
    return {"code": code, "message": message, "line": line, "param": None}


def token_limit_exceeded() -> Json:
    message = "Enqueued token limit reached for gpt-image-2 in this organization."
    return batch_error("token_limit_exceeded", message)


def cut_output(lines: Lines) -> Lines:
    """An output file whose last line ends in its middle."""
    *whole, last = lines
    yield from whole
    yield last[: len(last) // 2]


def stray_output(lines: Lines) -> Lines:
    """An output file that begins with an answer to nobody's question."""
    yield b'{"id":"batch_req_0","custom_id":"nobody","response":null,"error":null}\n'
    yield from lines


@dataclass(frozen=True, kw_only=True)
class BatchLine:
    """One request of a batch: an order, or the failure that it ends with."""

    custom_id: str
    body: Json
    result: Order | Failure
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def written(self, answer: bytes, number: int) -> bytes:
        """The line of an output or error file, joined by hand as in images_document."""
        response = {"status_code": number, "request_id": f"req_{self.id}"}
        opening = json.dumps(self._head | {"response": response}).encode()[:-2]
        return b'%b,"body":%b},"error":null}\n' % (opening, answer)

    def unfinished(self, state: str) -> bytes:
        error = {"code": f"batch_{state}", "message": f"This request was not executed: {state}."}
        return json.dumps(self._head | {"response": None, "error": error}).encode() + b"\n"

    @property
    def _head(self) -> Json:
        return {"id": f"batch_req_{self.id}", "custom_id": self.custom_id}


@dataclass(kw_only=True)
class Batch:
    """A batch and where it stands; `states` are those to come."""

    id: str
    endpoint: str
    input_file_id: str
    metadata: Json | None
    lines: list[BatchLine] = field(repr=False)
    errors: list[Json]
    plan: BatchPlan
    status: str = "validating"
    states: deque[str] = field(default_factory=deque)
    times: dict[str, int] = field(default_factory=dict)
    output_file_id: str | None = None
    error_file_id: str | None = None

    def executed(self, *, so_far: float = 1.0) -> list[BatchLine]:
        was_cancelled = "cancelling_at" in self.times
        share = self.plan.cancelled_share if was_cancelled else self.plan.share
        return self.lines[: round(len(self.lines) * share * so_far)]

    def enter(self, state: str) -> None:
        self.status = state
        self.times[f"{state}_at"] = int(time.time())

    @property
    def document(self) -> Json:
        begun = self.status not in {"validating", "failed"}
        so_far = {"validating": 0, "failed": 0, "in_progress": 0.5}.get(self.status, 1)
        executed = self.executed(so_far=so_far)
        failed = sum(isinstance(line.result, Failure) for line in executed)
        counts = {"completed": len(executed) - failed, "failed": failed}
        names = ("id", "endpoint", "input_file_id", "metadata", "status")
        return {
            **{name: getattr(self, name) for name in names},
            "object": "batch",
            "completion_window": "24h",
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "errors": {"object": "list", "data": self.errors} if self.status == "failed" else None,
            "request_counts": counts | {"total": len(self.lines) if begun else 0},
            "expires_at": self.times["created_at"] + 24 * 3600,
            **self.times,
        }


class BatchService:
    """The Files and the Batch API; each method that takes a request is an endpoint."""

    def __init__(
        self,
        draw: Callable[[Order], bytes],
        failure_for: Callable[[str, str], Failure | None],
    ) -> None:
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, Batch] = {}
        self.plans: deque[BatchPlan] = deque()
        self.max_lines = 50_000
        self.max_bytes = 200_000_000
        self._draw = draw
        self._failure_for = failure_for

    # Files

    def store(self, filename: str, purpose: str, content: Callable[[], Lines]) -> StoredFile:
        stored = StoredFile(
            id=f"file-{uuid.uuid4().hex}",
            filename=filename,
            purpose=purpose,
            created_at=int(time.time()),
            length=sum(map(len, content())),
            content=content,
        )
        self.files[stored.id] = stored
        return stored

    def data(self, file_id: str) -> bytes:
        return b"".join(self._file(file_id).content())

    def _file(self, file_id: str) -> StoredFile:
        if file_id not in self.files:
            raise RefusedError(status(404, f"No such File object: {file_id}"))
        return self.files[file_id]

    async def create_file(self, request: Request) -> Answer:
        purpose = str(request.body.get("purpose"))
        if purpose not in PURPOSES:
            raise invalid("purpose", "is none of the accepted ones")
        if [upload.field for upload in request.files] != ["file"]:
            raise refused("Missing required parameter: 'file'.", "file")
        upload = request.files[0]
        if purpose == "vision":
            check_image(upload.data, content_type_of(upload.data), "file")
        if purpose == "batch" and not (upload.filename or "").endswith(".jsonl"):
            raise refused("The file of a batch must be .jsonl.", "file")
        if purpose == "batch" and len(upload.data) > self.max_bytes:
            raise refused(f"The file exceeds {self.max_bytes} bytes.", "file")
        return told(self.store(upload.filename or "", purpose, lambda: (upload.data,)).document)

    async def get_file(self, request: Request) -> Answer:
        return told(self._file(request.parameters["file_id"]).document)

    async def get_content(self, request: Request) -> Answer:
        stored = self._file(request.parameters["file_id"])
        kind = "application/octet-stream"
        return Answer(chunks=stored.content(), length=stored.length, content_type=kind)

    async def delete_file(self, request: Request) -> Answer:
        stored = self._file(request.parameters["file_id"])
        del self.files[stored.id]
        return told({"id": stored.id, "object": "file", "deleted": True})

    async def list_files(self, request: Request) -> Answer:
        purpose = request.query.get("purpose")
        files = [f for f in self.files.values() if purpose in {None, f.purpose}]
        newest_first = request.query.get("order") != "asc"
        documents = [stored.document for stored in files]
        return told(page(documents[::-1] if newest_first else documents, request, 10_000))

    # Batches

    def _batch(self, request: Request) -> Batch:
        batch_id = request.parameters["batch_id"]
        if batch_id not in self.batches:
            raise RefusedError(status(404, f"No batch found with id '{batch_id}'."))
        return self.batches[batch_id]

    async def create_batch(self, request: Request) -> Answer:
        body: Json = request.body
        known = {"input_file_id", "endpoint", "completion_window", "metadata"}
        for name in body.keys() - known - {"output_expires_after"}:
            raise refused(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        if str(body.get("endpoint")) not in {route.split()[1] for route in PARAMETERS}:
            raise invalid("endpoint", "is none of the accepted ones")
        if body.get("completion_window") != "24h":
            raise refused("The completion_window must be 24h.", "completion_window")
        check_metadata(body.get("metadata"))
        stored = self._file(str(body.get("input_file_id")))
        if stored.purpose != "batch":
            raise refused("The input file must have purpose batch.", "input_file_id")
        plan = self.plans.popleft() if self.plans else BatchPlan()
        errors = list(plan.errors)
        lines = list(self._read_lines(stored, body["endpoint"], errors))
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=body["endpoint"],
            input_file_id=stored.id,
            metadata=body.get("metadata"),
            lines=lines,
            errors=errors,
            plan=plan,
            states=deque(["failed"] if errors else plan.states),
            times={"created_at": int(time.time())},
        )
        self.batches[batch.id] = batch
        return told(batch.document)

    def _read_lines(
        self, stored: StoredFile, endpoint: str, errors: list[Json]
    ) -> Iterator[BatchLine]:
        """The requests of an input file; what is wrong with the file goes to `errors`."""
        lines = self.data(stored.id).removesuffix(b"\n").split(b"\n")
        if len(lines) > self.max_lines:
            message = f"The file has {len(lines)} lines; at most {self.max_lines} are accepted."
            errors.append(batch_error("too_many_lines", message))
            return
        seen: set[str] = set()
        models: set[str] = set()
        for number, line in enumerate(lines, 1):
            match parsed(line):
                case {"custom_id": str(custom_id), "method": "POST", "url": str(url), **rest} if (
                    url == endpoint and rest.keys() == {"body"} and isinstance(rest["body"], dict)
                ):
                    body: Json = rest["body"]
                case _:
                    message = f"A line must have custom_id, method POST, url {endpoint} and body."
                    errors.append(batch_error("invalid_request_line", message, number))
                    continue
            if custom_id in seen:
                message = f"The custom_id '{custom_id}' is not unique."
                errors.append(batch_error("duplicate_custom_id", message, number))
            seen.add(custom_id)
            models.add(str(body.get("model")))
            if len(models) > 1:
                message = "All requests of a batch must have the same model."
                errors.append(batch_error("mismatched_model", message, number))
            yield BatchLine(custom_id=custom_id, body=body, result=self._judge(endpoint, body))

    def _judge(self, endpoint: str, body: Json) -> Order | Failure:
        route = f"POST {endpoint}"
        try:
            order = order_from(route, body, (), self.data)
        except RefusedError as error:
            return error.failure
        if order.stream:
            return status(400, "A request of a batch cannot stream.")
        return self._failure_for(route, order.prompt) or order

    async def get_batch(self, request: Request) -> Answer:
        batch = self._batch(request)
        if batch.states:
            state = batch.states.popleft()
            if state in FINAL_STATES - {"failed"}:
                await asyncio.to_thread(self._write_files, batch, state)
            batch.enter(state)
        return told(batch.document)

    async def cancel_batch(self, request: Request) -> Answer:
        batch = self._batch(request)
        if batch.status in FINAL_STATES:
            message = f"Cannot cancel a batch with status '{batch.status}'."
            raise RefusedError(status(409, message))
        batch.enter("cancelling")
        batch.states = deque(["cancelled"])
        return told(batch.document)

    async def list_batches(self, request: Request) -> Answer:
        documents = [batch.document for batch in self.batches.values()]
        return told(page(documents[::-1], request, 20))

    def _write_files(self, batch: Batch, state: str) -> None:
        executed = batch.executed()
        rest = batch.lines[len(executed) :]
        random.Random(batch.id).shuffle(executed)
        orders = [(line, line.result) for line in executed if isinstance(line.result, Order)]
        failures = [(line, line.result) for line in executed if isinstance(line.result, Failure)]

        def output() -> Lines:
            return batch.plan.output(line.written(self._draw(order), 200) for line, order in orders)

        def errors() -> Lines:
            for line, failure in failures:
                yield line.written(json.dumps(failure.document).encode(), failure.status)
            for line in rest:
                yield line.unfinished(state)

        if orders:
            stored = self.store(f"{batch.id}_output.jsonl", "batch_output", output)
            batch.output_file_id = stored.id
        if failures or rest:
            stored = self.store(f"{batch.id}_error.jsonl", "batch_output", errors)
            batch.error_file_id = stored.id


def told(content: Json) -> Answer:
    return Answer.of(json.dumps(content).encode())


def parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def check_metadata(metadata: object) -> None:
    match metadata:
        case None:
            return
        case dict() if len(metadata) <= 16 and all(
            isinstance(value, str) and len(key) <= 64 and len(value) <= 512
            for key, value in metadata.items()
        ):
            return
    raise invalid("metadata", "takes 16 pairs of short texts")


def page(documents: list[Json], request: Request, limit: int) -> Json:
    """The part of a list that `after` and `limit` of the request ask for."""
    ids = [document["id"] for document in documents]
    after = request.query.get("after")
    start = ids.index(after) + 1 if after in ids else 0
    size = int(request.query.get("limit", limit))
    shown = documents[start : start + size]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    more = start + size < len(documents)
    return {
        "object": "list",
        "data": shown,
        "has_more": more,
        "first_id": None,
        "last_id": None,
    } | ends


# ---------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------

Endpoint = Callable[[Request], Ordinary]
"""Judges a request now, RefusedError included, and acts when what it returns is awaited."""

KEY = "offline-placeholder-key"
WRITE_BYTES = 2**18  # a larger piece would be copied by the transport
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


class ImagesAPI:
    """The server, its record of requests, and the strings by which a test pulls it."""

    def __init__(
        self,
        *,
        latency: float = 0.0,
        limit: RateLimit | None = None,
        pictures: PictureStyle = "placeholder",
        auto_size: str = "1024x1024",
        on_answer: Callable[[Request], object] = lambda _: None,
    ) -> None:
        self.latency = latency
        self.limit = limit
        self.pictures: PictureStyle = pictures
        self.auto_size = auto_size
        self.base_url = ""
        self.peak_in_flight = 0
        self.billed = 0.0  # dollars, for what was drawn outside of batches
        self.noise: Callable[[], float] = lambda: 1.0  # by which the tokens of pictures are off
        self._on_answer = on_answer
        self._in_flight = 0
        self._rules: list[Rule] = []
        self._requests: list[Request] = []
        self._changed = threading.Condition()
        self._crash: Exception | None = None
        self._holding = False
        self._held: deque[asyncio.Event] = deque()
        self._stored: dict[str, bytes] = {}
        self._service = BatchService(
            draw=lambda order: b"".join(images_document(order, self._look(order))),
            failure_for=self._scripted_failure,
        )
        # One artist, so that requests for the same picture wait for one drawing of it.
        self._artist = ThreadPoolExecutor(1, thread_name_prefix="artist")
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="images-api", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._ready.result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._artist.shutdown()
        if self._crash:
            raise self._crash  # a mistake of this file must not pass for a fault of the network

    # What a test asks for

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order of arrival."""
        with self._changed:
            return list(self._requests)

    @property
    def image_requests(self) -> list[Request]:
        return [request for request in self.requests if request.is_for_images]

    def env(self) -> dict[str, str]:
        """The variables that point a client here, with a dummy key and past any proxy."""
        variables = {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": KEY}
        return variables | dict.fromkeys(PROXIES, "") | {"NO_PROXY": "*", "no_proxy": "*"}

    def wait_until(
        self, condition: Callable[[list[Request]], bool], timeout: float = PATIENCE
    ) -> None:
        """Waits until the record of requests satisfies the condition."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self._requests), timeout):
                statuses = [request.status for request in self._requests]
                raise TimeoutError(f"not within {timeout} s; statuses so far: {statuses}")

    def wait_for_requests(self, count: int, timeout: float = PATIENCE) -> None:
        """Waits until so many requests for images have arrived."""
        self.wait_until(lambda all_: sum(r.is_for_images for r in all_) >= count, timeout)

    def wait_for_route(self, route: str, timeout: float = PATIENCE) -> None:
        """Blocks until a request for a route has arrived."""
        self.wait_until(lambda all_: any(request.route == route for request in all_), timeout)

    def forget_files(self) -> None:
        """The account loses all that was uploaded."""
        self._service.files.clear()

    def wait_for_answers(self, count: int, timeout: float = PATIENCE) -> None:
        """Waits until so many requests for images have been answered."""
        self.wait_until(
            lambda all_: sum(r.is_for_images and bool(r.status) for r in all_) >= count, timeout
        )

    def script(self, *replies: Reply, repeat: bool = False) -> None:
        """Replies for the next requests for images; with `repeat` the last one stays."""
        self.script_route(IMAGES, *replies, repeat=repeat)

    def script_for(
        self, prompt: str | Callable[[str], bool], *replies: Reply, repeat: bool = False
    ) -> None:
        """Replies for requests whose prompt contains a text or satisfies a condition."""
        test = prompt if callable(prompt) else partial(_contains, prompt)
        self._rules.insert(
            0, Rule(route=IMAGES, replies=deque(replies), repeat=repeat, prompt=test)
        )

    def script_route(self, route: str, *replies: Reply, repeat: bool = False) -> None:
        """Replies for a route as `Request.route` names it, as in "POST /v1/batches"."""
        self._rules.append(Rule(route=route, replies=deque(replies), repeat=repeat))

    def forget_script(self) -> None:
        """What is left of all scripts is dropped."""
        self._rules.clear()

    def plan_batch(self, *plans: BatchPlan) -> None:
        """How the next batches go."""
        self._service.plans.extend(plans)

    def limit_batches(self, *, lines: int = 50_000, size: int = 200_000_000) -> None:
        """The limits of an input file, lower for tests."""
        self._service.max_lines, self._service.max_bytes = lines, size

    @property
    def batches(self) -> list[Batch]:
        return list(self._service.batches.values())

    def forget_batches(self) -> None:
        """Go on as a service that has had none."""
        self._service.batches.clear()

    @property
    def files(self) -> list[StoredFile]:
        return list(self._service.files.values())

    def store(self, name: str, content: bytes) -> str:
        """The address at which anyone may fetch these bytes."""
        self._stored[name] = content
        return f"{self.base_url.removesuffix('/v1')}/stored/{name}"

    def hold(self) -> None:
        """From now on requests for images are kept in flight until they are released."""
        self._holding = True

    def release(self, count: int | None = None) -> None:
        """Lets the oldest `count` held requests go on, or all of them and those to come."""
        self._loop.call_soon_threadsafe(self._release, count)

    def _release(self, count: int | None) -> None:
        if count is None:
            self._holding = False
        for _ in range(len(self._held) if count is None else min(count, len(self._held))):
            self._held.popleft().set()

    # What a request goes through

    async def _serve(self, route: str, endpoint: Endpoint, raw: web.Request) -> web.StreamResponse:
        started = time.monotonic()
        try:
            body, files = await read_body(raw)
            problem = None
        except RefusedError as error:
            body, files, problem = {}, (), error.failure
        request = self._request(route, raw, body, files, started)
        index = self._arrive(request)
        try:
            answer = problem.answer if problem else await self._answer(request, endpoint)
            headers = {
                "x-request-id": request.request_id,
                "openai-processing-ms": str(round((time.monotonic() - started) * 1000)),
            }
            # Recorded before the client can see it, and act or look at the record.
            if answer.breaks_after != 0 and not answer.never:
                self._end(index, answer.status)
            return await send(raw, answer, headers)
        except ConnectionError:
            raise
        except Exception as error:
            self._crash = error
            raise
        finally:
            self._end(index)
            self._on_answer(self._requests[index])

    def _arrive(self, request: Request) -> int:
        with self._changed:
            self._requests.append(request)
            self._in_flight += request.is_for_images
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
            self._changed.notify_all()
            return len(self._requests) - 1

    def _end(self, index: int, number: int | None = None) -> None:
        with self._changed:
            request = self._requests[index]
            self._in_flight -= request.is_for_images and request.ended is None
            number = request.status if number is None else number
            self._requests[index] = replace(request, status=number, ended=time.monotonic())
            self._changed.notify_all()

    def _request(
        self, route: str, raw: web.Request, body: Json, files: tuple[Upload, ...], started: float
    ) -> Request:
        headers = {name.lower(): value for name, value in raw.headers.items()}
        authorization = headers.pop("authorization", "")
        if authorization.startswith("Bearer "):
            headers["authorization"] = "(not recorded)"
        return Request(
            method=raw.method,
            path=raw.path,
            route=route,
            request_id=f"req_{uuid.uuid4().hex}",
            headers=headers,
            key_as_expected=authorization == f"Bearer {KEY}",
            query=dict(raw.query),
            parameters=dict(raw.match_info),
            body=body,
            files=files,
            started=started,
        )

    async def _answer(self, request: Request, endpoint: Endpoint) -> Answer:
        try:
            is_open = request.route == STORED  # signed addresses need no key
            if "authorization" not in request.headers and not is_open:
                raise RefusedError(status(401, "You didn't provide an API key."))  # noqa: TRY301
            if request.is_for_images:
                self._count()
            ordinary = endpoint(request)
            reply = self._scripted(request) or ok()
            if request.is_for_images and self._holding:
                await self._until_released()
            return await reply(ordinary)
        except RefusedError as error:
            return error.failure.answer

    async def _until_released(self) -> None:
        released = asyncio.Event()
        self._held.append(released)
        try:
            await released.wait()
        finally:
            if released in self._held:  # the client went away
                self._held.remove(released)

    def _count(self) -> None:
        wait = self.limit.wait(time.monotonic()) if self.limit else None
        if self.limit and wait is not None:
            raise RefusedError(rate_limited(wait, form=self.limit.headers))

    def _scripted(self, request: Request) -> Reply | None:
        for rule in self._rules:
            if rule.matches(request.route, request.prompt):
                return rule.take()
        return None

    def _image_endpoint(self, request: Request) -> Ordinary:
        order = order_from(request.route, request.body, request.files, self._service.data)

        async def draw() -> Answer:
            look = self._look(order)
            usage = usage_of(order, look, order.n, self.noise())
            with self._changed:
                self.billed += price_of(usage)
            make = partial(stream_events if order.stream else images_document, order, look, usage)
            chunks = await asyncio.get_running_loop().run_in_executor(self._artist, make)
            pause = self.latency / len(chunks) if order.stream else self.latency
            await asyncio.sleep(request.started + pause - time.monotonic())
            if not order.stream:
                return Answer.of(*chunks)
            return Answer(chunks=chunks, content_type="text/event-stream", pause=pause)

        return draw

    def _look(self, order: Order) -> Look:
        return look_of(order, self.pictures, self.auto_size)

    def _scripted_failure(self, route: str, prompt: str) -> Failure | None:
        """What a request of a batch meets: only failures that are scripted for its prompt."""
        for rule in self._rules:
            if rule.prompt and rule.matches(route, prompt):
                reply = rule.replies[0]
                if isinstance(reply, Failure):
                    rule.take()
                    return reply
        return None

    def _stored_endpoint(self, request: Request) -> Ordinary:
        async def serve() -> Answer:
            return Answer.of(self._stored[request.parameters["name"]])

        return serve

    def _not_found(self, request: Request) -> Ordinary:
        raise RefusedError(status(404, f"Invalid URL ({request.method} {request.path})"))

    # The thread

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        app = web.Application(client_max_size=2**30)
        service = {
            "POST /v1/files": self._service.create_file,
            "GET /v1/files": self._service.list_files,
            "GET /v1/files/{file_id}": self._service.get_file,
            "GET /v1/files/{file_id}/content": self._service.get_content,
            "DELETE /v1/files/{file_id}": self._service.delete_file,
            "POST /v1/batches": self._service.create_batch,
            "GET /v1/batches": self._service.list_batches,
            "GET /v1/batches/{batch_id}": self._service.get_batch,
            "POST /v1/batches/{batch_id}/cancel": self._service.cancel_batch,
        }
        endpoints: dict[str, Endpoint] = {
            GENERATIONS: self._image_endpoint,
            EDITS: self._image_endpoint,
            STORED: self._stored_endpoint,
            # These judge when they act: nothing is scripted or held between the two.
            **{route: partial(partial, method) for route, method in service.items()},
            "* /{path:.*}": self._not_found,
        }
        for route, endpoint in endpoints.items():
            method, path = route.split()
            app.router.add_route(method, path, partial(self._serve, route, endpoint))
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01
        )
        try:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.base_url = f"http://{host}:{port}/v1"
            self._ready.set_result(asyncio.get_running_loop())
            await self._stop.wait()
        finally:
            await runner.cleanup()


def _contains(text: str, prompt: str) -> bool:
    return text in prompt


async def send(
    request: web.Request, answer: Answer, headers: Mapping[str, str]
) -> web.StreamResponse:
    if answer.never:
        await asyncio.Event().wait()  # until the client goes, which cancels this
    response = web.StreamResponse(status=answer.status, headers={**headers, **answer.headers})
    response.content_type = answer.content_type
    response.content_length = answer.length
    if answer.breaks_after == 0:
        hang_up(request)
        return response
    await response.prepare(request)
    sent = 0
    for chunk in answer.chunks:
        if sent and answer.pause:
            await asyncio.sleep(answer.pause)
        left = len(chunk) if answer.breaks_after is None else answer.breaks_after - sent
        view = memoryview(chunk)[:left]
        for start in range(0, len(view), WRITE_BYTES):
            await response.write(view[start : start + WRITE_BYTES])
        sent += len(chunk)
        if answer.breaks_after is not None and sent >= answer.breaks_after:
            hang_up(request)
            return response
    await response.write_eof()
    return response


def hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.close()


# ---------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a command against an offline Image API, or serve one until Ctrl-C.",
        usage="%(prog)s [options] [-- COMMAND …]",
        allow_abbrev=False,
    )
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument(
        "--limit",
        type=rate_limit,
        metavar="N/SECONDS",
        help="admit N requests in each window of so many seconds and answer the rest with 429",
    )
    parser.add_argument(
        "--pictures",
        choices=get_args(PictureStyle),
        default="placeholder",
        help="captioned placeholders (default), flat colours, or noise that does not compress",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="write each request as a JSON line"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def rate_limit(text: str) -> RateLimit:
    count, _, seconds = text.partition("/")
    try:
        limit = RateLimit(admitted=int(count), window=float(seconds))
    except ValueError:
        limit = RateLimit(admitted=0, window=0)
    if limit.admitted < 1 or not limit.window > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 20/2 (requests/seconds)")
    return limit


def run_command(command: list[str], variables: dict[str, str]) -> int:
    """Runs the command; a Ctrl-C reaches it by itself, SIGTERM is passed on."""
    if command[0] in {"python", "python3"}:
        command = [sys.executable, *command[1:]]  # one interpreter has the packages of both
    process: subprocess.Popen[bytes] | None = None
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        if process is not None:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    try:
        process = subprocess.Popen(command, env=os.environ | variables)
    except OSError as error:
        print(f"Error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGINT, lambda *_: None)
    if is_ending:  # the command was just being started
        process.terminate()
    code = process.wait()
    return 128 - code if code < 0 else code


def serve(variables: dict[str, str]) -> int:
    with contextlib.suppress(KeyboardInterrupt):
        for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
            print(f"export {name}={variables[name]}", flush=True)
        threading.Event().wait()
    return 0


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(options.log.open("w")) if options.log else None
        api = stack.enter_context(
            ImagesAPI(
                latency=options.latency,
                limit=options.limit,
                pictures=options.pictures,
                on_answer=lambda request: log and print(request.log_line(), file=log, flush=True),
            )
        )
        return run_command(options.command, api.env()) if options.command else serve(api.env())


if __name__ == "__main__":
    sys.exit(main())
