"""Sending: what goes out, what is sent again and what is not, and what stops the run."""

from __future__ import annotations

import re
import time
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import image_gen
import live
import pytest
from images_api import (
    PATIENCE,
    answer_cut,
    answer_lost,
    connection_closed,
    forbidden,
    html,
    insufficient_quota,
    moderation_blocked,
    no_answer,
    rate_limited,
    server_error,
    status,
    unauthorized,
    unknown_model,
)
from inputs import FLARE, as_flags, picture

if TYPE_CHECKING:
    from cli import Run, Start
    from images_api import ImagesAPI, Reply

NO_MONEY = sorted(image_gen.NO_MONEY_CODES)


# What is sent.


def test_requests_are_sent_with_the_variables_of_the_sdk(run: Run, api: ImagesAPI) -> None:
    account = {"OPENAI_ORG_ID": "org-fox", "OPENAI_PROJECT_ID": "proj-den"}
    assert run(*live.generate(), env=account).exit_code == 0
    (request,) = api.requests
    assert request.key_as_expected
    assert request.headers["openai-organization"] == "org-fox"
    assert request.headers["openai-project"] == "proj-den"


def test_an_edit_sends_its_files_in_order_and_byte_for_byte(
    run_process: Run, api: ImagesAPI
) -> None:
    sent = [picture("room.png"), picture("chair.jpg"), picture("mask.png", "RGBA")]
    words = ["--image", "room.png", "--image", "chair.jpg", "--mask", "mask.png"]
    result = run_process("edit", *words, "--prompt", "a fox", "--out", "fox.png")
    assert result.exit_code == 0, result.stderr
    (request,) = api.requests
    assert [file.field for file in request.files] == ["image[]", "image[]", "mask"]
    assert [file.data for file in request.files] == [Path(name).read_bytes() for name in sent]
    types = ["image/png", "image/jpeg", "image/png"]
    assert [file.content_type for file in request.files] == types


MARKED = {"image": "room.png", "model": FLARE, "markup": "notes.png"}


def test_markup_is_a_file_part_of_its_own(run: Run, api: ImagesAPI) -> None:
    for name, mode in (("room.png", "RGB"), ("notes.png", "RGBA"), ("second.webp", "RGB")):
        picture(name, mode)
    call = ["edit", *as_flags({"prompt": "a fox", **MARKED})]
    assert run(*call).exit_code == 0
    assert run(*call, "--image", "second.webp", "--out", "b.png").exit_code == 0
    one, two = api.requests
    assert [file.field for file in one.files] == ["image", "markup"]
    assert [file.field for file in two.files] == ["image[]", "image[]", "markup"]
    for request in (one, two):
        markup = request.files[-1]
        assert (markup.content_type, markup.filename) == ("image/png", "markup.png")
        assert markup.data == Path("notes.png").read_bytes()
        assert "markup" not in request.body


