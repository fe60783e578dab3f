import gc
import itertools
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason, UnusableError
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from mixmae.trainer.data.stores.remote import RemoteStore
from mixmae.trainer.data.stream import LostWorkerError, Position, Stream, lost_worker_error, sample_order
from mixmae.trainer.data.to_device import ToDevice, copy_to_device
from mixmae.trainer.data.transform import (
    BatchBuffers,
    RandomResizedCropFlip,
    SampleTransform,
    shared_empty,
    shared_images,
)
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.recipe.sections.data import Cache, Network
from tests.helpers import tiny_recipe
from tests.trainer.data.servers import http_server


def recipe_for(shards: Path, workers: int = 0, **changes: Any) -> Recipe:
    settings = {"data.num_workers": workers, "data.shards": str(shards), "train.global_batch": 16}
    return tiny_recipe(**{**settings, **changes})


class Undecoded(RandomResizedCropFlip):
    """Reads images and makes nothing of them, which is most of the time, and nothing to their order."""

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        assert len(content) == row["size"]


def global_batches(recipe: Recipe, world_size: int, start: int, count: int) -> list[list[int]]:
    """Samples of `count` global batches from a position on, the ranks' shares one behind the other."""
    batches: list[list[int]] = [[] for _ in range(count)]
    for rank in range(world_size):
        index = open_index(recipe.data.shards)
        position, transform = Position(0, start, index.fingerprint), Undecoded(64, recipe.data)
        with Stream(recipe, Ranks(rank, world_size), index, position, transform=transform) as own:
            for number in range(count):
                for _ in range(recipe.accumulation(world_size)):
                    batches[number] += next(own).samples
    return batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_global_batches_depend_on_neither_ranks_nor_workers(shards: Path, world_size: int, workers: int) -> None:
    expected = global_batches(recipe_for(shards), 1, 0, 8)
    assert global_batches(recipe_for(shards, workers), world_size, 0, 8) == expected


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_goes_on_anywhere_with_other_ranks_and_batches(shards: Path, data: st.DataObject) -> None:
    """Stopped after any number of steps, again and again, each time with another world size and micro-batch."""
    drop_last = data.draw(st.booleans(), "drop_last")
    window = data.draw(st.integers(1, 60), "window")
    whole = recipe_for(shards, **{"data.drop_last": drop_last, "data.shuffle_window": window})
    expected = global_batches(whole, 1, 0, 12)
    found: list[list[int]] = []
    while len(found) < 12:
        count = data.draw(st.integers(1, 12 - len(found)), "steps")
        world_size = data.draw(st.sampled_from([1, 2, 4, 8]), "ranks")
        micro_batch = data.draw(st.sampled_from([m for m in (2, 4, 8, 16) if m * world_size <= 16]), "micro_batch")
        changes = {"data.drop_last": drop_last, "data.shuffle_window": window, "train.micro_batch": micro_batch}
        found += global_batches(recipe_for(shards, **changes), world_size, 16 * len(found), count)
    assert found == expected


def test_sixteen_to_eight_to_sixteen(shards: Path) -> None:
    recipe = recipe_for(shards, **{"train.global_batch": 32})
    expected = global_batches(recipe, 1, 0, 6)
    parts = [global_batches(recipe, ranks, 32 * done, 2) for ranks, done in ((16, 0), (8, 2), (16, 4))]
    assert list(itertools.chain.from_iterable(parts)) == expected


def test_every_epoch_shows_every_image(shards: Path) -> None:
    recipe = recipe_for(shards)
    seen = list(itertools.chain.from_iterable(global_batches(recipe, 2, 0, 27)))  # 8 epochs of 54
    assert {seen.count(sample) for sample in range(54)} == {8}


def test_other_numbers_of_ranks_are_refused_with_those_that_fit(shards: Path) -> None:
    recipe = recipe_for(shards, **{"train.global_batch": 24, "train.micro_batch": 2, "data.streams": 8})
    with pytest.raises(UsageError, match=r"3 ranks cannot share data.streams=8 .* use 1, 2, 4, 8 ranks \(2 is"):
        recipe.streams_of(0, 3)
    with pytest.raises(UsageError, match=r"train.global_batch=24 does not divide by data.streams=16"):
        recipe_for(shards, **{"train.global_batch": 24, "data.streams": 16})


