"""The ground of a stack: its database's file and its sockets, watched for somebody removing them beneath it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Identity = tuple[int, int]  # device and inode


def identity(path: Path) -> Identity | None:
    """Return the device and inode of a path; None where there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@dataclass(slots=True)
class Ground:
    """Paths as they were when this was made."""

    paths: Sequence[Path]
    _first: dict[Path, Identity | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first = {path: identity(path) for path in self.paths}

    def gone(self) -> list[Path]:
        """Return the paths that are no longer what they were."""
        return [path for path in self.paths if identity(path) != self._first[path]]
