"""What the benchmarks share: the server in a process of its own, and children that are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

HERE = Path(__file__).resolve().parent
IMAGE_GEN = HERE.parent.parent / "scripts" / "image_gen.py"

sys.path.insert(0, str(HERE.parent))
from images_api import ImagesAPI, PictureStyle, RateLimit, Request  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process that has ended."""

    seconds: float
    peak_mb: float
    stdout: str
    stderr: str
    exit_code: int


class Server:
    """An ImagesAPI that does not share this interpreter."""

    def __init__(self, connection: Connection, env: dict[str, str]) -> None:
        self._connection = connection
        self.env = env

    @property
    def requests(self) -> list[Request]:
        self._connection.send("requests")
        found: list[Request] = self._connection.recv()
        return found

    def busy_share(self, slots: int, skip: int = 0) -> float:
        """The share of the slots that held a request, from the first to the last one sent."""
        spans = [(r.started, r.ended or r.started) for r in self.requests[skip:]]
        first, last = min(spans)[0], max(spans)[0]
        return sum(min(end, last) - start for start, end in spans) / (slots * (last - first))


class Options(TypedDict, total=False):
    """What the server of a benchmark may be told."""

    latency: float
    limit: RateLimit
    pictures: PictureStyle


@contextmanager
def server(**options: Unpack[Options]) -> Iterator[Server]:
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(there, options))
    process.start()
    try:
        yield Server(here, here.recv())
    finally:
        here.send(None)
        process.join()


def serve(connection: Connection, options: Options) -> None:
    with ImagesAPI(**options) as api:
        connection.send(api.env())
        while connection.recv():
            connection.send(api.requests)


def measured(command: Sequence[str | Path], env: dict[str, str]) -> Child:
    """Runs a command to its end; time and peak memory are those of this child alone."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=out,
            stderr=err,
            env=os.environ | env,
        )
        _, state, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(state)
        out.seek(0)
        err.seek(0)
        return Child(
            seconds=elapsed,
            peak_mb=usage.ru_maxrss / 1024,
            stdout=out.read(),
            stderr=err.read(),
            exit_code=process.returncode,
        )


class Program(NamedTuple):
    """One of the programs that run a batch: this project's, and plain ones."""

    name: str
    words: Callable[[Path, int, int, str], list[object]]
    patience: tuple[str, ...] = ()  # what makes it meet a rate limit

    def command(
        self, folder: Path, jobs: int, concurrency: int, *flags: object, size: str = "1024x1024"
    ) -> list[str]:
        folder.mkdir(exist_ok=True)
        return [str(word) for word in (*self.words(folder, jobs, concurrency, size), *flags)]


def batch_words(folder: Path, jobs: int, concurrency: int, size: str) -> list[object]:
    lines = [json.dumps({"prompt": f"job {number}", "size": size}) for number in range(jobs)]
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    files = ["--input", folder / "jobs.jsonl", "--out-dir", folder / "out"]
    return [IMAGE_GEN, "generate-batch", *files, "--concurrency", concurrency]


def plain_words(folder: Path, jobs: int, concurrency: int, size: str) -> list[object]:
    return [HERE / "plain.py", folder, jobs, size, concurrency]


def threads_words(folder: Path, jobs: int, concurrency: int, size: str) -> list[object]:
    return [HERE / "threads.py", folder, jobs, size, concurrency]


BATCH = Program("image_gen", batch_words)
PLAIN = Program("bare SDK", plain_words, patience=("--retry",))
THREADS = Program("plain threads", threads_words)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="image_gen-benchmark-") as name:
        yield Path(name)
