"""Streams: drafts that are saved while the request is open, and every way to break."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import live
import pytest
from images_api import PATIENCE, Answer, answer_cut, changed, stream_cut, told
from inputs import picture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cli import Result, Run, Start
    from images_api import ImagesAPI, Reply
    from inputs import Job, Json


@pytest.fixture(autouse=True)
def room() -> None:
    """The image of the edits."""
    picture("room.png")


def drafts(*numbers: int, stem: str = "fox", suffix: str = ".png") -> list[str]:
    return [f"{stem}.partial-{number}{suffix}" for number in numbers]


def made() -> list[str]:
    """What a run has left in the current directory."""
    return [name for name in live.names(".") if name not in ("room.png", "jobs.jsonl")]


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
    assert process.stderr.readline().startswith("about $")
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
    flags = (
        "--partial-images",
        str(count),
        "--keep-partials",
        "--json",
        "--downscale-max-dim",
        "9",
    )
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
    own = {"planned", "outputs", "seconds", "request_id", "usage"}
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
    whole_error = kind in ("server", "moderation", "rate_limit")  # which says all there is to say
    kept = [] if whole_error else ["fox.png.answer"]
    assert made() == sorted([*partials, *kept])
    for name in kept:
        assert f"; the answer is kept as {name}; what had come is kept: " in said
        assert Path(name).read_bytes().count(b'"partial_image_index"') >= len(partials)
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
    assert (again.exit_code, made()) == (
        0,
        [*drafts(*range(1, count + 1)), "fox.png", "fox.png.answer"],
    )


def test_a_stream_that_breaks_before_any_draft_is_sent_again(run: Run, api: ImagesAPI) -> None:
    api.script(stream_cut(0), answer_cut(0))
    assert run(*live.generate(*DRAFTED)).json["attempts"] == 3
    assert len(api.requests) == 3
    assert made() == ["fox.png"]


def test_a_stream_that_stalls_after_a_draft_keeps_it(run: Run, api: ImagesAPI) -> None:
    api.script(changed(lambda answer: replace(answer, pause=60)))
    broken(run(*live.generate(*DRAFTED, "--timeout", str(live.TIME_OUT))), "timeout", drafts(1))
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
    api.script(events(lambda chunks: [chunks[0], event(said)]))
    kind, code = judged
    failure = broken(run(*live.generate(*DRAFTED)), kind, drafts(1))
    assert (failure["code"], failure["retryable"]) == (code, retryable)
    assert said.get("error", said)["message"] in failure["message"]
    assert "HTTP" not in failure["message"]
    assert len(api.requests) == 1


def test_an_error_event_before_the_image_does_not_cost_it(run: Run, api: ImagesAPI) -> None:
    said = event({"type": "error", "error": SERVER})
    api.script(events(lambda chunks: [chunks[0], said, *chunks[1:]]))
    result = run(*live.generate(*DRAFTED))
    assert (result.exit_code, result.json["error"], made()) == (0, None, ["fox.png"])
    assert live.size_of("fox.png") == (64, 64)
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
    ("kind", "end"),
    [
        pytest.param("connection", lambda last: event(last, b64_json=""), id="no image"),
        pytest.param("bad_answer", lambda last: event(last, b64_json="%%%"), id="no base64"),
        pytest.param("bad_answer", lambda last: event(last, b64_json=NO_IMAGE), id="other bytes"),
        pytest.param("connection", lambda _: b"data: {nope\n\n", id="no JSON"),
        pytest.param("connection", lambda _: b"data: [1]\n\n", id="no object"),
    ],
)
def test_an_end_that_is_damaged_fails_the_job_and_keeps_the_drafts(
    run: Run, api: ImagesAPI, kind: str, end: Callable[[bytes], bytes]
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
    assert (record["error"]["kind"], record["error"]["maybe_billed"]) == (kind, True)
    damaged = [name for name in ("fox.png.damaged",) if name in record["error"]["message"]]
    assert made() == [*drafts(1, 2), "fox.png.answer", *damaged]
    assert b"".join(Path(name).read_bytes() for name in damaged) in (b"", b"no image")
    assert Path("fox.png.answer").read_bytes().count(b'"partial_image_index"') == 2
    assert "; the answer is kept as fox.png.answer; " in record["error"]["message"]
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
    kept = ["out/a.png.answer", *written]
    assert sorted(itertools.chain(kept, *partials)) == [f"out/{name}" for name in live.names()]
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


@pytest.mark.parametrize("flag", ["--json", "--force", "--skip-existing"])
def test_a_draft_takes_a_free_name_and_nothing_else_is_removed(
    run: Run, api: ImagesAPI, flag: str
) -> None:
    mine = Path(drafts(2)[0])
    mine.write_text("mine")
    kept = run(*live.generate(*DRAFTED, "--keep-partials", flag))
    beside_mine = "fox.partial-2-alt-1.png"
    assert kept.json["partials"] == [*drafts(1), beside_mine]
    assert mine.read_text() == "mine"
    Path("fox.png").unlink()
    assert run(*live.generate(*DRAFTED, flag)).exit_code == 0
    assert mine.read_text() == "mine"
    assert made() == sorted(["fox.png", *drafts(1), beside_mine, mine.name])
    assert len(api.requests) == 2


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
