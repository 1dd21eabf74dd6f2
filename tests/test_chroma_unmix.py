"""Unmixing: drawn subjects with known alpha, recomposited; and what no picture may do to it."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chroma_oracle import (
    Subject,
    cut_out,
    disc,
    flat,
    glass,
    grid,
    hairs,
    load,
    recomposite_psnr,
    run,
    save,
    supersampled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from remove_chroma_key import (
    as_wholes,
    dilate,
    has_smooth_noise,
    has_subsampled_chroma,
    hue_pairs,
    key_free_share,
    parts_of,
    project,
    sharpen_chroma,
    unmixed_colour,
    without_glints,
)

if TYPE_CHECKING:
    from chroma_oracle import U8, Colour
    from numpy.typing import NDArray

UNMIX = ("--auto-key", "border", "--unmix")
GREEN: Colour = (0, 255, 0)
KEYS: list[Colour] = [GREEN, (255, 0, 255), (0, 0, 255), (4, 249, 11), (8, 162, 24)]
HEX = "#{0[0]:02x}{0[1]:02x}{0[2]:02x}".format


def jpeg(pixels: U8, quality: int = 90) -> U8:
    """What a JPEG with half-resolution chroma leaves of a picture."""
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(stored) as image:
        return np.asarray(image.convert("RGB"))


# ── Recomposites of drawn subjects ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", KEYS, ids=HEX)
@pytest.mark.parametrize(
    ("truth", "least"),
    [
        pytest.param(disc((128, 128, 128)), 55, id="grey disc"),
        pytest.param(disc((20, 20, 20)), 55, id="black disc"),
        pytest.param(disc((230, 60, 40)), 48, id="red disc"),
        pytest.param(disc((240, 200, 60)), 48, id="yellow disc"),
        pytest.param(hairs((60, 60, 60)), 50, id="dark hair"),
        pytest.param(hairs((250, 250, 250)), 48, id="white hair"),
        pytest.param(glass(), 46, id="glass"),
    ],
)
def test_a_clean_composite_looks_the_same_on_any_other_background(
    truth: Subject, least: float, key: Colour, tmp_path: Path
) -> None:
    cut = cut_out(tmp_path, truth.composite(key), *UNMIX)
    assert recomposite_psnr(cut, truth) >= least


@pytest.mark.parametrize(
    ("key", "colour"),
    [
        pytest.param(GREEN, (80, 200, 140), id="teal on green"),
        pytest.param(GREEN, (0, 200, 0), id="green on green"),
        pytest.param((0, 0, 255), (90, 110, 210), id="blue on blue"),
        pytest.param((255, 0, 255), (170, 110, 190), id="purple on magenta"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 2.0], ids=["clean", "noise"])
def test_a_subject_that_shares_the_hue_of_the_key_gets_no_holes(
    key: Colour, colour: Colour, noise: float, tmp_path: Path
) -> None:
    truth = disc(colour)
    cut = cut_out(tmp_path, truth.composite(key, noise=noise), *UNMIX)
    solid = truth.alpha == 1
    assert (cut[..., 3][solid] > 245).mean() > 0.93
    assert np.abs(cut[..., :3][solid].astype(int) - colour).mean() < 4
    assert recomposite_psnr(cut, truth) > 28


def test_a_subject_that_is_purer_than_the_key_gets_no_holes(tmp_path: Path) -> None:
    truth = disc((5, 150, 5))
    truth.colour[:, ::2, 1] -= 8
    truth.colour[:, 1::2, 1] += 8
    cut = cut_out(tmp_path, truth.composite((60, 200, 60)), *UNMIX)
    assert (cut[..., 3][truth.alpha == 1] == 255).mean() > 0.9


@pytest.mark.parametrize("noise", [1.0, 2.0, 4.0])
def test_noise_in_the_background_leaves_no_haze(noise: float, tmp_path: Path) -> None:
    truth = disc((128, 120, 110))
    cut = cut_out(tmp_path, truth.composite(GREEN, noise=noise), *UNMIX)
    assert (cut[..., 3][truth.alpha == 0] > 8).mean() < 0.02
    assert recomposite_psnr(cut, truth) > 36


def test_a_slow_drift_of_the_background_leaves_no_haze(tmp_path: Path) -> None:
    truth = disc((128, 120, 110))
    rows, columns = grid(96, 1)
    drift = 6 * np.stack([np.sin(rows / 40 + i) * np.cos(columns / 30) for i in range(3)], -1)
    background = np.clip(np.array((8, 240, 12)) + drift, 0, 255)
    pixels = np.rint(truth.on(background)).astype(np.uint8)
    cut = cut_out(tmp_path, pixels, *UNMIX)
    assert (cut[..., 3][truth.alpha == 0] > 8).mean() < 0.02
    assert recomposite_psnr(cut, truth) > 36


def test_a_glow_of_one_colour_keeps_its_colour_on_any_key(tmp_path: Path) -> None:
    size = 128
    rows, columns = grid(size, 1)
    distance = np.hypot(rows - size / 2, columns - size / 2)
    alpha = np.clip(1.05 - distance / 50, 0, 0.9)
    truth = Subject(colour=flat(size, (255, 215, 70)), alpha=alpha)
    for key in (GREEN, (0, 0, 255), (255, 0, 255)):
        cut = cut_out(tmp_path, truth.composite(key), *UNMIX)
        assert recomposite_psnr(cut, truth) > 16, key


def test_a_soft_black_shadow_stays_a_shadow_beside_an_opaque_subject(tmp_path: Path) -> None:
    size = 128
    rows, columns = grid(size)
    body = supersampled(size, np.hypot(rows - 50, columns - 64) < 30)
    soft_rows, soft_columns = grid(size, 1)
    spread = np.hypot((soft_rows - 96) * 2.2, soft_columns - 64)
    shadow = np.clip(0.55 - spread / 90, 0, 1)
    alpha = body + shadow * (1 - body)
    colour = flat(size, (180, 170, 160)) * (body / np.maximum(alpha, 1e-6))[..., None]
    truth = Subject(colour=colour, alpha=alpha)
    assert recomposite_psnr(cut_out(tmp_path, truth.composite(GREEN), *UNMIX), truth) > 42


def test_an_opaque_subject_of_the_key_s_hue_stays_opaque_above_its_shadow(tmp_path: Path) -> None:
    size = 160
    rows, columns = grid(size)
    body = supersampled(size, np.hypot(rows - 60, columns - 80) < 40)
    soft_rows, soft_columns = grid(size, 1)
    shadow = np.clip(0.6 - np.hypot((soft_rows - 118) * 2.2, soft_columns - 80) / 110, 0, 1)
    alpha = body + shadow * (1 - body)
    colour = flat(size, (80, 200, 140)) * (body / np.maximum(alpha, 1e-6))[..., None]
    truth = Subject(colour=colour, alpha=alpha)
    cut = cut_out(tmp_path, truth.composite(GREEN), *UNMIX)
    assert (cut[..., 3][body == 1] == 255).all()
    assert recomposite_psnr(cut, truth) > 40


@pytest.mark.parametrize(
    ("colour", "key"),
    [
        pytest.param((120, 70, 40), GREEN, id="brown on green"),
        pytest.param((220, 180, 110), (0, 0, 255), id="blond on blue"),
        pytest.param((190, 60, 40), (255, 0, 255), id="red on magenta"),
    ],
)
def test_coloured_strands_of_three_pixels_are_exact(
    colour: Colour, key: Colour, tmp_path: Path
) -> None:
    rows, columns = grid(96)
    strands = np.abs((columns + 0.35 * rows) % 14 - 7) < 1.5
    inside = strands & (rows > 10) & (columns > 10) & (columns < 86) & (rows < 86)
    truth = Subject(colour=flat(96, colour), alpha=supersampled(96, inside))
    assert recomposite_psnr(cut_out(tmp_path, truth.composite(key), *UNMIX), truth) > 50


@pytest.mark.parametrize("key", [(255, 255, 255), (0, 0, 0), (128, 128, 128)], ids=HEX)
def test_a_key_without_a_hue_works_for_opaque_subjects(key: Colour, tmp_path: Path) -> None:
    truth = disc((200, 60, 60))
    assert recomposite_psnr(cut_out(tmp_path, truth.composite(key), *UNMIX), truth) > 55


def test_opaque_pixels_keep_the_very_colour_of_the_input(tmp_path: Path) -> None:
    truth = disc((200, 60, 90))
    pixels = truth.composite(GREEN, noise=2)
    cut = cut_out(tmp_path, pixels, *UNMIX)
    opaque = cut[..., 3] == 255
    assert opaque.sum() > 2000
    assert (cut[..., :3][opaque] == pixels[opaque]).all()


def test_lossy_chroma_is_sharpened_by_the_luma_that_is_still_sharp(tmp_path: Path) -> None:
    truth = hairs((20, 20, 20))
    clean = truth.composite(GREEN)
    lossy = jpeg(clean)
    restored = sharpen_chroma(lossy.transpose(2, 0, 1).astype(np.float32)).transpose(1, 2, 0)
    before = np.square(lossy.astype(float) - clean).mean()
    after = np.square(restored - clean).mean()
    assert after < 0.6 * before
    assert recomposite_psnr(cut_out(tmp_path, lossy, *UNMIX), truth) > 24


def test_the_opaque_rim_of_a_jpeg_has_no_key_colour(tmp_path: Path) -> None:
    truth = disc((40, 40, 60))
    cut = cut_out(tmp_path, jpeg(truth.composite(GREEN), 75), *UNMIX)
    rim = (cut[..., 3] == 255) & dilate(cut[..., 3] == 0, 3)
    red, green, blue = cut[rim][:, :3].T.astype(int)
    assert np.maximum(0, green - np.maximum(red, blue)).mean() < 2


@pytest.mark.parametrize(
    ("subsampled", "pixels"),
    [
        pytest.param(True, jpeg(disc((30, 40, 50)).composite(GREEN)), id="JPEG disc"),
        pytest.param(True, jpeg(hairs((200, 60, 50)).composite(GREEN)), id="JPEG hair"),
        pytest.param(False, disc((30, 40, 50)).composite(GREEN), id="clean disc"),
        pytest.param(False, hairs((200, 60, 50)).composite(GREEN, noise=2), id="noisy hair"),
        pytest.param(False, np.zeros((9, 9, 3), np.uint8), id="nothing"),
    ],
)
def test_subsampled_chroma_is_told_from_full_chroma(*, subsampled: bool, pixels: U8) -> None:
    red, green, blue = pixels.transpose(2, 0, 1)
    assert has_subsampled_chroma((red, green, blue)) is subsampled


# ── The ground as image models paint it ──────────────────────────────────────────────────────────


def painted_ground(size: int, *, seed: int = 3) -> NDArray[np.float64]:
    """Green with noise of a level, blotches of 5, and corners 30 levels off."""
    random = np.random.default_rng(seed)
    ground = np.full((size, size, 3), (6.0, 246.0, 9.0))
    ground += random.normal(0, 1, ground.shape)
    rows, columns = grid(size, 1)
    near = np.exp(-np.abs(np.hypot(rows - size / 2, columns - size / 2) - size / 3) / 8)
    blotches = np.sin(rows / 2.5) * np.cos(columns / 2.5)
    ground += 5 * (near * blotches)[..., None] * np.array((1, -1, 1))
    ground[[0, 0, -1, -1], [0, -1, 0, -1]] += (30, -20, 25)
    return ground


def test_a_painted_background_comes_out_empty(tmp_path: Path) -> None:
    truth = disc((110, 90, 70), size=160, radius=50)
    pixels = np.clip(np.rint(truth.on(painted_ground(160))), 0, 255).astype(np.uint8)
    alpha = cut_out(tmp_path, pixels, *UNMIX)[..., 3]
    assert not alpha[~dilate(truth.alpha > 0, 2)].any()
    assert (alpha[truth.alpha == 1] == 255).all()


def test_an_enclosed_area_that_is_off_the_key_is_no_blot(tmp_path: Path) -> None:
    rows, columns = grid(160)
    distance = np.hypot(rows - 80, columns - 80)
    ring = supersampled(160, (distance < 50) & (distance > 8))
    ground = painted_ground(160)
    ground[supersampled(160, distance <= 8) > 0] += (24, -20, 16)
    truth = Subject(colour=flat(160, (110, 90, 70)), alpha=ring)
    pixels = np.clip(np.rint(truth.on(ground)), 0, 255).astype(np.uint8)
    alpha = cut_out(tmp_path, pixels, *UNMIX)[..., 3]
    assert alpha[76:85, 76:85].max() < 16


@pytest.mark.parametrize("spot", [(1, 1), (1, 3), (2, 2), (3, 4)], ids=str)
def test_spots_off_the_key_beside_the_subject_are_ground(
    spot: tuple[int, int], tmp_path: Path
) -> None:
    truth, ground = disc((110, 90, 70), size=160, radius=40), painted_ground(160)
    for turn in np.linspace(0, 2 * np.pi, 12, endpoint=False):
        top, left = (round(80 + 45 * part) for part in (np.sin(turn), np.cos(turn)))
        ground[top : top + spot[0], left : left + spot[1]] = (20, 222, 26)
    pixels = np.clip(np.rint(truth.on(ground)), 0, 255).astype(np.uint8)
    alpha = cut_out(tmp_path, pixels, *UNMIX)[..., 3]
    assert (alpha[truth.alpha == 0] > 8).mean() < 0.0005
    assert (alpha[truth.alpha == 1] == 255).all()


def test_painted_noise_is_smooth_and_white_noise_is_not() -> None:
    random = np.random.default_rng(2)
    white = random.normal(0, 1.5, (64, 64, 3))
    smooth = random.normal(0, 1.5, (32, 32, 3)).repeat(2, axis=0).repeat(2, axis=1)
    key = np.array((6, 246, 9), np.float32)
    for noise, is_smooth in ((white, False), (smooth, True)):
        red, green, blue = np.clip(key + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1)
        assert has_smooth_noise((red, green, blue), key) is is_smooth


@pytest.mark.parametrize(
    ("colour", "key"),
    [
        pytest.param((136, 126, 96), (43, 248, 4), id="dust on green"),
        pytest.param((110, 120, 140), GREEN, id="smoke on green"),
        pytest.param((136, 110, 80), (250, 4, 244), id="dust on magenta"),
    ],
)
def test_dull_dust_and_smoke_keep_their_colour(colour: Colour, key: Colour, tmp_path: Path) -> None:
    size = 160
    rows, columns = grid(size, 1)
    clumps = 0.5 + 0.25 * np.sin(rows / 5) * np.cos(columns / 6)
    fade = np.clip((62 - np.hypot((rows - 84) * 1.3, columns - 80)) / 30, 0, 1)
    truth = Subject(colour=flat(size, colour), alpha=clumps * fade)
    cut = cut_out(tmp_path, truth.composite(key, noise=0.7), *UNMIX)
    assert recomposite_psnr(cut, truth) > 34


def test_a_faint_wide_shadow_is_kept_on_a_painted_background(tmp_path: Path) -> None:
    rows, columns = grid(160, 1)
    shadow = np.clip(0.3 - np.hypot((rows - 110) * 2, columns - 80) / 200, 0, 1)
    truth = Subject(colour=flat(160, (0, 0, 0)), alpha=shadow)
    pixels = np.clip(np.rint(truth.on(painted_ground(160))), 0, 255).astype(np.uint8)
    cut = cut_out(tmp_path, pixels, *UNMIX)
    assert np.abs(cut[..., 3] / 255 - shadow)[shadow > 0.05].mean() < 0.02


def test_a_shadow_and_a_glow_of_some_colour_are_no_opaque_blots(tmp_path: Path) -> None:
    rows, columns = grid(200, 1)
    body = supersampled(200, np.abs(grid(200)[0] - 60) < 35)
    faint = 0.3 * np.exp(-np.square((rows - 150) / 14) - np.square((columns - 100) / 24))
    alpha = body + faint * (1 - body)
    colour = np.where(body[..., None] > 0, flat(200, (60, 40, 20)), flat(200, (38, 11, 12)))
    truth = Subject(colour=colour, alpha=alpha)
    cut = cut_out(tmp_path, truth.composite((250, 3, 248), noise=0.7), *UNMIX)
    assert cut[100:, :, 3].max() < 0.45 * 255


@pytest.mark.parametrize(
    ("width", "is_capped"),
    [pytest.param(1.3, True, id="a line"), pytest.param(9.0, False, id="a border of a sticker")],
)
def test_a_light_line_that_was_painted_around_the_subject_is_no_brighter_than_it(
    width: float, *, is_capped: bool, tmp_path: Path
) -> None:
    rows, columns = grid(160)
    away = np.hypot(rows - 80, columns - 80)
    light = supersampled(160, away > 60 - width)[..., None]
    truth = Subject(
        colour=(1 - light) * (60, 80, 120) + light * (235, 230, 225),
        alpha=supersampled(160, away < 60),
    )
    pixels = np.clip(np.rint(truth.on(painted_ground(160))), 0, 255).astype(np.uint8)
    cut = cut_out(tmp_path, pixels, *UNMIX)
    rim = (cut[..., 3] > 128) & (truth.alpha < 1)
    assert bool(cut[..., 0][rim].mean() < 90) is is_capped


def test_a_yellow_subject_does_not_share_the_hue_of_an_uneven_magenta(tmp_path: Path) -> None:
    truth = disc((250, 205, 20))
    source = save(tmp_path / "in.png", truth.composite((203, 6, 162), noise=0.7))
    outcome = run("--input", source, "--out", tmp_path / "out.png", *UNMIX)
    assert outcome.stderr == ""
    assert (load(tmp_path / "out.png")[..., 3][truth.alpha == 1] == 255).all()


def test_a_textured_body_of_nearly_the_key_s_hue_is_opaque_inside(tmp_path: Path) -> None:
    truth = disc((104, 108, 24), size=192, radius=80)
    texture = np.random.default_rng(5).normal(0, 12, (96, 96)).repeat(2, axis=0).repeat(2, axis=1)
    truth.colour[...] = np.clip(truth.colour + texture[..., None] * (1, 0.9, 0.5), 0, 255)
    alpha = cut_out(tmp_path, truth.composite((4, 248, 6), noise=0.7), *UNMIX)[..., 3]
    rows, columns = grid(192, 1)
    deep = np.hypot(rows - 96, columns - 96) < 60
    assert (alpha[deep] == 255).mean() > 0.9


@given(seed=st.integers(0, 9999))
def test_parts_of_a_mask_are_what_a_flood_reaches(seed: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 16, 2)) < random.choice([0.2, 0.4, 0.6])
    field = random.integers(1, 200, mask.shape).astype(np.uint8)
    sizes, largest, at_border, left = [], [], [], {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while left:
        flood, fresh = set(), {min(left)}
        while fresh:
            flood |= fresh
            around = {(y + i, x + j) for y, x in fresh for i in (-1, 0, 1) for j in (-1, 0, 1)}
            fresh = (around & left) - flood
        left -= flood
        sizes.append(len(flood))
        largest.append(max(field[place] for place in flood))
        edges = {0, mask.shape[0] - 1}, {0, mask.shape[1] - 1}
        at_border.append(any(y in edges[0] or x in edges[1] for y, x in flood))
    parts = parts_of(mask)
    assert parts.sizes().tolist() == sizes
    assert parts.largest(field).tolist() == largest
    assert parts.at_border().tolist() == at_border
    assert (parts.mask(np.ones(len(sizes), np.bool_)) == mask).all()


# ── --subject ────────────────────────────────────────────────────────────────────────────────────


def test_subject_decides_what_one_picture_cannot_tell(tmp_path: Path) -> None:
    truth = disc((80, 200, 140))
    pixels = truth.composite(GREEN)
    centre = np.s_[40:56, 40:56, 3]
    assert (cut_out(tmp_path, pixels, *UNMIX)[centre] == 255).all()
    assert (cut_out(tmp_path, pixels, *UNMIX, "--subject", "opaque")[centre] == 255).all()
    assert (cut_out(tmp_path, pixels, *UNMIX, "--subject", "translucent")[centre] < 230).all()


def test_a_pane_with_a_bright_fade_makes_the_subject_see_through(tmp_path: Path) -> None:
    size = 128
    alpha = np.zeros((size, size))
    alpha[16:80, 24:104] = 0.6
    alpha[80:112, 24:104] = np.linspace(0.3, 0.0, 32)[:, None]
    colour = flat(size, (90, 180, 240))
    colour[80:] = (190, 190, 190)
    truth = Subject(colour=colour, alpha=alpha)
    cut = cut_out(tmp_path, truth.composite(GREEN), *UNMIX)
    assert cut[40:60, 40:80, 3].mean() == pytest.approx(153, abs=12)


def test_a_glow_elsewhere_says_nothing_of_a_body_of_the_key_s_hue(tmp_path: Path) -> None:
    size = 200
    rows, columns = grid(size)
    body = supersampled(size, np.hypot(rows - 130, columns - 70) < 55)
    soft_rows, soft_columns = grid(size, 1)
    away = np.hypot(soft_rows - 45, soft_columns - 150)
    glow = np.clip(1.05 - away / 40, 0, 0.9)
    shading = 1.1 - np.hypot(soft_rows - 110, soft_columns - 60) / 130
    colour = np.where(body[..., None] > 0, flat(size, (70, 190, 80)), flat(size, (255, 225, 90)))
    colour *= np.where(body > 0, shading, 1)[..., None]
    truth = Subject(colour=np.clip(colour, 0, 255), alpha=np.maximum(body, glow))
    alpha = cut_out(tmp_path, truth.composite(GREEN, noise=0.7), *UNMIX)[..., 3]
    assert (alpha[body == 1] > 245).mean() > 0.95
    assert np.abs(alpha / 255 - glow)[(glow > 0.1) & (body == 0)].mean() < 0.1


def test_a_clear_pane_in_a_frame_is_glass(tmp_path: Path) -> None:
    rows, columns = grid(128)
    reach = np.maximum(abs(rows - 64), abs(columns - 64))
    frame, pane = (supersampled(128, mask) for mask in ((reach < 50) & (reach > 42), reach < 44))
    alpha = frame + 0.2 * pane * (1 - frame)
    colour = np.where(frame[..., None] > 0, flat(128, (90, 60, 40)), flat(128, (225, 235, 240)))
    truth = Subject(colour=colour, alpha=alpha)
    cut = cut_out(tmp_path, truth.composite(GREEN, noise=0.7), *UNMIX)
    assert cut[50:78, 50:78, 3].mean() == pytest.approx(51, abs=6)


@pytest.mark.parametrize("key", [GREEN, (255, 0, 255), (0, 0, 255), (228, 7, 206)], ids=HEX)
@pytest.mark.parametrize(
    "colour",
    [
        pytest.param((200, 60, 50), id="red"),
        pytest.param((60, 66, 72), id="smoked"),
        pytest.param((240, 245, 245), id="clear"),
    ],
)
def test_lenses_that_grow_denser_are_glass_in_spite_of_their_crisp_rim(
    key: Colour, colour: Colour, tmp_path: Path
) -> None:
    rows, columns = grid(160)
    away = np.hypot(rows - 80, columns - 80)
    rim, lens = (supersampled(160, mask) for mask in ((away < 66) & (away > 60), away < 63))
    ramp = 0.7 - 0.45 * (grid(160, 1)[0] - 17) / 126
    alpha = rim + ramp * lens * (1 - rim)
    truth = Subject(
        colour=np.where(rim[..., None] > 0, flat(160, (90, 60, 40)), flat(160, colour)), alpha=alpha
    )
    cut = cut_out(tmp_path, truth.composite(key, noise=0.7), *UNMIX)
    inner = np.s_[40:120, 40:120]
    assert np.abs(cut[..., 3][inner] / 255 - alpha[inner]).mean() < 0.12


def test_a_large_area_of_like_colour_is_judged_as_most_of_it_is() -> None:
    areas, chosen, whole = (
        np.kron(np.array(rows, np.bool_), np.ones((6, 6), np.bool_))
        for rows in (
            [[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]],
            [[1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0]],
            [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1]],
        )
    )
    assert (as_wholes(areas, chosen) == whole).all()


def test_a_small_area_keeps_what_is_opaque_of_it() -> None:
    arm = np.ones((3, 20), np.bool_)
    core = arm.copy()
    core[:, ::2] = False
    assert (as_wholes(arm, core) == core).all()


def test_a_glint_is_no_body_on_a_pane_that_is_none() -> None:
    pane, glint = np.ones((12, 12), np.bool_), np.eye(12, dtype=np.bool_)
    half = pane.copy()
    half[6:] = False
    assert not without_glints(pane, glint).any()
    assert (without_glints(pane, half) == half).all()
    assert (without_glints(glint, glint) == glint).all()


@pytest.mark.parametrize(
    ("key", "colour"),
    [
        pytest.param(GREEN, (90, 190, 70), id="green on green"),
        pytest.param((255, 0, 255), (190, 70, 200), id="violet on magenta"),
        pytest.param((0, 0, 255), (60, 110, 220), id="blue on blue"),
    ],
)
def test_a_shaded_ball_of_the_key_s_hue_is_no_glass(
    key: Colour, colour: Colour, tmp_path: Path
) -> None:
    truth = disc(colour, size=160, radius=62)
    rows, columns = grid(160, 1)
    light = 1.15 - np.hypot(rows - 60, columns - 60) / 170
    truth.colour[...] = np.clip(truth.colour * light[..., None], 0, 255)
    cut = cut_out(tmp_path, truth.composite(key, noise=0.7), *UNMIX)
    assert (cut[..., 3][truth.alpha == 1] > 245).mean() > 0.97


# ── Parts ────────────────────────────────────────────────────────────────────────────────────────


@given(
    subject=st.tuples(*[st.integers(0, 255)] * 3),
    key=st.sampled_from(KEYS),
    alpha=st.floats(0, 1),
)
def test_q_is_linear_in_alpha_for_every_subject(subject: Colour, key: Colour, alpha: float) -> None:
    exact_key, foreground = np.array(key, np.float32), np.array(subject, np.float32)
    mixed = alpha * foreground + (1 - alpha) * exact_key
    q_mixed, q_subject, q_key = (
        float(key_free_share(colour.astype(np.float32)[:, None], exact_key)[0])
        for colour in (mixed, foreground, exact_key)
    )
    assert q_key == pytest.approx(0, abs=1e-5)
    assert q_mixed == pytest.approx(alpha * q_subject, abs=1e-4)


def test_the_pixel_that_is_worked_out_by_hand_comes_out_as_written(tmp_path: Path) -> None:
    key, brown, half = (8, 248, 8), (200, 80, 40), (104, 164, 24)
    exact_key, foreground, mixed = (
        np.array(colour, np.float32)[:, None] for colour in (key, brown, half)
    )
    assert mixed.tolist() == (0.5 * foreground + 0.5 * exact_key).tolist()
    q = key_free_share(mixed, exact_key[:, 0])
    assert q.tolist() == [0.75]
    assert key_free_share(foreground, exact_key[:, 0]).tolist() == [1.5]
    olive = unmixed_colour(mixed, q, exact_key[:, 0])
    assert np.rint(olive[:, 0]).tolist() == [136, 136, 29]
    energy = np.square(mixed - exact_key).sum(axis=0)
    assert energy.tolist() == [96**2 + 84**2 + 16**2]
    alpha, misfit = project(mixed - exact_key, energy, foreground - exact_key)
    assert (alpha.tolist(), misfit.tolist()) == ([33056 / 66112], [0])
    assert unmixed_colour(mixed, alpha, exact_key[:, 0])[:, 0].tolist() == list(brown)
    pixels = np.full((24, 24, 3), key, np.uint8)
    pixels[6:18, 6:18] = half
    pixels[7:17, 7:17] = brown
    assert cut_out(tmp_path, pixels, *UNMIX)[12, 6].tolist() == [*brown, 128]


@pytest.mark.parametrize(
    ("key", "pairs"),
    [
        pytest.param(GREEN, [(1, 0), (1, 2)], id="green"),
        pytest.param((255, 0, 255), [(0, 1), (2, 1)], id="magenta"),
        pytest.param((203, 6, 162), [(0, 1), (2, 1)], id="a magenta that is off by 41"),
        pytest.param((255, 100, 0), [(0, 1), (0, 2)], id="a channel below the middle is unlit"),
        pytest.param((120, 120, 120), [], id="grey has no hue"),
    ],
)
def test_hue_pairs_are_the_differences_that_tell_the_key(
    key: Colour, pairs: list[tuple[int, int]]
) -> None:
    assert hue_pairs(np.array(key, np.float32)) == pairs


@given(seed=st.integers(0, 999), reach=st.integers(1, 9))
def test_dilating_a_mask_is_growing_every_pixel_to_a_square(seed: int, reach: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.random(random.integers(1, 20, 2)) < 0.1
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        expected[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = True
    assert (dilate(mask, reach) == expected).all()


# ── Any picture at all ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F"]),
    flags=st.sampled_from(
        [
            UNMIX,
            ("--unmix", "--key-color", "#808080"),
            ("--unmix", "--key-color", "#123456", "--subject", "translucent"),
            (*UNMIX, "--subject", "opaque", "--edge-contract", "2", "--edge-feather", "1.5"),
            (*UNMIX, "--enclosed", "keep"),
            ("--auto-key", "corners", "--soft-matte", "--despill"),
        ]
    ),
)
def test_any_size_and_mode_gives_a_picture_of_that_size_without_colour_under_alpha_0(
    seed: int, width: int, height: int, mode: str, flags: tuple[str, ...]
) -> None:
    random = np.random.default_rng(seed)
    pixels = np.where(
        random.random((height, width, 1)) < 0.5, (0, 255, 0, 255), random.integers(1, 256, 4)
    ).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode in {"CMYK", "YCbCr", "F", "I;16"}:
        image = image.convert("L" if mode in {"F", "I;16"} else "RGB")
    suffix = ".tif" if mode in {"CMYK", "YCbCr", "F"} else ".png"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / f"in{suffix}", Path(folder) / "out.webp"
        image.convert(mode).save(source)
        outcome = run("--input", source, "--out", target, "--json", *flags)
        assert outcome.exit_code == 0, outcome.stderr
        cut = load(target)
        report = json.loads(outcome.stdout)
        (looked_at,) = run("--inspect", target, "--json").json_lines
    assert cut.shape == (height, width, 4)
    assert (report["width"], report["height"]) == (width, height)
    assert not cut[cut[..., 3] == 0].any()
    shares = ("width", "height", "transparent", "partial", "opaque", "corners_transparent")
    assert {key: looked_at[key] for key in shares} == {key: report[key] for key in shares}
    assert {looked_at["verdict"], report["verdict"]} <= {"good", "look", "bad"}


def test_a_subject_without_any_background_is_left_as_it_is(tmp_path: Path) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (40, 40, 1)).astype(np.uint8)
    cut = cut_out(tmp_path, grey.repeat(3, axis=2), "--unmix")
    assert (cut[..., :3] == grey).all()
    assert (cut[..., 3] == 255).all()


def test_the_alpha_of_the_input_is_kept(tmp_path: Path) -> None:
    pixels = np.dstack([disc((90, 90, 90)).composite(GREEN), np.full((96, 96), 128, np.uint8)])
    source, target = save(tmp_path / "in.png", pixels), tmp_path / "out.png"
    assert run("--input", source, "--out", target, *UNMIX).exit_code == 0
    cut = load(target)
    assert (cut[40:50, 40:50] == (90, 90, 90, 128)).all()
    assert not cut[:5, :5].any()
