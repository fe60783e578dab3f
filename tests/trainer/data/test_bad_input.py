"""What is wrong with real data, kind by kind: replaced, counted, named once, and never the end of a run below
the share.

Every directory holds 39 good images and one that is not: five global batches of 8 are an epoch.
"""

import io
import itertools
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from mixmae.base.errors import UsageError
from mixmae.trainer.data.faults import Reason, TooManyFaultsError
from mixmae.trainer.data.index import ShardIndex
from mixmae.trainer.data.integrity import require_labels, require_usable
from mixmae.trainer.data.open_index import open_index
from mixmae.trainer.data.shards.indexing import write_index
from mixmae.trainer.data.stream import Position, Stream
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from tests.helpers import png_file, run_ranks, tiny_recipe
from tests.trainer.data.servers import Fault, HttpServer, http_server

GOOD = 39
Members = list[tuple[str, bytes]]


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (90, 70)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, quality=90)
    return buffer.getvalue()


def write_tar(file: Path, members: Members) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def good(first: int, count: int) -> Members:
    return [m for n in range(first, first + count) for m in ((f"{n:03d}.jpg", picture(n)), (f"{n:03d}.cls", b"1"))]


def directory(folder: Path, bad: Members, classes: int = 3) -> Path:
    """Two shards; the bad sample stands in the middle of the second one."""
    folder.mkdir()
    write_tar(folder / "a.tar", good(0, 20))
    write_tar(folder / "b.tar", [*good(20, 10), *bad, *good(30, 9)])
    write_index(folder, [f"class {n}" for n in range(classes)])
    return folder


def recipe_for(shards: Path | str, share: float = 0.1, workers: int = 0) -> Recipe:
    changes = {"data.shards": str(shards), "data.num_workers": workers, "data.max_corrupt_fraction": share}
    return tiny_recipe(**{**changes, "data.network": {"timeout": 1.0, "retries": 2}})


class Outcome(NamedTuple):
    """What two epochs of a stream showed and recorded."""

    shown: list[int]
    counts: dict[Reason, int]
    named: list[str]
    retried: int


