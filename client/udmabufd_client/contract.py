# SPDX-License-Identifier: MIT
"""Every name that the daemon and its clients share: the contract, as data.

The one module of the client that the daemon imports. It holds names, D-Bus types of dictionary keys and the table of
errors, and finds the interface XML. What the names *do* is left to the daemon; how they travel to udmabufd_base.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

VERSION: Final = 1
"""Value of the property Version: raised when members are added, never when they change."""

BUS_NAME: Final = "org.udmabufd.Allocator1"
OBJECT_PATH: Final = "/org/udmabufd/Allocator1"
BUFFER_PATH_PREFIX: Final = OBJECT_PATH + "/buffer/"
"""A buffer's object path is this and its id: 64 random bits as 16 hexadecimal digits, never reused."""

ALLOCATOR_INTERFACE: Final = "org.udmabufd.Allocator1"
BUFFER_INTERFACE: Final = "org.udmabufd.Buffer1"
ADMIN_INTERFACE: Final = "org.udmabufd.Admin1"
LOG_CONTROL_INTERFACE: Final = "org.freedesktop.LogControl1"
LOG_CONTROL_PATH: Final = "/org/freedesktop/LogControl1"

ERROR_PREFIX: Final = "org.udmabufd.Error."


class ErrorName(StrEnum):
    """The errors of the interface; on the bus each carries ERROR_PREFIX."""

    INVALID_SPEC = "InvalidSpec"
    INCOMPATIBLE_CONSTRAINTS = "IncompatibleConstraints"
    NO_ALLOCATOR = "NoAllocator"
    NO_SUCH_DEVICE = "NoSuchDevice"
    NO_SUCH_BUFFER = "NoSuchBuffer"
    ACCESS_DENIED = "AccessDenied"
    NOT_SUPPORTED = "NotSupported"
    QUOTA_EXCEEDED = "QuotaExceeded"
    RATE_LIMITED = "RateLimited"
    OUT_OF_MEMORY = "OutOfMemory"
    KERNEL_LIMIT = "KernelLimit"
    UDMABUF_UNAVAILABLE = "UdmabufUnavailable"
    CACHE_UNAVAILABLE = "CacheUnavailable"
    BAD_MEMFD = "BadMemfd"
    BUSY = "Busy"
    MOVE_TIMED_OUT = "MoveTimedOut"


ERROR_MEANINGS: Final[dict[ErrorName, str]] = {
    ErrorName.INVALID_SPEC: "A key or argument is unknown, of the wrong type, out of range, or contradicts another; "
    "the message names it.",
    ErrorName.INCOMPATIBLE_CONSTRAINTS: "The constraints of two devices have no value in common; the message names "
    "the key and both.",
    ErrorName.NO_ALLOCATOR: "No enabled allocator matches what was asked for.",
    ErrorName.NO_SUCH_DEVICE: "The device is not known to udev, or is gone.",
    ErrorName.NO_SUCH_BUFFER: "There is no such buffer, or the caller holds no share of it.",
    ErrorName.ACCESS_DENIED: "The caller may not do this.",
    ErrorName.NOT_SUPPORTED: "This kernel or this kind of buffer cannot do it.",
    ErrorName.QUOTA_EXCEEDED: "The caller's user would hold more bytes or buffers than its limit.",
    ErrorName.RATE_LIMITED: "The caller's user made too many calls, or has too many under way; try again later.",
    ErrorName.OUT_OF_MEMORY: "The kernel or the service has no memory, or no file descriptor, left for it.",
    ErrorName.KERNEL_LIMIT: "A parameter of the kernel's udmabuf driver forbids it; the message names parameter and "
    "value.",
    ErrorName.UDMABUF_UNAVAILABLE: "/dev/udmabuf is absent or failed its test; the message says what to do.",
    ErrorName.CACHE_UNAVAILABLE: "The required cache attribute cannot be had.",
    ErrorName.BAD_MEMFD: "A memfd lacks a seal, a mode, alignment or pages.",
    ErrorName.BUSY: "The buffer is held in place, or is already moving.",
    ErrorName.MOVE_TIMED_OUT: "An importer did not answer a move in time.",
}
"""One sentence each, for manual pages and `--help`."""


