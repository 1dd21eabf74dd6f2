"""The pages say what the scripts do: their commands run, and their facts are the constants."""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import image_gen
import live
import pytest
import remove_chroma_key
from cli import SCRIPTS, finished
from images_api import forbidden, moderation_blocked, no_answer, no_data, rate_limited
from openai.types import ImageModel
from pages import ROOT, TEXT, blocks, first_cells, prose, table, unfenced
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cli import Run
    from images_api import ImagesAPI

CLI, API = TEXT["references/cli.md"], TEXT["references/image-api.md"]

USE_CASES = [
    "photorealistic-natural",
    "product-mockup",
    "ui-mockup",
    "infographic-diagram",
    "scientific-educational",
    "ads-marketing",
    "productivity-visual",
    "logo-brand",
    "illustration-story",
    "stylized-concept",
    "historical-scene",
    "text-localization",
    "identity-preserve",
    "precise-object-edit",
    "lighting-weather",
    "background-extraction",
    "style-transfer",
    "compositing",
    "sketch-to-render",
]


# ------------------------------------------------------------------------- the commands are run

# The shell does all that a shell does; what it would run of this project is written down, and then
# run in this process, which is ten times as fast.
PYTHON_SHIM = """\
#!/bin/bash
case "$1" in
    -)  exec {python} "$@" ;;
    -c) exec {python} "$@" ;;
esac
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\n' > "$3/bin/pip"
    printf '' > "$3/bin/activate"
    chmod +x "$3/bin/pip"
    exit
fi
if [[ " $* " == *" --prompt-file - "* ]]; then cat > "$CALLS.stdin"; fi
{{ printf '%s\\0' "$@"; printf '\\1\\0'; }} >> "$CALLS"
"""
UV_SHIM = '#!/bin/bash\n[[ $1 == run ]] && shift\nexec python "$@"\n'


