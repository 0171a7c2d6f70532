"""Amounts of memory as people write them."""

import re

from protocol.errors import BadRequest

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """'16GB' → 16e9, '16GiB' → 17.18e9. BadRequest for anything else."""
    match = AMOUNT.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise BadRequest(f"{text!r} is not an amount of memory.", "Write it as 16GB, 15.5GiB or 800MB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_bytes(count: int) -> str:
    """'1.6 GB', in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_seconds(text: str) -> float:
    """'30d', '12h', '90m', '45s' or '45' in seconds; BadRequest."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in SECONDS else (text, "s")
    try:
        seconds = float(number) * SECONDS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise BadRequest(f"{text!r} is not a duration.", "Write it as 30d, 12h, 90m or 45s.")
    return seconds