def test_a_job_with_markup_is_an_edit(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    picture("notes.png", "RGBA")
    assert live.outcomes(run(*live.batch([{"prompt": "a fox", **MARKED}], "--json"))) == ["done"]
    (request,) = api.requests
    assert request.path == "/v1/images/edits"
    assert [file.field for file in request.files] == ["image", "markup"]


# What is sent again, and what is not.


class Fault(NamedTuple):
    """A fault of the connection or the server, and how it is recorded."""

    reply: Reply
    kind: str
    maybe_billed: bool = False
    timeout: float = PATIENCE
    kept: tuple[str, ...] = ()  # what has come of two such answers


FAULTS = {
    "closed before the answer": Fault(connection_closed(), "connection", maybe_billed=True),
    "answer lost": Fault(answer_lost(), "connection", maybe_billed=True),
    "closed within the answer": Fault(
        answer_cut(),
        "connection",
        maybe_billed=True,
        kept=("fox.png.answer", "fox.png-alt-1.answer"),
    ),
    "time-out": Fault(no_answer(), "timeout", maybe_billed=True, timeout=live.TIME_OUT),
    "408": Fault(status(408), "timeout"),
    "409": Fault(status(409), "conflict"),
    "500": Fault(server_error(500), "server"),
    "502 as HTML": Fault(html(502), "server", maybe_billed=True),
    "503": Fault(server_error(503), "server"),
    "504": Fault(server_error(504), "server", maybe_billed=True),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
class TestAFault:
    def test_is_met_with_another_request(self, run: Run, api: ImagesAPI, fault: Fault) -> None:
        api.script(fault.reply)
        result = run(*live.generate("--json", "--timeout", fault.timeout))
        assert result.exit_code == 0
        assert len(api.requests) == result.json["attempts"] == 2
        (note,) = (line for line in result.stderr.splitlines() if "attempt 2 of 3" in line)
        assert ("may have been billed" in note) == fault.maybe_billed
        recorded = any("billed" in warning for warning in result.json["warnings"])
        assert recorded == fault.maybe_billed
        assert live.names(".") == sorted(["fox.png", *fault.kept[:1]])
        assert all(f"; the answer is kept as {name}; " in note for name in fault.kept[:1])

    def test_that_stays_ends_the_job_after_max_attempts(
        self, run: Run, api: ImagesAPI, fault: Fault
    ) -> None:
        api.script(fault.reply, repeat=True)
        result = run(*live.generate("--json", "--timeout", fault.timeout, "--max-attempts", 2))
        assert live.error(result)
        assert len(api.requests) == result.json["attempts"] == 2
        failure = result.json["error"]
        assert (failure["kind"], failure["retryable"]) == (fault.kind, True)
        assert failure["maybe_billed"] == fault.maybe_billed
        assert live.names(".") == sorted(fault.kept)
        assert all(Path(name).read_bytes().startswith(b'{"created": ') for name in fault.kept)
        assert all(failure["message"].endswith(name) for name in fault.kept[-1:])


def test_one_attempt_means_one_request(run: Run, api: ImagesAPI) -> None:
    api.script(server_error())
    assert run(*live.generate("--max-attempts", 1)).exit_code == 1
    assert live.statuses(api) == [500]


def test_a_fault_of_an_earlier_attempt_may_still_be_billed_when_the_job_fails(
    run: Run, api: ImagesAPI
) -> None:
    api.script(answer_lost(), moderation_blocked())
    assert run(*live.generate("--json")).json["error"]["maybe_billed"] is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("HTTPS_PROXY", "nonsense://proxy", id="scheme"),
        pytest.param("ALL_PROXY", "socks5://127.0.0.1:1", id="package that is missing"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_a_refusal(
    run: Run, api: ImagesAPI, name: str, value: str
) -> None:
    everywhere = {name: value, name.lower(): value, "NO_PROXY": "", "no_proxy": ""}
    result = run(*live.generate(), env=everywhere)
    (said,) = live.lines(result)
    assert (result.exit_code, api.requests) == (2, [])
    assert "proxies" in said


def test_a_server_that_cannot_be_reached_is_named_and_nothing_is_billed(run: Run) -> None:
    nowhere = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "placeholder-key"}
    result = run(*live.generate("--json"), env=nowhere)
    assert "connection failed" in live.error(result)
    assert result.json["attempts"] == 3
    assert result.json["error"] | {"message": ""} == {
        "kind": "connection",
        "message": "",
        "code": None,
        "retryable": True,
        "maybe_billed": False,
    }


@pytest.mark.parametrize(
    "headers", [{"retry-after": "0.3"}, {"retry-after-ms": "300"}], ids=lambda h: next(iter(h))
)
def test_a_server_error_is_retried_when_the_server_says(
    run: Run, api: ImagesAPI, headers: dict[str, str]
) -> None:
    api.script(server_error(503, headers=headers))
    assert run(*live.generate()).exit_code == 0
    first, second = api.requests
    assert second.started - first.started >= 0.3


@pytest.mark.usefixtures("real_waits")
def test_back_off_grows_with_full_jitter_up_to_its_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _low, high: high)
    verdict = image_gen.Verdict("retry", image_gen.Failure("server", ""))
    delays = [image_gen.retry_delay(verdict, attempt) for attempt in range(1, 10)]
    assert delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert image_gen.retry_delay(verdict._replace(advised=7.0), 1) == 7


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 2009 00:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "soon", "x-ratelimit-reset-requests": "2s"}, 2.0),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-requests": "1h2m3.5s"}, 3723.5),
        ({"x-ratelimit-reset-tokens": "120ms"}, 0.12),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "3s"}, 3.0),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-tokens": "900",
                "x-ratelimit-reset-tokens": "3s",
            },
            1.0,
        ),
        ({"x-ratelimit-reset-requests": "tomorrow"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_servers_time_is_read_in_every_form(
    headers: dict[str, str], expected: float | None
) -> None:
    assert image_gen.advised_delay(headers) == pytest.approx(expected)


def test_a_date_in_the_future_is_waited_for() -> None:
    moment = int(time.time()) + 60
    header = {"retry-after": formatdate(moment, usegmt=True)}
    latest = moment - time.time()
    delay = image_gen.advised_delay(header)
    assert delay is not None
    assert moment - time.time() <= delay <= latest


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        *[pytest.param(insufficient_quota(code), "quota", id=code) for code in NO_MONEY],
        pytest.param(unauthorized(), "authentication", id="401"),
    ],
)
def test_what_is_hopeless_stops_the_run_and_keeps_what_is_in_flight(
    start_process: Start, api: ImagesAPI, reply: Reply, kind: str
) -> None:
    api.script(reply)
    argv = live.batch(5, "--json", "--concurrency", 2)
    result = live.run_staggered(start_process, api, argv, until=2)
    assert result.exit_code == 4
    assert sorted(live.outcomes(result)) == ["done", "failed", "not_sent", "not_sent", "not_sent"]
    assert len(api.requests) == 2
    assert len(live.names()) == 1
    failed, skipped = live.lines(result)
    assert skipped.startswith("3 jobs ")
    assert image_gen.REMEDIES[kind] in failed
    errors = [line["error"] for line in result.json_lines if line["status"] != "done"]
    assert {(error["kind"], error["retryable"]) for error in errors} == {(kind, False)}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        pytest.param(forbidden(), "permission", id="403"),
        pytest.param(unknown_model(), "unknown_model", id="404"),
    ],
)
def test_a_model_that_is_refused_stops_the_jobs_of_that_model_only(
    run: Run, api: ImagesAPI, reply: Reply, kind: str
) -> None:
    models = ["gpt-image-2.5-flare", "gpt-image-2"] * 3
    jobs = [{"prompt": f"job {n}", "model": model} for n, model in enumerate(models, start=1)]
    api.script_for("job 1", reply)
    result = run(*live.batch(jobs, "--json", "--concurrency", 1))
    assert result.exit_code == 4
    assert live.outcomes(result) == ["failed", "done", "not_sent", "done", "not_sent", "done"]
    refused = next(line for line in result.json_lines if line["job"] == 1)
    assert refused["error"]["kind"] == kind
    assert live.names() == live.images(2, 4, 6)
    assert any(line.startswith("2 jobs ") for line in live.lines(result))


