"""The walk over the SDK's types: whatever they take is offered, or left out with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

import image_gen
import pytest
from image_gen import FORMATS, PAYLOAD_KEYS, RANGES
from inputs import FLARE, as_flags, picture
from openai.types import ImageEditParams, ImageGenerateParams, ImageModel
from pages import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cli import Run
    from inputs import Json

MODELS: tuple[str, ...] = get_args(ImageModel)
SHAPES = {"generate": ImageGenerateParams, "edit": ImageEditParams}
# For types that no list of values bounds.
SAMPLES: Json = {key: low for key, (low, _) in RANGES.items()} | {
    "image": "room.png",
    "mask": "notes.png",
    "markup": "notes.png",
}


def values_of(hint: object) -> Iterator[object]:
    """The values of the Literals within a type."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from values_of(part)


def parameters(command: str) -> dict[str, list[object]]:
    """All parameters of a method of the SDK, with the values that their types spell out."""
    found: dict[str, dict[object, None]] = {}
    for shape in get_args(SHAPES[command]):
        for name, hint in get_type_hints(shape).items():
            found.setdefault(name, {}).update(dict.fromkeys(values_of(hint)))
    return {name: list(values) for name, values in found.items()}


WALK = [
    (command, name, value)
    for command in SHAPES
    for name, values in parameters(command).items()
    for value in values or [SAMPLES.get(name, "text")]
]


def left_out() -> dict[tuple[str, str | None], str]:
    """The parameters and the values that references/image-api.md leaves out, with the reasons."""
    reasons: dict[tuple[str, str | None], str] = {}
    for cell, reason in table("references/image-api.md", "Left out"):
        name, *values = re.findall(r"`([^`]+)`", cell)
        reasons |= dict.fromkeys([(name, value) for value in values or [None]], reason)
    return reasons


LEFT_OUT = left_out()
# What a value may need to be accepted: a model of one family, or a format of the newest.
FAMILIES = {image_gen.model_family(model): model for model in MODELS}
COMPANIONS = [
    *({"model": model, "output_format": "png"} for family, model in FAMILIES.items() if family),
    *({"model": FLARE, "output_format": name} for name in FORMATS if name != "png"),
]


@pytest.fixture(autouse=True)
def pictures() -> None:
    """The first image of the edits, and what can lie over it."""
    picture("room.png")
    picture("notes.png", "RGBA")


def offered(run: Run, command: str, name: str, value: object) -> bool:
    """Whether a flag and a key of JSONL send this value, with any model and any format."""
    edits = {"image": "room.png"} if command == "edit" else {}
    calls = [{"prompt": "text", **edits, **others, name: value} for others in COMPANIONS]
    for call in [one for index, one in enumerate(calls) if one not in calls[:index]]:
        by_flag = run(command, *as_flags(call), "--no-augment", "--dry-run")
        if by_flag.exit_code == 0 and by_flag.json.get(name) in (value, [value]):
            (by_key,) = run_lines(run, call)
            return bool(by_key.get(name) == by_flag.json[name])
    return False


def run_lines(run: Run, *jobs: Json) -> list[Json]:
    """The documents of a dry run of these lines, none if it is refused."""
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    flags = ("--out-dir", "out", "--no-augment", "--dry-run", "--json")
    return run("generate-batch", "--input", "jobs.jsonl", *flags).json_lines


@pytest.mark.parametrize(("command", "name", "value"), WALK)
def test_whatever_the_sdk_takes_is_offered_or_left_out_with_a_reason(
    run: Run, command: str, name: str, value: object
) -> None:
    is_left_out = (name, None) in LEFT_OUT or (name, value) in LEFT_OUT
    assert offered(run, command, name, value) != is_left_out


def test_nothing_is_left_out_that_the_sdk_does_not_have_and_nothing_without_a_reason() -> None:
    names = {name for _, name, _ in WALK}
    values = {(name, value) for _, name, value in WALK}
    assert [row for row in LEFT_OUT if row not in values and row[1] is not None] == []
    assert [name for name, value in LEFT_OUT if value is None and name not in names] == []
    assert all(len(reason) > 15 for reason in LEFT_OUT.values())


@pytest.mark.parametrize(
    ("command", "unknown"),
    [("generate", {"input_fidelity"}), ("edit", {*image_gen.EXTRA_BODY_KEYS})],
    ids=["generate", "edit"],
)
def test_nothing_is_sent_that_the_types_do_not_have(command: str, unknown: set[str]) -> None:
    assert set(PAYLOAD_KEYS) - set(parameters(command)) == unknown


@pytest.mark.parametrize("name", ["colour", "frame_style"])
def test_the_walk_would_find_a_parameter_that_is_new(run: Run, name: str) -> None:
    assert not offered(run, "generate", name, "text")


def test_every_model_of_the_sdk_that_is_not_left_out_has_a_family() -> None:
    known = [model for model in MODELS if image_gen.model_family(model)]
    assert known == [model for model in MODELS if ("model", model) not in LEFT_OUT]
