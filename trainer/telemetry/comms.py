"""Bytes and seconds of collective operations, from DeepSpeed's comms logger."""

from collections import Counter
from typing import Any


class Communication:
    """Bytes and seconds by operation, read as the logger's lists grow; nothing where the logger is off."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def read(self) -> None:
        """Takes what came since the last time out of the logger, which would keep a record of each operation."""
        from deepspeed import comm

        logger: Any = comm.comm.comms_logger
        for operation, sizes in logger.comms_dict.items():
            for size, (_, milliseconds, *bandwidths) in sizes.items():
                self.bytes[operation] += size * len(milliseconds)
                self.seconds[operation] += sum(milliseconds) / 1000
                for record in (milliseconds, *bandwidths):
                    record.clear()
