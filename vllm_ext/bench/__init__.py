"""`vllm-ext bench`: stock vLLM and a variant of it in turn, beside what the arithmetic allows."""
