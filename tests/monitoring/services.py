"""Programs that tests need from Debian packages."""

import os
import shutil

import pytest


def needs(program: str, package: str) -> str:
    """The program's path; skips the test where it is missing, and fails it in CI, which installs it."""
    path = shutil.which(program)
    if path is None:
        reason = f"needs the program {program}: apt-get install {package}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return path
