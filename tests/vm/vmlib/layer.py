# SPDX-License-Identifier: MIT
"""The files of one boot, as a tar that guest/init lays over the root file system: /src, the runner, the command."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from .image import read_list
from .tree import TOP

GUEST = Path(__file__).parent.parent / "guest"
MACHINE_ID = "75646d616275666475646d6162756664"
RUNNER_HOME = "usr/lib/udmabufd-vm"
UNITS = "etc/systemd/system"
BUS_UNITS = {"dbus-daemon": "dbus.service", "dbus-broker": "dbus-broker.service"}
COMMAND_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "UDMABUFD_GUEST": "1",
}


@dataclass(frozen=True)
class Job:
    """What one guest is booted for: the command, the system bus, and whether udmabufd.service has to run."""

    argv: list[str]
    bus: str
    service: bool


def write_layer(
    target: Path, job: Job, files: list[Path], config: Path, version: str, module: tuple[str, Path] | None = None
) -> None:
    """Writes the tar: the working tree's files to /src, the kernel's configuration to /boot, the job's own parts,
    and a kernel module, given as where it goes and the file.
    """
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in files:
            # an editor may have taken the file away since it was listed
            if os.path.lexists(TOP / path):
                tar.add(TOP / path, f"src/{path}", recursive=False, filter=_readable)
        tar.add(config, f"boot/config-{version}", filter=_readable)
        if module is not None:
            tar.add(module[1], module[0], filter=_readable)
        tar.add(GUEST / "runner.py", f"{RUNNER_HOME}/runner.py", filter=_readable)
        tar.add(GUEST / "runner.service", f"{UNITS}/udmabufd-vm.service", filter=_readable)
        _link(tar, f"{UNITS}/multi-user.target.wants/udmabufd-vm.service", "../udmabufd-vm.service")
        tar.add(GUEST / "udev-trigger.conf", f"{UNITS}/systemd-udev-trigger.service.d/guest.conf", filter=_readable)
        tar.add(GUEST / "modprobe.conf", "etc/modprobe.d/udmabufd-vm.conf", filter=_readable)
        # with one of its own systemd does not take each boot for the first, which would enable every unit there is
        _file(tar, "etc/machine-id", f"{MACHINE_ID}\n".encode())
        for unit in read_list(GUEST / "masked-units"):
            _link(tar, f"{UNITS}/{unit}", "/dev/null")
        _link(tar, f"{UNITS}/dbus.service", f"/usr/lib/systemd/system/{BUS_UNITS[job.bus]}")
        _file(tar, f"{RUNNER_HOME}/job.json", json.dumps(_describe(job)).encode())


def _describe(job: Job) -> dict[str, object]:
    return {"argv": job.argv, "cwd": "/src", "env": COMMAND_ENVIRONMENT, "service": job.service}


def _readable(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Owned by root and readable by every user of the guest, whatever the clone's owner and umask."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    tar.addfile(member)


def _file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))
