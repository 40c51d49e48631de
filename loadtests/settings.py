"""What is asked, and when it is sent: each setting is declared here, with its default and what `--help` says of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from loadtests.arrivals import schedule
from loadtests.conversations import Conversation
from loadtests.options import option
from loadtests.sharegpt import read_dialogues
from loadtests.texts import Texts
from loadtests.traces import arrivals, mean_rate, read_trace
from loadtests.workloads import NAMES, Workload

Arrival = Literal["closed", "constant", "poisson", "bursts"]
ARRIVALS: tuple[str, ...] = get_args(Arrival)


@dataclass(frozen=True)
class Load:
    """What a run asks, and when."""

    workload: str = option("chat", "What is asked.", choices=NAMES)
    api: str = option("completions", "The endpoint that is asked.", choices=("completions", "chat"))
    prompts: str = option("ids", "What completions are asked with; chat takes words.", choices=("ids", "words"))
    model: str = option("", "The model's name; by default the server's first.")
    scale: float = option(1.0, "Multiplies all lengths, for small models and machines.")
    vocab_size: int = option(32_000, "Prompts' token ids are drawn below it.")
    tokenizer: str = option("", "A tokenizer's folder, for prompts of words, where the server has no /tokenize.")
    turns: int = option(0, "Turns of every conversation; 0 is as the workload has it.")
    think: float = option(-1.0, "Seconds between an answer and the next turn, on average; -1 as the workload has it.")
    prefixes: int = option(1, "How many different prefixes prompts share.")
    prefix_tokens: int = option(-1, "Tokens of each shared prefix; -1 is as the workload has it.")
    prefix_share: float = option(1.0, "The part of conversations that begin with a shared prefix.")
    needles: float = option(0.0, "The part of conversations that ask for a number told in a text: right, or not.")
    trace: str = option("", "A file for --workload trace, sent when it says: Mooncake's form, BurstGPT's, or ours.")
    dataset: str = option("", "A file of ShareGPT's form, for --workload dataset.")
    seed: int = option(0, "For prompts, lengths and arrivals.")
    text_seed: int = option(-1, "For prompts' texts alone; -1 is as --seed.")
    arrival: str = option(
        "poisson",
        "How an open loop sends; closed: each user asks in turn; constant: as evenly as can be, lengths too.",
        choices=ARRIVALS,
    )
    rate: float = option(1.0, "Open loop: requests a second, over all processes.")
    burst: int = option(8, "Open loop: requests of a burst.")
    speed: float = option(1.0, "A trace is replayed once, so many times as fast; 0 repeats it at --rate.")
    warmup: float = option(5.0, "Open loop: seconds of requests before those that are measured.")
    duration: float = option(30.0, "Open loop: seconds of requests that are measured; it ends with their answers.")
    under_way: int = option(
        0,
        "Open loop: requests that it starts amidst, caught in the middle of their answers, so that what takes long is "
        "steady at once; the schedule begins once they go on.",
    )
    cut: bool = option(
        False, "Open loop: end with the measured seconds; requests under way are judged by what came of them."
    )
    max_in_flight: int = option(2000, "Open loop: more requests at once fail, and say so.")

    def __post_init__(self) -> None:
        if not (self.duration > 0 and self.warmup >= 0):
            times = f"duration {self.duration:g}, warmup {self.warmup:g}"
            raise ValueError(f"{times}: seconds; give one above 0, and one of at least 0")
        if not (self.rate > 0 and self.speed >= 0 and self.burst >= 1 and self.max_in_flight >= 1):
            given = f"rate {self.rate:g}, speed {self.speed:g}, burst {self.burst}, max-in-flight {self.max_in_flight}"
            raise ValueError(f"{given}: give a rate above 0, a speed of at least 0, and at least 1 of the others")

    @property
    def once(self) -> bool:
        """Whether a trace is replayed as a whole, whatever `duration` says."""
        return bool(self.trace) and self.speed > 0

    @property
    def closed(self) -> bool:
        """Whether users ask one request after another, or a schedule does."""
        return self.arrival == "closed" and not self.once

    def asks(self, model: str = "", texts: Texts | None = None) -> Workload:
        """What it asks.

        Raises:
            ValueError: for what cannot be asked, or a file that is none.

        """
        return Workload(
            self.workload,
            model or self.model,
            self.api,
            self.seed,
            self.scale,
            self.vocab_size,
            texts,
            None if self.text_seed < 0 else self.text_seed,
            self.turns,
            self.think,
            self.prefixes,
            self.prefix_tokens,
            self.prefix_share,
            self.needles,
            read_dialogues(Path(self.dataset)) if self.dataset else (),
            read_trace(Path(self.trace)) if self.trace else (),
            even=self.arrival == "constant",
        )

    def sends(self, workload: Workload) -> Iterator[tuple[float, Conversation]]:
        """The open loop: when each conversation begins, in seconds, and what is asked in it.

        Those of several turns begin before the time 0 too, so that as many are under way then as later.
        """
        if workload.trace:
            speed = self.speed or self.rate / mean_rate(workload.trace)
            for number, start in enumerate(arrivals(workload.trace, speed, again=not self.once)):
                yield start, workload.conversation(number)
            return
        before = (workload.mean_turns - 1) * 2 * self.turn_seconds(workload)
        for number, start in enumerate(schedule(self.arrival, self.rate / workload.mean_turns, self.seed, self.burst)):
            yield start - before, workload.conversation(number)

    def turn_seconds(self, workload: Workload) -> float:
        """From one turn of a conversation to the next, by Little's law."""
        return workload.mean_think + self.under_way / self.rate
