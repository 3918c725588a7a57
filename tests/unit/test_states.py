# SPDX-License-Identifier: MIT
"""core.states: the table is sound, every drawing of it is of it, and the documentation has that drawing."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.tools import TOP
from udmabufd.core.states import TABLE, ImpossibleStep, Row, Step, Who, after, drawing, steps
from udmabufd_client.contract import State

EVERYWHERE: tuple[State | None, ...] = (None, *State)


def test_a_step_has_one_outcome() -> None:
    assert max(Counter((row.before, row.step) for row in TABLE).values()) == 1
    # And one that does it, or a drawing of what several states do alike would lie.
    assert len({(row.step, row.who) for row in TABLE}) == len(Step)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.before}-{row.step.name}")
def test_what_is_in_the_table(row: Row) -> None:
    assert after(row.before, row.step) is row.after
    assert row.step in steps(row.before)


def test_what_is_not_in_the_table() -> None:
    possible = {(row.before, row.step) for row in TABLE}
    refused = [pair for pair in itertools.product(EVERYWHERE, Step) if pair not in possible]
    assert len(refused) + len(TABLE) == len(EVERYWHERE) * len(Step)
    for state, step in refused:
        with pytest.raises(ImpossibleStep) as caught:
            after(state, step)
        assert (caught.value.state, caught.value.step) == (state, step)
        assert step not in steps(state)
    with pytest.raises(ImpossibleStep, match="no buffer that is lingering can take the step MOVE_BEGUN"):
        after(State.LINGERING, Step.MOVE_BEGUN)
    with pytest.raises(ImpossibleStep, match="no buffer that is none can take the step FREED"):
        after(None, Step.FREED)


def reachable(start: State | None, without: set[Step]) -> set[State | None]:
    found = {start}
    while True:
        more = {row.after for row in TABLE if row.before in found and row.step not in without} - found
        if not more:
            return found
        found |= more


def test_every_state_comes_about_and_ends() -> None:
    assert reachable(None, set()) == set(EVERYWHERE)
    for state in State:
        assert None in reachable(state, {Step.CREATED})


def test_no_move_outlives_its_end() -> None:
    """Nor a restart, whoever held it; and no other state is changed by one."""
    for state in State:
        assert after(state, Step.RESTARTED) is (State.BACKED if state is State.MOVING else state)
    for step in (Step.MOVED, Step.MOVE_CANCELLED, Step.EVICTED):
        assert [row.before for row in TABLE if row.step is step] == [State.MOVING]


def test_whoever_has_memory_has_it_until_the_kernel_says_so() -> None:
    """But for memfds, which the service does not watch."""
    ends = [(row.before, row.who) for row in TABLE if row.after is None and row.step is not Step.DISCARDED]
    assert ends == [(State.LINGERING, Who.KERNEL)]
    for state in (State.BACKED, State.MOVING, State.EVICTED):
        assert after(state, Step.UNHELD) is State.LINGERING


def test_the_life_of_a_memfd() -> None:
    state: State | None = None
    for step, expected in (
        (Step.CREATED, State.EMPTY),
        (Step.ALLOCATED, State.BACKED),
        (Step.RESTARTED, State.BACKED),
        (Step.DISCARDED, None),
    ):
        state = after(state, step)
        assert state is expected


def read_back(text: str) -> set[tuple[str, str, str, str]]:
    """Return the transitions that a drawing shows, by looking at it alone: from, to, who, what."""
    header, *lines = text.splitlines()
    at = {header.index(name): name for name in header.split()}
    found = set()
    for line in lines:
        arrows, label = line[: len(header)], line[len(header) :].strip()
        who, what = label.split(": ")
        if "o" in arrows:
            begin, end = arrows.index("o"), arrows.index(">" if ">" in arrows else "<")
            between = arrows[min(begin, end) + 1 : max(begin, end)]
            assert set(between) == {"-"}
            assert len(arrows.strip()) == len(between) + 2
            found.add((at[begin], at[end], who, what))
        else:
            assert set(arrows) == {"=", " "}
            found |= {(at[column], at[column], who, what) for column, mark in enumerate(arrows) if mark == "="}
    return found


def test_the_drawing_shows_the_table_and_nothing_else() -> None:
    def name(state: State | None) -> str:
        return "none" if state is None else str(state)

    assert read_back(drawing()) == {(name(row.before), name(row.after), str(row.who), str(row.step)) for row in TABLE}
    assert drawing().isascii()
    assert all(line == line.rstrip() for line in drawing().splitlines())
    # In a manual page, which has a margin of 7, on a terminal of 80 columns.
    assert max(len(line) for line in drawing().splitlines()) <= 80 - 7


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_the_architecture_has_the_drawing() -> None:
    text = (TOP / "daemon/ARCHITECTURE.md").read_text()
    (section,) = [part for part in text.split("\n## ") if part.startswith("A buffer's life\n")]
    drawn = "".join(line for line in section.splitlines(keepends=True) if line.startswith("    "))
    assert drawn == indented(drawing()), f"it is to be:\n{indented(drawing())}"


def test_the_manual_page_has_the_drawing(tmp_path: Path) -> None:
    paths = [argument for path in sys.path if path for argument in ("--path", path)]
    subprocess.run([sys.executable, "-I", "-B", TOP / "systemd/man/generate.py", *paths, tmp_path], check=True)
    page = (tmp_path / "org.udmabufd.Allocator1.5").read_text().replace("\\-", "-").splitlines()
    assert "\n".join(f"\\&{line}" for line in drawing().splitlines()) in "\n".join(page)
