"""Tokens spelled out: *SpeLLM: Character-Level Multi-Head Decoding* (arXiv 2507.16323)."""
