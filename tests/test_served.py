"""What is served: the checkpoint as it is, or with a plan or a head laid over it."""

import json

import pytest

from model_executors.attention_plan import CONFIG_KEY, LayerPlan
from model_executors.heads.head_plan import HeadPlan
from tests.fitted import write_random
from vllm_ext.embedded.model import fetch_heads
from vllm_ext.errors import UsageError
from vllm_ext.served import Served


def test_a_checkpoint_as_it_is(tiny_models, tmp_path):
    stock = Served.open(str(tiny_models("Llama")))
    assert (stock.plan, stock.head, stock.hf_overrides()) == (None, HeadPlan(), {})
    assert {layer.kind for layer in stock.attention_plan.layers} == {"full"}
    planned = Served.open(str(write_random(tiny_models("Llama"), tmp_path / "planned", {5: LayerPlan("skip")})))
    assert planned.plan.skipped == [5]
    assert planned.hf_overrides() == {}


def test_a_plan_is_laid_over(tiny_models):
    served = Served.open(str(tiny_models("Llama")), {5: LayerPlan("skip")})
    overrides = served.hf_overrides()
    assert overrides["architectures"] == ["AttentionPlanLlamaForCausalLM"]
    assert overrides[CONFIG_KEY] == served.plan.to_config()
    # A plan that changes nothing is one still: it is measured beside stock.
    assert Served.open(str(tiny_models("Llama")), {}).hf_overrides()["architectures"] == overrides["architectures"]


def test_a_head_is_laid_over():
    spelled = str(fetch_heads())
    written = Served.open(spelled)
    stock = Served.open(spelled, None, "stock")
    assert stock.plan == written.plan
    assert stock.hf_overrides() == {CONFIG_KEY: stock.checkpoint.config[CONFIG_KEY] | {"head": HeadPlan().to_config()}}
    surer, sure = (Served.open(spelled, None, "character", agreement).head.threshold for agreement in (0.99, 0.9))
    assert 1 > surer > sure > 0


def test_refuses_what_does_not_fit(tiny_models, tmp_path):
    llama = str(tiny_models("Llama"))
    with pytest.raises(UsageError, match="layer 5 needs tensors fitted on text"):
        Served.open(llama, {5: LayerPlan("skip", consolidation="bias")})
    with pytest.raises(UsageError, match=r"--head character: .* has no character heads"):
        Served.open(llama, None, "character")
    with pytest.raises(UsageError, match=r"--agreement 0\.9: it is for character heads"):
        Served.open(llama, None, None, 0.9)
    with pytest.raises(UsageError, match=r"--agreement 0.981: .* was calibrated for 0.7, 0.8,"):
        Served.open(str(fetch_heads()), None, None, 0.981)


def test_heads_that_were_never_calibrated(tmp_path):
    """As those of random weights that `bench --shape` writes."""
    config = json.loads((fetch_heads() / "config.json").read_text())
    config[CONFIG_KEY]["training"] = {"text": "random"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"--agreement 0.9: .* was not calibrated for --head character"):
        Served.open(str(tmp_path), None, "character", 0.9, vllm_args=["--load-format", "dummy"])
