"""Preflight: everything that can be known before the first request."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dry
import pytest
from cli import command, finished
from image_gen import (
    JOB_OPTIONS,
    MAX_IMAGE_BYTES,
    MAX_IMAGES,
    MAX_MASK_BYTES,
    MAX_NAME_BYTES,
    OLDEST,
    RANGES,
)
from inputs import FLARE, OLDER, Job, Json, as_flags, flag, job_file, picture
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli import Result, Run
    from images_api import ImagesAPI

NOBODY = 65534


@pytest.fixture
def room() -> str:
    return picture("room.png")


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """A file and a folder that are closed to this process, though root may run the tests."""
    Path(picture("secret.png")).chmod(0)
    Path("closed").mkdir(mode=0o555)
    Path().chmod(0o777)
    is_root = os.getuid() == 0
    if is_root:
        os.setresuid(NOBODY, NOBODY, 0)
    yield
    if is_root:
        os.setresuid(0, 0, 0)


def lying_photograph() -> str:
    """64x32 as it is stored, 32x64 as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (64, 32)).save("photo.jpg", exif=exif)
    return "photo.jpg"


# Values and how they go together.


@pytest.mark.parametrize(
    ("key", "wrong", "accepted"),
    [
        ("moderation", ["", "LOW", "strict", "high"], "auto, low"),
        ("background", ["", "pink", "Auto", "none"], "transparent, opaque, auto"),
        ("output_format", ["", "tiff", ".png", "png "], "png, jpeg, webp"),
    ],
)
def test_words_are_of_their_list(run: Run, key: str, wrong: list[str], accepted: str) -> None:
    for value in wrong:
        said = dry.problem(dry.batch(run, {"prompt": "a fox", key: value}))
        assert said.startswith(f'line 1: {key} "{value}"')
        assert accepted in said
        assert f"line 1: {dry.problem(dry.generate(run, flag(key), value))}" == said


@pytest.mark.parametrize(
    ("output_format", "compression", "accepted"),
    [
        *((name, value, True) for name in ("jpeg", "webp") for value in (0, 100)),
        *((name, value, False) for name in ("jpeg", "webp") for value in (-1, 101)),
        ("png", 50, False),
        ("png", 0, False),
    ],
)
def test_compression_is_a_percentage_for_formats_that_lose(
    run: Run, output_format: str, compression: int, *, accepted: bool
) -> None:
    job = {"prompt": "a", "output_format": output_format, "output_compression": compression}
    if accepted:
        assert dry.document(dry.batch(run, job))["output_compression"] == compression
    else:
        assert dry.problem(dry.batch(run, job)).startswith("line 1: output_compression")


@pytest.mark.parametrize(
    ("flags", "job"),
    [
        pytest.param(
            ("--background", "transparent"), {"model": "gpt-image-1.5"}, id="transparent, model"
        ),
        pytest.param(
            ("--size", "2048x2048", "--model", "gpt-image-1-mini"),
            {"model": "gpt-image-2"},
            id="size, model",
        ),
        pytest.param(("--output-compression", "9"), {"output_format": "webp"}, id="compression"),
        pytest.param(("--output-format", "tiff"), {"output_format": "png"}, id="format"),
        pytest.param(("--n", "99"), {"n": 1}, id="n"),
    ],
)
def test_what_is_checked_is_what_would_be_sent(
    run: Run, flags: tuple[str, ...], job: dict[str, Any]
) -> None:
    dry.documents(dry.batch(run, {"prompt": "a fox", **job}, flags=flags))
    assert dry.problem(dry.batch(run, "a fox", flags=flags)).startswith("line 1: ")


# Formats, drafts and markup.

GIF: Json = {"model": FLARE, "output_format": "gif"}
SVG: Json = {"model": FLARE, "output_format": "svg"}
ROOM: Json = {"image": "room.png"}
NOTES: Json = {**ROOM, "model": FLARE, "markup": "notes.png"}

