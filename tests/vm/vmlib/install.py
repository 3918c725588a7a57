# SPDX-License-Identifier: MIT
"""Installs the working tree by its own systemd/install, natively in the image's root, into a tar for the guest."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .cache import cache_root, cached, digest
from .chroot import run_in_root
from .report import Report
from .tree import TOP, copy_tree, installed_key

INSTALLER = Path("systemd/install")
UNIT = "udmabufd.service"
INSTALLATIONS_KEPT = 12

HINT = f"This is what `{INSTALLER}` said, run with DESTDIR in a chroot of the guest's image."


def get_installation(report: Report, image: Path, files: list[Path], *, enable: bool) -> Path | None:
    """The tar of what systemd/install puts in place, cached by the tree's content; None while there is no installer.

    enable: as after `systemctl enable udmabufd`.
    """
    if INSTALLER not in files:
        report.say(f"no {INSTALLER} in the working tree: booting without the service")
        return None
    key = digest([image.name.encode(), installed_key(files).encode(), b"enabled" if enable else b"as installed"])
    family = cache_root() / "installations"

    def make(target: Path) -> None:
        _make(report, image / "root", files, target, enable)

    return cached(report, family, key, INSTALLATIONS_KEPT, make) / "install.tar"


def _make(report: Report, root: Path, files: list[Path], target: Path, enable: bool) -> None:
    source, out = target / "source", target / "out"
    source.mkdir()
    out.mkdir()
    copy_tree(files, source)
    shared = {"/src": source, "/out": out}
    run_in_root(
        report,
        f"{INSTALLER} of {TOP}, in the guest's file system",
        root,
        ["sh", "-c", f"cd /src && DESTDIR=/out {INSTALLER}"],
        shared,
        hint=HINT,
    )
    if enable:
        run_in_root(report, f"systemctl enable {UNIT}", root, ["systemctl", "--root=/out", "enable", UNIT], shared)
    # GNU's format is the one that busybox, in the initrd, reads with long names
    packed = target / "install.tar"
    pack = ["tar", "-C", str(out), "--format=gnu", "--owner=0", "--group=0", "--sort=name", "-cf", str(packed), "."]
    subprocess.run(pack, check=True)
    subprocess.run(["rm", "-r", source, out], check=True)
