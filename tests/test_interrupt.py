"""Ctrl-C and SIGTERM: what was paid for is saved, and the last line says how to go on."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import image_gen
import live
import pytest
from cli import heard
from images_api import rate_limited, server_error

if TYPE_CHECKING:
    import subprocess

    from cli import Run, Start
    from images_api import ImagesAPI, Reply

either_signal = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name
)
HINT = "--skip-existing"


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """The exit code and the lines of stdout and stderr."""
    out, err = process.communicate()
    assert "Traceback" not in err
    return process.returncode, out.splitlines(), err.splitlines()


@either_signal
def test_the_first_signal_saves_what_is_in_flight_and_sends_nothing_more(
    start_process: Start, run: Run, api: ImagesAPI, number: signal.Signals
) -> None:
    api.hold()
    argv = live.batch(6, "--concurrency", 2, "--downscale-max-dim", 32)
    process = start_process(*argv)
    api.wait_for_requests(2)
    process.send_signal(number)
    heard(process, "Interrupted")
    api.release()
    code, out, err = ended(process)
    assert code == 130
    assert len(api.requests) == 2
    assert sorted(out) == [f"Wrote out/{name}" for name in live.names()]
    assert [name for name in live.names() if "-web" not in name] == live.images(1, 2)
    assert HINT in err[-1]

    assert run(*argv, "--skip-existing").exit_code == 0
    assert len(api.requests) == 6
    assert len(live.names()) == 12


@either_signal
def test_the_second_signal_ends_at_once(
    start_process: Start, api: ImagesAPI, number: signal.Signals
) -> None:
    api.hold()
    process = start_process(*live.batch(5, "--concurrency", 2, "--json"))
    api.wait_for_requests(2)
    process.send_signal(number)
    heard(process, "Interrupted")
    process.send_signal(number)
    code, out, err = ended(process)  # the server still holds both requests
    assert code == 130
    assert len(api.requests) == 2
    assert live.names() == []
    assert HINT in err[-1]
    lines = {line["job"]: line for line in map(json.loads, out)}
    dropped, unsent = lines[1], lines[5]
    assert dropped["status"] == "failed"
    assert dropped["error"]["maybe_billed"] is True
    assert unsent["status"] == "not_sent"
    assert unsent["error"]["maybe_billed"] is False
    assert {line["error"]["kind"] for line in lines.values()} == {"interrupted"}


def test_a_single_command_saves_its_image(start_process: Start, api: ImagesAPI) -> None:
    api.hold()
    process = start_process(*live.generate("--force"))
    api.wait_for_requests(1)
    process.send_signal(signal.SIGINT)
    heard(process, "Interrupted")
    api.release()
    code, out, err = ended(process)
    assert (code, out) == (130, ["Wrote fox.png"])
    assert live.names(".") == ["fox.png"]
    assert err[-1].startswith("1 job: 1 done")  # nothing is left to resume


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        pytest.param(rate_limited(500), "rate limit", id="pause"),
        pytest.param(server_error(headers={"retry-after": "500"}), "attempt 2 of 3", id="back-off"),
    ],
)
def test_nobody_waits_on_after_a_signal(
    start_process: Start, api: ImagesAPI, reply: Reply, said: str
) -> None:
    api.script(reply, repeat=True)
    process = start_process(*live.batch(3, "--concurrency", 1))
    heard(process, said)
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, [])
    assert len(api.requests) == 1
    assert live.names() == []
    assert HINT in err[-1]


def test_quiet_still_says_how_to_resume(start_process: Start, api: ImagesAPI) -> None:
    api.script(rate_limited(500))
    process = start_process(*live.batch(2, "--quiet", "--concurrency", 1))
    api.wait_for_answers(1)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130
    assert HINT in err[-1]


def test_a_signal_behind_the_last_image_does_not_say_that_nothing_was_sent(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = image_gen.Report.close

    def closing(report: image_gen.Report, *arguments: Any) -> None:  # noqa: ANN401
        close(report, *arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(image_gen.Report, "close", closing)
    result = run(*live.batch(2))
    assert (result.exit_code, len(api.requests)) == (130, 2)
    assert "Error: interrupted; the images are saved\n" in result.stderr
    assert "before anything was sent" not in result.stderr
