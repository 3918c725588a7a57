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
