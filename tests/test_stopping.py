"""A run that buys nothing stops: unreachable, in doubt, or refused for its rate without end."""

from __future__ import annotations

import base64
import json
import socket
import threading
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import httpx2
import live
import pytest
from images_api import (
    PATIENCE,
    RateLimit,
    answer_cut,
    answer_lost,
    connection_closed,
    delayed,
    fewer_images,
    html,
    moderation_blocked,
    not_an_image,
    ok,
    rate_limited,
    server_error,
    status,
)
from inputs import encoded
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli import Result, Run
    from images_api import ImagesAPI, Reply

HELP = "references/codex-network.md"
CAREFUL = "going on with one request at a time"
ANSWER = json.dumps(
    {"data": [{"b64_json": base64.b64encode(encoded(Image.new("RGB", (64, 64)))).decode()}]}
).encode()


# ------------------------------------------------------------------------------ unreachable


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken and that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def listening(*replies: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server that reads a head and gives a reply, for each; then it is gone. What it has read."""
    heads: list[bytes] = []

    def serve() -> None:
        for number, reply in enumerate(replies, start=1):
            connection = server.accept()[0]
            if number == len(replies):
                server.close()
            with connection, connection.makefile("rwb") as file:
                connection.settimeout(PATIENCE)
                head = b"".join(iter(file.readline, b"\r\n"))
                heads.append(head)
                length = head.lower().partition(b"content-length:")[2].split(b"\r")[0]
                file.read(int(length or 0))
                file.write(reply)

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        thread = threading.Thread(target=serve)
        thread.start()
        yield port, heads
        thread.join(PATIENCE)
        assert not thread.is_alive()


def http(first: str, body: bytes = b"") -> bytes:
    """An answer behind which the server closes the connection, and says so."""
    head = f"HTTP/1.1 {first}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def environment(url: str, proxy: str = "") -> dict[str, str]:
    found = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "placeholder-key", "NO_PROXY": ""}
    for name in ("HTTP_PROXY", "HTTPS_PROXY") if proxy else ():
        found |= {name: proxy, name.lower(): proxy, "no_proxy": ""}
    return found


def assert_unreachable(result: Result, host: str) -> None:
    """The whole run ended in one sentence."""
    assert result.exit_code == 1
    (problem,) = live.lines(result)
    assert f"no connection to {host} came about" in problem
    assert "a sandbox or a proxy may refuse it" in problem
    assert HELP in problem
    assert set(live.outcomes(result)) == {"not_sent"}
    for line in result.json_lines:
        assert line["error"]["kind"] == "connection"
        assert line["error"]["maybe_billed"] is False
        assert line["error"]["retryable"] is True


@pytest.mark.parametrize("concurrency", [1, 25])
def test_a_host_that_is_never_reached_ends_the_run_in_one_sentence(
    run: Run, closed_port: int, concurrency: int
) -> None:
    env = environment(f"http://127.0.0.1:{closed_port}/v1")
    result = run(*live.batch(300, "--json", "--concurrency", concurrency), env=env)
    assert_unreachable(result, "127.0.0.1")
    assert len(result.json_lines) == 300
    assert len(result.stderr.splitlines()) < 10
    for attempt in (2, 3):
        assert result.stderr.count(f"attempt {attempt} of 3") == 1


def test_one_attempt_at_reaching_it_is_enough_where_one_is_asked_for(
    run: Run, closed_port: int
) -> None:
    env = environment(f"http://127.0.0.1:{closed_port}/v1")
    result = run(*live.batch(20, "--json", "--max-attempts", 1), env=env)
    assert_unreachable(result, "127.0.0.1")
    assert "attempt 2" not in result.stderr


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_an_unreachable_host(
    run: Run, closed_port: int, scheme: str
) -> None:
    env = environment(f"{scheme}://api.example/v1", f"http://127.0.0.1:{closed_port}")
    assert_unreachable(run(*live.batch(9, "--json"), env=env), "api.example")


def test_a_proxy_that_lets_nobody_through_is_an_unreachable_host(run: Run) -> None:
    with listening(http("403 Forbidden")) as (port, heads):
        env = environment("https://api.example/v1", f"http://127.0.0.1:{port}")
        flags = ("--json", "--max-attempts", 1, "--concurrency", 1)
        assert_unreachable(run(*live.batch(9, *flags), env=env), "api.example")
    assert [head.split()[0] for head in heads] == [b"CONNECT"]


def test_a_host_that_was_reached_once_is_no_unreachable_host(run: Run) -> None:
    with listening(http("200 OK", ANSWER)) as (port, heads):
        env = environment(f"http://127.0.0.1:{port}/v1")
        flags = ("--json", "--max-attempts", 2, "--concurrency", 1)
        result = run(*live.batch(3, *flags), env=env)
    assert live.outcomes(result) == ["done", "failed", "failed"]
    assert HELP not in result.stderr
    assert {line["error"]["maybe_billed"] for line in result.json_lines if line["error"]} == {False}
    assert len(heads) == 1


def test_a_host_that_comes_in_time_is_waited_for(run: Run, api: ImagesAPI) -> None:
    """The first connections are refused, as while a sandbox is asked for leave."""
    refused = iter([True] * 3)
    original = httpx2.AsyncHTTPTransport.handle_async_request

    async def handle(
        transport: httpx2.AsyncHTTPTransport, request: httpx2.Request
    ) -> httpx2.Response:
        if next(refused, False):
            raise httpx2.ConnectError("All connection attempts failed")
        return await original(transport, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", handle)
        result = run(*live.batch(6, "--json", "--concurrency", 3))
    assert result.exit_code == 0
    assert result.stderr.count("attempt 2 of 3") == 1
    assert len(api.requests) == 6


def test_a_single_command_says_the_same(run: Run, closed_port: int) -> None:
    env = environment(f"http://127.0.0.1:{closed_port}/v1")
    assert_unreachable(run(*live.generate("--json"), env=env), "127.0.0.1")
    assert live.names(".") == []


# ---------------------------------------------------------------------------------- doubts


def stopped(result: Result) -> str:
    """The sentence with which a run in doubt stops; its jobs that were not sent say it, too."""
    assert result.exit_code == 1
    (sentence,) = (line for line in live.lines(result) if " jobs " in line[:12])
    assert "may have been billed without an image" in sentence
    skipped = [line["error"] for line in result.json_lines if line["status"] == "not_sent"]
    assert skipped
    assert not any(error["maybe_billed"] for error in skipped)
    return sentence


DOUBTFUL: dict[str, Reply] = {
    "closed": connection_closed(),
    "lost": answer_lost(),
    "cut": answer_cut(0.3),
    "502": server_error(502),
    "504": server_error(504),
    "524 as a page": html(524),
    "no image": not_an_image(),
}


@pytest.mark.parametrize("reply", DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_run_that_may_pay_for_nothing_gets_careful_and_stops(
    run: Run, api: ImagesAPI, reply: Reply
) -> None:
    api.script(reply, repeat=True)
    result = run(*live.batch(20, "--json", "--concurrency", 1, "--max-attempts", 1))
    assert "requests in a row may have been billed" in stopped(result)
    sent = len(api.requests)
    assert 6 <= sent <= 8  # another may leave while what has come is looked at
    assert live.outcomes(result) == ["failed"] * sent + ["not_sent"] * (20 - sent)
    failed = [line["error"] for line in result.json_lines if line["status"] == "failed"]
    assert all(error["maybe_billed"] for error in failed)
    assert result.stderr.count(CAREFUL) == 1


def test_attempts_of_one_job_count_as_well(run: Run, api: ImagesAPI) -> None:
    api.script(connection_closed(), repeat=True)
    result = run(*live.batch(20, "--json", "--concurrency", 1, "--max-attempts", 10))
    stopped(result)
    assert len(api.requests) == 6
    assert live.outcomes(result) == ["failed"] + ["not_sent"] * 19


def test_as_many_as_are_in_flight_may_fail_before_a_run_is_careful(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.3)  # all have failed by then
    api.script(*[connection_closed()] * 8, delayed(0.02, connection_closed()), repeat=True)
    argv = live.batch(8, "--json", "--concurrency", 8, "--max-attempts", 9)
    result = live.run_held(run, api, argv, until=8)
    assert result.exit_code == 1
    assert result.stderr.count(CAREFUL) == 1
    assert len(api.requests) == 8 + 3
    for one, next_one in pairwise(api.requests[8:]):
        assert one.ended
        assert one.ended <= next_one.started


def test_an_image_in_between_ends_the_doubt(run: Run, api: ImagesAPI) -> None:
    late = delayed(0.15, connection_closed())  # the image before it is saved by then
    api.script(*[late, connection_closed(), ok()] * 4)
    result = run(*live.batch(12, "--json", "--concurrency", 1, "--max-attempts", 1))
    assert live.outcomes(result) == ["failed", "failed", "done"] * 4
    assert CAREFUL not in result.stderr


def test_a_careful_run_goes_on_at_full_speed_after_an_image(run: Run, api: ImagesAPI) -> None:
    api.script(*[connection_closed()] * 4, ok(), *[delayed(0.05)] * 8)
    argv = live.batch(14, "--json", "--concurrency", 4, "--max-attempts", 2)
    result = run(*argv)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count(CAREFUL) == 1
    later = api.requests[-6:]
    assert any(next_one.started < (one.ended or 0) for one, next_one in pairwise(later))


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(moderation_blocked(), id="moderation"),
        pytest.param(status(400), id="400"),
        pytest.param(server_error(500), id="500"),
        pytest.param(server_error(503), id="503"),
    ],
)
def test_what_costs_nothing_stops_no_run(run: Run, api: ImagesAPI, reply: Reply) -> None:
    api.script(reply, repeat=True)
    result = run(*live.batch(12, "--json", "--concurrency", 1, "--max-attempts", 1))
    assert live.outcomes(result) == ["failed"] * 12
    assert len(api.requests) == 12
    assert CAREFUL not in result.stderr


def test_part_of_the_images_is_an_image(run: Run, api: ImagesAPI) -> None:
    jobs = [{"prompt": f"job {number}", "n": 2} for number in range(1, 9)]
    api.script(fewer_images(1), repeat=True)
    result = run(*live.batch(jobs, "--json", "--concurrency", 1))
    assert live.outcomes(result) == ["failed"] * 8
    assert len(api.requests) == 8


# ------------------------------------------------------------------------------ rate limit


def test_a_limit_under_which_nothing_is_accepted_stops_the_run(run: Run, api: ImagesAPI) -> None:
    api.script(rate_limited(0.06), repeat=True)
    argv = live.batch(40, "--json", "--concurrency", 2, "--max-wait", 0.4)
    result = run(*argv)
    assert result.exit_code == 1
    assert len(api.requests) < 25
    assert any("--max-wait" in line for line in live.lines(result))
    assert {line["error"]["kind"] for line in result.json_lines} == {"rate_limit"}
    assert live.outcomes(result).count("not_sent") >= 30
    assert len(live.lines(result)) <= 4


def test_a_limit_that_lets_some_through_stops_no_run(run: Run, api: ImagesAPI) -> None:
    api.limit = RateLimit(admitted=4, window=0.2)
    result = run(*live.batch(24, "--json", "--concurrency", 4, "--max-wait", 0.7))
    assert live.outcomes(result) == ["done"] * 24
    begun, ended = api.requests[0].started, api.requests[-1].started
    assert ended - begun > 0.7


def test_the_patience_of_a_run_begins_anew_with_what_is_accepted(run: Run, api: ImagesAPI) -> None:
    replies: list[Reply] = [rate_limited(0.06), rate_limited(0.06), ok()]
    api.script(*replies * 5)
    result = run(*live.batch(5, "--json", "--concurrency", 1, "--max-wait", 0.45))
    assert live.outcomes(result) == ["done"] * 5
    assert live.statuses(api) == [429, 429, 200] * 5
    assert api.requests[-1].started - api.requests[0].started > 0.45
