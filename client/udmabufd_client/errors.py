# SPDX-License-Identifier: MIT
"""Typed exceptions, one class per error of the interface, and the one table that maps error names to them.

Knows the names of errors and nothing of connections: service.py decides when one is raised.
"""

from __future__ import annotations

from typing import ClassVar, Final

from udmabufd_client import contract
from udmabufd_client.contract import ErrorName


class UdmabufError(Exception):
    """Base of everything that this package raises on purpose. `str()` is one sentence for a person.

    `dbus_name` is the error's full name on the bus; empty for errors that arise in the client.
    """

    error: ClassVar[ErrorName | None] = None

    def __init__(self, message: str = "", *, dbus_name: str = "") -> None:
        if not dbus_name and self.error is not None:
            dbus_name = contract.ERROR_PREFIX + self.error
        super().__init__(message or (contract.ERROR_MEANINGS[self.error] if self.error else ""))
        self.dbus_name = dbus_name


class InvalidSpec(UdmabufError, ValueError):
    """A key or argument is unknown, of the wrong type, out of range, or contradicts another."""

    error = ErrorName.INVALID_SPEC


class IncompatibleConstraints(UdmabufError, ValueError):
    """Two devices have no value in common for a constraint."""

    error = ErrorName.INCOMPATIBLE_CONSTRAINTS


class NoAllocator(UdmabufError):
    """No enabled allocator matches what was asked for."""

    error = ErrorName.NO_ALLOCATOR


class NoSuchDevice(UdmabufError, LookupError):
    """The device is not known to udev."""

    error = ErrorName.NO_SUCH_DEVICE


class NoSuchBuffer(UdmabufError, LookupError):
    """There is no such buffer, or this connection holds no share of it."""

    error = ErrorName.NO_SUCH_BUFFER


class AccessDenied(UdmabufError, PermissionError):
    """The caller may not do this: the service says so, or the bus's policy."""

    error = ErrorName.ACCESS_DENIED


class NotSupported(UdmabufError):
    """This kernel, this kind of buffer, or the version of the service that runs cannot do it."""

    error = ErrorName.NOT_SUPPORTED


class QuotaExceeded(UdmabufError):
    """The caller's user would hold more bytes or buffers than its limit."""

    error = ErrorName.QUOTA_EXCEEDED


class RateLimited(UdmabufError):
    """The caller's user made too many calls, or has too many under way; try again later."""

    error = ErrorName.RATE_LIMITED


class OutOfMemory(UdmabufError, MemoryError):
    """The kernel or the service has no memory, or no file descriptor, left for it."""

    error = ErrorName.OUT_OF_MEMORY


class KernelLimit(UdmabufError):
    """A parameter of the kernel's udmabuf driver forbids it; the message names parameter and value."""

    error = ErrorName.KERNEL_LIMIT


class UdmabufUnavailable(UdmabufError):
    """/dev/udmabuf is absent or failed its test; the message says what to do."""

    error = ErrorName.UDMABUF_UNAVAILABLE


class CacheUnavailable(UdmabufError):
    """The required cache attribute cannot be had."""

    error = ErrorName.CACHE_UNAVAILABLE


class BadMemfd(UdmabufError, ValueError):
    """A memfd lacks a seal, a mode, alignment or pages."""

    error = ErrorName.BAD_MEMFD


class Busy(UdmabufError, BlockingIOError):
    """The buffer is held in place, or is already moving."""

    error = ErrorName.BUSY


class MoveTimedOut(UdmabufError, TimeoutError):
    """An importer did not answer a move in time."""

    error = ErrorName.MOVE_TIMED_OUT


class RemoteFailure(UdmabufError):
    """An error that this version has no class for; `dbus_name` and the text are as they came."""


class CallTimedOut(UdmabufError, TimeoutError):
    """The service did not answer within the call's time-out. What it allocates afterwards is given back."""


class ServiceUnavailable(UdmabufError, ConnectionError):
    """The service is not there, the bus is lost, or the client was closed; the message says what to do."""


class ServiceRestarted(ServiceUnavailable):
    """The service, or the bus, ended while it served the call, and the call is not one that is repeated by itself.

    Whether it took effect is not known. The client goes on: the message says what to do.
    """


class BadReply(UdmabufError):
    """The answer is not what the interface says: another program owns the name, or a version does not fit."""


BY_ERROR_NAME: Final[dict[ErrorName, type[UdmabufError]]] = {
    cls.error: cls for cls in UdmabufError.__subclasses__() if cls.error is not None
}
"""The class of each error of the interface."""

NO_OWNER: Final = ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner")
"""The call was not taken: the service is not there, or is about to end."""

ENDED: Final = ("org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Disconnected")
"""The service ended before it answered; whether it had taken the call is not known."""

_SPAWN_PREFIX: Final = "org.freedesktop.DBus.Error.Spawn."

_STANDARD: Final[dict[str, type[UdmabufError]]] = {
    "org.freedesktop.DBus.Error.AccessDenied": AccessDenied,
    "org.freedesktop.DBus.Error.LimitsExceeded": RateLimited,
    "org.freedesktop.DBus.Error.NoMemory": OutOfMemory,
    "org.freedesktop.DBus.Error.UnknownMethod": NotSupported,
    "org.freedesktop.DBus.Error.UnknownInterface": NotSupported,
    "org.freedesktop.DBus.Error.UnknownProperty": NotSupported,
    "org.freedesktop.DBus.Error.Timeout": CallTimedOut,
    "org.freedesktop.DBus.Error.TimedOut": CallTimedOut,
    **dict.fromkeys((*NO_OWNER, *ENDED), ServiceUnavailable),
}
"""What the bus itself, or a library in the service, answers."""

START_HINT: Final = "start it with 'systemctl start udmabufd' and see 'journalctl -u udmabufd' if that fails"


def not_taken(name: str) -> bool:
    """Whether an error reply of this name says that the call reached no service, so that it had no effect."""
    return name in NO_OWNER or name.startswith(_SPAWN_PREFIX)


def from_remote(name: str, text: str) -> UdmabufError:
    """Return the exception for an error reply: its full D-Bus name and its text."""
    if name.startswith(contract.ERROR_PREFIX):
        try:
            return BY_ERROR_NAME[ErrorName(name.removeprefix(contract.ERROR_PREFIX))](text)
        except ValueError:
            return RemoteFailure(f"{text or 'no text'} ({name})", dbus_name=name)
    cls = ServiceUnavailable if name.startswith(_SPAWN_PREFIX) else _STANDARD.get(name, RemoteFailure)
    if cls is ServiceUnavailable:
        text = f"{contract.BUS_NAME} does not answer ({text or name}): {START_HINT}"
    elif cls is AccessDenied:
        text = f"The bus's policy refuses it ({text or name}): see {contract.BUS_NAME}.conf in dbus-1/system.d"
    elif cls is RemoteFailure:
        text = f"{text or 'no text'} ({name})"
    return cls(text, dbus_name=name)
