# SPDX-License-Identifier: MIT
"""Every number that linux/ takes from the kernel, against the kernel's own headers and against their arithmetic."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from udmabufd.linux import dma_heap, dmabuf, drm, memfd, udmabuf

OURS = {
    "UDMABUF_CREATE": udmabuf.UDMABUF_CREATE,
    "UDMABUF_CREATE_LIST": udmabuf.UDMABUF_CREATE_LIST,
    "UDMABUF_FLAGS_CLOEXEC": udmabuf.UDMABUF_FLAGS_CLOEXEC,
    "DMA_BUF_IOCTL_SYNC": dmabuf.DMA_BUF_IOCTL_SYNC,
    "DMA_BUF_SYNC_READ": dmabuf.DMA_BUF_SYNC_READ,
    "DMA_BUF_SYNC_WRITE": dmabuf.DMA_BUF_SYNC_WRITE,
    "DMA_BUF_SYNC_START": dmabuf.DMA_BUF_SYNC_START,
    "DMA_BUF_SYNC_END": dmabuf.DMA_BUF_SYNC_END,
    "DMA_BUF_NAME_LEN": dmabuf.DMA_BUF_NAME_LEN,
    "DMA_BUF_SET_NAME_A": dmabuf.DMA_BUF_SET_NAME_A,
    "DMA_BUF_SET_NAME_B": dmabuf.DMA_BUF_SET_NAME_B,
    "MFD_CLOEXEC": memfd.MFD_CLOEXEC,
    "MFD_ALLOW_SEALING": memfd.MFD_ALLOW_SEALING,
    "MFD_HUGETLB": memfd.MFD_HUGETLB,
    "MFD_HUGE_SHIFT": memfd.MFD_HUGE_SHIFT,
    "MFD_NOEXEC_SEAL": memfd.MFD_NOEXEC_SEAL,
    "MFD_EXEC": memfd.MFD_EXEC,
    "F_ADD_SEALS": memfd.F_ADD_SEALS,
    "F_GET_SEALS": memfd.F_GET_SEALS,
    "F_SEAL_SEAL": memfd.F_SEAL_SEAL,
    "F_SEAL_SHRINK": memfd.F_SEAL_SHRINK,
    "F_SEAL_GROW": memfd.F_SEAL_GROW,
    "F_SEAL_WRITE": memfd.F_SEAL_WRITE,
    "F_SEAL_FUTURE_WRITE": memfd.F_SEAL_FUTURE_WRITE,
    "F_SEAL_EXEC": memfd.F_SEAL_EXEC,
    "DMA_HEAP_IOCTL_ALLOC": dma_heap.DMA_HEAP_IOCTL_ALLOC,
    "DRM_IOCTL_VERSION": drm.DRM_IOCTL_VERSION,
    "DRM_IOCTL_AUTH_MAGIC": drm.DRM_IOCTL_AUTH_MAGIC,
    "DRM_IOCTL_SET_MASTER": drm.DRM_IOCTL_SET_MASTER,
    "DRM_IOCTL_DROP_MASTER": drm.DRM_IOCTL_DROP_MASTER,
    "DRM_IOCTL_PRIME_HANDLE_TO_FD": drm.DRM_IOCTL_PRIME_HANDLE_TO_FD,
    "DRM_IOCTL_MODE_CREATE_DUMB": drm.DRM_IOCTL_MODE_CREATE_DUMB,
    "DRM_IOCTL_MODE_DESTROY_DUMB": drm.DRM_IOCTL_MODE_DESTROY_DUMB,
}

NEWER = {"MFD_NOEXEC_SEAL", "MFD_EXEC", "F_SEAL_EXEC"}
"""Missing in headers before Linux 6.3, such as Debian 12's."""

LIBDRM = {name for name in OURS if name.startswith("DRM_")}
"""Missing without libdrm-dev, which the guest has; held against their arithmetic everywhere."""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the kernel's headers; install gcc")
def test_equal_to_the_headers(tmp_path: Path) -> None:
    """A C program that includes the headers prints the same numbers, and the sizes of the same structures."""
    lines = [f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long){name});\n#endif' for name in OURS]
    source = tmp_path / "numbers.c"
    source.write_text(
        "#include <stdio.h>\n#include <linux/udmabuf.h>\n#include <linux/dma-buf.h>\n#include <linux/memfd.h>\n"
        "#include <linux/dma-heap.h>\n#include <linux/fcntl.h>\n"
        "#if __has_include(<libdrm/drm.h>)\n#include <libdrm/drm.h>\n#endif\nint main(void)\n{\n"
        + "\n".join(lines)
        + '\nprintf("create %zu\\n", sizeof(struct udmabuf_create));'
        + '\nprintf("list %zu\\n", sizeof(struct udmabuf_create_list));'
        + '\nprintf("item %zu\\n", sizeof(struct udmabuf_create_item));'
        + "\nreturn 0;\n}\n",
        encoding="ascii",
    )
    program = tmp_path / "numbers"
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    theirs = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    assert theirs.pop("create") == struct.calcsize("=IIQQ")
    assert theirs.pop("list") == struct.calcsize("=II")
    assert theirs.pop("item") == struct.calcsize("=IIQQ")
    assert set(OURS) - set(theirs) <= NEWER | LIBDRM
    assert theirs == {name: OURS[name] for name in theirs}


def test_equal_to_their_arithmetic() -> None:
    """_IO*(type, number, size) of asm-generic/ioctl.h: direction in bits 30-31, size 16-29, type 8-15, number 0-7."""

    def io(kind: str, number: int) -> int:
        return ord(kind) << 8 | number

    def iow(kind: str, number: int, size: int) -> int:
        return 1 << 30 | size << 16 | io(kind, number)

    def iowr(kind: str, number: int, size: int) -> int:
        return 3 << 30 | size << 16 | io(kind, number)

    assert iow("u", 0x42, 24) == udmabuf.UDMABUF_CREATE
    assert iow("u", 0x43, 8) == udmabuf.UDMABUF_CREATE_LIST
    assert iow("b", 0, 8) == dmabuf.DMA_BUF_IOCTL_SYNC
    assert iow("b", 1, 4) == dmabuf.DMA_BUF_SET_NAME_A
    assert iow("b", 1, 8) == dmabuf.DMA_BUF_SET_NAME_B
    assert iowr("H", 0, 24) == dma_heap.DMA_HEAP_IOCTL_ALLOC
    words = 3 * struct.calcsize("i") + 6 * struct.calcsize("P")
    assert iowr("d", 0x00, -(-words // struct.calcsize("P")) * struct.calcsize("P")) == drm.DRM_IOCTL_VERSION
    assert iow("d", 0x11, 4) == drm.DRM_IOCTL_AUTH_MAGIC
    assert io("d", 0x1E) == drm.DRM_IOCTL_SET_MASTER
    assert io("d", 0x1F) == drm.DRM_IOCTL_DROP_MASTER
    assert iowr("d", 0x2D, 12) == drm.DRM_IOCTL_PRIME_HANDLE_TO_FD
    assert iowr("d", 0xB2, 32) == drm.DRM_IOCTL_MODE_CREATE_DUMB
    assert iowr("d", 0xB4, 4) == drm.DRM_IOCTL_MODE_DESTROY_DUMB


def test_equal_to_the_interpreters() -> None:
    """Where Python has a constant of the same name, it is the same."""
    theirs = {name: getattr(module, name) for module in (os, fcntl) for name in OURS if hasattr(module, name)}
    assert len(theirs) >= 10
    assert theirs == {name: OURS[name] for name in theirs}
