"""Keeps processes from outliving the one that started them, however that one ends."""

import signal
import subprocess

_SCRIPT = """\
trap '' INT TERM HUP USR1 USR2
while read -r told; do group=$told; done
[ "${group:-0}" = 0 ] || kill -s "$1" -- "-$group"
"""


class Guard:
    """A process that waits for this one's end, and then signals a process group.

    The kernel can signal a child on its parent's death, but not the child's own children, such as data workers. The
    guard is a shell, so that a search for this process by its command line does not find it too.

    Args:
        ending: the signal that the group gets.
    """

    def __init__(self, ending: signal.Signals = signal.SIGKILL) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "mixmae-guard", ending.name.removeprefix("SIG")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # whoever reads this process's output must see its end
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def protect(self, group: int) -> None:
        """From now on the group ends with this process."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n".encode())
        self._process.stdin.flush()

    def release(self) -> None:
        """Ends the guard; the group is left alone."""
        self._process.communicate(b"0\n")
