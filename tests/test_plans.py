"""Plans drawn at random, kinds mixed freely, against the reference."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_executors.attention_plan import AttentionPlan, LayerPlan
from tests.answers import assert_same
from tests.engines import answers, engine
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import NUM_LAYERS, prompts

SKIP = st.builds(
    LayerPlan,
    kind=st.just("skip"),
    consolidation=st.sampled_from(["none", "bias", "linear"]),
) | st.builds(LayerPlan, kind=st.just("skip"), consolidation=st.just("linear"), rank=st.sampled_from([1, 8, 128]))
WINDOW = st.sampled_from([1, 2, 16, 17, 127, 128, 129, 500])
LOWER = st.just(LayerPlan()) | SKIP | st.builds(LayerPlan, kind=st.just("window"), window=WINDOW)
UPPER = SKIP | st.builds(LayerPlan, kind=st.just("freeze"), window=st.none() | WINDOW)


@st.composite
def plans(draw: st.DrawFn) -> dict[int, LayerPlan]:
    """Any plan over the tiny model that is allowed: frozen layers only above layers that see the prompt."""
    lower = draw(st.integers(1, NUM_LAYERS))
    layers = [draw(LOWER) for _ in range(lower)] + [draw(UPPER) for _ in range(NUM_LAYERS - lower)]
    if all(plan.kind == "skip" for plan in layers):
        layers[0] = LayerPlan()
    return dict(enumerate(layers))


@given(plan=plans())
def test_any_plan_survives_the_configuration(plan):
    written = AttentionPlan.of(NUM_LAYERS, plan)
    section = json.loads(json.dumps(written.to_config()))
    assert AttentionPlan.from_config(section, NUM_LAYERS) == written


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), family=st.sampled_from(["Llama", "Qwen3"]))
def test_any_plan_equals_the_reference(tiny_models, tmp_path_factory, plan, family):
    folder = write_random(tiny_models(family), tmp_path_factory.mktemp("plan") / "planned", plan)
    reference = Reference(folder, plan)
    frozen = any(layer.kind == "freeze" for layer in plan.values())
    with engine(folder) as llm:
        ours = answers(llm, prompts(), 4, prompt_logprobs=not frozen)
    assert_same(ours, [reference.answer(prompt, 4) for prompt in prompts()], prompt_logprobs=not frozen)
