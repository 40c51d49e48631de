"""Every OpenAI route of vLLM under our middleware, asked with the real client; and our own routes beside them."""

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai import BadRequestError, OpenAI

from serving.plan import PlanReport
from tests.servers import eventually, rows, served
from vllm_ext.dtypes import fast_dtype
from vllm_ext.process import free_port

MODEL = "SmolLM2"
ITEM_BYTES = {"auto": 2, "float32": 4}[fast_dtype()]
MESSAGES = [
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "The capital of Italy is Rome."},
    {"role": "user", "content": "What is the capital of France?"},
]
ASKED = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
PARIS = "The capital of France is Paris."
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def server(served_smollm2):
    return served_smollm2


@pytest.fixture(scope="module")
def client(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_the_plan(server):
    plan = server.get("/v1/plan").json()
    assert plan["name"] == "skip 27-29"
    assert plan["kinds"] == {"full": 27, "window": 0, "freeze": 0, "skip": 3}
    assert [layer["kind"] for layer in plan["layers"]] == ["full"] * 27 + ["skip"] * 3
    held, stock = plan["kv_cache"]["token_bytes"], plan["kv_cache"]["stock_token_bytes"]
    assert sum(layer["kv_cache_token_bytes"] for layer in plan["layers"]) == held
    assert held * 30 == stock * 27
    assert plan["weights"]["dropped_bytes"] == 3 * ITEM_BYTES * (2 * 576 * 576 + 2 * 576 * 192)
    assert plan["head"]["kind"] == "stock"
    assert plan["provenance"] == {}
    assert plan["judged"] is None
    assert "Plan skip 27-29: it was not judged on tasks that retrieve" in server.log.read_text()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "2,048 tokens; beyond"),
        (["capitals", "needle at 512", "needle at 2048", "words at 2048"], "2,048 tokens; beyond"),
        (["words at 512", "needle at 2048", "own.jsonl"], "2,048 tokens (words of up to 512); beyond"),
    ],
)
def test_says_up_to_which_length_a_plan_was_judged(tasks, said):
    judged = {"lengths": [512, 2048], "tasks": dict.fromkeys(tasks, 1.0)}
    report = PlanReport.model_construct(name="window 0-7:128", judged=judged)
    assert f"judged on texts of up to {said}" in report.judged_line


def test_models_name_the_plan(server, client):
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.model_extra["vllm_ext"]["plan"] == "skip 27-29"
    assert card.model_extra["max_model_len"] == 1024


def test_openapi_has_our_routes_and_what_they_answer(server):
    document = server.get("/openapi.json").json()
    for path, schema in {"/v1/plan": "PlanReport", "/v1/models": "PlannedModelList", "/ready": "Ready"}.items():
        content = document["paths"][path]["get"]["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{schema}")
        assert schema in document["components"]["schemas"]
    assert "503" in document["paths"]["/ready"]["get"]["responses"]


def test_ready_and_alive(server):
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.get("/health").status_code == 200


def test_chat(client):
    answer = client.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == PARIS
    assert answer.usage.completion_tokens == 8


def test_streams_with_usage(client):
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == PARIS
    assert chunks[-1].usage.completion_tokens == 8


def test_logprobs(client):
    answer = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith(PARIS)
    assert all(token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob for token in tokens)


def test_completions_of_several_prompts(client):
    prompts = ["One, two, three,", "Monday, Tuesday,"]
    both = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=4)
    alone = [client.completions.create(model=MODEL, prompt=each, temperature=0, max_tokens=4) for each in prompts]
    assert [choice.text for choice in both.choices] == [answer.choices[0].text for answer in alone]


def test_responses(client):
    asked = [{"role": each["role"], "content": each["content"]} for each in MESSAGES]
    answer = client.responses.create(model=MODEL, input=asked, temperature=0, max_output_tokens=16)
    assert answer.output_text == PARIS
    assert answer.usage.output_tokens == 8


