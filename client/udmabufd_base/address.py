# SPDX-License-Identifier: MIT
"""D-Bus addresses: from what names a bus to what connect() takes. Connecting is left to auth.

Source: D-Bus specification, "Server Addresses" and "Well-known Message Bus Instances".
"""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import unquote_to_bytes

SYSTEM_DEFAULT: Final = "unix:path=/run/dbus/system_bus_socket"


def socket_names(address: str) -> list[bytes]:
    """Return the AF_UNIX names to try, in order, for an address list, `system` or `session`.

    The names begin with NUL for abstract sockets. Transports other than unix:path and unix:abstract are passed over.
    Raises ValueError when none remains, or when the address is malformed.
    """
    names = []
    for entry in _address(address).split(";"):
        transport, _, options = entry.partition(":")
        if transport != "unix":
            continue
        values = dict(_option(option) for option in options.split(",") if option)
        if "path" in values:
            names.append(values["path"])
        elif "abstract" in values:
            names.append(b"\0" + values["abstract"])
    if not names:
        raise ValueError(f"no unix:path= or unix:abstract= in the D-Bus address {address!r}")
    return names


def _address(address: str) -> str:
    if address == "system":
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_DEFAULT
    if address == "session":
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        return os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={runtime}/bus"
    return address


def _option(option: str) -> tuple[str, bytes]:
    key, equals, value = option.partition("=")
    if not equals:
        raise ValueError(f"{option!r} in a D-Bus address is not key=value")
    return key, unquote_to_bytes(value)
