"""What a dry run costs beside starting Python at all.

    python tests/benchmarks/start_up.py

By path the script is compiled anew each time; installed (image-gen), its byte code is at hand.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from common import IMAGE_GEN, measured, scratch

if TYPE_CHECKING:
    from pathlib import Path

RUNS = 25
WORDS = ("generate", "--prompt", "a fox", "--dry-run")
INSTALLED = "import sys, image_gen; sys.exit(image_gen.main())"


def main() -> None:
    commands: dict[str, list[str | Path]] = {
        "python -c pass": ["-c", "pass"],
        "dry run by path": [IMAGE_GEN, *WORDS],
        "dry run as installed": ["-c", INSTALLED, *WORDS],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with scratch() as folder:
        env = {"PYTHONPATH": str(IMAGE_GEN.parent), "PYTHONPYCACHEPREFIX": str(folder)}
        env["PYTHONDONTWRITEBYTECODE"] = ""
        for _ in range(RUNS + 1):  # in turn, so that noise meets all alike
            for name, command in commands.items():
                seconds[name].append(measured(command, env).seconds)
    # The first round fills the caches.
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["python -c pass"]
        print(f"{name}: {median * 1000:.0f} ms, {ratio:.2f} x (median of {RUNS})")


if __name__ == "__main__":
    main()