class State(StrEnum):
    """States of a buffer."""

    EMPTY = "empty"
    BACKED = "backed"
    MOVING = "moving"
    EVICTED = "evicted"
    LINGERING = "lingering"


class Kind(StrEnum):
    """What is handed out: a dma-buf, or a sealed memfd for wl_shm and CPU sharing."""

    DMA_BUF = "dma-buf"
    MEMFD = "memfd"


class Cache(StrEnum):
    """Cache attribute of the CPU mappings of a buffer."""

    CACHED = "cached"
    WRITE_COMBINE = "write-combine"
    UNCACHED = "uncached"


class CachePolicy(StrEnum):
    """What to do when the cache attribute asked for cannot be had: take another, or refuse."""

    PREFER = "prefer"
    REQUIRE = "require"


class CacheEvidence(StrEnum):
    """How the effective cache attribute is known."""

    DEFAULT = "default"
    DRIVER = "driver"
    PROBE = "probe"
    MEASURED = "measured"


UDMABUF: Final = "udmabuf"
UDMABUF_2M: Final = "udmabuf-2M"
UDMABUF_1G: Final = "udmabuf-1G"
MEMFD: Final = "memfd"
WRAPPED: Final = "wrapped"
HEAP_PREFIX: Final = "heap:"
DUMB_PREFIX: Final = "dumb:"
"""Names of the allocators: the prefixes are followed by the name of a dma-heap, and of a DRM card (`card0`)."""

MAX_ATTACHMENTS: Final = 64
"""Attachments that a buffer has at the same time."""

MAX_FDS_PER_MESSAGE: Final = 16
"""dbus-daemon's max_message_unix_fds default, and so the largest count of AllocateMany."""

NAME_MAX: Final = 31
"""Bytes of a buffer's name: DMA_BUF_NAME_LEN of include/uapi/linux/dma-buf.h without the terminating NUL."""


REQUEST_ID_MIN: Final = 16
REQUEST_ID_MAX: Final = 64
"""Characters of a request_id, each of 0x21 to 0x7e."""

REQUEST_GRACE: Final = 10.0
"""Seconds for which a buffer that was asked for with a request_id outlives its last holder."""

MOVE_TIMEOUT_MAX: Final = 10_000
"""Milliseconds that an importer has at most to answer MoveNotify or EvictNotify."""

BUS_GRACE: Final = 30.0
"""Seconds for which buffers outlive a restart of the bus, for their clients to import them again."""


class Key(NamedTuple):
    """A key of a dictionary: the D-Bus type that its value has exactly, and what it means."""

    type: str
    meaning: str


CONSTRAINT_KEYS: Final[dict[str, Key]] = {
    "address_bits": Key("u", "Physical addresses have at most so many bits, 1 to 64."),
    "alignment": Key("t", "Bytes of which the physical address of each segment's start is a multiple."),
    "size_alignment": Key("t", "Bytes of which the buffer's size is a multiple."),
    "tail_padding": Key("t", "Bytes that follow the picture, or the size asked for."),
    "stride_alignment": Key("u", "Bytes of which each stride is a multiple."),
    "height_alignment": Key("u", "Rows: memory is laid out for a height that is a multiple of it."),
    "max_stride": Key("u", "Bytes of the longest stride."),
    "max_segments": Key(
        "u", "Physically adjacent runs of memory, cut at max_segment_size and segment_boundary, that may make it up."
    ),
    "max_segment_size": Key("t", "Bytes of the longest segment."),
    "segment_boundary": Key("t", "Bytes, a power of two: no segment crosses a multiple of it."),
    "contiguous": Key("b", "The same as max_segments 1."),
    "cache": Key("as", "Cache attributes of CPU mappings that are accepted."),
    "allocators": Key(
        "as", "Allocators that are accepted; heap:* stands for all dma-heaps, dumb:* for all cards' dumb buffers."
    ),
}
"""Keys of `constraints`, in the order in which they are explained; one that is absent demands nothing."""

