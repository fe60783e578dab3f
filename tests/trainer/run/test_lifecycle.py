"""What a run hands on from its recipe before it touches a GPU."""

import pytest

from mixmae.trainer.engine import distributed
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.run import lifecycle
from tests.helpers import tiny_recipe


class JoinedError(Exception):
    """In the place of a process group."""


def test_a_rank_joins_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def join(*given: object) -> None:
        told.extend(given)
        raise JoinedError

    monkeypatch.setattr(lifecycle, "check", lambda *_: None)
    monkeypatch.setattr(distributed, "join", join)
    with pytest.raises(JoinedError):
        lifecycle.train(tiny_recipe(**{"train.deterministic": True, "launch.stuck_seconds": 45}), Ranks())
    assert told == [Ranks(), 45, True]