class Reader:
    """Somebody who has the clone and a home folder, and copies commands into a shell."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.run_cli = run
        self.home, self.clone, self.bin = (folder / name for name in ("home", "clone", "bin"))
        self.calls = folder / "calls"
        for path in (self.clone / "references/pictures", self.clone / ".ci", self.bin):
            path.mkdir(parents=True)
        for name in ("scripts", "tests", "README.md", "SKILL.md", ".ci/run"):
            (self.clone / name).symlink_to(ROOT / name)
        (self.home / ".codex/skills").mkdir(parents=True)
        (self.home / ".codex/skills/imagegen").symlink_to(ROOT)
        (self.home / ".config/openai").mkdir(parents=True)
        (self.home / ".config/openai/key").write_text("a-key\n")
        for name, shim in (("python", PYTHON_SHIM), ("python3", PYTHON_SHIM), ("uv", UV_SHIM)):
            path = self.bin / name
            path.write_text(shim.format(python=sys.executable) if shim is PYTHON_SHIM else shim)
            path.chmod(0o755)

    def shell(self, command: str) -> list[list[str]]:
        """Run the command as a script; return what it wanted Python to run."""
        self.calls.write_bytes(b"")
        ended = finished(
            ["bash", "-euo", "pipefail", "-c", f"{SETUP}\n{command}\nwait"],
            cwd=self.clone,
            env={
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "HOME": str(self.home),
                "CALLS": str(self.calls),
            },
        )
        assert ended.exit_code == 0, f"{command}\n{ended.stderr}"
        calls = self.calls.read_bytes().decode().split("\1\0")[:-1]
        return [call.split("\0")[:-1] for call in calls]

    def python(self, call: list[str]) -> None:
        """Run in this process what the shell wanted to run, dry and then live."""
        if call[0] == "-m":
            return
        if call[0].startswith("tests/benchmarks/"):  # they take their time; CI does not run them
            assert Path(call[0]).is_file(), call
            return
        if call[0] == "tests/images_api.py":
            call = call[call.index("--") + 2 :]
        program = Path(call[0]).name
        words = [
            name
            for word in call[1:]
            for name in (sorted(glob.glob(word)) if "*" in word else [word])
        ]
        if program == "remove_chroma_key.py":
            assert remove_chroma_key.main(words) == 0, call
            return
        assert program == "image_gen.py"
        stdin = Path(f"{self.calls}.stdin").read_bytes() if "-" in words else b""
        dry = self.run_cli(*words, "--dry-run", stdin=stdin)
        assert dry.exit_code == 0, f"{call}\n{dry.stderr}"
        if "--dry-run" not in words:
            live = self.run_cli(*words, stdin=stdin)
            assert live.exit_code == (3 if "--no-wait" in words else 0), f"{call}\n{live.stderr}"


SETUP = blocks("references/cli.md", "bash")[0].code


def commands(code: str) -> list[str]:
    """The commands of a block, each with its further lines and its here-document."""
    pattern = r"(?:[^\n]*<<'EOF'\n.*?\nEOF|(?:[^\n]*\\\n)*[^\n]+)(?=\n|$)"
    return re.findall(pattern, code.strip(), re.DOTALL)


@pytest.fixture
def reader(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Reader:
    reader = Reader(tmp_path, run)
    monkeypatch.chdir(reader.clone)
    return reader


def draw_inputs(page: str) -> None:
    """Draw the pictures that the commands of a page expect a user to have."""
    code = "\n".join(
        block.code for language in ("bash", "jsonl") for block in blocks(page, language)
    )
    named = re.findall(r"--(?:image|input) +([\w/.-]+)", code)
    named += re.findall(r'"([\w/.-]+\.(?:png|jpg))"', " ".join(re.findall(r'"image": (.*)', code)))
    masks = re.findall(r'--(?:mask|markup) +([\w/.-]+)|"mask": "([\w/.-]+)"', code)
    for name in named:
        if Path(name).suffix in image_gen.SUFFIX_FORMATS and "/" not in name:
            Image.new("RGB", (64, 48), "#00ff00").save(name)
    for name in filter(None, sum(masks, ())):  # half of it is edited, by alpha and by white
        mask = Image.new("RGBA", (64, 48), "#00000000")
        mask.paste("#ffffffff", (0, 0, 32, 48))
        mask.save(name)


@pytest.mark.parametrize("page", TEXT)
def test_every_command_of_a_page_runs_dry_and_live(
    page: str, reader: Reader, api: ImagesAPI
) -> None:
    draw_inputs(page)
    for block in blocks(page, "bash"):
        for call in reader.shell(block.code):
            reader.python(call)
    assert [request.status for request in api.requests if request.status != 200] == []


def test_every_command_of_the_skill_runs_in_a_shell_of_its_own(
    reader: Reader, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As agents run them: in the project, with the path of scripts/ written out."""
    draw_inputs("SKILL.md")
    monkeypatch.setitem(globals(), "SETUP", "")
    found = [each for block in blocks("SKILL.md", "bash") for each in commands(block.code)]
    assert len(found) >= 8
    for command in found:
        assert "$" not in command
        for call in reader.shell(command):
            reader.python(call)
    assert [request.status for request in api.requests if request.status != 200] == []


@pytest.mark.parametrize("page", TEXT)
def test_every_example_of_jsonl_is_a_valid_batch(page: str, run: Run) -> None:
    draw_inputs(page)
    for block in blocks(page, "jsonl"):
        Path("jobs.jsonl").write_text(block.code, encoding="utf-8")
        result = run(
            "generate-batch", "--input", "jobs.jsonl", "--out-dir", "out", "--dry-run", "--json"
        )
        assert result.exit_code == 0, result.stderr
        assert len(result.json_lines) == sum(
            not line.startswith("#") for line in block.code.splitlines()
        )


@pytest.mark.parametrize("page", TEXT)
def test_every_block_has_a_language_that_is_checked(page: str) -> None:
    fences = re.findall(r"^```(.*)$", TEXT[page], re.MULTILINE)[::2]
    assert set(fences) <= {"bash", "jsonl", "toml", "text"}
    for block in blocks(page, "toml"):
        assert tomllib.loads(block.code)


def test_ci_runs_the_commands_of_the_readme_and_the_checks_of_the_code(reader: Reader) -> None:
    calls = reader.shell("bash .ci/run")
    assert calls[0][:4] == ["tests/images_api.py", "--", "python", "scripts/image_gen.py"]
    assert calls[0][4] == "generate"
    assert [call[:3] for call in calls[1:]] == [
        ["-m", "pytest", "-q"],
        ["-m", "ruff", "check"],
        ["-m", "ruff", "format"],
        ["-m", "mypy"],
    ]


