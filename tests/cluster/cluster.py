"""Bring up, find, repair and take down a cluster."""

import json
import os
import pwd
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmae.base.errors import UsageError
from tests.cluster import clock, namespaces, network, slurm, slurm_files, ssh
from tests.cluster.host import Host
from tests.cluster.slurm import Slurm

_PREFIX = "mixmae-cluster-"
_PARENT = Path("/tmp")
"""Not TMPDIR: commands with another TMPDIR must find the cluster, and socket paths must be short."""
_SWITCH = "switch"
_SIZES = "sizes.json"
_DAEMONS = ("munged", ssh.DAEMON, "slurmctld", ".*slurmscriptd", "slurmd ")


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        name: its name for `python -m tests.cluster`.
        folder: its folder on the machine, shared by all hosts.
        login: the host to launch from; runs slurmctld.
        hosts: node1, node2, ...; run sshd and slurmd.
        slots: ranks per host.
    """

    name: str
    folder: Path
    login: Host
    hosts: Sequence[Host]
    slots: int

    @property
    def slurm(self) -> Slurm:
        return Slurm(self.login, self.hosts, self.slots)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every command on its hosts."""
        return dict(self.login.environment)

    @property
    def shared(self) -> Path:
        """A folder shared by all hosts."""
        return self.folder / "shared"

    @property
    def local(self) -> Path:
        """A folder that is private to each host."""
        return self.folder / "local"

    def hostfile(self, slots: int | None = None, hosts: Sequence[Host] | None = None, path: Path | None = None) -> Path:
        """Writes a hostfile of `hosts` (all) with `slots` ranks each; returns its path."""
        path = path or self.folder / "hostfile"
        path.write_text("".join(f"{host.name} slots={slots or self.slots}\n" for host in hosts or self.hosts))
        return path

    def host(self, name: str) -> Host:
        """The host of this name; KeyError if there is none."""
        return {host.name: host for host in (self.login, *self.hosts)}[name]

    def power_on(self, host: Host) -> None:
        """Starts a host that was powered off: link up, empty /dev/shm, daemons running."""
        host.reconnect()
        host.run(["find", "/dev/shm", "-mindepth", "1", "-delete"], check=True)
        _start_daemons(host)
        if host in self.hosts and not host.processes(slurm.DAEMON):
            self.slurm.start_daemon(host)

    def repair(self) -> None:
        """Undoes what tests do to a cluster: jobs, links, clocks, daemons, nodes that are down or drained.

        Other processes on the hosts are killed. File systems that a test mounted have to be unmounted by the test.
        """
        for host in (self.login, *self.hosts):
            host.kill_all_except("|".join(_DAEMONS))
            self.power_on(host)
            clock.clear_offset(host)
        self.slurm.repair()
        self.slurm.wait_until_idle()

    def down(self) -> None:
        """Takes the cluster down and removes its folder."""
        take_down(self.name)


def folder_of(name: str) -> Path:
    """The folder of the cluster of this name."""
    return _PARENT / f"{_PREFIX}{name}"


def bring_up(name: str = "test", hosts: int = 2, slots: int = 2, with_parent: bool = False) -> Cluster:
    """Brings a cluster up; returns when ssh answers on every host and Slurm's nodes are idle.

    Args:
        name: lower-case letters, digits, dashes.
        hosts: number of hosts besides the login host; 1 to 200.
        slots: ranks, and Slurm `gpu` resources, per host.
        with_parent: the cluster's processes are killed when the calling thread exits for any reason.

    Raises:
        UsageError: a value is out of range, the name is taken, or the caller is not root.
    """
    _check(name, hosts, slots)
    folder = folder_of(name)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        raise UsageError(f"{name} already exists: python -m tests.cluster down --name {name}") from None
    try:
        return _build(name, folder, hosts, slots, with_parent)
    except BaseException as error:
        error.add_note(_last_lines(folder / "log"))
        take_down(name)
        raise


def find(name: str) -> Cluster:
    """The running cluster of this name. Raises UsageError if there is none or it is incomplete."""
    folder = folder_of(name)
    held = {mark.rpartition("/")[2]: spaces for mark, spaces in namespaces.find(f"{folder}/").items()}
    try:
        sizes = json.loads((folder / _SIZES).read_text())
        hosts = [_make_host(held, folder, name, address) for name, address in network.names(sizes["hosts"]).items()]
    except (FileNotFoundError, KeyError):
        raise UsageError(f"{name}: no such cluster is up, or not yet: python -m tests.cluster status") from None
    return Cluster(name, folder, hosts[0], hosts[1:], sizes["slots"])


