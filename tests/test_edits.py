"""Edits that keep what must stay: masks, kept pictures, and sizes that match the input."""

from __future__ import annotations

import io
import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from images_api import image_bytes, redrawn
from inputs import encoded, picture
from PIL import ExifTags, Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from queue_api import queued

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from cli import Run
    from images_api import ImagesAPI
    from inputs import Job, Json

    Pixels = npt.NDArray[np.uint8]

SIZE = (96, 64)
BOX = (24, 16, 72, 48)  # what is edited: a quarter of the picture
SEAM = image_gen.SEAM_PIXELS + 1
FREE = ("--model", "gpt-image-2")


def photograph(size: tuple[int, int] = SIZE, mode: str = "RGB") -> Image.Image:
    """A picture of many colours."""
    wave = Image.radial_gradient("L").resize(size)
    ramp = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (wave, ramp, ImageOps.invert(wave))).convert(mode)


def mask(size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = BOX) -> Image.Image:
    """A mask whose box is transparent."""
    alpha = Image.new("L", size, 255)
    alpha.paste(0, box)
    picture = Image.new("RGBA", size)
    picture.putalpha(alpha)
    return picture


def edit(*flags: object, image: str = "room.png", out: str = "night.png") -> list[str]:
    """The command line of an edit with a mask."""
    argv = ["edit", "--image", image, "--mask", "mask.png", "--prompt", "night", "--out", out]
    return [*argv, *map(str, flags)]


def pixels(source: str | Image.Image, mode: str = "RGBA") -> Pixels:
    """The pixels of a picture, upright."""
    if isinstance(source, str):
        with Image.open(source) as opened:
            return pixels(opened, mode)
    return np.asarray(ImageOps.exif_transpose(source).convert(mode))


@pytest.fixture
def room() -> Image.Image:
    image = photograph()
    image.save("room.png")
    mask().save("mask.png")
    return image


# Masks


@pytest.mark.usefixtures("room")
def test_the_share_that_is_edited_is_told_and_recorded(run: Run, api: ImagesAPI) -> None:
    result = run(*edit("--json"))
    assert "masks: 25% of the image will be edited" in result.stderr.splitlines()
    assert result.json["mask_share"] == 0.25
    assert api.requests[0].files[1].data == Path("mask.png").read_bytes()
    assert run(*live.generate("--json")).json["mask_share"] is None


@pytest.mark.usefixtures("room")
def test_a_batch_tells_the_span_of_its_masks(run: Run) -> None:
    mask(box=(0, 0, 96, 1)).save("thin.png")
    one: Json = {"prompt": "a", "image": "room.png"}
    jobs: list[Job] = [one | {"mask": name, "out": name} for name in ("mask.png", "thin.png")]
    said = dry.batch(run, *jobs).stderr.splitlines()
    assert "masks: 2% to 25% of the image will be edited, in 2 jobs" in said


@pytest.mark.parametrize(
    ("colour", "says"),
    [
        ((0, 0, 0, 255), "nothing would be edited, it is opaque everywhere"),
        ((255, 255, 255, 255), "nothing would be edited, it is opaque everywhere"),
    ],
)
@pytest.mark.usefixtures("room")
def test_an_opaque_mask_is_refused(run: Run, colour: tuple[int, ...], says: str) -> None:
    Image.new("RGBA", SIZE, colour).save("mask.png")
    assert says in dry.problem(run(*edit("--dry-run")))


