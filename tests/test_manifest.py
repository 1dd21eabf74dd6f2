"""What a folder remembers: which request made which image, however its file of jobs is edited."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import pytest
import queue_api
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from images_api import (
    forbidden,
    html,
    image_bytes,
    insufficient_quota,
    moderation_blocked,
    no_data,
    server_error,
    status,
    unauthorized,
    unknown_model,
)
from inputs import FLARE, Json, encoded, picture
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cli import Result, Run
    from images_api import ImagesAPI, Reply, Request
    from inputs import Job

RESUME = "--skip-existing"
REMAKE = "--remake"
FOX = {"prompt": "a fox", "out": "castle.png", "size": "1024x1024"}
HARE = FOX | {"prompt": "a hare"}
ALIKE = [f"A walnut desk radio on a white seamless background, from the {side}" for side in "abc"]


def unique_images(api: ImagesAPI) -> None:
    """No two answers bring the same bytes, as with a model."""
    numbers = count()

    def with_number(data: bytes) -> bytes:
        text = b"tEXtn\0%06d" % next(numbers)
        chunk = (len(text) - 4).to_bytes(4) + text + (0).to_bytes(4)
        return data[:-12] + chunk + data[-12:]

    api.script(image_bytes(with_number), repeat=True)


@pytest.fixture(autouse=True)
def _unique(api: ImagesAPI) -> None:
    unique_images(api)


def sha(name: str | Path) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def contents() -> dict[str, str]:
    """The SHA-256 of each file of the folder, by its name."""
    return {name: sha(f"out/{name}") for name in live.names()}


def entries() -> dict[str, Json]:
    """The last word of the manifest on each name."""
    lines = Path("out", image_gen.MANIFEST_NAME).read_text().splitlines()
    return {entry["name"]: entry for entry in map(json.loads, filter(None, lines))}


def records(result: Result) -> list[Json]:
    return sorted(result.json_lines, key=lambda record: int(record["job"]))


def outputs(result: Result) -> list[list[str]]:
    """The names of the images of each job."""
    return [[os.path.basename(image["path"]) for image in r["outputs"]] for r in records(result)]


def origins(result: Result) -> list[str]:
    return [image["origin"] for record in records(result) for image in record["outputs"]]


def resumed(run: Run, jobs: Sequence[Job], *flags: object) -> Result:
    return run(*live.batch(jobs, RESUME, "--json", *flags))


# ------------------------------------------------------------------------------ the manifest


def test_a_line_says_of_an_image_what_made_it(run: Run, api: ImagesAPI) -> None:
    (record,) = records(run(*live.batch([{**FOX, "scene": "fog"}], "--json")))
    (line,) = Path("out", image_gen.MANIFEST_NAME).read_text().splitlines()
    entry = json.loads(line)
    status = Path("out/castle.png").stat()
    assert entry["name"] == "castle.png"
    assert entry["sha256"] == sha("out/castle.png")
    assert (entry["bytes"], entry["mtime"]) == (status.st_size, status.st_mtime_ns)
    assert (entry["prompt"], entry["model"]) == ("a fox", "gpt-image-2")
    assert entry["request_id"] == record["request_id"] == api.requests[0].request_id
    assert entry["usage"] == record["usage"]
    assert entry["time"].startswith("20")


def test_the_usage_of_an_answer_stands_once(run: Run) -> None:
    run(*live.batch([{"prompt": "kites", "n": 3}]))
    assert [bool(entry["usage"]) for entry in entries().values()] == [True, False, False]


def test_the_line_is_synced_before_the_name_is_given(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    place, names = image_gen.place, {}

    def fsync(descriptor: int) -> None:
        names[descriptor] = name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append("image" if name.endswith(".tmp") else name)

    def placing(temporary: str, name: str) -> None:
        place(temporary, name)
        steps.append(os.path.basename(name))

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(image_gen, "place", placing)
    assert run(*live.batch([FOX])).exit_code == 0
    last = steps[-4:]
    assert last == ["image", image_gen.MANIFEST_NAME, "castle.png", "out"]


def test_what_only_has_the_name_of_a_temporary_image_is_left_alone(run: Run) -> None:
    Path("out").mkdir()
    names = [f"out/.image_gen-{digit * 12}{'0' * 64}.tmp" for digit in "123"]
    os.mkfifo(names[0])
    Path(names[1]).mkdir()
    Path(names[2]).symlink_to("nowhere")
    assert resumed(run, ["a fox"]).exit_code == 0
    assert all(map(os.path.lexists, names))


@pytest.mark.parametrize("left", ["whole", "cut", "of another line"])
def test_an_image_of_which_the_manifest_does_not_know_yet_is_taken_up(
    run: Run, api: ImagesAPI, left: str
) -> None:
    """As a run leaves it that is killed behind the sync of an image."""
    assert resumed(run, ["a fox"]).exit_code == 0
    (entry,) = entries().values()
    digest = str(entry["digest"]).rpartition("-")[2] if left != "of another line" else "0" * 64
    image = Path("out/001-a-fox.png").read_bytes()
    Path("out/001-a-fox.png").unlink()
    Path("out", image_gen.MANIFEST_NAME).unlink()
    temporary = Path(f"out/.image_gen-{'1' * 12}{digest}.tmp")
    temporary.write_bytes(image[:-9] if left == "cut" else image)
    result = resumed(run, ["a fox"])
    name = {"whole": "001-a-fox.png", "cut": "001-a-fox.png.damaged"}.get(
        left, f"image_gen-rescued-{'1' * 12}.png"
    )
    assert f"Warning: an image of a run that was killed is now out/{name}" in result.stderr
    assert image.startswith(Path("out", name).read_bytes())
    assert (result.exit_code, len(api.requests)) == (0, 1 if left == "whole" else 2)
    assert not temporary.exists()


def test_single_commands_leave_no_manifest(run: Run) -> None:
    assert run(*live.generate(out="out/fox.png")).exit_code == 0
    assert os.listdir("out") == ["fox.png"]


DIRT = {
    "torn": b'{"name": "castle.png", "sha',
    "foreign": b"\xff\xfe not of this program\n[]\n7\n{}\n",
    "of another version": b'{"name": "castle.png", "digest": "0-1", "asked": {}}\n',
    "of wrong types": b'{"name": 7, "digest": "1-", "asked": [], "prompt": "", "model": ""}\n',
    "out of the folder": b'{"name": "../x", "digest": "1-", "asked": {}, "prompt":"","model":""}\n',
    "nested": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("dirt", DIRT.values(), ids=DIRT)
def test_a_line_that_is_none_costs_only_what_it_would_have_said(run: Run, dirt: bytes) -> None:
    run(*live.batch([FOX]))
    manifest = Path("out", image_gen.MANIFEST_NAME)
    manifest.write_bytes(dirt + b"\n" + manifest.read_bytes() + dirt)
    result = resumed(run, [FOX, "an owl"])
    assert (result.exit_code, live.outcomes(result)) == (0, ["skipped", "done"])
    assert origins(result) == ["made", "new"]
    last = manifest.read_bytes().splitlines()[-1]  # on a line of its own, after a torn one
    assert json.loads(last)["prompt"] == "an owl"
    assert origins(resumed(run, [FOX, "an owl"])) == ["made", "made"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_manifest_that_takes_nothing_is_known_before_anything_is_paid(
    run: Run, api: ImagesAPI, make: Callable[[Path], None]
) -> None:
    Path("out").mkdir()
    manifest = Path("out", image_gen.MANIFEST_NAME)
    make(manifest)
    result = run(*live.batch([FOX]))
    assert (result.exit_code, api.requests) == (2, [])
    assert live.lines(result) == [f"{manifest} is no file; move it away, and names count instead"]


def test_an_image_is_saved_where_its_line_cannot_be(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = image_gen.Manifest.prove

    def then_full(manifest: image_gen.Manifest) -> None:
        prove(manifest)
        os.remove(manifest.path)
        os.mkdir(manifest.path)

    monkeypatch.setattr(image_gen.Manifest, "prove", then_full)
    result = run(*live.batch([FOX]))
    assert (result.exit_code, live.names()) == (0, ["castle.png"])
    assert any("manifest" in line for line in live.lines(result, "Warning: "))


@pytest.mark.parametrize("change", ["sha", "gone"])
def test_a_file_that_was_only_touched_or_copied_is_still_known(run: Run, change: str) -> None:
    run(*live.batch([FOX]))
    if change == "sha":
        os.utime("out/castle.png", (1, 1))
    else:
        shutil.copytree("out", "other")
        shutil.rmtree("out")
        shutil.move("other", "out")
    result = resumed(run, [FOX])
    assert (origins(result), result.exit_code) == (["made"], 0)


# --------------------------------------------------------------------- --skip-existing compares


def test_an_image_that_no_manifest_knows_is_taken_as_it_is(run: Run, api: ImagesAPI) -> None:
    picture("out/castle.png")
    result = resumed(run, [FOX])
    assert (result.exit_code, live.outcomes(result), origins(result)) == (
        0,
        ["skipped"],
        ["unknown"],
    )
    assert api.requests == []


@pytest.mark.parametrize("flag", [RESUME, REMAKE])
def test_an_image_that_was_edited_by_hand_is_never_sent_or_touched(
    run: Run, api: ImagesAPI, flag: str
) -> None:
    run(*live.batch([FOX]))
    picture("out/castle.png", size=(32, 32))
    before = contents()
    result = run(*live.batch([FOX], flag, "--json"))
    assert (result.exit_code, origins(result)) == (0, ["changed"])
    assert (contents(), len(api.requests)) == (before, 1)


CHANGES = {
    "prompt": {"prompt": "a hare"},
    "model": {"model": FLARE},
    "size": {"size": "1536x1024"},
    "quality": {"quality": "low"},
    "background": {"background": "opaque"},
}


@pytest.mark.parametrize(("part", "change"), CHANGES.items(), ids=CHANGES)
def test_an_image_made_from_another_request_is_stale(
    run: Run, api: ImagesAPI, part: str, change: Json
) -> None:
    run(*live.batch(["an owl", FOX]))
    before = contents()
    result = resumed(run, ["an owl", FOX | change])
    assert (result.exit_code, live.outcomes(result)) == (4, ["skipped", "stale"])
    assert outputs(result) == [["001-an-owl.png"], []]
    assert (contents(), len(api.requests)) == (before, 2)
    assert live.error(result) == (
        f"line 2: castle.png was made from another {part}; --remake makes it again and keeps the "
        "old one as castle-old-1.png"
    )
    assert "2 jobs: 1 skipped, 1 stale; " in result.stderr
    assert resumed(run, ["an owl", FOX]).exit_code == 0


def test_what_does_not_change_an_image_does_not_make_it_stale(run: Run, api: ImagesAPI) -> None:
    run(*live.batch([FOX]))
    same = FOX | {"safety_identifier": "ab12", "partial_images": 2}
    assert resumed(run, [same], "--downscale-max-dim", 32).exit_code == 0
    assert len(api.requests) == 1


@pytest.mark.parametrize("role", ["image", "mask"])
def test_the_content_of_the_input_files_counts_not_their_names(
    run: Run, api: ImagesAPI, role: str
) -> None:
    picture("room.png")
    picture("mask.png", "RGBA")
    job = {"prompt": "x", "image": "room.png", "mask": "mask.png", "out": "room-2.png"}
    run(*live.batch([job]))
    os.rename("room.png", "hall.png")
    assert resumed(run, [job | {"image": "hall.png"}]).exit_code == 0
    name = {"image": "hall.png", "mask": "mask.png"}[role]
    Path(name).write_bytes(Path(name).read_bytes() + b"x")
    result = resumed(run, [job | {"image": "hall.png"}])
    assert (result.exit_code, len(api.requests)) == (4, 1)
    assert f"from another {role};" in live.error(result)


def test_a_dry_run_sums_up_what_is_there(run: Run) -> None:
    run(*live.batch([FOX, "an owl", "a cat"]))
    os.remove("out/003-a-cat.png")
    result = run(*live.batch([HARE, "an owl", "a cat"], RESUME, "--dry-run", "--json"))
    assert result.exit_code == 0
    assert [document["job"] for document in result.json_lines] == [3]
    assert "3 jobs: 1 there, 1 stale, 1 missing" in result.stderr.splitlines()
    again = run(*live.batch([HARE, "an owl", "a cat"], REMAKE, "--dry-run", "--json"))
    assert [document["job"] for document in again.json_lines] == [1, 3]
    assert "3 jobs: 1 there, 1 to be made again, 1 missing" in again.stderr.splitlines()
    (warning,) = live.lines(result, "Warning: ")
    assert warning.startswith("line 1: castle.png was made from another prompt")


# ------------------------------------------------------------------------------------- --remake


def test_remake_makes_stale_images_anew_and_keeps_the_old_ones(run: Run, api: ImagesAPI) -> None:
    run(*live.batch([FOX, "an owl"], "--downscale-max-dim", 32))
    old = contents()
    argv = live.batch([HARE, "an owl"], REMAKE, "--json", "--downscale-max-dim", 32)
    result = run(*argv)
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "skipped"])
    now = contents()
    assert now["castle-old-1.png"] == old["castle.png"]
    assert now["castle.png"] not in old.values()
    assert now["castle-web.png"] != old["castle-web.png"]
    assert set(now) == {*old, "castle-old-1.png"}
    assert [request.prompt[-6:] for request in api.requests[2:]] == ["a hare"]
    known = entries()
    assert (known["castle.png"]["prompt"], known["castle-old-1.png"]["prompt"]) == (
        "a hare",
        "a fox",
    )
    assert known["castle-old-1.png"]["sha256"] == old["castle.png"]
    assert run(*argv).exit_code == 0
    assert (contents(), len(api.requests)) == (now, 3)


def test_each_remake_keeps_one_more(run: Run, api: ImagesAPI) -> None:
    for job in (FOX, HARE, FOX, HARE):
        assert run(*live.batch([job], REMAKE)).exit_code == 0
    assert live.names() == [
        "castle-old-1.png",
        "castle-old-2.png",
        "castle-old-3.png",
        "castle.png",
    ]
    assert len(set(contents().values())) == len(api.requests) == 4


def test_nothing_moves_if_the_request_fails(run: Run, api: ImagesAPI) -> None:
    run(*live.batch([FOX]))
    before = contents()
    api.script_for("hare", moderation_blocked())
    assert run(*live.batch([HARE], REMAKE)).exit_code == 4
    assert contents() == before
    api.script_for("hare", server_error())
    result = run(*live.batch([HARE], REMAKE, "--max-attempts", 1))
    assert (result.exit_code, contents()) == (1, before)
    assert "To resume, repeat the command.\n" in result.stderr
    assert entries()["castle.png"]["prompt"] == "a fox"


def test_the_name_for_an_old_one_is_not_that_of_another_job(run: Run) -> None:
    run(*live.batch([FOX]))
    other = {"prompt": "an owl", "out": "castle-old-1.png"}
    result = run(*live.batch([HARE, other], REMAKE, "--json"))
    assert (result.exit_code, outputs(result)) == (0, [["castle.png"], ["castle-old-1.png"]])
    assert entries()["castle-old-2.png"]["prompt"] == "a fox"
    assert entries()["castle-old-1.png"]["prompt"] == "an owl"


def test_it_excludes_force(run: Run, api: ImagesAPI) -> None:
    result = run(*live.batch([FOX], REMAKE, "--force"))
    assert (result.exit_code, api.requests) == (2, [])
    assert "--remake" in result.stderr
    assert "--force" in result.stderr


# ------------------------------------------------------------------------------------ lines move


def test_a_line_on_top_pays_for_itself_alone(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(["a fox", "a hare"]))
    result = resumed(run, ["a cat", "a fox", "a hare"])
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "skipped", "skipped"])
    assert outputs(result) == [["001-a-cat.png"], ["001-a-fox.png"], ["002-a-hare.png"]]
    assert records(result)[1]["planned"] == ["out/002-a-fox.png"]
    assert len(api.requests) == 3


def test_a_new_line_whose_name_belongs_to_another_job_gets_the_next_free_one(
    run: Run, api: ImagesAPI
) -> None:
    run(*live.batch(ALIKE))
    old = contents()
    new = ALIKE[0][:-1] + "top"
    for _ in range(2):
        result = resumed(run, [new, *ALIKE])
        assert result.exit_code == 0
        assert [names[0] for names in outputs(result)[1:]] == sorted(old)
    assert len(api.requests) == 4
    name = outputs(result)[0][0]
    assert (entries()[name]["prompt"], name in old) == (new, False)
    assert contents().items() >= old.items()


def test_a_new_name_is_given_to_the_image_that_is_there(run: Run, api: ImagesAPI) -> None:
    run(*live.batch([FOX, "an owl"]))
    jobs = [FOX | {"out": "fort.png"}, {"prompt": "an owl", "out": "owl.png"}]
    for _ in range(2):
        result = resumed(run, jobs, "--downscale-max-dim", 32)
        assert (result.exit_code, outputs(result)) == (0, [["fort.png"], ["owl.png"]])
        assert origins(result) == ["made", "made"]
    assert len(api.requests) == 2
    assert sha("out/fort.png") == sha("out/castle.png")
    assert live.size_of("out/fort-web.png") == (32, 32)
    more = resumed(run, [FOX | {"out": "fort.png", "n": 2}])  # castle.png is no second image
    assert (more.exit_code, api.requests[-1].body["n"]) == (0, 1)


def test_names_that_change_places_are_given_by_remake_at_no_cost(run: Run, api: ImagesAPI) -> None:
    fox, hare = {"prompt": "a fox", "out": "a.png"}, {"prompt": "a hare", "out": "b.png"}
    run(*live.batch([fox, hare]))
    old = contents()
    jobs = [fox | {"out": "b.png"}, hare | {"out": "a.png"}]
    stale = resumed(run, jobs)
    assert (stale.exit_code, live.outcomes(stale), contents()) == (4, ["stale", "stale"], old)
    assert "--remake puts a.png there" in live.lines(stale)[0]
    copies = ("--downscale-max-dim", 32)
    run(*live.batch([fox, hare], RESUME, *copies))
    small = contents()["a-web.png"]
    result = run(*live.batch(jobs, REMAKE, "--json", *copies))
    assert (result.exit_code, len(api.requests)) == (0, 2)
    now = contents()
    assert (now["b-web.png"], now["a-web.png"] != small) == (small, True)
    assert (now["a.png"], now["b.png"]) == (old["b.png"], old["a.png"])
    assert (now["a-old-1.png"], now["b-old-1.png"]) == (old["a.png"], old["b.png"])
    assert origins(resumed(run, jobs)) == ["made", "made"]


@pytest.mark.parametrize(("before", "after"), [(3, 4), (1, 2), (1, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize("out", [{}, {"out": "kite.png"}], ids=["automatic", "named"])
def test_another_number_of_variants_pays_for_those_that_are_more(
    run: Run, api: ImagesAPI, before: int, after: int, out: Json
) -> None:
    job = {"prompt": "kites", **out}
    run(*live.batch([job | {"n": before}]))
    result = resumed(run, [job | {"n": after}])
    assert result.exit_code == 0
    sent = [request.body.get("n", 1) for request in api.requests[1:]]
    assert sent == ([after - before] if after > before else [])
    assert len(set(map(sha, [f"out/{name}" for name in outputs(result)[0]]))) == after


def test_equal_lines_count_as_often_as_they_stand_there(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(["a fox", "a fox"]))
    result = resumed(run, ["a hare", "a fox", "a fox", "a fox"])
    assert (result.exit_code, len(api.requests)) == (0, 4)
    assert len({name for names in outputs(result) for name in names}) == 4


@pytest.mark.parametrize("edit", ["insert", "delete", "swap", "reverse"])
@pytest.mark.parametrize("words", ["no", ALIKE[0]], ids=["different", "alike"])
def test_of_thirty_lines_only_the_new_ones_are_sent(
    run: Run, api: ImagesAPI, edit: str, words: str
) -> None:
    jobs: list[Job] = [f"{words} {number}" for number in range(30)]
    run(*live.batch(jobs))
    old = contents()
    new: list[Job] = [f"{words} new"] if edit == "insert" else []
    lines = {
        "insert": jobs[:7] + new + jobs[7:],
        "delete": jobs[:7] + jobs[8:],
        "swap": [jobs[29], *jobs[1:29], jobs[0]],
        "reverse": jobs[::-1],
    }[edit]
    result = resumed(run, lines)
    assert (result.exit_code, len(api.requests)) == (0, 30 + len(new))
    assert contents().items() >= old.items()
    for record in records(result):
        (image,) = record["outputs"]
        assert entries()[os.path.basename(image["path"])]["prompt"] == record["title"]


PROMPTS = some.sampled_from([*"abc", *(ALIKE[0] + letter for letter in "xyz")])
JOBS = some.fixed_dictionaries(
    {"prompt": PROMPTS, "n": some.integers(1, 3)},
    optional={
        "size": some.sampled_from(["1024x1024", "1536x1024"]),
        "out": some.sampled_from(["o.png", "p.png", "q"]),
        "image": some.just("room.png"),
    },
)
EDITS = some.sampled_from(["insert", "delete", "swap", "change", "duplicate", "reverse", "room"])


def without_collisions(jobs: Sequence[Json]) -> list[Json]:
    """The jobs, but for those that would be written to a name that a former one has."""
    kept, names = [], set()
    for job in jobs:
        stem = str(job.get("out", "")).removesuffix(".png")
        if not stem or stem not in names:
            kept.append(job)
        names.add(stem)
    return kept


def edited(jobs: list[Json], edit: str, data: some.DataObject) -> list[Json]:
    """The lines after an edit as people make them."""
    at = data.draw(some.integers(0, len(jobs) - 1))
    other = data.draw(some.integers(0, len(jobs) - 1))
    new = data.draw(JOBS)
    if edit == "swap":
        jobs[at], jobs[other] = jobs[other], jobs[at]
    if edit == "change":
        key = data.draw(some.sampled_from(["prompt", "size", "n", "out"]))
        jobs[at] = jobs[at] | {key: new[key]} if key in new else jobs[at]
    if edit == "room":
        Path("room.png").write_bytes(Path("room.png").read_bytes() + b"x")
    return {
        "insert": [*jobs[:at], new, *jobs[at:]],
        "delete": jobs[:at] + jobs[at + 1 :] or jobs,
        "duplicate": [*jobs[:at], jobs[at], *jobs[at:]],
        "reverse": jobs[::-1],
    }.get(edit, jobs)


def what_it_asks(job: Json) -> tuple[object, ...]:
    """What a job's images are made from, told apart without the program."""
    room = sha("room.png") if "image" in job else ""
    return job["prompt"], job.get("size", "auto"), room


