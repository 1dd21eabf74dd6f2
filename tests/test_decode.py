"""Answers that are not what they should be, and the downscaled copies."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import numpy as np
import pytest
from images_api import (
    answer_cut,
    bomb_png,
    decompression_bomb,
    document,
    empty_data,
    fewer_images,
    html,
    huge_extra,
    image_bytes,
    more_images,
    no_data,
    not_an_image,
    redrawn,
    truncated_image,
    wrong_base64,
)
from inputs import encoded
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from cli import Run
    from images_api import Answer, ImagesAPI, Ordinary, Reply


def noted(reply: Reply, bodies: list[bytes]) -> Reply:
    """The same reply, whose body is put down as it is sent."""

    async def note(ordinary: Ordinary) -> Answer:
        answer = await reply(ordinary)
        bodies.append(answer.whole())
        return answer

    return note


@pytest.mark.parametrize(
    ("reply", "damaged"),
    [
        pytest.param(html(200), None, id="HTML"),
        pytest.param(wrong_base64(), None, id="wrong base64"),
        pytest.param(truncated_image(), 560, id="image cut off"),
        pytest.param(not_an_image(), 25, id="no image"),
        pytest.param(image_bytes(lambda _: b""), None, id="empty image"),
        pytest.param(image_bytes(lambda data: data[:30]), 30, id="only a head"),
        pytest.param(empty_data(), None, id="empty list"),
        pytest.param(no_data(), None, id="no data"),
        pytest.param(document(lambda d: d.update(data={"b64_json": ""})), None, id="data no list"),
        pytest.param(document(lambda d: d.update(data=[None])), None, id="null for an image"),
        pytest.param(document(lambda d: d.update(data=[{"url": "x"}])), None, id="a URL"),
        pytest.param(document(lambda d: d.update(data=[{"b64_json": 7}])), None, id="a number"),
    ],
)
def test_a_bad_answer_fails_its_job_alone_and_is_not_asked_for_again(
    run: Run, api: ImagesAPI, reply: Reply, damaged: int | None
) -> None:
    bodies: list[bytes] = []
    api.script_for("job 2", noted(reply, bodies))
    result = run(*live.batch(3, "--json"))
    assert live.error(result).startswith("line 2: ")
    assert live.outcomes(result) == ["done", "failed", "done"]
    assert len(api.requests) == 3
    failed = next(line for line in result.json_lines if line["job"] == 2)
    assert failed["error"]["kind"] == "bad_answer"
    # What was paid for is kept, under names that are no image's.
    kept = [name for name in live.names() if name not in live.images(1, 3)]
    assert kept == ["002-job-2.png.answer", *([] if damaged is None else ["002-job-2.png.damaged"])]
    assert all(f"kept as out/{name}" in failed["error"]["message"] for name in kept)
    assert [Path("out/002-job-2.png.answer").read_bytes()] == bodies
    assert [Path("out", name).stat().st_size for name in kept[1:]] == [damaged][: len(kept) - 1]
    assert failed["error"]["maybe_billed"] is True
    assert failed["request_id"] in {request.request_id for request in api.requests}


def test_a_body_that_always_breaks_is_a_connection_failure(run: Run, api: ImagesAPI) -> None:
    bodies: list[bytes] = []
    api.script(noted(answer_cut(0.9), bodies))
    result = run(*live.generate("--json", "--max-attempts", 1))
    assert "connection" in live.error(result)
    assert live.error(result).endswith("; the answer is kept as fox.png.answer")
    assert result.json["error"]["kind"] == "connection"
    assert result.json["error"]["maybe_billed"] is True
    assert live.names(".") == ["fox.png.answer"]
    came, (sent,) = Path("fox.png.answer").read_bytes(), bodies
    assert b'"b64_json"' in came
    assert len(came) < len(sent)
    assert sent.startswith(came)


def test_fewer_images_are_saved_and_the_job_fails(run: Run, api: ImagesAPI) -> None:
    api.script(fewer_images(2))
    result = run(*live.generate("--n", 3, "--json"))
    said = live.error(result)
    assert said == "asked for 3 images, got 2; the answer is kept as fox-3.png.answer"
    assert result.json["error"]["maybe_billed"] is True
    assert live.names(".") == ["fox-1.png", "fox-2.png", "fox-3.png.answer"]
    assert len(json.loads(Path("fox-3.png.answer").read_bytes())["data"]) == 2
    assert [image["path"] for image in result.json["outputs"]] == ["fox-1.png", "fox-2.png"]
    assert result.json["status"] == "failed"


def test_one_bad_image_of_three_does_not_lose_the_others(run: Run, api: ImagesAPI) -> None:
    api.script(document(lambda content: content["data"][1].update(b64_json="%")))
    result = run(*live.generate("--n", 3))
    assert "is empty; the answer is kept as fox-2.png.answer" in live.error(result)
    assert live.names(".") == ["fox-1.png", "fox-2.png.answer", "fox-3.png"]
    kept = json.loads(Path("fox-2.png.answer").read_bytes())["data"]
    assert [item["b64_json"] == "%" for item in kept] == [False, True, False]


def test_more_images_than_asked_for_are_saved_under_free_names(run: Run, api: ImagesAPI) -> None:
    api.script(more_images(2))
    result = run(*live.generate("--n", 1))
    assert result.exit_code == 0
    assert len(live.lines(result, "Warning: ")) == 1
    assert len(live.names(".")) == 3
    assert "fox.png" in live.names(".")


@pytest.mark.parametrize(
    ("reply", "got"),
    [
        pytest.param(redrawn("jpeg"), "got jpeg", id="format"),
        pytest.param(redrawn(size=(64, 32)), "got 64x32", id="size"),
    ],
)
def test_an_image_other_than_asked_for_is_saved_as_it_came_with_a_warning(
    run: Run, api: ImagesAPI, reply: Reply, got: str
) -> None:
    api.script(reply)
    result = run(*live.generate("--size", "1024x1024", "--json"))
    assert result.exit_code == 0
    (warning,) = live.lines(result, "Warning: ")
    assert warning.endswith(got)
    (image,) = result.json["outputs"]
    assert live.size_of(image["path"]) == (image["width"], image["height"])
    assert image["format"] == ("jpeg" if "jpeg" in got else "png")
    assert any(got in line for line in result.json["warnings"])


def test_the_original_is_written_byte_for_byte(run: Run, api: ImagesAPI) -> None:
    content = encoded(Image.effect_noise((64, 64), 80))
    api.script(image_bytes(lambda _: content))
    assert run(*live.generate("--downscale-max-dim", 32)).exit_code == 0
    assert Path("fox.png").read_bytes() == content


def test_other_keys_of_an_answer_are_no_matter(run: Run, api: ImagesAPI) -> None:
    api.script(huge_extra(5))
    assert run(*live.generate()).exit_code == 0


def test_a_decompression_bomb_is_saved_and_fails_the_downscaled_copy(
    run: Run, api: ImagesAPI
) -> None:
    api.script_for("job 1", decompression_bomb())
    result = run(*live.batch(2, "--json", "--downscale-max-dim", 32))
    assert "001-job-1-web.png" in live.error(result)
    assert live.outcomes(result) == ["failed", "done"]
    assert Path("out/001-job-1.png").read_bytes() == bomb_png()
    assert live.names() == ["001-job-1.png", "002-job-2-web.png", "002-job-2.png"]
    failed = next(line for line in result.json_lines if line["job"] == 1)
    assert failed["error"]["kind"] == "downscale"
    assert [image["path"] for image in failed["outputs"]] == ["out/001-job-1.png"]


def test_an_image_that_is_damaged_inside_is_saved_and_fails_the_copy(
    run: Run, api: ImagesAPI
) -> None:
    def damaged(data: bytes) -> bytes:
        return data[:-60] + bytes(40) + data[-20:]

    api.script(image_bytes(damaged))
    result = run(*live.generate("--downscale-max-dim", 32))
    assert "downscaled" in live.error(result)
    assert live.names(".") == ["fox.png"]


# ------------------------------------------------------------------------------------ the copies


def copy_of(
    image: Image.Image, name: str = "png", max_dim: int = 32, **save: object
) -> Image.Image:
    """The downscaled copy of an image, read to its end."""
    content = encoded(image, name, **save)
    picture = image_gen.probe(io.BytesIO(content))
    assert picture
    original = image_gen.Saved(
        "", len(content), picture.width, picture.height, picture.format, picture.alpha
    )
    copy = Image.open(io.BytesIO(image_gen.downscale(content, original, max_dim)))
    copy.load()
    assert copy.format == name.upper()
    return copy


@pytest.mark.parametrize(
    ("size", "max_dim", "expected"),
    [
        ((64, 32), 32, (32, 16)),
        ((32, 64), 32, (16, 32)),
        ((64, 64), 63, (63, 63)),
        ((300, 2), 30, (30, 1)),
        ((100, 67), 50, (50, 34)),
        ((64, 32), 1, (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_the_longer_edge_of_a_copy_is_the_limit(
    name: str, size: tuple[int, int], max_dim: int, expected: tuple[int, int]
) -> None:
    assert copy_of(Image.new("RGB", size), name, max_dim).size == expected


@pytest.mark.parametrize("max_dim", [64, 65, 4000])
def test_a_copy_is_never_larger_and_then_the_same_bytes(
    run: Run, api: ImagesAPI, max_dim: int
) -> None:
    assert api.requests == []
    assert run(*live.generate("--downscale-max-dim", max_dim)).exit_code == 0
    assert Path("fox-web.png").read_bytes() == Path("fox.png").read_bytes()


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_copy_has_the_format_of_its_original(run: Run, api: ImagesAPI, name: str) -> None:
    result = run(*live.generate("--downscale-max-dim", 32, "--json", out=f"fox.{name}"))
    assert result.exit_code == 0
    assert len(api.requests) == 1
    (copy,) = result.json["outputs_downscaled"]
    assert (copy["path"], copy["format"]) == (f"fox-web.{name}", name)
    assert (copy["width"], copy["height"]) == live.size_of(f"fox-web.{name}") == (32, 32)


@pytest.mark.parametrize("name", ["png", "webp"])
def test_alpha_is_kept(name: str) -> None:
    image = Image.new("RGBA", (64, 64), (200, 40, 40, 0))
    image.paste((200, 40, 40, 255), (0, 0, 32, 64))
    copy = copy_of(image, name)
    assert copy.mode == "RGBA"
    alpha = copy.getchannel("A")
    assert (alpha.getpixel((2, 16)), alpha.getpixel((29, 16))) == (255, 0)


@pytest.mark.parametrize("name", ["png", "webp"])
def test_colour_under_alpha_0_does_not_bleed_into_the_edge(name: str) -> None:
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 31, 64))
    options = {"lossless": True, "exact": True} if name == "webp" else {}
    copy = copy_of(image, name, **options)
    visible = np.array(copy)[np.array(copy)[..., 3] > 128]
    assert len(visible) > 0
    assert visible[:, 0].min() > 200
    assert visible[:, 1].max() < 60


def test_an_image_with_alpha_stands_on_white_in_jpeg() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    content = encoded(clear)
    original = image_gen.Saved("", len(content), 64, 64, "jpeg", alpha=True)
    copy = Image.open(io.BytesIO(image_gen.downscale(content, original, 32)))
    assert (copy.format, copy.mode) == ("JPEG", "RGB")
    assert copy.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_the_colour_profile_is_kept(name: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    copy = copy_of(Image.new("RGB", (64, 64), "teal"), name, icc_profile=profile)
    assert copy.info["icc_profile"] == profile


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_the_orientation_is_applied_once(name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    copy = copy_of(image, name, exif=exif)
    assert copy.size == (16, 32)
    assert copy.getexif().get(0x0112, 1) == 1
    grey = copy.convert("L")
    assert (grey.getpixel((8, 4)), grey.getpixel((8, 28))) == pytest.approx((255, 0), abs=8)


@pytest.mark.parametrize(
    ("mode", "name", "colour", "seen"),
    [
        pytest.param("L", "png", 90, (90, 90, 90, 255), id="grey"),
        pytest.param("L", "jpeg", 90, (90, 90, 90, 255), id="grey JPEG"),
        pytest.param("LA", "png", (90, 128), (90, 90, 90, 128), id="grey with alpha"),
        pytest.param("1", "png", 1, (255, 255, 255, 255), id="bilevel"),
        pytest.param("P", "png", 0, (10, 200, 30, 255), id="palette"),
        pytest.param("I;16", "png", 0x8080, (128, 128, 128, 255), id="16 bit"),
        pytest.param("CMYK", "jpeg", (0, 255, 255, 0), (255, 0, 0, 255), id="CMYK"),
    ],
)
def test_a_copy_of_any_mode_looks_like_its_original(
    mode: str, name: str, colour: int | tuple[int, ...], seen: tuple[int, int, int, int]
) -> None:
    image = Image.new(mode, (64, 64), colour)
    if mode == "P":
        image.putpalette([10, 200, 30])
    copy = copy_of(image, name).convert("RGBA")
    assert copy.getpixel((16, 16)) == pytest.approx(seen, abs=4)


def test_a_palette_with_transparency_keeps_it() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 200, 30, 0, 0, 0])
    image.paste(1, (0, 0, 32, 64))
    copy = copy_of(image, "png", transparency=1).convert("RGBA")
    assert [copy.getchannel("A").getpixel((x, 16)) for x in (4, 28)] == [0, 255]
