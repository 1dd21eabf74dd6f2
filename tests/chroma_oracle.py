"""What remove_chroma_key.py is measured against: a scalar oracle, drawn subjects, recomposites."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from remove_chroma_key import main

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    U8 = NDArray[np.uint8]
    F64 = NDArray[np.float64]
    Colour = tuple[int, int, int]

# ── Running the tool ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of the tool left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("Error: ")]

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("Warning: ")]


def run(*argv: str | Path) -> Outcome:
    """Run `main` in this process; only --help may raise SystemExit."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        exit_code = main([str(word) for word in argv])
    return Outcome(exit_code=exit_code, stdout=out.getvalue(), stderr=err.getvalue())


def save(path: Path, pixels: U8) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def load(path: Path) -> U8:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGBA"))


def cut_out(folder: Path, pixels: U8, *flags: str) -> U8:
    """The RGBA that the tool makes of these pixels."""
    source, target = save(folder / "in.png", pixels), folder / "out.png"
    outcome = run("--input", source, "--out", target, "--force", *flags)
    assert outcome.exit_code == 0, outcome.stderr
    return load(target)


# ── The recorded matte, one pixel at a time ──────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Matte:
    """The options of the recorded matte."""

    key: Colour = (0, 255, 0)
    tolerance: int = 12
    soft: bool = False
    low: float = 12.0
    high: float = 96.0
    despill: bool = False

    @property
    def flags(self) -> list[str]:
        return [
            *("--key-color", "#{:02x}{:02x}{:02x}".format(*self.key)),
            *("--tolerance", str(self.tolerance)),
            *(["--soft-matte"] if self.soft else []),
            *("--transparent-threshold", repr(self.low), "--opaque-threshold", repr(self.high)),
            *(["--despill"] if self.despill else []),
        ]


def oracle_pixel(pixel: tuple[int, int, int, int], matte: Matte) -> tuple[int, int, int, int]:
    """The recorded behaviour, straight from its description."""
    colour, key = pixel[:3], matte.key
    distance = max(abs(c - k) for c, k in zip(colour, key, strict=True))
    lit = [i for i in range(3) if key[i] >= 128 and key[i] >= max(key) - 16]
    rest = max((colour[i] for i in range(3) if i not in lit), default=0)
    dominance = min(colour[i] for i in lit) - rest if lit else 0
    key_like = distance <= 32 or not lit or dominance >= 16
    alpha = 0 if distance <= matte.tolerance else 255
    if matte.soft and key_like:
        if distance <= matte.low:
            soft = 0
        elif distance >= matte.high:
            soft = 255
        else:
            ramp = (distance - matte.low) / (matte.high - matte.low)
            soft = round(255 * (ramp * ramp * (3 - 2 * ramp)))
        by_dominance = 255
        if lit and dominance > 0:
            by_dominance = round(255 * (1 - min(1, dominance / max(1, max(key) - rest))))
        alpha = min(soft, by_dominance)
    alpha = round(alpha * pixel[3] / 255)
    if alpha <= 8:
        return 0, 0, 0, 0
    if matte.despill and key_like and alpha < 252 and len(lit) < 3:
        red, green, blue = (
            min(c, max(0, rest - 1)) if i in lit else c for i, c in enumerate(colour)
        )
        return red, green, blue, alpha
    return *colour, alpha


def oracle_key(pixels: U8, where: str) -> Colour:
    """The recorded search for the key colour."""
    height, width = pixels.shape[:2]
    found = []
    if where == "corners":
        side = min(12, width, height)
        for top in (0, height - side):
            for left in (0, width - side):
                found += [(top + y, left + x) for y in range(side) for x in range(side)]
    else:
        band, step = min(6, width, height), max(1, min(width, height) // 256)
        for depth in range(band):
            for x in range(0, width, step):
                found += [(depth, x), (height - 1 - depth, x)]
            for y in range(0, height, step):
                found += [(y, depth), (y, width - 1 - depth)]
    red, green, blue = (
        round(statistics.median(int(pixels[y, x, channel]) for y, x in found))
        for channel in range(3)
    )
    return red, green, blue


# ── Drawn subjects with known alpha ──────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A straight colour (h, w, 3) and its alpha (h, w) from 0 to 1."""

    colour: F64
    alpha: F64

    def on(self, background: F64 | Colour) -> F64:
        """C = a·F + (1 - a)·B."""
        cover = self.alpha[..., None]
        return self.colour * cover + np.asarray(background, np.float64) * (1 - cover)

    def composite(self, key: Colour, *, noise: float = 0.0, seed: int = 0) -> U8:
        random = np.random.default_rng(seed)
        pixels = self.on(key) + noise * random.standard_normal(self.colour.shape)
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def supersampled(size: int, inside: NDArray[np.bool_]) -> F64:
    """Coverage of size x size pixels by a mask that is drawn larger by a whole factor."""
    factor = inside.shape[0] // size
    blocks = inside.reshape(size, factor, size, factor).astype(np.float64)
    coverage: F64 = blocks.mean(axis=(1, 3))
    return coverage


def grid(size: int, factor: int = 4) -> tuple[F64, F64]:
    """Pixel coordinates of a picture that is drawn larger by `factor`."""
    line = (np.arange(size * factor) + 0.5) / factor
    rows, columns = np.meshgrid(line, line, indexing="ij")
    return rows, columns


def flat(size: int, colour: Colour) -> F64:
    return np.broadcast_to(np.array(colour, np.float64), (size, size, 3)).copy()


def disc(colour: Colour, *, size: int = 96, radius: float = 34.3) -> Subject:
    """An antialiased disc."""
    rows, columns = grid(size)
    inside = np.hypot(rows - size / 2, columns - size / 2) < radius
    return Subject(colour=flat(size, colour), alpha=supersampled(size, inside))


def hairs(colour: Colour, *, size: int = 96) -> Subject:
    """Slanting lines of one and a half pixels from a solid head of hair."""
    rows, columns = grid(size)
    strands = np.abs((columns + 0.35 * rows) % 9 - 4.5) < 0.75
    inside = (strands & (rows > 10)) | (rows > size - 30)
    inside &= (columns > 12) & (columns < size - 12) & (rows < size - 12)
    return Subject(colour=flat(size, colour), alpha=supersampled(size, inside))


def glass(*, size: int = 96) -> Subject:
    """A grey pane that fades from 0.6 to nothing, with a bright streak."""
    ramp = np.linspace(0.6, 0.0, size - 24)
    alpha = np.zeros((size, size))
    alpha[12 : size - 12, 16 : size - 16] = ramp[:, None]
    colour = flat(size, (150, 150, 150))
    colour[:, 40:48] = 235
    return Subject(colour=colour, alpha=alpha)


def recomposite_psnr(cut: U8, truth: Subject) -> float:
    """Worst PSNR in dB over black, white and a wavy ground."""
    rows, columns = grid(truth.alpha.shape[0], 1)
    wave = np.stack([128 + 100 * np.sin(rows / 9 + i) * np.cos(columns / 7) for i in range(3)], -1)
    found = Subject(colour=cut[..., :3].astype(np.float64), alpha=cut[..., 3] / 255)
    grounds: list[F64 | Colour] = [(0, 0, 0), (255, 255, 255), wave]
    errors = [float(np.mean((found.on(ground) - truth.on(ground)) ** 2)) for ground in grounds]
    return float(10 * np.log10(255**2 / max(1e-9, *errors)))
