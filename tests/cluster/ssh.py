"""ssh between the cluster's hosts: keys made for it, a daemon on each, nobody's own ssh files."""

import time
from pathlib import Path

from tests.cluster.host import Host
from tests.cluster.namespaces import run_checked

_DAEMON = """\
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

_CLIENT = """\
Host *
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    BatchMode yes
    StrictHostKeyChecking yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    UserKnownHostsFile /dev/null
"""


def configure(folder: Path) -> None:
    """Writes keys and configuration; the folder is every host's /etc/ssh."""
    folder.mkdir()
    for name in ("host_key", "user_key"):
        run_checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)])
    (folder / "known_hosts").write_text(f"* {(folder / 'host_key.pub').read_text()}")
    (folder / "sshd_config").write_text(_DAEMON)
    (folder / "ssh_config").write_text(_CLIENT)


def start(host: Host, log: Path) -> None:
    host.run(["mkdir", "--parents", "/run/sshd"], check=True)
    host.run(["/usr/sbin/sshd", "-E", log / "sshd.log"], check=True)


def set_environment(host: Host, environment: dict[str, str]) -> None:
    """Gives what is started by ssh on this host these variables, and no others of ours."""
    words = " ".join(f"{name}={value}" for name, value in environment.items())
    setting = f"printf %s '{f'SetEnv {words}' if words else ''}' > /run/sshd/environment.conf"
    host.run(["sh", "-c", f"{setting} && kill -HUP $(cat /run/sshd.pid)"], check=True)
    deadline = time.monotonic() + 10
    while not host.reaches(host):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{host.name}: sshd does not answer after it read its configuration again")
        time.sleep(0.05)
