"""Batches through the Batch API: what is submitted, once; what comes back, all of it."""

from __future__ import annotations

import base64
import json
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import image_gen
import live
import openai
import pytest
from images_api import (
    Answer,
    BatchPlan,
    answer_cut,
    answer_lost,
    batch_error,
    bomb_png,
    connection_closed,
    cut_output,
    document,
    html,
    moderation_blocked,
    ok,
    rate_limited,
    server_error,
    status,
    stray_output,
    token_limit_exceeded,
    unauthorized,
)
from inputs import FLARE, OLDER, Job, Json, encoded, mixed_jobs, picture
from PIL import Image
from queue_api import CANCEL, CREATE, DOWNLOAD, GOES_ON, LIST, POLL, STATE, UPLOAD, made, queued

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run, Start
    from images_api import ImagesAPI, Lines, Ordinary, Reply

AT_ONCE = {"retry-after-ms": "1"}
STRAY = b"what nobody asked for"


def routes(api: ImagesAPI) -> Counter[str]:
    return Counter(request.route for request in api.requests)


def bombed(line: Json) -> bool:
    """Put an image that Pillow does not unpack into a result."""
    (image,) = line["response"]["body"]["data"]
    image["b64_json"] = base64.b64encode(bomb_png()).decode()
    return True


def submitted(api: ImagesAPI) -> list[str]:
    """What the server was asked for in all batches, as the first words of the prompts."""
    asked = (line.body["prompt"] for each in api.batches for line in each.lines)
    return sorted(prompt.splitlines()[0].removeprefix("Primary request: ") for prompt in asked)


def uploads(api: ImagesAPI, purpose: str) -> list[bytes]:
    """What was uploaded, whether it is still there or not."""
    requests = [request for request in api.requests if request.route == UPLOAD]
    asked = [request for request in requests if request.body.get("purpose") == purpose]
    return [file.data for request in asked for file in request.files if request.status == 200]


def state() -> Json:
    content: Json = json.loads(STATE.read_bytes())
    return content


def failures(result: Result) -> dict[int, Json]:
    """The errors of a run by job."""
    return {line["job"]: line["error"] for line in result.json_lines if line["error"]}


def changed(change: Callable[[Json], object]) -> BatchPlan:
    """A batch whose output lines are spoilt in place."""

    def output(whole: Lines) -> Lines:
        for line in whole:
            content = json.loads(line)
            change(content)
            yield json.dumps(content).encode() + b"\n"

    return BatchPlan(output=output)


def before(act: Callable[[], object]) -> Reply:
    """The ordinary answer, after something has happened on this machine."""

    async def reply(ordinary: Ordinary) -> Answer:
        act()
        return await ordinary()

    return reply


