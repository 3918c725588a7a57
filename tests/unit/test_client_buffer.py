# SPDX-License-Identifier: MIT
"""Buffer's local half: who owns the descriptor, what close() does and when it warns, brackets by kind, arrays.

The service is stood in for by a recorder; the memory is real.
"""

from __future__ import annotations

import fcntl
import gc
import inspect
import mmap
import os
import resource
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from types import FrameType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client import aio_buffer as aio
from udmabufd_client import bracket as bracket_module
from udmabufd_client import sync_buffer as sync
from udmabufd_client.attachment import Attached
from udmabufd_client.bracket import SyncBracket
from udmabufd_client.buffer import BufferBase
from udmabufd_client.contract import BUFFER_PATH_PREFIX, State
from udmabufd_client.info import BufferInfo
from udmabufd_client.integrations import linux_dmabuf_planes, plane_array
from udmabufd_client.memory import Memory
from udmabufd_client.notice import UNREAD_MAX, MoveKind, Notice
from udmabufd_client.service import Service
from udmabufd_client.share import Share

SIZE = 4 * mmap.PAGESIZE
PATH = BUFFER_PATH_PREFIX + "0123456789abcdef"


class Recorder:
    """The members of Service that the local half uses."""

    def __init__(self) -> None:
        self.given_back: list[Share] = []
        self.descriptors = self
        self.bring_back: Callable[[Share], None] = lambda share: None
        self.without_fd: list[Share] = []

    def want_ticket_soon(self, share: Share) -> None:
        self.without_fd.append(share)

    def give_back_soon(self, share: Share) -> None:
        self.given_back.append(share)


@pytest.fixture
def service() -> Recorder:
    return Recorder()


def make(service: Recorder, *, fd: bool = True, **info: Any) -> BufferBase:
    known: dict[str, Any] = {"size": SIZE, "kind": "memfd", "name": "front", "serial": 1}
    share = Share(PATH, BufferInfo(**(known | info)))
    owned = None
    if fd:
        owned = OwnedFd(os.memfd_create("buffer"))
        os.ftruncate(owned.fileno(), SIZE)
    return BufferBase(cast(Service, service), share, owned)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_it_says_what_it_is(service: Recorder) -> None:
    with make(service, width=4, height=4, format="XR24", offsets=(0,), strides=(256,)) as buffer:
        assert (buffer.path, buffer.id, buffer.name, buffer.size) == (PATH, "0123456789abcdef", "front", SIZE)
        assert buffer.state == State.BACKED
        assert [(plane.offset, plane.stride, plane.size) for plane in buffer.planes] == [(0, 256, SIZE)]
        assert "0123456789abcdef (front), memfd" in repr(buffer)
    assert "closed" in repr(buffer)
    assert buffer.info.kind == "memfd"


@pytest.mark.parametrize(
    ("info", "state"),
    [
        ({"serial": None, "kind": "dma-buf"}, State.EMPTY),
        ({"kind": "dma-buf", "inode": 7}, State.BACKED),
        ({"kind": "dma-buf"}, State.EVICTED),
        ({"kind": "memfd"}, State.BACKED),
    ],
)
def test_the_state_that_comes_with_a_share(service: Recorder, info: dict[str, Any], state: State) -> None:
    """As by ticket, which brings one in any of them: nothing but `info` tells, until there is a change."""
    with make(service, fd=False, **info) as buffer:
        assert buffer.state == state


def test_close_closes_once_and_gives_the_share_back_once(service: Recorder) -> None:
    buffer = make(service)
    fd = buffer.fileno()
    buffer.close()
    assert not is_open(fd)
    reused = os.open("/dev/null", os.O_RDONLY)
    assert reused == fd
    buffer.close()
    assert is_open(reused)
    os.close(reused)
    assert len(service.given_back) == 1
    for use in (buffer.fileno, buffer.dup, buffer.steal_fd, buffer.map):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_duplicate_is_the_callers_and_not_inherited(service: Recorder) -> None:
    with make(service) as buffer:
        duplicate = buffer.dup()
        assert not os.get_inheritable(duplicate)
        assert os.path.sameopenfile(duplicate, buffer.fileno())
    assert is_open(duplicate)
    os.close(duplicate)


