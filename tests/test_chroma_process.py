"""remove_chroma_key.py as a process: streams of any kind, signals, odd names, an older Python."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import remove_chroma_key
from chroma_oracle import disc, load, run, save
from images_api import PATIENCE

SCRIPT = Path(remove_chroma_key.__file__)
UNMIX = ("--auto-key", "border", "--unmix")
COMMAND = [sys.executable, str(SCRIPT)]
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
EVIL = "k\x1b]0;owned\x07\x9b31m\nSecond line.png"


def shell(script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $RUN is the tool."""
    return subprocess.run(
        ["bash", "-c", script.replace("$RUN", shlex.join(COMMAND))],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
        timeout=PATIENCE,
        env={**os.environ, **env},
    )


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a script that loads the tool."""
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    )


@pytest.fixture(autouse=True)
def picture() -> Path:
    """A grey disc on green, in the current directory."""
    return save(Path("disc.png"), disc((120, 110, 100)).composite((0, 255, 0)))


# ── Streams ──────────────────────────────────────────────────────────────────────────────────────

FULL = "stdout takes no more: No space left on device"
CUT = "$RUN --input disc.png --out o.png --auto-key border --unmix"


@pytest.mark.parametrize(
    ("script", "exit_code", "errors"),
    [
        pytest.param(f"{CUT} >&-", 0, [], id="stdout closed"),
        pytest.param(f"{CUT} --json >&-", 0, [], id="stdout closed, json"),
        pytest.param(f"{CUT} <&- >&- 2>&-", 0, [], id="all closed"),
        pytest.param(f"set -o pipefail; {CUT} | true", 0, [], id="a reader that goes away"),
        pytest.param(
            f"{CUT} >/dev/full",
            1,
            [f"Error: {FULL}; the work is done all the same"],
            id="stdout full",
        ),
    ],
)
def test_a_stdout_that_takes_nothing_does_not_stop_the_work(
    script: str, exit_code: int, errors: list[str]
) -> None:
    done = shell(script)
    assert (done.returncode, done.stderr.splitlines()) == (exit_code, errors)
    assert load(Path("o.png")).shape == (96, 96, 4)


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("argv", "exit_code"),
    [
        pytest.param("--input disc.png --key-color '#ff00ff' --out o.png", 0, id="a warning"),
        pytest.param("--input damaged.png --out o.png", 1, id="a failure"),
        pytest.param("--input missing.png --out o.png", 2, id="a refusal"),
    ],
)
def test_a_stderr_that_takes_nothing_changes_no_exit_code(
    argv: str, exit_code: int, closed: str
) -> None:
    Path("damaged.png").write_bytes(b"\x89PNG")
    done = shell(f"$RUN {argv} {closed}")
    assert (done.returncode, done.stderr) == (exit_code, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "latin-1"])
def test_help_is_printed_on_any_stream(encoding: str) -> None:
    done = shell("$RUN --help", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--unmix" in done.stdout
    assert "\\x" not in done.stdout


def test_help_for_a_full_disk_is_an_error_line() -> None:
    done = shell("$RUN --help >/dev/full")
    assert done.returncode == 2
    assert done.stderr == f"Error: {FULL}\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "utf-8"])
def test_json_is_json_whatever_the_name_and_the_stream(encoding: str, picture: Path) -> None:
    name = os.fsdecode(b"a\xff\x9b") + "Bäume\u202e 😀" + EVIL
    source = picture.rename(name)
    Path("bad" + name).write_bytes(b"")
    names = shlex.join([str(source), "bad" + name])
    done = shell(f"$RUN --input {names} --out-dir cut --json", PYTHONIOENCODING=encoding)
    good, bad = map(json.loads, done.stdout.splitlines())
    assert [good["input"], bad["input"]] == [name, "bad" + name]
    assert all(line.isprintable() for line in [*done.stdout.split("\n"), *done.stderr.split("\n")])
    assert ("Bäume" in done.stdout) is (encoding == "utf-8")


def test_control_characters_in_names_are_shown_and_not_obeyed(picture: Path) -> None:
    picture.rename(EVIL)
    Path("bad" + EVIL).write_bytes(b"nothing")
    bad, good = (
        run("--input", "bad" + EVIL, "--out", "o.png"),
        run("--input", EVIL, "--out-dir", "d"),
    )
    assert bad.stderr.startswith(
        "Error: badk\\x1b]0;owned\\x07\\x9b31m\\nSecond line.png: no picture"
    )
    assert good.stdout.splitlines()[0] == "Wrote d/k\\x1b]0;owned\\x07\\x9b31m\\nSecond line.png"
    assert [len(text.splitlines()) for text in (bad.stderr, good.stdout)] == [1, 4]
    assert Path("d", EVIL).exists()


# ── Signals ──────────────────────────────────────────────────────────────────────────────────────


# Python 3.14 starts workers by another way than older ones, macOS and Windows by a third.
STARTED_SO = """
import multiprocessing, os, sys
import remove_chroma_key as tool
os.sched_getaffinity = lambda _: {{0, 1}}
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    sys.exit(tool.main())
"""


def busy(method: str) -> subprocess.Popen[str]:
    """A run that has written its first picture, and whose workers have much to do."""
    pixels = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3)).astype(np.uint8)
    large = save(Path("large.bmp"), pixels)
    names = ["disc.png"]
    for number in range(8):
        names.append(f"{number}.bmp")
        os.link(large, names[-1])
    Path("busy.py").write_text(STARTED_SO.format(method=method))
    process = subprocess.Popen(
        [sys.executable, "busy.py", "--input", *names, "--out-dir", "cut", *UNMIX],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    )
    assert process.stdout
    assert process.stdout.readline() == "Wrote cut/disc.png\n"
    return process


@pytest.mark.parametrize(
    ("method", "to_all"),
    [
        pytest.param("fork", False, id="fork, to the program"),
        pytest.param("fork", True, id="fork, to the group"),
        pytest.param("spawn", True, id="spawn, to the group"),
        pytest.param("forkserver", False, id="forkserver, to the program"),
    ],
)
@pytest.mark.parametrize("number", [*ENDING, signal.SIGKILL], ids=lambda number: number.name)
def test_no_worker_outlives_the_program(
    number: signal.Signals, method: str, *, to_all: bool
) -> None:
    process = busy(method)
    try:
        (os.killpg if to_all else os.kill)(process.pid, number)
        _, stderr = process.communicate(timeout=PATIENCE)  # until nobody holds the streams
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if number == signal.SIGKILL:
        assert (process.returncode, stderr) == (-number, "")
    else:
        assert process.returncode == 130
        assert stderr == "Error: interrupted; what was already written stays\n"
    assert len(list(Path("cut").iterdir())) < 9
    assert not list(Path("cut").glob(".*"))


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_a_signal_is_130_without_a_traceback(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_path: Path) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(remove_chroma_key, "read_picture", interrupted)
    outcome = run("--input", "disc.png", "--out", "o.png")
    assert outcome.exit_code == 130
    assert outcome.stderr == "Error: interrupted; what was already written stays\n"
    assert os.listdir() == ["disc.png"]


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_signals_while_a_picture_is_written_leave_it_whole(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_new = remove_chroma_key.write_new

    def interrupted(target: Path, data: bytes, *, force: bool) -> None:
        signal.raise_signal(number)
        write_new(target, data, force=force)
        signal.raise_signal(number)

    monkeypatch.setattr(remove_chroma_key, "write_new", interrupted)
    assert run("--input", "disc.png", "--out", "o.png").exit_code == 130
    assert sorted(os.listdir()) == ["disc.png", "o.png"]
    assert load(Path("o.png")).shape == (96, 96, 4)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_an_ignored_signal_stays_ignored(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_picture = remove_chroma_key.read_picture

    def undisturbed(path: Path) -> remove_chroma_key.Picture:
        os.kill(os.getpid(), number)
        return read_picture(path)

    signal.signal(number, signal.SIG_IGN)
    monkeypatch.setattr(remove_chroma_key, "read_picture", undisturbed)
    assert run("--input", "disc.png", "--out", "o.png").exit_code == 0


def test_a_worker_leaves_signals_to_the_program() -> None:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("forkserver")
    worker = context.Process(target=remove_chroma_key.work, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    assert worker.pid
    for number in ENDING:
        ours.send(remove_chroma_key.Inspection(Path("disc.png").absolute()))
        assert ours.recv().size == (96, 96)
        os.kill(worker.pid, number)
    ours.send(remove_chroma_key.Inspection(Path("disc.png").absolute()))
    assert ours.recv().size == (96, 96)
    worker.kill()
    worker.join()


# A file, so that workers of any start method load it as well.
DEADLY = """
import os, sys
import remove_chroma_key as tool
read_picture = tool.read_picture
def read_or_die(path):
    if path.name in {"b.png", "c.png", "d.png"} and tool.multiprocessing.parent_process():
        os._exit(9)
    return read_picture(path)