def test_dropping_everything_is_refused(shards: Path) -> None:
    recipe = recipe_for(shards, **{"train.global_batch": 64, "data.drop_last": True})
    with pytest.raises(UsageError, match="drops all of the 54 images"):
        sample_order(recipe, open_index(shards))


@pytest.mark.parametrize("decoder", ["fast", "pillow"])
def test_pixels_belong_to_seed_epoch_and_sample(shards: Path, decoder: str) -> None:
    views = []
    for workers, start in ((0, 0), (2, 0), (0, 16)):
        recipe, index = recipe_for(shards, workers, **{"data.decoder": decoder}), open_index(shards)
        with Stream(recipe, Ranks(), index, Position(0, start, "")) as stream:
            first = list(itertools.islice(stream, 16))
        views.append({s: b.images[i].clone() for b in first for i, s in enumerate(b.samples)})
    assert all(torch.equal(view, views[1][sample]) for sample, view in views[0].items())
    assert all(torch.equal(view, views[0][sample]) for sample, view in views[2].items() if sample in views[0])
    image = next(iter(views[0].values()))
    assert (image.dtype, image.shape) == (torch.uint8, (3, 64, 64))


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_come_beside_the_images(shards: Path, workers: int) -> None:
    index = open_index(shards)
    with Stream(recipe_for(shards, workers), Ranks(), index, Position(0, 0, "")) as stream:
        for batch in itertools.islice(stream, 8):
            assert batch.targets["label"].dtype == torch.int64
            assert batch.targets["label"].tolist() == index.samples["label"][batch.samples].tolist()


@dataclass(frozen=True)
class Checksum(SampleTransform):
    """A transform of a user's own: a number in place of pixels."""

    def new_batch(self, count: int) -> BatchBuffers:
        return BatchBuffers(shared_images(count, 1), {"draw": shared_empty((count,), torch.float64)})

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        if row["label"] % 3 == 1:
            raise UnusableError(Reason.DAMAGED, "not for this transform")
        buffers.images[i] = content[-1]
        buffers.targets["draw"][i] = random.random()


def test_a_transform_of_a_users_own_decides_what_workers_make_of_samples(shards: Path) -> None:
    seen = []
    for workers in (0, 2):
        index = open_index(shards)
        recipe = recipe_for(shards, workers, **{"data.max_corrupt_fraction": 0.9})
        with Stream(recipe, Ranks(), index, Position(0, 0, ""), transform=Checksum()) as stream:
            batches = list(itertools.islice(stream, 6))
            assert all(fault.detail == "not for this transform" for batch in batches for fault in batch.faults)
            assert stream.fault_log.counts == {Reason.DAMAGED: sum(len(batch.faults) for batch in batches)}
        assert not any(index.samples["label"][s] % 3 == 1 for batch in batches for s in batch.samples)
        seen.append([(batch.samples, batch.targets["draw"].tolist()) for batch in batches])
    assert seen[0] == seen[1]
    assert len({draw for _, draws in seen[0] for draw in draws}) > 10


def test_resuming_on_other_data_or_seed_is_refused(shards: Path) -> None:
    index = open_index(shards)
    with pytest.raises(UsageError, match="seed=1"):
        Position(0, 0, index.fingerprint).require(1, index)
    with pytest.raises(UsageError, match="not those that the run was started with"):
        Position(0, 0, "other").require(0, index)


def holdings() -> tuple[set[str], int]:
    """This process's open files and children."""
    gc.collect()
    files = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            files.add(f"{link.name} {link.readlink()}")
    return files, len(multiprocessing.active_children())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks into Linux's /proc")
