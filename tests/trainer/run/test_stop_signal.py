"""A wish of one rank is known to all at the next step."""

import pytest

from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.run.stop_signal import Vote, Wish
from tests.helpers import run_ranks

pytestmark = pytest.mark.distributed


def cast(ranks: Ranks, wishes: list[list[Wish]]) -> list[Wish]:
    vote = Vote()
    return [vote.cast(wish) for wish in wishes[ranks.rank]]


def test_all_learn_of_the_highest_wish_one_step_later() -> None:
    stay, stop, give_up = Wish.GO_ON, Wish.STOP, Wish.GIVE_UP
    wishes = [[stay, stay, give_up, stay, stay], [stay, stop, stop, stay, stay], [stay, stay, stay, stay, stop]]
    assert run_ranks(cast, 3, wishes) == [[stay, stay, stop, give_up, stay]] * 3