def test_the_first_command_of_the_readme_prints_what_the_readme_shows(reader: Reader) -> None:
    command = blocks("README.md", "bash")[0].code.rsplit("&& .venv/bin/python ", 1)[1]
    ended = finished(["sh", "-c", f"{sys.executable} {command.strip()} 2>&1"])
    assert ended.exit_code == 0, ended.stderr

    def without_figures(text: str) -> str:
        return re.sub(r"\d[\d,.]*", "#", text)

    shown = blocks("README.md", "text")[0].code
    assert without_figures(ended.stdout) == without_figures(shown)
    with Image.open(reader.clone / "output/imagegen/fox.png") as fox:
        assert fox.size == (1024, 1024)


# What a row of the README's last table quotes from the program; the other rows describe a result.
QUOTED = [
    re.sub(r"`(… )?|( …)?`", "", cell.removeprefix("a model that ").removesuffix(" a date"))
    for cell, *_ in table("README.md", "When something goes wrong")
    if "`" in cell
]


def test_the_messages_of_the_readme_are_those_of_the_program(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def say(*argv: str, env: Mapping[str, str] | None = None) -> None:
        once = ("--max-attempts", "1", "--force")
        said.append(run("generate", "--prompt", "x", *argv, *once, env=env).stderr)

    say(env={"OPENAI_API_KEY": ""})
    say("--max-cost", "1")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _name: None)
        say()
    Path("x.png").touch()
    said.append(run("generate", "--prompt", "x", "--out", "x.png").stderr)
    Path("x.png").write_text("mine")
    said.append(run("generate", "--prompt", "x", "--out", "x.png", "--skip-existing").stderr)
    said.append(run(*live.batch([{"prompt": "x", "out": "x.png"}])).stderr)
    said.append(run(*live.batch([{"prompt": "y", "out": "x.png"}], "--skip-existing")).stderr)
    with image_gen.locked("out"):
        said.append(run(*live.batch(1)).stderr)
    say(env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    api.script(no_data())
    once_more = ("generate", "--prompt", "x", "--out", "y.png")
    said.append(run(*once_more).stderr)
    api.script(no_answer())
    say("--timeout", str(live.TIME_OUT))
    api.script(rate_limited(0.05), moderation_blocked(), forbidden())
    say()
    say()
    say("--model", "gpt-image-1.5")
    missing = [message for message in QUOTED if not any(message in lines for lines in said)]
    assert missing == [], said


# ----------------------------------------------------------------------------- flags and defaults


def subparsers() -> dict[str, argparse.ArgumentParser]:
    parser = image_gen.build_parser()
    choices: dict[str, argparse.ArgumentParser] = next(
        action.choices for action in parser._actions if isinstance(action.choices, dict)
    )
    return choices


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        flag: action
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and action.help != "==SUPPRESS=="
    }


IMAGE_GEN_FLAGS = {
    flag: action
    for parser in (*reversed(subparsers().values()), image_gen.build_parser())
    for flag, action in flags_of(parser).items()
}
KEY_FLAGS = flags_of(remove_chroma_key.build_parser())
OTHER_FLAGS = {"--flag"}  # stands for any


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_cli_md_has_every_flag_of_both_parsers_and_no_other() -> None:
    own, key = CLI.split("\n## remove_chroma_key.py\n")
    assert flags_in(own) - OTHER_FLAGS == set(IMAGE_GEN_FLAGS) | (flags_in(own) & set(KEY_FLAGS))
    assert flags_in(own) - OTHER_FLAGS <= set(IMAGE_GEN_FLAGS)
    assert flags_in(key) == set(KEY_FLAGS)


@pytest.mark.parametrize("page", TEXT)
def test_no_page_names_a_flag_that_does_not_exist(page: str) -> None:
    assert flags_in(TEXT[page]) <= {*IMAGE_GEN_FLAGS, *KEY_FLAGS, *OTHER_FLAGS}


