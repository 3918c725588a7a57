# SPDX-License-Identifier: MIT
"""One emulated machine: QEMU's command line, the three channels from the guest, and how a run ends.

What the lines of the control channel mean is written in guest/runner.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .report import Report, VmError

TIMED_OUT, BROKEN = 124, 125
# The command has its own limit; a guest that is not up after this long will not come up.
BOOT_SECONDS = 300
CONSOLE_TAIL_LINES = 60
PORT_PREFIX = "udmabufd-vm."
PORTS = ("control", "stdout", "stderr")
# panic=-1 with -no-reboot: a panic ends QEMU; oops=panic: so does a kernel bug, rather than leave a guest half alive.
# tsc=reliable: a busy host must not make the guest change its clock.
KERNEL_ARGUMENTS = (
    "console=ttyS0 loglevel=5 panic=-1 oops=panic tsc=reliable systemd.show_status=error systemd.log_color=0"
)
PANIC = "Kernel panic"
# Two cards that can set modes, for who asks by modprobe (guest/modprobe.conf). Without a ROM, which the firmware would
# run for a screen that nobody looks at; virtio-gpu-pci has none.
CARDS = ("bochs-display,romfile=", "virtio-gpu-pci")
PR_SET_PDEATHSIG = 1


class BootPanic(VmError):
    """The kernel panicked before the command was started: booting again does no harm, and mostly helps.

    The emulator's fault: while one virtual CPU patches kernel code, the other can keep running what it translated a
    moment too early. A busy host makes it likelier (once in some 20 boots).
    """


@dataclass(frozen=True)
class Disk:
    """A raw image; guest/init finds it by its serial. No guest changes the file: writes go to a snapshot."""

    serial: str
    path: Path


@dataclass(frozen=True)
class Hardware:
    """What the machine is made of; memory in MiB, share a folder of the host or None."""

    kernel: Path
    initrd: Path
    append: str
    memory: int
    cpus: int
    disks: list[Disk]
    share: Path | None


class Machine:
    """Runs a guest to the end of its command. Use as a context manager: leaving it ends QEMU."""

    def __init__(self, report: Report, hardware: Hardware, console: Path) -> None:
        self._report = report
        self._console = console
        self._channels: dict[str, socket.socket] = {}
        theirs = {}
        for name in PORTS:
            self._channels[name], theirs[name] = socket.socketpair()
        argv = _command_line(hardware, console, {name: end.fileno() for name, end in theirs.items()})
        report.detail(" ".join(argv))
        self._began = time.monotonic()
        self._qemu = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno() for end in theirs.values()],
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        for end in theirs.values():
            end.close()
        self._seen = {"stdout": 0, "stderr": 0}
        self._lines = b""
        self._phase = "booting"
        self._end: tuple[int, int, int] | None = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._qemu.kill()
        self._qemu.wait()
        assert self._qemu.stdout is not None
        self._qemu.stdout.close()
        for end in self._channels.values():
            end.close()

    def run(self, timeout: float) -> int:
        """Copies the command's output to stdout and stderr until it ends; returns its exit status.

        Raises VmError with the console's last lines when the guest dies, does not come up, or timeout (seconds since
        power-on) is over.
        """
        with selectors.DefaultSelector() as selector:
            for name, end in self._channels.items():
                selector.register(end, selectors.EVENT_READ, name)
            while not self._complete():
                limit = min(timeout, BOOT_SECONDS) if self._phase == "booting" else timeout
                left = self._began + limit - time.monotonic()
                if left <= 0:
                    raise self._over_time(limit)
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65536)
                    if data:
                        self._take(key.data, data)
                    elif key.data == "control":
                        # everything the guest wrote before it died has been read from the others by now or is lost
                        raise self._died()
                    else:
                        selector.unregister(key.fileobj)
        assert self._end is not None
        return self._end[0]

    def _complete(self) -> bool:
        return self._end is not None and (self._seen["stdout"], self._seen["stderr"]) == self._end[1:]

    def _take(self, name: str, data: bytes) -> None:
        if name == "control":
            *lines, self._lines = (self._lines + data).split(b"\n")
            for line in lines:
                self._event(line.decode().split())
            return
        self._seen[name] += len(data)
        target = 1 if name == "stdout" else 2
        while data:
            data = data[os.write(target, data) :]

    def _event(self, words: list[str]) -> None:
        match words:
            case ["booted", seconds]:
                self._phase = "booted"
                self._report.detail(f"the guest is up ({seconds} s by its own clock)")
            case ["service", state]:
                self._report.detail(f"udmabufd.service: {state}")
                if state not in ("active", "absent", "unasked"):
                    self._report.error(
                        f"udmabufd.service did not start (it is {state}): its status and journal follow. "
                        "--no-service runs the command all the same."
                    )
            case ["running", _]:
                self._phase = "running"
                self._report.say("the guest is up: running the command")
            case ["exit", status, out, err]:
                self._report.detail(f"the command ended with status {status}")
                self._end = (int(status), int(out), int(err))

    def _died(self) -> VmError:
        assert self._qemu.stdout is not None
        said = self._qemu.stdout.read().decode(errors="replace").strip()
        console = self._console_text()
        panic = next((line.strip() for line in console.splitlines() if PANIC in line), None)
        if panic:
            what = f"the guest's kernel panicked: {panic}"
        elif said:
            what = f"QEMU ended: {said}"
        else:
            what = "the guest went down before the command had ended"
        message = f"{what} (while {self._phase}). The end of its console:\n{_tail(console)}"
        if panic and self._phase != "running":
            return BootPanic(message, BROKEN)
        return VmError(message, BROKEN)

    def _over_time(self, limit: float) -> VmError:
        what = "the guest did not come up" if self._phase == "booting" else "the command did not end"
        return VmError(
            f"{what} within {limit:.0f} s (--timeout). The end of its console:\n{_tail(self._console_text())}",
            TIMED_OUT,
        )

    def _console_text(self) -> str:
        """What came over the serial line, without the escape sequences that firmware and systemd send a terminal."""
        text = self._console.read_bytes().decode(errors="replace") if self._console.exists() else ""
        return re.sub(r"\x1b(\[[0-9;?!]*[a-zA-Z]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)", "", text).replace("\r", "")


def _tail(console: str) -> str:
    lines = [line.rstrip() for line in console.splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-CONSOLE_TAIL_LINES:]) or "    (empty)"


def _command_line(hardware: Hardware, console: Path, channels: dict[str, int]) -> list[str]:
    # QEMU reads ',' in a value as the next option unless doubled
    def value(path: Path) -> str:
        return str(path).replace(",", ",,")

    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"]
    argv += ["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(hardware.cpus), "-m", str(hardware.memory)]
    argv += ["-kernel", str(hardware.kernel), "-initrd", str(hardware.initrd)]
    argv += ["-append", f"{KERNEL_ARGUMENTS} {hardware.append}".strip()]
    argv += ["-serial", f"file:{console}"]
    for disk in hardware.disks:
        argv += ["-drive", f"file={value(disk.path)},format=raw,if=none,id={disk.serial},snapshot=on,cache=unsafe"]
        argv += ["-device", f"virtio-blk-pci,drive={disk.serial},serial={disk.serial}"]
    for card in CARDS:
        argv += ["-device", card]
    argv += ["-device", "virtio-serial-pci"]
    for name, fd in channels.items():
        argv += ["-chardev", f"socket,id={name},fd={fd}"]
        argv += ["-device", f"virtserialport,chardev={name},name={PORT_PREFIX}{name}"]
    if hardware.share is not None:
        path = value(hardware.share)
        argv += ["-fsdev", f"local,id=share,path={path},security_model=none,multidevs=remap"]
        argv += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]
    return argv


def _die_with_parent() -> None:
    """In the child: a run that is killed the hard way leaves no QEMU behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
