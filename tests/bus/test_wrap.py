# SPDX-License-Identifier: MIT
"""WrapMemfd on a bus: what is refused before the driver is asked, with memfd or range, and cause, by name.

Without a driver what is good ends in UdmabufUnavailable, so each refusal here is known to come before that. What the
driver makes of memfds is shown in tests/kernel/test_wrap.py.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from tests.bus.memfds import SEALS, clients_memfd, entries, peer_of, reopened, send, until, wrap
from tests.bus.peer import Peer, error
from tests.bus.service import RunningService
from tests.bus.test_import import DBUS, FOREIGN, kinds
from udmabufd.core.wrap import MAX_RANGES
from udmabufd.linux import memfd
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ALLOCATOR_INTERFACE, WRAP_TYPES

pytestmark = [pytest.mark.host, pytest.mark.root]

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE
HUGE = 2 << 20
SIGNATURE = "aha(utt)a{sv}"
WRAPPER = 7
"""A user that every system has, and no other test is."""

Ranges = list[tuple[int, int, int]]


@pytest.fixture
async def alice(service: RunningService) -> AsyncIterator[Peer]:
    """A user's connection, after which the service has what it had before, and no buffer of the user's."""
    async with peer_of(service.address, WRAPPER) as peer:
        assert not await entries(peer)
        before = kinds(service)

        async def as_before() -> bool:
            return kinds(service) <= before

        yield peer
        await until(as_before)
        assert not await entries(peer)


async def refused(
    peer: Peer, kind: str, text: str, fds: list[OwnedFd], ranges: Ranges, options: dict[str, object] | None = None
) -> None:
    """Expect the error with exactly this text, as a pattern."""
    with pytest.raises(RemoteError) as caught:
        await wrap(peer, fds, ranges, **(options or {}))
    assert caught.value.name == error(kind), caught.value
    assert re.fullmatch(text, caught.value.message), caught.value.message


async def test_what_is_good_waits_for_a_driver_alone(alice: Peer) -> None:
    with clients_memfd(SIZE) as one, clients_memfd(SIZE, SEALS | memfd.F_SEAL_GROW) as two:
        text = ".*/dev/udmabuf.*"
        await refused(alice, "UdmabufUnavailable", text, [one], [(0, 0, SIZE)], {"name": "good"})
        await refused(alice, "UdmabufUnavailable", text, [one, two], [(1, PAGE, PAGE), (0, 0, PAGE), (1, 0, SIZE)])
        await refused(alice, "UdmabufUnavailable", text, [one], [(0, 0, PAGE)] * 1024)


@pytest.mark.parametrize(
    ("flags", "seals", "cause"),
    [
        (os.O_RDONLY, SEALS, r"memfd 1 is not open for reading and writing \(O_RDWR\)"),
        (os.O_WRONLY, SEALS, r"memfd 1 is not open for reading and writing \(O_RDWR\)"),
        (os.O_PATH, SEALS, "memfd 1 is an O_PATH descriptor; open it for reading and writing"),
        (os.O_RDWR, memfd.F_SEAL_SEAL, "memfd 1 lacks the seal F_SEAL_SHRINK"),
        (os.O_RDWR, memfd.F_SEAL_SHRINK, "memfd 1 lacks the seal F_SEAL_SEAL"),
        (os.O_RDWR, memfd.F_SEAL_GROW, "memfd 1 lacks the seal F_SEAL_(SHRINK|SEAL)"),
        (os.O_RDWR, 0, "memfd 1 lacks the seal F_SEAL_(SHRINK|SEAL)"),
        (os.O_RDWR, SEALS | memfd.F_SEAL_WRITE, "memfd 1 has the seal F_SEAL_WRITE, .*"),
        (os.O_RDWR, SEALS | memfd.F_SEAL_FUTURE_WRITE, "memfd 1 has the seal F_SEAL_FUTURE_WRITE, .*"),
    ],
)
async def test_mode_and_seals(alice: Peer, flags: int, seals: int, cause: str) -> None:
    with clients_memfd(SIZE) as good, clients_memfd(SIZE, seals) as fd, reopened(fd, flags) as bad:
        await refused(alice, "BadMemfd", cause, [good, bad], [(0, 0, PAGE), (1, 0, PAGE)])


async def test_a_memfd_that_cannot_be_sealed(alice: Peer) -> None:
    """Made without MFD_ALLOW_SEALING it has F_SEAL_SEAL from birth and can never get F_SEAL_SHRINK."""
    with OwnedFd(os.memfd_create("unsealable", os.MFD_CLOEXEC)) as fd:
        os.pwrite(fd.fileno(), bytes(PAGE), 0)
        await refused(alice, "BadMemfd", "memfd 0 lacks the seal F_SEAL_SHRINK", [fd], [(0, 0, PAGE)])


async def test_what_is_no_memfd(alice: Peer) -> None:
    for make in FOREIGN.values():
        with clients_memfd(SIZE) as good, make() as fd:
            await refused(alice, "BadMemfd", "memfd 1 is no memfd", [good, fd], [(0, 0, PAGE), (1, 0, PAGE)])


async def test_a_buffer_of_ours_cannot_be_wrapped_again(alice: Peer) -> None:
    """kind=memfd has the seals; but what is wrapped is not asked whose it is, and all its pages may be holes."""
    path, fd, _ = await alice.allocate(size=SIZE, kind="memfd")
    await refused(alice, "UdmabufUnavailable", ".*", [fd], [(0, 0, SIZE)])
    assert os.fstat(fd.fileno()).st_blocks == 0, "nothing was populated by the service"
    await alice.call("Release", path=path)
    fd.close()


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        ((0, 1, PAGE), "range 1: offset 1 and size 4096 must be multiples of 4096.*"),
        ((0, 0, PAGE - 1), "range 1: offset 0 and size 4095 must be multiples of 4096.*"),
        ((0, 512, 512), "range 1: offset 512 and size 512 must be multiples of 4096.*"),
        ((0, PAGE, 0), "range 1 is empty"),
        ((0, 0, SIZE + PAGE), "range 1: bytes 0 to 36864 of a memfd of 32768"),
        ((0, SIZE, PAGE), "range 1: bytes 32768 to 36864 of a memfd of 32768"),
        ((0, 2**64 - PAGE, 2 * PAGE), "range 1: bytes 18446744073709547520 to 18446744073709555712 of a memfd of .*"),
        ((0, 2**64 - PAGE, PAGE), "range 1: bytes .* of a memfd of 32768"),
        ((0, 0, 2**64 - PAGE), "range 1: bytes .* of a memfd of 32768"),
    ],
)
async def test_ranges(alice: Peer, part: tuple[int, int, int], cause: str) -> None:
    with clients_memfd(SIZE) as fd:
        await refused(alice, "BadMemfd", cause, [fd], [(0, 0, PAGE), part])


async def test_a_huge_page_is_wrapped_as_a_whole(alice: Peer) -> None:
    """The kernel pins all of it for any part of it, so that a part would be charged far too little."""
    with memfd.create("huge", HUGE, huge_page=HUGE) as fd:
        memfd.add_seals(fd.fileno(), SEALS)
        for offset, size in ((0, PAGE), (PAGE, PAGE), (PAGE, HUGE - PAGE), (0, HUGE // 2)):
            cause = f"range 0: offset {offset} and size {size} must be multiples of {HUGE}.*"
            await refused(alice, "BadMemfd", cause, [fd], [(0, offset, size)])
        await refused(alice, "UdmabufUnavailable", ".*", [fd], [(0, 0, HUGE)])


async def test_lists_that_do_not_fit_each_other(alice: Peer) -> None:
    with clients_memfd(SIZE) as one, clients_memfd(SIZE) as two:
        whole = (0, 0, SIZE)
        await refused(alice, "InvalidSpec", "memfds: memfd 1 is in no range", [one, two], [whole])
        await refused(alice, "InvalidSpec", "memfds: at least one is needed", [], [])
        await refused(alice, "InvalidSpec", f"ranges: must be 1 to {MAX_RANGES}, not 0", [one], [])
        text = "ranges: range 1 is of memfd 1, and there are 1"
        await refused(alice, "InvalidSpec", text, [one], [whole, (1, 0, PAGE)])
        text = "ranges: range 0 is of memfd 4294967295, and there are 1"
        await refused(alice, "InvalidSpec", text, [one], [(2**32 - 1, 0, PAGE)])


async def test_options(alice: Peer) -> None:
    with clients_memfd(PAGE) as fd:
        ranges = [(0, 0, PAGE)]
        for name in ("", "x" * 32, "a\tb"):
            await refused(alice, "InvalidSpec", "name: .*", [fd], ranges, {"name": name})
        for request_id in ("short", "x" * 65, "has a blank in it"):
            await refused(alice, "InvalidSpec", "request_id: .*", [fd], ranges, {"request_id": request_id})
        body = [[0], [[0, 0, PAGE]]]
        for key, variant in (
            ("size", Variant("t", PAGE)),
            ("kind", Variant("s", "dma-buf")),
            ("name", Variant("u", 1)),
            ("", Variant("s", "")),
            ("constraints", Variant("a{ss}", {})),
            ("constraints.sise", Variant("a{sv}", {"sise": Variant("t", 1)})),
            ("constraints.alignment", Variant("a{sv}", {"alignment": Variant("t", 0)})),
            ("devices", Variant("as", [""])),
            ("devices", Variant("s", "mem:null")),
        ):
            with pytest.raises(RemoteError, match=f": {key}: ") as caught:
                await send(alice, "WrapMemfd", SIGNATURE, [*body, {key: variant}], [fd])
            assert caught.value.name == error("InvalidSpec")
    assert set(WRAP_TYPES) == {"name", "request_id", "constraints", "devices"}


async def test_calls_that_do_not_fit_their_descriptors(alice: Peer) -> None:
    with clients_memfd(PAGE) as fd, ExitStack() as stack:
        part = [[0, 0, PAGE]]
        many = [stack.enter_context(fd.dup()) for _ in range(16)]
        for name, interface, signature, body, fds, refusal in (
            ("another signature", ALLOCATOR_INTERFACE, "aha(uut)a{sv}", [[0], part, {}], [fd], "InvalidArgs"),
            ("one memfd", ALLOCATOR_INTERFACE, "ha(utt)a{sv}", [0, part, {}], [fd], "InvalidArgs"),
            ("no interface", "", SIGNATURE, [[0], part, {}], [fd], "AccessDenied"),
        ):
            with pytest.raises(RemoteError) as caught:
                await send(alice, "WrapMemfd", signature, body, fds, interface)
            assert caught.value.name == DBUS + refusal, name
        # 16 are as many as there can be, and each wants a range.
        await refused(alice, "InvalidSpec", "memfds: memfd 1 is in no range", many, [(0, 0, PAGE)])
        await refused(alice, "UdmabufUnavailable", ".*", many, [(index, 0, PAGE) for index in range(16)])


async def test_refusals_do_not_depend_on_the_order_of_memfds(alice: Peer) -> None:
    """The first that is wrong is named, by its index in the call."""
    with clients_memfd(PAGE) as good, clients_memfd(PAGE, memfd.F_SEAL_SHRINK) as bad:
        for index in range(3):
            fds = [good] * 3
            fds[index] = bad
            ranges = [(number, 0, PAGE) for number in range(3)]
            await refused(alice, "BadMemfd", f"memfd {index} lacks the seal F_SEAL_SEAL", fds, ranges)


async def test_a_list_that_is_too_long_is_not_even_read(alice: Peer) -> None:
    with clients_memfd(PAGE) as fd, pytest.raises(RemoteError) as caught:
        await wrap(alice, [fd], [(0, 0, PAGE)] * (MAX_RANGES + 1))
    assert caught.value.name in (error("InvalidSpec"), DBUS + "LimitsExceeded")