def stream_two_epochs(index: ShardIndex, tmp_path: Path, workers: int = 0) -> Outcome:
    record = tmp_path / "replaced.jsonl"
    recipe = recipe_for(index.store.location, workers=workers)
    require_usable(index, recipe.data.max_corrupt_fraction)
    shown = []
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint), record) as stream:
        for batch in itertools.islice(stream, 2 * len(index) // recipe.train.micro_batch):
            assert batch.images.shape[0] == recipe.train.micro_batch == len(batch.samples)
            shown += batch.samples
        named = [json.loads(line)["sample"] for line in record.read_text().splitlines()] if record.exists() else []
        return Outcome(shown, dict(stream.fault_log.counts), named, stream.retried)


def jpeg_saying(height: int, width: int) -> bytes:
    content = bytearray(picture(99))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def flipped(content: bytes, at: float) -> bytes:
    changed = bytearray(content)
    place = int(len(content) * at)
    changed[place : place + 40] = bytes(b ^ 0x5A for b in changed[place : place + 40])
    return bytes(changed)


WRONG_IN_THE_SHARD: dict[str, tuple[Members, Reason]] = {
    "empty image": ([("x.jpg", b""), ("x.cls", b"1")], Reason.EMPTY),
    "label without an image": ([("x.cls", b"1")], Reason.MISSING),
    "text in place of an image": ([("x.jpg", b"hello"), ("x.cls", b"1")], Reason.NOT_AN_IMAGE),
    "a server's error page": ([("x.png", b"<html><body>404</body></html>")], Reason.NOT_AN_IMAGE),
    "jpeg cut in the middle": ([("x.jpg", picture(99)[:900])], Reason.DAMAGED),
    "jpeg cut in its header": ([("x.jpg", picture(99)[:60])], Reason.DAMAGED),
    "jpeg with damaged tables": ([("x.jpg", flipped(picture(99), 0.1))], Reason.DAMAGED),
    "jpeg of nothing but its start": ([("x.jpg", b"\xff\xd8\xff")], Reason.DAMAGED),
    "png cut in the middle": ([("x.png", picture(99, "PNG")[:2000])], Reason.DAMAGED),
    "png with flipped bytes": ([("x.png", flipped(picture(99, "PNG"), 0.5))], Reason.DAMAGED),
    "webp cut in the middle": ([("x.webp", picture(99, "WEBP")[:300])], Reason.DAMAGED),
    "png that unpacks to gigapixels": ([("x.png", png_file(60_000, 60_000, 8, b"\0" * 100))], Reason.TOO_LARGE),
    "jpeg that claims gigapixels": ([("x.jpg", jpeg_saying(60_000, 60_000))], Reason.TOO_LARGE),
}


@pytest.mark.parametrize("kind", WRONG_IN_THE_SHARD)
def test_wrong_in_the_shard(kind: str, tmp_path: Path) -> None:
    members, reason = WRONG_IN_THE_SHARD[kind]
    index = open_index(directory(tmp_path / "shards", members))
    bad = 30
    assert len(index) == GOOD + 1
    assert index.samples["state"][bad] == reason
    outcome = stream_two_epochs(index, tmp_path)
    assert set(outcome.shown) == set(range(GOOD + 1)) - {bad}
    assert outcome.counts == {reason: 2}
    assert outcome.named == [index.name_of(bad)]


def overwrite(index: ShardIndex, sample: int, content: bytes) -> None:
    row = index.samples[sample]
    assert index.store.directory is not None
    with (index.store.directory / index.shards[row["shard"]].name).open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(content)


def flip_a_payload_byte(index: ShardIndex, shards: Path) -> None:
    overwrite(index, 30, b"\xff\xd8\xfe")


def swap_a_payload(index: ShardIndex, shards: Path) -> None:
    """Another whole image: nothing but a checksum can tell."""
    size = int(index.samples[30]["size"])
    overwrite(index, 30, picture(99, size=(40, 30)).ljust(size, b"\0")[:size])


def cut_a_shard(index: ShardIndex, shards: Path) -> None:
    with (shards / "b.tar").open("r+b") as file:
        file.truncate(int(index.samples[39]["offset"]) + 100)


@pytest.mark.parametrize(
    ("damage", "bad", "reason"),
    [
        (flip_a_payload_byte, 30, Reason.CHANGED),
        (swap_a_payload, 30, Reason.CHANGED),
        (cut_a_shard, 39, Reason.SHARD_CUT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_since_it_was_indexed(
    damage: Callable[[ShardIndex, Path], None], bad: int, reason: Reason, tmp_path: Path
) -> None:
    index = open_index(directory(tmp_path / "shards", [("x.jpg", picture(99))]))
    damage(index, tmp_path / "shards")
    # The size of a cut shard is seen before the run: half of the samples may be concerned.
    outcome = _stream_admitting(index, tmp_path, 0.9)
    assert bad not in outcome.shown
    assert outcome.counts == {reason: 2}
    assert len(outcome.named) == 1


def _stream_admitting(index: ShardIndex, tmp_path: Path, share: float) -> Outcome:
    record = tmp_path / "replaced.jsonl"
    recipe = recipe_for(index.store.location, share)
    require_usable(index, share)
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint), record) as stream:
        shown = [s for b in itertools.islice(stream, len(index)) for s in b.samples]
        named = [json.loads(line)["sample"] for line in record.read_text().splitlines()]
        return Outcome(shown, dict(stream.fault_log.counts), named, stream.retried)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_disappears_in_mid_run(workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(20):
        write_tar(folder / f"{number:02d}.tar", good(2 * number, 2))
    index = write_index(folder)
    recipe = recipe_for(folder, share=0.1, workers=workers)
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)) as stream:
        first = next(stream)
        (folder / "07.tar").unlink()
        shown = [s for b in itertools.islice(stream, 60) for s in b.samples]
        counts = dict(stream.fault_log.counts)
    gone = {14, 15} - set(first.samples)
    # A descriptor that is still open reads what was removed: only those that open the shard later miss it.
    assert set(counts) <= {Reason.SHARD_GONE}
    assert counts or gone <= set(shown)


def test_a_missing_shard_below_the_share_is_said_and_stepped_over(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(20):
        write_tar(folder / f"{number:02d}.tar", good(2 * number, 2))
    index = write_index(folder)
    (folder / "07.tar").unlink()
    assert "2 of 40 samples" in str(require_usable(index, 0.1))
    assert "07.tar (missing)" in str(require_usable(index, 0.1))
    outcome = stream_two_epochs(index, tmp_path)
    assert not {14, 15} & set(outcome.shown)
    assert outcome.counts == {Reason.SHARD_GONE: 4}
    with pytest.raises(
        UsageError, match=r"2 of 40 samples.*07\.tar \(missing\); more than data.max_corrupt_fraction=0.04"
    ):
        require_usable(index, 0.04)


def stream_from(server: HttpServer, tmp_path: Path, retries: int) -> tuple[ShardIndex, Recipe]:
    directory(tmp_path / "shards", [("x.jpg", picture(99))])
    network = {"timeout": 3.0, "retries": retries}
    cache = {"dir": str(tmp_path / "cache")}
    recipe = tiny_recipe(
        **{
            "data.shards": f"{server.url}/shards",
            "data.max_corrupt_fraction": 0.1,
            "data.network": network,
            "data.cache": cache,
        }
    )
    return open_index(recipe.data.shards, recipe.data.network, recipe.data.cache), recipe


def consume(index: ShardIndex, recipe: Recipe) -> Outcome:
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)) as stream:
        shown = [s for b in itertools.islice(stream, len(index)) for s in b.samples]
        return Outcome(shown, dict(stream.fault_log.counts), [], stream.retried)


