"""Files are safetensors by their own library's reading; any cut of a parameter is put together from any other cut."""

import mmap
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmae.trainer.checkpoints.files import ReadItem, read_slices, write
from mixmae.trainer.checkpoints.host_memory import HostMemory
from mixmae.trainer.checkpoints.manifest import DamagedError, verify_file


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """With larger elements first, as files have them."""
    return {
        "buffer/steps": torch.tensor(2**40),
        "buffer/positions": torch.randn(4, 2, dtype=torch.float64),
        "weight/a.weight@0": torch.randn(7),
        "exp_avg/b@13": torch.randn(950)[50:],
        "weight/frozen@0": torch.randn(3, 5).bfloat16().T,
        "buffer/flags": torch.tensor([True, False, True]),
    }


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    record = write(tmp_path / "rank", tensors)
    verify_file(tmp_path / "rank", record)
    assert record.bytes == (tmp_path / "rank").stat().st_size
    found = load_file(tmp_path / "rank")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_copies_are_of_the_moment_and_their_memory_is_kept(tmp_path: Path) -> None:
    weight = torch.zeros(100)
    tensors = {"buffer/steps": torch.tensor(5), "weight/a@0": weight, "buffer/flag": torch.tensor(True)}
    memory = HostMemory()
    memory.reserve(tensors)
    reserved = memory._memory.data_ptr()
    for value in (1.0, 2.0):
        weight.fill_(value)
        copies = memory.copy(tensors)
        weight.fill_(-1)
        write(tmp_path / "rank", copies)
        found = load_file(tmp_path / "rank")
        assert torch.equal(found["weight/a@0"], torch.full((100,), value))
        assert found["buffer/steps"].item() == 5
        assert next(iter(copies.values())).data_ptr() == memory._memory.data_ptr() == reserved


def test_reserved_memory_is_there_to_its_last_page() -> None:
    """The system gives a page at its first write; a first save that had to wait for that would take far longer."""
    memory = HostMemory()
    memory.reserve({"weight": torch.zeros(1).expand(2**24)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory._memory.fill_(1)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 0.1 * memory._memory.numel() / mmap.PAGESIZE


def test_a_file_is_the_same_from_copies_and_as_it_is(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    assert write(tmp_path / "copied", HostMemory().copy(tensors)) == write(tmp_path / "direct", tensors)


FOREIGN = {
    "no start": {"weight/a@x": torch.zeros(4)},
    "no elements": {"weight/a@0": torch.tensor(1.0)},
    "rows": {"weight/a@0": torch.zeros(2, 4)},
    "too few": {"weight/a@0": torch.zeros(3)},
    "another name": {"weight/b@0": torch.zeros(4)},
    "nothing": {},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_no_checkpoint_has_is_damaged(kind: str, tmp_path: Path) -> None:
    save_file(FOREIGN[kind], tmp_path / "rank")
    with pytest.raises(DamagedError, match=r"rank holds no slices|elements are in no file"):
        read_slices([ReadItem("weight", "a", 0, torch.empty(4))], [tmp_path / "rank"])


def test_a_file_that_is_no_safetensors_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "rank").write_bytes(b"x" * 100)
    with pytest.raises(DamagedError, match="rank holds no slices"):
        read_slices([ReadItem("weight", "a", 0, torch.empty(4))], [tmp_path / "rank"])


cuts = st.lists(st.integers(1, 59), max_size=6, unique=True).map(sorted)


@given(cuts, cuts, st.integers(0, 5))
def test_any_cut_is_read_by_any_other(tmp_path_factory, written: list[int], read: list[int], first: int) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("cut")
    whole = {(kind, name): torch.randn(60) for kind in ("weight", "momentum_buffer") for name in ("a.b", "c@d/e")}
    files = []
    for rank, (low, high) in enumerate(zip([0, *written], [*written, 60], strict=True)):
        slices = {f"{kind}/{name}@{low}": value[low:high].clone() for (kind, name), value in whole.items()}
        files.append(folder / f"{rank}")
        save_file(slices, files[-1])
    files = files[first % len(files) :] + files[: first % len(files)]
    for low, high in zip([0, *read], [*read, 60], strict=True):
        items = [ReadItem(kind, name, low, torch.full((high - low,), torch.nan)) for kind, name in whole]
        read_slices(items, files)
        for item in items:
            assert torch.equal(item.target, whole[item.kind, item.name][low:high])
