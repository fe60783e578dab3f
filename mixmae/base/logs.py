"""Where progress and warnings of ranks go: module loggers below `mixmae`, set up once per process.

MIXMAE_LOG_LEVEL=DEBUG   shows more, WARNING less; INFO without it
MIXMAE_LOG_FILE=PATH     writes it to a file too, with times; {rank} in it is the rank's number
"""

import logging
import os
import sys
from collections.abc import Mapping

from mixmae.base.errors import UsageError
from mixmae.base.redaction import redact

LEVEL, FILE = "MIXMAE_LOG_LEVEL", "MIXMAE_LOG_FILE"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class _Redacting(logging.Formatter):
    """Leaves credentials out, also of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Console(_Redacting):
    """Progress as it is, warnings as errors are told by `mixmae.base.errors`."""

    def __init__(self, rank: str) -> None:
        super().__init__("%(message)s")
        self._who = f"rank {rank}: " if rank != "0" else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"mixmae: {record.levelname.lower()}: {self._who}{text}" if record.levelno >= logging.WARNING else text


def set_up_logging(env: Mapping[str, str] = os.environ) -> None:
    """Shows what the package and its libraries log on standard output, and in a file if one is asked for.

    Of libraries only warnings and errors. To be called before torch and DeepSpeed are imported.

    Raises:
        UsageError: the environment names no level, or a file that cannot be written.
    """
    rank, level = env.get("RANK", "0"), env.get(LEVEL, "INFO").upper()
    if level not in _LEVELS:
        raise UsageError(f"{LEVEL}={env[LEVEL]}: expected one of {', '.join(_LEVELS)}")
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_Console(rank))
    root = logging.getLogger()
    root.handlers = [console]
    root.setLevel(logging.WARNING)
    logging.getLogger("mixmae").setLevel(level)
    if FILE in env:
        root.addHandler(_file_handler(env[FILE].replace("{rank}", rank)))
    if level != "DEBUG":
        logging.getLogger("DeepSpeed").addFilter(_is_warning)  # its level is set when it is imported, and says INFO


def _file_handler(path: str) -> logging.Handler:
    try:
        handler = logging.FileHandler(path)
    except OSError as error:
        raise UsageError(f"{FILE}={path} cannot be written: {error.strerror}; name another file") from error
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