def _attempts(fault: Fault) -> int:
    """Requests that fail before a read does: aiohttp repeats one on a connection that was reset, unasked."""
    return 2 if fault == "reset" else 1


@pytest.mark.parametrize("fault", ["stall", "503", "reset", "cut"])
def test_a_network_that_recovers_costs_nothing_but_a_retry(fault: Fault, tmp_path: Path) -> None:
    with http_server(tmp_path) as server:
        index, recipe = stream_from(server, tmp_path, retries=2)
        server.stall = 6.0
        server.fail(*[fault] * _attempts(fault))
        outcome = consume(index, recipe)
    assert (outcome.counts, outcome.retried) == ({}, 1)
    assert set(outcome.shown) == set(range(GOOD + 1))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("stall", Reason.STALLED),
        ("503", Reason.UNREADABLE),
        ("reset", Reason.UNREADABLE),
        ("cut", Reason.UNREADABLE),
        ("403", Reason.UNREADABLE),
        ("404", Reason.SHARD_GONE),
    ],
)
def test_a_network_that_fails_costs_the_sample(fault: Fault, reason: Reason, tmp_path: Path) -> None:
    with http_server(tmp_path) as server:
        index, recipe = stream_from(server, tmp_path, retries=0)
        server.stall = 6.0
        server.fail(*[fault] * _attempts(fault))
        outcome = consume(index, recipe)
    assert outcome.counts == {reason: 1}
    assert len(outcome.shown) == 2 * len(index)


def test_a_damaged_cache_is_fetched_anew(tmp_path: Path) -> None:
    with http_server(tmp_path) as server:
        index, recipe = stream_from(server, tmp_path, retries=0)
        consume(index, recipe)
        blocks = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 1000]
        assert blocks
        for block in blocks:
            block.write_bytes(b"\0" * block.stat().st_size)
        again = open_index(recipe.data.shards, recipe.data.network, recipe.data.cache)
        outcome = consume(again, recipe)
    assert outcome.counts == {}
    assert set(outcome.shown) == set(range(GOOD + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_share_the_run_stops_and_says_which_shards(workers: int, tmp_path: Path) -> None:
    index = open_index(directory(tmp_path / "shards", []))
    for sample in range(20, 30):
        overwrite(index, sample, b"\0" * 100)
    recipe = recipe_for(tmp_path / "shards", share=0.05, workers=workers)
    with (
        Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)) as stream,
        pytest.raises(TooManyFaultsError, match=r"2 samples of epoch 0 .*2 changed.*1\.95 that .*shards: b\.tar \(2\)"),
    ):
        list(itertools.islice(stream, 100))


def test_a_directory_above_the_share_is_refused_before_the_run(tmp_path: Path) -> None:
    bad = [(f"x{n}.jpg", b"") for n in range(4)] + [("y.jpg", b"text")]
    index = open_index(directory(tmp_path / "shards", bad))
    with pytest.raises(UsageError, match=r"5 of 44 samples.*4 empty, 1 not an image when indexed; more than"):
        require_usable(index, 0.1)
    assert "they will be replaced by other samples" in str(require_usable(index, 0.2))


def test_what_replaces_a_sample_is_the_same_on_every_machine(tmp_path: Path) -> None:
    index = open_index(directory(tmp_path / "shards", [("x.jpg", b"")]))
    outcomes = [stream_two_epochs(index, tmp_path, workers).shown for workers in (0, 1, 3)]
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("kind", ["gif", "bmp"])
def test_another_format_under_a_wrong_name_is_decoded_for_what_it_is(kind: str, tmp_path: Path) -> None:
    index = open_index(directory(tmp_path / "shards", [("x.jpg", picture(99, kind.upper()))]))
    outcome = stream_two_epochs(index, tmp_path)
    assert (outcome.counts, set(outcome.shown)) == ({}, set(range(GOOD + 1)))


def test_shell_commands_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allow_shell"):
        open_index(f"pipe:touch {tmp_path}/ran; cat {{}}")
    shards = directory(tmp_path / "shards", [])
    np.save(shards / "samples.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match=r"damaged.*[Oo]bject"):
        open_index(shards)
    assert not (tmp_path / "ran").exists()


def test_faults_are_counted_in_their_own_epoch(tmp_path: Path) -> None:
    """Of 40 images one is bad, in a global batch of 80: streams are two epochs apart, and 5 % would be two."""
    index = open_index(directory(tmp_path / "shards", [("x.jpg", b"")]))
    changes = {"train.global_batch": 80, "train.micro_batch": 8, "data.max_corrupt_fraction": 0.05}
    recipe = tiny_recipe(**{"data.shards": str(tmp_path / "shards"), **changes})
    with Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint)) as stream:
        for _ in range(30):  # six epochs
            next(stream)
        assert stream.fault_log.counts == {Reason.EMPTY: 6}