IMAGE_GEN_DEFAULTS = image_gen.DEFAULTS | {"out": f"{image_gen.DEFAULT_OUT}.<format>"}
KEY_DEFAULTS = {
    **vars(remove_chroma_key.Arguments),
    **remove_chroma_key.MatteMethod._field_defaults,
    **remove_chroma_key.UnmixMethod._field_defaults,
    "key_color": remove_chroma_key.hex_colour(remove_chroma_key.DEFAULT_KEY_COLOUR),
}


def shown_default(action: argparse.Action, defaults: Mapping[str, object]) -> str:
    """A default as the tables of cli.md write it; the parsers leave it to the records."""
    assert action.default in {argparse.SUPPRESS, None}
    default = defaults.get(action.dest)
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off" if action.dest not in {"help", "version"} else "-"
    if default is None or default == ():
        return "-"
    return f"{default:g}" if isinstance(default, float) else str(default)


FLAG_SECTIONS = {
    "Prompt (`generate`, `edit`)": ("generate", "edit"),
    "Input images (`edit`)": ("edit",),
    "Image (all three)": ("generate", "edit", "generate-batch"),
    "Output (all three, but for `--out`)": ("generate", "edit", "generate-batch"),
    "Batch (`generate-batch`)": ("generate-batch",),
    "Run (all three)": ("generate", "edit", "generate-batch"),
}


@pytest.mark.parametrize("heading", FLAG_SECTIONS)
def test_the_tables_of_flags_agree_with_the_parsers(heading: str) -> None:
    for name, default, *rest in table("references/cli.md", heading):
        flag, _, metavar = name.strip("`").partition(" ")
        if flag == "--version":  # of the parser above them
            continue
        having = tuple(command for command, sub in subparsers().items() if flag in flags_of(sub))
        expected = ("generate", "edit") if flag == "--out" else FLAG_SECTIONS[heading]
        assert having == expected, flag
        action = flags_of(subparsers()[having[0]])[flag]
        assert metavar == (action.metavar or ""), flag
        assert default.strip("`") == shown_default(action, IMAGE_GEN_DEFAULTS), flag
        if len(rest) == 2:
            is_key = action.dest in {*image_gen.JOB_OPTIONS, "prompt"}
            assert rest[0] == (f"`{action.dest}`" if is_key else "-"), flag


def test_every_flag_of_image_gen_stands_in_a_table_once() -> None:
    cells = [
        first.split()[0]
        for heading in (*FLAG_SECTIONS, "Prompt fields")
        for first in first_cells("references/cli.md", heading)
        if first.startswith("--") and "or" not in first.split()
    ]
    assert sorted([*cells, "--augment", "--no-augment"]) == sorted(IMAGE_GEN_FLAGS)


def test_the_table_of_the_key_remover_agrees_with_its_parser() -> None:
    rows = table("references/cli.md", "remove_chroma_key.py")
    flags = [flag for row in rows for flag in re.findall(r"--[a-z-]+", row[0])]
    assert flags == [*list(KEY_FLAGS)[2:], "--help", "--version"]
    for name, default, _ in rows:
        flag, _, metavar = name.split(",")[0].strip("`").partition(" ")
        action = KEY_FLAGS[flag]
        assert default.strip("`") == shown_default(action, KEY_DEFAULTS), flag
        if action.choices is None:
            assert metavar == str(action.metavar or "").upper(), flag


def test_the_prompt_fields_are_those_of_the_program_in_their_order() -> None:
    rows = [
        (key.strip("`"), line.split("`")[1])
        for _, key, line in table("references/cli.md", "Prompt fields")
    ]
    assert rows == [(key, label.format("…")) for key, label, _ in image_gen.PROMPT_SECTIONS]


def test_the_keys_of_jsonl_are_those_that_a_job_takes() -> None:
    cells = " ".join(first_cells("references/cli.md", "JSONL"))
    assert sorted(re.findall(r"\w+", cells)) == sorted(
        {*image_gen.JOB_OPTIONS, *image_gen.PROMPT_FIELDS, "prompt", "out"}
    )


# ------------------------------------------------------------------------- models, limits, codes


