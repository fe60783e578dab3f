"""Debian packages that a cluster needs."""

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
    """Why no cluster can be brought up on this machine, in one line with the fix; None if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    packages = {package for program, package in PACKAGES.items() if shutil.which(program, path=path) is None}
    if packages:
        return f"needs Debian packages: apt-get install --no-install-recommends {' '.join(sorted(packages))}"
    if os.geteuid():
        return "needs root, for namespaces: run as root"
    trial = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        return "needs the privilege to create namespaces: in a container, start it with --privileged"
    return None