def what_was_asked(request: Request) -> tuple[object, ...]:
    prompt = request.prompt.removeprefix("Primary request: ")
    room = request.files[0].sha256 if request.files else ""
    return prompt, request.body.get("size", "auto"), room


def images_to_use() -> Counter[tuple[object, ...]]:
    """The images that the manifest knows and has not put away, by what they are made from."""
    known = entries().values() if Path("out").exists() else []
    return Counter(
        (entry["prompt"], entry["asked"]["size"], *entry["asked"].get("image", [""]))
        for entry in known
        if not entry["kept"]
    )


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(some.lists(JOBS, min_size=1, max_size=5), some.lists(EDITS, max_size=4), some.data())
def test_whatever_is_edited_only_what_is_new_is_paid_and_nothing_is_lost(
    run: Run, api: ImagesAPI, jobs: list[Json], edits: list[str], data: some.DataObject
) -> None:
    shutil.rmtree("out", ignore_errors=True)
    picture("room.png")
    start = len(api.requests)
    for edit in ["", *edits]:
        jobs = without_collisions(edited(jobs, edit, data))
        there, first = images_to_use(), len(api.requests)
        result = run(*live.batch(jobs, REMAKE, "--json"))
        assert (result.exit_code, live.lines(result)) == (0, [])
        wanted: Counter[tuple[object, ...]] = Counter()
        for job in jobs:
            wanted[what_it_asks(job)] += int(job["n"])
        sent: Counter[tuple[object, ...]] = Counter()
        for request in api.requests[first:]:
            sent[what_was_asked(request)] += int(request.body.get("n", 1))
        assert sent == wanted - there
        known = entries()
        used = [name for names in outputs(result) for name in names]
        assert len(used) == len(set(used)) == wanted.total()
        for record, job in zip(records(result), jobs, strict=True):
            for image in record["outputs"]:
                entry = known[os.path.basename(image["path"])]
                assert entry["sha256"] == sha(image["path"])
                assert (entry["prompt"], entry["asked"]["size"]) == what_it_asks(job)[:2]
    bought = sum(int(request.body.get("n", 1)) for request in api.requests[start:])
    assert len(set(contents().values())) == bought


