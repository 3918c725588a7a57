# SPDX-License-Identifier: MIT
"""Whatever is put into a spec, the answer is a buffer or an error that names the key; nothing is left behind."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.bus.peer import Peer, error
from tests.bus.service import IN_GUEST, RunningService
from tests.unit.demands import constraints
from udmabufd.bus.values import wrap
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import close_all
from udmabufd_client.contract import CONSTRAINT_TYPES, ERROR_PREFIX, REQUEST_GRACE, SPEC_TYPES

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
NAMES = [
    "mem:null",
    "mem:none",
    "/dev/null",
    "/dev/none",
    "/sys/devices/virtual/mem/zero",
    "/etc/passwd",
    "drm:card0",
    ":",
]
"""Names of devices, of some that are there and of some that are none."""
WORDS = "XR24 NV12 dma-buf memfd cached uncached write-combine prefer require udmabuf heap:system wrapped"
VARIANTS = st.one_of(
    st.builds(Variant, st.just("t"), st.integers(0, (1 << 64) - 1) | st.integers(0, 1 << 20)),
    st.builds(Variant, st.just("u"), st.integers(0, (1 << 32) - 1) | st.integers(0, 1 << 12)),
    st.builds(Variant, st.just("i"), st.integers(-(1 << 31), (1 << 31) - 1)),
    st.builds(Variant, st.just("b"), st.booleans()),
    st.builds(Variant, st.just("d"), st.floats(allow_nan=False)),
    st.builds(Variant, st.just("as"), st.lists(TEXT | st.sampled_from(NAMES), max_size=3)),
    st.builds(Variant, st.just("s"), TEXT),
    st.builds(Variant, st.just("s"), st.sampled_from(WORDS.split())),
)


CONSTRAINTS = st.one_of(
    constraints().map(lambda found: wrap(found.values(), CONSTRAINT_TYPES)),
    st.dictionaries(st.sampled_from(sorted(CONSTRAINT_TYPES)) | TEXT, VARIANTS, max_size=4),
).map(lambda values: Variant("a{sv}", values))


def of_type(signature: str) -> st.SearchStrategy[Variant]:
    """Return variants of one D-Bus type."""
    if signature == "a{sv}":
        return CONSTRAINTS
    return VARIANTS.filter(lambda variant: bool(variant.signature == signature))


TYPED = {key: of_type(signature) for key, signature in SPEC_TYPES.items()}
SPECS = st.one_of(
    st.dictionaries(st.sampled_from(sorted(SPEC_TYPES)) | TEXT, VARIANTS | CONSTRAINTS, max_size=6),
    st.fixed_dictionaries({}, optional=TYPED),
    st.fixed_dictionaries(
        {"size": st.builds(Variant, st.just("t"), st.integers(1, 1 << 20))},
        optional={
            key: TYPED[key] for key in ("name", "kind", "cache", "cache_policy", "allocator", "devices", "constraints")
        },
    ),
)

ELSEWHERE = re.compile(r"(^| )/(?!dev/udmabuf|sys/module/udmabuf|dev/ |sys/[a-z]+/(,|$))|Traceback")
"""Places that are no business of the caller's: all but the node, its parameters, and the folders of devices."""

ALLOWED = {
    "InvalidSpec",
    "IncompatibleConstraints",
    "NoAllocator",
    "NoSuchDevice",
    "KernelLimit",
    "QuotaExceeded",
    "CacheUnavailable",
    "UdmabufUnavailable",
}


@contextmanager
def loop_of_its_own() -> Iterator[asyncio.Runner]:
    """One event loop for all examples of a synchronous property."""
    with asyncio.Runner() as runner:
        yield runner


