# SPDX-License-Identifier: MIT
"""Directories that are slow to make, kept outside the repository: made once, whole or not at all, old ones dropped."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from .report import Report

SHORT = 16


def cache_root() -> Path:
    """The folder of everything kept between runs: ${XDG_CACHE_HOME:-~/.cache}/udmabufd/vm."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(base) / "udmabufd" / "vm"
    root.mkdir(parents=True, exist_ok=True)
    return root


def digest(parts: Iterable[bytes]) -> str:
    """A short hash over parts, which are kept apart by their lengths."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()[:SHORT]


def cached(report: Report, family: Path, key: str, keep: int, make: Callable[[Path], None]) -> Path:
    """The directory family/key; made by make(temporary directory) if it is not there, then renamed into place.

    Two runs at once: the second waits for the first. The `keep` most recently used of the family stay, older ones go
    when a new one was made; a guest that still runs on one keeps its open files.
    """
    family.mkdir(parents=True, exist_ok=True)
    final = family / key
    if not final.is_dir():
        with open(family / f".{key}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report.say(f"another run is making {final}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not final.is_dir():
                unfinished = family / f".{key}.unfinished"
                remove(unfinished)
                unfinished.mkdir()
                try:
                    make(unfinished)
                    unfinished.rename(final)
                except BaseException:
                    remove(unfinished)
                    raise
                _prune(report, family, keep)
    os.utime(final)
    return final


def remove(tree: Path) -> None:
    """Deletes a directory tree; one that is not there is fine."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", tree], check=False)


def _prune(report: Report, family: Path, keep: int) -> None:
    entries = [entry for entry in family.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    entries.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for old in entries[keep:]:
        report.say(f"dropping {old}, not used lately")
        remove(old)
        (family / f".{old.name}.lock").unlink(missing_ok=True)
