"""Messages between ranks before there is a process group, through a TCPStore at the main rank's address.

It needs only one port that every host can reach, so that failures to form a process group can still be reported.
"""

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter
from torch._C._distributed_c10d import PrefixStore

from mixmae.base.errors import UsageError
from mixmae.base.liveness import JOIN_SECONDS
from mixmae.trainer.doctor.facts import Clock
from mixmae.trainer.engine.distributed import Ranks
from mixmae.trainer.engine.rendezvous import open_store

ARRIVAL_SECONDS = JOIN_SECONDS
"""Seconds that ranks may take to start and report."""
_ANSWER = timedelta(seconds=10)
_PINGS = 8
_POLL = 0.05


class NoAnswerError(TimeoutError):
    """No message before the timeout."""


class UnreachableError(UsageError):
    """A rank cannot reach the main rank. A failure of the cluster and not a usage error, so the exit code is 1."""

    exit_code = 1


class MessageStore:
    """A key-value store shared by all ranks; values are serialised as JSON.

    Raises:
        UnreachableError: there is no connection to the main rank's address.
    """

    def __init__(self, ranks: Ranks) -> None:
        try:
            store = open_store(ranks, timedelta(seconds=ARRIVAL_SECONDS), wait_for_workers=False)
        except dist.DistError as error:
            what = "listen at" if ranks.is_main else "reach the main rank at"
            raise UnreachableError(
                f"cannot {what} {ranks.master_addr} port {ranks.master_port} ({str(error).splitlines()[0]}); check "
                "MASTER_ADDR, that the port is free there, and the hosts' firewalls"
            ) from error
        self._store = PrefixStore("mixmae-doctor", store)

    def publish(self, key: str, value: Any, kind: Any) -> None:
        """Sets the value of `key`."""
        self._store.set(key, TypeAdapter(kind).dump_json(value).decode())

    def receive(self, key: str, kind: Any, seconds: float) -> Any:
        """Waits for the value of `key`, up to `seconds`.

        Raises:
            NoAnswerError: it was not set in time.
        """
        deadline = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise NoAnswerError(key)
            time.sleep(_POLL)
        return TypeAdapter(kind).validate_json(self._store.get(key))

    def answer_clock(self, rank: int) -> None:
        """Answers the main rank's pings with this host's time."""
        for ping in range(_PINGS):
            self._store.get(f"clock/{rank}/{ping}/ask")
            self._store.set(f"clock/{rank}/{ping}/answer", repr(time.time()))

    def ask_clock(self, rank: int, host: str) -> Clock:
        """A host's clock offset from this one, by the fastest of several round trips.

        Raises:
            NoAnswerError: the host does not answer.
        """
        trips = []
        for ping in range(_PINGS):
            answer = f"clock/{rank}/{ping}/answer"
            before, started = time.time(), time.perf_counter()
            self._store.set(f"clock/{rank}/{ping}/ask", "")
            try:
                self._store.wait([answer], _ANSWER)
            except dist.DistStoreError as error:
                raise NoAnswerError(answer) from error
            trip = time.perf_counter() - started
            trips.append((trip / 2, float(self._store.get(answer)) - (before + trip / 2)))
        uncertainty, ahead = min(trips)
        return Clock(host, ahead, uncertainty)
