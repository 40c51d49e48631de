"""What vLLM calls back: configuration checks, a scheduler, logits processors."""
