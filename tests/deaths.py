"""Runs through the Batch API, each a process of its own that is killed at a chosen step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import image_gen
import live
import pytest
from images_api import PATIENCE, Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess

    from images_api import ImagesAPI, Ordinary

CALLS = {"write": ("replace", "link"), "sync": ("fsync",)}

# A process that imports all modules once and has no other thread; each run is a fork of it.
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "deaths",
        "anyio._backends._asyncio",
        "httpcore2",
        "openai.resources.batches",
        "openai.resources.files",
        "PIL.PngImagePlugin",
    ]
)


class Death(NamedTuple):
    """When a process dies: before or after its request, write or sync of this number."""

    what: str = "never"
    when: str = ""
    step: int = 0

    def is_at(self, what: str, step: int) -> bool:
        return (what, step) == (self.what, self.step)


def fatal(act: Callable[..., object], counter: Iterator[int], what: str, death: Death) -> object:
    """A function of the operating system around whose call of that number the process dies."""

    def acting(*arguments: object) -> None:
        is_last = death.is_at(what, next(counter))
        if is_last and death.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        act(*arguments)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)

    return acting


def run_to_death(env: dict[str, str], death: Death, *flags: str) -> None:
    """One run, in a process of its own; it dies by its own hand around a write or a sync."""
    os.environ.update(env)
    with open("log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    live.shorten_waits(pytest.MonkeyPatch())
    for what, names in CALLS.items():
        counter = count(1)
        for name in names:
            setattr(os, name, fatal(getattr(os, name), counter, what, death))
    words = ["generate-batch", "--input", "jobs.jsonl", "--out-dir", "out"]
    sys.exit(image_gen.main([*words, "--downscale-max-dim", "32", *flags]))


class Lives:
    """Runs of one command, which the server kills when a request arrives or is half answered."""

    def __init__(self, api: ImagesAPI, *flags: str) -> None:
        self.flags = flags
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
        arguments = (self.api.env(), death, *self.flags, *flags)
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