def names() -> list[str]:
    """The names of all clusters, including incomplete ones."""
    return sorted(path.name.removeprefix(_PREFIX) for path in folder_of("").parent.glob(f"{_PREFIX}*"))


def take_down(name: str) -> None:
    """Kills all processes of the cluster of this name and removes its folder, also of an incomplete one."""
    folder = folder_of(name)
    namespaces.end(f"{folder}/")
    if folder.exists():
        shutil.rmtree(folder)


def _build(name: str, folder: Path, hosts: int, slots: int, with_parent: bool) -> Cluster:
    addresses = network.names(hosts)
    _write_files(folder, addresses, slots)
    switch = namespaces.hold(f"{folder}/{_SWITCH}", with_parent=with_parent)
    network.build_switch(switch)
    held = {_SWITCH: switch} | {host: namespaces.hold(f"{folder}/{host}", inside=switch) for host in addresses}
    login, *others = [_make_host(held, folder, host, address) for host, address in addresses.items()]
    for host in (login, *others):
        network.connect(switch, host.namespaces, host.name, host.address)
        _mount_private_files(host, folder)
        _start_daemons(host)
    cluster = Cluster(name, folder, login, others, slots)
    cluster.slurm.start()
    cluster.hostfile()
    (folder / _SIZES).write_text(json.dumps({"hosts": hosts, "slots": slots}))
    _wait_until_ready(cluster)
    return cluster


def _write_files(folder: Path, addresses: Mapping[str, str], slots: int) -> None:
    for host in addresses:
        (folder / "log" / host).mkdir(parents=True)
    for part in ("shared", "local", "etc"):
        (folder / part).mkdir()
    (folder / "etc" / "hosts").write_text(network.hosts_file(addresses))
    ssh.configure(folder / "etc" / "ssh")
    slurm_files.configure(folder / "etc" / "slurm", folder / "log", len(addresses) - 1, slots)
    slurm_files.configure_munge(folder / "etc" / "munge")


def _mount_private_files(host: Host, folder: Path) -> None:
    host.run(["hostname", host.name], check=True)
    # A /sys that shows the host's own interfaces. Slurm 22.05 needs a cgroup directory: an empty one will do.
    host.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)
    for path in (Path("/run"), Path("/sys/fs/cgroup"), folder / "local"):
        host.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", path], check=True)
    host.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)
    for part in ("hosts", "ssh", "slurm", "munge"):
        host.bind(folder / "etc" / part, Path("/etc") / part)
    _hide_user_settings(host, Path(pwd.getpwuid(0).pw_dir))


def _hide_user_settings(host: Host, home: Path) -> None:
    """Hides root's .bashrc and .ssh from ssh sessions: they may be slow, or wait for locks."""
    if (home / ".bashrc").exists():
        host.bind(Path("/dev/null"), home / ".bashrc")
    if (home / ".ssh").is_dir():
        host.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", home / ".ssh"], check=True)


def _start_daemons(host: Host) -> None:
    """Starts munged and sshd unless they run."""
    if not host.processes("^munged"):
        slurm.start_munge(host)
    if not host.processes(f"^{ssh.DAEMON}"):
        ssh.start(host)


def _make_host(held: Mapping[str, namespaces.Namespaces], folder: Path, name: str, address: str) -> Host:
    folders = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep), "/usr/sbin", "/sbin"]
    path = os.pathsep.join(dict.fromkeys(folders))
    environment = {"PATH": path, "PDSH_RCMD_TYPE": "ssh"}
    return Host(name, address, folder / "log" / name, held[name], held[_SWITCH], environment)


def _wait_until_ready(cluster: Cluster) -> None:
    for host in cluster.hosts:
        answer = cluster.login.run(["ssh", host.name, "hostname"], check=True).stdout.strip()
        if answer != host.name:
            raise RuntimeError(f"ssh {host.name} hostname printed {answer!r}")
    cluster.slurm.wait_until_idle()


def _last_lines(logs: Path) -> str:
    parts = []
    for path in sorted(logs.glob("*/*.log")):
        parts += [f"{path}:", *path.read_text().splitlines()[-8:]]
    return "\n".join(parts)


def _check(name: str, hosts: int, slots: int) -> None:
    if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
        raise UsageError(f"name {name!r}: expected up to 40 lower-case letters, digits and dashes")
    if not 1 <= hosts <= 200 or not 1 <= slots <= 64:
        raise UsageError(f"{hosts} hosts, {slots} slots: expected 1 to 200 hosts of 1 to 64 slots each")
    if os.geteuid():
        raise UsageError("network namespaces need root; run this as root")
