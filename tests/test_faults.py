"""What happens to requests when clients, the engine or the server itself go away, and when memory runs out.

Every request is counted: it ends in its full answer, the same as it would be alone, or in a clear error.
"""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest

from tests.servers import Server, eventually, served

MODEL = "SmolLM2"
ERRORS = {400, 404, 413, 415, 422}
MINUTES = float(os.environ.get("VLLM_EXT_SOAK_MINUTES", "15"))
BLOCKS = 9  # of 128 tokens, one of them vLLM's own: room for two of the requests below


def long_body(start: int, tokens: int = 200, **more) -> dict:
    """A request for exactly `tokens` tokens."""
    prompt = [start + 10 * step for step in range(60)]
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True, **more}


@dataclass
class Ended:
    """How a request ended."""

    status: int
    text: str = ""
    tokens: int = 0
    error: str = ""

    @property
    def full(self) -> bool:
        return self.status == 200 and not self.error


def ask(server: Server, body: dict) -> Ended:
    """Send it and wait for its end; a broken connection is an error of status 0."""
    try:
        if not body.get("stream"):
            answer = server.post("/v1/completions", body)
            if answer.status_code != 200:
                return Ended(answer.status_code, error=answer.json()["error"]["message"])
            said = answer.json()
            return Ended(200, said["choices"][0]["text"], said["usage"]["completion_tokens"])
        ended = Ended(0, error="no [DONE]")
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as stream:
            ended.status = stream.status_code
            for line in stream.iter_lines():
                read(line, ended)
        return ended
    except httpx.HTTPError as error:
        return Ended(0, error=repr(error))


def read(line: str, ended: Ended) -> None:
    """One line of a stream."""
    if line == "data: [DONE]":
        ended.error = "" if ended.error == "no [DONE]" else ended.error
    elif line.startswith("data: "):
        said = json.loads(line.removeprefix("data: "))
        if "error" in said:
            ended.error = str(said["error"])
        for choice in said.get("choices", []):
            ended.text += choice["text"]
        if said.get("usage"):
            ended.tokens = said["usage"]["completion_tokens"]


USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """A float32 server, so that rounding does not depend on who else is in the batch, with little KV cache."""
    options = ["--skip", "28-29", "--served-model-name", MODEL, "--max-model-len", 512, "--dtype", "float32"]
    small = ["--num-gpu-blocks-override", BLOCKS, "--drain-seconds", 60]
    with served(smollm2, *options, *small, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def alone(server):
    """What each of four requests is answered when nobody else is there."""
    return {start: ask(server, long_body(start)) for start in range(100, 104)}


def test_a_full_kv_cache_preempts_and_recovers_with_the_same_tokens(server, alone):
    before = server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda start: ask(server, long_body(start)), alone))
    assert together == list(alone.values())
    assert {ended.tokens for ended in together} == {200}
    assert server.metric("vllm:num_preemptions_total") > before
    assert server.idle()


def test_a_client_that_goes_away_frees_its_blocks(server):
    """In the prompt, in the answer, and while it waits for room: half of all clients go."""
    with ThreadPoolExecutor(8) as pool:
        stay = [pool.submit(ask, server, long_body(start, 60)) for start in range(4)]
        for start in range(8):
            body = long_body(200 + start, 400, stream=True)
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
                if start % 2:
                    next(stream.iter_lines())
        assert all(each.result().tokens == 60 for each in stay)
    assert server.idle()
    assert server.metric("vllm_ext_kv_cache_used_bytes") == 0


def test_used_kv_cache_is_what_vllm_says(server):
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, long_body(50, 100))
        assert eventually(lambda: server.metric("vllm_ext_kv_cache_used_bytes") > 0)
        rows = server.metrics()
        running.result()
    found = {name.partition("{")[0]: value for name, value in rows.items()}
    share = found["vllm:kv_cache_usage_perc"]
    for unit in ("tokens", "bytes"):
        used, capacity = (found[f"vllm_ext_kv_cache_{what}_{unit}"] for what in ("used", "capacity"))
        assert used == pytest.approx(share * capacity)
    assert found["vllm_ext_kv_cache_capacity_tokens"] == BLOCKS * 128


