# SPDX-License-Identifier: MIT
"""The daemon under the stand-in for systemd: that it starts, is killed, and ends there as a test says."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.private_bus import PrivateBus
from tests.system.fake_manager import FakeManager

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def bus() -> Iterator[PrivateBus]:
    with PrivateBus() as made:
        yield made


def test_the_daemon_is_started_killed_and_stopped(bus: PrivateBus) -> None:
    with FakeManager(bus.address, watchdog=2.0) as manager:
        manager.start()
        first = manager.pid
        assert manager.store.status
        manager.until(lambda: manager.store.pulses > 0, "heard to live")
        manager.kill()
        assert manager.status == -signal.SIGKILL
        manager.start()
        assert manager.pid != first
        manager.restart()
        assert manager.stop() == 0
        assert "STOPPING=1" in manager.store.messages
        assert manager.stored == {}


def test_a_daemon_that_does_not_start_is_shown_with_its_log(bus: PrivateBus) -> None:
    with FakeManager(bus.address, config="nonsense") as manager:
        with pytest.raises(AssertionError, match=r"status 78(.|\n)*nonsense|status 78(.|\n)*udmabufd\.toml"):
            manager.start()
        assert not manager.running


@pytest.mark.parametrize(
    ("room", "advice"),
    [({"store_size": 3007}, "FileDescriptorStoreMax=3008 "), ({"nofile": 5055}, "LimitNOFILE=5056 ")],
)
def test_too_little_room_for_what_may_have_to_be_kept_is_refused(
    bus: PrivateBus, room: dict[str, Any], advice: str
) -> None:
    with FakeManager(bus.address, **room) as manager:
        manager.spawn()
        assert manager.wait() == 78
        assert advice in manager.log_text()
    with FakeManager(bus.address, config="[limits]\nmax_buffers = 999\n", **room) as manager:
        manager.start()


def test_a_wrapper_takes_the_daemons_place(bus: PrivateBus, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\necho "$@" >"$0.arguments"\nexec sleep 600\n')
    wrapper.chmod(0o755)
    with FakeManager(bus.address, command=[str(wrapper)], config="# here\n") as manager:
        with pytest.raises(AssertionError, match=r"within 0\.5 s not ready"):
            manager.start(timeout=0.5)
        bus_option, address, config_option, config = Path(f"{wrapper}.arguments").read_text().split()
        assert (bus_option, address, config_option) == ("--bus", bus.address, "--config")
        assert Path(config).read_text() == "# here\n"
        manager.kill()
