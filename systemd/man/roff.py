# SPDX-License-Identifier: MIT
"""Turns a small part of Markdown into roff for man(7): what the prose of our manual pages needs, and no more.

    # TITLE            a section          - text        an item of a list (goes on in indented lines)
    ## Title           a subsection       @name@        what a function of that name makes
    term               a definition: the term on a line of its own,
    :   text           then its text (goes on in indented lines)
        text           four spaces after an empty line: kept as it is
    **bold**  *italic*  `code` (bold)

Where the generated lines come from is left to the caller.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_INLINE: Final = re.compile(r"\*\*(?P<bold>[^*]+)\*\*|\*(?P<italic>[^*\s][^*]*)\*|`(?P<code>[^`]+)`")


def escape(text: str) -> str:
    """Return `text` so that roff shows it as it is, within a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("'", "\\(aq")
    return text.replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")


def bold(text: str) -> str:
    """Return `text`, escaped, in bold."""
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    """Return `text`, escaped, in italics."""
    return f"\\fI{escape(text)}\\fR"


def inline(text: str) -> str:
    """Return a piece of prose with its emphasis, safe at the start of a line."""
    parts = []
    end = 0
    for match in _INLINE.finditer(text):
        parts.append(escape(text[end : match.start()]))
        parts.append(italic(match["italic"]) if match["italic"] else bold(match["bold"] or match["code"]))
        end = match.end()
    parts.append(escape(text[end:]))
    line = "".join(parts)
    return f"\\&{line}" if line.startswith((".", "\\(aq")) else line


def plain(text: str) -> str:
    """Return text that is no markup as one line of prose, safe at its start."""
    line = escape(" ".join(text.split()))
    return f"\\&{line}" if line.startswith((".", "\\(aq")) else line


def preformatted(text: str) -> list[str]:
    """Return text that was laid out for a terminal: prose at the margin, and what is indented kept as it is."""
    lines = []
    for block in _blocks(textwrap.dedent(text)):
        for indented, run in itertools.groupby(block, key=lambda line: line.startswith(" ")):
            if indented:
                kept = textwrap.dedent("\n".join(run)).splitlines()
                lines += [".RS 4", ".nf", *(f"\\&{escape(line)}" for line in kept), ".fi", ".RE"]
            else:
                lines += [".PP", plain(" ".join(run))]
    return lines


def definition(term: str, *paragraphs: str) -> list[str]:
    """Return a term, in roff, and the paragraphs that say what it is, plain text, below it."""
    lines = [".TP", term]
    for number, paragraph in enumerate(paragraphs):
        lines += ([".IP"] if number else []) + [plain(paragraph)]
    return lines


def render(source: str, parts: Mapping[str, Callable[[], list[str]]]) -> list[str]:
    """Return the lines of roff for a page of prose. Raises KeyError for an unknown `@name@`."""
    lines: list[str] = []
    blocks = iter(_blocks(re.sub(r"<!--.*?-->\n*", "", source, flags=re.DOTALL)))
    for block in blocks:
        first = block[0]
        if match := re.fullmatch(r"@([a-z-]+)@", first):
            lines += parts[match[1]]()
        elif first.startswith("## "):
            lines.append(f'.SS "{escape(first[3:])}"')
        elif first.startswith("# "):
            lines.append(f'.SH "{escape(first[2:])}"')
        elif first.startswith("    "):
            lines += [".PP", ".RS 4", ".nf"]
            lines += [f"\\&{escape(line[4:])}" for line in block]
            lines += [".fi", ".RE"]
        elif first.startswith("- "):
            for item in _items(block, "- "):
                lines += [".IP \\[u2022] 2", inline(item)]
        elif len(block) > 1 and block[1].startswith(":   "):
            for index, line in enumerate(block):
                if not line.startswith((":   ", "    ")):
                    text = [block[index + 1][4:]]
                    for more in block[index + 2 :]:
                        if not more.startswith("    "):
                            break
                        text.append(more.strip())
                    lines += [".TP", inline(line), inline(" ".join(text))]
        else:
            lines += [".PP", inline(" ".join(block))]
    # Below a heading there is a paragraph anyway.
    heads = (".SH", ".SS")
    return [line for before, line in itertools.pairwise(["", *lines]) if line != ".PP" or before[:3] not in heads]


def _blocks(source: str) -> Iterator[list[str]]:
    """Yield the runs of lines between empty lines; empty lines within what is kept as it is do not part it."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        if line.strip():
            block.append(line.rstrip())
        elif block:
            yield block
            block = []


def _items(block: list[str], marker: str) -> Iterator[str]:
    item: list[str] = []
    for line in block:
        if line.startswith(marker):
            if item:
                yield " ".join(item)
            item = [line[len(marker) :]]
        else:
            item.append(line.strip())
    yield " ".join(item)
