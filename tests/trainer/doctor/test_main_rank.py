"""What the main rank makes of collectives, with stand-ins for GPUs and network."""

from types import SimpleNamespace
from typing import Any

import pytest

from mixmae.trainer.doctor import main_rank
from mixmae.trainer.doctor.follower import SHORT
from mixmae.trainer.doctor.main_rank import MainRank


def test_gloo_that_fails_beside_nccl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has a group of each. Where a host's own name resolves to 127.0.1.1, NCCL works and gloo does not."""

    def refuse() -> None:
        raise RuntimeError("connect to 127.0.1.1 refused\nstack of gloo")

    told: dict[str, Any] = {}
    ranks: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    main = MainRank(ranks, SHORT, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(main, "_can_join", lambda: True)
    monkeypatch.setattr(main, "_messages", SimpleNamespace(publish=lambda *_: None), raising=False)
    monkeypatch.setattr(main, "_record", told.update)
    monkeypatch.setattr(main_rank, "measure", lambda *_: ())
    monkeypatch.setattr(main_rank, "form_background_group", refuse)
    main._measure()
    assert (told["network"].backend, told["network"].failure) == ("gloo", "connect to 127.0.1.1 refused")
