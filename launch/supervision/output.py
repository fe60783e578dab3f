"""A process's output: all of it goes to a file, as much as possible to the console; the last lines are kept."""

import os
import queue
import re
import sys
import threading
from collections import deque
from pathlib import Path

KEPT_LINES = 30
_LONGEST_LINE = 500
_CHUNK = 2**16
_DEEPSPEED = rb"\[[\d :,-]+\] \[\w+\] \[(real_accelerator\.py:\d+:get_accelerator|launch\.py:\d+:sigkill_handler)\] "
_LOG_ONLY = re.compile(rb"(mixmae: error: |" + _DEEPSPEED + rb").*\r?\n?")
"""Lines that the console does without: errors, which the final message repeats, and DeepSpeed's of a missing GPU and of
ranks that failed."""
_WAITING = 1000
"""Chunks that wait for a slow console; more are dropped there."""


class Console:
    """Writes to standard output in a thread of its own, so that a stopped terminal or a broken pipe blocks nobody."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._left_out = 0
        self._thread = threading.Thread(target=self._write, name="console", daemon=True)
        self._thread.start()

    def show(self, chunk: bytes) -> None:
        chunk = b"".join(line for line in chunk.splitlines(keepends=True) if not _LOG_ONLY.fullmatch(line))
        if self._left_out and not self._queue.full():
            chunk = f"\n[{self._left_out} bytes dropped here; the log has them]\n".encode() + chunk
            self._left_out = 0
        try:
            self._queue.put_nowait(chunk)
        except queue.Full:
            self._left_out += len(chunk)

    def close(self, seconds: float) -> None:
        """Waits up to `seconds` until everything is shown."""
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _write(self) -> None:
        descriptor = sys.stdout.fileno()
        while (chunk := self._queue.get()) is not None:
            try:
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
            except OSError:
                return  # nobody reads any more; the log is still written


class Output:
    """Drains a pipe until its last writer is gone.

    A log that cannot be written loses lines but never ends the run: the pipe is still read, and the last lines say so.
    """

    def __init__(self, pipe: int, log: Path, console: Console | None = None) -> None:
        self._pipe, self._log, self._console = pipe, log, console
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._rest = b""
        self._unwritten: OSError | None = None
        self._file = log.open("ab", buffering=0)
        self._thread = threading.Thread(target=self._drain, name="output", daemon=True)
        self._thread.start()

    def last_lines(self) -> list[str]:
        """The last lines, without what a progress bar overwrote."""
        lines = [*self._kept.copy(), _readable(self._rest)]
        if self._unwritten is not None:
            lines.append(f"[{self._log} could not be written: {self._unwritten.strerror}]")
        return [line for line in lines if line][-KEPT_LINES:]

    def close(self, seconds: float) -> None:
        """Waits up to `seconds` for the end of the output."""
        self._thread.join(seconds)

    def _drain(self) -> None:
        while chunk := os.read(self._pipe, _CHUNK):
            try:
                self._file.write(chunk)
            except OSError as error:
                self._unwritten = error
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self._kept.extend(_readable(line) for line in lines)
            self._rest = self._rest[-_CHUNK:]
            if self._console is not None:
                self._console.show(chunk)
        self._file.close()


def _readable(line: bytes) -> str:
    shown = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
    return shown[:_LONGEST_LINE]
