"""What a rank finds to choose by."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixmae.trainer.engine import deepspeed_engine
from mixmae.trainer.engine.auto import fit_here
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.loading import default_recipe


@pytest.mark.parametrize(("compilers", "compiled"), [(["gcc"], True), ([], False)])
def test_the_main_rank_says_what_it_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compilers: list[str], compiled: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: name if name in compilers else None)
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        trains = [fit_here(default_recipe([]), Ranks(rank=rank, world_size=2)).train for rank in range(2)]
    assert [(train.compile, train.fused_attention) for train in trains] == [(compiled, compiled)] * 2
    messages = [record.message for record in caplog.records]
    assert len(messages) == (0 if compiled else 1)
    assert all("off, which is slower: there is no C compiler (cc, gcc, clang)" in message for message in messages)


def test_a_processor_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not fit_here(default_recipe([]), Ranks()).train.compile
    assert not caplog.records


@pytest.mark.parametrize(("others", "windows"), [([], [True]), (["it does not run on a GPU"], [True, False])])
def test_ranks_take_the_same_kernels(
    others: list[str], windows: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def set_fused_attention(dtype: torch.dtype, windows: bool = True) -> list[str]:
        asked.append(windows)
        return []

    monkeypatch.setattr(deepspeed_engine, "all_gather", lambda own: [own, others, others])
    model: Any = SimpleNamespace(set_fused_attention=set_fused_attention)
    deepspeed_engine.fuse_attention(model, torch.bfloat16, Ranks(rank=0, world_size=3))
    assert asked == windows
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == others
