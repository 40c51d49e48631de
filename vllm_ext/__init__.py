"""vllm-ext: what vLLM loads and what a user types."""