def test_two_names_of_one_image_are_no_two_images(run: Run, api: ImagesAPI) -> None:
    fox = {"prompt": "a fox", "out": "a.png"}
    run(*live.batch([fox]))
    assert resumed(run, [fox | {"out": "b.png"}]).exit_code == 0
    both = [fox, fox | {"out": "b.png"}]
    stale = resumed(run, both)
    assert (stale.exit_code, live.outcomes(stale)) == (4, ["stale", "skipped"])
    assert "a.png was made from another line;" in live.error(stale)
    assert run(*live.batch(both, REMAKE)).exit_code == 0
    assert len(api.requests) == 2
    assert origins(resumed(run, both)) == ["made", "made"]
    assert sha("out/a.png") != sha("out/b.png") == sha("out/a-old-1.png")


def test_an_image_that_gives_way_stays_that_of_the_job_that_asks_for_it(
    run: Run, api: ImagesAPI
) -> None:
    run(*live.batch([{"prompt": "a fox", "out": "a.png"}]))
    jobs: list[Job] = [{"prompt": "a hare", "out": "a.png"}, {"prompt": "a fox", "out": "b.png"}]
    assert run(*live.batch(jobs, "--only", 1, REMAKE)).exit_code == 0
    result = resumed(run, jobs)
    assert (result.exit_code, outputs(result)) == (0, [["a.png"], ["b.png"]])
    assert len(api.requests) == 2