def test_the_table_of_models_is_that_of_the_program() -> None:
    rows = table("references/image-api.md", "Models")
    shown = {
        row[0].split("`")[1]: (
            row[1] == "fixed",
            row[2],
            row[3],
            row[4].startswith("yes"),
            row[5] == "yes",
            row[6],
            row[7],
        )
        for row in rows
    }
    assert shown == {
        family.prefix: (
            bool(family.sizes),
            ", ".join(family.qualities),
            ", ".join(family.formats),
            family.transparent is True,
            family.markup,
            ", ".join(family.fidelities) or "leave out",
            family.shut_down or "-",
        )
        for family in image_gen.MODEL_FAMILIES
    }
    assert [row[0] for row in rows if "default" in row[0]] == [
        f"`{image_gen.DEFAULT_MODEL}` (default)"
    ]


def test_the_prices_and_the_cells_are_those_of_the_program() -> None:
    page = "references/image-api.md"
    ((models, *dollars),) = table(page, "Money")
    assert f" | {' | '.join(image_gen.PRICES)} |" in TEXT[page]
    assert [float(amount) for amount in dollars] == list(image_gen.PRICES.values())
    assert models.endswith(f", on {image_gen.PRICES_DATE}")
    assert f"longer edge | {' | '.join(image_gen.QUALITIES[:-1])} |" in TEXT[page]
    rows = table(page, "Money", 1)
    shown = {row[0].strip("`"): [cell for cell in row[1:] if cell != "-"] for row in rows}
    assert shown == {
        row.prefix: [str(number) for number in row.cells]
        for row in image_gen.MODEL_FAMILIES
        if row.cells
    }


@pytest.mark.parametrize("page", TEXT)
def test_every_model_and_size_in_the_pages_is_accepted(page: str, run: Run) -> None:
    families = [family.prefix for family in image_gen.MODEL_FAMILIES]
    known = {*get_args(ImageModel), *families}
    named = {name.rstrip(".-") for name in re.findall(r"(?:chat)?gpt-image-[\w.-]+", TEXT[page])}
    assert named <= known
    offered = re.sub(r"^\| `size`: .*", "", TEXT[page], flags=re.MULTILINE)
    for size in set(re.findall(r"\b[0-9]{3,5}x[0-9]{3,5}\b", offered)):
        assert run("generate", "--prompt", "x", "--size", size, "--dry-run").exit_code == 0, size


def test_the_commands_name_only_models_that_can_be_asked_for() -> None:
    """A family's name is no model: gpt-image-2.6 does not exist."""
    for page in TEXT:
        for block in blocks(page, "bash"):
            for model in re.findall(r"--model (\S+)", block.code):
                assert model in get_args(ImageModel)


