"""What the way after an answer needs is there before the first request, or the run is refused."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import pytest
from cli import SCRIPTS, command, finished
from images_api import no_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run
    from images_api import ImagesAPI


def within(limits: dict[int, tuple[int, int]], *argv: str) -> Result:
    """The CLI as a process that may take no more than this."""

    def limit() -> None:
        for kind, values in limits.items():
            resource.setrlimit(kind, values)

    return finished(command(*argv), preexec_fn=limit)


def test_more_open_files_are_asked_for_where_they_are_allowed(api: ImagesAPI) -> None:
    allowed = {resource.RLIMIT_NOFILE: (32, 4096)}
    result = within(allowed, *live.batch(40, "--concurrency", "25"))
    assert (result.exit_code, result.stderr.count("Warning")) == (0, 0)
    assert len(live.names()) == len(api.requests) == 40


def test_where_they_are_not_allowed_fewer_requests_are_sent_at_once(api: ImagesAPI) -> None:
    most = image_gen.DESCRIPTORS + 4 * image_gen.WORKERS + 9
    result = within({resource.RLIMIT_NOFILE: (most, most)}, *live.batch(12, "--concurrency", "25"))
    assert result.exit_code == 0
    (warning,) = live.lines(result, "Warning: ")
    assert warning.startswith("--concurrency 2: ")
    assert len(live.names()) == len(api.requests) == 12


def test_too_few_open_files_for_one_request_are_refused(api: ImagesAPI) -> None:
    most = image_gen.DESCRIPTORS + 4 * image_gen.WORKERS
    result = within({resource.RLIMIT_NOFILE: (most, most)}, *live.generate())
    assert (result.exit_code, api.requests) == (2, [])
    assert f"{most} open files are allowed; raise it: ulimit -n" in result.stderr


def test_where_no_thread_can_be_started_nothing_is_sent(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", refuse)
        result = run(*live.generate())
    assert (result.exit_code, "no thread can be started" in result.stderr) == (2, True)
    assert api.requests == []


def test_a_module_that_does_not_load_is_found_before_anything_is_sent(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "filecmp", None)
    result = run(*live.generate())
    assert (result.exit_code, api.requests) == (2, [])
    assert "a package is damaged" in result.stderr


def test_a_folder_that_takes_no_file_is_found_before_anything_is_sent(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run(*live.batch(3))
    assert (result.exit_code, api.requests) == (2, [])
    assert "nothing can be written in out: No space left on device" in result.stderr
    assert not Path("out").exists()


def test_a_folder_in_which_everything_is_there_is_not_written_to(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*live.batch(2))
    written: list[object] = []
    monkeypatch.setattr(image_gen, "written", written.append)
    assert run(*live.batch(2, "--skip-existing")).exit_code == 0
    assert (written, len(api.requests)) == ([], 2)


def test_images_and_their_folder_are_synced_before_the_job_is_done(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", note)
    assert run(*live.batch(1, "--contact-sheet", "out/sheet.png")).exit_code == 0
    out = str(Path("out").resolve())
    assert api.requests
    # The proof and its folder, the folder above, the image, and the folder with its name.
    assert synced.count(out) >= 1
    assert str(Path.cwd()) in synced
    assert sum(name.startswith(f"{out}/.image_gen-") for name in synced) == 2
    assert synced[-1] == out


@pytest.mark.parametrize("letters", ["n", "ü"])
def test_a_name_of_255_bytes_leaves_room_for_what_is_kept(
    run: Run, api: ImagesAPI, letters: str
) -> None:
    stem = letters * (251 // len(letters.encode()))
    api.script(no_data())
    result = run(*live.generate(out=f"{stem}.png"))
    assert result.exit_code == 1
    (kept,) = live.names(".")
    assert kept.endswith(".png.answer")
    assert len(kept.encode()) <= 255
    assert run(*live.generate("--skip-existing", out=f"{stem}.png")).exit_code == 0


def test_an_older_python_reads_far_enough_to_be_told() -> None:
    source = (SCRIPTS / "image_gen.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    above = source[: source.index("if sys.version_info")]
    # What is imported up to there is in Python 3.8 as well.
    assert "import UTC" not in above
    assert "StrEnum" not in above
    older = (
        f"import sys\nsys.version_info = (3, 8, 10)\nsys.argv = ['image_gen.py', '--help']\n{above}"
    )
    guard = source[source.index("if sys.version_info") :].split("\n\n")[0]
    ran = subprocess.run(
        [sys.executable, "-c", older.replace("from __future__ import annotations", "") + guard],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("Error: image_gen.py needs Python 3.11 or newer; ")
    assert "3.8.10" in ran.stderr


@pytest.mark.parametrize(("package", "old"), [("openai", "2.9.1"), ("pillow", "9.5.0")])
def test_a_package_that_is_too_old_is_named_with_the_command_that_updates_it(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, package: str, old: str
) -> None:
    version: Callable[[str], str] = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: old if name == package else version(name))
    said = dry.problem(run(*live.generate("--downscale-max-dim", 9)))
    assert f"the package {package} is {old}; {image_gen.OLDEST[package]} or newer" in said
    assert f"-m pip install '{package}>=" in said
    assert api.requests == []


def test_the_oldest_packages_are_those_of_the_metadata() -> None:
    source = (SCRIPTS / "image_gen.py").read_text(encoding="utf-8")
    for package, version in image_gen.OLDEST.items():
        assert f'"{package}>={version.removesuffix(".0")}"' in source


def test_help_on_a_stream_that_is_full_is_told_without_a_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            command("--help"), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    assert "stdout takes no more" in ran.stderr