@pytest.mark.parametrize(
    ("alpha", "says"),
    [
        (0, "protects nothing: all of the image will be edited"),
        (100, "protects nothing: all of the image will be edited"),
        (128, "nowhere more than half transparent: little may be edited"),
        (254, "nowhere more than half transparent: little may be edited"),
    ],
)
@pytest.mark.usefixtures("room")
def test_a_mask_that_edits_all_or_little_is_a_warning(run: Run, alpha: int, says: str) -> None:
    Image.new("RGBA", SIZE, (0, 0, 0, alpha)).save("mask.png")
    assert any(says in warning for warning in dry.warnings(run(*edit("--dry-run"))))


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "I;16", "RGBA"])
@pytest.mark.parametrize(("ground", "shape"), [("black", "white"), ("white", "black")])
@pytest.mark.usefixtures("room")
def test_a_black_and_white_mask_is_refused_with_the_flag_that_fits(
    run: Run, api: ImagesAPI, mode: str, ground: str, shape: str
) -> None:
    drawn = Image.new("L", SIZE, ground)
    drawn.paste(255 if shape == "white" else 0, BOX)
    if mode == "I;16":
        drawn = drawn.convert("I").point(lambda value: value * 257).convert("I;16")
    (drawn if mode == "I;16" else drawn.convert(mode)).save("mask.png")
    problem = dry.problem(run(*edit()))
    edits = f"--mask-edits {shape} edits 25% of the image, --mask-edits {ground} 75%"
    assert f"it is black and white: {edits}" in problem
    assert api.requests == []
    result = run(*edit("--mask-edits", shape, "--json"))
    assert (result.exit_code, result.json["mask_share"]) == (0, 0.25), result.stderr
    sent = api.requests[0].files[1]
    assert (sent.field, sent.content_type, sent.filename) == ("mask", "image/png", "mask.png")
    with Image.open(io.BytesIO(sent.data)) as alpha:
        assert (alpha.format, alpha.size) == ("PNG", SIZE)
        wanted = mask().getchannel("A")
        assert ImageChops.difference(alpha.getchannel("A"), wanted).getbbox() is None
    assert "mask_edits" not in api.requests[0].body


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.usefixtures("room")
def test_a_mask_of_any_format_is_sent_as_png_without_a_warning(
    run: Run, api: ImagesAPI, suffix: str
) -> None:
    drawn = Image.new("RGB", SIZE)
    drawn.paste("white", BOX)
    drawn.save(f"white.{suffix}")
    argv = ["edit", "--image", "room.png", "--mask", f"white.{suffix}", "--prompt", "x"]
    result = run(*argv, "--mask-edits", "white", "--out", "n.png", "--size", "match")
    assert (result.exit_code, "Warning" in result.stderr) == (0, False), result.stderr
    assert api.requests[0].files[1].data.startswith(b"\x89PNG")


@pytest.mark.parametrize(("part", "colour"), [("white", "white"), ("black", "black")])
@pytest.mark.usefixtures("room")
def test_what_is_transparent_in_a_drawn_mask_is_not_edited(
    run: Run, api: ImagesAPI, part: str, colour: str
) -> None:
    drawn = Image.new("RGBA", SIZE)
    drawn.paste(colour, BOX)
    drawn.save("mask.png")
    assert run(*edit("--mask-edits", part)).exit_code == 0
    with Image.open(io.BytesIO(api.requests[0].files[1].data)) as alpha:
        assert (
            ImageChops.difference(alpha.getchannel("A"), mask().getchannel("A")).getbbox() is None
        )


@pytest.mark.usefixtures("room")
def test_a_mask_without_its_part_is_refused(run: Run) -> None:
    Image.new("L", SIZE).save("mask.png")
    problem = dry.problem(run(*edit("--mask-edits", "white", "--dry-run")))
    wanted = "mask mask.png: nothing would be edited, it is nowhere more than half white"
    assert problem == wanted


@pytest.mark.usefixtures("room")
def test_a_photograph_as_a_mask_is_told_what_a_mask_is(run: Run) -> None:
    photograph().save("mask.png")
    problem = dry.problem(run(*edit("--dry-run")))
    assert "has no alpha channel, and what is transparent in it is edited; " in problem
    assert "--mask-edits white or black" in problem


@pytest.mark.usefixtures("room")
def test_a_mask_of_another_size_is_refused_with_both_sizes(run: Run) -> None:
    mask((64, 64)).save("mask.png")
    assert "64x64, the first image 96x64" in dry.problem(run(*edit("--dry-run")))


@pytest.mark.parametrize("value", ["grey", "", "White"])
@pytest.mark.usefixtures("room")
def test_mask_edits_takes_three_words(run: Run, value: str) -> None:
    problem = dry.problem(run(*edit("--mask-edits", value, "--dry-run")))
    assert "accepted are transparent, white, black" in problem


@pytest.mark.usefixtures("room")
def test_without_pillow_the_dry_run_is_the_same_and_says_that_nothing_was_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = edit("--dry-run", "--keep-unmasked", "--size", "match")
    with_pillow = run(*argv)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    without = run(*argv)
    assert with_pillow.stdout == without.stdout
    assert without.exit_code == 0
    assert "Warning: mask mask.png is not measured: the package pillow is missing" in without.stderr


def test_a_mask_that_pillow_cannot_read_is_not_measured(run: Run, room: Image.Image) -> None:
    data = encoded(mask())
    room.save("room.png")
    Path("mask.png").write_bytes(data[:60] + bytes(40) + data[100:])
    result = run(*edit("--dry-run"))
    assert "mask mask.png is not measured: " in result.stderr, result.stderr


