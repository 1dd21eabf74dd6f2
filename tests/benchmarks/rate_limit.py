"""How a batch meets a limit that counts refused requests, beside a plain loop that retries.

    python tests/benchmarks/rate_limit.py

The ideal is ceil(jobs / admitted) windows. Where the last two seconds count instead of fixed
windows, the plain loop starves itself and never ends, so it is left out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from common import BATCH, PLAIN, Program, measured, scratch, server
from images_api import RateLimit

if TYPE_CHECKING:
    from common import Server

Kind = Literal["fixed", "sliding"]
WINDOW = 2.0
LATENCY = 0.5
CONCURRENCY = 25


def refused(api: Server) -> int:
    return sum(request.status == 429 for request in api.requests)


def meet(program: Program, jobs: int, admitted: int, kind: Kind) -> None:
    limit = RateLimit(admitted=admitted, window=WINDOW, kind=kind)
    with scratch() as folder, server(latency=LATENCY, limit=limit, pictures="flat") as api:
        command = program.command(folder, jobs, CONCURRENCY, *program.patience)
        child = measured(command, api.env)
        images = len(list(folder.rglob("*.png")))
        again = refused(api)
    ideal = math.ceil(jobs / admitted) * WINDOW
    print(
        f"{jobs} jobs, {admitted} per {WINDOW:g} s ({kind}), {program.name}: {images} images, "
        f"{child.seconds:.1f} s = {child.seconds / ideal:.2f} x ideal, "
        f"{again} refused = {again / jobs:.0%} of the jobs, exit {child.exit_code}",
        flush=True,
    )


def main() -> None:
    for jobs, admitted in ((120, 20), (30, 5)):
        meet(BATCH, jobs, admitted, "fixed")
        meet(PLAIN, jobs, admitted, "fixed")
        meet(BATCH, jobs, admitted, "sliding")


if __name__ == "__main__":
    main()
