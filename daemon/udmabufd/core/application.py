# SPDX-License-Identifier: MIT
"""The name of an application from its control group: what the books of one user are kept apart by.

Users name the units of their own service managers as they like, so the name is a label between programs of one user,
never a proof of anything. Whose cgroup it is, and that it is that process's, is left to `linux.process`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from udmabufd.linux.process import cgroup_of
from udmabufd_base.fd import OwnedFd

MAX_NAME: Final = 64
"""Characters of a name at most, each of 0x21 to 0x7e."""

_UNIT: Final = re.compile(r"(?P<body>[A-Za-z0-9:_.\\@-]+)\.(?P<type>service|scope|socket|mount|swap)")
"""unit_name_is_valid() of systemd, for the types of units that have processes."""

_MANAGER: Final = re.compile(r"user@\d+\.service")
"""The service that a user's own service manager is; what is below it was named by that user."""

_ESCAPED: Final = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")

_SNAP: Final = re.compile(r"snap\.([A-Za-z0-9_-]+)\..+")

_ACTIVATED: Final = re.compile(r"dbus-:[0-9.]+-(.+)@\d+")
"""What dbus-broker starts: its own unique name, the name that was called, and a count."""

_RANDOM: Final = re.compile(r"\d+|[0-9a-f]{32}")

_INSTANCE: Final = re.compile(
    r"-(?:c?\d+"  # logind's sessions, those of greeters with a c
    r"|u\d+|r[0-9a-f]{32}|p\d+-i\d+"  # systemd-run
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$"  # terminals
)
"""What tells the scopes of one kind apart."""


def application_of(cgroup: str) -> str:
    """Return the name of the application in the cgroup v2 path `cgroup`, or "" where it tells of none. Never raises.

    - a Flatpak: `flatpak:ID`, a Snap: `snap:NAME` (snap.NAME.APP.service, snap.NAME.APP-UUID.scope);
    - a unit app[-LAUNCHER]-ID[@RANDOM].service or app[-LAUNCHER]-ID-RANDOM.scope, as
      https://systemd.io/DESKTOP_ENVIRONMENTS/ has them: ID, systemd's escapes undone;
    - a service that dbus-broker started: the bus name that it was started for;
    - any other service: its unit's name, with the instance, for that was chosen: `foo@1.service`;
    - any other scope: its unit's name without `.scope`, and without the number that tells one from the next, so that
      all of a user's logins (session-3.scope) are `session`.

    Groups below the unit are its own affair and do not count; nor do slices. What is longer than 64 characters, or
    has any that is not of 0x21 to 0x7e, is shortened, has `?` in their place, and ends in `~` and 8 hexadecimal digits
    of its digest, so that two applications stay two.
    """
    unit = _unit_of(cgroup)
    match = _UNIT.fullmatch(unit)
    return "" if match is None else _printable(_name(match["body"], match["type"]))


def _unit_of(cgroup: str) -> str:
    """Return the first part of the path that is no slice, looking into a user's service manager; "" without one."""
    # A part with the name of a file of the kernel's is escaped by an underscore.
    parts = iter([part.removeprefix("_") for part in cgroup.split("/") if part])
    unit = next((part for part in parts if not part.endswith(".slice")), "")
    if _MANAGER.fullmatch(unit):
        return next((part for part in parts if not part.endswith(".slice")), unit)
    return unit


def _name(body: str, kind: str) -> str:
    if match := _SNAP.fullmatch(body):
        return f"snap:{match[1]}"
    if kind in ("service", "scope") and body.startswith("app-") and (name := _desktop_name(body, kind)):
        return name
    if kind == "service" and (match := _ACTIVATED.fullmatch(body)):
        return _unescape(match[1])
    return _INSTANCE.sub("", body) or body if kind == "scope" else f"{body}.{kind}"


def _desktop_name(body: str, kind: str) -> str:
    """Return the application id of app-[LAUNCHER-]ID..., or "" where there is none."""
    body, _, instance = body.partition("@")
    parts = body.split("-")[1:]
    # The random part of a service is behind `@`; earlier drafts of the convention had it as scopes have it.
    if len(parts) > 1 and not instance and (kind == "scope" or _RANDOM.fullmatch(parts[-1])):
        parts.pop()
    launcher = parts.pop(0) if len(parts) > 1 else ""
    # A dash in an id is to be escaped, and not everybody does.
    name = _unescape("-".join(parts))
    return f"flatpak:{name}" if name and launcher == "flatpak" else name


def _unescape(text: str) -> str:
    r"""Undo systemd's \xNN, which stands for a byte of UTF-8."""
    return _ESCAPED.sub(lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode("utf-8", "replace"), text)


def _printable(name: str) -> str:
    shown = "".join(char if "\x21" <= char <= "\x7e" else "?" for char in name)
    if shown == name and len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{shown[: MAX_NAME - 9]}~{digest}"


def of_process(pid: int, pidfd: OwnedFd | None, *, uid: int) -> str:
    """Return the application of process `pid`; "" where it cannot be known for certain. See linux.process.cgroup_of.

    Raises OSError for want of descriptors or memory only.
    """
    return application_of(cgroup_of(pid, pidfd, uid=uid) or "")
