"""Whether a batch keeps the network busy: many small images, and large ones with copies.

    python tests/benchmarks/batch.py

The start-up, a run of one job less its latency, is subtracted from the runs.
"""

from __future__ import annotations

import io
import math
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from common import BATCH, PLAIN, Program, measured, scratch, server
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 3
COPY_EDGE = 1024


def small_jobs(program: Program, jobs: int, concurrency: int, latency: float) -> float:
    """The shortest of some runs, in seconds."""
    found = []
    for _ in range(ROUNDS):
        with scratch() as folder, server(latency=latency, pictures="flat") as api:
            one = measured(program.command(folder / "one", 1, concurrency), api.env)
            all_ = measured(program.command(folder / "all", jobs, concurrency), api.env)
        found.append(all_.seconds - one.seconds + latency)
    return min(found)


def compare_small_jobs(jobs: int = 200, concurrency: int = 25, latency: float = 0.2) -> None:
    ideal = math.ceil(jobs / concurrency) * latency
    took = {p.name: small_jobs(p, jobs, concurrency, latency) for p in (BATCH, PLAIN)}
    for name, seconds in took.items():
        print(
            f"{jobs} jobs of {latency} s at concurrency {concurrency}, {name}: {seconds:.2f} s "
            f"= {seconds / ideal:.2f} x ideal"
        )
    print(f"image_gen / bare SDK: {took[BATCH.name] / took[PLAIN.name]:.2f}", flush=True)


def copy_size(path: Path) -> int:
    """Pillow's own work for a copy."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.resize((COPY_EDGE, COPY_EDGE), Image.Resampling.LANCZOS).save(file, "PNG")
    return len(file.getvalue())


def pillow_seconds(originals: list[Path]) -> float:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(copy_size, originals[:2]))
        started = time.perf_counter()
        list(pool.map(copy_size, originals))
        return time.perf_counter() - started


def copies(latency: float, jobs: int = 40, concurrency: int = 8, size: str = "2048x2048") -> None:
    with scratch() as folder, server(latency=latency, pictures="noise") as api:
        command = BATCH.command(folder / "warm", 1, 1, size=size)
        measured(command, api.env)  # draws the noise, which all requests share
        (folder / "one").mkdir()
        one = measured(BATCH.command(folder / "one", 1, 1, size=size), api.env)
        skip = len(api.requests)
        flags = ("--downscale-max-dim", COPY_EDGE)
        command = BATCH.command(folder / "all", jobs, concurrency, *flags, size=size)
        seconds = measured(command, api.env).seconds - one.seconds + latency
        busy = api.busy_share(concurrency, skip)
        files = (folder / "all").rglob("*.png")
        pillow = pillow_seconds([path for path in files if not path.stem.endswith("-web")])
    print(
        f"{jobs} images of {size} and {latency} s with copies at concurrency {concurrency}: "
        f"{seconds:.1f} s = {seconds / pillow:.2f} x Pillow alone on two cores "
        f"({pillow:.1f} s), {busy:.0%} of the slots busy while jobs remained",
        flush=True,
    )


if __name__ == "__main__":
    compare_small_jobs()
    for seconds_an_image in (0.0, 1.0):
        copies(seconds_an_image)
