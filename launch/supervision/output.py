"""Output of a process: logged, shown on the console as far as that keeps up; the last lines are kept in memory."""

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
_QUEUED_CHUNKS = 1000
"""Chunks queued for a slow console; further ones are dropped."""


class Console:
    """Writes to standard output in a thread, so that a stopped terminal or broken pipe blocks nothing."""

    def __init__(self) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUED_CHUNKS)
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
        """Waits up to `seconds` until everything is written."""
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
                return  # the reader is gone; the log is still written


class Output:
    """Drains a pipe until its last writer has closed it.

    If the log cannot be written, lines are lost but the run continues: the pipe is still read, and the last lines say
    so.
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
        """The last lines, without text that a progress bar overwrote."""
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
