"""Data worker processes: how they begin, and how they hand batches over.

A batch lies in shared memory, of which torch sends the main process a file descriptor: the main process connects to a
socket of the worker for each one. Python puts that socket into the folder of temporary files, where its path may be too
long for a socket, and where cleaners remove it in the middle of a run; here it has an abstract address, which is in no
folder. And Python prints what goes wrong in the thread that hands batches over, and drops the batch, for which the main
process then waits for ever; here the error takes the batch's place.
"""

import os
import secrets
import sys
from multiprocessing import connection
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

from mixmae.base.signals import leave_signals_to_the_main_process


class HandOverError(NamedTuple):
    """Stands for a batch that could not be handed over."""

    words: str


def init_worker(worker: int) -> None:
    """What a data worker does first."""
    leave_signals_to_the_main_process()
    if sys.platform == "linux":
        connection.arbitrary_address = _abstract_address  # type: ignore[attr-defined]
    Queue._on_queue_feeder_error = _put_error  # type: ignore[attr-defined]


def _abstract_address(family: str) -> str:
    assert family == "AF_UNIX"
    return f"\0mixmae-{os.getpid()}-{secrets.token_hex(8)}"


def _put_error(queue: Any, error: BaseException, item: Any) -> None:
    """In the queue's thread: torch's items are (number of the batch, batch)."""
    number, _ = item
    queue.put((number, HandOverError(hand_over_words(error))))


def hand_over_words(error: BaseException) -> str:
    """What to say of an error of shared memory or of descriptors."""
    return (
        f"a data worker could not hand over a batch ({type(error).__name__}: {error}); check the space on /dev/shm and "
        "'ulimit -n', enlarge them, or lower data.prefetch_factor, data.num_workers or train.micro_batch"
    )
