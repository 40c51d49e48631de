"""The model in plain transformers, layer by layer, with a plan: fits, probes and searches run on it."""
