"""Files are written whole or not at all, and nothing that was paid for is lost."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from cli import command, finished
from images_api import image_bytes, ok
from inputs import encoded
from PIL import Image

if TYPE_CHECKING:
    from cli import Result, Run, Start
    from images_api import ImagesAPI


@pytest.fixture(autouse=True)
def rescue_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders for what its own place does not take, away from those of the machine."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("HOME", str(folder))


def test_a_file_that_appears_meanwhile_is_kept_and_the_image_saved_beside_it(
    run: Run, api: ImagesAPI
) -> None:
    argv = live.generate("--json", "--downscale-max-dim", 32)
    result = live.run_held(run, api, argv, act=lambda: Path("fox.png").write_text("mine"))
    assert result.exit_code == 0
    assert Path("fox.png").read_text() == "mine"
    (warning,) = live.lines(result, "Warning: ")
    (image,) = result.json["outputs"]
    assert "fox.png has appeared" in warning
    assert image["path"] in warning
    assert live.size_of(image["path"]) == (64, 64)
    assert len(live.names(".")) == 3


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
class TestWriteFile:
    @pytest.fixture(autouse=True)
    def disk(self, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        if not links:
            monkeypatch.setattr(os, "link", refuse)

    def test_makes_the_file_and_its_folders(self) -> None:
        assert image_gen.write_file("a/b/c.png", b"new", replace=False) == "a/b/c.png"
        assert Path("a/b/c.png").read_bytes() == b"new"
        assert live.names("a/b") == ["c.png"]

    def test_takes_the_first_free_name(self) -> None:
        found = [image_gen.write_file("c.png", bytes([n]), replace=False) for n in range(4)]
        assert found[0] == "c.png"
        assert len(set(found)) == 4
        assert sorted(found) == live.names(".")
        assert [Path(name).read_bytes() for name in found] == [bytes([n]) for n in range(4)]

    def test_replaces_only_when_told(self) -> None:
        Path("c.png").write_bytes(b"old")
        assert image_gen.write_file("c.png", b"new", replace=True) == "c.png"
        assert Path("c.png").read_bytes() == b"new"
        assert live.names(".") == ["c.png"]

    def test_never_replaces_in_a_race(self) -> None:
        contents = [bytes([n]) * 10_000 for n in range(16)]
        start = threading.Barrier(len(contents))
        found: list[str] = []

        def write(content: bytes) -> None:
            start.wait()
            found.append(image_gen.write_file("c.png", content, replace=False))

        workers = [threading.Thread(target=write, args=(content,)) for content in contents]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert sorted(found) == live.names(".")
        assert {Path(name).read_bytes() for name in found} == set(contents)

    def test_does_not_follow_a_link_that_leads_nowhere(self) -> None:
        Path("c.png").symlink_to("nowhere.png")
        assert image_gen.write_file("c.png", b"new", replace=False) != "c.png"
        assert Path("c.png").is_symlink()

    def test_leaves_nothing_behind_when_it_fails(self) -> None:
        Path("c.png").mkdir()
        with pytest.raises(OSError, match="directory"):
            image_gen.write_file("c.png", b"new", replace=True)
        assert live.names(".") == ["c.png"]


def test_files_have_the_permissions_of_any_new_file(run: Run, api: ImagesAPI) -> None:
    assert api.requests == []
    assert run(*live.generate()).exit_code == 0
    Path("other").write_bytes(b"")
    assert Path("fox.png").stat().st_mode == Path("other").stat().st_mode


def test_force_replaces_image_and_copy(run: Run, api: ImagesAPI) -> None:
    assert api.requests == []
    for name in ("fox.png", "fox-web.png"):
        Path(name).write_text("old")
    assert run(*live.generate("--force", "--downscale-max-dim", 32)).exit_code == 0
    assert (live.size_of("fox.png"), live.size_of("fox-web.png")) == ((64, 64), (32, 32))


def a_file_in_place_of_the_folder() -> None:
    """Makes a folder refuse to be written, also for root."""
    os.rename("out", "out-before")
    Path("out").write_text("in the way")


def test_an_image_whose_folder_takes_no_more_is_rescued_and_the_run_stops(
    start_process: Start, api: ImagesAPI
) -> None:
    Path("out").mkdir()
    argv = live.batch(8, "--json", "--concurrency", 1)
    act = a_file_in_place_of_the_folder
    result = live.run_staggered(start_process, api, argv, act=act)
    assert result.exit_code == 1
    assert live.outcomes(result)[0] == "failed"
    assert live.outcomes(result)[-1] == "not_sent"
    rescued = sorted(Path().glob("image_gen-rescued-*"))
    assert len(rescued) == len(api.requests) <= 2  # another one may be in flight
    assert {live.size_of(name) for name in rescued} == {(64, 64)}
    first = live.lines(result)[0]
    assert "out/001-job-1.png" in first
    assert str(rescued[0]) in first
    failure = next(line["error"] for line in result.json_lines if line["job"] == 1)
    assert (failure["kind"], failure["maybe_billed"]) == ("write", True)


def test_a_copy_that_cannot_be_written_keeps_the_original(run: Run, api: ImagesAPI) -> None:
    argv = live.generate("--force", "--downscale-max-dim", 32, "--json")
    result = live.run_held(run, api, argv, act=Path("fox-web.png").mkdir)
    assert "fox-web.png" in live.error(result)
    assert live.size_of("fox.png") == (64, 64)
    assert live.names(".") == ["fox-web.png", "fox.png"]
    assert result.json["error"]["kind"] == "downscale"


def on_a_disk_with_room_for(size: int, *argv: str | Path) -> Result:
    """No file may grow beyond the size: a full disk for anyone, root included."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return finished(command(*argv), preexec_fn=limit)


def test_a_disk_that_is_full_from_the_start_is_found_before_anything_is_sent(
    api: ImagesAPI,
) -> None:
    ended = on_a_disk_with_room_for(1000, *live.batch(10))
    assert (ended.exit_code, api.requests) == (2, [])
    assert "nothing can be written in out: " in ended.stderr
    assert not Path("out").exists()


def test_a_full_disk_leaves_no_partial_file_and_stops_the_run(api: ImagesAPI) -> None:
    big = encoded(Image.effect_noise((512, 512), 80))
    assert len(big) > 100_000
    api.script(*[ok()] * 2, image_bytes(lambda _: big), repeat=True)
    ended = on_a_disk_with_room_for(100_000, *live.batch(10, "--concurrency", 1))
    assert ended.exit_code == 1
    assert "Traceback" not in ended.stderr
    assert "003-job-3.png could not be written (File too large); it is lost" in ended.stderr
    assert live.names() == live.images(1, 2)
    assert 2 < len(api.requests) < 10
    assert f"{10 - len(api.requests)} jobs " in ended.stderr


def test_a_process_that_is_killed_while_it_writes_leaves_no_partial_image(
    start_process: Start, run: Run, api: ImagesAPI
) -> None:
    picture = encoded(Image.effect_noise((800, 800), 80))
    api.script(*[image_bytes(lambda _: picture)] * 24)
    argv = live.batch(12, "--concurrency", 5)
    process = start_process(*argv)
    api.wait_for_answers(5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in live.names():
        if name.endswith(".png"):
            assert Path("out", name).read_bytes() == picture
    assert run(*argv, "--skip-existing").exit_code == 0
    assert [name for name in live.names() if name.endswith(".png")] == live.images(*range(1, 13))
