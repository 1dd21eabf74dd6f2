"""A run that buys nothing comes to its end; one that can go on does."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import live
import pytest
from cli import command
from images_api import (
    Answer,
    Failure,
    always,
    answer_lost,
    no_answer,
    ok,
    rate_limited,
    server_error,
    status,
)
from inputs import picture

if TYPE_CHECKING:
    from cli import Run, Start
    from images_api import ImagesAPI, Reply
    from inputs import Job

NOWHERE = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "sk-test-0123456789"}


def test_a_run_that_reaches_nobody_says_so_once(run: Run) -> None:
    result = run(*live.batch(60, "--json"), env=NOWHERE)
    assert result.exit_code == 1
    assert set(live.outcomes(result)) == {"skipped"}
    (said,) = live.lines(result)
    assert said.startswith("60 jobs not done: no connection to 127.0.0.1 came about")
    assert "references/codex-network.md" in said
    assert len(result.stderr.splitlines()) <= 5


def test_lost_answers_in_a_row_end_the_run(run: Run, api: ImagesAPI) -> None:
    api.script(answer_lost(), repeat=True)
    result = run(*live.batch(30, "--concurrency", 2, "--json"))
    assert result.exit_code == 1
    # Three while as many as may be in flight, then three one by one.
    assert len(api.requests) == 6
    assert "going on with one request at a time" in result.stderr
    assert live.outcomes(result).count("skipped") >= 27
    assert any("6 requests in a row may have been billed" in line for line in live.lines(result))


def test_lost_answers_with_images_in_between_do_not(run: Run, api: ImagesAPI) -> None:
    api.script(*[answer_lost(), answer_lost(), ok()] * 8)
    assert run(*live.batch(8, "--concurrency", 1)).exit_code == 0
    assert len(api.requests) == 24


def test_a_careful_run_sends_one_request_at_a_time_and_recovers(run: Run, api: ImagesAPI) -> None:
    api.script(*[status(524)] * 4)
    result = run(*live.batch(8, "--concurrency", 4, "--max-attempts", 9))
    assert result.exit_code == 0
    assert "going on with one request at a time" in result.stderr
    assert len(api.requests) == 12


def test_a_rate_limit_that_takes_nothing_ends_the_run(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.05), repeat=True)
    result = run(*live.batch(40, "--concurrency", 2, "--max-wait", 0.2, "--json"))
    assert result.exit_code == 1
    assert len(api.requests) < 40
    assert live.outcomes(result).count("skipped") >= 36
    assert any("nothing at all was accepted for --max-wait" in line for line in live.lines(result))


JUDGED: dict[str, tuple[Reply, str, int]] = {
    "402": (status(402, "Out of credit."), "quota", 1),
    "a relay without credit": (status(403, "Out.", code="insufficient_user_quota"), "quota", 1),
    "404 of the route": (status(404, "Not Found"), "address", 1),
    "404 of the model": (status(404, "No model.", code="model_not_found"), "unknown_model", 1),
    "520": (status(520), "server", 2),
    "a server that wants no retry": (
        server_error(headers={"x-should-retry": "false"}),
        "server",
        1,
    ),
}


@pytest.mark.parametrize(("reply", "kind", "requests"), JUDGED.values(), ids=JUDGED)
def test_an_answer_is_judged(
    run: Run, api: ImagesAPI, reply: Reply, kind: str, requests: int
) -> None:
    api.script(reply, repeat=True)
    result = run(*live.generate("--json", "--max-attempts", 2))
    assert (result.json["error"]["kind"], len(api.requests)) == (kind, requests)
    assert result.json["error"]["maybe_billed"] is (kind == "server" and requests == 2)


def test_the_address_of_a_route_that_is_not_there_is_named(run: Run, api: ImagesAPI) -> None:
    api.script(status(404, "Not Found"), repeat=True)
    result = run(*live.batch(5, "--concurrency", 1))
    assert len(api.requests) == 1
    for word in ("OPENAI_BASE_URL", f"POST {api.base_url}/images/generations"):
        assert word in result.stderr
    assert "--model" not in result.stderr


def redirect(number: int, location: str) -> Reply:
    return always(replace(Answer.of(b"", status=number), headers={"location": location}))


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_not_followed(
    run: Run, api: ImagesAPI, number: int
) -> None:
    other = "http://127.0.0.1:9/v1/images/generations"
    api.script(redirect(number, other))
    said = live.error(run(*live.generate()))
    assert (len(api.requests), f"redirected to {other}" in said) == (1, True)
    assert "OPENAI_BASE_URL" in said


def test_a_date_to_come_back_counts_from_the_date_of_the_answer(run: Run, api: ImagesAPI) -> None:
    dates = {
        "retry-after": "Wed, 25 Nov 2015 10:00:01 GMT",
        "date": "Wed, 25 Nov 2015 10:00:00 GMT",
    }
    limited = rate_limited(0)
    assert isinstance(limited, Failure)
    api.script(replace(limited, headers=dates))
    assert "all jobs wait 1.0 s" in run(*live.generate()).stderr


def test_an_input_that_became_a_pipe_fails_its_job_and_holds_up_no_other(
    run: Run, api: ImagesAPI
) -> None:
    picture("room.png")

    def swap() -> None:
        Path("room.png").unlink()
        os.mkfifo("room.png")

    jobs: list[Job] = ["first", {"prompt": "edit it", "image": "room.png"}, "last"]
    argv = live.batch(jobs, "--concurrency", 1, "--json")
    result = live.run_held(run, api, argv, act=swap)
    assert live.outcomes(result) == ["done", "failed", "done"]
    assert "room.png is no regular file any more" in live.error(result)


# ------------------------------------------------------------------------------------ signals


def said_by(process: subprocess.Popen[str], words: str) -> str:
    """The next line of stderr that has these words."""
    assert process.stderr
    return next(line for line in process.stderr if words in line)


def test_a_terminal_that_closes_does_not_lose_what_is_in_flight(
    start_process: Start, api: ImagesAPI
) -> None:
    api.hold()
    process = start_process(*live.batch(6, "--concurrency", 2))
    api.wait_for_requests(2)
    process.send_signal(signal.SIGHUP)
    said_by(process, "Interrupted: 2 requests in flight")
    api.release()
    assert process.wait() == 130
    assert live.names() == live.images(1, 2)


def test_a_signal_that_was_ignored_stays_ignored(api: ImagesAPI) -> None:
    api.hold()
    argv = command(*live.batch(2, "--concurrency", 1))
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *argv]
    with subprocess.Popen(shell, stderr=subprocess.PIPE, text=True) as process:
        api.wait_for_requests(1)
        process.send_signal(signal.SIGHUP)
        api.release()
        assert process.wait(60) == 0
    assert live.names() == live.images(1, 2)


def test_an_interruption_counts_what_is_on_the_wire_only(
    start_process: Start, api: ImagesAPI
) -> None:
    api.script_for("job 1", no_answer())
    api.script_for("job 2", server_error(headers={"retry-after": "60"}))
    process = start_process(*live.batch(2, "--concurrency", 2))
    said_by(process, "line 2: ")
    api.wait_for_requests(2)
    process.send_signal(signal.SIGINT)
    said_by(process, "Interrupted: 1 request in flight")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
