"""What a request meets before vLLM's routes, over an application that stands for them."""

import asyncio
from argparse import Namespace
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from serving.drain import drain
from serving.middleware import Endpoint
from serving.settings import ARGUMENT, ServerSettings

KEYS = ["one-key", "another-key"]


class Upload(httpx.AsyncByteStream):
    """A body in two parts; the second goes when it is let go."""

    def __init__(self) -> None:
        self.rest = asyncio.Event()

    async def __aiter__(self):
        yield b'{"n": '
        await self.rest.wait()
        yield b"3}"


def application(keys: list[str] | None = None, **limits: int) -> FastAPI:
    app = FastAPI()
    app.state.seen, app.state.let = asyncio.Event(), asyncio.Event()
    app.state.let.set()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def echo(request: Request, path: str):
        content = b""
        async for part in request.stream():
            content += part
            app.state.seen.set()
        await app.state.let.wait()
        return JSONResponse({"path": path, "bytes": len(content), "headers": dict(request.headers)})

    names = {"served_model_name": ["m"], "model": "m", "api_key": keys}
    app.state.args = Namespace(**names, **{ARGUMENT: ServerSettings(**limits)})
    app.add_middleware(Endpoint)
    return app


@asynccontextmanager
async def client(app: FastAPI):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def ask(app: FastAPI, method: str, path: str, **more) -> httpx.Response:
    async def one() -> httpx.Response:
        async with client(app) as asked:
            return await asked.request(method, path, **more)

    return asyncio.run(one())


@pytest.mark.parametrize("path", ["/version", "/load", "/v1/models", "/v1/messages", "/", "/metrics/", "/healthy"])
@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}])
def test_routes_ask_for_a_key(path, given):
    answer = ask(application(KEYS), "GET", path, headers=given)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/ping"])
def test_supervisors_are_asked_for_none(path):
    assert ask(application(KEYS), "GET", path).status_code == 200


@pytest.mark.parametrize("key", KEYS)
def test_a_key_opens(key):
    assert ask(application(KEYS), "GET", "/version", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_anthropics_header_opens_its_route_and_no_other():
    for path, status in {"/v1/messages": 200, "/v1/messages/count_tokens": 200, "/v1/chat/completions": 401}.items():
        answer = ask(application(KEYS), "POST", path, headers={"X-Api-Key": KEYS[1]}, json={})
        assert answer.status_code == status
        if status == 200:
            assert answer.json()["headers"]["authorization"] == f"Bearer {KEYS[1]}"  # vLLM's own check asks for it


@pytest.mark.parametrize(
    ("limits", "headers", "waits"),
    [
        ({}, {"Content-Length": "8"}, False),
        ({}, {}, True),  # of no stated length, so that its bytes have to be counted
        ({"max_n": 2}, {"Content-Length": "8"}, True),
        ({"max_n": 2}, {"Content-Length": "8", "Content-Type": "multipart/form-data; boundary=a"}, False),
    ],
)
def test_a_body_is_read_ahead_only_where_a_limit_asks_for_it(limits, headers, waits):
    async def upload() -> httpx.Response:
        app = application(**limits)
        async with client(app) as asked:
            body = Upload()
            answer = asyncio.ensure_future(asked.post("/v1/completions", content=body, headers=headers))
            try:
                await asyncio.wait_for(app.state.seen.wait(), 0.2)
                reached = True
            except TimeoutError:
                reached = False
            assert reached is not waits
            body.rest.set()
            return await answer

    answer = asyncio.run(upload())
    refused = waits and bool(limits)
    assert answer.status_code == (400 if refused else 200)
    assert refused or answer.json()["bytes"] == 8


@pytest.mark.parametrize("stated", [True, False])
def test_a_large_body_is_refused_and_its_connection_ended(stated):
    content = b"a" * 11 if stated else Upload()
    if not stated:
        content.rest.set()
    answer = ask(application(max_body_bytes=10 if stated else 7), "POST", "/v1/completions", content=content)
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")


def test_who_waits_for_a_place_gets_it_with_all_of_its_body():
    async def three() -> list[int]:
        app = application(max_concurrent_requests=1, max_queued_requests=1)
        app.state.let.clear()
        async with client(app) as asked:
            first, second = (asyncio.ensure_future(asked.post("/", content=b"abc")) for _ in range(2))
            await app.state.seen.wait()
            third = await asked.post("/", content=b"abc")
            app.state.let.set()
            answers = [await first, await second]
            assert [answer.json()["bytes"] for answer in answers] == [3, 3]
            return [answer.status_code for answer in (*answers, third)]

    assert asyncio.run(three()) == [200, 200, 429]


def test_how_many_may_wait_is_told():
    from prometheus_client import REGISTRY

    ask(application(max_concurrent_requests=1, max_queued_requests=7), "GET", "/health")
    assert REGISTRY.get_sample_value("vllm_ext_max_queued_requests", {"model_name": "m"}) == 7


def test_a_server_that_drains_refuses(monkeypatch):
    monkeypatch.setattr(drain, "draining", True)
    answer = ask(application(), "GET", "/v1/models")
    assert (answer.status_code, answer.headers["connection"]) == (503, "close")
    assert ask(application(), "GET", "/health").status_code == 200


@pytest.mark.parametrize("given", ["from-a-client-7", "a" * 128])
def test_a_request_id_goes_through(given):
    answer = ask(application(), "GET", "/", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == answer.json()["headers"]["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a" * 129, "two words", "a\tb"])
def test_a_request_id_is_made_where_none_can_be_taken(given):
    answer = ask(application(), "GET", "/", headers={} if given is None else {"X-Request-Id": given})
    made = answer.headers.get_list("x-request-id")
    assert made == [answer.json()["headers"]["x-request-id"]]
    assert len(made[0]) == 32
    assert int(made[0], 16) >= 0


def test_every_reason_has_a_row_before_the_first_refusal():
    from prometheus_client import REGISTRY

    from serving.errors import REASONS

    ask(application(), "GET", "/health")
    for reason in REASONS:
        found = REGISTRY.get_sample_value("vllm_ext_rejected_requests_total", {"model_name": "m", "reason": reason})
        assert found is not None, reason
