"""Fixtures: the loopback API, a guard against any other connection, and two ways to run the CLI."""

from __future__ import annotations

import io
import os
import signal
import socket
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import image_gen
import pytest
from cli import SCRIPTS, Result, command, finished, started
from hypothesis import HealthCheck, settings
from images_api import PROXIES, ImagesAPI
from live import shorten_waits

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from cli import Run, Start

# A busy machine is no bug.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what a run takes over
LOOPBACK = {"127.0.0.1", "::1", "localhost", b"127.0.0.1", b"localhost", "", None}


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that would leave this machine fails the test, whatever catches exceptions."""

    def refuse_others(host: object) -> None:
        if host not in LOOPBACK:
            pytest.fail(f"a test reached out to {host!r}")

    def guarded(connect: Callable[..., object]) -> Callable[[socket.socket, Any], object]:
        def guard(sock: socket.socket, address: tuple[object, ...]) -> object:
            if sock.family in {socket.AF_INET, socket.AF_INET6}:
                refuse_others(address[0])
            return connect(sock, address)

        return guard

    def resolve(host: object, *arguments: object, **options: object) -> object:
        refuse_others(host)
        return getaddrinfo(host, *arguments, **options)

    getaddrinfo: Callable[..., object] = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no proxy, and an empty current directory."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.upper() in {*PROXIES, "NO_PROXY"}:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def forks_find_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What deaths.py forks imports this program and these tests."""
    tests = os.path.dirname(os.path.abspath(__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), tests]))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Ctrl-C is heard, also where the tests are started with it ignored, as nohup does.

    A process inherits what its parent ignores; what the parent catches, it begins with the default.
    """
    before = {number: signal.getsignal(number) for number in HEARD}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def short_waits() -> Iterator[pytest.MonkeyPatch]:
    """Runs in this process wait for next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_waits(patch)
        yield patch


@pytest.fixture
def real_waits(short_waits: pytest.MonkeyPatch) -> None:
    """For a test of how long a user waits."""
    short_waits.undo()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImagesAPI]:
    """A loopback Image API to which the environment points, for this process and its children."""
    with ImagesAPI(auto_size="64x64") as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The CLI in this process, through `main`."""

    def run(*argv: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Result:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                exit_code = image_gen.main([str(word) for word in argv])
            except SystemExit as end:  # argparse: --help and wrong syntax
                exit_code = end.code if isinstance(end.code, int) else int(end.code is not None)
        streams = capfd.readouterr()
        return Result(exit_code=exit_code, stdout=streams.out, stderr=streams.err)

    return run


@pytest.fixture
def run_process() -> Run:
    """The CLI as a process of its own."""

    def run_process(
        *argv: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> Result:
        return finished(command(*argv), input=stdin, env=os.environ | dict(env or {}))

    return run_process


@pytest.fixture
def start_process() -> Iterator[Start]:
    """The CLI as a process that the test talks to while it runs."""
    with ExitStack() as stack:

        def start_process(
            *argv: str | Path, env: Mapping[str, str] | None = None
        ) -> subprocess.Popen[str]:
            process = started(command(*argv), env=os.environ | dict(env or {}))
            return stack.enter_context(process)

        yield start_process
