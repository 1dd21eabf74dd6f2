"""Answers as gateways and broken connections leave them: what was paid for in them is saved."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import Answer, answered, changed, image_bytes
from inputs import FLARE, encoded
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli import Result, Run
    from images_api import ImagesAPI, Reply
    from inputs import Json

FOX = encoded(Image.effect_noise((64, 64), 80))
FOX_TEXT = base64.b64encode(FOX).decode()
FOX_URL = f"data:image/png;base64,{FOX_TEXT}"


def document(*items: object, **more: object) -> bytes:
    return json.dumps({"created": 1, "data": [*items], **more}).encode()


def item(text: str = FOX_TEXT) -> Json:
    return {"b64_json": text}


def sse(kind: str = "image_generation.completed", end: bytes = b"\n\n", **more: object) -> bytes:
    event = {"type": kind, "b64_json": FOX_TEXT, **more}
    return f"event: {kind}\ndata: {json.dumps(event)}".encode() + end


WHOLE = document(item(), usage={"total_tokens": 7})
SHAPES = {
    "bytes behind the end": answered(WHOLE + b"}"),
    "a byte order mark": answered(b"\xef\xbb\xbf" + WHOLE),
    "an event stream": answered(sse(), content_type="text/event-stream"),
    "an event stream that is called JSON": answered(b": hello\n\n" + sse()),
    "an event without its blank line": answered(sse(end=b""), content_type="text/event-stream"),
    "events with CRLF": answered(sse().replace(b"\n", b"\r\n") + b"data: [DONE]\r\n\r\n"),
    "an event that holds a whole answer": answered(b"data: " + WHOLE + b"\n\n"),
    "an object for the list": answered(json.dumps({"data": item()}).encode()),
    "another name for the list": answered(json.dumps({"images": [item()]}).encode()),
    "no list": answered(json.dumps(item()).encode()),
    "a list and nothing else": answered(json.dumps([item()]).encode()),
    "text in the list": answered(json.dumps({"data": [FOX_TEXT]}).encode()),
    "the image itself": answered(FOX, content_type="image/png"),
    "a data URL": answered(document(item("data:image/png;base64," + FOX_TEXT))),
    "a data URL as the address": answered(document({"url": "data:image/png;base64," + FOX_TEXT})),
    "lines of base64": answered(document(item(base64.encodebytes(FOX).decode()))),
    "url-safe base64": answered(document(item(base64.urlsafe_b64encode(FOX).decode()))),
    "base64 without padding": answered(document(item(FOX_TEXT.rstrip("=")))),
    "base64 with a foreign byte": answered(document(item(FOX_TEXT + "*"))),
    "slashes that are escaped": answered(WHOLE.replace(b"/", b"\\/")),
    "half a surrogate pair": answered(WHOLE.replace(b'"created": 1', b'"note": "\\ud83d"')),
    "no number": answered(WHOLE.replace(b"7}", b"NaN}")),
    "a number without end": answered(WHOLE.replace(b"7}", b"1e999}")),
    "lines that end with CR": answered(
        sse().replace(b"\n", b"\r"), content_type="text/event-stream"
    ),
    "a compression that it has not": changed(
        lambda _: replace(Answer.of(WHOLE), headers={"content-encoding": "gzip"})
    ),
    "the Responses API": answered(json.dumps({"output": [{"result": FOX_TEXT}]}).encode()),
    "Gemini": answered(json.dumps({"parts": [{"inlineData": {"data": FOX_TEXT}}]}).encode()),
    "another key": answered(document({"b64": FOX_TEXT})),
    "a finished task that repeats its input": answered(
        json.dumps(
            {"id": "1", "status": "succeeded", "input": {"image": FOX_URL}, "output": [FOX_URL]}
        ).encode()
    ),
    "one image under two keys": answered(
        json.dumps({"output": [{"image_base64": FOX_TEXT, "image": FOX_URL}]}).encode()
    ),
    "null beside an address": answered(
        document({"b64_json": "null", "url": "DATA:image/png;BASE64," + FOX_TEXT})
    ),
    "an escaped data URL": answered(
        document({"url": " data:image/png;base64," + FOX_TEXT.replace("+", "%2B")})
    ),
    "a number of 5,000 digits": answered(WHOLE.replace(b"7}", b"7" * 5000 + b"}")),
    "its last chunk missing": changed(
        lambda _: replace(Answer.of(WHOLE), length=len(WHOLE) + 2, breaks_after=len(WHOLE))
    ),
}


@pytest.mark.parametrize("reply", SHAPES.values(), ids=SHAPES)
def test_an_image_is_saved_in_whatever_shape_it_comes(
    run: Run, api: ImagesAPI, reply: Reply
) -> None:
    api.script(reply)
    result = run(*live.generate("--json"))
    assert (result.exit_code, len(api.requests)) == (0, 1), result.stderr
    assert Path("fox.png").read_bytes() == FOX
    assert live.names(".") == ["fox.png"]
    assert "NaN" not in result.stdout
    assert "Infinity" not in result.stdout


def test_an_answer_that_is_no_stream_is_taken_where_a_stream_was_asked_for(
    run: Run, api: ImagesAPI
) -> None:
    api.script(answered(WHOLE), answered(WHOLE, content_type="text/event-stream"))
    for name in ("a.png", "b.png"):
        assert run(*live.generate("--partial-images", 1, out=name)).exit_code == 0
        assert Path(name).read_bytes() == FOX


def test_a_stream_that_stays_open_behind_its_image_is_not_waited_for(
    run: Run, api: ImagesAPI
) -> None:
    api.script(changed(lambda answer: replace(answer, chunks=[*answer.chunks, b":\n\n"], pause=1)))
    result = run(*live.generate("--partial-images", 1, "--timeout", 20))
    assert (result.exit_code, live.names(".")) == (0, ["fox.png"])


def test_of_three_images_whose_answer_breaks_off_in_the_last_two_are_saved(
    run: Run, api: ImagesAPI
) -> None:
    whole = document(item(), item(), item())
    cut = whole[: -len(FOX_TEXT) // 2]
    api.script(changed(lambda _: replace(Answer.of(cut), length=len(whole), breaks_after=len(cut))))
    result = run(*live.generate("--n", 3, "--json"))
    assert "asked for 3 images, got 2: the connection failed" in live.error(result)
    assert "the answer is kept as fox-3.png.answer" in live.error(result)
    assert live.names(".") == ["fox-1.png", "fox-2.png", "fox-3.png.answer"]
    assert Path("fox-3.png.answer").read_bytes() == cut
    assert result.json["error"]["maybe_billed"] is True
    assert len(api.requests) == 1
    again = run(*live.generate("--n", 3, "--skip-existing"))
    assert (again.exit_code, api.requests[-1].body["n"]) == (0, 1)
    assert "fox-3.png" in live.names(".")


SECRET = "sk-test-" + "0123456789abcdef" * 2
UNREADABLE = {
    "a task": (
        answered(b'{"id": "task_81f", "status": "queued"}', number=202),
        '{"status": "queued", "id": "task_81f"}; ask its service',
    ),
    "a page": (answered(b"<html><title>Log in</title></html>", content_type="text/html"), "Log in"),
    "JSON of something else": (
        answered(b'{"ok": true, "sk": "%s"}' % SECRET.encode()),
        '"ok": true',
    ),
    "a page with a logo": (
        answered(b'<title>Log in</title><img src="data:image/png;base64,%s">' % FOX_TEXT.encode()),
        "Log in",
    ),
    "a task with an address": (
        answered(b'{"id": "task_81f", "status": "queued", "url": "https://a.example/task_81f"}'),
        "ask its service",
    ),
    "a nest": (answered(b'{"message": %s1%s}' % (b"[" * 900, b"]" * 900)), "no image"),
    "text": (answered(b"moved to " + SECRET.encode()), "moved to [key]"),
}


@pytest.mark.parametrize(("reply", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_without_an_image_is_told_and_kept_without_the_key(
    run: Run, api: ImagesAPI, reply: Reply, said: str
) -> None:
    api.script(reply)
    Path("fox.png.answer").write_text("of before")
    result = run(*live.generate("--json"), env={"OPENAI_API_KEY": SECRET})
    assert said in live.error(result)
    assert result.json["error"]["kind"] == "bad_answer"
    assert result.json["error"]["maybe_billed"] is True
    assert len(api.requests) == 1
    kept = Path("fox.png-alt-1.answer")
    assert str(kept) in live.error(result)
    assert live.names(".") == ["fox.png-alt-1.answer", "fox.png.answer"]
    assert SECRET not in kept.read_text() + result.stdout + result.stderr
    assert run(*live.generate("--skip-existing")).exit_code == 0


@pytest.mark.parametrize(
    "content",
    [
        {"error": {"message": "bad"}, "request": {"image": FOX_URL}},
        {"error": {"message": "bad"}, "data": {"image": FOX_TEXT}},
        {"detail": [{"msg": "bad", "input": {"image": FOX_URL}}]},
        {"data": [{"b64_json": None}], "input": {"image": FOX_TEXT}},
        {"id": "1", "status": "starting", "input": {"image": FOX_URL}},
    ],
)
def test_an_input_that_is_repeated_is_no_image(run: Run, api: ImagesAPI, content: object) -> None:
    api.script(answered(json.dumps(content).encode()))
    assert run(*live.generate()).exit_code == 1
    assert not Path("fox.png").exists()


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("label", ["gzip", "deflate", "zstd"])
def test_an_announced_compression_is_undone_where_it_is_one(
    run: Run, api: ImagesAPI, label: str, size: int
) -> None:
    packed = {"gzip": gzip.compress(WHOLE), "deflate": zlib.compress(WHOLE)}.get(label, WHOLE)
    pieces = [packed[at : at + size] for at in range(0, len(packed), size)]
    headers = {"content-encoding": label}
    api.script(changed(lambda _: replace(Answer.of(*pieces), headers=headers)))
    assert run(*live.generate()).exit_code == 0
    assert Path("fox.png").read_bytes() == FOX


def test_an_answer_that_is_empty_leaves_no_file(run: Run, api: ImagesAPI) -> None:
    api.script(answered(b""))
    assert "no image" in live.error(run(*live.generate()))
    assert live.names(".") == []


ERROR_OBJECTS = {
    "no money": ({"error": {"message": "top up", "code": "insufficient_quota"}}, "quota", 1),
    "a lost answer": ({"data": [], "error": {"message": "busy", "code": 524}}, "server", 2),
    "a detail": ({"detail": "the model sleeps"}, "server", 1),
    "text": ({"error": "the model sleeps"}, "server", 1),
}


@pytest.mark.parametrize(("body", "kind", "requests"), ERROR_OBJECTS.values(), ids=ERROR_OBJECTS)
def test_an_error_object_is_an_error_whatever_the_status(
    run: Run, api: ImagesAPI, body: Json, kind: str, requests: int
) -> None:
    api.script(answered(json.dumps(body).encode()), repeat=True)
    result = run(*live.generate("--json", "--max-attempts", 2))
    assert result.json["error"]["kind"] == kind
    assert len(api.requests) == requests
    assert live.names(".") == []


def test_no_money_in_an_answer_of_200_stops_the_run_at_once(run: Run, api: ImagesAPI) -> None:
    body = b'{"error": {"message": "top up", "code": "insufficient_quota"}}'
    api.script(answered(body), repeat=True)
    assert run(*live.batch(6, "--concurrency", 1)).exit_code == 4
    assert len(api.requests) == 1


SAID = {
    "message": (b'{"error": {"message": "so it is"}}', "so it is"),
    "FastAPI": (b'{"detail": [{"loc": ["body"], "msg": "so it is"}]}', "so it is"),
    "JSON:API": (b'{"errors": [{"title": "so it is"}, {"detail": "and so"}]}', "so it is; and so"),
    "msg": (b'{"code": 7, "msg": "so it is"}', "so it is"),
    "text": (b"so it is", "so it is"),
    "a page": (b"<!DOCTYPE html><html><title>so &amp; so</title><p>x", "so & so"),
    "a page without a title": (b"<html><body>so <b>it</b> is", "so it is"),
    "none of these": (b'{"why": "so it is"}', '{"why": "so it is"}'),
}


@pytest.mark.parametrize(("body", "said"), SAID.values(), ids=SAID)
def test_an_error_is_quoted_in_whatever_words_it_explains_itself(
    run: Run, api: ImagesAPI, body: bytes, said: str
) -> None:
    api.script(answered(body, number=400))
    message = live.error(run(*live.generate()))
    assert message.partition(", HTTP 400: ")[2].startswith(said)


def test_an_error_of_many_megabytes_is_read_to_its_first(run: Run, api: ImagesAPI) -> None:
    api.script(answered(b"x" * 20_000_000, number=400))
    assert len(live.error(run(*live.generate()))) < 1000


def test_an_answer_without_end_is_cut_at_the_limit(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_gen, "MAX_ANSWER_BYTES", 100_000)
    api.script(answered(b" " * 1_000_000))
    assert "more than 100,000 bytes" in live.error(run(*live.generate()))
    assert len(api.requests) == 1
    assert Path("fox.png.answer").stat().st_size < 400_000


# ------------------------------------------------------------------------ whole means whole

TAILED = {
    "png": lambda data: data + b"\n",
    "jpeg": lambda data: data + b"\r\n",
    "webp": lambda data: data + b"\0",
    "gif": lambda data: data + b"\n\n",
    "svg": lambda data: data + b"<!-- bye -->",
}


@pytest.mark.parametrize("name", TAILED)
def test_bytes_behind_the_end_of_an_image_are_a_warning(
    run: Run, api: ImagesAPI, name: str
) -> None:
    api.script(image_bytes(TAILED[name]))
    argv = live.generate("--model", FLARE, "--skip-existing", out=f"a.{name}")
    result = run(*argv)
    assert result.exit_code == 0
    (warning,) = live.lines(result, "Warning: ")
    assert "behind the end of the image" in warning
    assert run(*argv).exit_code == 0
    assert (len(api.requests), live.names(".")) == (1, [f"a.{name}"])


def cut_inside(data: bytes) -> bytes:
    """An image that ends as one does, and lacks its middle."""
    return data[: len(data) // 2] + data[-12:]


@pytest.mark.parametrize("name", ["png", "webp"])
def test_an_image_that_lacks_its_middle_is_not_whole(run: Run, api: ImagesAPI, name: str) -> None:
    api.script(image_bytes(cut_inside))
    assert "is cut off" in live.error(run(*live.generate(out=f"a.{name}")))


def test_an_svg_that_runs_scripts_is_saved_with_a_warning(run: Run, api: ImagesAPI) -> None:
    drawn = b'<svg xmlns="http://www.w3.org/2000/svg" onload="go()"><script>1</script></svg>'
    api.script(image_bytes(lambda _: drawn))
    result = run(*live.generate("--model", FLARE, out="a.svg"))
    assert result.exit_code == 0
    (warning,) = live.lines(result, "Warning: ")
    assert "runs scripts" in warning
    assert Path("a.svg").read_bytes() == drawn


SLOW = {
    "svg": b"<!-- " + b"<svg " * 60_000,
    "gif": b"GIF89a" + b"\x21\xf9\x04" * 100_000,
    "jpeg": b"\xff\xd8" + b"\xff" * 300_000,
}


@pytest.mark.parametrize("head", SLOW.values(), ids=SLOW)
def test_what_would_take_long_to_look_at_does_not(head: bytes) -> None:
    Path("odd").write_bytes(head)
    picture = image_gen.probe_file("odd")
    assert picture is None or not picture.whole


def test_a_file_of_a_terabyte_is_not_read(run: Run) -> None:
    with Path("huge.png").open("wb") as file:
        file.write(b"GIF89a")
        file.truncate(1 << 40)
    assert image_gen.probe_file("huge.png") is None
    assert (
        "has 1,099,511,627,776 bytes" in run("edit", "--image", "huge.png", "--prompt", "x").stderr
    )


# ------------------------------------------------------------------- images that are named only


class Shop(ThreadingHTTPServer):
    """Where images lie that an answer only names; it notes who comes, and with what."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Visit)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer = document({"url": f"{self.url}/fox.png"})
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.replies: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}


