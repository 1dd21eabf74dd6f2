"""Peak memory of 100 jobs of 3840x2160 noise (15 MB each) at concurrency 25.

python tests/benchmarks/memory.py
"""

from __future__ import annotations

from common import BATCH, PLAIN, THREADS, measured, scratch, server

JOBS = 100
CONCURRENCY = 25
SIZE = "3840x2160"


def main() -> None:
    for program, flags in (
        (BATCH, ()),
        (BATCH, ("--downscale-max-dim", 1024)),
        (PLAIN, ()),
        (THREADS, ()),
    ):
        with scratch() as folder, server(latency=1.0, pictures="noise") as api:
            measured(PLAIN.command(folder / "first", 1, 1, size=SIZE), api.env)  # draws the noise
            skip = len(api.requests)
            command = program.command(folder / "all", JOBS, CONCURRENCY, *flags, size=SIZE)
            child = measured(command, api.env)
            images = len(list((folder / "all").rglob("*.png")))
            busy = api.busy_share(CONCURRENCY, skip)
        print(
            f"{program.name} {' '.join(map(str, flags))}: {images} files, "
            f"peak {child.peak_mb:.0f} MB, {child.seconds:.1f} s, {busy:.0%} of the slots busy, "
            f"exit {child.exit_code}",
            flush=True,
        )


if __name__ == "__main__":
    main()
