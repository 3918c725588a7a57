# SPDX-License-Identifier: MIT
"""The warning of slow reads: when it comes, that it comes once, what it says, what silences it, what measuring costs.

Ordinary memory stands in for the buffer's; how slow it is, a clock that is stood in for says. That what the service
says of a buffer leads here is in tests/bus/test_client_cache.py.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client import SlowReadWarning, slow_reads
from udmabufd_client import bracket as bracket_module
from udmabufd_client.bracket import READ, SyncBracket
from udmabufd_client.buffer import BufferBase
from udmabufd_client.contract import BUFFER_PATH_PREFIX
from udmabufd_client.info import BufferInfo
from udmabufd_client.service import Service
from udmabufd_client.share import Share
from udmabufd_client.slow_reads import LEAST, MOST, Measured, measure, notice

PATH = BUFFER_PATH_PREFIX + "0123456789abcdef"

SLOW = Measured(buffer=310e6, ordinary=7.13e9)
FIGURE = "Measured on this machine just now: 310 MB/s, 23 times slower than ordinary memory (7130 MB/s)."


class Silent:
    """The members of Service that the local half uses."""

    def give_back_soon(self, share: Share) -> None:
        pass


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has read nothing yet."""
    monkeypatch.setattr(slow_reads, "_told", set())


@pytest.fixture
def brackets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernel sees of brackets."""
    seen: list[tuple[str, int]] = []

    def bracket() -> SyncBracket:
        return SyncBracket(
            lambda fd, flags: seen.append(("start", flags)), lambda fd, flags: seen.append(("end", flags))
        )

    monkeypatch.setattr(bracket_module, "SyncBracket", bracket)
    return seen


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the views that were measured, with the result SLOW."""
    sizes: list[int] = []

    def slow(view: memoryview) -> Measured:
        sizes.append(len(view))
        return SLOW

    monkeypatch.setattr(slow_reads, "measure", slow)
    return sizes


def make(cache: str | None, size: int = LEAST, kind: str = "dma-buf") -> BufferBase:
    share = Share(PATH, BufferInfo(size=size, kind=kind, name="front", serial=1, cache_effective=cache))
    owned = OwnedFd(os.memfd_create("buffer"))
    os.ftruncate(owned.fileno(), size)
    return BufferBase(cast(Service, Silent()), share, owned)


