"""Files that a command was told to write."""

from __future__ import annotations

from pathlib import Path


def ensure_writable(path: Path) -> None:
    """Raise OSError unless a file can be written at `path`: nothing is to be measured in vain.

    Folders that are missing are made; a file that is there is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    path.open("ab").close()
    if fresh:
        path.unlink()
