"""Files are safetensors by their own library's reading; any cut of a parameter is put together from any other cut."""

import mmap
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmae.trainer.checkpoints.files import HostMemory, Wanted, contents, fill, read_buffers, write
from mixmae.trainer.checkpoints.layout import verify_file
from mixmae.trainer.checkpoints.pieces import KINDS, Piece


class Held:
    """Pieces as an engine has them, without one."""

    def __init__(self, pieces: list[Piece], states: dict[str, Tensor]) -> None:
        self.pieces, self.states = pieces, states

    def to_write(self) -> list[Piece]:
        return self.pieces

    def values(self, piece: Piece, kind: str) -> Tensor:
        home = piece.home if kind == "weight" else self.states[kind]
        return home.view(-1)[piece.offset : piece.offset + piece.numel]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    home = torch.randn(1000)
    states = {kind: torch.randn(1000) for kind in KINDS[1:]}
    held = Held([Piece("a.weight", 0, 7, home, 0), Piece("b", 13, 900, home, 50)], states)
    buffers = {
        "steps": torch.tensor(2**40),
        "half": torch.randn(3, 5).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "positions": torch.randn(4, 2, dtype=torch.float64),
    }
    written = write(tmp_path / "rank", contents(held, buffers))  # type: ignore[arg-type]
    verify_file(tmp_path / "rank", written)
    assert written.bytes == (tmp_path / "rank").stat().st_size
    found = load_file(tmp_path / "rank")
    assert found.keys() == {
        *(f"{kind}/{place}" for kind in KINDS for place in ("a.weight@0", "b@13")),
        *(f"buffer/{name}" for name in buffers),
    }
    assert torch.equal(found["weight/b@13"], home[50:950])
    assert torch.equal(found["exp_avg_sq/a.weight@0"], states["exp_avg_sq"][:7])
    for name, value in buffers.items():
        assert found[f"buffer/{name}"].dtype == value.dtype
        assert torch.equal(found[f"buffer/{name}"], value)
    assert read_buffers(tmp_path / "rank").keys() == buffers.keys()


def test_copies_are_of_the_moment_and_their_memory_is_kept(tmp_path: Path) -> None:
    home = torch.zeros(100)
    held = Held([Piece("a", 0, 100, home, 0)], dict.fromkeys(KINDS, home))
    tensors = contents(held, {"steps": torch.tensor(5), "flag": torch.tensor(True)})  # type: ignore[arg-type]
    memory = HostMemory()
    memory.reserve(tensors)
    reserved = memory._memory.data_ptr()
    for value in (1.0, 2.0):
        home.fill_(value)
        copies = memory.copy(tensors)
        home.fill_(-1)
        write(tmp_path / "rank", copies)
        found = load_file(tmp_path / "rank")
        assert torch.equal(found["weight/a@0"], torch.full((100,), value))
        assert found["buffer/steps"].item() == 5
        assert next(iter(copies.values())).data_ptr() == memory._memory.data_ptr() == reserved


def test_reserved_memory_is_there_to_its_last_page() -> None:
    """The system gives a page at its first write; a first save that had to wait for that would take far longer."""
    memory = HostMemory()
    before = resident_bytes()
    memory.reserve({"weight": torch.zeros(1).expand(2**24)})
    assert resident_bytes() - before > 0.9 * 4 * 2**24


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_file_is_the_same_from_copies_and_as_it_is(tmp_path: Path) -> None:
    home = torch.randn(100)
    held = Held([Piece("a", 3, 40, home, 9)], dict.fromkeys(KINDS, home))
    buffers = {"half": torch.randn(3, 5).bfloat16().T, "flag": torch.tensor(True)}
    tensors = contents(held, buffers)  # type: ignore[arg-type]
    assert write(tmp_path / "copied", HostMemory().copy(tensors)) == write(tmp_path / "direct", tensors)


cuts = st.lists(st.integers(1, 59), max_size=6, unique=True).map(sorted)


@given(cuts, cuts, st.integers(0, 5))
def test_any_cut_is_read_by_any_other(tmp_path_factory, written: list[int], read: list[int], first: int) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("cut")
    whole = {(kind, name): torch.randn(60) for kind in KINDS for name in ("a.b", "c@d/e")}
    places = list(zip([0, *written], [*written, 60], strict=True))
    files = []
    for rank, (low, high) in enumerate(places):
        pieces = {f"{kind}/{name}@{low}": value[low:high].clone() for (kind, name), value in whole.items()}
        files.append(folder / f"{rank}")
        save_file(pieces, files[-1])
    files = files[first % len(files) :] + files[: first % len(files)]
    for low, high in zip([0, *read], [*read, 60], strict=True):
        wanted = [Wanted(kind, name, low, torch.full((high - low,), torch.nan)) for kind, name in whole]
        fill(wanted, files)
        for stretch in wanted:
            assert torch.equal(stretch.target, whole[stretch.kind, stretch.name][low:high])
