"""What the tests give to the CLI: pictures, and files of jobs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

Json = dict[str, Any]
Job = Json | list[object] | str | bytes | int | None


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