def test_a_stolen_descriptor_survives_close(service: Recorder) -> None:
    with make(service) as buffer:
        stolen = buffer.steal_fd()
        assert not buffer.has_fd
        with pytest.raises(ValueError, match="get_fd"):
            buffer.fileno()
    assert is_open(stolen)
    os.close(stolen)
    assert len(service.given_back) == 1


def test_an_empty_buffer_says_how_to_get_memory(service: Recorder) -> None:
    with make(service, fd=False, size=None, serial=None, kind=None) as buffer:
        assert buffer.state == State.EMPTY
        with pytest.raises(ValueError, match="get_fd"):
            buffer.fileno()
        with pytest.raises(ValueError, match="get_fd"):
            buffer.map()


def test_a_buffer_that_is_dropped_unclosed_warns_and_leaks_nothing(service: Recorder) -> None:
    buffers = [make(service)]
    fd = buffers[0].fileno()
    with pytest.warns(ResourceWarning, match=r"unclosed buffer 0123456789abcdef \(front\)"):
        buffers.clear()
    assert not is_open(fd)
    assert len(service.given_back) == 1


def test_closing_under_a_map_warns_and_leaves_the_memory(service: Recorder) -> None:
    buffer = make(service)
    with buffer.map() as view:
        with pytest.warns(ResourceWarning, match=r"0123456789abcdef \(front\) was closed while it is mapped \(1 maps"):
            buffer.close()
        view[SIZE - 1] = 1
        assert view[SIZE - 1] == 1


def test_closing_under_an_array_warns_and_leaves_the_memory(service: Recorder) -> None:
    buffer = make(service)
    array = np.asarray(buffer)
    with pytest.warns(ResourceWarning, match=r"was closed while it is mapped \(0 maps"):
        buffer.close()
    array[-1] = 1


def by_map(buffer: BufferBase) -> bytes:
    with buffer.map() as view:
        return bytes(view[:1])


def by_cpu_access(buffer: BufferBase) -> bytes:
    with buffer.cpu_access() as view:
        return bytes(view[:1])


def by_array(buffer: BufferBase) -> bytes:
    return np.asarray(buffer)[:1].tobytes()


def by_buffer_protocol(buffer: BufferBase) -> bytes:
    with buffer.__buffer__(0) as view:
        return bytes(view[:1])


def by_duplicate(buffer: BufferBase) -> bytes:
    with OwnedFd(buffer.dup()) as fd:
        return os.pread(fd.fileno(), 1, 0)


@pytest.mark.parametrize("first_byte", [by_map, by_cpu_access, by_array, by_buffer_protocol])
def test_a_close_while_it_is_being_mapped_maps_no_other_file(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, first_byte: Callable[[BufferBase], bytes]
) -> None:
    buffer = make(service)
    os.pwrite(buffer.fileno(), b"mine", 0)
    theirs: list[OwnedFd] = []
    real = mmap.mmap

    def late(*arguments: Any) -> mmap.mmap:
        number = buffer.fileno()
        closing = threading.Thread(target=buffer.close)
        closing.start()
        closing.join()
        theirs.append(OwnedFd(os.memfd_create("theirs")))
        assert theirs[0].fileno() == number
        os.ftruncate(number, SIZE)
        return real(*arguments)

    monkeypatch.setattr(mmap, "mmap", late)
    assert first_byte(buffer) == b"m"
    theirs[0].close()


@pytest.mark.parametrize("first_byte", [by_duplicate, by_map, by_cpu_access, by_array, by_buffer_protocol])
def test_the_descriptor_cannot_be_closed_while_it_is_duplicated(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, first_byte: Callable[[BufferBase], bytes]
) -> None:
    recorded_brackets(monkeypatch)
    real = fcntl.fcntl
    locked: list[bool] = []
    made: list[int] = []

    def watched(fd: int, command: int, argument: int = 0) -> int:
        assert command == fcntl.F_DUPFD_CLOEXEC
        locked.append(held_elsewhere(buffer))
        made.append(real(fd, command, argument))
        return made[-1]

    with make(service, kind="dma-buf") as buffer:
        monkeypatch.setattr(fcntl, "fcntl", watched)
        assert first_byte(buffer) == b"\0"
        # The bracket has a descriptor of its own.
        assert locked == [True] * (2 if first_byte is by_cpu_access else 1)
    assert not any(map(is_open, made))


