"""Dry runs: how the tests call them, and what they read of what is shown or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from inputs import job_file

if TYPE_CHECKING:
    from cli import Result, Run
    from inputs import Job, Json


def generate(run: Run, *argv: str, prompt: str = "a fox") -> Result:
    """A dry run of generate."""
    return run("generate", "--prompt", prompt, "--dry-run", *argv)


def edit(run: Run, *argv: str, image: str = "room.png") -> Result:
    """A dry run of edit."""
    return run("edit", "--image", image, "--prompt", "a fox", "--dry-run", *argv)


def batch(run: Run, *jobs: Job, flags: tuple[str, ...] = ()) -> Result:
    """A dry run of generate-batch."""
    out_dir = () if "--out-dir" in flags else ("--out-dir", "out")
    return run("generate-batch", "--input", job_file(*jobs), *out_dir, "--dry-run", *flags)


def documents(result: Result) -> list[Json]:
    """What a dry run that is accepted prints."""
    assert "Error: " not in result.stderr
    assert "Traceback" not in result.stderr
    assert result.exit_code == 0
    found, rest = [], result.stdout
    while rest:
        document, end = json.JSONDecoder().raw_decode(rest)
        found.append(document)
        rest = rest[end:].lstrip("\n")
    return found


def document(result: Result) -> Json:
    """The same, where it is one."""
    (only,) = documents(result)
    return only


def messages(result: Result, label: str) -> list[str]:
    """The messages of one kind; there is nothing else than messages and what it would cost."""
    assert result.stderr.endswith("\n") or not result.stderr
    lines = result.stderr.split("\n")[:-1]
    labels = ("Error: ", "Warning: ", "about $", "no estimate for ", "masks: ")
    assert all(line.startswith(labels) for line in lines), result.stderr
    return [line.removeprefix(label) for line in lines if line.startswith(label)]


def problems(result: Result) -> list[str]:
    """The errors of a call that is refused before anything is sent."""
    errors = messages(result, "Error: ")
    assert errors
    assert result.stdout == ""
    assert result.exit_code == 2
    return errors


def problem(result: Result) -> str:
    """The same, where it is one."""
    (only,) = problems(result)
    return only


def warnings(result: Result) -> list[str]:
    """The warnings of a dry run that is accepted."""
    documents(result)
    return messages(result, "Warning: ")


def files() -> dict[Path, bytes | None]:
    """All that is below the current directory; hypothesis keeps its tables there as well."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in Path().rglob("*")
        if ".hypothesis" not in path.parts
    }
