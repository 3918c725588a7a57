# SPDX-License-Identifier: MIT
"""Reads the device database: TOML files in devices.d of the places where the configuration is looked for.

A file in /etc hides one of the same name in /run and /usr/lib. What is not understood is an error: a constraint that
is mistyped must not silently be none. What entries mean is left to core/database.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from udmabufd import files
from udmabufd.config import DIRECTORIES
from udmabufd.core.constraints import NONE, Constraints
from udmabufd.core.database import Database, DumbFacts, Entry, Globs, Match, kernel_version, parse_kernels
from udmabufd.core.errors import InvalidSpec
from udmabufd.files import ConfigError
from udmabufd_client.contract import Cache

FOLDER: Final = "devices.d"
TABLE: Final = "device"
"""Each entry is a table [[device]]."""


class _Wrong(Exception):
    """What is wrong with an entry: the key, and why."""


def load(directories: Iterable[Path] = DIRECTORIES, release: str | None = None) -> Database:
    """Return the database that the files in `directories` make up, for this kernel or that of `release`.

    Raises ConfigError naming the file, the entry by its number in the file and its name, and the key.
    """
    entries = [entry for path in files.drop_ins(directories, FOLDER) for entry in read(path)]
    return Database(entries, kernel_version(release or os.uname().release))


def read(path: Path) -> list[Entry]:
    """Return the entries of one file. Raises ConfigError."""
    document = files.read_toml(path)
    for key in document.keys() - {TABLE}:
        raise ConfigError(f"{path}: {key!r} is not known; each entry is a table [[{TABLE}]]")
    tables = document.get(TABLE, [])
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: {TABLE} must be tables [[{TABLE}]]")
    entries = []
    for number, table in enumerate(tables, 1):
        try:
            entries.append(entry_of(table))
        except _Wrong as error:
            raise ConfigError(f"{path}: entry {number}{_named(table)}: {error}") from error
    return entries


def entry_of(table: object) -> Entry:
    """Return the entry that a table of a file states. Raises _Wrong."""
    values = _checked(table, "", ENTRY_KEYS)
    if "source" not in values:
        raise _Wrong("source: must say where this is known from")
    match = values.get("match", Match())
    if not any((match.driver, match.subsystem, match.name, match.modalias, match.property)):
        raise _Wrong("match: must name devices by driver, subsystem, name, modalias or property")
    dumb = values.get("dumb")
    return Entry(
        match,
        values["source"],
        values.get("constraints", NONE),
        values.get("by_cpu", False),
        values.get("own_only", False),
        None if dumb is None else DumbFacts(dumb["cache"], dumb["contiguous"], values["source"]),
    )


def _named(table: object) -> str:
    match = table.get("match") if isinstance(table, dict) else None
    values = [match.get(key) for key in ("driver", "name", "modalias")] if isinstance(match, dict) else []
    return next((f" ({value})" for value in values if isinstance(value, str)), "")


Check = Callable[[Any, str], Any]
"""Returns the value of a key, whose full name it is given, as entries have it. Raises _Wrong."""


def _checked(table: Any, key: str, known: dict[str, Check]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise _Wrong(f"{key or TABLE}: must be a table")
    for name in table.keys() - known.keys():
        raise _Wrong(f"{key}{'.' if key else ''}{name}: is not one of the keys {', '.join(known)}")
    return {name: known[name](value, f"{key}.{name}" if key else name) for name, value in table.items()}


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"{key}: must be text")
    return value


def _sources(value: Any, key: str) -> str:
    if not isinstance(value, list):
        value = [value]
    if not value:
        raise _Wrong(f"{key}: must say where this is known from")
    return "; ".join(_text(source, key) for source in value)


def _flag(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"{key}: must be true or false")
    return value


def _globs(value: Any, key: str) -> Globs:
    if not isinstance(value, list):
        value = [value]
    if not value:
        raise _Wrong(f"{key}: must have at least one pattern")
    return tuple(_text(glob, key) for glob in value)


def _table_of_globs(value: Any, key: str) -> dict[str, Globs]:
    if not isinstance(value, dict):
        raise _Wrong(f"{key}: must be a table")
    return {name: _globs(globs, f"{key}.{name}") for name, globs in value.items()}


def _kernels(value: Any, key: str) -> Any:
    try:
        return parse_kernels(_text(value, key))
    except ValueError as error:
        raise _Wrong(f"{key}: {error}") from error


def _pattern(value: Any, key: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(_text(value, key))
    except re.error as error:
        raise _Wrong(f"{key}: {error}") from error
    if pattern.groups != 1:
        raise _Wrong(f"{key}: must have one group, for the number")
    return pattern


def _cache(value: Any, key: str) -> Cache:
    try:
        return Cache(value)
    except ValueError:
        raise _Wrong(f"{key}: must be one of {', '.join(Cache)}") from None


def _match(value: Any, key: str) -> Match:
    return Match(**_checked(value, key, MATCH_KEYS))


def _constraints(value: Any, key: str) -> Constraints:
    if not isinstance(value, dict):
        raise _Wrong(f"{key}: must be a table")
    try:
        return Constraints.from_values(value, key)
    except InvalidSpec as error:
        raise _Wrong(str(error)) from error


def _dumb(value: Any, key: str) -> dict[str, Any]:
    checked = _checked(value, key, DUMB_KEYS)
    for name in DUMB_KEYS.keys() - checked.keys():
        raise _Wrong(f"{key}.{name}: is missing")
    return checked


MATCH_KEYS: Final[dict[str, Check]] = {
    "driver": _globs,
    "subsystem": _globs,
    "name": _globs,
    "modalias": _globs,
    "property": _table_of_globs,
    "parameter": _table_of_globs,
    "instance": _pattern,
    "iommu": _flag,
    "kernel": _kernels,
}
DUMB_KEYS: Final[dict[str, Check]] = {"cache": _cache, "contiguous": _flag}
ENTRY_KEYS: Final[dict[str, Check]] = {
    "match": _match,
    "constraints": _constraints,
    "by_cpu": _flag,
    "own_only": _flag,
    "dumb": _dumb,
    "source": _sources,
}
"""What an entry may have."""
