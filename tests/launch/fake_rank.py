"""A fake rank that does not train: `python -m tests.launch.fake_rank --world-size N key=value ...`.

It steps, writes heartbeats, records signals and fails as its settings say. The other ranks then hang, as if they waited
for the failed one in a collective. Started by `tests.launch.launch_fake_ranks` it gets a recipe, as a real rank does,
prints its seed, and reads its settings from the environment.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from mixmae.base.exit_codes import PREEMPTED
from mixmae.base.heartbeat import HEARTBEAT, Heartbeat
from mixmae.base.rank_env import read_rank_env
from mixmae.base.run_directory import CHECKPOINTS, checkpoint_name, newest_step
from mixmae.trainer.checkpoints.layout import set_newest
from mixmae.trainer.recipe.loading import load_recipe

STEP_SECONDS = 0.1
SETTINGS = "FAKE_RANK_SETTINGS"


class FakeRank:
    """Does `steps` steps; at step `at` rank `rank` fails by `how`: error, exit, kill, stop, hang or leak-child.

    With `how=ignore-signals` all ranks ignore signals to stop. At step `at` all ranks overwrite the file `edits`.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        self.rank_env = read_rank_env(os.environ)
        self.steps, self.at = int(settings.get("steps", 20)), int(settings.get("at", -1))
        self.how, self.fails = settings.get("how", ""), self.rank_env.rank == int(settings.get("rank", -1))
        self.code = int(settings.get("code", 1))
        self.run_dir = Path(settings["run_dir"]) if "run_dir" in settings else None
        self.edits = Path(settings["edits"]) if "edits" in settings else None
        self.stop_signal: str | None = None
        self.beat = Heartbeat(Path(os.environ[HEARTBEAT]))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN if self.how == "ignore-signals" else self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = signal.Signals(number).name

    def run(self) -> int:
        first = newest_step(self.run_dir) if self.run_dir is not None else 0
        env = self.rank_env
        print(f"rank {env.rank} of {env.world_size} from step {first}, port {env.master_port}")
        for step in range(first, self.steps):
            self.beat.set_phase("forward", step)
            time.sleep(STEP_SECONDS)
            if step == self.at and self.edits is not None:
                self.edits.write_text("edited: after submission")
            if step == self.at and self.how not in ("", "ignore-signals"):
                self.fail() if self.fails else self.wait()
            if self.stop_signal is not None:
                self.save(step + 1)
                print(f"stopped by {self.stop_signal} after step {step + 1}")
                return PREEMPTED
            if (step + 1) % 5 == 0:
                self.save(step + 1)
        print("done")
        return 0

    def fail(self) -> None:
        match self.how:
            case "error":
                raise RuntimeError("injected error")
            case "exit":
                print("mixmae: error: injected usage error", file=sys.stderr)
                sys.exit(self.code)
            case "kill" | "stop":
                os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)
            case "hang":
                self.beat.set_phase("data_wait")
                time.sleep(1000)
            case "leak-child":
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", "leaked child"])
                os.kill(os.getpid(), signal.SIGKILL)

    def wait(self) -> None:
        self.beat.set_phase("backward")
        while True:
            time.sleep(1000)

    def save(self, step: int) -> None:
        if self.run_dir is not None and self.rank_env.is_main:
            folder = self.run_dir / CHECKPOINTS / checkpoint_name(step)
            folder.mkdir(parents=True, exist_ok=True)
            set_newest(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--world-size", type=int)
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in args.settings if "=" in setting)
    if SETTINGS in os.environ:
        recipe = load_recipe(Path(args.settings[0]))
        print(f"seed {recipe.seed}")
        settings = {"run_dir": str(recipe.run_dir), **json.loads(os.environ[SETTINGS])}
    rank = FakeRank(settings)
    assert args.world_size == rank.rank_env.world_size
    sys.exit(rank.run())
