"""One batch at a time in a folder, with the system's lock or with a file."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest

if TYPE_CHECKING:
    from cli import Run, Start
    from images_api import ImagesAPI

LOCK = Path("out", image_gen.LOCK_NAME)


def owner(**changes: object) -> bytes:
    """A lock file of this process, or of another."""
    facts = {"host": socket.gethostname(), "process": os.getpid(), "since": "2026-11-28T00:00:00"}
    return json.dumps(facts | changes).encode()


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


@pytest.fixture(params=["missing", "refused"])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without locks, as Windows, or a network disk that refuses them."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if request.param == "missing":
        monkeypatch.setattr(image_gen, "fcntl", image_gen.Lazy("no_such_module"))
    else:
        monkeypatch.setattr("fcntl.flock", refuse)


def test_a_second_batch_in_a_folder_is_refused_while_the_first_runs(
    run: Run, start_process: Start, api: ImagesAPI
) -> None:
    api.hold()
    first = start_process(*live.batch(1))
    api.wait_for_requests(1)
    second = run(*live.batch(1, "--skip-existing"))
    assert (second.exit_code, len(api.requests)) == (2, 1)
    assert live.lines(second) == ["another process works on out; wait for it, or end it"]
    assert run(*live.batch(1, "--skip-existing", "--dry-run")).exit_code == 0
    api.release()
    first.communicate()
    assert first.returncode == 0
    assert run(*live.batch(1, "--skip-existing")).exit_code == 0


def test_a_host_without_locks_is_seen_by_one_that_has_them(run: Run, api: ImagesAPI) -> None:
    Path("out").mkdir()
    LOCK.write_bytes(owner(host="elsewhere"))
    result = run(*live.batch(1))
    assert (result.exit_code, api.requests) == (2, [])
    assert "on elsewhere" in result.stderr


@pytest.mark.usefixtures("no_locks")
class TestWithoutLocks:
    def test_a_file_says_who_is_there_and_goes_at_the_end(self, run: Run, api: ImagesAPI) -> None:
        seen: list[bytes] = []
        result = live.run_held(run, api, live.batch(1), act=lambda: seen.append(LOCK.read_bytes()))
        assert result.exit_code == 0, result.stderr
        facts = json.loads(seen[0])
        assert (facts["host"], facts["process"]) == (socket.gethostname(), os.getpid())
        assert facts["since"].startswith("20")
        assert live.names() == live.images(1)

    @pytest.mark.parametrize(
        "held",
        [
            pytest.param(owner(), id="a process of this host"),
            pytest.param(owner(host="elsewhere", process=1), id="another host"),
            pytest.param(b"", id="torn"),
            pytest.param(b"[1]", id="foreign"),
            pytest.param(owner(process="none"), id="no number"),
            pytest.param(owner(process=10**40), id="no number of a process"),
        ],
    )
    def test_whoever_is_there_is_named_and_the_file_stays(
        self, run: Run, api: ImagesAPI, held: bytes
    ) -> None:
        Path("out").mkdir()
        LOCK.write_bytes(held)
        result = run(*live.batch(1))
        assert (result.exit_code, api.requests) == (2, [])
        (problem,) = live.lines(result)
        assert f"delete {LOCK}" in problem
        assert LOCK.read_bytes() == held

    def test_the_lock_of_a_process_that_has_ended_is_taken_over(
        self, run: Run, api: ImagesAPI
    ) -> None:
        Path("out").mkdir()
        LOCK.write_bytes(owner(process=ended_process()))
        assert run(*live.batch(1)).exit_code == 0
        assert live.names() == live.images(1)
        assert len(api.requests) == 1

    def test_a_refused_command_leaves_nothing(self, run: Run) -> None:
        assert run(*live.batch([{"prompt": "x", "size": "7x7"}])).exit_code == 2
        assert not Path("out").exists()
