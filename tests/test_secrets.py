"""Secrets: no part of the key is printed, logged or written, and none goes where it should not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from images_api import STORED, answered, status
from inputs import encoded
from PIL import Image

if TYPE_CHECKING:
    from cli import Result, Run
    from images_api import ImagesAPI, Reply

SECRET = "sk-proj-Zq81LmTw0Xc5Vb29NdRf"
FOX = encoded(Image.new("RGB", (64, 64), "teal"))


def parts(secret: str = SECRET) -> set[str]:
    """All that is long enough to tell."""
    length = image_gen.MIN_SECRET
    return {secret[at : at + length] for at in range(len(secret) - length + 1)}


def told(result: Result) -> list[str]:
    """The parts of the key that a run has printed, or left in any file."""
    seen = result.stdout + result.stderr
    for path in Path().rglob("*"):
        seen += str(path) + (path.read_text(encoding="latin-1") if path.is_file() else "")
    return sorted(part for part in parts() if part in seen)


# ----------------------------------------------------------------- what the other side repeats


def as_text(text: str, number: int = 400) -> Reply:
    return answered(text.encode(), number=number, content_type="text/plain")


def as_json(content: object) -> Reply:
    return answered(json.dumps(content).encode())


def as_error(**fields: object) -> Reply:
    return answered(json.dumps({"error": fields}).encode(), number=400)


def with_header(name: str, number: int) -> Reply:
    return answered(b"{}", number=number, headers={name: f"/{SECRET}"})


REPEATED = {
    "whole": as_text(f"the key {SECRET} is wrong"),
    "its head": as_text(f"the key {SECRET[:12]}… is wrong"),
    "its end": as_text(f"the key …{SECRET[-9:]} is wrong"),
    "head and end": as_text(f"the key {SECRET[:10]}****{SECRET[-10:]} is wrong"),
    "twice": as_text(f"{SECRET}{SECRET} {SECRET[3:20]}"),
    "where a message is cut": as_text("x" * 590 + f" {SECRET} " + "y" * 90),
    "in the middle of words": as_text(f"key=“{SECRET}”"),
    "its message": as_error(message=f"the key {SECRET} is wrong"),
    "its code": as_error(message="wrong", code=SECRET),
    "its type": as_error(message="wrong", type=SECRET),
    "as a number's unit": as_error(message="wrong", code={"of": SECRET}),
    "a page": answered(f"<title>{SECRET}</title>".encode(), number=403),
    "a redirect": with_header("location", 302),
    "its request id": with_header("x-request-id", 400),
    "a task": as_json({"status": "queued", "id": SECRET}),
    "an answer without an image": as_json({"ok": True, "echo": f"Bearer {SECRET}"}),
    "an error in a 200": as_json({"error": {"message": SECRET, "code": SECRET[:9]}}),
    "an event": answered(
        b'data: {"type": "error", "error": {"message": "%b"}}\n\n' % SECRET.encode(),
        content_type="text/event-stream",
    ),
    "an address": as_json({"data": [{"url": f"http://images.example/a.png?sig={SECRET}"}]}),
    "an address of another kind": as_json({"data": [{"url": f"file:///{SECRET}"}]}),
    "base64": as_json({"data": [{"b64_json": f"{SECRET}"}]}),
    "escaped": answered(
        ('{"error": {"message": "\\u0073' + SECRET[1:] + '"}}').encode(), number=400
    ),
}


@pytest.mark.parametrize("words", [["--json"], []], ids=["JSON", "text"])
@pytest.mark.parametrize("reply", REPEATED.values(), ids=REPEATED)
def test_no_part_of_the_key_is_printed_or_written(
    run: Run, api: ImagesAPI, reply: Reply, words: list[str]
) -> None:
    api.script(reply)
    result = run(*live.generate(*words), env={"OPENAI_API_KEY": SECRET})
    assert live.error(result)
    assert len(api.requests) == 1
    assert told(result) == []


def test_what_is_said_of_an_image_that_came_holds_no_key_either(run: Run, api: ImagesAPI) -> None:
    address = api.store("fox.png", FOX)
    usage = {"total_tokens": 3, "account": SECRET}
    body = {"data": [{"url": address}], "usage": usage, "size": SECRET, "quality": SECRET[:9]}
    api.script(
        answered(json.dumps(body).encode(), headers={"x-request-id": SECRET}),
    )
    result = run(*live.generate("--json"), env={"OPENAI_API_KEY": SECRET})
    assert result.exit_code == 0, result.stderr
    assert told(result) == []
    assert Path("fox.png").read_bytes() == FOX


def test_notes_about_what_is_tried_again_hold_no_key(run: Run, api: ImagesAPI) -> None:
    api.script(status(500, f"upstream said {SECRET}"), as_text(f"no {SECRET[:14]}", 503))
    result = run(*live.generate(), env={"OPENAI_API_KEY": SECRET})
    assert result.exit_code == 0
    assert "attempt 3 of 3" in result.stderr
    assert told(result) == []


def test_a_traceback_holds_no_key(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"with {SECRET}")

    monkeypatch.setattr(image_gen, "decode_item", broken)
    result = run(*live.generate("--json"), env={"OPENAI_API_KEY": SECRET})
    assert "Traceback" in result.stderr
    assert len(api.requests) == 1
    assert told(result) == []


def test_the_log_of_the_sdk_holds_no_key(run_process: Run, api: ImagesAPI) -> None:
    body = json.dumps({"data": [{"url": api.store("fox.png", FOX)}]}).encode()
    api.script(
        status(500, f"the key {SECRET} is wrong", headers={"x-request-id": SECRET[:10]}),
        answered(body, headers={"x-request-id": f"req_{SECRET}"}),
    )
    env = {"OPENAI_API_KEY": SECRET, "OPENAI_LOG": "debug", "OPENAI_PROJECT_ID": SECRET[4:]}
    result = run_process(*live.generate(f"--safety-identifier={SECRET[2:]}"), env=env)
    assert result.exit_code == 0, result.stderr
    assert "DEBUG] request_id: req_[key]" in result.stderr
    assert len(api.requests) == 3
    assert told(result) == []


def test_a_key_in_the_address_is_not_repeated_by_what_fails(run: Run) -> None:
    env = {"OPENAI_BASE_URL": f"http://127.0.0.1:9/{SECRET}/v1", "OPENAI_API_KEY": SECRET}
    result = run(*live.generate("--json"), env=env)
    assert result.exit_code == 1
    assert told(result) == []


ALPHABET = st.text("ab-[]key", min_size=8, max_size=14)


@given(secret=ALPHABET, around=st.lists(st.text("ab-key ", max_size=6), max_size=4), cut=st.data())
@example(secret="aaaaaaaaaa", around=["", ""], cut=None)
def test_no_part_of_a_key_outlives_the_blotting(
    secret: str, around: list[str], cut: st.DataObject | None
) -> None:
    text = ""
    for words in around:
        start = cut.draw(st.integers(0, 3)) if cut else 0
        end = cut.draw(st.integers(0, len(secret))) if cut else len(secret)
        text += words + secret[start:end]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", secret)
        blotted = image_gen.redacted(text)
    left = blotted.replace("[key]", "\0")
    assert not [part for part in parts(secret) if part in left]


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        pytest.param("", "all of it", id="no key"),
        pytest.param("test", "a test of tests", id="a stand-in"),
        pytest.param(SECRET, "a task of a proj", id="words that are in the key"),
    ],
)
def test_ordinary_words_stay(monkeypatch: pytest.MonkeyPatch, secret: str, text: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    assert image_gen.redacted(text) == text


def test_a_long_text_is_blotted_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET * 4)
    text = f"{SECRET[:9]} {SECRET[4:]} ordinary words " * 20_000
    blotted = image_gen.redacted(text)
    assert not [part for part in parts() if part in blotted]
    assert blotted.count("ordinary words") == 20_000


# ------------------------------------------------------------------------- where the key goes


def test_the_key_goes_to_the_api_and_to_no_address_of_an_answer(
    run: Run, api: ImagesAPI, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login fox password den\n")
    netrc.chmod(0o600)
    body = {"data": [{"url": api.store("fox.png", FOX)}]}
    cookie = {"set-cookie": "session=1; Path=/"}
    api.script(answered(json.dumps(body).encode(), headers=cookie))
    env = {"HOME": str(tmp_path), "NETRC": str(netrc), "OPENAI_ORG_ID": "org-1"}
    assert run(*live.generate(), env=env).exit_code == 0
    post, get = api.requests
    assert post.key_as_expected
    assert get.route == STORED
    assert not {"authorization", "cookie", "openai-organization"} & get.headers.keys()


# --------------------------------------------------------------------------- OPENAI_BASE_URL


@pytest.mark.parametrize(
    "url",
    [
        "https://fox:den-7141@api.example/v1",
        "https://den-7141@api.example/v1",
        "https://:den-7141@api.example/v1",
        "http://fox:den-7141@127.0.0.1:9/v1",
        "fox:den-7141@api.example/v1",
        "https://fox:den-7141%40x@api.example",
        " https://fox:den-7141@api.example/v1 ",
        "https://fox:den-7141@",
        "https://fox:den-7141@[::1",
    ],
)
def test_a_password_in_the_address_is_refused_unseen(
    run: Run, run_process: Run, api: ImagesAPI, url: str
) -> None:
    for runs in (run, run_process):
        result = runs(*live.generate(), env={"OPENAI_BASE_URL": url})
        assert (result.exit_code, api.requests) == (2, [])
        (problem,) = live.lines(result)
        assert problem.startswith("OPENAI_BASE_URL holds a user or a password")
        assert "den-7141" not in result.stderr + result.stdout


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "is set and empty"),
        ("  ", "is set and empty"),
        ("{} ", "begins or ends with white space"),
        (" {}", "begins or ends with white space"),
        ("{}\n", "begins or ends with white space"),
        ("ftp://api.example", "has to begin with https://"),
        ("api.example/v1", "has to begin with https://"),
        ("https://", "has to begin with https:// and a host"),
        ("https://api.example:99999/v1", "has to begin with https:// and a host"),
    ],
)
def test_an_address_that_is_none_is_refused_by_the_name_of_its_variable(
    run: Run, api: ImagesAPI, url: str, said: str
) -> None:
    result = run(*live.generate(), env={"OPENAI_BASE_URL": url.format(api.base_url)})
    assert (result.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(result)
    assert problem.startswith("OPENAI_BASE_URL ")
    assert said in problem


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://api.example/v1", True),
        ("http://192.168.0.7:8080", True),
        ("http://0.0.0.0:8080", True),
        ("http://localhost.example", True),
        ("https://api.example/v1", False),
        ("http://127.0.0.1:8080/v1", False),
        ("http://127.3.4.5/v1", False),
        ("http://[::1]:8080/v1", False),
        ("http://localhost:8080/v1", False),
        ("http://api.localhost/v1", False),
        (None, False),
    ],
)
def test_a_key_in_clear_over_a_network_is_warned_of(url: str | None, *, warned: bool) -> None:
    found = list(image_gen.check_base_url(url))
    assert [type(finding) for finding in found] == [image_gen.Notice] * warned
    assert all("OPENAI_BASE_URL begins with http://" in finding for finding in found)


def test_a_run_over_http_to_another_machine_goes_on_with_the_warning(
    run_process: Run, api: ImagesAPI
) -> None:
    url = api.base_url.replace("127.0.0.1", "0.0.0.0")
    result = run_process(*live.generate(), env={"OPENAI_BASE_URL": url})
    assert result.exit_code == 0, result.stderr
    (warning,) = live.lines(result, "Warning: ")
    assert "cross the network in clear" in warning


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_not_there_are_named(run: Run, api: ImagesAPI, name: str) -> None:
    result = run(*live.generate(), env={name: os.path.abspath("certs.pem")})
    assert (result.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(result)
    assert problem.startswith(f"{name} names ")
    assert "certs.pem" in problem


def test_a_password_that_cuts_its_address_short_is_not_shown(run: Run) -> None:
    address = "https://me:pass?w0rd-w0rd@127.0.0.1/v1"
    result = run(*live.generate(), env={"OPENAI_BASE_URL": address, "OPENAI_API_KEY": SECRET})
    assert (result.exit_code, "w0rd" in result.stderr) == (2, False)
    assert "OPENAI_BASE_URL is not shown" in result.stderr


def test_an_address_with_an_at_sign_in_its_path_is_taken() -> None:
    assert [*image_gen.check_base_url("https://gateway.example/v1/@team")] == []


def test_a_bug_behind_a_batch_is_told_once_and_without_the_key(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"leak {SECRET}")

    argv = live.batch(6, "--batch-api")
    with monkeypatch.context() as patch:
        patch.setattr(image_gen, "save_answer", broken)
        result = run(*argv, env={"OPENAI_API_KEY": SECRET})
    assert (result.exit_code, result.stderr.count("Traceback")) == (1, 1)
    assert SECRET not in result.stderr + result.stdout
    assert run(*argv).exit_code == 0
    assert (len(api.batches), len(list(Path("out").glob("*.png")))) == (1, 6)
