"""Combinations that would be served wrongly are refused while vLLM is configured, before any weight is read."""

import pytest
from vllm import EngineArgs
from vllm.config import DeviceConfig

from model_executors.attention_plan import LayerPlan
from model_executors.heads.head_plan import HeadPlan
from model_executors.hooks.kv_cache import in_flight_tokens
from model_executors.hooks.verify import AttentionPlanConfig
from tests.engines import engine, skipping
from vllm_ext.checkpoint import Checkpoint

FREEZE = LayerPlan("freeze")


def configure(folder, changes, **settings):
    overrides = overriding(folder, changes) | settings.pop("hf_overrides", {})
    return EngineArgs(
        str(folder), dtype="float32", max_model_len=256, skip_tokenizer_init=True, hf_overrides=overrides, **settings
    ).create_engine_config()


def overriding(folder, changes):
    """Fitted tensors are not asked for yet, so that any plan can be laid over a stock checkpoint."""
    checkpoint = Checkpoint.open(str(folder), weights=False)
    plan = checkpoint.planned(changes)
    return {"architectures": [checkpoint.family.planned_architecture], "vllm_ext": plan.to_config()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runner": "pooling"}, "--runner pooling: layers 4-5 do not run for every position"),
        ({"cpu_offload_gb": 1}, "weight offloading does not work with an attention plan"),
        ({"hf_overrides": {"vllm_ext": {"attention_plan": ["full"] * 5}}}, "for 5 layers but the model has 6"),
        ({"hf_overrides": {"vllm_ext": {"attention_plan": ["skip"] * 6}}}, "skips all 6 layers"),
        ({"hf_overrides": {"vllm_ext": {}}}, "attention_plan is None"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses(tiny_models, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(tiny_models("Llama"), skipping([4, 5]), **settings)


def test_refuses_speculation_that_reads_hidden_states(tiny_models):
    speculation = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    with pytest.raises(ValueError, match="speculative method 'extract_hidden_states': layers 4-5 do not run"):
        configure(tiny_models("Llama"), skipping([4, 5]), speculative_config=speculation)


def test_refuses_a_pipeline_rank_without_attention(tiny_models):
    with pytest.raises(ValueError, match="rank 1 has layers 3-5, all of them skipped"):
        configure(tiny_models("Llama"), skipping([3, 4, 5]), pipeline_parallel_size=2)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {2: FREEZE, 3: FREEZE, 4: FREEZE, 5: FREEZE},
            {"pipeline_parallel_size": 2},
            "must be on the last rank",
        ),
        ({4: FREEZE, 5: FREEZE}, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "a scheduler of their"),
        ({5: LayerPlan("skip", consolidation="linear", rank=7)}, {"tensor_parallel_size": 2}, "rank 7 cannot be split"),
    ],
    ids=["pipeline", "scheduler", "rank"],
)
def test_refuses_what_a_kind_cannot_do(tiny_models, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(tiny_models("Llama"), changes, **settings)


def test_refuses_a_window_where_the_model_has_one(tiny_models):
    with pytest.raises(ValueError, match="window 8 on layer 2: the model gives that layer a sliding window of 16"):
        configure(tiny_models("Gemma2"), {2: LayerPlan("window", 8)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config .*connectors do not know windows with a sink; drop it, or",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size.*: connectors do not know windows with a sink"),
        ({"disable_hybrid_kv_cache_manager": True}, "without it windows save nothing; drop it, or serve without"),
    ],
    ids=["connector", "offloading", "hybrid manager"],
)
def test_refuses_windows_without_the_hybrid_manager(tiny_models, settings, message):
    with pytest.raises(ValueError, match=message):
        configure(tiny_models("Llama"), {2: LayerPlan("window", 8)}, **settings)


