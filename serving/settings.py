"""What the endpoint admits, shows and keeps, and how it ends: set by `vllm-ext serve`, read by the server."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MEBIBYTE = 2**20


class ServerSettings(BaseModel):
    """Of one server; limits that are None are off.

    vLLM hands its arguments to every API server process, and these travel with them, as `ARGUMENT`.
    """

    model_config = ConfigDict(frozen=True)

    max_body_bytes: int = Field(default=32 * MEBIBYTE, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_n: int | None = Field(default=None, ge=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_concurrent_requests: int | None = Field(default=None, ge=1)
    max_queued_requests: int = Field(default=0, ge=0)
    drain_seconds: float = Field(default=30.0, ge=0)
    api_key_file: Path | None = None
    metrics_port: int | None = None
    """Where /metrics is served, and then not on the main port."""
    log_format: Literal["text", "json"] = "text"
    allow_code: bool = False
    """Whether code from the checkpoint may be run, and pickled weights read."""

    @property
    def of_content(self) -> bool:
        """Whether a limit asks for what is in a body."""
        return any(limit is not None for limit in (self.max_n, self.max_output_tokens, self.max_prompt_tokens))

    def shared_by(self, processes: int) -> "ServerSettings":
        """One process's part of what is counted in each process by itself; each gets at least one."""
        if self.max_concurrent_requests is None or processes == 1:
            return self
        changes = {
            "max_concurrent_requests": max(1, self.max_concurrent_requests // processes),
            "max_queued_requests": self.max_queued_requests // processes,
        }
        return self.model_copy(update=changes)


ARGUMENT = "vllm_ext_settings"
"""The name in vLLM's parsed arguments."""
