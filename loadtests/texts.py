"""What prompts of text are made of: words that are one token each."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

WORDS = re.findall(
    r"\w+",
    """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy music market sense nation plan college interest death experience effect use class
control care field development role effort rate heart drug show leader light voice wife whole police mind price report
decision son view relationship town road arm difference value building action season society tax director position
""",
)


@dataclass(frozen=True)
class Texts:
    """What prompts of text are made of."""

    words: tuple[str, ...] = tuple(WORDS)
    """One token each, after a space."""
    around: int = 0
    """Tokens that the chat template adds."""
    exact: bool = False
    count: Callable[[str], int] | None = None
    """Tokens of a prompt, where somebody counts them."""


def single_token_words(count: Callable[[str], int]) -> Texts:
    """The words that are one token each in a message, by `count`: a whole prompt's tokens, its template included.

    Raises:
        ValueError: where no such words are found, or a prompt of them has another length than follows.

    """
    base = count(WORDS[0])
    found = tuple(word for word in WORDS if count(f"{WORDS[0]} {word}") == base + 1)
    around = base - 1
    dice = random.Random(0)
    if len(found) >= 32 and count(" ".join([WORDS[0], *dice.choices(found, k=200)])) == base + 200:
        return Texts(found, around, exact=True, count=count)
    raise ValueError(f"only {len(found)} of {len(WORDS)} words are one token each; ask completions, with token ids")
