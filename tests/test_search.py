"""The scan and the search on models whose idle and retrieving layers are known, because they were planted."""

from dataclasses import replace

import pytest
import torch

from model_executors.attention_plan import KINDS, LayerPlan
from tests.tiny import NUM_LAYERS, prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.offline.attentions import stock_attention, window_attention
from vllm_ext.offline.fit import fit_passages
from vllm_ext.offline.model import OfflineModel, PlannedModel, generate, load
from vllm_ext.planner.kv_heads import WindowedHead
from vllm_ext.planner.linear import LINEAR, fit_alone
from vllm_ext.planner.scan import Scan, scan
from vllm_ext.planner.search import Search
from vllm_ext.planner.trials import KEYS, Trials
from vllm_ext.reports.journal import Journal
from vllm_ext.tasks.items import Item, Task

LAYERS = range(NUM_LAYERS)
PASSAGES = torch.randint(3, 256, (4, 64), generator=torch.Generator().manual_seed(0))
WINDOW = LayerPlan("window", 8)


def planted(stock, attending):
    """A model in which those layers alone attend."""
    model = OfflineModel(Checkpoint.open(str(stock), weights=True))
    for layer in set(LAYERS) - set(attending):
        model.attention(layer).o_proj.weight.data.zero_()
    return model


def trials(model, out):
    asked = torch.tensor(prompts((40,) * 6))
    own = generate(PlannedModel(model), asked, 6).tolist()
    items = tuple(Item(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked.tolist(), own, strict=True))
    tasks = [Task("one", "answers", items[:3], length=46), Task("other", "answers", items[3:])]
    journal = Journal(out / "trials" / "trials.jsonl", {}, KEYS)
    fitted = fit_alone(model, [model.enter(PASSAGES)], LAYERS)
    return Trials(lambda: model, tasks, "search", journal, NUM_LAYERS, lambda: fitted, lambda *_: None)


def search(made, layers=LAYERS, windows=(8,)):
    scanned = scan(made, 8, layers)
    return Search(made, scanned, windows, (4,), KINDS, lambda changes: len(changes) / NUM_LAYERS)


def test_idle_layers_are_found(tiny_models, tmp_path):
    """The upper three."""
    made = trials(planted(tiny_models("Llama"), range(3)), tmp_path)
    found = search(made)
    assert set(found.scan.order[:3]) == {3, 4, 5}
    best = found.most(1e-4, WINDOW, found.scan.order, {})
    assert set(best.changes) >= {3, 4, 5}
    assert best.missed <= 1e-4
    frozen, skipped = found.tops(best)
    assert {each.kind for each in frozen.changes.values()} >= {"freeze"}
    assert {layer for layer, each in skipped.changes.items() if each.kind == "skip"} == {3, 4, 5}


def test_the_only_layer_that_retrieves_is_kept(tiny_models, tmp_path):
    made = trials(planted(tiny_models("Llama"), [2]), tmp_path)
    found = search(made)
    assert found.scan.order[-1] == 2
    assert found.scan.most(2) > 0.02 > 1e-4 > max(found.scan.most(layer) for layer in LAYERS if layer != 2)
    assert found.scan.fetching == [2]
    assert set(found.most(0.01, WINDOW, found.scan.order, {}).changes) == set(LAYERS) - {2}
    for top in found.tops(found.most(0.01, WINDOW, found.scan.order, {})):
        assert min(layer for layer, each in top.changes.items() if each.kind != "window") > 2


def test_layers_that_may_not_be_changed_are_not(tiny_models, tmp_path):
    made = trials(planted(tiny_models("Llama"), [0]), tmp_path)
    found = search(made, layers=[1, 3, 5])
    assert set(found.most(0.01, WINDOW, found.scan.order, {}).changes) == {1, 3, 5}
    (front,) = {tuple(sorted(each.changes)) for each in found.front()}
    assert front == (1, 3, 5)


