"""Which layers can let go, found by measuring: a search over attention plans."""
