# SPDX-License-Identifier: MIT
"""Programs that checks need: where they are, and what it means that one is not there."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

TOP: Final = Path(__file__).resolve().parents[2]

STRICT: Final = bool(os.environ.get("UDMABUFD_STRICT")) or os.environ.get("CI") == "true"
"""Where a tool that is missing fails the check: in CI, and in tests/run, which installs them. On a laptop it skips."""


def needed(name: str) -> str:
    """Return the path of a program, that of this Python's environment first; without it, fail or skip the test."""
    if name == "python3":
        return sys.executable
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        message = f"{name} is not installed"
        if STRICT:
            pytest.fail(message)
        pytest.skip(message)
    return path


def drop_in(file: Path, first: str) -> str:
    """Return the example of a drop-in that `file` shows, indented, after # or not, from the line `first` on."""
    lines = file.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.lstrip("# ") == first)
    prefix = lines[start].removesuffix(first)
    taken = itertools.takewhile(lambda line: line.startswith(prefix) or line == prefix.rstrip(), lines[start:])
    return "\n".join(line.removeprefix(prefix) if line.strip("# ") else "" for line in taken) + "\n"
