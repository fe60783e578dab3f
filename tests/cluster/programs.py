"""What of Debian's a cluster needs."""

import os
import shutil
import subprocess

from tests.cluster import clock

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    clock.COMPILER: "gcc",
}


def missing() -> str | None:
    """Why no cluster can be made here, in one line with what to do; None if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    packages = {package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None}
    if packages:
        return f"needs programs of Debian: apt-get install --no-install-recommends {' '.join(sorted(packages))}"
    if os.geteuid():
        return "needs root, for namespaces: run it as root"
    trial = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        return "needs the right to make namespaces: in a container, start it privileged"
    return None
