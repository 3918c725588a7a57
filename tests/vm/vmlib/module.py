# SPDX-License-Identifier: MIT
"""The kernel module of tests/module, built natively in the guest's root file system, for the kernel that is booted.

In the guest that takes a minute and a half. tests/kernel/modules.py, which loads it there, does so all the same when
the module has been changed in the guest, or could not be built here: whoever does not ask for it is not bothered.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from .cache import cache_root, cached, digest
from .chroot import run_in_root
from .kernel import Kernel
from .report import Report, VmError
from .tree import TOP

FOLDER = Path("tests/module")
NAME = "udmabuf_cache.ko"
BUILT = "usr/lib/udmabufd-vm/modules"
"""Where the guest has it, in a folder named by sources_digest()."""
BUILT_KEPT = 8

# The headers name each other by absolute paths: everything of them is linked to from where it would be installed.
SCRIPT = """\
set -eu
for there in /headers/usr/src/* /headers/usr/lib/linux-kbuild-*; do
    ln -s "$there" "${there#/headers}"
done
make -C /module KDIR="/usr/src/linux-headers-$1"
"""


def sources_digest(files: Iterable[Path]) -> str:
    """Tells versions of the module's source apart, by the names and contents of its files."""
    return digest(part for file in sorted(files) for part in (file.name.encode(), file.read_bytes()))


def get_module(
    report: Report, image: Path, kernel: Kernel, headers: Path, files: list[Path]
) -> tuple[str, Path] | None:
    """Where the guest is to have the module, and the file here; None, with the reason said, if it cannot be built."""
    sources = [TOP / path for path in files if path.parent == FOLDER]
    if not sources:
        return None
    version = sources_digest(sources)
    key = digest([image.name.encode(), kernel.version.encode(), version.encode()])

    def make(target: Path) -> None:
        for source in sources:
            shutil.copy(source, target)
        shared = {"/headers": headers, "/module": target}
        what = f"make: {FOLDER} for Linux {kernel.version}"
        run_in_root(report, what, image / "root", ["sh", "-c", SCRIPT, "sh", kernel.version], shared)

    try:
        folder = cached(report, cache_root() / "modules", key, BUILT_KEPT, make)
    except VmError as error:
        report.say(f"no module for this guest: {error}")
        return None
    return f"{BUILT}/{version}/{NAME}", folder / NAME
