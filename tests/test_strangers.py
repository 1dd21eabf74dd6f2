"""Files of others: what counts as there, what is replaced, and what is refused beforehand."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import BatchPlan
from inputs import FLARE, encoded, picture
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run
    from images_api import ImagesAPI

RESUME = "--skip-existing"
COPIES = ("--downscale-max-dim", 32)
KINDS = ["png", "jpeg", "webp", "gif"]


def drawn(kind: str, size: tuple[int, int] = (20, 30)) -> bytes:
    return encoded(Image.new("RGB", size, "teal"), kind)


def cut(kind: str) -> bytes:
    return drawn(kind)[:-9]


def made(name: str, *flags: object) -> list[str]:
    """The command line of an image; any format."""
    return live.generate("--model", FLARE, *flags, out=name)


def refusal(result: Result, api: ImagesAPI, requests: int = 0) -> str:
    assert (result.exit_code, len(api.image_requests)) == (2, requests), result.stderr
    (problem,) = live.lines(result)
    return problem


# --------------------------------------------------------------------------- the originals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"", b"\n<!-- -->"], ids=["whole", "bytes behind"])
def test_a_whole_image_of_the_planned_format_counts_as_there_whoever_made_it(
    run: Run, api: ImagesAPI, kind: str, tail: bytes
) -> None:
    Path(f"a.{kind}").write_bytes(drawn(kind) + tail)
    result = run(*made(f"a.{kind}", RESUME, "--json"))
    assert (result.exit_code, api.requests) == (0, [])
    assert result.json["status"] == "skipped"
    assert Path(f"a.{kind}").read_bytes() == drawn(kind) + tail


STRANGERS = {
    "text": lambda path: path.write_text("notes of mine"),
    "a whole image of another format": lambda path: path.write_bytes(drawn("jpeg")),
    "a cut-off image of another format": lambda path: path.write_bytes(cut("jpeg")),
    "an svg": lambda path: path.write_text("<svg></svg>"),
    "a zip archive": lambda path: path.write_bytes(b"PK\3\4" + bytes(99)),
    "one byte": lambda path: path.write_bytes(b"\x89"),
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("flag", [(), (RESUME,)], ids=["plain", "resumed"])
def test_anything_else_under_the_name_is_refused_beforehand_and_stays(
    run: Run, api: ImagesAPI, stranger: Callable[[Path], object], flag: tuple[str, ...]
) -> None:
    file = Path("fox.png")
    stranger(file)
    before = os.lstat(file)
    assert "fox.png" in refusal(run(*made("fox.png", *flag)), api)
    after = os.lstat(file)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert live.names(".") == ["fox.png"]


REMNANTS = {"empty": lambda _: b"", "cut off": cut}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remnant", REMNANTS.values(), ids=REMNANTS)
def test_what_a_broken_writing_has_left_is_replaced(
    run: Run, api: ImagesAPI, remnant: Callable[[str], bytes], kind: str
) -> None:
    Path(f"a.{kind}").write_bytes(remnant(kind))
    assert run(*made(f"a.{kind}", RESUME)).exit_code == 0
    assert live.size_of(f"a.{kind}") == (64, 64)
    assert live.names(".") == [f"a.{kind}"]
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    "content", [drawn("png"), drawn("webp"), b"notes of mine"], ids=["whole", "another", "text"]
)
def test_a_remnant_that_has_become_something_meanwhile_is_kept(
    run: Run, api: ImagesAPI, content: bytes
) -> None:
    file = Path("fox.png")
    file.write_bytes(cut("png"))
    act = lambda: file.write_bytes(content)  # noqa: E731
    result = live.run_held(run, api, made("fox.png", RESUME), act=act)
    assert result.exit_code == 0
    assert file.read_bytes() == content
    assert live.size_of("fox-alt-1.png") == (64, 64)
    assert "fox.png has appeared meanwhile" in result.stderr


def test_answers_and_damaged_images_of_before_are_no_obstacle(run: Run, api: ImagesAPI) -> None:
    for name in ("fox.png.answer", "fox.png.damaged", "fox-alt-1.png"):
        Path(name).write_text("of before")
    assert run(*made("fox.png", RESUME)).exit_code == 0
    assert len(api.requests) == 1
    assert [Path(name).read_text() for name in live.names(".") if name != "fox.png"] == [
        "of before"
    ] * 3


def test_a_stranger_under_one_name_of_a_batch_refuses_all_of_it(run: Run, api: ImagesAPI) -> None:
    Path("out").mkdir()
    Path("out/002-job-2.png").write_text("mine")
    problem = refusal(run(*live.batch(3, RESUME)), api)
    assert "out/002-job-2.png" in problem
    assert "--force" in problem
    assert run(*live.batch(3, "--force")).exit_code == 0
    assert live.size_of("out/002-job-2.png") == (64, 64)


def test_what_the_batch_api_was_paid_for_is_saved_beside_a_stranger(
    run: Run, api: ImagesAPI
) -> None:
    argv = live.batch(2, "--batch-api", "--no-wait")
    api.plan_batch(BatchPlan(states=("in_progress", "in_progress", "completed")))
    assert run(*argv).exit_code == 3
    Path("out/001-job-1.png").write_text("mine")
    result = run(*live.batch(2, "--batch-api"))
    assert result.exit_code == 0, result.stderr
    assert Path("out/001-job-1.png").read_text() == "mine"
    assert live.size_of("out/001-job-1-alt-1.png") == (64, 64)
    assert live.size_of("out/002-job-2.png") == (64, 64)


# -------------------------------------------------------------------------------- the marks


def mark_of(name: str) -> object:
    """What a program that reads metadata finds under Software, or in a GIF's comment."""
    with Image.open(name) as image:
        image.load()
        if image.format == "GIF":
            comment = image.info["comment"]
            return comment.decode()
        return image.info.get("Software") or image.getexif().get(0x0131)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_carry_the_mark_of_this_program_and_originals_do_not(
    run: Run, api: ImagesAPI, kind: str
) -> None:
    assert run(*made(f"a.{kind}", *COPIES)).exit_code == 0
    assert mark_of(f"a-web.{kind}") == "image_gen.py (derived)"
    assert image_gen.DERIVED_MARK not in Path(f"a.{kind}").read_bytes()
    assert len(api.requests) == 1


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_contact_sheet_carries_the_mark_and_is_made_anew(
    run: Run, api: ImagesAPI, kind: str
) -> None:
    argv = live.batch(2, RESUME, "--contact-sheet", f"sheet.{kind}")
    assert run(*argv).exit_code == 0
    assert mark_of(f"sheet.{kind}") == "image_gen.py (derived)"
    before = os.stat(f"sheet.{kind}").st_ino
    assert run(*argv).exit_code == 0
    assert os.stat(f"sheet.{kind}").st_ino != before
    assert len(api.requests) == 2


