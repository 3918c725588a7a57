# SPDX-License-Identifier: MIT
"""The command line of tests/vm/run, and the order of things: host, image, kernel, installation, boot."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType

from . import host
from .headers import IMAGE, TREE, get_headers
from .image import get_image
from .initrd import write_initrd
from .install import get_installation
from .kernel import get_kernel
from .layer import BUS_UNITS, Job, write_layer
from .machine import BROKEN, BootPanic, Disk, Hardware, Machine
from .module import get_module
from .report import Report, VmError
from .tree import tree_files

BOOT_ATTEMPTS = 3

DESCRIPTION = """\
Boots an emulated Debian 13 with systemd and a real /dev/udmabuf, with the working tree (uncommitted changes included)
installed by systemd/install and udmabufd.service running, runs COMMAND in it as root, and ends with its exit status.
Needs neither KVM nor a kernel with udmabuf on this machine; needs Debian 12 or newer and root or sudo. The first run
makes the image (some minutes, kept in ~/.cache/udmabufd/vm); after that COMMAND starts in about 20 seconds.
"""

EPILOG = """\
in the guest:
  COMMAND's working directory is /src, a copy of the working tree that may be written to; stdin is /dev/null.
  Users alice, bob and mallory (1000 to 1002) may not open /dev/udmabuf. `swapon /swapfile` gives 1 GiB of swap.
  modprobe vgem, bochs, virtio_gpu (DRM; the latter two with mode setting) and vivid (V4L2) make devices.
  Compilers, Weston, GStreamer, v4l-utils, gdbus, busctl, bpftrace, pytest: see tests/vm/image/packages. No network.

exit status:
  that of COMMAND (126: cannot be run, 127: not found, 128+N: killed by signal N), or
  2    wrong usage, no such kernel
  124  the time-out is over
  125  the guest broke: kernel panic, no boot, udmabufd.service did not start; stderr says why, with the console's end

examples:
  tests/vm/run -- uname -a
  tests/vm/run -- busctl introspect org.udmabufd.Allocator1 /org/udmabufd/Allocator1
  tests/vm/run -- sh -c 'gcc -o /tmp/probe tests/probe.c && /tmp/probe'
  tests/vm/run -- runuser -u alice -- udmabufctl alloc --size 65536
  tests/vm/run --share ./results -- python3 -m pytest tests/kernel --junitxml=/share/kernel.xml
  tests/vm/run --share ~/other-suite --bus dbus-broker -- sh -c 'cd /share && ./run-tests'
  tests/vm/run --kernel sid -- modprobe vivid                       the newest kernel of Debian unstable
  tests/vm/run --kernel 6.12.95+deb12-amd64 -- uname -r             an exact one; a wrong version lists what there is
  tests/vm/run --append 'init_on_alloc=0 udmabuf.size_limit_mb=16' -- cat /proc/cmdline
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; ends with status 2 and the usage where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="tests/vm/run",
        usage="tests/vm/run [OPTIONS] -- COMMAND [ARGUMENT ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--kernel",
        metavar="VERSION",
        help="a packaged kernel: an exact version, or trixie (default), backports, "
        "bookworm, sid for the current one of Debian 13, its backports, Debian 12's backports, unstable",
    )
    add("--append", metavar="ARGS", action="append", default=[], help="added to the kernel's command line")
    add("--share", metavar="DIR", type=Path, help="a folder of this machine, /share in the guest, to read and write")
    add(
        "--memory",
        metavar="M",
        type=mebibytes,
        default=3072,
        help="MiB of memory, or with G: GiB (default: 3072, all of it below 4 GiB, where devices of 32 bits reach it)",
    )
    add("--cpus", metavar="N", type=int, default=2, help="virtual CPUs (default: 2)")
    add("--timeout", metavar="SECONDS", type=float, default=1800.0, help="for boot and command (default: 1800)")
    add("--bus", choices=sorted(BUS_UNITS), default="dbus-daemon", help="the system bus (default: dbus-daemon)")
    add("--no-service", action="store_true", help="install, but do not enable or wait for udmabufd.service")
    add("--no-install", action="store_true", help="do not even install the working tree: /src is all there is of it")
    add("--console", metavar="FILE", type=Path, help="keep the kernel's console in this file")
    add("--verbose", action="store_true", help="show the phases of preparation and boot, and QEMU's command line")
    add("--quiet", action="store_true", help="nothing but the command's own output, and errors")
    add("command", metavar="COMMAND", nargs="*", help=argparse.SUPPRESS)
    if "--" not in argv:
        if not {"-h", "--help"} & set(argv):
            parser.error("the command to run goes after --")
        own, command = argv, []
    else:
        own, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parser.parse_args(own)
    if options.command:
        parser.error(f"{options.command[0]}: the command to run goes after --")
    if not command:
        parser.error("there is no command after --")
    if options.share and not options.share.is_dir():
        parser.error(f"--share {options.share}: no such folder")
    options.command = command
    return options