@pytest.mark.parametrize("first_byte", [by_map, by_cpu_access, by_array, by_buffer_protocol])
def test_an_eviction_just_before_it_is_mapped_maps_what_comes_back(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, first_byte: Callable[[BufferBase], bytes]
) -> None:
    recorded_brackets(monkeypatch)
    buffer = make(service, kind="dma-buf")
    passing = buffer._memory.gate.passing
    evicted: list[str] = []

    def late(label: str) -> AbstractContextManager[None]:
        if not evicted:
            evicted.append(label)
            buffer._memory.send_away()
        return passing(label)

    def bring_back(share: Share) -> None:
        fd = OwnedFd(os.memfd_create("again"))
        os.ftruncate(fd.fileno(), SIZE)
        os.pwrite(fd.fileno(), b"back", 0)
        share.memory.take(fd, BufferInfo(size=SIZE, kind="dma-buf", serial=2))

    monkeypatch.setattr(buffer._memory.gate, "passing", late)
    service.bring_back = bring_back
    assert first_byte(buffer) == b"b"
    assert (evicted, buffer._memory.serial) == (["buffer 0123456789abcdef (front)"], 2)
    buffer.close()


def held_elsewhere(buffer: BufferBase) -> bool:
    """Whether a thread beside this one would have to wait for the descriptor."""
    taken: list[bool] = []

    def take() -> None:
        taken.append(buffer._memory.lock.acquire(blocking=False))
        if taken[0]:
            buffer._memory.lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not taken[0]


def test_closing_after_the_last_map_does_not_warn(service: Recorder, recwarn: pytest.WarningsRecorder) -> None:
    with make(service) as buffer, buffer.map() as view:
        view[0] = 1
    gc.collect()
    assert not list(recwarn)


def test_numpy_takes_a_buffer_without_a_copy(service: Recorder) -> None:
    with make(service) as buffer:
        array = np.asarray(buffer)
        assert (array.shape, array.dtype.str, array.flags.writeable) == ((SIZE,), "|u1", True)
        array[10] = 77
        assert os.pread(buffer.fileno(), 1, 10) == b"M"
        with buffer.map() as view:
            assert view[10] == 77
            words = np.frombuffer(view, dtype="<u2")
            assert words[5] == 77
            del words
        del array


def test_memoryview_takes_a_buffer_where_python_lets_it(service: Recorder) -> None:
    with make(service) as buffer:
        # PEP 688 is in Python 3.12 and later.
        if not hasattr(inspect, "BufferFlags"):
            with pytest.raises(TypeError, match="bytes-like"):
                memoryview(cast(Any, buffer))
            return
        with memoryview(cast(Any, buffer)) as view:
            view[3] = 5
        assert os.pread(buffer.fileno(), 1, 3) == b"\5"


def test_the_buffer_protocol_hands_out_the_shared_mapping(service: Recorder) -> None:
    with make(service) as buffer:
        with buffer.__buffer__(0) as view, buffer.map() as other:
            view[3] = 5
            assert other[3] == 5
        del view


def recorded_brackets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def bracket() -> SyncBracket:
        return SyncBracket(
            lambda fd, flags: seen.append(f"start {flags}"), lambda fd, flags: seen.append(f"end {flags}")
        )

    monkeypatch.setattr(bracket_module, "SyncBracket", bracket)
    return seen


@pytest.mark.parametrize(("read", "write", "flags"), [(True, False, 1), (False, True, 3), (True, True, 3)])
def test_access_to_a_dma_buf_is_bracketed(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, read: bool, write: bool, flags: int
) -> None:
    seen = recorded_brackets(monkeypatch)
    with make(service, kind="dma-buf") as buffer:
        with buffer.cpu_access(read=read, write=write) as view:
            assert seen == [f"start {flags}"]
            assert view.readonly is not write
            with buffer.cpu_access(read=read, write=write):
                assert seen == [f"start {flags}"]
        assert seen == [f"start {flags}", f"end {flags}"]


