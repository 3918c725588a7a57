# SPDX-License-Identifier: MIT
"""`udmabufctl verify`: have the kernel say whether a device takes a buffer, and put the service's word beside it.

The import is importers/'s, with the rights of whoever runs this; where the buffer comes from, and how the two answers
are compared and shown, is here.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from udmabufd_client.cli.buffer_id import parse_buffer
from udmabufd_client.cli.constraint import parse_device
from udmabufd_client.cli.wanted import add_wanted, parse_picture, spec_of

if TYPE_CHECKING:
    from udmabufd_client.importers import Outcome
    from udmabufd_client.sync import Buffer, Client

VERB = "verify"
SUMMARY = "have the kernel say whether a device takes a buffer"
DESCRIPTION = (
    "Import a buffer into a device as this user, let it go again, and say whether the device took it: by PRIME into "
    "a DRM device, by queueing it as V4L2_MEMORY_DMABUF in a V4L2 device, where no stream is started. What the "
    "service says of the device (udmabufctl explain) is shown beside it. Everything is as before afterwards, the "
    "format of a camera too."
)
EPILOG = """\
what BUFFER can be:
  the ticket of a buffer (GetTicket), the id of one that 'udmabufctl alloc
  --hold' or '--background' of this user holds, or WIDTHxHEIGHT, which with
  --format allocates a picture for the test. Without BUFFER, --size does.

what the answer means:
  taken    the driver attached to the memory. Most also map it for their
           device at once; amdgpu, i915 and xe do so at its first use.
  refused  it did not, or could not be asked; one line on standard error
           says why and what to do.

exit status:
  0 taken, 1 refused

examples:
  udmabufctl verify --size 8M /dev/dri/renderD128
  udmabufctl verify --format NV12 1920x1080 /dev/video0
  udmabufctl verify --size 2M --allocator udmabuf-2M /dev/video4
  id=$(udmabufctl alloc --size 1M --background --json | jq -r .id)
  udmabufctl verify --json "$id" /dev/dri/card0
"""

_BY_SIGNAL: Final = 128


@dataclass(frozen=True, slots=True)
class Subject:
    """What is imported: a buffer by ticket or id, or a picture of these pixels that is allocated for it."""

    ticket: str = ""
    id: str = ""
    pixels: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What the service says of the device and the buffer's allocator; `suits` is None where it says nothing."""

    suits: bool | None
    reason: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments: buffer and device, and those keys of `spec` with which one is allocated."""
    parser.add_argument("buffer", metavar="BUFFER", nargs="?", type=parse_subject, help="the buffer: see below")
    parser.add_argument(
        "device",
        metavar="DEVICE",
        type=parse_device,
        help="a device node, such as /dev/dri/renderD128 or /dev/video0",
    )
    add_wanted(parser.add_argument_group("allocating one for the test"), "name", "kind", "devices", "request_id")


def parse_subject(text: str) -> Subject:
    """Return what BUFFER names. Raises ValueError."""
    if "x" in text.lower():
        return Subject(pixels=parse_picture(text))
    if re.fullmatch(r"[0-9a-f]{32}", text.lower()):
        return Subject(ticket=text.lower())
    return Subject(id=parse_buffer(text))


parse_subject.__name__ = "ticket, buffer id, or WIDTHxHEIGHT"
"""argparse names the type in its message."""


def run(arguments: argparse.Namespace) -> int:
    """Import and show what came of it; return the exit status."""
    from udmabufd_client.sync import Client

    spec = _spec(arguments)
    device: str = arguments.device
    with _ended_by_signals(), Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        with _buffer(arguments, client, spec) as buffer:
            from udmabufd_client.importers import verify

            buffer.get_fd()
            outcome = verify(device, buffer.fileno(), buffer.info)
            statement = _statement(client, buffer, device)
            _show(arguments, buffer, device, outcome, statement)
    return 0 if outcome.taken else 1


def _spec(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return what is to be allocated for the test, or None for a buffer that there is. Ends on wrong usage."""
    subject: Subject | None = arguments.buffer
    wanted = spec_of(arguments)
    if subject is not None and subject.pixels is None:
        if wanted:
            arguments.parser.error("these options are for a buffer that is allocated for the test, instead of BUFFER")
        return None
    if subject is not None and subject.pixels is not None:
        if "width" in wanted or "height" in wanted:
            arguments.parser.error("WIDTHxHEIGHT goes without --width and --height")
        wanted["width"], wanted["height"] = subject.pixels
    if "size" not in wanted and not {"width", "height", "format"} <= set(wanted):
        arguments.parser.error("name a BUFFER, or have one allocated: by --size, or by --format and WIDTHxHEIGHT")
    return wanted


