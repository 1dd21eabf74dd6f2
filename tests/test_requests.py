"""Requests: the prompt that is sent, prompt files, and the lines of a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dry
import pytest
from image_gen import MAX_JOBS, MAX_PROMPT_CHARACTERS, PROMPT_FIELDS, compose_prompt
from inputs import Job, flag, picture

if TYPE_CHECKING:
    from cli import Run

LABELS = [
    ("use_case", "Use case: {}"),
    ("scene", "Scene/background: {}"),
    ("subject", "Subject: {}"),
    ("style", "Style/medium: {}"),
    ("composition", "Composition/framing: {}"),
    ("lighting", "Lighting/mood: {}"),
    ("palette", "Color palette: {}"),
    ("materials", "Materials/textures: {}"),
    ("text", 'Text (verbatim): "{}"'),
    ("constraints", "Constraints: {}"),
    ("negative", "Avoid: {}"),
]


# The prompt.


def test_all_fields_stand_in_the_prompt_in_the_documented_order() -> None:
    fields = {key: f"<{key}>" for key, _ in reversed(LABELS)}
    assert compose_prompt("a fox", fields, augment=True).splitlines() == [
        "Use case: <use_case>",
        "Primary request: a fox",
        "Scene/background: <scene>",
        "Subject: <subject>",
        "Style/medium: <style>",
        "Composition/framing: <composition>",
        "Lighting/mood: <lighting>",
        "Color palette: <palette>",
        "Materials/textures: <materials>",
        'Text (verbatim): "<text>"',
        "Constraints: <constraints>",
        "Avoid: <negative>",
    ]


def test_every_field_has_its_label_in_these_tests() -> None:
    assert {key for key, _ in LABELS} == set(PROMPT_FIELDS)


@pytest.mark.parametrize(("key", "label"), LABELS)
def test_a_field_adds_its_line_from_the_flag_and_from_the_job(
    run: Run, key: str, label: str
) -> None:
    line = label.format("grey dusk")
    for prompt in (
        dry.document(dry.generate(run, flag(key), "grey dusk"))["prompt"],
        dry.document(dry.batch(run, {"prompt": "a fox", key: "grey dusk"}))["prompt"],
        dry.document(dry.batch(run, {"prompt": "a fox", "fields": {key: "grey dusk"}}))["prompt"],
        dry.document(dry.batch(run, "a fox", flags=(flag(key), "grey dusk")))["prompt"],
    ):
        assert sorted(prompt.splitlines()) == sorted(["Primary request: a fox", line])


@pytest.mark.parametrize(
    ("prompt", "flags", "sent"),
    [
        pytest.param("a fox", [], "Primary request: a fox", id="the prompt alone"),
        pytest.param(" \t a fox \n", [], "Primary request: a fox", id="stripped"),
        pytest.param("a\n fox", [], "Primary request: a\n fox", id="white space inside is kept"),
        pytest.param("a fox", ["--no-augment", "--scene", "x"], "a fox", id="no augmentation"),
        pytest.param(" a fox ", ["--no-augment"], "a fox", id="no augmentation, stripped"),
        pytest.param("a fox", ["--scene", " "], "Primary request: a fox", id="blank field"),
        pytest.param("a fox", ["--scene", ""], "Primary request: a fox", id="empty field"),
        pytest.param(
            "a fox",
            ["--scene", " fog "],
            "Primary request: a fox\nScene/background: fog",
            id="field stripped",
        ),
        pytest.param(
            "a fox",
            ["--text", 'say "hi"'],
            'Primary request: a fox\nText (verbatim): "say "hi""',
            id="quotes are kept as they are",
        ),
        pytest.param("{} %s {0}", [], "Primary request: {} %s {0}", id="braces mean nothing"),
        pytest.param(
            "a",
            ["--text", "{prompt}"],
            'Primary request: a\nText (verbatim): "{prompt}"',
            id="braces, 2",
        ),
    ],
)
def test_the_prompt_that_is_sent(run: Run, prompt: str, flags: list[str], sent: str) -> None:
    assert dry.document(dry.generate(run, *flags, prompt=prompt))["prompt"] == sent


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u00a0"])
def test_a_prompt_of_blanks_is_refused_wherever_it_comes_from(run: Run, blank: str) -> None:
    Path("blank.txt").write_text(blank)
    for result in (
        dry.generate(run, prompt=blank),
        run("generate", "--prompt-file", "blank.txt", "--dry-run"),
        dry.batch(run, {"prompt": blank, "scene": "fog"}),
    ):
        said = dry.problem(result)
        assert "prompt" in said
        assert "empty" in said


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_the_length_of_the_prompt_is_limited_as_it_is_sent(run: Run, command: str) -> None:
    label = len("Primary request: ")
    for length, fits in ((MAX_PROMPT_CHARACTERS - label, True), (MAX_PROMPT_CHARACTERS, False)):
        prompt = "é" * length
        result = (
            dry.generate(run, prompt=prompt) if command == "generate" else dry.batch(run, prompt)
        )
        if fits:
            assert len(dry.document(result)["prompt"]) == MAX_PROMPT_CHARACTERS
        else:
            assert "32,017 characters" in dry.problem(result)
            assert "32,000" in dry.problem(result)


# Prompt files.


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        pytest.param("a fox\n", "a fox", id="plain"),
        pytest.param("\ufeffa fox", "a fox", id="byte order mark"),
        pytest.param("a\r\nfox\r\n", "a\nfox", id="CRLF"),
        pytest.param("a\u2028fox", "a\u2028fox", id="line separator"),
        pytest.param('{"prompt": "x"}', '{"prompt": "x"}', id="JSON is no more than text here"),
    ],
)
@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_a_prompt_file_is_read_as_utf8(run: Run, name: str, content: str, prompt: str) -> None:
    Path("prompt.txt").write_bytes(content.encode())
    argv = ("generate", "--prompt-file", name, "--no-augment", "--dry-run")
    assert dry.document(run(*argv, stdin=content.encode()))["prompt"] == prompt


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        pytest.param("missing.txt", None, "No such file", id="missing"),
        pytest.param(".", None, "Is a directory", id="folder"),
        pytest.param("x" * 300, None, "File name too long", id="300 bytes"),
        pytest.param("bad.txt", b"caf\xe9", "not UTF-8", id="latin-1"),
        pytest.param("bad.txt", b"a\0b", "NUL", id="NUL"),
        pytest.param("bad.txt", "fox".encode("utf-16"), "not UTF-8", id="UTF-16"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_named(
    run: Run, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    said = dry.problem(run("generate", "--prompt-file", name, "--dry-run"))
    assert f"--prompt-file {name}" in said
    assert says in said


@pytest.mark.parametrize("prompt", ["a fox", ""])
def test_a_prompt_and_a_prompt_file_are_one_too_many(run: Run, prompt: str) -> None:
    said = dry.problem(dry.generate(run, "--prompt-file", "-", prompt=prompt))
    assert "--prompt and --prompt-file are both given" in said


# The lines of a JSONL file.


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        pytest.param('{"prompt": "a fox"}', "a fox", id="object"),
        pytest.param('  {"prompt": " a fox "}  ', "a fox", id="blanks around"),
        pytest.param('"a \\"red\\" fox"', 'a "red" fox', id="JSON string"),
        pytest.param("a fox", "a fox", id="plain text"),
        pytest.param('a "red" fox', 'a "red" fox', id="plain text with quotes"),
        pytest.param('"Red" said the fox', '"Red" said the fox', id="text that begins with quotes"),
        pytest.param("a fox # red", "a fox # red", id="a comment only begins a line"),
        pytest.param("3 foxes", "3 foxes", id="text that begins with a number"),
        pytest.param("[wide] a fox", "[wide] a fox", id="text that begins with a bracket"),
        pytest.param("a\u2028fox\u0085\x0b\x0c", "a\u2028fox", id="no line ends but LF and CRLF"),
        pytest.param("a\rfox", "a\rfox", id="a lone CR does not end a line"),
    ],
)
def test_a_line_is_one_job(run: Run, line: str, prompt: str) -> None:
    shown = dry.document(dry.batch(run, line, flags=("--no-augment",)))
    assert shown["prompt"] == prompt
    assert shown["job"] == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("a\nb\n", id="LF"),
        pytest.param("a\r\nb\r\n", id="CRLF"),
        pytest.param("a\nb", id="no line end at the end"),
        pytest.param("\ufeffa\nb\n", id="byte order mark"),
        pytest.param("\ufeff# c\na\nb\n", id="byte order mark before a comment"),
        pytest.param("\n \t \r\na\n\n\nb\n\n", id="blank lines"),
        pytest.param("# c\na\n  # {\n#\nb\n#", id="comments"),
    ],
)
def test_jobs_are_counted_and_lines_without_a_job_are_not(run: Run, content: str) -> None:
    shown = dry.documents(dry.batch(run, content, flags=("--no-augment",)))
    assert [(each["job"], each["prompt"]) for each in shown] == [(1, "a"), (2, "b")]
    assert [each["outputs"] for each in shown] == [["out/001-a.png"], ["out/002-b.png"]]


def test_messages_count_lines_and_not_jobs(run: Run) -> None:
    assert dry.problem(dry.batch(run, "# first", "", "a fox", '{"prompt": 3}')).startswith(
        "line 4: "
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param("42", "not 42", id="number"),
        pytest.param("null", "not null", id="null"),
        pytest.param("true", "not true", id="truth value"),
        pytest.param('["a fox"]', 'not ["a fox"]', id="array"),
        pytest.param('{"prompt": "a"', "is not valid JSON", id="broken object"),
        pytest.param('{"prompt": "a"} x', "is not valid JSON", id="text behind an object"),
        pytest.param("{'prompt': 'a'}", "is not valid JSON", id="Python instead of JSON"),
        pytest.param("{}", "prompt is missing", id="no prompt"),
        pytest.param('{"prompt": null}', "prompt is missing", id="null prompt"),
        pytest.param('""', "empty", id="empty string"),
    ],
)
def test_a_line_that_is_no_job_is_named(run: Run, line: str, says: str) -> None:
    said = dry.problem(dry.batch(run, "a fox", line))
    assert said.startswith("line 2: ")
    assert says in said


@pytest.mark.parametrize("content", [b"", b"\n", b"# only a comment\n", b"\xef\xbb\xbf"])
def test_a_file_without_a_job_is_refused(run: Run, content: bytes) -> None:
    assert "--input jobs.jsonl holds no job" in dry.problem(dry.batch(run, content))


def test_a_batch_has_at_most_so_many_jobs(run: Run) -> None:
    assert len(dry.documents(dry.batch(run, *["a fox"] * MAX_JOBS))) == MAX_JOBS == 500
    assert "501" in dry.problem(dry.batch(run, *["a fox"] * (MAX_JOBS + 1)))


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "x" * 300])
def test_an_input_that_cannot_be_read_is_named(run: Run, name: str) -> None:
    result = run("generate-batch", "--input", name, "--out-dir", "out", "--dry-run")
    assert f"--input {name} cannot be read" in dry.problem(result)


# Jobs over flags.

VALUES: dict[str, tuple[Any, Any]] = {
    "model": ("gpt-image-2.5-flare", "gpt-image-2-2026-04-21"),
    "n": (2, 3),
    "size": ("1024x1024", "1536x1024"),
    "quality": ("low", "high"),
    "background": ("opaque", "auto"),
    "output_format": ("webp", "jpeg"),
    "output_compression": (70, 80),
    "moderation": ("auto", "low"),
}
# What lets a value stand alone.
COMPANIONS = {"output_compression": {"output_format": "webp"}}


@pytest.mark.parametrize("key", VALUES)
def test_a_job_overlays_the_flags_and_null_means_not_given(run: Run, key: str) -> None:
    by_flag, by_job = VALUES[key]
    base = {"prompt": "a fox", **COMPANIONS.get(key, {})}
    jobs = [base | {key: by_job}, base, base | {key: None}]
    shown = dry.documents(dry.batch(run, *jobs, flags=(flag(key), str(by_flag))))
    assert [each[key] for each in shown] == [by_job, by_flag, by_flag]


@pytest.mark.parametrize(
    ("job", "line"),
    [
        pytest.param({}, "Scene/background: shared", id="the flag"),
        pytest.param({"scene": "flat"}, "Scene/background: flat", id="flat over the flag"),
        pytest.param({"fields": {"scene": "deep"}}, "Scene/background: deep", id="fields"),
        pytest.param(
            {"scene": "flat", "fields": {"scene": "deep"}}, "Scene/background: flat", id="flat wins"
        ),
        pytest.param(
            {"fields": {"scene": "deep"}, "scene": None}, "Scene/background: deep", id="null flat"
        ),
        pytest.param({"scene": None}, "Scene/background: shared", id="null keeps the flag"),
        pytest.param({"fields": None}, "Scene/background: shared", id="null fields"),
        pytest.param({"scene": ""}, None, id="an empty one clears the flag"),
        pytest.param({"fields": {"scene": " "}}, None, id="blanks clear the flag"),
    ],
)
def test_prompt_fields_of_a_job(run: Run, job: dict[str, Any], line: str | None) -> None:
    shown = dry.document(dry.batch(run, {"prompt": "a fox", **job}, flags=("--scene", "shared")))
    assert shown["prompt"].splitlines() == ["Primary request: a fox", *([line] if line else [])]


@pytest.mark.parametrize(
    ("given", "sent"),
    [("png", "png"), ("PNG", "png"), ("jpg", "jpeg"), ("JPG", "jpeg"), ("Jpeg", "jpeg")],
)
def test_formats_are_taken_in_any_case_and_jpg_means_jpeg(run: Run, given: str, sent: str) -> None:
    assert dry.document(dry.generate(run, "--output-format", given))["output_format"] == sent
    job = {"prompt": "a fox", "output_format": given}
    assert dry.document(dry.batch(run, job))["output_format"] == sent


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", "1024X1024"), ("quality", "High"), ("model", "GPT-IMAGE-2"), ("moderation", "LOW")],
)
def test_all_but_formats_are_case_sensitive(run: Run, key: str, value: str) -> None:
    by_flag = dry.problem(dry.generate(run, flag(key), value))
    assert value in by_flag
    assert dry.problem(dry.batch(run, {"prompt": "a fox", key: value})) == f"line 1: {by_flag}"


@pytest.mark.parametrize(("given", "sent"), [(3, 3), ("3", 3), (3.0, 3)])
def test_a_whole_number_of_a_job_may_be_written_in_any_way(
    run: Run, given: object, sent: int
) -> None:
    shown = dry.document(dry.batch(run, {"prompt": "a fox", "n": given}))
    assert shown["n"] == sent
    assert type(shown["n"]) is int
    assert len(shown["outputs"]) == sent


@pytest.mark.parametrize(
    ("job", "says"),
    [
        pytest.param({"qualty": "low"}, 'did you mean "quality"?', id="typing error"),
        pytest.param({"Size": "auto"}, 'did you mean "size"?', id="case"),
        pytest.param({"use-case": "x"}, 'did you mean "use_case"?', id="flag's form"),
        pytest.param({"outptu_format": "png"}, 'did you mean "output_format"?', id="swapped"),
        pytest.param({"fields": {"stile": "x"}}, 'did you mean "style"?', id="in fields"),
        pytest.param({"fields": {"size": "auto"}}, "known are composition, ", id="no prompt field"),
        pytest.param({"zzzz": 1}, "known are background, ", id="nothing like it"),
        pytest.param({"qualty": None}, 'did you mean "quality"?', id="null"),
        pytest.param({"dry_run": True}, "known are background, ", id="an option of the run"),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(
    run: Run, job: dict[str, Any], says: str
) -> None:
    said = dry.problem(dry.batch(run, {"prompt": "a fox", **job}))
    wrong = next(iter(job.get("fields", job)))
    assert said.startswith(f'line 1: unknown key "{wrong}"')
    assert says in said


def test_every_problem_of_every_line_is_told_at_once(run: Run) -> None:
    jobs: list[Job] = [
        {"prompt": "a fox", "qualty": "low", "n": "two", "size": "17x17"},
        "a fox",
        "[1]",
        {"prompt": "a fox", "quality": "best", "background": "pink"},
    ]
    told = "\n".join(dry.problems(dry.batch(run, *jobs)))
    for line, key in ((1, "qualty"), (1, '"n"'), (1, "size 17x17"), (3, "[1]"), (4, "quality")):
        assert any(
            said.startswith(f"line {line}: ") and key in said for said in told.splitlines()
        ), f"line {line}: {key}\n{told}"
    assert "line 4: background" in told
    assert "line 2" not in told


def test_one_problem_of_many_jobs_is_told_once(run: Run) -> None:
    said = dry.problem(dry.batch(run, "a", "b", "c", flags=("--size", "big")))
    assert said.startswith('line 1: size "big"')
    assert said.endswith("(also lines 2, 3)")


# Edits.


def test_a_job_with_an_image_is_an_edit_and_the_order_of_the_images_is_kept(run: Run) -> None:
    names = [picture(name) for name in ("b.png", "a.jpg", "c.webp")]
    mask = picture("mask.png", "RGBA")
    by_job = dry.document(dry.batch(run, {"prompt": "a fox", "image": names, "mask": mask}))
    by_flags = dry.document(
        dry.edit(run, "--image", "a.jpg", "--image", "c.webp", "--mask", mask, image="b.png")
    )
    for shown in (by_job, by_flags):
        assert shown["endpoint"] == "/v1/images/edits"
        assert shown["image"] == names
        assert shown["mask"] == mask


def test_an_image_of_a_job_is_a_path_or_a_list_relative_to_the_current_directory(run: Run) -> None:
    picture("in/room.png")
    jobs = [{"prompt": p, "image": i} for p, i in (("a", "in/room.png"), ("b", ["in/room.png"]))]
    shown = dry.documents(dry.batch(run, *jobs, "no edit"))
    assert [each.get("image") for each in shown] == [["in/room.png"], ["in/room.png"], None]
    assert shown[2]["endpoint"] == "/v1/images/generations"


def test_an_empty_list_of_images_is_no_generation(run: Run) -> None:
    said = dry.problem(dry.batch(run, {"prompt": "a fox", "image": []}))
    assert said.startswith("line 1: ")
    assert "image" in said
