# SPDX-License-Identifier: MIT
"""Cache attributes as clients and udmabufctl are told of them, and the warning of slow reads that follows from them.

What mappings really are is shown in tests/kernel; when the warning comes and what it says, in
tests/unit/test_client_slow_reads.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from os import environ
from typing import Any

import pytest

from tests.bus.fake_allocator import FakeAllocator
from tests.bus.private_bus import PrivateBus
from tests.bus.service import RunningService
from tests.bus.test_client_restart import answer_all
from udmabufd_base.codec import Variant
from udmabufd_client import SlowReadWarning, aio, errors, slow_reads, sync
from udmabufd_client import bracket as bracket_module
from udmabufd_client.bracket import SyncBracket
from udmabufd_client.contract import Cache, CacheEvidence

PAGES = 32
"""128 KiB: enough to be measured."""

UNCACHED = {
    "kind": Variant("s", "dma-buf"),
    "cache_requested": Variant("s", "uncached"),
    "cache_effective": Variant("s", "uncached"),
    "cache_evidence": Variant("s", "probe"),
}

Ctl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    """A service whose dma-bufs are uncached, as it says."""

    def prepare(fake: FakeAllocator) -> None:
        answer_all(fake).answers["Allocate"] = lambda incoming: fake.grant(incoming.header, pages=PAGES, told=UNCACHED)

    fake = await FakeAllocator.start(open_bus.address, prepare)
    yield fake
    fake.close()


@pytest.fixture
def in_a_process_that_has_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was told yet; and as these dma-bufs are memfds, the kernel is not asked for brackets."""
    monkeypatch.setattr(slow_reads, "_told", set())
    monkeypatch.setattr(bracket_module, "SyncBracket", lambda: SyncBracket(lambda *_: None, lambda *_: None))


def read(buffer: aio.Buffer | sync.Buffer) -> list[str]:
    """Read twice; return the warnings of that."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", SlowReadWarning)
        for _ in range(2):
            with buffer.cpu_access(write=False) as view:
                assert view[0] == 0
    assert {warning.category for warning in given} <= {SlowReadWarning}
    return [str(warning.message) for warning in given]


@pytest.mark.host
@pytest.mark.usefixtures("in_a_process_that_has_read_nothing")
async def test_reading_what_the_service_says_is_uncached_warns_once(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    def blocking() -> list[str]:
        with sync.Client.connect(open_bus.address, timeout=60) as client, client.allocate(size=1) as buffer:
            return read(buffer)

    async with aio.Client.connect(open_bus.address, timeout=60) as client:
        with await client.allocate(size=1, name="camera") as buffer:
            (text,) = await asyncio.to_thread(read, buffer)
            assert text.startswith("buffer 0123456789abcdef (fake) is mapped uncached, ")
            # It is ordinary memory in fact, and that is found out.
            assert "no difference from ordinary memory could be told" in text
            assert read(buffer) == []
    assert await asyncio.to_thread(blocking) == []


@pytest.mark.host
@pytest.mark.usefixtures("in_a_process_that_has_read_nothing", "fake")
async def test_on_the_event_loop_it_warns_without_measuring(open_bus: PrivateBus) -> None:
    async with aio.Client.connect(open_bus.address, timeout=60) as client:
        with await client.allocate(size=1) as buffer:
            (text,) = read(buffer)
    assert "was not measured, for this is an event loop's thread" in text


@pytest.mark.host
@pytest.mark.usefixtures("in_a_process_that_has_read_nothing", "fake")
async def test_the_blocking_client_measures(open_bus: PrivateBus) -> None:
    def blocking() -> list[str]:
        with sync.Client.connect(open_bus.address, timeout=60) as client, client.allocate(size=1) as buffer:
            return read(buffer)

    (text,) = await asyncio.to_thread(blocking)
    assert "Measured on this machine just now" in text


@pytest.mark.host
@pytest.mark.usefixtures("fake")
async def test_udmabufctl_shows_what_was_obtained_and_how_that_is_known(
    open_bus: PrivateBus, fake: FakeAllocator
) -> None:
    async def alloc() -> str:
        process = await asyncio.create_subprocess_exec(
            *command(open_bus.address, "alloc", "--size", "4K", "--cache", "uncached"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=paths(),
        )
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    shown = await alloc()
    assert "cache_requested  uncached\ncache_effective  uncached\ncache_evidence   probe\n" in shown
    other = UNCACHED | {"cache_effective": Variant("s", "cached"), "cache_evidence": Variant("s", "default")}
    fake.answers["Allocate"] = lambda incoming: fake.grant(incoming.header, told=other)
    shown = await alloc()
    assert "cache_effective  cached (not uncached as requested)\ncache_evidence   default\n" in shown
    # A service that does not say what was asked for.
    del other["cache_requested"]
    assert "cache_effective  cached\n" in await alloc()


# ---- on the daemon --------------------------------------------------------------------------------------------------


@pytest.fixture
def client(service: RunningService) -> Iterator[sync.Client]:
    with sync.Client.connect(service.address, timeout=60) as client:
        yield client


def command(address: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "udmabufd_client.cli", "--bus", address, "--timeout", "60", *words]


def paths() -> dict[str, str]:
    return environ | {"PYTHONPATH": ":".join(sys.path)}


@pytest.fixture
def ctl(service: RunningService) -> Ctl:
    """Run udmabufctl and return what it said."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(service.address, *words), capture_output=True, text=True, timeout=120, check=False, env=paths()
        )

    return run


