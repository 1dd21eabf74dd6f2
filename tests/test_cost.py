"""What a command will cost, what it has cost, and the cap of --max-cost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import dry
import image_gen
import live
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from images_api import (
    answer_cut,
    answer_lost,
    connection_closed,
    delayed,
    document,
    empty_data,
    html,
    moderation_blocked,
    ok,
    rate_limited,
    server_error,
    status,
    truncated_image,
)
from inputs import FLARE, picture
from queue_api import CREATE, GOES_ON, queued

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Result, Run
    from images_api import ImagesAPI, Reply
    from inputs import Job, Json

SQUARE = ("--size", "1024x1024")
SMALL = ("--size", "816x816", "--quality", "low")
CLOSING = "prompts and input images come on top"


def said(result: Result) -> str:
    """The line about the cost, which is the first one."""
    first, *_ = result.stderr.splitlines() or [""]
    return first


def capped(jobs: int | list[Job], cap: float, *flags: object) -> list[str]:
    """The command line of a batch of small images with a cap."""
    return live.batch(jobs, *SMALL, "--max-cost", f"{cap:.6f}", *flags)


def bound(prompt: str, *, size: str = "816x816", quality: str = "low") -> float:
    """The most that one image can cost, with the labelled line of its prompt."""
    request = image_gen.ImageRequest(prompt, size=size, quality=quality)
    return image_gen.bound_of(request, image_gen.RunOptions())


def literal_advice(result: Result) -> str:
    """The line that says what the jobs would take that the cap has kept from being sent."""
    (line,) = [each for each in result.stderr.splitlines() if each.startswith("With --max-cost ")]
    return line


# Before


@pytest.mark.parametrize(
    ("size", "quality", "dollars"),
    [
        ("1024x1024", "low", 0.006),
        ("1024x1024", "medium", 0.053),
        ("1024x1024", "high", 0.211),
        ("1536x1024", "medium", 0.041),
        ("1024x1536", "high", 0.165),
    ],
)
def test_the_published_prices_come_out(run: Run, size: str, quality: str, dollars: float) -> None:
    result = dry.generate(run, "--size", size, "--quality", quality)
    assert said(result).startswith(f"about ${dollars} for 1 image (")
    assert said(result).endswith(f"output tokens; prices of 2026-11-25); {CLOSING}")


@pytest.mark.parametrize(
    ("cells", "least", "most"),
    [
        pytest.param(cells, None, None, id=f"{row.prefix} {cells}")
        if cells != 48
        else pytest.param(48, 514, 5930, id=f"{row.prefix} 48")
        for row in image_gen.MODEL_FAMILIES
        for cells in row.cells
    ],
)
def test_the_extreme_sizes_are_those_of_all_legal_ones(
    cells: int, least: int | None, most: int | None
) -> None:
    steps = range(image_gen.EDGE_STEP, image_gen.MAX_EDGE + 1, image_gen.EDGE_STEP)
    counts = [
        image_gen.output_tokens(width, height, cells)
        for width in steps
        for height in steps
        if image_gen.MIN_PIXELS <= width * height <= image_gen.MAX_PIXELS
        and height <= width <= image_gen.MAX_ASPECT * height
    ]
    extremes = [image_gen.output_tokens(*size, cells) for size in image_gen.EXTREME_SIZES]
    assert (min(extremes), max(extremes)) == (min(counts), max(counts))
    if least is not None:
        assert (min(counts), max(counts)) == (least, most)


def test_a_batch_is_summed_up_in_one_line_and_half_of_it_through_the_batch_api(run: Run) -> None:
    jobs = live.prompts(300)
    at_once = dry.batch(run, *jobs, flags=SQUARE)
    assert said(at_once) == (
        "about $15.80 for 300 images (526,800 output tokens; prices of 2026-11-25); " + CLOSING
    )
    queue = dry.batch(run, *jobs, flags=(*SQUARE, "--batch-api"))
    assert said(queue).startswith("about $7.90 for 300 images (526,800 output tokens at half price")


def test_auto_is_a_range(run: Run) -> None:
    assert said(dry.generate(run)).startswith(
        "about $0.015 to $0.178 for 1 image (514 to 5,930 output tokens, as size or quality is auto"
    )
    any_quality = said(dry.generate(run, *SQUARE, "--quality", "auto", "--n", "2"))
    assert any_quality.startswith("about $0.012 to $0.421 for 2 images (392 to 14,048 output")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--model", "gpt-image-2.6-flare"), "gpt-image-2.6-flare"),
        (("--model", "gpt-image-1.5"), "gpt-image-1.5"),
        (("--model", "gpt-image-3"), "gpt-image-3"),
        (("--model", FLARE, "--output-format", "gif"), "gif"),
        (("--model", FLARE, "--output-format", "svg"), "svg"),
    ],
)
def test_what_has_no_formula_is_said(run: Run, flags: tuple[str, ...], what: str) -> None:
    result = dry.generate(run, *SQUARE, *flags)
    assert said(result) == f"no estimate for 1 image of {what}: no formula is known"


def test_a_mixed_batch_says_both(run: Run) -> None:
    jobs: list[Job] = ["a fox", {"prompt": "an owl", "model": "gpt-image-2.6-flare", "n": 3}]
    assert said(dry.batch(run, *jobs, flags=SQUARE)).endswith(
        f"{CLOSING}; no estimate for 3 images of gpt-image-2.6-flare: no formula is known"
    )


def test_drafts_are_counted(run: Run) -> None:
    assert "(1,956 output tokens;" in said(dry.generate(run, *SQUARE, "--partial-images", "2"))


def test_the_documents_are_the_same_with_a_cap_and_quiet_says_nothing(run: Run) -> None:
    plain, cap = dry.generate(run, *SQUARE), dry.generate(run, *SQUARE, "--max-cost", "1")
    assert plain.stdout == cap.stdout
    assert dry.generate(run, *SQUARE, "--quiet").stderr == ""


def test_only_what_would_be_sent_counts(run: Run, api: ImagesAPI) -> None:
    assert run(*live.batch(2, *SMALL)).exit_code == 0
    again = run(*live.batch(3, *SMALL, "--skip-existing", "--dry-run"))
    assert "for 1 image (" in said(again)
    nothing = run(*live.batch(2, *SMALL, "--skip-existing", "--max-cost", "0"))
    assert (nothing.exit_code, "about $" in nothing.stderr) == (0, False)
    assert len(api.requests) == 2


# Afterwards


def test_a_record_has_the_cost_of_its_answer_and_the_summary_the_sum(
    run: Run, api: ImagesAPI
) -> None:
    jobs: list[Job] = [{"prompt": "a fox", "n": 2}, "an owl"]
    result = run(*live.batch(jobs, *SQUARE, "--json"))
    costs = {line["job"]: line["cost_usd"] for line in result.json_lines}
    for line in result.json_lines:
        usage, images = line["usage"], line["job"] % 2 + 1
        assert usage["output_tokens"] == 1756 * images
        text = usage["input_tokens_details"]["text_tokens"]
        assert costs[line["job"]] == pytest.approx((30 * 1756 * images + 5 * text) / 1e6)
    assert sum(costs.values()) == pytest.approx(api.billed)
    assert re.search(
        r"tokens, \$0\.158, [0-9.]+ s; this folder so far: \$0\.158$", result.stderr, re.MULTILINE
    )


def test_an_edit_counts_its_input_images(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    argv = ["edit", "--image", "room.png", "--prompt", "night", "--out", "n.png", *SMALL, "--json"]
    result = run(*argv)
    details = result.json["usage"]["input_tokens_details"]
    inputs = 5 * details["text_tokens"] + 8 * details["image_tokens"]
    output = 30 * result.json["usage"]["output_tokens"]
    assert result.json["cost_usd"] == pytest.approx((inputs + output) / 1e6)
    assert result.json["cost_usd"] == pytest.approx(api.billed)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        (None, None),
        ({}, None),
        ("many", None),
        ({"total_tokens": 200}, None),
        ({"input_tokens": 10, "output_tokens": 196}, 0.00593),
        ({"input_tokens": 10, "output_tokens": 1e3}, None),
        ({"input_tokens": -10, "output_tokens": 196}, None),
        ({"input_tokens": 10, "output_tokens": 10**400}, None),
        ({"input_tokens_details": {"text_tokens": 10}, "output_tokens": 196}, 0.00593),
        ({"input_tokens_details": {"image_tokens": 0}, "output_tokens": 196}, None),
        (
            {"input_tokens_details": {"text_tokens": 2, "image_tokens": 1}, "output_tokens": 1},
            0.000048,
        ),
    ],
)
def test_a_cost_that_cannot_be_told_is_null(
    run: Run, api: ImagesAPI, usage: object, cost: float | None
) -> None:
    api.script(document(lambda answer: answer.update(usage=usage)))
    result = run(*live.generate("--json"))
    assert (result.exit_code, result.json["cost_usd"]) == (0, cost)
    assert ("1 job of unknown cost" in result.stderr) == (cost is None)


def test_an_edit_that_does_not_tell_its_inputs_has_no_known_cost(run: Run, api: ImagesAPI) -> None:
    picture("room.png")
    usage = {"input_tokens": 1000, "output_tokens": 196}
    zero = usage | {"input_tokens_details": {"text_tokens": 10, "image_tokens": 0}}
    argv = ["edit", "--image", "room.png", "--prompt", "night", "--out", "n.png", "--json"]
    for told in (usage, zero):
        api.script(document(partial(dict.update, usage=told)))
        assert run(*argv, "--force").json["cost_usd"] is None


@pytest.mark.parametrize(
    ("model", "out"),
    [("gpt-image-1.5", "a.png"), ("gpt-image-9", "a.png"), (FLARE, "a.svg")],
)
def test_what_has_no_price_has_no_cost(run: Run, api: ImagesAPI, model: str, out: str) -> None:
    api.script(ok())
    result = run(*live.generate("--model", "gpt-image-2.5-flare", "--json", out=out))
    if out.endswith("svg"):
        assert result.json["cost_usd"] is None
    request = image_gen.ImageRequest("x", model=model)
    usage = {"input_tokens": 1, "output_tokens": 1, **({"svg_usage": {}} if "svg" in out else {})}
    assert image_gen.cost_of(request, usage, image_gen.RunOptions()) is None


def test_2_6_has_prices_without_a_formula(run: Run, api: ImagesAPI) -> None:
    result = run(*live.generate("--model", "gpt-image-2.6-flare", "--json"))
    assert result.json["cost_usd"] == pytest.approx(api.billed)


def test_an_answer_without_an_image_costs_too_and_is_added_to_the_next(
    run: Run, api: ImagesAPI
) -> None:
    def fails(answer: dict[str, object]) -> None:
        answer.update(data=[], error={"code": "server_error", "message": "no"})

    api.script(document(fails))
    result = run(*live.generate(*SMALL, "--json"))
    assert (result.exit_code, len(api.requests)) == (0, 2)
    assert result.json["cost_usd"] == pytest.approx(api.billed)


def test_a_folder_adds_up_all_its_runs(run: Run, api: ImagesAPI) -> None:
    for jobs, flags in ((2, ()), (3, ("--skip-existing",)), (3, ("--force",))):
        result = run(*live.batch(jobs, *SQUARE, *flags))
        assert result.exit_code == 0
    remade = run(*live.batch(3, *SQUARE, "--only", "2", "--remake"))
    assert remade.exit_code == 0
    so_far = remade.stderr.split("this folder so far: ")[1].splitlines()[0]
    assert len(api.requests) == 7
    assert so_far == image_gen.dollars(api.billed)
    idle = run(*live.batch(3, *SQUARE, "--skip-existing"))
    assert f"$0.00, 0.0 s; this folder so far: {so_far}" in re.sub(r"0\.\d s", "0.0 s", idle.stderr)


def test_a_name_that_is_taken_meanwhile_is_not_counted_twice(
    run: Run, api: ImagesAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = image_gen.place
    taken: list[str] = []

    def late(temporary: str, name: str) -> None:
        if name.endswith("001-job-1.png") and not taken:
            taken.append(name)
            picture(name)
        place(temporary, name)

    monkeypatch.setattr(image_gen, "place", late)
    result = run(*live.batch(1, *SQUARE))
    assert (result.exit_code, len(taken)) == (0, 1)
    assert "001-job-1-alt-1.png" in result.stdout
    assert image_gen.read_manifest("out").spent == pytest.approx(api.billed)


@pytest.mark.parametrize("cost", ["true", "NaN", "-1", '"1"', "1e99", "[]"])
def test_a_strange_cost_in_a_manifest_is_passed_over(run: Run, api: ImagesAPI, cost: str) -> None:
    run(*live.batch(1, *SQUARE))
    manifest = Path("out", image_gen.MANIFEST_NAME)
    line = re.sub('"cost_usd": [0-9.e-]+', f'"cost_usd": {cost}', manifest.read_text())
    manifest.write_text(line)
    result = run(*live.batch(1, *SQUARE, "--skip-existing"))
    assert (result.exit_code, len(api.requests)) == (0, 1), result.stderr
    assert "this folder so far" not in result.stderr


# The cap, before anything is sent


@pytest.mark.parametrize("value", ["", "-1", "x", "1e3", "$5", "1,50", "inf", "0x1", "5 "])
def test_a_cap_that_is_no_amount_is_refused(run: Run, value: str) -> None:
    result = run(*live.generate(*SQUARE, f"--max-cost={value}"))
    assert "--max-cost: has to be dollars, as 2.50, not " in dry.problem(result)


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["live", "dry"])
def test_more_than_the_cap_is_refused_with_the_estimate(
    run: Run, api: ImagesAPI, dry_run: tuple[str, ...]
) -> None:
    result = run(*live.batch(20, *SQUARE, "--max-cost", "1", *dry_run))
    assert re.fullmatch(
        r"--max-cost 1: 20 images can cost \$1\.06 with prompts and input images "
        r"\(prices of 2026-11-25\); raise it, or ask for fewer, smaller or plainer ones "
        r"\(--quality low\)",
        dry.problem(result),
    )
    assert (api.requests, os.path.exists("out")) == ([], False)


def test_the_estimate_counts_prompt_and_input_images_and_the_cap_may_be_met_exactly(
    run: Run, api: ImagesAPI
) -> None:
    picture("room.png")
    prompt = "é" * 400
    argv = [
        "edit",
        "--image",
        "room.png",
        "--image",
        "room.png",
        "--prompt",
        prompt,
        "--no-augment",
    ]
    argv += [*SQUARE, "--out", "n.png"]
    most = (30 * 1756 + 5 * math.ceil(800 / 3)) / 1e6 + 2 * 0.0176
    assert "can cost $0.09" in dry.problem(run(*argv, "--max-cost", f"{most - 1e-6:.9f}"))
    assert run(*argv, "--max-cost", f"{most:.9f}").exit_code == 0
    assert api.billed <= most


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), ["size auto: ", "give --size"]),
        ((*SQUARE, "--quality", "auto"), ["quality auto: ", "give --quality"]),
        (
            (*SQUARE, "--model", "gpt-image-2.6-flare"),
            ["model gpt-image-2.6-flare: ", "gpt-image-2"],
        ),
        ((*SQUARE, "--model", "gpt-image-1.5"), ["model gpt-image-1.5: ", "gpt-image-2"]),
        ((*SQUARE, "--model", FLARE, "--output-format", "gif"), ["output_format gif: "]),
        ((*SQUARE, "--model", FLARE, "--output-format", "svg"), ["output_format svg: "]),
    ],
)
def test_what_has_no_bound_is_refused_with_a_cap(
    run: Run, api: ImagesAPI, flags: tuple[str, ...], named: list[str]
) -> None:
    problem = dry.problem(run(*live.generate(*flags, "--max-cost", "9", out="fox")))
    assert all(words in problem for words in (*named, "--max-cost")), problem
    assert api.requests == []


def test_lines_without_a_bound_are_named_together(run: Run) -> None:
    jobs: list[Job] = [{"prompt": str(n), "size": "auto"} for n in range(3)]
    (problem,) = dry.problems(
        run(*live.batch([*jobs, "sized"], *SQUARE, "--max-cost", "1", "--dry-run"))
    )
    assert problem.startswith("line 1: size auto: ")
    assert problem.endswith("(also lines 2, 3)")


# The cap, while it runs

FAULTS: dict[str, Callable[[], Reply]] = {
    "ok": ok,
    "paid and lost": answer_lost,
    "paid and cut": answer_cut,
    "paid and damaged": truncated_image,
    "paid and empty": empty_data,
    "gateway": lambda: html(504),
    "closed": connection_closed,
    "late": lambda: delayed(0.01),
    "slow down": lambda: rate_limited(0.001),
    "server": server_error,
    "refused": lambda: status(400),
    "no usage": lambda: document(lambda answer: answer.pop("usage")),
}


RUNS = some.fixed_dictionaries(
    {
        "faults": some.lists(some.sampled_from(sorted(FAULTS)), max_size=12),
        "sizes": some.lists(
            some.sampled_from(["816x816", "1024x1024", "1536x1024"]), min_size=1, max_size=8
        ),
        "concurrency": some.integers(1, 12),
        "spare": some.floats(0, 0.02),
        "noise": some.lists(some.floats(0.9, 1.1), min_size=1, max_size=5) | some.just([1.0]),
    }
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(RUNS)
def test_what_is_billed_never_exceeds_the_cap_by_more_than_the_noise_of_what_was_in_flight(
    run: Run, api: ImagesAPI, of: Json
) -> None:
    shutil.rmtree("out", ignore_errors=True)
    noises = cycle(of["noise"])
    api.noise = lambda: next(noises)
    api.forget_script()
    api.script(*[FAULTS[fault]() for fault in of["faults"]])
    jobs: list[Job] = [
        {"prompt": f"job {number}", "size": size, "quality": "low"}
        for number, size in enumerate(of["sizes"])
    ]
    bounds = [bound(f"job {number}", size=size) for number, size in enumerate(of["sizes"])]
    cap, before = sum(bounds) + of["spare"] + 1e-6, api.billed
    flags = ("--max-cost", f"{cap:.9f}", "--concurrency", of["concurrency"], "--json")
    result = run(*live.batch(jobs, *flags))
    billed = api.billed - before
    in_flight = sum(sorted(bounds)[-of["concurrency"] :])
    assert billed <= cap + (max(of["noise"]) - 1) * in_flight + 1e-9, result.stderr
    records = result.json_lines
    assert len(records) == len(jobs)
    known = sum(record["cost_usd"] or 0 for record in records)
    assert known <= billed + 1e-9
    if set(of["faults"]) <= {"ok", "late", "slow down", "server"} and max(of["noise"]) <= 1:
        assert "not_sent" not in live.outcomes(result)
        assert known == pytest.approx(billed)
    if result.exit_code == 4 and "not_sent" in live.outcomes(result):
        assert literal_advice(result)


def test_what_does_not_fit_any_more_is_not_sent_and_a_line_says_what_it_would_take(
    run: Run, api: ImagesAPI
) -> None:
    api.script(answer_lost(), answer_lost())
    cap = 4 * bound("job 1") + 1e-6
    result = run(*capped(4, cap, "--concurrency", 1, "--json"))
    assert result.exit_code == 4
    assert live.outcomes(result) == ["done", "done", "not_sent", "not_sent"]
    assert api.billed <= cap
    error = live.error(result)
    assert re.fullmatch(
        r"2 jobs not sent: --max-cost 0\.0\d+ allows no \$0\.00\d more: \$0\.0\d+ may be spent",
        error,
    ), error
    assert literal_advice(result).endswith("repeat the command with --skip-existing (2 jobs).")
    amount = literal_advice(result).split()[2].strip(":")
    again = run(*capped(4, float(amount), "--skip-existing"))
    assert (again.exit_code, len(live.names())) == (0, 4)


def test_a_retry_that_does_not_fit_fails_with_what_came_before(run: Run, api: ImagesAPI) -> None:
    api.script(answer_lost(), repeat=True)
    result = run(*capped(1, bound("job 1") + 1e-6, "--json"))
    assert (result.exit_code, len(api.requests)) == (4, 1)
    (record,) = result.json_lines
    assert (record["status"], record["error"]["kind"]) == ("failed", "connection")
    assert record["error"]["maybe_billed"] is True
    assert record["error"]["message"].endswith("may be spent")
    assert "; not sent again: --max-cost 0.00" in record["error"]["message"]
    assert literal_advice(result).startswith("With --max-cost 0.00")


def test_a_job_waits_for_what_is_in_flight_if_that_may_leave_room(run: Run, api: ImagesAPI) -> None:
    """Costs less than it was held at: a prompt has fewer tokens than a third of its bytes."""
    prompt = "é" * 9000
    jobs: list[Job] = [f"{number} {prompt}" for number in range(6)]
    api.script(answer_lost())
    cap = sum(bound(str(job)) for job in jobs) + 1e-6
    result = run(*capped(jobs, cap, "--concurrency", 6))
    assert result.exit_code == 0, result.stderr
    assert api.billed <= cap


def test_a_whole_submission_counts_before_it_is_made_and_collecting_is_free(
    run: Run, api: ImagesAPI
) -> None:
    whole = sum(bound(f"job {number}") for number in range(1, 5)) / 2
    cap = ("--max-cost", f"{whole - 1e-6:.6f}")
    assert "4 images can cost " in dry.problem(run(*queued(4, *SMALL, *cap)))
    assert api.requests == []
    api.plan_batch(GOES_ON)
    enough = ("--max-cost", f"{whole + 1e-6:.6f}")
    assert run(*queued(4, *SMALL, *enough, "--no-wait")).exit_code == 3
    api.batches[0].states.append("completed")
    collected = run(*queued(4, *SMALL, "--max-cost", "0", "--json"))
    assert (collected.exit_code, len(api.batches)) == (0, 1), collected.stderr
    assert "about $" not in collected.stderr
    costs = [line["cost_usd"] for line in collected.json_lines]
    assert 0 < sum(costs) <= whole
    assert "this folder so far: $0.01" in collected.stderr


def test_a_creation_in_doubt_is_repeated_only_if_the_cap_allows_both(
    run: Run, api: ImagesAPI
) -> None:
    whole = sum(bound(f"job {number}") for number in (1, 2)) / 2
    api.script_route(CREATE, connection_closed())
    once = run(*queued(2, *SMALL, "--max-cost", f"{1.5 * whole:.6f}", "--json"))
    assert (once.exit_code, len(api.batches)) == (4, 0), once.stderr
    assert live.outcomes(once) == ["not_sent", "not_sent"]
    again = run(*queued(2, *SMALL, "--max-cost", f"{1.5 * whole:.6f}", "--json"))
    assert (again.exit_code, len(api.batches)) == (0, 1), again.stderr


def test_a_refused_creation_gives_back_what_was_held(run: Run, api: ImagesAPI) -> None:
    whole = sum(bound(f"job {number}") for number in (1, 2)) / 2
    api.script_route(CREATE, rate_limited(0.001))
    result = run(*queued(2, *SMALL, "--max-cost", f"{1.5 * whole:.6f}"))
    assert (result.exit_code, len(api.batches)) == (0, 1), result.stderr


def test_the_manifest_keeps_what_was_paid_at_the_time(run: Run, api: ImagesAPI) -> None:
    assert run(*live.batch([{"prompt": "a", "n": 2}], *SMALL)).exit_code == 0
    lines = Path("out", image_gen.MANIFEST_NAME).read_text().splitlines()
    costs = [json.loads(line)["cost_usd"] for line in lines]
    assert costs == [pytest.approx(api.billed), None]


def test_a_usage_of_zeros_is_no_usage(run: Run, api: ImagesAPI) -> None:
    """Gateways that do not count answer with it; the cap holds all the same."""
    zeros = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    details = {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}
    reply = document(lambda answer: answer.update(usage=zeros | details))
    api.script(*[answer_lost(), reply] * 5)
    cap = 6 * bound("job 1") + 1e-6
    result = run(*capped(6, cap, "--concurrency", 1, "--json"))
    assert api.billed <= cap
    assert {record["cost_usd"] for record in result.json_lines} == {None}


def test_a_cap_that_is_met_exactly_is_enough_whatever_floats_add_up_to(run: Run) -> None:
    for jobs in range(1, 30):
        cap = round(sum(bound(f"job {number}") for number in range(1, jobs + 1)), 9)
        argv = live.batch(jobs, *SMALL, "--max-cost", f"{cap:.9f}", "--dry-run")
        assert run(*argv).exit_code == 0


def test_the_folder_counts_answers_that_brought_no_image(run: Run, api: ImagesAPI) -> None:
    def fails(answer: dict[str, object]) -> None:
        answer.update(data=[], error={"code": "server_error", "message": "no"})

    api.script(document(fails), ok(), truncated_image())
    result = run(*live.batch(2, *SMALL, "--concurrency", 1))
    assert (result.exit_code, len(api.requests)) == (1, 3)
    assert image_gen.read_manifest("out").spent == pytest.approx(api.billed)
    again = run(*live.batch(2, *SMALL, "--skip-existing"))
    assert again.exit_code == 0
    assert f"this folder so far: {image_gen.dollars(api.billed)}" in again.stderr
    assert "of unknown cost" not in result.stderr


def test_only_the_cap_changes_what_a_failure_is_counted_as(run: Run, api: ImagesAPI) -> None:
    """A 503 may pass, whatever stopped the run before it could be sent again."""
    api.script_for("job 1", server_error(503), repeat=True)
    api.script_for("job 2", delayed(0.05, moderation_blocked()))
    result = run(*live.batch(2, "--fail-fast", "--concurrency", 2, "--max-attempts", 10, "--json"))
    kinds = {line["job"]: line["error"]["kind"] for line in result.json_lines}
    assert (result.exit_code, kinds[1]) == (1, "server")
    assert "1 failed (moderation), 1 failed (server)" in result.stderr.replace(
        "1 failed (server), 1 failed (moderation)", "1 failed (moderation), 1 failed (server)"
    )


def test_a_manifest_that_was_merged_with_itself_counts_once(run: Run, api: ImagesAPI) -> None:
    assert run(*live.batch(2, *SMALL)).exit_code == 0
    manifest = Path("out", image_gen.MANIFEST_NAME)
    manifest.write_bytes(manifest.read_bytes() * 2)
    assert image_gen.read_manifest("out").spent == pytest.approx(api.billed)
