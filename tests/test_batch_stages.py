"""How far a shard has got: the steps that there are, and what stands of them on disk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import image_gen
import pytest
from image_gen import STATE_NAME, Stage, Submission

# As version 0.1.0 has left them: file_id, creating, batch_id, settled.
Facts = tuple[str | None, bool, str | None, bool]
ON_DISK: dict[Facts, Stage] = {
    (None, False, None, False): Stage.PLANNED,
    ("file-1", False, None, False): Stage.UPLOADED,
    ("file-1", True, None, False): Stage.CREATING,
    ("file-1", True, "batch-1", False): Stage.CREATED,
    ("file-1", True, "batch-1", True): Stage.SETTLED,
    (None, False, None, True): Stage.DROPPED,
    ("file-1", False, None, True): Stage.DROPPED,
    ("file-1", True, None, True): Stage.DROPPED,
}
ARROWS = {
    ("PLANNED", "UPLOADED"),
    ("UPLOADED", "CREATING"),
    ("CREATING", "UPLOADED"),
    ("CREATING", "CREATED"),
    ("CREATED", "SETTLED"),
    ("PLANNED", "DROPPED"),
    ("UPLOADED", "DROPPED"),
    ("CREATING", "DROPPED"),
    ("UPLOADED", "PLANNED"),  # the API has lost its lines
    ("UPLOADED", "CREATED"),  # a batch of these jobs waits already
}


def state(facts: Facts) -> dict[str, Any]:
    """The content of a state file with one shard."""
    names = ("file_id", "creating", "batch_id", "settled")
    shard = {"numbers": [1], "endpoint": "/v1/images/generations"}
    return {
        "version": 1,
        "run": "0123456789abcdef",
        "started": 1_790_000_000,
        "digests": {"1": "ab" * 12},
        "variants": {"1": [0]},
        "uploads": {},
        "shards": [shard | dict(zip(names, facts, strict=True))],
        "planned": True,
        "force": False,
    }


def written(content: dict[str, Any]) -> Submission:
    Path(STATE_NAME).write_text(json.dumps(content))
    submission = image_gen.load_submission("")
    assert submission is not None
    return submission


@pytest.mark.parametrize(("facts", "stage"), list(ON_DISK.items()), ids=str)
def test_a_state_of_the_former_version_is_read_and_written_as_it_was(
    facts: Facts, stage: Stage
) -> None:
    submission = written(state(facts))
    assert submission.shards[0].stage is stage
    submission.save()
    assert stage is written(json.loads(Path(STATE_NAME).read_text())).shards[0].stage
    if stage is not Stage.DROPPED:  # nobody asks again how it got there
        now, then = json.loads(Path(STATE_NAME).read_text()), state(facts)
        assert {key: now[key] for key in then if key not in ("shards", "started")} == {
            key: then[key] for key in then if key not in ("shards", "started")
        }
        assert now["shards"][0].items() >= then["shards"][0].items()


@pytest.mark.parametrize(
    ("before", "after"), list(itertools.product(Stage, Stage)), ids=lambda s: s.name
)
def test_a_shard_steps_along_the_arrows_alone_and_each_step_is_on_disk(
    before: Stage, after: Stage
) -> None:
    facts = next(facts for facts, stage in ON_DISK.items() if stage is before)
    submission = written(state(facts))
    (shard,) = submission.shards
    if (before.name, after.name) not in ARROWS:
        with pytest.raises(AssertionError):
            submission.advance(shard, after)
        assert (shard.stage, json.loads(Path(STATE_NAME).read_text())) == (before, state(facts))
        return
    shard.file_id = None if after is Stage.PLANNED else shard.file_id or "file-1"
    if after is Stage.CREATED:
        shard.batch_id = "batch-1"
    submission.advance(shard, after)
    found = image_gen.load_submission("")
    assert found is not None
    assert found.shards[0].stage is after


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        pytest.param([Stage.PLANNED, Stage.UPLOADED], {"unasked"}, id="before"),
        pytest.param([Stage.CREATING, Stage.PLANNED], set(), id="in doubt"),
        pytest.param([Stage.CREATED, Stage.SETTLED], {"submitted"}, id="under way"),
        pytest.param([Stage.SETTLED, Stage.DROPPED], {"submitted", "finished"}, id="at the end"),
    ],
)
def test_a_run_is_as_far_as_its_shards(stages: list[Stage], expected: set[str]) -> None:
    facts = {stage: facts for facts, stage in ON_DISK.items()}
    content = state(facts[stages[0]])
    content["shards"] = [
        state(facts[stage])["shards"][0] | {"numbers": [number]}
        for number, stage in enumerate(stages, start=1)
    ]
    content["digests"] = content["variants"] = {"1": [0], "2": [0]}
    run = written(content)
    found = {name for name in ("submitted", "finished", "unasked") if getattr(run, name)}
    assert found == expected
