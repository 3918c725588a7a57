# SPDX-License-Identifier: MIT
"""linux.drm: answers of kernels and drivers that no test can have."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from udmabufd.linux import drm
from udmabufd.linux.errors import HintedOSError

CARD = 7

Answer = Callable[[list[int | None]], list[int]]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A function that has the kernel answer so, an errno or None each, and returns the list of what it was asked."""

    def script(answers: list[int | None]) -> list[int]:
        asked: list[int] = []

        def ioctl(_fd: int, request: int, _argument: object = 0) -> int:
            asked.append(request)
            if (code := answers[len(asked) - 1]) is not None:
                raise OSError(code, os.strerror(code))
            return 0

        monkeypatch.setattr("fcntl.ioctl", ioctl)
        return asked

    return script


def test_an_interrupted_call_is_repeated(answer: Answer) -> None:
    asked = answer([errno.EINTR, errno.EINTR, None])
    drm.set_master(CARD)
    assert asked == [drm.DRM_IOCTL_SET_MASTER] * 3


@pytest.mark.parametrize(("code", "master"), [(errno.EACCES, False), (errno.EINVAL, True), (None, True)])
def test_who_may_authenticate_is_master(answer: Answer, code: int | None, master: bool) -> None:
    answer([code])
    assert drm.is_master(CARD) is master


def test_what_tells_nothing_of_masters_is_an_error(answer: Answer) -> None:
    answer([errno.ENODEV])
    with pytest.raises(OSError) as caught:
        drm.is_master(CARD)
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS])
def test_a_driver_without_dumb_buffers(answer: Answer, code: int) -> None:
    answer([code])
    with pytest.raises(HintedOSError, match="has no dumb buffers") as caught:
        drm.create_dumb(CARD, 1024, 1)
    assert caught.value.errno == errno.ENOTSUP
