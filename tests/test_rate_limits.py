"""Rate limits are waited out: a pause for all jobs, and then the pace that the server takes."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import RateLimit, rate_limited, server_error

if TYPE_CHECKING:
    from cli import Result, Run
    from images_api import HeaderForm, ImagesAPI


def pauses(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("rate limit: all jobs")]


@pytest.mark.parametrize("code", ["rate_limit_exceeded", "slow_down", "something_new"])
def test_waiting_uses_up_no_attempt(run: Run, api: ImagesAPI, code: str) -> None:
    api.script(*[rate_limited(0.02, code=code)] * 4)
    result = run(*live.generate("--json", "--max-attempts", 1))
    assert result.exit_code == 0
    assert live.statuses(api) == [429] * 4 + [200]
    assert result.json["attempts"] == 1


def test_attempts_are_counted_on_beside_the_waiting(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.02), server_error(headers={"retry-after": "0"}), rate_limited(0.02))
    result = run(*live.generate("--json", "--max-attempts", 2))
    assert result.exit_code == 0
    assert result.json["attempts"] == 2


@pytest.mark.parametrize("form", ["retry-after", "retry-after-ms", "reset"])
def test_the_time_of_the_server_is_waited_for(run: Run, api: ImagesAPI, form: HeaderForm) -> None:
    api.script(rate_limited(0.3, form=form))
    result = run(*live.generate())
    first, second = api.requests
    assert second.started - first.started >= 0.3
    assert len(pauses(result)) == 1
    assert "0.3 s" in pauses(result)[0]


def test_without_a_time_of_the_server_back_off_is_waited_for(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.2)
    api.script(rate_limited(None))
    assert run(*live.generate()).exit_code == 0
    first, second = api.requests
    assert second.started - first.started >= 0.2


def test_a_pause_holds_all_jobs_and_is_told_once(run: Run, api: ImagesAPI) -> None:
    api.script(*[rate_limited(0.3)] * 4)
    released: list[float] = []
    argv = live.batch(8, "--concurrency", 4)
    result = live.run_held(run, api, argv, until=4, act=lambda: released.append(time.monotonic()))
    assert result.exit_code == 0
    assert len(pauses(result)) == 1
    assert live.names() == live.images(*range(1, 9))
    assert live.statuses(api) == [429] * 4 + [200] * 8
    assert all(request.started >= released[0] + 0.3 for request in api.requests[4:])


def test_a_job_gives_up_after_max_wait_and_says_so(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.15), repeat=True)
    result = run(*live.generate("--json", "--max-wait", 0.5))
    assert "--max-wait" in live.error(result)
    assert 2 <= len(api.requests) <= 5
    failure = result.json["error"]
    assert (failure["kind"], failure["retryable"]) == ("rate_limit", True)
    assert failure["code"] == "rate_limit_exceeded"


def test_a_wait_that_is_too_long_is_not_begun(run: Run, api: ImagesAPI) -> None:
    api.script_for("job 1", rate_limited(3600))
    result = run(*live.batch(1, "--max-wait", 5))
    assert "--max-wait" in live.error(result)
    assert len(api.requests) == 1


def test_a_job_does_not_wait_longer_for_the_refusal_of_another(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(3600))
    result = run(*live.batch(3, "--json", "--concurrency", 1, "--max-wait", 0.5))
    assert result.exit_code == 1
    assert len(api.requests) == 1
    assert {line["error"]["kind"] for line in result.json_lines} == {"rate_limit"}


@pytest.mark.parametrize("form", ["retry-after", "reset"])
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(partial(RateLimit, kind="fixed"), id="fixed windows"),
        pytest.param(partial(RateLimit, kind="sliding"), id="sliding window"),
    ],
)
def test_a_limit_that_counts_refusals_is_met_with_few_of_them(
    run: Run, api: ImagesAPI, limit: partial[RateLimit], form: HeaderForm
) -> None:
    api.limit = at = limit(admitted=5, window=0.3, headers=form)
    api.latency = 0.05
    result = run(*live.batch(30, "--json", "--concurrency", 8))
    assert result.exit_code == 0
    assert live.outcomes(result) == ["done"] * 30
    assert len(live.names()) == len(at.admitted_times) == 30
    assert at.refused < 15
    assert 1 <= len(pauses(result)) <= at.refused
    assert {line["attempts"] for line in result.json_lines} == {1}


def test_without_a_limit_no_request_waits_for_another(run: Run, api: ImagesAPI) -> None:
    result = live.run_held(run, api, live.batch(8, "--concurrency", 4), until=4)
    assert result.exit_code == 0
    assert api.peak_in_flight == 4
    assert pauses(result) == live.lines(result) == []


def test_quiet_says_nothing_of_pauses(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.02))
    result = run(*live.generate("--quiet"))
    assert (result.exit_code, result.stderr) == (0, "")


def test_the_pace_is_what_was_taken_between_two_pauses() -> None:
    async def paced() -> float:
        gate = image_gen.RateGate(image_gen.Halt(), 600.0, lambda _delay: None)
        now = 100.0
        gate.clock = lambda: now
        gate.sent, gate.opened_at = 6, 100.0
        gate.refuse(0, 2.0)
        return gate.interval

    assert asyncio.run(paced()) == pytest.approx(2.0 / 5)
