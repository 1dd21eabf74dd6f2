"""Batches in a world of late replicas, odd answers, other keys, lost files and slow networks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import openai
import pytest
from images_api import (
    Answer,
    BatchPlan,
    answer_lost,
    answered,
    document,
    html,
    no_answer,
    ok,
    server_error,
    slow_body,
    status,
    unauthorized,
)
from inputs import FLARE, picture
from queue_api import (
    CANCEL,
    CREATE,
    DELETE,
    DOWNLOAD,
    FILE,
    GOES_ON,
    LIST,
    POLL,
    STATE,
    UPLOAD,
    made,
    queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run, Start
    from images_api import ImagesAPI, Lines, Ordinary, Reply
    from inputs import Job, Json

AT_ONCE = BatchPlan(states=("completed",))


def asked(api: ImagesAPI, route: str) -> int:
    return sum(request.route == route for request in api.requests)


def manifest() -> list[Json]:
    return [
        json.loads(line)
        for line in Path("out", image_gen.MANIFEST_NAME).read_text().splitlines()
        if line
    ]


# ----------------------------------------------------------------------------- once means once


def committed_late(api: ImagesAPI, looks: int) -> None:
    """A creation is answered with 504; its batch shows up in the list after so many looks."""
    seen = count(1)

    async def hide(ordinary: Ordinary) -> Answer:
        answer = await ordinary()
        if next(seen) > looks:
            return answer
        content = json.loads(answer.whole()) | {"data": [], "has_more": False}
        return Answer.of(json.dumps(content).encode())

    async def lost(ordinary: Ordinary) -> Answer:
        await ordinary()
        return await server_error(504)(ordinary)

    api.script_route(CREATE, lost)
    api.script_route(LIST, hide, repeat=True)


@pytest.mark.parametrize("looks", [2, 4])
def test_a_batch_that_shows_up_late_is_not_created_again(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    monkeypatch.setattr(image_gen, "LOOK_SECONDS", 30.0)
    monkeypatch.setattr(image_gen, "FIRST_LOOK_SECONDS", 0.01)
    committed_late(api, looks)
    result = run(*queued(2))
    assert result.exit_code == 0, result.stderr
    assert (len(api.batches), asked(api, CREATE), made()) == (1, 1, live.images(1, 2))
    assert "looking for its batch" in result.stderr


def test_a_twin_is_cancelled_and_what_it_has_made_is_kept_beside(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(states=("completed",)), AT_ONCE)
    committed_late(api, looks=3)  # one before its creation, two when it is missed
    result = run(*queued(2))
    assert result.exit_code == 0, result.stderr
    assert len(api.batches) == 2
    assert asked(api, CANCEL) == 1
    assert made() == ["001-job-1.png", "002-job-2.png"]  # the same bytes: nothing is kept twice
    assert "is a twin of" in result.stderr
    assert len(manifest()) == 2


@pytest.mark.parametrize(
    "name", ["OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"], ids=str.lower
)
def test_another_account_is_refused_and_a_new_key_is_not(
    run: Run, api: ImagesAPI, name: str
) -> None:
    assert run(*queued(2, "--no-wait")).exit_code == 3
    value = f"{api.base_url}/other" if name == "OPENAI_BASE_URL" else "other-1"
    before = len(api.requests)
    result = run(*queued(2), env={name: value})
    assert (result.exit_code, len(api.requests)) == (2, before)
    assert name in result.stderr
    assert value not in STATE.read_text()
    assert run(*queued(2)).exit_code == 0


def test_a_batch_that_another_key_does_not_see_is_not_submitted_again(
    run: Run, api: ImagesAPI
) -> None:
    api.script_route(CREATE, answer_lost())
    assert run(*queued(1, "--max-attempts", 1)).exit_code == 1
    api.script_route(FILE, status(404, "No such File object"))
    api.script_route(LIST, document(lambda page: page.update(data=[])))
    result = run(*queued(1))
    assert (result.exit_code, len(api.batches)) == (1, 1)
    assert "submitted with another key?" in result.stderr
    assert "delete" not in result.stderr
    assert run(*queued(1)).exit_code == 0
    assert len(api.batches) == 1


def test_a_batch_that_is_not_known_says_what_to_look_at_and_nothing_that_pays_again(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_gen, "LAG_SECONDS", 0.0)
    assert run(*queued(1, "--no-wait")).exit_code == 3
    api.script_route(POLL, status(404, "No batch found"))
    said = live.error(run(*queued(1)))
    assert "submitted with another key?" in said
    assert "delete" not in said
    assert "--skip-existing" not in said


def test_a_replica_that_lags_is_waited_for(run: Run, api: ImagesAPI) -> None:
    api.script_route(POLL, *[status(404, "No batch found")] * 3)
    assert run(*queued(1)).exit_code == 0
    api.script_route(POLL, status(404, "No batch found"))
    assert run(*queued(["new"], "--skip-existing", "--no-wait")).exit_code == 3


def test_a_twin_that_shows_up_only_later_is_cancelled_before_the_run_is_settled(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(AT_ONCE, BatchPlan(states=("in_progress", "in_progress", "completed")))
    committed_late(api, looks=5)
    result = run(*queued(2))
    assert result.exit_code == 0, result.stderr
    assert len(api.batches) == 2
    assert "is a twin of" in result.stderr
    assert json.loads(STATE.read_text())["shards"][0]["twins"]


def test_a_batch_whose_creation_failed_for_the_service_is_looked_for_whatever_it_advises(
    run: Run, api: ImagesAPI
) -> None:
    async def lost(ordinary: Ordinary) -> Answer:
        await ordinary()
        return await server_error(504, headers={"x-should-retry": "false"})(ordinary)

    api.script_route(CREATE, lost)
    run(*queued(1))
    assert run(*queued(1)).exit_code == 0
    assert len(api.batches) == 1


def test_an_answer_about_another_batch_is_no_answer(run: Run, api: ImagesAPI) -> None:
    other = document(lambda batch: batch.update(id="batch_other", status="completed"))
    api.script_route(POLL, other)
    result = run(*queued(2))
    assert (result.exit_code, made()) == (0, live.images(1, 2))
    assert "answers oddly" in result.stderr


@pytest.mark.usefixtures("api")
def test_a_run_that_reached_nobody_goes_on_at_the_right_address(run: Run) -> None:
    wrong = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    assert run(*queued(1, "--max-attempts", 1), env=wrong).exit_code == 1
    assert run(*queued(1)).exit_code == 0
    assert made() == live.images(1)


def test_a_list_that_repeats_itself_ends_and_creates_nothing(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, answer_lost())
    assert run(*queued(1, "--max-attempts", 1)).exit_code == 1
    (ours,) = api.batches
    others = [{"id": "batch_x", "status": "completed", "created_at": 2_000_000_000}]
    broken = document(lambda page: page.update(data=others, has_more=True))
    api.script_route(LIST, broken, repeat=True)
    result = run(*queued(1, "--max-attempts", 1))
    assert (result.exit_code, api.batches) == (1, [ours])
    assert "repeats itself" in result.stderr


def test_a_gateway_without_a_list_of_batches_takes_them_all_the_same(
    run: Run, api: ImagesAPI
) -> None:
    api.script_route(LIST, status(404, "Invalid URL"), repeat=True)
    result = run(*queued(1))
    assert (result.exit_code, made()) == (0, live.images(1))
    assert "no list of batches to look at" in result.stderr


def test_names_are_synced_before_anything_is_built_on_them(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves is what was synced: so no step may come before its sync."""
    events: list[str] = []
    replace_, place = os.replace, image_gen.place

    def synced(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"sync {'content' if name.endswith('.tmp') else name}")

    def replaced(source: str, target: str) -> None:
        if target == str(STATE):
            settled = json.loads(Path(source).read_bytes())["shards"][:1]
            events.append("settled" if settled and settled[0]["settled"] else "state")
        replace_(source, target)

    def placed(source: str, target: str) -> None:
        place(source, target)
        events.append("image")

    def heard(step: str) -> Reply:
        async def reply(ordinary: Ordinary) -> Answer:
            events.append(step)
            return await ordinary()

        return reply

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr("os.replace", replaced)
    monkeypatch.setattr(image_gen, "place", placed)
    api.script_route(CREATE, heard("creation"), repeat=True)
    api.script_route(POLL, heard("poll"), repeat=True)
    api.plan_batch(AT_ONCE)
    assert run(*queued(1)).exit_code == 0
    steps = [event for event in events if event != "poll"]
    for index, event in enumerate(steps):
        if event in ("state", "settled"):
            assert steps[index - 1] == "sync content"
            assert steps[index + 1] == "sync out"
    image = steps.index("image")
    assert steps[image - 2 : image] == ["sync content", f"sync {image_gen.MANIFEST_NAME}"]
    assert steps[image + 1] == "sync out"
    assert steps.index("creation") > steps.index("state")
    assert steps.index("settled") > image + 1


