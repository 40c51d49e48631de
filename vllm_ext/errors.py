"""What is wrong with something a user typed or handed over."""


class UsageError(ValueError):
    """One line with the name, the value and the fix; `vllm-ext` prints it and exits with code 2."""


def one_line(error: Exception) -> str:
    """The message in one line, without the frame that pydantic puts around it."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("ctx", {}).get("error", item["msg"])) for item in errors())
    return " ".join(str(error).split())
