"""Where ranks listen for each other, and how values travel between them."""

import os
import socket
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from mixmae.base.errors import UsageError
from mixmae.base.ports import free_port, reserve_port
from mixmae.base.rank_env import RankEnv
from mixmae.trainer.data.faults import Reason
from mixmae.trainer.engine.distributed import Ranks, all_gather, from_main
from mixmae.trainer.engine.rendezvous import choose_interfaces, open_store
from tests.helpers import run_ranks

SHORT = timedelta(seconds=10)


def listening() -> set[str]:
    """Addresses on which this process listens."""
    return {one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_the_store_listens_where_the_others_look_for_it(address: str) -> None:
    reserved = reserve_port(free_port())  # as by the coordinator
    ranks = RankEnv(0, 2, 0, address, reserved.getsockname()[1])
    before = listening()
    store = open_store(ranks, SHORT, wait_for_workers=False)
    assert listening() - before <= {"127.0.0.1", "::1"}
    second = open_store(ranks, SHORT, wait_for_workers=False)  # as the process group's beside the doctor's
    open_store(RankEnv(1, 2, 1, address, ranks.master_port), SHORT, wait_for_workers=False).set("key", "value")
    assert (store.get("key"), second.get("key")) == (b"value", b"value")
    reserved.close()


def test_a_port_that_another_program_has_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(dist.DistError):
        open_store(RankEnv(0, 1, 0, "127.0.0.1", other.getsockname()[1]), SHORT, wait_for_workers=False)


def test_an_interface_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,no0")
    with pytest.raises(UsageError, match=r"GLOO_SOCKET_IFNAME=lo,no0: this host has no interface 'no0', but .*lo"):
        choose_interfaces(RankEnv(0, 2, 0, "node1", 20_000))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_interfaces(RankEnv(0, 2, 0, "node1", 20_000))
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    choose_interfaces(RankEnv())
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def exchange(ranks: Ranks) -> tuple[set[str], Any, Any]:
    """Where a rank that has joined listens once it has exchanged something with the others, and what it got."""
    own = (Path("ä" * ranks.rank), Counter({Reason.EMPTY: ranks.rank}), None if ranks.rank else 0.1)
    kind = tuple[Path, dict[Reason, int], float | None]
    figures = {"top1": float("nan"), "top5": 0.1}
    assert str(from_main(figures if ranks.is_main else {})) == str(figures)
    return listening(), from_main(own, kind), all_gather(own, kind)


@pytest.mark.distributed
def test_ranks_of_this_machine_listen_on_its_loopback_interface_alone_and_tell_each_other() -> None:
    found = run_ranks(exchange, 2)
    first, second = (Path(), {Reason.EMPTY: 0}, 0.1), (Path("ä"), {Reason.EMPTY: 1}, None)
    for addresses, of_main, of_all in found:
        assert addresses <= {"127.0.0.1", "::1"}
        assert (of_main, of_all) == (first, [first, second])
    assert found[0][0]
