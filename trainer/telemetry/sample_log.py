"""Which samples a run used at which step: one file a rank, appended to from start to start."""

import json
import time
from collections import defaultdict
from pathlib import Path

from mixmae.trainer.engine.distributed import Ranks, from_main

FOLDER = "samples"
_MOST_WAITING = 64 * 2**20


class SampleLog:
    """A rank's file; to be opened by all ranks of a start together.

    While the disk is full, lines wait in memory: what a model has seen is no record to have gaps.
    """

    def __init__(self, run_dir: Path, ranks: Ranks) -> None:
        self._started = from_main(time.time())
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / FOLDER / f"rank-{ranks.rank:05d}.jsonl").open("ab", buffering=0)
        self._waiting = bytearray(b"\n")  # ends what a killed rank left of a line
        self._add({"started": self._started, "world_size": ranks.world_size})

    def write(self, step: int, samples: list[list[int]]) -> None:
        """Notes the samples of this rank's micro-batches.

        Raises:
            OSError: nothing can be written, and too much waits already.
        """
        self._add({"started": self._started, "step": step, "samples": samples})

    def _add(self, record: dict[str, object]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        try:
            self._flush()
        except OSError:
            if len(self._waiting) > _MOST_WAITING:
                raise

    def _flush(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        """Raises OSError if something waits that still cannot be written."""
        self._flush()
        self._file.close()


def read_samples(run_dir: Path) -> dict[int, list[int]]:
    """All ranks' samples by step, in the order of the global batch; of a step that was done again, the last time's.

    The last start is the one that rank 0's file, which all of them are in, has last: its clock may have been set back.
    """
    order: dict[float, int] = {}
    by_step: dict[int, dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((run_dir / FOLDER).glob("rank-*.jsonl")):
        for line in filter(lambda line: line.endswith("}"), file.read_text().splitlines()):
            record = json.loads(line)
            order.setdefault(record["started"], len(order))
            if "step" in record:
                by_step[record["step"]][record["started"]] += [s for part in record["samples"] for s in part]
    return {step: starts[max(starts, key=order.__getitem__)] for step, starts in sorted(by_step.items())}
