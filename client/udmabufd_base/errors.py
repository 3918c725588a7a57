# SPDX-License-Identifier: MIT
"""What can go wrong on a D-Bus connection, as exceptions. The errors of udmabufd's interface are left to its users."""

from __future__ import annotations


class BusError(Exception):
    """Base of everything that udmabufd_base raises about D-Bus, but for ValueError on wrong arguments."""


class AuthError(BusError):
    """The bus refused our credentials, or closed the connection while it was looking at them."""


class ConnectionLost(BusError):
    """There is no connection: it could not be made, has ended, or was closed by this side."""


class CallTimedOut(BusError):
    """No answer came in time. The call may still take effect; a late reply is dropped and its fds are closed."""


class QueueFull(BusError):
    """The bus does not read and the queue has reached its bound; nothing of the message was sent."""


class ProtocolError(BusError):
    """The peer sent bytes that are not D-Bus, or a body that does not match its signature."""


class BodyTooLarge(BusError):
    """The body was over the connection's bound: it was skipped unread."""


class NameTaken(BusError):
    """Another connection owns the bus name."""


class RemoteError(BusError):
    """The called side answered with an error: `name` is its D-Bus name, `message` its text (may be empty)."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(name, message)
        self.name = name
        self.message = message

    def __str__(self) -> str:
        return f"{self.name}: {self.message}" if self.message else self.name
