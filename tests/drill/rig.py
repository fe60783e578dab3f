"""The test rig that all drills share: three hosts, shards, recipes, and baseline runs without faults."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixmae.trainer.data.shards.build import build_shards
from mixmae.trainer.data.shards.synthetic import Synthetic
from tests.cluster.cluster import Cluster
from tests.drill.runs import Backend, Local, Run
from tests.helpers import tiny_recipe

IMAGES = 90
"""In an epoch: 7.5 global batches."""
GLOBAL_BATCH = 12
STEPS, SAVE_EVERY = 60, 5
STAGES = (0, 1, 2, 3)
_BASELINE_TIMEOUT, _POLL_SECONDS = 300.0, 0.1


@dataclass
class Rig:
    """A cluster of three hosts with two slots each, with shards and baseline runs that are made once.

    Attributes:
        folder: shared by all hosts; holds all files of the drills.
        start_seconds: from the command to the first step of the last baseline run.
    """

    cluster: Cluster
    folder: Path
    start_seconds: float = 0.0
    _baselines: dict[int, Path] = field(default_factory=dict)

    @property
    def shards(self) -> Path:
        shards = self.folder / "shards"
        if not shards.exists():
            build_shards(Synthetic(IMAGES, 72, seed=0), shards, shard_bytes=60_000, seed=0, jobs=1)
        return shards

    def recipe(self, run_dir: Path, stage: int, **changes: Any) -> Path:
        """Writes the recipe of a drill beside its run directory; returns the file.

        Global batches and streams divide by 1, 2 and 3 ranks; no epoch ends where a global batch does.
        """
        recipe = tiny_recipe(
            **{
                "run_dir": str(run_dir),
                "encoder.drop_path_rate": 0.2,
                "data.shards": str(self.shards),
                "data.streams": GLOBAL_BATCH,
                "train.global_batch": GLOBAL_BATCH,
                "train.precision": "bf16" if stage else "fp32",
                "train.zero_stage": stage,
                "train.duration": f"{STEPS} steps",
                "optim.clip_grad": 0.05,
                "checkpoint.every": f"{SAVE_EVERY} steps",
                "launch.stuck_seconds": 60,
                "launch.join_seconds": 120,
                "launch.grace_seconds": 60,
                "log.samples": True,
                "monitoring.enabled": False,
                **changes,
            }
        )
        file = run_dir.with_suffix(".yaml")
        file.write_text(recipe.to_yaml())
        return file

    def run(self, name: str, backend: Backend, stage: int, **changes: Any) -> Run:
        """A run in a new run directory, not started yet."""
        run_dir = self.folder / name
        shutil.rmtree(run_dir, ignore_errors=True)
        return Run(self.cluster, backend, self.recipe(run_dir, stage, **changes), run_dir)

    def baseline(self, stage: int) -> Path:
        """The run directory of a finished run without faults, on two ranks of one host; trained on the first call."""
        if stage not in self._baselines:
            run = self.run(f"baseline-stage-{stage}", Local(2), stage, **{"checkpoint.keep": STEPS})
            started = time.monotonic()
            run.start()
            while run.step() == 0 and run.poll() is None:
                time.sleep(_POLL_SECONDS)
            self.start_seconds = time.monotonic() - started
            code = run.wait(_BASELINE_TIMEOUT)
            assert code == 0, f"exit code {code} of the baseline run:\n{run.output()[-5000:]}"
            self._baselines[stage] = run.folder
        return self._baselines[stage]

    def clear(self, run: Run, keep: bool) -> None:
        """Repairs the cluster after a drill, and deletes the run's files unless `keep` is set."""
        if run.mounted is not None:
            host, path = run.mounted
            if keep:
                shutil.copytree(run.folder, run.run_dir.with_suffix(".kept"), dirs_exist_ok=True)
            host.unmount(path)
            run.mounted = None
        self.cluster.repair()
        if not keep:
            for path in self.folder.glob(f"{run.run_dir.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