# Parameters, and how the message begins that refuses them.
REFUSED: dict[str, tuple[Json, str]] = {
    "complexity": ({"complexity": "max"}, 'complexity "max": accepted are low, medium, hi'),
    "frames of a png": ({"frame_count": 4}, "frame_count needs output_format gif, not png"),
    "time of a png": ({"frame_duration_ms": 90}, "frame_duration_ms needs output_format gi"),
    "gif drafts": ({**GIF, "partial_images": 1}, "partial_images needs output_format png"),
    "gif lossy": ({**GIF, "output_compression": 9}, "output_compression needs output_form"),
    "gif clear": ({**GIF, "background": "transparent"}, "background transparent needs out"),
    "gif mask": ({**GIF, **ROOM, "mask": "notes.png"}, "mask needs output_format png or"),
    "svg mask": ({**SVG, **ROOM, "mask": "notes.png"}, "mask needs output_format png or"),
    "two svg": ({**SVG, "n": 2}, "n 2: svg is made one at a time"),
    "svg drafts": ({**SVG, "partial_images": 1}, "partial_images needs output_format png"),
    "svg lossy": ({**SVG, "output_compression": 9}, "output_compression needs output_form"),
    "svg clear": ({**SVG, "background": "transparent"}, "background transparent needs out"),
    "svg frames": ({**SVG, "frame_count": 2}, "frame_count needs output_format gif, not s"),
    "drafts of two": ({"partial_images": 1, "n": 2}, "partial_images with n 2: a stream"),
    "markup and mask": ({**NOTES, "mask": "notes.png"}, "mask and markup cannot be combin"),
    "markup of an older model": ({**NOTES, "model": OLDER[0]}, "markup is not supported by"),
    "markup without alpha": ({**NOTES, "markup": "rgb.png"}, "markup rgb.png has no alpha"),
    "markup of another size": ({**NOTES, "markup": "wide.png"}, "markup wide.png is 65x64"),
    "markup that is none": ({**NOTES, "markup": "gone.png"}, "markup gone.png cannot be r"),
    "markup that is text": ({**NOTES, "markup": "a.txt"}, "markup a.txt is no PNG, JPEG o"),
    "a copy of an svg": (SVG | {"downscale_max_dim": 9}, "--downscale-max-dim: svg has no pixels"),
}
REFUSED |= {
    f"{key} {value}": ({**others, key: value}, f"{key} {value}: accepted are {low} to {high:,}")
    for key, others in {"frame_count": GIF, "frame_duration_ms": GIF, "partial_images": {}}.items()
    for low, high in [RANGES[key]]
    for value in (low - 1, high + 1)
}
REFUSED |= {
    f"{name} of {model}": (
        {"model": model, "output_format": name},
        f"output_format {name}: {model} makes png, jpeg, webp",
    )
    for model, name in itertools.product(OLDER, ("gif", "svg"))
}


