"""Which samples a run used at which step: one file a rank, appended to from start to start."""

import time
from collections import defaultdict
from pathlib import Path

from mixmae.base import jsonl
from mixmae.base.jsonl import JsonLines
from mixmae.base.run_directory import SAMPLES, all_rank_records, rank_records
from mixmae.trainer.engine.distributed import Ranks, from_main

_MAX_WAITING_BYTES = 64 * 2**20


class SampleLog:
    """A rank's file; to be opened by all ranks of a start together.

    While the disk is full, lines wait in memory: what a model has seen is no record to have gaps.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._started = from_main(time.time(), float)
        (run_dir / SAMPLES).mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(rank_records(run_dir / SAMPLES, ranks.rank), _MAX_WAITING_BYTES)
        self._lines.write({"started": self._started, "world_size": ranks.world_size})

    def write(self, step: int, samples: list[list[int]]) -> None:
        """Notes the samples of this rank's micro-batches.

        Raises:
            OSError: nothing can be written, and too much waits already.
        """
        self._lines.write({"started": self._started, "step": step, "samples": samples})

    def close(self) -> None:
        """Raises OSError if something waits that still cannot be written."""
        self._lines.close()


def read_samples(run_dir: Path) -> dict[int, list[int]]:
    """All ranks' samples by step, in the order of the global batch; of a step that was done again, the last time's.

    The last start is the one that rank 0's file, which all of them are in, has last: its clock may have been set back.
    """
    order: dict[float, int] = {}
    by_step: dict[int, dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in all_rank_records(run_dir / SAMPLES):
        for record in jsonl.read(file, "started"):
            order.setdefault(record["started"], len(order))
            if "step" in record:
                by_step[record["step"]][record["started"]] += [s for part in record["samples"] for s in part]
    return {step: starts[max(starts, key=order.__getitem__)] for step, starts in sorted(by_step.items())}
