"""How ranks communicate before there is a process group: through a TCPStore at the main rank's address.

It needs one port that every host reaches, so that whatever keeps a process group from forming can still be reported.
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
"""Seconds that the slowest rank may take to start."""
_ANSWER = timedelta(seconds=10)
_PINGS = 8
_POLL = 0.05


class NoAnswerError(TimeoutError):
    """No message arrived in time."""


class UnreachableError(UsageError):
    """A rank cannot reach the main one: the cluster failed, not the command."""

    exit_code = 1


class MessageStore:
    """One key-value store for all ranks; values are serialised as JSON of a type.

    Raises:
        UnreachableError: the main rank does not answer at its address.
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
        """The value of `key`; waits for it, `seconds` at most.

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
        """Reports this host's time whenever the main rank asks."""
        for ping in range(_PINGS):
            self._store.get(f"clock/{rank}/{ping}/ask")
            self._store.set(f"clock/{rank}/{ping}/answer", repr(time.time()))

    def ask_clock(self, rank: int, host: str) -> Clock:
        """A host's clock against this one, by the fastest of several round trips.

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
