"""What fitted plans keep of the embedded model, on little text and with slack; the README has the figures in full."""

import pytest

from model_executors.attention_plan import LayerPlan
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.dtypes import fast_dtype
from vllm_ext.offline.fit import fit
from vllm_ext.planned_checkpoint import write_planned
from vllm_ext.quality.command import measure
from vllm_ext.quality.work import QualitySettings
from vllm_ext.served import Served
from vllm_ext.tasks.texts import prose

pytestmark = pytest.mark.nightly

PLANS = {
    "window": dict.fromkeys(range(15, 30), LayerPlan("window", 128)),
    "linear": dict.fromkeys(range(25, 30), LayerPlan("skip", consolidation="linear")),
}


@pytest.fixture(scope="module")
def figures(smollm2, tmp_path_factory):
    source = Checkpoint.open(str(smollm2), weights=True)
    freeze = dict.fromkeys(range(21, 30), LayerPlan("freeze"))
    beside = {"freeze": Served.open(str(smollm2), freeze)}
    for name, changes in PLANS.items():
        plan = source.planned(changes)
        fitted = fit(source, plan, prose("calibration"), tokens=8192, length=512, seed=0) if plan.fitted else None
        folder = tmp_path_factory.mktemp(name) / "planned"
        write_planned(source, plan, folder, fitted)
        beside[name] = Served.open(str(folder))
    return measure(
        str(smollm2), beside, QualitySettings((512,), tokens=4096, items=60, tasks=()), ("--dtype", fast_dtype())
    )


def test_perplexity(figures):
    """Of passages of 512 tokens: to reach are 1.08 times the full model's, and 1.22 times."""
    assert figures["window"].perplexity[512].ratio < 1.12
    assert figures["linear"].perplexity[512].ratio < 1.3
    assert figures["window"].agreement[512].value > 0.8


@pytest.mark.parametrize("name", ["window", "freeze"])
def test_capitals(figures, name):
    assert figures["stock"].capitals.value > 0.25
    assert figures[name].capitals.ratio > 0.8
