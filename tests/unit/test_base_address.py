# SPDX-License-Identifier: MIT
"""udmabufd_base.address: D-Bus addresses."""

from __future__ import annotations

import os

import pytest

from udmabufd_base.address import socket_names


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("unix:path=/run/bus", [b"/run/bus"]),
        ("unix:path=/run/bus,guid=0123", [b"/run/bus"]),
        ("unix:guid=0123,abstract=name", [b"\0name"]),
        ("unix:path=/a%20b%2c%ff", [b"/a b,\xff"]),
        ("tcp:host=localhost,port=1;unix:path=/one;unix:abstract=two", [b"/one", b"\0two"]),
    ],
)
def test_addresses(address: str, names: list[bytes]) -> None:
    assert socket_names(address) == names


@pytest.mark.parametrize("address", ["", "tcp:host=localhost", "unix:", "unix:path", "/run/bus", "unix:tmpdir=/tmp"])
def test_what_cannot_be_connected_to_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="D-Bus address"):
        socket_names(address)


@pytest.mark.parametrize("bus", ["system", "session"])
def test_the_environment_names_the_well_known_buses(monkeypatch: pytest.MonkeyPatch, bus: str) -> None:
    monkeypatch.setenv(f"DBUS_{bus.upper()}_BUS_ADDRESS", "unix:path=/elsewhere")
    assert socket_names(bus) == [b"/elsewhere"]


def test_defaults_of_the_well_known_buses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DBUS_SYSTEM_BUS_ADDRESS", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert socket_names("system") == [b"/run/dbus/system_bus_socket"]
    assert socket_names("session") == [f"/run/user/{os.getuid()}/bus".encode()]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    assert socket_names("session") == [b"/elsewhere/bus"]
