"""Buffers: which are saved, and what another number of ranks has of them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixmae.trainer.checkpoints.buffers import buffers_to_write, mean_buffers, restore_buffers


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        self.inner.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.register_buffer("seen", torch.tensor([False, False]))


def write(folder: Path, *of_ranks: dict[str, Tensor]) -> list[Path]:
    files = [folder / f"{rank}" for rank in range(len(of_ranks))]
    for file, buffers in zip(files, of_ranks, strict=True):
        save_file({f"buffer/{name}": value for name, value in buffers.items()} | {"weight/a@0": torch.ones(3)}, file)
    return files


def test_persistent_buffers_are_saved() -> None:
    names = ("inner.running_mean", "inner.running_var", "inner.num_batches_tracked", "seen")
    assert buffers_to_write(Buffered()).keys() == {f"buffer/{name}" for name in names}


def test_the_mean_over_ranks_is_exact_where_they_agree(tmp_path: Path) -> None:
    same = torch.tensor([0.1, -torch.inf, 1e38])
    of_ranks = [
        {"same": same, "mean": torch.tensor(value), "count": torch.tensor(count), "flags": torch.tensor(flags)}
        for value, count, flags in ((1.0, 4, [True, False]), (2.0, 9, [False, False]), (6.0, 2, [True, False]))
    ]
    found = mean_buffers(write(tmp_path, *of_ranks))
    assert torch.equal(found["same"], same)
    assert (found["mean"].item(), found["count"].item(), found["flags"].tolist()) == (3.0, 9, [True, False])
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in of_ranks[0].items()
    }


def test_each_rank_has_its_own_again_or_all_the_mean(tmp_path: Path) -> None:
    of_ranks = [dict(Buffered().state_dict()) for _ in range(2)]
    for rank, state in enumerate(of_ranks):
        state["inner.running_mean"].fill_(rank)
        state["seen"][rank] = True
    files = write(tmp_path, *of_ranks)
    for rank, expected in enumerate(of_ranks):
        model = Buffered()
        restore_buffers(model, files, rank, 2)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    model = Buffered()
    restore_buffers(model, files, 2, 3)
    assert model.state_dict()["inner.running_mean"].tolist() == [0.5, 0.5]
    assert model.state_dict()["seen"].tolist() == [True, True]
