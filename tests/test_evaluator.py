"""Tasks scored in batches, and by kind of score."""

import pytest
import torch
from safetensors.torch import load_file

from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES, own_window
from tests.engines import answers, engine
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import CONFIGS, NUM_LAYERS, prompts
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

PLAN_OF_WINDOWS = {1: LayerPlan("window", 16)}


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


@pytest.mark.parametrize("plan", [{}, PLAN, dict.fromkeys(range(NUM_LAYERS), LayerPlan("window", 16))], ids=len)
@pytest.mark.parametrize("family", CONFIGS)
def test_items_of_one_text_are_scored_as_each_alone(tiny_models, tmp_path, family, plan):
    """With questions of one token and more than a window of them, and another text between."""
    stock = tiny_models(family)
    kinds = FAMILIES[f"{family}ForCausalLM"].kinds
    model = OfflineModel(Checkpoint.open(str(stock), weights=True))
    own = {layer for layer in range(NUM_LAYERS) if own_window(model.model.config, layer) is not None}
    usable = {layer: each for layer, each in plan.items() if each.kind in kinds and layer not in own}
    # Nothing may be full above a frozen layer, so a layer that may not be changed there leaves none.
    plan = {layer: each for layer, each in usable.items() if each.kind != "freeze" or {3, 4, 5} <= set(usable)}
    fitted = Reference(write_random(stock, tmp_path / "planned", plan), plan).fitted
    text, other, *asked = prompts((60, 40, 1, 30, 17))
    items = [Item((*text, *each), tuple(range(9, 12 + n))) for n, each in enumerate(asked)]
    items.insert(1, Item(tuple(other), (7,)))
    items = [*items[2:], items[1], items[0]]
    together = Evaluator(model, Task("t", "tokens", tuple(items)))
    assert sorted(batch.text for batch, _ in together.batches) == [0, len(text)]
    found = together.plan(plan, fitted)
    alone = [Evaluator(model, Task("t", "tokens", (each,))).plan(plan, fitted) for each in items]
    assert found.nll == pytest.approx([each.nll[0] for each in alone], abs=1e-4)
    assert found.scores == [each.scores[0] for each in alone]


def test_many_items_of_one_text_are_asked_in_several_batches(model, monkeypatch):
    text, *asked = prompts((60, 10, 10, 10))
    items = tuple(Item((*text, *each), (9, 10)) for each in asked)
    whole = Evaluator(model, Task("t", "answers", items)).plan(PLAN_OF_WINDOWS, {})
    monkeypatch.setattr(evaluator, "FORKED_TOKENS", 25)
    parted = Evaluator(model, Task("t", "answers", items))
    assert [len(batch.sizes) for batch, _ in parted.batches] == [2, 1]
    assert parted.plan(PLAN_OF_WINDOWS, {}).nll == pytest.approx(whole.nll, abs=1e-4)


def test_states_let_go_of_are_made_again(model):
    asked = Evaluator(model, task())
    before = asked.manipulated(manipulation("skip", 3, NUM_LAYERS, 0))
    asked.forget(5)
    held = [set(states.states) for _, states in asked.batches]
    assert held == [{0, 3}] * len(held)  # what layer 5's is made of
    asked.manipulated(manipulation("skip", 5, NUM_LAYERS, 0))
    asked.forget(5)
    held = [set(states.states) for _, states in asked.batches]
    assert held == [{0, 5}] * len(held)
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
    given = Evaluator(model, Task("served", "answers", items))
    planned = given.plan(PLAN, load_file(folder / "vllm_ext.safetensors"))
    assert planned.scores == [1.0] * len(asked)
    assert planned.nll == pytest.approx([-sum(each.logprobs) / 6 for each in served], abs=2e-4)
    assert given.plan({}, {}).scores != planned.scores
