"""The dry run: what it prints is what is sent, and printing is all that it does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import live
import pytest
from cli import command, finished
from image_gen import probe_file
from inputs import Json, job_file, mixed_jobs, picture

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI, Request

NOT_SENT = {"endpoint", "outputs", "outputs_downscaled", "job", "image", "mask"}


def assert_sent(shown: Json, request: Request) -> None:
    """The request is, field for field, what the document says; so are its files."""
    assert request.status == 200
    assert request.path == shown["endpoint"]
    assert request.body == {key: value for key, value in shown.items() if key not in NOT_SENT}
    sent = {
        name: [file.data for file in request.files if file.field.removesuffix("[]") == name]
        for name in ("image", "mask")
    }
    masks = [shown["mask"]] if "mask" in shown else []
    assert sent["image"] == [Path(name).read_bytes() for name in shown.get("image", [])]
    assert sent["mask"] == [Path(name).read_bytes() for name in masks]


def assert_written(shown: Json) -> None:
    """The files are there that the document names."""
    for name in (*shown["outputs"], *(shown["outputs_downscaled"] or ())):
        made = probe_file(name)
        assert made is not None
        assert (made.format, made.whole) == (shown["output_format"], True)


def test_the_document_of_a_generation(run: Run) -> None:
    flags = ("--n", "2", "--output-format", "webp", "--output-compression", "80", "--out", "fox")
    result = dry.generate(run, *flags, "--moderation", "low", "--background", "opaque")
    assert result.stdout == (
        "{\n"
        '  "background": "opaque",\n'
        '  "endpoint": "/v1/images/generations",\n'
        '  "model": "gpt-image-2",\n'
        '  "moderation": "low",\n'
        '  "n": 2,\n'
        '  "output_compression": 80,\n'
        '  "output_format": "webp",\n'
        '  "outputs": [\n'
        '    "fox-1.webp",\n'
        '    "fox-2.webp"\n'
        "  ],\n"
        '  "outputs_downscaled": null,\n'
        '  "prompt": "Primary request: a fox",\n'
        '  "quality": "medium",\n'
        '  "size": "auto"\n'
        "}\n"
    )


def test_the_document_of_an_edit(run: Run) -> None:
    flags = ("--mask", picture("mask.png", "RGBA"), "--image", picture("b.webp"))
    assert dry.document(
        dry.edit(run, *flags, "--downscale-max-dim", "9", image=picture("a.jpg"))
    ) == {
        "endpoint": "/v1/images/edits",
        "image": ["a.jpg", "b.webp"],
        "mask": "mask.png",
        "model": "gpt-image-2",
        "n": 1,
        "output_format": "png",
        "outputs": ["output/imagegen/output.png"],
        "outputs_downscaled": ["output/imagegen/output-web.png"],
        "prompt": "Primary request: a fox",
        "quality": "medium",
        "size": "auto",
    }


def test_a_batch_prints_a_document_for_each_job_with_its_number(run: Run) -> None:
    result = dry.batch(run, "a fox", "# no job", {"prompt": "a cat", "n": 2})
    first, second = dry.documents(result)
    assert (first["job"], first["outputs"]) == (1, ["out/001-a-fox.png"])
    assert (second["job"], second["outputs"]) == (2, ["out/002-a-cat-1.png", "out/002-a-cat-2.png"])
    assert result.stdout.count("\n{\n") == 1


def test_with_json_each_document_is_one_line(run: Run) -> None:
    result = dry.batch(run, "a fox", "a\u2028cat 🦊", flags=("--json",))
    lines = result.stdout.removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == dry.documents(
        dry.batch(run, "a fox", "a\u2028cat 🦊")
    )


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("command", ["generate", "generate with all flags"])
def test_a_generation_is_sent_as_it_is_shown(
    run: Run, api: ImagesAPI, command: str, output_format: str
) -> None:
    flags = ["--prompt", 'an "é"\n fox 🦊\u2028', "--output-format", output_format]
    if command != "generate":
        flags += ["--n", "2", "--size", "1024x640", "--quality", "low", "--scene", "fog"]
        flags += ["--moderation", "low", "--background", "opaque", "--model", "gpt-image-2.5-flare"]
        flags += ["--downscale-max-dim", "9"]
        flags += [] if output_format == "png" else ["--output-compression", "0"]
    shown = dry.document(run("generate", *flags, "--dry-run"))
    assert api.requests == []
    assert run("generate", *flags).exit_code == 0
    (request,) = api.requests
    assert_sent(shown, request)
    assert_written(shown)


def test_an_edit_with_two_images_and_a_mask_is_sent_as_it_is_shown(
    run_process: Run, api: ImagesAPI
) -> None:
    Path(picture("wrong.jpg")).rename("photo.png")
    images = ("--image", "photo.png", "--image", picture("b.webp"))
    mask = ("--mask", picture("mask.png", "RGBA"))
    flags = ("edit", *images, *mask, "--prompt", "a fox", "--n", "2", "--moderation", "low")
    shown = dry.document(run_process(*flags, "--dry-run"))
    assert run_process(*flags).exit_code == 0
    (request,) = api.requests
    assert_sent(shown, request)
    assert [file.content_type for file in request.files if file.field != "mask"] == [
        "image/jpeg",
        "image/webp",
    ]
    assert_written(shown)


def test_a_batch_of_mixed_jobs_is_sent_as_it_is_shown(run_process: Run, api: ImagesAPI) -> None:
    jobs = mixed_jobs()
    flags = (
        "--out-dir",
        "out",
        "--concurrency",
        "5",
        "--downscale-max-dim",
        "32",
        "--style",
        "oil",
    )
    argv = ("generate-batch", "--input", job_file(*jobs), *flags)
    shown = dry.documents(run_process(*argv, "--dry-run"))
    assert len(shown) == len(jobs)
    assert not Path("out").exists()

    result = run_process(*argv)
    assert result.exit_code == 0, result.stderr
    requests = {request.prompt: request for request in api.requests}
    assert len(api.requests) == len(requests) == len(jobs)
    for each in shown:
        assert_sent(each, requests[each["prompt"]])
        assert_written(each)
    names = [name for each in shown for name in (*each["outputs"], *each["outputs_downscaled"])]
    assert [f"out/{name}" for name in live.names()] == sorted(names)
    assert api.peak_in_flight <= 5


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["generate", "--prompt", "x", "--out-dir", "new/deep"], id="generate"),
        pytest.param(["edit", "--prompt", "x", "--image", "room.png", "--out", "n/"], id="edit"),
        pytest.param(
            [
                *("generate-batch", "--input", "jobs.jsonl", "--out-dir", "new"),
                *("--contact-sheet", "sheet/all.png", "--downscale-max-dim", "9"),
            ],
            id="generate-batch",
        ),
    ],
)
def test_a_dry_run_needs_no_package_and_no_key_and_leaves_the_disk_alone(argv: list[str]) -> None:
    picture("room.png")
    job_file("a fox", {"prompt": "a cat", "image": "room.png"})
    before = dry.files()
    # Without site-packages; -X importtime names every module that is imported.
    bare = [sys.executable, "-I", "-S", "-X", "importtime", *command(*argv)[1:], "--dry-run"]
    ended = finished(bare, env={})
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.exit_code == 0
    assert '"endpoint"' in ended.stdout
    assert not {"openai", "PIL", "numpy", "asyncio", "socket", "ssl"} & imported
    assert dry.files() == before


def test_a_dry_run_sends_nothing_even_with_a_key(run: Run, api: ImagesAPI) -> None:
    dry.documents(dry.batch(run, "a fox", {"prompt": "a cat", "image": picture("room.png")}))
    assert api.requests == []


def test_a_dry_run_never_shows_the_key(run: Run, api: ImagesAPI) -> None:
    result = dry.generate(run)
    assert os.environ["OPENAI_API_KEY"] not in result.stdout + result.stderr
    assert api.requests == []


@pytest.mark.parametrize("flag", ["--force", "--quiet", "--max-attempts=1", "--timeout=1"])
def test_what_concerns_the_run_alone_changes_nothing_that_is_shown(run: Run, flag: str) -> None:
    assert dry.generate(run, flag).stdout == dry.generate(run).stdout


def test_nothing_is_shown_of_a_batch_of_which_one_job_is_refused(run: Run) -> None:
    result = dry.batch(run, "a fox", {"prompt": "a cat", "n": 11}, "a dog")
    assert (result.exit_code, result.stdout) == (2, "")


def test_warnings_go_to_stderr_and_quiet_keeps_them_back(run: Run) -> None:
    assert len(dry.warnings(dry.generate(run, "--model", "gpt-image-9"))) == 1
    assert dry.generate(run, "--model", "gpt-image-9", "--quiet").stderr == ""


def test_a_job_that_is_done_is_told_on_stderr_and_not_shown(run: Run) -> None:
    picture("out/001-a-fox.png")
    result = dry.batch(run, "a fox", flags=("--skip-existing",))
    assert (result.exit_code, result.stdout) == (0, "")
    said = "1 job: 1 there (1 image not in the manifest), 0 stale, 0 missing"
    assert result.stderr.splitlines() == [said]