def facts() -> Iterator[tuple[str, str]]:
    """Yield where a limit stands, and how it reads there."""
    g, api, cli = image_gen, "references/image-api.md", "references/cli.md"
    *sizes, last = g.OLD_SIZES[:-1]
    yield api, f"The fixed sizes are {' '.join(sizes)} and {last}"
    yield api, f"both edges multiples of {g.EDGE_STEP},"
    yield api, f"at most {g.MAX_EDGE} and at most {g.MAX_ASPECT} times the shorter"
    yield api, f"{g.MIN_PIXELS:,} to {g.MAX_PIXELS:,} pixels; above 2560x1440"
    yield api, f"| 1 to {g.MAX_PROMPT_CHARACTERS:,} characters |"
    for key, (low, high) in g.RANGES.items():
        if key in g.PAYLOAD_KEYS:
            yield api, f"| `{key}` | {low} to {high:,} |"
        else:
            yield cli, f", {low} to {high:,} |"
    yield api, f"| `output_format` | {', '.join(g.FORMATS)} |"
    compressing = [name for name, row in g.FORMATS.items() if row.compresses]
    yield api, f"| 0 to 100 | {' and '.join(compressing)} only |"
    yield api, f"| `background` | {', '.join(g.BACKGROUNDS)} |"
    yield api, f"| `moderation` | {', '.join(g.MODERATIONS)} |"
    yield api, f"| `complexity` | {', '.join(g.COMPLEXITIES)} |"
    yield api, f"| `input_fidelity` | {', '.join(g.FIDELITIES)} |"
    yield api, f"Up to {g.MAX_IMAGES} images"
    yield api, f"smaller than {g.MAX_IMAGE_BYTES >> 20} MB ({g.MAX_IMAGE_BYTES:,} bytes)"
    yield api, f"less than {g.MAX_MASK_BYTES >> 20} MB ({g.MAX_MASK_BYTES:,} bytes)"
    yield api, f"within {g.SHUT_DOWN_NOTICE_DAYS} days"
    yield api, ", ".join(f"`{code}`" for code in g.NO_MONEY_CODES)
    yield api, "Facts read on 2026-11-22"
    yield api, f"Each draft of a stream adds {g.DRAFT_TOKENS} tokens"
    yield api, f"to ${g.INPUT_IMAGE_DOLLARS}"
    yield cli, f"a token for {g.PROMPT_BYTES} bytes of prompt and ${g.INPUT_IMAGE_DOLLARS} for"
    yield cli, f"prices of {g.PRICES_DATE}"
    yield cli, f"A seam of {g.SEAM_PIXELS} pixels"
    yield cli, f"the aspect of the input within {g.MATCHING:.0%}".replace("%", " %")
    yield cli, f"above {g.MAX_COPY_PIXELS:,} pixels"
    yield api, f"An answer may have {g.MAX_ANSWER_BYTES >> 20} MB for each image"
    yield api, f"of an error {g.MAX_ERROR_BYTES >> 20} MB is read"
    yield api, f"at most {g.MAX_REDIRECTS} redirects"
    yield api, f"within `--timeout`, up to {g.MAX_ANSWER_BYTES >> 20} MB"
    *statuses, last_status = map(str, g.LOST_ANSWER_STATUSES)
    yield api, f"after {', '.join(statuses)} and {last_status} it may have done the work"
    yield cli, f"openai ({g.OLDEST['openai']} or newer), and pillow ({g.OLDEST['pillow']} or newer)"
    yield cli, f"requests in flight, 1 to {g.MAX_CONCURRENCY} |"
    yield cli, f"when network or server fail, 1 to {g.MAX_ATTEMPTS} |"
    yield cli, f"at most {g.MAX_JOBS} lines with jobs, or {g.MAX_BATCH_API_JOBS:,} with"
    yield api, f"up to {g.MAX_BATCH_LINES:,} requests or a file of {g.MAX_BATCH_BYTES // 10**6} MB"
    yield cli, f"names of at most {g.MAX_NAME_BYTES} bytes"
    yield cli, f"stands in `{g.STATE_NAME}`"
    *suffixes, last = g.SUFFIX_FORMATS
    yield cli, f"A name that ends with {' '.join(suffixes)} or {last} decides the format"
    yield cli, f"| `--edge-contract 0-{remove_chroma_key.MAX_EDGE_CONTRACT}` |"
    yield cli, f"| `--edge-feather 0-{remove_chroma_key.MAX_EDGE_FEATHER:g}` |"
    for setting in (remove_chroma_key.AUTO_KEYS, remove_chroma_key.SUBJECTS):
        for value in setting:
            yield cli, f"`{value}`"


@pytest.mark.parametrize(("page", "fact"), [*facts()])
def test_every_limit_reads_as_the_constants_have_it(page: str, fact: str) -> None:
    assert re.sub(r"\W+", " ", fact) in re.sub(r"\W+", " ", prose(page))


@pytest.mark.parametrize(
    "number", ["8,294,400", "655,360", "32,000", "52,428,800", "90 days", "2026-12-01", "308"]
)
def test_a_number_stands_on_one_page(number: str) -> None:
    assert [page for page in TEXT if number in TEXT[page]] == ["references/image-api.md"]


def test_the_exit_codes_are_those_of_help() -> None:
    codes = re.findall(r"^  (\d+)", image_gen.EXIT_CODES, re.MULTILINE)
    assert first_cells("references/cli.md", "Exit codes") == codes
    assert first_cells("README.md", "Exit codes") == codes
    of_the_other = remove_chroma_key.build_parser().format_help().rpartition("Exit codes:")[2]
    assert re.findall(r"(\d+) ", of_the_other) == [code for code in codes if code not in "34"]


# ------------------------------------------------------------------------------------ the records


def test_the_record_has_the_keys_of_its_tables(run: Run, api: ImagesAPI) -> None:
    heading = "The `--json` record"
    api.script(moderation_blocked())
    failed = run("generate", "--prompt", "x", "--json").json
    done = run("generate", "--prompt", "x", "--json").json
    assert [list(done), list(failed)] == [first_cells("references/cli.md", heading)] * 2
    assert list(done["outputs"][0]) == first_cells("references/cli.md", heading, 1)
    assert list(failed["error"]) == first_cells("references/cli.md", heading, 2)


