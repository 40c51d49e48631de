"""The papers' experiments on any model: which layers read earlier tokens, and which can let go of them."""
