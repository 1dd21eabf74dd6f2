"""What the tests give to the CLI: pictures, and files of jobs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

Json = dict[str, Any]
Job = Json | list[object] | str | bytes | int | None

FLARE = "gpt-image-2.5-flare"  # one of the newest models, which take everything
OLDER = [
    "gpt-image-2",
    "gpt-image-2-2026-04-21",
    "gpt-image-1.5",
    "gpt-image-1-mini",
    "gpt-image-1",
]


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> str:
    """An image file in the current directory, in the format of its suffix."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(name)
    return name


def encoded(image: Image.Image, image_format: str = "png", **options: object) -> bytes:
    """An image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def job_file(*jobs: Job, end: bytes = b"\n") -> str:
    """A file of jobs: text and bytes as they are, anything else as JSON."""
    lines = [job if isinstance(job, str | bytes) else json.dumps(job) for job in jobs]
    encoded_lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    Path("jobs.jsonl").write_bytes(end.join(encoded_lines) + end)
    return "jobs.jsonl"


def flag(key: str) -> str:
    """The flag of a JSONL key."""
    return "--" + key.replace("_", "-")


def as_flags(parameters: Json) -> list[str]:
    """Parameters as words of the command line."""
    return [word for key, value in parameters.items() for word in (flag(key), str(value))]


def mixed_jobs() -> list[Job]:
    """Jobs of all kinds, with the pictures that they name."""
    room, chair, mask = picture("room.png"), picture("chair.jpg"), picture("mask.png", "RGBA")
    old = {"model": "gpt-image-1.5", "size": "1024x1024", "background": "transparent"}
    formats = ("png", "jpeg", "webp")
    return [
        "plain text",
        '"a JSON string"',
        {"prompt": "object"},
        {"prompt": "  stripped  ", "scene": " fog ", "fields": {"style": "ink", "scene": "sun"}},
        {"prompt": "nulls", "n": None, "size": None, "scene": None},
        {"prompt": 'quotes " and 🦊 and \u2028', "text": 'say "hi"'},
        {"prompt": "variants", "n": 3},
        *({"prompt": f"two {name}", "output_format": name, "n": 2} for name in formats),
        {"prompt": "named", "out": "sub/hero"},
        {"prompt": "webp by its name", "out": "named.webp"},
        {"prompt": "jpeg", "output_format": "JPG", "output_compression": 0},
        {"prompt": "packed", "output_format": "webp", "output_compression": 40},
        {"prompt": "size", "size": "1024x640"},
        {"prompt": "quality", "quality": "high"},
        {"prompt": "moderation", "moderation": "low"},
        {"prompt": "opaque", "background": "opaque"},
        {"prompt": "transparent", **old},
        {"prompt": "a cutout", "model": FLARE, "background": "transparent"},
        {"prompt": "newer model", "model": "gpt-image-2.6-flare", "quality": "low"},
        {"prompt": "edit", "image": room},
        {"prompt": "masked edit", "image": room, "mask": mask},
        {"prompt": "edit of two", "image": [room, chair], "moderation": "low"},
        {"prompt": "masked edit of two", "image": [room, chair], "mask": mask},
        {"prompt": "faithful edit", "image": [room], "input_fidelity": "high", **old},
        {"prompt": "edit to jpeg", "image": room, "output_format": "jpeg", "moderation": "auto"},
    ]
