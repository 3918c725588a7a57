# SPDX-License-Identifier: MIT
"""Real devices of the guest: what they resolve to, what is known of them, their removal, what a look-up touches."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.importing import Vivid, drm_nodes
from udmabufd import database
from udmabufd.core.constraints import NONE
from udmabufd.core.database import Database, kernel_version
from udmabufd.core.errors import NoSuchDevice
from udmabufd.core.workers import Workers
from udmabufd.system.device_finder import DeviceFinder
from udmabufd.system.devices import DeviceEvent, DeviceMonitor
from udmabufd_client.contract import Cache

pytestmark = [pytest.mark.guest, pytest.mark.root]

TOP = Path(__file__).resolve().parents[2]
KERNEL = kernel_version(os.uname().release)
SHIPPED = Database(
    [entry for path in sorted((TOP / "systemd/constraints").glob("*.toml")) for entry in database.read(path)], KERNEL
)


class Heard:
    """What the monitor told, to be awaited."""

    def __init__(self) -> None:
        self.removed: asyncio.Queue[str] = asyncio.Queue()

    def __call__(self, action: str, device: DeviceEvent) -> None:
        if action == "remove":
            self.removed.put_nowait(device.path)


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(1, "devices")
    yield made
    made.close()


class NoMonitor:
    """For who does not wait for removals."""

    generation = None

    def watch(self, device: DeviceEvent) -> None:
        raise NotImplementedError

    def unwatch(self, path: str) -> None:
        raise NotImplementedError


@pytest.fixture
def finder(workers: Workers) -> DeviceFinder:
    return DeviceFinder(workers.submit, SHIPPED, NoMonitor())


def device_of(node: Path) -> Path:
    """Return what sysfs says the device of a node is, by the node's number: not the way that the finder goes."""
    number = node.stat().st_rdev
    return Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}/device").resolve()


async def test_vgem_is_a_device_without_a_driver_and_takes_any_memory(finder: DeviceFinder, vgem: Path) -> None:
    for node in [node for node in drm_nodes() if device_of(node).name == "vgem"]:
        device = await finder.find(str(node))
        assert (device.dma_path, device.driver) == (str(device_of(node)), None)
        assert f"{device.dma_subsystem}:{device.dma_sysname}" == "platform:vgem"
        assert (device.modalias, device.dma_mask_bits, device.card) == ("platform:vgem", None, vgem.name)
        assert device.constraints == NONE
        facts = SHIPPED.dumb_of(device)
        assert facts is not None
        assert (facts.cache, facts.contiguous) == (Cache.WRITE_COMBINE, False)


async def test_an_instance_of_vivid_wants_what_its_parameter_says(finder: DeviceFinder, vivid: Vivid) -> None:
    for node, contiguous in ((vivid.mapped, False), (vivid.contiguous, True), (vivid.planes, False)):
        device = await finder.find(str(node))
        assert (device.dma_path, device.driver) == (str(device_of(node)), "vivid")
        assert device.label == Path("/sys/class/video4linux", node.name, "name").read_text().strip()
        assert device.parameters["allocators"].split(",")[:3] == ["0", "1", "0"]
        assert device.constraints.contiguous is contiguous
        assert device.constraints.address_bits == (32 if contiguous else None)


async def test_a_gpu_on_virtio_takes_only_its_own_memory_and_has_its_transports_mask(
    finder: DeviceFinder, virtio_gpu: list[Path]
) -> None:
    card, _ = virtio_gpu
    for node in virtio_gpu:
        device = await finder.find(str(node))
        assert (device.dma_subsystem, device.driver, device.card) == ("pci", "virtio-pci", card.name)
        assert device.drivers == ("virtio_gpu", "virtio-pci")
        assert device.dma_path == str(device_of(node))
        assert device.dma_mask_bits == int((device_of(node) / "dma_mask_bits").read_text()) == 64
        assert device.constraints.allocators == (frozenset({f"dumb:{card.name}"}) if KERNEL < (6, 14) else None)
        facts = SHIPPED.dumb_of(device)
        assert facts is not None
        assert (facts.cache, facts.contiguous) == (Cache.CACHED, False)


