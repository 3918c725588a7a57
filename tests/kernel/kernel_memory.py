# SPDX-License-Identifier: MIT
"""Memory, symbols and the page attribute table of the running x86-64 kernel, read as root; what they mean is left.

Nothing is changed and no kernel text is patched: /proc/kcore and /proc/kallsyms are read, and the MSR driver is
loaded. A kernel that is locked down refuses the former.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

Kind = Literal["WB", "WC", "UC-", "UC", "WT", "WP"]

KCORE: Final = Path("/proc/kcore")
KALLSYMS: Final = Path("/proc/kallsyms")

_ELF_HEADER: Final = struct.Struct("=16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("=IIQQQQQQ")
_PT_LOAD: Final = 1

_IA32_PAT: Final = 0x277
# Intel SDM volume 3, "Page Attribute Table": the encodings of IA32_PAT; 2 and 3 are reserved.
_ENCODINGS: Final[dict[int, Kind]] = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}


class Segment(NamedTuple):
    """A range of kernel addresses, `start` to `end`, and where it begins in /proc/kcore and in physical memory."""

    start: int
    end: int
    offset: int
    physical: int


class KernelMemory:
    """/proc/kcore, open until close(). Raises OSError when made: EPERM without CAP_SYS_RAWIO or locked down."""

    def __init__(self) -> None:
        self._file = KCORE.open("rb", buffering=0)
        try:
            self.segments = self._read_segments()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()

    def read(self, address: int, size: int) -> bytes:
        """Return `size` bytes at a kernel address. Raises OSError: EFAULT where the kernel has no memory."""
        for segment in self.segments:
            if segment.start <= address and address + size <= segment.end:
                data = os.pread(self._file.fileno(), size, segment.offset + address - segment.start)
                if len(data) == size:
                    return data
                break
        raise OSError(errno.EFAULT, f"{KCORE} has no {size} bytes at {address:#x}")

    def word(self, address: int, size: int = 8) -> int:
        """Return an unsigned integer of `size` bytes. Raises OSError as read() does."""
        return int.from_bytes(self.read(address, size), "little")

    def _read_segments(self) -> list[Segment]:
        fd = self._file.fileno()
        header = _ELF_HEADER.unpack(os.pread(fd, _ELF_HEADER.size, 0))
        table_at, count = header[5], header[10]
        table = os.pread(fd, count * _PROGRAM_HEADER.size, table_at)
        segments = []
        for kind, _, offset, start, physical, size, _, _ in _PROGRAM_HEADER.iter_unpack(table):
            if kind == _PT_LOAD:
                segments.append(Segment(start, start + size, offset, physical))
        return segments


def symbols(names: Sequence[str]) -> dict[str, int]:
    """Return the addresses of the kernel's own symbols `names`.

    Raises LookupError for one that the kernel does not have, PermissionError if addresses are hidden.
    """
    data = KALLSYMS.read_bytes()
    found = {}
    for name in names:
        # A line is "ffffffff81000000 T _text"; a module's name follows those of its symbols.
        at = data.find(f" {name}\n".encode())
        if at >= 0:
            found[name] = int(data[data.rfind(b"\n", 0, at) + 1 : at].split()[0], 16)
    if missing := [name for name in names if name not in found]:
        raise LookupError(
            f"the kernel has no symbol {', '.join(missing)}; is it one for x86-64 with CONFIG_KALLSYMS_ALL?"
        )
    if 0 in found.values():
        raise PermissionError(
            errno.EPERM, f"{KALLSYMS} shows no addresses: be root, and set kernel.kptr_restrict to 1"
        )
    return found


def page_attribute_table() -> tuple[Kind, ...]:
    """Return what each of the eight PAT indices means, as the processors have it (not as the kernel believes).

    Loads the MSR driver. Raises OSError, CalledProcessError if there is none; RuntimeError if processors disagree.
    """
    if not Path("/dev/cpu/0/msr").exists():
        subprocess.run(["modprobe", "msr"], check=True)
        subprocess.run(["udevadm", "wait", "--timeout=30", "/dev/cpu/0/msr"], check=True)
    values = {}
    for device in Path("/dev/cpu").glob("[0-9]*/msr"):
        with open(device, "rb", buffering=0) as msr:
            values[device.parent.name] = os.pread(msr.fileno(), 8, _IA32_PAT)
    if len(set(values.values())) != 1:
        raise RuntimeError(f"processors with different page attribute tables, or none: {values}")
    return decode_pat(next(iter(values.values())))


def decode_pat(register: bytes) -> tuple[Kind, ...]:
    """Return the meaning of the eight bytes of IA32_PAT. Raises ValueError for a reserved encoding."""
    try:
        return tuple(_ENCODINGS[byte] for byte in register)
    except KeyError as error:
        raise ValueError(f"reserved encoding {error} in IA32_PAT {register[::-1].hex()}") from None