def test_the_bracket_ends_when_the_access_fails(service: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_brackets(monkeypatch)
    with make(service, kind="dma-buf") as buffer:
        with pytest.raises(ZeroDivisionError), buffer.cpu_access():
            raise ZeroDivisionError
        assert seen == ["start 3", "end 3"]


def test_the_bracket_ends_though_the_buffer_was_closed_in_it(
    service: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded_brackets(monkeypatch)
    buffer = make(service, kind="dma-buf")
    with buffer.cpu_access() as view:
        with pytest.warns(ResourceWarning, match="closed while it is mapped"):
            buffer.close()
        view[0] = 1
    assert seen == ["start 3", "end 3"]


def test_two_buffers_of_one_memory_share_the_bracket(service: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_brackets(monkeypatch)
    with make(service, kind="dma-buf") as buffer, make(service, fd=False, kind="dma-buf") as other:
        other._memory.take(OwnedFd(buffer.dup()), other.info)
        with buffer.cpu_access(read=False) as view:
            view[0] = 7
            with other.cpu_access(write=False) as theirs:
                assert theirs[0] == 7
            view[1] = 8
        assert seen == ["start 3", "end 3"]


@pytest.fixture
def no_more_descriptors() -> Iterator[Callable[[], None]]:
    """Let this process open no descriptor from the call of this on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhaust() -> None:
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))

    yield exhaust
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_nested_access_needs_no_descriptor(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, no_more_descriptors: Callable[[], None]
) -> None:
    seen = recorded_brackets(monkeypatch)
    with make(service, kind="dma-buf") as buffer:
        with buffer.cpu_access(write=False):
            no_more_descriptors()
            with pytest.raises(OSError, match="Too many open files"):
                buffer.dup()
            with buffer.cpu_access() as view:
                view[0] = 1
        assert seen == ["start 1", "end 1", "start 3", "end 3"]


class Signal:
    """Comes once, at a point counted from 0: where a function of the brackets begins, or what one called returns.

    These are the points at which the interpreter runs the handlers of signals. What they raise in __del__ it ignores.
    """

    def __init__(self, point: int) -> None:
        self.point = point
        self.came = ""

    def watch(self, frame: FrameType, event: str, argument: object) -> None:
        if self.came or event not in {"call", "c_return", "c_exception"}:
            return
        code = frame.f_code
        if code.co_name == "cpu_access" or (code.co_filename == bracket_module.__file__ and code.co_name != "__del__"):
            self.point -= 1
            if self.point < 0:
                self.came = f"{event} {code.co_qualname}"
                raise KeyboardInterrupt


@pytest.mark.parametrize("nested", [False, True])
def test_an_access_that_is_interrupted_anywhere_ends(
    service: Recorder, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    seen = recorded_brackets(monkeypatch)
    came: set[str] = set()
    with make(service, kind="dma-buf") as buffer:
        for point in count():
            seen.clear()
            signal = Signal(point)
            written = False
            with buffer.cpu_access() if nested else nullcontext():
                try:
                    sys.setprofile(signal.watch)
                    with buffer.cpu_access() as view:
                        view[0] = 1
                        written = True
                except KeyboardInterrupt:
                    sys.setprofile(None)
                    # Already while the traceback still has everything, but where nothing was done about the end yet.
                    if signal.came != "call Access.end":
                        depths = [bracket.depth for bracket in bracket_module._brackets.values()]
                        assert depths in ([[1]] if nested else [[0], []]), signal.came
                        assert seen[-1:] != ["start 3"] or nested or not written, signal.came
                finally:
                    sys.setprofile(None)
                gc.collect()
                if nested:
                    assert seen == ["start 3"], signal.came
                    assert [bracket.depth for bracket in bracket_module._brackets.values()] == [1], signal.came
            if nested or written:
                assert seen == ["start 3", "end 3"], signal.came
            assert list(bracket_module._brackets) == []
            if not signal.came:
                break
            came.add(signal.came)
    assert {"call Access.begin", "call SyncBracket._enter", "call Access.end", "call SyncBracket._drop"} <= came


def test_a_memfd_has_no_brackets(service: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded_brackets(monkeypatch)
    with make(service) as buffer, buffer.cpu_access() as view:
        view[0] = 1
    assert seen == []


def test_access_for_nothing_is_refused(service: Recorder) -> None:
    with make(service) as buffer, pytest.raises(ValueError, match="reading"):
        buffer.cpu_access(read=False, write=False).__enter__()


def nv12(service: Recorder) -> BufferBase:
    # 8x6: 6 rows of luma, 3 rows of chroma, rows 256 bytes apart.
    return make(
        service, width=8, height=6, format="NV12", modifier=(1 << 56) | 5, offsets=(0, 1536), strides=(256, 256)
    )


def test_planes_as_linux_dmabuf_takes_them(service: Recorder) -> None:
    with nv12(service) as buffer:
        fd = buffer.fileno()
        assert linux_dmabuf_planes(buffer) == ((fd, 0, 0, 256, 1 << 24, 5), (fd, 1, 1536, 256, 1 << 24, 5))
    with make(service) as plain, pytest.raises(ValueError, match="no planes"):
        linux_dmabuf_planes(plain)


def test_a_plane_as_an_array_has_its_stride(service: Recorder) -> None:
    with nv12(service) as buffer, buffer.map() as view:
        luma, chroma = buffer.planes
        rows = plane_array(view, luma, (6, 8))
        pairs = plane_array(view, chroma, (3, 4, 2))
        assert (rows.strides, pairs.strides) == ((256, 1), (256, 2, 1))
        rows[5, 7] = 9
        pairs[2, 3, 1] = 8
        assert os.pread(buffer.fileno(), 1, 5 * 256 + 7) == b"\t"
        assert os.pread(buffer.fileno(), 1, 1536 + 2 * 256 + 7) == b"\b"
        assert bytes(luma.of(view)[5 * 256 + 7 : 5 * 256 + 8]) == b"\t"
        words = plane_array(view, luma, (6, 4), "<u2")
        assert words.strides == (256, 2)
        del rows, pairs, words


@pytest.mark.parametrize("shape", [(7, 8), (6, 257), (6, 64, 5)])
def test_a_shape_that_does_not_fit_is_refused(service: Recorder, shape: tuple[int, ...]) -> None:
    with nv12(service) as buffer, buffer.map() as view, pytest.raises(ValueError, match="does not fit"):
        plane_array(view, buffer.planes[0], shape)


def test_what_is_evicted_again_at_once_is_brought_back_again(service: Recorder) -> None:
    """In a thread, whose turn may come only when the next eviction is over."""
    for borrow in (BufferBase.fileno, BufferBase.dup, BufferBase.steal_fd):
        with make(service) as buffer:
            memory = buffer._memory
            times = count()

            def bring_back(share: Share, memory: Memory = memory, times: Iterator[int] = times) -> None:
                memory.take(OwnedFd(os.memfd_create("back")), share.info)
                if next(times) == 0:
                    memory.send_away()

            memory.send_away()
            service.bring_back = bring_back
            number = borrow(buffer)
            assert is_open(number)
            if borrow is not BufferBase.fileno:
                os.close(number)
            assert next(times) == 2


@pytest.mark.parametrize("library", [aio, sync])
async def test_a_stream_that_nobody_reads_keeps_the_last_moves(service: Recorder, library: Any) -> None:
    share, served = Share(PATH, BufferInfo(size=SIZE)), cast(Service, service)

    def run(listening: Coroutine[Any, Any, None]) -> None:
        with pytest.raises(StopIteration):
            listening.send(None)

    stream = library.MoveStream(*([SimpleNamespace(run=run)] if library is sync else []), served, share)
    last = 3 * UNREAD_MAX
    for serial in range(1, last + 1):
        share.watch.tell(Notice(share, cast(Attached, None), MoveKind.MOVE, serial, 1.0, lambda: None))
    share.watch.end()
    read = [move.serial async for move in stream] if library is aio else [move.serial for move in stream]
    assert read == list(range(last - UNREAD_MAX + 2, last + 1))
