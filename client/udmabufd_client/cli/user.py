# SPDX-License-Identifier: MIT
"""What only administrators may ask for: how it is asked, how users are named, and how a refusal is put."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from udmabufd_client.errors import AccessDenied

WHO = "For root, and for those whom polkit allows org.udmabufd.admin; a polkit agent may ask for a password."


def can_ask() -> bool:
    """Whether somebody is there who could answer a polkit agent."""
    return sys.stdin.isatty()


@contextmanager
def administrator(verb: str) -> Iterator[None]:
    """Say who may do it when the service, or the bus, refuses."""
    try:
        yield
    except AccessDenied as error:
        raise AccessDenied(
            f"{verb} is for root and for those whom polkit allows org.udmabufd.admin: try sudo ({error})",
            dbus_name=error.dbus_name,
        ) from error


def user_name(uid: int) -> str:
    """Return the user's name, or the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
