"""Key removal against Pillow decoding and encoding the same file, and its peak memory.

    python tests/benchmarks/key_removal.py [--rounds 7]

All times are CPU seconds (user + system). The first table takes the work alone: `main` of
remove_chroma_key in a warm process against Image.open and save of the same file, in turns in the
same process; the medians of the rounds count. The second takes whole processes, start included, and
their peak resident memory. Everything is drawn here: a disc, hair and glass on green, clean, with
noise and as JPEG.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent.parent / "scripts" / "remove_chroma_key.py"
RECOMMENDED = ("--auto-key", "border", "--unmix")
SIZE_LIMIT, RATIO_LIMIT, MEMORY_LIMIT_MB = (1024, 1024), 3.0, 1200

# A process started from this one would begin with this one's peak memory, so a bare one starts it.
MEASURE = """
import json, os, sys
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execv(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""

sys.path[:0] = [str(SCRIPT.parent)]
import numpy as np  # noqa: E402
import remove_chroma_key  # noqa: E402
from PIL import Image  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A file to be cut out."""

    name: str
    path: Path
    size: tuple[int, int]

    @property
    def megapixels(self) -> float:
        return self.size[0] * self.size[1] / 1e6


def draw(size: tuple[int, int], noise: float) -> Image.Image:
    """A disc with a texture, a fringe of hair and a pane of glass, composited on green."""
    width, height = size
    random = np.random.default_rng(1)
    rows, columns = np.ogrid[:height, :width]
    unit = min(size) / 1024
    distance = np.hypot(rows - height * 0.45, columns - width * 0.45)
    disc = np.clip(320 * unit - distance + 0.5, 0, 1)
    strands = np.clip(1.5 - np.abs((columns + 0.4 * rows) % (14 * unit + 4) - 5), 0, 1)
    hair = strands * (rows > height * 0.7) * (np.abs(columns - width * 0.45) < 250 * unit)
    fade = np.clip(0.5 - np.abs(rows - height / 2) / (700 * unit), 0, 1)
    glass = fade * (np.abs(columns - width * 0.85) < 90 * unit)
    alpha = np.maximum(np.maximum(disc, hair * (rows < height * 0.95)), glass)[..., None]
    texture = 130 + 60 * np.sin(rows / (23 * unit)) * np.cos(columns / (31 * unit))
    colour = np.stack([texture, texture * 0.8, texture * 0.6], axis=-1)
    mixed = alpha * colour + (1 - alpha) * np.array((0.0, 255.0, 0.0))
    if noise:
        mixed += noise * random.standard_normal(mixed.shape)
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def drawings(folder: Path) -> list[Drawing]:
    found = []
    for size in (SIZE_LIMIT, (3840, 2160)):
        for name, noise, suffix in (("clean", 0, "png"), ("noise", 2, "png"), ("JPEG", 0, "jpg")):
            path = folder / f"{name}-{size[0]}.{suffix}"
            draw(size, noise).save(path, quality=90)
            found.append(Drawing(name=name, path=path, size=size))
    return found


def cpu_of_pillow(drawing: Drawing) -> float:
    start = time.process_time()
    with Image.open(drawing.path) as image:
        image.save(drawing.path.with_suffix(".copy.png"))
    return time.process_time() - start


def cpu_of_tool(drawing: Drawing) -> float:
    target = drawing.path.with_suffix(".cut.png")
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exit_code = remove_chroma_key.main(
            ["--input", str(drawing.path), "--out", str(target), "--force", *RECOMMENDED]
        )
    seconds = time.process_time() - start
    if exit_code:
        sys.exit(f"{drawing.path}: exit code {exit_code}")
    return seconds


def process(drawing: Drawing) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of a whole run."""
    target = drawing.path.with_suffix(".cut.png")
    tool = [str(SCRIPT), "--input", str(drawing.path), "--out", str(target), "--force"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *tool, *RECOMMENDED],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    status, seconds, peak = json.loads(done.stdout)
    if status:
        sys.exit(f"{drawing.path}: {done.stderr}")
    return seconds, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {' '.join(RECOMMENDED)}\n")
    within = True
    with tempfile.TemporaryDirectory() as folder:
        found = drawings(Path(folder))
        print("| picture | Pillow decode + encode, s | tool, s | ratio | tool, s per megapixel |")
        print("|---|---|---|---|---|")
        for drawing in found:
            pairs = [(cpu_of_pillow(drawing), cpu_of_tool(drawing)) for _ in range(rounds)]
            pillow, tool = (statistics.median(times) for times in zip(*pairs, strict=True))
            within &= drawing.size != SIZE_LIMIT or tool < RATIO_LIMIT * pillow
            print(
                f"| {drawing.size[0]}x{drawing.size[1]} {drawing.name} | {pillow:.3f} | {tool:.3f} "
                f"| {tool / pillow:.2f} | {tool / drawing.megapixels:.3f} |"
            )
        print("\n| whole process | CPU s | CPU s per megapixel | peak MB |\n|---|---|---|---|")
        for drawing in found:
            runs = [process(drawing) for _ in range(max(1, rounds // 2))]
            seconds = statistics.median(run[0] for run in runs)
            peak = max(run[1] for run in runs)
            within &= peak < MEMORY_LIMIT_MB
            print(
                f"| {drawing.size[0]}x{drawing.size[1]} {drawing.name} | {seconds:.2f} "
                f"| {seconds / drawing.megapixels:.3f} | {peak:.0f} |"
            )
    print(
        f"\n{'within' if within else 'NOT WITHIN'} the limits: 1024x1024 below {RATIO_LIMIT:g} x "
        f"decode + encode, every peak below {MEMORY_LIMIT_MB} MB"
    )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
