"""Whether vLLM's attention for CPUs can have blocks of that many tokens."""

from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence

from vllm_ext.errors import UsageError
from vllm_ext.versions import vllm_distribution

MULTIPLE = 32


def check_block_size(size: int) -> None:
    """Raise UsageError where a CPU cannot have them."""
    if size % MULTIPLE:
        nearest = max(1, round(size / MULTIPLE)) * MULTIPLE
        raise UsageError(
            f"--block-size {size}: on a CPU it is a multiple of {MULTIPLE}; take {nearest}, or leave it out"
        )


def check_named(vllm_args: Sequence[str]) -> None:
    """The same by the arguments alone: a second, where vLLM takes eight until it can parse them."""
    if "cpu" not in "".join(vllm_distribution() or ()):
        return
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--block-size", "--block_size", type=int)
    try:
        named, _ = parser.parse_known_args(list(vllm_args))
    except ArgumentError:  # vLLM says what is wrong with it
        return
    if named.block_size is not None:
        check_block_size(named.block_size)
