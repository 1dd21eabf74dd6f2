"""Time and peak memory of the client of the Batch API, in submitting and in collecting, by scale.

    python tests/benchmarks/batch_api.py [CASE …]

The cases are numbered from 1; all run unless some are named. Each prints a line of a table.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, NamedTuple

from common import BATCH, measured, scratch, server

if TYPE_CHECKING:
    from pathlib import Path

    from common import Child
    from images_api import PictureStyle


class Load(NamedTuple):
    """Jobs of one kind, and the memory that they may take."""

    name: str
    jobs: int
    bound_mb: int
    pictures: PictureStyle = "flat"
    size: str = "1024x1024"
    prompt: int = 8  # characters
    n: int = 1
    flags: tuple[str, ...] = ()


LOADS = (
    Load("2,000 images of 1 MB", 2_000, 400, "noise", "832x832"),
    Load(
        "the same with copies", 2_000, 400, "noise", "832x832", flags=("--downscale-max-dim", "256")
    ),
    Load("50,000 short jobs", 50_000, 600),
    Load("50,000 prompts of 7.5 kB", 50_000, 600, prompt=7_500),
    Load("8 jobs of 10 images, 100 MB a line", 8, 400, "noise", "1920x1376", n=10),
)


def write_jobs(folder: Path, load: Load) -> None:
    """Write a file of jobs, each with a prompt of its own."""
    with (folder / "jobs.jsonl").open("w") as file:
        for number in range(load.jobs):
            prompt = f"job {number} ".ljust(load.prompt, "x")
            job = {"prompt": prompt, "size": load.size, "n": load.n, "out": f"{number}.png"}
            file.write(json.dumps(job) + "\n")


def told(load: Load, step: str, child: Child) -> str:
    """Return a cell of the table."""
    late = "" if child.peak_mb <= load.bound_mb else "!"
    return f"{step} {child.seconds:6.1f} s, peak {child.peak_mb:4.0f} MB{late}"


def main() -> None:
    """Run the cases."""
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(LOADS) + 1)
    for load in (LOADS[number - 1] for number in chosen):
        with scratch() as folder, server(pictures=load.pictures) as api:
            command = BATCH.command(
                folder, 1, 5, "--batch-api", "--no-wait", "--quiet", *load.flags
            )
            write_jobs(folder, load)
            # Each run asks once how the batches stand, so that nobody waits for the next poll.
            submitted = child = measured(command, api.env)
            while child.exit_code == 3:
                child = measured(command, api.env)
            made = sum(path.name[-8:] != "-web.png" for path in (folder / "out").glob("*.png"))
            print(
                f"{load.name:36} {told(load, 'submit', submitted)}; {told(load, 'collect', child)} "
                f"(bound {load.bound_mb}); {made:,} images, exit {child.exit_code}",
                flush=True,
            )


if __name__ == "__main__":
    main()
