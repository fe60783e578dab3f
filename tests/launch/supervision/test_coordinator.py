"""What the coordinator does with an outcome that it cannot write down."""

import asyncio
from pathlib import Path

import pytest

from mixmae.launch.supervision import coordinator
from mixmae.launch.supervision.coordinator import Coordinator
from mixmae.launch.supervision.membership import Limits
from mixmae.launch.supervision.outcome import Outcome


def test_a_full_disk_does_not_keep_a_run_from_telling_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def write(folder: Path, outcome: Outcome) -> None:
        tried.append(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(coordinator, "write_outcome", write)
    own = Coordinator("secret", 1, False, Limits(join=60, stuck=100, grace=30), tmp_path)
    asyncio.run(own._write(Outcome(1, "reason")))
    assert tried == [tmp_path]
