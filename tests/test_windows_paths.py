"""Windows, as far as it can be played: open files stay in place, and some names do not exist."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from images_api import moderation_blocked
from inputs import picture
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Run
    from images_api import ImagesAPI

COPIES = ("--downscale-max-dim", 32)


def is_open(*names: str) -> bool:
    """Whether this process has any of these files open."""
    held = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    return any(os.path.realpath(name) in held for name in names)


class Windows:
    """The module os as the program finds it there; the rest of this process keeps its own."""

    name = "nt"
    O_BINARY = 0

    def __getattr__(self, name: str) -> object:
        if name == "O_NONBLOCK":
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, flags, mode)

    def link(self, source: str, name: str) -> None:
        raise OSError(errno.EINVAL, "The function is incorrect", source, None, name)

    def rename(self, source: str, name: str) -> None:
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, "File exists", source, None, name)
        self.replace(source, name)

    def replace(self, source: str, name: str) -> None:
        if is_open(source, name):
            raise PermissionError(errno.EACCES, "It is being used by another process", source)
        os.replace(source, name)

    def unlink(self, name: str) -> None:
        if is_open(name):
            raise PermissionError(errno.EACCES, "It is being used by another process", name)
        os.unlink(name)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program runs there: other rules for files, and no fcntl, resource or SIGHUP."""
    monkeypatch.setattr(image_gen, "os", Windows())
    monkeypatch.delattr(signal, "SIGHUP")
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)


# ------------------------------------------------------------------------- how files are named


