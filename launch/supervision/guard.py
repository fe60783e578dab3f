"""No process outlives the one that started it, however that one ends."""

import signal
import subprocess

_SCRIPT = """\
trap '' INT TERM HUP USR1 USR2
while read -r told; do group=$told; done
[ "${group:-0}" = 0 ] || kill -s "$1" -- "-$group"
"""


class Guard:
    """A process that does nothing but wait for this one's end, and then ends a process group.

    The kernel could tell a child alone of its parent's death; its children, such as loading processes, would live on.
    It is a shell, so that who looks for this process by its command line does not find both.

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
        """From now on the group is ended when this process is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{group}\n".encode())
        self._process.stdin.flush()

    def release(self) -> None:
        """Nothing is left to end; the guard goes too."""
        self._process.communicate(b"0\n")
