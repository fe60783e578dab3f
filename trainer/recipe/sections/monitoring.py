"""`monitoring:`: the exporter of each node."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from mixmae.base.liveness import STALL_SECONDS
from mixmae.trainer.recipe.sections.section import Seconds, Section


class Monitoring(Section):
    enabled: bool = True
    address: str = "127.0.0.1"
    """On which each node's exporter listens; 0.0.0.0 for a Prometheus on another host."""
    port: int = Field(9400, ge=0, le=65535)
    """The first of 100 that are tried."""
    certfile: Path | None = None
    keyfile: Path | None = None
    auth_file: Path | None = None
    """A file with one line, user:password; None lets everybody read."""
    stall_seconds: Seconds = STALL_SECONDS
    """/healthz fails when a rank of the node finished no step for so long."""
    pushgateway: str | None = None
    """URL to which each node pushes its last numbers at the end; for runs that end between two scrapes."""
    comms_logger: bool = False
    """Counts communication by operation; DeepSpeed then waits for each operation, which costs speed."""
    peak_flops: float | None = Field(None, gt=0)
    """Operations per second that a device can do, for the MFU; None: known ones are looked up."""

    @field_validator("address", mode="after")
    @classmethod
    def _brackets_are_those_of_urls(cls, address: str) -> str:
        return address[1:-1] if address.startswith("[") and address.endswith("]") else address

    @model_validator(mode="after")
    def _a_key_needs_its_certificate(self) -> Self:
        if self.keyfile is not None and self.certfile is None:
            raise ValueError(f"keyfile={self.keyfile} without certfile; set both for TLS")
        return self
