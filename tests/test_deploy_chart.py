"""The Helm chart, linted, rendered with several values, and each manifest held against Kubernetes' own schemas."""

import json
import re
import subprocess
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import typer
import yaml
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.buckets import TIME_TO_FIRST_TOKEN_BUCKETS

from tests.command import vllm_ext
from vllm_ext.cli.main import app

DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "vllm-ext"
VALUES = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
KUBERNETES = "1.34"
# Custom resources: no schema of theirs is in Kubernetes.
CUSTOM = {"InferenceService", "LeaderWorkerSet", "PrometheusRule", "ScaledObject", "ServiceMonitor", "ServingRuntime"}


def values(name: str) -> dict:
    """The values of one of the chart's examples; none for `defaults`."""
    return {} if name == "defaults" else yaml.safe_load(VALUES[name].read_text())


def rendered(given: dict) -> dict[str, dict]:
    """Every manifest, by kind and name."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(given)
        texts = chart.render(values=given, name="demo", namespace="llm")
    documents = [
        document
        for name, text in texts.items()
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in documents}


def validated(manifests: list[dict]) -> set[str]:
    """The kinds that were held against a schema; custom resources are left out by name."""
    kinds = set()
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            kinds.add(manifest["kind"])
    return kinds


@pytest.mark.parametrize("name", ["defaults", *VALUES])
def test_lints(name):
    report = helm_python.lint(CHART, values(name), strict=True)
    found = [each for each in report["messages"] if each["severity"] >= 2]  # "icon is recommended" is mere information
    assert (report["errors"], found) == ([], [])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("defaults", {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}),
        ("smallest", {"Deployment", "Service"}),
        ("gpu", {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"}),
        (
            "router",
            {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"}
            | {"ServiceAccount", "Role", "RoleBinding"},
        ),
    ],
)
def test_kubernetes_takes_every_manifest(name, kinds):
    assert validated(list(rendered(values(name)).values())) == kinds


def test_the_validator_finds_what_is_wrong():
    deployment = rendered({})["Deployment/demo-vllm-ext"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        validated([deployment])


@pytest.mark.parametrize("name", ["defaults", *VALUES])
def test_pods_cannot_harm_their_node_and_have_time_to_drain(name):
    given = values(name)
    drain = given.get("server", {}).get("drainSeconds", 60)
    for manifest in rendered(given).values():
        if manifest["kind"] != "Deployment":
            continue
        pod = manifest["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= drain + 20
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_probes_ask_readiness_and_liveness_apart():
    (server,) = rendered({})["Deployment/demo-vllm-ext"]["spec"]["template"]["spec"]["containers"]
    paths = {kind: server[kind]["httpGet"]["path"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}


def test_keys_come_from_a_secret_and_are_on_no_command_line():
    deployment = rendered({"apiKeys": {"existingSecret": "keys-of-ours"}})["Deployment/demo-vllm-ext"]
    pod = deployment["spec"]["template"]["spec"]
    assert "--api-key-file=/etc/vllm-ext/keys" in pod["containers"][0]["args"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "keys"]
    assert volume["secret"]["secretName"] == "keys-of-ours"


def test_the_autoscaler_follows_the_queue():
    hpa = rendered(values("router"))["HorizontalPodAutoscaler/demo-vllm-ext"]["spec"]
    assert hpa["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demo-vllm-ext"}
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == "vllm_num_requests_waiting"
    keda = rendered(values("gpu"))["ScaledObject/demo-vllm-ext"]["spec"]
    query = keda["triggers"][0]["metadata"]["query"]
    assert "vllm:num_requests_waiting|vllm_ext_http_requests_queued" in query
    for name in ("router", "gpu"):
        assert "replicas" not in rendered(values(name))["Deployment/demo-vllm-ext"]["spec"]


def test_rules_and_dashboards_arrive_as_they_are():
    """Prometheus' own templates in alerts are not Helm's."""
    manifests = rendered(values("gpu"))
    _, *groups = manifests["PrometheusRule/demo-vllm-ext"]["spec"]["groups"]
    files = [yaml.safe_load((DEPLOY / "prometheus" / name).read_text()) for name in ("rules.yml", "alerts.yml")]
    assert groups == [group for file in files for group in file["groups"]]
    for name in ("endpoint", "variant"):
        text = manifests["ConfigMap/demo-vllm-ext-dashboards"]["data"][f"vllm-ext-{name}.json"]
        assert text.strip() == (DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text().strip()


def test_thresholds_follow_the_values(tmp_path):
    """The same ones as for a Prometheus without the chart; a start, the queue and what is named are the release's."""
    changed = {"thresholds": {"ttftSeconds": "10.0", "errorRatio": 0.2}}
    given = values("gpu") | {"startupSeconds": 3000, "autoscaling": {"waitingRequests": 3}}
    given["prometheusRule"] = given["prometheusRule"] | changed
    rule = rendered(given)["PrometheusRule/demo-vllm-ext"]["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule))
    subprocess.run(["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, check=True, timeout=60)
    thresholds = {each["record"].removeprefix("vllm_threshold:"): each for each in rule["groups"][0]["rules"]}
    file = yaml.safe_load((DEPLOY / "prometheus" / "thresholds.yml").read_text())["groups"][0]
    assert rule["groups"][0]["name"] == file["name"]
    assert {f"vllm_threshold:{name}" for name in thresholds} == {each["record"] for each in file["rules"]}
    assert thresholds["ttft_seconds"]["labels"] == {"le": "10.0"}
    expressions = {name: each["expr"] for name, each in thresholds.items()}
    assert expressions["ttft_seconds"] == "vector(10.0)"
    assert expressions["error_ratio"] == "vector(0.2)"
    assert expressions["start_seconds"] == "vector(3000)"
    assert expressions["waiting_requests"] == "vector(6)"
    assert expressions["rejection_ratio"] == "vector(0.05)"


def test_first_tokens_are_told_apart_at_a_bound_of_the_histogram():
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["prometheusRule"]
    bounds = schema["properties"]["thresholds"]["properties"]["ttftSeconds"]["enum"]
    assert bounds == [str(bound) for bound in TIME_TO_FIRST_TOKEN_BUCKETS]


def test_alerts_are_for_these_targets():
    (endpoint,) = rendered(values("gpu"))["ServiceMonitor/demo-vllm-ext"]["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"targetLabel": "app", "replacement": "vllm-ext"}]


def test_the_router_selects_the_servers_and_may_reach_them():
    manifests = rendered(values("router"))
    router = manifests["Deployment/demo-vllm-ext-router"]["spec"]["template"]
    labels = manifests["Deployment/demo-vllm-ext"]["spec"]["template"]["metadata"]["labels"]
    arguments = router["spec"]["containers"][0]["args"]
    selected = arguments[arguments.index("--selector") + 1 :][:2]
    assert all(labels[key] == value for key, value in (each.split("=") for each in selected))
    allowed = manifests["NetworkPolicy/demo-vllm-ext"]["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert allowed.items() <= router["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicas": "two"}, "replicas"),
        ({"image": {"repository": "vllm-ext", "tag": "latest"}}, "tag"),
        ({"server": {"drainSecond": 5}}, "drainSecond"),
        ({"server": {"metricsPort": 8000}}, "metricsPort"),
        ({"server": {"limits": {"maxConcurrentRequests": None}}}, "maxQueuedRequests|max-queued-requests"),
        ({"server": {"args": ["--api-key=secret"]}}, "args"),
        ({"server": {"env": {"VLLM_API_KEY": "secret"}}}, "env"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
        ({"prometheusRule": {"thresholds": {"ttftSeconds": "3.0"}}}, "ttftSeconds"),
        ({"prometheusRule": {"thresholds": {"errorRatio": 2}}}, "errorRatio"),
        ({"disruptionBudget": {"minAvailable": "half"}}, "minAvailable"),
    ],
)
def test_refuses_values_that_mean_nothing(wrong, message):
    with pytest.raises(helm_python.HelmError, match=message):
        rendered(wrong)


def leader_worker_set() -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "leaderworkerset.yaml").read_text()))


def test_the_pods_of_a_leader_worker_set_are_pods():
    """Its own schema is not to be had here; the pods in it are Kubernetes' own."""
    group, service = leader_worker_set()
    template = group["spec"]["leaderWorkerTemplate"]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part}, "spec": template[f"{part}Template"]["spec"]}
        for part in ("leader", "worker")
    ]
    assert validated([*pods, service]) == {"Pod", "Service"}
    assert service["spec"]["selector"] == template["leaderTemplate"]["metadata"]["labels"]
    leader, worker = (set(pod["spec"]["containers"][0]["args"]) for pod in pods)
    assert worker - leader == {"--headless"}
    nodes, ranks = f"--nnodes={template['size']}", "--pipeline-parallel-size=2"
    assert {nodes, ranks} <= leader & worker