def test_a_bad_request_fails_its_job_alone(run: Run, api: ImagesAPI) -> None:
    api.script_for("job 2", status(400, "Unknown parameter: 'n'.", code="unknown_parameter"))
    result = run(*live.batch(3, "--json"))
    assert "Unknown parameter: 'n'." in live.error(result)
    assert live.outcomes(result) == ["done", "failed", "done"]
    assert live.names() == live.images(1, 3)
    failed = next(line["error"] for line in result.json_lines if line["job"] == 2)
    assert (failed["kind"], failed["code"]) == ("invalid_request", "unknown_parameter")
    assert failed["retryable"] is failed["maybe_billed"] is False


def test_a_moderation_refusal_is_named_with_message_and_request_id(
    run: Run, api: ImagesAPI
) -> None:
    api.script(moderation_blocked("Rejected: safety_violations=[gore]."))
    result = run(*live.generate("--json"))
    (request,) = api.requests
    for part in ("moderation", "Rejected: safety_violations=[gore].", request.request_id):
        assert part in live.error(result)
    assert result.json["error"]["kind"] == "moderation"
    assert result.json["request_id"] == request.request_id


def test_fail_fast_sends_nothing_after_the_first_failure_and_saves_what_is_in_flight(
    start_process: Start, api: ImagesAPI
) -> None:
    api.script(moderation_blocked())
    argv = live.batch(5, "--json", "--fail-fast", "--concurrency", 2)
    result = live.run_staggered(start_process, api, argv, until=2)
    assert result.exit_code == 4
    assert len(api.requests) == 2
    assert sorted(live.outcomes(result)) == ["done", "failed", "not_sent", "not_sent", "not_sent"]
    assert len(live.names()) == 1
    assert any("--fail-fast" in line for line in live.lines(result))


def test_without_fail_fast_the_other_jobs_go_on(run: Run, api: ImagesAPI) -> None:
    api.script(moderation_blocked())
    assert run(*live.batch(4, "--concurrency", 1)).exit_code == 4
    assert live.names() == live.images(2, 3, 4)


def test_a_long_message_of_the_server_stays_one_short_line(run: Run, api: ImagesAPI) -> None:
    api.script(status(400, "no\n\x1b[31m" + "word " * 2000))
    message = live.error(run(*live.generate()))
    assert len(message) < 800
    assert re.search(r"[\x00-\x1f]", message) is None


@pytest.mark.parametrize("advice", [0, 0.001])
def test_advice_to_come_back_at_once_is_not_followed_without_end(
    run: Run, api: ImagesAPI, advice: float
) -> None:
    api.script(rate_limited(advice), repeat=True)
    result = run(*live.generate("--max-wait", 0.2))
    assert "gave up, --max-wait is spent" in live.error(result)
    assert len(api.requests) < 60


def test_an_input_that_vanishes_is_no_failure_of_the_network(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    argv = live.batch([{"prompt": f"job {n}", "image": "room.png"} for n in (1, 2)])
    flags = ("--json", "--concurrency", "1")
    result = live.run_held(run, api, [*argv, *flags], act=lambda: Path("room.png").unlink())
    record = next(line for line in result.json_lines if line["status"] == "failed")
    assert (record["error"]["kind"], record["attempts"]) == ("input", 0)
    assert record["error"]["maybe_billed"] is False