class Visit(BaseHTTPRequestHandler):
    server: Shop

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, headers))
        planned = self.server.replies.get(self.path, [])
        status, more, body = planned.pop(0) if planned else (200, {}, FOX)
        self.send_response(status)
        for name, value in {**more, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.replies.setdefault(self.path, []).insert(
            0, (200, {"set-cookie": "id=7"}, self.server.answer)
        )
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def shop() -> Iterator[Shop]:
    with Shop() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def bought(run: Run, server: Shop, *flags: object) -> Result:
    env = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "sk-test-0123456789"}
    return run(*live.generate("--json", *flags), env=env)


@pytest.mark.parametrize(
    "hops",
    [
        [],
        [(503, {}, b"")],
        [(404, {}, b"not yet")],
        [(302, {"location": "/a"}, b""), (307, {"location": "/b"}, b"")],
    ],
    ids=["at once", "after an error", "when it is there", "through redirects"],
)
def test_an_image_at_an_address_of_the_api_is_fetched_without_the_key(
    run: Run, hops: list[tuple[int, dict[str, str], bytes]]
) -> None:
    with shop() as server:
        server.replies["/fox.png"] = hops
        assert bought(run, server).exit_code == 0
        visits = server.seen
    assert Path("fox.png").read_bytes() == FOX
    assert [method for method, _, _ in visits].count("POST") == 1
    for _, _, headers in visits[1:]:
        assert not {"authorization", "cookie", "openai-organization"} & headers.keys()


