# SPDX-License-Identifier: MIT
"""What the manual pages are generated from: argument parsers, configuration keys, interfaces, contract and events.

Each function answers with lines of roff. Where on a page they go is left to the prose.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

import roff

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from udmabufd.config import Option
    from udmabufd_client.contract import ErrorName, Key

DOC: Final = "org.gtk.GDBus.DocString"
EMITS: Final = "org.freedesktop.DBus.Property.EmitsChangedSignal"

CHANGES: Final = {
    "true": "Changes are signalled with the new value.",
    "invalidates": "Changes are signalled, without the new value.",
    "false": "Changes are not signalled.",
    "const": "Never changes while the service runs.",
}


# ---- argparse ---------------------------------------------------------------------------------------------------


def _formatter(parser: argparse.ArgumentParser) -> argparse.HelpFormatter:
    # A page's own width is man's affair.
    return argparse.HelpFormatter(parser.prog, width=10_000)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction):
            yield action


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            # An alias is the same parser under another name.
            unique: dict[int, tuple[str, argparse.ArgumentParser]] = {}
            for name, subparser in action.choices.items():
                unique.setdefault(id(subparser), (name, subparser))
            return dict(unique.values())
    return {}


def synopsis(parser: argparse.ArgumentParser) -> list[str]:
    """Return how the program is called."""
    formatter = _formatter(parser)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    usage = " ".join(formatter.format_help().split())
    return [".PP", roff.bold(parser.prog) + roff.escape(usage.removeprefix(parser.prog))]


def description(parser: argparse.ArgumentParser) -> list[str]:
    """Return what the program's --help says of it, above and below its options."""
    lines = []
    kind = parser.formatter_class
    raw = isinstance(kind, type) and issubclass(kind, argparse.RawDescriptionHelpFormatter)
    for text in (parser.description, parser.epilog):
        if text:
            lines += roff.preformatted(text % {"prog": parser.prog}) if raw else [".PP", roff.plain(text)]
    return lines


def options(parser: argparse.ArgumentParser) -> list[str]:
    """Return each option and argument with its meaning."""
    formatter = _formatter(parser)
    lines = []
    for action in _actions(parser):
        if action.option_strings:
            default = formatter._get_default_metavar_for_optional(action)
            value = "" if action.nargs == 0 else formatter._format_args(action, default)
            term = ", ".join(map(roff.bold, action.option_strings)) + (f" {roff.italic(value)}" if value else "")
        else:
            term = roff.italic(formatter._format_args(action, formatter._get_default_metavar_for_positional(action)))
        lines += roff.definition(term, formatter._expand_help(action) if action.help else "")
    return lines


def commands(parser: argparse.ArgumentParser) -> list[str]:
    """Return each sub-command: how it is called, what it does, its options."""
    lines = []
    for name, subparser in _subparsers(parser).items():
        lines += [f'.SS "{roff.escape(name)}"', *synopsis(subparser), *description(subparser), *options(subparser)]
        lines += commands(subparser)
    return lines


# ---- configuration ----------------------------------------------------------------------------------------------


def value(option: Option) -> str:
    """Return the default as TOML has it."""
    return _toml(option.default)


def _toml(value: object) -> str:
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{quoted}"'
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    assert isinstance(value, list | tuple)
    return f"[{', '.join(_toml(part) for part in value)}]"


def domain(option: Option) -> str:
    """Return the type, the unit and the bounds of a key as a sentence."""
    if option.type is str:
        return f"A {option.unit}, as a string."
    if option.type is not int:
        return f"An array of {option.unit}, as strings."
    if option.minimum is not None and option.maximum is not None:
        return f"A number of {option.unit}, {option.minimum} to {option.maximum}."
    return f"A number of {option.unit}."


def config_options() -> list[str]:
    """Return each key of each section of udmabufd.toml."""
    from udmabufd.config import OPTIONS

    lines = []
    section = None
    for option in OPTIONS:
        if option.section != section:
            section = option.section
            lines.append(f'.SS "[{roff.escape(section)}]"')
        term = f"{roff.bold(option.key)} = {roff.escape(value(option))}"
        lines += roff.definition(term, option.doc, domain(option))
    return lines


# ---- interfaces -------------------------------------------------------------------------------------------------


def _annotation(element: ElementTree.Element, name: str) -> str:
    for annotation in element.findall("annotation"):
        if annotation.get("name") == name:
            return annotation.get("value", "")
    return ""


def _arguments(member: ElementTree.Element, direction: str) -> str:
    # An argument of a signal has no direction.
    wanted = [arg for arg in member.findall("arg") if arg.get("direction", direction) == direction]
    return ", ".join(f"{roff.escape(arg.get('type', ''))} {roff.italic(arg.get('name', ''))}" for arg in wanted)


def _member(member: ElementTree.Element) -> list[str]:
    name = roff.bold(member.get("name", ""))
    if member.tag == "property":
        kind = "read and write" if member.get("access") == "readwrite" else member.get("access", "")
        changes = CHANGES[_annotation(member, EMITS) or "true"]
        term = f"{name} {roff.escape(member.get('type', ''))} ({kind})"
        return roff.definition(term, f"{_annotation(member, DOC)} {changes}")
    answer = _arguments(member, "out") if member.tag == "method" else ""
    given = _arguments(member, "in" if member.tag == "method" else "out")
    term = f"{name}({given})" + (f" \\(-> {answer}" if answer else "")
    lines = roff.definition(term, _annotation(member, DOC))
    for arg in member.findall("arg"):
        if doc := _annotation(arg, DOC):
            lines += [".IP", f"{roff.italic(arg.get('name', ''))}: {roff.escape(doc)}"]
    return lines


def interface(xml: str) -> list[str]:
    """Return the members of the interface in `xml`, as the introspection document describes them."""
    lines = []
    for element in ElementTree.fromstring(xml).findall("interface"):  # noqa: S314  # it is our own file
        if doc := _annotation(element, DOC):
            lines += [".PP", roff.plain(doc)]
        for title, tag in (("Methods", "method"), ("Signals", "signal"), ("Properties", "property")):
            members = element.findall(tag)
            if members:
                lines.append(f'.SS "{title} of {roff.escape(element.get("name", ""))}"')
                for member in members:
                    lines += _member(member)
    return lines


def keys(table: Mapping[str, Key]) -> list[str]:
    """Return the keys of a dictionary with their D-Bus types."""
    lines = []
    for name, key in table.items():
        lines += roff.definition(f"{roff.bold(name)} {roff.escape(key.type)}", key.meaning)
    return lines


def errors(prefix: str, meanings: Mapping[ErrorName, Any]) -> list[str]:
    """Return each error by its full name."""
    lines = []
    for name, meaning in meanings.items():
        lines += roff.definition(roff.bold(f"{prefix}{name}"), meaning)
    return lines


# ---- journal ----------------------------------------------------------------------------------------------------


def events() -> list[str]:
    """Return the MESSAGE_ID of each event that the journal is told of, and what the event is."""
    from udmabufd.core.events import Event

    lines = []
    for event in Event:
        lines += roff.definition(roff.bold(event.message_id), f"{event.subject}.")
    return lines


def journal_fields() -> list[str]:
    """Return each field of the journal that is the daemon's own."""
    from udmabufd.core.events import FIELDS
    from udmabufd.system import journal

    lines = []
    for name, meaning in FIELDS.items():
        lines += roff.definition(roff.bold(journal.FIELDS[name]), f"{meaning[0].upper()}{meaning[1:]}.")
    return lines
