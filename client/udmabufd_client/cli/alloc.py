# SPDX-License-Identifier: MIT
"""`udmabufctl alloc`: get a buffer, show what it is, and run a command with it or hold it."""

from __future__ import annotations

import argparse
import sys
from typing import Any, TextIO

from udmabufd_client.cli.constraint import parse_size as parse_size
from udmabufd_client.cli.show import described, show
from udmabufd_client.cli.wanted import add_wanted, spec_of

VERB = "alloc"
SUMMARY = "allocate a buffer, show it, and run a command with it or hold it"
DESCRIPTION = (
    "Allocate one buffer, either by --size or as a picture by --width, --height and --format, and show what was "
    "obtained. The buffer ends with this command. With -- COMMAND, that is when COMMAND ends; with --hold, at Ctrl-C "
    "or 'udmabufctl release'; with --background, at 'udmabufctl release'."
)
EPILOG = """\
running a command:
  COMMAND inherits the buffer's file descriptor. Its number is in $UDMABUF_FD,
  and replaces {} in COMMAND's arguments. $UDMABUF_ID is the buffer's id, and
  every key of info is there in capitals: $UDMABUF_SIZE, $UDMABUF_KIND,
  $UDMABUF_WIDTH, $UDMABUF_HEIGHT, $UDMABUF_FORMAT, $UDMABUF_MODIFIER, and,
  separated by spaces, $UDMABUF_OFFSETS and $UDMABUF_STRIDES. What was
  obtained is then shown on standard error, so that standard output is
  COMMAND's alone.

buffers that can move:
  With --dynamic the holder lets the service give the buffer other memory,
  and goes on with that: when a device comes later that the memory does not
  suit, by 'udmabufctl move', or because memory is short ('udmabufctl
  evict'). It needs a device, and goes without a COMMAND: a program that has
  inherited a descriptor would not learn of the move, and what it wrote
  afterwards would be lost.

examples:
  udmabufctl alloc --width 640 --height 480 --format NV12
  udmabufctl alloc --size 8M --device /dev/video0 --device /dev/dri/card0
  udmabufctl alloc --size 2M --constraint contiguous --hold
  udmabufctl alloc --size 1M -- sh -c 'ls -l /proc/self/fd/$UDMABUF_FD'
  udmabufctl alloc --size 1M --kind memfd -- ./program --fd {}
  udmabufctl alloc --size 1M --background --json
  udmabufctl alloc --size 8M --device drm:card0 --dynamic --hold
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options: the keys of `spec`, and what becomes of the buffer."""
    wanted = parser.add_argument_group("what is wanted")
    add_wanted(wanted)
    wanted.add_argument(
        "--dynamic",
        action="store_true",
        help="attach each --device dynamically, so that the buffer can move while it is held; with --hold or "
        "--background",
    )
    end = parser.add_argument_group("when it ends").add_mutually_exclusive_group()
    end.add_argument(
        "--hold", action="store_true", help="hold the buffer until Ctrl-C, SIGTERM or 'udmabufctl release ID'"
    )
    end.add_argument(
        "--background",
        action="store_true",
        help="leave a process that holds the buffer until 'udmabufctl release ID', show its pid, and end",
    )
    parser.add_argument(
        "command", nargs="*", metavar="-- COMMAND", help="run COMMAND with the buffer, and end with its exit status"
    )


def run(arguments: argparse.Namespace) -> int:
    """Allocate as the arguments say; return the exit status."""
    spec = spec_of(arguments)
    if arguments.dynamic:
        _check_dynamic(arguments)
    if arguments.hold or arguments.background:
        from udmabufd_client.cli import hold

        if arguments.command is not None:
            arguments.parser.error("--hold and --background go without a COMMAND")
        if arguments.background:
            return hold.in_background(arguments, spec)
        return hold.in_foreground(arguments, spec)

    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client, client.allocate(spec) as buffer:
        if arguments.command is not None:
            from udmabufd_client.cli import command

            report(arguments, described(buffer), sys.stderr)
            return command.run_with(buffer, arguments.command)
        report(arguments, described(buffer), sys.stdout)
    if not arguments.json:
        print("The buffer ended with this command; keep one with -- COMMAND, --hold or --background.", file=sys.stderr)
    return 0


def _check_dynamic(arguments: argparse.Namespace) -> None:
    """End if nobody would be there to let go of the memory."""
    if arguments.command is not None:
        arguments.parser.error("--dynamic goes without a COMMAND, which nobody could tell that the buffer moves")
    if not arguments.devices:
        arguments.parser.error("--dynamic is about devices: add --device")
    if not (arguments.hold or arguments.background):
        arguments.parser.error("--dynamic is for a buffer that is held: add --hold or --background")


def report(arguments: argparse.Namespace, shown: dict[str, Any], stream: TextIO) -> None:
    """Show what was obtained, at once: what follows may take long."""
    show(shown, json_wanted=arguments.json, stream=stream)
    stream.flush()