def test_jobs_with_one_name_do_not_get_each_others_images(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = [FOX, HARE]
    run(*live.batch([FOX]))
    result = resumed(run, jobs, "--only", 2)
    assert (result.exit_code, live.outcomes(result), outputs(result)) == (4, ["stale"], [[]])
    collision = resumed(run, jobs)
    assert (collision.exit_code, len(api.requests)) == (2, 1)
    assert "written twice" in collision.stderr


def test_a_name_that_two_lines_share_in_turn_is_written_by_one(run: Run, api: ImagesAPI) -> None:
    run(*live.batch([{"prompt": "a fox", "out": "a.png"}]))
    jobs: list[Job] = [{"prompt": "a hare", "out": "a.png"}, {"prompt": "a fox", "out": "b.png"}]
    plain = run(*live.batch(jobs))
    assert plain.exit_code == 2
    assert "written twice" not in plain.stderr
    picture("out/b.png")
    result = resumed(run, jobs)
    assert (result.exit_code, live.outcomes(result)) == (4, ["stale", "skipped"])
    assert outputs(result)[1] == ["a.png"]
    assert len(api.requests) == 1


@pytest.mark.parametrize("temporary", ["castle.png", "../x.tmp", "other.png"])
def test_a_line_names_no_file_that_is_not_its_own(run: Run, temporary: str) -> None:
    run(*live.batch([FOX]))
    manifest = Path("out", image_gen.MANIFEST_NAME)
    entry = json.loads(manifest.read_text()) | {"temporary": temporary}
    manifest.write_text(json.dumps(entry) + "\n")
    shutil.copy("out/castle.png", "out/other.png")
    before = contents()
    assert resumed(run, [FOX]).exit_code == 0
    assert contents() == before


# ----------------------------------------------------------------------------- a plain repetition


def test_without_a_word_on_what_is_there_nothing_is_bought_twice(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(["a fox", "a hare"]))
    for flags in ([], ["--dry-run"]):
        result = run(*live.batch(["a cat", "a fox", "a hare"], *flags))
        assert (result.exit_code, len(api.requests)) == (2, 2)
        (problem,) = live.lines(result)
        assert problem.startswith("out/001-a-fox.png, out/002-a-hare.png were made from these ")
    assert run(*live.batch(["a cat", "a fox"], "--force")).exit_code == 0
    assert len(api.requests) == 4


# ----------------------------------------------------------------------------------------- --only

FOUR: list[Job] = ["a fox", FOX, "an owl", {"prompt": "kites", "n": 2, "out": "kite"}]
CHOICES = {
    "1": [1],
    "1,3-4": [1, 3, 4],
    "castle.png": [2],
    "kite": [4],
    "kite-2.png, 1": [1, 4],
    "001-a-fox.png,castle.png": [1, 2],
    "3-9": [3, 4],
}


@pytest.mark.parametrize(("only", "numbers"), CHOICES.items(), ids=CHOICES)
def test_only_these_jobs_are_run_under_the_names_of_the_whole(
    run: Run, api: ImagesAPI, only: str, numbers: list[int]
) -> None:
    result = run(*live.batch(FOUR, "--only", only, "--json"))
    assert result.exit_code == 0
    assert [record["job"] for record in records(result)] == numbers
    shown = run(*live.batch(FOUR, "--only", only, "--dry-run", "--json", "--force"))
    assert [document["outputs"] for document in shown.json_lines] == [
        record["planned"] for record in records(result)
    ]
    assert len(api.requests) == len(numbers)


@pytest.mark.parametrize("only", ["5", "0", "castle", "caste.png", "1,", ",", "3-1", "1;2", "²"])
def test_what_means_no_job_is_refused(run: Run, api: ImagesAPI, only: str) -> None:
    result = run(*live.batch(FOUR, "--only", only))
    assert (result.exit_code, api.requests) == (2, [])
    assert live.lines(result)[0].startswith("--only ")
    assert ("did you mean castle.png?" in result.stderr) == (only in ("castle", "caste.png"))


def test_the_other_lines_are_read_but_not_checked(run: Run, api: ImagesAPI) -> None:
    wrong: list[Job] = [{"prompt": "x", "size": "7x7"}, '{"prompt": ', {"prompt": 7}, b"\xff"]
    jobs = [*wrong, "a fox", {"prompt": "x", "image": "gone.png"}]
    result = run(*live.batch(jobs, "--only", 5, "--json"))
    assert (result.exit_code, outputs(result)) == (0, [["005-a-fox.png"]])
    for number in (1, 2, 3, 4, 6):
        assert run(*live.batch(jobs, "--only", number)).exit_code == 2
    assert len(api.requests) == 1


def test_a_job_is_rolled_again_though_nothing_has_changed(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(FOUR))
    before = contents()
    again = live.batch(FOUR, "--only", "castle.png,kite", REMAKE, "--json")
    result = run(*again)
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "done"])
    assert len(api.requests) == 6
    after = contents()
    for name in ("castle", "kite-1", "kite-2"):
        assert after[f"{name}-old-1.png"] == before[f"{name}.png"] != after[f"{name}.png"]
    assert after["001-a-fox.png"] == before["001-a-fox.png"]
    assert origins(resumed(run, FOUR)) == ["made"] * 5
    assert run(*again).exit_code == 0
    assert "castle-old-2.png" in live.names()


