"""The model run layer by layer, against the reference's whole forward passes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import CONFIGS, NUM_LAYERS, prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline.attentions import QUERIES_AT_ONCE, window_attention
from vllm_ext.offline.batch import Batch
from vllm_ext.offline.model import OfflineModel, PlannedModel, generate
from vllm_ext.tasks.items import Item

WINDOW = 8
PLANS = {
    "none": {},
    "every kind": {
        1: LayerPlan("window", 16),
        2: LayerPlan("skip"),
        3: LayerPlan("freeze"),
        4: LayerPlan("freeze"),
        5: LayerPlan("skip", consolidation="linear", rank=8),
    },
    "frozen windows": dict.fromkeys(range(2, NUM_LAYERS), LayerPlan("freeze", 16)),
    "all but the first": dict.fromkeys(range(1, NUM_LAYERS), LayerPlan("skip", consolidation="bias")),
}
ITEMS = [
    Item(tuple(prompt), tuple(range(3, 3 + more)))
    for prompt, more in zip(prompts((40, 1, 17)), (3, 30, 1), strict=True)
]


def open_planned(stock, folder, changes):
    """The model, and its fitted tensors."""
    written = write_random(stock, folder / "planned", changes)
    reference = Reference(written, changes)
    return OfflineModel(Checkpoint.open(str(stock), weights=True)), reference


@pytest.mark.parametrize("name", PLANS)
def test_a_batch_has_the_references_logits(tiny_models, tmp_path, name):
    model, reference = open_planned(tiny_models("Llama"), tmp_path, PLANS[name])
    batch = Batch.of(ITEMS, model.device)
    entered = model.enter(batch.tokens)
    changed = PlannedModel(model, PLANS[name], reference.fitted, batch.prompt_rows)
    first = min(PLANS[name], default=NUM_LAYERS)
    left = changed.run(entered, entered.state(model, first), first)
    found = torch.cat(list(model.logits(left[batch.answering_rows]))).log_softmax(-1)
    wanted = []
    for item in ITEMS:
        reference.prompt_length = len(item.prompt)
        with torch.no_grad():
            wanted.append(reference.logprobs([*item.prompt, *item.answer])[len(item.prompt) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_the_references_logits(tiny_models, tmp_path, family):
    kinds = FAMILIES[f"{family}ForCausalLM"].kinds
    changes = {2: LayerPlan("skip", consolidation="linear"), 4: LayerPlan("freeze"), 5: LayerPlan("freeze")}
    changes = {layer: plan for layer, plan in changes.items() if plan.kind in kinds}
    model, reference = open_planned(tiny_models(family), tmp_path, changes)
    batch = Batch.of([ITEMS[0]], model.device)
    entered = model.enter(batch.tokens)
    left = PlannedModel(model, changes, reference.fitted, batch.prompt_rows).run(entered, entered.state(model, 0), 0)
    found = torch.cat(list(model.logits(left[batch.answering_rows]))).log_softmax(-1)
    reference.prompt_length = len(ITEMS[0].prompt)
    with torch.no_grad():
        wanted = reference.logprobs([*ITEMS[0].prompt, *ITEMS[0].answer])[len(ITEMS[0].prompt) - 1 : -1]
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_generates_what_the_reference_answers(tiny_models, tmp_path, family, name):
    changes = {layer: plan for layer, plan in PLANS[name].items() if family == "Llama" or plan.window is None}
    model, reference = open_planned(tiny_models(family), tmp_path, changes)
    asked = prompts((40, 40))
    tokens = torch.tensor(asked)
    changed = PlannedModel(model, changes, reference.fitted, torch.ones_like(tokens, dtype=torch.bool))
    assert generate(changed, tokens, 8).tolist() == [reference.answer(prompt, 8).tokens for prompt in asked]


@pytest.mark.parametrize("earlier", [0, 1, 7, 8, 9, QUERIES_AT_ONCE])
def test_last_queries_attend_as_among_all(earlier):
    generator = torch.Generator().manual_seed(earlier)
    query, key, value = (torch.randn(2, heads, QUERIES_AT_ONCE + 9, 16, generator=generator) for heads in (4, 2, 2))
    settings = {"window": 8, "sink": 4, "scaling": 0.3}
    whole = window_attention(query, key, value, **settings)
    torch.testing.assert_close(window_attention(query[:, :, earlier:], key, value, **settings), whole[:, earlier:])


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 4, 3 * QUERIES_AT_ONCE + 1])
@pytest.mark.parametrize("sink", [1, 4, 16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_window_attention_is_what_a_loop_makes(length, sink, softcap):
    """Each token sees the first ones and the last ones, those that are both once."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    attended = window_attention(query, key, value, window=WINDOW, sink=sink, scaling=0.3, softcap=softcap)

    expected = torch.empty(length, 4, 16)
    for position in range(length):
        seen = [other for other in range(position + 1) if other < sink or position - other < WINDOW]
        for head in range(4):
            logits = torch.stack([query[0, head, position] @ key[0, head // 2, other] * 0.3 for other in seen])
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            expected[position, head] = logits.softmax(0) @ torch.stack([value[0, head // 2, other] for other in seen])
    torch.testing.assert_close(attended[0], expected)
    last = window_attention(query[:, :, -3:], key, value, window=WINDOW, sink=sink, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(last[0], expected[-3:])


def test_a_model_in_bfloat16_keeps_its_rotary_frequencies(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_ext.offline.model.slow_on_cpu", lambda dtype: False)
    AutoModelForCausalLM.from_pretrained(tiny_models("Llama"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = OfflineModel(Checkpoint.open(str(tmp_path), weights=True))
    assert model.model.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).model.rotary_emb.inv_freq
    assert torch.equal(model.decoder.rotary_emb.inv_freq, expected)
