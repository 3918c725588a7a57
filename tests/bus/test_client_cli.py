# SPDX-License-Identifier: MIT
"""udmabufctl against the daemon, as a process: what it prints, what COMMAND gets, how holders live and end."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.service import RunningService
from udmabufd_client import sync
from udmabufd_client.contract import ALLOCATOR_INTERFACE, INFO_TYPES, LIST_TYPES, buffer_path
from udmabufd_client.interface import interface

Ctl = Callable[..., subprocess.CompletedProcess[str]]

PYTHON = {"t": int, "u": int, "s": str, "o": str, "b": bool, "at": list, "as": list}


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return kept | {"PYTHONPATH": ":".join(sys.path)}


@pytest.fixture
def command(service: RunningService) -> list[str]:
    """How udmabufctl is called here."""
    return [sys.executable, "-m", "udmabufd_client.cli", "--bus", service.address, "--timeout", "60"]


@pytest.fixture
def ctl(command: list[str]) -> Ctl:
    """Run udmabufctl and return what it said."""

    def run(*words: str, columns: int | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment() | ({} if columns is None else {"COLUMNS": str(columns)}),
        )

    return run


@pytest.fixture
def watcher(service: RunningService) -> Iterator[sync.Client]:
    """A connection that sees what there is."""
    with sync.Client.connect(service.address, timeout=60) as client:
        yield client


def ids(watcher: sync.Client) -> set[str]:
    return {listed.id for listed in watcher.list_buffers()}


def check_types(shown: dict[str, Any], types: dict[str, str]) -> None:
    """Check a JSON object's keys and types against the interface's."""
    for key, value in shown.items():
        assert type(value) is PYTHON[types[key]], key


def test_alloc_shows_what_it_got_and_keeps_nothing(ctl: Ctl, watcher: sync.Client) -> None:
    run = ctl("alloc", "--width", "640", "--height", "480", "--format", "NV12", "--kind", "memfd", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    shown = json.loads(run.stdout)
    assert shown.pop("id") == shown["buffer"].rpartition("/")[2]
    check_types(shown, INFO_TYPES | {"buffer": "o"})
    assert set(shown) == set(INFO_TYPES) | {"buffer"}
    assert (shown["width"], shown["format"], shown["offsets"][0]) == (640, "NV12", 0)
    assert shown["buffer"] not in {listed.buffer for listed in watcher.list_buffers()}


def test_alloc_for_people_says_that_the_buffer_has_ended(ctl: Ctl) -> None:
    run = ctl("alloc", "--size", "1M", "--kind", "memfd", "--name", "for people")
    assert run.returncode == 0
    assert "size             1048576 (1 MiB)" in run.stdout
    assert "name             for people" in run.stdout
    assert "ended with this command" in run.stderr


def test_a_command_gets_the_descriptor_and_the_figures(ctl: Ctl) -> None:
    code = """
