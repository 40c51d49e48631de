"""The file with the API keys."""

from pathlib import Path

from vllm_ext.errors import UsageError

FIX = "write one key a line, of visible ASCII characters"


def read_keys(file: Path | None) -> list[str]:
    """The keys in a file, one a line; blank lines and those that begin with # are none.

    Raises:
        UsageError: for a file that cannot be read, has no key, or one that no HTTP header can carry.

    """
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"--api-key-file {file}: cannot be read ({error}); {FIX}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip(" \t")
        if not key or key.startswith("#"):
            continue
        check_key(key, f"--api-key-file {file}: line {number}")
        keys.append(key)
    if not keys:
        raise UsageError(f"--api-key-file {file}: it has no key; {FIX}")
    return keys


def check_key(key: str, where: str) -> None:
    """Raise UsageError, without the key, where a client could not send it as a bearer token."""
    for character in key:
        if not "!" <= character <= "~":
            raise UsageError(f"{where} has U+{ord(character):04X} in its key, which no header can carry; {FIX}")
