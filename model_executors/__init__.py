"""Torch modules that run inside vLLM's engine; nothing here knows of HTTP or of where files lie."""
