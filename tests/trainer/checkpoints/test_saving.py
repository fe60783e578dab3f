"""Saves while training goes on; damaged checkpoints are skipped, and failed saves cost no other (two ranks)."""

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixmae.base.errors import UsageError
from mixmae.base.run_directory import CHECKPOINTS, complete_checkpoints
from mixmae.trainer.checkpoints.claim import Claim
from mixmae.trainer.checkpoints.manifest import MANIFEST, Manifest
from mixmae.trainer.checkpoints.resume import NoIntactCheckpointError
from mixmae.trainer.checkpoints.saver import Saver
from mixmae.trainer.checkpoints.weights import master_weights, optimizer_states
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.recipe.schema import Recipe
from mixmae.trainer.run import saving
from mixmae.trainer.run.checking import check
from mixmae.trainer.run.context import Run
from mixmae.trainer.run.ending import close
from mixmae.trainer.run.loop import fit
from mixmae.trainer.run.preparing import prepare
from mixmae.trainer.run.saving import SaveError
from mixmae.trainer.run.train_step import train_step
from mixmae.trainer.telemetry.events import read_events
from tests.helpers import run_ranks, tiny_recipe

pytestmark = pytest.mark.distributed


def recipe_for(shards: Path, run_dir: Path, **changes: Any) -> Recipe:
    return tiny_recipe(
        **{
            "data.shards": str(shards),
            "run_dir": str(run_dir),
            "train.duration": "12 steps",
            "checkpoint.every": "4 steps",
            "monitoring.enabled": False,
            **changes,
        }
    )


def fit_to_message(run: Run) -> str:
    """Trains to the end; returns the message of what ended it earlier, if anything did."""
    try:
        fit(run)
    except SaveError as error:
        return str(error)
    return ""


def train(ranks: Ranks, recipe: Recipe) -> str:
    """Trains to the end; returns the message of what ended it earlier, if anything did."""
    try:
        run = prepare(check(recipe, ranks), ranks)
    except NoIntactCheckpointError as error:
        return str(error)
    message = fit_to_message(run)
    close(run, clean=True)
    return message


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run_ranks(train, 2, recipe_for(shards, run_dir)) == ["", ""]
    return run_dir


def same_end(a: Path, b: Path) -> bool:
    return same_content(complete_checkpoints(a)[-1], complete_checkpoints(b)[-1])


