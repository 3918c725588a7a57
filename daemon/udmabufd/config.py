# SPDX-License-Identifier: MIT
"""Configuration: TOML files in the places and with the drop-ins that systemd's own daemons use.

The main file is the first of /etc, /run and /usr/lib that has one; drop-ins of all three are read after it in the
order of their names, and one in /etc hides one of the same name below. A key that is not known is an error: a limit
that is mistyped must not silently stay at its default. The manual page is made from OPTIONS.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from udmabufd import files
from udmabufd.core.heap_allocator import HeapRoles
from udmabufd.core.limits import Limits
from udmabufd.files import ConfigError as ConfigError
from udmabufd_client.contract import DUMB_PREFIX, HEAP_PREFIX, MEMFD, UDMABUF, UDMABUF_1G, UDMABUF_2M

DIRECTORIES = (Path("/etc/udmabufd"), Path("/run/udmabufd"), Path("/usr/lib/udmabufd"))
"""Where files are looked for, the administrator's first."""

FILE_NAME = "udmabufd.toml"

_GLOB = r"[!-.0-~]{1,64}"
"""Matches a glob of names that have no '/' in them."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where the kernel's udmabuf driver is found."""

    device: str = field(
        default="/dev/udmabuf",
        metadata={
            "unit": "path",
            "doc": "The device node that exports memfds as dma-bufs. It may be that of another driver with the same "
            "ioctls, see udmabufd(8).",
        },
    )
    parameters: str = field(
        default="/sys/module/udmabuf/parameters",
        metadata={
            "unit": "path",
            "doc": "The folder of the driver's parameters list_limit and size_limit_mb.",
        },
    )


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """Which allocators are enabled."""

    order: tuple[str, ...] = field(
        default=(UDMABUF, UDMABUF_2M, UDMABUF_1G, f"{HEAP_PREFIX}*", f"{DUMB_PREFIX}*", MEMFD),
        metadata={
            "unit": "allocators",
            "pattern": rf"{UDMABUF}|{UDMABUF_2M}|{UDMABUF_1G}|{MEMFD}|({HEAP_PREFIX}|{DUMB_PREFIX}){_GLOB}",
            "example": f"'{UDMABUF}' or '{HEAP_PREFIX}*'",
            "doc": "The allocators, best first; those that map memory as it was asked for come before the others. A "
            "buffer gets memory from the first that suits its devices and has some. heap:* stands for all dma-heaps "
            "and dumb:* for all cards of [drm], in the order of their names; heap:system is one heap. What is not in "
            "the list is not used.",
        },
    )


@dataclass(frozen=True, slots=True)
class DrmConfig:
    """Which DRM cards give dumb buffers."""

    cards: tuple[str, ...] = field(
        default=(),
        metadata={
            "unit": "names of cards",
            "pattern": "card[0-9]{1,6}",
            "example": "'card0'",
            "doc": "DRM cards below /dev/dri whose dumb buffers are given out, as allocators dumb:card0 and so on. A "
            "card that is not named here is never opened. Of one that is, the right to set modes, which comes with "
            "opening it, is given up at once, so that a compositor can have it. The unit must be allowed to open the "
            "node: see DeviceAllow= and SupplementaryGroups=.",
        },
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be configured, a field for each section of the file."""

    limits: Limits = field(default_factory=Limits)
    udmabuf: DeviceConfig = field(default_factory=DeviceConfig)
    allocators: AllocatorConfig = field(default_factory=AllocatorConfig)
    heaps: HeapRoles = field(default_factory=HeapRoles)
    drm: DrmConfig = field(default_factory=DrmConfig)


@dataclass(frozen=True, slots=True)
class Option:
    """One key of the file, for its checks and its manual page.

    `type` is what the file has: int, str, or list for strings each of which `pattern` matches, such as `example`.
    """

    section: str
    key: str
    type: type
    default: int | str | tuple[str, ...]
    unit: str
    doc: str
    minimum: int | None
    maximum: int | None
    pattern: str
    example: str


_Section = type[Limits] | type[DeviceConfig] | type[AllocatorConfig] | type[HeapRoles] | type[DrmConfig]

_SECTIONS: dict[str, _Section] = {
    "limits": Limits,
    "udmabuf": DeviceConfig,
    "allocators": AllocatorConfig,
    "heaps": HeapRoles,
    "drm": DrmConfig,
}


def _options() -> tuple[Option, ...]:
    return tuple(
        Option(
            section,
            key.name,
            list if isinstance(key.default, tuple) else type(key.default),
            cast("int | str | tuple[str, ...]", key.default),
            key.metadata["unit"],
            key.metadata["doc"],
            key.metadata.get("min"),
            key.metadata.get("max"),
            key.metadata.get("pattern", _GLOB),
            key.metadata.get("example", "'system*'"),
        )
        for section, fields in _SECTIONS.items()
        for key in dataclasses.fields(fields)
    )


OPTIONS = _options()
"""Every key, in the order of the manual page."""


def load(path: Path | None = None, directories: Iterable[Path] = DIRECTORIES) -> Config:
    """Read `path` alone, or the files and drop-ins found in `directories`. Raises ConfigError."""
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for file in [path] if path is not None else _files(tuple(directories)):
        for section, entries in _read(file).items():
            values[section].update(
                {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
            )
    return Config(**{section: fields(**values[section]) for section, fields in _SECTIONS.items()})  # type: ignore[arg-type]


def _files(directories: tuple[Path, ...]) -> list[Path]:
    main = [directory / FILE_NAME for directory in directories if FILE_NAME in files.names(directory)][:1]
    return main + files.drop_ins(directories, f"{FILE_NAME}.d")


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    tables = files.read_toml(path)
    known = {(option.section, option.key): option for option in OPTIONS}
    sections = {option.section for option in OPTIONS}
    for section, entries in tables.items():
        if section not in sections or not isinstance(entries, dict):
            raise ConfigError(f"{path}: {section!r} is not one of the sections {', '.join(sorted(sections))}")
        for key, value in entries.items():
            if (section, key) not in known:
                keys = ", ".join(option.key for option in OPTIONS if option.section == section)
                raise ConfigError(f"{path}: {key!r} is not one of the keys of [{section}]: {keys}")
            _check(path, known[section, key], value)
    return tables


def _check(path: Path, option: Option, value: object) -> None:
    # bool is an int to isinstance, and not to anyone who writes a limit.
    if not isinstance(value, option.type) or isinstance(value, bool):
        name = "array of strings" if option.type is list else option.type.__name__
        raise ConfigError(f"{path}: {option.key} must be of type {name}, not {value!r}")
    if isinstance(value, int):
        low, high = option.minimum, option.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"{path}: {option.key} must be {low} to {high} {option.unit}, not {value}")
    if isinstance(value, list):
        for entry in value:
            if not isinstance(entry, str) or not re.fullmatch(option.pattern, entry):
                raise ConfigError(f"{path}: {option.key} is of {option.unit}, such as {option.example}, not {entry!r}")
            if value.count(entry) > 1:
                raise ConfigError(f"{path}: {option.key} names {entry!r} more than once")