def test_a_stream_left_in_mid_epoch_leaves_nothing_behind(shards: Path) -> None:
    def use() -> list[int]:
        index = open_index(shards)
        with Stream(recipe_for(shards, 2), Ranks(), index, Position(0, 0, "")) as stream:
            kept = [next(stream) for _ in range(3)]
            workers = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
            assert len(workers) == 2
        del kept
        return workers

    use()  # what libraries open once
    before = holdings()
    workers = use()
    deadline = time.monotonic() + 60
    while len((after := holdings())[0]) > len(before[0]) and time.monotonic() < deadline:
        time.sleep(0.05)  # the threads that feed queues close their ends when they have noticed
    assert after[1] == before[1] == 0
    assert len(after[0]) <= len(before[0])
    assert not [file for pid in (os.getpid(), *workers) for file in Path("/dev/shm").glob(f"torch_{pid}_*")]


def test_a_killed_worker_is_noticed_and_named(shards: Path) -> None:
    index = open_index(shards)
    with Stream(recipe_for(shards, 2), Ranks(), index, Position(0, 0, "")) as stream:
        next(stream)
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(
            LostWorkerError, match=rf"rank 0: data worker process {victim} ended .*(Killed|exited unexpectedly)"
        ):
            list(itertools.islice(stream, 1000))