@pytest.mark.usefixtures("room")
def test_another_meaning_of_a_mask_makes_another_image(run: Run, api: ImagesAPI) -> None:
    drawn = Image.new("L", SIZE)
    drawn.paste(255, BOX)
    drawn.save("mask.png")
    job: Json = {"prompt": "a", "image": "room.png", "mask": "mask.png", "out": "a.png"}
    assert run(*live.batch([job | {"mask_edits": "white"}])).exit_code == 0
    other = run(*live.batch([job | {"mask_edits": "black"}], "--skip-existing"))
    assert (other.exit_code, len(api.requests)) == (4, 1)
    assert "was made from another mask_edits" in other.stderr
    same = run(*live.batch([job | {"mask_edits": "white"}], "--skip-existing"))
    assert (same.exit_code, len(api.requests)) == (0, 1)


# What is kept

INPUTS: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded(photograph()),
    "jpeg": lambda: encoded(photograph(), "jpeg"),
    "webp": lambda: encoded(photograph(), "webp"),
    "alpha": lambda: encoded(with_alpha(photograph())),
    "grey": lambda: encoded(photograph(mode="L")),
    "grey and alpha": lambda: encoded(with_alpha(photograph()).convert("LA")),
    "palette": lambda: encoded(photograph().quantize(17)),
    "palette and alpha": lambda: encoded(photograph().quantize(17), transparency=3),
    "colour key": lambda: encoded(photograph(), transparency=photograph().getpixel((0, 0))),
    "black and white": lambda: encoded(photograph(mode="1")),
    "profile": lambda: encoded(photograph(), icc_profile=b"a profile"),
}


def with_alpha(image: Image.Image) -> Image.Image:
    """The same with colours that nobody sees, and some half seen."""
    copy = image.copy()
    copy.putalpha(
        Image.linear_gradient("L").resize(image.size).point(lambda v: max(0, 2 * v - 255))
    )
    return copy


def check_kept(kept: str, source: Pixels, answer: str, alpha: Image.Image) -> None:
    """Protected pixels are those of the input, those far inside of the answer, others between."""
    height, width = source.shape[:2]
    with Image.open(answer) as opened, Image.open(kept) as file:
        mode = file.mode
        assert (file.format, file.size) == ("PNG", (width, height))
        scaled = np.asarray(opened.convert(mode).resize((width, height), Image.Resampling.LANCZOS))
        found = np.asarray(file)
    before = np.asarray(Image.fromarray(source).convert(mode))
    edited = np.asarray(alpha) < 128
    assert (found[~edited] == before[~edited]).all()
    core = Image.fromarray(edited).convert("L").filter(ImageFilter.MinFilter(2 * SEAM - 1))
    far = np.asarray(core) > 0
    assert (found[far] == scaled[far]).all()
    low, high = np.minimum(before, scaled), np.maximum(before, scaled)
    assert ((low <= found) & (found <= high)).all()


@pytest.mark.parametrize("kind", INPUTS)
def test_every_protected_pixel_is_that_of_the_input(
    run_process: Run, api: ImagesAPI, kind: str
) -> None:
    suffix = kind if kind in {"jpeg", "webp"} else "png"
    Path(f"room.{suffix}").write_bytes(INPUTS[kind]())
    mask().save("mask.png")
    api.script(redrawn(size=(48, 32)))
    result = run_process(*edit("--keep-unmasked", "--json", image=f"room.{suffix}"))
    assert result.exit_code == 0, result.stderr
    (kept,) = result.json["outputs_kept"]
    assert (kept["path"], kept["width"], kept["height"]) == ("night-kept.png", *SIZE)
    assert Path("night.png").exists()
    check_kept("night-kept.png", pixels(f"room.{suffix}"), "night.png", mask().getchannel("A"))
    with Image.open("night-kept.png") as image:
        assert image.info.get("icc_profile") == (b"a profile" if kind == "profile" else None)
        assert image.mode == ("RGBA" if "alpha" in kind or "key" in kind else "RGB")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn", ["as stored", "as seen"])