SPEC_KEYS: Final[dict[str, Key]] = {
    "size": Key("t", "Bytes wanted, rounded up to whole pages. Either this or width, height and format."),
    "width": Key("u", "Pixels in a row."),
    "height": Key("u", "Rows."),
    "format": Key("s", "DRM fourcc, exactly four characters, spaces included, such as XR24 or NV12."),
    "name": Key("s", "1 to 31 bytes of 0x20 to 0x7e, shown by the kernel and by listings; made up if absent."),
    "kind": Key("s", "dma-buf (default), or memfd: a sealed memfd for wl_shm and CPU sharing."),
    "cache": Key("s", "Cache attribute of CPU mappings: cached (default), write-combine or uncached."),
    "cache_policy": Key("s", "prefer (default) takes what can be had; require refuses anything but cache."),
    "constraints": Key("a{sv}", "What the memory must be like beside what the devices need: see CONSTRAINT KEYS."),
    "devices": Key(
        "as",
        "Devices that will touch the buffer, each a device node, a sysfs path or subsystem:name. They become static "
        "attachments of the caller, numbered from 1 in this order.",
    ),
    "allocator": Key("s", "Take memory from this allocator and no other."),
    "request_id": Key(
        "s",
        "16 to 64 printable characters, meant to be random: the same id with an equal spec answers with the same "
        "buffer and a share of it, so that a call whose answer was lost can be repeated. Such a buffer outlives its "
        "last holder by 10 s.",
    ),
}
"""Keys of `spec`."""

WRAP_KEYS: Final[dict[str, Key]] = {
    "name": Key("s", "As in spec."),
    "constraints": Key("a{sv}", "As in spec."),
    "devices": Key("as", "As in spec."),
    "request_id": Key("s", "As in spec."),
}
"""Keys of the options of WrapMemfd."""

RECOVER_KEYS: Final[dict[str, Key]] = {
    "discard": Key("b", "Give up the buffers instead of keeping them; false if absent."),
}
"""Keys of the options of Recover."""

GET_FD_KEYS: Final[dict[str, Key]] = {
    "attachment": Key("u", "The caller's attachment that the descriptor is for."),
}
"""Keys of the options of GetFd."""

MOVE_KEYS: Final[dict[str, Key]] = {
    "allocator": Key("s", "The allocator to move to; the first that matches if absent."),
}
"""Keys of the options of Move."""

ATTACH_KEYS: Final[dict[str, Key]] = {
    "constraints": Key("a{sv}", "What the device needs beside what is known of it: see CONSTRAINT KEYS."),
    "dynamic": Key("b", "The importer can be told to use other memory; false if absent."),
}
"""Keys of the options of Attach."""

INFO_KEYS: Final[dict[str, Key]] = {
    "size": Key("t", "Bytes of the file descriptor, in whole pages: what is charged."),
    "size_requested": Key("t", "Bytes asked for, by size or by the layout of the picture."),
    "kind": Key("s", "dma-buf or memfd."),
    "allocator": Key("s", "The allocator that served."),
    "cache_requested": Key("s", "As in spec."),
    "cache_effective": Key("s", "What CPU mappings really are."),
    "cache_evidence": Key("s", "How that is known: default, driver, probe or measured."),
    "needs_sync": Key("b", "Whether CPU access needs the DMA_BUF_SYNC brackets to be correct; true when unsure."),
    "width": Key("u", "As in spec."),
    "height": Key("u", "As in spec."),
    "format": Key("s", "As in spec."),
    "modifier": Key("t", "DRM format modifier: 0, LINEAR."),
    "offsets": Key("at", "Bytes from the start of the buffer to each plane, in the order of the fourcc."),
    "strides": Key("at", "Bytes from row to row of each plane."),
    "serial": Key("t", "1 for the first memory of the buffer, higher for each later one, also after an eviction."),
    "inode": Key("t", "Inode number of the file descriptor: the same in every process that has it."),
    "name": Key("s", "The buffer's name."),
}
"""Keys of `info`; a key that does not apply is absent."""

