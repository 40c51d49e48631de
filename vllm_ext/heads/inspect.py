"""How tokens are spelled, and what k heads over bytes would weigh: `python -m vllm_ext.heads.inspect MODEL`."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError, run_tool
from vllm_ext.heads.vocabulary import OWN, POSITIONS, CharacterVocabulary
from vllm_ext.tasks import texts

EXAMPLES = 5
PROSE_TOKENS = 100_000


def figures(source: Checkpoint, vocabulary: CharacterVocabulary, tokenizer: Any) -> dict[str, Any]:
    """By what they are called in the table."""
    vocab_size, hidden_size = source.config["vocab_size"], source.config["hidden_size"]
    positions, reasons = vocabulary.positions, Counter(vocabulary.own.values())
    prose = [token for text in texts.prose("held_out") for token in tokenizer(text, verbose=False).input_ids]
    return {
        "tokens": vocab_size,
        "places": positions,
        "symbols": vocabulary.symbols,
        "spelled to their end": vocab_size - len(vocabulary.own) - len(vocabulary.cut),
        f"cut to {positions} bytes": len(vocabulary.cut),
        **{f"symbols of their own: {reason}": count for reason, count in sorted(reasons.items())},
        "prose tokens spelled to their end": vocabulary.coverage(prose[:PROSE_TOKENS]),
        "weights of the stock head": vocab_size * hidden_size,
        # Symbols that are tokens stand in the first place only.
        "weights of the character heads": (positions * OWN + len(vocabulary.own)) * hidden_size,
    }


def print_inspected(source: Checkpoint, positions: int) -> None:
    """Print the figures, and examples of what is not spelled to its end.

    Raises:
        UsageError: for a model without a tokenizer, or with one that does not tell its tokens' bytes.

    """
    vocabulary, tokenizer = _vocabulary(source, positions)
    table = Table(title=f"{source.called}: tokens spelled out", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in figures(source, vocabulary, tokenizer).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.2%}")
    examples = {"cut": vocabulary.cut[:EXAMPLES]}
    for reason in ("same bytes", "same beginning"):
        examples[reason] = tuple(token for token, why in vocabulary.own.items() if why == reason)[:EXAMPLES]
    console = Console()
    console.print(table)
    for name, tokens in examples.items():
        if tokens:
            shown = ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in tokens)
            console.print(f"{name}: {shown}", markup=False, highlight=False)


def _vocabulary(source: Checkpoint, positions: int) -> tuple[CharacterVocabulary, Any]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder or source.name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {source.name}: no tokenizer is to be had; add its files") from error
    return CharacterVocabulary.of(tokenizer, source.config["vocab_size"], positions), tokenizer


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder.")],
    positions: Annotated[int, typer.Option(help="How many bytes of a token are spelled.")] = POSITIONS,
) -> None:
    """Print how MODEL's tokens are spelled, and which are not to their end."""
    print_inspected(Checkpoint.open(model, weights=False), positions)


if __name__ == "__main__":
    run_tool(main)
