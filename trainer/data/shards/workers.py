"""Jobs in a pool of processes: a progress bar that moves within jobs, and no process left running at the end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from mixmae.base.errors import UsageError

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")

_job: Callable[[Any, Any], Any]
_shared: Any
_count: Any
_stop: Any


class CancelledError(Exception):
    """Raised in a job that was cancelled."""


def run_jobs(
    job: Callable[[Shared, Task], Result], shared: Shared, tasks: Sequence[Task], jobs: int, bar: "tqdm[Any]"
) -> list[Result]:
    """`job(shared, task)` of every task. An error in one, and Ctrl-C, stop the others.

    Args:
        shared: handed to each process once.
        jobs: processes.
        bar: moved by what jobs `tick`.

    Raises:
        UsageError: a process was killed.
    """
    if not tasks:
        return []
    count, stop = multiprocessing.Value("q", 0), multiprocessing.Event()
    start, setup = bar.n, (job, shared, count, stop)
    pool = ProcessPoolExecutor(min(jobs, len(tasks)), initializer=_init_worker, initargs=setup)
    try:
        futures = [pool.submit(_run, task) for task in tasks]
        waiting: set[Future[Any]] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(start + count.value - bar.n)
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise UsageError(
            f"one of {jobs} processes was killed, perhaps because the machine ran out of memory; lower --jobs"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def advance(amount: int = 1) -> None:
    """Called by jobs to report progress.

    Raises:
        CancelledError: another job failed, or Ctrl-C.
    """
    with _count.get_lock():
        _count.value += amount
    if _stop.is_set():
        raise CancelledError


def _init_worker(job: Callable[[Any, Any], Any], shared: Any, count: Any, stop: Any) -> None:
    global _job, _shared, _count, _stop
    _job, _shared, _count, _stop = job, shared, count, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent tells these when to stop
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exits when the parent is killed, since this process would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Any) -> Any:
    return _job(_shared, task)
