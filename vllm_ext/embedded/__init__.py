"""The default model, out of its package, and the plan and heads that ship for it."""
