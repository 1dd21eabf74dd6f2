"""The same command, repeated with --skip-existing until it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import live
import pytest
from images_api import fewer_images, moderation_blocked, no_data, server_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Run
    from images_api import ImagesAPI
    from inputs import Job

RESUME = "--skip-existing"
VARIANTS = [{"prompt": "kites", "n": 3, "out": "kite"}]


def contents(folder: str = "out") -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in live.names(folder)}


def test_jobs_whose_files_are_there_are_skipped_at_no_cost(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(2))
    before = contents()
    result = run(*live.batch(2, RESUME, "--json"))
    assert result.exit_code == 0
    assert live.outcomes(result) == ["skipped"] * 2
    assert len(api.requests) == 2
    assert contents() == before
    for line in result.json_lines:
        assert (line["attempts"], line["usage"], line["error"]) == (0, None, None)
        assert len(line["outputs"]) == 1
    assert result.stderr.splitlines()[0] == "2 jobs: 2 there, 0 stale, 0 missing"
    assert "2 jobs: 2 skipped; 0 images" in result.stderr


def test_only_the_jobs_without_files_are_sent(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(2))
    result = run(*live.batch(4, RESUME, "--json"))
    assert live.outcomes(result) == ["skipped"] * 2 + ["done"] * 2
    assert len(api.requests) == 4
    assert live.names() == live.images(1, 2, 3, 4)


@pytest.mark.parametrize(
    "missing", [(1,), (2,), (3,), (1, 3), (1, 2, 3)], ids=lambda numbers: f"missing {numbers}"
)
def test_missing_variants_alone_are_asked_for_and_keep_their_names(
    run: Run, api: ImagesAPI, missing: tuple[int, ...]
) -> None:
    run(*live.batch(VARIANTS))
    for number in missing:
        Path(f"out/kite-{number}.png").unlink()
    kept = contents()
    result = run(*live.batch(VARIANTS, RESUME, "--json"))
    assert result.exit_code == 0
    assert api.requests[-1].body["n"] == len(missing)
    assert live.names() == ["kite-1.png", "kite-2.png", "kite-3.png"]
    assert contents() | kept == contents()
    assert [image["path"] for image in result.json["outputs"]] == [f"out/{n}" for n in live.names()]


def truncated(data: bytes) -> bytes:
    return data[:-20]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncated, id="cut off"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda data: data[:20], id="only a head"),
    ],
)
@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_broken_file_is_made_again(
    run: Run, api: ImagesAPI, name: str, damage: Callable[[bytes], bytes]
) -> None:
    argv = live.generate(out=f"fox.{name}")
    run(*argv)
    file = Path(f"fox.{name}")
    file.write_bytes(damage(file.read_bytes()))
    assert run(*argv, RESUME).exit_code == 0
    assert live.size_of(file) == (64, 64)
    assert len(api.requests) == 2
    assert live.names(".") == [f"fox.{name}"]


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_file_that_is_no_image_is_refused_and_stays(run: Run, api: ImagesAPI, name: str) -> None:
    argv = live.generate(out=f"fox.{name}")
    run(*argv)
    Path(f"fox.{name}").write_bytes(b"<html>")
    refused = run(*argv, RESUME)
    assert (refused.exit_code, refused.stdout, len(api.requests)) == (2, "", 1)
    remedy = "move it away, choose another name, or --force to replace it"
    assert live.lines(refused) == [f"fox.{name} is no whole {name}; {remedy}"]
    assert Path(f"fox.{name}").read_bytes() == b"<html>"
    assert run(*argv, "--force").exit_code == 0
    assert live.size_of(f"fox.{name}") == (64, 64)
    assert live.names(".") == [f"fox.{name}"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(Path.unlink, id="missing"),
        pytest.param(lambda path: path.write_bytes(truncated(path.read_bytes())), id="cut off"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    ],
)
def test_copies_are_made_again_from_the_originals_without_a_request(
    run: Run, api: ImagesAPI, damage: Callable[[Path], Any]
) -> None:
    flags = ("--downscale-max-dim", 32)
    run(*live.batch(2, *flags))
    before = contents()
    damage(Path("out/002-job-2-web.png"))
    result = run(*live.batch(2, *flags, RESUME, "--json"))
    assert result.exit_code == 0
    assert len(api.requests) == 2
    assert contents() == before
    copies = [line["outputs_downscaled"] for line in result.json_lines]
    assert [len(found) for found in copies] == [1, 1]


def test_copies_can_be_asked_for_afterwards(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(2))
    assert run(*live.batch(2, "--downscale-max-dim", 16, RESUME)).exit_code == 0
    assert len(api.requests) == 2
    assert live.size_of("out/001-job-1-web.png") == (16, 16)


def test_the_same_command_ends_with_0_at_last(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = ["job 1", {"prompt": "job 2", "n": 3}, "job 3", "job 4"]
    api.script_for("job 2", fewer_images(1), fewer_images(1))
    api.script_for("job 3", no_data(), moderation_blocked())
    api.script_for("job 4", server_error(headers={"retry-after": "0"}))
    argv = live.batch(jobs, RESUME, "--max-attempts", 1)
    codes = [run(*argv).exit_code for _ in range(4)]
    assert codes == [1, 1, 0, 0]
    sent = [request.body["n"] for request in api.requests if request.prompt.endswith("job 2")]
    assert sent == [3, 2, 1]
    assert [request.prompt[-1] for request in api.requests].count("1") == 1
    variants = [f"002-job-2-{number}.png" for number in (1, 2, 3)]
    answers = [f"{name}.answer" for name in ("002-job-2-2.png", "002-job-2-3.png", "003-job-3.png")]
    assert live.names() == sorted([*live.images(1, 3, 4), *variants, *answers])
    kept = [json.loads(Path("out", name).read_bytes()) for name in answers]
    assert [len(answer.get("data", ())) for answer in kept] == [1, 1, 0]


def test_a_failed_job_of_variants_says_what_is_there_already(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(VARIANTS))
    Path("out/kite-2.png").unlink()
    api.script(moderation_blocked())
    result = run(*live.batch(VARIANTS, RESUME, "--json"))
    assert live.error(result)
    there = [image["path"] for image in result.json["outputs"]]
    assert there == ["out/kite-1.png", "out/kite-3.png"]


def test_a_single_command_is_skipped_too(run: Run, api: ImagesAPI) -> None:
    run(*live.generate())
    result = run(*live.generate(RESUME))
    assert (result.exit_code, result.stdout) == (0, "")
    assert len(api.requests) == 1
    assert "skipped" in result.stderr


def test_a_dry_run_shows_what_is_still_to_be_sent(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(2))
    result = run(*live.batch(3, RESUME, "--dry-run", "--json"))
    assert result.exit_code == 0
    assert [document["job"] for document in result.json_lines] == [3]
    assert len(api.requests) == 2


def test_it_excludes_force(run: Run, api: ImagesAPI) -> None:
    result = run(*live.batch(1, RESUME, "--force"))
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert api.requests == []


def test_other_files_of_the_folder_stay_as_they_are(run: Run, api: ImagesAPI) -> None:
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    result = run(*live.batch(1, RESUME))
    assert (result.exit_code, live.lines(result)) == (0, [])
    assert contents()["notes.txt"] == b"mine"
    assert len(api.requests) == 1
