"""What models made of the work, kept as each ends: a run that is stopped goes on from there, and another reuses it.

A file belongs to one model (its configuration and weight files), one plan and head, the options of its engine and the
work. Whatever differs, or cannot be read whole, is measured anew.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vllm_ext.quality.work import Asked, Replies
from vllm_ext.versions import vllm_distribution

REPLIES = TypeAdapter(Replies)


class Kept:
    """A folder of replies; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def read(self, asked: Asked) -> Replies | None:
        """Those of an earlier run, if it ended."""
        if self.folder is None:
            return None
        try:
            replies = REPLIES.validate_json(self._file(asked).read_bytes())
        except (OSError, ValidationError):
            return None
        return replies if replies.answers.keys() == asked.work.passages.keys() else None

    def write(self, asked: Asked, replies: Replies) -> None:
        """Keep them; the file appears under its name when it is whole."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        file = self._file(asked)
        building = file.with_suffix(".part")
        building.write_bytes(REPLIES.dump_json(replies))
        building.rename(file)

    def _file(self, asked: Asked) -> Path:
        assert self.folder is not None
        checkpoint = asked.served.checkpoint
        weights = checkpoint.files if checkpoint.folder is not None else []
        of = {
            "config": checkpoint.config,
            "overrides": asked.served.hf_overrides(),
            "weights": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weights],
            "vllm": vllm_distribution(),
            "vllm_args": list(asked.vllm_args),
            "work": asdict(asked.work),
        }
        return self.folder / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"
