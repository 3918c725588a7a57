# SPDX-License-Identifier: MIT
"""Configuration: TOML files in the places and with the drop-ins that systemd's own daemons use.

The main file is the first of /etc, /run and /usr/lib that has one; drop-ins of all three are read after it in the
order of their names, and one in /etc hides one of the same name below. A key that is not known is an error: a limit
that is mistyped must not silently stay at its default. The manual page is made from OPTIONS.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from udmabufd.core.limits import Limits

DIRECTORIES = (Path("/etc/udmabufd"), Path("/run/udmabufd"), Path("/usr/lib/udmabufd"))
"""Where files are looked for, the administrator's first."""

FILE_NAME = "udmabufd.toml"


class ConfigError(Exception):
    """A file cannot be read or says something that is not known; the text names file and key."""


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where the kernel's udmabuf driver is found."""

    device: str = field(
        default="/dev/udmabuf",
        metadata={"unit": "path", "doc": "The device node that exports memfds as dma-bufs."},
    )
    parameters: str = field(
        default="/sys/module/udmabuf/parameters",
        metadata={
            "unit": "path",
            "doc": "The folder of the driver's parameters list_limit and size_limit_mb.",
        },
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be configured, a field for each section of the file."""

    limits: Limits = field(default_factory=Limits)
    udmabuf: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True, slots=True)
class Option:
    """One key of the file, for its checks and its manual page."""

    section: str
    key: str
    type: type
    default: int | str
    unit: str
    doc: str
    minimum: int | None
    maximum: int | None


_SECTIONS: dict[str, type[Limits] | type[DeviceConfig]] = {"limits": Limits, "udmabuf": DeviceConfig}


def _options() -> tuple[Option, ...]:
    return tuple(
        Option(
            section,
            key.name,
            type(key.default),
            cast("int | str", key.default),
            key.metadata["unit"],
            key.metadata["doc"],
            key.metadata.get("min"),
            key.metadata.get("max"),
        )
        for section, fields in _SECTIONS.items()
        for key in dataclasses.fields(fields)
    )


OPTIONS = _options()
"""Every key, in the order of the manual page."""


def load(path: Path | None = None, directories: Iterable[Path] = DIRECTORIES) -> Config:
    """Read `path` alone, or the files and drop-ins found in `directories`. Raises ConfigError."""
    values: dict[str, dict[str, Any]] = {}
    for file in [path] if path is not None else _files(tuple(directories)):
        for section, entries in _read(file).items():
            values.setdefault(section, {}).update(entries)
    return Config(Limits(**values.get("limits", {})), DeviceConfig(**values.get("udmabuf", {})))


def _files(directories: tuple[Path, ...]) -> list[Path]:
    files = [directory / FILE_NAME for directory in directories if FILE_NAME in _names(directory)][:1]
    drop_ins: dict[str, Path] = {}
    for directory in reversed(directories):
        folder = directory / f"{FILE_NAME}.d"
        drop_ins.update({name: folder / name for name in _names(folder) if name.endswith(".toml")})
    return files + [drop_ins[name] for name in sorted(drop_ins)]


def _names(folder: Path) -> list[str]:
    """Return what is in `folder`. One that cannot be read is an error: it may hold limits that would be missed."""
    try:
        return os.listdir(folder)  # noqa: PTH208 (names are wanted)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
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
        raise ConfigError(f"{path}: {option.key} must be of type {option.type.__name__}, not {value!r}")
    if isinstance(value, int):
        low, high = option.minimum, option.maximum
        if (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"{path}: {option.key} must be {low} to {high} {option.unit}, not {value}")