@pytest.fixture
def no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is unknown to the API for good, not only as long as it is new."""
    monkeypatch.setattr(image_gen, "LAG_SECONDS", 0.0)


# --------------------------------------------------------------------------------- the same as live


def test_a_run_leaves_and_reports_what_a_live_run_does(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, list[Json], dict[str, bytes]]] = []
    costs: list[list[float | None]] = []
    own = ("attempts", "seconds", "request_id", "cost_usd")
    api.script_for("two webp", *[moderation_blocked()] * 2)
    flags = ("--json", "--downscale-max-dim", 32, "--contact-sheet", "sheet.png")
    for way in ((), ("--batch-api",)):
        Path(*way, "here").mkdir(parents=True)
        monkeypatch.chdir(Path(*way, "here"))
        jobs = mixed_jobs()
        result = run(*live.batch(jobs, *flags, *way))
        records = sorted(result.json_lines, key=lambda line: line["job"])
        contents = {name: Path("out", name).read_bytes() for name in made()}
        contents["sheet"] = Path("sheet.png").read_bytes()
        for record in records:
            record["request_id"] = record["error"] and record["error"].pop("message") and None
        costs.append([record["cost_usd"] for record in records])
        records = [{key: line[key] for key in line if key not in own} for line in records]
        found.append((result.exit_code, records, contents))
    at_once, in_batches = found
    assert [cost and 2 * cost for cost in costs[1]] == costs[0]
    assert at_once[0] == in_batches[0] == 4
    assert at_once[1] == in_batches[1]
    assert at_once[2] == in_batches[2]
    assert [line["status"] for line in at_once[1]].count("done") == len(jobs) - 1


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param([{"prompt": "a", "sise": "64x64"}], id="unknown key"),
        pytest.param([{"prompt": "a", "size": "10x10"}, {"prompt": "b", "n": 11}], id="values"),
        pytest.param([{"prompt": "a", "image": "nowhere.png"}], id="no input"),
        pytest.param([{"prompt": "a", "out": "x"}, {"prompt": "b", "out": "x"}], id="same name"),
        pytest.param([{"prompt": "a", "out": "mine"}], id="existing"),
    ],
)
def test_what_live_refuses_is_refused_in_the_same_words(
    run: Run, api: ImagesAPI, jobs: list[Job]
) -> None:
    Path("out").mkdir()
    picture("out/mine.png")
    at_once, in_batches = run(*live.batch(jobs)), run(*queued(jobs))
    assert (in_batches.exit_code, in_batches.stdout) == (2, "")
    assert in_batches.stderr == at_once.stderr
    assert api.requests == []
    assert live.names() == ["mine.png"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["--no-wait"], "--batch-api", id="no-wait alone"),
        pytest.param(["--cancel"], "--batch-api", id="cancel alone"),
        pytest.param(["--batch-api", "--cancel"], "nothing submitted", id="nothing to cancel"),
        pytest.param(["--batch-api", "--partial-images", "1"], "partial_images", id="drafts"),
        pytest.param(["--batch-api", "--concurrency", "0"], "1 to 25", id="concurrency"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run: Run, api: ImagesAPI, argv: list[str], said: str
) -> None:
    result = run(*live.batch(1, *argv))
    assert result.exit_code == 2
    (problem,) = live.lines(result)
    assert said in problem
    assert api.requests == []


def test_markup_is_refused_since_no_batch_carries_it(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    picture("drawing.png", "RGBA")
    job = {"prompt": "a", "model": FLARE, "image": "room.png", "markup": "drawing.png"}
    result = run(*queued([job]))
    assert (result.exit_code, api.requests) == (2, [])
    assert "line 1: markup" in live.lines(result)[0]


@pytest.mark.parametrize(
    ("jobs", "flags", "exit_code"),
    [
        (501, (), 2),
        (501, ("--batch-api",), 0),
        (50_001, ("--batch-api",), 2),
    ],
    ids=str,
)
def test_fifty_thousand_jobs_are_taken_where_live_takes_five_hundred(
    run: Run, jobs: int, flags: tuple[str, ...], exit_code: int
) -> None:
    result = run(*live.batch(["a fox"] * jobs, "--dry-run", *flags))
    assert result.exit_code == exit_code
    if exit_code:
        assert f"{jobs:,} jobs" in live.lines(result)[0]
    assert ("--batch-api" in result.stderr) == (jobs == 501 and exit_code == 2)


# --------------------------------------------------------------------------------- what is uploaded


def test_the_uploaded_lines_are_those_of_the_dry_run(run: Run, api: ImagesAPI) -> None:
    jobs = mixed_jobs()
    dry = run(*queued(jobs, "--dry-run"))
    assert (dry.exit_code, api.requests, live.names()) == (0, [], [])
    assert run(*queued(jobs, "--no-wait")).exit_code == 3
    contents = {f"upload of {name}": Path(name).read_bytes() for name in ("room.png", "mask.png")}
    contents["upload of chair.jpg"] = Path("chair.jpg").read_bytes()
    by_content = {content: file_id for file_id, content in contents.items()}
    ids = {
        file.id: by_content[b"".join(file.content())]
        for file in api.files
        if file.purpose == "vision"
    }
    sent = b"".join(uploads(api, "batch")).decode()
    for file_id, shown in ids.items():
        sent = sent.replace(file_id, shown)
    order = {line["custom_id"]: line for line in map(json.loads, sent.splitlines())}
    assert len(ids) == 3
    assert [order[line["custom_id"]] for line in dry.json_lines] == dry.json_lines
    assert len(order) == len(dry.json_lines) == len(jobs)


def test_a_dry_run_of_what_is_submitted_shows_no_lines_and_refuses_what_the_run_refuses(
    run: Run, api: ImagesAPI
) -> None:
    assert run(*queued(2, "--no-wait")).exit_code == 3
    asked = len(api.requests)
    dry = run(*queued(2, "--dry-run"))
    assert (dry.exit_code, dry.stdout) == (0, "")
    assert run(*queued(["a", "b"], "--dry-run")).exit_code == 2
    assert len(api.requests) == asked


JOBS_OF_FOUR_KINDS: list[Job] = [
    {"prompt": f"{kind} {number}", **options}
    for number in range(3)
    for kind, options in (
        ("draw", {}),
        ("redraw", {"image": "room.png"}),
        ("flare", {"model": FLARE}),
        ("edit with flare", {"image": "room.png", "model": FLARE}),
    )
]


def test_a_batch_has_one_endpoint_and_one_model(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    assert run(*queued(JOBS_OF_FOUR_KINDS)).exit_code == 0
    kinds = [f"{each.lines[0].body['model']} {each.endpoint}" for each in api.batches]
    models = (image_gen.DEFAULT_MODEL, FLARE)
    paths = ("/v1/images/edits", "/v1/images/generations")
    assert sorted(kinds) == [f"{model} {path}" for model in models for path in paths]
    assert [len(each.lines) for each in api.batches] == [3] * 4
    assert len(made()) == 12


FILLINGS = pytest.mark.parametrize(
    ("jobs", "sizes"), [(4, [4]), (5, [5]), (6, [5, 1]), (11, [5, 5, 1])], ids=str
)


@FILLINGS
def test_batches_are_filled_up_to_the_most_lines(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, jobs: int, sizes: list[int]
) -> None:
    api.limit_batches(lines=5)
    monkeypatch.setattr(image_gen, "MAX_BATCH_LINES", 5)
    assert run(*queued(jobs)).exit_code == 0
    assert [len(each.lines) for each in api.batches] == sizes
    assert len(made()) == jobs


@FILLINGS
def test_batches_are_filled_up_to_the_most_bytes(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, jobs: int, sizes: list[int]
) -> None:
    asked = [f"ünïcödé {number:02}" for number in range(jobs)]
    assert run(*queued(asked[:1], "--no-wait", "--out-dir", "one")).exit_code == 3
    (line,) = uploads(api, "batch")
    most = 5 * len(line) + 4  # from job 10 on a line has a byte more
    api.limit_batches(size=most)
    monkeypatch.setattr(image_gen, "MAX_BATCH_BYTES", most)
    assert run(*queued(asked)).exit_code == 0
    assert [len(each.lines) for each in api.batches[1:]] == sizes
    assert len(made()) == jobs


def test_each_distinct_input_is_uploaded_once_by_content(run: Run, api: ImagesAPI) -> None:
    for name in ("room.png", "same.png", "again.png"):
        picture(name)
    picture("chair.png", size=(32, 32))
    picture("mask.png", "RGBA")
    jobs: list[Job] = [
        {"prompt": "a", "image": ["room.png", "chair.png"], "mask": "mask.png"},
        {"prompt": "b", "image": "same.png", "mask": "mask.png"},
        {"prompt": "c", "image": ["again.png", "room.png"], "model": FLARE},
    ]
    assert run(*queued(jobs)).exit_code == 0
    contents = [Path(name).read_bytes() for name in ("room.png", "chair.png", "mask.png")]
    assert sorted(uploads(api, "vision")) == sorted(contents)
    first, second, third = (line.body for each in api.batches for line in each.lines)
    assert second["images"] == third["images"][:1] == third["images"][1:] == first["images"][:1]
    assert first["mask"] == second["mask"]
    assert "mask" not in third


# ----------------------------------------------------------------------------------- the state file


def test_the_state_is_on_disk_before_and_after_each_step(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    seen: list[tuple[str, Json]] = []
    for route in (UPLOAD, CREATE, POLL, DOWNLOAD):
        step = route.rpartition("/")[2]
        note = before(lambda step=step: seen.append((step, state())))  # type: ignore[misc]
        api.script_route(route, note, repeat=True)
    api.plan_batch(BatchPlan(states=("completed",)))
    assert run(*queued([{"prompt": "a", "image": "room.png"}])).exit_code == 0
    assert [step for step, _ in seen] == ["files", "files", "batches", "{batch_id}", "content"]
    image, lines_, created, polled, fetched = (content for _, content in seen)
    (digest,) = image["digests"].values()
    assert all(content["digests"] == {"1": digest} for _, content in seen)
    assert all(content["run"] == image["run"] for _, content in seen)
    (batch,) = api.batches
    assert (image["uploads"], image["shards"]) == ({}, [])
    assert len(lines_["uploads"]) == 1
    assert lines_["shards"][0]["file_id"] is None
    (shard,) = created["shards"]
    begun = (shard["file_id"], shard["creating"], shard["batch_id"])
    assert begun == (batch.input_file_id, True, None)
    for content in (polled, fetched):
        assert content["shards"] == [{**shard, "batch_id": batch.id}]
    assert state()["shards"] == [{**polled["shards"][0], "settled": True, "file_id": None}]
    assert state()["uploads"] == {}
    metadata = batch.metadata or {}
    named = (metadata["image_gen_run"], metadata["image_gen_shard"])
    assert named == (image["run"], "0")


def test_what_a_settled_run_has_uploaded_is_deleted_and_its_results_are_not(
    run: Run, api: ImagesAPI
) -> None:
    picture("room.png")
    jobs: list[Job] = [{"prompt": "a", "image": "room.png"}, {"prompt": "b", "model": FLARE}]
    api.plan_batch(BatchPlan(states=("completed",)), BatchPlan(states=("in_progress", "completed")))
    assert run(*queued(jobs, "--no-wait")).exit_code == 3
    assert {file.purpose for file in api.files} == {"vision", "batch", "batch_output"}
    assert run(*queued(jobs)).exit_code == 0
    assert {file.purpose for file in api.files} == {"batch_output"}


def test_the_state_holds_no_key(run: Run, api: ImagesAPI) -> None:
    assert run(*queued(1)).exit_code == 0
    assert api.env()["OPENAI_API_KEY"] not in STATE.read_text()


def test_a_run_that_is_finished_asks_the_server_nothing_more(run: Run, api: ImagesAPI) -> None:
    assert run(*queued(2)).exit_code == 0
    asked = len(api.requests)
    again = run(*queued(2, "--json"))
    assert (again.exit_code, live.outcomes(again)) == (0, ["skipped"] * 2)
    assert len(api.requests) == asked


def test_force_submits_everything_anew(run: Run, api: ImagesAPI) -> None:
    for _ in range(2):
        assert run(*queued(2, "--force")).exit_code == 0
    assert submitted(api) == ["job 1", "job 1", "job 2", "job 2"]
    assert made() == live.images(1, 2)


EDIT = {"prompt": "b", "image": "room.png"}


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(["other", EDIT], id="a prompt"),
        pytest.param(["a", EDIT, "c"], id="one more"),
        pytest.param(["a"], id="one less"),
        pytest.param([EDIT, "a"], id="another order"),
        pytest.param(["a", {**EDIT, "n": 2}], id="more images"),
        pytest.param(["a", {**EDIT, "image": "chair.png"}], id="another input"),
        pytest.param([{"prompt": "a", "out": "elsewhere"}, EDIT], id="another name"),
    ],
)
def test_changed_jobs_are_refused_and_told_how_to_go_on(
    run: Run, api: ImagesAPI, jobs: list[Job]
) -> None:
    picture("room.png")
    picture("chair.png", size=(32, 32))
    assert run(*queued(["a", EDIT], "--no-wait")).exit_code == 3
    asked, kept = len(api.requests), STATE.read_bytes()
    result = run(*queued(jobs))
    assert (result.exit_code, result.stdout) == (2, "")
    (problem,) = live.lines(result)
    for way_on in ("--out-dir", "--cancel", "--input"):
        assert way_on in problem
    assert "delete" not in problem  # what is lost with the state would be paid again
    assert (len(api.requests), STATE.read_bytes()) == (asked, kept)
    run(*queued(["a", EDIT], "--cancel"))
    assert run(*queued(jobs, "--skip-existing")).exit_code == 0
    assert all(image_gen.saved_file(f"out/{name}") for name in made())


def test_a_changed_input_file_is_a_changed_job(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    assert run(*queued([EDIT], "--no-wait")).exit_code == 3
    picture("room.png", size=(32, 32))
    asked = len(api.requests)
    assert run(*queued([EDIT])).exit_code == 2
    assert len(api.requests) == asked


def test_jobs_may_change_as_long_as_nothing_was_submitted(run: Run, api: ImagesAPI) -> None:
    api.script_route(UPLOAD, unauthorized())
    failed = run(*queued(2))
    assert failed.exit_code == 4
    assert any("OPENAI_API_KEY" in line for line in live.lines(failed))
    assert run(*queued(["a", "b", "c"])).exit_code == 0
    assert submitted(api) == ["a", "b", "c"]


def test_jobs_may_change_after_their_batch_was_refused(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, status(400, "This model has no batches.", code="model_not_supported"))
    failed = run(*queued(["a", "b"], "--json"))
    assert failed.exit_code == 4
    assert {failure["code"] for failure in failures(failed).values()} == {"model_not_supported"}
    assert run(*queued(["a", "c"])).exit_code == 0
    assert submitted(api) == ["a", "c"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"version": 99}', b"\xff"], ids=repr)
def test_a_state_that_cannot_be_read_is_refused_and_kept(
    run: Run, api: ImagesAPI, content: bytes
) -> None:
    Path("out").mkdir()
    STATE.write_bytes(content)
    result = run(*queued(1))
    assert (result.exit_code, api.requests) == (2, [])
    assert str(STATE) in live.lines(result)[0]
    assert STATE.read_bytes() == content


def test_a_second_process_is_refused_and_ctrl_c_leaves_the_batches_running(
    run: Run, api: ImagesAPI, start_process: Start
) -> None:
    api.plan_batch(GOES_ON)
    argv = queued(2)
    first = start_process(*argv)
    api.wait_until(lambda requests: any(request.route == POLL for request in requests))
    second = run(*argv)
    assert (second.exit_code, second.stdout) == (2, "")
    assert "another process" in live.lines(second)[0]
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate()
    assert (first.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert "paid for" not in stderr
    assert "repeat the command" in stderr
    assert "--cancel" in stderr
    assert routes(api)[CANCEL] == 0
    api.batches[0].states.append("completed")
    assert run(*argv).exit_code == 0
    assert (submitted(api), made()) == (live.prompts(2), live.images(1, 2))


def test_a_process_that_started_at_the_same_moment_submits_nothing_twice(
    run: Run, api: ImagesAPI, run_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight: Callable[..., list[str]] = image_gen.preflight
    argv = queued(2, "--no-wait")
    other: list[Result] = []

    def overtaken(*arguments: object) -> list[str]:
        other.append(run_process(*argv))
        return preflight(*arguments)

    monkeypatch.setattr(image_gen, "preflight", overtaken)
    run(*argv)
    assert other
    assert submitted(api) == live.prompts(2)


# ------------------------------------------------------------------------- a create that goes wrong


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(rate_limited(0.001), id="429"),
        pytest.param(answer_lost(), id="answer lost"),
        pytest.param(answer_cut(), id="answer cut"),
        pytest.param(connection_closed(), id="closed"),
        pytest.param(server_error(), id="500"),
        pytest.param(html(502), id="502"),
        pytest.param(status(409), id="409"),
    ],
)
@pytest.mark.parametrize("attempts", [1, 3], ids=["found by the next run", "found by this run"])
def test_a_create_that_fails_never_submits_twice(
    run: Run, api: ImagesAPI, fault: Reply, attempts: int
) -> None:
    api.script_route(CREATE, fault)
    results = [run(*queued(2, "--max-attempts", attempts)) for _ in range(2)]
    assert results[1].exit_code == 0
    assert submitted(api) == live.prompts(2)
    assert len(api.batches) == 1
    assert made() == live.images(1, 2)


def test_a_lost_batch_is_found_behind_a_page_of_others(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, answer_lost())
    assert run(*queued(1, "--max-attempts", 1)).exit_code == 1
    (ours,) = api.batches
    with openai.OpenAI() as client:
        for _ in range(120):
            client.batches.create(
                input_file_id=ours.input_file_id,
                endpoint="/v1/images/generations",
                completion_window="24h",
            )
    assert run(*queued(1)).exit_code == 0
    assert len(api.batches) == 121
    assert routes(api)[LIST] > 1


def test_the_rate_limit_is_waited_for_no_longer_than_max_wait(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, *[rate_limited(0.02)] * 100)
    result = run(*queued(1, "--max-wait", 0.1))
    assert result.exit_code == 1
    assert any("--max-wait" in line for line in live.lines(result))
    assert routes(api)[CREATE] <= 10


def test_a_batch_that_is_refused_does_not_keep_the_others_from_being_collected(
    run: Run, api: ImagesAPI
) -> None:
    refusal = status(400, "Billing hard limit.", code="billing_hard_limit_reached")
    api.script_route(CREATE, ok(), refusal, refusal)
    argv = queued(["a", {"prompt": "b", "model": FLARE}], "--json")
    first = run(*argv)
    assert first.exit_code == 4
    assert live.outcomes(first)[0] == "done"
    assert failures(first)[2]["code"] == "billing_hard_limit_reached"
    run(*argv)
    assert run(*argv).exit_code == 0
    assert (submitted(api), made()) == (["a", "b"], ["001-a.png", "002-b.png"])


# --------------------------------------------------------------------------- waiting and collecting


def test_no_wait_returns_after_submitting_and_the_same_command_collects_later(
    run: Run, api: ImagesAPI
) -> None:
    first = run(*queued(2, "--no-wait", "--json"))
    assert (first.exit_code, live.outcomes(first), made()) == (3, ["submitted"] * 2, [])
    assert {failure["kind"] for failure in failures(first).values()} == {"submitted"}
    assert "repeat the command" in first.stderr
    assert run(*queued(2, "--no-wait")).exit_code == 3
    assert run(*queued(2, "--no-wait")).exit_code == 0
    assert (submitted(api), made()) == (live.prompts(2), live.images(1, 2))


def test_results_are_collected_although_the_inputs_are_gone(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    argv = queued([EDIT])
    assert run(*argv, "--no-wait").exit_code == 3
    Path("room.png").unlink()
    assert run(*argv).exit_code == 0
    assert (len(api.batches), made()) == (1, ["001-b.png"])


@pytest.mark.usefixtures("real_waits")
def test_polls_back_off_from_five_seconds_to_sixty_and_show_the_counts(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []

    async def sleep(_: image_gen.Halt, seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(image_gen.Halt, "sleep", sleep)
    api.plan_batch(BatchPlan(states=("in_progress",) * 12 + ("finalizing", "completed")))
    result = run(*queued(4))
    assert result.exit_code == 0
    waits = [delay for delay in delays if delay]
    assert (waits[0], waits[-1], sorted(waits)) == (5, 60, waits)
    for shown in ("in_progress, 2/4 done", "completed, 4/4 done"):
        assert sum(shown in line for line in result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "route", [UPLOAD, POLL, DOWNLOAD], ids=lambda route: route.partition("/v1/")[2]
)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(server_error(503, headers=AT_ONCE), id="503"),
        pytest.param(rate_limited(headers=AT_ONCE), id="429"),
        pytest.param(answer_cut(), id="cut"),
        pytest.param(answer_lost(), id="lost"),
    ],
)
def test_a_fault_of_any_other_step_is_met_with_another_request(
    run: Run, api: ImagesAPI, route: str, fault: Reply
) -> None:
    picture("room.png")
    api.script_route(route, fault)
    result = run(*queued([EDIT]))
    assert result.exit_code == 0, result.stderr
    assert Path("room.png").read_bytes() in uploads(api, "vision")
    assert (submitted(api), made()) == (["b"], ["001-b.png"])


def test_a_wait_outlives_a_server_that_is_away_for_some_polls(run: Run, api: ImagesAPI) -> None:
    api.script_route(POLL, *[server_error(503, headers=AT_ONCE)] * 8)
    assert run(*queued(1)).exit_code == 0


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(server_error(503), id="503"),
        pytest.param(rate_limited(), id="429"),
        pytest.param(html(200), id="a portal"),
        pytest.param(answer_lost(), id="no answer"),
    ],
)
def test_a_wait_outlives_any_number_of_polls_without_an_answer(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch, fault: Reply
) -> None:
    monkeypatch.setattr(image_gen, "MAX_POLL_SECONDS", 0.005)
    api.script_route(POLL, *[fault] * 40)
    result = run(*queued(2, "--max-wait", 0.01, "--max-attempts", 1))
    assert result.exit_code == 0, result.stderr
    assert (len(api.batches), made()) == (1, live.images(1, 2))
    assert len(result.stderr.splitlines()) < 9  # one and the same fault is told once


def test_without_waiting_each_batch_is_asked_for_as_often_as_the_others(
    run: Run, api: ImagesAPI
) -> None:
    models = [image_gen.DEFAULT_MODEL, FLARE, OLDER[-1]]
    argv = queued([{"prompt": "a", "model": model} for model in models], "--json", "--no-wait")
    assert run(*argv).exit_code == 3
    api.script_route(POLL, *[server_error(503, headers=AT_ONCE)] * 8)
    result = run(*argv, "--max-attempts", "3")
    asked = Counter(request.path for request in api.requests if request.route == POLL)
    assert sorted(asked.values()) == [4, 4, 4]
    assert live.outcomes(result) == ["submitted"] * 3


# ------------------------------------------------------------------------------ how a batch can end


@pytest.mark.parametrize(
    ("plan", "codes", "done"),
    [
        (BatchPlan(), set(), 4),
        (BatchPlan(states=("completed",)), set(), 4),
        (BatchPlan(states=("in_progress", "expired"), share=0.5), {"batch_expired"}, 2),
        (BatchPlan(states=("expired",), share=0), {"batch_expired"}, 0),
        (BatchPlan(states=("cancelled",), share=0.25), {"batch_cancelled"}, 1),
        (BatchPlan(errors=(token_limit_exceeded(),)), {"token_limit_exceeded"}, 0),
    ],
    ids=["completed", "at once", "half expired", "expired", "cancelled elsewhere", "failed"],
)
def test_every_end_gives_its_codes_and_skip_existing_submits_only_what_is_missing(
    run: Run, api: ImagesAPI, plan: BatchPlan, codes: set[str], done: int
) -> None:
    api.plan_batch(plan)
    result = run(*queued(4, "--json"))
    assert result.exit_code == int(done < 4)
    assert {failure["code"] for failure in failures(result).values()} == codes
    assert all(failure["retryable"] for failure in failures(result).values())
    assert all("HTTP 0" not in failure["message"] for failure in failures(result).values())
    assert live.outcomes(result).count("done") == len(made()) == done
    assert len(live.lines(result)) == (done < 4)  # whatever is said of them, it is said once
    assert ("--skip-existing" in result.stderr) == (done < 4)
    asked = len(api.requests)
    again = run(*queued(4))
    assert (again.exit_code, len(api.requests)) == (4 * (done < 4), asked)
    assert bool(live.lines(again)) == ("--skip-existing" in again.stderr) == (done < 4)
    assert run(*queued(4, "--skip-existing")).exit_code == 0
    assert made() == live.images(1, 2, 3, 4)
    assert [len(each.lines) for each in api.batches[1:]] == [4 - done] * (done < 4)


def test_variants_that_are_missing_are_submitted_alone(run: Run, api: ImagesAPI) -> None:
    job: Job = {"prompt": "a", "n": 3}
    assert run(*queued([job])).exit_code == 0
    Path("out/001-a-2.png").unlink()
    assert run(*queued([job], "--skip-existing")).exit_code == 0
    assert [each.lines[0].body["n"] for each in api.batches] == [3, 1]
    assert made() == ["001-a-1.png", "001-a-2.png", "001-a-3.png"]


def test_a_failed_validation_is_shown_with_the_numbers_of_the_jobs(
    run: Run, api: ImagesAPI
) -> None:
    errors = (
        batch_error("invalid_value", "The first is wrong.", 1),
        batch_error("mismatched", "The third is wrong.", 3),
        batch_error("outside", "Beyond the end.", 99),
        batch_error("whole", "About the file."),
    )
    api.plan_batch(BatchPlan(errors=errors))
    result = run(*queued(["# a comment", *live.prompts(4)], "--json"))
    assert (result.exit_code, live.outcomes(result)) == (1, ["failed"] * 4)
    found = failures(result)
    assert "The first is wrong." in found[1]["message"]
    assert "The third is wrong." in found[3]["message"]
    assert (found[1]["code"], found[3]["code"]) == ("invalid_value", "mismatched")
    assert "job 1: The first is wrong." in found[2]["message"]
    assert "job 3: The third is wrong." in found[2]["message"]


def test_an_error_file_without_an_output_file_gives_each_job_its_error(
    run: Run, api: ImagesAPI
) -> None:
    api.script_for("job 1", moderation_blocked("Rejected: gore."))
    api.script_for("job 2", status(400, "Unknown.", code="unknown_parameter"))
    api.script_for("job 3", server_error(502))
    result = run(*queued(3, "--json"))
    assert result.exit_code == 1
    assert api.batches[0].output_file_id is None
    found = failures(result)
    kinds = [(found[number]["kind"], found[number]["code"]) for number in (1, 2, 3)]
    assert kinds == [
        ("moderation", "moderation_blocked"),
        ("invalid_request", "unknown_parameter"),
        ("server", "502"),
    ]
    assert [found[number]["retryable"] for number in (1, 2, 3)] == [False, False, True]
    ids = {f"req_{line.id}" for line in api.batches[0].lines}
    assert {line["request_id"] for line in result.json_lines} == ids
    assert "Rejected: gore." in result.stderr


@pytest.mark.parametrize("shown", ["detail", "url"])
def test_a_refusal_that_shows_a_picture_is_a_refusal(run: Run, api: ImagesAPI, shown: str) -> None:
    url = f"data:image/png;base64,{base64.b64encode(encoded(Image.new('RGB', (9, 9)))).decode()}"
    body: Json = {"detail": [{"msg": "bad", "input": {"image": url}}]}
    if shown == "url":
        body = {"message": "bad", "url": "https://example.org/docs"}
    api.plan_batch(changed(lambda line: line["response"].update(status_code=422, body=body)))
    result = run(*queued(2))
    assert live.error(result) == "line 1: refused, HTTP 422: bad (also line 2)"
    assert made() == []


@pytest.mark.parametrize("code", ["200", 201, None, 502])
def test_an_image_of_a_result_counts_whatever_its_status_says(
    run: Run, api: ImagesAPI, code: object
) -> None:
    api.plan_batch(changed(lambda line: line["response"].update(status_code=code)))
    assert run(*queued(2)).exit_code == 0
    assert made() == live.images(1, 2)


@pytest.mark.parametrize(
    ("kept", "change"),
    [
        pytest.param("", lambda line: line.update(response=None, error="gone"), id="error is text"),
        pytest.param("", lambda line: line.update(response="gone"), id="response is text"),
        pytest.param("", lambda line: line.update(response=[1]), id="response is a list"),
        pytest.param(
            "", lambda line: line.update(response={"status_code": "200"}), id="text and no body"
        ),
        pytest.param("answer", lambda line: line["response"].update(body=None), id="no body"),
        pytest.param(
            "answer damaged", lambda line: line["response"].update(body="gone"), id="body is text"
        ),
        pytest.param(
            "",
            lambda line: line["response"].update(status_code=502, body="gone"),
            id="502 with text",
        ),
        pytest.param(
            "",
            lambda line: line["response"].update(status_code=500, body={"error": "gone"}),
            id="500 with text",
        ),
        pytest.param(
            "answer", lambda line: line["response"]["body"].update(data=[]), id="no image"
        ),
        pytest.param(
            "answer", lambda line: line["response"]["body"].update(data=[7]), id="no base64"
        ),
    ],
)
def test_an_odd_result_fails_its_job_alone(
    run: Run, api: ImagesAPI, kept: str, change: Callable[[Json], object]
) -> None:
    api.plan_batch(changed(lambda line: line["custom_id"] == "job-1" and change(line)))
    result = run(*queued(3, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (1, ["failed", "done", "done"])
    assert "Traceback" not in result.stderr
    assert failures(result)[1]["kind"] != "internal"
    names = [f"001-job-1.png.{suffix}" for suffix in kept.split()]
    assert made() == [*names, *live.images(2, 3)]
    for name in names:
        assert f"kept as out/{name}" in failures(result)[1]["message"]
    if kept:  # as it came: a whole line, in which nothing is left to be changed
        line, again = (json.loads(Path("out", names[0]).read_bytes()) for _ in range(2))
        change(again)
        assert (line["custom_id"], line) == ("job-1", again)


@pytest.mark.parametrize(
    "odd",
    [b"[]", b"7", b"{}", b'{"custom_id": 7}', b"\xff", b"", b"not json", b"[" * 100_000],
    ids=lambda odd: repr(odd[:20]),
)
def test_a_line_that_is_no_result_is_passed_over(run: Run, api: ImagesAPI, odd: bytes) -> None:
    api.plan_batch(BatchPlan(output=lambda whole: [odd + b"\n", *whole]))
    result = run(*queued(2, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "done"])
    assert "Traceback" not in result.stderr


def renamed(whole: Lines) -> Lines:
    """The results, and the first once more under a name that no job has."""
    first, *others = whole
    yield from (first.replace(b'"job-', b'"../job-'), first, *others)


def test_an_image_that_nobody_asked_for_is_told_and_kept(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(output=renamed))
    result = run(*queued(2, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "done"])
    (stray,) = set(made()) - set(live.images(1, 2))
    assert image_gen.saved_file(f"out/{stray}")
    assert any("../job-" in line and stray in line for line in live.lines(result, "Warning: "))
    assert live.names(".") == ["jobs.jsonl", "out"]


def test_a_result_that_comes_twice_changes_nothing(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(output=lambda whole: [*(two := list(whole)), *two]))
    result = run(*queued(2, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (0, ["done", "done"])
    assert {*live.images(1, 2)} <= {*made()}


def test_a_stray_error_is_told(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(output=stray_output))
    result = run(*queued(1))
    assert (result.exit_code, made()) == (0, live.images(1))
    assert any("nobody" in line for line in live.lines(result, "Warning: "))


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "in a line": lambda body: body[:-100],
    "at the end of a line": lambda body: body[: body.rstrip().rindex(b"\n") + 1],
    "before its first line": lambda _: b"",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("wait", [[], ["--no-wait"]], ids=["waiting", "by the next run"])
def test_a_file_that_is_shorter_than_it_should_be_is_asked_for_again(
    run: Run, api: ImagesAPI, cut: Callable[[bytes], bytes], wait: list[str]
) -> None:
    async def truncated(ordinary: Ordinary) -> Answer:
        return Answer.of(cut((await ordinary()).whole()))

    api.script_route(DOWNLOAD, *[truncated] * 3)
    api.plan_batch(BatchPlan(states=("completed",)))
    codes = [run(*queued(3, *wait)).exit_code for _ in range(4 if wait else 1)]
    assert codes == ([3, 3, 3, 0] if wait else [0])
    assert (len(api.batches), made()) == (1, live.images(1, 2, 3))


def test_an_output_file_that_is_not_there_yet_is_waited_for(run: Run, api: ImagesAPI) -> None:
    hidden = document(lambda batch: batch.update(output_file_id=None))
    api.plan_batch(BatchPlan(states=("completed",)))
    api.script_route(POLL, hidden, hidden)
    assert run(*queued(2)).exit_code == 0
    assert (len(api.batches), made()) == (1, live.images(1, 2))


def test_what_a_file_lacks_for_ever_is_given_up_by_cancel_and_then_submitted(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(BatchPlan(output=cut_output))
    soon = ("--max-wait", 0.01)
    for _ in range(2):
        result = run(*queued(3, *soon))
        assert "has not given all its results" in live.error(result)
        assert "To collect the images, repeat the command;" in result.stderr
        assert "--skip-existing" not in result.stderr
    assert run(*queued(3, *soon, "--cancel")).exit_code == 1
    assert run(*queued(3, "--skip-existing")).exit_code == 0
    assert made() == live.images(1, 2, 3)
    assert [len(each.lines) for each in api.batches] == [3, 1]


def test_what_stops_the_account_is_said_of_every_job_that_it_keeps_from_being_submitted(
    run: Run, api: ImagesAPI
) -> None:
    api.script_route(CREATE, unauthorized())
    result = run(*queued(["a", {"prompt": "b", "model": FLARE}], "--json"))
    assert result.exit_code == 4
    assert {failure["kind"] for failure in failures(result).values()} == {"authentication"}
    assert (routes(api)[CREATE], len(failures(result))) == (1, 2)
    error = live.error(result)
    assert error.startswith("2 jobs not sent: authentication, HTTP 401: ")


def test_a_line_that_is_wrong_is_the_only_problem_of_a_folder_that_waits_to_be_collected(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(BatchPlan(states=("in_progress", "completed"), output=cut_output))
    assert run(*queued(3, "--no-wait")).exit_code == 3
    assert run(*queued(3, "--max-wait", 0.01)).exit_code == 1
    result = run(*queued(["job 1", {"prompt": "job 2", "siez": "auto"}, "job 3"]))
    (problem,) = live.lines(result)
    assert result.exit_code == 2
    assert problem.startswith('line 2: unknown key "siez"')


# ---------------------------------------------------------------------------------- nothing is lost


def test_a_link_to_nowhere_under_the_name_of_an_image_is_kept_and_ours_saved_beside_it(
    run: Run, api: ImagesAPI
) -> None:
    link = Path("out/001-job-1.png")
    api.script_route(DOWNLOAD, before(lambda: link.symlink_to("nowhere")))
    assert run(*queued(1)).exit_code == 0
    assert link.is_symlink()
    assert made() == ["001-job-1-alt-1.png", "001-job-1.png"]
    assert live.size_of("out/001-job-1-alt-1.png") == (64, 64)


def test_collecting_again_does_not_make_the_copies_again(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(states=("in_progress", "completed"), output=cut_output))
    argv = queued(3, "--downscale-max-dim", 32, "--max-wait", 0.01)
    assert run(*argv, "--no-wait").exit_code == 3
    assert run(*argv).exit_code == 1
    (copy, *_) = Path("out").glob("*-web.png")
    before = copy.stat().st_ino
    assert run(*argv).exit_code == 1
    assert copy.stat().st_ino == before


def test_fail_fast_means_nothing_to_a_copy_that_cannot_be_made(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(changed(lambda line: line["custom_id"] == "job-1" and bombed(line)))
    flags = ("--skip-existing", "--fail-fast", "--downscale-max-dim", 32, "--json")
    result = run(*queued(3, *flags))
    assert sorted(live.outcomes(result)) == ["done", "done", "failed"]
    assert failures(result)[1]["kind"] == "downscale"
    assert made() == sorted([*live.images(1, 2, 3), "002-job-2-web.png", "003-job-3-web.png"])


def test_a_picture_that_someone_put_there_meanwhile_is_kept_and_ours_saved_beside_it(
    run: Run, api: ImagesAPI
) -> None:
    assert run(*queued(2, "--no-wait")).exit_code == 3
    theirs = Path(picture("out/001-job-1.png", size=(32, 32))).read_bytes()
    result = run(*queued(2))
    assert result.exit_code == 0
    assert Path("out/001-job-1.png").read_bytes() == theirs
    assert len(made()) == 3
    assert any("appeared meanwhile" in line for line in live.lines(result, "Warning: "))
    assert len(api.batches) == 1


def test_what_was_saved_beside_it_is_not_saved_again_by_the_next_collection(
    run: Run, api: ImagesAPI
) -> None:
    api.plan_batch(BatchPlan(states=("in_progress", "completed"), output=cut_output))
    assert run(*queued(3, "--no-wait")).exit_code == 3
    for name in live.images(1, 2, 3):
        picture(f"out/{name}", size=(32, 32))
    soon = ("--max-wait", 0.01)
    seen = [made() for _ in range(3) if run(*queued(3, *soon)).exit_code == 1]
    assert [len(found) for found in seen] == [5, 5, 5]


def test_an_image_that_cannot_be_written_is_collected_by_the_next_run(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(temporary: str, name: str) -> None:
        if name.endswith("job-1.png"):
            raise OSError(28, "No space left on device")
        place(temporary, name)

    place: Callable[[str, str], None] = image_gen.place
    with monkeypatch.context() as patch:
        patch.setattr(image_gen, "place", full)
        result = run(*queued(2, "--json"))
    assert (result.exit_code, live.outcomes(result)) == (1, ["failed", "done"])
    assert "No space left" in result.stderr
    assert run(*queued(2)).exit_code == 0
    assert (submitted(api), made()) == (live.prompts(2), live.images(1, 2))


@pytest.mark.usefixtures("no_lag")
@pytest.mark.parametrize(
    ("route", "reply", "said"),
    [
        pytest.param(POLL, status(404, "No batch found."), "No batch found.", id="no such batch"),
        pytest.param(POLL, unauthorized(), "OPENAI_API_KEY", id="wrong key"),
    ],
)
def test_a_refused_step_is_told_without_a_remedy_for_something_else(
    run: Run, api: ImagesAPI, route: str, reply: Reply, said: str
) -> None:
    api.script_route(route, reply)
    result = run(*queued(1))
    assert result.exit_code == (4 if said == "OPENAI_API_KEY" else 1)
    assert any(said in line for line in live.lines(result))
    assert "--model" not in result.stderr
    assert run(*queued(1)).exit_code == 0
    assert (len(api.batches), made()) == (1, live.images(1))


@pytest.mark.usefixtures("no_lag")
def test_a_batch_that_is_gone_does_not_keep_the_others_from_being_collected(
    run: Run, api: ImagesAPI
) -> None:
    argv = queued(["a", {"prompt": "b", "model": FLARE}], "--json")
    assert run(*argv, "--no-wait").exit_code == 3
    api.script_route(POLL, status(404, "It is gone."))
    result = run(*argv)
    assert (result.exit_code, len(made())) == (1, 1)
    (failure,) = failures(result).values()
    assert "It is gone." in failure["message"]


# --------------------------------------------------------------------------------------- cancelling


def test_cancel_collects_what_is_finished_and_the_rest_can_be_submitted_later(
    run: Run, api: ImagesAPI
) -> None:
    assert run(*queued(4, "--no-wait")).exit_code == 3
    result = run(*queued(4, "--cancel", "--json"))
    assert (result.exit_code, live.outcomes(result).count("done")) == (1, 2)
    assert {failure["code"] for failure in failures(result).values()} == {"batch_cancelled"}
    assert (api.batches[0].status, len(made())) == ("cancelled", 2)
    assert run(*queued(4, "--cancel")).exit_code == 2
    assert run(*queued(4, "--skip-existing")).exit_code == 0
    assert [len(each.lines) for each in api.batches] == [4, 2]
    assert made() == live.images(1, 2, 3, 4)


def test_cancel_of_what_has_ended_already_only_collects(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(BatchPlan(states=("in_progress", "completed")))
    assert run(*queued(2, "--no-wait")).exit_code == 3
    with openai.OpenAI() as client:
        assert client.batches.retrieve(api.batches[0].id).status == "completed"
    assert run(*queued(2, "--cancel")).exit_code == 0
    assert (api.batches[0].status, made()) == ("completed", live.images(1, 2))


def test_cancel_goes_on_after_a_fault(run: Run, api: ImagesAPI) -> None:
    argv = queued(["a", {"prompt": "b", "model": FLARE}])
    assert run(*argv, "--no-wait").exit_code == 3
    api.script_route(CANCEL, server_error(503, headers=AT_ONCE))
    run(*argv, "--cancel")
    assert [each.status for each in api.batches] == ["cancelled", "cancelled"]


def test_cancel_finds_a_batch_whose_creation_was_not_answered(run: Run, api: ImagesAPI) -> None:
    api.script_route(CREATE, answer_lost())
    assert run(*queued(2, "--max-attempts", 1)).exit_code == 1
    result = run(*queued(2, "--cancel"))
    assert result.exit_code == 1
    assert "repeat the command without --cancel with --skip-existing" in result.stderr
    assert (len(api.batches), api.batches[0].status, len(made())) == (1, "cancelled", 1)


def test_cancel_without_waiting_says_that_it_is_not_finished(run: Run, api: ImagesAPI) -> None:
    api.plan_batch(GOES_ON)
    assert run(*queued(2, "--no-wait")).exit_code == 3
    cancelled = run(*queued(2, "--cancel", "--no-wait"))
    assert cancelled.exit_code in {1, 3}
    assert run(*queued(2)).exit_code in {1, 4}
    assert (api.batches[0].status, len(made())) == ("cancelled", 1)
