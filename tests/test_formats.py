"""GIF and SVG, from the request to the copy and the contact sheet."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import live
import pytest
from image_gen import FORMATS, probe
from images_api import image_bytes, redrawn
from inputs import FLARE, encoded, picture
from PIL import Image, ImageSequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Run
    from images_api import ImagesAPI, Reply
    from inputs import Job


def recorded(into: list[bytes]) -> Reply:
    """The ordinary answer; its images are written down as they are sent."""
    return image_bytes(lambda data: into.append(data) or data)  # type: ignore[func-returns-value]


def animation(name: str | Path) -> tuple[tuple[int, int], list[int]]:
    """The size of a gif, and the time of each frame."""
    with Image.open(name) as image:
        frames = [(f.size, f.info.get("duration", 0)) for f in ImageSequence.Iterator(image)]
        assert {size for size, _ in frames} == {image.size}
        return image.size, [time for _, time in frames]


def test_a_gif_is_saved_as_it_came_and_its_copy_keeps_frames_and_timing(
    run_process: Run, api: ImagesAPI
) -> None:
    sent: list[bytes] = []
    api.script(recorded(sent))
    flags = (
        "--model",
        FLARE,
        "--frame-count",
        5,
        "--frame-duration-ms",
        124,
        "--downscale-max-dim",
        9,
    )
    result = run_process(*live.generate(*flags, "--json", out="fox.gif"))
    assert result.exit_code == 0, result.stderr
    assert Path("fox.gif").read_bytes() == sent[0]
    assert animation("fox.gif") == ((64, 64), [120] * 5)
    assert animation("fox-web.gif") == ((9, 9), [120] * 5)
    body = api.requests[0].body
    assert (body["output_format"], body["frame_count"], body["frame_duration_ms"]) == (
        "gif",
        5,
        124,
    )
    shown = [*result.json["outputs"], *result.json["outputs_downscaled"]]
    assert [(image["format"], image["width"]) for image in shown] == [("gif", 64), ("gif", 9)]
    assert result.json["warnings"] == []


def test_variants_of_a_gif_are_counted_and_the_frames_are_the_api_s_choice(
    run: Run, api: ImagesAPI
) -> None:
    assert run(*live.generate("--model", FLARE, "--n", 2, out="fox.gif")).exit_code == 0
    assert [animation(f"fox-{number}.gif") for number in (1, 2)] == [((64, 64), [200] * 9)] * 2
    assert "frame_count" not in api.requests[0].body


def gif(frames: list[Image.Image], **options: object) -> bytes:
    return encoded(frames[0], "gif", save_all=True, append_images=frames[1:], **options)


def almost_equal() -> list[Image.Image]:
    """Frames that differ in one pixel, which a smaller copy no longer shows."""
    frames = [Image.new("RGB", (64, 64), (10, 200, 30)) for _ in range(6)]
    for frame in frames[1::2]:
        frame.putpixel((5, 5), (11, 200, 30))
    return frames


def clear_halves() -> list[Image.Image]:
    frames = [Image.new("RGBA", (64, 64), (200, 40 * number, 9, 255)) for number in range(6)]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return frames


TIMES = [100, 200, 300, 40, 500, 20]


@pytest.mark.parametrize(
    ("content", "loop"),
    [
        pytest.param(gif(almost_equal(), duration=TIMES, loop=0), 0, id="almost equal frames"),
        pytest.param(gif(almost_equal(), duration=TIMES), None, id="played once"),
        pytest.param(gif(clear_halves(), duration=TIMES, loop=3, disposal=2), 3, id="transparent"),
    ],
)
def test_the_copy_of_any_gif_looks_like_it_at_each_moment(
    run: Run, api: ImagesAPI, content: bytes, loop: int | None
) -> None:
    api.script(image_bytes(lambda _: content))
    assert (
        run(*live.generate("--model", FLARE, "--downscale-max-dim", 16, out="a.gif")).exit_code == 0
    )
    assert Path("a.gif").read_bytes() == content
    assert animation("a.gif") == ((64, 64), TIMES)
    (size, times), before, after = animation("a-web.gif"), film("a.gif"), film("a-web.gif")
    assert (size, sum(times), len(after)) == ((16, 16), sum(TIMES), len(before))
    for seen, expected in zip(after, before, strict=True):
        assert seen == pytest.approx(expected, abs=8)
    with Image.open("a-web.gif") as copy:
        assert copy.info.get("loop") == loop


def film(name: str) -> list[tuple[int, ...]]:
    """Two pixels of what is seen, every 20 ms."""
    shown: list[tuple[int, ...]] = []
    with Image.open(name) as image:
        for frame in ImageSequence.Iterator(image):
            picture = frame.convert("RGBA")
            left, right = (
                picture.getpixel((int(x * image.width), image.height // 2)) for x in (0.2, 0.8)
            )
            assert isinstance(left, tuple)
            assert isinstance(right, tuple)
            shown += [(*left, *right)] * (frame.info["duration"] // 20)
    return shown


def test_an_svg_is_saved_as_it_came(run_process: Run, api: ImagesAPI) -> None:
    sent: list[bytes] = []
    api.script(recorded(sent))
    flags = ("--model", FLARE, "--complexity", "low", "--json")
    result = run_process(*live.generate(*flags, prompt="a <fox> & co", out="fox.svg"))
    assert result.exit_code == 0, result.stderr
    assert Path("fox.svg").read_bytes() == sent[0]
    assert sent[0].startswith(b"<svg")
    (image,) = result.json["outputs"]
    assert image == {
        "path": "fox.svg",
        "origin": "new",
        "bytes": len(sent[0]),
        "width": 64,
        "height": 64,
        "format": "svg",
        "alpha": True,
    }
    assert (api.requests[0].body["output_format"], result.json["warnings"]) == ("svg", [])
    assert result.json["usage"]["svg_usage"]["total_tokens"] == 300


@pytest.mark.parametrize("name", ["gif", "svg"])
def test_an_edit_makes_it_too(run: Run, api: ImagesAPI, name: str) -> None:
    edit = ("edit", "--image", picture("room.png"), "--prompt", "a fox", "--model", FLARE)
    assert run(*edit, "--out", f"fox.{name}").exit_code == 0
    made = probe(io.BytesIO(Path(f"fox.{name}").read_bytes()))
    assert made is not None
    assert (made.format, made.whole, made.size) == (name, True, "64x64")
    assert [request.status for request in api.requests] == [200]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("gif", lambda data: data[:-1], id="gif without its end"),
        pytest.param("gif", lambda data: b"GIF8?a" + data[6:], id="gif of no version"),
        pytest.param("svg", lambda data: data[:60], id="svg without its end"),
        pytest.param("svg", lambda _: b"<html><body></body></html>", id="a page"),
        pytest.param("svg", lambda _: b"<?xml version='1.0'?><rss></rss>", id="other XML"),
        pytest.param("svg", lambda _: b'{"svg": "<svg></svg>"}', id="JSON"),
    ],
)
def test_what_is_no_gif_or_svg_by_its_bytes_is_not_saved(
    run: Run, api: ImagesAPI, name: str, change: Callable[[bytes], bytes]
) -> None:
    api.script(image_bytes(change))
    failed = run(*live.generate("--model", FLARE, "--json", out=f"made/a.{name}"))
    assert live.error(failed).startswith("an image of the answer")
    assert failed.json["error"]["kind"] == "bad_answer"
    assert live.names("made") == [f"a.{name}.answer", f"a.{name}.damaged"]
    assert f"are kept as made/a.{name}.damaged" in live.error(failed)
    assert live.error(failed).endswith(f"; the answer is kept as made/a.{name}.answer")
    (item,) = json.loads(Path(f"made/a.{name}.answer").read_bytes())["data"]
    assert base64.b64decode(item["b64_json"]) == Path(f"made/a.{name}.damaged").read_bytes()
    assert len(api.requests) == 1


def test_another_format_than_gif_is_saved_as_it_came_with_a_warning(
    run: Run, api: ImagesAPI
) -> None:
    api.script(redrawn("png"))
    result = run(*live.generate("--model", FLARE, out="a.gif"))
    assert result.exit_code == 0
    assert live.lines(result, "Warning: ") == ["a.gif: asked for gif, got png"]


def test_a_batch_of_all_formats_has_copies_and_a_contact_sheet(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = [{"prompt": "a", "model": FLARE, "out": f"a.{name}"} for name in FORMATS]
    result = run(*live.batch(jobs, "--contact-sheet", "sheet.png", "--json"))
    assert live.outcomes(result) == ["done"] * len(FORMATS)
    assert live.names() == sorted(f"a.{name}" for name in FORMATS)
    assert live.size_of("sheet.png")[0] > 256
    made = [line["outputs"][0]["format"] for line in result.json_lines]
    assert sorted(made) == sorted(FORMATS)
    assert len(api.requests) == len(FORMATS)


@pytest.mark.parametrize("name", ["gif", "svg"])
def test_a_run_resumes_with_what_is_missing_or_cut(run: Run, api: ImagesAPI, name: str) -> None:
    call = live.generate("--model", FLARE, "--skip-existing", out=f"a.{name}")
    for requests in (1, 1):
        assert run(*call).exit_code == 0
        assert len(api.requests) == requests
    whole = Path(f"a.{name}").read_bytes()
    Path(f"a.{name}").write_bytes(whole[:-8])
    assert run(*call).exit_code == 0
    assert len(api.requests) == 2
    assert Path(f"a.{name}").read_bytes() == whole
