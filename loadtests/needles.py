"""Questions with a known answer: a number told once in a text, and asked for at its end.

After RULER's single needle in a haystack of repeated sentences (arXiv 2404.06654). A server that answers sooner because
it forgets gets these wrong.
"""

import random

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FILLER_TOKENS = 23
"""About, by most tokenizers."""
ASKED_TOKENS = 60
"""Of what stands around the filler, about."""
KEYS = (
    "amber",
    "cedar",
    "dahlia",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "jasmine",
    "lagoon",
    "maple",
    "nectar",
)


def needle(tokens: int, dice: random.Random, name: str, chat: bool) -> tuple[str, str]:
    """A prompt of about `tokens` tokens, and the number that a right answer has in it.

    `name` stands at its beginning, so that no prefix cache knows the rest.
    """
    key, value = dice.choice(KEYS), str(dice.randrange(1_000_000, 10_000_000))
    sentences = max(1, round((tokens - ASKED_TOKENS) / FILLER_TOKENS)) * [FILLER]
    sentences.insert(dice.randint(0, len(sentences)), f"One of the special magic numbers for {key} is: {value}.")
    asked = f"What is the special magic number for {key} mentioned in the text?"
    begun = f"The special magic number for {key} mentioned in the text is"
    text = f"Text {name}. A special magic number is hidden in it.\n{' '.join(sentences)}\n{asked}"
    return (text if chat else f"{text} {begun}"), value
