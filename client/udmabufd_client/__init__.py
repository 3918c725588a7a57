# SPDX-License-Identifier: MIT
"""The client library of udmabufd: dma-bufs from the allocator service, as objects.

`Client` blocks its callers; `aio.Client` has the same verbs as coroutines. Names are imported when they are first
used, so that `udmabufd_client.contract`, which the daemon shares, brings in nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from udmabufd_client import aio, errors, integrations, sync
    from udmabufd_client.errors import (
        AccessDenied,
        BadMemfd,
        BadReply,
        Busy,
        CacheUnavailable,
        CallTimedOut,
        IncompatibleConstraints,
        InvalidSpec,
        KernelLimit,
        MoveTimedOut,
        NoAllocator,
        NoSuchBuffer,
        NoSuchDevice,
        NotSupported,
        OutOfMemory,
        QuotaExceeded,
        RateLimited,
        RemoteFailure,
        ServiceRestarted,
        ServiceUnavailable,
        UdmabufError,
        UdmabufUnavailable,
    )
    from udmabufd_client.info import (
        AttachmentInfo,
        BufferInfo,
        Limits,
        ListedBuffer,
        Plane,
        RecoveredBuffer,
        Usage,
    )
    from udmabufd_client.inventory import AllocatorInfo, DeviceInfo, Verdict
    from udmabufd_client.memfd import wrappable_memfd
    from udmabufd_client.notice import MoveKind
    from udmabufd_client.slow_reads import SlowReadWarning
    from udmabufd_client.spec import new_request_id
    from udmabufd_client.sync import Attachment, Buffer, Client, Move

__all__ = [
    "Client",
    "Buffer",
    "Attachment",
    "Move",
    "MoveKind",
    "AttachmentInfo",
    "Verdict",
    "DeviceInfo",
    "AllocatorInfo",
    "BufferInfo",
    "ListedBuffer",
    "Plane",
    "Limits",
    "RecoveredBuffer",
    "Usage",
    "new_request_id",
    "wrappable_memfd",
    "SlowReadWarning",
    "aio",
    "sync",
    "errors",
    "integrations",
    "UdmabufError",
    "AccessDenied",
    "BadMemfd",
    "BadReply",
    "Busy",
    "CacheUnavailable",
    "CallTimedOut",
    "IncompatibleConstraints",
    "InvalidSpec",
    "KernelLimit",
    "MoveTimedOut",
    "NoAllocator",
    "NoSuchBuffer",
    "NoSuchDevice",
    "NotSupported",
    "OutOfMemory",
    "QuotaExceeded",
    "RateLimited",
    "RemoteFailure",
    "ServiceRestarted",
    "ServiceUnavailable",
    "UdmabufUnavailable",
]

_MODULES: Final = ("aio", "sync", "errors", "integrations")
_HOMES: Final = {
    "Client": "sync",
    "Buffer": "sync",
    "Attachment": "sync",
    "Move": "sync",
    "MoveKind": "notice",
    "AttachmentInfo": "info",
    "Verdict": "inventory",
    "DeviceInfo": "inventory",
    "AllocatorInfo": "inventory",
    "BufferInfo": "info",
    "ListedBuffer": "info",
    "Plane": "info",
    "Limits": "info",
    "RecoveredBuffer": "info",
    "Usage": "info",
    "new_request_id": "spec",
    "wrappable_memfd": "memfd",
    "SlowReadWarning": "slow_reads",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    found = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
