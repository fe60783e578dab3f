"""Programs that tests need from Debian packages."""

import shutil

from tests.helpers import is_marked, lacks


def needs(program: str, package: str) -> str:
    """The program's path; skips the test where it is missing, and fails it in CI, which installs it."""
    is_marked("services")
    path = shutil.which(program)
    if path is None:
        lacks(f"needs the program {program}: apt-get install {package}")
    return path