def test_a_contact_sheet_without_the_mark_is_refused_by_its_flag(run: Run, api: ImagesAPI) -> None:
    content = Path(picture("sheet.png")).read_bytes()
    problem = refusal(run(*live.batch(2, RESUME, "--contact-sheet", "sheet.png")), api)
    assert "sheet.png" in problem
    assert "--contact-sheet" in problem
    assert Path("sheet.png").read_bytes() == content


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_fits_counts_as_there(run: Run, api: ImagesAPI, kind: str) -> None:
    argv = made(f"a.{kind}", RESUME, *COPIES, "--json")
    assert run(*argv).exit_code == 0
    before = os.stat(f"a-web.{kind}")
    result = run(*argv)
    assert result.json["status"] == "skipped"
    assert [copy["path"] for copy in result.json["outputs_downscaled"]] == [f"a-web.{kind}"]
    after = os.stat(f"a-web.{kind}")
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(api.requests) == 1


def test_a_copy_of_another_size_is_made_anew(run: Run, api: ImagesAPI) -> None:
    assert run(*made("a.png", *COPIES)).exit_code == 0
    assert run(*made("a.png", RESUME, "--downscale-max-dim", 16)).exit_code == 0
    assert live.size_of("a-web.png") == (16, 16)
    assert live.names(".") == ["a-web.png", "a.png"]
    assert len(api.requests) == 1


def test_a_copy_that_is_older_than_its_original_is_made_anew(run: Run, api: ImagesAPI) -> None:
    argv = made("a.png", RESUME, *COPIES)
    assert run(*argv).exit_code == 0
    Path("a.png").write_bytes(encoded(Image.new("RGB", (64, 64), "red")))
    past = time.time() - 60
    os.utime("a-web.png", (past, past))
    assert run(*argv).exit_code == 0
    with Image.open("a-web.png") as copy:
        assert copy.convert("RGB").getpixel((9, 9)) == (255, 0, 0)
    assert len(api.requests) == 1


@pytest.mark.parametrize("there", [False, True], ids=["original to come", "original there"])
@pytest.mark.parametrize(
    "content",
    [drawn("png", (32, 32)), drawn("jpeg"), b"notes of mine"],
    ids=["fit", "jpeg", "text"],
)
def test_a_file_without_the_mark_in_place_of_a_copy_is_refused_by_its_flag(
    run: Run,
    api: ImagesAPI,
    content: bytes,
    there: bool,  # noqa: FBT001
) -> None:
    if there:
        picture("a.png")
    Path("a-web.png").write_bytes(content)
    problem = refusal(run(*made("a.png", RESUME, *COPIES)), api)
    assert "a-web.png" in problem
    assert "--downscale-suffix" in problem
    assert Path("a-web.png").read_bytes() == content
    again = run(*made("a.png", RESUME, *COPIES, "--downscale-suffix=-small"))
    assert again.exit_code == 0
    assert live.size_of("a-small.png") == (32, 32)
    assert Path("a-web.png").read_bytes() == content


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("002-job-2.png", ()),
        ("002-job-2-web.png", COPIES),
        ("sheet.png", ("--contact-sheet", "out/sheet.png")),
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_what_is_no_file_is_refused_and_holds_up_nothing(
    run_process: Run,
    api: ImagesAPI,
    name: str,
    flags: tuple[object, ...],
    make: Callable[[str], None],
) -> None:
    os.mkdir("out")
    make(f"out/{name}")
    assert name in refusal(run_process(*live.batch(3, RESUME, *flags)), api)


