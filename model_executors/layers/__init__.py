"""A planned model's decoder layers: the adapter over vLLM's classes, and the kinds of attention."""
