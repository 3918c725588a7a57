# SPDX-License-Identifier: MIT
"""Finds and reads configuration files where systemd's own daemons look for theirs.

What a file may say is left to config.py and database.py.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUFFIX = ".toml"


class ConfigError(Exception):
    """A file cannot be read or says something that is not known; the text names file and key."""


def drop_ins(directories: Iterable[Path], folder: str) -> list[Path]:
    """Return the files of `folder` in all `directories`, the administrator's directory first, in the order of their
    names. A file hides those of the same name in later directories. Raises ConfigError.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        for name in names(directory / folder):
            if name.endswith(SUFFIX):
                found.setdefault(name, directory / folder / name)
    return [found[name] for name in sorted(found)]


def names(folder: Path) -> list[str]:
    """Return what is in `folder`, nothing if there is none.

    Raises ConfigError for one that cannot be read: it may hold limits that would be missed.
    """
    try:
        return os.listdir(folder)  # noqa: PTH208 (names are wanted)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return what the file says. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