HOSTILE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"model": "SmolLM2"}',
    b'{"model": "SmolLM2", "prompt": null, "messages": null, "input": null}',
    b'{"model": "SmolLM2", "prompt": "a", "max_tokens": NaN}',
    b'{"model": "SmolLM2", "prompt": "a", "max_tokens": -1}',
    b'{"model": "SmolLM2", "prompt": "a", "max_tokens": 1e400}',
    b'{"model": "SmolLM2", "prompt": "a", "temperature": 1e308}',
    b'{"model": "SmolLM2", "prompt": [999999999], "max_tokens": 1}',
    b'{"model": "SmolLM2", "prompt": [-1], "max_tokens": 1}',
    b'{"model": "SmolLM2", "prompt": ["a", 1, []], "max_tokens": 1}',
    b'{"model": "SmolLM2", "prompt": "a", "n": 100000}',
    b'{"model": "SmolLM2", "prompt": "a", "logprobs": 1000000, "max_tokens": 1}',
    b'{"model": "SmolLM2", "prompt": "a", "logit_bias": {"999999999": 1}, "max_tokens": 1}',
    b'{"model": "SmolLM2", "prompt": "a", "stop": [""], "max_tokens": 1}',
    b'{"model": "../../etc/passwd", "prompt": "a"}',
    b'{"model": "SmolLM2", "prompt": "' + b"word " * 5_000 + b'"}',
    b'{"model": "SmolLM2", "prompt": "a", "structured_outputs": {"regex": "(((("}, "max_tokens": 1}',
    b'{"model": "SmolLM2", "messages": [{"role": "user", "content": {"a": 1}}]}',
    b'{"model": "SmolLM2", "messages": [{"role": "user", "content": "a"}], "chat_template": "{{ x.y.z }}"}',
    b'{"model": "SmolLM2", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}',
    b'{"model": "SmolLM2", "messages": [], "input": [], "prompt": []}',
]
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations"]


def test_a_bad_request_never_harms_a_neighbour(server, alone):
    """Hostile bodies on every route while others are answered: they get 4xx, and the others what they get alone."""
    headers = {"Content-Type": "application/json"}

    def hurt(route: str, body: bytes) -> tuple[str, bytes, int]:
        # Its answers count, if any: a body that means something to a route may be answered.
        return route, body[:80], httpx.post(server.url + route, content=body, headers=headers, timeout=60).status_code

    with ThreadPoolExecutor(4) as pool:
        neighbours = [pool.submit(ask, server, long_body(start)) for start in (100, 103)]
        statuses = [hurt(route, body) for route in ROUTES for body in HOSTILE]
        assert [each.result() for each in neighbours] == [alone[100], alone[103]]
    assert [each for each in statuses if each[2] not in ERRORS | {200}] == []
    assert sum(status in ERRORS for _, _, status in statuses) > len(statuses) * 0.8
    assert server.idle()


def test_a_slow_reader_gets_everything_and_holds_up_nobody(server, alone):
    body = long_body(300, 200, logprobs=5, **USAGE)
    ended, content = Ended(0, error="no [DONE]"), json.dumps(body).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = (
            f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        slow.sendall(head.encode() + content)
        first = slow.recv(100)
        assert ask(server, long_body(101)) == alone[101]
        received = bytearray(first)
        while piece := slow.recv(4096):
            received += piece
    for line in received.decode().splitlines():
        read(line, ended)
    assert (ended.error, ended.tokens) == ("", 200)


def test_sigterm_drains(server, alone):
    """Accepted requests finish, new ones get 503, and the process ends well. Nothing can be asked of it after that."""
    with ThreadPoolExecutor(8) as pool:
        bodies = [long_body(start, **(USAGE if start % 2 else {})) for start in alone]
        accepted = [pool.submit(ask, server, body) for body in bodies]
        assert eventually(lambda: server.metric("vllm_ext_http_requests_in_flight") == len(accepted))
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: server.get("/ready").status_code == 503, 5)
        assert server.get("/health").status_code == 200
        late = server.post("/v1/completions", long_body(1))
        assert (late.status_code, late.json()["error"]["code"]) == (503, 503)
        assert int(late.headers["retry-after"]) >= 1
        assert [each.result() for each in accepted] == list(alone.values())
    assert server.process.wait(60) == 0
    assert time.monotonic() - told < 60


