"""Where ranks find each other: a TCPStore that the main rank serves, on the address by which the others reach it.

torch's own listens on all interfaces, and whoever reaches it can read and change what it holds.
"""

import os
import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from mixmae.base.errors import UsageError
from mixmae.base.ports import PortError, is_loopback, listening_address
from mixmae.base.rank_env import RankEnv

_LOOPBACK_INTERFACE = "lo"


def open_store(ranks: RankEnv, timeout: timedelta, wait_for_workers: bool = True) -> TCPStore:
    """Opens the store, and serves it on the main rank; several of a process share one server.

    Args:
        wait_for_workers: whether the main rank waits for all others to connect.

    Raises:
        torch.distributed.DistError: the port is taken, or the main rank does not answer.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun serves it
    serves = ranks.is_main and not agents
    listener = _listener(ranks.master_addr, ranks.master_port) if serves else None
    return TCPStore(
        ranks.master_addr,
        ranks.master_port,
        ranks.world_size if wait_for_workers else None,
        is_master=serves,
        timeout=timeout,
        wait_for_workers=wait_for_workers,
        multi_tenant=True,
        master_listen_fd=None if listener is None else listener.detach(),
    )


def choose_interfaces(ranks: RankEnv) -> None:
    """Has gloo and NCCL listen on the loopback interface where all ranks are here, unless the user says where.

    Raises:
        UsageError: the environment names an interface for gloo that this host does not have.
    """
    if is_loopback(ranks.master_addr):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={_LOOPBACK_INTERFACE}")  # the very name, and no prefix
    named, there = os.environ.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    if missing := [name for name in named.split(",") if name and name not in there]:
        raise UsageError(
            f"GLOO_SOCKET_IFNAME={named}: this host has no interface {missing[0]!r}, but {', '.join(there)}; name one "
            "of those, or unset it"
        )


def _listener(name: str, port: int) -> socket.socket | None:
    """The store's socket.

    None where torch has to find out: this process serves another store there already, the port is taken, or the address
    is translated on its way to this host.
    """
    try:
        address = listening_address(name)
        if address == "::":
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except (OSError, PortError):
        return None