def test_a_photograph_is_kept_upright_however_its_mask_was_drawn(
    run: Run, run_process: Run, api: ImagesAPI, orientation: int, drawn: str
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Path("room.jpg").write_bytes(encoded(photograph(), "jpeg", exif=exif))
    upright = pixels("room.jpg")
    size = upright.shape[1], upright.shape[0]
    turned = orientation > 4
    if drawn == "as stored" and turned:
        stored = mask(box=(0, 0, 40, 20))
        stored.save("mask.png")
        stored.getexif()[ExifTags.Base.Orientation] = orientation
        alpha = ImageOps.exif_transpose(stored).getchannel("A")
    else:
        seen = mask(size, (0, 0, 40, 20))
        seen.save("mask.png")
        alpha = seen.getchannel("A")
    api.script(redrawn(size=(size[0] // 2, size[1] // 2)))
    call = run_process if orientation in {3, 6} else run
    result = call(*edit("--keep-unmasked", image="room.jpg"))
    assert result.exit_code == 0, result.stderr
    check_kept("night-kept.png", upright, "night.png", alpha)


def test_a_run_as_a_process_with_a_copy_keeps_too(run_process: Run, api: ImagesAPI) -> None:
    photograph((1200, 800)).save("room.jpg")
    mask((1200, 800), (300, 200, 900, 600)).save("mask.png")
    argv = edit("--keep-unmasked", "--size", "match", "--downscale-max-dim", 300, image="room.jpg")
    result = run_process(*argv, "--json")
    assert result.exit_code == 0, result.stderr
    assert api.requests[0].body["size"] == "1200x800"
    copies = [copy["path"] for copy in result.json["outputs_downscaled"]]
    assert copies == ["night-web.png", "night-kept-web.png"]
    assert live.size_of("night-kept-web.png") == (300, 200)
    check_kept(
        "night-kept.png", pixels("room.jpg"), "night.png", Image.open("mask.png").getchannel("A")
    )


MASKS = some.lists(
    some.tuples(
        some.integers(0, 60), some.integers(0, 60), some.integers(0, 40), some.integers(0, 40)
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    size=some.tuples(some.integers(1, 90), some.integers(1, 90)),
    boxes=MASKS,
    levels=some.lists(some.integers(0, 255), min_size=4, max_size=4),
    scale=some.sampled_from([1, 2, 3]),
    alphas=some.tuples(some.booleans(), some.booleans()),
)
def test_protected_pixels_stay_and_edited_ones_are_those_of_the_answer(
    size: tuple[int, int],
    boxes: list[tuple[int, ...]],
    levels: list[int],
    scale: int,
    alphas: tuple[bool, bool],
) -> None:
    source, answer = photograph(size), photograph((size[0] * scale, size[1] * scale)).rotate(180)
    source, answer = (
        with_alpha(image) if has_alpha else image
        for image, has_alpha in zip((source, answer), alphas, strict=True)
    )
    alpha = Image.new("L", size, 255)
    for (left, top, wide, high), level in zip(boxes, levels, strict=False):
        alpha.paste(level, (left, top, left + wide, top + high))
    layer = Image.new("RGBA", size)
    layer.putalpha(alpha)
    source.save("source.png")
    layer.save("layer.png")
    answer.save("answer.png")
    request = image_gen.ImageRequest("x", image=("source.png",), mask="layer.png")
    original = image_gen.saved_file("answer.png")
    assert original
    Path("kept.png").write_bytes(image_gen.keep_unmasked(original, request))
    check_kept("kept.png", pixels(source), "answer.png", alpha)


def test_a_hole_that_is_erased_in_the_picture_itself_has_no_ring(run: Run, api: ImagesAPI) -> None:
    """The same file as image and mask: where it is transparent, there is nothing to blend with."""
    hole = Image.new("RGBA", (64, 64), "white")
    hole.paste((0, 0, 0, 0), (16, 16, 48, 48))
    hole.save("room.png")
    white = Image.new("RGB", (64, 64), "white")
    api.script(image_bytes(lambda _: encoded(white)))
    argv = ["edit", "--image", "room.png", "--mask", "room.png", "--prompt", "x", "--out", "n.png"]
    assert run(*argv, "--keep-unmasked").exit_code == 0
    assert (pixels("n-kept.png") == 255).all()


@pytest.mark.usefixtures("room")
def test_an_answer_of_another_aspect_is_kept_as_it_came_and_the_job_says_so(
    run: Run, api: ImagesAPI
) -> None:
    result = run(*edit("--keep-unmasked", "--json"))
    assert (result.exit_code, result.json["error"]["kind"]) == (4, "keep")
    assert "the answer is 64x64, the input 96x64" in result.json["error"]["message"]
    assert Path("night.png").exists()
    assert not Path("night-kept.png").exists()
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--size", "1024x1024"), "size 1024x1024 has another aspect than room.png (96x64)"),
        (("--size", "1536x1008"), "--size match asks for 1008x672"),
    ],
)
@pytest.mark.usefixtures("room")
def test_a_size_that_does_not_fit_is_refused_beforehand(
    run: Run, flags: tuple[str, ...], says: str
) -> None:
    assert says in dry.problem(run(*edit("--keep-unmasked", "--dry-run", *flags)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: encoded(photograph().convert("CMYK"), "jpeg"), "is CMYK"),
        (lambda: encoded(Image.new("I;16", SIZE)), "is of more than 8 bits a channel"),
    ],
)
def test_what_cannot_be_kept_is_refused_beforehand(
    run: Run, data: Callable[[], bytes], says: str
) -> None:
    Path("room.png").write_bytes(data())
    mask().save("mask.png")
    result = run(*edit("--keep-unmasked", "--dry-run"))
    problem = dry.problem(result)
    assert problem.startswith("keep_unmasked: room.png ")
    assert says in problem
    warned = dry.warnings(run(*edit("--dry-run")))
    assert any(f"image room.png {says}; the API may refuse it" in each for each in warned)


@pytest.mark.parametrize(
    ("size", "model", "says"),
    [
        ((800, 600), "gpt-image-1.5", "crop the input or take a model with free sizes"),
        ((4000, 1000), "gpt-image-2", "no size of gpt-image-2 has it, crop the input"),
    ],
)
@pytest.mark.parametrize("asked", ["match", "auto"])
def test_what_no_size_can_keep_is_refused_beforehand(
    run: Run, size: tuple[int, int], model: str, says: str, asked: str
) -> None:
    photograph(size).save("room.png")
    mask(size, (0, 0, 300, 300)).save("mask.png")
    argv = edit("--keep-unmasked", "--size", asked, "--model", model, "--dry-run")
    assert says in dry.problem(run(*argv))


def test_a_label_mask_of_small_numbers_is_refused(run: Run) -> None:
    photograph().save("room.png")
    Image.new("L", SIZE, 1).save("mask.png")
    problem = dry.problem(run(*edit("--mask-edits", "white", "--dry-run")))
    assert "nowhere more than half white" in problem
    assert "--mask-edits white or black" in dry.problem(run(*edit("--dry-run")))


def test_mask_edits_without_a_mask_is_refused(run: Run) -> None:
    picture("room.png")
    argv = ("edit", "--image", "room.png", "--prompt", "x", "--mask-edits", "white", "--dry-run")
    assert 'mask_edits "white": give a mask with it' in dry.problem(run(*argv))
    job: Json = {"prompt": "x", "mask_edits": "black"}
    assert 'mask_edits "black": give a mask with it' in dry.problem(dry.batch(run, job))


def test_a_huge_mask_is_not_opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_gen, "MAX_COPY_PIXELS", 1000)
    photograph().save("room.png")
    mask().save("mask.png")
    warned = dry.warnings(run(*edit("--dry-run")))
    assert "mask mask.png is not measured: it has more than 1,000 pixels" in warned
    drawn = dry.problem(run(*edit("--mask-edits", "white", "--dry-run")))
    assert drawn == "mask mask.png is not measured: it has more than 1,000 pixels"


@pytest.mark.parametrize("space", [b"GRAY", b"CMYK", b"RGB "])
def test_a_profile_that_an_rgb_picture_must_not_have_is_left_out(
    run: Run, api: ImagesAPI, space: bytes
) -> None:
    profile = bytes(16) + space + bytes(108)
    Path("room.png").write_bytes(encoded(photograph(mode="L"), icc_profile=profile))
    mask().save("mask.png")
    api.script(redrawn(size=SIZE))
    assert run(*edit("--keep-unmasked")).exit_code == 0
    with Image.open("night-kept.png") as image:
        assert (image.info.get("icc_profile") == profile) == (space == b"RGB ")


def test_a_mask_that_lies_as_its_own_exif_says_is_set_upright(run: Run, api: ImagesAPI) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Path("room.jpg").write_bytes(encoded(photograph(), "jpeg", exif=exif))
    drawn = Image.new("L", SIZE)
    drawn.paste(255, (0, 0, 40, 20))
    Path("mask.png").write_bytes(encoded(drawn, exif=exif))
    api.script(redrawn(size=SIZE))
    result = run(*edit("--keep-unmasked", "--mask-edits", "white", image="room.jpg"))
    assert result.exit_code == 0, result.stderr
    alpha = ImageOps.invert(drawn.rotate(180))
    check_kept("night-kept.png", pixels("room.jpg"), "night.png", alpha)


def test_a_photograph_that_is_stored_turned_warns_of_how_its_mask_counts(run: Run) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Path("room.jpg").write_bytes(encoded(photograph(), "jpeg", exif=exif))
    mask().save("mask.png")
    warned = dry.warnings(run(*edit("--keep-unmasked", "--dry-run", image="room.jpg")))
    assert "mask mask.png counts as drawn upright, the first image is stored turned" in warned


def test_keep_unmasked_needs_an_image_and_a_mask(run: Run) -> None:
    picture("room.png")
    argv = ("edit", "--image", "room.png", "--prompt", "x", "--keep-unmasked", "--dry-run")
    assert "keep_unmasked needs an image and a mask" in dry.problem(run(*argv))
    job: Json = {"prompt": "x", "keep_unmasked": True}
    assert "keep_unmasked needs an image and a mask" in dry.problem(dry.batch(run, job))


@pytest.mark.parametrize("way", [(), ("--batch-api",)], ids=["live", "Batch API"])
@pytest.mark.usefixtures("room")
def test_a_job_of_a_batch_keeps_and_makes_it_again_without_a_request(
    run: Run, api: ImagesAPI, way: tuple[str, ...]
) -> None:
    job: Json = {"prompt": "night", "image": "room.png", "mask": "mask.png", "out": "n.png"}
    jobs: list[Job] = [job | {"keep_unmasked": True, "size": "match", "n": 2}, "a fox"]
    argv = live.batch(jobs, *way, "--json", "--downscale-max-dim", 50)
    shown = run(*argv, "--dry-run")
    result = run(*argv)
    assert result.exit_code == 0, result.stderr
    record = next(line for line in result.json_lines if line["job"] == 1)
    kept = [image["path"] for image in record["outputs_kept"]]
    assert kept == ["out/n-1-kept.png", "out/n-2-kept.png"]
    assert len(record["outputs_downscaled"]) == 4
    if not way:
        assert json.loads(shown.stdout.splitlines()[0])["outputs_kept"] == kept
    for name in kept:
        check_kept(name, pixels("room.png"), name.replace("-kept", ""), mask().getchannel("A"))
    sent, before = len(api.requests), Path(kept[1]).stat().st_mtime_ns
    os.unlink(kept[0])
    again = run(*live.batch(jobs, "--skip-existing", "--json", "--downscale-max-dim", 50))
    assert (again.exit_code, len(api.requests)) == (0, sent), again.stderr
    assert Path(kept[0]).exists()
    assert Path(kept[1]).stat().st_mtime_ns == before


@pytest.mark.usefixtures("room")
def test_a_kept_picture_follows_its_mask(run: Run, api: ImagesAPI) -> None:
    api.script(redrawn(size=SIZE))
    assert run(*edit("--keep-unmasked")).exit_code == 0
    former = Path("night-kept.png").read_bytes()
    mask(box=(0, 0, 10, 10)).save("mask.png")
    later = Path("night-kept.png").stat().st_mtime + 5
    os.utime("mask.png", (later, later))
    assert run(*edit("--keep-unmasked", "--skip-existing")).exit_code == 0
    assert Path("night-kept.png").read_bytes() != former
    assert len(api.requests) == 1


@pytest.mark.usefixtures("room")
def test_somebody_elses_file_under_the_kept_name_is_not_replaced(run: Run, api: ImagesAPI) -> None:
    picture("night-kept.png")
    assert "night-kept.png exists" in dry.problem(run(*edit("--keep-unmasked")))
    problem = dry.problem(run(*edit("--keep-unmasked", "--skip-existing")))
    assert problem.startswith("night-kept.png is no kept picture of this program's")
    assert api.requests == []


@pytest.mark.usefixtures("room")
def test_two_jobs_do_not_keep_under_one_name(run: Run) -> None:
    job: Json = {"prompt": "a", "image": "room.png", "mask": "mask.png"}
    jobs: list[Job] = [
        job | {"keep_unmasked": True, "out": "a.png"},
        {"prompt": "b", "out": "a-kept.png"},
    ]
    assert "a-kept.png would be written twice" in dry.problem(dry.batch(run, *jobs))


@pytest.mark.usefixtures("room")
def test_what_a_kept_picture_is_made_of_decides_whether_it_is_made_again(
    run: Run, api: ImagesAPI
) -> None:
    """Also where the other mask is the older file."""
    api.script(redrawn(size=SIZE))
    assert run(*edit("--keep-unmasked")).exit_code == 0
    former = Path("night-kept.png").read_bytes()
    mask(box=(0, 0, 10, 10)).save("mask.png")
    os.utime("mask.png", (1, 1))
    assert run(*edit("--keep-unmasked", "--skip-existing")).exit_code == 0
    assert Path("night-kept.png").read_bytes() != former
    assert len(api.requests) == 1


@pytest.mark.usefixtures("room")
def test_a_kept_picture_of_a_former_answer_does_not_stay(run: Run, api: ImagesAPI) -> None:
    api.script(redrawn(size=SIZE))
    assert run(*edit("--keep-unmasked")).exit_code == 0
    failed = run(*edit("--keep-unmasked", "--force"))
    assert (failed.exit_code, Path("night-kept.png").exists()) == (4, False)
    advice = "repeat the command with --force (1 job)"
    assert f"With --size match or another size of the input's aspect: {advice}" in failed.stderr


@pytest.mark.usefixtures("room")
def test_a_full_disk_is_no_matter_of_the_size(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    api.script(redrawn(size=SIZE))
    with monkeypatch.context() as patch:
        patch.setattr(image_gen, "keep_unmasked", full)
        result = run(*edit("--keep-unmasked", "--json"))
    assert (result.exit_code, result.json["error"]["kind"]) == (1, "downscale")
    assert run(*edit("--keep-unmasked", "--skip-existing")).exit_code == 0
    assert len(api.requests) == 1


@pytest.mark.usefixtures("room")
def test_a_kept_picture_of_any_size_is_told(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a photograph of 48 million pixels is, which has over 64 MB."""
    api.script(redrawn(size=SIZE))
    monkeypatch.setattr(image_gen, "MAX_ANSWER_BYTES", 60_000)
    Path("room.png").write_bytes(Path("room.png").read_bytes())
    result = run(*edit("--keep-unmasked", "--json"))
    kept = Path("night-kept.png").read_bytes()
    monkeypatch.setattr(image_gen, "MAX_ANSWER_BYTES", len(kept) - 1)
    assert image_gen.saved_file("night-kept.png") is not None
    assert [image["path"] for image in result.json["outputs_kept"]] == ["night-kept.png"]


@pytest.mark.usefixtures("room")
def test_a_lost_input_fails_what_is_kept_and_not_the_answer(run: Run, api: ImagesAPI) -> None:
    api.script(redrawn(size=SIZE))
    assert run(*edit("--keep-unmasked")).exit_code == 0
    os.unlink("night-kept.png")
    shutil.move("mask.png", "gone.png")
    result = run(*edit("--keep-unmasked", "--skip-existing"))
    assert result.exit_code == 2
    assert "mask mask.png cannot be read" in result.stderr


# Sizes that match


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((1024, 1024), "1024x1024"),
        ((1200, 800), "1200x800"),
        ((2048, 1152), "2048x1152"),
        ((96, 64), "1008x672"),
        ((8000, 6000), "3264x2448"),
        ((3000, 500), "2112x704"),
        ((500, 3000), "704x2112"),
    ],
)
def test_match_asks_for_the_nearest_legal_size(
    run: Run, size: tuple[int, int], wanted: str
) -> None:
    picture("room.png", size=size)
    result = dry.edit(run, "--size", "match")
    width, height = map(int, dry.document(result)["size"].split("x"))
    if max(size) <= 3 * min(size):
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.01
    assert f"{width}x{height}" == wanted


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(width=some.integers(200, 6000), height=some.integers(200, 6000))
def test_whatever_the_input_a_match_is_legal_and_of_its_aspect(
    run: Run, width: int, height: int
) -> None:
    seen = image_gen.Picture("png", width, height, alpha=False, whole=True)
    size = image_gen.nearest_size(seen.edges, ())
    assert run("generate", "--prompt", "x", "--size", size, "--dry-run").exit_code == 0
    ratio = max(width, height) / min(width, height)
    if ratio <= 3:
        edges = image_gen.edges_of(size)
        assert edges is not None
        assert image_gen.fit(edges, seen.edges)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1100, 1000), "1024x1024"), ((1000, 650), "1536x1024"), ((640, 1000), "1024x1536")],
)
def test_the_old_models_get_the_closest_of_three(
    run: Run, size: tuple[int, int], wanted: str
) -> None:
    picture("room.png", size=size)
    result = dry.edit(run, "--size", "match", "--model", "gpt-image-1.5")
    assert dry.document(result)["size"] == wanted


def test_match_looks_at_a_photograph_as_it_is_seen(run: Run) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photograph((1200, 800)).save("room.jpg", exif=exif)
    result = dry.edit(run, "--size", "match", image="room.jpg")
    assert dry.document(result)["size"] == "800x1200"


def test_match_is_for_edits(run: Run) -> None:
    assert "size match is for edits" in dry.problem(dry.generate(run, "--size", "match"))
    assert "size match is for edits" in dry.problem(
        dry.batch(run, {"prompt": "a", "size": "match"})
    )
    result = dry.edit(run, "--size", "match", image="nowhere.png")
    assert dry.problem(result).startswith("image nowhere.png cannot be read")


@pytest.mark.parametrize(
    ("size", "warned"), [((64, 64), False), ((96, 64), False), ((64, 96), False), ((80, 64), True)]
)
def test_auto_is_warned_of_where_the_aspect_is_unusual(
    run: Run, size: tuple[int, int], *, warned: bool
) -> None:
    picture("room.png", size=size)
    warnings = dry.warnings(dry.edit(run))
    assert any("size auto may come back in another aspect" in each for each in warnings) == warned
    assert all("--size match asks for " in each for each in warnings)


@pytest.mark.usefixtures("room")
def test_a_kept_picture_needs_a_whole_input(run: Run) -> None:
    mask().save("mask.png")
    Path("room.png").write_bytes(Path("room.png").read_bytes()[:-9])
    argv = edit("--keep-unmasked", "--size", "match", "--dry-run")
    assert dry.problem(run(*argv)).endswith("room.png is cut off at its end; give a whole image")


@pytest.mark.usefixtures("room")
def test_auto_is_warned_of_where_a_kept_picture_needs_the_aspect(run: Run) -> None:
    mask().save("mask.png")
    (warning,) = dry.warnings(run(*edit("--keep-unmasked", "--dry-run")))
    assert "another aspect than room.png (96x64), and there is no kept picture then" in warning


# Several inputs


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("edit", "--image", "a.png", "b.png", "--prompt", "x"), "repeat --image for each file"),
        (("edit", "--image", "a.png,b.png", "--prompt", "x"), "repeat --image for each file"),
        (("generate", "--image", "a.png", "--prompt", "x"), "use edit"),
        (("generate", "--mask", "a.png", "--prompt", "x"), "use edit"),
        (("generate", "--keep-unmasked", "--prompt", "x"), "use edit"),
        (
            ("generate-batch", "--image", "a.png", "--input", "j", "--out-dir", "o"),
            'write "image" into the jobs',
        ),
        (
            ("generate-batch", "--input", "j", "--out-dir", "o", "--mask-edits", "white"),
            'write "mask_edits" into the jobs',
        ),
    ],
)
def test_inputs_in_the_wrong_place_are_told_the_right_one(
    run: Run, argv: tuple[str, ...], says: str
) -> None:
    picture("a.png")
    picture("b.png")
    assert says in dry.problem(run(*argv, "--dry-run"))


def test_several_images_each_by_its_flag_keep_their_order(run: Run) -> None:
    names = [picture(f"{letter}.png") for letter in "cab"]
    flags = [word for name in names for word in ("--image", name)]
    shown = dry.document(run("edit", *flags, "--prompt", "x", "--dry-run"))
    assert shown["image"] == names


@pytest.mark.parametrize(
    ("name", "oddity"),
    list(product(["a.png", "a.webp"], ["animated"])),
)
def test_an_animated_input_is_warned_of(run: Run, name: str, oddity: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(name, save_all=True, append_images=frames[1:])
    warnings = dry.warnings(dry.edit(run, image=name))
    assert f"image {name} is {oddity}; the API may refuse it: give one frame" in warnings


@pytest.mark.usefixtures("api")
def test_the_kept_part_has_no_rim(run: Run) -> None:
    """A disc on a plain ground: from the rim inwards the answer gains, pixel by pixel."""
    Image.new("RGB", (64, 64), "white").save("room.png")
    layer = mask((64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(layer).rectangle((16, 16, 47, 47), fill=(0, 0, 0, 0))
    layer.save("mask.png")
    assert run(*edit("--keep-unmasked")).exit_code == 0
    row = pixels("night-kept.png", "L")[32, 12:24].astype(int)
    answer = pixels("night.png", "L")[32, 12:24].astype(int)
    assert list(row[:4]) == [255] * 4
    assert list(row[8:]) == list(answer[8:])


def test_the_queue_is_given_the_mask_that_it_understands(run: Run, api: ImagesAPI) -> None:
    photograph().save("room.png")
    drawn = Image.new("L", SIZE)
    drawn.paste(255, BOX)
    drawn.save("mask.png")
    job: Json = {"prompt": "a", "image": "room.png", "mask": "mask.png", "mask_edits": "white"}
    assert run(*queued([job, job | {"prompt": "b"}])).exit_code == 0
    uploads = [request for request in api.requests if request.route == "POST /v1/files"]
    masks = [upload.files[0].data for upload in uploads if b"RGBA" not in upload.files[0].data]
    alphas = []
    for data in masks:
        if data.startswith(b"\x89PNG"):
            with Image.open(io.BytesIO(data)) as image:
                alphas += [image.getchannel("A")] if image.mode == "RGBA" else []
    assert len(alphas) == 1
    assert ImageChops.difference(alphas[0], mask().getchannel("A")).getbbox() is None