@pytest.mark.parametrize("cache", Cache)
def test_what_explain_says_of_mappings_is_what_allocate_gives(client: sync.Client, kind: str, cache: Cache) -> None:
    spec: dict[str, Any] = {"size": 1, "kind": kind, "cache": cache}
    verdicts = client.explain(spec)
    for verdict in verdicts:
        assert bool(verdict.cache_effective) == bool(verdict.cache_evidence) == verdict.ok
    serving = next(verdict for verdict in verdicts if verdict.ok)
    with client.allocate(spec) as buffer:
        info = buffer.info
        assert (info.allocator, info.cache_requested) == (serving.allocator, cache)
        assert (info.cache_effective, info.cache_evidence) == (serving.cache_effective, serving.cache_evidence)
    able = [each.allocator for each in verdicts if each.ok and each.cache_effective == cache]
    required = spec | {"cache_policy": "require"}
    assert [each.allocator for each in client.explain(required) if each.ok] == able
    if able:
        with client.allocate(required) as buffer:
            assert buffer.info.cache_effective == cache
    else:
        with pytest.raises(errors.CacheUnavailable, match=cache):
            client.allocate(required)


def test_allocators_say_which_attributes_can_be_had_of_them(client: sync.Client, ctl: Ctl) -> None:
    for allocator in client.allocators():
        if not allocator.available and allocator.cache is None:
            # Nothing is known of a device that is not there, and nothing is claimed.
            assert (allocator.obtainable, allocator.caches or (), allocator.cache_evidence) == ((), (), None)
            continue
        assert allocator.cache in (allocator.caches or ())
        assert set(allocator.obtainable) == set(allocator.caches or ()) <= set(Cache)
        assert allocator.obtainable[0] == allocator.cache
        assert allocator.cache_evidence in set(CacheEvidence)
    shown = {row["allocator"]: row["caches"] for row in json.loads(ctl("allocators", "--json").stdout)}
    assert shown == {allocator.allocator: list(allocator.caches or ()) for allocator in client.allocators()}


def test_udmabufctl_says_where_another_attribute_is_obtained(ctl: Ctl, client: sync.Client) -> None:
    words = ["--kind", "memfd", "--size", "4K", "--cache", "write-combine"]
    explained = ctl("explain", *words)
    assert explained.returncode == 0, explained.stderr
    assert "with memory that is mapped cached, not write-combine" in explained.stdout
    assert explained.stdout.splitlines()[2].split() == [
        *("ALLOCATOR", "VERDICT", "CACHE", "EVIDENCE"),
        *("BECAUSE", "OF", "DEMANDED", "BY"),
    ]
    assert "cache_effective  cached (not write-combine as requested)\n" in ctl("alloc", *words).stdout
    with client.allocate(size=1, kind="memfd", cache="write-combine") as buffer:
        shown = dict(line.split(maxsplit=1) for line in ctl("info", buffer.id).stdout.splitlines())
        assert (shown["cache_requested"], shown["cache_effective"], shown["cache_evidence"]) == (
            "write-combine",
            "cached (not write-combine as requested)",
            "default",
        )
        told = json.loads(ctl("info", buffer.id, "--json").stdout)
        assert (told["cache_effective"], told["cache_evidence"]) == ("cached", buffer.info.cache_evidence)
    plain = ctl("explain", "--kind", "memfd", "--size", "4K").stdout
    assert "CACHE" not in plain
