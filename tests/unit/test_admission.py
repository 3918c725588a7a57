# SPDX-License-Identifier: MIT
"""core.admission: no more is admitted than there is room for, whoever asks at the same time; refusals say why."""

from __future__ import annotations

import pytest

from udmabufd.core.admission import CLOSE, LEFT_BEHIND, RESERVE, SPARE_FDS, Admission
from udmabufd.core.errors import OutOfMemory
from udmabufd.linux.headroom import Room

MIB = 1 << 20


class Machine:
    """What there is room for."""

    def __init__(self, available: int = 1024 * MIB, free_fds: int = 10_000) -> None:
        self.available = available
        self.free_fds = free_fds
        self.admission = Admission(self.room, lambda: self.free_fds)

    def room(self, beside: int) -> Room:
        return Room(
            self.available - beside, "memory.max of udmabufd.slice", 2048 * MIB, 2048 * MIB - self.available + beside
        )


def test_up_to_the_reserve_and_not_one_byte_more() -> None:
    machine = Machine()
    with machine.admission.admit(1024 * MIB - RESERVE, 3):
        pass
    with pytest.raises(OutOfMemory) as caught:
        machine.admission.admit(1024 * MIB - RESERVE + 1, 3)
    assert str(caught.value) == (
        f"size: {1024 * MIB - RESERVE + 1} more bytes would exceed memory.max of udmabufd.slice of {2048 * MIB}; "
        f"{1024 * MIB} are in use, 0 promised to calls under way, {RESERVE} kept in reserve"
    )


def test_what_was_admitted_counts_until_it_shows() -> None:
    machine = Machine(RESERVE + 1016 * MIB)
    admit = machine.admission.admit
    with admit(600 * MIB, 3), admit(400 * MIB, 3):
        with pytest.raises(OutOfMemory, match=f"{1000 * MIB} promised to calls under way"):
            admit(17 * MIB, 3)
        with admit(16 * MIB, 3):
            pass
    # It shows now, and was given back: it counts once.
    machine.available -= 1000 * MIB
    with admit(16 * MIB, 3):
        pass
    with pytest.raises(OutOfMemory, match="0 promised"):
        admit(17 * MIB, 3)


def test_a_reservation_ends_with_an_error_too() -> None:
    machine = Machine(RESERVE + 1016 * MIB)
    with pytest.raises(ZeroDivisionError), machine.admission.admit(1000 * MIB, 3):
        raise ZeroDivisionError
    with machine.admission.admit(1000 * MIB, 3):
        pass


def test_a_refusal_reserves_nothing() -> None:
    machine = Machine(free_fds=SPARE_FDS + 6)
    for _ in range(3):
        with pytest.raises(OutOfMemory):
            machine.admission.admit(2048 * MIB, 6)
    with machine.admission.admit(MIB, 6):
        pass


def test_near_the_limit_a_child_does_the_filling() -> None:
    machine = Machine(CLOSE + 100 * MIB)
    with machine.admission.admit(100 * MIB, 3) as exactly:
        assert not exactly.close
    with machine.admission.admit(100 * MIB + 1, 3) as beyond:
        assert beyond.close
    # Those under way bring it near for the next.
    with machine.admission.admit(60 * MIB, 3) as first, machine.admission.admit(60 * MIB, 3) as second:
        assert (first.close, second.close) == (False, True)


def test_descriptors_run_out_with_figures() -> None:
    machine = Machine(free_fds=SPARE_FDS + 9)
    with machine.admission.admit(MIB, 6):
        with pytest.raises(
            OutOfMemory, match="can open 3 more descriptors for buffers, and 6 are needed.*LimitNOFILE="
        ):
            machine.admission.admit(MIB, 6)
        with machine.admission.admit(MIB, 3):
            pass
    machine.free_fds = 10
    with pytest.raises(OutOfMemory, match="can open 0 more descriptors"):
        machine.admission.admit(MIB, 1)


def test_memory_that_no_group_is_charged_for_counts_as_if_one_were() -> None:
    machine = Machine(RESERVE + 1000 * MIB)
    with machine.admission.admit(600 * MIB, 3, 400 * MIB):
        pass
    with pytest.raises(OutOfMemory, match=f"{601 * MIB} more bytes .*; {(2048 - 600) * MIB - RESERVE} are in use"):
        machine.admission.admit(601 * MIB, 3, 400 * MIB)
    with machine.admission.admit(100 * MIB, 3, 850 * MIB) as near:
        assert near.close
    with machine.admission.admit(100 * MIB, 3) as far:
        assert not far.close
    # What takes none of the memory in question needs none.
    with machine.admission.admit(0, 3, 5000 * MIB):
        pass


def test_a_group_beyond_its_limit_admits_only_what_takes_no_memory() -> None:
    machine = Machine(-5 * MIB)
    with pytest.raises(OutOfMemory, match=f"size: 4096 more bytes .*{2053 * MIB} are in use"):
        machine.admission.admit(4096, 3)
    with machine.admission.admit(0, 3):
        pass


def test_what_clients_leave_to_the_service_is_bounded() -> None:
    room = Room(1 << 40, "MemAvailable", 1 << 40, 0)
    present: int | None = None
    admission = Admission(lambda _: room, lambda: 10_000, lambda: present)
    admission.check_left_behind(0)  # Where nothing tells, nothing is refused.
    present = LEFT_BEHIND + 4096
    admission.check_left_behind(4096)
    with pytest.raises(OutOfMemory, match=f"pays for {LEFT_BEHIND + 4096} bytes .* beyond {LEFT_BEHIND}"):
        admission.check_left_behind(0)
    with admission.admit(4096, 1):
        # What is just being filled for a buffer is the service's own.
        admission.check_left_behind(0)
