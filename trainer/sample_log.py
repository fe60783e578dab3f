"""Which samples a run used at which step: one file a rank, appended to from start to start."""

import json
import time
from collections import defaultdict
from pathlib import Path

from trainer.distributed import Ranks, from_main

FOLDER = "samples"


class SampleLog:
    """A rank's file; to be opened by all ranks of a start together."""

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._started = from_main(time.time())
        self._ranks = ranks
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / FOLDER / f"rank-{ranks.rank:05d}.jsonl").open("a", buffering=1)
        self._file.write("\n")  # ends what a killed rank left of a line

    def write(self, step: int, samples: list[list[int]]) -> None:
        """Notes the samples of this rank's micro-batches."""
        line = {"started": self._started, "step": step, "samples": samples}
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        self._file.close()


def read_samples(run_dir: Path) -> dict[int, list[int]]:
    """All ranks' samples by step, in the order of the global batch; of a step that was done again, the last time's."""
    by_step: dict[int, dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        for line in filter(lambda line: line.endswith("}"), file.read_text().splitlines()):
            record = json.loads(line)
            by_step[record["step"]][record["started"]] += [s for part in record["samples"] for s in part]
    return {step: starts[max(starts)] for step, starts in sorted(by_step.items())}
