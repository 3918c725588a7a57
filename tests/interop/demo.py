# SPDX-License-Identifier: MIT
"""Conducts the demo on a machine with /dev/udmabuf, udmabufd and Weston; tests/demo brings it there.

Starts a compositor as one unprivileged user and the client as another, takes the compositor's own screenshot, has it
compared with the reference program's drawing, and prints what the kernel says of the buffers meanwhile. Processes are
actors.py's; drawing, showing and judging are left to picture.py, wayland_client.py, reference.c and compare.py.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from tests.interop.actors import HERE, Client, Compositor, DemoError, end
from tests.interop.users import User
from tests.kernel.witness import BUFINFO, DmaBuf, bufinfo, dma_bufs

DEVICE = Path("/dev/udmabuf")

SCREEN = (500, 375)
"""Pixels. 500 pixels of XR24 are 2000 bytes, a stride that the service has to round up."""
INSET = (250, 180)
"""Pixels, even numbers as NV12 has them; 250 bytes of luma in a row."""

TIME_LIMIT = 300
"""Seconds for the whole; some 30 is usual in an emulated machine."""

PROGRAMS = {"weston": "weston", "weston-screenshooter": "weston", "cc": "gcc", "busctl": "systemd"}
MODULES = {"numpy": "python3-numpy", "PIL": "python3-pil", "pywayland": "pywayland (from PyPI)"}
"""What is needed, and the Debian package that brings it."""


class Progress:
    """Prints what happens, with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print a step."""
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)


def need_everything() -> None:
    """Make sure that the demo can run here. Raises DemoError naming all that is missing, and the next step."""
    missing = []
    if os.geteuid() != 0:
        missing.append("root, to become two other users and to read the kernel's list of dma-bufs: use sudo")
    elif not BUFINFO.exists():
        missing.append(f"{BUFINFO}: mount -t debugfs none /sys/kernel/debug (and a kernel with CONFIG_DEBUG_FS)")
    if not DEVICE.exists():
        missing.append(f"{DEVICE}: modprobe udmabuf, or leave --host out: then the demo runs in an emulated machine")
    missing += [f"{name}: install {package}" for name, package in PROGRAMS.items() if not shutil.which(name)]
    missing += [f"Python's {name}: install {package}" for name, package in MODULES.items() if not find_spec(name)]
    if not find_spec("udmabufd_client") or (shutil.which("busctl") and not service_answers()):
        missing.append("a running udmabufd that can use /dev/udmabuf: systemd/install, then systemctl status udmabufd")
    if missing:
        raise DemoError("missing here:\n  " + "\n  ".join(missing))


def service_answers() -> bool:
    """Whether udmabufd is on the system bus and has a usable /dev/udmabuf."""
    interface = "org.udmabufd.Allocator1"
    # Not `busctl get-property`, which would start a service that is stopped.
    command = ["busctl", "--auto-start=no", "call", interface, "/org/udmabufd/Allocator1"]
    command += ["org.freedesktop.DBus.Properties", "Get", "ss", interface, "UdmabufAvailable"]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return answer.stdout.strip() == "v b true"


def compile_reference(work: Path) -> Path:
    """Compile the program that draws what the screen must show. Raises DemoError."""
    program = work / "reference"
    command = ["cc", "-std=c17", "-O2", "-Wall", "-o", str(program), str(HERE / "reference.c"), "-lm"]
    if subprocess.run(command, check=False).returncode:
        raise DemoError("the reference program does not compile; the compiler's message is above")
    return program


def check_layout(drawn: dict[str, Any]) -> str:
    """Describe the layout of a buffer. Raises DemoError if its rows follow one another without a gap."""
    row = drawn["width"] * (4 if drawn["format"] == "XR24" else 1)
    if drawn["strides"][0] <= row:
        raise DemoError(
            f"{drawn['name']} has stride {drawn['strides'][0]} for rows of {row} bytes: it shows too little"
        )
    planes = ", ".join(f"{offset}" for offset in drawn["offsets"])
    return (
        f"{drawn['format']} {drawn['width']}x{drawn['height']}, {drawn['size']} bytes, stride {drawn['strides'][0]} "
        f"for rows of {row} bytes, planes at {planes}"
    )


def look_up(drawn: dict[str, Any], listed: dict[int, DmaBuf]) -> DmaBuf:
    """Return the kernel's entry of a buffer. Raises DemoError where it says otherwise than the service did."""
    entry = listed.get(drawn["inode"])
    said = (drawn["name"], drawn["size"], "udmabuf")
    if entry is None or (entry.name, entry.size, entry.exporter) != said:
        raise DemoError(f"the kernel's list has {entry} where the service said {said}, inode {drawn['inode']}")
    return entry


