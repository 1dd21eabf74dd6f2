"""What the newer models can do, and that the CLI forgets nothing of the SDK's types."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import dry
import image_gen
import live
import pytest
from image_gen import FORMATS, JOB_OPTIONS, PAYLOAD_KEYS, RANGES, probe
from images_api import PATIENCE, Answer, answer_cut, changed, image_bytes, redrawn, stream_cut, told
from inputs import Job, encoded, flag, picture
from openai.types import ImageEditParams, ImageGenerateParams, ImageModel
from pages import table
from PIL import Image, ImageSequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cli import Result, Run, Start
    from images_api import ImagesAPI, Reply

Json = dict[str, Any]

FLARE = "gpt-image-2.5-flare"
MODELS: tuple[str, ...] = get_args(ImageModel)
NEW = [model for model in MODELS if "-2.5-" in model or "-2.6-" in model]
OLD = ["gpt-image-2", "gpt-image-2-2026-04-21", "gpt-image-1.5", "gpt-image-1-mini", "gpt-image-1"]


@pytest.fixture(autouse=True)
def pictures() -> None:
    """The first image of the edits, and what can lie over it."""
    picture("room.png")
    picture("notes.png", "RGBA")


# ------------------------------------------------------------------ the walk over the SDK's types

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
    *({"model": NEW[-1], "output_format": name} for name in FORMATS if name != "png"),
]


def words(arguments: Json) -> list[str]:
    """Parameters as flags."""
    return [word for key, value in arguments.items() for word in (flag(key), str(value))]


def offered(run: Run, command: str, name: str, value: object) -> bool:
    """Whether a flag and a key of JSONL send this value, with any model and any format."""
    edits = {"image": "room.png"} if command == "edit" else {}
    calls = [{"prompt": "text", **edits, **others, name: value} for others in COMPANIONS]
    for call in [one for index, one in enumerate(calls) if one not in calls[:index]]:
        by_flag = run(command, *words(call), "--no-augment", "--dry-run")
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


# ----------------------------------------------------------------------- what the families accept


@pytest.mark.parametrize("model", [model for model in MODELS if ("model", model) not in LEFT_OUT])
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


@pytest.mark.parametrize("model", OLD[:2])
def test_native_transparency_comes_first_where_gpt_image_2_refuses_it(run: Run, model: str) -> None:
    said = dry.problem(dry.generate(run, "--model", model, "--background", "transparent"))
    assert said.startswith(f"background transparent is not supported by {model}; use a --model")
    in_order = ["gpt-image-2.6-sunburst", FLARE, "gpt-image-1.5", "remove_chroma_key.py"]
    assert sorted(in_order, key=said.index) == in_order


GIF: Json = {"model": FLARE, "output_format": "gif"}
SVG: Json = {"model": FLARE, "output_format": "svg"}
ROOM: Json = {"image": "room.png"}
NOTES: Json = {**ROOM, "model": FLARE, "markup": "notes.png"}
DOWNSCALED = ("--downscale-max-dim", "9")


# Parameters, and how the message begins that refuses them.
REFUSED: dict[str, tuple[Json, str]] = {
    "complexity": ({"complexity": "max"}, 'complexity "max": accepted are low, medium, hi'),
    "frames of a png": ({"frame_count": 4}, "frame_count needs output_format gif, not png"),
    "time of a png": ({"frame_duration_ms": 9}, "frame_duration_ms needs output_format gi"),
    "gif drafts": ({**GIF, "partial_images": 1}, "partial_images needs output_format png"),
    "gif lossy": ({**GIF, "output_compression": 9}, "output_compression needs output_form"),
    "gif clear": ({**GIF, "background": "transparent"}, "background transparent needs out"),
    "gif mask": ({**GIF, **ROOM, "mask": "notes.png"}, "mask needs output_format png or"),
    "svg mask": ({**SVG, **ROOM, "mask": "notes.png"}, "mask needs output_format png or"),
    "two svg": ({**SVG, "n": 2}, "n 2: svg is made one at a time"),
    "svg drafts": ({**SVG, "partial_images": 1}, "partial_images needs output_format png"),
    "svg lossy": ({**SVG, "output_compression": 9}, "output_compression needs output_form"),
    "svg clear": ({**SVG, "background": "transparent"}, "background transparent needs out"),
    "svg frames": ({**SVG, "frame_count": 2}, "frame_count needs output_format gif, not s"),
    "drafts of two": ({"partial_images": 1, "n": 2}, "partial_images with n 2: a stream"),
    "markup and mask": ({**NOTES, "mask": "notes.png"}, "mask and markup cannot be combin"),
    "markup of an older model": ({**NOTES, "model": OLD[0]}, "markup is not supported by"),
    "markup without alpha": ({**NOTES, "markup": "rgb.png"}, "markup rgb.png has no alpha"),
    "markup of another size": ({**NOTES, "markup": "wide.png"}, "markup wide.png is 65x64"),
    "markup that is none": ({**NOTES, "markup": "gone.png"}, "markup gone.png cannot be r"),
    "markup that is text": ({**NOTES, "markup": "a.txt"}, "markup a.txt is no PNG, JPEG o"),
    "a copy of an svg": (SVG | {"downscale_max_dim": 9}, "--downscale-max-dim: svg has no pixels"),
}
REFUSED |= {
    f"{key} {value}": ({**others, key: value}, f"{key} {value}: accepted are {low} to {high:,}")
    for key, others in {"frame_count": GIF, "frame_duration_ms": GIF, "partial_images": {}}.items()
    for low, high in [RANGES[key]]
    for value in (low - 1, high + 1)
}
REFUSED |= {
    f"{name} of {model}": (
        {"model": model, "output_format": name},
        f"output_format {name}: {model} makes png, jpeg, webp",
    )
    for model, name in itertools.product(OLD, ("gif", "svg"))
}


@pytest.mark.parametrize(("job", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_api_would_refuse_is_refused_before_it_is_sent(
    run: Run, job: Json, said: str
) -> None:
    picture("rgb.png")
    picture("wide.png", "RGBA", (65, 64))
    Path("a.txt").write_text("text")
    command = "edit" if "image" in job else "generate"
    by_flag = dry.problem(run(command, *words({"prompt": "a fox"} | job), "--dry-run"))
    assert by_flag.startswith(said)
    keys = {key: value for key, value in job.items() if key in JOB_OPTIONS}
    flags = words({key: value for key, value in job.items() if key not in keys})
    by_key = dry.problem(dry.batch(run, {"prompt": "a fox"} | keys, flags=tuple(flags)))
    assert by_key == f"line 1: {by_flag}"


def test_markup_of_a_generation_is_refused(run: Run) -> None:
    job = {"prompt": "a fox", "model": FLARE, "markup": "notes.png"}
    assert dry.problem(dry.batch(run, job)).startswith("line 1: markup is for edits")


def test_markup_is_drawn_over_a_photograph_as_it_is_seen(run: Run) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.new("RGB", (64, 32)).save("photo.jpg", exif=exif)
    flags = ("--model", FLARE, "--markup")
    upright = picture("upright.png", "RGBA", (32, 64))
    result = dry.edit(run, *flags, upright, image="photo.jpg")
    assert dry.document(result)["markup"] == upright
    assert dry.warnings(result) == []
    stored = picture("stored.png", "RGBA", (64, 32))
    assert dry.problem(dry.edit(run, *flags, stored, image="photo.jpg")).startswith(
        "markup stored.png"
    )


# ------------------------------------------------------------- the older families behave as before


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


@pytest.mark.parametrize("model", [None, *OLD])
def test_the_document_of_an_older_model_has_no_new_key(run: Run, model: str | None) -> None:
    chosen = ("--model", model) if model else ()
    files: Json = {"outputs": ["output/imagegen/output.png"], "outputs_downscaled": None}
    generated = {**plain_body(model), **files, "endpoint": "/v1/images/generations"}
    edited = {**generated, "endpoint": "/v1/images/edits", "image": ["room.png"]}
    assert dry.document(dry.generate(run, *chosen)) == generated
    assert dry.document(dry.edit(run, *chosen)) == edited
    line = dry.document(dry.batch(run, {"prompt": "a fox", "out": "a"}, flags=chosen))
    assert line == {**generated, "outputs": ["out/a.png"], "job": 1}


def test_a_request_of_an_older_model_has_no_new_key(run: Run, api: ImagesAPI) -> None:
    served = OLD[:-1]  # the last is shut down, and the server knows
    jobs: list[Job] = [
        {"prompt": "a fox", "model": model, **image} for model in served for image in ({}, ROOM)
    ]
    assert live.outcomes(run(*live.batch(jobs, "--json"))) == ["done"] * len(jobs)
    sent = [(request.path, request.body["model"], request.body) for request in api.requests]
    paths = ("/v1/images/edits", "/v1/images/generations")
    expected = [(path, model, plain_body(model)) for path in paths for model in served]
    assert sorted(sent, key=str) == sorted(expected, key=str)
    files = [[file.field for file in request.files] for request in api.requests]
    assert sorted(files) == [[]] * len(served) + [["image"]] * len(served)


# ----------------------------------------------------------------------- what the new models take

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
        shown = dry.document(run("generate", *words(call), "--no-augment", "--dry-run"))
        assert shown == {**shown, **call}
        calls[call["model"]] = {key: shown[key] for key in shown if key in PAYLOAD_KEYS}
    jobs: list[Job] = [EVERYTHING | {"prompt": "a fox", "model": model} for model in NEW]
    result = run(*live.batch(jobs, "--no-augment", "--json"))
    assert {request.body["model"]: request.body for request in api.requests} == calls
    for record in result.json_lines:
        assert (record["quality"], record["outputs"][0]["alpha"]) == ("xhigh", True)
        assert (record["warnings"], record["error"]) == ([], None)
    assert run("generate", *words(calls[FLARE]), "--no-augment").exit_code == 0
    assert api.requests[-1].body == calls[FLARE]


def test_the_new_keys_go_through_the_batch_api_too(run: Run) -> None:
    call = {
        "prompt": "a fox",
        **GIF,
        "frame_count": 4,
        "frame_duration_ms": 50,
        "complexity": "low",
    }
    shown = dry.document(dry.batch(run, call, flags=("--batch-api", "--no-augment")))
    assert shown["body"] == {**shown["body"], **call}


def test_markup_is_a_file_part_of_its_own(run: Run, api: ImagesAPI) -> None:
    picture("second.webp")
    call = ["edit", *words({"prompt": "a fox", **NOTES})]
    assert run(*call).exit_code == 0
    assert run(*call, "--image", "second.webp", "--out", "b.png").exit_code == 0
    one, two = api.requests
    assert [file.field for file in one.files] == ["image", "markup"]
    assert [file.field for file in two.files] == ["image[]", "image[]", "markup"]
    for request in (one, two):
        markup = request.files[-1]
        assert (markup.content_type, markup.filename) == ("image/png", "markup.png")
        assert markup.data == Path("notes.png").read_bytes()
        assert "markup" not in request.body


def test_a_job_with_markup_is_an_edit(run: Run, api: ImagesAPI) -> None:
    assert live.outcomes(run(*live.batch([{"prompt": "a fox", **NOTES}], "--json"))) == ["done"]
    (request,) = api.requests
    assert request.path == "/v1/images/edits"
    assert [file.field for file in request.files] == ["image", "markup"]


# ------------------------------------------------------------------------------------ gif and svg


def recorded(into: list[bytes]) -> Reply:
    """The ordinary answer; its images are written down as they are sent."""
    return image_bytes(lambda data: into.append(data) or data)  # type: ignore[func-returns-value]


def animation(name: str | Path) -> tuple[tuple[int, int], list[int]]:
    """The size of a gif, and the time of each frame."""
    with Image.open(name) as image:
        frames = [(f.size, f.info.get("duration", 0)) for f in ImageSequence.Iterator(image)]
        assert {size for size, _ in frames} == {image.size}
        return image.size, [time for _, time in frames]


def test_a_gif_is_saved_as_it_came_and_its_copy_keeps_frames_and_timing(
    run_process: Run, api: ImagesAPI
) -> None:
    sent: list[bytes] = []
    api.script(recorded(sent))
    flags = ("--model", FLARE, "--frame-count", 5, "--frame-duration-ms", 124, *DOWNSCALED)
    result = run_process(*live.generate(*flags, "--json", out="fox.gif"))
    assert result.exit_code == 0, result.stderr
    assert Path("fox.gif").read_bytes() == sent[0]
    assert animation("fox.gif") == ((64, 64), [120] * 5)
    assert animation("fox-web.gif") == ((9, 9), [120] * 5)
    body = api.requests[0].body
    assert (body["output_format"], body["frame_count"], body["frame_duration_ms"]) == (
        "gif",
        5,
        124,
    )
    shown = [*result.json["outputs"], *result.json["outputs_downscaled"]]
    assert [(image["format"], image["width"]) for image in shown] == [("gif", 64), ("gif", 9)]
    assert result.json["warnings"] == []


def test_variants_of_a_gif_are_counted_and_the_frames_are_the_api_s_choice(
    run: Run, api: ImagesAPI
) -> None:
    assert run(*live.generate("--model", FLARE, "--n", 2, out="fox.gif")).exit_code == 0
    assert [animation(f"fox-{number}.gif") for number in (1, 2)] == [((64, 64), [200] * 9)] * 2
    assert "frame_count" not in api.requests[0].body


def gif(frames: list[Image.Image], **options: object) -> bytes:
    return encoded(frames[0], "gif", save_all=True, append_images=frames[1:], **options)


def almost_equal() -> list[Image.Image]:
    """Frames that differ in one pixel, which a smaller copy no longer shows."""
    frames = [Image.new("RGB", (64, 64), (10, 200, 30)) for _ in range(6)]
    for frame in frames[1::2]:
        frame.putpixel((5, 5), (11, 200, 30))
    return frames


def clear_halves() -> list[Image.Image]:
    frames = [Image.new("RGBA", (64, 64), (200, 40 * number, 9, 255)) for number in range(6)]
    for frame in frames:
        frame.paste((0, 0, 0, 0), (0, 0, 32, 64))
    return frames


TIMES = [100, 200, 300, 40, 500, 20]


@pytest.mark.parametrize(
    ("content", "loop"),
    [
        pytest.param(gif(almost_equal(), duration=TIMES, loop=0), 0, id="almost equal frames"),
        pytest.param(gif(almost_equal(), duration=TIMES), None, id="played once"),
        pytest.param(gif(clear_halves(), duration=TIMES, loop=3, disposal=2), 3, id="transparent"),
    ],
)
def test_any_gif_keeps_frames_timing_and_look_in_its_copy(
    run: Run, api: ImagesAPI, content: bytes, loop: int | None
) -> None:
    api.script(image_bytes(lambda _: content))
    assert (
        run(*live.generate("--model", FLARE, "--downscale-max-dim", 16, out="a.gif")).exit_code == 0
    )
    assert Path("a.gif").read_bytes() == content
    assert animation("a.gif") == ((64, 64), TIMES)
    assert animation("a-web.gif") == ((16, 16), TIMES)
    with Image.open("a.gif") as original, Image.open("a-web.gif") as copy:
        assert copy.info.get("loop") == loop
        for number in range(len(TIMES)):
            original.seek(number)
            copy.seek(number)
            for x in (0.2, 0.8):
                before, after = (
                    image.convert("RGBA").getpixel((int(x * image.width), image.height // 2))
                    for image in (original, copy)
                )
                assert after == pytest.approx(before, abs=8)


def test_an_svg_is_saved_as_it_came(run_process: Run, api: ImagesAPI) -> None:
    sent: list[bytes] = []
    api.script(recorded(sent))
    flags = ("--model", FLARE, "--complexity", "low", "--json")
    result = run_process(*live.generate(*flags, prompt="a <fox> & co", out="fox.svg"))
    assert result.exit_code == 0, result.stderr
    assert Path("fox.svg").read_bytes() == sent[0]
    assert sent[0].startswith(b"<svg")
    (image,) = result.json["outputs"]
    assert image == {
        "path": "fox.svg",
        "bytes": len(sent[0]),
        "width": 64,
        "height": 64,
        "format": "svg",
        "alpha": True,
    }
    assert (api.requests[0].body["output_format"], result.json["warnings"]) == ("svg", [])
    assert result.json["usage"]["svg_usage"]["total_tokens"] == 300


@pytest.mark.parametrize("name", ["gif", "svg"])
def test_an_edit_makes_it_too(run: Run, api: ImagesAPI, name: str) -> None:
    edit = ("edit", "--image", "room.png", "--prompt", "a fox", "--model", FLARE)
    assert run(*edit, "--out", f"fox.{name}").exit_code == 0
    made = probe(io.BytesIO(Path(f"fox.{name}").read_bytes()))
    assert made is not None
    assert (made.format, made.whole, made.size) == (name, True, "64x64")
    assert [request.status for request in api.requests] == [200]


@pytest.mark.parametrize(
    ("head", "size"),
    [
        pytest.param(b'<?xml version="1.0"?>\n<svg width="30" height="20">', "30x20", id="xml"),
        pytest.param(b'\xef\xbb\xbf<svg width="30px" height="20px">', "30x20", id="BOM, px"),
        pytest.param(b"<!-- by hand -->\n<svg viewBox='0 0 9 9'>", "0x0", id="comment"),
        pytest.param(b"<!DOCTYPE svg>\n<svg\nwidth='100%'>", "0x0", id="doctype"),
    ],
)
def test_an_svg_may_begin_in_several_ways(head: bytes, size: str) -> None:
    whole, cut = (probe(io.BytesIO(head + end)) for end in (b"<path/></svg>\n", b"<path/>"))
    assert whole is not None
    assert cut is not None
    assert (whole.format, whole.size, whole.alpha) == ("svg", size, True)
    assert (whole.whole, cut.whole) == (True, False)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("gif", lambda data: data[:-1], id="gif without its end"),
        pytest.param("gif", lambda data: b"GIF8?a" + data[6:], id="gif of no version"),
        pytest.param("svg", lambda data: data[:60], id="svg without its end"),
        pytest.param("svg", lambda _: b"<html><body></body></html>", id="a page"),
        pytest.param("svg", lambda _: b"<?xml version='1.0'?><rss></rss>", id="other XML"),
        pytest.param("svg", lambda _: b'{"svg": "<svg></svg>"}', id="JSON"),
    ],
)
def test_what_is_no_gif_or_svg_by_its_bytes_is_not_saved(
    run: Run, api: ImagesAPI, name: str, change: Callable[[bytes], bytes]
) -> None:
    api.script(image_bytes(change))
    failed = run(*live.generate("--model", FLARE, "--json", out=f"made/a.{name}"))
    assert live.error(failed).startswith("an image of the answer")
    assert failed.json["error"]["kind"] == "bad_answer"
    assert live.names("made") == [f"a.{name}.damaged"]
    assert f"are kept as made/a.{name}.damaged" in live.error(failed)
    assert len(api.requests) == 1


def test_another_format_than_gif_is_saved_as_it_came_with_a_warning(
    run: Run, api: ImagesAPI
) -> None:
    api.script(redrawn("png"))
    result = run(*live.generate("--model", FLARE, out="a.gif"))
    assert result.exit_code == 0
    assert live.lines(result, "Warning: ") == ["a.gif: asked for gif, got png"]


def test_a_batch_of_all_formats_has_copies_and_a_contact_sheet(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = [{"prompt": "a", "model": FLARE, "out": f"a.{name}"} for name in FORMATS]
    result = run(*live.batch(jobs, "--contact-sheet", "sheet.png", "--json"))
    assert live.outcomes(result) == ["done"] * len(FORMATS)
    assert live.names() == sorted(f"a.{name}" for name in FORMATS)
    assert live.size_of("sheet.png")[0] > 256
    made = [line["outputs"][0]["format"] for line in result.json_lines]
    assert sorted(made) == sorted(FORMATS)
    assert len(api.requests) == len(FORMATS)


@pytest.mark.parametrize("name", ["gif", "svg"])
def test_a_run_resumes_with_what_is_missing_or_cut(run: Run, api: ImagesAPI, name: str) -> None:
    call = live.generate("--model", FLARE, "--skip-existing", out=f"a.{name}")
    for requests in (1, 1):
        assert run(*call).exit_code == 0
        assert len(api.requests) == requests
    whole = Path(f"a.{name}").read_bytes()
    Path(f"a.{name}").write_bytes(whole[:-8])
    assert run(*call).exit_code == 0
    assert len(api.requests) == 2
    assert Path(f"a.{name}").read_bytes() == whole


# ----------------------------------------------------------------------------------------- drafts


def drafts(*numbers: int, stem: str = "fox", suffix: str = ".png") -> list[str]:
    return [f"{stem}.partial-{number}{suffix}" for number in numbers]


def made() -> list[str]:
    """What a run has left in the current directory."""
    return [name for name in live.names(".") if name not in ("room.png", "notes.png", "jobs.jsonl")]


def events(change: Callable[[list[bytes]], Iterable[bytes]]) -> Reply:
    """The ordinary stream after `change` has worked on its events."""
    return changed(lambda answer: replace(answer, chunks=change(list(answer.chunks))))


def event(document: object, **fields: object) -> bytes:
    """A server-sent event; an event that was sent before may be given, with other fields."""
    if isinstance(document, bytes):
        document = json.loads(document.split(b"data: ")[1])
    content = document | fields if isinstance(document, dict) else document
    kept = {k: v for k, v in content.items() if v != ""} if isinstance(content, dict) else content
    return b"data: " + json.dumps(kept).encode() + b"\n\n"


def held_after(count: int, gate: threading.Event) -> Reply:
    """The stream stops after so many events until the gate opens."""

    def hold(chunks: list[bytes]) -> Iterator[bytes]:
        yield from chunks[:count]
        gate.wait(PATIENCE)
        yield from chunks[count:]

    return events(hold)


def test_a_draft_is_on_disk_while_the_request_is_open_and_goes_when_the_image_is_there(
    start_process: Start, api: ImagesAPI
) -> None:
    gate = threading.Event()
    api.script(held_after(1, gate))
    process = start_process(*live.generate("--partial-images", 2))
    assert process.stderr is not None
    assert process.stderr.readline() == "draft 1: fox.partial-1.png\n"
    assert (made(), process.poll(), gate.is_set()) == (drafts(1), None, False)
    assert live.size_of("fox.partial-1.png") == (64, 64)
    gate.set()
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, "Wrote fox.png\n"), stderr
    assert stderr.startswith("draft 2: fox.partial-2.png\n")
    assert made() == ["fox.png"]
    body = api.requests[0].body
    assert (body["stream"], body["partial_images"]) == (True, 2)


@pytest.mark.parametrize(
    "command", [["generate"], ["edit", "--image", "room.png"]], ids=["generate", "edit"]
)
@pytest.mark.parametrize(("out", "count"), [("fox.png", 3), ("fox.jpg", 1), ("fox.webp", 2)])
def test_drafts_are_kept_on_demand(
    run: Run, api: ImagesAPI, command: list[str], out: str, count: int
) -> None:
    flags = ("--partial-images", str(count), "--keep-partials", "--json", *DOWNSCALED)
    result = run(*command, "--prompt", "a fox", "--out", out, *flags)
    assert result.exit_code == 0
    suffix = Path(out).suffix
    expected = drafts(*range(1, count + 1), suffix=suffix)
    assert result.json["partials"] == expected
    assert made() == sorted([out, f"fox-web{suffix}", *expected])
    assert {live.size_of(name) for name in (out, *expected)} == {(64, 64)}
    assert len({Path(name).read_bytes() for name in (out, *expected)}) == count + 1
    (request,) = api.requests
    assert (request.body["stream"], request.body["partial_images"]) == (True, count)


def test_the_record_of_a_stream_is_that_of_any_answer(run: Run, api: ImagesAPI) -> None:
    flags = ("--safety-identifier", "4b1d", "--quality", "high", "--json")
    plain = run(*live.generate(*flags, out="a.png")).json
    streamed = run(*live.generate(*flags, "--partial-images", 1, out="b.png")).json
    own = {"outputs", "seconds", "request_id", "usage"}
    assert {key: streamed[key] for key in streamed if key not in own} == {
        key: plain[key] for key in plain if key not in own
    }
    assert (streamed["partials"], streamed["attempts"]) == ([], 1)
    assert streamed["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
    assert streamed["request_id"] == api.requests[1].request_id
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert [request.body["safety_identifier"] for request in api.requests] == ["4b1d"] * 2


def broken(result: Result, kind: str, partials: list[str]) -> Json:
    """The error of a job whose stream broke after these drafts; they are kept and named."""
    said = live.error(result)
    assert all(name in said for name in partials)
    record = result.json
    assert (record["status"], record["outputs"], record["attempts"]) == ("failed", [], 1)
    assert record["partials"] == partials
    assert (record["error"]["kind"], record["error"]["message"]) == (kind, said)
    assert record["error"]["maybe_billed"] is True
    assert record["warnings"] == []
    assert made() == partials
    failure: Json = record["error"]
    return failure


DRAFTED = ("--partial-images", "2", "--json")


@pytest.mark.parametrize(
    ("cut", "count"),
    [
        pytest.param(stream_cut(1), 1, id="connection closed"),
        pytest.param(stream_cut(2), 2, id="connection closed after two"),
        pytest.param(events(lambda chunks: chunks[:1]), 1, id="stream ended"),
        pytest.param(events(lambda chunks: [chunks[0], b"data: [DONE]\n\n"]), 1, id="DONE"),
    ],
)
def test_a_stream_that_breaks_after_a_draft_keeps_it_and_is_not_sent_again(
    run: Run, api: ImagesAPI, cut: Reply, count: int
) -> None:
    api.script(cut)
    failure = broken(run(*live.generate(*DRAFTED)), "connection", drafts(*range(1, count + 1)))
    assert failure["retryable"] is True
    assert len(api.requests) == 1
    again = run(*live.generate(*DRAFTED, "--skip-existing"))
    assert (again.exit_code, made()) == (0, ["fox.png"])


def test_a_stream_that_breaks_before_any_draft_is_sent_again(run: Run, api: ImagesAPI) -> None:
    api.script(stream_cut(0), answer_cut(0))
    assert run(*live.generate(*DRAFTED)).json["attempts"] == 3
    assert len(api.requests) == 3
    assert made() == ["fox.png"]


def test_a_stream_that_stalls_after_a_draft_keeps_it(run: Run, api: ImagesAPI) -> None:
    api.script(changed(lambda answer: replace(answer, pause=60)))
    broken(run(*live.generate(*DRAFTED, "--timeout", "0.3")), "timeout", drafts(1))
    assert len(api.requests) == 1


SERVER = {"type": "server_error", "code": None, "message": "The server had an error."}
MODERATION = {
    "type": "image_generation_user_error",
    "code": "moderation_blocked",
    "message": "Rejected by the safety system.",
}
SLOW_DOWN = {"type": "requests", "code": "rate_limit_exceeded", "message": "Slow down."}
# An event, how it is judged (kind and code), and whether another request may help.
ERRORS: dict[str, tuple[Json, tuple[str, str | None], bool]] = {
    "server": ({"type": "error", "error": SERVER}, ("server", None), True),
    "refused": (
        {"type": "error", "error": MODERATION},
        ("moderation", "moderation_blocked"),
        False,
    ),
    "rate": ({"type": "error", "error": SLOW_DOWN}, ("rate_limit", "rate_limit_exceeded"), True),
    "flat": (SERVER | {"type": "error", "code": "server_error"}, ("server", "server_error"), True),
}
each_error = pytest.mark.parametrize(
    ("said", "judged", "retryable"), ERRORS.values(), ids=ERRORS.keys()
)


@each_error
def test_an_error_event_after_a_draft_fails_the_job_and_keeps_the_draft(
    run: Run, api: ImagesAPI, said: Json, judged: tuple[str, str | None], *, retryable: bool
) -> None:
    api.script(events(lambda chunks: [chunks[0], event(said), *chunks[1:]]))
    kind, code = judged
    failure = broken(run(*live.generate(*DRAFTED)), kind, drafts(1))
    assert (failure["code"], failure["retryable"]) == (code, retryable)
    assert said.get("error", said)["message"] in failure["message"]
    assert "HTTP" not in failure["message"]
    assert len(api.requests) == 1


@each_error
def test_an_error_event_before_any_draft_is_judged_as_an_answer_is(
    run: Run, api: ImagesAPI, said: Json, judged: tuple[str, str | None], *, retryable: bool
) -> None:
    api.script(events(lambda _: [event(said)]))
    record = run(*live.generate(*DRAFTED)).json
    if retryable:
        assert (record["error"], made(), len(api.requests)) == (None, ["fox.png"], 2)
    else:
        assert (record["error"]["kind"], record["error"]["code"]) == judged
        assert (made(), len(api.requests)) == ([], 1)


NO_IMAGE = base64.b64encode(b"no image").decode()


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(
            lambda draft: [event(draft, partial_image_index=i) for i in (-9, 99, "x", "", None)],
            id="indices",
        ),
        pytest.param(
            lambda draft: [event(draft, b64_json=text) for text in ("", "%%%", NO_IMAGE, None, 5)],
            id="images",
        ),
        pytest.param(
            lambda draft: [
                event(draft, type=""),
                event(draft, type=5),
                event({"type": "image_generation.thinking"}),
                event({}),
                b": still there\n\n",
            ],
            id="events",
        ),
    ],
)
def test_drafts_that_are_damaged_do_not_cost_the_image(
    run: Run, api: ImagesAPI, damaged: Callable[[bytes], list[bytes]]
) -> None:
    api.script(events(lambda chunks: [*damaged(chunks[0]), *chunks[1:]]))
    result = run(*live.generate(*DRAFTED))
    assert "Traceback" not in result.stderr
    assert result.exit_code == 0, result.stderr
    assert result.json["partials"] == []
    assert made() == ["fox.png"]
    assert len(api.requests) == 1


def test_drafts_are_numbered_as_they_are_saved(run: Run, api: ImagesAPI) -> None:
    api.script(events(lambda chunks: [event(chunks[0], b64_json="%%%"), *chunks]))
    result = run(*live.generate(*DRAFTED, "--keep-partials"))
    assert result.json["partials"] == drafts(1, 2)
    notes = [line for line in result.stderr.splitlines() if line.startswith("draft ")]
    assert notes == ["draft 1: fox.partial-1.png", "draft 2: fox.partial-2.png"]


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda last: event(last, b64_json=""), id="no image"),
        pytest.param(lambda last: event(last, b64_json="%%%"), id="no base64"),
        pytest.param(lambda last: event(last, b64_json=NO_IMAGE), id="other bytes"),
        pytest.param(lambda _: b"data: {nope\n\n", id="no JSON"),
        pytest.param(lambda _: b"data: [1]\n\n", id="no object"),
    ],
)
def test_an_end_that_is_damaged_fails_the_job_and_keeps_the_drafts(
    run: Run, api: ImagesAPI, end: Callable[[bytes], bytes]
) -> None:
    api.script(events(lambda chunks: [*chunks[:-1], end(chunks[-1])]))
    result = run(*live.generate(*DRAFTED))
    assert live.error(result)
    record = result.json
    assert (record["status"], record["attempts"], record["partials"]) == (
        "failed",
        1,
        drafts(1, 2),
    )
    assert record["error"]["kind"] in ("bad_answer", "connection")
    assert record["error"]["maybe_billed"] is True
    assert [name for name in made() if not name.endswith(".damaged")] == drafts(1, 2)
    assert len(api.requests) == 1


def test_an_answer_that_is_no_stream_is_taken_as_the_image_it_is(run: Run, api: ImagesAPI) -> None:
    def plain(answer: Answer) -> Answer:
        (*_, last) = answer.chunks
        encoded_image = json.loads(last.split(b"data: ")[1])["b64_json"]
        return told({"created": 1, "data": [{"b64_json": encoded_image}]})

    api.script(changed(plain))
    assert run(*live.generate(*DRAFTED)).json["attempts"] == 1
    assert made() == ["fox.png"]
    assert len(api.requests) == 1


def test_drafts_of_a_batch_are_asked_for_job_by_job(run: Run, api: ImagesAPI) -> None:
    api.script_for("broken", stream_cut(1))
    jobs: list[Job] = [
        {"prompt": "broken", "partial_images": 3, "out": "a.png"},
        {"prompt": "whole", "partial_images": 2, "out": "b.webp"},
        {"prompt": "edited", "partial_images": 1, "out": "c.jpg", "image": "room.png"},
        {"prompt": "plain", "out": "d.png"},
    ]
    result = run(*live.batch(jobs, "--keep-partials", "--json"))
    assert live.outcomes(result) == ["failed", "done", "done", "done"]
    partials = [
        line["partials"] for line in sorted(result.json_lines, key=lambda line: line["job"])
    ]
    assert partials == [
        [f"out/{name}" for name in of_one]
        for of_one in (
            drafts(1, stem="a"),
            drafts(1, 2, stem="b", suffix=".webp"),
            drafts(1, stem="c", suffix=".jpg"),
            [],
        )
    ]
    written = [line["outputs"][0]["path"] for line in result.json_lines if line["outputs"]]
    assert sorted(itertools.chain(written, *partials)) == [f"out/{name}" for name in live.names()]
    (said,) = live.lines(result)
    assert said.startswith("line 1: ")
    assert "out/a.partial-1.png" in said
    assert len(api.requests) == len(jobs)


def test_the_flag_is_for_all_jobs_and_a_job_has_its_own(run: Run) -> None:
    result = dry.batch(run, "a", {"prompt": "b", "partial_images": 3}, flags=DRAFTED[:2])
    shown = [(one["partial_images"], one["stream"]) for one in dry.documents(result)]
    assert shown == [(2, True), (3, True)]


def test_to_keep_drafts_that_nobody_asked_for_is_told_once(run: Run) -> None:
    jobs: list[Job] = [{"prompt": "a"}, {"prompt": "b"}]
    said = ["--keep-partials means nothing without --partial-images"]
    assert dry.warnings(dry.generate(run, "--keep-partials")) == said
    assert len(dry.warnings(dry.batch(run, *jobs, flags=("--keep-partials",)))) == 1
    drafted: Job = {"prompt": "c", "partial_images": 1}
    assert dry.warnings(dry.batch(run, *jobs, drafted, flags=("--keep-partials",))) == []


def test_a_draft_that_would_replace_a_file_is_refused_without_force(
    run: Run, api: ImagesAPI
) -> None:
    mine = Path(drafts(2)[0])
    mine.write_text("mine")
    refused = run(*live.generate(*DRAFTED))
    assert (refused.exit_code, refused.stdout, api.requests) == (2, "", [])
    (said,) = dry.messages(refused, "Error: ")
    assert said.startswith(f"{mine} exists")
    assert mine.read_text() == "mine"
    assert run(*live.generate(*DRAFTED, "--force")).exit_code == 0
    assert made() == ["fox.png"]


def test_a_file_that_appears_under_the_name_of_a_draft_is_kept(run: Run, api: ImagesAPI) -> None:
    mine = Path(drafts(1)[0])
    result = live.run_held(run, api, live.generate(*DRAFTED), act=lambda: mine.write_text("mine"))
    assert result.exit_code == 0
    assert mine.read_text() == "mine"
    assert made() == sorted(["fox.png", mine.name])


def test_two_jobs_cannot_make_one_draft(run: Run) -> None:
    drafted = {"prompt": "a", "partial_images": 1, "out": "a.png"}
    said = dry.problem(dry.batch(run, drafted, {"prompt": "b", "out": "a.partial-1"}))
    assert "out/a.partial-1.png would be written twice" in said