import json, os, sys
fd = int(os.environ["UDMABUF_FD"])
assert sys.argv[1] == f"fd={fd}"
os.pwrite(fd, b"x", 0)
known = os.fstat(fd)
told = {key: value for key, value in os.environ.items() if key.startswith("UDMABUF_")}
print(json.dumps([fd, known.st_size, known.st_ino, os.listdir("/proc/self/fd"), told]))
"""
    spec = ["--width", "100", "--height", "10", "--format", "NV12", "--kind", "memfd", "--name", "cmd"]
    run = ctl("alloc", *spec, "--json", "--", sys.executable, "-c", code, "fd={}")
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stderr)
    fd, size, inode, descriptors, told = json.loads(run.stdout)
    assert (size, inode) == (shown["size"], shown["inode"])
    # Standard streams, the buffer, and the descriptor of that listing.
    assert {"0", "1", "2", str(fd)} < set(descriptors)
    assert len(descriptors) == 5
    assert told["UDMABUF_ID"] == shown["id"]
    assert told["UDMABUF_STRIDES"] == " ".join(map(str, shown["strides"]))
    assert told["UDMABUF_NEEDS_SYNC"] == "0"
    assert set(told) == {f"UDMABUF_{key.upper()}" for key in shown} - {"UDMABUF_BUFFER"} | {"UDMABUF_FD"}


def test_the_buffer_is_held_while_the_command_runs(command: list[str], watcher: sync.Client) -> None:
    words = [*command, "alloc", "--size", "4K", "--kind", "memfd", "--", "sh", "-c", "echo $UDMABUF_ID; read line"]
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        held = process.stdout.readline().strip()
        assert held in ids(watcher)
        process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    assert held not in ids(watcher)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["/nonexistent/program"], 127),
        (["/nonexistent program of PATH"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
        (["/etc/passwd/program"], 126),
        (["/" + "x" * 256], 126),
        (["./no-format"], 126),
        (["sh", "-c", "echo {} | grep -x $UDMABUF_FD >/dev/null"], 0),
        # What looks like our own options is the command's.
        (["sh", "-c", "exit $#", "x", "--json", "--", "--help"], 3),
    ],
)
def test_alloc_ends_as_the_command_does(
    ctl: Ctl, words: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no-format").write_text("neither ELF nor a script")
    Path("no-format").chmod(0o755)
    run = ctl("alloc", "--size", "4096", "--kind", "memfd", "--", *words)
    assert run.returncode == status, run.stderr
    assert run.stdout == ""
    assert (f"udmabufctl: {words[0]}: " in run.stderr) is (status in (126, 127))
    assert "Traceback" not in run.stderr


def catching(command: list[str], number: signal.Signals) -> list[str]:
    """Return an alloc whose COMMAND says ready, waits for the signal `number`, and then ends with status 9."""
    # Blocked and waited for: a shell's trap can be missed between two of its commands.
    script = f"""if True:
        import signal, sys
        signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
        print("ready", flush=True)
        signal.sigwait([{int(number)}])
        print("caught", flush=True)
        sys.exit(9)
    """
    return [*command, "alloc", "--size", "4K", "--kind", "memfd", "--", sys.executable, "-c", script]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_command(command: list[str], number: signal.Signals) -> None:
    words = catching(command, number)
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "caught\n"
        assert process.wait(60) == 9


def ignoring_hangups(command: list[str]) -> list[str]:
    """Return `command` as nohup starts it."""
    return ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *command]


def test_a_hangup_that_is_ignored_stays_ignored_in_the_command(command: list[str]) -> None:
    script = "import signal; print(signal.getsignal(signal.SIGHUP).name, flush=True); input()"
    words = [
        *ignoring_hangups(command),
        "alloc",
        "--size",
        "4K",
        "--kind",
        "memfd",
        "--",
        sys.executable,
        "-c",
        script,
    ]
    with subprocess.Popen(words, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "SIG_IGN\n"
        process.send_signal(signal.SIGHUP)
        process.communicate("go\n", timeout=60)
    assert process.returncode == 0


def test_a_hangup_that_is_ignored_does_not_end_a_holder(ctl: Ctl, command: list[str]) -> None:
    words = [*ignoring_hangups(command), "alloc", "--size", "8K", "--kind", "memfd", "--hold", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        shown = json.loads("".join(iter_until(process.stdout, "}\n")))
        process.send_signal(signal.SIGHUP)
        (ignored,) = [
            int(line.split()[1], 16)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if line.startswith("SigIgn:")
        ]
        assert ignored & 1 << (signal.SIGHUP - 1)
        assert ctl("release", shown["id"]).returncode == 0
        assert process.wait(60) == 0


def test_ctrl_c_is_the_commands_to_handle(command: list[str]) -> None:
    words = catching(command, signal.SIGINT)
    with subprocess.Popen(
        words, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment(), start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        # A terminal sends it to the whole foreground process group.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 9


def test_a_held_buffer_is_listed_shown_and_released(ctl: Ctl, command: list[str], watcher: sync.Client) -> None:
    words = [*command, "alloc", "--size", "8K", "--kind", "memfd", "--name", "held", "--hold", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        shown, _ = json.JSONDecoder().raw_decode("".join(iter_until(process.stdout, "}\n")))
        assert shown["pid"] == process.pid

        listed = json.loads(ctl("list", "--json").stdout)
        (entry,) = [entry for entry in listed if entry["id"] == shown["id"]]
        check_types({key: value for key, value in entry.items() if key != "id"}, LIST_TYPES)
        assert (entry["name"], entry["holders"], entry["size"], entry["state"]) == ("held", 1, 8192, "backed")

        table = ctl("list", columns=80).stdout.splitlines()
        assert table[0].split() == ["ID", "NAME", "STATE", "KIND", "SIZE", "PICTURE", "ALLOCATOR", "HOLDERS"]
        (row,) = [line for line in table if shown["id"] in line]
        assert row.split() == [shown["id"], "held", "backed", "memfd", "8", "KiB", "-", "memfd", "1"]
        assert all(len(line) <= 40 for line in ctl("list", columns=40).stdout.splitlines())

        by_id, by_path = ctl("info", shown["id"], "--json"), ctl("info", buffer_path(shown["id"]), "--json")
        assert json.loads(by_id.stdout) == json.loads(by_path.stdout) == entry
        assert f"buffer           {buffer_path(shown['id'])}" in ctl("info", shown["id"]).stdout

        run = ctl("release", shown["id"], "--json")
        assert (run.returncode, json.loads(run.stdout)) == (0, {"released": [shown["id"]]})
        assert shown["id"] not in ids(watcher)
        assert process.wait(60) == 0
    again = ctl("release", shown["id"])
    assert again.returncode == 1
    assert again.stderr.startswith(f"udmabufctl: No udmabufctl holds buffer {shown['id']}.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_holder(command: list[str], watcher: sync.Client, number: signal.Signals) -> None:
    words = [*command, "alloc", "--size", "8K", "--kind", "memfd", "--hold", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        shown = json.loads("".join(iter_until(process.stdout, "}\n")))
        assert shown["id"] in ids(watcher)
        process.send_signal(number)
        assert process.wait(60) == 0
    assert shown["id"] not in ids(watcher)


def iter_until(lines: Any, last: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line == last:
            return


def test_a_background_holder_outlives_the_command(ctl: Ctl, watcher: sync.Client) -> None:
    run = ctl("alloc", "--size", "8K", "--kind", "memfd", "--background", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    shown = json.loads(run.stdout)
    with open(os.pidfd_open(shown["pid"]), "rb", buffering=0) as holder:
        assert shown["id"] in ids(watcher)
        # It keeps nothing of the terminal or the directory that it was started from.
        process = Path(f"/proc/{shown['pid']}")
        assert {str((process / "fd" / str(fd)).readlink()) for fd in range(3)} == {"/dev/null"}
        assert str((process / "cwd").readlink()) == "/"
        assert os.getsid(shown["pid"]) == shown["pid"]
        assert ctl("release", shown["id"]).returncode == 0
        assert shown["id"] not in ids(watcher)
        assert select.select([holder], [], [], 60)[0], "the holder has not ended"


def test_a_background_holder_keeps_no_lock_of_whoever_started_it(ctl: Ctl, command: list[str], tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run = subprocess.run(
            [*command, "alloc", "--size", "8K", "--kind", "memfd", "--background", "--json"],
            stdout=subprocess.PIPE,
            pass_fds=[held.fileno()],
            env=environment(),
            check=True,
            timeout=120,
        )
    shown = json.loads(run.stdout)
    with lock.open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert ctl("release", shown["id"]).returncode == 0


def test_a_background_holder_that_gets_nothing_says_why(ctl: Ctl) -> None:
    run = ctl("alloc", "--size", "0", "--kind", "memfd", "--background")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("udmabufctl: size: ")
    assert run.stderr.count("\n") == 1


def test_release_goes_on_after_a_failure(ctl: Ctl) -> None:
    shown = json.loads(ctl("alloc", "--size", "8K", "--kind", "memfd", "--background", "--json").stdout)
    run = ctl("release", "0" * 16, shown["id"], "--json")
    assert run.returncode == 1
    assert json.loads(run.stdout) == {"released": [shown["id"]]}
    assert run.stderr.count("\n") == 1


def test_a_holder_ignores_what_it_does_not_understand(ctl: Ctl) -> None:
    shown = json.loads(ctl("alloc", "--size", "8K", "--kind", "memfd", "--background", "--json").stdout)
    for nonsense in (b"", b"\n", b"x" * 100_000, b"rel", b"release"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(60)
            sock.connect(f"\0udmabufctl/{shown['id']}")
            try:
                sock.sendall(nonsense)
                sock.shutdown(socket.SHUT_WR)
                assert sock.recv(10) == b""
            except ConnectionError:
                pass
    assert ctl("info", shown["id"]).returncode == 0
    assert ctl("release", shown["id"]).returncode == 0


@pytest.mark.root
def test_another_user_cannot_end_a_holder(ctl: Ctl) -> None:
    shown = json.loads(ctl("alloc", "--size", "8K", "--kind", "memfd", "--background", "--json").stdout)
    nobody = pwd.getpwnam("nobody")
    ask = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect("\\0udmabufctl/" + sys.argv[1])
    try:
        sock.sendall(b"release\\n")
        print(sock.recv(100))
    except ConnectionError:
        print(b"")
"""
    run = subprocess.run(
        ["/usr/bin/python3", "-c", ask, shown["id"]],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
    )
    assert run.stdout == "b''\n", run.stderr
    assert ctl("info", shown["id"]).returncode == 0
    assert ctl("release", shown["id"]).returncode == 0


