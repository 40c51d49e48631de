"""Tasks scored in batches, and by kind of score."""

import pytest
import torch

from model_executors.attention_plan import LayerPlan
from tests.engines import answers, engine
from tests.fitted import write_random
from tests.tiny import NUM_LAYERS, prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline import evaluator
from vllm_ext.offline.evaluator import Evaluator
from vllm_ext.offline.model import OfflineModel, PlannedModel, generate
from vllm_ext.probe.manipulations import Manipulation, manipulation
from vllm_ext.tasks.items import Item, Task

PLAN = {
    1: LayerPlan("window", 16),
    3: LayerPlan("freeze", 16),
    4: LayerPlan("freeze"),
    5: LayerPlan("skip", consolidation="linear"),
}


@pytest.fixture(scope="module")
def model(tiny_models):
    return OfflineModel(Checkpoint.open(str(tiny_models("Llama")), weights=True))


def task(score="answers"):
    asked = prompts((30, 5, 18, 64))
    return Task("tiny", score, tuple(Item(tuple(each), tuple(range(9, 12 + n))) for n, each in enumerate(asked)))


def test_batches_change_nothing(model, monkeypatch):
    whole = Evaluator(model, task()).manipulated(manipulation("shuffle", 2, NUM_LAYERS, 0))
    monkeypatch.setattr(evaluator, "BATCH_TOKENS", 1)
    asked = Evaluator(model, task())
    assert len(asked.batches) == 4
    alone = asked.manipulated(manipulation("shuffle", 2, NUM_LAYERS, 0))
    assert alone.nll == pytest.approx(whole.nll, abs=1e-4)


def test_states_let_go_of_are_made_again(model):
    asked = Evaluator(model, task())
    before = asked.manipulated(manipulation("skip", 3, NUM_LAYERS, 0))
    asked.forget(NUM_LAYERS)
    assert asked.manipulated(manipulation("skip", 3, NUM_LAYERS, 0)) == before


def test_counts_tokens_or_whole_answers(model):
    """The answers are the model's own but for one token of the first."""
    asked = torch.tensor(prompts((12, 12)))
    own = generate(PlannedModel(model), asked, 4).tolist()
    own[0][3] = (own[0][3] + 1) % 256
    items = tuple(Item(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked.tolist(), own, strict=True))
    assert Evaluator(model, Task("t", "answers", items)).manipulated(Manipulation(0)).scores == [0.0, 1.0]
    assert Evaluator(model, Task("t", "tokens", items)).manipulated(Manipulation(0)).scores == [0.75, 1.0]


def test_what_a_served_plan_answers_is_right_under_the_same_plan(tiny_models, tmp_path):
    """Two implementations of one plan: vLLM's and the offline one."""
    stock = tiny_models("Llama")
    folder = write_random(stock, tmp_path / "planned", PLAN)
    asked = prompts((2, 17, 40, 129))
    with engine(folder) as llm:
        served = answers(llm, asked, 6, prompt_logprobs=False)
    items = tuple(Item(tuple(prompt), tuple(each.tokens)) for prompt, each in zip(asked, served, strict=True))
    model = OfflineModel(Checkpoint.open(str(stock), weights=True))
    from safetensors.torch import load_file

    given = Evaluator(model, Task("served", "answers", items))
    planned = given.plan(PLAN, load_file(folder / "vllm_ext.safetensors"))
    assert planned.scores == [1.0] * len(asked)
    assert planned.nll == pytest.approx([-sum(each.logprobs) / 6 for each in served], abs=2e-4)
    assert given.plan({}, {}).scores != planned.scores
