"""Where gloo listens: where the other hosts reach this one, whatever its own name resolves to."""

import os
import socket

import psutil
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from mixmae.base.ports import free_port
from mixmae.base.rank_env import RankEnv
from mixmae.trainer.engine import interfaces
from mixmae.trainer.engine.distributed import Ranks, background_group, join
from mixmae.trainer.engine.interfaces import GLOO_INTERFACE, choose_gloo_interface
from tests.helpers import lacks, run_ranks
from tests.trainer.engine.test_rendezvous import listening

ROUTES = {("node1", "node1"): "127.0.0.1", ("node1", "10.0.0.2"): "10.0.0.1", ("node2", "node1"): "10.0.0.2"}
"""Addresses by host and destination; node1's own name resolves to 127.0.1.1 on it."""
NAMES = {"127.0.0.1": "lo", "10.0.0.1": "eth0", "10.0.0.2": "ib0"}


def choose(monkeypatch: pytest.MonkeyPatch, rank: int, host: str, store: Store, world_size: int = 4) -> str | None:
    """The interface that a rank of a host sets."""
    monkeypatch.delenv(GLOO_INTERFACE, raising=False)
    monkeypatch.setattr(interfaces, "address_towards", lambda destination: ROUTES[host, destination])
    monkeypatch.setattr(interfaces, "interface_name", NAMES.get)
    choose_gloo_interface(RankEnv(rank, world_size, rank % 2, "node1", 29500), store)
    return os.environ.get(GLOO_INTERFACE)


def test_the_interface_is_that_of_the_route_to_the_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    store.set("mixmae/address/0", "127.0.0.1")
    store.set("mixmae/address/1", "127.0.0.1")
    assert [choose(monkeypatch, rank, "node2", store) for rank in (2, 3)] == ["ib0", "ib0"]
    assert [choose(monkeypatch, rank, "node1", store) for rank in (0, 1)] == ["eth0", "eth0"]


def test_ranks_of_one_host_stay_on_its_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    store.set("mixmae/address/1", "127.0.0.1")
    assert choose(monkeypatch, 0, "node1", store, world_size=2) == "lo"
    assert choose(monkeypatch, 0, "node1", HashStore(), world_size=1) is None


def test_what_the_user_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOO_INTERFACE, "bond0")
    monkeypatch.setattr(interfaces, "address_towards", lambda destination: ROUTES["node2", destination])
    store = HashStore()
    choose_gloo_interface(RankEnv(2, 4, 0, "node1", 29500), store)
    assert os.environ[GLOO_INTERFACE] == "bond0"
    store.set("mixmae/address/0", "127.0.0.1")
    store.set("mixmae/address/1", "127.0.0.1")
    assert choose(monkeypatch, 0, "node1", store) == "eth0"  # others learn where this host is


def outer_address() -> str:
    """An IPv4 address of this machine beside the loopback interface's."""
    addresses = [one for name, own in psutil.net_if_addrs().items() for one in own if name != "lo"]
    found = [str(one.address) for one in addresses if one.family == socket.AF_INET]
    if not found:
        lacks("needs a network interface with an IPv4 address")
    return found[0]


def join_over(ranks: Ranks, address: str, port: int) -> set[str]:
    """Joins again, now at an address that other hosts could reach; where this rank then listens."""
    import deepspeed.comm.comm as of_deepspeed

    dist.destroy_process_group()
    of_deepspeed.cdb = None
    del os.environ[GLOO_INTERFACE]
    before = listening()
    join(Ranks(ranks.rank, ranks.world_size, ranks.local_rank, address, port))
    dist.all_reduce(torch.ones(1), group=background_group())
    return listening() - before


@pytest.mark.distributed
def test_gloo_publishes_the_address_of_the_route() -> None:
    """Also on a machine whose own name resolves to 127.0.1.1, whose ranks no other host would reach."""
    address = outer_address()
    for addresses in run_ranks(join_over, 2, address, free_port()):
        assert addresses == {address}
