"""Kills child processes when their parent dies, for whatever reason."""

import signal
import subprocess

_SCRIPT = """\
trap '' INT TERM HUP USR1 USR2
while read -r told; do group=$told; done
[ "${group:-0}" = 0 ] || kill -s "$1" -- "-$group"
"""


class Guard:
    """A process that waits for its parent's death, and then signals a process group.

    The kernel can signal a child on its parent's death, but not grandchildren, such as data workers. The guard is a
    shell, so that a search for the parent by its command line does not find the guard too.

    Args:
        ending: the signal that the group gets.
    """

    def __init__(self, ending: signal.Signals = signal.SIGKILL) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "mixmae-guard", ending.name.removeprefix("SIG")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # must not hold the parent's pipe open
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def protect(self, group: int) -> None:
        """Kills the group when this process dies, from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n".encode())
        self._process.stdin.flush()

    def release(self) -> None:
        """Ends the guard without signalling the group."""
        self._process.communicate(b"0\n")