def same_content(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights and moments."""
    contents = [[master_weights(folder), *optimizer_states(folder).values()] for folder in (a, b)]
    assert [len(content) for content in contents] == [3, 3]
    return all(torch.equal(value, y[name]) for x, y in zip(*contents, strict=True) for name, value in x.items())


def flip(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose(checkpoint: Path) -> None:
    (checkpoint / "rank-00001.safetensors").unlink()


def empty(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text("")


FAULTS: dict[Callable[[Path], None], str] = {
    flip: "rank-00001.safetensors does not match its checksum",
    cut: "rank-00000.safetensors has",
    lose: "rank-00001.safetensors is missing",
    empty: "manifest.json cannot be read",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_skipped(
    whole: Path, shards: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shutil.rmtree(complete_checkpoints(copy)[-1])
    (copy / CHECKPOINTS / "newest").write_text("step-00000008\n")
    damage(complete_checkpoints(copy)[-1])
    assert run_ranks(train, 2, recipe_for(shards, copy)) == ["", ""]
    (note,) = read_events(copy, "fallback")
    assert "step-00000008 is damaged and was quarantined: " + FAULTS[damage] in note["message"]
    assert note["step"] == 4
    assert (copy / CHECKPOINTS / "damaged-step-00000008").is_dir()
    assert same_end(whole, copy)


def test_a_run_never_starts_over_where_nothing_is_intact(whole: Path, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for checkpoint in complete_checkpoints(copy):
        flip(checkpoint)
    with pytest.raises(UsageError, match="is damaged: rank-00001"):
        master_weights(complete_checkpoints(copy)[-1])
    for message in run_ranks(train, 2, recipe_for(shards, copy)):
        assert "is intact: step-00000012 is damaged and was quarantined" in message
        assert "name another run_dir to start from the beginning" in message
    for message in run_ranks(train, 2, recipe_for(shards, copy)):  # nor when it is tried again, as by --max-restarts
        assert "is intact: found only damaged-step-00000004, damaged-step-00000008, damaged-step-00000012" in message


def test_a_run_never_starts_over_where_its_checkpoints_are_gone(whole: Path, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    for checkpoint in complete_checkpoints(copy):
        shutil.rmtree(checkpoint)
    for message in run_ranks(train, 2, recipe_for(shards, copy)):
        assert "is intact: found only newest; restore one from a copy" in message


def hold_writes(ranks: Ranks, recipe: Recipe) -> list[str]:
    """Trains on while a save is held up until two steps later; returns what happened in which order."""
    run = prepare(check(recipe, ranks), ranks)
    order = []
    let_go = threading.Event()
    write = Saver._write_own

    def held(self: Saver, folder: Path, tensors: Any) -> Any:
        let_go.wait()
        order.append("written")
        return write(self, folder, tensors)

    Saver._write_own = held  # type: ignore[method-assign]
    for _ in range(4):
        train_step(run)
        run.state.advance(8, applied=True)
        order.append("step")
        if run.state.step == 2:
            saving.save(run)
    assert run.saver.poll() is None
    let_go.set()
    run.saver.wait()
    assert (run.saver.poll() is not None) == ranks.is_main
    close(run, clean=True)
    return order


def test_training_goes_on_while_a_save_is_written(shards: Path, tmp_path: Path) -> None:
    held, plain = recipe_for(shards, tmp_path / "held"), recipe_for(shards, tmp_path / "plain")
    for order in run_ranks(hold_writes, 2, held):
        assert order == ["step"] * 4 + ["written"]
    changed = {"checkpoint.every": "2 steps", "checkpoint.keep": 9, "checkpoint.asynchronous": False}
    run_ranks(train, 2, recipe_for(shards, tmp_path / "plain", **changed))
    assert same_content(complete_checkpoints(held.run_dir)[0], complete_checkpoints(plain.run_dir)[0])


def memory_of_saves(ranks: Ranks, recipe: Recipe) -> list[int]:
    """Where the copies are before the first save and after each of three, and how many bytes that is."""
    run = prepare(check(recipe, ranks), ranks)
    run.saver.wait()
    memory = run.saver._memory
    held = [memory._memory]
    for _ in range(3):
        train_step(run)
        run.state.advance(8, applied=True)
        saving.save(run)
        run.saver.wait()
        held.append(memory._memory)
    close(run, clean=True)
    assert len({tensor.data_ptr() for tensor in held}) == 1
    return [tensor.numel() for tensor in held]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saves_find_their_memory_ready(shards: Path, tmp_path: Path, stage: int) -> None:
    precision = "bf16" if stage == 3 else "fp32"
    recipe = recipe_for(shards, tmp_path / "run", **{"train.zero_stage": stage, "train.precision": precision})
    for sizes in run_ranks(memory_of_saves, 2, recipe):
        assert set(sizes) == {sizes[0]}
        assert sizes[0] > 0


def test_saves_that_training_waits_for_take_no_memory(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run", **{"checkpoint.asynchronous": False})
    assert run_ranks(memory_of_saves, 2, recipe) == [[0] * 4] * 2
    for saved in read_events(recipe.run_dir, "checkpoint"):
        assert saved["stall_seconds"] == saved["seconds"] > 0


def train_beside_a_reader(ranks: Ranks, recipe: Recipe) -> str:
    """As `train`, but no old checkpoint can be removed, as on NFS while somebody reads it."""

    remove = shutil.rmtree

    def busy(folder: Path, **options: Any) -> None:
        if folder.name.endswith("-removed"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
        remove(folder, **options)

    shutil.rmtree = busy  # type: ignore[assignment]
    return train(ranks, recipe)


def test_an_old_checkpoint_that_stays_costs_no_new_one(shards: Path, tmp_path: Path) -> None:
    settings = {"checkpoint.keep": 1, "checkpoint.max_failures": 0}
    recipe = recipe_for(shards, tmp_path / "run", **settings)
    assert run_ranks(train_beside_a_reader, 2, recipe) == ["", ""]
    assert [event["step"] for event in read_events(recipe.run_dir, "checkpoint")] == [4, 8, 12]
    assert not list(read_events(recipe.run_dir, "checkpoint_failed"))
    kept = list(read_events(recipe.run_dir, "checkpoint_kept"))
    assert [event["step"] for event in kept] == [8, 12]
    assert "could not be removed: Directory not empty" in kept[0]["message"]
    assert [folder.name for folder in complete_checkpoints(recipe.run_dir)] == ["step-00000012"]


def train_with_a_full_disk(ranks: Ranks, recipe: Recipe, from_step: int, until_step: int) -> str:
    """As `train`, but files cannot grow for some steps: the system refuses, as it does on a full disk."""
    run = prepare(check(recipe, ranks), ranks)
    fetch = run.to_device

    def limited(images: Any) -> Any:
        full = ranks.rank == 1 and from_step <= run.state.step < until_step
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return fetch(images)

    run.to_device = limited  # type: ignore[assignment]
    message = fit_to_message(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    close(run, clean=True)
    return message


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole: Path, shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run", **{"checkpoint.asynchronous": False})
    assert run_ranks(train_with_a_full_disk, 2, recipe, 7, 8) == ["", ""]
    (failed,) = read_events(recipe.run_dir, "checkpoint_failed")
    assert "rank 1: File too large" in failed["message"]
    assert [folder.name for folder in complete_checkpoints(recipe.run_dir)] == ["step-00000004", "step-00000012"]
    assert not list((recipe.run_dir / CHECKPOINTS).glob("partial-*"))
    assert same_end(whole, recipe.run_dir)


def train_on_a_bad_disk(ranks: Ranks, recipe: Recipe, bad: int) -> str:
    """As `train`, but what one rank wrote first does not get to its disk."""
    sync = os.fsync
    broken = iter([ranks.rank == bad])

    def fails_once(descriptor: int) -> None:
        if next(broken, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    run = prepare(check(recipe, ranks), ranks)
    os.fsync = fails_once  # type: ignore[assignment]
    fit(run)
    close(run, clean=True)
    return run.saver.error or ""


@pytest.mark.parametrize("bad", [0, 1])
def test_an_input_output_error_costs_a_checkpoint_and_not_the_run(
    whole: Path, shards: Path, tmp_path: Path, bad: int
) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    assert run_ranks(train_on_a_bad_disk, 2, recipe, bad) == ["", ""]
    (failed,) = read_events(recipe.run_dir, "checkpoint_failed")
    assert failed["step"] == 4
    assert f"rank {bad}: Input/output error" in failed["message"]
    assert [folder.name for folder in complete_checkpoints(recipe.run_dir)] == ["step-00000008", "step-00000012"]
    assert same_end(whole, recipe.run_dir)


def train_with_a_broken_claim(ranks: Ranks, recipe: Recipe) -> str:
    """As `train`, but the file that says who has the run is of no use any more."""
    run = prepare(check(recipe, ranks), ranks)
    if ranks.is_main:
        (recipe.run_dir / "claimed.json").write_text("")
    message = fit_to_message(run)
    close(run, clean=True)
    return message


def test_whatever_ends_a_save_is_reported(shards: Path, tmp_path: Path) -> None:
    """Also what nobody thought of, in a thread that nobody waits for: no run ends as if all were saved."""
    recipe = recipe_for(shards, tmp_path / "run")
    for message in run_ranks(train_with_a_broken_claim, 2, recipe):
        assert "3 saves in a row failed, the last with rank 0: JSONDecodeError(" in message
    assert complete_checkpoints(recipe.run_dir) == []


def test_too_many_failed_saves_end_the_run(shards: Path, tmp_path: Path) -> None:
    settings = {"checkpoint.max_failures": 1, "checkpoint.every": "2 steps", "checkpoint.asynchronous": False}
    recipe = recipe_for(shards, tmp_path / "run", **settings)
    messages = run_ranks(train_with_a_full_disk, 2, recipe, 3, 99)
    assert messages[0] == messages[1]
    assert "the run ends at step 7: 2 saves in a row failed, the last with rank 1: File too large" in messages[0]
    assert "make room" in messages[0]
    assert [folder.name for folder in complete_checkpoints(recipe.run_dir)] == ["step-00000002"]


def train_twice_at_once(ranks: Ranks, recipe: Recipe) -> str:
    """As `train`, but in mid-run another start takes the run directory over."""
    run = prepare(check(recipe, ranks), ranks)
    fetch = run.to_device

    def interfere(images: Any) -> Any:
        if ranks.is_main and run.state.step == 5:
            Claim.take(recipe.run_dir)
        return fetch(images)

    run.to_device = interfere  # type: ignore[assignment]
    message = fit_to_message(run)
    close(run, clean=True)
    return message


def test_an_earlier_start_leaves_the_run_to_a_later_one(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run", **{"checkpoint.asynchronous": False})
    for message in run_ranks(train_twice_at_once, 2, recipe):
        assert message.startswith("the run ends at step 9: the run was started again on ")
    assert [folder.name for folder in complete_checkpoints(recipe.run_dir)] == ["step-00000004"]
    assert not list((recipe.run_dir / CHECKPOINTS).glob("partial-*"))


def test_the_last_save_must_succeed(shards: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shards, tmp_path / "run")
    for message in run_ranks(train_with_a_full_disk, 2, recipe, 11, 99):
        assert "the run ends at step 12: 1 saves in a row failed" in message
    assert Manifest.read(complete_checkpoints(recipe.run_dir)[-1]).step == 8
