# SPDX-License-Identifier: MIT
"""`udmabufctl limits`: every property of the service with its meaning, which the interface XML gives."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from udmabufd_client.cli.show import as_json
from udmabufd_client.cli.text import bold, human_size, paragraph, printable, width_of

VERB = "limits"
SUMMARY = "show what the service can do and what it allows this user"
DESCRIPTION = (
    "Show the service's properties: the limits that apply to this user, what can be allocated now, and how much is in "
    "use, each with its meaning."
)
EPILOG = """\
examples:
  udmabufctl limits
  udmabufctl limits --json | jq .MaxBufferSize
"""

_INDENT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the properties; return the exit status."""
    from udmabufd_client.contract import ALLOCATOR_INTERFACE
    from udmabufd_client.interface import interface
    from udmabufd_client.sync import Client

    with Client.connect(arguments.bus, timeout=arguments.timeout) as client:
        properties = client.properties()
    if arguments.json:
        print(as_json(properties))
        return 0
    known = interface(ALLOCATOR_INTERFACE).properties
    for name, value in properties.items():
        print(f"{bold(name, sys.stdout)}  {printable(_value(name, value))}")
        for line in paragraph(known[name].doc, _INDENT, width_of(sys.stdout)):
            print(line)
    return 0


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("USec"):
        return f"{value / 1e6:g} s"
    if "Bytes" in name or name.endswith("Size"):
        return f"{value} ({human_size(value)})"
    return str(value)
