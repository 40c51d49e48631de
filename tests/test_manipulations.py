"""Each manipulation at each layer, against one text at a time through plain transformers with a hook."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_executors.attention_plan import LayerPlan
from tests.reference import Reference
from tests.tiny import NUM_LAYERS, prompts
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.offline.batch import Batch
from vllm_ext.offline.evaluator import Evaluator
from vllm_ext.offline.model import OfflineModel, PlannedModel, generate
from vllm_ext.probe import manipulations
from vllm_ext.probe.injection import Pairs
from vllm_ext.probe.manipulations import NAMES, injected, manipulation, randomised, shuffled
from vllm_ext.tasks.items import Item, Task

ITEMS = tuple(
    Item(tuple(prompt), tuple(range(3, 3 + more))) for prompt, more in zip(prompts((40, 2, 17)), (3, 9, 1), strict=True)
)
SEED = 5


@pytest.fixture(scope="module")
def model(tiny_models):
    return OfflineModel(Checkpoint.open(str(tiny_models("Llama")), weights=True))


def change(hidden, name, previous):
    """One text's states `[1, length, hidden_size]` with those of the `previous` first tokens changed, one by one."""
    changed = hidden.clone()
    noise = torch.randn(49, hidden.shape[2], generator=torch.Generator().manual_seed(SEED))
    order = torch.randperm(hidden.shape[2], generator=torch.Generator().manual_seed(SEED))
    for place in range(previous):
        state = hidden[0, place]
        if name == "random":
            changed[0, place] = noise[place] * state.norm() / noise[place].norm()
        else:
            changed[0, place] = torch.stack([state[number] for number in order.tolist()])
    return changed


def slow_nll(folder, name, layer):
    """Nats a token of each item's answer."""
    found = []
    for item in ITEMS:
        previous = len(item.prompt) - 1
        if name in ("freeze", "skip", "drop", "window"):
            layers = [layer] if name in ("drop", "window") else range(layer, NUM_LAYERS)
            plan = LayerPlan("window", 8) if name == "window" else LayerPlan("freeze" if name == "freeze" else "skip")
            reference = Reference(folder, dict.fromkeys(layers, plan))
            reference.prompt_length = previous
            run = reference.model
        else:
            run = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            run.model.layers[layer].register_forward_pre_hook(
                lambda module, args, previous=previous: (change(args[0], name, previous), *args[1:])
            )
        with torch.no_grad():
            logprobs = run(torch.tensor([item.prompt + item.answer]), use_cache=False).logits[0].log_softmax(-1)
        told = [-logprobs[len(item.prompt) - 1 + at, token].item() for at, token in enumerate(item.answer)]
        found.append(sum(told) / len(told))
    return found


@pytest.mark.parametrize("layer", [0, 3, NUM_LAYERS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_slow_one(tiny_models, model, name, layer, monkeypatch):
    monkeypatch.setattr(manipulations, "WINDOW", 8)  # the texts are short
    made = Evaluator(model, Task("tiny", "answers", ITEMS)).manipulated(manipulation(name, layer, NUM_LAYERS, SEED))
    assert made.nll == pytest.approx(slow_nll(tiny_models("Llama"), name, layer), abs=2e-3)


def test_random_states_keep_their_norms():
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)) * 7
    made = randomised(states, 0)
    torch.testing.assert_close(made.norm(dim=-1), states.norm(dim=-1))
    assert torch.nn.functional.cosine_similarity(made, states, dim=-1).abs().max() < 0.8


def test_shuffled_states_keep_their_numbers():
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    made = shuffled(states, 0)
    assert not made.equal(states)
    assert made.sort(-1).values.equal(states.sort(-1).values)


@pytest.mark.parametrize("layer", [0, 3, NUM_LAYERS - 1])
def test_injects_the_state_of_another_prompts_token(tiny_models, model, layer):
    """In batches of pairs, and one by one with hooks."""
    pairs = Pairs.__new__(Pairs)
    pairs.model, pairs.count, pairs.positions = model, 2, [[3, 3], [3, 4]]
    base = prompts((9,))[0]
    own = [(*base[:3], 50, *base[4:]), (*base[:3], 60, 61, *base[5:])]
    other = [(*base[:3], 70, *base[4:]), (*base[:3], 80, 81, *base[5:])]
    answers = [(7, 8), (9,)]
    pairs.own = Batch.of([Item(prompt, answer) for prompt, answer in zip(own, answers, strict=True)], model.device)
    pairs.others = pairs.own
    donors = Batch.of([Item(prompt, ()) for prompt in other], model.device)
    pairs.entered = [model.enter(batch.tokens) for batch in (pairs.own, pairs.others, donors)]
    given = pairs.entered[2].state(model, layer)[torch.arange(2)[:, None], torch.tensor(pairs.positions)]
    states = injected(pairs.entered[0].state(model, layer), pairs.positions, given)
    left = PlannedModel(model).run(pairs.entered[0], states, layer)
    ours = torch.cat(list(model.logits(left[pairs.own.answering_rows]))).split([2, 1])

    plain = AutoModelForCausalLM.from_pretrained(tiny_models("Llama"), dtype=torch.float32)
    for number, found in enumerate(ours):
        kept: list[torch.Tensor] = []
        hook = plain.model.layers[layer].register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            plain(torch.tensor([other[number]]), use_cache=False)
        hook.remove()

        def exchange(module, args, number=number, kept=kept):
            for place in set(pairs.positions[number]):
                args[0][0, place] = kept[0][0, place]

        hook = plain.model.layers[layer].register_forward_pre_hook(exchange)
        with torch.no_grad():
            logits = plain(torch.tensor([own[number] + answers[number]]), use_cache=False).logits[0]
        hook.remove()
        torch.testing.assert_close(found, logits[len(base) - 1 : -1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["random", "freeze", "skip"])
def test_writes_as_if_each_pass_were_whole(tiny_models, model, name):
    """With its cache, generation sees what a whole pass over prompt and answer so far sees."""
    asked = torch.tensor(prompts((12, 12)))
    done = manipulation(name, 2, NUM_LAYERS, SEED)
    rows = torch.zeros_like(asked, dtype=torch.bool)
    rows[:, :-1] = True
    edit = done.edit and (lambda states: done.edit(states, rows))
    written = generate(PlannedModel(model, done.plans, {}, rows), asked, 5, done.layer, edit)
    items = tuple(
        Item(tuple(prompt), tuple(answer)) for prompt, answer in zip(asked.tolist(), written.tolist(), strict=True)
    )
    assert Evaluator(model, Task("written", "answers", items)).manipulated(done).scores == [1.0, 1.0]
