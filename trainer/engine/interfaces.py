"""The network interface by which other hosts reach this one, and that gloo is told to take."""

import os
import socket

import psutil
from torch._C._distributed_c10d import Store

from mixmae.base.ports import is_loopback
from mixmae.base.rank_env import RankEnv

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def address_towards(host: str) -> str:
    """This host's address on the route to another host; sends no packet."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def interface_name(address: str) -> str | None:
    """The interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (one.address.partition("%")[0] for one in addresses):
            return name
    return None


def choose_gloo_interface(ranks: RankEnv, store: Store) -> None:
    """Has gloo listen on the interface that routes to the other hosts, unless the user says where.

    Left alone, gloo publishes what the host's own name resolves to. Where /etc/hosts makes that 127.0.1.1, as on Debian
    and Ubuntu, NCCL works and ranks of other hosts wait for gloo until they give up.

    Args:
        store: of all ranks, who tell each other their addresses in it.
    """
    if ranks.world_size == 1:
        return
    own = address_towards(ranks.master_addr)
    store.set(f"mixmae/address/{ranks.rank}", own)  # also where the user has chosen: others may wait for it
    if GLOO_INTERFACE in os.environ:
        return
    if is_loopback(own):  # on the main rank's host, whose name other hosts resolve to another address
        addresses = (store.get(f"mixmae/address/{rank}").decode() for rank in range(ranks.world_size))
        elsewhere = next((address for address in addresses if not is_loopback(address)), None)
        own = own if elsewhere is None else address_towards(elsewhere)
    if (name := interface_name(own)) is not None:
        os.environ[GLOO_INTERFACE] = name