def test_batches_are_handed_over_whatever_becomes_of_temporary_files(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose name is too long for a socket, and one that is cleaned away."""
    for folder in (tmp_path / ("d" * 100), tmp_path / "gone"):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)  # type: ignore[attr-defined]
        with Stream(recipe_for(shards, 1), Ranks(), open_index(shards), Position(0, 0, "")) as stream:
            assert all(len(next(stream).images) for _ in range(3))


class Unpicklable(RandomResizedCropFlip):
    """Gives what cannot leave its process."""

    def new_batch(self, count: int) -> BatchBuffers:
        return BatchBuffers(super().new_batch(count).images, {"label": threading.Lock()})  # type: ignore[dict-item]

    def read(self, content: bytes, row: Any, random: Random, buffers: BatchBuffers, i: int) -> None:
        pass


class WithoutMemory(RandomResizedCropFlip):
    """Finds no shared memory."""

    def new_batch(self, count: int) -> BatchBuffers:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("kind", [Unpicklable, WithoutMemory])
def test_errors_of_handing_over_reach_the_main_process(shards: Path, kind: type[RandomResizedCropFlip]) -> None:
    recipe = recipe_for(shards, 1)
    transform = kind(64, recipe.data)
    with (
        Stream(recipe, Ranks(), open_index(shards), Position(0, 0, ""), transform=transform) as stream,
        pytest.raises(UsageError, match=r"could not hand over a batch .*/dev/shm"),
    ):
        next(stream)


def test_normalisation() -> None:
    recipe = tiny_recipe()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ToDevice(torch.device("cpu"), recipe.data.mean, recipe.data.std)(images), expected)


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Private_"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="looks into Linux's /proc")
def test_memory_of_workers_stays_flat(shards: Path) -> None:
    index = open_index(shards)
    held = []
    with Stream(recipe_for(shards, 1), Ranks(), index, Position(0, 0, "")) as stream:
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        for _ in range(5):
            for _ in range(8 * 27):  # 8 epochs
                next(stream)
            held.append(private_bytes(worker.pid))
    # The first ones also write to pages that the fork shares with this process, as many as it had free.
    assert max(held[2:]) - held[1] < 4 * 2**20, held


def test_each_byte_crosses_the_network_once_an_epoch(tmp_path: Path) -> None:
    """Two ranks with one cache that holds little more than the open windows; then a resume in mid-epoch."""
    build_shards(Synthetic(400, 72, seed=0), tmp_path / "shards", shard_bytes=120_000, seed=0, jobs=2)
    recipe = recipe_for(tmp_path / "shards", **{"data.streams": 4, "data.shuffle_window": 16})
    steps = 400 // 16
    local = open_index(tmp_path / "shards")
    total = sum(shard.bytes for shard in local.shards)
    block = 4096
    windows = 4 * (16 * total // 400 + 2 * block)

    def sent(first: int, last: int) -> int:
        """Bytes that the server sent for the global batches from `first` up to `last`."""
        with ExitStack() as stack:
            server = stack.enter_context(http_server(tmp_path))
            cache = Cache(dir=tmp_path / f"cache-{first}", max_bytes=3 * windows)
            streams = []
            for rank in range(2):
                store = RemoteStore(f"{server.url}/shards", Network(), cache, block_bytes=block)
                index, position = replace(local, store=store), Position(0, 16 * first, local.fingerprint)
                own = Stream(recipe, Ranks(rank, 2), index, position, transform=Undecoded(64, recipe.data))
                streams.append(stack.enter_context(own))
            for _ in range((last - first) * recipe.accumulation(2)):
                for own in streams:
                    next(own)
            return server.bytes_sent

    assert sent(0, steps) <= 1.05 * total
    assert sent(steps // 2, steps) <= total * (steps - steps // 2) / steps + windows


def test_what_a_pinning_thread_has_taken_is_ready_too(shards: Path) -> None:
    """As on a GPU, where a thread of torch empties the workers' queue at once and fills another."""
    index = open_index(shards)
    stream = Stream(recipe_for(shards), Ranks(), index, Position(0, 0, index.fingerprint))
    workers: queue.Queue[int] = queue.Queue()
    pinned: queue.Queue[int] = queue.Queue()
    for number in range(3):
        pinned.put(number)
    stream._batches = SimpleNamespace(_worker_result_queue=workers, _data_queue=pinned)
    assert stream.ready == 3
    stream.close()


@pytest.mark.gpu
def test_pinned_batches_that_nobody_took_are_ready(shards: Path) -> None:
    index = open_index(shards)
    with Stream(recipe_for(shards, workers=2), Ranks(), index, Position(0, 0, index.fingerprint)) as stream:
        assert next(stream).images.is_pinned()
        deadline = time.monotonic() + 30
        while not stream.ready and time.monotonic() < deadline:
            time.sleep(0.1)
        assert stream.ready


def test_a_pinning_thread_that_ends_is_a_lost_worker() -> None:
    """It dies with the worker whose batch it takes, and torch then names no worker."""
    lost = lost_worker_error(RuntimeError("Pin memory thread exited unexpectedly"), 3)
    assert lost is not None
    assert str(lost).startswith("rank 3: data worker process of a batch ended (Pin memory thread")


def test_a_gpu_copies_beside_its_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for its streams: which of them is current when images are copied, and who waits for whom."""
    told: list[object] = []
    computing = SimpleNamespace(wait_stream=lambda stream: told.append(("waits for", stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)

    @contextmanager
    def stream(copies: object) -> Iterator[None]:
        told.append("copies begin")
        yield
        told.append("copies end")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: told.append(("used by", stream)))
    to_device = ToDevice(torch.device("cpu"), [0.5] * 3, [0.5] * 3)
    to_device._copies = "copies"  # type: ignore[assignment]
    images = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    plain = ToDevice(torch.device("cpu"), [0.5] * 3, [0.5] * 3)(images)
    assert torch.equal(to_device(images), plain)
    assert told == ["copies begin", "copies end", ("waits for", "copies"), ("used by", computing)]


def test_a_gpu_has_a_stream_of_its_own_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"copies of {device}")
    with FakeTensorMode():
        on_gpu, on_cpu = (ToDevice(torch.device(name), [0.5] * 3, [0.5] * 3) for name in ("cuda:1", "cpu"))
    assert str(on_gpu._copies) == "copies of cuda:1"
    assert on_cpu._copies is None


def test_what_is_drawn_on_the_host_is_pinned_before_it_goes_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a copy of more than 64 KB from other memory the host may wait for all that the GPU has yet to do."""
    told: list[object] = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: told.append((device.type, non_blocking)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned)
    copy_to_device(torch.ones(3), torch.device("cuda"))
    assert told == [("cuda", True)]
    assert torch.equal(copy_to_device(torch.ones(3), torch.device("cpu")), torch.ones(3))