LIST_KEYS: Final[dict[str, Key]] = {
    "buffer": Key("o", "The buffer's object."),
    **INFO_KEYS,
    "state": Key(
        "s",
        "empty, backed, moving, evicted, or lingering: nobody holds a share, and the kernel has not freed the memory "
        "yet.",
    ),
    "holders": Key("u", "Connections that hold shares of it."),
    "references": Key(
        "u",
        "References to the dma-buf that others hold: file descriptors, mappings and imports. "
        "Absent where the kernel counts none.",
    ),
    "charged": Key(
        "t",
        "Bytes charged for it: to who created it, or to the earliest holder once that user holds none; of an evicted "
        "buffer, bytes that can be swapped out.",
    ),
}
"""Keys of each entry of ListBuffers; a key that does not apply is absent."""

ATTACHMENT_KEYS: Final[dict[str, Key]] = {
    "attachment": Key("u", "Its number, never used again for this buffer."),
    "device": Key("s", "The device, as Attach or spec.devices named it."),
    "dynamic": Key("b", "As in Attach."),
    "pins": Key("u", "How often it is pinned."),
    "own": Key("b", "Whether it is the asking connection's."),
}
"""Keys of each row of the property Attachments."""

VERDICT_KEYS: Final[dict[str, Key]] = {
    "allocator": Key("s", "The allocator."),
    "ok": Key("b", "Whether it would be asked for the memory."),
    "field": Key("s", "The key of constraints or spec for which it refuses, empty if for no key."),
    "device": Key("s", "Whose constraint that is: a device, or spec; empty if nobody's."),
    "reason": Key("s", "What does not suit, with the figures."),
    "remedy": Key("s", "What would make it suit; empty if nothing would."),
    "cache_effective": Key("s", "What CPU mappings would be, where it would be asked."),
    "cache_evidence": Key("s", "How that is known, where it would be asked: default, driver, probe or measured."),
}
"""Keys of each row of Explain: field to remedy for one that would not be asked, the last two for one that would."""

DEVICE_KEYS: Final[dict[str, Key]] = {
    "device": Key("s", "What Attach takes: the device node, or subsystem:name where there is none."),
    "subsystem": Key("s", "The kernel's subsystem, such as drm or video4linux."),
    "label": Key("s", "What the device calls itself."),
    "driver": Key("s", "The driver of the device that does the DMA, where one is bound."),
    "dma_device": Key("s", "The device that does the DMA, subsystem:name."),
    "dma_mask_bits": Key("u", "Bits of the addresses that it can reach, where sysfs tells."),
    "iommu_group": Key("s", "Its IOMMU group; absent without an IOMMU."),
    "iommu_type": Key("s", "How the IOMMU translates for it, such as DMA or identity."),
    "numa_node": Key("u", "The NUMA node that it is near to, where there is one."),
    "constraints": Key("a{sv}", "What memory for it must be like: see CONSTRAINT KEYS."),
    "sources": Key("a{ss}", "Where each of these constraints is known from, by key."),
}
"""Keys of each row of ListDevices; a key that does not apply is absent."""