def test_the_dry_run_has_the_keys_of_its_table(run: Run) -> None:
    draw_inputs("references/cli.md")
    job = {"prompt": "x", "image": "room.png", "mask": "mask.png", "keep_unmasked": True}
    Path("jobs.jsonl").write_text(json.dumps(job))
    dry = run("generate-batch", "--input", "jobs.jsonl", "--out-dir", "out", "--dry-run").json
    parameters = {key for key in dry if key in image_gen.PAYLOAD_KEYS}
    shown = " ".join(first_cells("references/cli.md", "Dry run"))
    assert set(dry) - parameters == set(re.findall(r"\w+", shown)) - {"markup"}


def test_the_kinds_of_failure_are_those_of_the_program() -> None:
    source = (SCRIPTS / "image_gen.py").read_text(encoding="utf-8")
    tables = (image_gen.VERDICT_BY_CODE, image_gen.VERDICT_BY_STATUS, image_gen.VERDICT_BY_SERIES)
    verdicts = [verdict for table_ in tables for verdict in table_.values()]
    kinds = {kind for _, kind in verdicts} | {"server", "invalid_request"}
    kinds |= set(re.findall(r'Failure\(\s*"(\w+)"', source))
    kinds |= set(re.findall(r'(?:kind ?= ?|code"\) or )"(\w+)"', source))
    kinds |= {"timeout", "connection"}
    kinds |= {f"batch_{status}" for status in image_gen.ENDED if status != "completed"}
    shown = [row[-1].strip("`") for row in table("references/image-api.md", "Errors")]
    cells = first_cells("references/cli.md", "The `--json` record", 3)
    shown += re.findall(r"\w+", " ".join(cells))
    shown.remove("quota")  # which has two rows: 402, and codes of 429
    assert sorted(shown) == sorted(kinds)


def test_the_record_of_the_key_remover_has_the_keys_of_its_table(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (8, 8), "#00ff00").save("key.png")
    assert remove_chroma_key.main(["--input", "key.png", "--out", "cut.png", "--json"]) == 0
    record: dict[str, Any] = json.loads(capfd.readouterr().out)
    assert list(record) == first_cells("references/cli.md", "remove_chroma_key.py", 2)


# ------------------------------------------------------------------------------------- the pages


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", unfenced(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXT)
def test_every_link_and_file_name_leads_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(str(path.relative_to(ROOT))), target
    named = re.findall(r"(?<![\w/.])(?:scripts|tests|references)/[\w./-]*\w", TEXT[page])
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_skill_is_accepted_by_the_validator(tmp_path: Path) -> None:
    skills_ref = importlib.import_module("skills_ref")
    folder = tmp_path / "imagegen"
    folder.symlink_to(ROOT)
    assert skills_ref.validate(folder) == []


def test_the_pages_keep_to_their_lengths() -> None:
    skill = TEXT["SKILL.md"]
    assert len(skill.splitlines()) < 170
    assert len(re.findall(r"\w+|[^\w\s]", skill)) < 5000  # every word and every sign a token
    assert len(TEXT["README.md"].splitlines()) < 200


def test_the_skill_names_every_reference_and_when_to_read_it() -> None:
    listed = re.findall(r"^- `(references/[\w-]+\.md)`: \w", TEXT["SKILL.md"], re.MULTILINE)
    assert sorted(listed) == sorted(page for page in TEXT if page.startswith("references/"))


def test_there_is_a_sample_for_every_use_case() -> None:
    page = "references/sample-prompts.md"
    found = [
        block.heading.removeprefix("### ")
        for block in blocks(page, "bash")
        if f"--use-case {block.heading.removeprefix('### ')} " in block.code
    ]
    assert found == USE_CASES
    listed = first_cells(page, "Sample prompts") + first_cells(page, "Sample prompts", 1)
    assert [cell[1 : cell.index("]")] for cell in listed] == USE_CASES


def test_the_pictures_of_the_readme_are_small() -> None:
    for path in (ROOT / "references/pictures").iterdir():
        assert os.path.getsize(path) < 60_000, path
