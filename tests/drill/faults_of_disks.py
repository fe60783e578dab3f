"""Faults: the disk is full, or nothing can be written to it, and later it can."""

from mixmae.base.exit_codes import FAILED
from mixmae.base.run_directory import CHECKPOINTS
from tests.cluster.host import Host
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import fault
from tests.drill.target import run_to_a_step

_LITTLE, _ENOUGH = "4M", "100M"
"""Two checkpoints of a drill's model fit, and all."""


@fault("local")
def full_disk(drill: Drill) -> None:
    """The disk is full when a checkpoint is written; the run goes on, and saves when there is room again"""
    host = _mount(drill, CHECKPOINTS, _LITTLE)
    drill.start(0, "checkpoint.max_failures=100")
    _until_a_save_failed(drill)
    drill.strike("no room for a third checkpoint, then room", lambda: None)
    drill.pause(drill.rng.uniform(0, 1))
    host.run(["mount", "-o", f"remount,size={_ENOUGH}", str(drill.run.run_dir / CHECKPOINTS)], check=True)
    drill.finish(again=0)


@fault("local")
def full_disk_until_the_run_ends(drill: Drill) -> None:
    """The disk stays full; the run ends after checkpoint.max_failures, and goes on when there is room"""
    host = _mount(drill, CHECKPOINTS, _LITTLE)
    drill.start(0, "checkpoint.max_failures=1")
    _until_a_save_failed(drill)
    drill.strike("no room for a third checkpoint", lambda: None)
    drill.ended([FAILED], "No space left on device", "make room")
    host.run(["mount", "-o", f"remount,size={_ENOUGH}", str(drill.run.run_dir / CHECKPOINTS)], check=True)
    drill.start()
    drill.finish(again=0)


@fault("local")
def read_only_disk(drill: Drill) -> None:
    """The file system of the checkpoints turns read-only, and later writable"""
    host, place = _mount(drill, CHECKPOINTS, _ENOUGH), str(drill.run.run_dir / CHECKPOINTS)
    drill.start(0, "checkpoint.max_failures=100")
    step = drill.rng.randint(6, 30)
    drill.reach(step)
    drill.strike(f"read-only after step {step}", lambda: host.run(["mount", "-o", "remount,ro", place], check=True))
    _until_a_save_failed(drill)
    host.run(["mount", "-o", "remount,rw", place], check=True)
    drill.finish(again=0)


@fault("local")
def full_run_directory(drill: Drill) -> None:
    """The disk of the whole run directory is full for a while: records cannot be written either"""
    host = _mount(drill, "", "30M")
    target, seconds = run_to_a_step(drill, 6, 30), drill.rng.uniform(1, 4)
    filler = drill.run.run_dir / "filler"
    fill = ["sh", "-c", f"cat /dev/zero > {filler} 2> /dev/null; test -s {filler}"]
    drill.strike(f"full after step {target.step}, for {seconds:.1f} s", lambda: host.run(fill, check=True))
    drill.pause(seconds)
    host.run(["rm", str(filler)], check=True)
    drill.finish()


def _mount(drill: Drill, part: str, size: str) -> Host:
    """Puts a small file system on the run directory, or a folder in it, before the first start; returns the host."""
    place = drill.run.run_dir / part
    place.mkdir(parents=True)
    host = drill.rig.cluster.host(drill.backend.host)
    host.mount_tmpfs(place, size)
    drill.run.mounted = (host, place)
    return host


def _until_a_save_failed(drill: Drill) -> None:
    drill.until(lambda: drill.told("checkpoint_failed"), "a save that fails", alive=True)
    if drill.told("resumed"):
        raise DrillError("a failed save started the run again")