def test_a_name_means_the_job_whose_image_has_it(run: Run, api: ImagesAPI) -> None:
    run(*live.batch(ALIKE))
    names = live.names()
    result = run(*live.batch(ALIKE[::-1], "--only", names[2], REMAKE, "--json"))
    assert (result.exit_code, outputs(result)) == (0, [[names[2]]])
    assert api.requests[-1].prompt.endswith(ALIKE[2])


@pytest.mark.parametrize("flags", [["--only", "1,3", REMAKE], ["--force"]], ids=" ".join)
def test_what_could_not_be_made_again_is_named_by_the_way_on(
    run: Run, api: ImagesAPI, flags: list[str]
) -> None:
    run(*live.batch(FOUR))
    api.script_for("owl", no_data())
    result = run(*live.batch(FOUR, *flags))
    assert result.exit_code == 1
    assert "repeat the command with --only 3 (1 job)" in result.stderr


def test_a_contact_sheet_of_some_jobs_shows_the_others_too(run: Run, api: ImagesAPI) -> None:
    sheet = ("--contact-sheet", "sheet.png")
    run(*live.batch(FOUR, *sheet))
    whole = Path("sheet.png").read_bytes()
    assert run(*live.batch(FOUR, RESUME, "--only", 3, *sheet)).exit_code == 0
    assert (Path("sheet.png").read_bytes(), len(api.requests)) == (whole, 4)
    fixed = image_bytes(lambda data: data)
    api.script_for("owl", fixed)
    assert run(*live.batch(FOUR, REMAKE, "--only", 3, *sheet)).exit_code == 0
    assert Path("sheet.png").read_bytes() == whole  # the placeholder of a prompt looks the same


