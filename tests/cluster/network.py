"""The cluster's network: a bridge in its own namespaces as the switch, and a veth link to each host."""

from collections.abc import Mapping

from tests.cluster.namespaces import Namespaces, run_checked

LOGIN = "login"
SUBNET = "10.77.0"
"""The same in every cluster: none is reachable from outside its switch."""

INTERFACE = "eth0"
_BRIDGE = "bridge0"


def address_of(number: int) -> str:
    """The address of nodeNUMBER; 0 is the login host."""
    return f"{SUBNET}.{10 + number}"


def names(hosts: int) -> dict[str, str]:
    """Addresses by name: login, node1 ... nodeHOSTS."""
    return {LOGIN: address_of(0)} | {f"node{number}": address_of(number) for number in range(1, hosts + 1)}


def hosts_file(addresses: Mapping[str, str]) -> str:
    """The /etc/hosts of every host."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    return "\n".join([*lines, *(f"{address} {name}" for name, address in addresses.items())]) + "\n"


def build_switch(switch: Namespaces) -> None:
    _ip(switch, "link", "add", _BRIDGE, "type", "bridge")
    _ip(switch, "link", "set", _BRIDGE, "up")


def connect(switch: Namespaces, host: Namespaces, name: str, address: str) -> None:
    """Links the switch's port `name` to the host's eth0, and sets its address."""
    port = ["link", "add", name, "type", "veth"]
    _ip(switch, *port, "peer", "name", INTERFACE, "netns", str(host.pid))
    _ip(switch, "link", "set", name, "master", _BRIDGE, "up")
    _ip(host, "link", "set", "lo", "up")
    _ip(host, "address", "add", f"{address}/24", "dev", INTERFACE)
    _ip(host, "link", "set", INTERFACE, "up")


def set_link(switch: Namespaces, name: str, up: bool) -> None:
    """Takes the host's link at the switch up or down."""
    _ip(switch, "link", "set", name, "up" if up else "down")


def _ip(where: Namespaces, *arguments: str) -> None:
    # Enters only the network namespace, because `netns PID` takes a pid of the caller's PID namespace.
    run_checked(["nsenter", f"--target={where.pid}", "--net", "--", "ip", *arguments])