def test_refuses_windows_that_vllm_would_take_for_the_models_own(tiny_models):
    """Where no layer is left in full, layers of one window share their blocks, whether these have a sink or not."""
    windows = dict.fromkeys((1, 3, 5), LayerPlan("window", 16))
    with pytest.raises(ValueError, match="window 16 is the model's own on the other layers: take another size, or le"):
        configure(tiny_models("Gemma2"), windows)
    assert configure(tiny_models("Gemma2"), dict.fromkeys((1, 3, 5), LayerPlan("window", 17)))


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"max_num_batched_tokens": 8192}, 256),  # the model's length
        ({"max_num_batched_tokens": 128}, 128),
        ({"max_num_batched_tokens": 128, "long_prefill_token_threshold": 32}, 32),
    ],
)
def test_windows_bound_what_is_computed_of_a_request_at_once(tiny_models, settings, most):
    config = configure(tiny_models("Llama"), {2: LayerPlan("window", 8)}, **settings)
    assert config.scheduler_config.long_prefill_token_threshold == most
    assert in_flight_tokens(config) == config.max_concurrent_batches * most


def test_a_scheduler_of_the_users_own_bounds_nothing(tiny_models):
    stock = {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}
    config = configure(tiny_models("Llama"), {2: LayerPlan("window", 8)}, **stock, max_num_batched_tokens=512)
    assert in_flight_tokens(config) == config.max_concurrent_batches * 512


def test_allows_what_needs_all_positions_where_there_is_no_tail(tiny_models):
    assert configure(tiny_models("Llama"), skipping([1, 3]), runner="pooling")


def test_the_engine_refuses_too(tiny_models):
    """Whatever way vLLM is started, the same check is on its road."""
    with (
        pytest.raises(ValueError, match="weight offloading"),
        engine(tiny_models("Llama"), skipping([5]), cpu_offload_gb=1),
    ):
        pass


WINDOW = LayerPlan("window", 8)


def on_cuda(folder, changes, head=None):
    """A configuration whose device is said to be a GPU, checked as vLLM has it checked at start."""
    config = configure(folder, changes)
    config.device_config = DeviceConfig("cuda")
    if head is not None:
        config.model_config.hf_config.vllm_ext["head"] = head.to_config()
    AttentionPlanConfig.verify_and_update_config(config)
    return config


@pytest.mark.parametrize(("kind", "changes"), [("freeze", {4: FREEZE, 5: FREEZE}), ("window", {2: WINDOW})])
def test_refuses_on_a_gpu_what_was_never_seen_to_answer_right_there(tiny_models, monkeypatch, kind, changes):
    monkeypatch.delenv("VLLM_EXT_UNPROVED", raising=False)
    line = (
        f"layer {min(changes)} is {kind}: such layers were never seen to answer right on cuda; take another kind, or "
    )
    with pytest.raises(ValueError, match=line + "set VLLM_EXT_UNPROVED=1 to find out whether it does"):
        on_cuda(tiny_models("Llama"), changes)


@pytest.mark.parametrize("changes", [{4: FREEZE, 5: FREEZE}, {2: WINDOW}])
def test_lets_them_through_for_those_who_want_to_find_out(tiny_models, monkeypatch, changes):
    monkeypatch.setenv("VLLM_EXT_UNPROVED", "1")
    assert on_cuda(tiny_models("Llama"), changes)


def test_serves_on_a_gpu_what_was_seen_there(tiny_models, monkeypatch):
    monkeypatch.delenv("VLLM_EXT_UNPROVED", raising=False)
    assert on_cuda(tiny_models("Llama"), skipping([4, 5]))


def test_refuses_heads_on_a_gpu_that_were_never_seen_to_answer_right_there(tiny_models, monkeypatch):
    monkeypatch.delenv("VLLM_EXT_UNPROVED", raising=False)
    with pytest.raises(
        ValueError, match="--head rescored: it was never seen to answer right on cuda; take another one"
    ):
        on_cuda(tiny_models("Llama"), {}, HeadPlan("rescored", slots=(2, 2)))


def test_refuses_everything_on_a_device_that_nothing_was_seen_on(tiny_models, monkeypatch):
    monkeypatch.delenv("VLLM_EXT_UNPROVED", raising=False)
    config = configure(tiny_models("Llama"), {})
    config.device_config.device_type = "xpu"
    with pytest.raises(ValueError, match="layer 0 is full: such layers were never seen to answer right on xpu"):
        AttentionPlanConfig.verify_and_update_config(config)
