"""The OpenAI-compatible server: vLLM's own, with our metrics attached through its plugin groups."""
