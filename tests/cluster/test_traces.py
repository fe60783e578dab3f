"""Taking a test cluster down leaves nothing behind, also when it was incomplete."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mixmae.base.errors import UsageError
from tests.cluster import namespaces, programs
from tests.cluster.cluster import Cluster, bring_up, find, folder_of, names, take_down
from tests.helpers import lacks

pytestmark = pytest.mark.services


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a cluster of the test's own, taken down afterwards."""
    if reason := programs.missing():
        lacks(reason)
    own = f"pytest-{os.getpid()}-own"
    yield own
    take_down(own)


def test_down_leaves_no_trace(cluster: Cluster, name: str) -> None:
    before = _machine_state()
    own = bring_up(name, hosts=1, slots=1)
    assert own.login.run(["ssh", "node1", "hostname"]).stdout == "node1\n"
    ended = own.hosts[0].popen(["sh", "-c", "setsid sleep 1000 & exec sleep 1000"])
    processes = [process for host in (own.login, *own.hosts) for process in host.processes()]
    held = _namespaces_of(own)
    assert _all_namespaces() >= held
    own.down()
    assert ended.wait(200) == -signal.SIGKILL
    assert not [process for process in processes if process.is_running()]
    assert not _all_namespaces() & held
    assert _machine_state() == before
    assert not folder_of(name).exists()
    assert name not in names()
    assert cluster.login.run(["ssh", "node1", "hostname"]).stdout == "node1\n"


@pytest.mark.parametrize("reached", ["etc", "log/login/munged.log", "sizes.json"])
def test_down_removes_an_incomplete_cluster(name: str, reached: str) -> None:
    up = subprocess.Popen([sys.executable, "-m", "tests.cluster", "up", "--name", name], start_new_session=True)
    _wait_for(folder_of(name) / reached)
    up.kill()
    up.wait()
    take_down(name)
    take_down(name)
    assert not namespaces.holders_of(f"{folder_of(name)}/")
    assert not folder_of(name).exists()
    assert not _processes_naming(folder_of(name))


def test_a_cluster_can_end_with_its_parent(name: str) -> None:
    code = f"from tests.cluster.cluster import bring_up; bring_up({name!r}, 1, 1, with_parent=True); input()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    _wait_for(folder_of(name) / "sizes.json")
    holders = [process for process, _ in namespaces.holders_of(f"{folder_of(name)}/")]
    assert len(holders) >= 3
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(holders, timeout=20)[1]
    assert not _processes_naming(folder_of(name))


def test_an_interrupted_up_cleans_up(name: str) -> None:
    up = subprocess.Popen([sys.executable, "-m", "tests.cluster", "up", "--name", name], stderr=subprocess.DEVNULL)
    _wait_for(folder_of(name) / "log" / "login" / "munged.log")
    up.send_signal(signal.SIGINT)
    assert up.wait(200) != 0
    assert not namespaces.holders_of(f"{folder_of(name)}/")
    assert not folder_of(name).exists()


def test_a_name_is_unique(cluster: Cluster) -> None:
    with pytest.raises(UsageError, match="down --name"):
        bring_up(cluster.name)
    assert find(cluster.name) == cluster


def test_an_unknown_cluster_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="no such cluster"):
        find(name)


def _machine_state() -> dict[str, object]:
    """State of the machine that a cluster could leak into."""
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    folders = ("/etc", "/etc/ssh", "/run", "/var/log", "/sys/fs/cgroup")
    return {
        "links": [line.split(":")[1] for line in links.splitlines()],
        "mounts": sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        "names": (os.uname().nodename, Path("/etc/hosts").read_text()),
        "files": {folder: sorted(map(str, Path(folder).iterdir())) for folder in folders},
        "control groups": sorted(Path("/sys/fs/cgroup").glob("**/*slurm*")),
        "ssh": (Path.home() / ".ssh").exists(),
    }


def _namespaces_of(cluster: Cluster) -> set[str]:
    """The namespaces that the cluster's hosts do not share with this process."""
    holders = [host.namespaces.pid for host in (cluster.login, *cluster.hosts)]
    return {link for pid in holders for link in _links(pid)} - _links(os.getpid())


def _all_namespaces() -> set[str]:
    """Namespaces of every process of the machine."""
    return {link for pid in psutil.pids() for link in _links(pid)}


def _links(pid: int) -> set[str]:
    try:
        return {str(link.readlink()) for link in Path(f"/proc/{pid}/ns").iterdir()}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()


def _processes_naming(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names the folder."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)