def test_a_service_of_kserve_takes_our_runtime():
    """Its own schemas are not to be had here; what its pod is made of is Kubernetes' own."""
    runtime, service = kserve()
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    shared = ("automountServiceAccountToken", "terminationGracePeriodSeconds", "securityContext")
    pod = {name: predictor[name] for name in shared}
    pod |= {"containers": [container | {"resources": model["resources"]}], "volumes": runtime["spec"]["volumes"]}
    assert validated([{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}]) == {"Pod"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    drain = next(each for each in container["args"] if each.startswith("--drain-seconds="))
    sleep = container["lifecycle"]["preStop"]["exec"]["command"][1]
    assert pod["terminationGracePeriodSeconds"] >= int(drain.partition("=")[2]) + int(sleep) + 20
    assert f"--port={container['ports'][0]['containerPort']}" in container["args"]
    assert service["metadata"]["name"] in predictor["autoScaling"]["metrics"][0]["external"]["metric"]["query"]


def kserve() -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "kserve.yaml").read_text()))


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """The arguments and our variables of every server in the chart's examples and the other files."""
    group = leader_worker_set()[0]["spec"]["leaderWorkerTemplate"]
    pods = {f"leaderworkerset {part}": group[f"{part}Template"]["spec"] for part in ("leader", "worker")}
    pods["kserve"] = kserve()[0]["spec"]
    for name in ("defaults", *VALUES):
        pods[f"chart {name}"] = rendered(values(name))["Deployment/demo-vllm-ext"]["spec"]["template"]["spec"]
    found = {name: (pod["containers"][0]["args"], {}) for name, pod in pods.items()}
    for name, service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].items():
        if "vllm-ext" in service.get("image", ""):
            ours = {key: value for key, value in service["environment"].items() if key.startswith("VLLM_EXT_")}
            found[f"compose {name}"] = (service["command"], ours)
    return found


@pytest.mark.parametrize("name", commands())
def test_the_server_takes_every_option(name, tmp_path, monkeypatch):
    """Each is one of `vllm-ext serve`'s or of vLLM's, with a value that it can have; the model alone is not there."""
    (model, *options), variables = commands()[name]
    assert model.startswith("/m")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "keys").write_text("one-key")
    options = [re.sub(r"\$\(\w+\)", "1", each).replace("/etc/vllm-ext", str(tmp_path)) for each in options]
    serve = typer.main.get_command(app).commands["serve"]
    taken = {option.envvar for option in serve.params if option.envvar}
    assert set(variables) <= taken
    handed_on = serve.make_context("serve", [model, *options]).args
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers()).parse_args([model, *handed_on])
    done = vllm_ext("serve", str(tmp_path / "nothing"), *options)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: model {tmp_path / 'nothing'}: no such folder;.*\n", done.stderr)


def test_compose_gives_its_servers_settings():
    assert len(commands()["compose variant"][1]) > 3
