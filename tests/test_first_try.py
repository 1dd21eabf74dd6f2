"""What a newcomer or an agent does at the first try: other files, other flags, other names."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from subprocess import run as shell_run
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import pytest
from cli import SCRIPTS, finished
from images_api import image_bytes, redrawn
from inputs import FLARE, encoded, picture
from PIL import Image
from queue_api import GOES_ON, made, queued

if TYPE_CHECKING:
    from cli import Run
    from images_api import ImagesAPI
    from inputs import Job

RED, BLUE = "A red kite", "A blue kite, with a long tail"


def shown(run: Run, content: str | bytes, name: str = "jobs.txt") -> list[str]:
    """The prompts of a dry run of a file, without their label."""
    data = content if isinstance(content, bytes) else content.encode()
    Path(name).write_bytes(data)
    argv = ("generate-batch", "--input", name, "--out-dir", "out", "--dry-run", "--json")
    result = run(*argv, "--no-augment")
    assert result.exit_code == 0, result.stderr
    return [line["prompt"] for line in result.json_lines]


def refusal(run: Run, content: str | bytes, name: str = "jobs.txt") -> str:
    """The one line that refuses a file."""
    data = content if isinstance(content, bytes) else content.encode()
    Path(name).write_bytes(data)
    return dry.problem(run("generate-batch", "--input", name, "--out-dir", "out", "--dry-run"))


# Files that are no jobs

FOREIGN = {
    "CSV": [
        f'prompt,size\n{RED},1024x1024\n"{BLUE}",1024x1024\n',
        f'\ufeffPrompt,Size\r\n{RED},1024x1024\r\n"{BLUE}",1024x1024\r\n',
        f'prompt;size\n{RED};1024x1024\n"{BLUE}";\n',
        f"prompt\n{RED}\n{BLUE}\n",
        f'prompt,quality\n"{RED}",low\n"A blue kite\nover dunes",low\n',
        f'id;prompt\n1;{RED}\n2;"{BLUE}"\n',
        f"name\tprompt\ta\nx\t{RED}\tb\ny\t{BLUE}\tb\n",
        f"Prompt (EN),Size (px)\n{RED},auto\nAn owl,auto\n",
        f"id|image_prompt\n1|{RED}\n2|An owl\n",
        f"Nr;Motiv;Ort\n1;{RED};Kiel\n2;{BLUE};Bern\n",
        f"Dateiname,Beschreibung\na.png,{RED}\nb.png,An owl\n",
        f"编号,提示词\n1,{RED}\n2,An owl\n",
        f",prompt,size\n0,{RED},auto\n1,An owl,auto\n",
        f'"{RED}","auto"\n"{BLUE}","auto"\n',
        f"sep=;\nprompt;size\n{RED};auto\n",
    ],
    "YAML": [
        f"- prompt: {RED}\n  size: 1024x1024\n- prompt: {BLUE}\n",
        f"---\nprompts:\n  - {RED}\n",
        f"prompts:\n- {RED}\n- {BLUE}\n",
        f'- "prompt": "{RED}"\n  "size": auto\n',
        f"- prompt: |\n    {RED}\n    over dunes\n",
        f"prompt: {RED}\nsize: 1024x1024\n",
    ],
    "a Markdown list": [
        f"- {RED}\n- {BLUE}\n",
        f"# Kites\n\n* {RED}\n* {BLUE}\n",
        f"Here they are:\n\n1. {RED}\n2. {BLUE}\n3. An owl\n",
        f"- 一只狐狸\n- {BLUE}\n",
        f"- [ ] {RED}\n- [x] {BLUE}\n",
        f"# Kites\n- {RED}\n",
        f"• {RED}\n• {BLUE}\n",
        f"- {RED}\n  over dunes\n- {BLUE}\n  at noon\n",
        f"1、{RED}\n2、{BLUE}\n",
    ],
    "a Markdown table": [
        f"| prompt | size |\n|---|---|\n| {RED} | auto |\n",
        f"Here:\n\nprompt | size\n--- | ---\n{RED} | auto\n",
        f"| prompt | size |\n| {RED} | auto |\n",
    ],
    "HTML or XML": [f"<!DOCTYPE html>\n<p>{RED}</p>\n", f"<svg>\n<text>{RED}</text></svg>\n"],
    "lines that end with CR": [f"{RED}\r{BLUE}\r"],
    "JSON over several lines": [
        f'[\n  "{RED}",\n  "{BLUE}"\n]\n',
        f'[\n{{"prompt": "{RED}"}}\n]\n',
        f'[{{"prompt": "{RED}"}},\n {{"prompt": "{BLUE}"}}]\n',
        f'{{\n  "prompt": "{RED}",\n  "size": "auto"\n}}\n',
        f'{{\n  "jobs": [\n{{"prompt": "{RED}"}},\n"{BLUE}"\n]\n}}\n',
        f'\ufeff[\n "{RED}"\n, "{BLUE}"\n]\n',
    ],
    "TOML": [
        f'[hero]\nprompt = "{RED}"\n\n[foot]\nprompt = "{BLUE}"\n',
        f'[[jobs]]\nprompt = "{RED}"\nsize = "auto"\n[[jobs]]\nprompt = "{BLUE}"\n',
        f'prompt = "{RED}"\nsize = "auto"\n',
    ],
    "a list of a program": [
        f'prompts = [\n    "{RED}",\n    r"{BLUE}",  # "1"\n]\n'.replace('"1"', "1"),
        f'"{RED}",\n"{BLUE}"\n',
    ],
    "a list in single quotes": [f"const prompts: string[] = [\n  '{RED}'\n]\n"],
    "a script": [f'#!/bin/sh\nimage_gen.py generate --prompt "{RED}"\n'],
    "a code fence": [
        f'```jsonl\n{{"prompt": "{RED}"}}\n```\n',
        f"```\n{RED}\n```\n",
        f'Here are the jobs:\n\n~~~\n"{RED}"\n~~~\n',
    ],
}


@pytest.mark.parametrize(
    ("kind", "content"),
    [(kind, content) for kind, contents in FOREIGN.items() for content in contents],
)
def test_a_file_of_another_kind_is_refused_in_one_line_with_the_way_to_jsonl(
    run: Run, kind: str, content: str
) -> None:
    said = refusal(run, content)
    assert said.startswith(f"--input jobs.txt looks like {kind}; a job a line is wanted, ")
    assert len(said) < 480


WAYS = [
    *[("CSV", content) for content in FOREIGN["CSV"][:5]],
    *[
        (kind, each)
        for kind in (
            "JSON over several lines",
            "a code fence",
            "TOML",
            "a list of a program",
            "a list in single quotes",
        )
        for each in FOREIGN[kind]
    ],
    *[("a Markdown list", content) for content in FOREIGN["a Markdown list"]],
    *[("lines that end with CR", content) for content in FOREIGN["lines that end with CR"]],
]


@pytest.mark.parametrize(
    ("name", "kind", "content"),
    [
        *[("jobs.jsonl", *way) for way in WAYS],
        *[("my 'list'.txt", kind, FOREIGN[kind][0]) for kind in dict(WAYS)],
    ],
)
def test_the_way_to_jsonl_is_one_and_leaves_the_file_alone(
    run: Run, kind: str, content: str, name: str
) -> None:
    """The command of the message, as a shell runs it."""
    said = refusal(run, content, name)
    way = said.partition("as a JSON string): ")[2]
    way = way.replace("python -c", f"{sys.executable} -c")
    ended = shell_run(["sh", "-c", way], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, (kind, ended.stderr)
    assert Path(name).read_bytes() == content.encode()
    (made,) = [each for each in os.listdir() if each != name]
    prompts = shown(run, Path(made).read_bytes(), made)
    kites = {
        f"{RED} over dunes",
        f"{BLUE} at noon",
        RED,
        BLUE,
        "一只狐狸",
        "An owl",
        "A blue kite\nover dunes",
    }
    assert prompts
    assert set(prompts) <= kites


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{RED}\n{BLUE}\n".encode("utf-16"), "UTF-16 or UTF-32; "),
        (f"{RED}\n{BLUE}\n".encode("utf-16-le"), "UTF-16 or UTF-32; "),
        (f"{RED}\n{BLUE}\n".encode("utf-16-be"), "UTF-16 or UTF-32; "),
        (f"{RED}\n{BLUE}\n".encode("utf-32"), "UTF-16 or UTF-32; "),
        (encoded(Image.new("RGB", (64, 64))), "no text; "),
        (encoded(Image.new("RGB", (64, 64)), "jpeg"), "no text; "),
        (b"PK\x03\x04 a spreadsheet", "no text; "),
    ],
    ids=["utf-16", "little", "big", "utf-32", "png", "jpeg", "xlsx"],
)
def test_a_file_that_is_no_utf_8_text_is_refused(run: Run, content: bytes, says: str) -> None:
    assert refusal(run, content).startswith(f"--input jobs.txt looks like {says}")


@pytest.mark.parametrize(
    "lines",
    [
        ["// not a comment", RED, BLUE],
        ["3:1", RED],
        ["- one kite alone"],
        ["[noir] a man in the rain", "[noir] a dog, waiting]"],
        ["fox,snow", "owl,night"],
        ["A fox, an owl, a hare", "A red kite, dunes, wind", "Rain, a tram, gouache"],
        ["Style: gouache. A tram stop", "An owl", "A hare"],
        ['{"prompt": "a"}', '"b"', "c"],
        ["1. one kite", RED, BLUE],
        ["A table | of contents", "| odd", RED],
        ["``a quoted word``", RED],
        ["style: gouache, a tram", "style: oil, an owl"],
        ["watercolor: a tram", "portrait: an owl", "landscape: a bay"],
        ["int: a bar", "ext: a street"],
        [RED, "---", BLUE],
        ["fox\tsnow", "owl\tnight"],
        ["狐狸;雪", "猫头鹰;夜"],
        ["mask", "A venetian carnival"],
        ["text", "An owl"],
        ["[wide shot],", "a fox,", "an owl,", "a hare}"],
        ["| fox |", "| owl |"],
        ["RIFF raff on a stage"],
        ["GIF89 nostalgia"],
        ["A text on a wall, a title, a name", "An owl, a hare, a fox"],
        ["A wooden texture,seamless", "A stone texture,seamless"],
        ['"Tiger, tiger,"', "In the forests,", '"What immortal hand",', "or eye"],
        ["mood = [", RED],
        ["16: 9 frame of a fox", "4: 3 frame of a dog"],
        ["12: noon, a square", "18: evening, a square"],
        ["| o | x |", "| x | o |", "a caption"],
        ["[portrait]", "prompt = who is there, a neon sign", RED],
    ],
    ids=lambda lines: lines[0],
)
def test_odd_lines_stay_prompts(run: Run, lines: list[str]) -> None:
    assert len(shown(run, "\n".join(lines))) == len(lines)


@pytest.mark.parametrize(
    "mark",
    ["\ufeff", "\u200b", "\u2060", "\ufeff\u200b \ufeff", "\u00ad", "\u202a", "\u2066", "\x01"],
)
def test_what_nobody_sees_is_dropped_at_the_start_of_every_line(run: Run, mark: str) -> None:
    job = json.dumps({"prompt": RED})
    assert shown(run, f"{mark}{job}\r\n{mark}{job}\r\n{mark}{BLUE}\r\n") == [RED, RED, BLUE]


@pytest.mark.parametrize("charset", ["cp1252", "gb18030", "cp932"])
def test_a_table_in_another_encoding_is_first_to_be_converted(run: Run, charset: str) -> None:
    prompt = "Füchse" if charset == "cp1252" else "一匹の狐"
    Path("jobs.csv").write_bytes(f"prompt;size\n{prompt};auto\n".encode(charset))
    argv = ("generate-batch", "--input", "jobs.csv", "--out-dir", "out", "--dry-run")
    said = dry.problem(run(*argv))
    assert said.startswith("line 2: is not UTF-8 (")
    assert "iconv -f CP1252 -t UTF-8 (Chinese: GB18030, Japanese: CP932)" in said


def test_the_way_to_jsonl_lies_beside_the_file_and_takes_no_name_that_is_taken(run: Run) -> None:
    Path("tmp").mkdir()
    Path("tmp/kites-jobs.txt").write_text("mine")
    assert refusal(run, f"- {RED}\n- {BLUE}\n", "tmp/kites.md").endswith(
        "tmp/kites.md > tmp/kites-jobs1.txt"
    )


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("filename", "out"),
        ("negative_prompt", "negative"),
        ("width", "size"),
        ("Format", "output_format"),
    ],
)
def test_a_key_of_another_program_is_told_its_name_here(run: Run, key: str, meant: str) -> None:
    assert f'unknown key "{key}" (did you mean "{meant}"?)' in dry.problem(
        dry.batch(run, {"prompt": "x", key: "y"})
    )


def test_jobs_come_from_standard_input_and_the_run_is_repeated_by_piping_again(
    run: Run, api: ImagesAPI
) -> None:
    argv = ("generate-batch", "--input", "-", "--out-dir", "out")
    assert run(*argv, stdin=b"a fox\n").exit_code == 0
    again = run(*argv, "--skip-existing", stdin=b"a fox\nan owl\n")
    assert (again.exit_code, len(api.requests)) == (0, 2)
    assert "FILE" in dry.problem(run(*argv, "--dry-run", stdin=b"- a\n- b\n"))


# Names


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("一只红色的狐狸", "001-一只红色的狐狸.png"),
        ("雪中的狐狸，水彩", "001-雪中的狐狸-水彩.png"),
        ("Лиса в снегу", "001-лиса-в-снегу.png"),
        ("बर्फ में लोमड़ी", "001-बर्फ-में-लोमड़ी.png"),
        ("!!!", "001-job.png"),
        ("🦊", "001-job.png"),
        ("❤️ ☀️", "001-job.png"),
        ("狐" * 90, f"001-{'狐' * 60}.png"),
        ("𓃬" * 90, f"001-{'𓃬' * 45}.png"),
        ("Fuchs 狐", "001-fuchs.png"),
    ],
)
def test_a_prompt_of_another_script_has_a_name_that_tells(
    run: Run, api: ImagesAPI, prompt: str, name: str
) -> None:
    assert run(*live.batch([prompt])).exit_code == 0
    assert live.names() == [name]
    assert run(*live.batch([prompt], "--skip-existing")).exit_code == 0
    assert len(api.requests) == 1


def test_a_contact_sheet_shows_what_the_font_lacks_as_escapes(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(image_gen, "SYSTEM_FONTS", ())
    captions = image_gen.Captions()
    text, font = captions.choose("1 狐.png")
    assert (text, font) == ("1 \\u72d0.png", captions.fonts[0])
    assert captions.choose("1 Foxes.png")[0] == "1 Foxes.png"
    assert run(*live.batch(["狐", "a fox"], "--contact-sheet", "sheet.png")).exit_code == 0
    assert len(api.requests) == 2


def test_a_font_of_the_system_is_taken_where_it_has_the_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any font file will do here: Pillow's own stands for that of the system."""
    monkeypatch.setenv("PATH", "")
    captions = image_gen.Captions()
    own = captions.fonts[0]
    lacks = captions.lacks
    monkeypatch.setattr(
        captions, "lacks", lambda font, text: lacks(font, text) if font is own else []
    )
    Path("system.ttf").write_bytes(own.font_bytes)
    monkeypatch.setattr(image_gen, "SYSTEM_FONTS", ("nowhere.ttf", "system.ttf"))
    text, font = captions.choose("狐")
    assert (text, font is own) == ("狐", False)
    assert captions.choose("狸")[1] is font


