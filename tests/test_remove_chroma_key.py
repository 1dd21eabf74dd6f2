"""The command line of remove_chroma_key.py: files in, files out, and every way to be refused."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import remove_chroma_key
from chroma_oracle import (
    Outcome,
    Subject,
    cut_out,
    disc,
    flat,
    grid,
    load,
    run,
    save,
    supersampled,
)
from pages import first_cells
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from collections.abc import Callable

    from chroma_oracle import U8, Colour

SCRIPT = Path(remove_chroma_key.__file__)
GREEN = (0, 255, 0)
UNMIX = ("--auto-key", "border", "--unmix")


def grey_disc() -> U8:
    return disc((120, 110, 100)).composite(GREEN)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A grey disc on green."""
    return save(tmp_path / "disc.png", grey_disc())


def in_process(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# ── What is printed and written ──────────────────────────────────────────────────────────────────


def test_a_cut_out_is_reported_in_the_known_words(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut.png"
    outcome = run("--input", picture, "--out", target)
    alpha = load(target)[..., 3]
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines() == [
        f"Wrote {target}",
        "Key color: #00ff00",
        f"Transparent pixels: {(alpha == 0).sum()}/{alpha.size}",
        f"Partially transparent pixels: 0/{alpha.size}",
    ]


def test_the_script_runs_alone_as_a_process(picture: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.py"
    copy.write_bytes(SCRIPT.read_bytes())
    target = tmp_path / "cut.webp"
    done = subprocess.run(
        [sys.executable, str(copy), "--input", str(picture), "--out", str(target), *UNMIX],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Wrote {target}\nKey color: #00ff00\n")
    assert load(target)[0, 0].tolist() == [0, 0, 0, 0]


def test_json_tells_an_agent_what_it_must_know(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut.png"
    outcome = run("--input", picture, "--out", target, *UNMIX, "--json")
    assert outcome.json_lines == [
        {
            "input": str(picture),
            "output": str(target),
            "preview": None,
            "width": 96,
            "height": 96,
            "key_color": "#00ff00",
            "border_uniform": 1.0,
            "border_spread": 0.0,
            "border": "flat",
            "transparent": pytest.approx(0.59, abs=0.02),
            "partial": pytest.approx(0.03, abs=0.02),
            "opaque": pytest.approx(0.38, abs=0.02),
            "corners_transparent": 4,
            "residual_spill": pytest.approx(0, abs=1),
            "rim_tint": pytest.approx(0, abs=1),
            "opaque_key": 0.0,
            "key_hued": 0.0,
            "see_through": 0.0,
            "touches_border": [],
            "verdict": "good",
            "warnings": [],
        }
    ]


def test_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        remove_chroma_key.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Exit codes: 0 every requested image is on disk;" in printed
    assert "--unmix" in printed


# ── Self-check ───────────────────────────────────────────────────────────────────────────────────


def warned(folder: Path, pixels: U8, *flags: str) -> str:
    outcome = run("--input", save(folder / "in.png", pixels), "--out", folder / "o.png", *flags)
    assert outcome.exit_code == 0
    return "\n".join(outcome.warnings)


def test_a_good_cut_out_gives_no_warning(picture: Path, tmp_path: Path) -> None:
    assert run("--input", picture, "--out", tmp_path / "o.png", *UNMIX).stderr == ""


def test_a_border_that_is_not_flat_is_warned_of(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)
    assert "the background is no flat colour" in warned(tmp_path, noise, *UNMIX)


def test_a_key_colour_that_is_not_there_is_warned_of(tmp_path: Path) -> None:
    grey = np.full((40, 40, 3), 90, np.uint8)
    assert "no pixel matched the key colour #00ff00" in warned(tmp_path, grey)


def test_a_picture_of_nothing_but_key_is_warned_of(tmp_path: Path) -> None:
    green = np.full((40, 40, 3), GREEN, np.uint8)
    assert "next to nothing is left" in warned(tmp_path, green, *UNMIX)


def frog() -> U8:
    return disc((80, 200, 140)).composite(GREEN)


def leaves() -> U8:
    """Four discs in the key's hue."""
    quarter = disc((80, 200, 140), size=64, radius=20).composite(GREEN)
    return np.tile(quarter, (2, 2, 1))


@pytest.mark.parametrize(
    ("pixels", "flags"),
    [
        pytest.param(leaves(), UNMIX, id="several areas"),
        pytest.param(frog(), ("--soft-matte",), id="soft matte"),
    ],
)
def test_a_subject_that_shares_the_hue_of_the_key_is_warned_of(
    pixels: U8, flags: tuple[str, ...], tmp_path: Path
) -> None:
    assert "shares the hue of #00ff00" in warned(tmp_path, pixels, *flags)


def test_one_crisp_area_in_the_hue_of_the_key_is_no_fault(tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", frog())
    outcome = run("--input", source, "--out", tmp_path / "o.png", *UNMIX, "--json")
    assert (outcome.stderr, outcome.json_lines[0]["verdict"]) == ("", "good")
    assert outcome.json_lines[0]["key_hued"] > 0.8


def test_a_subject_that_is_transparent_in_the_input_is_not_called_see_through(
    tmp_path: Path,
) -> None:
    pixels = np.dstack([grey_disc(), np.full((96, 96), 255, np.uint8)])
    pixels[30:66, 30:66, 3] = 0
    outcome = run(
        "--input", save(tmp_path / "in.png", pixels), "--out", tmp_path / "o.png", *UNMIX, "--json"
    )
    assert outcome.json_lines[0]["see_through"] == 0


def pane() -> U8:
    """A pane of glass, half see-through."""
    pixels = np.full((96, 96, 3), GREEN, np.uint8)
    pixels[20:76, 20:76] = (75, 202, 75)
    return pixels


def cornered() -> U8:
    pixels = grey_disc()
    pixels[0, 0] = (30, 200, 30)
    return pixels


def rimmed() -> U8:
    """A grey disc with a wide, partly transparent rim that a hard matte leaves as it is."""
    pixels = np.full((96, 96, 3), GREEN, np.uint8)
    pixels[30:66, 30:66] = (60, 200, 60)
    pixels[38:58, 38:58] = (110, 110, 110)
    return pixels


def pocketed() -> U8:
    """A grey square around a piece of background that is off the key."""
    pixels = np.full((96, 96, 3), GREEN, np.uint8)
    pixels[20:76, 20:76] = (120, 110, 100)
    pixels[40:50, 40:55] = (24, 231, 20)
    return pixels


def checkerboard(light: int = 255, dark: int = 228, side: int = 12) -> U8:
    """A disc on a checkerboard that is painted."""
    truth = disc((120, 60, 40), size=192, radius=60)
    rows, columns = np.indices((192, 192)) // side
    ground = np.where((rows + columns) % 2, light, dark)
    noise = np.random.default_rng(0).normal(0, 1.5, (192, 192, 3))
    return np.clip(np.rint(truth.on(ground[..., None] + noise)), 0, 255).astype(np.uint8)


VERDICTS = [
    pytest.param(grey_disc(), UNMIX, "good", None, id="good"),
    pytest.param(
        pane(), (*UNMIX, "--subject", "translucent"), "look", "is see-through", id="glass"
    ),
    pytest.param(cornered(), UNMIX, "look", "only 3 of the four corners", id="corner"),
    pytest.param(rimmed(), ("--soft-matte",), "look", "levels of #00ff00 shine", id="spill"),
    pytest.param(pocketed(), (), "look", "4.78% of what is left is opaque and nearly", id="pocket"),
    pytest.param(grey_disc()[:60], UNMIX, "look", "cut by the bottom", id="cut"),
    pytest.param(checkerboard(), UNMIX, "bad", "a pattern of two tones", id="checkerboard"),
    pytest.param(grey_disc(), (), "bad", "levels more of #00ff00", id="rim"),
    pytest.param(grey_disc(), ("--key-color", "#ff00ff"), "bad", "no pixel matched", id="no key"),
    pytest.param(np.full((40, 40, 3), GREEN, np.uint8), UNMIX, "bad", "is left", id="nothing left"),
]


def framed(frame: Colour, ground: Colour, width: int = 6) -> U8:
    """A disc on a ground that has a frame."""
    pixels = np.full((160, 160, 3), frame, np.uint8)
    inner = disc((20, 30, 90), size=160 - 2 * width, radius=30).composite(ground)
    pixels[width : 160 - width, width : 160 - width] = inner
    return pixels


@pytest.mark.parametrize(("pixels", "flags", "verdict", "sentence"), VERDICTS)
def test_the_verdict_is_that_of_the_worst_warning(
    pixels: U8, flags: tuple[str, ...], verdict: str, sentence: str | None, tmp_path: Path
) -> None:
    source = save(tmp_path / "in.png", pixels)
    outcome = run("--input", source, "--out", tmp_path / "o.png", *flags, "--json")
    (record,) = outcome.json_lines
    assert (record["verdict"], outcome.exit_code) == (verdict, 0)
    assert any(sentence in warning for warning in record["warnings"]) if sentence else True
    *told, last = outcome.stderr.splitlines() or [""]
    assert told == [f"Warning: {source}: {warning}" for warning in record["warnings"]]
    assert last.startswith(f"Warning: {source}: verdict {verdict}: ") if sentence else not last


@pytest.mark.parametrize(("pixels", "flags", "verdict", "_sentence"), VERDICTS)
def test_strict_makes_a_bad_verdict_a_failure(
    pixels: U8, flags: tuple[str, ...], verdict: str, _sentence: str | None, tmp_path: Path
) -> None:
    source = save(tmp_path / "in.png", pixels)
    outcome = run("--input", source, "--out", tmp_path / "o.png", *flags, "--strict")
    errors = [f"Error: {source}: verdict bad: do not use it as it is"]
    assert (outcome.exit_code, outcome.errors) == ((1, errors) if verdict == "bad" else (0, []))
    assert (tmp_path / "o.png").exists()


def test_a_subject_that_is_cut_by_the_picture_is_warned_of(tmp_path: Path) -> None:
    assert "cut by the bottom" in warned(tmp_path, grey_disc()[:60], *UNMIX)


BORDERS = [
    pytest.param(grey_disc(), "flat", "good", id="flat"),
    pytest.param(checkerboard(), "pattern", "bad", id="checkerboard"),
    pytest.param(framed((250, 250, 250), GREEN), "frame", "bad", id="green in a white frame"),
    pytest.param(framed(GREEN, (250, 0, 250)), "frame", "bad", id="magenta in a green frame"),
    pytest.param(framed(GREEN, (250, 250, 250)), "flat", "good", id="a white card on green"),
    pytest.param(framed((250, 250, 250), GREEN, 40), "no hue", "look", id="a green card on white"),
    pytest.param(disc((200, 60, 60)).composite((255, 255, 255)), "no hue", "look", id="white"),
    pytest.param(
        disc((240, 240, 240), size=160, radius=60).composite((255, 255, 255)),
        "no hue",
        "bad",
        id="nearly white on white",
    ),
    pytest.param(
        np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8),
        "uneven",
        "bad",
        id="noise",
    ),
]


@pytest.mark.parametrize(("pixels", "border", "verdict"), BORDERS)
def test_the_border_is_called_what_it_is(
    pixels: U8, border: str, verdict: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "in.png", pixels)
    (record,) = run("--input", source, "--out", tmp_path / "o.png", *UNMIX, "--json").json_lines
    assert (record["border"], record["verdict"]) == (border, verdict)
    if border in remove_chroma_key.BORDER_FAULTS:
        assert (
            "make the picture again" in record["warnings"][0] or "crop it" in record["warnings"][0]
        )


def test_a_frame_is_named_with_what_it_surrounds(tmp_path: Path) -> None:
    said = warned(tmp_path, framed((250, 250, 250), GREEN), *UNMIX)
    assert "the border is a frame of #fafafa around a flat #00ff00; crop it off" in said


# ── What is enclosed, and what nobody sees ───────────────────────────────────────────────────────

EYE = np.s_[44:52, 44:52]


def ring_of(key: Colour) -> U8:
    """A black ring with a hole."""
    rows, columns = grid(96)
    distance = np.hypot(rows - 48, columns - 48)
    ring = supersampled(96, (distance < 40) & (distance > 16))
    return Subject(colour=flat(96, (20, 20, 20)), alpha=ring).composite(key)


@pytest.mark.parametrize(
    ("key", "flags", "kept"),
    [
        pytest.param((255, 255, 255), [], True, id="white"),
        pytest.param((255, 255, 255), ["--enclosed", "remove"], False, id="white, remove"),
        pytest.param(GREEN, [], False, id="green"),
        pytest.param(GREEN, ["--enclosed", "auto"], False, id="green, auto"),
        pytest.param(GREEN, ["--enclosed", "keep"], True, id="green, keep"),
    ],
)
def test_what_the_subject_encloses_is_kept_where_the_key_has_no_hue(
    key: Colour, flags: list[str], *, kept: bool, tmp_path: Path
) -> None:
    pixels = ring_of(key)
    cut = cut_out(tmp_path, pixels, *UNMIX, *flags)
    assert np.unique(cut[EYE][..., 3]).tolist() == [255 if kept else 0]
    rows, columns = grid(96, 1)
    inside = np.hypot(rows - 48, columns - 48) < 36
    if kept:
        assert (cut[inside] == np.dstack([pixels, np.full((96, 96), 255, np.uint8)])[inside]).all()
    assert cut[0, 0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", [["--unmix"], ["--soft-matte"], []], ids=str)
@pytest.mark.parametrize(
    ("place", "said"), [("border", "its border is"), ("corners", "its corners are")]
)
def test_a_cut_out_is_not_cut_out_once_more(
    place: str, said: str, method: list[str], picture: Path, tmp_path: Path
) -> None:
    once, twice = tmp_path / "once.png", tmp_path / "twice.png"
    assert run("--input", picture, "--out", once, *UNMIX).exit_code == 0
    outcome = run("--input", once, "--out", twice, "--auto-key", place, *method)
    assert outcome.exit_code == 1
    assert f"{said} transparent already" in outcome.errors[0]
    assert not twice.exists()
    outcome = run("--input", once, "--out", twice, *method)
    assert outcome.exit_code == 0
    assert "its border was transparent already" in outcome.warnings[0]


def test_the_key_is_measured_where_it_is_seen(tmp_path: Path) -> None:
    pixels = np.dstack([grey_disc(), np.full((96, 96), 255, np.uint8)])
    pixels[:40] = (0, 0, 0, 0)  # less than half of the border
    pixels[90:, 30:66] = (10, 10, 10, 255)  # and with this more than half
    source = save(tmp_path / "in.png", pixels)
    outcome = run("--input", source, "--out", tmp_path / "o.png", *UNMIX, "--json")
    assert outcome.json_lines[0]["key_color"] == "#00ff00"


@pytest.mark.parametrize("steps", [3, 8, 15])
def test_a_drift_and_a_subject_at_the_border_are_no_pattern(steps: int, tmp_path: Path) -> None:
    ground = np.linspace(0, 8 * steps, 192)[:, None, None] + np.array(GREEN)
    truth = disc((20, 20, 20), size=192, radius=110)
    pixels = np.clip(truth.on(ground - 4 * steps), 0, 255)
    assert "pattern" not in warned(tmp_path, pixels.astype(np.uint8), *UNMIX)


# ── Inspection ───────────────────────────────────────────────────────────────────────────────────


def inspected(folder: Path, pixels: U8) -> tuple[dict[str, Any], Outcome]:
    """What `--inspect` says of a picture, and that it writes nothing."""
    source = save(folder / "in.png", pixels)
    outcome = run("--inspect", source, "--json")
    (record,) = outcome.json_lines
    assert os.listdir(folder) == ["in.png"]
    return record, outcome


def cut_of(pixels: U8, *flags: str) -> U8:
    """What is cut out, and is looked at anew."""
    with tempfile.TemporaryDirectory() as folder:
        return cut_out(Path(folder), pixels, *flags)


def cut_disc(*flags: str) -> U8:
    """A disc that was cut out."""
    return cut_of(grey_disc(), *flags)


def covered(pixels: U8, alpha: int, area: tuple[slice, slice]) -> U8:
    """The same with grey of some alpha over an area."""
    changed = pixels.copy()
    changed[area] = (90, 90, 90, alpha)
    return changed


CUT_DISC = cut_disc(*UNMIX)
CORNER, LEFT = np.s_[:6, :6], np.s_[30:34, :3]


@pytest.mark.parametrize(
    ("pixels", "verdict", "sentences"),
    [
        pytest.param(CUT_DISC, "good", [], id="a good cut-out"),
        pytest.param(
            grey_disc(),
            "bad",
            ["it has no alpha; cut it out with", "parts of it have the key colour #00ff00"],
            id="no alpha",
        ),
        pytest.param(
            np.dstack([grey_disc(), np.full((96, 96), 255, np.uint8)]),
            "bad",
            ["its alpha is opaque everywhere; cut it out with", "the key colour #00ff00"],
            id="opaque everywhere",
        ),
        pytest.param(
            checkerboard(),
            "bad",
            ["it has no alpha; make it again", "a checkerboard is painted"],
            id="checkerboard",
        ),
        pytest.param(
            checkerboard(60, 80),
            "bad",
            ["it has no alpha; make it again", "a checkerboard is painted"],
            id="dark checkerboard",
        ),
        pytest.param(CUT_DISC * 0, "bad", ["next to nothing of it is visible"], id="empty"),
        pytest.param(
            covered(CUT_DISC, 20, CORNER),
            "look",
            ["only 3 of the four corners", "a haze covers 0.39% of it"],
            id="haze in a corner",
        ),
        pytest.param(
            covered(CUT_DISC, 60, np.s_[4:6, 4:6]), "look", ["a haze covers 0.04%"], id="a speck"
        ),
        pytest.param(covered(CUT_DISC, 255, LEFT), "look", ["cut by the left"], id="cut"),
        pytest.param(cut_disc(), "bad", ["levels more of #00ff00"], id="a rim of the key"),
    ],
)
def test_inspect_judges_a_picture_that_should_be_transparent(
    pixels: U8, verdict: str, sentences: list[str], tmp_path: Path
) -> None:
    record, outcome = inspected(tmp_path, pixels)
    assert record["verdict"] == verdict
    assert outcome.exit_code == (verdict == "bad")
    assert len(record["warnings"]) == len(sentences)
    for said, sentence in zip(record["warnings"], sentences, strict=True):
        assert sentence in said


def test_inspect_says_all_in_json(tmp_path: Path) -> None:
    record, outcome = inspected(tmp_path, CUT_DISC)
    assert outcome.stderr == ""
    assert list(record) == first_cells("references/cli.md", "remove_chroma_key.py", 3)
    assert record == {
        "input": str(tmp_path / "in.png"),
        "width": 96,
        "height": 96,
        "alpha": True,
        "transparent": pytest.approx(0.59, abs=0.02),
        "partial": pytest.approx(0.03, abs=0.02),
        "opaque": pytest.approx(0.38, abs=0.02),
        "corners_transparent": 4,
        "haze": 0.0,
        "key_left": None,
        "touches_border": [],
        "verdict": "good",
        "warnings": [],
    }


def test_inspect_takes_many_pictures_and_ends_with_the_worst(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "a.png", CUT_DISC), save(tmp_path / "b.png", grey_disc())
    Path("c.png").write_bytes(b"")
    outcome = run("--inspect", tmp_path / "[ab].png", "c.png")
    assert outcome.exit_code == 1
    assert outcome.stdout.splitlines() == [f"Inspected {good}: good", f"Inspected {bad}: bad"]
    assert [line.split(": ")[1] for line in outcome.errors] == [str(bad), "c.png"]
    assert run("--inspect", good, good).exit_code == 0


def test_inspect_keeps_a_subject_in_a_key_s_hue_apart_from_a_rim(tmp_path: Path) -> None:
    record, _ = inspected(tmp_path, cut_of(frog(), *UNMIX))
    assert (record["verdict"], record["key_left"]) == ("good", None)


# ── Preview ──────────────────────────────────────────────────────────────────────────────────────

TILE, STEP = remove_chroma_key.TILE, remove_chroma_key.TILE + remove_chroma_key.GAP


def preview_tiles(folder: Path, pixels: U8, *flags: str, suffix: str = "png") -> list[list[U8]]:
    """The tiles of a preview, by row and column."""
    source, preview = save(folder / "in.png", pixels), folder / f"preview.{suffix}"
    paths: list[str | Path] = ["--input", source, "--out", folder / "o.png", "--preview", preview]
    outcome = run(*paths, *flags, "--force")
    assert outcome.exit_code == 0
    assert outcome.stdout.splitlines()[-1] == f"Wrote {preview}"
    sheet = load(preview)[remove_chroma_key.GAP :, remove_chroma_key.GAP :, :3]
    return [
        [sheet[y * STEP : y * STEP + TILE, x * STEP : x * STEP + TILE] for x in range(4)]
        for y in range(2)
    ]


def test_a_preview_shows_the_cut_out_on_four_grounds(tmp_path: Path) -> None:
    whole, _ = preview_tiles(tmp_path, grey_disc(), *UNMIX)
    middle = TILE // 2
    assert all(tile[middle, middle].tolist() == [120, 110, 100] for tile in whole)
    black, white, checkerboard, uneven = (tile[:60, :60].reshape(-1, 3) for tile in whole)
    assert [np.unique(tile).tolist() for tile in (black, white)] == [[0], [255]]
    assert len(np.unique(checkerboard, axis=0)) == 2
    assert len(np.unique(uneven, axis=0)) > 100


def test_a_preview_enlarges_the_edge_where_key_colour_shows(tmp_path: Path) -> None:
    pixels = np.full((400, 400, 3), GREEN, np.uint8)
    pixels[40:360, 40:360] = (110, 110, 110)
    pixels[320:330, 356:361] = (60, 190, 60)
    _, (_, white, _, _) = preview_tiles(tmp_path, pixels, "--tolerance", "20")
    colours = {tuple(colour) for colour in white.reshape(-1, 3).tolist()}
    assert colours == {(255, 255, 255), (110, 110, 110), (60, 190, 60)}
    spill = (white == (60, 190, 60)).all(axis=-1).sum()
    assert spill == 50 * remove_chroma_key.ZOOM**2


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "jpeg"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1900), (30, 40)], ids=str)
def test_a_preview_is_made_of_any_size_and_in_any_format(
    shape: tuple[int, int], suffix: str, tmp_path: Path
) -> None:
    pixels = np.full((*shape, 3), (90, 20, 20), np.uint8)
    whole, detail = preview_tiles(tmp_path, pixels, suffix=suffix)
    assert {tile.shape for tile in whole + detail} == {(TILE, TILE, 3)}


def test_json_names_the_preview(picture: Path, tmp_path: Path) -> None:
    preview = tmp_path / "p.png"
    outcome = run("--input", picture, "--out", tmp_path / "o.png", "--preview", preview, "--json")
    assert outcome.json_lines[0]["preview"] == str(preview)


# ── Refused before anything is done ──────────────────────────────────────────────────────────────

REFUSED = [
    pytest.param(["--tolerance", "256"], "'256' is not a whole number from 0 to 255", id="high"),
    pytest.param(["--tolerance", "-1"], "not a whole number", id="negative"),
    pytest.param(["--tolerance", "1.5"], "not a whole number", id="fraction"),
    pytest.param(["--transparent-threshold", "nan"], "not a number from 0 to 255", id="nan"),
    pytest.param(["--opaque-threshold", "1e9"], "not a number from 0 to 255", id="huge"),
    pytest.param(["--edge-contract", "17"], "whole number from 0 to 16", id="contract"),
    pytest.param(["--edge-feather", "65"], "number from 0 to 64", id="feather"),
    pytest.param(["--key-color", "#0f0"], "give #rrggbb", id="short colour"),
    pytest.param(["--key-color", "green"], "give #rrggbb", id="colour name"),
    pytest.param(["--auto-key", "middle"], "choose from", id="auto key"),
    pytest.param(["--subject", "opaque"], "needs --unmix", id="subject alone"),
    pytest.param(["--enclosed", "keep"], "needs --unmix", id="enclosed alone"),
    pytest.param(["--unmi"], "unrecognized arguments", id="no abbreviations"),
    pytest.param(["--unmix", "--tolerance", "12"], "--tolerance shapes the matte", id="unmix, t"),
    pytest.param(
        ["--unmix", "--soft-matte", "--despill", "--opaque-threshold", "96"],
        "--soft-matte, --opaque-threshold, --despill shapes",
        id="unmix with three matte flags",
    ),
    pytest.param(
        ["--soft-matte", "--transparent-threshold", "96"],
        "--transparent-threshold 96 is not below --opaque-threshold 96",
        id="thresholds crossed",
    ),
]


@pytest.mark.parametrize(("flags", "reason"), REFUSED)
def test_options_that_make_no_sense_are_refused_with_a_reason(
    flags: list[str], reason: str, picture: Path, tmp_path: Path
) -> None:
    outcome = run("--input", picture, "--out", tmp_path / "o.png", *flags)
    assert outcome.exit_code == 2
    assert len(outcome.errors) == 1
    assert reason in outcome.errors[0]
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--transparent-threshold", "96"], id="thresholds without --soft-matte"),
        pytest.param(["--key-color", "00FF00"], id="colour without #"),
        pytest.param(["--edge-contract", "16", "--edge-feather", "64"], id="limits"),
        pytest.param([*UNMIX, "--edge-contract", "1", "--edge-feather", "0.5"], id="unmix, edge"),
        pytest.param(["--unmix", "--key-color", "#00ff00"], id="unmix, named key"),
    ],
)
def test_options_that_go_together_are_accepted(
    flags: list[str], picture: Path, tmp_path: Path
) -> None:
    assert run("--input", picture, "--out", tmp_path / "o.png", *flags).exit_code == 0


Refusal = tuple[list[str], str]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        pytest.param(["--out", "o.png"], "required: --input", id="no input"),
        pytest.param(["--input", "disc.png"], "give either --out", id="no output"),
        pytest.param(
            ["--input", "disc.png", "--out", "o.png", "--out-dir", "d"], "give either", id="both"
        ),
        pytest.param(
            ["--input", "disc.png", "disc.png", "--out", "o.png"], "received 2", id="two, one out"
        ),
        pytest.param(["--input", "none.png", "--out", "o.png"], "does not exist", id="missing"),
        pytest.param(["--input", ".", "--out", "o.png"], "is a directory", id="directory"),
        pytest.param(["--input", "/dev/null", "--out", "o.png"], "no regular file", id="device"),
        pytest.param(
            ["--inspect", "disc.png", "--out", "o.png", "--unmix", "--auto-key", "border"],
            "takes no key; leave out --out, --unmix, --auto-key",
            id="inspect and make",
        ),
        pytest.param(["--inspect", "none.png"], "does not exist", id="inspect, missing"),
        pytest.param(["--input", "disc.png", "--out", "o.jpg"], "only .png and .webp", id="jpg"),
        pytest.param(["--input", "disc.png", "--out", "o"], "only .png and .webp", id="no suffix"),
        pytest.param(["--input", "disc.png", "--out", "old.png"], "--force", id="existing"),
        pytest.param(
            ["--input", "disc.png", "--out", "disc.png", "--force"], "is the input", id="onto input"
        ),
        pytest.param(
            ["--input", "disc.png", "--out-dir", ".", "--force"], "is the input", id="dir of input"
        ),
        pytest.param(
            ["--input", "disc.png", "--out", "old.png/o.png"], "no directory", id="file as folder"
        ),
        pytest.param(
            ["--input", "disc.png", "a/disc.jpg", "--out-dir", "d"], "would both become", id="same"
        ),
        pytest.param(
            ["--input", "disc.png", "b.png", "--out-dir", "d", "--preview", "p.png"],
            "--preview takes one input, received 2",
            id="previews",
        ),
        *(
            pytest.param(
                ["--input", "disc.png", "--out", "o.png", "--preview", name], reason, id=name
            )
            for name, reason in {
                "p.gif": ".png, .webp, .jpg and .jpeg are accepted",
                "o.png": "is the input or the cut-out",
                "./disc.png": "is the input or the cut-out",
                "old.png": "old.png exists",
                "old.png/p.png": "no directory",
            }.items()
        ),
    ],
)
def test_files_that_cannot_work_are_refused_before_any_work(
    argv: list[str], reason: str, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    before = picture.read_bytes()
    Path("old.png").write_bytes(b"old")
    outcome = run(*argv)
    assert outcome.exit_code == 2
    assert any(reason in error for error in outcome.errors), outcome.errors
    assert outcome.stdout == ""
    assert picture.read_bytes() == before
    assert Path("old.png").read_bytes() == b"old"
    assert not Path("d").exists()


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    outcome = run("--input", tmp_path / "none.png", "--out", tmp_path / "o.jpg")
    assert len(outcome.errors) == 2


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    outcome = run("--input", picture, "--out", tmp_path / "o.png")
    assert outcome.exit_code == 2
    assert outcome.errors == [
        f"Error: numpy is not installed; run: {sys.executable} -m pip install pillow numpy"
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        pytest.param("__version__ = '1.24.4'", "numpy is 1.24.4, and 1.26 or newer is", id="old"),
        pytest.param("raise ImportError('no libblas')", "numpy cannot be loaded (no lib", id="bad"),
    ],
)
def test_a_package_that_cannot_do_the_work_is_refused(code: str, said: str, picture: Path) -> None:
    Path("numpy.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--input", str(picture), "--out", "o.png"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 2
    assert f"Error: {said}" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_oldest_versions_are_those_that_the_script_declares() -> None:
    block = re.search(r"^# dependencies = (\[.*\])$", SCRIPT.read_text(), re.MULTILINE)
    assert block
    declared = dict(word.split(">=") for word in json.loads(block[1]))
    numbers = remove_chroma_key.numbers_of
    for package, least in remove_chroma_key.PACKAGES.values():
        assert numbers(f"{declared[package]}.0") == numbers(least)


@pytest.mark.parametrize(
    ("argv", "exit_code", "said"),
    [
        pytest.param(["--help"], 0, "--out-dir", id="help"),
        pytest.param(["--version"], 0, "remove_chroma_key.py ", id="version"),
        pytest.param(["--input", "none.png", "--out", "o.jpg"], 2, "only .png", id="refusal"),
        pytest.param(["--input", "disc.png", "--out", "o.png"], 2, "numpy is not ins", id="work"),
    ],
)
def test_nothing_but_the_work_itself_needs_numpy_and_pillow(
    argv: list[str], exit_code: int, said: str, picture: Path
) -> None:
    folder = picture.parent
    for name in ("numpy", "PIL"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == exit_code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_that_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        remove_chroma_key.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"remove_chroma_key.py {remove_chroma_key.__version__}\n"


# ── Damaged and odd inputs ───────────────────────────────────────────────────────────────────────


def damaged_png(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bomb(_data: bytes) -> bytes:
    """A PNG that claims 30,000 x 30,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(damaged_png, "make it again", id="truncated"),
        pytest.param(lambda _: b"", "no picture", id="empty"),
        pytest.param(lambda _: b"not a picture at all", "no picture", id="text"),
        pytest.param(lambda data: data[:8], "", id="signature only"),
        pytest.param(lambda data: data[:40] + os.urandom(60), "", id="garbage after the header"),
        pytest.param(bomb, "pixels; scale the picture down", id="decompression bomb"),
    ],
)
def test_a_damaged_input_is_one_error_line(
    spoil: Callable[[bytes], bytes], reason: str, picture: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(spoil(picture.read_bytes()))
    outcome = run("--input", bad, "--out", tmp_path / "o.png")
    assert outcome.exit_code == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith(f"Error: {bad}: ")
    assert reason in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "disc.png"]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_refused_with_a_sentence(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"in.{suffix}", save_all=True, append_images=frames[1:])
    outcome = run("--input", tmp_path / f"in.{suffix}", "--out", tmp_path / "o.png")
    assert outcome.exit_code == 1
    assert "3 frames; only still pictures are accepted" in outcome.stderr


def test_orientation_of_the_camera_is_applied(tmp_path: Path) -> None:
    pixels = np.full((6, 10, 3), GREEN, np.uint8)
    pixels[0, 0] = (200, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "in.png", exif=exif)
    run("--input", tmp_path / "in.png", "--out", tmp_path / "o.png")
    cut = load(tmp_path / "o.png")
    assert cut.shape == (10, 6, 4)
    assert cut[0, 5].tolist() == [200, 0, 0, 255]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_rgb_profile_is_kept(suffix: str, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(grey_disc()).save(tmp_path / "in.png", icc_profile=profile)
    run("--input", tmp_path / "in.png", "--out", tmp_path / f"o.{suffix}", *UNMIX)
    with Image.open(tmp_path / f"o.{suffix}") as cut:
        assert cut.info.get("icc_profile") == profile


def test_a_profile_of_another_colour_space_does_not_reach_an_rgb_picture(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(grey_disc()).convert("CMYK").save(tmp_path / "in.jpg", icc_profile=lab)
    outcome = run("--input", tmp_path / "in.jpg", "--out", tmp_path / "o.png", *UNMIX)
    assert outcome.exit_code == 0
    with Image.open(tmp_path / "o.png") as cut:
        assert "icc_profile" not in cut.info


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "in.png")
    run("--input", tmp_path / "in.png", "--out", tmp_path / "o.png")
    assert load(tmp_path / "o.png")[0, :, 0].tolist() == [0, 100, 255]


def test_webp_keeps_every_colour_under_partial_alpha(picture: Path, tmp_path: Path) -> None:
    for suffix in ("png", "webp"):
        run("--input", picture, "--out", tmp_path / f"o.{suffix}", *UNMIX)
    assert (load(tmp_path / "o.png") == load(tmp_path / "o.webp")).all()


def test_feathered_unmixing_does_not_bleed_black(tmp_path: Path) -> None:
    source = save(tmp_path / "in.png", disc((250, 240, 230)).composite(GREEN))
    run("--input", source, "--out", tmp_path / "o.png", *UNMIX, "--edge-feather", "3")
    cut = load(tmp_path / "o.png")
    visible = cut[..., 3] > 16
    assert cut[..., :3][visible].min() > 200


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────


def test_force_replaces_an_existing_output(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.png"
    target.write_bytes(b"old")
    assert run("--input", picture, "--out", target, "--force").exit_code == 0
    assert load(target).shape == (96, 96, 4)


def test_missing_folders_are_made(picture: Path, tmp_path: Path) -> None:
    assert run("--input", picture, "--out", tmp_path / "a" / "b" / "o.png").exit_code == 0
    assert (tmp_path / "a" / "b" / "o.png").exists()


def without_links(_source: object, _target: object) -> None:
    raise OSError(1, "no hard links here")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    *, links: bool, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "o.png"
    encode = remove_chroma_key.encode

    def race(*arguments: object) -> bytes:
        target.write_bytes(b"someone else's")
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(remove_chroma_key, "encode", race)
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    outcome = run("--input", picture, "--out", target)
    assert outcome.exit_code == 1
    assert "appeared meanwhile" in outcome.stderr
    assert target.read_bytes() == b"someone else's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disc.png", "o.png"]


def test_file_systems_without_hard_links_are_written_to(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", without_links)
    assert run("--input", picture, "--out", tmp_path / "o.png").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disc.png", "o.png"]
    assert load(tmp_path / "o.png").shape == (96, 96, 4)


def test_a_name_that_no_file_can_have_is_an_error_line(picture: Path, tmp_path: Path) -> None:
    target = tmp_path / f"{'x' * 300}.png"
    outcome = run("--input", picture, "--out", target)
    assert outcome.exit_code == 1
    assert outcome.errors[0].startswith(f"Error: {picture}: {target} cannot be written: ")
    outcome = run("--input", target, "--out", tmp_path / "o.png")
    assert outcome.exit_code == 2
    assert "does not exist" in outcome.errors[0]


# ── Several inputs ───────────────────────────────────────────────────────────────────────────────


def batch(folder: Path, *names: str) -> list[Path]:
    return [save(folder / name, grey_disc()) for name in names]


def test_several_inputs_become_files_of_the_same_stem(tmp_path: Path) -> None:
    sources = batch(tmp_path, "a.png", "b.bmp", "c.tif")
    outcome = run("--input", *sources, "--out-dir", tmp_path / "cut", *UNMIX)
    assert outcome.exit_code == 0
    assert [line for line in outcome.stdout.splitlines() if line.startswith("Wrote")] == [
        f"Wrote {tmp_path / 'cut' / name}" for name in ("a.png", "b.png", "c.png")
    ]
    assert all(
        (load(path) == load(tmp_path / "cut" / "a.png")).all()
        for path in (tmp_path / "cut").iterdir()
    )


@pytest.mark.parametrize("bad", ["empty", "missing", "directory"])
def test_one_bad_file_does_not_stop_the_others(bad: str, tmp_path: Path) -> None:
    first, last = batch(tmp_path, "a.png", "z.png")
    middle = tmp_path / "m.png"
    if bad == "empty":
        middle.write_bytes(b"")
    elif bad == "directory":
        middle.mkdir()
    outcome = run("--input", first, middle, last, "--out-dir", tmp_path / "cut", "--json", *UNMIX)
    assert outcome.exit_code == 1
    assert [line["output"] is None for line in outcome.json_lines] == [False, True, False]
    assert outcome.json_lines[1]["error"]
    assert len(outcome.errors) == 1
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["a.png", "z.png"]


def test_an_existing_target_stops_a_batch_before_any_work(tmp_path: Path) -> None:
    sources = batch(tmp_path, "a.png", "b.png")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "b.png").write_bytes(b"old")
    outcome = run("--input", *sources, "--out-dir", tmp_path / "cut")
    assert outcome.exit_code == 2
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["b.png"]


def test_a_batch_runs_as_processes_of_a_real_run(tmp_path: Path) -> None:
    sources = batch(tmp_path, "a.png", "b.png", "c.png")
    done = in_process("--input", *sources, "--out-dir", tmp_path / "cut", *UNMIX, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [Path(json.loads(line)["output"]).name for line in done.stdout.splitlines()] == [
        "a.png",
        "b.png",
        "c.png",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_no_text_is_printed_with_escapes(tmp_path: Path) -> None:
    source = save(tmp_path / os.fsdecode(b"a\xff.png"), grey_disc())
    done = in_process("--input", source, "--out", tmp_path / "o.png")
    assert done.returncode == 0
    done = in_process("--input", source, "--out-dir", tmp_path / "cut")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Wrote {tmp_path / 'cut'}/a\\udcff.png")
