"""The search on models whose idle and retrieving layers are known, because they were planted."""

import pytest
import torch

from model_executors.attention_plan import KINDS, LayerPlan
from tests.tiny import NUM_LAYERS, prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline.evaluator import Asked
from vllm_ext.offline.fit import fit_passages
from vllm_ext.offline.model import Changed, OfflineModel, generate, load
from vllm_ext.planner.constants import fit_alone
from vllm_ext.planner.search import Budget, Exhausted, Search
from vllm_ext.tasks.items import Item, Task

LAYERS = range(NUM_LAYERS)
PASSAGES = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0))


def planted(stock, attending):
    """A model in which those layers alone attend."""
    model = OfflineModel(Checkpoint.open(str(stock), weights=True))
    for layer in set(LAYERS) - set(attending):
        model.attention(layer).o_proj.weight.data.zero_()
    return model


def search(model, passes=1_000.0, layers=LAYERS):
    asked = torch.tensor(prompts((40,) * 6))
    own = generate(Changed(model), asked, 6).tolist()
    items = tuple(Item(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked.tolist(), own, strict=True))
    fitted = fit_alone(model, [model.enter(PASSAGES)], 8, layers)
    budget = Budget(passes)
    tasks = [Asked(model, Task("one", "answers", items[:3])), Asked(model, Task("other", "answers", items[3:]))]
    return Search(tasks, fitted, 8, KINDS, layers, budget, lambda what: None), budget


def test_idle_layers_are_found(tiny_models):
    """The upper three."""
    found, _ = search(planted(tiny_models("Llama"), range(3)))
    path = found.windows()
    assert set(path[2].changes) == {3, 4, 5}
    assert path[2].missed == pytest.approx(0, abs=1e-5)
    assert found.missed({2: LayerPlan("window", 8)}) > 0.01
    frozen, skipped = found.tops({}, 1e-5)
    assert {each.kind for each in frozen.changes.values()} == {"freeze"}
    assert {layer: each.kind for layer, each in skipped.changes.items()} == dict.fromkeys((3, 4, 5), "skip")


def test_the_only_retrieving_layer_is_kept(tiny_models):
    found, _ = search(planted(tiny_models("Llama"), [2]))
    alone = found.alone(LayerPlan("window", 8))
    assert min(alone, key=lambda layer: -alone[layer]) == 2
    assert alone[2] > 0.01 > 1e-5 > max(missed for layer, missed in alone.items() if layer != 2)
    path = found.windows()
    assert set(path[4].changes) == set(LAYERS) - {2}
    assert 2 not in found.tops({}, 1e-5)[1].changes


def test_layers_that_may_not_be_changed_are_not(tiny_models):
    found, _ = search(planted(tiny_models("Llama"), [0]), layers=[1, 3, 5])
    assert set(found.windows()[-1].changes) == {1, 3, 5}
    assert set(found.tops({}, 1e-5)[1].changes) == {5}


def test_windows_on_top(tiny_models):
    found, _ = search(planted(tiny_models("Llama"), range(3)))
    two, three, all_of_them = (found.on_top(lambda changes, n=n: len(changes) >= n) for n in (2, 3, 99))
    assert set(two.changes) == {4, 5}
    assert three.missed == pytest.approx(0, abs=1e-5)
    assert set(all_of_them.changes) == set(LAYERS)
    assert all_of_them.missed > 0.01


def test_keeps_to_its_budget(tiny_models):
    model = planted(tiny_models("Llama"), [0, 1])
    found, budget = search(model, passes=7)
    path = found.windows()
    assert 6 < budget.used <= 7
    # One pass for the unchanged model, and for each layer alone the part of the model from there on: 21 sixths.
    assert budget.used >= 1 + 21 / 6
    assert len(path) < NUM_LAYERS
    with pytest.raises(Exhausted):
        found.missed({0: LayerPlan("window", 8), 1: LayerPlan("window", 8)})
    assert found.missed({5: LayerPlan("window", 8)}) == pytest.approx(0, abs=1e-5)  # tried before


def test_what_is_missed_is_the_mean_or_half_of_the_worst(tiny_models):
    found, _ = search(planted(tiny_models("Llama"), range(6)))
    changes = {2: LayerPlan("window", 8), 4: LayerPlan("skip", consolidation="linear")}
    more = []
    for each in found.asked:
        before, after = each.plan({}, {}), each.plan(changes, found.fitted)
        more.append(max(sum(after.nll) / 3 - sum(before.nll) / 3, 0))
    assert found.missed(changes) == pytest.approx(max(sum(more) / 2, max(more) / 2))
    assert max(more) > 0.01


@pytest.mark.parametrize("plan", [LayerPlan("window", 8), LayerPlan("skip", consolidation="linear")], ids=str)
def test_layers_fitted_alone_are_fitted_as_if_no_other_were_changed(tiny_models, plan):
    source = Checkpoint.open(str(tiny_models("Llama")), weights=True)
    model = OfflineModel(source)
    made = fit_alone(model, [model.enter(each) for each in PASSAGES.split(2)], 8, [1, 4])
    for layer in (1, 4):
        alone, _ = fit_passages(load(source.folder), source.family, source.planned({layer: plan}), PASSAGES)
        assert alone
        for name, tensor in alone.items():
            torch.testing.assert_close(made[name].float(), tensor.float(), atol=1e-4, rtol=1e-3)