def test_any_spec_is_served_or_refused_by_name(service: RunningService, long_run: bool) -> None:
    with loop_of_its_own() as runner:
        peer = runner.run(Peer.connect(service.address))
        baseline = len(service.fds())

        async def ask(member: str, signature: str, *body: Any) -> None:
            try:
                answer = await peer.call(member, signature, *body)
            except RemoteError as refusal:
                name, told = refusal.name.removeprefix(ERROR_PREFIX), refusal.message
                assert name in ALLOWED, refusal
                if name == "InvalidSpec":
                    # The key may be any text of ours.
                    key, _, reason = refusal.message.partition(": ")
                    told = reason
                    assert reason
                    assert key.partition(".")[0] in SPEC_TYPES or key == "count" or "is not a known key" in reason
                if name == "NoSuchDevice":
                    # It begins with the caller's own words.
                    told = refusal.message.rpartition(": ")[2]
                assert not ELSEWHERE.search(told), refusal
                return
            if member == "Explain":
                return
            paths = answer[0] if isinstance(answer[0], list) else [answer[0]]
            for path in paths:
                await peer.call("Release", path=path)
            # What is handed out keeps the memory, and its charge.
            fds = answer[1] if len(answer) > 1 else []
            close_all(fds if isinstance(fds, list) else [fds])

        @settings(
            max_examples=1000 if long_run else 60 if IN_GUEST else 200,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(SPECS, st.sampled_from(["Allocate", "CreateBuffer", "AllocateMany", "Explain"]), st.integers(0, 3))
        @example({"size": Variant("t", 1), "devices": Variant("as", ["/0"])}, "Allocate", 0)
        def check(values: dict[str, Variant], member: str, count: int) -> None:
            if member == "AllocateMany":
                runner.run(ask(member, "a{sv}u", values, count))
            else:
                runner.run(ask(member, "a{sv}", values))

        try:
            check()
            # What had a request_id outlives its holder by some seconds.
            deadline = time.monotonic() + 2 * REQUEST_GRACE
            # The charge ends when the kernel has freed the memory, a moment after the listing does.
            while runner.run(peer.get("Buffers")) + runner.run(peer.get("Bytes")) and time.monotonic() < deadline:
                runner.run(asyncio.sleep(0.1))
            assert runner.run(peer.get("Buffers")) == 0
            assert runner.run(peer.get("Bytes")) == 0
            assert len(service.fds()) <= baseline
        finally:
            peer.close()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"sise": Variant("t", 1)}, "sise"),
        ({"size": Variant("u", 1)}, "size"),
        ({"size": Variant("t", 1), "devices": Variant("as", [""])}, "devices"),
        ({"size": Variant("t", 1), "devices": Variant("s", "mem:null")}, "devices"),
        ({"size": Variant("t", 1), "devices": Variant("as", ["mem:null"] * 65)}, "devices"),
        ({"size": Variant("t", 1), "constraints": Variant("a{st}", {})}, "constraints"),
        ({"size": Variant("t", 1), "constraints": Variant("a{sv}", {"sise": Variant("t", 1)})}, "constraints.sise"),
        (
            {"size": Variant("t", 1), "constraints": Variant("a{sv}", {"cache": Variant("as", [])})},
            "constraints.cache",
        ),
        ({"size": Variant("t", 1), "kind": Variant("s", "memfd"), "request_id": Variant("s", "x" * 15)}, "request_id"),
        ({"size": Variant("t", 1), "kind": Variant("s", "memfd"), "request_id": Variant("s", "x" * 65)}, "request_id"),
        ({"size": Variant("t", 1), "kind": Variant("s", "memfd"), "request_id": Variant("s", " " * 16)}, "request_id"),
        ({"size": Variant("t", 1), "a\nb\x1b[31m" + "c" * 99: Variant("t", 1)}, "a\\nb\\x1b[31m"),
    ],
)
async def test_the_key_is_named(peer: Peer, values: dict[str, Variant], key: str) -> None:
    with pytest.raises(RemoteError) as caught:
        await peer.call("Allocate", "a{sv}", values)
    assert caught.value.name == error("InvalidSpec")
    assert caught.value.message.startswith(key)
    assert len(caught.value.message) < 250


async def test_more_than_a_user_may_have_is_refused_with_figures(peer: Peer) -> None:
    limit = await peer.get("MaxBytesPerUser")
    with pytest.raises(RemoteError, match=f"max_bytes_per_user of {limit}; 0 are in use") as caught:
        await peer.allocate(size=limit + 1, kind="memfd")
    assert caught.value.name == error("QuotaExceeded")
    path, _, _ = await peer.allocate(size=limit, kind="memfd")
    with pytest.raises(RemoteError, match=f"{limit} are in use"):
        await peer.allocate(size=1, kind="memfd")
    await peer.call("Release", path=path)
    await peer.allocate(size=limit, kind="memfd")
