"""What vLLM calls back: each name resolves as vLLM resolves it, and each hook is what each model runner asks for.

`test_model_runner_v2.py` has engines of the one, most other files of the other.
"""

import inspect
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample import logits_processor as v1
from vllm.v1.worker.gpu.sample import logits_processor as v2

from model_executors import names
from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES
from model_executors.hooks import scheduler
from model_executors.hooks.frozen_prompts import FrozenPrompts
from model_executors.hooks.verify import AttentionPlanConfig
from model_executors.layers.freeze import in_prompt
from tests.test_verify import configure

FREEZE = {4: LayerPlan("freeze"), 5: LayerPlan("freeze")}


def v1_classes(*fqcns):
    return v1._load_logitsprocs_by_fqcns(fqcns)


def v2_validator(*fqcns):
    return v2.build_custom_logits_processors_params_validator(fqcns)


def test_every_name_is_in_the_table_and_resolves():
    table = {name: value for name, value in vars(names).items() if name.isupper()}
    assert {family.module for family in FAMILIES.values()} == {table.pop("DECODER"), table.pop("TRANSFORMERS_DECODER")}
    assert resolve_obj_by_qualname(table.pop("SCHEDULER")) is scheduler.planned_scheduler
    for value in table.values():
        module, _, attribute = value.partition(":")
        assert v1_classes(value) == [getattr(import_module(module), attribute)]


def test_the_refusal_of_prompt_logprobs_is_a_logits_processor_of_both_runners():
    assert v1_classes(names.FROZEN_PROMPTS) == [FrozenPrompts]
    assert issubclass(FrozenPrompts, v2.LogitsProcessor)
    assert not FrozenPrompts.__abstractmethods__


@pytest.mark.parametrize(
    "asked", [{"prompt_logprobs": 0}, {"prompt_logprob_token_ids": [1]}], ids=lambda each: min(each)
)
def test_both_runners_refuse_at_admission(asked):
    (name,), value = asked, next(iter(asked.values()))
    sampling = SamplingParams()
    setattr(sampling, name, value)
    for validate in (
        v2_validator(names.FROZEN_PROMPTS),
        lambda sampling: v1.validate_logits_processors_parameters([names.FROZEN_PROMPTS], sampling),
    ):
        validate(SamplingParams(logprobs=3))
        with pytest.raises(VLLMValidationError, match=f"{name} .*cannot be answered by this model"):
            validate(sampling)


@pytest.mark.parametrize("interface", [v1.LogitsProcessor, v2.LogitsProcessor])
def test_it_takes_what_each_runner_calls_it_with(interface):
    for name, theirs in inspect.getmembers(interface, inspect.isfunction):
        ours = inspect.signature(getattr(FrozenPrompts, name))
        ours.bind(*inspect.signature(theirs).parameters)  # a positional argument for each of theirs


def test_it_says_that_it_changes_no_logits():
    """So that V2 does not copy a step's logits for it."""
    hook = FrozenPrompts(None, torch.device("cpu"), False)
    assert hook.add_request(0, SamplingParams()) is False
    assert hook.is_argmax_invariant()
    assert hook.apply("logits") == hook.apply("logits", "context") == "logits"


@pytest.mark.parametrize("v2_runner", [False, True])
@pytest.mark.parametrize("speculation", [None, {"method": "ngram", "num_speculative_tokens": 2}])
def test_each_runner_gets_what_it_knows(tiny_models, monkeypatch, v2_runner, speculation):
    """V1 has no custom logits processors beside speculation."""
    config = configure(tiny_models("Llama"), FREEZE, speculative_config=speculation)
    config.model_config.logits_processors, config.cache_config.kv_sharing_fast_prefill = None, False
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", v2_runner)
    AttentionPlanConfig.verify_and_update_config(config)
    refuses = names.FROZEN_PROMPTS in (config.model_config.logits_processors or [])
    assert refuses is (v2_runner or speculation is None)
    assert config.cache_config.kv_sharing_fast_prefill is not refuses


@pytest.mark.parametrize("mixed", [scheduler._PlannedScheduler, scheduler._PlannedAsyncScheduler])
def test_the_scheduler_is_vllms_with_another_last_word(mixed):
    assert issubclass(mixed, SchedulerInterface)
    (stock,) = (base for base in mixed.__bases__ if issubclass(base, Scheduler))
    assert stock in (Scheduler, AsyncScheduler)
    ours, theirs = (inspect.signature(each._reserve_prefill_lookahead) for each in (mixed, stock))
    assert list(ours.parameters) == list(theirs.parameters)
    # It is asked for its last word in every step, of running requests and of waiting ones.
    assert inspect.getsource(Scheduler.schedule).count("self._reserve_prefill_lookahead(") == 2


def test_the_configuration_is_checked_by_vllms_hook():
    assert issubclass(AttentionPlanConfig, VerifyAndUpdateConfig)
    ours, theirs = (
        inspect.signature(each.verify_and_update_config) for each in (AttentionPlanConfig, VerifyAndUpdateConfig)
    )
    assert list(ours.parameters) == list(theirs.parameters)


def test_what_v1_says_of_prompts_is_taken(tiny_models):
    config = configure(tiny_models("Llama"), FREEZE)
    FrozenPrompts(config, torch.device("cpu"), False)
    prefilling = torch.tensor([True, False])
    assert in_prompt(SimpleNamespace(is_prefilling=prefilling), config) is prefilling


@pytest.mark.parametrize("changes", [FREEZE, {5: LayerPlan("skip")}, {2: LayerPlan("window", 8)}], ids=str)
def test_nothing_of_ours_keeps_vllm_from_its_newer_runner(tiny_models, changes):
    config = configure(tiny_models("Llama"), changes)
    assert config._get_v2_model_runner_unsupported_features() == []
    for name in config.model_config.logits_processors or []:
        v2_validator(name)
