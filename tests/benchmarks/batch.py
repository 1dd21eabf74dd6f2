"""Whether a batch keeps the network busy: many small images, and large ones, beside plain programs.

    python tests/benchmarks/batch.py [CASE …]

The start-up, a run of one job less its latency, is subtracted from the runs. The programs take
turns, and the shortest of some runs counts, of one job as of all. The cases are numbered from 1;
all run unless some are named.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from common import BATCH, PLAIN, THREADS, Program, measured, scratch, server
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    from common import Server
    from images_api import PictureStyle

ROUNDS = 3
COPY_EDGE = 1024
COPIES = ("--downscale-max-dim", COPY_EDGE)


class Load(NamedTuple):
    """A batch, and the program that image_gen is compared with."""

    jobs: int
    concurrency: int
    latency: float
    beside: Program
    size: str = "1024x1024"
    pictures: PictureStyle = "noise"
    flags: tuple[object, ...] = ()

    @property
    def name(self) -> str:
        copies = " with copies" if self.flags else ""
        return (
            f"{self.jobs} jobs of {self.size} and {self.latency:g} s{copies} "
            f"at concurrency {self.concurrency}"
        )

    @property
    def ideal(self) -> float:
        """Seconds of a program that does nothing but wait for the answers."""
        return math.ceil(self.jobs / self.concurrency) * self.latency


class Run(NamedTuple):
    """What was measured of one run of a batch."""

    start_up: float
    seconds: float
    peak_mb: float
    busy: float


LOADS = (
    Load(200, 25, 0.2, PLAIN, pictures="flat"),
    Load(40, 8, 0.0, THREADS, "2048x2048", flags=COPIES),
    Load(40, 8, 1.0, THREADS, "2048x2048", flags=COPIES),
    Load(12, 6, 0.0, THREADS, "3840x2160", flags=COPIES),
    Load(12, 6, 1.0, THREADS, "3840x2160", flags=COPIES),
    Load(100, 25, 1.0, THREADS, "3840x2160"),
)


def run(program: Program, load: Load, api: Server, folder: Path) -> Run:
    os.sync()  # what the run before has left to be written
    one = measured(program.command(folder / "one", 1, 1, *load.flags, size=load.size), api.env)
    skip = len(api.requests)
    command = program.command(
        folder / "all", load.jobs, load.concurrency, *load.flags, size=load.size
    )
    child = measured(command, api.env)
    if child.exit_code or one.exit_code:
        sys.exit(f"{program.name}: {one.stderr}{child.stderr}")
    start_up = one.seconds - load.latency
    return Run(start_up, child.seconds, child.peak_mb, api.busy_share(load.concurrency, skip))


def report(name: str, runs: list[Run], load: Load, pillow: float) -> float:
    """Prints a line, and returns the seconds without the start-up."""
    best = min(runs, key=lambda each: each.seconds)
    seconds = best.seconds - min(each.start_up for each in runs)
    figures = [f"{seconds:.2f} s"]
    if pillow:
        figures.append(f"{seconds / pillow:.2f} x Pillow alone on two cores")
    if load.latency:
        figures.append(f"{seconds / load.ideal:.2f} x ideal")
        figures.append(f"{best.busy:.0%} of the slots busy while jobs remained")
    figures.append(f"peak {max(each.peak_mb for each in runs):.0f} MB")
    print(f"{load.name}, {name}: {', '.join(figures)}")
    return seconds


def compare(load: Load) -> None:
    programs = (BATCH, load.beside)
    found: dict[str, list[Run]] = {program.name: [] for program in programs}
    pillow = 0.0
    with server(latency=load.latency, pictures=load.pictures) as api:
        with scratch() as folder:
            # Draws the noise, which all requests share.
            measured(PLAIN.command(folder / "first", 1, 1, size=load.size), api.env)
        for number in range(ROUNDS):
            for program in programs[:: -1 if number % 2 else 1]:
                with scratch() as folder:
                    found[program.name].append(run(program, load, api, folder))
                    if load.flags and not pillow:
                        images = (folder / "all").rglob("*.png")
                        pillow = pillow_seconds([p for p in images if not p.stem.endswith("-web")])
    took = {name: report(name, runs, load, pillow) for name, runs in found.items()}
    ratio = took[BATCH.name] / took[load.beside.name]
    print(f"{BATCH.name} / {load.beside.name}: {ratio:.2f}", flush=True)


def copy_size(path: Path) -> int:
    """Pillow's own work for a copy."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((COPY_EDGE, COPY_EDGE), Image.Resampling.LANCZOS)
        image.save(file, "PNG")
    return len(file.getvalue())


def pillow_seconds(originals: list[Path]) -> float:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(copy_size, originals[:2]))
        started = time.perf_counter()
        list(pool.map(copy_size, originals))
        return time.perf_counter() - started


if __name__ == "__main__":
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(LOADS) + 1)
    for place in chosen:
        compare(LOADS[place - 1])