def test_a_few_jobs_of_a_file_that_is_too_long_are_run(run: Run, api: ImagesAPI) -> None:
    result = run(*live.batch(600, "--only", "599-600", "--json"))
    assert (result.exit_code, [record["job"] for record in records(result)]) == (0, [599, 600])
    assert run(*live.batch(600, "--only", "1-600")).exit_code == 2
    assert len(api.requests) == 2


# ---------------------------------------------------------------------------- through the Batch API


def queued(jobs: Sequence[Job], *flags: object) -> list[str]:
    return queue_api.queued(jobs, "--json", *flags)


def lines_of_batches(api: ImagesAPI) -> list[str]:
    prompts = [str(line.body["prompt"]) for batch in api.batches for line in batch.lines]
    return [prompt.removeprefix("Primary request: ") for prompt in prompts]


def test_what_one_way_has_made_the_other_knows(run: Run, api: ImagesAPI) -> None:
    assert run(*queued(["a fox", FOX])).exit_code == 0
    known = entries()
    assert (known["castle.png"]["prompt"], bool(known["castle.png"]["usage"])) == ("a fox", True)
    jobs: list[Job] = ["a hare", "a fox", FOX]
    assert resumed(run, jobs).exit_code == 0
    assert len(api.image_requests) == 1
    result = run(*queued([*jobs, "an owl"], RESUME))
    assert (result.exit_code, live.outcomes(result)) == (0, ["skipped"] * 3 + ["done"])
    assert lines_of_batches(api) == ["a fox", "a fox", "an owl"]


