"""The key is in no message, no file and no log, and goes to nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import Failure, status

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI

KEY = "sk-proj-" + "Ab3dE6gHiJ9kLmN" * 8


def parts(text: str) -> list[str]:
    """The parts of the key, of eight characters, that a text has."""
    return [part for at in range(len(KEY) - 7) if (part := KEY[at : at + 8]) in text]


QUOTED = {
    "whole": f"the key {KEY} is unknown",
    "at the place where the message is cut": "x" * (601 - len(KEY)) + KEY + " is unknown",
    "its end": f"a key that ends with {KEY[-12:]}",
    "its middle": f"a key with {KEY[30:50]} in it",
    "twice": f"{KEY}{KEY}",
}


@pytest.mark.parametrize("message", QUOTED.values(), ids=QUOTED)
@pytest.mark.parametrize("number", [400, 500])
def test_no_part_of_the_key_is_repeated(
    run: Run, api: ImagesAPI, number: int, message: str
) -> None:
    failure = status(number, message, code=KEY[:40])
    assert isinstance(failure, Failure)
    api.script(replace(failure, headers={"x-request-id": KEY}), repeat=True)
    argv = live.generate("--json", "--max-attempts", 1)
    result = run(*argv, env={"OPENAI_API_KEY": KEY})
    assert result.exit_code == 1
    assert parts(result.stdout + result.stderr) == []
    assert "[key]" in result.stderr


def test_the_log_of_the_sdk_is_blotted_too(run_process: Run, api: ImagesAPI) -> None:
    api.script(status(400, f"the key {KEY} is unknown"))
    env = {"OPENAI_LOG": "debug", "OPENAI_API_KEY": KEY}
    result = run_process(*live.generate(), env=env)
    assert "DEBUG" in result.stderr
    assert parts(result.stderr + result.stdout) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://me:pass-w0rd@gateway/v1",
        "htp://me:pass-w0rd@gateway/v1",
        "http://me:pass-w0rd@a:b/",
    ],
)
def test_a_password_in_the_address_is_refused_unseen(run: Run, address: str) -> None:
    result = run(*live.generate(), env={"OPENAI_BASE_URL": address, "OPENAI_API_KEY": KEY})
    assert result.exit_code == 2
    assert "OPENAI_BASE_URL holds a user or a password" in result.stderr
    assert "w0rd" not in result.stderr


VARIABLES = {
    "an empty address": ({"OPENAI_BASE_URL": ""}, "OPENAI_BASE_URL is set and empty"),
    "blanks": ({"OPENAI_BASE_URL": "https://a.example/v1 "}, "OPENAI_BASE_URL begins or ends"),
    "no scheme": ({"OPENAI_BASE_URL": "a.example/v1"}, 'OPENAI_BASE_URL "a.example/v1" has to'),
    "certificates": ({"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE names /nowhere.pem"),
    "a port of a proxy": ({"HTTPS_PROXY": "http://me:pass-w0rd@a:99999"}, "HTTPS_PROXY names no"),
}


@pytest.mark.parametrize(("variables", "said"), VARIABLES.values(), ids=VARIABLES)
def test_a_variable_that_cannot_be_used_is_named(
    run: Run, variables: dict[str, str], said: str
) -> None:
    result = run(*live.generate(), env={"OPENAI_API_KEY": KEY, **variables})
    assert result.exit_code == 2
    assert said in result.stderr
    assert "w0rd" not in result.stderr


@pytest.mark.parametrize(
    ("host", "is_told"),
    [("192.0.2.7", True), ("gateway.example", True), ("127.0.0.1", False), ("localhost", False)],
)
def test_a_key_in_clear_over_the_network_is_warned_of(host: str, *, is_told: bool) -> None:
    found = [*image_gen.check_base_url(f"http://{host}:8080/v1")]
    assert ["in clear" in finding for finding in found] == [True] * is_told
    assert all(isinstance(finding, image_gen.Notice) for finding in found)


def test_a_key_shorter_than_a_part_is_a_stand_in(run: Run, api: ImagesAPI) -> None:
    api.script(status(400, "no key, no image"))
    assert "no key, no image" in run(*live.generate(), env={"OPENAI_API_KEY": "key"}).stderr
    assert not Path("fox.png").exists()
