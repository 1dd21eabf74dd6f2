"""The recorded matte: vectorised code against a scalar oracle, and the known figures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chroma_oracle import Matte, cut_out, oracle_key, oracle_pixel, run, save
from hypothesis import given, settings
from hypothesis import strategies as st
from remove_chroma_key import border_samples, corner_samples, spill_channels

if TYPE_CHECKING:
    from chroma_oracle import U8, Colour

GREEN, MAGENTA, BLUE, NEAR_GREEN = (0, 255, 0), (255, 0, 255), (0, 0, 255), (4, 249, 11)
OLIVE, BLACK, WHITE = (128, 112, 0), (0, 0, 0), (255, 255, 255)
KEYS: list[Colour] = [GREEN, MAGENTA, BLUE, NEAR_GREEN, OLIVE, BLACK, WHITE]
MATTES = [
    pytest.param(Matte(), id="hard"),
    pytest.param(Matte(tolerance=0), id="hard, exact"),
    pytest.param(Matte(tolerance=255), id="hard, everything"),
    pytest.param(Matte(despill=True), id="hard, despill"),
    pytest.param(Matte(soft=True), id="soft"),
    pytest.param(Matte(soft=True, low=0, high=255), id="soft, full range"),
    pytest.param(Matte(soft=True, low=12.5, high=91.25, despill=True), id="soft, despill"),
    pytest.param(Matte(soft=True, tolerance=80, low=40, high=41), id="soft, steep, tolerance"),
]


def assert_equals_oracle(pixels: U8, matte: Matte, folder: Path) -> None:
    found = cut_out(folder, pixels, *matte.flags)
    for y, x in np.ndindex(*pixels.shape[:2]):
        red, green, blue, alpha = (int(value) for value in pixels[y, x])
        expected = oracle_pixel((red, green, blue, alpha), matte)
        assert tuple(found[y, x].tolist()) == expected, (pixels[y, x], matte)


def pixels_near(key: Colour, seed: int) -> U8:
    """Random pixels, half of them near the key, a quarter of them not opaque."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (24, 24, 4))
    pixels[:12, :, :3] = np.clip(np.array(key) + random.integers(-70, 71, (12, 24, 3)), 0, 255)
    pixels[::2, :, 3] = 255
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("key", KEYS, ids="#{0[0]:02x}{0[1]:02x}{0[2]:02x}".format)
@pytest.mark.parametrize("matte", MATTES)
def test_every_pixel_of_the_matte_is_what_the_formulas_say(
    matte: Matte, key: Colour, tmp_path: Path
) -> None:
    assert_equals_oracle(
        pixels_near(key, seed=sum(key)), Matte(**{**vars(matte), "key": key}), tmp_path
    )


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=4, max_size=160),
    key=st.tuples(*[st.integers(0, 255)] * 3),
    tolerance=st.integers(0, 255),
    soft=st.booleans(),
    despill=st.booleans(),
    low=st.floats(0, 254),
    span=st.floats(0.01, 255),
)
def test_no_pixel_key_or_threshold_makes_the_matte_differ_from_the_formulas(
    *, data: bytes, key: Colour, tolerance: int, soft: bool, despill: bool, low: float, span: float
) -> None:
    pixels = np.frombuffer(data[: len(data) // 4 * 4], np.uint8).reshape(1, -1, 4)
    matte = Matte(
        key=key, tolerance=tolerance, soft=soft, despill=despill, low=low, high=min(255, low + span)
    )
    with tempfile.TemporaryDirectory() as folder:
        assert_equals_oracle(pixels, matte, Path(folder))


@pytest.mark.parametrize("where", ["corners", "border"])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 30), (7, 3), (13, 13), (40, 26), (530, 515)], ids=str
)
def test_the_key_colour_is_the_median_of_the_corners_or_the_border(
    where: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3)).astype(np.uint8)
    source = save(tmp_path / "in.png", pixels)
    outcome = run("--input", source, "--out", tmp_path / "out.png", "--auto-key", where)
    expected = "#{:02x}{:02x}{:02x}".format(*oracle_key(pixels, where))
    assert f"Key color: {expected}" in outcome.stdout.splitlines()


def test_samples_have_the_shape_of_a_list_of_colours() -> None:
    plane = np.zeros((40, 30), np.uint8)
    assert corner_samples((plane, plane, plane)).shape == (4 * 144, 3)
    assert border_samples((plane, plane, plane)).shape == (12 * 30 + 12 * 40, 3)


@pytest.mark.parametrize(
    ("key", "channels"),
    [
        pytest.param((0, 255, 0), (1,), id="green"),
        pytest.param((255, 0, 255), (0, 2), id="magenta"),
        pytest.param((255, 239, 238), (0, 1), id="16 below the highest is in, 17 is not"),
        pytest.param((127, 127, 127), (), id="dark grey has none"),
        pytest.param((128, 128, 128), (0, 1, 2), id="light grey has all"),
    ],
)
def test_spill_channels_are_those_that_the_key_lights_up(
    key: Colour, channels: tuple[int, ...]
) -> None:
    assert spill_channels(key) == channels


def test_contracting_takes_one_pixel_off_each_side(tmp_path: Path) -> None:
    pixels = np.full((9, 9, 3), (0, 255, 0), np.uint8)
    pixels[2:7, 2:7] = (200, 30, 40)
    alpha = cut_out(tmp_path, pixels, "--edge-contract", "1")[..., 3]
    expected = np.zeros((9, 9), np.uint8)
    expected[3:6, 3:6] = 255
    assert (alpha == expected).all()


def test_feathering_spreads_the_matte_and_keeps_its_weight(tmp_path: Path) -> None:
    pixels = np.full((41, 41, 3), (0, 255, 0), np.uint8)
    pixels[15:26, 15:26] = (200, 30, 40)
    hard = cut_out(tmp_path, pixels)[..., 3].astype(float)
    soft = cut_out(tmp_path, pixels, "--edge-feather", "2")[..., 3].astype(float)
    assert ((soft > 0) & (soft < 255)).sum() > 60
    assert soft.sum() == pytest.approx(hard.sum(), rel=0.02)
