"""How the tests of the first half call the CLI, make its inputs and read what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from conftest import Result, Run

Document = dict[str, Any]
Job = Document | list[object] | str | bytes | int | None


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> str:
    """An image file in the current directory, in the format of its suffix."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(name)
    return name


def job_file(*jobs: Job, end: bytes = b"\n") -> str:
    """A file of jobs: text and bytes as they are, anything else as JSON."""
    lines = [job if isinstance(job, str | bytes) else json.dumps(job) for job in jobs]
    encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
    Path("jobs.jsonl").write_bytes(end.join(encoded) + end)
    return "jobs.jsonl"


def flag(key: str) -> str:
    """The flag of a JSONL key."""
    return "--" + key.replace("_", "-")


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


def documents(result: Result) -> list[Document]:
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


def document(result: Result) -> Document:
    """The same, where it is one."""
    (only,) = documents(result)
    return only


def messages(result: Result, label: str) -> list[str]:
    """The messages of one kind; there is nothing else than messages, each in one line."""
    assert result.stderr.endswith("\n") or not result.stderr
    lines = result.stderr.split("\n")[:-1]
    assert all(line.startswith(("Error: ", "Warning: ")) for line in lines), result.stderr
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
