# SPDX-License-Identifier: MIT
"""The interfaces that every D-Bus object has: Properties, Introspectable and Peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from udmabufd.bus.dispatch import Dispatcher
from udmabufd.bus.objects import Call, EdgeError, Exported, Reply
from udmabufd.core.errors import AccessDenied
from udmabufd.core.ledger import ROOT
from udmabufd_base.codec import Variant
from udmabufd_base.interface import Property
from udmabufd_base.message import Message, MessageType

PROPERTIES = "org.freedesktop.DBus.Properties"

DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    '  "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)


def properties_changed(
    path: str,
    interface: str,
    changed: dict[str, Variant],
    destination: str = "",
    invalidated: Sequence[str] = (),
) -> Message:
    """Return the signal that properties have changed, of `invalidated` ones without their values, to one connection
    or, without destination, to everyone.
    """
    return Message(
        type=MessageType.SIGNAL,
        path=path,
        interface=PROPERTIES,
        member="PropertiesChanged",
        destination=destination,
        signature="sa{sv}as",
        body=[interface, changed, list(invalidated)],
    )


class StandardInterfaces:
    """Handlers that are the same for every object; the dispatcher has seen that a buffer's caller holds it."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.exported = (
            Exported(PROPERTIES, methods={"Get": self.get, "Set": self.set, "GetAll": self.get_all}),
            Exported("org.freedesktop.DBus.Introspectable", methods={"Introspect": self.introspect}),
            Exported("org.freedesktop.DBus.Peer", methods={"Ping": self.ping, "GetMachineId": self.get_machine_id}),
        )

    def get(self, call: Call, interface: str, name: str) -> Reply:
        """Answer one property."""
        exported, member = self._property(call, interface, name)
        return Reply([Variant(member.signature, exported.getters[name](call))])

    def get_all(self, call: Call, interface: str) -> Reply:
        """Answer all properties of an interface."""
        values = {
            name: Variant(exported.interface.properties[name].signature, get(call))
            for exported in self._named(call, interface)
            for name, get in exported.getters.items()
        }
        return Reply([values])

    def set(self, call: Call, interface: str, name: str, value: Variant) -> Reply:
        """Write a property: root only, and only one that the XML says can be written."""
        exported, member = self._property(call, interface, name)
        if not member.writable:
            raise EdgeError("PropertyReadOnly", f"{name} can only be read")
        if call.holder.uid != ROOT:
            raise AccessDenied(f"Only root may set {name}")
        if value.signature != member.signature:
            raise EdgeError("InvalidArgs", f"{name} has type {member.signature!r}, not {value.signature[:32]!r}")
        try:
            exported.setters[name](value.value)
        except ValueError as error:
            raise EdgeError("InvalidArgs", f"{name}: {error}") from None
        return Reply()

    def introspect(self, call: Call) -> Reply:
        """Describe an object: its interfaces as their XML has them, and its children."""
        children = "".join(f'  <node name="{name}"/>\n' for name in self._dispatcher.children(call.path))
        elements = "".join(exported.interface.element for exported in self._dispatcher.interfaces(call.path))
        return Reply([f"{DOCTYPE}<node>\n{elements}{children}</node>\n"])

    def ping(self, call: Call) -> Reply:
        """Answer."""
        return Reply()

    def get_machine_id(self, call: Call) -> Reply:
        """Answer the machine id."""
        try:
            return Reply([Path("/etc/machine-id").read_text(encoding="ascii").strip()])
        except OSError as error:
            raise EdgeError("FileNotFound", "This machine has no machine id") from error

    def _property(self, call: Call, interface: str, name: str) -> tuple[Exported, Property]:
        for exported in self._named(call, interface):
            if name in exported.getters:
                return exported, exported.interface.properties[name]
        raise EdgeError("UnknownProperty", "The interface has no such property")

    def _named(self, call: Call, name: str) -> list[Exported]:
        """Return the interface `name` of the object; where that is empty, as D-Bus allows for properties, all."""
        found = [e for e in self._dispatcher.interfaces(call.path) if name in ("", e.interface.name)]
        if not found:
            raise EdgeError("UnknownInterface", "The object has no such interface")
        return found
