"""Every expression of the dashboards, and every recording rule, against a Prometheus that scrapes real servers."""

import json
import math
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from model_executors.attention_plan import AttentionPlan
from vllm_ext.embedded.model import PLANNED, fetch_planned
from vllm_ext.process import free_port, running

DEPLOY = Path(__file__).parent.parent / "deploy"
BOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
MODEL = "SmolLM2"
SCRAPE_SECONDS = 1
RATE_SECONDS = 60  # all of the load: a slow machine answers a request or two in it, and never both servers at once
METRIC = re.compile(r"(?<![\w:])(?:vllm:|vllm_ext_|http_)\w+|\bup\b")


def expressions(board: Path) -> dict[str, str]:
    """A dashboard's expressions, by panel and legend."""
    panels = json.loads(board.read_text())["panels"]
    return {
        f"{board.stem}: {panel['title']}: {target['legendFormat']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", [])
    }


EXPRESSIONS = {name: expression for board in BOARDS for name, expression in expressions(board).items()}
VARIABLES = {"$job": ".+", "$instance": ".+", "$baseline": "baseline", "$variant": "variant"}


def substituted(expression: str) -> str:
    """As Grafana would put its variables in."""
    for name, value in (VARIABLES | {"$__rate_interval": f"{RATE_SECONDS}s"}).items():
        expression = expression.replace(name, value)
    return expression


def load(url: str, seconds: float) -> int:
    """Streamed requests for `seconds`, and a few that are refused; returns how many were answered."""
    end, answered = time.monotonic() + seconds, 0
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        while time.monotonic() < end:
            prompt = f"Once upon a time there were {answered} geese. " * 24  # more than a block, to find in the cache
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
            body |= {"stream": True, "temperature": 0}
            for _ in range(2):
                with client.stream("POST", "/v1/completions", json=body) as response:
                    answered += response.read().endswith(b"data: [DONE]\n\n")
            client.post("/v1/completions", json=body | {"model": "nobody"})
            client.post("/v1/completions", json=body | {"n": 5, "stream": False, "max_tokens": 1})
    return answered


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]):
    """The deployment's own configuration and rules, with these servers in place of the ones in containers."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = [targets[job["job_name"]]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def scraped(smollm2, tmp_path_factory):
    """Baseline and variant under load; gives a query's series over that time, and has each expression's before it."""
    ports = {"baseline": free_port(), "variant": free_port()}
    models = {"baseline": [smollm2], "variant": [fetch_planned(), "--head", "screened"]}
    options = ["--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "1024"]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setenv("VLLM_EXT_MAX_N", "4")  # so that there are rejections
        patch.setenv("VLLM_EXT_MAX_CONCURRENT_REQUESTS", "64")
        patch.setenv("VLLM_EXT_MAX_QUEUED_REQUESTS", "64")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        servers = {}
        for job, port in ports.items():
            command = [sys.executable, "-m", "vllm_ext.cli.main", "serve", *map(str, models[job]), "--port", str(port)]
            servers[job] = running([*command, *options], port)
        urls = dict(zip(servers, pool.map(stack.enter_context, servers.values()), strict=True))
        targets = {job: f"127.0.0.1:{port}" for job, port in ports.items()}
        source = stack.enter_context(prometheus(tmp_path_factory.mktemp("prometheus"), targets))
        wait_for_scrapes(source)
        time.sleep(3 * SCRAPE_SECONDS)  # a rate needs two samples
        idle = {}
        for name, expression in EXPRESSIONS.items():
            query = {"query": substituted(expression.replace("$job", "variant"))}
            answer = httpx.get(f"{source}/api/v1/query", params=query, trust_env=False).json()
            idle[name] = [float(each["value"][1]) for each in answer["data"]["result"]]
        start = time.time()
        assert all(pool.map(lambda url: load(url, 12), urls.values()))
        exposed = {job: httpx.get(f"{url}/metrics", trust_env=False).text for job, url in urls.items()}
        time.sleep(2 * SCRAPE_SECONDS)
        end = time.time()

        def series(expression: str) -> list[dict]:
            query = {"query": expression, "start": start, "end": end, "step": SCRAPE_SECONDS}
            answer = httpx.get(f"{source}/api/v1/query_range", params=query, trust_env=False).json()
            assert answer["status"] == "success", answer
            return answer["data"]["result"]

        series.exposed, series.idle = exposed, idle
        yield series


def wait_for_scrapes(source: str) -> None:
    """Return once both servers were scraped."""
    for _ in range(60):
        try:
            answer = httpx.get(f"{source}/api/v1/query", params={"query": "sum(up)"}, trust_env=False)
            result = answer.raise_for_status().json()["data"]["result"]  # while it starts it has a status, and no JSON
            if result and result[0]["value"][1] == "2":
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("Prometheus scraped nothing")


def finite(series: list[dict]) -> bool:
    """Whether there is a number among the samples."""
    return any(math.isfinite(float(value)) for each in series for _, value in each["values"])


def test_the_json_is_what_the_code_generates(tmp_path):
    subprocess.run([sys.executable, DEPLOY / "grafana" / "generate.py", tmp_path], check=True)
    generated = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert generated == {board.name: board.read_text() for board in BOARDS}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_panel_has_data(scraped, name):
    assert finite(scraped(substituted(EXPRESSIONS[name]))), substituted(EXPRESSIONS[name])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_panel_shows_0_and_not_no_data_before_the_first_request(scraped, name):
    """Latencies alone, and ratios of two servers' rates, are of nothing then: no number."""
    none_yet = re.search(r"histogram_quantile|_seconds_sum|: variant / baseline$", EXPRESSIONS[name] + name)
    if none_yet is None:
        assert any(map(math.isfinite, scraped.idle[name])), scraped.idle[name]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.stem)
def test_every_variable_has_choices(scraped, board):
    for variable in json.loads(board.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
            assert {each["metric"][label] for each in scraped(substituted(metric))}


def test_every_recording_rule_has_data(scraped):
    groups = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())["groups"]
    rules = [rule["record"] for group in groups for rule in group["rules"]]
    assert rules
    assert [rule for rule in rules if not finite(scraped(rule))] == []


def test_the_variant_is_seen_to_save(scraped):
    """What the dashboard shows is what the plan says: the part of the layers that hold a window."""
    section = json.loads((PLANNED / "config.json").read_text())
    plan = AttentionPlan.from_config(section, len(section["attention_plan"]))
    windows = sum(layer.kind == "window" for layer in plan.layers)
    (saved,) = scraped(substituted(EXPRESSIONS["variant: KV bytes a token saved: "]))
    assert float(saved["values"][-1][1]) == pytest.approx(windows / len(plan.layers))
    kinds = {each["metric"]["kind"]: each for each in scraped('vllm_ext_layers{job="variant"}')}
    assert float(kinds["window"]["values"][-1][1]) == windows > 0


def test_metrics_that_are_missing_are_named(scraped):
    """Dashboards and alerts use no metric that the servers do not have, but for those that are still to come."""
    rules = [(DEPLOY / "prometheus" / name).read_text() for name in ("rules.yml", "alerts.yml")]
    expressions = [*EXPRESSIONS.values(), *(rule["expr"] for text in rules for rule in all_rules(text))]
    used = {name for expression in expressions for name in METRIC.findall(expression)}
    assert len(used) > 20
    assert not {name for name in used if not scraped(name)}


def all_rules(text: str) -> list[dict]:
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def test_metrics_are_clean(scraped):
    """promtool's own lint of our rows; vLLM's are vLLM's."""
    for text in scraped.exposed.values():
        ours = "".join(line + "\n" for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?vllm_ext_", line))
        done = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