ALLOCATOR_KEYS: Final[dict[str, Key]] = {
    "allocator": Key("s", "Its name."),
    "kind": Key("s", "What it hands out: dma-buf or memfd."),
    "available": Key("b", "Whether it can serve at present."),
    "reason": Key("s", "Why it cannot, where it cannot."),
    "max_size": Key("t", "Bytes of the largest buffer that it gives at present."),
    "granule": Key("t", "Bytes of the physically contiguous, naturally aligned pieces that its memory consists of."),
    "contiguous": Key("b", "Whether a whole buffer is one physically contiguous run."),
    "address_bits": Key("u", "Bits of its physical addresses, where that is known."),
    "cache": Key("s", "Cache attribute of its CPU mappings, unless another is asked for that is among caches."),
    "caches": Key("as", "Every cache attribute that can be had of it."),
    "cache_evidence": Key("s", "How that is known: default, driver, probe or measured."),
    "accounting": Key(
        "s",
        "Whom the kernel charges for the memory: service, pool (huge pages set aside), system (nobody's control "
        "group), or client.",
    ),
    "free": Key("t", "Bytes left in its pool, where it has one."),
    "sources": Key("a{ss}", "Where each of these figures is known from, by key."),
}
"""Keys of each row of ListAllocators; a key that does not apply is absent."""

USAGE_KEYS: Final[dict[str, Key]] = {
    "uid": Key("u", "The user."),
    "application": Key("s", "The application, as its cgroup tells; empty where that is not known."),
    "buffers": Key("u", "Buffers that it holds or is charged for."),
    "bytes": Key("t", "Bytes charged, lingering ones included."),
    "lingering": Key("t", "Bytes of buffers that nobody holds any more and the kernel has not freed yet."),
    "refusals": Key("t", "Calls refused for a limit or for want of memory."),
}
"""Keys of each row of GetUsage."""

RECOVERED_KEYS: Final[dict[str, Key]] = {
    "buffer": Key("o", "The buffer's object, where it is known."),
    "size": Key("t", "Bytes."),
    "kind": Key("s", "dma-buf or memfd."),
    "name": Key("s", "The buffer's name, where it is known."),
    "inode": Key("t", "Inode number of the file descriptor."),
    "action": Key("s", "restored (with its holders), kept (without an owner, until it is imported), or discarded."),
}
"""Keys of each row of Recover."""


def types(keys: Mapping[str, Key]) -> dict[str, str]:
    """Return the D-Bus type of each key."""
    return {name: key.type for name, key in keys.items()}


CONSTRAINT_TYPES: Final = types(CONSTRAINT_KEYS)
SPEC_TYPES: Final = types(SPEC_KEYS)
GET_FD_TYPES: Final = types(GET_FD_KEYS)
MOVE_TYPES: Final = types(MOVE_KEYS)
ATTACH_TYPES: Final = types(ATTACH_KEYS)
ATTACHMENT_TYPES: Final = types(ATTACHMENT_KEYS)
VERDICT_TYPES: Final = types(VERDICT_KEYS)
DEVICE_TYPES: Final = types(DEVICE_KEYS)
ALLOCATOR_TYPES: Final = types(ALLOCATOR_KEYS)
INFO_TYPES: Final = types(INFO_KEYS)
LIST_TYPES: Final = types(LIST_KEYS)
WRAP_TYPES: Final = types(WRAP_KEYS)
RECOVER_TYPES: Final = types(RECOVER_KEYS)
USAGE_TYPES: Final = types(USAGE_KEYS)
RECOVERED_TYPES: Final = types(RECOVERED_KEYS)
"""D-Bus types alone, by key."""


def buffer_path(buffer_id: str) -> str:
    """Return the object path of the buffer with this id."""
    return BUFFER_PATH_PREFIX + buffer_id


def buffer_id(path: str) -> str:
    """Return the id of the buffer whose object path this is."""
    return path.removeprefix(BUFFER_PATH_PREFIX)


def interface_xml(name: str) -> str:
    """Return the introspection document of interface `name`, as shipped in systemd/interfaces.

    Raises FileNotFoundError when the installation lacks it.
    """
    packaged = resources.files("udmabufd_client") / "interfaces" / f"{name}.xml"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    # A source tree or an editable installation: the file is in its one home.
    source = Path(__file__).resolve().parents[2] / "systemd" / "interfaces" / f"{name}.xml"
    return source.read_text(encoding="utf-8")
