"""A live run is killed around every write; the same command brings it to its end."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import image_gen
import live
import pytest
from deaths import Death, Lives
from inputs import job_file

if TYPE_CHECKING:
    from images_api import ImagesAPI
    from inputs import Json

pytestmark = pytest.mark.usefixtures("forks_find_their_modules")


class Edit(NamedTuple):
    """What is changed in a file of jobs between two runs, and what that leads to."""

    before: list[Json]
    after: list[Json]
    new: Counter[str]  # images that have to be paid, by prompt
    names: list[str]  # of all originals in the end


def job(prompt: str, out: str, **more: object) -> Json:
    return {"prompt": prompt, "out": out, **more}


EDITS = {
    "a prompt, a name, a new line": Edit(
        [job("a fox", "castle.png"), job("a hare", "hare.png")],
        [job("an owl", "castle.png"), job("a hare", "rabbit.png"), job("kites", "kite.png", n=2)],
        Counter({"an owl": 1, "kites": 2}),
        ["castle-old-1.png", "castle.png", "hare.png", "kite-1.png", "kite-2.png", "rabbit.png"],
    ),
    "two names that change places": Edit(
        [job("a fox", "a.png"), job("a hare", "b.png")],
        [job("a fox", "b.png"), job("a hare", "a.png")],
        Counter(),
        ["a-old-1.png", "a.png", "b-old-1.png", "b.png"],
    ),
}


DEATHS = [("write", "before"), ("write", "after"), ("sync", "before")]


def sha(name: str) -> str:
    return hashlib.sha256(Path("out", name).read_bytes()).hexdigest()


def entries() -> list[Json]:
    """Each whole line of the manifest."""
    lines = Path("out", image_gen.MANIFEST_NAME).read_bytes().split(b"\n")
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def pictures() -> list[str]:
    return [name for name in live.names() if name[0] != "." and not name.endswith("-web.png")]


@pytest.mark.parametrize("death", DEATHS, ids=" ".join)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_run_that_is_killed_loses_no_image_that_it_has_noted_and_makes_none_twice(
    api: ImagesAPI,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    edit: Edit,
    death: tuple[str, str],
) -> None:
    lives = Lives(api, "--remake", "--concurrency", "1")
    job_file(*edit.before)
    assert lives.one(Death()) == 0
    former = set(map(sha, pictures()))
    job_file(*edit.after)
    for step in count(1):
        folder = tmp_path / "steps" / str(step)
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("steps"))
        monkeypatch.chdir(folder)
        died = lives.one(Death(*death, step)) != 0
        noted = {entry["sha256"]: entry["prompt"] for entry in entries()}
        left = {sha(name) for name in live.names() if name.endswith(".tmp")} - set(noted)
        assert lives.one(Death(), "--safety-identifier", str(step)) == 0  # which changes no image
        again = Counter[str]()
        for request in api.requests:
            if request.body.get("safety_identifier") == str(step):
                again[request.prompt.removeprefix("Primary request: ")] += request.body.get("n", 1)
        taken_up = {
            entry["sha256"]: entry["prompt"] for entry in entries() if entry["sha256"] in left
        }
        assert again == edit.new - Counter(noted.values()) - Counter(taken_up.values())
        assert set(pictures()) - set(edit.names) <= {"castle-alt-1.png"}  # a taken-up owl
        assert set(edit.names) <= set(pictures())
        last = {entry["name"]: entry["sha256"] for entry in entries()}
        assert {name: sha(name) for name in pictures()} == last
        assert former | set(noted) <= set(last.values())
        if not died:
            break
    assert step > 3