def test_a_name_works_where_the_locale_is_ascii(api: ImagesAPI) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [
        sys.executable,
        str(SCRIPTS / "image_gen.py"),
        *live.generate(prompt="füchse", out="狐.png"),
    ]
    ended = finished(words, env=env)
    assert ended.exit_code == 0, ended.stderr
    assert Path("狐.png").exists()
    assert api.requests[0].prompt.endswith("füchse")


def test_a_cut_out_is_named_as_it_is_where_the_locale_is_ascii() -> None:
    Image.new("RGB", (32, 32), "#00ff00").save("狐.png")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = str(SCRIPTS / "remove_chroma_key.py")
    words = [sys.executable, script, "--input", "狐.png", "--out", "狸.png", "--json"]
    ended = finished(words, env=env)
    assert ended.exit_code == 0, ended.stderr
    assert (ended.json["output"], Path("狸.png").exists()) == ("狸.png", True)


def test_a_batch_that_waits_under_former_names_is_collected(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other scripts were called job before their letters stood in names."""
    api.plan_batch(GOES_ON)
    with monkeypatch.context() as patch:
        patch.setattr(image_gen, "slugify", lambda _: "job")
        assert run(*queued(["狐", "狸"], "--no-wait")).exit_code == 3
    api.batches[0].states.append("completed")
    result = run(*queued(["狐", "狸"], "--no-wait"))
    assert (result.exit_code, len(api.batches)) == (0, 1), result.stderr
    assert made() == ["001-狐.png", "002-狸.png"]


# Flags


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("generate", ["--format", "png"], 'unknown "--format": did you mean --output-format?'),
        ("generate", ["--output", "a.png"], 'unknown "--output": did you mean --out?'),
        ("generate", ["--width=512"], 'unknown "--width": did you mean --size?'),
        ("generate", ["--seed", "1"], 'unknown "--seed": the API has none; '),
        ("generate", ["--api-key=sk-abcdef"], 'unknown "--api-key": set OPENAI_API_KEY in'),
        ("generate-batch", ["--workers", "4"], "did you mean --concurrency?"),
        ("generate-batch", ["--skip"], "did you mean --skip-existing?"),
        ("generate-batch", ["--budget", "4"], "did you mean --max-cost?"),
        ("generate", ["--steps", "4"], 'unknown "--steps": no such flag'),
        ("generate", ["--forced"], 'unknown "--forced": no such flag'),
        ("generate", ["--Size", "4"], "did you mean --size?"),
        ("generate", ["--images", "2"], 'unknown "--images": did you mean --n?'),
        ("edit", ["--images", "a.png"], 'unknown "--images": did you mean --image?'),
        ("generate", ["a fox"], 'unknown "a fox": did you mean --prompt?'),
        ("generate", ["kite.png"], 'unknown "kite.png": did you mean --out?'),
        ("edit", ["b.png"], 'unknown "b.png": repeat --image for each file'),
        ("generate", ["--qualty", "low"], 'unknown "--qualty": did you mean --quality?'),
        ("generate", ["--negative_prompt", "x"], "did you mean --negative?"),
        ("generate-batch", ["--output", "x"], "did you mean --out-dir?"),
        ("generate-batch", ["jobs.jsonl"], "did you mean --input?"),
    ],
)
def test_a_flag_that_is_nearly_right_is_told_the_right_one(
    run: Run, command: str, words: list[str], says: str
) -> None:
    picture("a.png")
    given = {
        "generate": ["--prompt", "x"],
        "edit": ["--prompt", "x", "--image", "a.png"],
        "generate-batch": ["--input", "j", "--out-dir", "o"],
    }
    problem = dry.problem(run(command, *given[command], *words))
    assert says in problem
    assert problem.endswith(f" {command} --help lists what is accepted)")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["genrate", "--prompt", "x"], "did you mean generate?"),
        (
            ["--model", "x", "generate"],
            "the first word has to be generate or edit or generate-batch",
        ),
        (["a red fox"], "the first word has to be generate or edit or generate-batch"),
        (["edit", "--images", "a.png", "--prompt", "x"], "did you mean --image?"),
        (["generate", "--prompt", "--nonsense"], "expected one argument"),
    ],
)
def test_what_is_wrong_is_told_before_what_is_missing(
    run: Run, words: list[str], says: str
) -> None:
    assert says in dry.problem(run(*words))


def test_a_flag_that_nobody_knows_is_refused_without_a_guess(run: Run) -> None:
    problem = dry.problem(run("generate", "--prompt", "x", "--zzzzqqqq"))
    assert problem.startswith('unknown "--zzzzqqqq": no such flag (')


@pytest.mark.parametrize("command", list(image_gen.COMMANDS))
def test_help_is_one_page_that_begins_with_what_is_used_most(run: Run, command: str) -> None:
    page = run(command, "--help").stdout.splitlines()
    assert len(page) <= 110
    assert max(map(len, page)) <= 105
    first = {"generate": "--prompt", "edit": "--prompt", "generate-batch": "--input"}[command]
    assert any(first in line for line in page[:10])


def test_help_of_a_batch_lists_the_keys_of_a_line(run: Run) -> None:
    page = run("generate-batch", "--help").stdout
    listed = page.partition("keys of a JSON object")[2].partition("exit codes")[0]
    keys = set(listed.replace(",", " ").split())
    assert set(image_gen.JOB_KEYS) <= keys


@pytest.mark.parametrize(
    ("asked", "told"),
    [("16:9", "2048x1152"), ("1:1", "1536x1536"), ("9/16", "1152x2048"), ("50:1", "2640x880")],
)
def test_an_aspect_instead_of_a_size_is_told_a_size(run: Run, asked: str, told: str) -> None:
    assert dry.problem(dry.generate(run, "--size", asked)).endswith(f"e.g. {told}")
    assert dry.warnings(dry.generate(run, "--size", told)) == []


def test_a_suffix_that_is_not_made_is_refused_with_one_that_is(run: Run) -> None:
    problem = dry.problem(dry.generate(run, "--out", "Favicon.ICO"))
    assert problem == "the name Favicon.ICO: no .ICO is made; call it Favicon.png, and convert that"


def test_an_input_that_is_an_address_is_told_to_be_downloaded(run: Run) -> None:
    problem = dry.problem(dry.edit(run, image="https://example.org/room.png"))
    assert problem.endswith("room.png is an address; download it, and give the file")


@pytest.mark.parametrize("flags", [("--out", "-"), ("--out-dir", "-"), ("--contact-sheet", "-")])
def test_standard_output_is_no_place_for_an_image(run: Run, flags: tuple[str, ...]) -> None:
    problem = dry.problem(run("generate", "--prompt", "x", *flags, "--dry-run"))
    assert "cannot be standard output, which names files; give a name" in problem


# Models


@pytest.mark.parametrize("model", ["openai/gpt-image-2", "azure/openai/gpt-image-2"])
def test_a_vendor_may_stand_before_a_model(run: Run, model: str) -> None:
    result = dry.generate(run, "--model", model, "--size", "1024x1024")
    assert (dry.document(result)["model"], dry.warnings(result)) == (model, [])
    assert result.stderr.startswith("about $0.053 for 1 image")
    refused = dry.generate(run, "--model", model, "--background", "transparent")
    assert "is not supported by" in dry.problem(refused)


def test_a_model_that_ends_is_told_all_that_follow_it(run: Run) -> None:
    (said,) = dry.warnings(dry.generate(run, "--model", "gpt-image-1"))
    assert "gpt-image-2.6-sunburst, gpt-image-2.6-flare, gpt-image-2.5-sunburst" in said


@pytest.mark.parametrize(
    ("model", "warned"), [("gpt-image-2.6-flare", True), ("gpt-image-3", True), (FLARE, False)]
)
def test_transparency_is_warned_of_where_a_model_is_not_known_to_have_it(
    run: Run, model: str, *, warned: bool
) -> None:
    result = dry.generate(run, "--model", model, "--background", "transparent")
    assert any("is not known to have it" in said for said in dry.warnings(result)) == warned


@pytest.mark.parametrize(
    ("size", "frames", "warned"),
    [
        ("480x480", 9, False),
        ("960x960", 9, False),
        ("1024x1024", 9, True),
        ("816x816", 12, False),
        ("960x960", 12, True),
        ("720x720", 16, False),
        ("736x736", 16, True),
        ("auto", 9, False),
    ],
)
def test_a_gif_has_no_size_rule_of_ours(run: Run, size: str, frames: int, *, warned: bool) -> None:
    gif = ("--model", FLARE, "--output-format", "gif")
    result = dry.generate(run, *gif, "--size", size, "--frame-count", str(frames))
    assert any("was refused above" in said for said in dry.warnings(result)) == warned
    assert dry.document(result)["size"] == size


# Smaller things


def test_variants_have_a_contact_sheet_too(run: Run, api: ImagesAPI) -> None:
    flags = ("--n", "3", "--contact-sheet", "sheet.png")
    assert run(*live.generate(*flags)).exit_code == 0
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 500
    assert len(api.requests) == 1


@pytest.mark.parametrize("kind", ["webp", "jpeg", "jpg", "png"])
def test_a_copy_may_have_a_format_of_its_own(run: Run, api: ImagesAPI, kind: str) -> None:
    suffix = "jpg" if kind.startswith("jp") else kind
    flags = ("--downscale-max-dim", "32", "--downscale-format", kind)
    shown = dry.document(run(*live.generate(*flags, "--dry-run")))
    assert shown["outputs_downscaled"] == [f"fox-web.{suffix}"]
    result = run(*live.generate(*flags, "--json"))
    (copy,) = result.json["outputs_downscaled"]
    assert (copy["path"], copy["format"]) == (f"fox-web.{suffix}", dry_format(suffix))
    before = Path(copy["path"]).stat().st_mtime_ns
    assert run(*live.generate(*flags, "--skip-existing")).exit_code == 0
    assert (Path(copy["path"]).stat().st_mtime_ns, len(api.requests)) == (before, 1)


def dry_format(suffix: str) -> str:
    return "jpeg" if suffix == "jpg" else suffix


def test_a_copy_has_the_format_that_was_asked_for_whatever_came(run: Run, api: ImagesAPI) -> None:
    api.script(redrawn("WEBP"))
    flags = ("--downscale-max-dim", "32", "--downscale-format", "png", "--json")
    (copy,) = run(*live.generate(*flags)).json["outputs_downscaled"]
    assert (copy["path"], copy["format"]) == ("fox-web.png", "png")


def test_a_huge_answer_is_not_unpacked_to_look_for_alpha(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_gen, "MAX_COPY_PIXELS", 1000)
    api.script(image_bytes(lambda _: encoded(Image.new("RGBA", (64, 64), (1, 2, 3, 255)))))
    flags = ("--model", FLARE, "--background", "transparent", "--json")
    (image,) = run(*live.generate(*flags)).json["outputs"]
    assert image["alpha"] is True


def test_a_small_image_is_converted_too(run: Run, api: ImagesAPI) -> None:
    flags = ("--downscale-max-dim", "500", "--downscale-format", "webp")
    assert run(*live.generate(*flags)).exit_code == 0
    assert Path("fox-web.webp").read_bytes()[8:12] == b"WEBP"
    assert live.size_of("fox-web.webp") == (64, 64)
    assert len(api.requests) == 1


def test_a_format_of_copies_needs_copies(run: Run) -> None:
    problem = dry.problem(dry.generate(run, "--downscale-format", "webp"))
    assert problem == "--downscale-format needs --downscale-max-dim"


def test_what_stands_above_the_guard_is_there_in_old_pythons() -> None:
    """An import that Python 3.8 does not have would come before the sentence on its version."""
    text = (SCRIPTS / "image_gen.py").read_text(encoding="utf-8")
    above = ast.parse(text.partition("if sys.version_info")[0])
    names = {
        f"{node.module}.{alias.name}"
        for node in above.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    newer = {"contextlib.aclosing", "contextlib.chdir", "itertools.pairwise", "itertools.batched"}
    newer |= {"datetime.UTC", "enum.StrEnum", "functools.cache", "typing.Self", "typing.TypeAlias"}
    assert names & newer == set()


@pytest.mark.parametrize("kind", ["gif", "svg", "bmp"])
def test_a_copy_has_one_of_three_formats(run: Run, kind: str) -> None:
    flags = ("--downscale-max-dim", "32", "--downscale-format", kind)
    assert "accepted are png, jpeg, webp" in dry.problem(dry.generate(run, *flags))


@pytest.mark.parametrize(("alpha", "found"), [(255, False), (254, True)])
def test_an_alpha_that_is_opaque_everywhere_is_none(
    run: Run, api: ImagesAPI, alpha: int, *, found: bool
) -> None:
    api.script(image_bytes(lambda _: encoded(Image.new("RGBA", (64, 64), (1, 2, 3, alpha)))))
    flags = ("--model", FLARE, "--background", "transparent", "--json")
    result = run(*live.generate(*flags))
    (image,) = result.json["outputs"]
    assert (result.exit_code, image["alpha"]) == (0, found)
    assert ("an image that is opaque everywhere" in result.stderr) != found
    (image,) = run(*live.generate(*flags, "--skip-existing")).json["outputs"]
    assert (image["alpha"], len(api.requests)) == (found, 1)


def test_a_batch_of_jobs_from_a_list_in_two_languages(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = ["一只狐狸", "Ein Fuchs im Schnee"]
    assert run(*live.batch(jobs)).exit_code == 0
    assert live.names() == ["001-一只狐狸.png", "002-ein-fuchs-im-schnee.png"]
    assert len(api.requests) == 2
