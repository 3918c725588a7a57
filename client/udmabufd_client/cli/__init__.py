# SPDX-License-Identifier: MIT
"""udmabufctl: the command line of the client. This module parses arguments and turns errors into exit statuses.

What a verb does is in the file of its name. Nothing that speaks D-Bus is imported before the arguments are known, so
that --help and usage errors are immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Final

from udmabufd_client.cli import (
    alloc,
    allocators,
    devices,
    drain,
    evict,
    explain,
    info,
    limits,
    list_buffers,
    move,
    recover,
    release,
    top,
    verify,
)
from udmabufd_client.cli.streams import open_closed_streams
from udmabufd_client.cli.text import printable
from udmabufd_client.errors import UdmabufError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_VERBS: Final = (
    alloc,
    explain,
    list_buffers,
    top,
    info,
    verify,
    move,
    evict,
    release,
    devices,
    allocators,
    limits,
    drain,
    recover,
)
"""In the order of --help: what one asks for, what there is, what the machine has. A verb that takes long has a TIMEOUT
of its own.
"""

_TIMEOUT: Final = 25.0
"""Seconds, as with other clients of D-Bus."""

_LONGEST_TIMEOUT: Final = 86_400
"""Seconds, a day. Sockets and event loops fail on what does not fit into the kernel's clocks."""

_DESCRIPTION = (
    "Ask the dma-buf allocator service, udmabufd, for buffers, and look at those that there are. A buffer belongs to "
    "the connections that hold shares of it: what this command allocates ends with this command, unless a program has "
    "taken over the file descriptor (alloc -- COMMAND) or a holder stays (alloc --hold, --background)."
)

_EPILOG = """\
examples:
  udmabufctl alloc --size 8M
      show what the service gives for 8 MiB
  udmabufctl alloc --width 1920 --height 1080 --format XR24 -- ./draw --fd {}
      run a program with the buffer's file descriptor
  udmabufctl alloc --size 64K --background
      keep a buffer; 'udmabufctl release ID' ends it
  udmabufctl explain --device /dev/video0 --format NV12 1920x1080
      where memory that suits a device would come from
  udmabufctl move ID --allocator udmabuf-2M
      give a buffer that 'alloc --dynamic' keeps other memory, in use
  udmabufctl list --json
      all buffers of this user, exact figures
  sudo udmabufctl top
      who holds how much, live

exit status:
  0    success
  1    the service refused or is not there; one line on standard error says
       why and what to do
  2    wrong usage
  130  interrupted by Ctrl-C
  alloc -- COMMAND ends with COMMAND's own status: 128+N when signal N ended
  it, 127 when it was not found, 126 when it could not be run.

environment:
  COLUMNS   width of tables; by default that of the terminal, and no limit
            where output is not a terminal
  NO_COLOR  no bold headings on terminals
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of epilogs, which are laid out, and fills descriptions, which are one paragraph."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of udmabufctl; the manual page is made from it too."""
    parser = argparse.ArgumentParser(
        prog="udmabufctl",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    _add_global_options(parser, top=True, patience=_TIMEOUT)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, title="verbs")
    for module in _VERBS:
        verb = verbs.add_parser(
            module.VERB,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=_HelpFormatter,
        )
        module.add_arguments(verb)
        patience: float = getattr(module, "TIMEOUT", _TIMEOUT)
        _add_global_options(verb, top=False, patience=patience)
        verb.set_defaults(run=module.run, parser=verb, patience=patience)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run udmabufctl with `argv` (sys.argv's arguments by default) and return its exit status."""
    open_closed_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    # argparse's own treatment of "--" differs between Python versions; COMMAND must arrive as it was written.
    command: list[str] | None = None
    if "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    try:
        arguments = make_parser().parse_args(words)
        if command is not None and arguments.verb != alloc.VERB:
            arguments.parser.error("only alloc runs a COMMAND")
        if arguments.verb == alloc.VERB:
            if arguments.command:
                arguments.parser.error(f'put "--" before COMMAND, and options before that: -- {arguments.command[0]}')
            if command == []:
                arguments.parser.error('a COMMAND is missing after "--"')
        arguments.command = command
        if arguments.timeout is None:
            arguments.timeout = arguments.patience
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except UdmabufError as error:
        print(f"udmabufctl: {printable(str(error))}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:
        # Whoever read us has enough (head); what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        print(f"udmabufctl: {printable(str(error))}", file=sys.stderr)
        return EXIT_FAILURE


def _add_global_options(parser: argparse.ArgumentParser, *, top: bool, patience: float) -> None:
    """Add the options that stand before or after the verb; a verb's default must not undo what stood before it.

    `patience` is the time-out, in seconds, without one that is given.
    """

    def default(value: object) -> object:
        return value if top else argparse.SUPPRESS

    others = ", of some verbs more" if top else ""
    group = parser.add_argument_group("general options")
    group.add_argument(
        "--bus",
        metavar="ADDRESS",
        default=default("system"),
        help="the bus of the service: 'system' (default), 'session', or a D-Bus address",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=default(None),
        help=f"how long each call may take (default: {patience:g}{others}, at most {_LONGEST_TIMEOUT})",
    )
    group.add_argument(
        "--json",
        action="store_true",
        default=default(False),
        help="answer in JSON: sizes in bytes, keys as in org.udmabufd.Allocator1(5)",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"invalid number of seconds: {text!r} is not more than 0 and at most {_LONGEST_TIMEOUT}"
        )
    return seconds


_seconds.__name__ = "number of seconds"
"""argparse names the type in its message."""
