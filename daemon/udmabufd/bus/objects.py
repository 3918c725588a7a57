# SPDX-License-Identifier: MIT
"""What an exported object consists of, and how its handlers talk to the dispatcher.

A handler gets the call and its plain arguments and returns a Reply; it decides nothing and knows no message.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from udmabufd.core.buffer import Holder
from udmabufd_base.fd import OwnedFd
from udmabufd_base.interface import Interface, parse
from udmabufd_client.contract import interface_xml

DBUS_ERROR = "org.freedesktop.DBus.Error."


class EdgeError(Exception):
    """An error that the D-Bus specification names, such as UnknownMethod."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.error_name = DBUS_ERROR + name


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and which object. `fds` came with the call and stay the dispatcher's; `interactive` callers can wait
    for somebody to type a password.
    """

    holder: Holder
    path: str
    fds: Sequence[OwnedFd] = ()
    interactive: bool = False

    def fd(self, index: int) -> OwnedFd:
        """Return, borrowed, the descriptor that an argument of type `h` stands for."""
        if not 0 <= index < len(self.fds):
            raise EdgeError("InvalidArgs", f"Descriptor {index} is named, and {len(self.fds)} came")
        return self.fds[index]


@dataclass(frozen=True, slots=True)
class Reply:
    """Arguments out, where `h` is an index into `fds`; the descriptors are the dispatcher's from here on. `sent` is
    called when the reply is on its way.
    """

    values: list[Any] = field(default_factory=list)
    fds: list[OwnedFd] = field(default_factory=list)
    sent: Callable[[], None] | None = None


Handler = Callable[..., Reply | Awaitable[Reply]]
Getter = Callable[[Call], Any]
Setter = Callable[[Any], None]


class Exported:
    """One interface of an object: a handler for each method of its XML, a getter for each property."""

    def __init__(
        self,
        name: str,
        *,
        methods: Mapping[str, Handler] | None = None,
        getters: Mapping[str, Getter] | None = None,
        setters: Mapping[str, Setter] | None = None,
    ) -> None:
        """Raises ValueError when handlers and XML do not tell of the same members."""
        self.interface: Interface = parse(interface_xml(name), name)
        self.methods = dict(methods or {})
        self.getters = dict(getters or {})
        self.setters = dict(setters or {})
        writable = {p.name for p in self.interface.properties.values() if p.writable}
        for ours, theirs in (
            (self.methods, self.interface.methods),
            (self.getters, self.interface.properties),
            (self.setters, writable),
        ):
            if difference := set(ours) ^ set(theirs):
                raise ValueError(f"{name}: XML and handlers differ in {', '.join(sorted(difference))}")