def test_as_many_layers_as_one_by_one_would_find(tiny_models, tmp_path):
    """By halves, where each layer more is missed more."""
    made = trials(planted(tiny_models("Llama"), range(6)), tmp_path)
    found = search(made)
    costs = [made.missed(dict.fromkeys(found.scan.order[:count], WINDOW)) for count in range(NUM_LAYERS + 1)]
    slack = sorted(costs)[NUM_LAYERS // 2]
    best = found.most(slack, WINDOW, found.scan.order, {})
    assert best.missed <= slack
    assert best.missed == pytest.approx(costs[len(best.changes)])
    assert len(best.changes) == NUM_LAYERS or costs[len(best.changes) + 1] > slack


def test_as_many_layers_as_save_more_than_fewer_do(tiny_models, tmp_path):
    """Where a number of layers is padded to the next that three divide, so many are not tried."""
    made = trials(planted(tiny_models("Llama"), [2]), tmp_path)
    found = search(made)
    found.saved = lambda changes: len(changes) // 3 * 3
    best = found.most(0.01, WINDOW, found.scan.order, {})
    assert len(best.changes) == 3
    below = {found.scan.order[0]: WINDOW}
    assert found.most(0.01, LayerPlan("window", 16), found.scan.order[1:5], below).changes.keys() == set(
        found.scan.order[:3]
    )
    found.saved = lambda changes: -len(changes)
    assert found.most(0.01, WINDOW, found.scan.order, {}).changes == {}


def test_what_is_missed_is_the_mean_or_half_of_the_worst(tiny_models, tmp_path):
    made = trials(planted(tiny_models("Llama"), range(6)), tmp_path)
    changes = {2: WINDOW, 4: LINEAR}
    more = [max(made.lost(task, changes), 0) for task in made.tasks]
    assert made.missed(changes) == pytest.approx(max(sum(more) / 2, max(more) / 2))
    assert max(more) > 0.01
    assert made.missed(changes, enough=0) <= made.missed(changes)


def test_what_the_model_never_knew_is_not_missed(tiny_models, tmp_path):
    """Items that the unchanged model gets wrong do not count, unless it gets all wrong."""
    made = trials(planted(tiny_models("Llama"), range(6)), tmp_path)
    known = made.tasks[0]
    wrong = tuple(replace(each, answer=tuple(token ^ 1 for token in each.answer)) for each in known.items)
    mixed = replace(known, name="mixed", items=(*wrong, *known.items))
    unknown = replace(known, name="wrong", items=wrong)
    made.tasks = [known, mixed, unknown]
    changes = {0: WINDOW}
    assert made.scores(mixed, {}).scores == [0.0] * 3 + [1.0] * 3
    assert made.lost(mixed, changes) == pytest.approx(made.lost(known, changes), abs=1e-4)
    more = [a - b for a, b in zip(made.scores(unknown, changes).nll, made.scores(unknown, {}).nll, strict=True)]
    assert made.lost(unknown, changes) == pytest.approx(sum(more) / 3)
    assert abs(made.lost(known, changes) - sum(more) / 3) > 1e-3


def test_no_trial_is_made_twice(tiny_models, tmp_path):
    made = trials(planted(tiny_models("Llama"), [0]), tmp_path)
    told = []
    made.tell = lambda task, tokens: told.append(task)
    first = made.scores(made.tasks[0], {0: WINDOW})
    assert made.scores(made.tasks[0], {0: WINDOW}) == first
    assert told == ["one"]
    with pytest.raises(UsageError, match="another run writes there"):
        Journal(made.journal.file, {}, KEYS)
    made.journal.close()
    again = Trials(made.model, made.tasks, "search", Journal(made.journal.file, {}, KEYS), 6, made.fitted, made.tell)
    assert again.scores(made.tasks[0], {0: WINDOW}) == first
    assert told == ["one"]
    assert again.scores(made.tasks[0], {0: LayerPlan("window", 8, 2)}) != first
    assert told == ["one", "one"]


def test_layers_are_ordered_by_the_task_that_misses_them_most():
    scanned = Scan(8, {"a": {0: 0.0, 1: 0.5, 2: 0.01}, "b": {0: 0.1, 1: 0.0, 2: 0.015}})
    assert scanned.order == [2, 0, 1]
    assert scanned.fetching == [0, 1]


def test_layers_fitted_alone_are_fitted_as_if_no_other_were_changed(tiny_models):
    source = Checkpoint.open(str(tiny_models("Llama")), weights=True)
    model = OfflineModel(source)
    made = fit_alone(model, [model.enter(each) for each in PASSAGES.split(2)], [1, 4])
    for layer in (1, 4):
        alone, _ = fit_passages(load(source.folder), source.family, source.planned({layer: LINEAR}), PASSAGES)
        assert alone
        for name, tensor in alone.items():
            torch.testing.assert_close(made[name].float(), tensor.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("head", [0, 1])
def test_a_window_on_one_kv_head_leaves_the_others_alone(head):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    module.is_causal = True
    whole, _ = stock_attention(module, query, key, value, None, scaling=0.3)
    near = window_attention(query, key, value, window=8, sink=4, scaling=0.3)
    mixed, _ = WindowedHead(8, 4, head)(module, query, key, value, None, scaling=0.3)
    ours, others = [2 * head, 2 * head + 1], [2 - 2 * head, 3 - 2 * head]
    torch.testing.assert_close(mixed[:, :, ours], near[:, :, ours])
    torch.testing.assert_close(mixed[:, :, others], whole[:, :, others])
    assert not torch.allclose(near, whole)


def test_the_heads_of_a_layer_that_fetches_are_told_apart(tiny_models, tmp_path):
    made = trials(planted(tiny_models("Llama"), [2]), tmp_path)
    scanned = scan(made, 8, LAYERS, kv_heads=2)
    assert list(scanned.heads) == [2]
    assert len(scanned.heads[2]) == 2
    model = made.model()
    model.attention(2).o_proj.weight.data[:, 64:] = 0  # what the query heads of the second KV head found
    again = scan(trials(model, tmp_path / "again"), 8, LAYERS, kv_heads=2)
    assert again.heads[2][1] == pytest.approx(0, abs=1e-4)
    assert again.heads[2][0] > 0.02