REFUSED = {
    "plain http": "http://images.example/a.png",
    "this machine": "https://127.0.0.1/a.png",
    "another scheme": "file:///etc/passwd",
    "no address": "http://[",
}


@pytest.mark.parametrize("address", REFUSED.values(), ids=REFUSED)
def test_an_address_that_is_not_fetched_is_told(run: Run, api: ImagesAPI, address: str) -> None:
    api.script(answered(document({"url": address})))
    result = run(*live.generate())
    assert result.exit_code == 1
    assert address in result.stderr or address in Path("fox.png.answer").read_text()
    assert "Traceback" not in result.stderr
    assert Path("fox.png.answer").exists()
    assert len(api.requests) == 1


def test_a_host_that_cannot_be_is_told(run_process: Run, api: ImagesAPI) -> None:
    address = f"https://{'a' * 64}.example/x.png"
    api.script(answered(document({"url": address})))
    result = run_process(*live.generate())
    assert f"the image at {address} was not fetched" in live.error(result)
    assert "Traceback" not in result.stderr


def test_what_stays_away_is_asked_for_again_and_the_image_never(run: Run) -> None:
    with shop() as server:
        server.replies["/fox.png"] = [(500, {}, b"")] * 9
        result = bought(run, server, "--max-attempts", 3)
        methods = [method for method, _, _ in server.seen]
    assert f"the image at {server.url}/fox.png was not fetched: HTTP 500" in live.error(result)
    assert methods == ["POST", "GET", "GET", "GET"]


def test_of_many_addresses_as_many_are_fetched_as_can_be_asked_for(run: Run) -> None:
    with shop() as server:
        links = [{"url": f"{server.url}/{number}.png"} for number in range(300)]
        server.answer = json.dumps({"links": links}).encode()
        assert bought(run, server).exit_code == 0
        methods = [method for method, _, _ in server.seen]
    assert methods == ["POST", *["GET"] * image_gen.MAX_N]


def test_redirects_come_to_an_end(run: Run) -> None:
    with shop() as server:
        server.replies["/fox.png"] = [(302, {"location": "/fox.png"}, b"")] * 9
        result = bought(run, server)
        assert len(server.seen) == 2 + image_gen.MAX_REDIRECTS
    assert "more than 3 redirects away" in live.error(result)
