"""Requests made from the OpenAPI document, by schemathesis: no route may break, and no neighbour be harmed."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.servers import served

EXAMPLES = int(os.environ.get("VLLM_EXT_FUZZ_EXAMPLES", "40"))
# vLLM says of this that this model has no such thing.
NOT_IMPLEMENTED = {(501, "/v1/systemone")}
ASKED = {"model": "SmolLM2", "prompt": "One, two, three,", "temperature": 0, "max_tokens": 8}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    options = ["--skip", "28-29", "--served-model-name", "SmolLM2", "--max-model-len", 256, "--dtype", "float32"]
    limits = ["--max-output-tokens", 8, "--max-n", 2, "--max-body-bytes", 100_000]
    with served(smollm2, *options, *limits, log=tmp_path_factory.mktemp("fuzz") / "server.log") as server:
        yield server


def operations(server) -> list:
    document = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    document.config.update(base_url=server.url)
    return [found.ok() for found in document.get_all_operations()]


def test_no_route_breaks_and_no_neighbour_is_harmed(server):
    alone = server.post("/v1/completions", ASKED).json()["choices"][0]["text"]
    counts: dict[int, int] = {}
    broken: list[tuple[str, int, str, str]] = []
    routes = operations(server)
    assert len(routes) > 20
    for operation in routes:
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE) | operation.as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        )
        @given(case=strategy)
        def ask(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "SmolLM2"  # or hardly any would get beyond their model's name
            answer = case.call(timeout=60)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            if answer.status_code >= 500 and (answer.status_code, case.operation.path) not in NOT_IMPLEMENTED:
                broken.append((case.operation.label, answer.status_code, answer.text[:200], str(case.body)[:500]))

        ask()
        assert server.process.poll() is None, f"{operation.label} ended the server"
        assert server.post("/v1/completions", ASKED).json()["choices"][0]["text"] == alone, operation.label
    print(f"\n{sum(counts.values())} requests to {len(routes)} operations: {dict(sorted(counts.items()))}")
    assert broken == []
    assert server.idle()