def test_structured_output(client):
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = client.chat.completions.create(**ASKED | {"max_tokens": 40}, response_format=form)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_a_schema_without_end_is_refused_and_a_tree_is_answered(client):
    def ask(schema: dict):
        form = {"type": "json_schema", "json_schema": {"name": "tree", "schema": schema}}
        return client.chat.completions.create(**ASKED | {"max_tokens": 40}, response_format=form)

    with pytest.raises(BadRequestError, match="refers to itself without end"):
        ask({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
    with pytest.raises(BadRequestError, match="the grammar refers to itself without end"):
        client.chat.completions.create(**ASKED, extra_body={"structured_outputs": {"grammar": "root ::= root"}})
    child = {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
    fields = {"name": {"enum": ["Paris"]}, "child": child}
    answer = ask({"type": "object", "properties": fields, "required": ["name", "child"]})
    assert "".join(answer.choices[0].message.content.split()).startswith('{"name":"Paris","child":')


def test_a_tool_that_must_be_called(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = ASKED | {"max_tokens": 100}
    answer = client.chat.completions.create(**asked, tools=[TOOL], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_tool_that_may_be_called(client):
    answer = client.chat.completions.create(**ASKED, tools=[TOOL], tool_choice="auto")
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_messages_as_anthropics_client_sends_them(server):
    answer = server.post("/v1/messages", {"model": MODEL, "max_tokens": 16, "messages": MESSAGES, "temperature": 0})
    assert answer.status_code == 200
    assert answer.json()["content"][0]["text"] == PARIS


def test_tokenizes_and_back(server):
    tokens = server.post("/tokenize", {"model": MODEL, "prompt": "Paris is large."}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 2
    assert (
        server.post("/detokenize", {"model": MODEL, "tokens": tokens["tokens"]}).json()["prompt"] == "Paris is large."
    )


def test_a_mistake_is_an_openai_error(client):
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(**ASKED | {"temperature": -1})
    assert caught.value.status_code == 400


def test_the_request_id_goes_from_header_to_log_to_answer(server):
    answer = server.post("/v1/chat/completions", ASKED, headers={"X-Request-Id": "from-a-client-7"})
    assert answer.headers["x-request-id"] == "from-a-client-7"
    assert answer.json()["id"] == "chatcmpl-from-a-client-7"
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if "from-a-client-7" in line]
    assert [line for line in lines if line["name"] == "uvicorn.access" and line["request_id"] == "from-a-client-7"]


@pytest.mark.parametrize("given", ["x" * 129, "two words", "a\tb", ""])
def test_a_request_id_that_cannot_be_is_replaced(server, given):
    answer = (
        server.get("/v1/models", headers=None)
        if given is None
        else httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": given})
    )
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_two_requests_with_one_id_both_get_their_answers(server):
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(server.post, "/v1/chat/completions", ASKED, headers={"X-Request-Id": "same"}) for _ in range(2)
        ]
        answers = [each.result().json() for each in asked]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == [PARIS, PARIS]


def test_every_line_of_the_log_is_json_once_the_server_is_up(server):
    server.get("/v1/models")
    lines = [line for line in server.log.read_text().splitlines() if "/v1/models" in line and "GET" in line]
    assert lines
    assert all(json.loads(line)["request_id"] for line in lines)


def test_metrics_are_as_prometheus_wants_them(server):
    check_metrics(server.metrics_text())


def check_metrics(text: str) -> None:
    """Raise where promtool finds something in our rows; vLLM's are vLLM's."""
    ours = [line for line in text.splitlines(keepends=True) if re.search(r"^(# (HELP|TYPE) )?vllm_ext_", line)]
    assert shutil.which("promtool"), "install Debian's prometheus"
    done = subprocess.run(["promtool", "check", "metrics"], input="".join(ours), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_metrics_count_prompt_tokens(server):
    before = rows(server.get("/metrics").text)
    prompt = list(range(100, 150))
    server.post("/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 3})
    after = rows(server.get("/metrics").text)
    labels = f'{{engine="0",model_name="{MODEL}"}}'
    added = {name: after[name + labels] - before[name + labels] for name in COUNTED}
    assert added == {"vllm_ext_prompt_tokens_total": 50, "vllm_ext_tail_skipped_prompt_tokens_total": 49}


COUNTED = ("vllm_ext_prompt_tokens_total", "vllm_ext_tail_skipped_prompt_tokens_total")


def test_metrics_of_the_kv_cache_beside_stock(server):
    found = {name.partition("{")[0]: value for name, value in server.metrics().items() if name.startswith("vllm_ext_")}
    tokens, size = found["vllm_ext_kv_cache_capacity_tokens"], found["vllm_ext_kv_cache_capacity_bytes"]
    assert tokens == pytest.approx(size / found["vllm_ext_kv_cache_token_bytes"], rel=1e-6)
    stock = found["vllm_ext_stock_kv_cache_capacity_tokens"]
    assert tokens / 128 * 27 // 30 == stock / 128
    assert found["vllm_ext_kv_cache_used_tokens"] == found["vllm_ext_kv_cache_used_bytes"] == 0


@pytest.mark.slow
def test_metrics_of_two_engines_and_two_api_servers_add_up(smollm2, tmp_path):
    """Data-parallel engines, an API server for each, and the metrics of all on a port of their own."""
    options = ["--skip", "27-29", "--served-model-name", MODEL, "--max-model-len", 512, "--data-parallel-size", 2]
    port = free_port()
    with served(smollm2, *options, "--metrics-port", port, log=tmp_path / "log") as server:
        server.metrics_url = f"http://127.0.0.1:{port}/metrics"

        def ask(number: int) -> int:
            body = {"model": MODEL, "prompt": [100 + number] * 40, "max_tokens": 8, "ignore_eos": True}
            return server.post("/v1/completions", body).json()["usage"]["completion_tokens"]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(32))) == [8] * 32
        assert eventually(lambda: server.metric("vllm_ext_prompt_tokens_total") == 32 * 40)
        assert server.metric("vllm_ext_tail_skipped_prompt_tokens_total") == 32 * 39
        assert server.metric("vllm:prompt_tokens_total") == 32 * 40
        for engine in ("0", "1"):
            assert server.metric("vllm_ext_prompt_tokens_total", engine=engine) > 0
            assert server.metric("vllm_ext_layers", engine=engine, kind="skip") == 3
            tokens, size, one = (
                server.metric(f"vllm_ext_kv_cache_{name}", engine=engine)
                for name in ("capacity_tokens", "capacity_bytes", "token_bytes")
            )
            assert tokens * one == size <= 2**30
        assert server.idle()
        assert server.metric("vllm_ext_kv_cache_used_bytes") == 0
        assert server.get("/ready").status_code == 200
        check_metrics(server.metrics_text())
        assert "pid=" not in "".join(row for row in server.metrics() if row.startswith("vllm_ext_"))