@pytest.mark.parametrize(("job", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_api_would_refuse_is_refused_before_it_is_sent(
    run: Run, job: Json, said: str
) -> None:
    picture("room.png")
    picture("rgb.png")
    picture("notes.png", "RGBA")
    picture("wide.png", "RGBA", (65, 64))
    Path("a.txt").write_text("text")
    command = "edit" if "image" in job else "generate"
    by_flag = dry.problem(run(command, *as_flags({"prompt": "a fox"} | job), "--dry-run"))
    assert by_flag.startswith(said)
    keys = {key: value for key, value in job.items() if key in JOB_OPTIONS}
    others = as_flags({key: value for key, value in job.items() if key not in keys})
    by_key = dry.problem(dry.batch(run, {"prompt": "a fox"} | keys, flags=tuple(others)))
    assert by_key == f"line 1: {by_flag}"


def test_markup_of_a_generation_is_refused(run: Run) -> None:
    job = {"prompt": "a fox", "model": FLARE, "markup": picture("notes.png", "RGBA")}
    assert dry.problem(dry.batch(run, job)).startswith("line 1: markup is for edits")


def test_markup_is_drawn_over_a_photograph_as_it_is_seen(run: Run) -> None:
    photograph = lying_photograph()
    markup = ("--model", FLARE, "--markup")
    upright = picture("upright.png", "RGBA", (32, 64))
    result = dry.edit(run, *markup, upright, "--size", "1024x2048", image=photograph)
    assert dry.document(result)["markup"] == upright
    assert dry.warnings(result) == []
    stored = picture("stored.png", "RGBA", (64, 32))
    assert dry.problem(dry.edit(run, *markup, stored, image=photograph)).startswith(
        "markup stored.png"
    )


# Input images.


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("gone.png", None, "No such file", id="missing"),
        pytest.param(".", None, "is a folder", id="folder"),
        pytest.param("x" * 300, None, "File name too long", id="300 bytes"),
        pytest.param("empty.png", b"", "no PNG, JPEG or WebP", id="empty"),
        pytest.param("text.png", b"a fox", "no PNG, JPEG or WebP", id="text"),
        pytest.param("page.svg", b"<svg></svg>", "render it to PNG first", id="svg"),
        pytest.param("a.gif", b"GIF89a\1\0\1\0\0\0\0;", "no PNG, JPEG or WebP", id="gif"),
        pytest.param("head.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "", id="head of a PNG"),
        pytest.param("bare.jpg", b"\xff\xd8\xff\xe0\0\0\xff\xd9", "", id="JPEG without a frame"),
    ],
)
def test_an_input_that_is_no_image_is_refused(
    run: Run, room: str, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    said = dry.problem(dry.edit(run, "--image", name, image=room))
    assert said.startswith(f"image {name} ")
    assert says in said
    by_job = dry.problem(dry.batch(run, {"prompt": "a fox", "image": [room, name]}))
    assert by_job == f"line 1: {said}"


@pytest.mark.parametrize("name", ["photo", "photo.txt", "photo.png", "photo.JPG"])
def test_an_input_is_judged_by_its_bytes_whatever_its_name(run: Run, name: str) -> None:
    Image.new("RGB", (64, 64)).save(name, "JPEG")
    assert dry.document(dry.edit(run, image=name))["image"] == [name]


@pytest.mark.parametrize("trailer", [b"\n", b"SEFT" * 50, b"\0\0\0\x18ftypmp42" * 9])
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp"])
def test_a_picture_with_a_trailer_is_a_picture(run: Run, name: str, trailer: bytes) -> None:
    Path(picture(name)).write_bytes(Path(name).read_bytes() + trailer)
    assert dry.document(dry.edit(run, image=name))["image"] == [name]


@pytest.mark.usefixtures("ordinary_user")
def test_an_input_that_may_not_be_read_is_refused(run: Run) -> None:
    assert "Permission denied" in dry.problem(dry.edit(run, image="secret.png"))


def test_a_pipe_is_no_input_image(run: Run) -> None:
    os.mkfifo("pipe.png")
    assert "image pipe.png is no regular file" in dry.problem(dry.edit(run, image="pipe.png"))


def test_up_to_16_images_are_accepted(run: Run, room: str) -> None:
    rest = ["--image", room] * (MAX_IMAGES - 1)
    assert len(dry.document(dry.edit(run, *rest))["image"]) == MAX_IMAGES == 16
    assert "17 input images; at most 16" in dry.problem(dry.edit(run, *rest, "--image", room))


@pytest.mark.parametrize("role", ["image", "mask"])
def test_a_file_over_50_mb_is_refused(run: Run, room: str, role: str) -> None:
    large = picture("large.png", "RGBA")
    os.truncate(large, 49_000_000)
    dry.documents(dry.edit(run, f"--{role}", large, image=room))
    os.truncate(large, MAX_IMAGE_BYTES + 1)
    said = dry.problem(dry.edit(run, f"--{role}", large, image=room))
    assert said.startswith(f"{role} large.png has 52,428,801 bytes")


@pytest.mark.parametrize(
    ("name", "mode", "size", "says"),
    [
        pytest.param("mask.png", "RGB", (64, 64), "no alpha", id="RGB"),
        pytest.param("mask.png", "L", (64, 64), "no alpha", id="grey"),
        pytest.param("mask.jpg", "RGB", (64, 64), "no alpha", id="JPEG"),
        pytest.param("mask.png", "RGBA", (64, 63), "64x63, the first image 64x64", id="size"),
    ],
)
@pytest.mark.usefixtures("room")
def test_a_mask_without_alpha_or_of_another_size_is_refused(
    run: Run, name: str, mode: str, size: tuple[int, int], says: str
) -> None:
    said = dry.problem(dry.edit(run, "--mask", picture(name, mode, size)))
    assert said.startswith(f"mask {name} ")
    assert says in said


@pytest.mark.parametrize("name", ["gone.png", ".", "jobs.txt"])
@pytest.mark.usefixtures("room")
def test_a_mask_that_is_no_image_is_refused(run: Run, name: str) -> None:
    Path("jobs.txt").write_text("text")
    assert dry.problem(dry.edit(run, "--mask", name)).startswith(f"mask {name} ")


@pytest.mark.usefixtures("room")
def test_a_mask_belongs_to_the_first_image(run: Run) -> None:
    mask, other = picture("mask.png", "RGBA"), picture("other.png", size=(32, 32))
    assert dry.document(dry.edit(run, "--image", other, "--mask", mask))["mask"] == mask
    assert "the first image 32x32" in dry.problem(
        dry.edit(run, "--image", "room.png", "--mask", mask, image=other)
    )


@pytest.mark.parametrize("name", ["upright.png", "upright.jpg"])
def test_a_mask_that_lies_across_its_image_is_refused(run: Run, name: str) -> None:
    mask = picture("mask.png", "RGBA", (64, 32))
    said = dry.problem(dry.edit(run, "--mask", mask, image=picture(name, size=(32, 64))))
    assert "64x32, the first image 32x64" in said


def test_a_mask_may_be_drawn_over_a_photograph_as_it_is_seen(run: Run) -> None:
    photograph = lying_photograph()
    mask = picture("mask.png", "RGBA", (32, 64))
    assert dry.document(dry.edit(run, "--mask", mask, image=photograph))["mask"] == mask


@pytest.mark.parametrize(
    ("name", "bytes_behind", "says"),
    [
        pytest.param("mask.webp", 0, "mask.webp is no PNG", id="no PNG"),
        pytest.param("mask.png", MAX_MASK_BYTES, "less than 4,194,304", id="over 4 MB"),
    ],
)
@pytest.mark.usefixtures("room")
def test_a_mask_that_the_api_may_not_take_is_sent_with_a_warning(
    run: Run, name: str, bytes_behind: int, says: str
) -> None:
    mask = Path(picture(name, "RGBA"))
    mask.write_bytes(mask.read_bytes() + b"\0" * bytes_behind)
    assert any(says in said for said in dry.warnings(dry.edit(run, "--mask", name)))


# Outputs.


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--out", "room.png"), id="file"),
        pytest.param(("--out", "room-web.png", "--n", "2"), id="a variant"),
        pytest.param(("--out", "other.png", "--downscale-max-dim", "9"), id="downscaled copy"),
        pytest.param(
            (
                "--out",
                "dangling.png",
            ),
            id="link to nowhere",
        ),
    ],
)
@pytest.mark.usefixtures("room")
def test_an_output_that_exists_is_refused_without_force(run: Run, flags: tuple[str, ...]) -> None:
    picture("room-web-2.png")
    picture("other-web.png")
    os.symlink("nowhere", "dangling.png")
    said = dry.problem(dry.generate(run, *flags))
    assert " exists; " in said
    assert "--force" in said
    dry.documents(dry.generate(run, *flags, "--force"))


