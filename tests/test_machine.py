"""The machine: disk, descriptors, threads, packages, Pythons, signals, and bugs of our own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import tomllib
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import image_gen
import live
import pytest
from cli import SCRIPTS, command, finished, heard, started
from images_api import answered, image_bytes
from inputs import FLARE, encoded, picture
from PIL import Image

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from cli import Result, Run, Start
    from images_api import ImagesAPI

SCRIPT = SCRIPTS / "image_gen.py"


@pytest.fixture
def other_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """A place for temporary files and a home, away from those of the machine."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("temporary", "home")}
    monkeypatch.setattr(tempfile, "tempdir", str(found["temporary"]))
    monkeypatch.setenv("HOME", str(found["home"]))
    return found


# --------------------------------------------------------------------------------- the disk


def limited(kind: int, most: int, *argv: str | Path) -> Result:
    """The CLI as a process that may have no more of something, root or not."""
    return finished(command(*argv), preexec_fn=partial(resource.setrlimit, kind, (most, most)))


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_a_folder_that_takes_no_file_is_found_beforehand_and_not_left_behind(
    api: ImagesAPI, size: int
) -> None:
    argv = live.generate(out="a/b/c/fox.png")
    ended = limited(resource.RLIMIT_FSIZE, size, *argv)
    assert (ended.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(ended)
    assert "nothing can be written in a/b/c: " in problem
    assert "choose another folder" in problem
    assert live.names(".") == []


def test_a_folder_where_none_can_be_made_is_found_beforehand(run: Run, api: ImagesAPI) -> None:
    result = run(*live.generate(out="/proc/fox/fox.png"))
    assert (result.exit_code, api.requests) == (2, [])
    assert len(live.lines(result)) == 1


def test_the_proof_of_a_folder_leaves_nothing_there(run: Run, api: ImagesAPI) -> None:
    seen: list[list[str]] = []
    live.run_held(run, api, live.batch(1), act=lambda: seen.append(live.names()))
    assert seen == [[]]


def test_every_folder_of_a_run_is_proved(run: Run, api: ImagesAPI) -> None:
    written: list[str] = []
    original = image_gen.written

    def noted(folder: str, content: bytes, **options: Any) -> Any:  # noqa: ANN401
        written.append(folder)
        return original(folder, content, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_gen, "written", noted)
        patch.setattr(image_gen, "start_threads", refused)
        result = run(*live.batch(3))
    assert (result.exit_code, api.requests) == (2, [])
    assert written == ["out"]


async def refused(*_: object) -> None:
    raise image_gen.UsageError("no further")


# ------------------------------------------------------------------- descriptors and threads


def test_more_requests_than_descriptors_allow_are_not_sent_at_once(api: ImagesAPI) -> None:
    own = image_gen.DESCRIPTORS + 4 * image_gen.WORKERS
    argv = live.batch(12, "--concurrency", 25)
    ended = limited(resource.RLIMIT_NOFILE, own + 4 * 3, *argv)
    assert ended.exit_code == 0, ended.stderr
    (warning,) = live.lines(ended, "Warning: ")
    assert warning.startswith("--concurrency 3: ")
    assert api.peak_in_flight <= 3
    assert live.names() == live.images(*range(1, 13))


def test_inputs_need_descriptors_too(api: ImagesAPI) -> None:
    jobs = [{"prompt": f"job {n}", "image": [picture("room.png")] * 4} for n in range(1, 5)]
    own = image_gen.DESCRIPTORS + 4 * image_gen.WORKERS
    argv = live.batch(jobs, "--concurrency", 4)
    ended = limited(resource.RLIMIT_NOFILE, own + 8 * 2, *argv)
    assert ended.exit_code == 0, ended.stderr
    assert live.lines(ended, "Warning: ")[0].startswith("--concurrency 2: ")
    assert api.peak_in_flight <= 2


def test_too_few_descriptors_for_one_request_are_a_refusal(api: ImagesAPI) -> None:
    own = image_gen.DESCRIPTORS + 4 * image_gen.WORKERS
    ended = limited(resource.RLIMIT_NOFILE, own + 3, *live.batch(2))
    assert (ended.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(ended)
    assert f"ulimit -n {own + 4}" in problem


def test_a_soft_limit_is_raised_without_a_word(api: ImagesAPI) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (30, hard))
    ended = finished(command(*live.batch(4, "--concurrency", 25)), preexec_fn=limit)
    assert ended.exit_code == 0, ended.stderr
    assert live.lines(ended, "Warning: ") == []
    assert len(api.requests) == 4


@pytest.mark.parametrize("share", ["one", "half", "all but one"])
def test_threads_that_cannot_be_started_are_found_beforehand(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    allowed = {"one": 1, "half": image_gen.WORKERS, "all but one": 2 * image_gen.WORKERS}[share]

    def start(thread: threading.Thread) -> None:
        if sum(each.is_alive() for each in begun) >= allowed:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        original(thread)

    begun: list[threading.Thread] = []
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    result = run(*live.batch(2))
    assert (result.exit_code, api.requests) == (2, [])
    assert live.lines(result)[0].startswith("no thread can be started")
    assert len(begun) >= allowed
    assert not any(thread.is_alive() for thread in begun)


def test_no_thread_is_started_once_a_request_is_out(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the server's own, and that with which the event loop ends."""
    late: list[str] = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        others = thread.name.startswith("artist") or "_do_shutdown" in thread.name
        if api.requests and not others:
            late.append(thread.name)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    argv = live.batch(12, "--downscale-max-dim", 16, "--contact-sheet", "sheet.png")
    assert run(*argv).exit_code == 0
    assert late == []


# --------------------------------------------------------------------------------- modules

# From the moment at which a file appears, no module can be loaded any more.
WITHOUT_MODULES = """
import os, sys
sys.path.insert(0, {scripts!r})
import image_gen

class Gone:
    def find_spec(self, name, path=None, target=None):
        if os.path.exists("gone"):
            raise ImportError("the disk of " + name + " is gone")

sys.meta_path.insert(0, Gone())
sys.exit(image_gen.main())
"""


def names_its_image(api: ImagesAPI) -> None:
    address = api.store("fox.png", encoded(Image.new("RGB", (64, 64))))
    body = json.dumps({"data": [{"url": address}]}).encode()
    api.script(answered(body), repeat=True)


def explains_itself(api: ImagesAPI) -> None:
    headers = {"retry-after": "Thu, 01 Jan 2009 00:00:00 GMT"}
    api.script(
        answered(b"<title>&lt;busy&gt;</title>", number=503, headers=headers),
        answered(b"data: [DONE]\n\n", content_type="text/event-stream"),
        image_bytes(lambda data: data[:50]),
    )


KINDS: dict[str, tuple[list[object], Callable[[ImagesAPI], object], bool]] = {
    "webp": (["--output-format", "webp", "--contact-sheet", "sheet.webp"], lambda _: None, True),
    "gif": (["--output-format", "gif", "--contact-sheet", "sheet.jpg"], lambda _: None, True),
    "drafts": (["--partial-images", 1], lambda _: None, True),
    "an address": ([], names_its_image, True),
    "no image": ([], explains_itself, False),
}


@pytest.mark.parametrize(("flags", "script", "fine"), KINDS.values(), ids=KINDS)
def test_modules_that_vanish_after_the_first_request_are_there_already(
    api: ImagesAPI, flags: list[object], script: Callable[[ImagesAPI], object], *, fine: bool
) -> None:
    script(api)
    api.hold()
    words = [sys.executable, "-c", WITHOUT_MODULES.format(scripts=str(SCRIPTS))]
    copies = [] if "svg" in flags else ["--downscale-max-dim", 16]
    argv = live.batch(2, "--model", FLARE, "--concurrency", 1, *copies, *flags)
    with started([*words, *argv], env=os.environ) as process:
        api.wait_for_requests(1)
        Path("gone").touch()
        api.release()
        _, said = process.communicate()
    assert "is gone" not in said
    assert "Traceback" not in said
    assert process.returncode == (0 if fine else 1), said
    assert len(api.image_requests) >= 2


def test_a_package_that_lost_its_parts_is_found_beforehand(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.ImageSequence", None)
    result = run(*live.batch(2, "--downscale-max-dim", 16))
    assert (result.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(result)
    assert "PIL.ImageSequence" in problem
    assert "install it anew" in problem


# --------------------------------------------------------------------- Pythons and packages


def test_the_script_is_read_by_a_python_that_only_gets_told_off() -> None:
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize(
    ("version", "words"),
    [((3, 8, 0), ["--help"]), ((3, 9, 18), []), ((3, 10, 13), ["generate", "--prompt", "x"])],
    ids=str,
)
def test_an_older_python_is_told_in_a_sentence(
    version: tuple[int, int, int], words: list[str]
) -> None:
    older = f"import runpy, sys; sys.version_info = {version}; sys.argv = sys.argv[1:]; "
    code = older + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    ended = finished([sys.executable, "-c", code, "image_gen.py", *words])
    assert (ended.exit_code, ended.stdout) == (2, "")
    (only,) = ended.stderr.splitlines()
    assert only.startswith("Error: image_gen.py needs Python 3.11 or newer; ")
    assert only.endswith(" is {}.{}.{}".format(*version))


def test_nothing_stands_above_the_check_that_an_older_python_lacks() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    (guard,) = (
        number for number, node in enumerate(tree.body) if "version_info" in ast.unparse(node)
    )
    above = tree.body[:guard]
    kinds = {type(node) for node in above}
    assert kinds == {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign}
    names = {name.name for node in above if isinstance(node, ast.Import) for name in node.names}
    assert not names & {"tomllib", "graphlib", "zoneinfo"}


def test_the_oldest_versions_are_those_of_the_project_and_of_the_script() -> None:
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    block = re.search(r"^# dependencies = (\[.*\])$", SCRIPT.read_text(), re.MULTILINE)
    assert block
    for wanted in (ast.literal_eval(block[1]), project["project"]["dependencies"]):
        named = dict(word.split(">=") for word in wanted)
        for package, oldest in image_gen.OLDEST.items():
            assert f"{named[package]}.0"[: len(oldest)] == oldest


VERSIONS = [
    ("openai", "3.54", True),
    ("openai", "3.54.0", True),
    ("openai", "3.100.1", True),
    ("openai", "4.0.0rc1", True),
    ("openai", "10.0", True),
    ("openai", "3.53.9", False),
    ("openai", "3.9", False),
    ("openai", "2.99.0", False),
    ("pillow", "11.0.0", True),
    ("pillow", "12.1", True),
    ("pillow", "10.4.0", False),
    ("pillow", "9.5.0.dev1", False),
]


@pytest.mark.parametrize(("package", "version", "accepted"), VERSIONS)
def test_a_package_that_is_too_old_is_refused_with_the_command_that_updates_it(
    run: Run,
    api: ImagesAPI,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    version: str,
    *,
    accepted: bool,
) -> None:
    original = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else original(name)
    )
    result = run(*live.generate("--downscale-max-dim", 16))
    assert (result.exit_code, len(api.requests)) == ((0, 1) if accepted else (2, 0))
    if not accepted:
        (problem,) = live.lines(result)
        least = image_gen.OLDEST[package]
        assert f"the package {package} is {version}; {least} or newer is needed" in problem
        assert f"{sys.executable} -m pip install '{package}>={least}'" in problem


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        ((), ["openai"]),
        (("--downscale-max-dim", 16), ["openai", "pillow"]),
        (("--contact-sheet", "sheet.png"), ["openai", "pillow"]),
        (("--dry-run",), []),
    ],
    ids=str,
)
def test_a_package_is_asked_for_where_it_is_needed(
    run: Run,
    api: ImagesAPI,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    needed: list[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    result = run(*live.batch(1, *flags))
    assert api.requests == []
    assert result.exit_code == (2 if needed else 0)
    missing = sorted(line.split()[2] for line in live.lines(result))
    assert missing == needed
    assert all("is missing; " in line for line in live.lines(result))


# ----------------------------------------------------------------------------- long names


LONGEST = [
    pytest.param("x" * 251 + ".png", id="251 letters"),
    pytest.param("ä" * 125 + ".png", id="125 letters of two bytes"),
    pytest.param("🦊" * 62 + "xxx.png", id="62 foxes"),
    pytest.param("x" * 246 + ".png.jpeg", id="two suffixes"),
]


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_names_are_taken_and_there_is_room_for_what_they_add(
    run: Run, api: ImagesAPI, name: str
) -> None:
    api.script(image_bytes(lambda data: data[:40]), image_bytes(lambda data: data[:50]))
    for _ in range(2):
        failed = run(*live.generate(out=name))
        assert failed.exit_code == 1
        assert "could not be written" not in failed.stderr
    for until in (3, 4):
        argv, act = live.generate(out=name), partial(appear, name)
        took = live.run_held(run, api, argv, until=until, act=act)
        assert took.exit_code == 0
        Path(name).unlink()
    assert run(*live.generate(out=name)).exit_code == 0
    ends = [found.rpartition(".")[2] for found in live.names(".")]
    kind = name.rpartition(".")[2]
    assert sorted(ends) == sorted(["answer"] * 2 + ["damaged"] * 2 + [kind] * 3)


def appear(name: str) -> None:
    Path(name).write_text("mine")


def test_a_name_of_256_bytes_is_refused(run: Run, api: ImagesAPI) -> None:
    for name in ("x" * 252 + ".png", "ä" * 126 + ".png"):
        result = run(*live.generate(out=name))
        assert (result.exit_code, api.requests) == (2, [])
        assert "a name of over 255 bytes" in live.lines(result)[0]


# -------------------------------------------------------------------------------- durable


def test_image_and_folder_are_on_disk_before_a_job_is_done(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, str]] = []

    def fsync(descriptor: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"))
        happened.append(("on disk", path))

    def link(source: str, name: str) -> None:
        happened.append((source, name))
        original_link(source, name)

    def add(report: image_gen.Report, outcome: image_gen.Outcome) -> None:
        happened.append(("done", ""))
        original_add(report, outcome)

    original_link, original_add = os.link, image_gen.Report.add
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(image_gen.Report, "add", add)
    assert run(*live.generate("--n", 2, out="new/deep/fox.png")).exit_code == 0
    names = ["new/deep/fox-1.png", "new/deep/fox-2.png"]
    for name in names:
        ((source, _),) = (each for each in happened if each[1] == name)
        at = happened.index((source, name))
        assert ("on disk", source) in happened[:at]
        after = happened[at : happened.index(("done", ""))]
        assert ("on disk", "new/deep") in after
    made = [path for what, path in happened[: happened.index(("done", ""))] if what == "on disk"]
    assert {".", "new", "new/deep"} <= set(made)
    assert len(api.requests) == 1


# ------------------------------------------------------------------------ bugs of our own


def broken(*_: object, **__: object) -> None:
    """A function of ours that fails as nobody has foreseen."""
    raise ZeroDivisionError("not foreseen")


@pytest.mark.parametrize(
    "step", ["read_answer", "items_of", "decode_item", "decode_image", "differences", "usage_of"]
)
def test_a_bug_after_an_answer_keeps_the_answer_and_buys_no_other(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(image_gen, step, broken)
    result = run(*live.batch(6, "--json", "--concurrency", 1))
    assert result.exit_code == 1
    assert result.stderr.count("Traceback") == 1
    sent = len(api.requests)
    assert sent < 6  # the next ones may have left while the first was read
    lines = sorted(result.json_lines, key=lambda line: line["job"])
    for number, line in enumerate(lines[:sent], start=1):
        kept = f"out/{live.images(number)[0]}.answer"
        assert (line["status"], line["error"]["kind"]) == ("failed", "internal")
        assert "not foreseen" in line["error"]["message"]
        assert kept in line["error"]["message"]
        assert line["error"]["maybe_billed"] is True
        assert b'"b64_json"' in Path(kept).read_bytes()
    assert {line["status"] for line in lines[sent:]} == {"not_sent"}


@pytest.mark.parametrize("step", ["images_on_disk", "with_history"])
def test_a_bug_behind_the_images_stops_the_run_and_keeps_them(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(image_gen, step, broken)
    result = run(*live.batch(6, "--concurrency", 1))
    assert result.exit_code == 1
    assert result.stderr.count("Traceback") == 1
    assert len(api.requests) < 6  # the next ones may have left
    assert live.names() == live.images(*range(1, len(api.requests) + 1))


def test_a_bug_under_many_jobs_prints_one_traceback(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_gen, "decode_item", broken)
    result = live.run_held(run, api, live.batch(30, "--concurrency", 5), until=5)
    assert result.stderr.count("Traceback") == 1
    sent = len(api.requests)
    assert sent < 15
    assert live.names() == [f"{name}.answer" for name in live.images(*range(1, sent + 1))]


# ------------------------------------------------------------------------------ the rescue


@pytest.mark.parametrize("blocked", range(5))
def test_the_rescue_tries_four_places_before_it_says_lost(
    other_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, blocked: int
) -> None:
    here, out = Path("here").absolute(), Path("out").absolute()
    temporary, home = other_folders["temporary"], other_folders["home"]
    here.mkdir()
    monkeypatch.chdir(here)
    for place in [out, here, temporary, home][:blocked]:
        with suppress(FileNotFoundError):
            place.rmdir()
        if place != here:
            place.write_text("a file")
    saved = image_gen.rescue(str(out / "fox.png"), b"paid for")
    monkeypatch.chdir("/")
    if blocked == 4:
        assert saved is None
        return
    assert saved is not None
    path = here / saved if blocked == 1 else Path(saved)
    assert path.read_bytes() == b"paid for"
    assert path.name == "image_gen-rescued-fox.png"
    assert [out, here, temporary, home][blocked] in path.parents


def test_the_rescue_replaces_nothing(other_folders: dict[str, Path]) -> None:
    assert other_folders
    found = [image_gen.rescue("out/fox.png", bytes([number])) for number in range(3)]
    assert len(set(found)) == 3
    assert [Path(name or "").read_bytes() for name in found] == [b"\0", b"\1", b"\2"]


def test_an_image_without_any_place_is_called_lost_and_stops_the_run(
    api: ImagesAPI, other_folders: dict[str, Path]
) -> None:
    nowhere = other_folders["home"] / "file"
    nowhere.write_text("")
    env = os.environ | {"HOME": str(nowhere)}
    for name in ("TMPDIR", "TEMP", "TMP"):
        env[name] = str(nowhere)
    big = b"\x89PNG" + os.urandom(200_000)
    api.script(image_bytes(lambda _: big), repeat=True)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    argv = command(*live.batch(6, "--concurrency", 1))
    ended = finished(argv, env=env, preexec_fn=limit)
    assert ended.exit_code == 1
    assert "it is lost" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(api.requests) < 6


# --------------------------------------------------------------------- inputs that change


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a pipe": become_pipe,
    "a folder": become_folder,
    "text": lambda path: path.write_text("no image any more"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_input_that_changes_meanwhile_fails_its_job_and_holds_up_no_other(
    run: Run, api: ImagesAPI, change: Callable[[Path], object]
) -> None:
    picture("room.png")
    jobs = [
        {"prompt": "job 1"},
        {"prompt": "job 2", "image": "room.png"},
        {"prompt": "job 3"},
    ]
    argv = live.batch(jobs, "--json", "--concurrency", 1)
    result = live.run_held(run, api, argv, act=lambda: change(Path("room.png")))
    assert live.outcomes(result) == ["done", "failed", "done"]
    failed = next(line for line in result.json_lines if line["job"] == 2)
    assert (failed["error"]["kind"], failed["attempts"]) == ("input", 0)
    assert failed["error"]["maybe_billed"] is False
    assert "room.png" in failed["error"]["message"]
    assert len(api.requests) == 2


# -------------------------------------------------------------------------------- signals


@contextmanager
def without(number: signal.Signals, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """The CLI as nohup or a shell's & starts it: a signal is ignored from the start."""
    ignore = partial(signal.signal, number, signal.SIG_IGN)
    with started(command(*argv), env=os.environ, preexec_fn=ignore) as process:
        yield process


def test_a_terminal_that_closes_ends_a_run_in_order(start_process: Start, api: ImagesAPI) -> None:
    api.hold()
    process = start_process(*live.batch(6, "--concurrency", 2))
    api.wait_for_requests(2)
    process.send_signal(signal.SIGHUP)
    heard(process, "Interrupted")
    api.release()
    _, said = process.communicate()
    assert process.returncode == 130
    assert live.names() == live.images(1, 2)
    assert "--skip-existing" in said


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    api: ImagesAPI, number: signal.Signals
) -> None:
    api.hold()
    with without(number, *live.batch(3, "--concurrency", 1)) as process:
        api.wait_for_requests(1)
        process.send_signal(number)
        process.send_signal(number)
        api.release()
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "nterrupted" not in said
    assert live.names() == live.images(1, 2, 3)


def test_the_first_signal_counts_the_requests_that_are_on_the_wire(
    start_process: Start, api: ImagesAPI
) -> None:
    api.hold()
    process = start_process(*live.batch(9, "--concurrency", 3))
    api.wait_for_requests(3)
    process.send_signal(signal.SIGTERM)
    heard(process, "Interrupted: 3 requests in flight")
    api.release()
    process.communicate()
    assert len(api.requests) == 3