def mebibytes(text: str) -> int:
    """Reads 4096, 4096M or 4G."""
    match = re.fullmatch(r"(\d+)([MG]?)", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text}: give MiB, such as 4096, or GiB, such as 4G")
    return int(match[1]) * (1024 if match[2] == "G" else 1)


def run(options: argparse.Namespace, report: Report) -> int:
    """Makes ready what is missing, boots, runs the command; returns the exit status."""
    host.become_root()
    # folders made here become folders of the guest, which its other users have to enter
    os.umask(0o022)
    host.need_packages(report)
    image = get_image(report)
    kernel = get_kernel(report, image / "root", options.kernel)
    headers = get_headers(report, image / "root", kernel)
    files = tree_files(report)
    module = get_module(report, image, kernel, headers / TREE, files) if headers else None
    service = not (options.no_service or options.no_install)
    installed = None if options.no_install else get_installation(report, image, files, enable=service)
    with tempfile.TemporaryDirectory(prefix="udmabufd-vm-") as name:
        work = Path(name)
        job = Job(options.command, options.bus, service)
        write_layer(work / "boot.tar", job, files, kernel.directory / "config", kernel.version, module)
        write_initrd(work / "initrd", image / "root", kernel.directory / "boot-modules")
        disks = [Disk("root", image / "root.img"), Disk("boot", work / "boot.tar")]
        disks += [Disk("modules", kernel.directory / "modules.img"), Disk("swap", image / "swap.img")]
        if headers is not None:
            disks.append(Disk("headers", headers / IMAGE))
        if installed is not None:
            disks.append(Disk("install", installed))
        hardware = Hardware(
            kernel=kernel.image,
            initrd=work / "initrd",
            append=" ".join(options.append),
            memory=options.memory,
            cpus=options.cpus,
            disks=disks,
            share=options.share and options.share.resolve(),
        )
        report.say(f"booting Debian 13 with Linux {kernel.version}")
        return boot(report, hardware, options.console or work / "console.log", options.timeout)


def boot(report: Report, hardware: Hardware, console: Path, timeout: float) -> int:
    """Boots and runs the command; once more if the kernel panics before the command was started."""
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        try:
            with Machine(report, hardware, console) as machine:
                return machine.run(timeout)
        except BootPanic:
            if attempt == BOOT_ATTEMPTS:
                raise
            report.say("the kernel panicked while booting, as it now and then does under emulation: booting again")
    raise AssertionError


def interrupted(number: int, _: FrameType | None) -> None:
    """Turns a signal into an orderly end: QEMU is ended and temporary files go."""
    raise SystemExit(128 + number)


def main() -> int:
    """The whole of it."""
    options = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    report = Report(quiet=options.quiet, verbose=options.verbose)
    try:
        return run(options, report)
    except VmError as error:
        report.error(str(error))
        return error.status
    except BrokenPipeError:
        # whoever read the output has gone: as if the signal had ended us
        return 128 + signal.SIGPIPE
    except Exception:
        # any other status could be taken for the command's own
        traceback.print_exc()
        return BROKEN