def test_a_batch_of_which_one_output_exists_sends_nothing(run_process: Run, api: ImagesAPI) -> None:
    picture("out/there.png")
    jobs = job_file("a fox", {"prompt": "a cat", "out": "there"}, "a dog")
    before = dry.files()
    result = run_process("generate-batch", "--input", jobs, "--out-dir", "out")
    assert dry.problem(result).startswith("line 2: out/there.png exists")
    assert api.requests == []
    assert dry.files() == before


@pytest.mark.parametrize(
    ("jobs", "twice"),
    [
        pytest.param([{"out": "same"}, {"out": "same"}], "same.png", id="same name"),
        pytest.param([{"out": "same"}, {"out": "same.png"}], "same.png", id="with suffix"),
        pytest.param([{"out": "a/x.png"}, {"out": "b/x.png"}], "x.png", id="other directories"),
        pytest.param([{"out": "x", "n": 2}, {"out": "x-2"}], "x-2.png", id="variant"),
        pytest.param([{}, {"out": "001-a-fox"}], "001-a-fox.png", id="slug of another"),
        pytest.param([{"out": "x"}, {"out": "x-web"}], "x-web.png", id="copy of another"),
        pytest.param([{"out": "x-web"}, {"out": "x"}], "x-web.png", id="copy of a later one"),
    ],
)
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_two_jobs_cannot_make_one_file(
    run: Run, jobs: list[dict[str, Any]], twice: str, force: tuple[str, ...]
) -> None:
    made: list[Job] = [{"prompt": "a fox", **job} for job in jobs]
    told = dry.problems(dry.batch(run, *made, flags=("--downscale-max-dim", "9", *force)))
    (said,) = [each for each in told if f"out/{twice} would be written twice" in each]
    assert "line 1" in said
    assert "line 2" in said


