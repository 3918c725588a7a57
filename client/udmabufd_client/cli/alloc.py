# SPDX-License-Identifier: MIT
"""`udmabufctl alloc`: get a buffer, show what it is, and run a command with it or hold it."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, TextIO

from udmabufd_client.cli.show import show
from udmabufd_client.contract import SPEC_KEYS, Cache, CachePolicy, Kind

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

examples:
  udmabufctl alloc --width 640 --height 480 --format NV12
  udmabufctl alloc --size 1M -- sh -c 'ls -l /proc/self/fd/$UDMABUF_FD'
  udmabufctl alloc --size 1M --kind memfd -- ./program --fd {}
  udmabufctl alloc --size 1M --background --json
"""

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options: the keys of `spec`, and what becomes of the buffer."""
    wanted = parser.add_argument_group("what is wanted")
    wanted.add_argument(
        "--size", type=parse_size, metavar="BYTES", help=_help("size") + " Suffixes K, M, G, T: 1024s."
    )
    wanted.add_argument("--width", type=int, metavar="PIXELS", help=_help("width"))
    wanted.add_argument("--height", type=int, metavar="PIXELS", help=_help("height"))
    wanted.add_argument("--format", metavar="FOURCC", help=_help("format"))
    wanted.add_argument("--name", help=_help("name"))
    wanted.add_argument("--kind", choices=[*map(str, Kind)], help=_help("kind"))
    wanted.add_argument("--cache", choices=[*map(str, Cache)], help=_help("cache"))
    wanted.add_argument("--cache-policy", choices=[*map(str, CachePolicy)], help=_help("cache_policy"))
    wanted.add_argument("--allocator", help=_help("allocator"))
    wanted.add_argument("--request-id", metavar="ID", help=_help("request_id"))
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
    spec = {key: value for key in SPEC_KEYS if (value := getattr(arguments, key)) is not None}
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

            report(arguments, {"id": buffer.id, "buffer": buffer.path, **buffer.info.as_dict()}, sys.stderr)
            return command.run_with(buffer, arguments.command)
        report(arguments, {"id": buffer.id, "buffer": buffer.path, **buffer.info.as_dict()}, sys.stdout)
    if not arguments.json:
        print("The buffer ended with this command; keep one with -- COMMAND, --hold or --background.", file=sys.stderr)
    return 0


def report(arguments: argparse.Namespace, shown: dict[str, Any], stream: TextIO) -> None:
    """Show what was obtained, at once: what follows may take long."""
    show(shown, json_wanted=arguments.json, stream=stream)
    stream.flush()


def parse_size(text: str) -> int:
    """Return "4096", "64K" or "8MiB" as bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(text)
    return int(match[1]) << _SUFFIXES[match[2].upper()]


parse_size.__name__ = "size"
"""argparse names the type in its message."""


def _help(key: str) -> str:
    meaning = SPEC_KEYS[key].meaning
    assert "%" not in meaning  # argparse would take it for a format
    return meaning
