"""ssh between the cluster's hosts: generated keys and one sshd per host, independent of the user's ssh files."""

from collections.abc import Mapping
from pathlib import Path

from tests.cluster.host import Host
from tests.cluster.namespaces import run_checked

DAEMON = "sshd: /usr/sbin/sshd"
"""Prefix of the listening daemon's command line."""

_DAEMON_FILE = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PrintMotd no
MaxStartups 100
Include /run/sshd/*.conf
"""

_CLIENT_FILE = """\
Host *
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    BatchMode yes
    StrictHostKeyChecking yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    UserKnownHostsFile /dev/null
"""


def configure(folder: Path) -> None:
    """Writes keys and configuration; the folder becomes every host's /etc/ssh."""
    folder.mkdir()
    for name in ("host_key", "user_key"):
        run_checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)])
    (folder / "known_hosts").write_text(f"* {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(_DAEMON_FILE)
    (folder / "ssh_config").write_text(_CLIENT_FILE)


def start(host: Host) -> None:
    """Starts sshd; returns when it answers."""
    host.run(["mkdir", "--parents", "/run/sshd"], check=True)
    host.run(["/usr/sbin/sshd", "-E", host.logs / "sshd.log"], check=True)
    host.wait_until_reaches(host)


def set_environment(host: Host, environment: Mapping[str, str]) -> None:
    """Replaces the variables that sshd sets in new sessions on this host; open sessions are unaffected."""
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    setting = f"SetEnv {variables}\n" if variables else ""
    host.run(["sh", "-c", 'printf %s "$0" > /run/sshd/environment.conf', setting], check=True)
    host.kill(DAEMON)
    host.wait_until_exited(DAEMON)
    start(host)
