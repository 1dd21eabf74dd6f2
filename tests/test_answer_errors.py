"""Errors under any status, redirects, limits, and the odd answers of the Batch API."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import socket
import time
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import image_gen
import live
import pytest
from images_api import (
    STORED,
    BatchPlan,
    answered,
    document,
    image_bytes,
    insufficient_quota,
    more_images,
    no_answer,
    rate_limited,
    server_error,
    slow_body,
    status,
    unknown_model,
)
from inputs import encoded
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cli import Result, Run
    from images_api import ImagesAPI, Reply
    from inputs import Json

FOX = encoded(Image.effect_noise((64, 64), 80))
FOX_TEXT = base64.b64encode(FOX).decode()


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def events(*written: bytes) -> Reply:
    return answered(b"".join(written), content_type="text/event-stream")


def of_json(content: object) -> Reply:
    return answered(json.dumps(content).encode())


# ---------------------------------------------------------------------- what an error stops


RELAY_QUOTA = status(403, "balance is 0", code="insufficient_user_quota")
NO_MONEY = {"code": "insufficient_quota", "message": "top up"}
STOPS = {
    "402": (status(402, "payment required"), "quota"),
    "402 in plain words": (answered(b"Payment Required", number=402), "quota"),
    "a relay without balance": (RELAY_QUOTA, "quota"),
    "a balance in a 200": (of_json({"error": NO_MONEY}), "quota"),
    "a balance in an event": (events(event(type="error", error=NO_MONEY)), "quota"),
    "a flat error event": (events(event(type="error", **NO_MONEY)), "quota"),
    "a wrong path": (status(404, "Not Found"), "address"),
    "a page for a wrong path": (answered(b"<title>nginx</title>", number=404), "address"),
    "a key refused in a 200": (of_json({"error": {"code": 401, "message": "no"}}), None),
}


@pytest.mark.parametrize(("reply", "kind"), STOPS.values(), ids=STOPS)
def test_what_concerns_all_jobs_stops_the_run_whatever_the_status(
    run: Run, api: ImagesAPI, reply: Reply, kind: str | None
) -> None:
    api.script(reply, repeat=True)
    result = run(*live.batch(4, "--json", "--concurrency", 1))
    assert result.exit_code == (1 if kind == "address" else 4)
    assert live.outcomes(result) == ["failed", "not_sent", "not_sent", "not_sent"]
    kinds = {line["error"]["kind"] for line in result.json_lines}
    assert kinds == {kind or "authentication"}
    assert len(api.requests) == 1
    assert live.names() == []


def test_a_wrong_path_is_named_with_the_variable_it_comes_from(run: Run, api: ImagesAPI) -> None:
    env = {"OPENAI_BASE_URL": api.base_url.removesuffix("/v1")}
    message = live.error(run(*live.generate(), env=env))
    assert f"POST {env['OPENAI_BASE_URL']}/images/generations" in message
    assert "OPENAI_BASE_URL" in message


def test_an_unknown_model_is_one_only_by_its_code(run: Run, api: ImagesAPI) -> None:
    api.script(unknown_model())
    message = live.error(run(*live.generate()))
    assert message.startswith("unknown model, HTTP 404")
    assert "OPENAI_BASE_URL" not in message


@pytest.mark.parametrize("number", [502, 504, 520, 524])
@pytest.mark.parametrize("in_body", [False, True], ids=["status", "code of a 200"])
def test_a_gateway_that_lost_the_answer_is_asked_again_with_a_word_of_warning(
    run: Run,
    api: ImagesAPI,
    number: int,
    in_body: bool,  # noqa: FBT001
) -> None:
    page = answered(b"<html><title>lost it</title></html>", number=number)
    api.script(of_json({"error": {"code": number, "message": "lost it"}}) if in_body else page)
    result = run(*live.generate("--json"))
    assert (result.exit_code, result.json["attempts"]) == (0, 2)
    (note,) = (line for line in result.stderr.splitlines() if "attempt 2" in line)
    assert f"HTTP {number}: lost it" in note
    assert "may have been billed" in note


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(server_error(500, headers={"x-should-retry": "false"}), id="500"),
        pytest.param(server_error(503, headers={"x-should-retry": "false"}), id="503"),
        pytest.param(status(409, headers={"x-should-retry": "false"}), id="409"),
        pytest.param(rate_limited(0.01, headers={"x-should-retry": "false"}), id="429"),
    ],
)
def test_a_server_that_wants_no_retry_gets_none(run: Run, api: ImagesAPI, reply: Reply) -> None:
    api.script(reply)
    result = run(*live.generate("--json"))
    assert live.error(result)
    assert result.json["error"]["retryable"] is False
    assert len(api.requests) == 1


@pytest.mark.parametrize("ours", [-7200, 0, 86400], ids=lambda shift: f"{shift} s off")
def test_a_date_to_come_back_is_read_against_the_clock_of_the_server(
    run: Run, api: ImagesAPI, ours: int
) -> None:
    theirs = int(time.time()) + ours
    headers = {
        "date": formatdate(theirs, usegmt=True),
        "retry-after": formatdate(theirs + 500, usegmt=True),
    }
    api.script(rate_limited(headers=headers))
    assert "--max-wait is spent" in live.error(run(*live.generate("--max-wait", 499)))
    assert image_gen.advised_delay(headers) == 500


def test_an_error_of_an_event_is_judged_by_its_code(run: Run, api: ImagesAPI) -> None:
    api.script(events(event(type="error", error={"code": "server_error", "message": "hiccup"})))
    result = run(*live.generate("--json"))
    assert (result.exit_code, result.json["attempts"]) == (0, 2)
    assert "hiccup" in result.stderr


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"data": [{"b64_json": FOX_TEXT}], "error": None}, id="null"),
        pytest.param({"data": [{"b64_json": FOX_TEXT}], "error": {}}, id="an empty object"),
        pytest.param(
            {"data": [{"b64_json": FOX_TEXT}], "error": {"message": "slow"}}, id="an object"
        ),
        pytest.param({"data": [{"b64_json": FOX_TEXT}], "errors": ["slow"]}, id="a list"),
    ],
)
def test_an_image_beside_an_error_is_an_image(run: Run, api: ImagesAPI, body: Json) -> None:
    api.script(of_json(body))
    assert run(*live.generate()).exit_code == 0
    assert Path("fox.png").read_bytes() == FOX


def test_odd_words_and_numbers_of_usage_leave_json_that_everybody_reads(
    run: Run, api: ImagesAPI
) -> None:
    def nothing_else(name: str) -> object:
        raise AssertionError(name)

    usage = b'{"total_tokens": NaN, "input_tokens": 1e999, "a": -Infinity, "b": "\\ud83d", "c": 3}'
    api.script(answered(b'{"data": [{"b64_json": "%b"}], "usage": %b, "size": "\\udc00"}' % (
        FOX_TEXT.encode(), usage
    )))  # fmt: skip
    result = run(*live.generate("--json"))
    assert result.exit_code == 0, result.stderr
    read = json.loads(result.stdout, parse_constant=nothing_else)
    assert read["usage"] == {
        "total_tokens": None, "input_tokens": None, "a": None, "b": "?", "c": 3
    }  # fmt: skip
    result.stdout.encode("utf-8", "strict")


# ------------------------------------------------------------------------------- redirects


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.1:9/v1/images/generations",
        "http://localhost:9/v1/images/generations",
        "//127.0.0.2/x",
        "http://[",
    ],
)
def test_a_redirect_to_another_origin_is_refused_with_its_address(
    run: Run, api: ImagesAPI, number: int, target: str
) -> None:
    api.script(answered(b"", number=number, headers={"location": target}), repeat=True)
    result = run(*live.batch(3, "--json", "--concurrency", 1))
    failed, _ = live.lines(result)
    for part in (target, "OPENAI_BASE_URL", f"POST {api.base_url}/images/generations"):
        assert part in failed
    assert result.json_lines[0]["error"] | {"message": ""} == {
        "kind": "address",
        "message": "",
        "code": str(number),
        "retryable": False,
        "maybe_billed": False,
    }
    assert len(api.requests) == 1


@pytest.mark.parametrize("number", [301, 302, 303])
def test_a_redirect_that_would_make_the_request_a_get_is_refused(
    run: Run, api: ImagesAPI, number: int
) -> None:
    api.script(answered(b"", number=number, headers={"location": "/v1/images/generations"}))
    assert "redirected to /v1/images/generations" in live.error(run(*live.generate()))
    assert [request.method for request in api.requests] == ["POST"]


@pytest.mark.parametrize("number", [307, 308])
def test_a_redirect_within_the_origin_repeats_the_request(
    run: Run, api: ImagesAPI, number: int
) -> None:
    api.script(answered(b"", number=number, headers={"location": "/v1/images/generations?b=1"}))
    assert run(*live.generate()).exit_code == 0
    first, second = api.requests
    assert first.body == second.body
    assert second.query == {"b": "1"}
    assert second.key_as_expected


def test_redirects_in_a_circle_come_to_an_end(run: Run, api: ImagesAPI) -> None:
    headers = {"location": "/v1/images/generations"}
    api.script(answered(b"", number=307, headers=headers), repeat=True)
    assert "redirects" in live.error(run(*live.generate())).lower()
    assert len(api.requests) < 30


# ---------------------------------------------------------------------------------- limits


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(image_gen, "MAX_ANSWER_BYTES", 200_000)
    return 200_000


def test_an_answer_is_limited_by_what_it_unpacks_to(
    run: Run, api: ImagesAPI, small_limit: int
) -> None:
    packed = gzip.compress(bytes(50_000_000))
    assert len(packed) < small_limit
    api.script(answered(packed, headers={"content-encoding": "gzip"}))
    result = run(*live.generate("--json"))
    assert "more than 200,000 bytes" in live.error(result)
    assert result.json["error"]["maybe_billed"] is True
    assert len(api.requests) == 1
    assert Path("fox.png.answer").stat().st_size < 50 * small_limit


@pytest.mark.usefixtures("small_limit")
def test_a_limit_holds_for_each_image_that_was_asked_for(run: Run, api: ImagesAPI) -> None:
    def padded(content: Json) -> None:
        images = content.pop("data")
        content |= {"extra": "x" * 150_000 * len(images) ** 2, "data": images}

    api.script(document(padded), document(padded))
    assert run(*live.generate(out="one.png")).exit_code == 0
    assert "more than 800,000 bytes" in live.error(run(*live.generate("--n", 4)))


def test_an_unpacked_answer_is_an_answer_like_any_other(run: Run, api: ImagesAPI) -> None:
    body = gzip.compress(json.dumps({"data": [{"b64_json": FOX_TEXT}]}).encode())
    api.script(answered(body, headers={"content-encoding": "gzip"}))
    assert run(*live.generate()).exit_code == 0
    assert Path("fox.png").read_bytes() == FOX


def test_a_body_that_trickles_is_cut_by_the_time_out_and_what_came_is_kept(
    run: Run, api: ImagesAPI
) -> None:
    api.script(slow_body(300, pieces=100))
    begun = time.monotonic()
    result = run(*live.generate("--json", "--timeout", 1, "--max-attempts", 1))
    assert time.monotonic() - begun < 60
    assert result.json["error"]["kind"] == "timeout"
    assert "the answer is kept as fox.png.answer" in live.error(result)
    assert Path("fox.png.answer").read_bytes().startswith(b'{"created":')


def test_each_of_many_surplus_images_takes_one_look_for_its_name(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def link(source: str, name: str) -> None:
        tried.append(name)
        original(source, name)

    original = os.link
    monkeypatch.setattr(os, "link", link)
    api.script(more_images(200))
    assert run(*live.generate()).exit_code == 0
    assert len(live.names(".")) == 201
    assert len(tried) < 2 * 201


# ------------------------------------------------------------------ whom an answer may send to

BASE = "https://api.example/v1/"
HOSTS = {
    "public": (["93.184.216.34"], True),
    "public by IPv6": (["2606:2800:220:1::1"], True),
    "a neighbour": (["192.168.0.1"], False),
    "one neighbour of two": (["93.184.216.34", "10.0.0.7"], False),
    "the metadata of a cloud": (["169.254.169.254"], False),
    "this machine": (["127.0.0.1"], False),
    "this machine by IPv6": (["::1"], False),
    "a neighbour by IPv6": (["fd00::1"], False),
    "a neighbour in IPv6": (["::ffff:10.0.0.1"], False),
    "any": (["0.0.0.0"], False),
}


@pytest.mark.parametrize(("found", "allowed"), HOSTS.values(), ids=HOSTS)
def test_an_image_is_fetched_from_public_addresses_only(
    monkeypatch: pytest.MonkeyPatch, found: list[str], *, allowed: bool
) -> None:
    """The name service stands still here: no test leaves this machine."""

    def resolve(_host: object, port: int, *_: object, **__: object) -> list[object]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in found]
        named = zip(families, found, strict=True)
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in named]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    def judged(address: str) -> bool:
        url, base = httpx2.URL(address), httpx2.URL(BASE)
        return asyncio.run(image_gen.is_fetched(url, base))

    assert judged("https://images.example/a.png") is allowed
    assert judged("http://images.example/a.png") is False
    assert judged("https://api.example/a.png") is True
    assert judged("https://api.example:444/a.png") is allowed
    assert judged("http://api.example/a.png") is False


# ---------------------------------------------------------------- what is kept, and what not


def test_an_image_that_could_only_not_be_written_leaves_no_answer(run: Run, api: ImagesAPI) -> None:
    def spoil() -> None:
        os.rename("out", "gone")
        Path("out").write_text("a file")

    result = live.run_held(run, api, live.batch(1, "--json"), act=spoil)
    assert result.json["error"]["kind"] == "write"
    assert "it was saved as" in live.error(result)
    found = sorted(path.name for path in Path().rglob("*"))
    assert not [name for name in found if name.endswith(".answer")]
    (rescued,) = (name for name in found if name.startswith("image_gen-rescued-"))
    assert live.size_of(rescued) == (64, 64)


@pytest.mark.parametrize(
    "reply", [insufficient_quota(), status(400), server_error(500), of_json({"error": "busy"})]
)
def test_an_error_leaves_no_answer(run: Run, api: ImagesAPI, reply: Reply) -> None:
    api.script(reply, repeat=True)
    assert live.error(run(*live.generate("--max-attempts", 2)))
    assert live.names(".") == []


def test_a_damaged_image_is_kept_beside_the_answer_it_came_in(run: Run, api: ImagesAPI) -> None:
    api.script(image_bytes(lambda data: data[:40]))
    result = run(*live.generate("--json"))
    assert "is cut off; its 40 bytes are kept as fox.png.damaged" in live.error(result)
    assert Path("fox.png.damaged").stat().st_size == 40
    assert live.names(".") == ["fox.png.answer", "fox.png.damaged"]
    assert result.json["error"]["maybe_billed"] is True


# --------------------------------------------------------------------------- the Batch API


def spoiled(change: Callable[[Json], None]) -> BatchPlan:
    """A batch in whose output each answer is changed in place."""

    def spoil(lines: Iterable[bytes]) -> Iterable[bytes]:
        for line in lines:
            content = json.loads(line)
            change(content["response"]["body"])
            yield json.dumps(content).encode() + b"\n"

    return BatchPlan(output=spoil)


def collected(run: Run, api: ImagesAPI, plan: BatchPlan) -> Result:
    api.plan_batch(plan)
    return run(*live.batch(2, "--batch-api", "--json"))


def whole(text: str) -> Callable[[Json], None]:
    return lambda body: body.update(data=[{"b64_json": text}])


def under_images(body: Json) -> None:
    body["images"] = body.pop("data")


def without_list(body: Json) -> None:
    (body["data"],) = body["data"]


LINES = {
    "a data URL": whole("data:image/png;base64," + FOX_TEXT),
    "lines of base64": whole(base64.encodebytes(FOX).decode()),
    "url-safe base64": whole(base64.urlsafe_b64encode(FOX).decode().rstrip("=")),
    "text for an item": lambda body: body.update(data=[FOX_TEXT]),
    "another name": under_images,
    "an object for the list": without_list,
    "odd usage": lambda body: body.update(usage={"total_tokens": float("nan")}),
}


@pytest.mark.parametrize("change", LINES.values(), ids=LINES)
def test_a_line_of_a_batch_is_read_like_any_answer(
    run: Run, api: ImagesAPI, change: Callable[[Json], None]
) -> None:
    result = collected(run, api, spoiled(change))
    assert result.exit_code == 0, result.stderr
    assert live.outcomes(result) == ["done", "done"]
    shown = [name for name in live.names() if name.endswith(".png")]
    assert shown == live.images(1, 2)
    assert "NaN" not in result.stdout


def test_a_line_of_a_batch_that_names_its_image_has_it_fetched_without_the_key(
    run: Run, api: ImagesAPI
) -> None:
    address = api.store("fox.png", FOX)
    result = collected(run, api, spoiled(lambda body: body.update(data=[{"url": address}])))
    assert result.exit_code == 0, result.stderr
    assert {Path("out", name).read_bytes() for name in live.images(1, 2)} == {FOX}
    fetched = [request for request in api.requests if request.route == STORED]
    assert len(fetched) == 2
    assert not any("authorization" in request.headers for request in fetched)


def test_images_that_are_named_and_images_that_came_are_saved_together(
    run: Run, api: ImagesAPI
) -> None:
    address = api.store("fox.png", FOX)
    api.script(of_json({"data": [{"b64_json": FOX_TEXT}, {"url": address}, address]}))
    assert run(*live.generate("--n", 3)).exit_code == 0
    assert {Path(f"fox-{number}.png").read_bytes() for number in (1, 2, 3)} == {FOX}


def test_an_image_that_is_named_may_not_be_endless(
    run: Run, api: ImagesAPI, small_limit: int
) -> None:
    address = api.store("fox.png", bytes(small_limit + 1))
    api.script(of_json({"data": [{"url": address}]}))
    message = live.error(run(*live.generate()))
    assert f"the image at {address} was not fetched: it has more than 200,000 bytes" in message
    assert [request.method for request in api.requests] == ["POST", "GET"]


def test_an_image_that_is_named_is_waited_for_as_long_as_a_request(
    run: Run, api: ImagesAPI
) -> None:
    address = api.store("fox.png", FOX)
    api.script(of_json({"data": [{"url": address}]}))
    api.script_route(STORED, no_answer(), repeat=True)
    result = run(*live.generate("--timeout", 1, "--max-attempts", 1))
    assert f"the image at {address} was not fetched: no answer in time" in live.error(result)
    assert [request.method for request in api.requests] == ["POST", "GET"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        pytest.param(lambda body: body.update(data=[]), "bad_answer", id="no image"),
        pytest.param(whole("%"), "bad_answer", id="no base64"),
        pytest.param(whole(FOX_TEXT[:200]), "bad_answer", id="cut off"),
        pytest.param(
            lambda body: body.update(data=[], error={"code": "moderation_blocked"}),
            "moderation",
            id="an error in a 200",
        ),
    ],
)
def test_a_line_of_a_batch_without_an_image_is_judged_like_any_answer(
    run: Run, api: ImagesAPI, change: Callable[[Json], None], kind: str
) -> None:
    result = collected(run, api, spoiled(change))
    assert result.exit_code == (1 if kind == "bad_answer" else 4)
    assert live.outcomes(result) == ["failed", "failed"]
    assert {line["error"]["kind"] for line in result.json_lines} == {kind}
    kept = [name for name in live.names() if name.endswith(".answer")]
    wanted = [f"{name}.answer" for name in live.images(1, 2)] if kind == "bad_answer" else []
    assert kept == wanted
