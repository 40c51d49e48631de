"""What a plan costs where it changes nothing: torch's operations in an engine's steps, counted by name."""

from collections import Counter

from torch.profiler import ProfilerActivity, profile

from tests.engines import engine, outputs, skipping
from tests.tiny import prompts

ATTENTION = "_C::cpu_attention_with_kv_cache"


def operations(folder, changes):
    """Of all prompts in one batch and two further tokens each."""
    with engine(folder, changes) as llm:
        outputs(llm, prompts(), 3, prompt_logprobs=False)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            outputs(llm, prompts(), 3, prompt_logprobs=False)
    return Counter(event.name for event in seen.events())


def test_a_plan_of_all_full_runs_the_operations_of_stock(tiny_models):
    """Noise hides a hundredth of the time; that no operation is added leaves nothing that could take it."""
    stock = operations(tiny_models("Llama"), None)
    assert operations(tiny_models("Llama"), {}) == stock
    assert operations(tiny_models("Llama"), skipping([2]))[ATTENTION] == stock[ATTENTION] * 5 / 6 > 0
