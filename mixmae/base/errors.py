"""Errors of the user: one clear line and exit code 2, never a traceback."""

import errno
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

from mixmae.base.exit_codes import FAILED, FINISHED
from mixmae.base.redaction import redact

ERROR = "mixmae: error: "
"""How the line begins that says what went wrong."""
_INTERRUPTED = 130
"""What a shell reports of a command that SIGINT ended."""
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""What is wrong with a file that no further start gets around."""
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)
"""What may be better at the next start: somebody made room, or the file system is mounted again."""
_BROKEN_PIPE = 141
"""What it reports of one that SIGPIPE ended."""


class UsageError(ValueError):
    """A wrong value from the user; the message gives the value, what was expected and what to change.

    It is shown in many places, so that credentials in it are hidden from the start.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


def run_cli(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs a command; a UsageError, or Ctrl-C, becomes one line on standard error and an exit code.

    A command whose reader has gone, as in `mixmae ... | head`, ends without a word. What a terminal's encoding has no
    characters for is shown by their numbers.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it
    try:
        try:
            code = _run(main, argv)
        finally:
            unwritten = _flush()
        return unwritten or code
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
        if not gone:
            raise
        for stream in gone:
            _drop_output(stream)
        return _BROKEN_PIPE


def _flush() -> int:
    """Writes what is buffered, which the interpreter would complain about at its end; an exit code if it cannot."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{ERROR}standard output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
        _drop_output(sys.stdout)
        return UsageError.exit_code
    return 0


def _run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    try:
        return main(argv)
    except UsageError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print("mixmae: interrupted", file=sys.stderr, flush=True)
        return _INTERRUPTED


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"{ERROR}{f'rank {rank}: ' if rank != '0' else ''}{message}", file=sys.stderr, flush=True)


def run_rank(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """As `run_cli`, for a process that must leave by `os._exit` whatever was raised.

    The interpreter's own way out would wait for data workers, which do not heed its SIGTERM. A file that cannot be
    written is one line too; errors that are not the user's are shown with their traceback.
    """
    try:
        return run_cli(main, argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED if end.code else FINISHED
    except BaseException as error:  # even one of memory
        if isinstance(error, OSError) and error.filename is not None and error.errno in (*_IN_THE_WAY, *_NOT_WRITABLE):
            _say(redact(f"{error.filename}: {error.strerror}"))
            return UsageError.exit_code if error.errno in _IN_THE_WAY else FAILED
        print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
        return FAILED


def describe_error(error: BaseException) -> str:
    """What an error says in a line, with its type unless it was written for users."""
    kind, said = type(error).__name__, redact(" ".join(str(error).split()))
    return said if said and isinstance(error, UsageError) else f"{kind}: {said}" if said else kind


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody will read any more."""
    poll = select.poll()
    with suppress(OSError):  # a stream without a descriptor, as in tests
        poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _drop_output(stream: TextIO) -> None:
    """What is still buffered, and the interpreter writes at its end, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
