"""What can be seen from where the command is typed: recorded answers of ssh here, real hosts with services."""

import json
import sys
from pathlib import Path

import pytest

from mixmae.launch.backends.hostfile_parser import HostSlots
from mixmae.launch.preflight.login_checks import Answer, check_batch, check_names, explain
from mixmae.trainer.doctor.protocol.findings import Finding, Level, finding_of
from tests.cluster.cluster import Cluster
from tests.helpers import tiny_recipe

# What OpenSSH 9.2 writes.
RECORDED = {
    "unknown key": ("No ED25519 host key is known for node1 and you have requested strict checking.\n"
                    "Host key verification failed.", "host key is unknown", "ssh-keyscan node1"),
    "changed key": ("@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nIT IS POSSIBLE THAT SOMEONE IS DOING "
                    "SOMETHING!\nHost key verification failed.", "has changed", "ssh-keygen -R node1"),
    "refused key": ("root@node1: Permission denied (publickey).", "refuses your key", "ssh-copy-id node1"),
    "unknown": ("ssh: Could not resolve hostname node1: Name or service not known", "does not resolve", "hostfile"),
    "no sshd": ("ssh: connect to host node1 port 22: Connection refused", "nothing listens", "--ssh-port"),
    "down": ("ssh: connect to host node1 port 22: Connection timed out", "does not answer", "check that it is up"),
    "banner": ("Connection timed out during banner exchange", "does not answer", "check that it is up"),
    "no route": ("ssh: connect to host node1 port 22: No route to host", "no route", "check its network"),
    "too many": ("kex_exchange_identification: read: Connection reset by peer", "drops connections", "MaxStartups"),
    "other": ("Unable to negotiate with 10.0.0.1 port 22: no matching cipher found.", "no matching cipher", "by hand"),
    "silent": ("", "exit code 255", "by hand"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDED)
def test_what_ssh_says_is_told_with_what_to_do(case: str) -> None:
    errors, found, advice = RECORDED[case]
    finding = explain(Answer("node1", "", 255, errors))
    assert finding is not None
    assert (finding.level, finding.check, finding.where) == (Level.ERROR, "ssh", "node1")
    assert found in finding.found
    assert advice in finding.advice


@pytest.mark.parametrize(
    ("code", "found"), [(None, "no answer within"), (71, str(Path.cwd())), (72, sys.executable), (73, "mixmae")]
)
def test_hosts_that_lack_what_this_one_has(code: int | None, found: str) -> None:
    finding = explain(Answer("node1", "a b", code, ""))
    assert finding is not None
    assert found in finding.found


def test_a_good_answer_is_no_finding() -> None:
    assert explain(Answer("node1", "a b", 0, "Warning: Permanently added 'node1' to the list of known hosts.")) is None


def test_batches_that_divide_and_that_do_not() -> None:
    recipe = tiny_recipe(**{"train.global_batch": 8, "train.micro_batch": 2})
    (good,) = check_batch(recipe, 2)
    assert (good.level, good.found) == (Level.OK, "8 images = 2 x 2 ranks x 2 micro-steps")
    (bad,) = check_batch(recipe, 3)
    assert bad.level is Level.ERROR
    assert "does not divide" in bad.found
    (streams,) = check_batch(tiny_recipe(**{"data.streams": 1}), 2)
    assert "cannot share data.streams=1" in streams.found


def test_names_that_are_one_address_or_none() -> None:
    assert list(check_names(HostSlots({"localhost": (0,)}))) == []
    (twice,) = check_names(HostSlots({"localhost": (0,), "127.0.0.1": (0,)}))
    assert (twice.where, twice.found) == ("localhost, 127.0.0.1", "all are 127.0.0.1")
    (unknown,) = check_names(HostSlots({"nowhere.invalid": (0,)}))
    assert "does not resolve here" in unknown.found


ASK = """
import sys
from mixmae.launch.backends.hostfile_parser import read_hostfile
from mixmae.launch.preflight.login_checks import check_hosts
from pathlib import Path
print("\\n".join(f.to_json() for f in check_hosts(read_hostfile(Path(sys.argv[1])))))
"""


def asked(cluster: Cluster, hosts: dict[str, int], tmp_path: Path, **options: object) -> list[Finding]:
    """What `check_hosts` finds from the cluster's login host."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots={slots}\n" for name, slots in hosts.items()))
    done = cluster.login.run([sys.executable, "-c", ASK, hostfile], check=True, **options)  # type: ignore[arg-type]
    return [finding_of(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.services
def test_hosts_that_answer(cluster: Cluster, tmp_path: Path) -> None:
    (finding,) = asked(cluster, {"node1": 2, "node2": 2}, tmp_path)
    assert finding.level is Level.OK
    assert finding.found.startswith("all answered within")


@pytest.mark.services
def test_a_host_that_is_down(cluster: Cluster, tmp_path: Path) -> None:
    cluster.hosts[1].disconnect()
    try:
        (finding,) = asked(cluster, {"node1": 2, "node2": 2}, tmp_path)
    finally:
        cluster.hosts[1].reconnect()
    assert (finding.level, finding.where, finding.found) == (Level.ERROR, "node2", "it does not answer")


@pytest.mark.services
def test_a_machine_under_two_addresses(cluster: Cluster, tmp_path: Path) -> None:
    node1 = cluster.hosts[0]
    second = ["ip", "address", "{}", "10.77.0.200/24", "dev", "eth0"]
    node1.run([word.format("add") for word in second], check=True)
    try:
        findings = asked(cluster, {"node1": 1, "10.77.0.200": 1}, tmp_path)
    finally:
        node1.run([word.format("delete") for word in second], check=True)
    wrong = [finding for finding in findings if finding.level is Level.ERROR]
    assert [(finding.where, finding.found) for finding in wrong] == [("node1, 10.77.0.200", "are one machine")]


@pytest.mark.services
@pytest.mark.parametrize(
    ("option", "found"),
    [("GlobalKnownHostsFile=/dev/null", "its host key is unknown here"), ("PreferredAuthentications=none", "refuses")],
)
def test_keys_that_do_not_fit(cluster: Cluster, tmp_path: Path, option: str, found: str) -> None:
    findings = asked(cluster, {"node1": 2, "node2": 2}, tmp_path, env={"PDSH_SSH_ARGS_APPEND": f"-o {option}"})
    assert [finding.where for finding in findings] == ["node1", "node2"]
    assert all(found in finding.found for finding in findings)


@pytest.mark.services
def test_a_host_without_this_folder_or_this_python(cluster: Cluster, tmp_path: Path) -> None:
    login, _, node2 = cluster.login, *cluster.hosts
    here = cluster.local / "only-here"
    login.run(["mkdir", here], check=True)
    findings = asked(cluster, {"node1": 2, "node2": 2}, tmp_path, cwd=here)
    assert [(f.where, f.found) for f in findings] == [(name, f"it has no {here}") for name in ("node1", "node2")]
    hidden = Path(sys.executable).parent
    node2.mount_tmpfs(hidden, "1M")
    try:
        (finding,) = asked(cluster, {"node1": 2, "node2": 2}, tmp_path)
    finally:
        node2.unmount(hidden)
    assert (finding.where, finding.found) == ("node2", f"it has no {sys.executable}")
