"""The plan of outputs: which files a request makes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dry
import pytest
from image_gen import slugify
from inputs import picture

if TYPE_CHECKING:
    from cli import Run


@pytest.mark.parametrize(
    ("flags", "outputs"),
    [
        pytest.param([], ["output/imagegen/output.png"], id="default"),
        pytest.param(
            ["--output-format", "webp"], ["output/imagegen/output.webp"], id="default, format"
        ),
        pytest.param(["--output-format", "jpg"], ["output/imagegen/output.jpeg"], id="jpg is jpeg"),
        pytest.param(
            ["--n", "2"],
            ["output/imagegen/output-1.png", "output/imagegen/output-2.png"],
            id="default, variants",
        ),
        pytest.param(["--out", "fox.png"], ["fox.png"], id="file"),
        pytest.param(["--out", "a/b/fox.webp"], ["a/b/fox.webp"], id="file in new folders"),
        pytest.param(["--out", "../fox.png"], ["../fox.png"], id="file elsewhere"),
        pytest.param(["--out", "fox.jpg"], ["fox.jpg"], id="a user's .jpg is kept"),
        pytest.param(["--out", "fox.PNG"], ["fox.PNG"], id="suffix in capitals"),
        pytest.param(["--out", "fox.png", "--n", "2"], ["fox-1.png", "fox-2.png"], id="variants"),
        pytest.param(["--out", "fox"], ["fox.png"], id="no suffix"),
        pytest.param(["--out", "fox", "--output-format", "jpeg"], ["fox.jpeg"], id="no suffix, 2"),
        pytest.param(["--out", "v1.2"], ["v1.2.png"], id="a dot is no suffix"),
        pytest.param(["--out", "v1.2", "--n", "2"], ["v1.2-1.png", "v1.2-2.png"], id="dot, n"),
        pytest.param(["--out", "fox.tar.gz"], ["fox.tar.gz.png"], id="two dots"),
        pytest.param(["--out", "new/"], ["new/image_1.png"], id="trailing slash"),
        pytest.param(["--out", "there"], ["there/image_1.png"], id="folder that exists"),
        pytest.param(["--out", "."], ["./image_1.png"], id="current folder"),
        pytest.param(
            ["--out-dir", "d", "--n", "2"], ["d/image_1.png", "d/image_2.png"], id="out-dir"
        ),
        pytest.param(
            ["--out-dir", "d", "--output-format", "JPG"], ["d/image_1.jpeg"], id="out-dir, format"
        ),
        pytest.param(
            ["--out-dir", "d", "--out", "x.png"], ["d/image_1.png"], id="out-dir wins over out"
        ),
    ],
)
@pytest.mark.parametrize("command", ["generate", "edit"])
def test_the_names_of_single_images(
    run: Run, command: str, flags: list[str], outputs: list[str]
) -> None:
    Path("there").mkdir()
    picture("room.png")
    shown = dry.document(
        dry.generate(run, *flags) if command == "generate" else dry.edit(run, *flags)
    )
    assert [str(Path(name)) for name in shown["outputs"]] == [str(Path(name)) for name in outputs]
    assert shown["outputs_downscaled"] is None


def test_a_tilde_is_the_home_directory(run: Run) -> None:
    shown = dry.document(
        run("generate", "--prompt", "x", "--out", "~/fox.png", "--dry-run", env={"HOME": "/h"})
    )
    assert shown["outputs"] == ["/h/fox.png"]


@pytest.mark.parametrize(
    ("name", "sent"),
    [("x.png", "png"), ("x.jpg", "jpeg"), ("x.JPEG", "jpeg"), ("x.webp", "webp"), ("v1.2", "png")],
)
def test_the_suffix_of_a_name_decides_the_format_where_none_is_given(
    run: Run, name: str, sent: str
) -> None:
    assert dry.document(dry.generate(run, "--out", name))["output_format"] == sent
    assert dry.document(dry.batch(run, {"prompt": "a fox", "out": name}))["output_format"] == sent


@pytest.mark.parametrize(
    ("name", "output_format"), [("x.jpg", "jpeg"), ("x.JPG", "jpg"), ("x.png", "PNG")]
)
def test_a_suffix_and_a_format_that_mean_the_same_agree(
    run: Run, name: str, output_format: str
) -> None:
    shown = dry.document(dry.generate(run, "--out", name, "--output-format", output_format))
    assert shown["outputs"] == [name]


@pytest.mark.parametrize(
    ("job", "flags", "remedies"),
    [
        pytest.param({"out": "x.jpg", "output_format": "png"}, (), ("x.png", "jpeg"), id="job"),
        pytest.param({"out": "x.webp"}, ("--output-format", "png"), ("x.png", "webp"), id="flag"),
        pytest.param({"out": "x.png", "output_format": "jpg"}, (), ("x.jpeg", "png"), id="jpg"),
    ],
)
def test_a_suffix_and_a_format_that_disagree_are_refused_with_both_remedies(
    run: Run, job: dict[str, Any], flags: tuple[str, ...], remedies: tuple[str, str]
) -> None:
    said = dry.problem(dry.batch(run, {"prompt": "a fox", **job}, flags=flags))
    assert said.startswith("line 1: ")
    assert all(remedy in said for remedy in remedies)


@pytest.mark.parametrize(
    ("flags", "copies"),
    [
        pytest.param([], ["x-web.png"], id="default suffix"),
        pytest.param(["--downscale-suffix", "small"], ["x-small.png"], id="gets a dash"),
        pytest.param(["--downscale-suffix=-s"], ["x-s.png"], id="has a dash"),
        pytest.param(["--downscale-suffix", "_s"], ["x_s.png"], id="has an underscore"),
        pytest.param(["--downscale-suffix", ".s"], ["x-.s.png"], id="dot"),
        pytest.param(["--n", "2"], ["x-1-web.png", "x-2-web.png"], id="variants"),
        pytest.param(["--out", "v1.2"], ["v1.2-web.png"], id="dot in the name"),
    ],
)
def test_the_names_of_downscaled_copies(run: Run, flags: list[str], copies: list[str]) -> None:
    shown = dry.document(dry.generate(run, "--out", "x.png", "--downscale-max-dim", "512", *flags))
    assert shown["outputs_downscaled"] == copies


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--downscale-suffix", ""], "--downscale-suffix is empty"),
        (["--downscale-suffix", "a/b"], "--downscale-suffix a/b"),
        (["--downscale-suffix", "/"], "--downscale-suffix /"),
        (["--downscale-max-dim", "0"], "--downscale-max-dim 0: accepted are 1 and more"),
        (["--downscale-max-dim", "-3"], "--downscale-max-dim -3: accepted are 1 and more"),
    ],
    ids=str,
)
def test_a_copy_that_cannot_be_named_or_made_is_refused(
    run: Run, flags: list[str], says: str
) -> None:
    assert says in dry.problem(dry.generate(run, "--downscale-max-dim", "512", *flags))


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        pytest.param("A red fox", "a-red-fox", id="lower case"),
        pytest.param("  A -- red?! fox.  ", "a-red-fox", id="runs become one dash"),
        pytest.param("Café crème", "caf-cr-me", id="accents split words"),
        pytest.param("狐 🦊 ٣", "狐-٣", id="letters of its own script"),
        pytest.param("🦊 !!!", "job", id="nothing left"),
        pytest.param("--", "job", id="dashes only"),
        pytest.param("İstanbul ſ", "i-stanbul", id="letters that grow or turn ASCII in lower case"),
        pytest.param("x" * 70, "x" * 60, id="60 characters"),
        pytest.param("x" * 59 + " yy", "x" * 59, id="no dash at the cut"),
        pytest.param("!" * 80 + "fox", "job", id="of the first 80 characters"),
        pytest.param("!" * 77 + "foxes", "fox", id="cut at 80"),
    ],
)
def test_the_slug_of_a_prompt(prompt: str, slug: str) -> None:
    assert slugify(prompt) == slug


@pytest.mark.parametrize(
    ("job", "outputs"),
    [
        pytest.param({}, ["001-a-red-fox.png"], id="number and slug"),
        pytest.param({"output_format": "jpg"}, ["001-a-red-fox.jpeg"], id="format"),
        pytest.param({"n": 2}, ["001-a-red-fox-1.png", "001-a-red-fox-2.png"], id="variants"),
        pytest.param({"scene": "fog"}, ["001-a-red-fox.png"], id="of the prompt, not its fields"),
        pytest.param({"out": None}, ["001-a-red-fox.png"], id="null"),
        pytest.param({"out": "hero"}, ["hero.png"], id="name without a suffix"),
        pytest.param({"out": "hero.webp"}, ["hero.webp"], id="name with a suffix"),
        pytest.param({"out": "v1.2", "n": 2}, ["v1.2-1.png", "v1.2-2.png"], id="dot, variants"),
        pytest.param({"out": "sub/hero.png"}, ["hero.png"], id="directories are dropped"),
        pytest.param({"out": "/abs/hero.png"}, ["hero.png"], id="absolute path"),
        pytest.param({"out": "../../hero.png"}, ["hero.png"], id="way out"),
        pytest.param({"out": "~/hero"}, ["hero.png"], id="tilde"),
        pytest.param({"out": "sub/"}, ["sub.png"], id="trailing slash"),
        pytest.param({"out": "a b.png"}, ["a b.png"], id="blank inside"),
    ],
)
def test_the_names_of_a_job(run: Run, job: dict[str, Any], outputs: list[str]) -> None:
    shown = dry.document(dry.batch(run, {"prompt": "A red fox", **job}))
    assert shown["outputs"] == [f"out/{name}" for name in outputs]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "./", "a/..", "//", "sub/."])
def test_a_job_name_that_names_no_file_is_refused(run: Run, name: str) -> None:
    said = dry.problem(dry.batch(run, {"prompt": "a fox", "out": name}))
    assert said.startswith('line 1: "out" ')


def test_job_numbers_have_three_digits_or_more(run: Run) -> None:
    shown = dry.documents(dry.batch(run, *["a fox"] * 100))
    assert shown[8]["outputs"] == ["out/009-a-fox.png"]
    assert shown[99]["outputs"] == ["out/100-a-fox.png"]


@pytest.mark.parametrize(
    ("there", "asked", "n"),
    [
        pytest.param([], ["x-1.png", "x-2.png", "x-3.png"], 3, id="nothing there"),
        pytest.param(["x-2.png"], ["x-1.png", "x-3.png"], 2, id="one there"),
    ],
)
def test_skip_existing_asks_for_the_missing_variants_under_their_names(
    run: Run, there: list[str], asked: list[str], n: int
) -> None:
    for name in there:
        picture(name)
    shown = dry.document(dry.generate(run, "--out", "x.png", "--n", "3", "--skip-existing"))
    assert (shown["outputs"], shown["n"]) == (asked, n)


def test_skip_existing_sends_nothing_for_a_job_that_is_done(run: Run) -> None:
    picture("out/done.png")
    shown = dry.document(
        dry.batch(run, {"prompt": "a", "out": "done"}, "a fox", flags=("--skip-existing",))
    )
    assert shown["job"] == 2


def test_skip_existing_asks_again_for_a_file_that_is_no_whole_image(run: Run) -> None:
    whole = Path(picture("x-1.png")).read_bytes()
    Path("x-1.png").write_bytes(whole[:-4])
    Path("x-2.png").write_bytes(b"")
    argv = ("--out", "x.png", "--n", "2", "--skip-existing")
    shown = dry.document(dry.generate(run, *argv))
    assert shown["outputs"] == ["x-1.png", "x-2.png"]
    Path("x-2.png").write_text("no image")
    refused = dry.generate(run, *argv)
    assert (refused.exit_code, refused.stdout) == (2, "")
    (said,) = dry.messages(refused, "Error: ")
    assert said.startswith("x-2.png is no whole png; ")
    assert Path("x-2.png").read_text() == "no image"


def test_the_plan_of_outputs_creates_nothing(run: Run) -> None:
    picture("room.png")
    before = dry.files()
    dry.generate(run, "--out", "new/deep/", "--n", "3", "--downscale-max-dim", "9")
    dry.edit(run, "--out-dir", "other")
    assert dry.files() == before
