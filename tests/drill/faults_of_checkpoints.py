"""Faults: checkpoints are damaged while no rank runs, as storage does it or people do."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mixmae.base.exit_codes import FAILED
from mixmae.base.run_directory import NEWEST, complete_checkpoints
from mixmae.trainer.checkpoints.manifest import MANIFEST
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import fault
from tests.drill.target import run_to_a_step, seen_at_a_step

_LATE = 16
"""By this step there are three checkpoints."""
Damage = Callable[[Path, random.Random], str]


def cut_short(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    size = rng.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(size)
    return f"{file.name} cut to {size} bytes"


def flip_a_bit(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    content = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file.name} flipped"


def zero_a_block(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    content = bytearray(file.read_bytes())
    block = rng.randrange(len(content) // 4096)
    content[block * 4096 : (block + 1) * 4096] = bytes(4096)
    file.write_bytes(content)
    return f"block {block} of {file.name} zeroed"


def lose_a_file(checkpoint: Path, rng: random.Random) -> str:
    file = _any_file(checkpoint, rng)
    file.unlink()
    return f"{file.name} removed"


def damage_manifest(checkpoint: Path, rng: random.Random) -> str:
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


_DAMAGES: Sequence[Damage] = (cut_short, flip_a_bit, zero_a_block, lose_a_file, damage_manifest)


def _any_file(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(checkpoint.glob("rank-*")))


def _damaging(*damages: Damage) -> Callable[[Drill], None]:
    """Plays a run that is killed and finds its newest checkpoints damaged, one by each of these."""

    def play(drill: Drill) -> None:
        _kill_all(drill)
        for damage, checkpoint in zip(damages, reversed(complete_checkpoints(drill.run.folder)), strict=False):
            description = damage(checkpoint, drill.rng)
            drill.done += f", {description} of {checkpoint.name}"
        drill.finish()
        require_told(drill, "is damaged and was set aside")

    return play


@fault("local", "hostfile", "slurm")
def truncated_file(drill: Drill) -> None:
    """A file of the newest checkpoint is cut short"""
    _damaging(cut_short)(drill)


@fault("local", "hostfile", "slurm")
def flipped_bit(drill: Drill) -> None:
    """A bit of the newest checkpoint flips"""
    _damaging(flip_a_bit)(drill)


@fault("local")
def zeroed_block(drill: Drill) -> None:
    """A block of the newest checkpoint reads as zeros"""
    _damaging(zero_a_block)(drill)


@fault("local", "hostfile", "slurm")
def missing_file(drill: Drill) -> None:
    """A file of the newest checkpoint is gone"""
    _damaging(lose_a_file)(drill)


@fault("local", "hostfile", "slurm")
def damaged_manifest(drill: Drill) -> None:
    """The manifest of the newest checkpoint is damaged or gone"""
    _damaging(damage_manifest)(drill)


@fault("local", "slurm")
def two_damaged(drill: Drill) -> None:
    """The two newest checkpoints are damaged"""
    _damaging(*drill.rng.sample(_DAMAGES, 2))(drill)


@fault("local", "hostfile")
def all_damaged(drill: Drill) -> None:
    """All checkpoints are damaged; one is restored from a copy when the run refuses to start over"""
    drill.start()
    target = seen_at_a_step(drill, _LATE)
    drill.strike(f"all ranks killed after step {target.step}", target.kill_everyone)
    drill.ended([FAILED])
    checkpoints = complete_checkpoints(drill.run.folder)
    copy = drill.run.folder.with_suffix(".copy")
    shutil.copytree(checkpoints[-1], copy)
    for checkpoint in checkpoints:
        drill.done += f", {flip_a_bit(checkpoint, drill.rng)} of {checkpoint.name}"
    for _ in range(2):  # the second one finds them set aside
        drill.start()
        drill.ended([FAILED], "is intact", "name another run_dir to start from the beginning")
    copy.rename(checkpoints[-1])
    drill.start()
    drill.finish(again=0)


@fault("local", "hostfile", "slurm")
def lost_pointer(drill: Drill) -> None:
    """`newest` is gone, empty, or names a checkpoint that is not there"""
    _kill_all(drill)
    how, pointer = drill.rng.choice(("removed", "emptied", "wrong")), drill.run.checkpoints / NEWEST
    if how == "removed":
        pointer.unlink()
    else:
        pointer.write_text("" if how == "emptied" else "step-00000999\n")
    drill.done += f", `{NEWEST}` {how}"
    drill.finish()
    require_told(drill, "names no checkpoint that exists")


@fault("local")
def lost_newest(drill: Drill) -> None:
    """The newest checkpoint is gone altogether"""
    _kill_all(drill)
    newest = complete_checkpoints(drill.run.folder)[-1]
    shutil.rmtree(newest)
    drill.done += f", {newest.name} removed"
    drill.finish()
    require_told(drill, "names no checkpoint that exists")


def require_told(drill: Drill, description: str) -> None:
    """The run said why it did not begin where it was expected to."""
    told = [record["message"] for record in drill.told("fallback")]
    if not any(description in message for message in told):
        raise DrillError(f"events.jsonl does not tell that the checkpoint {description}: {told}")


def _kill_all(drill: Drill) -> None:
    """All ranks are killed, late enough for three checkpoints; nothing can be saved after that."""
    target = run_to_a_step(drill, _LATE)
    drill.strike(f"all ranks killed after step {target.step}", target.kill_everyone)