def test_limits_come_with_their_meanings(ctl: Ctl) -> None:
    known = interface(ALLOCATOR_INTERFACE).properties
    shown = json.loads(ctl("limits", "--json").stdout)
    check_types(shown, {name: prop.signature for name, prop in known.items()})
    assert set(shown) == set(known)
    text = ctl("limits").stdout
    for name, prop in known.items():
        assert f"{name}  " in text
        assert f"    {prop.doc}\n" in text
    narrow = ctl("limits", columns=60).stdout
    assert max(map(len, narrow.splitlines())) <= 60
    assert "\x1b" not in narrow


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "0" * 16], "No buffer 0000000000000000"),
        (["alloc", "--size", "0", "--kind", "memfd"], "size: "),
        (["alloc", "--size", "4K", "--width", "3", "--kind", "memfd"], "size"),
        (["alloc", "--size", "4K", "--allocator", "no such", "--kind", "memfd"], "allocator"),
    ],
)
def test_a_refusal_is_one_line_and_status_1(ctl: Ctl, words: list[str], said: str) -> None:
    run = ctl(*words)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("udmabufctl: ")
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_reader_that_has_enough_is_no_traceback(command: list[str]) -> None:
    with subprocess.Popen([*command, "limits"], stdout=-1, stderr=-1, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["list"], 0),
        (["limits", "--json"], 0),
        (["--help"], 0),
        (["paint"], 2),
        (["info", "0" * 16], 1),
        (["alloc", "--size", "4K", "--kind", "memfd"], 0),
    ],
)
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_no_status(
    command: list[str], closed: str, words: list[str], status: int
) -> None:
    run = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command, *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert run.returncode == status, run.stderr
    assert "Error" not in run.stderr


