"""A run through the Batch API is killed at every step; the same command brings it to its end."""

from __future__ import annotations

import os
import signal
import ssl
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import image_gen
import live
import pytest
from cli import SCRIPTS
from images_api import PATIENCE, Answer, BatchPlan
from inputs import job_file, picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess

    from images_api import Batch, ImagesAPI, Ordinary

JOBS: list[dict[str, Any]] = [
    {"prompt": "two drafts", "n": 2, "out": "drafts"},
    {"prompt": "an edit", "image": "room.png", "out": "edit"},
]
ORIGINALS = ["drafts-1", "drafts-2", "edit"]
IMAGES = sorted(name + suffix for name in ORIGINALS for suffix in (".png", "-web.png"))
COPIES = ("--downscale-max-dim", "32")
WRITES = ("replace", "link")

# A process that imports all modules once and has no other thread; each run is a fork of it.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "test_batch_api_deaths",
        "anyio._backends._asyncio",
        "httpcore2",
        "openai.resources.batches",
        "openai.resources.files",
        "PIL.PngImagePlugin",
    ]
)


@pytest.fixture(autouse=True)
def forks_find_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), str(Path(__file__).parent)]))


class Death(NamedTuple):
    """When a process dies: before or after its request, or its write, of this number."""

    what: str = "never"
    when: str = ""
    step: int = 0

    def is_at(self, what: str, step: int) -> bool:
        return (what, step) == (self.what, self.step)


def fatal(act: Callable[..., object], counter: Iterator[int], death: Death) -> object:
    """A function of the operating system around whose call of that number the process dies."""

    def acting(*arguments: object) -> None:
        is_last = death.is_at("write", next(counter))
        if is_last and death.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        act(*arguments)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    return acting


def run_to_death(env: dict[str, str], death: Death, *flags: str) -> None:
    """One run, in a process of its own; it dies by its own hand around a write."""
    os.environ.update(env)
    with open("log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    counter = count(1)
    for name in WRITES:
        setattr(os, name, fatal(getattr(os, name), counter, death))
    image_gen.POLL_SECONDS = 0.001
    # Half the time of a run: nobody cuts the power or speaks TLS here.
    for owner, name in ((os, "fsync"), (ssl.SSLContext, "load_verify_locations")):
        setattr(owner, name, lambda *_, **__: None)
    words = ["generate-batch", "--batch-api", "--input", "jobs.jsonl", "--out-dir", "out"]
    sys.exit(image_gen.main([*words, *COPIES, *flags]))


class Lives:
    """Runs of one command, which the server kills when a request arrives or is half answered."""

    def __init__(self, api: ImagesAPI) -> None:
        for method in ("GET", "POST"):
            api.script_route(f"{method} /v1/", self.answer, repeat=True)
        self.api = api
        self.process: BaseProcess
        self.started = threading.Event()
        self.arrivals = count(1)
        self.death = Death()

    def one(self, death: Death, *flags: str) -> int:
        """Runs the command until it ends or dies; its exit code."""
        self.arrivals, self.death = count(1), death
        self.started.clear()
        arguments = (self.api.env(), death, *flags)
        self.process = FORKS.Process(target=run_to_death, args=arguments, daemon=True)
        self.process.start()
        self.started.set()
        self.process.join(timeout=PATIENCE)
        assert "Traceback" not in Path("log.txt").read_text()
        assert self.process.exitcode is not None
        return self.process.exitcode

    async def answer(self, ordinary: Ordinary) -> Answer:
        if not self.death.is_at("request", next(self.arrivals)):
            return await ordinary()
        if self.death.when == "before":
            self.send(signal.SIGKILL)
            return Answer(breaks_after=0)
        answer = await ordinary()
        if self.death.when == "interrupted":
            self.send(signal.SIGINT)
            return answer
        return replace(answer, chunks=self.halved(answer.whole()))

    def halved(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        self.send(signal.SIGKILL)
        yield body[len(body) // 2 :]

    def send(self, number: signal.Signals) -> None:
        self.started.wait(PATIENCE)
        assert self.process.pid
        os.kill(self.process.pid, number)


@pytest.fixture
def lives(api: ImagesAPI) -> Lives:
    return Lives(api)


class Begin(Protocol):
    """Makes a new current directory with jobs; returns what tells the batches made since then."""

    def __call__(self, plan: BatchPlan) -> Callable[[], list[Batch]]: ...


@pytest.fixture
def begin(api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Begin:
    folders = count(1)

    def begin(plan: BatchPlan) -> Callable[[], list[Batch]]:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        monkeypatch.chdir(folder)
        picture("room.png")
        job_file(*JOBS)
        api.plan_batch(plan, plan)
        already = len(api.batches)
        return lambda: api.batches[already:]

    return begin


def exactly_once(batches: list[Batch]) -> None:
    """Every image is there once, and the server saw every job once."""
    assert [name for name in live.names() if not name.startswith(".")] == IMAGES
    contents = {Path("out", f"{name}.png").read_bytes() for name in ORIGINALS}
    assert len(contents) == len(ORIGINALS)
    seen = Counter(line.custom_id for batch in batches for line in batch.lines)
    assert seen == {"job-1": 1, "job-2": 1}


@pytest.mark.parametrize(
    ("what", "when"),
    [
        ("request", "before"),
        ("request", "after"),
        ("request", "interrupted"),
        ("write", "before"),
        ("write", "after"),
    ],
)
def test_the_same_command_ends_what_was_cut_short_at_any_step(
    lives: Lives, begin: Begin, what: str, when: str
) -> None:
    cut_short = 130 if when == "interrupted" else -signal.SIGKILL
    for step in count(1):
        batches = begin(BatchPlan(states=("completed",)))
        ended = lives.one(Death(what, when, step))
        if ended == cut_short:
            assert lives.one(Death()) == 0, Path("log.txt").read_text()
        exactly_once(batches())
        if ended != cut_short:
            break
    assert ended == 0
    assert step > {"request": 9, "write": 15}[what]


def test_cancel_ends_what_a_cancel_began_that_was_killed_at_any_step(
    lives: Lives, begin: Begin
) -> None:
    for step in count(1):
        batches = begin(BatchPlan(states=("in_progress",), cancelled_share=1.0))
        assert lives.one(Death(), "--no-wait") == 3
        ended = lives.one(Death("request", "after", step), "--cancel")
        if ended == -signal.SIGKILL:
            assert lives.one(Death(), "--cancel") == 0, Path("log.txt").read_text()
        assert [batch.status for batch in batches()] == ["cancelled"] * 2
        exactly_once(batches())
        if ended != -signal.SIGKILL:
            break
    assert ended == 0
    assert step > 6


def test_a_command_that_is_killed_after_every_fifth_write_still_gets_to_its_end(
    lives: Lives, begin: Begin
) -> None:
    batches = begin(BatchPlan())
    deaths = 0
    while (ended := lives.one(Death("write", "after", 5))) == -signal.SIGKILL:
        deaths += 1
        assert deaths < 20
    assert (ended, deaths > 2) == (0, True)
    exactly_once(batches())