def test_a_dead_engine_ends_the_server(smollm2, tmp_path):
    """Requests that run and requests that wait: each gets an error, none hangs."""
    with served(
        smollm2, "--served-model-name", MODEL, "--max-model-len", 512, "--max-num-seqs", 3, log=tmp_path / "log"
    ) as server:
        (engine,) = server.engines()
        with ThreadPoolExecutor(8) as pool:
            bodies = [long_body(start, 400, **(USAGE if start % 2 else {})) for start in range(8)]
            asked = [pool.submit(ask, server, body) for body in bodies]
            assert eventually(lambda: server.metric("vllm:num_requests_running") == 3)
            engine.kill()
            assert eventually(lambda: unready(server), 3)
            ended = [each.result(timeout=30) for each in asked]
        assert [each for each in ended if each.full] == []
        assert all(each.error and each.status in (0, 200, 500, 503) for each in ended)
        # Those that had begun to be streamed, and the others, are told what happened.
        assert sum("EngineCore" in each.error or each.status >= 500 for each in ended) >= 6, ended
        assert server.process.wait(60) not in (0, None)


def unready(server: Server) -> bool:
    try:
        return server.get("/ready").status_code == 503
    except httpx.HTTPError:
        return True  # it has ended already


@pytest.mark.slow
def test_two_api_servers_share_limits_metrics_and_the_end(smollm2, tmp_path):
    """Two processes answer on one port: their counters add up, and both drain."""
    options = ["--skip", "28-29", "--served-model-name", MODEL, "--max-model-len", 512, "--api-server-count", 2]
    with served(smollm2, *options, "--drain-seconds", 60, log=tmp_path / "log") as server:
        with ThreadPoolExecutor(8) as pool:
            ended = list(pool.map(lambda start: ask(server, long_body(start, 20)), range(16)))
        assert all(each.tokens == 20 for each in ended)
        assert eventually(lambda: server.metric("vllm_ext_prompt_tokens_total") == 16 * 60)
        assert server.metric("vllm_ext_tail_skipped_prompt_tokens_total") == 16 * 59
        assert server.metric("vllm_ext_layers", kind="skip") == 2
        assert server.metric("vllm_ext_kv_cache_used_bytes") == 0
        assert server.idle()
        with ThreadPoolExecutor(8) as pool:
            accepted = [
                pool.submit(ask, server, long_body(start, **(USAGE if start % 2 else {}))) for start in range(6)
            ]
            assert eventually(lambda: server.metric("vllm_ext_http_requests_in_flight") == 6)
            server.process.send_signal(signal.SIGTERM)
            assert [each.result().tokens for each in accepted] == [200] * 6
        assert server.process.wait(90) == 0


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_memory_is_flat(smollm2, tmp_path):
    """Load for VLLM_EXT_SOAK_MINUTES: all answers right, and no process grows after the first third."""
    options = ["--skip", "28-29", "--served-model-name", MODEL, "--max-model-len", 512, "--dtype", "float32"]
    with served(smollm2, *options, log=tmp_path / "log") as server:
        family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        expected = {start: ask(server, long_body(start, 24)) for start in range(100, 116)}
        counts, sizes = {"full": 0, "refused": 0, "gone": 0}, []
        began = time.monotonic()
        with ThreadPoolExecutor(6) as pool:
            while (passed := time.monotonic() - began) < MINUTES * 60:
                more = USAGE if len(sizes) % 2 else {}
                asked = {start: pool.submit(ask, server, long_body(start, 24, **more)) for start in expected}
                bad = [pool.submit(ask, server, long_body(1, 24, temperature=-1)) for _ in range(4)]
                counts["gone"] += sum(pool.submit(leave, server).result() for _ in range(2))
                assert {start: each.result() for start, each in asked.items()} == expected
                assert {each.result().status for each in bad} == {400}
                counts["full"] += len(asked)
                counts["refused"] += len(bad)
                sizes.append((passed, [process.memory_info().rss for process in family]))
        assert server.idle()
    settled = [rss for passed, rss in sizes if passed > MINUTES * 20]
    print(f"\n{counts} in {MINUTES:g} min; RSS by process, MiB, at a third and at the end:")
    for number, process in enumerate(family):
        print(process.pid, *(round(rss[number] / 2**20, 1) for rss in (settled[0], settled[-1])))
    third = len(settled) // 3
    for number in range(len(family)):
        early, late = ([rss[number] for rss in part] for part in (settled[:third], settled[-third:]))
        assert sorted(late)[third // 2] < sorted(early)[third // 2] * 1.02 + 4 * 2**20


def leave(server: Server) -> int:
    """Begin a stream and go away."""
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=long_body(7, 200, stream=True), timeout=60
    ) as stream:
        next(stream.iter_lines())
    return 1
