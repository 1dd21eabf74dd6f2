"""Files of others are neither replaced nor taken for ours; what is ours is known by its mark."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import pytest
from images_api import image_bytes, more_images
from inputs import encoded, picture
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Run
    from images_api import ImagesAPI

KEEP = "--skip-existing"
SMALL = ("--downscale-max-dim", 32)


def paid(name: str) -> bytes:
    """A picture of another run."""
    return Path(picture(name, size=(48, 48))).read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"mine", encoded(Image.new("RGB", (9, 9)), "jpeg"), b"\xff\xd8\xff\xe0" + b"\0" * 30],
    ids=["text", "a jpeg", "a jpeg that is cut off"],
)
def test_another_file_under_the_name_of_an_image_is_refused_beforehand(
    run: Run, api: ImagesAPI, content: bytes
) -> None:
    Path("fox.png").write_bytes(content)
    result = run(*live.generate(KEEP))
    assert (result.exit_code, api.requests) == (2, [])
    assert "fox.png is no whole png; move it away" in result.stderr
    assert dry.problem(dry.generate(run, KEEP, "--out", "fox.png"))
    assert Path("fox.png").read_bytes() == content


def test_a_file_that_was_cut_off_and_is_whole_when_the_image_comes_is_kept(
    run: Run, api: ImagesAPI
) -> None:
    whole = paid("fox.png")
    Path("fox.png").write_bytes(whole[:-8])
    act = lambda: Path("fox.png").write_bytes(whole)  # noqa: E731
    result = live.run_held(run, api, live.generate(KEEP), act=act)
    assert result.exit_code == 0
    assert Path("fox.png").read_bytes() == whole
    assert live.names(".") == ["fox-alt-1.png", "fox.png"]


@pytest.mark.parametrize("name", ["png", "jpg", "webp"])
def test_a_paid_image_under_the_name_of_a_copy_is_refused_beforehand(
    run: Run, api: ImagesAPI, name: str
) -> None:
    theirs = paid(f"fox-web.{name}")
    result = run(*live.generate(KEEP, *SMALL, out=f"fox.{name}"))
    assert (result.exit_code, api.requests) == (2, [])
    assert f"fox-web.{name} is no copy of this program's" in result.stderr
    assert "--downscale-suffix" in result.stderr
    assert Path(f"fox-web.{name}").read_bytes() == theirs


def test_a_paid_image_under_the_name_of_the_sheet_is_refused_beforehand(
    run: Run, api: ImagesAPI
) -> None:
    theirs = paid("sheet.png")
    result = run(*live.batch(1, KEEP, "--contact-sheet", "sheet.png"))
    assert (result.exit_code, api.requests) == (2, [])
    assert "sheet.png is no contact sheet of this program's" in result.stderr
    assert Path("sheet.png").read_bytes() == theirs


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg", "sheet.webp"])
def test_a_sheet_of_before_is_made_anew(run: Run, api: ImagesAPI, name: str) -> None:
    for count in (1, 5):
        assert run(*live.batch(count, KEEP, "--contact-sheet", name)).exit_code == 0
    assert len(api.requests) == 5
    assert live.size_of(name)[0] > 600


def aged(path: Path) -> None:
    """A copy that is older than its original."""
    os.utime(path.with_stem(f"{path.stem}-web"), (1, 1))


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "gif"])
@pytest.mark.parametrize(
    ("change", "edge", "is_made"),
    [
        pytest.param(lambda _: None, 32, False, id="nothing has changed"),
        pytest.param(lambda _: None, 16, True, id="another size"),
        pytest.param(aged, 32, True, id="older than its original"),
    ],
)
def test_a_copy_is_made_anew_where_it_does_not_fit(
    run: Run, api: ImagesAPI, name: str, change: Callable[[Path], None], edge: int, *, is_made: bool
) -> None:
    path = Path(f"fox.{name}")
    model = ("--model", "gpt-image-2.5-flare")
    assert run(*live.generate(*model, *SMALL, out=path.name)).exit_code == 0
    copy = Path(f"fox-web.{name}")
    change(path)
    before = copy.stat().st_ino
    assert (
        run(*live.generate(*model, KEEP, "--downscale-max-dim", edge, out=path.name)).exit_code == 0
    )
    assert len(api.requests) == 1
    assert (copy.stat().st_ino != before) == is_made
    assert max(live.size_of(copy)) == edge


def test_a_copy_of_an_image_that_was_small_enough_is_known_as_well(
    run: Run, api: ImagesAPI
) -> None:
    argv = live.generate("--downscale-max-dim", 900)
    assert run(*argv).exit_code == 0
    assert Path("fox-web.png").read_bytes() == Path("fox.png").read_bytes()
    assert run(*argv, KEEP).exit_code == 0
    assert len(api.requests) == 1


def test_copies_keep_the_profile_of_their_original_beside_the_mark(
    run: Run, api: ImagesAPI
) -> None:
    content = encoded(Image.effect_noise((64, 64), 80), "jpeg")
    api.script(image_bytes(lambda _: content))
    assert run(*live.generate(*SMALL, out="fox.jpg")).exit_code == 0
    with Image.open("fox-web.jpg") as copy:
        assert "image_gen" in copy.getexif()[0x0131]


@pytest.mark.parametrize(
    "names",
    [("straße", "STRASSE"), ("ſun", "sun"), ("é", unicodedata.normalize("NFD", "É"))],
    ids=["ß", "long s", "composed"],
)
def test_names_that_a_disk_may_fold_together_are_one(run: Run, names: tuple[str, str]) -> None:
    said = dry.problem(dry.batch(run, *({"prompt": "a", "out": name} for name in names)))
    assert "would be written twice" in said


def test_a_name_is_tried_once_for_each_image_that_nobody_asked_for(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counted(temporary: str, name: str) -> None:
        tried.append(name)
        place(temporary, name)

    place = image_gen.place
    monkeypatch.setattr(image_gen, "place", counted)
    api.script(more_images(200))
    assert run(*live.generate()).exit_code == 0
    assert len(live.names(".")) == 201
    assert len(tried) < 210
