"""One image of all images of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import decompression_bomb, image_bytes, moderation_blocked, unauthorized
from inputs import encoded
from PIL import Image, ImageChops

if TYPE_CHECKING:
    from cli import Result, Run
    from images_api import ImagesAPI

COLOURS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (200, 160, 30)]
SHEET = ("--contact-sheet", "sheet.png")


@pytest.fixture
def coloured(api: ImagesAPI) -> ImagesAPI:
    """A server that answers job N with the Nth colour."""
    for number, colour in enumerate(COLOURS, start=1):
        content = encoded(Image.new("RGB", (64, 48), colour))
        reply = image_bytes(lambda _, content=content: content)  # type: ignore[misc]
        api.script_for(f"job {number}", reply, repeat=True)
    return api


def cells(name: str = "sheet.png", count: int = 4) -> list[tuple[int, ...]]:
    """The colours in the middle of the cells, row by row."""
    with Image.open(name) as sheet:
        picture = sheet.convert("RGB")
    columns = next(k for k in range(1, count + 1) if k * k >= count)
    rows = -(-count // columns)
    width, height = picture.width / columns, picture.height / rows
    middles = [
        (int((k % columns + 0.5) * width), int((k // columns + 0.45) * height))
        for k in range(count)
    ]
    found = [picture.getpixel(middle) for middle in middles]
    assert all(isinstance(colour, tuple) for colour in found)
    return [colour for colour in found if isinstance(colour, tuple)]


def make(run: Run, jobs: int, *flags: object) -> Result:
    return run(*live.batch(jobs, *SHEET, *flags))


def test_the_thumbnails_stand_in_job_order(run: Run, coloured: ImagesAPI) -> None:
    result = make(run, 4)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "Wrote sheet.png"
    assert cells() == COLOURS
    assert len(coloured.requests) == 4


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "JSON"])
def test_a_failed_job_is_marked_and_keeps_its_place(
    run: Run, coloured: ImagesAPI, flags: tuple[str, ...]
) -> None:
    coloured.script_for("job 2", moderation_blocked())
    assert make(run, 4, *flags).exit_code == 4
    first, second, *rest = cells()
    assert [first, *rest] == [COLOURS[0], *COLOURS[2:]]
    red, green, _ = second
    assert red > green
    assert second != COLOURS[1]


def test_jobs_that_were_not_sent_are_marked_too(run: Run, coloured: ImagesAPI) -> None:
    coloured.script_for("job 2", unauthorized())
    assert make(run, 4, "--concurrency", 1).exit_code == 4
    first, *rest = cells()
    assert first == COLOURS[0]
    assert len(set(rest)) == 1


def test_it_is_made_when_everything_is_there_already(run: Run, coloured: ImagesAPI) -> None:
    make(run, 4)
    before = Path("sheet.png").read_bytes()
    Path("sheet.png").unlink()
    result = make(run, 4, "--skip-existing")
    assert (result.exit_code, result.stdout) == (0, "Wrote sheet.png\n")
    assert Path("sheet.png").read_bytes() == before
    assert len(coloured.requests) == 4


def test_it_is_renewed_when_the_command_is_repeated(run: Run, coloured: ImagesAPI) -> None:
    coloured.script_for("job 2", moderation_blocked())
    make(run, 4)
    assert make(run, 4, "--skip-existing").exit_code == 0
    assert cells() == COLOURS
    assert live.names(".") == ["jobs.jsonl", "out", "sheet.png"]


def test_it_does_not_replace_a_file_that_exists(run: Run, api: ImagesAPI) -> None:
    Path("sheet.png").write_text("mine")
    result = make(run, 1)
    assert result.exit_code == 2
    assert "sheet.png exists" in live.lines(result)[0]
    assert api.requests == []
    assert Path("sheet.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg", "sheet.webp"])
def test_its_suffix_decides_its_format(run: Run, api: ImagesAPI, name: str) -> None:
    assert run(*live.batch(1, "--contact-sheet", name)).exit_code == 0
    with Image.open(name) as sheet:
        assert sheet.format == image_gen.SUFFIX_FORMATS[Path(name).suffix].upper()
    assert len(api.requests) == 1


def test_every_variant_has_a_cell(run: Run, api: ImagesAPI) -> None:
    four = run(*live.batch([{"prompt": "a", "n": 4}], *SHEET))
    assert four.exit_code == 0
    size = live.size_of("sheet.png")
    Path("sheet.png").unlink()
    make(run, 4, "--force")
    assert live.size_of("sheet.png") == size
    assert len(api.requests) == 5


def test_an_image_that_cannot_be_read_is_marked(run: Run, coloured: ImagesAPI) -> None:
    coloured.script_for("job 2", decompression_bomb())
    assert make(run, 4).exit_code == 0
    assert cells()[2:] == COLOURS[2:]
    assert "Traceback" not in make(run, 4, "--skip-existing").stderr


def test_the_names_stand_below_the_thumbnails(run: Run, coloured: ImagesAPI) -> None:
    make(run, 1)
    with Image.open("sheet.png") as sheet:
        label = sheet.convert("L").crop((0, sheet.height - 24, sheet.width, sheet.height))
    assert ImageChops.invert(label).point(lambda v: 255 * (v > 128)).getbbox()
    assert len(coloured.requests) == 1


def test_a_title_of_any_characters_can_be_drawn(run: Run, api: ImagesAPI) -> None:
    api.script(moderation_blocked(), repeat=True)
    titles = ["日本 🦊 \u202e", "a\ttab \x07", "long " * 500, '"two\\nlines"']
    result = run(*live.batch(titles, *SHEET))
    assert result.exit_code == 4
    assert "sheet" not in "".join(live.lines(result))
    assert len(cells()) == 4


def test_a_sheet_that_cannot_be_written_fails_the_run_and_keeps_the_images(
    run: Run, api: ImagesAPI
) -> None:
    api.script(image_bytes(in_the_way), repeat=True)
    result = make(run, 1, "--force")
    assert result.exit_code == 1
    assert "--contact-sheet sheet.png" in live.lines(result)[0]
    assert live.names() == ["001-job-1.png"]


def in_the_way(data: bytes) -> bytes:
    """The server of this process makes a folder between preflight and the sheet."""
    Path("sheet.png").mkdir()
    return data


def test_a_hundred_images_make_a_sheet(run: Run, api: ImagesAPI) -> None:
    assert make(run, 100, "--concurrency", 25).exit_code == 0
    assert live.size_of("sheet.png") == (2648, 2848)
    assert len(api.requests) == 100


def test_single_commands_have_none(run: Run) -> None:
    assert run(*live.generate(*SHEET)).exit_code == 2
