"""What Windows does with names and files, played on this system."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import pytest

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume without hard links, on which nothing is renamed onto a file that is held open."""

    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    def held(name: str) -> bool:
        files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return os.path.realpath(name) in {os.path.realpath(file) for file in files}

    def onto(source: str, target: str) -> None:
        if held(target):
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "replace", onto)


@pytest.mark.usefixtures("no_links")
def test_an_image_is_saved_where_there_are_no_hard_links(run: Run, api: ImagesAPI) -> None:
    result = run(*live.generate("--downscale-max-dim", 32))
    assert (result.exit_code, len(api.requests)) == (0, 1)
    assert live.names(".") == ["fox-web.png", "fox.png"]
    assert live.size_of("fox.png") == (64, 64)


@pytest.mark.usefixtures("no_links")
def test_no_empty_file_stays_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        image_gen.write_file("fox.png", b"an image", replace=False)
    assert live.names(".") == []


def test_a_file_that_is_there_is_kept_where_renaming_refuses_to_replace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rename(source: str, target: str) -> None:
        if os.path.exists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", target)
        replace(source, target)

    replace = os.replace
    Path("fox.png").write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        patch.setattr(os, "name", "nt")
        saved = image_gen.write_file("fox.png", b"an image", replace=False)
    assert saved == "fox-alt-1.png"
    assert Path("fox.png").read_bytes() == b"mine"
    assert Path(saved).read_bytes() == b"an image"


REFUSED = ["who is it?", "a:b", "CON", "nul.txt", "com1", "a|b", 'say "hi"', "tail.png ", "a*b"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_windows_has_not_is_refused_there(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    target = image_gen.Target(1, name, replace=False, what="the image", kind="image")
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        (said,) = image_gen.check_target(target, image_gen.Plan(()))
    assert "Windows has no such name" in said


@pytest.mark.parametrize("name", ["con", "a b.png", "console.png", "commons1.png"])
def test_other_names_and_systems_are_not_concerned(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert dry.document(dry.generate(run, "--out", "who is it?.png"))
    target = image_gen.Target(1, f"x{name}", replace=False, what="the image", kind="image")
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        found = [*image_gen.check_target(target, image_gen.Plan(()))]
    assert found == []
