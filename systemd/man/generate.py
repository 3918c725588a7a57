#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes the manual pages and the commented udmabufd.toml from what the programs themselves are made of.

Each page is a file NAME.SECTION.md beside this one: hand-written prose, in which a line like `@options@` stands for
what is generated: from the argument parsers, the tables of configuration keys and of states, the interface XML and the
contract. What the markup of the prose means is left to `roff`.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final

HERE: Final = Path(__file__).resolve().parent
TOP: Final = HERE.parents[1]
# `python -I` leaves the script's own folder out.
sys.path.insert(0, str(HERE))

import roff  # noqa: E402
import sources  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

TOML_NAME: Final = "udmabufd.toml"


def parts() -> dict[str, Callable[[], list[str]]]:
    """Return what each `@name@` of the prose stands for, as a function that makes its lines of roff."""
    # Late: these modules are found by --path.
    from udmabufd import __main__ as daemon
    from udmabufd.core import states
    from udmabufd_client import cli, contract

    def xml(interface: str) -> Callable[[], list[str]]:
        return lambda: sources.interface(contract.interface_xml(interface))

    return {
        "daemon-synopsis": lambda: sources.synopsis(daemon.make_parser()),
        "daemon-description": lambda: sources.description(daemon.make_parser()),
        "daemon-options": lambda: sources.options(daemon.make_parser()),
        "ctl-synopsis": lambda: sources.synopsis(cli.make_parser()),
        "ctl-description": lambda: sources.description(cli.make_parser()),
        "ctl-options": lambda: sources.options(cli.make_parser()),
        "ctl-commands": lambda: sources.commands(cli.make_parser()),
        "config-options": sources.config_options,
        "allocator": xml(contract.ALLOCATOR_INTERFACE),
        "buffer": xml(contract.BUFFER_INTERFACE),
        "admin": xml(contract.ADMIN_INTERFACE),
        "log-control": xml(contract.LOG_CONTROL_INTERFACE),
        "states": lambda: kept(states.drawing()),
        "spec-keys": lambda: sources.keys(contract.SPEC_KEYS),
        "wrap-keys": lambda: sources.keys(contract.WRAP_KEYS),
        "get-fd-keys": lambda: sources.keys(contract.GET_FD_KEYS),
        "move-keys": lambda: sources.keys(contract.MOVE_KEYS),
        "constraint-keys": lambda: sources.keys(contract.CONSTRAINT_KEYS),
        "attach-keys": lambda: sources.keys(contract.ATTACH_KEYS),
        "attachment-keys": lambda: sources.keys(contract.ATTACHMENT_KEYS),
        "verdict-keys": lambda: sources.keys(contract.VERDICT_KEYS),
        "device-keys": lambda: sources.keys(contract.DEVICE_KEYS),
        "allocator-keys": lambda: sources.keys(contract.ALLOCATOR_KEYS),
        "info-keys": lambda: sources.keys(contract.INFO_KEYS),
        "list-keys": lambda: sources.keys(
            {name: key for name, key in contract.LIST_KEYS.items() if name not in contract.INFO_KEYS}
        ),
        "usage-keys": lambda: sources.keys(contract.USAGE_KEYS),
        "recover-keys": lambda: sources.keys(contract.RECOVER_KEYS),
        "recovered-keys": lambda: sources.keys(contract.RECOVERED_KEYS),
        "events": sources.events,
        "journal-fields": sources.journal_fields,
        "errors": lambda: sources.errors(contract.ERROR_PREFIX, contract.ERROR_MEANINGS),
    }


def kept(text: str) -> list[str]:
    """Return lines of roff that show `text` as it is, each character as wide as the others."""
    # groff's .EE turns hyphenation on again, which the pages begin without.
    return [".PP", ".EX", *(f"\\&{roff.escape(line)}" for line in text.splitlines()), ".EE", ".nh"]


def page(path: Path, version: str, known: dict[str, Callable[[], list[str]]]) -> str:
    """Return the page in roff. Raises KeyError for an `@name@` that is not known."""
    name, section = path.name.removesuffix(".md").rsplit(".", 1)
    lines = [
        '.\\" SPDX-License-Identifier: MIT',
        f'.\\" Made by systemd/man/generate.py from {path.name}; change it there.',
        f'.TH "{roff.escape(name.upper() if section != "5" else name)}" {section} "" "udmabufd {version}" "udmabufd"',
        # Left-aligned and unhyphenated: names are not to be cut.
        ".ad l",
        ".nh",
        *roff.render(path.read_text(encoding="utf-8"), known),
    ]
    return "\n".join(lines) + "\n"


def toml() -> str:
    """Return the configuration file that is installed: every key with its meaning and default, commented out."""
    from udmabufd.config import OPTIONS

    lines = [
        "# SPDX-License-Identifier: MIT",
        "#",
        "# The defaults of udmabufd, see udmabufd.toml(5). To change one, write it to /etc/udmabufd/udmabufd.toml, or",
        "# to a drop-in /etc/udmabufd/udmabufd.toml.d/NAME.toml, and restart the service.",
    ]
    section = None
    for option in OPTIONS:
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"]
        text = f"{option.doc} {sources.domain(option)}"
        lines += ["", *(f"# {line}" for line in textwrap.wrap(text, 110)), f"#{option.key} = {sources.value(option)}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write all pages and the configuration file into the folder that is named on the command line."""
    parser = argparse.ArgumentParser(prog="generate.py", description="Make the manual pages and udmabufd.toml.")
    parser.add_argument(
        "--path",
        metavar="DIR",
        action="append",
        help="where the modules of udmabufd are, repeatable; by default in this source tree",
    )
    parser.add_argument("outdir", type=Path, help="folder to write to; made if it is not there")
    arguments = parser.parse_args()
    sys.path[:0] = arguments.path or [str(TOP / "daemon"), str(TOP / "client")]
    version = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    arguments.outdir.mkdir(parents=True, exist_ok=True)
    known = parts()
    for path in sorted(HERE.glob("*.[158].md")):
        target = arguments.outdir / path.name.removesuffix(".md")
        target.write_text(page(path, version, known), encoding="utf-8")
    (arguments.outdir / TOML_NAME).write_text(toml(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