async def test_each_link_leads_to_the_device_of_its_node(
    finder: DeviceFinder, vivid: Vivid, virtio_gpu: list[Path]
) -> None:
    links = [link for folder in ("/dev/dri/by-path", "/dev/v4l/by-path") for link in Path(folder).iterdir()]
    assert {link.parts[2] for link in links} == {"dri", "v4l"}
    for link in links:
        by_link = await finder.find(str(link))
        assert by_link.node == str(link.resolve())
        assert by_link.path == (await finder.find(str(link.resolve()))).path


async def test_all_nodes_that_buffers_can_be_meant_for_are_listed(
    finder: DeviceFinder, vivid: Vivid, virtio_gpu: list[Path], vgem: Path
) -> None:
    cameras = {f"/dev/{entry.name}" for entry in Path("/sys/class/video4linux").iterdir()}
    listed = await finder.all()
    assert {device.name for device in listed} == cameras | {str(node) for node in drm_nodes()}
    for device in listed:
        assert device == await finder.find(device.name)


async def test_pci_devices_say_what_sysfs_says(finder: DeviceFinder, virtio_gpu: list[Path]) -> None:
    bound = 0
    for entry in Path("/sys/bus/pci/devices").iterdir():
        device = await finder.find(f"pci:{entry.name}")
        mask = int((entry / "dma_mask_bits").read_text())
        # Without a driver the 32 bits that each device starts with mean nothing.
        assert device.dma_mask_bits == (mask if (entry / "driver").exists() else None)
        assert (device.iommu_group, device.iommu_type, device.translated) == (None, None, False)
        bound += device.dma_mask_bits is not None
    assert bound


async def test_what_is_removed_is_told_whatever_it_was_called(workers: Workers) -> None:
    heard = Heard()
    subprocess.run(["modprobe", "vgem"], check=True)
    try:
        subprocess.run(["udevadm", "settle", "--timeout=60"], check=True)
        (card,) = [node for node in drm_nodes() if node.name.startswith("card") and device_of(node).name == "vgem"]
        with DeviceMonitor(heard) as monitor:
            finder = DeviceFinder(workers.submit, SHIPPED, monitor)
            devices = [await finder.find(name) for name in (str(card), "platform:vgem")]
            for device in devices:
                finder.watch(device)
            removal = await asyncio.create_subprocess_exec("modprobe", "--remove", "vgem")
            async with asyncio.timeout(60):
                assert await removal.wait() == 0
                waiting = {device.path for device in devices}
                while waiting:
                    waiting.discard(await heard.removed.get())
            for device in devices:
                with pytest.raises(NoSuchDevice):
                    finder.watch(device)
                with pytest.raises(NoSuchDevice):
                    await finder.find(device.name)
    finally:
        subprocess.run(["modprobe", "--remove", "--quiet", "vgem"], check=False)


HOSTILE = [
    "/dev/shm/udmabufd-hostile",
    "/dev/udmabufd-hostile",
    "/dev/../tmp/udmabufd-hostile",
    "/tmp/udmabufd-hostile",
]

LOOK_UP = """
import asyncio, sys
from udmabufd.core.database import Database
from udmabufd.core.workers import Workers
from udmabufd.system.device_finder import DeviceFinder

class Monitor:
    generation = 1

async def main(names):
    workers = Workers(1)
    finder = DeviceFinder(workers.submit, Database([], (6, 12)), Monitor())
    print("ready", flush=True)
    sys.stdin.readline()
    found = await asyncio.gather(*[finder.find(name) for name in names], return_exceptions=True)
    print([type(each).__name__ for each in found])
    workers.close()

asyncio.run(main(sys.argv[1:]))
"""


def test_no_system_call_is_made_on_a_path_that_a_client_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with subprocess.Popen(
        [sys.executable, "-c", LOOK_UP, *HOSTILE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        # -y: descriptors are shown with their paths.
        strace = ["strace", "-f", "-y", "-s", "300", "-e", "trace=%file", "-o", str(trace), "-p", str(program.pid)]
        with subprocess.Popen(strace, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "attached" in tracer.stderr.readline()
            output, _ = program.communicate("go on\n")
            tracer.communicate()
    assert output.strip() == str(["NoSuchDevice", "NoSuchDevice", "InvalidSpec", "InvalidSpec"])
    calls = [line for line in trace.read_text().splitlines() if "udmabufd-hostile" in line]
    # What is looked at is what sysfs has by the last part of the name.
    assert calls
    for call in calls:
        assert '"/sys/' in call or "</sys/" in call, call
