"""What the fixtures promise to every test."""

from __future__ import annotations

import signal
import socket
import sys
from functools import partial

import pytest
from cli import finished

IGNORED = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
HANDLER = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_a_connection_that_would_leave_the_machine_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"reached out to 'example\.com'"):
        socket.create_connection(("example.com", 80))
    with (
        socket.socket() as connection,
        pytest.raises(pytest.fail.Exception, match=r"reached out to '192\.0\.2\.1'"),
    ):
        connection.connect(("192.0.2.1", 80))


def test_ctrl_c_is_heard_here_and_by_what_is_started() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert finished([sys.executable, "-c", HANDLER]).stdout == "True\n"
    assert finished([sys.executable, "-c", HANDLER], preexec_fn=IGNORED).stdout == "False\n"


def test_ctrl_c_is_heard_where_the_tests_are_started_with_it_ignored() -> None:
    test = f"{__file__}::{test_ctrl_c_is_heard_here_and_by_what_is_started.__name__}"
    words = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test]
    ended = finished(words, preexec_fn=IGNORED)
    assert ended.exit_code == 0, ended.stdout