def test_two_names_of_one_folder_do_not_hide_a_collision(run: Run) -> None:
    Path("real").mkdir()
    os.symlink("real", "link")
    picture("real/room.png")
    said = dry.problem(dry.edit(run, "--out", "link/room.png", "--force", image="real/room.png"))
    assert "link/room.png is an input" in said


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--out", "room.png"], id="image"),
        pytest.param(["--out", "./x/../room.png"], id="another spelling"),
        pytest.param(["--out", "second.png"], id="second image"),
        pytest.param(["--out", "mask.png"], id="mask"),
        pytest.param(["--out", "small.png", "--downscale-max-dim", "9"], id="downscaled copy"),
    ],
)
@pytest.mark.usefixtures("room")
def test_an_edit_never_writes_over_its_inputs_even_with_force(run: Run, flags: list[str]) -> None:
    inputs = ["--image", picture("second.png"), "--image", picture("small-web.png")]
    masked = [*inputs, "--mask", picture("mask.png", "RGBA")]
    assert "is an input image" in dry.problem(dry.edit(run, *masked, *flags, "--force"))


def test_a_job_does_not_write_over_the_input_of_another(run: Run) -> None:
    picture("out/room.png")
    jobs = ({"prompt": "a", "image": "out/room.png"}, {"prompt": "b", "out": "room"})
    said = dry.problem(dry.batch(run, *jobs, flags=("--force",)))
    assert said.startswith("line 2: out/room.png is an input image")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--out-dir", "room.png"], id="out-dir"),
        pytest.param(["--out-dir", "room.png/deep/er"], id="parent of out-dir"),
        pytest.param(["--out", "room.png/x.png"], id="parent of out"),
        pytest.param(["--out", "room.png/"], id="trailing slash"),
    ],
)
def test_a_folder_that_is_a_file_is_refused(run: Run, room: str, flags: list[str]) -> None:
    assert f"{room} is a file" in dry.problem(dry.generate(run, *flags))


def test_a_folder_in_the_place_of_a_file_is_refused(run: Run) -> None:
    Path("out/there.png").mkdir(parents=True)
    job = {"prompt": "a fox", "out": "there"}
    assert "out/there.png is a folder" in dry.problem(dry.batch(run, job, flags=("--force",)))


