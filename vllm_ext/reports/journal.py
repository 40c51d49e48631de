"""Results in a file, each written as soon as it is found, so that a run that was stopped goes on where it was."""

import fcntl
import json
from pathlib import Path
from typing import Any

from vllm_ext.errors import UsageError


class Journal:
    """Rows of JSON, a line each, by what some of their columns say; the first line says what they are of."""

    def __init__(self, file: Path, header: dict[str, Any], keys: tuple[str, ...]) -> None:
        """Begin a file in a folder, or go on in it; `keys` are the columns that name a row.

        Raises:
            UsageError: where the folder holds other results, or anything else, or another run writes there.

        """
        self.file, self.keys = file, keys
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self.rows: dict[str, dict[str, Any]] = {}
        out = file.parent
        begins = not file.exists()
        if begins and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out {out}: it holds something else; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        self.writing = file.open("ab", buffering=0)
        try:
            fcntl.flock(self.writing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--out {out}: another run writes there; wait for it, or choose another folder") from None
        if begins:
            self._append(self.header)
            return
        # A line that was being written when the run was stopped has no end.
        try:
            text = file.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
            found = [json.loads(line) for line in lines]
            ours = found[:1] == [self.header]
            self.rows = {self._name({key: row[key] for key in keys}): row for row in found[1:] if ours}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"--out {out}: {file.name} is damaged ({error!r:.80}); remove it to begin anew") from error
        if not ours:
            raise UsageError(
                f"--out {out}: it holds results of other settings; choose another folder, or the same settings"
            )
        file.write_text("".join(lines), encoding="utf-8")

    def get(self, **key: Any) -> dict[str, Any] | None:
        """The row that the key names, where there is one."""
        return self.rows.get(self._name(key))

    def add(self, row: dict[str, Any]) -> None:
        """Write it down at once."""
        self.rows[self._name({key: row[key] for key in self.keys})] = row
        self._append(row)

    def close(self) -> None:
        """Write no more, and leave the folder to others."""
        self.writing.close()

    def _name(self, key: dict[str, Any]) -> str:
        return json.dumps([key[name] for name in self.keys])

    def _append(self, row: dict[str, Any]) -> None:
        self.writing.write(f"{json.dumps(row)}\n".encode())
