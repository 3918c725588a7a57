# SPDX-License-Identifier: MIT
"""bus.polkit against an authority of our own on a private bus, and against the real one in the guest."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.bus.peer import error
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from udmabufd.bus import polkit
from udmabufd.bus.polkit import ACTION, AUTHORITY, AUTHORITY_INTERFACE, AUTHORITY_PATH, Authority
from udmabufd.core.events import Event
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import RemoteError
from udmabufd_base.message import ALLOW_INTERACTIVE_AUTHORIZATION, Header, Message, MessageType
from udmabufd_client.contract import ADMIN_INTERFACE, BUS_NAME, OBJECT_PATH

POLICY = Path(__file__).resolve().parents[2] / "systemd/polkit/org.udmabufd.policy"

YES = [[True, False, {"polkit.retains_authorization_after_challenge": "1"}]]
NO = [[False, True, {}]]


class FakeAuthority:
    """Owns polkit's name; keeps what it was asked and answers when told to."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.asked: asyncio.Queue[tuple[Header, list[Any]]] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def start(self, address: str) -> None:
        self.connection = await Connection.open(address, receive_fds=False, handler=self._take)
        await self.connection.request_name(AUTHORITY)

    def _take(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.type != MessageType.METHOD_CALL:
            return
        assert (header.path, header.interface) == (AUTHORITY_PATH, AUTHORITY_INTERFACE)
        if header.member == "CheckAuthorization":
            assert header.signature == "(sa{sv})sa{ss}us"
            self.asked.put_nowait((header, incoming.body()))
        else:
            assert (header.member, header.signature) == ("CancelCheckAuthorization", "s")
            self.cancelled.put_nowait(incoming.body()[0])

    def answer(self, question: Header, body: list[Any], signature: str = "(bba{ss})") -> None:
        assert self.connection is not None
        self.connection.send(
            Message(
                MessageType.METHOD_RETURN,
                reply_serial=question.serial,
                destination=question.sender,
                signature=signature,
                body=body,
            )
        )

    def refuse(self, question: Header, name: str) -> None:
        assert self.connection is not None
        self.connection.send(
            Message(
                MessageType.ERROR,
                error_name=name,
                reply_serial=question.serial,
                destination=question.sender,
                signature="s",
                body=["because"],
            )
        )


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with PrivateBus(policies=[], extra_policy=OPEN_POLICY) as running:
        yield running


@pytest.fixture
async def connection(bus: PrivateBus) -> AsyncIterator[Connection]:
    made = await Connection.open(bus.address, receive_fds=False)
    yield made
    made.close()


@pytest.fixture
async def fake(bus: PrivateBus) -> AsyncIterator[FakeAuthority]:
    made = FakeAuthority()
    await made.start(bus.address)
    yield made
    assert made.connection is not None
    made.connection.close()


async def test_what_is_asked(fake: FakeAuthority, connection: Connection) -> None:
    authority = Authority(connection)
    for interactive, flags in ((False, 0), (True, 1)):
        task = asyncio.create_task(authority.allowed(":1.42", interactive))
        question, (subject, action, details, asked_flags, cancellation_id) = await fake.asked.get()
        assert subject[0] == "system-bus-name"
        assert {key: (value.signature, value.value) for key, value in subject[1].items()} == {"name": ("s", ":1.42")}
        assert (action, details, asked_flags) == (ACTION, {}, flags)
        assert bool(cancellation_id) is interactive
        fake.answer(question, YES)
        assert await task is True


@pytest.mark.parametrize(
    ("body", "signature"),
    [
        (NO, "(bba{ss})"),
        ([[False, False, {}]], "(bba{ss})"),
        ([True], "b"),
        ([[1, True]], "(ub)"),
        ([], ""),
    ],
)
async def test_only_a_yes_is_one(fake: FakeAuthority, connection: Connection, body: list[Any], signature: str) -> None:
    task = asyncio.create_task(Authority(connection).allowed(":1.42", False))
    question, _ = await fake.asked.get()
    fake.answer(question, body, signature)
    assert await task is False


@pytest.mark.parametrize(
    "name",
    [
        "org.freedesktop.PolicyKit1.Error.Failed",
        "org.freedesktop.PolicyKit1.Error.NotAuthorized",
        "org.freedesktop.DBus.Error.AccessDenied",
    ],
)
async def test_an_error_is_no_and_told_of(
    fake: FakeAuthority, connection: Connection, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = asyncio.create_task(Authority(connection).allowed(":1.42", False))
    question, _ = await fake.asked.get()
    fake.refuse(question, name)
    assert await task is False
    assert name in caplog.text


async def test_without_polkit_nobody_may(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    assert await Authority(connection).allowed(":1.42", True) is False
    assert caplog.text == ""


async def test_an_authority_that_ends_says_no(fake: FakeAuthority, connection: Connection) -> None:
    task = asyncio.create_task(Authority(connection).allowed(":1.42", True))
    await fake.asked.get()
    assert fake.connection is not None
    fake.connection.close()
    assert await task is False


async def test_a_lost_bus_says_no(fake: FakeAuthority, connection: Connection) -> None:
    task = asyncio.create_task(Authority(connection).allowed(":1.42", True))
    await fake.asked.get()
    connection.close()
    assert await task is False


async def test_one_dialogue_does_not_hold_up_others(fake: FakeAuthority, connection: Connection) -> None:
    authority = Authority(connection)
    slow = asyncio.create_task(authority.allowed(":1.1", True))
    first, _ = await fake.asked.get()
    quick = asyncio.create_task(authority.allowed(":1.2", True))
    second, (_, _, _, flags, _) = await fake.asked.get()
    assert flags == 1
    fake.answer(second, YES)
    assert await quick is True
    assert not slow.done()
    fake.answer(first, NO)
    assert await slow is False


async def test_a_connection_has_one_dialogue_and_all_together_few(
    fake: FakeAuthority, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit, "MAX_DIALOGUES", 2)
    authority = Authority(connection)
    tasks = []
    seen = []
    for sender in (":1.1", ":1.1", ":1.2", ":1.3"):
        tasks.append(asyncio.create_task(authority.allowed(sender, True)))
        question, (_, _, _, flags, _) = await fake.asked.get()
        seen.append((question, flags))
    assert [flags for _, flags in seen] == [1, 0, 1, 0]
    for question, _ in seen:
        fake.answer(question, NO)
    assert await asyncio.gather(*tasks) == [False] * 4
    again = asyncio.create_task(authority.allowed(":1.3", True))
    question, (_, _, _, flags, _) = await fake.asked.get()
    assert flags == 1
    fake.answer(question, YES)
    assert await again is True


async def test_a_dialogue_that_takes_too_long_is_closed(
    fake: FakeAuthority, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit, "INTERACTIVE_TIMEOUT", 0.1)
    task = asyncio.create_task(Authority(connection).allowed(":1.42", True))
    _, body = await fake.asked.get()
    assert await task is False
    assert await fake.cancelled.get() == body[4]


async def test_a_dialogue_that_nobody_waits_for_is_closed(fake: FakeAuthority, connection: Connection) -> None:
    authority = Authority(connection)
    task = asyncio.create_task(authority.allowed(":1.42", True))
    _, body = await fake.asked.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await fake.cancelled.get() == body[4]
    # And the next one of that connection may have a dialogue again.
    task = asyncio.create_task(authority.allowed(":1.42", True))
    question, body = await fake.asked.get()
    assert body[3] == 1
    fake.answer(question, YES)
    assert await task is True


async def test_a_caller_that_has_gone_needs_no_dialogue(
    fake: FakeAuthority, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(connection)
    task = asyncio.create_task(authority.allowed(":1.42", True))
    question, body = await fake.asked.get()
    authority.ended(":1.41")
    authority.ended(":1.42")
    assert await fake.cancelled.get() == body[4]
    assert fake.cancelled.empty()
    fake.refuse(question, polkit.CANCELLED)
    assert await task is False
    assert caplog.text == ""


def test_the_action_is_an_administrators_and_the_services_user_may_ask_about_it() -> None:
    (action,) = ElementTree.parse(POLICY).getroot().iter("action")
    assert action.get("id") == ACTION
    defaults = action.find("defaults")
    assert defaults is not None
    assert {element.tag: element.text for element in defaults} == {
        "allow_any": "auth_admin",
        "allow_inactive": "auth_admin",
        "allow_active": "auth_admin_keep",
    }
    unit = (POLICY.parents[1] / "udmabufd.service.in").read_text()
    (user,) = re.findall(r"^User=(.*)$", unit, flags=re.MULTILINE)
    assert [(element.get("key"), element.text) for element in action.iter("annotate")] == [
        ("org.freedesktop.policykit.owner", f"unix-user:{user}")
    ]


# ---- the real one ---------------------------------------------------------------------------------------------------

INSTALLED = Path("/usr/share/polkit-1/actions") / POLICY.name
RULES = Path("/etc/polkit-1/rules.d/49-udmabufd-test.rules")
SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
ALICE_MAY = f"""\
polkit.addRule(function(action, subject) {{
    if (action.id == "{ACTION}" && subject.user == "alice")
        return polkit.Result.YES;
}});
"""


@pytest.fixture
def real_polkit() -> Iterator[None]:
    """polkitd with our action, and a rule of the administrator by which alice may."""
    ours = not INSTALLED.exists()
    if ours:
        INSTALLED.write_bytes(POLICY.read_bytes())
    RULES.write_text(ALICE_MAY)
    RULES.chmod(0o644)
    subprocess.run(["systemctl", "restart", "polkit.service"], check=True)
    yield
    RULES.unlink()
    if ours:
        INSTALLED.unlink()
    subprocess.run(["systemctl", "restart", "polkit.service"], check=True)


async def open_as(name: str, opened: list[Connection]) -> Connection:
    """Connect to the system bus as that user."""
    from pwd import getpwnam

    user = getpwnam(name)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        opened.append(await Connection.open(SYSTEM_BUS, receive_fds=False))
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    return opened[-1]


@pytest.fixture
def opened() -> Iterator[list[Connection]]:
    made: list[Connection] = []
    yield made
    for one in made:
        one.close()


@pytest.mark.guest
@pytest.mark.root
@pytest.mark.usefixtures("real_polkit")
async def test_real_polkit_tells_the_services_user(opened: list[Connection], caplog: pytest.LogCaptureFixture) -> None:
    """The service is not root: polkit answers it about others because the action names its user as the owner."""
    service = Authority(await open_as("udmabufd", opened))
    alice, mallory = await open_as("alice", opened), await open_as("mallory", opened)
    root = await open_as("root", opened)
    assert await service.allowed(alice.unique_name, False) is True
    assert await service.allowed(root.unique_name, False) is True
    # No agent is there to ask mallory for a password.
    assert await service.allowed(mallory.unique_name, False) is False
    assert await service.allowed(mallory.unique_name, True) is False
    assert caplog.text == ""
    # Another user, who is no owner, is told nothing about alice.
    assert await Authority(mallory).allowed(alice.unique_name, False) is False
    assert "NotAuthorized" in caplog.text or "Only trusted callers" in caplog.text
    # A connection that has gone.
    alice.close()
    assert await service.allowed(alice.unique_name, False) is False


@pytest.mark.guest
@pytest.mark.root
@pytest.mark.usefixtures("real_polkit")
async def test_the_service_lets_in_whom_polkit_allows(opened: list[Connection]) -> None:
    for name in ("root", "alice"):
        connection = await open_as(name, opened)
        reply = await connection.call(BUS_NAME, OBJECT_PATH, ADMIN_INTERFACE, "GetUsage", timeout=60)
        assert reply.signature == "aa{sv}"
    mallory = await open_as("mallory", opened)
    for flags in (0, ALLOW_INTERACTIVE_AUTHORIZATION):
        with pytest.raises(RemoteError) as caught:
            await mallory.call(BUS_NAME, OBJECT_PATH, ADMIN_INTERFACE, "GetUsage", flags=flags, timeout=60)
        assert caught.value.name == error("AccessDenied")
    # One a minute: that of an earlier run may be the one that is there.
    found = ["journalctl", "--quiet", f"MESSAGE_ID={Event.ACCESS_DENIED.message_id}", "UDMABUFD_UID=1002", "-o", "cat"]
    subprocess.run(["journalctl", "--sync"], check=True)
    entries = subprocess.run(found, check=True, capture_output=True, text=True).stdout
    assert "Refused GetUsage of user 1002" in entries
