"""A run through the Batch API is killed at every step; the same command brings it to its end."""

from __future__ import annotations

import signal
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import live
import pytest
from deaths import Death, Lives
from images_api import BatchPlan
from inputs import job_file, picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from images_api import Batch, ImagesAPI
    from inputs import Json

pytestmark = pytest.mark.usefixtures("forks_find_their_modules")

JOBS: list[Json] = [
    {"prompt": "two drafts", "n": 2, "out": "drafts"},
    {"prompt": "an edit", "image": "room.png", "out": "edit"},
]
ORIGINALS = ["drafts-1", "drafts-2", "edit"]
IMAGES = sorted(name + suffix for name in ORIGINALS for suffix in (".png", "-web.png"))


@pytest.fixture
def lives(api: ImagesAPI) -> Lives:
    return Lives(api, "--batch-api")


class Begin(Protocol):
    """Makes a new current directory with jobs; returns what tells the batches made since then."""

    def __call__(self, plan: BatchPlan) -> Callable[[], list[Batch]]: ...


@pytest.fixture
def begin(api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Begin:
    folders = count(1)

    def begin(plan: BatchPlan) -> Callable[[], list[Batch]]:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        monkeypatch.chdir(folder)
        picture("room.png")
        job_file(*JOBS)
        api.plan_batch(plan, plan)
        api.forget_batches()  # or one that the run before has not tidied up would be taken up
        return lambda: api.batches

    return begin


def exactly_once(batches: list[Batch]) -> None:
    """Every image is there once, and the server saw every job once."""
    assert [name for name in live.names() if not name.startswith(".")] == IMAGES
    contents = {Path("out", f"{name}.png").read_bytes() for name in ORIGINALS}
    assert len(contents) == len(ORIGINALS)
    seen = Counter(line.custom_id for batch in batches for line in batch.lines)
    assert seen == {"job-1": 1, "job-2": 1}


@pytest.mark.parametrize(
    ("what", "when"),
    [
        ("request", "before"),
        ("request", "after"),
        ("request", "interrupted"),
        ("write", "before"),
        ("write", "after"),
    ],
)
def test_the_same_command_ends_what_was_cut_short_at_any_step(
    lives: Lives, begin: Begin, what: str, when: str
) -> None:
    cut_short = 130 if when == "interrupted" else -signal.SIGKILL
    for step in count(1):
        batches = begin(BatchPlan(states=("completed",)))
        ended = lives.one(Death(what, when, step))
        if ended == cut_short:
            assert lives.one(Death()) == 0, Path("log.txt").read_text()
        exactly_once(batches())
        if ended != cut_short:
            break
    assert ended == 0
    assert step > {"request": 9, "write": 15}[what]


def test_cancel_ends_what_a_cancel_began_that_was_killed_at_any_step(
    lives: Lives, begin: Begin
) -> None:
    for step in count(1):
        batches = begin(BatchPlan(states=("in_progress",), cancelled_share=1.0))
        assert lives.one(Death(), "--no-wait") == 3
        ended = lives.one(Death("request", "after", step), "--cancel")
        if ended == -signal.SIGKILL:
            assert lives.one(Death(), "--cancel") == 0, Path("log.txt").read_text()
        assert [batch.status for batch in batches()] == ["cancelled"] * 2
        exactly_once(batches())
        if ended != -signal.SIGKILL:
            break
    assert ended == 0
    assert step > 6


def test_a_command_that_is_killed_after_every_fifth_write_still_gets_to_its_end(
    lives: Lives, begin: Begin
) -> None:
    batches = begin(BatchPlan())
    deaths = 0
    while (ended := lives.one(Death("write", "after", 5))) == -signal.SIGKILL:
        deaths += 1
        assert deaths < 20
    assert (ended, deaths > 2) == (0, True)
    exactly_once(batches())
