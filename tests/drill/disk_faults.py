"""Disk faults: the disk is full or read-only, and later writable."""

from mixmae.base.exit_codes import FAILED
from mixmae.base.run_directory import CHECKPOINTS
from tests.cluster.host import Host
from tests.drill.drill import Drill, DrillError
from tests.drill.faults import fault
from tests.drill.target import start_and_pick_target

_SMALL, _LARGE = "4M", "100M"
"""Room for two checkpoints of a drill's model, and for all."""


@fault("local")
def full_disk(drill: Drill) -> None:
    """The disk is full when a checkpoint is written; the run goes on, and saves when there is room again"""
    host = _mount(drill, CHECKPOINTS, _SMALL)
    drill.start(0, "checkpoint.max_failures=100")
    _wait_for_failed_save(drill)
    drill.inject("no room for a third checkpoint, then room", lambda: None)
    drill.sleep(drill.rng.uniform(0, 1))
    host.run(["mount", "-o", f"remount,size={_LARGE}", str(drill.run.run_dir / CHECKPOINTS)], check=True)
    drill.finish(user_restarts=0)


@fault("local")
def full_disk_until_the_run_ends(drill: Drill) -> None:
    """The disk stays full; the run ends after checkpoint.max_failures, and goes on when there is room"""
    host = _mount(drill, CHECKPOINTS, _SMALL)
    drill.start(0, "checkpoint.max_failures=1")
    _wait_for_failed_save(drill)
    drill.inject("no room for a third checkpoint", lambda: None)
    drill.expect_exit([FAILED], "No space left on device", "make room")
    host.run(["mount", "-o", f"remount,size={_LARGE}", str(drill.run.run_dir / CHECKPOINTS)], check=True)
    drill.start()
    drill.finish(user_restarts=0)


@fault("local")
def read_only_disk(drill: Drill) -> None:
    """The file system of the checkpoints turns read-only, and later writable"""
    host, place = _mount(drill, CHECKPOINTS, _LARGE), str(drill.run.run_dir / CHECKPOINTS)
    drill.start(0, "checkpoint.max_failures=100")
    step = drill.rng.randint(6, 30)
    drill.wait_for_step(step)
    drill.inject(f"read-only after step {step}", lambda: host.run(["mount", "-o", "remount,ro", place], check=True))
    _wait_for_failed_save(drill)
    host.run(["mount", "-o", "remount,rw", place], check=True)
    drill.finish(user_restarts=0)


@fault("local")
def full_run_directory(drill: Drill) -> None:
    """The disk of the whole run directory is full for a while: records cannot be written either"""
    host = _mount(drill, "", "30M")
    target, seconds = start_and_pick_target(drill, 6, 30), drill.rng.uniform(1, 4)
    filler = drill.run.run_dir / "filler"
    fill = ["sh", "-c", f"cat /dev/zero > {filler} 2> /dev/null; test -s {filler}"]
    drill.inject(f"full after step {target.step}, for {seconds:.1f} s", lambda: host.run(fill, check=True))
    drill.sleep(seconds)
    host.run(["rm", str(filler)], check=True)
    drill.finish()


def _mount(drill: Drill, part: str, size: str) -> Host:
    """Mounts a small tmpfs on the run directory, or a folder in it, before the first start; returns the host."""
    place = drill.run.run_dir / part
    place.mkdir(parents=True)
    host = drill.rig.cluster.host(drill.backend.host)
    host.mount_tmpfs(place, size)
    drill.run.mounted = (host, place)
    return host


def _wait_for_failed_save(drill: Drill) -> None:
    drill.wait_until(lambda: drill.events_of_kind("checkpoint_failed"), "failed save", alive=True)
    if drill.events_of_kind("resumed"):
        raise DrillError("the run restarted after a failed save")