def test_a_command_never_gets_the_buffer_as_a_standard_stream(command: list[str]) -> None:
    code = """if True:
        import os, sys
        streams = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
        sys.exit(3 if streams == ["/dev/null"] * 3 and int(os.environ["UDMABUF_FD"]) > 2 else 4)
    """
    words = [*command, "alloc", "--size", "4K", "--kind", "memfd", "--", sys.executable, "-c", code]
    run = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], env=environment(), timeout=120)
    assert run.returncode == 3


def test_a_terminal_gets_a_bold_heading_cut_to_its_width(command: list[str]) -> None:
    terminal, inner = os.openpty()
    with open(terminal, "rb", buffering=0) as screen, open(inner, "wb", buffering=0) as output:
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, 30, 0, 0))
        subprocess.run(
            [*command, "list"], stdout=output, env=environment() | {"TERM": "xterm"}, check=True, timeout=120
        )
        shown = screen.read(4096).decode()
    assert shown.startswith("\x1b[1mID")
    heading = shown.splitlines()[0].removeprefix("\x1b[1m").removesuffix("\x1b[0m")
    assert len(heading) <= 30


def test_the_module_is_the_command() -> None:
    main = Path(__file__).parents[2] / "client" / "udmabufd_client" / "cli" / "__main__.py"
    run = subprocess.run(
        [sys.executable, str(main), "--help"], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert run.stdout.startswith("usage: udmabufctl ")
