"""What a server on a CPU is given where nobody says, and what it is refused.

By itself vLLM takes nearly all memory for its KV cache there, or does not start where some is in use, and runs bfloat16
where that is several times slower than float32.
"""

import logging
import os
from argparse import Namespace

from vllm.config import CompilationMode, VllmConfig

from serving.block_size import check_block_size
from vllm_ext.dtypes import fast_dtype
from vllm_ext.errors import UsageError

logger = logging.getLogger("vllm.vllm_ext")

SPACE = "VLLM_CPU_KVCACHE_SPACE"
KV_CACHE_GIB = 1
GIBIBYTE = 2**30


def set_defaults(args: Namespace) -> None:
    """Choose a dtype and the size of the KV cache where the user did not, and say so in one line.

    Raises:
        UsageError: where the size is named twice, or is none.

    """
    space, chosen = os.environ.get(SPACE), []
    if space and args.kv_cache_memory_bytes is not None:
        given = args.kv_cache_memory_bytes
        raise UsageError(f"--kv-cache-memory-bytes {given}: {SPACE}={space} would override it; unset one of them")
    if space and not (space.isascii() and space.isdecimal() and int(space)):
        raise UsageError(f"{SPACE}={space}: it is a whole number of GiB, as 4; set it to one")
    if not space and args.kv_cache_memory_bytes is None:
        args.kv_cache_memory_bytes = KV_CACHE_GIB * GIBIBYTE
        chosen.append(f"--kv-cache-memory-bytes {args.kv_cache_memory_bytes} ({KV_CACHE_GIB} GiB)")
    if args.dtype == "auto" and fast_dtype() == "float32":
        args.dtype = "float32"
        chosen.append("--dtype float32 (bfloat16 is slow here)")
    if chosen:
        logger.info("On this CPU, unless you say otherwise: %s", ", ".join(chosen))


def check(config: VllmConfig) -> None:
    """Raise UsageError for what would fail once the weights are loaded, and say what takes long."""
    if not config.model_config.use_mla:
        check_block_size(config.cache_config.block_size)
    if config.compilation_config.mode != CompilationMode.NONE:
        logger.info(
            "The model is compiled for this CPU before it is served: minutes, in which vLLM may say that no shared "
            "memory broadcast block is available. With --enforce-eager it starts in about 20 s, and is slower then."
        )