def test_the_share_is_that_of_all_ranks(tmp_path: Path) -> None:
    """One shard of twelve is gone, and one rank of eight serves most of it: still less than the share."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(12):
        write_tar(folder / f"{number:02d}.tar", good(10 * number, 10))
    index = write_index(folder)
    (folder / "03.tar").unlink()
    assert require_usable(index, 0.1)
    recipe = recipe_for(folder, share=0.1)
    shown = 0
    for rank in range(4):
        with Stream(recipe, Ranks(rank, 4), open_index(folder), Position(0, 0, index.fingerprint)) as stream:
            shown += sum(len(next(stream).samples) for _ in range(15))
    assert shown == 120


def lose_a_shard(ranks: Ranks, recipe: Recipe, victim: str) -> str:
    """Trains; after the first step a tenth of the data turns bad. Returns how the run ended."""
    run = prepare(check(recipe, ranks), ranks)
    with Path(victim).open("r+b") as file:
        for row in run.index.samples[run.index.samples["shard"] == 1]:
            file.seek(int(row["offset"]))
            file.write(b"\0" * 64)
    try:
        fit(run)
        return "finished"
    except TooManyFaultsError as error:
        return str(error)
    finally:
        close(run, clean=True)


@pytest.mark.distributed
def test_ranks_stop_together_when_they_together_met_too_much(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(5):
        write_tar(folder / f"{number}.tar", good(16 * number, 16))
    write_index(folder)
    changes = {"data.shards": str(folder), "run_dir": str(tmp_path / "run"), "data.max_corrupt_fraction": 0.15}
    recipe = tiny_recipe(**{**changes, "train.duration": "12 steps", "monitoring.enabled": False})
    ends = run_ranks(lose_a_shard, 2, recipe, str(folder / "1.tar"))
    assert all("of epoch 0 could not be used" in end and "shards: 1.tar" in end for end in ends), ends


def test_an_outage_ends_a_run_and_does_not_hang_it(tmp_path: Path) -> None:
    with http_server(tmp_path) as server:
        index, recipe = stream_from(server, tmp_path, retries=1)
        server.always = "503"
        stream = Stream(recipe, Ranks(), index, Position(0, 0, ""))
        with stream, pytest.raises(TooManyFaultsError, match="nothing that could have replaced"):
            next(stream)
        assert len(server.requests) < 20


def test_names_are_written_once_over_all_starts(tmp_path: Path) -> None:
    index = open_index(directory(tmp_path / "shards", [("x.jpg", b"")]))
    stream_two_epochs(index, tmp_path)
    assert stream_two_epochs(open_index(tmp_path / "shards"), tmp_path).named == ["b.tar: x.jpg"]


def test_an_index_whose_parts_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    one, other = (directory(tmp_path / name, [("x.jpg", picture(seed))]) for name, seed in (("one", 1), ("two", 2)))
    (other / "samples.npy").replace(one / "samples.npy")
    with pytest.raises(UsageError, match="do not belong together"):
        open_index(one)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (b"", r"finetuning needs a label .* of 40 usable ones in .* 1 unlabelled: b\.tar: x\.jpg; label them"),
        (b"7", r"1 with a label that is no class: b\.tar: x\.jpg"),
        (b"class 2", None),
    ],
)
def test_a_task_that_needs_labels_says_what_is_missing(label: bytes, message: str | None, tmp_path: Path) -> None:
    index = open_index(directory(tmp_path / "shards", [("x.jpg", picture(99)), ("x.cls", label)]))
    assert require_usable(index, 0.0) is None
    if message is None:
        assert require_labels(index, "finetuning") == 3
    else:
        with pytest.raises(UsageError, match=message):
            require_labels(index, "finetuning")


@pytest.mark.parametrize("workers", [0, 1])
def test_want_of_memory_ends_a_run_and_blames_no_image(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(directory(tmp_path / "shards", []))
    record = tmp_path / "replaced.jsonl"

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    recipe = recipe_for(index.store.location, workers=workers)
    with (
        Stream(recipe, Ranks(), index, Position(0, 0, index.fingerprint), record) as stream,
        pytest.raises(UsageError, match=r"ran out of memory .* lower --jobs or data\.num_workers"),
    ):
        next(stream)
    assert not record.exists()