@pytest.mark.usefixtures("windows")
class TestOnWindows:
    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
    def test_an_image_and_its_copy_are_written(self, run: Run, api: ImagesAPI, kind: str) -> None:
        argv = live.generate("--model", "gpt-image-2.5-flare", *COPIES, out=f"new/a.{kind}")
        assert run(*argv).exit_code == 0
        assert len(api.requests) == 1
        assert live.names("new") == [f"a-web.{kind}", f"a.{kind}"]
        assert live.size_of(f"new/a.{kind}") == (64, 64)

    def test_a_batch_is_written_with_its_contact_sheet(self, run: Run, api: ImagesAPI) -> None:
        result = run(*live.batch(6, *COPIES, "--contact-sheet", "sheet.png"))
        assert result.exit_code == 0, result.stderr
        assert [name for name in live.names() if "-web" not in name] == live.images(*range(1, 7))
        assert Path("sheet.png").stat().st_size > 0
        assert len(api.requests) == 6

    def test_drafts_are_written_and_removed(self, run: Run, api: ImagesAPI) -> None:
        assert run(*live.generate("--partial-images", 2)).exit_code == 0
        assert live.names(".") == ["fox.png"]
        assert len(api.requests) == 1

    def test_a_file_that_appears_meanwhile_is_kept(self, run: Run, api: ImagesAPI) -> None:
        act = lambda: Path("fox.png").write_text("mine")  # noqa: E731
        assert live.run_held(run, api, live.generate(), act=act).exit_code == 0
        assert Path("fox.png").read_text() == "mine"
        assert live.names(".") == ["fox-alt-1.png", "fox.png"]

    @pytest.mark.parametrize("flag", ["--force", "--skip-existing"])
    def test_what_may_be_replaced_is_replaced(self, run: Run, api: ImagesAPI, flag: str) -> None:
        Path("fox.png").touch()
        Path("fox-web.png").touch()
        assert run(*live.generate(flag, *COPIES)).exit_code == 0
        assert [live.size_of(name) for name in ("fox.png", "fox-web.png")] == [(64, 64), (32, 32)]
        assert live.names(".") == ["fox-web.png", "fox.png"]
        assert len(api.requests) == 1

    def test_an_edit_sends_its_files(self, run: Run, api: ImagesAPI) -> None:
        words = ["--image", picture("room.png"), "--mask", picture("mask.png", "RGBA")]
        result = run("edit", *words, "--prompt", "x", "--out", "fox.png")
        assert result.exit_code == 0, result.stderr
        (request,) = api.requests
        sent = [file.data for file in request.files]
        assert sent == [Path("room.png").read_bytes(), Path("mask.png").read_bytes()]

    def test_a_folder_is_gone_on_with(self, run: Run, api: ImagesAPI) -> None:
        api.script_for("job 2", moderation_blocked())
        assert run(*live.batch(3)).exit_code == 4
        assert run(*live.batch(3, "--skip-existing")).exit_code == 0
        assert live.names() == live.images(1, 2, 3)

    def test_the_batch_api_is_collected_without_locks(self, run: Run, api: ImagesAPI) -> None:
        result = run(*live.batch(2, "--batch-api"))
        assert result.exit_code == 0, result.stderr
        assert [name for name in live.names() if name.endswith(".png")] == live.images(1, 2)
        assert len(api.batches) == 1

    def test_a_file_that_cannot_be_renamed_is_no_image_and_is_rescued(
        self, run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def rename(_windows: Windows, source: str, name: str) -> None:
            if "rescued" not in name:
                raise PermissionError(errno.EACCES, "A scanner has it", source)
            os.rename(source, name)

        monkeypatch.setattr(Windows, "rename", rename)
        assert "A scanner has it" in live.error(run(*live.generate()))
        assert live.names(".") == ["image_gen-rescued-fox.png"]
        assert live.size_of("image_gen-rescued-fox.png") == (64, 64)
        assert len(api.requests) == 1


# ------------------------------------------------------------------------ without hard links


@pytest.fixture(params=[errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV], ids=os.strerror)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk like FAT, or a network's, each with its own word for it."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_nothing_is_open_when_a_file_is_replaced(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    original = os.replace

    def replace(source: str, name: str) -> None:
        seen.append((name, is_open(source, name)))
        original(source, name)

    monkeypatch.setattr(os, "replace", replace)
    assert run(*live.generate(*COPIES)).exit_code == 0
    assert seen == [("fox.png", False), ("fox-web.png", False)]
    assert live.names(".") == ["fox-web.png", "fox.png"]
    assert len(api.requests) == 1


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_no_empty_file_stays_under_a_name(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.replace

    def replace(source: str, name: str) -> None:
        if "rescued" not in name:
            raise PermissionError(errno.EACCES, "Permission denied")
        original(source, name)

    monkeypatch.setattr(os, "replace", replace)
    assert "it was saved as" in live.error(run(*live.generate()))
    assert live.names(".") == ["image_gen-rescued-fox.png"]
    assert len(api.requests) == 1


@pytest.mark.usefixtures("no_links")
def test_without_hard_links_a_file_that_appears_is_kept(run: Run, api: ImagesAPI) -> None:
    act = lambda: Path("fox.png").write_text("mine")  # noqa: E731
    assert live.run_held(run, api, live.generate(), act=act).exit_code == 0
    assert Path("fox.png").read_text() == "mine"
    assert live.names(".") == ["fox-alt-1.png", "fox.png"]


# ----------------------------------------------------------------------- names it has none of

REFUSED = [
    "CON.png",
    "con.webp",
    "nul.png",
    "Aux.jpg",
    "PRN.png",
    "COM1.png",
    "lpt9.png",
    "COM¹.png",
    "nul.tar.png",
    "con .png",
    "CONIN$.png",
    "conout$.webp",
    "a:b.png",
    "what?.png",
    "a*b.png",
    'say "hi".png',
    "a<b>.png",
    "a|b.png",
    "con/fox.png",
    "out./fox.png",
    "out /fox.png",
]
ACCEPTED = [
    "console.png",
    "comet.png",
    "conin.png",
    "com10.png",
    "a.con.png",
    "fox .png",
    ".fox.png",
    "fox's.png",
    "Füchse & Co (1).png",
]


def dry(name: str) -> list[str]:
    return live.generate("--dry-run", out=name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_windows_does_not_have_is_refused_there_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert run(*dry(name)).exit_code == 0
    monkeypatch.setattr(image_gen, "os", Windows())
    result = run(*dry(name))
    assert result.exit_code == 2
    (problem,) = live.lines(result)
    assert f"{name}: Windows has no such name" in problem
    assert live.names(".") == []


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_name_that_only_looks_like_one_is_accepted(run: Run, name: str) -> None:
    assert run(*dry(name)).exit_code == 0


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--downscale-suffix=-a:b", *COPIES), id="a copy"),
        pytest.param(("--contact-sheet", "nul.png"), id="a contact sheet"),
    ],
)
def test_every_name_of_a_run_is_looked_at(
    run: Run, api: ImagesAPI, flags: tuple[object, ...]
) -> None:
    result = run(*live.batch(1, *flags))
    assert (result.exit_code, api.requests) == (2, [])
    assert "Windows has no such name" in live.lines(result)[0]


@pytest.mark.usefixtures("windows")
def test_a_prompt_never_becomes_a_name_that_windows_does_not_have(run: Run, api: ImagesAPI) -> None:
    prompts = ["con", "nul: a: b?", "what is 'this' | that", "a fox. ", "C:\\x\\y", "<svg>"]
    assert run(*live.batch([{"prompt": prompt} for prompt in prompts])).exit_code == 0
    assert len(api.requests) == len(live.names()) == len(prompts)
    refused: Callable[[str], object] = image_gen.WINDOWS_REFUSES.search
    assert not [name for name in live.names() if refused(name)]
    for name in live.names():
        with Image.open(Path("out", name)) as image:
            assert image.size == (64, 64)
