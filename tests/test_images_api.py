"""The loopback Image API, proved with the real SDK and with plain HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import images_api
import openai
import pytest
from cli import finished, started
from images_api import PATIENCE, ImagesAPI, RateLimit
from openai import AsyncOpenAI
from openai.types import ImagesResponse
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cli import Result
    from openai.types import Batch

PROGRAM = Path(images_api.__file__)
Json = dict[str, Any]
T = TypeVar("T")


def with_sdk(api: ImagesAPI, work: Callable[[AsyncOpenAI], Awaitable[T]]) -> T:
    async def call() -> T:
        async with AsyncOpenAI(
            base_url=api.base_url, api_key=images_api.KEY, max_retries=0, timeout=PATIENCE
        ) as sdk:
            return await work(sdk)

    return asyncio.run(call())


def ask(api: ImagesAPI, **parameters: object) -> ImagesResponse:
    """An edit where an image is given, else a generation, through the SDK."""
    answer = with_sdk(api, lambda sdk: method(sdk, parameters)(**{"prompt": "a fox"} | parameters))
    assert isinstance(answer, ImagesResponse)
    return answer


def streamed(api: ImagesAPI, **parameters: object) -> list[Any]:
    async def work(sdk: AsyncOpenAI) -> list[Any]:
        stream = await method(sdk, parameters)(prompt="a fox", stream=True, **parameters)
        return [event async for event in stream]

    return with_sdk(api, work)


def method(sdk: AsyncOpenAI, parameters: Json) -> Callable[..., Awaitable[Any]]:
    return sdk.images.edit if "image" in parameters else sdk.images.generate


def post(api: ImagesAPI, path: str, **body: object) -> tuple[int, Json]:
    """A request by hand: json=… or data=…"""

    request: Any = {"url": api.base_url + path, **body}

    async def call() -> tuple[int, Json]:
        headers = {"Authorization": "Bearer anything"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(**request) as answer,
        ):
            return answer.status, await answer.json()

    return asyncio.run(call())


def form(*files: tuple[str, str, bytes], **fields: str) -> aiohttp.FormData:
    """Parts of (field, content type, data), and plain fields."""
    data = aiohttp.FormData(default_to_multipart=True)
    for name, content_type, content in files:
        data.add_field(name, content, filename="picture", content_type=content_type)
    for name, value in fields.items():
        data.add_field(name, value)
    return data


def opened(data: bytes | str | None) -> Image.Image:
    assert data is not None
    image = Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    image.load()
    return image


def first(answer: ImagesResponse) -> str:
    assert answer.data
    assert answer.data[0].b64_json
    return answer.data[0].b64_json


def drawing(image_format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, image_format)
    return file.getvalue()


PNG = drawing()
MASK = drawing(mode="RGBA")


# Pictures


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("style", ["placeholder", "flat", "noise"])
def test_the_pictures_are_real_and_have_format_and_size(
    output_format: str, style: images_api.PictureStyle
) -> None:
    with ImagesAPI(pictures=style) as api:
        answer = ask(api, size="1536x1024", output_format=output_format)
    image = opened(first(answer))
    assert image.format == output_format.upper()
    assert image.size == (1536, 1024)
    assert (answer.size, answer.output_format) == ("1536x1024", output_format)


def test_n_pictures_differ_from_each_other(api: ImagesAPI) -> None:
    data = ask(api, n=4).data
    assert data
    assert len({entry.b64_json for entry in data}) == 4


def test_auto_is_1024_square_unless_the_server_is_told_otherwise(api: ImagesAPI) -> None:
    with ImagesAPI() as ordinary:
        assert opened(first(ask(ordinary))).size == (1024, 1024)
    assert opened(first(ask(api))).size == (64, 64)


@pytest.mark.parametrize("output_format", ["png", "webp"])
@pytest.mark.parametrize("style", ["placeholder", "flat"])
def test_a_transparent_background_has_transparent_pixels(
    output_format: str, style: images_api.PictureStyle
) -> None:
    with ImagesAPI(pictures=style) as api:
        answer = ask(api, background="transparent", output_format=output_format)
    assert opened(first(answer)).getchannel("A").getextrema() == (0, 255)
    assert answer.background == "transparent"


def test_the_noise_of_a_4k_picture_does_not_compress_and_is_made_once() -> None:
    with ImagesAPI(pictures="noise") as api:
        drawn = first(ask(api, size="3840x2160"))
        assert first(ask(api, size="3840x2160", prompt="another")) == drawn  # so it was kept
    assert 14e6 < len(drawn) * 3 / 4 < 17e6


def test_an_answer_has_usage_settings_and_its_own_request_id(api: ImagesAPI) -> None:
    answers = [ask(api, quality="low", n=2), ask(api)]
    assert [answer.quality for answer in answers] == ["low", "medium"]
    usage = answers[0].usage
    assert usage is not None
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    ids = [answer._request_id for answer in answers]
    assert ids == [request.request_id for request in api.requests]
    assert len(set(ids)) == 2


def test_a_gif_has_frames_and_their_duration(api: ImagesAPI) -> None:
    image: Any = opened(first(ask(api, output_format="gif", frame_count=3, frame_duration_ms=124)))
    assert (image.format, image.n_frames, image.info["duration"]) == ("GIF", 3, 120)


def test_an_svg_is_text_that_carries_the_prompt_escaped(api: ImagesAPI) -> None:
    text = base64.b64decode(first(ask(api, output_format="svg", prompt="a <fox>"))).decode()
    assert text.startswith("<svg")
    assert "a &lt;fox&gt;" in text


# Event streams


@pytest.mark.parametrize("parameters", [{}, {"image": ("a.png", PNG)}], ids=["generate", "edit"])
def test_a_stream_has_partial_images_and_then_the_completed_one(
    api: ImagesAPI, parameters: Json
) -> None:
    *drafts, final = streamed(api, partial_images=3, **parameters)
    kind = "image_edit" if parameters else "image_generation"
    assert [event.type for event in drafts] == [f"{kind}.partial_image"] * 3
    assert [event.partial_image_index for event in drafts] == [0, 1, 2]
    assert final.type == f"{kind}.completed"
    assert final.usage.total_tokens > 0
    assert len({event.b64_json for event in (*drafts, final)}) == 4
    assert {opened(event.b64_json).size for event in (*drafts, final)} == {(64, 64)}


def test_a_stream_breaks_after_so_many_events(api: ImagesAPI) -> None:
    api.script(images_api.stream_cut(1))
    seen: list[str] = []

    async def work(sdk: AsyncOpenAI) -> None:
        stream = await sdk.images.generate(prompt="x", stream=True, partial_images=2)
        async for event in stream:
            seen.append(event.type)  # noqa: PERF401

    with pytest.raises(openai.APIError):
        with_sdk(api, work)
    assert seen == ["image_generation.partial_image"]


# Validation

WRONG = {
    "an empty prompt": ("prompt", {"prompt": " "}),
    "a long prompt": ("prompt", {"prompt": "x" * 32_001}),
    "no n": ("n", {"n": 0}),
    "n too high": ("n", {"n": 11}),
    "n as text": ("n", {"n": "2"}),
    "n as a float": ("n", {"n": 2.0}),
    "n as a boolean": ("n", {"n": True}),
    "an unknown key": ("colour", {"colour": "red"}),
    "a flag of the CLI": ("augment", {"augment": True}),
    "an unknown model": ("model", {"model": "gpt-image-9"}),
    "a retired model": ("model", {"model": "dall-e-3"}),
    "a quality that does not exist": ("quality", {"quality": "best"}),
    "a quality of the newest models": ("quality", {"quality": "max"}),
    "a size that is no size": ("size", {"size": "big"}),
    "an edge that is no multiple of 16": ("size", {"size": "1000x1000"}),
    "too few pixels": ("size", {"size": "512x512"}),
    "too many pixels": ("size", {"size": "3840x3840"}),
    "too long an edge": ("size", {"size": "4096x2048"}),
    "too wide": ("size", {"size": "3840x1024"}),
    "a free size of a fixed model": ("size", {"size": "1536x864", "model": "gpt-image-1.5"}),
    "a list where a word is expected": ("quality", {"quality": ["low"]}),
    "jpg for jpeg": ("output_format", {"output_format": "jpg"}),
    "transparent jpeg": ("background", {"background": "transparent", "output_format": "jpeg"}),
    "compressed png": ("output_compression", {"output_compression": 50}),
    "compression above 100": (
        "output_compression",
        {"output_compression": 101, "output_format": "webp"},
    ),
    "partial images without a stream": ("partial_images", {"partial_images": 2}),
    "four partial images": ("partial_images", {"partial_images": 4, "stream": True}),
    "frames of a png": ("frame_count", {"frame_count": 4}),
    "one frame": ("frame_count", {"frame_count": 1, "output_format": "gif"}),
    "a streamed gif": ("stream", {"stream": True, "output_format": "gif"}),
    "two svg": ("n", {"n": 2, "output_format": "svg"}),
    "an old parameter": ("style", {"style": "vivid"}),
    "input fidelity of a generation": ("input_fidelity", {"input_fidelity": "high"}),
}


@pytest.mark.parametrize(("param", "body"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_body_is_refused_with_400_and_the_name_of_the_parameter(
    api: ImagesAPI, param: str, body: Json
) -> None:
    status, answer = post(api, "/images/generations", json={"prompt": "a fox"} | body)
    assert status == (404 if param == "model" else 400)
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"


def test_null_stands_for_a_parameter_that_is_not_given(api: ImagesAPI) -> None:
    body = {"prompt": "a fox", "n": None, "size": None, "stream": None}
    assert post(api, "/images/generations", json=body)[0] == 200


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"n": NaN}', b"[" * 100_000, b"\xff", b'{"prompt": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_refused(api: ImagesAPI, data: bytes) -> None:
    status, _ = post(
        api, "/images/generations", data=data, headers={"Content-Type": "application/json"}
    )
    assert status == 400


def test_a_wrong_body_uses_up_no_scripted_reply(api: ImagesAPI) -> None:
    api.script(images_api.server_error())
    assert post(api, "/images/generations", json={"prompt": "a", "n": 0})[0] == 400
    assert post(api, "/images/generations", json={"prompt": "a"})[0] == 500


def test_a_request_without_a_key_gets_401(api: ImagesAPI) -> None:
    body = {"json": {"prompt": "a"}, "headers": {"Authorization": ""}}
    assert post(api, "/images/generations", **body)[0] == 401


def test_an_unknown_path_gets_404_and_is_recorded(api: ImagesAPI) -> None:
    assert post(api, "/images/variations", json={"prompt": "a"})[0] == 404
    assert api.requests[0].path == "/v1/images/variations"


# Edits


def test_an_edit_with_two_images_and_a_mask_is_recorded_part_by_part(api: ImagesAPI) -> None:
    jpeg = drawing("JPEG")
    ask(
        api,
        model="gpt-image-1.5",
        image=[("first.png", PNG), ("second.jpg", jpeg)],
        mask=("mask.png", MASK),
        n=2,
        input_fidelity="high",
        extra_body={"moderation": "low"},
    )
    request = api.requests[0]
    parts = [(f.field, f.filename, f.content_type, f.data) for f in request.files]
    assert parts == [
        ("image[]", "first.png", "image/png", PNG),
        ("image[]", "second.jpg", "image/jpeg", jpeg),
        ("mask", "mask.png", "image/png", MASK),
    ]
    assert request.body == {
        "model": "gpt-image-1.5",
        "prompt": "a fox",
        "n": 2,
        "input_fidelity": "high",
        "moderation": "low",
    }


WRONG_EDITS = {
    "no image": ("image", [], {}),
    "bytes without a type": ("image", [("image", "application/octet-stream", PNG)], {}),
    "a gif": ("image", [("image", "image/gif", drawing("GIF"))], {}),
    "a jpeg that says png": ("image", [("image", "image/png", drawing("JPEG"))], {}),
    "half an image": ("image", [("image", "image/png", PNG[:30])], {}),
    "two images without brackets": ("image", [("image", "image/png", PNG)] * 2, {}),
    "seventeen images": ("image", [("image[]", "image/png", PNG)] * 17, {}),
    "an unknown file": ("extra", [("extra", "image/png", PNG)], {}),
    "a mask without alpha": (
        "mask",
        [("image", "image/png", PNG), ("mask", "image/png", PNG)],
        {},
    ),
    "a mask of another size": (
        "mask",
        [("image", "image/png", PNG), ("mask", "image/png", drawing(mode="RGBA", size=(9, 8)))],
        {},
    ),
    "a mask that is a webp": (
        "mask",
        [("image", "image/png", PNG), ("mask", "image/webp", drawing("WEBP", mode="RGBA"))],
        {},
    ),
    "markup on an old model": (
        "markup",
        [("image", "image/png", PNG), ("markup", "image/png", MASK)],
        {"model": "gpt-image-2"},
    ),
    "markup with a mask": (
        "markup",
        [(name, "image/png", MASK) for name in ("image", "mask", "markup")],
        {"model": "gpt-image-2.5-flare"},
    ),
    "n as a word": ("n", [("image", "image/png", PNG)], {"n": "two"}),
    "an unknown moderation": ("moderation", [("image", "image/png", PNG)], {"moderation": "off"}),
    "fidelity of gpt-image-2": (
        "input_fidelity",
        [("image", "image/png", PNG)],
        {"input_fidelity": "high"},
    ),
}


@pytest.mark.parametrize(("param", "files", "fields"), WRONG_EDITS.values(), ids=WRONG_EDITS.keys())
def test_a_wrong_edit_is_refused_with_400_and_the_name_of_the_parameter(
    api: ImagesAPI, param: str, files: list[tuple[str, str, bytes]], fields: dict[str, str]
) -> None:
    data = form(*files, **{"prompt": "a fox"} | fields)
    status, answer = post(api, "/images/edits", data=data)
    assert (status, answer["error"]["param"]) == (400, param)


def test_an_edit_may_carry_its_images_as_data_urls_in_json(api: ImagesAPI) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    body = {"prompt": "a fox", "images": [{"image_url": url}], "moderation": "low"}
    assert post(api, "/images/edits", json=body)[0] == 200


@pytest.mark.parametrize(
    "reference",
    [
        {"file_id": "file-unknown"},
        {"image_url": "https://example.com/a.png"},
        {"image_url": "data:image/png;base64,%%%"},
        {"image_url": "x", "file_id": "y"},
        {},
        "file-unknown",
    ],
)
def test_a_wrong_image_reference_is_refused(api: ImagesAPI, reference: object) -> None:
    body = {"prompt": "a fox", "images": [reference]}
    assert post(api, "/images/edits", json=body)[0] in {400, 404}


# The record


def test_the_record_tells_that_there_was_a_key_and_never_which(api: ImagesAPI) -> None:
    key = "sk-a-secret"

    async def work(sdk: AsyncOpenAI) -> None:
        await sdk.with_options(api_key=key, project="proj").images.generate(prompt="x")

    with_sdk(api, work)
    ask(api)
    assert key not in repr(api.requests)
    assert images_api.KEY not in repr(api.requests)
    assert api.requests[0].headers["openai-project"] == "proj"
    assert [request.key_as_expected for request in api.requests] == [False, True]


def test_held_requests_are_in_flight_until_they_are_released(api: ImagesAPI) -> None:
    api.hold()
    threads = [threading.Thread(target=ask, args=(api,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    api.wait_for_requests(3)
    assert [request.status for request in api.requests] == [None] * 3
    api.release(1)
    api.wait_for_answers(1)
    assert sum(request.status is None for request in api.requests) == 2
    api.release()
    for thread in threads:
        thread.join()
    assert [request.status for request in api.requests] == [200] * 3
    assert api.peak_in_flight == 3


def test_a_client_that_goes_leaves_a_request_without_status(api: ImagesAPI) -> None:
    api.script(images_api.no_answer())

    async def work(sdk: AsyncOpenAI) -> None:
        call = asyncio.create_task(sdk.images.generate(prompt="a fox"))
        await asyncio.to_thread(api.wait_for_requests, 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    with_sdk(api, work)
    api.wait_until(lambda requests: requests[0].ended is not None)
    assert api.requests[0].status is None


def test_waiting_for_what_does_not_come_raises(api: ImagesAPI) -> None:
    with pytest.raises(TimeoutError):
        api.wait_for_requests(1, timeout=0.01)


def test_latency_is_counted_from_the_arrival_of_a_request() -> None:
    with ImagesAPI(latency=0.3, auto_size="64x64") as api:
        ask(api)
    request = api.requests[0]
    assert request.ended is not None
    assert request.ended - request.started >= 0.3


def test_the_server_ends_while_a_request_is_held() -> None:
    def ask_in_vain(api: ImagesAPI) -> None:
        with pytest.raises(openai.APIConnectionError):
            ask(api)

    with ImagesAPI() as server:
        server.hold()
        thread = threading.Thread(target=ask_in_vain, args=(server,))
        thread.start()
        server.wait_for_requests(1)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_mistake_of_the_server_fails_the_test_that_meets_it() -> None:
    async def mistaken(_: images_api.Ordinary) -> images_api.Answer:
        raise ZeroDivisionError

    server = ImagesAPI()
    server.script(mistaken)
    with pytest.raises(ZeroDivisionError), server, pytest.raises(openai.InternalServerError):
        ask(server)


def test_the_peak_in_flight_is_the_concurrency_of_the_client() -> None:
    with ImagesAPI(latency=0.01, pictures="flat", auto_size="64x64") as api:

        async def work(sdk: AsyncOpenAI) -> None:
            slots = asyncio.Semaphore(7)

            async def one() -> None:
                async with slots:
                    await sdk.images.generate(prompt="x")

            await asyncio.gather(*(one() for _ in range(100)))

        with_sdk(api, work)
        assert api.peak_in_flight == 7
        assert [request.status for request in api.requests] == [200] * 100


# Scripted replies

REFUSALS = {
    "moderation": (images_api.moderation_blocked(), openai.BadRequestError, "moderation_blocked"),
    "rate limit": (images_api.rate_limited(1), openai.RateLimitError, "rate_limit_exceeded"),
    "quota": (images_api.insufficient_quota(), openai.RateLimitError, "insufficient_quota"),
    "key": (images_api.unauthorized(), openai.AuthenticationError, "invalid_api_key"),
    "access": (images_api.forbidden(), openai.PermissionDeniedError, None),
    "model": (images_api.unknown_model(), openai.NotFoundError, "model_not_found"),
    "server": (images_api.server_error(503), openai.InternalServerError, None),
}


@pytest.mark.parametrize(("reply", "error", "code"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_scripted_refusal_is_the_sdk_error_with_its_code(
    api: ImagesAPI, reply: images_api.Reply, error: type[openai.APIStatusError], code: str | None
) -> None:
    api.script(reply)
    with pytest.raises(error) as raised:
        ask(api)
    assert raised.value.code == code
    assert raised.value.request_id == api.requests[0].request_id


def test_scripted_replies_are_used_in_order_of_arrival_and_then_all_is_well(
    api: ImagesAPI,
) -> None:
    api.script(images_api.server_error(500), images_api.ok(), images_api.server_error(502))
    statuses = [post(api, "/images/generations", json={"prompt": "a"})[0] for _ in range(4)]
    assert statuses == [500, 200, 502, 200]


def test_replies_for_a_prompt_come_before_the_others(api: ImagesAPI) -> None:
    api.script(images_api.server_error())
    api.script_for("gore", images_api.moderation_blocked(), repeat=True)
    prompts = ["gore", "fox", "much gore", "fox"]
    statuses = [post(api, "/images/generations", json={"prompt": p})[0] for p in prompts]
    assert statuses == [400, 500, 400, 200]


@pytest.mark.parametrize(
    "reply",
    [
        images_api.connection_closed(),
        images_api.answer_lost(),
        images_api.delayed(0.01, images_api.connection_closed()),
    ],
)
def test_a_lost_answer_is_a_connection_error(api: ImagesAPI, reply: images_api.Reply) -> None:
    api.script(reply)
    with pytest.raises(openai.APIConnectionError):
        ask(api)
    assert api.requests[0].status is None


def test_a_cut_answer_has_a_status_and_half_a_body(api: ImagesAPI) -> None:
    api.script(images_api.answer_cut())
    with pytest.raises(aiohttp.ClientPayloadError):
        post(api, "/images/generations", json={"prompt": "a"})
    assert api.requests[0].status == 200


def test_a_slow_body_arrives_whole(api: ImagesAPI) -> None:
    api.script(images_api.slow_body(0.2))
    started = time.monotonic()
    assert opened(first(ask(api))).size == (64, 64)
    assert time.monotonic() - started >= 0.15


@pytest.mark.parametrize("number", [200, 502])
def test_a_page_of_html_comes_in_place_of_json(api: ImagesAPI, number: int) -> None:
    api.script(images_api.html(number))
    with pytest.raises(aiohttp.ContentTypeError):
        post(api, "/images/generations", json={"prompt": "a"})
    assert api.requests[0].status == number


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (images_api.fewer_images(1), 1),
        (images_api.more_images(2), 5),
        (images_api.empty_data(), 0),
    ],
    ids=["fewer", "more", "none"],
)
def test_another_number_of_images_than_asked_for(
    api: ImagesAPI, reply: images_api.Reply, count: int
) -> None:
    api.script(reply)
    data = ask(api, n=3).data
    assert data is not None
    assert len(data) == count


def test_an_answer_without_data(api: ImagesAPI) -> None:
    api.script(images_api.no_data())
    assert ask(api).data is None


def test_a_huge_answer(api: ImagesAPI) -> None:
    api.script(images_api.huge_extra(3))
    assert len(ask(api).model_dump_json()) > 3_000_000


def test_another_format_and_another_size_than_asked_for(api: ImagesAPI) -> None:
    api.script(images_api.redrawn("JPEG"), images_api.redrawn(size=(10, 20)))
    assert opened(first(ask(api))).format == "JPEG"
    assert opened(first(ask(api))).size == (10, 20)


def test_what_is_no_image(api: ImagesAPI) -> None:
    api.script(images_api.wrong_base64(), images_api.not_an_image(), images_api.truncated_image())
    with pytest.raises(ValueError, match="base64"):
        base64.b64decode(first(ask(api)), validate=True)
    for _ in range(2):
        with pytest.raises(OSError, match=r"cannot identify|truncated"):
            opened(first(ask(api)))


def test_a_decompression_bomb_is_small_and_declares_much(api: ImagesAPI) -> None:
    api.script(images_api.decompression_bomb())
    data = first(ask(api))
    assert len(data) < 100_000
    with pytest.raises(Image.DecompressionBombError):
        opened(data)


# Rate limits


def test_a_fixed_window_admits_so_many_and_tells_when_the_next_begins() -> None:
    limit = RateLimit(admitted=2, window=10)
    assert [limit.wait(at) for at in (100, 101, 103, 109)] == [None, None, 7, 1]
    assert [limit.wait(at) for at in (110, 110.5, 111)] == [None, None, 9]
    assert limit.refused == 3
    assert limit.admitted_times == [100, 101, 110, 110.5]


def test_a_sliding_window_counts_refused_requests_too() -> None:
    limit = RateLimit(admitted=2, window=10, kind="sliding")
    assert [limit.wait(at) for at in (0, 1, 2, 9)] == [None, None, 9, 3]
    assert limit.wait(11.5) == pytest.approx(7.5)
    lenient = RateLimit(admitted=2, window=10, kind="sliding", count_refused=False)
    assert [lenient.wait(at) for at in (0, 1, 2, 9, 11.5)] == [None, None, 8, 1, None]


def test_requests_above_the_limit_are_refused_at_once_and_counted() -> None:
    limit = RateLimit(admitted=2, window=60)
    with ImagesAPI(limit=limit, auto_size="64x64") as api:
        ask(api)
        ask(api)
        api.latency = 2 * PATIENCE  # a refusal that waited for it would not come
        with pytest.raises(openai.RateLimitError) as raised:
            ask(api)
    assert (limit.refused, len(limit.admitted_times)) == (1, 2)
    opens, refused = limit.admitted_times[0] + 60, api.requests[2]
    assert refused.ended is not None
    wait = float(raised.value.response.headers["retry-after"])
    assert opens - refused.ended <= wait <= opens - refused.started + 0.001  # it is rounded up


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        ("retry-after", "retry-after", "1.500"),
        ("retry-after-seconds", "retry-after", "2"),
        ("retry-after-ms", "retry-after-ms", "1500"),
        ("reset", "x-ratelimit-reset-requests", "1500ms"),
    ],
)
def test_the_waiting_time_stands_in_a_header(
    form: images_api.HeaderForm, name: str, value: str
) -> None:
    assert images_api.rate_limited(1.5, form=form).headers[name] == value


def test_the_waiting_time_may_be_a_date_or_missing() -> None:
    before = time.time()
    header = images_api.rate_limited(3, form="http-date").headers["retry-after"]
    assert before + 3 <= parsedate_to_datetime(header).timestamp() < time.time() + 4
    assert images_api.rate_limited(3, form="none").headers == {}


# Files and batches


def line(custom_id: str, url: str = "/v1/images/generations", **body: object) -> Json:
    content = {"model": "gpt-image-2", "prompt": f"picture {custom_id}", **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": content}


LINES = [line(f"job-{number}") for number in range(1, 5)]


def jsonl(lines: list[Json]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in lines)


async def submit(sdk: AsyncOpenAI, data: bytes, url: str = "/v1/images/generations") -> Batch:
    uploaded = await sdk.files.create(file=("jobs.jsonl", data), purpose="batch")
    endpoint: Any = url
    return await sdk.batches.create(
        input_file_id=uploaded.id,
        endpoint=endpoint,
        completion_window="24h",
        metadata={"run": "r1"},
    )


async def finish(sdk: AsyncOpenAI, batch: Batch) -> tuple[list[str], list[Json], list[Json]]:
    """The states on the way to the end, and the lines of the output and of the error file."""
    states = [batch.status]
    while batch.status not in images_api.FINAL_STATES:
        batch = await sdk.batches.retrieve(batch.id)
        states.append(batch.status)
    return (
        list(states),
        await lines_of(sdk, batch.output_file_id),
        await lines_of(sdk, batch.error_file_id),
    )


async def lines_of(sdk: AsyncOpenAI, file_id: str | None) -> list[Json]:
    if file_id is None:
        return []
    content = await sdk.files.content(file_id)
    return [json.loads(entry) for entry in content.text.splitlines()]


def ids(lines: list[Json]) -> set[str]:
    return {entry["custom_id"] for entry in lines}


def test_a_batch_goes_through_its_states_and_answers_every_line(api: ImagesAPI) -> None:
    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        return await finish(sdk, await submit(sdk, jsonl(LINES)))

    states, output, errors = with_sdk(api, work)
    assert states == ["validating", "in_progress", "finalizing", "completed"]
    assert ids(output) == {"job-1", "job-2", "job-3", "job-4"}
    assert errors == []
    response = output[0]["response"]
    assert (response["status_code"], output[0]["error"]) == (200, None)
    assert opened(response["body"]["data"][0]["b64_json"]).size == (64, 64)
    assert ImagesResponse.model_validate(response["body"]).usage is not None
    assert [len(batch.lines) for batch in api.batches] == [4]


def test_a_batch_counts_its_requests_and_keeps_its_metadata(api: ImagesAPI) -> None:
    api.script_for("picture job-2", images_api.moderation_blocked())

    async def work(sdk: AsyncOpenAI) -> list[Batch]:
        batch = await submit(sdk, jsonl(LINES))
        return [batch] + [await sdk.batches.retrieve(batch.id) for _ in range(4)]

    batches = with_sdk(api, work)
    counts = [batch.request_counts for batch in batches]
    assert [(c.total, c.completed, c.failed) for c in counts if c] == [
        (0, 0, 0),
        (4, 1, 1),
        (4, 3, 1),
        (4, 3, 1),
        (4, 3, 1),
    ]
    assert {batch.status for batch in batches[3:]} == {"completed"}
    assert batches[-1].metadata == {"run": "r1"}
    assert batches[-1].completed_at


def test_failed_requests_of_a_batch_stand_in_the_error_file(api: ImagesAPI) -> None:
    api.script_for("picture job-2", images_api.moderation_blocked())
    lines = [*LINES[:3], line("job-4", n=0)]

    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        return await finish(sdk, await submit(sdk, jsonl(lines)))

    _, output, errors = with_sdk(api, work)
    assert ids(output) == {"job-1", "job-3"}
    codes = {e["custom_id"]: e["response"]["body"]["error"]["code"] for e in errors}
    assert codes == {"job-2": "moderation_blocked", "job-4": "invalid_value"}
    assert {entry["response"]["status_code"] for entry in errors} == {400}


def test_a_batch_without_any_success_has_an_error_file_alone(api: ImagesAPI) -> None:
    api.script_for("picture", images_api.server_error(), repeat=True)

    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        return await finish(sdk, await submit(sdk, jsonl(LINES)))

    states, output, errors = with_sdk(api, work)
    assert (states[-1], output, len(errors)) == ("completed", [], 4)


def test_a_batch_may_expire_half_done(api: ImagesAPI) -> None:
    api.plan_batch(images_api.BatchPlan(states=("in_progress", "expired"), share=0.5))

    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        return await finish(sdk, await submit(sdk, jsonl(LINES)))

    states, output, errors = with_sdk(api, work)
    assert states == ["validating", "in_progress", "expired"]
    assert ids(output) == {"job-1", "job-2"}
    assert ids(errors) == {"job-3", "job-4"}
    assert {entry["error"]["code"] for entry in errors} == {"batch_expired"}


def test_a_cancelled_batch_keeps_what_is_finished(api: ImagesAPI) -> None:
    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        batch = await submit(sdk, jsonl(LINES))
        await sdk.batches.retrieve(batch.id)
        result = await finish(sdk, await sdk.batches.cancel(batch.id))
        with pytest.raises(openai.ConflictError):
            await sdk.batches.cancel(batch.id)
        return result

    states, output, errors = with_sdk(api, work)
    assert states == ["cancelling", "cancelled"]
    assert (ids(output), ids(errors)) == ({"job-1", "job-2"}, {"job-3", "job-4"})


BAD_FILES = {
    "a repeated custom_id": ([LINES[0], LINES[0]], "duplicate_custom_id", 2),
    "another endpoint": ([LINES[0], line("x", "/v1/images/edits")], "invalid_request_line", 2),
    "no body": ([{"custom_id": "x", "method": "POST"}], "invalid_request_line", 1),
    "two models": ([LINES[0], line("x", model="gpt-image-1.5")], "mismatched_model", 2),
    "too many lines": ([line(f"{n}") for n in range(6)], "too_many_lines", None),
    "no line": ([], "invalid_request_line", 1),
}


@pytest.mark.parametrize(("lines", "code", "number"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_wrong_input_file_fails_the_validation_of_its_batch(
    api: ImagesAPI, lines: list[Json], code: str, number: int | None
) -> None:
    api.limit_batches(lines=5)

    async def work(sdk: AsyncOpenAI) -> Batch:
        batch = await submit(sdk, jsonl(lines))
        assert batch.status == "validating"
        return await sdk.batches.retrieve(batch.id)

    batch = with_sdk(api, work)
    assert batch.status == "failed"
    assert batch.errors
    assert batch.errors.data
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)


def test_the_validation_may_fail_for_the_limit_of_enqueued_tokens(api: ImagesAPI) -> None:
    api.plan_batch(images_api.BatchPlan(errors=(images_api.token_limit_exceeded(),)))

    async def work(sdk: AsyncOpenAI) -> Batch:
        return await sdk.batches.retrieve((await submit(sdk, jsonl(LINES))).id)

    batch = with_sdk(api, work)
    assert batch.errors
    assert batch.errors.data
    assert batch.errors.data[0].code == "token_limit_exceeded"


def test_a_lost_answer_to_a_submission_leaves_a_batch_that_the_list_shows(api: ImagesAPI) -> None:
    api.script_route("POST /v1/batches", images_api.answer_lost())

    async def work(sdk: AsyncOpenAI) -> list[Batch]:
        with pytest.raises(openai.APIConnectionError):
            await submit(sdk, jsonl(LINES))
        return [batch async for batch in sdk.batches.list()]

    listed = with_sdk(api, work)
    assert [batch.metadata for batch in listed] == [{"run": "r1"}]


def test_a_closed_connection_leaves_no_batch_and_429_neither(api: ImagesAPI) -> None:
    api.script_route("POST /v1/batches", images_api.connection_closed(), images_api.rate_limited(1))

    async def work(sdk: AsyncOpenAI) -> None:
        with pytest.raises(openai.APIConnectionError):
            await submit(sdk, jsonl(LINES))
        with pytest.raises(openai.RateLimitError):
            await submit(sdk, jsonl(LINES))

    with_sdk(api, work)
    assert api.batches == []


def test_batches_are_listed_newest_first_and_page_by_page(api: ImagesAPI) -> None:
    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[str]]:
        made = [(await submit(sdk, jsonl(LINES[:1]))).id for _ in range(5)]
        return made, [batch.id async for batch in sdk.batches.list(limit=2)]

    made, listed = with_sdk(api, work)
    assert listed == made[::-1]
    lists = [request for request in api.requests if request.route == "GET /v1/batches"]
    assert [request.query.get("after") for request in lists] == [None, made[3], made[1]]


def test_the_output_may_be_cut_and_may_hold_strangers(api: ImagesAPI) -> None:
    api.plan_batch(
        images_api.BatchPlan(output=images_api.stray_output),
        images_api.BatchPlan(output=images_api.cut_output),
    )

    async def work(sdk: AsyncOpenAI) -> set[str]:
        _, output, _ = await finish(sdk, await submit(sdk, jsonl(LINES)))
        with pytest.raises(json.JSONDecodeError):
            await finish(sdk, await submit(sdk, jsonl(LINES)))
        return ids(output)

    assert with_sdk(api, work) == {"nobody", "job-1", "job-2", "job-3", "job-4"}


def test_a_download_may_break(api: ImagesAPI) -> None:
    api.script_route("GET /v1/files/{file_id}/content", images_api.answer_cut())

    async def work(sdk: AsyncOpenAI) -> None:
        uploaded = await sdk.files.create(file=("a.jsonl", jsonl(LINES)), purpose="batch")
        await sdk.files.retrieve(uploaded.id)
        with pytest.raises(Exception, match=r"(?i)peer closed|incomplete|connection"):
            await sdk.files.content(uploaded.id)
        assert (await sdk.files.content(uploaded.id)).content == jsonl(LINES)

    with_sdk(api, work)


def test_an_edit_in_a_batch_refers_to_uploaded_images(api: ImagesAPI) -> None:
    async def work(sdk: AsyncOpenAI) -> tuple[list[str], list[Json], list[Json]]:
        image = await sdk.files.create(file=("a.png", PNG), purpose="vision")
        mask = await sdk.files.create(file=("m.png", MASK), purpose="vision")
        references: Json = {"images": [{"file_id": image.id}], "mask": {"file_id": mask.id}}
        unknown: Json = {"images": [{"file_id": "file-0"}]}
        url = "/v1/images/edits"
        data = jsonl([line("good", url, **references), line("bad", url, **unknown)])
        return await finish(sdk, await submit(sdk, data, url))

    _, output, errors = with_sdk(api, work)
    assert (ids(output), ids(errors)) == ({"good"}, {"bad"})


def test_files_are_listed_read_and_deleted(api: ImagesAPI) -> None:
    async def work(sdk: AsyncOpenAI) -> None:
        batch = await sdk.files.create(file=("a.jsonl", b"{}"), purpose="batch")
        vision = await sdk.files.create(file=("a.png", PNG), purpose="vision")
        assert [stored.id async for stored in sdk.files.list()] == [vision.id, batch.id]
        assert [stored.id async for stored in sdk.files.list(purpose="batch")] == [batch.id]
        assert (await sdk.files.retrieve(vision.id)).bytes == len(PNG)
        assert (await sdk.files.delete(vision.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await sdk.files.content(vision.id)

    with_sdk(api, work)


WRONG_FILES = {
    "no purpose": form(("file", "text/plain", b"{}")),
    "an unknown purpose": form(("file", "text/plain", b"{}"), purpose="fun"),
    "no file": form(purpose="batch"),
    "a batch that is not called .jsonl": form(("file", "text/plain", b"{}"), purpose="batch"),
    "an image that is none": form(("file", "image/png", b"{}"), purpose="vision"),
}


@pytest.mark.parametrize("data", WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_wrong_upload_is_refused(api: ImagesAPI, data: aiohttp.FormData) -> None:
    assert post(api, "/files", data=data)[0] == 400
    assert api.files == []


def test_a_file_above_the_limit_of_a_batch_is_refused(api: ImagesAPI) -> None:
    api.limit_batches(size=100)
    with pytest.raises(openai.BadRequestError):
        with_sdk(api, lambda sdk: submit(sdk, jsonl(LINES)))


# The program


def program(*words: str) -> Result:
    return finished([sys.executable, str(PROGRAM), *words])


def test_the_program_points_a_command_at_the_server_and_returns_its_exit_code(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log.jsonl"
    script = (
        "import openai; openai.OpenAI().images.generate(prompt='a fox', size='1024x1024');"
        "raise SystemExit(7)"
    )
    ended = program("--log", str(log), "--pictures", "flat", "--", "python", "-c", script)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (7, "", "")
    assert '"status": 200' in log.read_text()


def test_the_program_limits_as_it_is_told() -> None:
    script = (
        "import openai; c = openai.OpenAI(max_retries=0); c.images.generate(prompt='a');"
        "c.images.generate(prompt='a')"
    )
    ended = program("--limit", "1/60", "--", "python", "-c", script)
    assert "RateLimitError" in ended.stderr


def test_the_program_refuses_a_limit_that_is_none() -> None:
    assert program("--limit", "20").exit_code == 2


def test_a_command_that_does_not_exist_is_one_sentence_and_127() -> None:
    ended = program("--", "no-such-command")
    assert ended.exit_code == 127
    assert ended.stderr.startswith("Error: cannot run no-such-command")


def test_sigterm_is_passed_on_to_the_command() -> None:
    script = "import signal; print('ready', flush=True); signal.pause()"
    words = [sys.executable, str(PROGRAM), "--", "python", "-c", script]
    with started(words) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM


def test_without_a_command_the_program_serves_until_ctrl_c() -> None:
    words = [sys.executable, str(PROGRAM)]
    with started(words) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("export OPENAI_BASE_URL=http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it() -> None:
    ended = finished([sys.executable, "-I", "-S", str(PROGRAM)])
    assert ended.exit_code == 1
    assert ended.stderr.count("\n") == 1
    assert "python -m pip install" in ended.stderr
