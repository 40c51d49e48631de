"""What is asked, and when it is sent: each setting is declared here, with its default and what `--help` says of it."""

from dataclasses import dataclass
from typing import Literal, get_args

from loadtests.options import option
from loadtests.workloads import NAMES

Arrival = Literal["closed", "constant", "poisson", "bursts", "trace"]
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
    seed: int = option(0, "For prompts, lengths and arrivals.")
    text_seed: int = option(-1, "For prompts' texts alone; -1 is as --seed.")
    arrival: str = option("poisson", "How an open loop sends; closed: each user asks in turn.", choices=ARRIVALS)
    rate: float = option(1.0, "Open loop: requests a second, over all processes.")
    burst: int = option(8, "Open loop: requests of a burst.")
    trace: str = option("", "A file of JSON lines to replay: arrival, prompt_tokens, answer_tokens.")
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
