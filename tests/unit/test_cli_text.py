# SPDX-License-Identifier: MIT
"""Tables, lists and sizes as they look: golden at two widths, never wider than asked, harmless to terminals."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd_client.cli.constraint import constraints_text
from udmabufd_client.cli.list_buffers import _COLUMNS
from udmabufd_client.cli.text import bold, cut, human_size, notes, pairs, paragraph, printable, table, width_of

ROWS = [
    ("0123456789abcdef", "viewfinder picture", "backed", "dma-buf", "7.9 MiB", "1920x1080 XR24", "udmabuf", "2"),
    ("fedcba9876543210", "x", "empty", "-", "4 KiB", "-", "-", "1"),
]

WIDE = """\
ID                NAME                STATE   KIND        SIZE  PICTURE         ALLOCATOR  HOLDERS
0123456789abcdef  viewfinder picture  backed  dma-buf  7.9 MiB  1920x1080 XR24  udmabuf          2
fedcba9876543210  x                   empty   -          4 KiB  -               -                1"""

AT_80 = """\
ID                NAME         STATE   KIND        SIZE  PICTURE         HOLDERS
0123456789abcdef  viewfinder…  backed  dma-buf  7.9 MiB  1920x1080 XR24        2
fedcba9876543210  x            empty   -          4 KiB  -                     1"""

AT_40 = """\
ID                NAME              SIZE
0123456789abcdef  viewfinder p…  7.9 MiB
fedcba9876543210  x                4 KiB"""


@pytest.mark.parametrize(("width", "golden"), [(None, WIDE), (200, WIDE), (80, AT_80), (40, AT_40)])
def test_the_list_looks_as_it_should(width: int | None, golden: str) -> None:
    assert "\n".join(table(_COLUMNS, ROWS, width)) == golden


@given(
    st.lists(st.tuples(*[st.text(max_size=40)] * len(_COLUMNS)), max_size=4),
    st.integers(min_value=1, max_value=200),
)
def test_no_line_is_wider_than_the_terminal(rows: list[tuple[str, ...]], width: int) -> None:
    lines = table(_COLUMNS, rows, width)
    assert len(lines) == len(rows) + 1
    assert all(len(line) <= width for line in lines)
    assert all(len(line) <= width for line in pairs([(row[0], row[1]) for row in rows], width))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (4096, "4 KiB"),
        (1 << 20, "1 MiB"),
        (1920 * 1080 * 4, "7.9 MiB"),
        (552960, "540 KiB"),
        (1 << 40, "1 TiB"),
        (1 << 63, "8192 PiB"),
    ],
)
def test_sizes_for_people(size: int | None, text: str) -> None:
    assert human_size(size) == text


def test_nothing_steers_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\u202e") == "a\N{REPLACEMENT CHARACTER}[31mb" + "\N{REPLACEMENT CHARACTER}c" + (
        "\N{REPLACEMENT CHARACTER}"
    )
    assert "\x1b" not in "".join(table(_COLUMNS, [("\x1b[2J",) * len(_COLUMNS)], 80))
    assert "\x1b" not in pairs([("name", "\x1b[2J")], None)[0]


def test_paragraphs_are_filled() -> None:
    assert paragraph("one two three", 4, 12) == ["    one two", "    three"]
    assert paragraph("one two three", 4, None) == ["    one two three"]
    assert cut("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ({}, "any"),
        ({"alignment": 65536, "tail_padding": 1000}, "alignment 64 KiB; tail_padding 1000 B"),
        (
            {"address_bits": 32, "height_alignment": 16, "max_segments": 8},
            "address_bits 32 bits; height_alignment 16 rows; max_segments 8",
        ),
        # The same demand twice is said once.
        ({"max_segments": 1, "contiguous": True}, "contiguous"),
        ({"cache": ["cached", "uncached"]}, "cache cached, uncached"),
        ({"size_alignment": 3 << 20}, "size_alignment 3 MiB"),
        ({"segment_boundary": 1 << 63}, "segment_boundary 8 EiB"),
        ({"tail_padding": 0}, "tail_padding 0 B"),
    ],
)
def test_constraints_for_people(constraints: dict[str, object], text: str) -> None:
    assert constraints_text(constraints) == text


def test_notes_are_filled_and_what_is_said_of_many_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    notes([("one", ["same"]), ("three", ["a\x1bb", "some words too many"]), ("two", ["same"])], stream)
    assert stream.getvalue().splitlines() == [
        "",
        "one, two",
        "    same",
        "",
        "three",
        "    a\N{REPLACEMENT CHARACTER}b",
        "    some words too",
        "    many",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bold_and_width_only_on_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert (bold("ID", io.StringIO()), width_of(io.StringIO())) == ("ID", None)
    assert bold("ID", Terminal()) == "\x1b[1mID\x1b[0m"
    monkeypatch.setenv("COLUMNS", "47")
    assert width_of(io.StringIO()) == width_of(Terminal()) == 47
    monkeypatch.setenv("NO_COLOR", "1")
    assert bold("ID", Terminal()) == "ID"
