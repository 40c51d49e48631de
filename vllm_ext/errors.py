"""What is wrong with something a user typed or handed over."""


class UsageError(ValueError):
    """One line with the name, the value and the fix; `vllm-ext` prints it and exits with code 2."""
