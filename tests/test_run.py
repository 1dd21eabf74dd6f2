"""Batches as a whole, through real processes where that matters."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import image_gen
import live
import pytest
from images_api import moderation_blocked
from inputs import mixed_jobs

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI, Request

FORMATS = ("png", "jpeg", "webp")


def as_sent(request: Request) -> dict[str, Any]:
    """A recorded request as a dry run describes it, without the files."""
    return {**request.body, "endpoint": request.path}


def test_a_batch_of_mixed_jobs_does_what_its_dry_run_says(run_process: Run, api: ImagesAPI) -> None:
    jobs = mixed_jobs()
    argv = live.batch(jobs, "--concurrency", 5, "--downscale-max-dim", 32, "--json")
    shown = run_process(*argv, "--dry-run")
    assert shown.exit_code == 0
    assert api.requests == []
    planned = shown.json_lines
    files = [name for job in planned for name in (*job["outputs"], *job["outputs_downscaled"])]

    result = live.run_held(run_process, api, argv, until=5)
    assert result.exit_code == 0, result.stderr
    assert live.outcomes(result) == ["done"] * len(jobs)
    assert sorted(files) == [f"out/{name}" for name in live.names()]
    assert api.peak_in_flight == 5
    sent = {request.prompt: as_sent(request) for request in api.requests}
    not_in_body = ("outputs", "outputs_downscaled", "job", "image", "mask", "partials")
    for job in planned:
        expected = {key: value for key, value in job.items() if key not in not_in_body}
        assert sent[job["prompt"]] == expected
    for line in result.json_lines:
        job = planned[line["job"] - 1]
        assert [image["path"] for image in line["outputs"]] == job["outputs"]
        copies = [image["path"] for image in line["outputs_downscaled"]]
        assert copies == job["outputs_downscaled"]
        for image in (*line["outputs"], *line["outputs_downscaled"]):
            assert live.size_of(image["path"]) == (image["width"], image["height"])
            assert image["bytes"] == Path(image["path"]).stat().st_size


@pytest.mark.parametrize("name", FORMATS)
def test_one_image_of_each_format_through_a_process(
    run_process: Run, api: ImagesAPI, name: str
) -> None:
    result = run_process(*live.generate(out=f"fox.{name}"))
    assert (result.exit_code, result.stdout) == (0, f"Wrote fox.{name}\n")
    assert live.size_of(f"fox.{name}") == (64, 64)
    assert len(api.requests) == 1


def test_an_existing_output_stops_the_batch_before_any_request(
    run_process: Run, api: ImagesAPI
) -> None:
    Path("out").mkdir()
    Path("out/002-job-2.png").write_text("mine")
    result = run_process(*live.batch(3))
    assert (result.exit_code, result.stdout) == (2, "")
    (problem,) = live.lines(result)
    assert "line 2: " in problem
    assert "out/002-job-2.png exists" in problem
    assert api.requests == []
    assert live.names() == ["002-job-2.png"]


def test_a_refused_job_fails_alone_in_a_process(run_process: Run, api: ImagesAPI) -> None:
    api.script_for("job 2", moderation_blocked())
    result = run_process(*live.batch(3))
    assert live.error(result).startswith("line 2: ")
    assert live.names() == live.images(1, 3)
    assert sorted(result.stdout.splitlines()) == [f"Wrote out/{name}" for name in live.images(1, 3)]


@pytest.mark.parametrize("concurrency", [1, 3, 25])
def test_as_many_requests_are_in_flight_as_asked_for(
    run: Run, api: ImagesAPI, concurrency: int
) -> None:
    argv = live.batch(30, "--concurrency", concurrency)
    assert live.run_held(run, api, argv, until=concurrency).exit_code == 0
    assert api.peak_in_flight == concurrency
    assert len(live.names()) == 30


def test_downscaling_does_not_hold_up_requests(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = threading.Event()

    def slow(*arguments: Any) -> bytes:  # noqa: ANN401
        seen.set()
        api.wait_for_answers(6)  # a copy waits here until all requests have been answered
        return downscale(*arguments)

    downscale = image_gen.downscale
    monkeypatch.setattr(image_gen, "downscale", slow)
    result = run(*live.batch(6, "--concurrency", 2, "--downscale-max-dim", 32))
    assert result.exit_code == 0
    assert seen.is_set()
    assert len(live.names()) == 12


def test_answers_do_not_pile_up_behind_the_disk(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaved: list[int] = []
    saved: list[int] = []

    def slow(job: image_gen.Job, answer: image_gen.Answer, **more: Any) -> image_gen.Delivery:  # noqa: ANN401
        # Three jobs a slot are under way; nothing is saved before so many have been sent.
        api.wait_for_requests(min(30, len(saved) + 6))
        unsaved.append(len(api.requests) - len(saved))
        delivery = save(job, answer, **more)
        saved.append(job.number)
        return delivery

    save = image_gen.save_answer
    monkeypatch.setattr(image_gen, "save_answer", slow)
    result = run(*live.batch(30, "--concurrency", 2))
    assert result.exit_code == 0
    assert max(unsaved) == 6


def test_a_bug_in_one_job_does_not_take_the_others_along(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: image_gen.Job, answer: image_gen.Answer, **more: Any) -> image_gen.Delivery:  # noqa: ANN401
        if job.number == 2:
            raise ZeroDivisionError
        return save(job, answer, **more)

    save = image_gen.save_answer
    monkeypatch.setattr(image_gen, "save_answer", broken)
    # A bug stops the run: what is in flight is finished, so all of it has to be.
    result = live.run_held(run, api, live.batch(3, "--json"), until=3)
    assert result.exit_code == 1
    assert live.outcomes(result) == ["done", "failed", "done"]
    assert len(api.requests) == 3
    failed = next(line for line in result.json_lines if line["job"] == 2)
    assert failed["error"]["kind"] == "internal"
    kept = Path("out/002-job-2.png.answer")
    assert str(kept) in failed["error"]["message"]
    assert b"b64_json" in kept.read_bytes()


def test_a_bug_behind_an_answer_is_told_once_and_buys_nothing_more(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: image_gen.Job, answer: image_gen.Answer, **_: object) -> image_gen.Delivery:
        raise ZeroDivisionError(f"{job.number}, {len(answer.items)}")

    monkeypatch.setattr(image_gen, "save_answer", broken)
    result = run(*live.batch(12, "--json", "--concurrency", 2))
    assert result.exit_code == 1
    assert result.stderr.count("Traceback") == 1
    assert len(api.requests) < 8
    kept = list(Path("out").glob("*.png.answer"))
    assert len(kept) == len(api.requests)
    assert live.outcomes(result).count("not_sent") == 12 - len(kept)


def test_a_large_batch_is_run_to_its_end(run: Run, api: ImagesAPI) -> None:
    result = run(*live.batch(150, "--concurrency", 25, "--quiet"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(live.names()) == len(api.requests) == 150
    assert len(result.stdout.splitlines()) == 150
