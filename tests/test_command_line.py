"""The command line, and the contract of the process: exit codes, streams, help."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING

import dry
import image_gen
import pytest
from cli import command, finished
from image_gen import MAX_ATTEMPTS, MAX_CONCURRENCY, MAX_N
from inputs import job_file, picture

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run, Start

SHARED_FLAGS = [
    *("--model", "--n", "--size", "--quality", "--background", "--moderation"),
    *("--output-format", "--output-compression", "--augment", "--no-augment"),
    *("--use-case", "--scene", "--subject", "--style", "--composition", "--lighting"),
    *("--palette", "--materials", "--text", "--constraints", "--negative"),
    *("--out-dir", "--downscale-max-dim", "--downscale-suffix", "--force", "--skip-existing"),
    *("--downscale-format", "--contact-sheet", "--max-cost"),
    *("--dry-run", "--json", "--quiet", "--max-attempts", "--timeout", "--max-wait"),
]
SINGLE_FLAGS = ["--prompt", "--prompt-file", "--out"]
EDIT_FLAGS = ["--image", "--mask", "--mask-edits", "--keep-unmasked", "--input-fidelity"]
BATCH_FLAGS = ["--input", "--concurrency", "--fail-fast", "--only", "--remake"]
COMMANDS = ["generate", "edit", "generate-batch"]
GENERATE = ("generate", "--prompt", "a fox", "--dry-run")


@pytest.fixture
def call(run: Run) -> Callable[..., Result]:
    """A valid dry run of a subcommand, with more flags."""
    picture("room.png")
    calls: dict[str, Callable[..., Result]] = {"generate": dry.generate, "edit": dry.edit}

    def call(subcommand: str, *argv: str) -> Result:
        if subcommand in calls:
            return calls[subcommand](run, *argv)
        return dry.batch(run, "a fox", flags=argv)

    return call


@pytest.mark.parametrize(
    ("subcommand", "own", "foreign"),
    [
        ("generate", SINGLE_FLAGS, EDIT_FLAGS + BATCH_FLAGS),
        ("edit", SINGLE_FLAGS + EDIT_FLAGS, BATCH_FLAGS),
        ("generate-batch", BATCH_FLAGS, SINGLE_FLAGS + EDIT_FLAGS),
    ],
)
def test_help_lists_the_flags_of_a_subcommand_and_no_others(
    run: Run, subcommand: str, own: list[str], foreign: list[str]
) -> None:
    result = run(subcommand, "--help")
    words = result.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split()
    assert result.exit_code == 0
    assert set(SHARED_FLAGS + own) <= set(words)
    assert not set(foreign) & set(words)


@pytest.mark.parametrize("subcommand", COMMANDS)
@pytest.mark.parametrize(
    "part",
    [
        pytest.param("\nimage:\n", id="groups"),
        pytest.param("\nprompt fields:\n", id="more groups"),
        pytest.param("(default: gpt-image-2)", id="default of a word"),
        pytest.param("(default: 600)", id="default of a number"),
        pytest.param("\nexample:\n", id="example"),
        pytest.param("\nexit codes:\n", id="exit codes"),
        pytest.param("\n  130  ", id="exit code of an interruption"),
    ],
)
def test_help_of_each_subcommand_shows(run: Run, subcommand: str, part: str) -> None:
    assert part in run(subcommand, "--help").stdout


def test_help_without_a_subcommand_lists_the_subcommands_and_the_exit_codes(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert set(COMMANDS) <= set(result.stdout.split())
    assert "exit codes:" in result.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        pytest.param([], "COMMAND", id="no subcommand"),
        pytest.param(["paint"], "'paint'", id="unknown subcommand"),
        pytest.param(["generate", "--dry-run"], "--prompt-file FILE", id="no prompt"),
        pytest.param(["edit", "--prompt", "x"], "--image", id="edit without an image"),
        pytest.param(["generate", "--prompt", "x", "--image", "a"], "--image", id="foreign flag"),
        pytest.param(["generate", "--promt", "x"], "--promt", id="misspelt flag"),
        pytest.param(["generate", "a fox"], "a fox", id="prompt without its flag"),
        pytest.param(["generate-batch", "--out-dir", "d"], "--input", id="batch without input"),
        pytest.param(["generate-batch", "--input", "j"], "--out-dir", id="batch without folder"),
        pytest.param(
            ["generate", "--prompt", "-x"], "--flag=VALUE", id="value that begins with a dash"
        ),
    ],
)
def test_wrong_syntax_is_refused_with_a_sentence_that_names_it(
    run: Run, argv: list[str], says: str
) -> None:
    assert says in dry.problem(run(*argv))


@pytest.mark.parametrize(
    ("subcommand", "abbreviation"),
    [
        ("generate", ["--dry"]),
        ("generate", ["--qual", "low"]),
        ("generate", ["--out-d", "x"]),
        ("generate", ["--no"]),
        ("edit", ["--input", "low"]),
        ("generate-batch", ["--conc", "3"]),
    ],
    ids=str,
)
def test_flags_cannot_be_abbreviated(
    call: Callable[..., Result], subcommand: str, abbreviation: list[str]
) -> None:
    assert abbreviation[0] in dry.problem(call(subcommand, *abbreviation))


@pytest.mark.parametrize(
    ("flag", "goes_to"),
    [("--prompt", "--input"), ("--prompt-file", "--input"), ("--out", "--out-dir")],
)
def test_generate_batch_says_where_the_flags_of_single_images_go(
    call: Callable[..., Result], flag: str, goes_to: str
) -> None:
    said = dry.problem(call("generate-batch", flag, "x"))
    assert f"{flag}: is no option of generate-batch" in said
    assert goes_to in said.partition("is no option")[2]


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("--prompt", "- a list", "- a list"),
        ("--prompt", "-5", "-5"),
        ("--prompt=-dash", None, "-dash"),
    ],
    ids=str,
)
def test_a_prompt_may_begin_with_a_dash(run: Run, flag: str, value: str | None, shown: str) -> None:
    argv = [flag] if value is None else [flag, value]
    shown_prompt = dry.document(run("generate", *argv, "--no-augment", "--dry-run"))["prompt"]
    assert shown_prompt == shown


@pytest.mark.parametrize("flag", ["--n", "--output-compression", "--downscale-max-dim"])
@pytest.mark.parametrize("value", ["", "three", "1_0", "٣", " 3 ", "3.0", "0x3", "1e1", "9" * 5000])
def test_a_whole_number_is_written_in_digits(run: Run, flag: str, value: str) -> None:
    said = dry.problem(dry.generate(run, f"{flag}={value}"))
    assert f"{flag}: has to be a whole number" in said


@pytest.mark.parametrize("flag", ["--timeout", "--max-wait"])
@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "-1", "0"])
def test_a_time_is_a_positive_number_of_seconds(run: Run, flag: str, value: str) -> None:
    said = dry.problem(dry.generate(run, f"{flag}={value}"))
    assert f"{flag}: has to be a positive number of seconds" in said


@pytest.mark.parametrize(
    ("subcommand", "flag", "low", "high"),
    [
        ("generate", "--n", 1, MAX_N),
        ("generate", "--max-attempts", 1, MAX_ATTEMPTS),
        ("edit", "--max-attempts", 1, MAX_ATTEMPTS),
        ("generate-batch", "--max-attempts", 1, MAX_ATTEMPTS),
        ("generate-batch", "--concurrency", 1, MAX_CONCURRENCY),
    ],
)
def test_a_number_is_accepted_within_its_limits_and_refused_beyond(
    call: Callable[..., Result], subcommand: str, flag: str, low: int, high: int
) -> None:
    for value in (low, high):
        dry.document(call(subcommand, f"{flag}={value}"))
    for value in (low - 1, high + 1):
        said = dry.problem(call(subcommand, f"{flag}={value}"))
        assert flag.lstrip("-") in said
        assert f"{value}: accepted are {low} to {high}" in said


def test_force_and_skip_existing_exclude_each_other(run: Run) -> None:
    said = dry.problem(dry.generate(run, "--force", "--skip-existing"))
    assert "--force" in said
    assert "--skip-existing" in said


@pytest.mark.parametrize(
    "flag", ["--out", "--out-dir", "--prompt-file", "--image", "--mask", "--input"]
)
def test_an_empty_path_is_refused(call: Callable[..., Result], flag: str) -> None:
    subcommand = "generate-batch" if flag == "--input" else "edit"
    assert f"{flag}: is empty" in dry.problem(call(subcommand, flag, ""))


def test_the_last_of_a_repeated_flag_wins(run: Run) -> None:
    assert dry.document(dry.generate(run, "--n", "2", "--n", "3"))["n"] == 3


# The process itself.


@pytest.mark.parametrize(
    ("argv", "exit_code", "speaks_on"),
    [
        pytest.param(("--help",), 0, "stdout", id="help"),
        pytest.param((*GENERATE, "--quiet"), 0, "stdout", id="valid dry run"),
        pytest.param((*GENERATE, "--n", "0"), 2, "stderr", id="refused value"),
        pytest.param(("generate", "--nonsense"), 2, "stderr", id="wrong syntax"),
        pytest.param(("generate", "--prompt", "x"), 2, "stderr", id="no key"),
    ],
)
def test_results_go_to_stdout_refusals_to_stderr_and_the_exit_code_tells_them_apart(
    run_process: Run, argv: tuple[str, ...], exit_code: int, speaks_on: str
) -> None:
    result = run_process(*argv)
    assert result.exit_code == exit_code
    spoken = {"stdout": result.stdout, "stderr": result.stderr}
    assert [name for name, said in spoken.items() if said] == [speaks_on]


def test_a_prompt_comes_from_standard_input(run_process: Run) -> None:
    argv = ("generate", "--prompt-file", "-", "--dry-run")
    result = run_process(*argv, stdin="  é – ein Fuchs \r\n".encode())
    assert dry.document(result)["prompt"] == "Primary request: é – ein Fuchs"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(("--prompt", "\udcff"), id="prompt"),
        pytest.param(("--prompt", "x", "--out", "\udcff.png"), id="path"),
        pytest.param(("--prompt", "x", "--scene", "\udcff"), id="prompt field"),
    ],
)
def test_bytes_on_the_command_line_that_are_not_utf8_are_refused(
    run_process: Run, argv: tuple[str, ...]
) -> None:
    said = dry.problem(run_process("generate", "--dry-run", *argv))
    assert f"{argv[-2]}: is not valid text" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_document_is_the_same_on_a_stdout_of_any_encoding(
    run_process: Run, encoding: str
) -> None:
    argv = ("generate", "--dry-run", "--no-augment", "--prompt", "é…🦊")
    result = run_process(*argv, env={"PYTHONIOENCODING": encoding})
    assert dry.document(result)["prompt"] == "é…🦊"


@pytest.mark.parametrize(
    ("redirection", "argv", "exit_code"),
    [
        pytest.param("<&-", GENERATE, 0, id="stdin that is not read"),
        pytest.param("<&-", ("generate", "--prompt-file", "-", "--dry-run"), 2, id="stdin"),
        pytest.param(">&-", GENERATE, 0, id="stdout"),
        pytest.param(">&-", (*GENERATE, "--n", "0"), 2, id="stdout of a refusal"),
        pytest.param("2>&-", GENERATE, 0, id="stderr"),
        pytest.param("2>&-", (*GENERATE, "--n", "0"), 2, id="stderr of a refusal"),
        pytest.param("2>&-", (*GENERATE, "--model", "gpt-image-9"), 0, id="stderr of a warning"),
        pytest.param(">&- 2>&-", (*GENERATE, "--n", "0"), 2, id="both"),
    ],
)
def test_a_stream_that_is_closed_changes_no_exit_code(
    redirection: str, argv: tuple[str, ...], exit_code: int
) -> None:
    shell = ["sh", "-c", f'exec "$0" "$@" {redirection}', *command(*argv)]
    ended = finished(shell, stdin=subprocess.DEVNULL)
    assert "Traceback" not in ended.stderr
    assert ended.exit_code == exit_code
    if exit_code == 2 and "2>" not in redirection:
        assert ended.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param((*GENERATE, "--quiet"), id="a document"),
        pytest.param(("generate", "--help"), id="help"),
        pytest.param(
            ("generate-batch", "--input", "jobs.jsonl", "--out-dir", "d", "--dry-run", "--quiet"),
            id="more than a pipe holds",
        ),
    ],
)
def test_a_reader_that_leaves_is_no_failure(argv: tuple[str, ...]) -> None:
    job_file(*["a fox " * 50] * 400)
    reader, writer = os.pipe()
    os.close(reader)
    ended = finished(command(*argv), stdout=writer)
    os.close(writer)
    assert ended.stderr == ""
    assert ended.exit_code == 0


def test_ctrl_c_before_anything_is_sent_ends_with_130(start_process: Start) -> None:
    os.mkfifo("prompt")
    process = start_process("generate", "--prompt-file", "prompt")
    with open("prompt", "wb"):  # returns when the process has opened it to read
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "Interrupted before anything was sent.\n"


NASTY = "a\nb\x1b[31m\r\x07c"


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["generate", "--prompt", "x", NASTY], id="stray argument"),
        pytest.param(["generate", "--prompt-file", NASTY], id="prompt file"),
        pytest.param([*GENERATE, "--model", NASTY], id="model"),
        pytest.param([*GENERATE, "--model", f"gpt-image-{NASTY}"], id="model of the family"),
        pytest.param([*GENERATE, "--size", NASTY], id="size"),
        pytest.param([*GENERATE, "--n", NASTY], id="number"),
        pytest.param([*GENERATE, "--timeout", NASTY], id="seconds"),
        pytest.param([*GENERATE, "--out", f"taken/{NASTY}.png"], id="out below a file"),
        pytest.param([*GENERATE, "--out", f"{NASTY}.jpg", "--output-format", "png"], id="format"),
        pytest.param([*GENERATE, "--out-dir", f"taken/{NASTY}"], id="folder"),
        pytest.param(["edit", "--prompt", "x", "--image", NASTY, "--dry-run"], id="image"),
        pytest.param(["generate-batch", "--input", NASTY, "--out-dir", "d"], id="input"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_without_control_characters(
    run: Run, argv: list[str]
) -> None:
    picture("taken.png")
    os.rename("taken.png", "taken")
    said = dry.problem(run(*argv))
    assert said.isprintable()


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["sk-secret-word"], id="stray argument"),
        pytest.param(["--model", "sk-secret-word"], id="model"),
        pytest.param(["--size", "sk-secret-word"], id="size"),
        pytest.param(["--prompt-file", "sk-secret-word"], id="path"),
    ],
)
def test_a_key_that_slipped_into_the_arguments_is_not_repeated(run: Run, argv: list[str]) -> None:
    prompt = () if "--prompt-file" in argv else ("--prompt", "x")
    said = dry.problem(run("generate", *prompt, *argv, env={"OPENAI_API_KEY": "sk-secret-word"}))
    assert "sk-secret-word" not in said


def test_a_current_directory_that_is_gone_is_a_refusal(run_process: Run) -> None:
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")
    assert dry.problem(run_process(*GENERATE))


def test_a_refused_call_leaves_the_disk_as_it_was(run: Run) -> None:
    before = dry.files()
    dry.problem(run("generate", "--prompt", "x", "--out-dir", "new", "--n", "0", "--dry-run"))
    assert dry.files() == before


def test_every_flag_has_a_field_that_takes_its_value() -> None:
    fields = {
        *image_gen.ImageRequest._fields,
        *image_gen.RunOptions._fields,
        *image_gen.PROMPT_FIELDS,
        *image_gen.Arguments.__annotations__,
        "augment",
    }
    groups = [group for command in image_gen.COMMANDS.values() for group in command.groups.values()]
    assert {option.key for group in groups for option in group} <= fields
