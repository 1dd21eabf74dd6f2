"""Input that nobody should write: each is refused with a line and a key, or works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dry
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_gen import JOB_OPTIONS, PROMPT_FIELDS, as_whole_number
from inputs import Json, flag, job_file, picture

if TYPE_CHECKING:
    from cli import Result, Run
    from images_api import ImagesAPI

MILLION = 1_000_000
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        pytest.param(BOM + b'{"prompt": "a fox"}', "a fox", id="byte order mark"),
        pytest.param(b'{"prompt": "a fox"}\r', "a fox", id="CRLF"),
        pytest.param('{"prompt": "a\u2028fox"}'.encode(), "a\u2028fox", id="U+2028 in a string"),
        pytest.param('{"prompt": "a\x85fox"}'.encode(), "a\x85fox", id="U+0085 in a string"),
        pytest.param(b'{"prompt": "a\\nfox"}', "a\nfox", id="line end in a string"),
        pytest.param(b'{"prompt": "\\ud83e\\udd8a"}', "🦊", id="a whole surrogate pair"),
        pytest.param(b'{"prompt": "a\\u0001fox"}', "a\x01fox", id="control character"),
        pytest.param(b'{"prompt": "a", "fields": {}}', "a", id="no fields"),
        pytest.param(b" " * 10 * MILLION + b"a fox", "a fox", id="10 MB of blanks"),
    ],
)
def test_odd_lines_that_work(run: Run, line: bytes, prompt: str) -> None:
    assert dry.document(dry.batch(run, line, flags=("--no-augment",)))["prompt"] == prompt


LONG = "x" * 10 * MILLION


@pytest.mark.parametrize(
    ("line", "says"),
    [
        pytest.param(b'{"prompt": "caf\xe9"}', "not UTF-8", id="invalid UTF-8"),
        pytest.param(b"\xed\xa0\x80", "not UTF-8", id="surrogate in UTF-8"),
        pytest.param("a fox".encode("utf-16"), "not UTF-8", id="UTF-16"),
        pytest.param(f'{{"prompt": "{LONG}"}}', "prompt", id="prompt of 10 MB"),
        pytest.param(LONG, "prompt", id="plain text of 10 MB"),
        pytest.param(f'{{"prompt": "a", "size": "{LONG[:MILLION]}"}}', "size", id="size of 1 MB"),
        pytest.param(f'{{"prompt": "a", "out": "{LONG[:MILLION]}"}}', "name", id="name of 1 MB"),
        pytest.param(f'{{"prompt": "a", "{LONG}": 1}}', "unknown key", id="key of 10 MB"),
        pytest.param("[" * 200_000, "nested too deeply", id="open arrays"),
        pytest.param('{"a":' * 200_000, "nested too deeply", id="open objects"),
        pytest.param(
            '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}",
            "nested too deeply",
            id="deep value",
        ),
        pytest.param('{"prompt": "a", "prompt": "b"}', '"prompt" is given twice', id="duplicate"),
        pytest.param(
            '{"prompt": "a", "fields": {"text": "a", "text": "b"}}',
            '"text" is given twice',
            id="duplicate in fields",
        ),
        pytest.param('{"prompt": "a", "n": NaN}', "NaN", id="NaN"),
        pytest.param('{"prompt": "a", "n": -Infinity}', "Infinity", id="infinity"),
        pytest.param('{"prompt": "a", "n": 1e999}', '"n"', id="number that overflows"),
        pytest.param('{"prompt": "a", "n": 1e300}', '"n"', id="huge number"),
        pytest.param('{"prompt": "a", "n": ' + "9" * 9999 + "}", '"n"', id="10,000 digits"),
        pytest.param("9" * 9999 + "x" * 30_000, "prompt", id="text of digits"),
        pytest.param('{"prompt": "a\\u0000b"}', '"prompt" must not contain a NUL', id="NUL"),
        pytest.param('{"prompt": "\\ud800"}', '"prompt" is not valid text', id="lone surrogate"),
        pytest.param(
            '{"prompt": "a", "scene": "\\udfff"}', '"scene" is not valid text', id="in a field"
        ),
        pytest.param('{"prompt": "a", "out": "\\udc80"}', '"out" is not valid', id="in a name"),
        pytest.param('{"prompt": "a", "out": "a\\u0000"}', '"out" must not', id="NUL in a name"),
        pytest.param('{"prompt": "a", "image": "\\u0000"}', '"image" must not', id="NUL in a path"),
        pytest.param('{"prompt": "a", "\\ud800": 1}', "unknown key", id="surrogate as a key"),
        pytest.param('{"prompt": "a", "": 1}', 'unknown key ""', id="empty key"),
        pytest.param('{"prompt": "a", "image": "a\\nb"}', "image", id="line end in a path"),
        pytest.param('{"prompt": "a", "image": "\\u001b[2J"}', "image", id="escape in a path"),
        pytest.param('{"prompt": "a", "model": "\\u009b2J"}', "model", id="C1 control character"),
    ],
)
def test_hostile_lines_are_refused_with_their_number_in_one_short_line(
    run: Run, line: bytes | str, says: str
) -> None:
    said = dry.problem(dry.batch(run, "# one", "a fox", line))
    assert said.startswith("line 3: ")
    assert says in said
    assert said.isprintable()
    assert len(said) < 1000


VALUE_KEYS = {key for key, option in JOB_OPTIONS.items() if option.convert}  # no switches
STRING_KEYS = sorted({*VALUE_KEYS, *PROMPT_FIELDS, "prompt", "out"})
NUMBER_KEYS = [key for key, option in JOB_OPTIONS.items() if option.convert is as_whole_number]
WRONG_TYPES: list[object] = [True, False, 2.5, {}, {"a": 1}, [[]], [{"b": 2}], [None], [8]]


@pytest.mark.parametrize("key", [*STRING_KEYS, "fields"])
def test_a_value_of_the_wrong_type_is_refused_for_every_key(
    run: Run, api: ImagesAPI, key: str
) -> None:
    wrong = [value for value in WRONG_TYPES if not (key == "fields" and isinstance(value, dict))]
    wrong += ["two", "", "2.5"] if key in NUMBER_KEYS else [0, 7, 10**30]
    jobs = job_file(*({"prompt": "a fox", key: value} for value in wrong))
    told = dry.problems(run("generate-batch", "--input", jobs, "--out-dir", "out"))
    for number, value in enumerate(wrong, start=1):
        about = [said for said in told if said.startswith(f"line {number}: ")]
        assert about, f"nothing on {value!r}"
        assert all(f'"{key}"' in said for said in about)
    assert api.requests == []


@pytest.mark.parametrize(
    "name", ["CON", "nul.png", "aux.jpg", "LPT1", "a:b", "a\\b", "x?.png", "é"]
)
def test_names_that_are_odd_elsewhere_work_or_are_refused_by_name(run: Run, name: str) -> None:
    result = dry.batch(run, {"prompt": "a fox", "out": name})
    if result.exit_code:
        assert dry.problem(result).startswith("line 1: ")
    else:
        assert dry.document(result)["outputs"][0].startswith(f"out/{name}")


@pytest.mark.parametrize(
    "name", ["雪　山.png", "Schloß\u00a0.png", "\N{WOMAN}\u200d\N{FIRE ENGINE}.png"]
)
def test_names_of_any_script_are_taken(run: Run, name: str) -> None:
    assert dry.document(dry.generate(run, "--out", name))["outputs"] == [name]


@pytest.mark.parametrize("name", ["a\u2028b.png", "a\u202egnp.exe", "a\x9bb.png"])
def test_names_that_would_break_or_turn_a_line_are_refused(run: Run, name: str) -> None:
    assert "must not hold control characters" in dry.problem(dry.generate(run, "--out", name))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("generate-batch", "--out-dir", "out", "--input"), "looks like no text"),
        (("generate", "--prompt-file"), "is no prompt, it is too long"),
    ],
)
def test_a_file_without_end_is_no_prompt_and_no_jobs(
    run: Run, flags: tuple[str, ...], said: str
) -> None:
    assert said in dry.problem(run(*flags, "/dev/zero", "--dry-run"))


def test_names_of_300_bytes_are_refused(run: Run) -> None:
    told = dry.problems(
        dry.batch(
            run, *({"prompt": "a", "out": name} for name in ("x" * 300, "狐" * 100, "y" * 255))
        )
    )
    assert [said[:7] for said in told] == ["line 1:", "line 2:", "line 3:"]
    assert all("255 bytes" in said and len(said) < 300 for said in told)


@pytest.mark.parametrize(
    ("one", "other"), [("fox", "FOX"), ("fox.png", "fox.PNG"), ("é", "É"), ("é", "e\u0301")]
)
def test_names_that_differ_only_in_case_or_composition_are_one_file_on_some_disks(
    run: Run, one: str, other: str
) -> None:
    said = dry.problem(dry.batch(run, *({"prompt": "a", "out": name} for name in (one, other))))
    assert said.startswith("line 2: ")
    assert "line 1" in said


def test_names_that_differ_in_a_letter_are_two_files(run: Run) -> None:
    jobs = ({"prompt": "a", "out": name} for name in ("straße", "strase"))
    assert len(dry.documents(dry.batch(run, *jobs))) == 2


def test_many_unknown_keys_make_a_short_refusal(run: Run) -> None:
    job = {"prompt": "a fox"} | {f"key{number}": 1 for number in range(50_000)}
    result = dry.batch(run, job)
    assert dry.problems(result)
    assert len(result.stderr) < 20_000


def test_a_key_that_is_given_twice_is_found_among_many(run: Run) -> None:
    keys = ",".join(f'"key{number}": 1' for number in range(50_000))
    assert '"key49999" is given twice' in dry.problem(dry.batch(run, f'{{{keys}, "key49999": 2}}'))


# Any input at all.

ANY_INPUT = settings(
    max_examples=80,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(max_size=12) | st.sampled_from(
    [
        *("auto", "1024x1024", "low", "png", "jpg", "gpt-image-2", "gpt-image-1.5", "transparent"),
        *("..", "a/b", "-", "~", " ", "\n", "\0", "\ud800", "3", "room.png", "x" * 300),
    ]
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
KEY = st.sampled_from([*STRING_KEYS, "fields"])
JOB = st.dictionaries(KEY | TEXT, VALUE | TEXT, max_size=5)
LINE = (
    st.binary(max_size=30)
    | TEXT.map(lambda line: line.encode("utf-8", "surrogatepass"))
    | VALUE.map(lambda value: json.dumps(value).encode())
    | JOB.map(lambda job: json.dumps({"prompt": "a fox", **job}).encode())
)
FLAG = st.sampled_from(
    [
        *("--dry-run", "--json", "--quiet", "--force", "--skip-existing", "--no-augment", "--help"),
        *("--prompt-file", "--out-dir", "--input", "--contact-sheet", "--fail-fast", "--timeout"),
        *("--downscale-max-dim", "--downscale-suffix", "--concurrency", "--max-wait"),
        *map(flag, STRING_KEYS),
    ]
)


def assert_documented(result: Result, before: dict[Path, bytes | None]) -> None:
    """The end is a documented one, and the disk is as it was."""
    assert result.exit_code in (0, 2)
    assert "Traceback" not in result.stderr
    assert dry.files() == before
    if result.exit_code == 2:
        assert dry.messages(result, "Error: ")
        assert result.stdout == ""


@ANY_INPUT
@given(
    lines=st.lists(LINE, max_size=5), end=st.sampled_from([b"\n", b"\r\n"]), copies=st.booleans()
)
def test_any_jobs_end_with_a_documented_exit_code_and_write_nothing(
    run: Run, lines: list[bytes], end: bytes, *, copies: bool
) -> None:
    picture("room.png")
    jobs = job_file(*lines, end=end)
    before = dry.files()
    flags = ("--downscale-max-dim", "9") if copies else ()
    argv = ("generate-batch", "--input", jobs, "--out-dir", "out", "--dry-run", *flags)
    result = run(*argv)
    assert_documented(result, before)
    shown: list[Json] = dry.documents(result) if result.exit_code == 0 else []
    numbers = [each["job"] for each in shown]
    assert numbers == list(range(1, len(numbers) + 1))
    names = [name for each in shown for name in each["outputs"]]
    assert len(set(names)) == len(names)
    assert all(Path(name).parent == Path("out") for name in names)


@ANY_INPUT
@given(
    subcommand=st.sampled_from(["generate", "edit", "generate-batch"]) | TEXT,
    words=st.lists(FLAG | TEXT | st.tuples(FLAG, TEXT), max_size=6),
)
def test_any_command_line_ends_with_a_documented_exit_code_and_writes_nothing(
    run: Run, subcommand: str, words: list[str | tuple[str, str]]
) -> None:
    job_file("a fox")
    valid = {
        "generate": ["--prompt", "a fox"],
        "edit": ["--prompt", "a fox", "--image", picture("room.png")],
        "generate-batch": ["--input", "jobs.jsonl", "--out-dir", "out"],
    }
    flat = [word for item in words for word in ([item] if isinstance(item, str) else item)]
    before = dry.files()
    assert_documented(run(subcommand, *valid.get(subcommand, []), "--dry-run", *flat), before)


@ANY_INPUT
@given(fields=st.dictionaries(st.sampled_from(PROMPT_FIELDS), st.text(max_size=9)))
def test_any_text_in_a_field_is_sent_as_it_is_or_refused(run: Run, fields: dict[str, Any]) -> None:
    result = dry.batch(run, {"prompt": "a fox", **fields})
    given = [value.strip() for value in fields.values() if value.strip()]
    if re.search("[\0\ud800-\udfff]", "".join(fields.values())):
        assert dry.problems(result)
    else:
        prompt = dry.document(result)["prompt"]
        assert all(value in prompt for value in given)