def _buffer(arguments: argparse.Namespace, client: Client, spec: dict[str, Any] | None) -> Buffer:
    """Return the buffer, which ends with its connection, or is another's too."""
    if spec is not None:
        return client.allocate(spec, name="verify")
    ticket = arguments.buffer.ticket
    if not ticket:
        from udmabufd_client.cli.hold import ask_ticket

        ticket = ask_ticket(arguments.buffer.id, arguments.timeout)
    return client.import_ticket(ticket)


def _statement(client: Client, buffer: Buffer, device: str) -> Statement:
    """Ask the service whether the allocator of this buffer suits the device."""
    from udmabufd_client.errors import IncompatibleConstraints, UdmabufError

    info = buffer.info
    spec: dict[str, object] = {"kind": info.kind, "devices": [device]}
    if info.format is not None:
        spec |= {"width": info.width, "height": info.height, "format": info.format}
    else:
        spec["size"] = info.size_requested or info.size
    try:
        verdicts = {verdict.allocator: verdict for verdict in client.explain(spec)}
    except IncompatibleConstraints as error:
        return Statement(False, str(error))
    except UdmabufError as error:
        return Statement(None, str(error))
    verdict = verdicts.get(info.allocator or "")
    if verdict is None:
        return Statement(None, f"Explain does not speak of the allocator {info.allocator}.")
    if verdict.ok:
        return Statement(True)
    # That its pool is empty now, say, is nothing against the device.
    return Statement(False if verdict.device == device else None, f"{verdict.field}: {verdict.reason}")


def _show(arguments: argparse.Namespace, buffer: Buffer, device: str, outcome: Outcome, statement: Statement) -> None:
    from udmabufd_client.cli.show import as_json
    from udmabufd_client.cli.text import human_size, pairs, printable, width_of, write

    comparable = outcome.tried and statement.suits is not None
    agree = outcome.taken == statement.suits if comparable else None
    if arguments.json:
        shown: dict[str, Any] = {
            "taken": outcome.taken,
            "device": device,
            "how": outcome.how,
            "reason": outcome.reason,
            "error": outcome.error,
            "tried": outcome.tried,
            "buffer": buffer.path,
            "allocator": buffer.info.allocator,
            "service": {"suits": statement.suits, "reason": statement.reason},
            "agree": agree,
        }
        print(as_json(shown))
        return
    answer = "taken" if outcome.taken else f"refused{f' ({outcome.error})' if outcome.error else ''}"
    said = {True: "suitable", False: "not suitable", None: "no statement"}[statement.suits]
    rows = [
        ("buffer", f"{buffer.id} ({human_size(buffer.size)}, {buffer.info.allocator})"),
        ("device", device),
        ("kernel", f"{answer}{f': {outcome.how}' if outcome.how else ''}"),
        ("service", f"{said}{f': {statement.reason}' if statement.reason else ''}"),
        ("agree", _agreement(outcome, agree)),
    ]
    write(pairs(rows, width_of(sys.stdout)), sys.stdout)
    if not outcome.taken:
        sys.stdout.flush()
        print(f"udmabufctl: {printable(outcome.reason)}", file=sys.stderr)


def _agreement(outcome: Outcome, agree: bool | None) -> str:
    if agree is None:
        return "-"
    if agree:
        return "yes"
    if outcome.taken:
        return "no: the service has a reason against it that no import shows"
    return "no: the service does not know of this; tell it by a file in /etc/udmabufd/devices.d"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP unwind as Ctrl-C does: a device's format is to be set back."""
    from udmabufd_client.cli.signals import heeded

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_BY_SIGNAL + number)

    before = {number: signal.signal(number, end) for number in heeded() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
