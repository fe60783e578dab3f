"""Checkpoint faults: files are corrupted or deleted while no rank runs."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mixmae.base.exit_codes import FAILED
from mixmae.base.run_directory import NEWEST, checkpoint_history, complete_checkpoints
from mixmae.trainer.checkpoints.manifest import MANIFEST
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import fault
from tests.drill.target import pick_target, start_and_pick_target

_LATE_STEP = 16
"""By this step there are three checkpoints."""
Corruption = Callable[[Path, random.Random], str]
"""Corrupts a checkpoint; returns a description."""


def truncate(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    size = rng.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(size)
    return f"{file.name} cut to {size} bytes"


def flip_bit(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file.name} flipped"


def zero_block(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    content = bytearray(file.read_bytes())
    block = rng.randrange(len(content) // 4096)
    content[block * 4096 : (block + 1) * 4096] = bytes(4096)
    file.write_bytes(content)
    return f"block {block} of {file.name} zeroed"


def remove_file(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    file.unlink()
    return f"{file.name} removed"


def corrupt_manifest(checkpoint: Path, rng: random.Random) -> str:
    file = checkpoint / MANIFEST
    text = file.read_text()
    how = rng.choice(("emptied", "cut", "changed", "removed"))
    if how == "removed":
        file.unlink()
    elif how == "changed":
        file.write_text(json.dumps(json.loads(text) | {"step": 7}))
    else:
        file.write_text(text[: len(text) // 2] if how == "cut" else "")
    return f"{MANIFEST} {how}"


_CORRUPTIONS: Sequence[Corruption] = (truncate, flip_bit, zero_block, remove_file, corrupt_manifest)


def _any_file(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(checkpoint.glob("rank-*")))


def _kill_and_corrupt(drill: Drill, *corruptions: Corruption) -> None:
    """Kills all ranks, corrupts one of the newest checkpoints by each corruption, and expects a fallback.

    A kill may come between a checkpoint's publication and that of its name in `newest`: it would not be resumed from.
    """
    _kill_all(drill)
    for corrupt, checkpoint in zip(corruptions, checkpoint_history(drill.run.folder), strict=False):
        description = corrupt(checkpoint, drill.rng)
        drill.injected += f", {description} of {checkpoint.name}"
    drill.finish()
    require_fallback_logged(drill, "is damaged and was quarantined")


@fault("local", "hostfile", "slurm")
def truncated_file(drill: Drill) -> None:
    """A file of the newest checkpoint is cut short"""
    _kill_and_corrupt(drill, truncate)


@fault("local", "hostfile", "slurm")
def flipped_bit(drill: Drill) -> None:
    """A bit of the newest checkpoint flips"""
    _kill_and_corrupt(drill, flip_bit)


@fault("local")
def zeroed_block(drill: Drill) -> None:
    """A block of the newest checkpoint reads as zeros"""
    _kill_and_corrupt(drill, zero_block)


@fault("local", "hostfile", "slurm")
def missing_file(drill: Drill) -> None:
    """A file of the newest checkpoint is gone"""
    _kill_and_corrupt(drill, remove_file)


@fault("local", "hostfile", "slurm")
def damaged_manifest(drill: Drill) -> None:
    """The manifest of the newest checkpoint is damaged or gone"""
    _kill_and_corrupt(drill, corrupt_manifest)


@fault("local", "slurm")
def two_damaged(drill: Drill) -> None:
    """The two newest checkpoints are damaged"""
    _kill_and_corrupt(drill, *drill.rng.sample(_CORRUPTIONS, 2))


@fault("local", "hostfile")
def all_damaged(drill: Drill) -> None:
    """All checkpoints are damaged; one is restored from a copy when the run refuses to start over"""
    drill.start()
    target = pick_target(drill, _LATE_STEP)
    drill.inject(f"all ranks killed after step {target.step}", target.kill_all_ranks)
    drill.expect_exit([FAILED])
    checkpoints = complete_checkpoints(drill.run.folder)
    copy = drill.run.folder.with_suffix(".copy")
    shutil.copytree(checkpoints[-1], copy)
    for checkpoint in checkpoints:
        drill.injected += f", {flip_bit(checkpoint, drill.rng)} of {checkpoint.name}"
    for _ in range(2):  # the first start quarantines them, the second finds none
        drill.start()
        drill.expect_exit([FAILED], "is intact", "name another run_dir to start from the beginning")
    copy.rename(checkpoints[-1])
    drill.start()
    drill.finish(user_restarts=0)


@fault("local", "hostfile", "slurm")
def lost_pointer(drill: Drill) -> None:
    """`newest` is gone, empty, or names a checkpoint that is not there"""
    _kill_all(drill)
    how, pointer = drill.rng.choice(("removed", "emptied", "wrong")), drill.run.checkpoints / NEWEST
    if how == "removed":
        pointer.unlink()
    else:
        pointer.write_text("" if how == "emptied" else "step-00000999\n")
    drill.injected += f", `{NEWEST}` {how}"
    drill.finish()
    require_fallback_logged(drill, "names no existing checkpoint")


@fault("local")
def lost_newest(drill: Drill) -> None:
    """The newest checkpoint is gone altogether"""
    _kill_all(drill)
    newest = complete_checkpoints(drill.run.folder)[-1]
    shutil.rmtree(newest)
    drill.injected += f", {newest.name} removed"
    drill.finish()
    require_fallback_logged(drill, "names no existing checkpoint")


def require_fallback_logged(drill: Drill, reason: str) -> None:
    """Expects a fallback event with this reason."""
    messages = [record["message"] for record in drill.events_of_kind("fallback")]
    if not any(reason in message for message in messages):
        raise DrillError(f"no fallback event with {reason!r} in events.jsonl: {messages}")


def _kill_all(drill: Drill) -> None:
    """Kills all ranks, late enough for three checkpoints."""
    target = start_and_pick_target(drill, _LATE_STEP)
    drill.inject(f"all ranks killed after step {target.step}", target.kill_all_ranks)