# ------------------------------------------------------------------------------------ odd answers

ODD = {
    "null": answered(b"null"),
    "a list": answered(b"[]"),
    "a string": answered(b'"ok"'),
    "nothing": answered(b""),
    "an empty object": answered(b"{}"),
    "a portal": html(200),
}


@pytest.mark.parametrize("route", [UPLOAD, CREATE, LIST, POLL], ids=str)
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_answer_is_a_sentence_and_another_try(
    run: Run, api: ImagesAPI, route: str, odd: Reply
) -> None:
    api.script_route(route, odd)
    result = run(*queued(2))
    assert result.exit_code == 0, result.stderr
    assert (len(api.batches), made()) == (1, live.images(1, 2))
    api.script_route(route, odd, repeat=True)
    again = run(*queued(["new"], "--skip-existing", "--no-wait"))
    assert again.exit_code in (1, 3)
    assert "answers oddly" in again.stderr
    assert len(live.lines(again)) >= (again.exit_code == 1)


FIELDS: dict[str, Json] = {
    "counts of words": {"request_counts": {"total": "x"}},
    "a list of counts": {"request_counts": [1]},
    "no counts": {"request_counts": None},
    "errors of words": {"errors": "x"},
    "odd errors": {"errors": {"data": [None, {"line": "1", "message": {"a": 1}, "code": ["x"]}]}},
    "no id": {"id": None},
    "odd metadata": {"metadata": [1]},
    "an error file of words": {"error_file_id": {"a": 1}},
    "an id that leaves its place": {"error_file_id": "../models"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_batch_with_odd_fields_is_collected_by_those_that_make_sense(
    run: Run, api: ImagesAPI, fields: Json
) -> None:
    api.plan_batch(AT_ONCE)
    api.script_route(POLL, document(lambda batch: batch.update(fields)), repeat=True)
    result = run(*queued(2))
    assert result.exit_code == 0, result.stderr
    assert made() == live.images(1, 2)


def test_an_image_wins_over_an_error_of_the_same_job(run: Run, api: ImagesAPI) -> None:
    def both(lines: Lines) -> Lines:
        for line in lines:
            name = json.loads(line)["custom_id"]
            error = {"custom_id": name, "response": None, "error": {"code": "server_error"}}
            yield json.dumps(error).encode() + b"\n"
            yield line

    api.plan_batch(BatchPlan(states=("completed",), output=both))
    result = run(*queued(3, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done"] * 3)


# ------------------------------------------------------------------------------- slow and stopped


def test_a_call_that_drips_ends_with_its_time(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(AT_ONCE)
    api.script_route(POLL, slow_body(60.0, pieces=600))
    result = run(*queued(1, "--timeout", live.TIME_OUT))
    assert result.exit_code == 0, result.stderr
    assert "no answer in time" in result.stderr


@pytest.mark.parametrize("route", [UPLOAD, CREATE, LIST, POLL, DOWNLOAD], ids=str)
def test_ctrl_c_is_heard_in_each_call_and_the_next_run_goes_on(
    run: Run, start_process: Start, api: ImagesAPI, route: str
) -> None:
    api.plan_batch(AT_ONCE)
    if route == LIST:
        api.script_route(CREATE, answer_lost())
    api.script_route(route, no_answer())
    process = start_process(*queued(2))
    api.wait_for_route(route)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert run(*queued(2)).exit_code == 0
    assert (len(api.batches), made()) == (1, live.images(1, 2))


@pytest.mark.parametrize("honoured", [True, False], ids=["ranges", "no ranges"])
def test_a_download_that_breaks_goes_on_behind_its_last_whole_line(
    run: Run, api: ImagesAPI, *, honoured: bool
) -> None:
    ranges: list[str] = []
    sent: list[int] = []

    async def breaking(ordinary: Ordinary) -> Answer:
        body = (await ordinary()).whole()
        ranges.append(api.requests[-1].headers.get("range", ""))
        start = int(ranges[-1].removeprefix("bytes=").rstrip("-") or 0) if honoured else 0
        answer = Answer.of(body[start:], status=206 if start else 200)
        sent.append(len(body) - start)
        if len(ranges) > 2:
            return answer
        return replace(answer, breaks_after=len(body[start:].split(b"\n")[0]) + 10)

    api.plan_batch(AT_ONCE)
    api.script_route(DOWNLOAD, breaking, repeat=True)
    result = run(*queued(4))
    assert result.exit_code == 0, result.stderr
    assert made() == live.images(1, 2, 3, 4)
    assert ranges[0] == ""
    first, second = (int(each.removeprefix("bytes=").rstrip("-")) for each in ranges[1:])
    assert 0 < first <= second < sent[0]
    assert (first < second) == honoured


COUNTS: dict[str, Json] = {
    "none": {"request_counts": None},
    "zeros": {"request_counts": {"total": 0, "completed": 0, "failed": 0}},
    "too few": {"request_counts": {"total": 3, "completed": 1, "failed": 0}},
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_completed_batch_has_a_line_for_every_job_whatever_it_counts(
    run: Run, api: ImagesAPI, counts: Json
) -> None:
    async def first_line(ordinary: Ordinary) -> Answer:
        body = (await ordinary()).whole()
        return Answer.of(body[: body.index(b"\n") + 1])

    api.plan_batch(AT_ONCE)
    hidden = document(lambda batch: batch.update(counts, output_file_id=None))
    shown = document(lambda batch: batch.update(counts))
    api.script_route(POLL, hidden, shown, repeat=True)
    api.script_route(DOWNLOAD, first_line, status(404, "not here yet"))
    result = run(*queued(3))
    assert result.exit_code == 0, result.stderr
    assert (len(api.batches), made()) == (1, live.images(1, 2, 3))


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_lines_of_jobs_that_were_not_done_do_not_stand_for_those_that_were(
    run: Run, api: ImagesAPI, state: str
) -> None:
    api.plan_batch(BatchPlan(states=(state,), share=0.5))
    late = document(lambda batch: batch.update(output_file_id=None))
    api.script_route(POLL, late, late)
    result = run(*queued(2, "--json"))
    assert sorted(live.outcomes(result)) == ["done", "failed"]
    assert made() == live.images(1)


def test_a_line_that_cannot_be_read_is_kept_as_it_is(run: Run, api: ImagesAPI) -> None:
    def spoilt(lines: Lines) -> Lines:
        for number, line in enumerate(lines):
            yield line if number else b"<" + line[1:]

    api.plan_batch(BatchPlan(states=("completed",), output=spoilt))
    result = run(*queued(2, "--max-wait", 0.01))
    images = [name for name in made() if name in live.images(1, 2)]
    assert (result.exit_code, len(images)) == (1, 1)
    (kept,) = Path("out").glob("unreadable-*.answer")
    assert kept.read_bytes().startswith(b"<")
    assert str(kept) in result.stderr


def test_a_range_that_begins_elsewhere_is_asked_for_from_the_start(
    run: Run, api: ImagesAPI
) -> None:
    calls = count(1)

    async def wrong(ordinary: Ordinary) -> Answer:
        body, call = (await ordinary()).whole(), next(calls)
        if call == 1:
            return replace(Answer.of(body), breaks_after=body.index(b"\n") + 9)
        if call == 2:
            head = {"content-range": f"bytes {len(body) - 5}-{len(body) - 1}/{len(body)}"}
            return replace(Answer.of(body[-5:], status=206), headers=head)
        return Answer.of(body)

    api.plan_batch(AT_ONCE)
    api.script_route(DOWNLOAD, wrong, repeat=True)
    result = run(*queued(3))
    assert result.exit_code == 0, result.stderr
    assert made() == live.images(1, 2, 3)


# ---------------------------------------------------------------------------------------- uploads


def test_inputs_that_the_account_has_lost_are_uploaded_again(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    edit = {"prompt": "night", "image": "room.png", "out": "night.png"}
    api.script_route(DELETE, server_error(), repeat=True)  # so that they are known to the next run
    assert run(*queued([edit])).exit_code == 0
    state = json.loads(STATE.read_text())
    state["uploads"] = {image_gen.file_digest("room.png"): "file-gone"}
    STATE.write_text(json.dumps(state))
    result = run(*queued([edit, edit | {"prompt": "day", "out": "day.png"}], "--skip-existing"))
    assert (result.exit_code, made()) == (0, ["day.png", "night.png"])


def test_lines_that_the_account_has_lost_are_uploaded_again(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, unauthorized())
    assert run(*queued(2)).exit_code == 4
    api.forget_files()
    assert run(*queued(2)).exit_code == 0
    assert made() == live.images(1, 2)


def test_many_inputs_are_uploaded_some_at_a_time(run: Run, api: ImagesAPI) -> None:
    jobs: list[Job] = []
    for number in range(12):
        name = picture(f"in{number}.png", size=(16 + number, 16))
        jobs.append({"prompt": "x", "image": name, "out": f"o{number}.png"})
    enough, arrivals = asyncio.Event(), count(1)

    async def together(ordinary: Ordinary) -> Answer:
        if next(arrivals) >= image_gen.CALLS_AT_ONCE:
            enough.set()
        await asyncio.wait_for(enough.wait(), 30)
        return await ordinary()

    api.script_route(UPLOAD, together, repeat=True)
    assert run(*queued(jobs, "--no-wait")).exit_code == 3
    assert asked(api, UPLOAD) == 13


# ---------------------------------------------------------------------------- cancel and no-wait


def test_cancel_ends_what_it_can_where_one_batch_cannot_be_looked_up(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(GOES_ON, GOES_ON)
    api.script_route(CREATE, answer_lost())
    jobs: list[Job] = ["a", {"prompt": "b", "model": FLARE}]
    run(*queued(jobs, "--no-wait", "--max-attempts", 1))
    api.script_route(LIST, server_error(), repeat=True)
    result = run(*queued(jobs, "--no-wait", "--cancel", "--max-attempts", 1))
    assert [batch.status for batch in api.batches][1] in ("cancelling", "cancelled")
    assert any(line.startswith("not cancelled: ") for line in live.lines(result))


def test_a_refused_cancel_is_told_with_how_the_batch_stands(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(GOES_ON)
    assert run(*queued(1, "--no-wait")).exit_code == 3
    api.script_route(CANCEL, status(409, "not now"), repeat=True)
    result = run(*queued(1, "--cancel", "--no-wait", "--max-attempts", 1))
    assert result.exit_code == 3
    assert any("not now" in line and "in_progress" in line for line in live.lines(result))


@pytest.mark.parametrize(
    ("reply", "code"),
    [(unauthorized(), 4), (status(400, "no", code="invalid_value"), 4), (status(403, "no"), 1)],
    ids=["a wrong key", "refused", "forbidden"],
)
def test_not_waiting_ends_with_3_only_if_something_waits(
    run: Run, api: ImagesAPI, reply: Reply, code: int
) -> None:
    api.script_route(CREATE, reply, repeat=True)
    result = run(*queued(2, "--no-wait"))
    assert (result.exit_code, len(api.batches)) == (code, 0)
    assert live.lines(result)


# -------------------------------------------------------------------------------- the state file


def pending(run: Run, *flags: object) -> Result:
    result = run(*queued(2, "--no-wait", *flags))
    assert result.exit_code == 3
    return result


def edited(change: Callable[[Json], object]) -> str:
    content = json.loads(STATE.read_text())
    change(content)
    return json.dumps(content)


DAMAGE: dict[str, Callable[[Json], object]] = {
    "foreign numbers": lambda state: state["shards"][0].update(numbers=[7]),
    "no numbers": lambda state: state["shards"][0].update(numbers=None),
    "an address for an id": lambda state: state["shards"][0].update(batch_id="../files/x"),
    "dots for an id": lambda state: state["shards"][0].update(batch_id=".."),
    "a number for an id": lambda state: state["shards"][0].update(batch_id=5),
    "foreign variants": lambda state: state.update(variants={"1": [9], "2": [0]}),
    "no variants": lambda state: state.update(variants={}),
    "no shards": lambda state: state.update(shards=[]),
    "null for a shard": lambda state: state.update(shards=[None]),
    "odd digests": lambda state: state.update(digests={"x": 1}),
    "odd uploads": lambda state: state.update(uploads=5),
    "another version": lambda state: state.update(version=99),
}
TEXTS = {"nested": "[" * 100_000, "nothing": "", "zeros": "\0" * 50, "a list": "[]"}


@pytest.mark.parametrize("damage", [*DAMAGE, *TEXTS])
def test_a_damaged_state_is_refused_and_nothing_is_submitted(
    run: Run, api: ImagesAPI, damage: str
) -> None:
    pending(run)
    STATE.write_text(TEXTS[damage] if damage in TEXTS else edited(DAMAGE[damage]))
    for flags in (["--batch-api"], []):
        result = run(*live.batch(2, *flags))
        assert result.exit_code == 2
        assert len(live.lines(result)) == 1
    assert len(api.batches) == 1
    assert api.image_requests == []


@pytest.mark.parametrize(
    "make",
    [os.mkdir, os.mkfifo, lambda name: os.symlink("/nowhere", name)],
    ids=["folder", "pipe", "link to nowhere"],
)
def test_what_is_no_state_file_is_refused(
    run: Run, api: ImagesAPI, make: Callable[[Path], None]
) -> None:
    Path("out").mkdir()
    make(STATE)
    result = run(*queued(2))
    assert (result.exit_code, api.requests) == (2, [])
    assert live.lines(result) == [f"{STATE} is no file; move it away"]


def test_a_folder_whose_state_is_gone_goes_on_with_its_batch(run: Run, api: ImagesAPI) -> None:
    pending(run)
    STATE.unlink()
    result = run(*queued(2))
    assert (result.exit_code, len(api.batches), made()) == (0, 1, live.images(1, 2))
    assert "was submitted for these jobs, going on" in result.stderr
    new = run(*queued(3, "--skip-existing"))
    assert (new.exit_code, len(api.batches)) == (0, 2)


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")


def test_a_batch_of_the_same_jobs_in_another_folder_is_named_and_not_adopted(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.plan_batch(GOES_ON)
    pending(run)
    elsewhere(monkeypatch)
    result = run(*queued(2))
    assert (result.exit_code, len(api.batches)) == (2, 1)
    assert api.batches[0].id in live.lines(result)[0]
    assert not STATE.exists()
    assert run(*queued(["something else"])).exit_code == 0


def test_other_jobs_are_not_submitted_beside_a_batch_of_a_folder_without_its_state(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(GOES_ON)
    pending(run)
    STATE.unlink()
    result = run(*queued(["job 1", "job 2", "job 3"]))
    assert (result.exit_code, len(api.batches)) == (2, 1)
    assert api.batches[0].id in live.lines(result)[0]


def test_a_part_of_a_run_that_waits_elsewhere_keeps_the_state_of_the_rest(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    second: Job = {"prompt": "b", "model": FLARE}
    api.plan_batch(GOES_ON)
    assert run(*queued(["a", second], "--only", 2, "--no-wait")).exit_code == 3
    elsewhere(monkeypatch)
    result = run(*queued(["a", second], "--no-wait"))
    assert (result.exit_code, len(api.batches), STATE.exists()) == (3, 2, True)
    assert api.batches[0].id in result.stderr


@pytest.mark.parametrize(
    "fault", [server_error(), status(404), no_answer()], ids=["500", "404", "nothing"]
)
def test_what_cannot_be_deleted_holds_up_nothing(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, fault: Reply
) -> None:
    monkeypatch.setattr(image_gen, "TIDY_SECONDS", 0.05)
    api.script_route(DELETE, fault, repeat=True)
    result = run(*queued(2))
    assert (result.exit_code, live.lines(result), made()) == (0, [], live.images(1, 2))
    assert asked(api, DELETE) <= image_gen.CALLS_AT_ONCE


def test_the_same_jobs_may_be_submitted_again_when_they_are_done(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*queued(2)).exit_code == 0
    elsewhere(monkeypatch)
    assert run(*queued(2)).exit_code == 0
    assert len(api.batches) == 2
    assert run(*queued(2, "--force")).exit_code == 0
    assert len(api.batches) == 3


def test_a_batch_that_has_ended_and_was_not_collected_is_collected_elsewhere(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a runner of continuous integration has gone, and its folder with it."""
    api.plan_batch(GOES_ON)
    assert run(*queued(2, "--no-wait")).exit_code == 3
    api.batches[0].states.append("completed")
    client = openai.OpenAI(max_retries=0)
    assert client.batches.retrieve(api.batches[0].id).status == "completed"
    client.close()
    elsewhere(monkeypatch)
    result = run(*queued(2))
    assert (result.exit_code, len(api.batches)) == (0, 1), result.stderr
    assert "was submitted for these jobs elsewhere, and has its files (--force" in result.stderr
    assert made() == live.images(1, 2)


def test_an_image_that_is_collected_has_its_line_once(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    edit = {"prompt": "night", "image": "room.png", "out": "night.png"}
    api.plan_batch(BatchPlan(states=("in_progress", "completed")))
    assert run(*queued([edit], "--no-wait")).exit_code == 3
    digest = image_gen.file_digest("room.png")
    os.remove("room.png")
    assert run(*queued([edit])).exit_code == 0
    (entry,) = manifest()
    assert (entry["prompt"], entry["asked"]["image"]) == ("night", [digest])
    state = json.loads(STATE.read_text())
    state["shards"][0]["settled"] = False
    STATE.write_text(json.dumps(state))
    assert run(*queued([edit])).exit_code == 0
    assert manifest() == [entry]


def test_a_run_that_is_done_tells_nothing_new(run: Run, api: ImagesAPI) -> None:
    api.script_route(POLL, ok())
    assert run(*queued(1)).exit_code == 0
    before = len(api.requests)
    assert run(*queued(1)).exit_code == 0
    assert len(api.requests) == before