def holders() -> dict[int, list[str]]:
    """Return, by inode, which processes have descriptors of dma-bufs, as "program (user)"."""
    found: dict[int, list[str]] = {}
    for folder in sorted(Path("/proc").glob("[0-9]*")):
        try:
            held = {buffer.inode for buffer in dma_bufs(int(folder.name))}
            if held:
                user = pwd.getpwuid(folder.stat().st_uid).pw_name
                program = (folder / "comm").read_text().strip()
        except (OSError, KeyError):
            continue  # The process has ended.
        for inode in held:
            found.setdefault(inode, []).append(f"{program} ({user})")
    return found


def print_table(entries: list[DmaBuf], held: dict[int, list[str]]) -> None:
    """Print what the kernel says of the buffers."""
    rows = [("name", "bytes", "exporter", "references", "inode", "descriptors in")]
    for entry in entries:
        numbers = str(entry.size), entry.exporter, str(entry.count), str(entry.inode)
        rows.append((entry.name, *numbers, ", ".join(held.get(entry.inode, []))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        print("          " + "  ".join([*cells, row[-1]]), flush=True)


def wait_until(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    """Wait for what the kernel and the service do in their own time. Raises DemoError when it takes too long."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(complaint())
        # The kernel tells nobody that a dma-buf has gone: there is nothing to wait on.
        time.sleep(0.05)


def check_screen(program: Path, seed: str, place: list[int], output: Path, progress: Progress) -> dict[str, Any]:
    """Compare the screenshot in `output` with the reference, and spoilt ones too. Raises DemoError."""
    import numpy as np  # only here: need_everything() has looked for it

    from tests.interop.compare import NV12_TOLERANCE, Scene, judge, mutants, read_png, read_ppm, write_png

    pictures = []
    for fourcc, size in (("xr24", SCREEN), ("nv12", INSET)):
        command = [str(program), fourcc, seed, *map(str, size)]
        pictures.append(read_ppm(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    scene = Scene(pictures[0], pictures[1], x=place[0], y=place[1])
    write_png(output / "expected.png", scene.whole())
    screen = read_png(output / "screenshot.png")
    verdict = judge(screen, scene)
    right = verdict.xr24_pixels - verdict.xr24_wrong
    progress.say(f"XR24: {right} of {verdict.xr24_pixels} pixels are exactly those of the reference program")
    right = verdict.nv12_pixels - verdict.nv12_wrong
    progress.say(
        f"NV12: {right} of {verdict.nv12_pixels} pixels are within {NV12_TOLERANCE} of it (of 255; greatest error "
        f"{verdict.nv12_max}, mean {verdict.nv12_mean:.3f})"
    )
    if not verdict.ok:
        raise DemoError(
            f"the screen does not show the picture: {verdict.xr24_wrong} pixels of XR24 and {verdict.nv12_wrong} of "
            f"NV12 are wrong, the first: {verdict.first_wrong}; compare screenshot.png with expected.png"
        )
    spoilt = mutants(screen, scene, np.random.default_rng())
    noticed = {name: not judge(mutant, scene).ok for name, mutant in spoilt}
    if not all(noticed.values()):
        raise DemoError(f"the comparison is blind: it passed {[name for name, seen in noticed.items() if not seen]}")
    progress.say(f"the comparison rejects {len(noticed)} spoilt copies of the screenshot, such as:")
    print("          " + "; ".join(list(noticed)[:2]), flush=True)
    return {"verdict": asdict(verdict), "mutants": noticed}


def conduct(options: argparse.Namespace, work: Path, progress: Progress) -> dict[str, Any]:
    """Run the demo in the folder `work`; return what came of it. Raises DemoError."""
    seed = os.urandom(8).hex()
    place = [random.SystemRandom().randrange(whole - part) for whole, part in zip(SCREEN, INSET, strict=True)]
    compositor_user, client_user = User(options.compositor), User(options.client)
    progress.say(f"seed {seed}: another picture in every run; NV12 on XR24 at {place[0]}, {place[1]}")

    with ExitStack() as stack:
        compositor = Compositor(compositor_user, client_user, work, SCREEN)
        progress.say(f"Weston starts as {compositor_user.name}: headless, GL in software")
        wait_until_ready = stack.enter_context(compositor.running())
        program = compile_reference(work)
        wait_until_ready()
        progress.say(f"Weston is ready; the client starts as {client_user.name}")
        client = Client(client_user, work, compositor.display, seed, [*INSET, *place])
        stack.callback(end, client.process)
        refused = client.report("refused")
        progress.say(f"{client_user.name} (uid {refused['uid']}) may not open {DEVICE}: {refused['errno']}")
        client.report("connected")
        drawn = [client.report("drawn"), client.report("drawn")]
        for buffer in drawn:
            progress.say(f"drawn: {check_layout(buffer)}")
        client.report("shown")
        progress.say("the compositor has presented both, taken as linux-dmabuf")

        shutil.copyfile(compositor.screenshot(), options.output / "screenshot.png")
        progress.say("the compositor has taken its screenshot")
        listed = bufinfo()
        entries = {buffer["inode"]: look_up(buffer, listed) for buffer in drawn}
        held = {inode: users for inode, users in holders().items() if inode in entries}
        progress.say(f"what the kernel says of the buffers meanwhile ({BUFINFO}):")
        print_table(list(entries.values()), held)
        judged = check_screen(program, seed, place, options.output, progress)

        client.finish()
        # Weston 14 with Mesa 25 keeps the descriptors and mappings of an NV12 import until it ends; for as long
        # the service charges for that buffer, and keeps what it will know its end by.
        without_client = {f"weston ({compositor_user.name})", "udmabufd (udmabufd)", "systemd (root)"}
        wait_until(
            lambda: all(without_client.issuperset(holders().get(inode, [])) for inode in entries),
            lambda: f"the client has ended, and its buffers are still held: {holders()}",
        )
        progress.say("the client has ended: the service charges on for what the compositor still has")
    wait_until(
        lambda: not entries.keys() & bufinfo().keys(),
        lambda: f"client and compositor have ended, and the kernel still has buffers of theirs: {holders()}",
    )
    progress.say("Weston has ended: the kernel has none of them any more")
    return {
        "seed": seed,
        "place": place,
        "refused": refused,
        "buffers": drawn,
        "kernel": [asdict(entry) | {"holders": held.get(inode, [])} for inode, entry in entries.items()],
        **judged,
    }


def show_logs(work: Path) -> None:
    """Print the ends of what Weston and the client wrote."""
    for log in sorted(work.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-15:]
        if lines:
            print(f"--- the end of {log.name}:", *lines, sep="\n  ", file=sys.stderr, flush=True)


def took_too_long(number: int, frame: FrameType | None) -> None:
    """End a demo in which something never answers."""
    raise DemoError(f"the demo took longer than {TIME_LIMIT} s")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.interop.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder for the pictures and report.json")
    parser.add_argument("--client", default="alice", help="the client's user (default: alice)")
    parser.add_argument("--compositor", default="bob", help="the compositor's user (default: bob)")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the reference program there, too")
    return parser.parse_args(argv)


def main() -> int:
    """Run the demo; return 0 when the screen showed the picture."""
    options = parse(sys.argv[1:])
    progress = Progress()
    signal.signal(signal.SIGALRM, took_too_long)
    signal.alarm(TIME_LIMIT)
    with tempfile.TemporaryDirectory(prefix="udmabufd-demo-") as name:
        work = Path(name)
        work.chmod(0o711)
        try:
            need_everything()
            report = conduct(options, work, progress)
        except (DemoError, LookupError, ValueError) as error:
            signal.alarm(0)
            show_logs(work)
            print(f"demo: {error}", file=sys.stderr)
            return 1
        finally:
            if options.keep:
                for kept in [*work.glob("*.log"), *work.glob("reference")]:
                    shutil.copy(kept, options.output)
        (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
