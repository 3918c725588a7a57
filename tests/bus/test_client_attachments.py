# SPDX-License-Identifier: MIT
"""Attachments in the client: what is sent, whom it believes, how they end, and how they come through restarts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import ID, PAGE, PATH, FakeAllocator, attachments, info, page, send_detached
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_reconnect import MortalBus, Start, Told, bus, start
from tests.bus.test_client_restart import answer_all, calls
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import RemoteError
from udmabufd_client import AttachmentInfo, errors, new_request_id, sync
from udmabufd_client.aio import Attachment, Client
from udmabufd_client.contract import buffer_path

pytestmark = pytest.mark.host

__all__ = ["bus", "start"]

CAMERA, CARD = "/dev/video0", "drm:card0"
OTHER = buffer_path("fedcba9876543210")
GONE = "the device was removed"


def demanding(fake: FakeAllocator) -> FakeAllocator:
    """Have the service number attachments from 1, and answer the alignment of the latest."""
    numbers = iter(range(1, 1000))

    def attach(incoming: Incoming) -> None:
        fake.attached(incoming.header, next(numbers), alignment=Variant("t", 64))

    answer_all(fake).answers["Attach"] = attach
    return fake


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    fake = await FakeAllocator.start(open_bus.address, demanding)
    yield fake
    fake.close()


class Ends:
    """What on_detached tells."""

    def __init__(self) -> None:
        self.told: list[Attachment] = []

    def __call__(self, attachment: Attachment) -> None:
        self.told.append(attachment)


@pytest.fixture
async def ends() -> Ends:
    return Ends()


@pytest.fixture
async def client(open_bus: PrivateBus, fake: FakeAllocator, ends: Ends) -> AsyncIterator[Client]:
    async with Client.connect(open_bus.address, timeout=20, on_detached=ends) as client:
        yield client


def bodies(fake: FakeAllocator, member: str) -> list[list[Any]]:
    return [body for header, body in fake.calls if header.member == member]


async def seen(client: Client) -> None:
    """Return when the client has read all that was sent to it before: the bus keeps the order."""
    await client.list_buffers()


# What is sent, and what comes of it


async def test_a_device_is_attached_and_detached(fake: FakeAllocator, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        assert (buffer.constraints, buffer.attachments, buffer.own_attachments) == ({}, (), ())
        camera = await buffer.attach(CAMERA)
        card = await buffer.attach(CARD, {"contiguous": True, "cache": ["cached"]}, dynamic=True)
        (plain, plain_options), (name, options) = bodies(fake, "Attach")
        assert (plain, plain_options, name) == (CAMERA, {}, CARD)
        assert options["dynamic"].value is True
        assert {key: (value.signature, value.value) for key, value in options["constraints"].value.items()} == {
            "contiguous": ("b", True),
            "cache": ("as", ["cached"]),
        }
        assert [(each.number, each.device, each.dynamic) for each in (camera, card)] == [
            (1, CAMERA, False),
            (2, CARD, True),
        ]
        assert (camera.constraints, buffer.constraints, camera.buffer_id) == ({"alignment": 64}, {"alignment": 64}, ID)
        # Whether others changed something, too, it does not know.
        assert (list(buffer.own_attachments), buffer.attachments) == ([camera, card], None)
        rows = attachments((1, CAMERA, True), (2, CARD, True), (3, "theirs", False))
        fake.answers["GetAll"] = lambda incoming: fake.reply(incoming.header, "a{sv}", {"Attachments": rows})
        await seen(client)
        await buffer.refresh()
        assert [(row.number, row.device, row.own) for row in buffer.attachments or ()] == [
            (1, CAMERA, True),
            (2, CARD, True),
            (3, "theirs", False),
        ]
        await camera.detach()
        assert buffer.attachments is None
        await camera.detach()
        assert bodies(fake, "Detach") == [[1]]
        assert (camera.ended, camera.reason) == (True, "it was detached")
        assert list(buffer.own_attachments) == [card]
        assert "drm:card0" in repr(card)
    assert card.ended
    assert "closed or released" in card.reason


async def test_the_end_of_a_with_block_detaches(fake: FakeAllocator, client: Client) -> None:
    async with await client.allocate(size=PAGE) as buffer:
        async with await buffer.attach(CAMERA) as camera:
            assert calls(fake, "Detach") == 0
        assert camera.ended
        assert bodies(fake, "Detach") == [[1]]
        async with await buffer.attach(CAMERA) as camera:
            await buffer.release()
        # With the last share it has ended by itself.
        assert camera.ended
        assert calls(fake, "Detach") == 1


@pytest.mark.parametrize(
    ("device", "constraints", "why"),
    [
        (5, None, "^device: "),
        (CAMERA, {"alignment": "big"}, r"^constraints\.alignment: "),
        (CAMERA, {"colour": 1}, r"^constraints\.colour: no such key"),
        (CAMERA, ["contiguous"], "^constraints: "),
    ],
)
async def test_what_is_no_constraint_is_never_sent(
    fake: FakeAllocator, client: Client, device: Any, constraints: Any, why: str
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        with pytest.raises(errors.InvalidSpec, match=why):
            await buffer.attach(device, constraints)
    for verb in (client.allocate, client.create, client.explain):
        with pytest.raises(errors.InvalidSpec, match=r"^constraints\.max_segments: "):
            await verb(size=PAGE, constraints={"max_segments": -1})
    with page() as memfd, pytest.raises(errors.InvalidSpec, match=r"^devices\[0\]: "):
        await client.wrap([memfd], devices=[5])  # type: ignore[list-item]
    assert [calls(fake, member) for member in ("Attach", "CreateBuffer", "Explain", "WrapMemfd")] == [0] * 4


@pytest.mark.parametrize("name", ["IncompatibleConstraints", "NoSuchDevice", "Busy", "NoAllocator"])
async def test_a_refused_device_changes_nothing(fake: FakeAllocator, client: Client, name: str) -> None:
    fake.answers["Attach"] = lambda incoming: fake.fail(
        incoming.header, f"org.udmabufd.Error.{name}", "no, as it says"
    )
    with await client.allocate(size=PAGE) as buffer:
        with pytest.raises(getattr(errors, name), match="as it says"):
            await buffer.attach(CAMERA)
        assert (buffer.own_attachments, buffer.constraints) == ((), {})


async def test_a_descriptor_is_got_for_an_attachment(fake: FakeAllocator, client: Client, ends: Ends) -> None:
    with await client.create(size=PAGE) as buffer:
        camera, card = await buffer.attach(CAMERA), await buffer.attach(CARD)
        await buffer.get_fd(attachment=card)
        (options,) = bodies(fake, "GetFd")[0]
        assert {key: (value.signature, value.value) for key, value in options.items()} == {"attachment": ("u", 2)}
        number = buffer.fileno()
        assert await buffer.get_fd() == number
        assert calls(fake, "GetFd") == 1
        # Its own descriptor stays; whether the attachment is one is the service's to say.
        assert await buffer.get_fd(attachment=camera) == number
        assert await buffer.get_fd(attachment=7) == number
        assert [body[0]["attachment"].value for body in bodies(fake, "GetFd")] == [2, 1, 7]
        fake.detached(client.unique_name, 1, GONE)
        await seen(client)
        with pytest.raises(errors.InvalidSpec, match=f"^attachment: .*{CAMERA}.*{GONE}"):
            await buffer.get_fd(attachment=camera)
        fake.answers["CreateBuffer"] = lambda incoming: fake.reply(incoming.header, "o", OTHER)
        with await client.create(size=PAGE) as other:
            with pytest.raises(errors.InvalidSpec, match="^attachment: .*another buffer"):
                await other.get_fd(attachment=card)
        with pytest.raises(errors.InvalidSpec, match="^attachment: "):
            await buffer.get_fd(attachment="1")  # type: ignore[arg-type]
        assert calls(fake, "GetFd") == 3


async def test_devices_of_a_spec_are_attachments(fake: FakeAllocator, client: Client) -> None:
    rows = attachments((1, CAMERA, True), (2, CARD, True))
    fake.answers["GetAll"] = lambda incoming: fake.reply(
        incoming.header,
        "a{sv}",
        {"Attachments": rows, "Constraints": Variant("a{sv}", {"contiguous": Variant("b", True)})},
    )
    verbs: list[Callable[[], Awaitable[Any]]] = [
        lambda: client.allocate(size=PAGE, devices=[CAMERA, CARD]),
        lambda: client.create(size=PAGE, devices=[CAMERA, CARD]),
        lambda: wrap(client, devices=[CAMERA, CARD]),
        lambda: first_of_many(client, devices=[CAMERA, CARD]),
    ]
    for verb in verbs:
        with await verb() as buffer:
            assert [(each.number, each.device) for each in buffer.own_attachments] == [(1, CAMERA), (2, CARD)]
            assert buffer.constraints == {"contiguous": True}
            assert buffer.own_attachments[1].constraints == {"contiguous": True}
            assert buffer.attachments == (
                AttachmentInfo(attachment=1, device=CAMERA, own=True),
                AttachmentInfo(attachment=2, device=CARD, own=True),
            )
            await buffer.own_attachments[0].detach()
            assert [each.device for each in buffer.own_attachments] == [CARD]
    sent = bodies(fake, "Allocate")[0][0]["devices"]
    assert (sent.signature, sent.value) == ("as", [CAMERA, CARD])


async def wrap(client: Client, **keys: Any) -> Any:
    with page() as memfd:
        return await client.wrap([memfd], **keys)


async def first_of_many(client: Client, **keys: Any) -> Any:
    fake_one, other = await client.allocate_many(2, size=PAGE, **keys)
    assert [each.number for each in other.own_attachments] == [1, 2]
    other.close()
    return fake_one


async def test_a_buffer_that_is_had_by_its_request_has_the_connections_own_attachments(
    fake: FakeAllocator, client: Client
) -> None:
    rows = attachments((1, CAMERA, False), (4, CAMERA, True), (5, "another program's", True))
    fake.answers["GetAll"] = lambda incoming: fake.reply(incoming.header, "a{sv}", {"Attachments": rows})
    with await client.allocate(size=PAGE, devices=[CAMERA], request_id=new_request_id()) as buffer:
        assert [(each.number, each.device) for each in buffer.own_attachments] == [(4, CAMERA)]


async def test_a_buffer_is_not_lost_for_want_of_its_properties(fake: FakeAllocator, client: Client) -> None:
    fake.answers["GetAll"] = lambda incoming: fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "later")
    with await client.allocate(size=PAGE, devices=[CAMERA]) as buffer:
        assert (buffer.constraints, buffer.attachments) == (None, None)
        assert [each.number for each in buffer.own_attachments] == [1]


async def test_one_of_two_shares_takes_its_own_attachments_along(fake: FakeAllocator, client: Client) -> None:
    one, two = await client.allocate(size=PAGE), await client.allocate(size=PAGE)
    assert one.path == two.path
    first, second = await one.attach(CAMERA), await two.attach(CARD)
    one.close()
    await seen(client)
    assert (bodies(fake, "Detach"), first.ended, second.ended) == ([[1]], True, False)
    two.close()
    await seen(client)
    # With the last share the service ends the rest by itself.
    assert (calls(fake, "Detach"), calls(fake, "Release"), second.ended) == (1, 2, True)


async def test_what_is_attached_is_unknown_from_the_reply_on(fake: FakeAllocator, client: Client) -> None:
    """However late the signal comes: a program finds the same whatever it does in between."""
    fake.answers["Attach"] = lambda incoming: fake.reply(incoming.header, "ua{sv}", 1, {})
    with await client.allocate(size=PAGE) as buffer, await client.allocate(size=PAGE) as same:
        camera = await buffer.attach(CAMERA)
        assert (buffer.attachments, same.attachments) == (None, None)
        fake.answers["GetAll"] = lambda incoming: fake.reply(
            incoming.header, "a{sv}", {"Attachments": attachments((1, CAMERA, True))}
        )
        await buffer.refresh()
        assert buffer.attachments == (AttachmentInfo(attachment=1, device=CAMERA, own=True),)
        await camera.detach()
        assert buffer.attachments is None


async def test_changes_of_others_are_seen(fake: FakeAllocator, client: Client) -> None:
    fake.answers["GetAll"] = lambda incoming: fake.reply(
        incoming.header, "a{sv}", {"Attachments": attachments((3, "theirs", False))}
    )
    with await client.allocate(size=PAGE) as buffer, await client.allocate(size=PAGE) as same:
        fake.changed(client.unique_name, {"Name": Variant("s", "new")}, invalidated=["Size"])
        fake.changed(client.unique_name, {}, OTHER, invalidated=["Attachments"])
        await seen(client)
        assert (buffer.name, buffer.attachments) == ("new", ())
        fake.changed(
            client.unique_name,
            {"Constraints": Variant("a{sv}", {"address_bits": Variant("u", 32)})},
            invalidated=["Attachments"],
        )
        await seen(client)
        assert buffer.constraints == {"address_bits": 32}
        assert (buffer.attachments, same.attachments, buffer.own_attachments) == (None, None, ())
        # Nobody is asked for what nobody looks at.
        assert calls(fake, "GetAll") == 0
        await buffer.refresh()
        assert buffer.attachments == (AttachmentInfo(attachment=3, device="theirs"),)
        assert (same.attachments, buffer.own_attachments, calls(fake, "GetAll")) == (None, (), 1)


async def test_attachments_that_change_while_they_are_read_are_read_again(fake: FakeAllocator, client: Client) -> None:
    restless = 2

    def tell(incoming: Incoming) -> None:
        row = (calls(fake, "GetAll"), "theirs", False)
        if calls(fake, "GetAll") <= restless:
            fake.changed(incoming.header.sender, {}, invalidated=["Attachments"])
        fake.reply(incoming.header, "a{sv}", {"Attachments": attachments(row)})

    fake.answers["GetAll"] = tell
    with await client.allocate(size=PAGE) as buffer:
        await buffer.refresh()
        assert [row.number for row in buffer.attachments or ()] == [3]
        restless = 1000
        await buffer.refresh()
        # Which answer is older than a change cannot be told, and others must not be kept busy without end.
        assert (buffer.attachments, calls(fake, "GetAll")) == (None, 7)
        restless = 0
        await buffer.refresh()
        assert [row.number for row in buffer.attachments or ()] == [8]


async def test_a_request_that_is_answered_amid_changes_has_the_connections_own_attachments(
    fake: FakeAllocator, client: Client
) -> None:
    rows = attachments((1, CAMERA, False), (4, CAMERA, True))

    def tell(incoming: Incoming) -> None:
        fake.changed(incoming.header.sender, {}, invalidated=["Attachments"])
        fake.reply(incoming.header, "a{sv}", {"Attachments": rows})

    fake.answers["GetAll"] = tell
    for verb in (client.allocate, client.create):
        with await verb(size=PAGE, devices=[CAMERA], request_id=new_request_id()) as buffer:
            assert [each.number for each in buffer.own_attachments] == [4]
            assert buffer.attachments is None


# Detached


async def test_a_device_that_is_gone_is_told(fake: FakeAllocator, client: Client, ends: Ends) -> None:
    with await client.allocate(size=PAGE) as buffer:
        camera, card = await buffer.attach(CAMERA), await buffer.attach(CARD)
        fake.detached(client.unique_name, 1, GONE)
        fake.detached(client.unique_name, 1, "said twice")
        fake.detached(client.unique_name, 9, "never was")
        fake.detached(client.unique_name, 2, "of another buffer", OTHER)
        await seen(client)
        assert (camera.ended, camera.reason, card.ended) == (True, GONE, False)
        assert ends.told == [camera]
        assert buffer.attachments is None
        await camera.detach()
        await card.detach()
        assert bodies(fake, "Detach") == [[2]]
    assert ends.told == [camera], "what the program ends itself is not told"


async def test_a_device_that_goes_while_it_is_detached_is_no_news(
    fake: FakeAllocator, client: Client, ends: Ends
) -> None:
    def too_late(incoming: Incoming) -> None:
        fake.detached(incoming.header.sender, 1, GONE)
        fake.fail(incoming.header, "org.udmabufd.Error.InvalidSpec", "attachment: there is no such one")

    fake.answers["Detach"] = too_late
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA)
        await camera.detach()
        assert (camera.ended, camera.reason, ends.told) == (True, GONE, [])


async def test_a_detach_that_is_refused_leaves_the_attachment(fake: FakeAllocator, client: Client) -> None:
    fake.answers["Detach"] = lambda incoming: fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "later")
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA)
        with pytest.raises(errors.RateLimited):
            await camera.detach()
        assert (camera.ended, list(buffer.own_attachments)) == (False, [camera])
        fake.answers["Detach"] = lambda incoming: fake.reply(incoming.header)
        await camera.detach()
        assert bodies(fake, "Detach") == [[1], [1]]


async def test_nobody_but_the_service_says_that_a_device_is_gone(
    fake: FakeAllocator, client: Client, ends: Ends, connect: Callable[..., Awaitable[Connection]]
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA)
        stranger = await connect()
        send_detached(stranger, client.unique_name, 1, "forged")
        # The bus keeps the order of what reaches the client: after this answer the signal has been seen.
        with pytest.raises(RemoteError):
            await stranger.call(client.unique_name, "/", "com.example.Any", "Ping")
        assert not camera.ended
        fake.detached(client.unique_name, 1, GONE)
        await seen(client)
        assert ends.told == [camera]


async def test_an_end_right_behind_the_answer_is_not_missed(fake: FakeAllocator, client: Client, ends: Ends) -> None:
    def attach(incoming: Incoming) -> None:
        fake.attached(incoming.header, 3)
        fake.detached(incoming.header.sender, 3, GONE)
        fake.detached(incoming.header.sender, 4, "never was")

    def allocate(incoming: Incoming) -> None:
        fake.grant(incoming.header)
        fake.detached(incoming.header.sender, 2, GONE)

    fake.answers |= {"Attach": attach, "Allocate": allocate}
    fake.answers["GetAll"] = lambda incoming: fake.reply(
        incoming.header, "a{sv}", {"Attachments": attachments((1, CAMERA, True))}
    )
    with await client.allocate(size=PAGE, devices=[CAMERA, CARD]) as buffer:
        # Whichever of the two the loop looked at first: the signal is read by the time of this answer.
        await seen(client)
        assert [each.device for each in buffer.own_attachments] == [CAMERA]
        assert [each.device for each in ends.told] == [CARD]
        camera = await buffer.attach(CAMERA)
        await seen(client)
        assert (camera.ended, camera.reason) == (True, GONE)
        # What was kept for one call is not taken for a later one's.
        fake.answers["Attach"] = lambda incoming: fake.attached(incoming.header, 4)
        assert not (await buffer.attach(CAMERA)).ended


async def test_a_callback_that_fails_is_logged_and_harms_nothing(
    open_bus: PrivateBus, fake: FakeAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(attachment: Attachment) -> None:
        raise LookupError("in the callback")

    async with Client.connect(open_bus.address, timeout=20, on_detached=fail) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA)
            fake.detached(client.unique_name, 1, GONE)
            await seen(client)
            assert camera.ended
    assert "on_detached failed" in caplog.text


# Late answers


async def test_an_attachment_that_comes_late_is_taken_back(fake: FakeAllocator, client: Client) -> None:
    fake.answers["Attach"] = lambda incoming: None
    with await client.allocate(size=PAGE) as buffer:
        with pytest.raises(errors.CallTimedOut, match="given back"):
            await buffer.attach(CAMERA, timeout=0.05)
        (late,) = await fake.called("Attach")
        fake.attached(late, 8)
        await fake.called("Detach")
        assert bodies(fake, "Detach") == [[8]]
        assert buffer.own_attachments == ()
        waiting = asyncio.ensure_future(buffer.attach(CAMERA))
        (_, cancelled) = await fake.called("Attach", 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        fake.attached(cancelled, 9)
        await fake.called("Detach", 2)
        assert bodies(fake, "Detach") == [[8], [9]]


async def test_an_answer_that_is_not_the_interfaces_is_refused_and_taken_back(
    fake: FakeAllocator, client: Client
) -> None:
    fake.answers["Attach"] = lambda incoming: fake.attached(incoming.header, 3, alignment=Variant("u", 64))
    with await client.allocate(size=PAGE) as buffer:
        with pytest.raises(errors.BadReply, match="alignment"):
            await buffer.attach(CAMERA)
        await fake.called("Detach")
        assert (bodies(fake, "Detach"), buffer.own_attachments) == ([[3]], ())


async def test_a_buffer_that_is_closed_over_an_attach_keeps_none(fake: FakeAllocator, client: Client) -> None:
    held: list[Incoming] = []
    fake.answers["Attach"] = held.append
    other = await client.allocate(size=PAGE)
    buffer = await client.allocate(size=PAGE)
    waiting = asyncio.ensure_future(buffer.attach(CAMERA))
    await fake.called("Attach")
    buffer.close()
    fake.attached(held[0].header, 6)
    assert (await waiting).ended
    await fake.called("Detach")
    assert bodies(fake, "Detach") == [[6]]
    other.close()


# Restarts


async def test_an_attach_that_a_service_left_unanswered_is_made_again_and_once(
    open_bus: PrivateBus, fake: FakeAllocator, client: Client
) -> None:
    taken = asyncio.Event()
    with await client.allocate(size=PAGE) as buffer:
        card = await buffer.attach(CARD)
        fake.answers["Attach"] = lambda incoming: taken.set()
        waiting = asyncio.ensure_future(buffer.attach(CAMERA))
        await taken.wait()
        fake.close()

        def successor(again: FakeAllocator) -> None:
            answer_all(again).answers["Attach"] = lambda incoming: again.attached(incoming.header, 3)
            # The former one had attached it before it ended, as number 2.
            rows = attachments((1, CARD, True), (2, CAMERA, True), (7, CAMERA, False))
            again.answers["GetAll"] = lambda incoming: again.reply(incoming.header, "a{sv}", {"Attachments": rows})

        again = await FakeAllocator.start(open_bus.address, successor)
        camera = await waiting
        assert (camera.number, camera.ended, card.ended) == (3, False, False)
        assert bodies(again, "Detach") == [[2]]
        assert calls(again, "Attach") == 1
        again.close()


async def test_what_a_restarted_service_does_not_have_any_more_has_ended(
    open_bus: PrivateBus, fake: FakeAllocator
) -> None:
    told, ends = Told(), Ends()
    async with Client.connect(open_bus.address, timeout=20, on_reconnect=told, on_detached=ends) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera, card = await buffer.attach(CAMERA), await buffer.attach(CARD)
            fake.close()

            def successor(again: FakeAllocator) -> None:
                rows = attachments((2, CARD, True), (1, "theirs", False))
                answer_all(again).answers["GetAll"] = lambda incoming: again.reply(
                    incoming.header, "a{sv}", {"Attachments": rows}
                )

            again = await FakeAllocator.start(open_bus.address, successor)
            await told.wait()
            assert (camera.ended, card.ended, card.number) == (True, False, 2)
            assert "does not have it any more" in camera.reason
            assert ends.told == [camera]
            assert calls(again, "Attach") == 0
            again.close()


async def test_what_a_recovered_service_has_is_not_attached_again(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    """One that could not read its former state at first: the client takes its buffers for lost, and asks for them."""
    told = Told()
    async with Client.connect(open_bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera, card = await buffer.attach(CAMERA), await buffer.attach(CARD)
            fake.close()

            def successor(again: FakeAllocator) -> None:
                def tell(incoming: Incoming) -> None:
                    if not calls(again, "Import"):
                        again.fail(incoming.header, "org.udmabufd.Error.NoSuchBuffer", "nothing is known")
                        return
                    # Others change theirs meanwhile.
                    again.changed(incoming.header.sender, {}, invalidated=["Attachments"])
                    rows = attachments((1, CAMERA, True), (2, CARD, True), (7, "theirs", False))
                    again.reply(incoming.header, "a{sv}", {"Attachments": rows})

                answer_all(again).answers |= {
                    "GetAll": tell,
                    "Import": lambda incoming: again.fail(
                        incoming.header, "org.udmabufd.Error.UdmabufUnavailable", "it waits for an administrator"
                    ),
                }

            again = await FakeAllocator.start(open_bus.address, successor)
            await told.wait()
            assert (buffer.lost, calls(again, "Import"), calls(again, "Attach")) == (False, 1, 0)
            assert [(each.number, each.ended) for each in (camera, card)] == [(1, False), (2, False)]
            again.close()


async def test_attachments_are_made_anew_on_another_bus(bus: MortalBus, start: Start) -> None:
    await start(demanding)
    told, ends = Told(), Ends()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told, on_detached=ends) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA, {"contiguous": True})
            card = await buffer.attach(CARD, dynamic=True)
            left = await buffer.attach("mem:null")
            await left.detach()
            bus.kill()
            await client.wait_lost()
            waiting = asyncio.ensure_future(buffer.get_fd(attachment=card))
            bus.again()

            def successor(again: FakeAllocator) -> None:
                def attach(incoming: Incoming) -> None:
                    device = incoming.body()[0]
                    if device == CAMERA:
                        again.fail(incoming.header, "org.udmabufd.Error.NoSuchDevice", "it was unplugged")
                    else:
                        again.attached(incoming.header, 9)

                demanding(again).answers["Attach"] = attach
                rows = attachments((9, "theirs", False))
                again.answers["GetAll"] = lambda incoming: again.reply(incoming.header, "a{sv}", {"Attachments": rows})

            again = await start(successor)
            await told.wait()
            await waiting
            assert (card.number, card.ended, camera.ended) == (9, False, True)
            assert list(buffer.own_attachments) == [card]
            assert camera.reason == "it could not be attached again: it was unplugged"
            assert ends.told == [camera]
            (one, options), (two, _) = bodies(again, "Attach")
            assert (one, two) == (CAMERA, CARD)
            assert options["constraints"].value["contiguous"].value is True
            # No call about the buffer before its attachments are there.
            assert [body[0]["attachment"].value for body in bodies(again, "GetFd")] == [9]
            await card.detach()
            assert bodies(again, "Detach") == [[9]]


async def test_refusals_that_pass_are_waited_out_by_attachments_too(bus: MortalBus, start: Start) -> None:
    await start(demanding)
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA)
            bus.kill()
            bus.again()
            refusals = ["RateLimited", "QuotaExceeded"]

            def busy(again: FakeAllocator) -> None:
                def refuse(incoming: Incoming) -> None:
                    if refusals:
                        again.fail(incoming.header, f"org.udmabufd.Error.{refusals.pop()}", "not now")
                    else:
                        again.attached(incoming.header, 5)

                answer_all(again).answers["Attach"] = refuse

            await start(busy)
            await told.wait()
            assert (camera.ended, camera.number, refusals) == (False, 5, [])


async def test_a_detach_over_the_loss_of_the_bus_has_its_effect(bus: MortalBus, start: Start) -> None:
    first = await start(demanding)
    told, ends = Told(), Ends()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told, on_detached=ends) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA)
            taken = asyncio.Event()
            first.answers["Detach"] = lambda incoming: taken.set()
            waiting = asyncio.ensure_future(camera.detach())
            await taken.wait()
            bus.kill()
            bus.again()
            again = await start(demanding)
            await told.wait()
            await waiting
            assert (camera.ended, calls(again, "Attach"), calls(again, "Detach")) == (True, 0, 0)
            assert ends.told == []


async def test_a_lost_buffer_ends_its_attachments(bus: MortalBus, start: Start) -> None:
    await start(demanding)
    told, ends = Told(), Ends()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told, on_detached=ends) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA)
            bus.kill()
            bus.again()

            def forgetful(again: FakeAllocator) -> None:
                demanding(again).answers["Import"] = lambda incoming: again.fail(
                    incoming.header, "org.udmabufd.Error.NoSuchBuffer", "the grace is over"
                )

            again = await start(forgetful)
            await told.wait()
            assert (buffer.lost, camera.ended, calls(again, "Attach")) == (True, True, 0)
            assert "lost" in camera.reason
            with pytest.raises(errors.NoSuchBuffer, match="lost in a restart"):
                await buffer.attach(CAMERA)


async def test_a_buffer_that_is_closed_while_it_is_attached_again_is_given_back(bus: MortalBus, start: Start) -> None:
    await start(demanding)
    async with Client.connect(bus.address, timeout=20) as client:
        buffer = await client.allocate(size=PAGE)
        await buffer.attach(CAMERA)
        bus.kill()
        bus.again()
        held: list[Incoming] = []

        def holding(again: FakeAllocator) -> None:
            demanding(again).answers["Attach"] = held.append

        again = await start(holding)
        await again.called("Attach")
        buffer.close()
        again.attached(held[0].header, 1)
        assert (await again.called("Release"))[0].path == PATH


# The blocking client


async def test_the_blocking_client_attaches_too(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    loop = asyncio.get_running_loop()
    told = threading.Event()
    ended: list[sync.Attachment] = []

    def on_detached(attachment: sync.Attachment) -> None:
        ended.append(attachment)
        told.set()

    def work() -> None:
        with sync.Client.connect(open_bus.address, timeout=20, on_detached=on_detached) as client:
            with client.create(size=PAGE) as buffer, buffer.attach(CAMERA, {"alignment": 64}) as camera:
                buffer.get_fd(attachment=camera)
                card = buffer.attach(CARD)
                assert buffer.own_attachments == (camera, card)
                loop.call_soon_threadsafe(fake.detached, client.unique_name, 2, GONE)
                assert told.wait(20)
                assert (card.ended, card.reason, ended) == (True, GONE, [card])
                card.detach()
            assert camera.ended
            with pytest.raises(errors.InvalidSpec, match=r"constraints\.cache"):
                client.explain(size=PAGE, constraints={"cache": "cached"})
            assert (client.explain(size=PAGE), client.devices(), client.allocators()) == ([], [], [])

    await asyncio.to_thread(work)
    assert bodies(fake, "Detach") == [[1]]


# What only tells


async def test_verdicts_devices_and_allocators_are_typed(fake: FakeAllocator, client: Client) -> None:
    verdict = {"allocator": Variant("s", "udmabuf"), "ok": Variant("b", False), "field": Variant("s", "max_segments")}
    device = {"device": Variant("s", CAMERA), "constraints": Variant("a{sv}", {"contiguous": Variant("b", True)})}
    allocator = {"allocator": Variant("s", "memfd"), "available": Variant("b", True), "granule": Variant("t", PAGE)}
    rows = {"Explain": verdict, "ListDevices": device, "ListAllocators": allocator}

    def answer(incoming: Incoming) -> None:
        fake.reply(incoming.header, "aa{sv}", [rows[incoming.header.member]] * 2)

    fake.answers |= dict.fromkeys(rows, answer)
    (refusal, _) = await client.explain({"size": PAGE}, devices=[CAMERA], constraints={"max_segments": 8})
    assert (refusal.allocator, refusal.ok, refusal.field, refusal.remedy) == ("udmabuf", False, "max_segments", "")
    (sent,) = bodies(fake, "Explain")[0]
    assert {key: value.signature for key, value in sent.items()} == {
        "size": "t",
        "devices": "as",
        "constraints": "a{sv}",
    }
    (camera, _), (memfd, _) = await client.devices(), await client.allocators()
    assert (camera.device, camera.constraints, camera.driver) == (CAMERA, {"contiguous": True}, None)
    assert (memfd.allocator, memfd.available, memfd.granule, memfd.free) == ("memfd", True, PAGE, None)
    fake.answers["Explain"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", [{"ok": Variant("b", True)}])
    with pytest.raises(errors.BadReply, match="no allocator"):
        await client.explain(size=PAGE)
    fake.answers["ListDevices"] = lambda incoming: fake.reply(incoming.header, "a{sv}", info())
    with pytest.raises(errors.BadReply, match="signature"):
        await client.devices()
