# SPDX-License-Identifier: MIT
"""The manual pages: what programs, configuration and interfaces have is in them, and formatters find no fault."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.tools import TOP, needed
from udmabufd import database
from udmabufd.__main__ import make_parser as daemon_parser
from udmabufd.config import OPTIONS
from udmabufd.core.device import Device
from udmabufd.core.events import FIELDS, Event
from udmabufd.system import journal
from udmabufd_client import contract
from udmabufd_client.cli import make_parser as ctl_parser

GENERATE = TOP / "systemd/man/generate.py"
PAGES = ("org.udmabufd.Allocator1.5", "udmabufctl.1", "udmabufd.8", "udmabufd.devices.5", "udmabufd.toml.5")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, generated as the installation does."""
    folder = tmp_path_factory.mktemp("man")
    paths = [argument for path in sys.path if path for argument in ("--path", path)]
    subprocess.run([sys.executable, "-I", "-B", GENERATE, *paths, folder], check=True)
    return folder


def text(page: Path) -> str:
    """Return the page as a reader sees it, in one line."""
    environ = {**os.environ, "MANWIDTH": "200", "MAN_KEEP_FORMATTING": "", "LC_ALL": "C.UTF-8"}
    shown = subprocess.run(
        [needed("man"), "--warnings", "-l", page],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0
    assert shown.stderr == ""
    return " ".join(shown.stdout.replace("\N{HYPHEN}", "-").split())


def test_these_pages_and_no_others_are_made(pages: Path) -> None:
    assert sorted(path.name for path in pages.iterdir()) == sorted([*PAGES, "udmabufd.toml"])


@pytest.mark.parametrize("name", PAGES)
def test_groff_has_no_warning(pages: Path, name: str) -> None:
    done = subprocess.run(
        [needed("groff"), "-man", "-ww", "-Tutf8", "-z", pages / name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_has_no_warning(pages: Path, name: str) -> None:
    done = subprocess.run(
        [needed("mandoc"), "-Tlint", "-Wwarning", pages / name], capture_output=True, text=True, check=False
    )
    # A page carries the version, not a date: it is made anew at each installation.
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                found += parsers(action.choices[name])
    return found


@pytest.mark.parametrize(("name", "make"), [("udmabufd.8", daemon_parser), ("udmabufctl.1", ctl_parser)])
def test_each_option_is_in_the_page(pages: Path, name: str, make: type[argparse.ArgumentParser]) -> None:
    shown = text(pages / name)
    for parser in parsers(make()):
        assert parser.prog in shown
        for action in parser._actions:
            if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
                continue
            assert action.help, f"{parser.prog}: {action.dest} has no help"
            for option in action.option_strings:
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"{parser.prog} {option}"
            formatter = argparse.HelpFormatter(parser.prog)
            assert " ".join(formatter._expand_help(action).split()) in shown


@pytest.mark.parametrize("make", [daemon_parser, ctl_parser])
def test_help_fits_a_terminal(make: type[argparse.ArgumentParser]) -> None:
    for parser in parsers(make()):
        if parser.formatter_class is argparse.RawDescriptionHelpFormatter:
            for line in f"{parser.description}\n{parser.epilog}".splitlines():
                assert len(line) <= 78, f"{parser.prog}: {line}"


def test_each_key_of_the_configuration_is_in_the_page(pages: Path) -> None:
    shown = text(pages / "udmabufd.toml.5")
    for option in OPTIONS:
        assert f"[{option.section}]" in shown
        assert f"{option.key} = " in shown
        assert " ".join(option.doc.split()) in shown
        if option.minimum is not None:
            assert f"{option.unit}, {option.minimum} to {option.maximum}." in shown


def test_the_format_of_the_database_is_in_the_page(pages: Path) -> None:
    shown = text(pages / "udmabufd.devices.5")
    for key in (*database.ENTRY_KEYS, *database.MATCH_KEYS, *database.DUMB_KEYS):
        assert re.search(rf"(?<![\w-]){key}(?![\w-])", shown), key
    for name, described in contract.CONSTRAINT_KEYS.items():
        assert f"{name} {described.type} {described.meaning}" in shown


def test_the_example_of_the_database_says_what_the_page_says(tmp_path: Path) -> None:
    page = (TOP / "systemd/man/udmabufd.devices.5.md").read_text()
    example = page[page.index("    [[device]]\n") :].split("\n\nAfter ")[0]
    folder = tmp_path / database.FOLDER
    folder.mkdir()
    (folder / "50-acme.toml").write_text(textwrap.dedent(example))
    known = database.load([tmp_path], "6.12.0")
    decoder = Device("/dev/video2", "/dev/video2", "video4linux", "video2", "/v", "", "/p", "platform", "vdec")
    decoder = dataclasses.replace(decoder, driver="acme-vdec", drivers=("acme-vdec",))
    anywhere = {"stride_alignment": 128, "height_alignment": 16, "tail_padding": 64}
    behind_iommu = known.describe(dataclasses.replace(decoder, iommu_group="1", iommu_type="DMA"))
    assert behind_iommu.constraints.values() == anywhere
    assert known.describe(decoder).constraints.values() == {**anywhere, "max_segments": 1, "contiguous": True}
    assert set(known.describe(decoder).sources) >= anywhere.keys()


def test_the_configuration_file_is_the_defaults(pages: Path) -> None:
    content = (pages / "udmabufd.toml").read_text()
    # Installed, it changes nothing; with its comments taken away, it still changes nothing.
    assert not any(tomllib.loads(content).values())
    values = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", content, flags=re.MULTILINE))
    assert {(section, key): value for section, entries in values.items() for key, value in entries.items()} == {
        (option.section, option.key): list(option.default) if isinstance(option.default, tuple) else option.default
        for option in OPTIONS
    }


def test_each_member_key_and_error_is_in_the_page(pages: Path) -> None:
    shown = text(pages / "org.udmabufd.Allocator1.5")
    for name in (
        contract.ALLOCATOR_INTERFACE,
        contract.BUFFER_INTERFACE,
        contract.ADMIN_INTERFACE,
        contract.LOG_CONTROL_INTERFACE,
    ):
        (interface,) = ElementTree.fromstring(contract.interface_xml(name)).iter("interface")
        assert f"of {name}" in shown
        for member in interface:
            if member.tag == "annotation":
                continue
            arguments = [f"{arg.get('type')} {arg.get('name')}" for arg in member.findall("arg")]
            docs = [
                annotation.get("value", "")
                for annotation in member.iter("annotation")
                if annotation.get("name") == "org.gtk.GDBus.DocString"
            ]
            assert docs, f"{name}.{member.get('name')} is not documented"
            if member.tag == "property":
                assert f"{member.get('name')} {member.get('type')} (" in shown
            else:
                assert f"{member.get('name')}(" in shown
            assert all(part in shown for part in (*arguments, *docs))
    for table in (
        contract.SPEC_KEYS,
        contract.WRAP_KEYS,
        contract.INFO_KEYS,
        contract.LIST_KEYS,
        contract.GET_FD_KEYS,
        contract.CONSTRAINT_KEYS,
        contract.ATTACH_KEYS,
        contract.ATTACHMENT_KEYS,
        contract.VERDICT_KEYS,
        contract.DEVICE_KEYS,
        contract.ALLOCATOR_KEYS,
        contract.USAGE_KEYS,
        contract.RECOVER_KEYS,
        contract.RECOVERED_KEYS,
    ):
        for key, described in table.items():
            assert f"{key} {described.type} {described.meaning}" in shown
    for error in contract.ErrorName:
        assert f"{contract.ERROR_PREFIX}{error} {contract.ERROR_MEANINGS[error]}" in shown


def test_each_section_that_the_interfaces_point_to_is_there(pages: Path) -> None:
    page = (pages / "org.udmabufd.Allocator1.5").read_text()
    titles = set(re.findall(r'^\.SH "(.*)"$', page, flags=re.MULTILINE))
    seen = set()
    for path in (TOP / "systemd/interfaces").glob("org.udmabufd.*.xml"):
        seen |= set(re.findall(r"See ([A-Z]+ KEYS)|see ([A-Z]+ KEYS)", path.read_text()))
    wanted = {title for pair in seen for title in pair if title}
    words = "SPEC WRAPMEMFD INFO LIST USAGE RECOVER CONSTRAINT GETFD ATTACH ATTACHMENT VERDICT DEVICE ALLOCATOR"
    assert {f"{word} KEYS" for word in words.split()} <= wanted
    assert wanted <= titles


def test_each_event_and_field_of_the_journal_is_in_the_page(pages: Path) -> None:
    shown = text(pages / "udmabufd.8")
    for event in Event:
        assert f"{event.message_id} {event.subject}." in shown
    for name in FIELDS:
        assert f"{journal.FIELDS[name]} " in shown
    # Those that the prose names are there, too.
    page = (TOP / "systemd/man/udmabufd.8.md").read_text()
    assert set(re.findall(r"\b[0-9a-f]{32}\b", page)) == {Event.OUT_OF_MEMORY.message_id}
    assert set(re.findall(r"\bUDMABUFD_[A-Z]+(?!\w)", page)) <= set(journal.FIELDS.values())


def test_an_unknown_part_of_a_page_is_an_error(tmp_path: Path) -> None:
    program = "import sys; sys.path.insert(0, sys.argv[1]); import roff; roff.render('@nonesuch@', {})"
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", program, GENERATE.parent], capture_output=True, text=True, check=False
    )
    assert "KeyError: 'nonesuch'" in done.stderr
