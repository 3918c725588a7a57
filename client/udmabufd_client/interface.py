# SPDX-License-Identifier: MIT
"""The interfaces of the service as the installation describes them; the service is never asked for its own."""

from __future__ import annotations

from functools import cache
from typing import Final

from udmabufd_base.interface import Interface, parse
from udmabufd_client import contract

PROPERTIES_INTERFACE: Final = "org.freedesktop.DBus.Properties"


@cache
def interface(name: str) -> Interface:
    """Return interface `name`. Raises FileNotFoundError when the installation lacks its XML."""
    return parse(contract.interface_xml(name), name)


def preload() -> None:
    """Read the interfaces that every client uses: this takes milliseconds, which no event loop should be kept for."""
    for name in (contract.ALLOCATOR_INTERFACE, contract.BUFFER_INTERFACE, PROPERTIES_INTERFACE):
        interface(name)
