"""Which bodies are refused, and what a guarded server answers."""

import asyncio
import threading

import httpx
import pytest

from serving import limits
from serving.errors import Refused
from serving.settings import ServerSettings
from tests.servers import eventually, served

KEY = "a-key-for-tests"
STRICT = ServerSettings(max_n=2, max_output_tokens=10)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 3},
        {"n": "3"},
        {"n": 3.0},
        {"best_of": 3},
        {"max_tokens": 11},
        {"max_completion_tokens": 11},
        {"max_output_tokens": "11"},
        {"sampling_params": {"max_tokens": 11}},
        {"max_tokens": float("inf")},
    ],
)
def test_refuses_what_is_over_a_limit(body):
    with pytest.raises(Refused) as caught:
        limits.check(body, STRICT)
    assert caught.value.status == 400
    assert "this server allows at most" in str(caught.value)


@pytest.mark.parametrize("body", [{"n": 2, "max_tokens": 10}, {"n": None}, {"n": "many"}, {"n": []}, [], None, "n", 3])
def test_leaves_the_rest_to_vllm(body):
    limits.check(body, STRICT)
    limits.check(body, ServerSettings())


def test_what_is_nested_too_deeply_is_refused():
    with pytest.raises(Refused):
        limits.parse(b"[" * 200_000)
    assert limits.parse(b"{") is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "a"}, [{"prompt": "a"}]),
        ({"prompt": ["a", "b"]}, [{"prompt": "a"}, {"prompt": "b"}]),
        ({"prompt": [1, 2]}, [[1, 2]]),
        ({"prompt": [[1, 2], [3]]}, [[1, 2], [3]]),
        ({"token_ids": [1]}, [[1]]),
        ({"messages": [{"role": "user"}]}, [{"messages": [{"role": "user"}]}]),
        (
            {"input": "a", "instructions": "b"},
            [{"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]}],
        ),
        ({"model": "m"}, []),
    ],
)
def test_finds_the_prompts_of_every_route(body, expected):
    assert list(limits.prompts(body)) == expected


def test_counts_each_prompt_against_the_limit():
    async def count(prompt):
        return len(prompt["prompt"])

    asyncio.run(limits.check_prompt({"prompt": ["abc", "ab"]}, 3, count))
    with pytest.raises(Refused):
        asyncio.run(limits.check_prompt({"prompt": ["abc", "abcd"]}, 3, count))
    with pytest.raises(Refused):
        asyncio.run(limits.check_prompt({"prompt": [1, 2, 3, 4]}, 3, count))


def test_asks_tokenize_as_a_client_that_stays():
    """vLLM's routes listen for a client that goes away while they work."""
    from fastapi import FastAPI, Request
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    from serving.tokens import count_tokens

    app = FastAPI()

    @app.post("/tokenize")
    @with_cancellation
    async def tokenize(request: dict, raw_request: Request):
        await asyncio.sleep(0.01)
        return {"count": len(request["prompt"])}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "root_path": ""}
    asked = count_tokens(app, scope, {"prompt": "four"})
    assert asyncio.run(asyncio.wait_for(asked, 5)) == 4


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """One with every limit, a key, and its metrics elsewhere."""
    from vllm_ext.process import free_port

    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys").write_text(f"# keys\n\nanother-key\n{KEY}\n")
    metrics_port = free_port()
    options = {
        "--served-model-name": "SmolLM2",
        "--max-model-len": 512,
        "--dtype": "float32",  # so that what runs beside it changes no answer
        "--api-key-file": folder / "keys",
        "--metrics-port": metrics_port,
        "--max-body-bytes": 20_000,
        "--max-prompt-tokens": 40,
        "--max-output-tokens": 150,
        "--max-concurrent-requests": 2,
        "--max-queued-requests": 1,
    }
    arguments = [str(each) for option in options.items() for each in option]
    environment = {"VLLM_EXT_MAX_N": "2"}
    with served(smollm2, *arguments, log=folder / "server.log", key=KEY, env=environment) as server:
        server.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        yield server


def rejected(server, reason: str) -> float:
    row = f'vllm_ext_rejected_requests_total{{model_name="SmolLM2",reason="{reason}"}}'
    return server.metrics().get(row, 0)


