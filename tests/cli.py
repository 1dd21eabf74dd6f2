"""The CLI as a process, and what a run of it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, Popen
from typing import TYPE_CHECKING, Any, Protocol

from images_api import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run of the CLI left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as one JSON document."""
        document: dict[str, Any] = json.loads(self.stdout)
        return document

    @property
    def json_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


class Run(Protocol):
    """Runs the CLI with these arguments; `stdin` is what it reads, `env` is set on top."""

    def __call__(
        self, *argv: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> Result: ...


class Start(Protocol):
    """Starts the CLI as a process that is killed at the end of the test if it is still there."""

    def __call__(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> Popen[str]: ...


def command(*argv: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPTS / "image_gen.py"), *map(str, argv)]


def finished(words: Sequence[str], **options: Any) -> Result:  # noqa: ANN401
    """Runs a command to its end; the options are those of `subprocess`, here and below."""
    options = {"stdout": PIPE, "stderr": PIPE, **options}
    ended: CompletedProcess[bytes] = subprocess.run(words, timeout=PATIENCE, check=False, **options)
    return Result(
        exit_code=ended.returncode,
        stdout=(ended.stdout or b"").decode(),
        stderr=(ended.stderr or b"").decode(),
    )


@contextmanager
def started(words: Sequence[str], **options: Any) -> Iterator[Popen[str]]:  # noqa: ANN401
    """A process to talk to while it runs; one that hangs is killed, which ends any wait for it."""
    options = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE, **options}
    with Popen(words, text=True, **options) as process:
        guard = threading.Timer(PATIENCE, process.kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            process.kill()


def heard(process: Popen[str], text: str) -> None:
    """Reads stderr up to a line with this text."""
    assert process.stderr
    said = ""
    while text not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