@pytest.mark.parametrize("flags", [[], ["--only", "castle.png"]], ids=["stale", "again"])
@pytest.mark.parametrize("collect", [[REMAKE], []], ids=["the same", "without --remake"])
def test_images_are_made_anew_through_the_batch_api_too(
    run: Run, api: ImagesAPI, flags: list[str], collect: list[str]
) -> None:
    run(*live.batch([FOX, "an owl"]))
    before = contents()
    jobs: list[Job] = [FOX if flags else HARE, "an owl"]
    assert run(*queued(jobs, *flags, REMAKE, "--no-wait")).exit_code == 3
    assert before.items() <= contents().items()
    result = run(*queued(jobs, *flags, *collect))
    assert result.exit_code == 0, result.stderr
    after = contents()
    assert after["castle-old-1.png"] == before["castle.png"] != after["castle.png"]
    assert set(after) - {image_gen.STATE_NAME} == {*before, "castle-old-1.png"}
    assert len(lines_of_batches(api)) == 1
    assert origins(resumed(run, jobs)) == ["made", "made"]


def test_a_batch_that_waits_belongs_to_the_jobs_that_began_it(run: Run, api: ImagesAPI) -> None:
    assert run(*queued(FOUR, "--only", "1,3", "--no-wait")).exit_code == 3
    for flags in ([], ["--only", 2]):
        result = run(*queued(FOUR, *flags))
        assert result.exit_code == 2
        assert "begun with --only 1,3" in result.stderr
    result = run(*queued(FOUR, "--only", "3,1"))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "done"])
    assert run(*queued(FOUR, RESUME)).exit_code == 0
    assert sorted(lines_of_batches(api)) == ["a fox", "a fox", "an owl", "kites"]


