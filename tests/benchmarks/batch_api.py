"""Peak memory of the client that collects 2,000 images of about 1 MB through the Batch API.

python tests/benchmarks/batch_api.py
"""

from __future__ import annotations

from common import BATCH, measured, scratch, server

JOBS = 2000
SIZE = "832x832"
MAX_PEAK_MB = 400
CONCURRENCY = 5  # the default, which means nothing here


def main() -> None:
    for copies in ((), ("--downscale-max-dim", 256)):
        with scratch() as folder, server(pictures="noise") as api:
            # Each run asks once how the batch stands, so that nobody waits for the next poll.
            flags = ("--batch-api", "--no-wait", "--quiet", *copies)
            command = BATCH.command(folder, JOBS, CONCURRENCY, *flags, size=SIZE)
            child = measured(command, api.env)
            while child.exit_code == 3:
                child = measured(command, api.env)
            images = [p for p in (folder / "out").glob("*.png") if "-web" not in p.name]
            megabytes = sum(path.stat().st_size for path in images) / 1e6
            print(
                f"{' '.join(map(str, copies)) or 'originals only'}: {len(images)} images of "
                f"{megabytes / max(1, len(images)):.2f} MB collected, peak {child.peak_mb:.0f} MB "
                f"(bound {MAX_PEAK_MB}), {child.seconds:.1f} s, exit {child.exit_code}",
                flush=True,
            )


if __name__ == "__main__":
    main()