tool.read_picture = read_or_die
os.sched_getaffinity = lambda _: {0, 1}
if __name__ == "__main__":
    sys.exit(tool.main())
"""


def test_a_worker_that_dies_costs_its_own_picture_alone(picture: Path) -> None:
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    for name in names:
        os.link(picture, name)
    Path("deadly.py").write_text(DEADLY)
    done = script("deadly.py", "--input", *names, "--out-dir", "cut", "--unmix", "--json")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"Error: {name}: its worker process died (out of memory?)" for name in names[1:4]
    ]
    assert [json.loads(line)["input"] for line in done.stdout.splitlines()] == names
    assert sorted(os.listdir("cut")) == ["a.png", "e.png"]


NO_PROCESSES = """
import os, sys
import remove_chroma_key as tool
def refuse(*_):
    raise BlockingIOError(11, "Resource temporarily unavailable")
tool.multiprocessing.Process.start = refuse
os.sched_getaffinity = lambda _: {0, 1}
if __name__ == "__main__":
    sys.exit(tool.main())
"""


def test_without_room_for_workers_the_program_works_alone(picture: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    for name in names:
        os.link(picture, name)
    Path("alone.py").write_text(NO_PROCESSES)
    done = script("alone.py", "--input", *names, "--out-dir", "cut", "--unmix")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir("cut")) == names


# ── Names ────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_may_be_as_long_as_names_are() -> None:
    name = "é" * 125 + "x.png"
    assert len(os.fsencode(name)) == 255
    assert run("--input", "disc.png", "--out", name).exit_code == 0
    assert sorted(os.listdir()) == ["disc.png", name]


def test_wildcards_that_the_shell_left_alone_are_expanded(picture: Path) -> None:
    Path("shots").mkdir()
    for name in ("b.png", "a.png", "c.jpg"):
        Path("shots", name).write_bytes(picture.read_bytes())
    outcome = run("--input", "shots/*.png", "disc.pn[f-h]", "--out-dir", "cut")
    assert outcome.exit_code == 0
    wrote = [line for line in outcome.stdout.splitlines() if line.startswith("Wrote")]
    assert wrote == ["Wrote cut/a.png", "Wrote cut/b.png", "Wrote cut/disc.png"]
    assert "received 2" in run("--input", "shots/*.png", "--out", "o.png").stderr
    assert "x*.png does not exist" in run("--input", "x*.png", "--out", "o.png").stderr


def test_a_name_with_brackets_is_a_name_before_it_is_a_wildcard(picture: Path) -> None:
    os.link(picture, "d[io]sc.png")
    assert run("--input", "d[io]sc.png", "--out-dir", "cut").exit_code == 0
    assert os.listdir("cut") == ["d[io]sc.png"]


# ── An older Python ──────────────────────────────────────────────────────────────────────────────


def test_the_script_is_read_by_a_python_that_only_gets_told_off() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("version", [(3, 8, 0), (3, 9, 18), (3, 10, 13)], ids=str)
def test_an_older_python_is_told_in_a_sentence(version: tuple[int, int, int]) -> None:
    # What Python 3.8 lacks and the script asks typing for, it would have to ask for further below.
    older = f"import runpy, sys, typing; del typing.TypeAlias; sys.version_info = {version}; "
    code = older + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (only,) = done.stderr.splitlines()
    assert only.startswith("Error: remove_chroma_key.py needs Python 3.11 or newer; ")
    assert only.endswith(" is {}.{}.{}".format(*version))
