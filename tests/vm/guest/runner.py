# SPDX-License-Identifier: MIT
"""Runs the command in the guest and carries its output and exit status to the host.

Started by runner.service once the system is up. Reads what to do from job.json, written by the host for this boot.
stdout and stderr go to one virtio port each; a third port, control, carries one line per event:

    booted SECONDS              the runner is alive, so long after power-on
    service STATE               what systemd says of udmabufd.service, or "absent", "unasked"
    running SECONDS             the command starts
    exit STATUS OUT ERR         it ended; so many bytes went to the two output ports

Which statuses mean what, and what is shown to the user, is the host's affair (vmlib/machine.py).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
PORT_PREFIX = "udmabufd-vm."
UNIT = "udmabufd.service"

# Conventions of env(1) and sh(1).
CANNOT_RUN, NOT_FOUND, BY_SIGNAL = 126, 127, 128
# The host prints what it read of the service's journal and ends with the status for a broken guest.
SERVICE_FAILED = 125


def open_port(name: str) -> int:
    """Opens the virtio port of that name; found in sysfs, so that udev need not have made its link yet."""
    for entry in Path("/sys/class/virtio-ports").iterdir():
        if (entry / "name").read_text().strip() == PORT_PREFIX + name:
            return os.open(f"/dev/{entry.name}", os.O_WRONLY | os.O_CLOEXEC)
    raise SystemExit(f"no virtio port {name}")


def write_all(fd: int, data: bytes) -> None:
    """Writes all of data; blocks while the host is slow to read."""
    while data:
        data = data[os.write(fd, data) :]


def uptime() -> str:
    """Seconds since the kernel started, as text."""
    return Path("/proc/uptime").read_text().split()[0]


def service_state(wanted: bool) -> str:
    """What systemd says of the service: is-active's word, "absent" without a unit file, "unasked"."""
    if not wanted:
        return "unasked"
    if subprocess.run(["systemctl", "cat", UNIT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        return "absent"
    return subprocess.run(["systemctl", "is-active", UNIT], stdout=subprocess.PIPE, text=True).stdout.strip()


def service_report() -> bytes:
    """Status and journal of the service that did not start."""
    status = subprocess.run(
        ["systemctl", "status", "--no-pager", "--full", "--lines=0", UNIT], stdout=subprocess.PIPE
    ).stdout
    journal = subprocess.run(
        ["journalctl", "--no-pager", "--boot", "-o", "short-monotonic", "-u", UNIT], stdout=subprocess.PIPE
    ).stdout
    return status + journal


def in_child() -> None:
    """Undoes, for the command, what protects the runner."""
    Path("/proc/self/oom_score_adj").write_text("0")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run(argv: list[str], cwd: str, env: dict[str, str], ports: dict[str, int]) -> tuple[int, dict[str, int]]:
    """Runs argv and copies its output as it comes; returns its status and the bytes copied per stream.

    What is left in the pipes when the command ends is still copied, but nobody waits for processes that it left
    behind and that keep the pipes open.
    """
    counts = {"stdout": 0, "stderr": 0}
    try:
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=in_child,
        )
    except OSError as error:
        message = f"{argv[0]}: {error.strerror}\n".encode()
        write_all(ports["stderr"], message)
        counts["stderr"] = len(message)
        return (NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN), counts

    assert child.stdout is not None
    assert child.stderr is not None
    ended = os.pidfd_open(child.pid)
    with selectors.DefaultSelector() as selector:
        for name, pipe in (("stdout", child.stdout), ("stderr", child.stderr)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, name)
        selector.register(ended, selectors.EVENT_READ, None)
        running = True
        while running or any(key.data for key in selector.get_map().values()):
            ready = selector.select(timeout=None if running else 0)
            if not ready:
                break
            for key, _ in ready:
                if key.data is None:
                    running = False
                    selector.unregister(ended)
                    continue
                data = os.read(key.fd, 65536)
                if data:
                    write_all(ports[key.data], data)
                    counts[key.data] += len(data)
                else:
                    selector.unregister(key.fileobj)
    status = child.wait()
    return (status if status >= 0 else BY_SIGNAL - status), counts


def main() -> None:
    """Says that the guest is up, looks at the service, runs the command, reports its end."""
    job = json.loads((HERE / "job.json").read_text())
    ports = {name: open_port(name) for name in ("control", "stdout", "stderr")}

    def tell(*words: object) -> None:
        write_all(ports["control"], (" ".join(map(str, words)) + "\n").encode())

    tell("booted", uptime())
    subprocess.run(["udevadm", "settle", "--timeout=60"], check=False)
    state = service_state(job["service"])
    tell("service", state)
    if state not in ("active", "absent", "unasked"):
        report = service_report()
        write_all(ports["stderr"], report)
        tell("exit", SERVICE_FAILED, 0, len(report))
        return
    tell("running", uptime())
    argv = [os.fsencode(word).decode(errors="surrogateescape") for word in job["argv"]]
    status, counts = run(argv, job["cwd"], job["env"], ports)
    # the host pulls the plug when it reads the next line: what is cached of /share has to be there by then
    os.sync()
    tell("exit", status, counts["stdout"], counts["stderr"])


if __name__ == "__main__":
    main()