def caught(use: Callable[[], object]) -> list[str]:
    """Return the warnings that `use` gives."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        use()
    assert {warning.category for warning in given} <= {SlowReadWarning}
    return [str(warning.message) for warning in given]


@pytest.mark.usefixtures("brackets")
@pytest.mark.parametrize(("cache", "words"), [("write-combine", "write-combined"), ("uncached", "uncached")])
def test_the_first_read_of_a_process_warns_with_the_figure(measured: list[int], cache: str, words: str) -> None:
    def read() -> None:
        with make(cache) as buffer:
            for _ in range(2):
                with buffer.cpu_access(write=False) as view, buffer.cpu_access():
                    assert view[0] == 0

    (text,) = caught(read)
    assert text.startswith(f"buffer 0123456789abcdef (front) is mapped {words}, which the CPU reads slowly. {FIGURE} ")
    assert text.endswith(" or ask for cached memory.")
    assert measured == [LEAST]
    assert caught(read) == []


@pytest.mark.usefixtures("brackets")
def test_each_attribute_warns_by_itself(measured: list[int]) -> None:
    for cache in ("uncached", "write-combine", "uncached"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowReadWarning)
            with make(cache) as buffer, buffer.cpu_access():
                pass
    assert measured == []
    for cache, expected in (("uncached", 1), ("write-combine", 1), ("uncached", 0)):
        assert len(caught(lambda cache=cache: read_once(cache))) == expected  # type: ignore[misc]


def read_once(cache: str | None, **more: Any) -> None:
    with make(cache, **more) as buffer, buffer.cpu_access(write=False):
        pass


@pytest.mark.usefixtures("brackets")
@pytest.mark.parametrize("cache", ["cached", None, "as yet unthought of"])
def test_other_memory_does_not(measured: list[int], cache: str | None) -> None:
    assert caught(lambda: read_once(cache)) == []
    assert measured == []


@pytest.mark.usefixtures("brackets")
def test_what_does_not_read_does_not(measured: list[int]) -> None:
    def write() -> None:
        with make("uncached") as buffer:
            with buffer.cpu_access(read=False) as view:
                view[0] = 1
            with buffer.map():
                pass

    assert caught(write) == []
    assert measured == []
    assert len(caught(lambda: read_once("uncached"))) == 1


def test_it_is_measured_inside_the_bracket(brackets: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def look(view: memoryview) -> Measured:
        assert brackets == [("start", READ)]
        assert view.readonly
        return SLOW

    monkeypatch.setattr(slow_reads, "measure", look)
    assert len(caught(lambda: read_once("uncached"))) == 1
    assert brackets == [("start", READ), ("end", READ)]


@pytest.mark.usefixtures("brackets", "measured")
def test_the_place_that_is_named_is_the_readers() -> None:
    with pytest.warns(SlowReadWarning) as given, make("uncached") as buffer:
        with buffer.cpu_access():
            pass
    assert given[0].filename == __file__


@pytest.mark.usefixtures("measured")
def test_a_filter_that_makes_it_an_error_leaves_no_bracket_open(brackets: list[tuple[str, int]]) -> None:
    with make("uncached") as buffer, warnings.catch_warnings():
        warnings.simplefilter("error", SlowReadWarning)
        with pytest.raises(SlowReadWarning, match="uncached"):
            buffer.cpu_access().__enter__()
        assert [what for what, _ in brackets] == ["start", "end"]
        with buffer.cpu_access() as view:
            assert view[0] == 0


@pytest.mark.usefixtures("brackets")
@pytest.mark.parametrize("category", [SlowReadWarning, RuntimeWarning, Warning])
def test_where_filters_ignore_it_nothing_is_measured_and_nothing_is_over(
    measured: list[int], category: type[Warning]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        read_once("uncached")
    assert measured == []
    assert len(caught(lambda: read_once("uncached"))) == 1


@pytest.mark.usefixtures("brackets")
@pytest.mark.parametrize("first", [{"message": "other words"}, {"module": "elsewhere"}, {"lineno": 3}])
def test_filters_for_some_places_do_not_decide_for_all(measured: list[int], first: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=SlowReadWarning, **first)
        read_once("uncached")
    assert (measured, len(given)) == ([LEAST], 1)


@pytest.mark.usefixtures("brackets")
def test_a_buffer_that_is_too_small_is_warned_of_without_a_figure(measured: list[int]) -> None:
    (text,) = caught(lambda: read_once("uncached", size=LEAST - mmap.PAGESIZE))
    assert "How slowly was not measured: that takes a buffer of 64 KiB." in text
    assert "MB/s" not in text
    assert measured == []


@pytest.mark.usefixtures("brackets")
def test_on_an_event_loop_nothing_is_measured(measured: list[int]) -> None:
    async def read() -> None:
        read_once("uncached")

    (text,) = caught(lambda: asyncio.run(read()))
    assert "How slowly was not measured, for this is an event loop's thread." in text
    assert "MB/s" not in text
    assert measured == []


@pytest.mark.usefixtures("brackets")
def test_beside_an_event_loop_it_is(measured: list[int]) -> None:
    async def read() -> None:
        await asyncio.to_thread(read_once, "uncached")

    (text,) = caught(lambda: asyncio.run(read()))
    assert FIGURE in text
    assert measured == [LEAST]


@pytest.mark.parametrize("times", [0.5, 1.0, 1.9])
def test_a_result_inside_the_noise_is_no_figure(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    monkeypatch.setattr(slow_reads, "measure", lambda view: Measured(buffer=1e9, ordinary=times * 1e9))
    (text,) = caught(lambda: notice("uncached", memoryview(bytes(LEAST)), "buffer x"))
    assert "Measured on this machine just now, no difference from ordinary memory could be told from noise." in text
    assert "MB/s" not in text


def test_threads_that_begin_at_once_have_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4)
    sizes: list[int] = []

    def late() -> bool:
        # All have looked whether it was told before any tells.
        together.wait(30)
        return False

    def slow(view: memoryview) -> Measured:
        sizes.append(len(view))
        return SLOW

    monkeypatch.setattr(slow_reads, "_ignored", late)
    monkeypatch.setattr(slow_reads, "measure", slow)
    memory = memoryview(bytes(LEAST))

    def read_by_threads() -> None:
        threads = [threading.Thread(target=notice, args=["uncached", memory, "buffer x"]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert len(caught(read_by_threads)) == 1
    assert sizes == [LEAST]


@pytest.mark.usefixtures("measured")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_fork_warns_though_a_thread_of_its_parent_was_about_to() -> None:
    with slow_reads._lock:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # Unless it comes to that it ends by the signal.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(30)
                (text,) = caught(lambda: notice("uncached", memoryview(bytes(LEAST)), "buffer x"))
                status = 0 if FIGURE in text else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class SlowMemory:
    """A view of memory and the clock beside it: each byte read from it takes `seconds`, all else 100 ps."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size = size
        self.seconds = seconds
        self.now = 0.0
        self.read = 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> memoryview | SlowMemory:
        start, stop, _ = part.indices(self.size)
        if stop - start > slow_reads._PIECE:
            assert (start, stop) == (0, min(self.size, MOST))
            return self
        self.read += stop - start
        self.now += (stop - start) * self.seconds
        return memoryview(bytes(stop - start))

    def clock(self) -> float:
        self.now += 1e-10 * slow_reads._PIECE
        return self.now


@pytest.mark.parametrize("size", [LEAST, MOST, 64 * MOST])
@pytest.mark.parametrize("seconds", [1e-9, 1e-8, 2e-7])
def test_slow_memory_is_found_slow_and_costs_some_milliseconds(
    monkeypatch: pytest.MonkeyPatch, size: int, seconds: float
) -> None:
    memory = SlowMemory(size, seconds)
    monkeypatch.setattr(time, "perf_counter", memory.clock)
    measured = measure(cast(memoryview, memory))
    assert measured.buffer == pytest.approx(1 / (seconds + 1e-10), rel=0.05)
    assert measured.ordinary == pytest.approx(1e10, rel=0.05)
    assert measured.conclusive
    # Two passes, each of which ends with the piece that it is at, or with the memory.
    pieces = min(size, MOST) // slow_reads._PIECE
    worst = min(pieces, 1 + 0.001 // (slow_reads._PIECE * seconds))
    assert memory.read <= 2 * worst * slow_reads._PIECE
    assert memory.now < 0.004 + 2 * slow_reads._PIECE * seconds


def test_ordinary_memory_is_not_found_slow_and_is_only_read() -> None:
    """On the real clock, and within a bound that a busy machine keeps too."""
    with mmap.mmap(-1, 2 * MOST) as memory:
        memory[:5] = b"first"
        with memoryview(memory) as view, view.toreadonly() as readonly:
            results = [measure(readonly) for _ in range(5)]
        assert memory[:5] == b"first"
    assert min(result.times for result in results) < 2
    assert all(result.buffer > 0 for result in results)
