"""Live runs against the loopback API: their command lines, and what the tests read of their end."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import image_gen
from cli import Result
from inputs import job_file
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pytest
    from cli import Run, Start
    from images_api import ImagesAPI
    from inputs import Job


# --timeout of a request that is to run into it: all that comes before has to fit in, on a busy
# machine too.
TIME_OUT = 3


def shorten_waits(patch: pytest.MonkeyPatch) -> None:
    """No run of this process waits for longer than a test needs."""
    patch.setattr(image_gen, "BACK_OFF_SECONDS", 0.01)
    patch.setattr(image_gen, "POLL_SECONDS", 0.005)
    patch.setattr(image_gen, "LOOK_SECONDS", 0.05)
    # Half the time of a run: nobody cuts the power or speaks TLS here.
    patch.setattr("os.fsync", lambda _: None)
    patch.setattr("ssl.SSLContext.load_verify_locations", lambda *_, **__: None)


def prompts(count: int) -> list[str]:
    """Job 1 writes 001-job-1.png, and so on."""
    return [f"job {number}" for number in range(1, count + 1)]


def batch(jobs: int | Sequence[Job], *flags: object) -> list[str]:
    """The command line of a batch into the folder out."""
    lines = prompts(jobs) if isinstance(jobs, int) else jobs
    words = ["--input", job_file(*lines), "--out-dir", "out", *flags]
    return ["generate-batch", *map(str, words)]


def generate(*flags: object, prompt: str = "a fox", out: str = "fox.png") -> list[str]:
    """The command line of one image."""
    return ["generate", "--prompt", prompt, "--out", out, *map(str, flags)]


def names(folder: str = "out") -> list[str]:
    """All files of a folder, hidden ones included, but for the manifest of a batch."""
    found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return sorted(found - {image_gen.MANIFEST_NAME})


def images(*numbers: int) -> list[str]:
    """The names of the images of these jobs of `prompts`."""
    return [f"{number:03d}-job-{number}.png" for number in numbers]


def lines(result: Result, label: str = "Error: ") -> list[str]:
    """The messages of one kind; a traceback is never one of them."""
    assert "Traceback" not in result.stderr
    return [
        line.removeprefix(label) for line in result.stderr.splitlines() if line.startswith(label)
    ]


def error(result: Result) -> str:
    """The only error of a run that failed."""
    assert result.exit_code in (1, 4), result.stderr
    (only,) = lines(result)
    return only


def outcomes(result: Result) -> list[str]:
    """The status of each job, in order of the jobs."""
    return [line["status"] for line in sorted(result.json_lines, key=lambda line: line["job"])]


def statuses(api: ImagesAPI) -> list[int | None]:
    """How the server answered, in order of arrival."""
    return [request.status for request in api.image_requests]


def size_of(name: str | Path) -> tuple[int, int]:
    """The size of an image file that Pillow reads to its end."""
    with Image.open(name) as image:
        image.load()
        return image.size


def run_held(
    run: Run,
    api: ImagesAPI,
    argv: Sequence[str],
    *,
    until: int = 1,
    act: Callable[[], object] = lambda: None,
) -> Result:
    """Runs the CLI; before any request is answered, so many are in flight, and `act` is called."""
    api.hold()

    def let_go() -> None:
        try:
            api.wait_for_requests(until)
            act()
        finally:
            api.release()

    releaser = threading.Thread(target=let_go)
    releaser.start()
    try:
        return run(*argv)
    finally:
        releaser.join()


def run_staggered(
    start_process: Start,
    api: ImagesAPI,
    argv: Sequence[str],
    *,
    until: int = 1,
    act: Callable[[], object] = lambda: None,
) -> Result:
    """The same in a process, but only one request is answered before the first job has ended.

    That end is a line of stdout, so `argv` has --json.
    """
    api.hold()
    process = start_process(*argv)
    api.wait_for_requests(until)
    act()
    api.release(1)
    assert process.stdout
    assert process.stderr
    first = process.stdout.readline()
    api.release()
    # Not communicate(), which passes over what readline() has buffered.
    stdout, stderr = first + process.stdout.read(), process.stderr.read()
    return Result(exit_code=process.wait(), stdout=stdout, stderr=stderr)
