"""The one retry rule: what uses up an attempt, what is only waited out, and when it ends."""

from __future__ import annotations

import random

import image_gen
import pytest
from image_gen import Failure, JobError, Patience, RunOptions, Verdict

AWAY = Verdict("retry", Failure("server", "away", retryable=True), advised=2.0)
BUSY = Verdict("wait", Failure("rate_limit", "busy", retryable=True), advised=3.0)
OPTIONS = RunOptions(max_attempts=2, max_wait=10.0)


def waits(patience: Patience, *verdicts: Verdict) -> list[float]:
    """What is waited after requests that have ended so."""
    found = []
    for verdict in verdicts:
        patience.begin()
        delay = patience.after(verdict)
        patience.spend(delay)
        found.append(delay)
    return found


def ends(patience: Patience, *verdicts: Verdict) -> JobError:
    with pytest.raises(JobError) as caught:
        waits(patience, *verdicts)
    return caught.value


def test_a_failure_uses_up_an_attempt() -> None:
    patience = Patience(OPTIONS)
    assert waits(patience, AWAY) == [2.0]
    assert ends(patience, AWAY).failure == AWAY.failure
    assert (patience.attempts, patience.requests) == (2, 2)


def test_a_refusal_for_the_rate_uses_up_time_alone() -> None:
    patience = Patience(OPTIONS)
    assert waits(patience, BUSY, BUSY, BUSY) == [3.0, 3.0, 3.0]
    assert (patience.attempts, patience.requests, patience.seconds) == (0, 3, 1.0)
    ended = ends(patience, BUSY)
    assert ended.failure.message == "gave up, --max-wait is spent: busy"
    assert (ended.action, ended.failure.retryable) == ("fail", True)


def test_what_is_hopeless_ends_at_once_and_says_what_it_means_for_others() -> None:
    lasting = Verdict("stop run", Failure("quota", "no money"))
    ended = ends(Patience(OPTIONS), lasting)
    assert (ended.failure, ended.action) == (lasting.failure, "stop run")


def test_an_endless_one_is_ended_by_time_alone() -> None:
    patience = Patience(OPTIONS, endless=True)
    assert waits(patience, *[AWAY] * 5) == [2.0] * 5
    assert "--max-wait" in ends(patience, AWAY).failure.message


def test_one_that_is_spent_before_anything_was_answered_names_the_rate_limit() -> None:
    with pytest.raises(JobError) as caught:
        Patience(OPTIONS).allow(10.5)
    assert caught.value.failure.kind == "rate_limit"


def test_thousands_of_requests_wait_no_longer_than_the_longest_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(random, "uniform", lambda _low, high: high)
    verdict = AWAY._replace(advised=None)
    assert image_gen.retry_delay(verdict, 5000) == image_gen.MAX_BACK_OFF_SECONDS
