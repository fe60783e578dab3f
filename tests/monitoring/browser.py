"""Headless Chromium, as a test sees it."""

import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.monitoring.services import needs

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=10000",
)


class Visit(NamedTuple):
    dom: str
    """The document, after its scripts ran."""
    console: list[str]
    """Errors and all else that was written to the browser's console."""


def visit(url: str, profile: Path, *options: str, size: tuple[int, int] = (1400, 1800)) -> Visit:
    """Opens a page; `profile` is a folder for the browser's own files."""
    flags = (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}")
    command = [needs("chromium", package="chromium"), *flags, *(options or ("--dump-dom",)), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