def test_a_copy_that_is_its_small_original_counts_as_there(run: Run, api: ImagesAPI) -> None:
    argv = made("a.png", RESUME, "--downscale-max-dim", 64)
    assert run(*argv).exit_code == 0
    assert Path("a-web.png").read_bytes() == Path("a.png").read_bytes()
    before = os.stat("a-web.png").st_ino
    assert run(*argv).exit_code == 0
    assert os.stat("a-web.png").st_ino == before
    assert len(api.requests) == 1


def test_a_copy_of_which_only_an_empty_file_is_there_is_made(run: Run, api: ImagesAPI) -> None:
    picture("a.png")
    Path("a-web.png").touch()
    assert run(*made("a.png", RESUME, *COPIES)).exit_code == 0
    assert (live.size_of("a-web.png"), api.requests) == ((32, 32), [])


def test_a_mark_somewhere_else_makes_no_original_replaceable(run: Run, api: ImagesAPI) -> None:
    Path("fox.png").write_bytes(b"notes about " + image_gen.DERIVED_MARK)
    refusal(run(*made("fox.png", RESUME)), api)
    assert Path("fox.png").read_bytes().startswith(b"notes")


# ------------------------------------------------------------------------------ the drafts


@pytest.mark.parametrize("flag", [(), (RESUME,), ("--force",)], ids=["plain", "resumed", "forced"])
@pytest.mark.parametrize("keep", [False, True], ids=["removed", "kept"])
def test_drafts_take_free_names_and_only_those_of_this_run_go(
    run: Run,
    api: ImagesAPI,
    flag: tuple[str, ...],
    keep: bool,  # noqa: FBT001
) -> None:
    Path("fox.partial-1.png").write_text("mine")
    keeping = ("--keep-partials",) if keep else ()
    result = run(*made("fox.png", "--partial-images", 2, "--json", *flag, *keeping))
    assert result.exit_code == 0, result.stderr
    assert Path("fox.partial-1.png").read_text() == "mine"
    drafts = ["fox.partial-1-alt-1.png", "fox.partial-2.png"] if keep else []
    assert result.json["partials"] == drafts
    assert live.names(".") == sorted(["fox.partial-1.png", "fox.png", *drafts])
    assert len(api.requests) == 1


# --------------------------------------------------------------------------- folding names

FOLDED = {
    "case": ("Fox.png", "fox.PNG"),
    "ß and SS": ("straße.png", "STRASSE.png"),
    "ß and ẞ": ("straße.png", "STRAẞE.png"),
    "a long s": ("moſs.png", "moss.png"),
    "composed and not": ("fée.png", unicodedata.normalize("NFD", "fée.png")),
    "composed, and case": ("FÉE.png", unicodedata.normalize("NFD", "fée.png")),
    "Hangul": ("한.png", unicodedata.normalize("NFD", "한.png")),
    "the sign of Ångström": ("\u212b.png", "å.png"),
    "a ligature": ("ﬁn.png", "FIN.png"),
    "marks in another order": ("\u1fb4.png", "\u03b1\u0345\u0301.png"),
    "sigmas": ("ΛΌΓΟΣ.png", "λόγος.png"),
}


@pytest.mark.parametrize(("one", "other"), FOLDED.values(), ids=FOLDED)
def test_names_that_a_disk_may_fold_are_one_name(
    run: Run, api: ImagesAPI, one: str, other: str
) -> None:
    jobs = [{"prompt": name, "out": name} for name in (one, other)]
    assert "would be written twice" in refusal(run(*live.batch(jobs)), api)


def test_an_input_under_a_name_that_folds_to_the_output_is_kept(run: Run, api: ImagesAPI) -> None:
    picture("Straße.png")
    words = ["--image", "Straße.png", "--prompt", "x", "--out", "STRASSE.png"]
    assert "is an input image" in refusal(run("edit", *words), api)


def test_a_copy_may_not_fold_to_another_image(run: Run, api: ImagesAPI) -> None:
    jobs = [{"prompt": "1", "out": "a.png"}, {"prompt": "2", "out": "A-WEB.png"}]
    assert "would be written twice" in refusal(run(*live.batch(jobs, *COPIES)), api)


def test_names_that_no_disk_folds_are_two(run: Run, api: ImagesAPI) -> None:
    names = ["e.png", "é.png", "ss.png", "s.png", "o.png", "ø.png", "ı.png", "i.png"]
    assert run(*live.batch([{"prompt": name, "out": name} for name in names])).exit_code == 0
    assert live.names() == sorted(names)
    assert len(api.requests) == len(names)
