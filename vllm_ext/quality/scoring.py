"""What `vllm-ext quality` runs inside an engine's process: texts scored, and prompts answered, by the real engine.

Prompts are scored through `prompt_logprobs`. Continuations are scored too, token by token as if the engine had chosen
them itself: a logits processor forces the text's next token, while vLLM reports the log-probabilities from before it.
So plans that treat prompt tokens and generated ones differently are measured the way they are used.
"""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from vllm_ext.engine import engine_args
from vllm_ext.quality.work import MAX_TOKENS, Asked, Replies
from vllm_ext.reports.figures import Scored
from vllm_ext.tasks.items import Item

FORCED = "vllm_ext_forced_tokens"
GROUP_TOKENS = 16_384
"""Prompt tokens handed to the engine at once, so that progress is seen."""


class ForceTokens(AdapterLogitsProcessor, LogitsProcessorV2):
    """Makes a request's answer the tokens it names in `extra_args`, under either of vLLM's model runners."""

    def __init__(self, vllm_config: VllmConfig, *state: Any) -> None:
        """`state` is V2's of all requests, or V1's device and whether memory is pinned."""
        if len(state) == 1:
            self.prompt_len = state[0].prompt_len
            self.forced: dict[int, list[int]] = {}
        else:
            super().__init__(vllm_config, *state)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: whether it changes the logits of the request that is the `req_idx`th of V2's table from now on."""
        self.forced.pop(req_idx, None)
        forced = (sampling_params.extra_args or {}).get(FORCED)
        if forced is not None:
            self.forced[req_idx] = forced
        return forced is not None

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """`[num_reqs, vocab_size]`; with V2's context of the step, else V1's way."""
        if not context:
            return super().apply(logits)
        (step,) = context
        for row, (request, tokens) in enumerate(zip(step.idx_mapping_np, step.seq_lens_upper_bound_np, strict=False)):
            forced, answered = self.forced.get(int(request)), int(tokens - self.prompt_len.np[request])
            if forced is not None and answered >= 0:  # else a prompt is still being prefilled
                logits[row].fill_(-torch.inf)
                logits[row, forced[answered]] = 0
        return logits

    def is_argmax_invariant(self) -> bool:
        """It decides what is chosen."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        """Of requests that name such tokens."""
        forced = (params.extra_args or {}).get(FORCED)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            """`logits` is a row, `[vocab_size]`."""
            token = forced[len(output_ids)]
            logits.fill_(-torch.inf)
            logits[token] = 0
            return logits

        return force


def reply(connection: Connection, asked: Asked) -> None:
    """Start the engine, do all the work and end it; sends numbers of tokens done, and at last the replies."""
    args, work = engine_args(asked.served, asked.vllm_args), asked.work
    args.logits_processors = [*(args.logits_processors or []), f"{ForceTokens.__module__}:{ForceTokens.__name__}"]
    llm, done = LLM.from_engine_args(args), connection.send
    replies = Replies()
    for task in work.retrieved:
        replies.retrieved[task.name] = score_answers(llm, task.items, done)
    for length, passages in work.passages.items():
        if asked.with_prompts:
            replies.prompts[length] = score_prompts(llm, passages, done)
        cut = length - work.answer_tokens(length)
        ends = [Item(tuple(passage[:cut]), tuple(passage[cut:])) for passage in passages]
        replies.answers[length] = score_answers(llm, ends, done)
    for name, prompts in work.prompts.items():
        replies.generated[name] = generate(llm, prompts, MAX_TOKENS[name], done)
    llm.llm_engine.engine_core.shutdown()
    connection.send(replies)


def score_prompts(llm: LLM, passages: list[list[int]], done: Callable[[int], None]) -> list[Scored]:
    """Each passage's tokens after the first, as prompt tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    return [
        _scored((output.prompt_logprobs or [])[1:], passage[1:])
        for passage, output in _outputs(llm, passages, [sampling] * len(passages), done)
    ]


def score_answers(llm: LLM, items: Sequence[Item], done: Callable[[int], None]) -> list[Scored]:
    """Each item's answer, as if it were generated after the prompt."""
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=len(item.answer),
            ignore_eos=True,
            logprobs=1,
            detokenize=False,
            extra_args={FORCED: list(item.answer)},
        )
        for item in items
    ]
    prompts = [list(item.prompt) for item in items]
    scored = [
        _scored(output.outputs[0].logprobs, item.answer)
        for item, (_, output) in zip(items, _outputs(llm, prompts, sampling, done), strict=True)
    ]
    # Frozen layers keep other K and V of generated tokens than of prompt tokens: no later prompt may find these.
    llm.reset_prefix_cache()
    return scored


def generate(llm: LLM, prompts: list[list[int]], tokens: int, done: Callable[[int], None]) -> list[list[int]]:
    """Greedy answers of up to `tokens`."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False)
    return [list(output.outputs[0].token_ids) for _, output in _outputs(llm, prompts, [sampling] * len(prompts), done)]


def _outputs(
    llm: LLM, prompts: list[list[int]], sampling: list[SamplingParams], done: Callable[[int], None]
) -> Iterator[tuple[list[int], RequestOutput]]:
    """Each prompt with its output, some prompts at a time."""
    start = 0
    while start < len(prompts):
        end = start + max(1, GROUP_TOKENS // max(map(len, prompts)))
        group = prompts[start:end]
        outputs = llm.generate(group, sampling[start:end], use_tqdm=False)
        done(sum(map(len, group)))
        yield from zip(group, outputs, strict=True)
        start = end


def _scored(positions: Any, tokens: Sequence[int]) -> Scored:
    """From vLLM's log-probabilities of the top token and the text's, in each place."""
    return Scored(
        [position[token].logprob for position, token in zip(positions, tokens, strict=True)],
        # Of two that tie, vLLM ranks the one it takes for the first as 1.
        [min(position, key=lambda token: position[token].rank) for position in positions],
    )
