# SPDX-License-Identifier: MIT
"""The headers of a packaged Debian kernel, to build modules with here, and as a disk of the guest to build them there.

They are fetched once for each kernel, and cost a boot nothing: the disk is not mounted until somebody builds
(tests/kernel/modules.py).
"""

from __future__ import annotations

from pathlib import Path

from .cache import cache_root, cached
from .image import make_ext4
from .kernel import KERNELS_KEPT, Kernel, find_kernel
from .report import Report, VmError, run_step

# Raise when what _make() leaves changes.
LAYOUT = "2"
IMAGE, TREE = "headers.img", "tree"
SIZE = "512M"


def get_headers(report: Report, root: Path, kernel: Kernel) -> Path | None:
    """A directory with the headers, as TREE and as an ext4 IMAGE of it; None, with the reason, if they cannot be had.

    The tree is laid out as the packages are, with usr/src/linux-headers-* and usr/lib/linux-kbuild-*, which
    name each other by absolute paths too: all of these have to be found from the root.
    """
    key = f"{kernel.version}_{LAYOUT}"
    try:
        folder = cached(
            report,
            cache_root() / "headers",
            key,
            KERNELS_KEPT,
            lambda target: _make(report, root, kernel.version, target),
        )
    except VmError as error:
        report.say(f"no kernel module can be built in this guest, for there are no headers: {error}")
        return None
    return folder


def _make(report: Report, root: Path, version: str, target: Path) -> None:
    apt = find_kernel(report, root, version)
    package = f"linux-headers-{version}"
    # the part that all flavours share, and the programs that build
    parts = [name for name in apt.depends(package) if name.startswith(("linux-headers-", "linux-kbuild-"))]
    apt.download(report, [package, *parts], target)
    tree = target / TREE
    tree.mkdir()
    for archive in target.glob("*.deb"):
        run_step(report, f"unpacking {archive.name}", ["dpkg-deb", "-x", archive, tree])
        archive.unlink()
    if not (tree / "usr/src" / package / "Makefile").is_file():
        raise VmError(f"{package} has no usr/src/{package}/Makefile: headers are packed in another way now")
    make_ext4(report, "mke2fs: the kernel's headers", tree, target / IMAGE, SIZE)
