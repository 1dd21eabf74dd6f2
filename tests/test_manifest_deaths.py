"""A live run is killed around every write; the same command brings it to its end."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
from cli import SCRIPTS
from deaths import Death, Lives
from inputs import job_file

if TYPE_CHECKING:
    from images_api import ImagesAPI
    from inputs import Json

BEFORE: list[Json] = [
    {"prompt": "a fox", "out": "castle.png"},
    {"prompt": "a hare", "out": "hare.png"},
]
AFTER: list[Json] = [
    {"prompt": "an owl", "out": "castle.png"},
    {"prompt": "a hare", "out": "rabbit.png"},
    {"prompt": "kites", "n": 2, "out": "kite.png"},
]
NEW = Counter({"an owl": 1, "kites": 2})
NAMES = ["castle-old-1.png", "castle.png", "hare.png", "kite-1.png", "kite-2.png", "rabbit.png"]


@pytest.fixture(autouse=True)
def forks_find_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPTS), str(Path(__file__).parent)]))


def sha(name: str) -> str:
    return hashlib.sha256(Path("out", name).read_bytes()).hexdigest()


def entries() -> list[Json]:
    """Each whole line of the manifest."""
    lines = Path("out", image_gen.MANIFEST_NAME).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def pictures() -> list[str]:
    return [name for name in live.names() if name[0] != "." and not name.endswith("-web.png")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["write", "sync"])
def test_a_run_that_is_killed_loses_no_image_that_it_has_noted_and_makes_none_twice(
    api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, when: str
) -> None:
    lives = Lives(api, "--remake", "--concurrency", "1")
    for step in count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        monkeypatch.chdir(folder)
        job_file(*BEFORE)
        assert lives.one(Death()) == 0
        former = sha("castle.png")
        job_file(*AFTER)
        died = lives.one(Death(what, when, step)) != 0
        noted = {entry["sha256"]: entry["prompt"] for entry in entries()}
        assert lives.one(Death(), "--safety-identifier", str(step)) == 0  # which changes no image
        again = Counter[str]()
        for request in api.requests:
            if request.body.get("safety_identifier") == str(step):
                again[request.prompt.removeprefix("Primary request: ")] += request.body.get("n", 1)
        assert again == NEW - Counter(noted.values())
        assert pictures() == NAMES
        assert sha("castle-old-1.png") == former
        last = {entry["name"]: entry["sha256"] for entry in entries()}
        assert {name: sha(name) for name in NAMES} == last
        assert set(noted) <= set(last.values())
        if not died:
            break
    assert step > 5
