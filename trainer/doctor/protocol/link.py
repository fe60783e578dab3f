"""Parser of network link speeds. No torch."""

import argparse
import re

_SPEED = re.compile(r"(\d+(?:\.\d+)?) ?([MGT])(bps|bit/s|B/s)")
_PREFIX = {"M": 1e6, "G": 1e9, "T": 1e12}


def link_rate(text: str) -> float:
    """Argument type: `200gbps` or `25GB/s` to bytes per second.

    Raises:
        argparse.ArgumentTypeError: the text is not a speed.
    """
    match = _SPEED.fullmatch(re.sub("[mgt](?=bps|bit/s)", lambda prefix: prefix[0].upper(), text.strip()))
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected bits or bytes per second, such as 200gbps or 25GB/s")
    return float(match[1]) * _PREFIX[match[2]] / (1 if match[3] == "B/s" else 8)