@pytest.mark.parametrize(
    ("path", "body", "reason", "said"),
    [
        ("/v1/completions", {"prompt": "a", "n": 3}, "n", "n is 3"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 3}, "n", "n is 3"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 151}, "output_tokens", "at most 150"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 151}, "output_tokens", "at most 150"),
        ("/v1/completions", {"prompt": "word " * 41}, "prompt_tokens", "the prompt has"),
        ("/v1/completions", {"prompt": list(range(41))}, "prompt_tokens", "has 41 tokens"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "word " * 40}]},
            "prompt_tokens",
            "at most 40",
        ),
        ("/v1/responses", {"input": "word " * 40}, "prompt_tokens", "at most 40"),
        (
            "/v1/messages",
            {"max_tokens": 2, "messages": [{"role": "user", "content": "word " * 40}]},
            "prompt_tokens",
            "at",
        ),
    ],
)
def test_over_a_limit_is_400(server, path, body, reason, said):
    before = rejected(server, reason)
    answer = server.post(path, {"model": "SmolLM2", "max_tokens": 2} | body if "input" not in body else body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert rejected(server, reason) == before + 1


def test_within_the_limits_is_answered(server):
    body = {"model": "SmolLM2", "prompt": "One, two,", "n": 2, "max_tokens": 4}
    assert len(server.post("/v1/completions", body).json()["choices"]) == 2


def test_who_names_no_number_gets_the_limit(server):
    body = {"model": "SmolLM2", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "temperature": 0}
    assert server.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 150


@pytest.mark.parametrize("chunked", [False, True], ids=["stated", "chunked"])
def test_a_large_body_is_413(server, chunked):
    content = b'{"prompt": "' + b"a" * 20_000 + b'"}'
    sent = (content[start : start + 1000] for start in range(0, len(content), 1000)) if chunked else content
    answer = httpx.post(f"{server.url}/v1/completions", content=sent, headers=server.headers, timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "RequestEntityTooLargeError" or answer.json()["error"]["code"] == 413


ROUTES = ["/v1/models", "/v1/completions", "/tokenize", "/invocations", "/openapi.json", "/version", "/load"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
def test_every_route_asks_for_a_key(server, path, given):
    answer = httpx.request(
        "POST" if path[-1] in "se" and path != "/v1/models" else "GET", server.url + path, headers=given
    )
    assert answer.status_code == 401
    assert "API key" in answer.json()["error"]["message"]


@pytest.mark.parametrize("given", [{}, {"Authorization": "Bearer wrong"}], ids=["no key", "a wrong one"])
def test_supervisors_need_no_key(server, given):
    assert httpx.get(f"{server.url}/health", headers=given).status_code == 200
    ready = httpx.get(f"{server.url}/ready", headers=given)
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


def test_each_key_of_the_file_opens(server):
    for key in (KEY, "another-key"):
        answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_anthropics_clients_send_it_in_a_header_of_their_own(server):
    body = {"model": "SmolLM2", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}
    for given, status in (({"x-api-key": KEY}, 200), ({"x-api-key": "wrong"}, 401)):
        assert httpx.post(f"{server.url}/v1/messages", json=body, headers=given, timeout=60).status_code == status
    chat = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert chat.status_code == 401


def test_no_key_in_processes_or_logs(server):
    import psutil

    process = psutil.Process(server.process.pid)
    assert KEY not in " ".join(process.cmdline())
    assert KEY not in server.log.read_text()


def test_metrics_are_on_their_own_port_only(server):
    assert server.get("/metrics").status_code == 404
    found = server.metrics_text()
    assert "vllm:kv_cache_usage_perc" in found
    assert "vllm_ext_layers" in found


def test_more_at_once_wait_or_get_429(server):
    """Of four long requests two run, one waits, and one is told to come again; three are answered in full."""
    body = {"model": "SmolLM2", "prompt": "One,", "max_tokens": 150, "ignore_eos": True, "temperature": 0}
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: rejected(server, "concurrency"))
    assert server.metric("vllm_ext_http_requests_queued") == 1
    assert server.metric("vllm_ext_http_requests_in_flight") == 3
    assert httpx.get(f"{server.url}/ready", timeout=5).status_code == 200  # full is ready: others wait, or are told
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 429]
    assert server.metric("vllm_ext_http_requests_queued") == 0
    (refused,) = [answer for answer in answers if answer.status_code == 429]
    assert int(refused.headers["retry-after"]) >= 1
    full = [answer.json() for answer in answers if answer.status_code == 200]
    assert {answer["usage"]["completion_tokens"] for answer in full} == {150}
    assert len({answer["choices"][0]["text"] for answer in full}) == 1
