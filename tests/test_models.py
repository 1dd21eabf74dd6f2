"""Model families: what each of them takes, and that the older ones are sent nothing new."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, get_args

import dry
import image_gen
import live
import pytest
from image_gen import PAYLOAD_KEYS
from inputs import FLARE, OLDER, as_flags, picture
from openai.types import ImageModel

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI
    from inputs import Job, Json

KNOWN = [model for model in get_args(ImageModel) if image_gen.model_family(model)]
NEW = [model for model in KNOWN if "-2.5-" in model or "-2.6-" in model]
TWO, MINI, SUNBURST = "gpt-image-2", "gpt-image-1-mini", "gpt-image-2.6-sunburst"
FREE = [TWO, "gpt-image-2-2026-04-21", FLARE, "gpt-image-2.5-sunburst-2026-09-08", SUNBURST]
FIXED = ["gpt-image-1", MINI, "gpt-image-1.5", "gpt-image-1.5-2025-12-16"]


@pytest.fixture
def room() -> str:
    return picture("room.png")


@pytest.mark.parametrize(
    "model",
    [
        "",
        "gpt-image",
        "gpt-image-",
        "gpt-image--2",
        "GPT-IMAGE-2",
        "gpt-image-2 ",
        " gpt-image-2",
        "gpt-image-2\n",
        "dall-e-3",
        "chatgpt-image-latest",
    ],
)
def test_a_model_that_is_no_gpt_image_model_is_refused(run: Run, model: str) -> None:
    said = dry.problem(dry.generate(run, "--model", model))
    assert said.startswith("model ")
    assert "gpt-image-" in said
    assert dry.problem(dry.batch(run, {"prompt": "a fox", "model": model})) == f"line 1: {said}"


@pytest.mark.parametrize("model", ["gpt-image-9", "gpt-image-20", "gpt-image-3-mini"])
def test_an_unknown_model_gets_the_newest_rules_and_a_warning(run: Run, model: str) -> None:
    flags = ("--size", "2048x1152", "--quality", "xhigh", "--background", "transparent")
    unknown, transparent = dry.warnings(dry.generate(run, "--model", model, *flags))
    assert model in unknown
    assert "the API decides" in unknown
    assert f"{model} is not known to have it" in transparent


@pytest.mark.parametrize("model", FREE)
@pytest.mark.parametrize(
    "size",
    [
        *("auto", "1024x1024", "1536x1024", "1024x1536", "2048x2048", "2048x1152"),
        pytest.param("1024x640", id="smallest area, 655,360 pixels"),
        pytest.param("3840x2160", id="largest area, 8,294,400 pixels"),
        pytest.param("2160x3840", id="largest area, upright"),
        pytest.param("3840x1280", id="3:1"),
        pytest.param("1280x3840", id="1:3"),
    ],
)
def test_free_sizes_are_accepted_to_the_last_pixel(run: Run, model: str, size: str) -> None:
    assert dry.document(dry.generate(run, "--model", model, "--size", size))["size"] == size


@pytest.mark.parametrize("model", FREE)
@pytest.mark.parametrize(
    ("size", "says"),
    [
        pytest.param("1008x640", "645,120 pixels; accepted are 655,360 to 8,294,400", id="small"),
        pytest.param("3840x2176", "8,355,840 pixels", id="large"),
        pytest.param("2080x688", "3 times", id="narrow"),
        pytest.param("688x2080", "3 times", id="narrow, upright"),
        pytest.param("1000x1008", "multiples of 16", id="width in between"),
        pytest.param("1024x1025", "multiples of 16, e.g. 1024x1024", id="height in between"),
        pytest.param("3856x1296", "at most 3840", id="long"),
    ],
)
def test_free_sizes_beyond_a_limit_are_refused_with_the_limit(
    run: Run, model: str, size: str, says: str
) -> None:
    said = dry.problem(dry.generate(run, "--model", model, "--size", size))
    assert said.startswith(f"size {size}")
    assert says in said


@pytest.mark.parametrize(
    "size",
    [
        *("", "AUTO", "1024", "1024x", "x1024", "0x0", "-1024x1024", "1024x1024x1", "1024*1024"),
        *("1024 x 1024", "01024x1024", "1024x1024\n", "１０２４x1024", "9" * 5000 + "x16"),
    ],
)
@pytest.mark.parametrize("model", [TWO, "gpt-image-1.5"])
def test_what_is_no_size_is_refused(run: Run, model: str, size: str) -> None:
    said = dry.problem(dry.generate(run, "--model", model, f"--size={size}"))
    assert said.startswith('size "')
    assert len(said) < 200


@pytest.mark.parametrize("model", FIXED)
def test_older_models_have_a_list_of_sizes(run: Run, model: str) -> None:
    for size in ("auto", "1024x1024", "1536x1024", "1024x1536"):
        assert dry.document(dry.generate(run, "--model", model, "--size", size))["size"] == size
    said = dry.problem(dry.generate(run, "--model", model, "--size", "2048x2048"))
    assert "1024x1024, 1536x1024, 1024x1536, auto" in said


@pytest.mark.parametrize(("size", "count"), [("2560x1440", 0), ("2576x1440", 1), ("3840x2160", 1)])
def test_sizes_above_2560x1440_are_called_experimental(run: Run, size: str, count: int) -> None:
    said = dry.warnings(dry.generate(run, "--size", size))
    assert len(said) == count
    assert all("experimental" in each for each in said)


@pytest.mark.parametrize(
    ("model", "accepted"),
    [
        *((model, ["low", "medium", "high", "auto"]) for model in [TWO, FREE[1], *FIXED]),
        *((model, ["low", "medium", "high", "xhigh", "max", "auto"]) for model in FREE[2:]),
    ],
)
def test_qualities_follow_the_family(run: Run, model: str, accepted: list[str]) -> None:
    for quality in ("low", "medium", "high", "xhigh", "max", "auto", "", "hd", "standard"):
        result = dry.generate(run, "--model", model, "--quality", quality)
        if quality in accepted:
            assert dry.document(result)["quality"] == quality
        else:
            said = dry.problem(result)
            assert said.startswith(f'quality "{quality}"')
            assert ", ".join(accepted) in said


@pytest.mark.parametrize("model", [FLARE, SUNBURST, *FIXED])
def test_a_transparent_background_needs_a_format_with_alpha(run: Run, model: str) -> None:
    flags = ("--model", model, "--background", "transparent", "--output-format")
    for output_format in ("png", "webp"):
        assert dry.document(dry.generate(run, *flags, output_format))["background"] == "transparent"
    assert "png or webp, not jpeg" in dry.problem(dry.generate(run, *flags, "jpeg"))


@pytest.mark.parametrize("model", FREE[:2])
def test_gpt_image_2_has_no_transparent_background(run: Run, model: str) -> None:
    said = dry.problem(dry.generate(run, "--model", model, "--background", "transparent"))
    assert "gpt-image-2.5" in said
    assert "remove_chroma_key.py" in said


@pytest.mark.parametrize(
    ("model", "fidelity", "outcome"),
    [
        ("gpt-image-1.5", "low", "sent"),
        ("gpt-image-1.5", "high", "sent"),
        ("gpt-image-1", "high", "sent"),
        (MINI, "low", "sent"),
        (MINI, "high", "sent with a warning"),
        ("gpt-image-1.5", "medium", "refused"),
        (TWO, "low", "refused"),
        (TWO, "high", "refused"),
        (FLARE, "high", "refused"),
    ],
)
@pytest.mark.usefixtures("room")
def test_input_fidelity_follows_the_family(
    run: Run, model: str, fidelity: str, outcome: str
) -> None:
    result = dry.edit(run, "--model", model, "--input-fidelity", fidelity)
    if outcome == "refused":
        assert "input_fidelity" in dry.problem(result)
    else:
        warned = any("input_fidelity" in said for said in dry.warnings(result))
        assert dry.document(result)["input_fidelity"] == fidelity
        assert warned == (outcome == "sent with a warning")


@pytest.mark.parametrize("key", ["mask", "input_fidelity"])
@pytest.mark.usefixtures("room")
def test_what_belongs_to_an_edit_needs_an_image(run: Run, key: str) -> None:
    job = {"prompt": "a fox", "model": "gpt-image-1.5", key: "high"}
    assert f"line 1: {key} is for edits" in dry.problem(dry.batch(run, job))


@pytest.mark.parametrize(
    ("days", "says"),
    [
        pytest.param(-400, "was shut down on", id="long gone"),
        pytest.param(-1, "was shut down on", id="just gone"),
        pytest.param(30, "shuts down on", id="soon"),
        pytest.param(1000, None, id="far away"),
    ],
)
def test_a_model_that_ends_is_used_with_a_warning_that_names_its_successor(
    run: Run, monkeypatch: pytest.MonkeyPatch, days: int, says: str | None
) -> None:
    day = (datetime.now(UTC).date() + timedelta(days=days)).isoformat()
    families = [
        family._replace(shut_down=day) if family.shut_down else family
        for family in image_gen.MODEL_FAMILIES
    ]
    monkeypatch.setattr(image_gen, "MODEL_FAMILIES", families)
    said = dry.warnings(dry.generate(run, "--model", "gpt-image-1.5"))
    assert bool(said) == bool(says)
    for each in said:
        assert f"gpt-image-1.5 {says} {day}" in each
        assert FLARE in each


def test_the_end_of_the_first_models_is_known() -> None:
    ends = {family.prefix: family.shut_down for family in image_gen.MODEL_FAMILIES}
    assert ends["gpt-image-1"] == "2026-10-23"
    assert ends[MINI] == ends["gpt-image-1.5"] == "2026-12-01"


@pytest.mark.parametrize("model", KNOWN)
@pytest.mark.parametrize("quality", ["xhigh", "max"])
def test_the_highest_qualities_are_those_of_2_5_and_2_6(run: Run, model: str, quality: str) -> None:
    result = dry.generate(run, "--model", model, "--quality", quality)
    if model in NEW:
        assert dry.document(result)["quality"] == quality
        assert dry.warnings(result) == []
    else:
        said = dry.problem(result)
        assert said.startswith(f'quality "{quality}"')
        assert "low, medium, high, auto" in said


@pytest.mark.parametrize("model", OLDER[:2])
def test_native_transparency_comes_first_where_gpt_image_2_refuses_it(run: Run, model: str) -> None:
    said = dry.problem(dry.generate(run, "--model", model, "--background", "transparent"))
    assert said.startswith(f"background transparent is not supported by {model}; use a --model")
    in_order = [FLARE, "gpt-image-1.5", "gpt-image-2.6-sunburst", "remove_chroma_key.py"]
    assert sorted(in_order, key=said.index) == in_order


# The older families behave as before.


def plain_body(model: str | None) -> Json:
    """What has always been sent where nothing else is asked for."""
    return {
        "model": model or "gpt-image-2",
        "n": 1,
        "output_format": "png",
        "prompt": "Primary request: a fox",
        "quality": "medium",
        "size": "auto",
    }


@pytest.mark.parametrize("model", [None, *OLDER])
@pytest.mark.usefixtures("room")
def test_the_document_of_an_older_model_has_no_new_key(run: Run, model: str | None) -> None:
    chosen = ("--model", model) if model else ()
    files: Json = {"outputs": ["output/imagegen/output.png"], "outputs_downscaled": None}
    generated = {**plain_body(model), **files, "endpoint": "/v1/images/generations"}
    edited = {**generated, "endpoint": "/v1/images/edits", "image": ["room.png"]}
    assert dry.document(dry.generate(run, *chosen)) == generated
    assert dry.document(dry.edit(run, *chosen)) == edited
    line = dry.document(dry.batch(run, {"prompt": "a fox", "out": "a"}, flags=chosen))
    assert line == {**generated, "outputs": ["out/a.png"], "job": 1}


@pytest.mark.usefixtures("room")
def test_a_request_of_an_older_model_has_no_new_key(run: Run, api: ImagesAPI) -> None:
    served = OLDER[:-1]  # the last is shut down, and the server knows
    jobs: list[Job] = [
        {"prompt": "a fox", "model": model, **image}
        for model in served
        for image in ({}, {"image": "room.png"})
    ]
    assert live.outcomes(run(*live.batch(jobs, "--json"))) == ["done"] * len(jobs)
    sent = [(request.path, request.body["model"], request.body) for request in api.requests]
    paths = ("/v1/images/edits", "/v1/images/generations")
    expected = [(path, model, plain_body(model)) for path in paths for model in served]
    assert sorted(sent, key=str) == sorted(expected, key=str)
    files = [[file.field for file in request.files] for request in api.requests]
    assert sorted(files) == [[]] * len(served) + [["image"]] * len(served)


# What the new models take.

EVERYTHING = {
    "model": FLARE,
    "quality": "xhigh",
    "complexity": "high",
    "background": "transparent",
    "safety_identifier": "4b1d",
}


def test_the_new_keys_are_sent_as_they_are_shown(run: Run, api: ImagesAPI) -> None:
    calls = {model: EVERYTHING | {"prompt": "a fox", "model": model} for model in NEW}
    for call in calls.values():
        shown = dry.document(run("generate", *as_flags(call), "--no-augment", "--dry-run"))
        assert shown == {**shown, **call}
        calls[call["model"]] = {key: shown[key] for key in shown if key in PAYLOAD_KEYS}
    jobs: list[Job] = [EVERYTHING | {"prompt": "a fox", "model": model} for model in NEW]
    result = run(*live.batch(jobs, "--no-augment", "--json"))
    assert {request.body["model"]: request.body for request in api.requests} == calls
    for record in result.json_lines:
        assert (record["quality"], record["outputs"][0]["alpha"]) == ("xhigh", True)
        assert (record["warnings"], record["error"]) == ([], None)
    assert run("generate", *as_flags(calls[FLARE]), "--no-augment").exit_code == 0
    assert api.requests[-1].body == calls[FLARE]


def test_the_new_keys_go_through_the_batch_api_too(run: Run) -> None:
    call = {
        "prompt": "a fox",
        "model": FLARE,
        "output_format": "gif",
        "frame_count": 4,
        "frame_duration_ms": 50,
        "complexity": "low",
    }
    shown = dry.document(dry.batch(run, call, flags=("--batch-api", "--no-augment")))
    assert shown["body"] == {**shown["body"], **call}