@pytest.mark.parametrize("flags", [[], [RESUME], ["--dry-run"], ["--force"]], ids=str)
def test_a_live_run_beside_a_batch_that_waits_is_refused(
    run: Run, api: ImagesAPI, flags: list[str]
) -> None:
    assert run(*queued([FOX], "--no-wait")).exit_code == 3
    result = run(*live.batch([FOX], *flags))
    assert (result.exit_code, api.image_requests) == (2, [])
    (problem,) = live.lines(result)
    assert "add --batch-api to collect it, or --batch-api --cancel to end it" in problem
    assert run(*queued([FOX])).exit_code == 0
    assert resumed(run, [FOX]).exit_code == 0


@pytest.mark.parametrize("selection", [["--only", "1-2"], []], ids=["only all of them", "all"])
def test_a_run_of_all_jobs_may_be_collected_by_naming_all(
    run: Run, api: ImagesAPI, selection: list[str]
) -> None:
    run(*live.batch([FOX, "an owl"]))
    jobs: list[Job] = [HARE, "an owl"]
    assert run(*queued(jobs, REMAKE, "--no-wait")).exit_code == 3
    result = run(*queued(jobs, *selection))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "skipped"])
    assert lines_of_batches(api) == ["a hare"]


def test_an_answer_of_the_same_bytes_is_known_to_answer_the_new_request(
    run: Run, api: ImagesAPI
) -> None:
    fixed = image_bytes(lambda _: encoded(Image.new("RGB", (64, 64))))
    api.script(fixed, fixed, fixed)
    run(*live.batch([FOX]))
    api.script_for("hare", fixed, repeat=True)
    assert run(*queued([HARE], REMAKE)).exit_code == 0
    assert origins(resumed(run, [HARE])) == ["made"]
    assert entries()["castle.png"]["prompt"] == "a hare"


def test_stale_images_are_not_submitted(run: Run, api: ImagesAPI) -> None:
    assert run(*queued([FOX, "an owl"])).exit_code == 0
    result = run(*queued([HARE, "an owl", "a cat"], RESUME))
    assert (result.exit_code, live.outcomes(result)) == (4, ["stale", "skipped", "done"])
    assert lines_of_batches(api) == ["a fox", "an owl", "a cat"]


# --------------------------------------------------------------------------------- how a run ends

ENDS = {
    "one that may pass": ([server_error()], 1),
    "one that lasts": ([moderation_blocked()], 4),
    "both": ([moderation_blocked(), server_error()], 1),
    "an unknown model": ([unknown_model()], 4),
    "no access": ([forbidden()], 4),
    "no money": ([insufficient_quota()], 4),
    "a wrong key": ([unauthorized()], 4),
    "an invalid request": ([status(400, "no", code="invalid_value")], 4),
    "a page of a gateway": ([html(400)], 1),
    "a page that forbids": ([html(403)], 1),
    "a teapot": ([status(418)], 1),
    "no image": ([no_data()], 1),
}


@pytest.mark.parametrize(("replies", "code"), ENDS.values(), ids=ENDS)
def test_the_exit_code_says_whether_repeating_can_help(
    run: Run, api: ImagesAPI, replies: list[Reply], code: int
) -> None:
    for number, reply in enumerate(replies, start=1):
        api.script_for(f"job {number}", reply, repeat=True)
    result = run(*live.batch(3, "--json", "--max-attempts", 1, "--concurrency", 1))
    assert result.exit_code == code, result.stderr
    assert len(
        [line for line in result.stderr.splitlines() if "repeat the command" in line]
    ) == len(replies)


def test_what_was_not_sent_inherits_its_cause(run: Run, api: ImagesAPI) -> None:
    api.script_for("job 2", insufficient_quota())
    result = run(*live.batch(4, "--json", "--concurrency", 1))
    assert result.exit_code == 4
    assert "4 jobs: 1 done, 2 not sent (quota), 1 failed (quota); " in result.stderr
    assert "After topping up: repeat the command with --skip-existing (3 jobs)." in result.stderr
    api.script_for("job 2", moderation_blocked())
    refused = run(*live.batch(4, RESUME, "--fail-fast", "--concurrency", 1))
    assert refused.exit_code == 4
    assert run(*live.batch(4, RESUME)).exit_code == 0


def test_an_answer_without_an_image_says_that_repeating_pays_again(
    run: Run, api: ImagesAPI
) -> None:
    api.script_for("job", no_data())
    result = run(*live.batch(1))
    assert result.exit_code == 1
    assert "To pay for an answer once more: repeat the command" in result.stderr


# -------------------------------------------------------------------------------- bounded output


def test_hundreds_of_files_that_exist_are_one_line(run: Run, api: ImagesAPI) -> None:
    jobs = live.prompts(300)
    for number in range(1, 301):
        Path("out").mkdir(exist_ok=True)
        Path(f"out/{number:03d}-job-{number}.png").write_bytes(b"mine")
    result = run(*live.batch(jobs))
    assert (result.exit_code, api.requests) == (2, [])
    (problem,) = live.lines(result)
    assert problem.startswith(
        "out/001-job-1.png, out/002-job-2.png, out/003-job-3.png and 297 more"
    )


def test_hundreds_of_jobs_say_little_without_a_terminal(run: Run, api: ImagesAPI) -> None:
    result = run(*live.batch(300, "--concurrency", 25))
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(api.requests) == 300
    cost, summary = result.stderr.splitlines()
    assert cost.startswith("about $")
    assert summary.startswith("300 jobs: 300 done; 300 images, ")
    again = run(*live.batch(300, RESUME))
    assert (again.exit_code, again.stdout, len(again.stderr.splitlines())) == (0, "", 2)
