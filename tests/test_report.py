"""What is said: results on stdout, progress on stderr, and --json as a contract."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import image_gen
import live
import pytest
from cli import command, started
from images_api import KEY, document, html, moderation_blocked, rate_limited, status, unauthorized

if TYPE_CHECKING:
    from cli import Run, Start
    from images_api import ImagesAPI, Reply

IMAGE_KEYS = {"path", "bytes", "width", "height", "format", "alpha"}
ERROR_KEYS = {"kind", "code", "message", "retryable", "maybe_billed"}
KEYS = {
    *("job", "line", "status", "title", "prompt", "endpoint", "model", "planned", "partials"),
    *("outputs", "outputs_kept", "outputs_downscaled", "mask_share"),
    *("attempts", "seconds", "request_id", "usage", "cost_usd", "size", "quality"),
    *("warnings", "error"),
}


@pytest.fixture
def one_of_each(run: Run, api: ImagesAPI) -> dict[str, dict[str, Any]]:
    """The lines of a job that is done, one that fails and one that is not sent, by status."""
    api.script_for("job 2", unauthorized())
    result = run(*live.batch(3, "--json", "--concurrency", 1, "--downscale-max-dim", 32))
    assert result.exit_code == 4
    return {line["status"]: line for line in result.json_lines}


def test_every_line_has_every_key(one_of_each: dict[str, dict[str, Any]]) -> None:
    assert set(one_of_each) == {"done", "failed", "not_sent"}
    for line in one_of_each.values():
        assert set(line) == KEYS
        assert line["endpoint"] == "/v1/images/generations"
        assert line["model"] == "gpt-image-2"
        assert line["prompt"] == f"Primary request: {line['title']}"
        assert line["title"] == f"job {line['job']}"
        assert line["line"] == line["job"]
        assert line["planned"] == [f"out/00{line['job']}-job-{line['job']}.png"]


def test_a_job_that_is_done_records_its_images(
    one_of_each: dict[str, dict[str, Any]], api: ImagesAPI
) -> None:
    line = one_of_each["done"]
    (image,), (copy,) = line["outputs"], line["outputs_downscaled"]
    assert set(image) - {"origin"} == set(copy) == IMAGE_KEYS
    size = os.path.getsize("out/001-job-1.png")
    facts = {"path": "out/001-job-1.png", "bytes": size, "width": 64, "height": 64}
    assert image == facts | {"format": "png", "alpha": False, "origin": "new"}
    assert (copy["path"], copy["width"]) == ("out/001-job-1-web.png", 32)
    assert line["request_id"] == api.requests[0].request_id
    assert (line["size"], line["quality"]) == ("64x64", "medium")
    assert line["usage"]["total_tokens"] > 0
    assert line["usage"]["input_tokens_details"]["image_tokens"] == 0
    assert (line["attempts"], line["error"], line["warnings"]) == (1, None, [])
    assert line["seconds"] > 0


def test_a_job_that_failed_or_was_not_sent_records_why(
    one_of_each: dict[str, dict[str, Any]], api: ImagesAPI
) -> None:
    failed, skipped = one_of_each["failed"], one_of_each["not_sent"]
    for line in (failed, skipped):
        assert set(line["error"]) == ERROR_KEYS
        assert line["outputs"] == line["outputs_downscaled"] == []
        assert line["usage"] is line["size"] is line["quality"] is None
    assert (failed["attempts"], skipped["attempts"]) == (1, 0)
    assert failed["request_id"] == api.requests[1].request_id
    assert skipped["request_id"] is None
    assert failed["error"]["code"] == "invalid_api_key"


def test_alpha_is_recorded(run: Run, api: ImagesAPI) -> None:
    flags = ("--background", "transparent", "--model", "gpt-image-2.5-flare", "--json")
    (image,) = run(*live.generate(*flags)).json["outputs"]
    assert image["alpha"] is True
    assert len(api.requests) == 1


def test_a_line_is_written_as_soon_as_its_job_ends(start_process: Start, api: ImagesAPI) -> None:
    api.hold()
    process = start_process(*live.batch(2, "--json", "--concurrency", 2))
    api.wait_for_requests(2)
    api.release(1)
    assert process.stdout
    first = json.loads(process.stdout.readline())  # the other job is still in flight
    assert first["status"] == "done"
    api.release()
    assert json.loads(process.communicate()[0])["job"] == 3 - first["job"]


def test_a_prompt_of_any_characters_stays_one_line(run: Run, api: ImagesAPI) -> None:
    prompt = 'a "fox"\nby\u2028night 🦊\x85'
    (line,) = run(*live.generate("--json", "--no-augment", prompt=prompt)).json_lines
    assert line["prompt"] == api.requests[0].prompt == prompt.strip()


def test_stdout_has_nothing_but_results(run: Run, api: ImagesAPI) -> None:
    api.script_for("job 2", moderation_blocked())
    result = run(*live.batch(3, "--downscale-max-dim", 32))
    assert sorted(result.stdout.splitlines()) == [f"Wrote out/{name}" for name in live.names()]


def test_without_a_terminal_failures_and_a_summary_are_all_that_is_said(
    run: Run, api: ImagesAPI
) -> None:
    api.script_for("job 2", moderation_blocked())
    result = run(*live.batch(3, "--json"))
    cost, *said = result.stderr.splitlines()
    assert cost.startswith("about $")
    assert said[0] == f"Error: {live.error(result)}"
    assert said[0].startswith("Error: line 2: ")
    tokens = sum((record["usage"] or {}).get("total_tokens", 0) for record in result.json_lines)
    assert said[1].startswith(
        f"3 jobs: 2 done, 1 failed (moderation); 2 images, {tokens:,} tokens, "
    )
    assert said[2].startswith(
        "After the refused job has been changed or removed: repeat the command"
    )
    assert len(said) == 3


def test_without_a_terminal_a_long_run_tells_now_and_then_how_it_stands(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_gen, "PROGRESS_SECONDS", 0.02)
    api.script_for("job 1", moderation_blocked())
    told = threading.Event()
    note = image_gen.Report.note

    def listen(report: image_gen.Report, line: str) -> None:
        note(report, line)
        if line.startswith("1/3 done · 2 in flight · 1 failed · about "):
            told.set()

    monkeypatch.setattr(image_gen.Report, "note", listen)
    api.hold()

    def let_go() -> None:
        api.wait_for_requests(3)
        api.release(1)
        told.wait(20)
        api.release()

    releaser = threading.Thread(target=let_go)
    releaser.start()
    result = run(*live.batch(3, "--concurrency", 3))
    releaser.join()
    assert told.is_set(), result.stderr
    _, *said = result.stderr.splitlines()  # the first line is what it costs
    assert all(" in flight" in line or "job" in line for line in said)


def test_quiet_leaves_errors_only(run: Run, api: ImagesAPI) -> None:
    api.script_for("job 2", moderation_blocked())
    result = run(*live.batch(3, "--quiet"))
    assert len(result.stdout.splitlines()) == 2
    assert [line[:7] for line in result.stderr.splitlines()] == ["Error: "]


def test_without_a_terminal_there_are_no_control_characters(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.05), status(400, "bad\r\x1b[2J\x07news"), repeat=False)
    result = run(*live.batch(4, "--json"))
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stderr + result.stdout) is None


def on_a_terminal(argv: list[str], api: ImagesAPI, until: str) -> tuple[str, int]:
    """What a terminal receives from the CLI; requests are held until it has shown a text."""
    ours, theirs = os.openpty()
    with started(command(*argv), stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = ""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 4096):
                shown += chunk.decode()
                if re.search(until, shown):
                    api.release()
        os.close(ours)
        return shown, process.wait()


def test_a_terminal_gets_a_status_line_that_is_kept_up_to_date(api: ImagesAPI) -> None:
    api.script_for("job 1", moderation_blocked())
    api.script_for("job 2", rate_limited(2))  # the status line is written twice a second
    api.hold()
    argv = live.batch(3, "--concurrency", 3)
    shown, code = on_a_terminal(argv, api, until="3 in flight")
    assert code == 4
    for part in (r"\d/3 done", "in flight", "1 failed", r"rate limit: \d", "left"):
        assert re.search(part, shown), shown
    lines_ = [line.rsplit("\r\x1b[K", 1)[-1] for line in shown.split("\n")]
    assert any(line.startswith("3 jobs: 2 done, 1 failed (moderation)") for line in lines_)
    assert any(re.match(r"\[\d/3\] .* s out/003-job-3\.png", line) for line in lines_)
    assert len(live.names()) == 2


def test_quiet_has_no_status_line_on_a_terminal(api: ImagesAPI) -> None:
    shown, code = on_a_terminal(live.batch(2, "--quiet"), api, until="$^")
    assert (shown, code) == ("", 0)


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "JSON"])
def test_a_reader_of_stdout_that_goes_loses_no_image(
    start_process: Start, api: ImagesAPI, flags: tuple[str, ...]
) -> None:
    process = start_process(*live.batch(5, "--concurrency", 2, *flags))
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    said = process.stderr.read()
    assert process.wait() == 0
    assert "Traceback" not in said
    assert "BrokenPipe" not in said
    assert live.names() == live.images(1, 2, 3, 4, 5)
    assert len(api.requests) == 5


def test_a_reader_of_stderr_that_goes_loses_no_image(start_process: Start, api: ImagesAPI) -> None:
    process = start_process(*live.batch(5, "--concurrency", 2))
    assert process.stderr
    process.stderr.close()
    assert process.stdout
    assert len(process.stdout.read().splitlines()) == 5
    process.wait()
    assert live.names() == live.images(1, 2, 3, 4, 5)
    assert len(api.requests) == 5


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(status(400, f"Bad header: Bearer {KEY}"), id="400"),
        pytest.param(status(401, f"Incorrect API key provided: {KEY}."), id="401"),
        pytest.param(rate_limited(0.5, headers={"x-key": KEY}), id="429"),
        pytest.param(status(500, f"Authorization: Bearer {KEY}"), id="500"),
        pytest.param(status(400, "no", code=KEY), id="code"),
        pytest.param(status(400, f"{'x' * 590}{KEY}"), id="where the message is cut"),
        pytest.param(document(lambda d: d.update(size=KEY, quality=KEY)), id="size"),
        pytest.param(document(lambda d: d.update(usage={"note": KEY})), id="usage"),
        pytest.param(document(lambda d: d.update(data=[{"b64_json": KEY + "%"}])), id="image"),
        pytest.param(document(lambda d: d.update({KEY: 1, "data": []})), id="no image"),
        pytest.param(html(200), id="HTML"),
    ],
)
def test_the_key_appears_nowhere(run: Run, api: ImagesAPI, reply: Reply) -> None:
    api.script(reply, repeat=True)
    flags = ("--max-attempts", 1, "--max-wait", 0.3)
    for extra in ((), ("--json",)):
        result = run(*live.batch(2, *flags, *extra, "--force"))
        said = result.stdout + result.stderr
        assert KEY not in said
        assert KEY[:12] not in said
        assert all(request.key_as_expected for request in api.requests)


def test_a_prompt_that_holds_the_key_does_not_bring_it_into_the_manifest(
    run: Run, api: ImagesAPI
) -> None:
    result = run(*live.generate("--json", prompt=f"a fox {KEY}"))
    assert KEY not in result.stdout + result.stderr
    assert len(api.requests) <= 1


@pytest.mark.parametrize(
    "usage",
    [None, [], "many", {}, {"total_tokens": "many"}, {"total_tokens": None}, {"total_tokens": 1.5}],
    ids=repr,
)
def test_usage_of_any_shape_ends_no_run(run: Run, api: ImagesAPI, usage: object) -> None:
    api.script_for("job 1", document(lambda content: content.update(usage=usage)))
    result = run(*live.batch(2, "--json"))
    assert result.exit_code == 0
    assert live.lines(result) == []
    assert live.outcomes(result) == ["done", "done"]
    recorded = next(line["usage"] for line in result.json_lines if line["job"] == 1)
    assert recorded == (usage if isinstance(usage, dict) else None)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (60, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (3599.9, "1 h 0 min 0 s"),
        (3725, "1 h 2 min 5 s"),
    ],
)
def test_a_duration_is_said_as_people_do(seconds: float, said: str) -> None:
    assert image_gen.duration(seconds) == said