@pytest.mark.parametrize(
    "flags",
    [["--out", "closed/x.png"], ["--out-dir", "closed"], ["--out-dir", "closed/a/b"]],
    ids=str,
)
@pytest.mark.usefixtures("ordinary_user")
def test_a_folder_that_is_not_writable_is_refused(run: Run, flags: list[str]) -> None:
    assert "folder closed is not writable" in dry.problem(dry.generate(run, *flags))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        pytest.param("x" * (MAX_NAME_BYTES - 4) + ".png", True, id="255 bytes"),
        pytest.param("x" * (MAX_NAME_BYTES - 3) + ".png", False, id="256 bytes"),
        pytest.param("狐" * 84 + ".png", False, id="256 bytes in 88 characters"),
        pytest.param("x" * 300 + "/x.png", False, id="folder of 300 bytes"),
        pytest.param("d/" * 2500 + "x.png", False, id="path of 5,000 bytes"),
    ],
)
def test_a_name_that_no_disk_takes_is_refused(run: Run, name: str, *, fits: bool) -> None:
    result = dry.generate(run, "--out", name)
    if fits:
        assert dry.document(result)["outputs"] == [name]
    else:
        assert "bytes" in dry.problem(result)


# What only a live run needs.


@pytest.mark.parametrize(
    ("key", "says"),
    [
        pytest.param("", "OPENAI_API_KEY is not set", id="missing"),
        *(
            pytest.param(key, "OPENAI_API_KEY holds white space", id=name)
            for name, key in {
                "blank inside": "sk-s3cret key",
                "line end": "sk-s3cret\n",
                "tab before": "\tsk-s3cret",
                "letter of no key": "sk-s3crét-s3cret",
                "typographic dash": "sk\u2013s3cret",
                "blanks": "   ",
            }.items()
        ),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(run: Run, key: str, says: str) -> None:
    said = dry.problem(run("generate", "--prompt", "x", env={"OPENAI_API_KEY": key}))
    assert says in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1", "127.0.0.1:80", "http://", "http://127.0.0.1:99999", "http://[::1"]
)
def test_a_base_url_that_nobody_can_ask_is_refused(run: Run, url: str) -> None:
    env = {"OPENAI_API_KEY": "placeholder-key", "OPENAI_BASE_URL": url}
    said = dry.problem(run("generate", "--prompt", "x", env=env))
    assert f'OPENAI_BASE_URL "{url}" has to begin with https:// and a host' in said


@pytest.mark.parametrize("name", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
def test_an_organisation_that_no_header_can_carry_is_refused(run: Run, name: str) -> None:
    env = {"OPENAI_API_KEY": "placeholder-key", name: "örg"}
    assert name in dry.problem(run("generate", "--prompt", "x", env=env))


def test_a_dry_run_needs_no_key(run: Run) -> None:
    dry.document(dry.generate(run))


def without_packages(*argv: str, **environment: str) -> Result:
    """A live run in a Python that has the standard library only."""
    bare = [sys.executable, "-I", "-S", *command(*argv)[1:]]
    return finished(bare, env=os.environ | {"OPENAI_API_KEY": "sk-dummy"} | environment)


@pytest.mark.parametrize(
    ("flags", "packages"), [([], ["openai"]), (["--downscale-max-dim", "9"], ["openai", "pillow"])]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    flags: list[str], packages: list[str]
) -> None:
    told = dry.problems(without_packages("generate", "--prompt", "x", *flags))
    assert len(told) == len(packages)
    for said, package in zip(told, packages, strict=True):
        assert f"the package {package} is missing" in said
        least = OLDEST[package]
        assert f"{least} or newer is needed: " in said
        assert f"-m pip install '{package}>={least}'" in said


def test_key_packages_and_requests_are_told_together(run: Run) -> None:
    told = without_packages("generate", "--prompt", " ", "--n", "11", OPENAI_API_KEY="")
    assert len(dry.messages(told, "Error: ")) == 4
    assert len(dry.problems(run("generate", "--prompt", " ", "--n", "11"))) == 3


def test_a_refusal_says_nothing_of_warnings_that_no_longer_matter(run: Run) -> None:
    assert dry.messages(dry.generate(run, "--model", "gpt-image-9", "--n", "0"), "Warning: ") == []
