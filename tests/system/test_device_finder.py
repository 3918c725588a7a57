# SPDX-License-Identifier: MIT
"""Looking devices up by the names that clients give: in a made-up sysfs, in the real one, and hostile ones."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bus.silent_fuse import silent_file
from tests.system.udev_tree import StandIn, Tree
from udmabufd.core.constraints import NONE, Constraints
from udmabufd.core.database import Database, Entry, Match
from udmabufd.core.device import Device
from udmabufd.core.errors import IncompatibleConstraints, InvalidSpec, NoSuchDevice
from udmabufd.core.workers import Workers
from udmabufd.system import device_finder
from udmabufd.system.device_finder import NAME_MAX, PATH_MAX, DeviceFinder
from udmabufd.system.devices import DeviceEvent

GPU = "pci0000:00/0000:00:02.0"
HOST_CONTROLLER = "pci0000:00/0000:00:14.0"
CAMERA = f"{HOST_CONTROLLER}/usb1/1-4/1-4:1.0"


class FakeMonitor:
    """Remembers what it is to watch."""

    def __init__(self) -> None:
        self.generation: int | None = 1
        self.watched: list[DeviceEvent] = []

    def watch(self, device: DeviceEvent) -> None:
        self.watched.append(device)

    def unwatch(self, path: str) -> None:
        self.watched = [device for device in self.watched if device.path != path]


@pytest.fixture
def workers() -> Iterator[Workers]:
    """One thread, which the daemon has for look-ups alone: libudev knows no locks, and nor does the finder."""
    made = Workers(1, "devices")
    yield made
    made.close()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A machine with a GPU, a USB camera, virtual devices, a virtio GPU and an unbound PCI device."""
    made = Tree(tmp_path / "sys")
    monkeypatch.setattr(device_finder, "SYSFS", str(made.sysfs))
    made.add(
        GPU,
        "pci",
        driver="amdgpu",
        properties={"MODALIAS": "pci:v00001002d00001638", "ID_MODEL_FROM_DATABASE": "Cezanne"},
        files={"dma_mask_bits": "44", "numa_node": "0"},
    )
    (tmp_path / "sys/kernel/iommu_groups/3").mkdir(parents=True)
    (tmp_path / "sys/kernel/iommu_groups/3/type").write_text("DMA-FQ\n")
    made.link(f"{GPU}/iommu_group", "../../../kernel/iommu_groups/3")
    made.add(f"{GPU}/drm/card1", "drm", node="/dev/dri/card1", links=("/dev/dri/by-path/pci-0000:00:02.0-card",))
    made.add(f"{GPU}/drm/card1/card1-HDMI-A-1", "drm")
    made.add(f"{GPU}/drm/renderD128", "drm", node="/dev/dri/renderD128", properties={"ID_FOR_SEAT": "x"})
    made.add(HOST_CONTROLLER, "pci", driver="xhci_hcd", files={"dma_mask_bits": "64", "numa_node": "-1"})
    made.add(f"{HOST_CONTROLLER}/usb1", "usb", driver="usb")
    made.add(f"{HOST_CONTROLLER}/usb1/1-4", "usb", driver="usb")
    made.add(CAMERA, "usb", driver="uvcvideo", properties={"MODALIAS": "usb:v046Dp085E"})
    made.add(
        f"{CAMERA}/video4linux/video0",
        "video4linux",
        node="/dev/video0",
        links=("/dev/v4l/by-id/usb-046d_Brio-video-index0", "/dev/front"),
        files={"name": "Brio\x1b[31m 4K\nStream"},
        properties={"ID_VENDOR_ID": "046d"},
    )
    made.add(
        "platform/vivid.0",
        "platform",
        driver="vivid",
        properties={"MODALIAS": "platform:vivid"},
        files={"driver/module/parameters/allocators": "0,1,0", "driver/module/parameters/n_devs": "2"},
    )
    made.add("platform/vivid.0/video4linux/video3", "video4linux", node="/dev/video3", files={"name": "vivid-001-vid"})
    made.add("platform/vgem", "platform", properties={"MODALIAS": "platform:vgem"})
    made.add("platform/vgem/drm/card0", "drm", node="/dev/dri/card0")
    # The card of a virtio GPU has been the virtio device's, and is its transport's.
    made.add("pci0000:00/0000:00:05.0", "pci", driver="virtio-pci", files={"dma_mask_bits": "64"})
    made.add("pci0000:00/0000:00:05.0/virtio3", "virtio", driver="virtio_gpu")
    made.add("pci0000:00/0000:00:05.0/virtio3/drm/card2", "drm", node="/dev/dri/card2")
    made.add("pci0000:00/0000:00:07.0", "pci", driver="virtio-pci", files={"dma_mask_bits": "64"})
    made.add("pci0000:00/0000:00:07.0/virtio4", "virtio", driver="virtio_gpu")
    made.link("pci0000:00/0000:00:07.0/virtio4/driver", "/sys/bus/virtio/drivers/virtio_gpu")
    made.add("pci0000:00/0000:00:07.0/drm/card3", "drm", node="/dev/dri/card3")
    made.add("pci0000:00/0000:00:06.0", "pci", files={"dma_mask_bits": "32"})
    made.add("virtual/mem/null", "mem", node="/dev/null")
    made.add("virtual/misc/udmabuf", "misc", node="/dev/udmabuf")
    return made


@pytest.fixture
def monitor() -> FakeMonitor:
    return FakeMonitor()


ENTRIES = [
    Entry(Match(driver=("vivid",), parameter={"allocators": ("*",)}), "parameters are read"),
    Entry(Match(driver=("uvcvideo",)), "of a camera", Constraints(stride_alignment=64), by_cpu=True),
    Entry(Match(subsystem=("mem",)), "one", Constraints(allocators=frozenset({"udmabuf"}))),
    Entry(Match(name=("null",)), "another", Constraints(allocators=frozenset({"memfd"}))),
]


@pytest.fixture
def finder(tree: Tree, workers: Workers, monitor: FakeMonitor) -> DeviceFinder:
    return DeviceFinder(workers.submit, Database(ENTRIES, (6, 12)), monitor, lookup=tree)


# ---- which device, and which does the DMA ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sysname", "dma", "driver"),
    [
        ("/dev/dri/card1", "card1", GPU, "amdgpu"),
        ("/dev/dri/renderD128", "renderD128", GPU, "amdgpu"),
        ("/dev/dri/by-path/pci-0000:00:02.0-card", "card1", GPU, "amdgpu"),
        ("drm:card1", "card1", GPU, "amdgpu"),
        ("pci:0000:00:02.0", "0000:00:02.0", GPU, "amdgpu"),
        ("/dev/video0", "video0", HOST_CONTROLLER, "xhci_hcd"),
        ("/dev/v4l/by-id/usb-046d_Brio-video-index0", "video0", HOST_CONTROLLER, "xhci_hcd"),
        ("/dev/front", "video0", HOST_CONTROLLER, "xhci_hcd"),
        ("usb:1-4", "1-4", HOST_CONTROLLER, "xhci_hcd"),
        ("/dev/video3", "video3", "platform/vivid.0", "vivid"),
        ("platform:vivid.0", "vivid.0", "platform/vivid.0", "vivid"),
        ("/dev/dri/card0", "card0", "platform/vgem", None),
        ("/dev/dri/card2", "card2", "pci0000:00/0000:00:05.0", "virtio-pci"),
        ("/dev/dri/card3", "card3", "pci0000:00/0000:00:07.0", "virtio-pci"),
        ("/dev/udmabuf", "udmabuf", "virtual/misc/udmabuf", None),
    ],
)
async def test_a_name_leads_to_the_device_that_does_the_dma(
    finder: DeviceFinder, tree: Tree, name: str, sysname: str, dma: str, driver: str | None
) -> None:
    device = await finder.find(name)
    assert (device.name, device.sysname, device.driver) == (name, sysname, driver)
    assert device.dma_path == str(tree.sysfs / "devices" / dma)
    assert device.node == tree.devices[device.path].device_node


async def test_a_path_in_sysfs_is_one(finder: DeviceFinder, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_path(path: str) -> StandIn:
        asked.append(path)
        return next(tree.of_subsystem("misc"))

    monkeypatch.setattr(tree, "by_path", by_path)
    for name in ("/sys/devices/virtual/misc/udmabuf", "/sys/class/misc/udmabuf", "/sys/dev/char/10:125"):
        assert (await finder.find(name)).sysname == "udmabuf"
        assert asked.pop() == name


async def test_what_sysfs_tells_of_a_gpu(finder: DeviceFinder, tree: Tree) -> None:
    assert await finder.find("/dev/dri/renderD128") == Device(
        name="/dev/dri/renderD128",
        node="/dev/dri/renderD128",
        subsystem="drm",
        sysname="renderD128",
        path=str(tree.sysfs / "devices" / GPU / "drm/renderD128"),
        label="Cezanne",
        dma_path=str(tree.sysfs / "devices" / GPU),
        dma_subsystem="pci",
        dma_sysname="0000:00:02.0",
        driver="amdgpu",
        drivers=("amdgpu",),
        modalias="pci:v00001002d00001638",
        properties={"ID_FOR_SEAT": "x"},
        dma_mask_bits=44,
        iommu_group="3",
        iommu_type="DMA-FQ",
        numa_node=0,
        card="card1",
    )


async def test_a_camera_on_usb_has_its_own_driver_and_its_host_controllers_mask(finder: DeviceFinder) -> None:
    camera = await finder.find("/dev/video0")
    assert camera.drivers == ("uvcvideo", "usb", "xhci_hcd")
    assert (camera.dma_subsystem, camera.dma_sysname) == ("pci", "0000:00:14.0")
    assert (camera.dma_mask_bits, camera.numa_node, camera.iommu_group, camera.card) == (64, None, None, None)
    assert camera.constraints == Constraints(stride_alignment=64)
    assert camera.sources == {"stride_alignment": "of a camera"}


async def test_what_a_device_calls_itself_is_made_printable(finder: DeviceFinder) -> None:
    assert (await finder.find("/dev/video0")).label == "Brio?[31m 4K?Stream"


async def test_only_parameters_that_entries_ask_for_are_read(finder: DeviceFinder) -> None:
    assert (await finder.find("/dev/video3")).parameters == {"allocators": "0,1,0"}
    assert (await finder.find("/dev/video0")).parameters == {}


async def test_an_unbound_pci_device_says_nothing_of_its_mask(finder: DeviceFinder) -> None:
    unbound = await finder.find("pci:0000:00:06.0")
    assert (unbound.driver, unbound.dma_mask_bits, unbound.constraints) == (None, None, NONE)


@pytest.mark.parametrize(
    ("name", "card"), [("drm:card2", "card2"), ("drm:card3", "card3"), ("virtio:virtio3", "card2")]
)
async def test_a_virtio_device_has_its_own_driver_and_its_transports_mask(
    finder: DeviceFinder, name: str, card: str
) -> None:
    gpu = await finder.find(name)
    assert (gpu.drivers, gpu.dma_mask_bits, gpu.card) == (("virtio_gpu", "virtio-pci"), 64, card)


async def test_so_has_its_transport(finder: DeviceFinder) -> None:
    assert (await finder.find("pci:0000:00:07.0")).drivers == ("virtio_gpu", "virtio-pci")


async def test_a_string_that_is_cut_within_a_character_is_left_out(finder: DeviceFinder, tree: Tree) -> None:
    class Properties(dict[str, str]):
        def __getitem__(self, key: str) -> str:
            return b"\xe2\x82".decode() if key == "ID_V4L_PRODUCT" else super().__getitem__(key)

    found = tree.devices[str(tree.sysfs / "devices" / CAMERA / "video4linux/video0")]
    found.properties = Properties({"ID_V4L_PRODUCT": "", "ID_VENDOR_ID": "046d"})
    assert (await finder.find("/dev/video0")).properties == {"ID_VENDOR_ID": "046d"}


# ---- all, removal, contradictions -----------------------------------------------------------------------------------


async def test_all_devices_that_buffers_are_meant_for_are_listed_by_what_attach_takes(finder: DeviceFinder) -> None:
    devices = await finder.all()
    names = [device.name for device in devices]
    assert names == sorted(names)
    assert set(names) == {
        *("/dev/dri/card0", "/dev/dri/card1", "/dev/dri/card2", "/dev/dri/card3", "/dev/dri/renderD128"),
        *("/dev/video0", "/dev/video3"),
    }
    assert devices == [await finder.find(name) for name in names]


async def test_a_removal_is_told_by_the_monitor(finder: DeviceFinder, monitor: FakeMonitor) -> None:
    camera = await finder.find("/dev/video0")
    finder.watch(camera)
    assert monitor.watched == [DeviceEvent("video4linux", "video0", "/dev/video0", camera.path)]
    finder.unwatch(f"{camera.path}x")
    assert len(monitor.watched) == 1
    finder.unwatch(camera.path)
    assert monitor.watched == []


async def test_a_device_that_went_between_finding_and_watching_is_gone(finder: DeviceFinder, tree: Tree) -> None:
    camera = await finder.find("/dev/video0")
    shutil.rmtree(camera.path)
    with pytest.raises(NoSuchDevice, match="has just been removed"):
        finder.watch(camera)


async def test_a_contradiction_is_an_error_and_is_logged_once(
    finder: DeviceFinder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with pytest.raises(IncompatibleConstraints) as caught:
            await finder.find("mem:null")
        assert caught.value.devices == ("one", "another")
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "mem:null" in caplog.text


async def test_one_device_that_is_contradictory_does_not_hide_the_others(
    tree: Tree, workers: Workers, monitor: FakeMonitor
) -> None:
    both = [
        Entry(Match(driver=("amdgpu",)), "one", Constraints(allocators=frozenset({"udmabuf"}))),
        Entry(Match(driver=("amdgpu",)), "another", Constraints(allocators=frozenset({"memfd"}))),
    ]
    finder = DeviceFinder(workers.submit, Database(both, (6, 12)), monitor, lookup=tree)
    devices = {device.name: device for device in await finder.all()}
    assert len(devices) == 7
    assert devices["/dev/dri/card1"].constraints == NONE
    assert "contradicts itself" in devices["/dev/dri/card1"].sources["allocators"]


# ---- hostile names --------------------------------------------------------------------------------------------------

INVALID = [
    *("", " ", "card0", "/", "/dev", "/dev/", "/sys", "/sys/devices", "/sys/", "//dev/video0", "/dev//video0"),
    *("/etc/passwd", "/proc/self/root/dev/video0", "/tmp/video0", "dev/video0", "./dev/video0"),
    *("/dev/../dev/video0", "/dev/./video0", "/dev/dri/..", "/dev/video0/", "/sys/devices/../../dev/video0"),
    *("/sys/fs/fuse/connections", "/sys/kernel/debug/x", "/sys/module/vivid", "/sys/firmware/x", "/sys/class/"),
    *("/dev/video0\n", "/dev/video0\0", "/dev/vid\teo0", "\x1b[2J", "/dev/vidéo0", "\udcff:x", "drm:\udcff"),
    *(
        "drm:",
        ":card0",
        "drm:../card0",
        "drm:card0/device",
        "../class/drm:card0",
        "..:card0",
        ".:x",
        "drm:..",
        "drm:.",
    ),
    *("dr m:card0", "drm/x:card0", "/dev/" + "x" * NAME_MAX, "drm:" + "x" * NAME_MAX, "x" * 1_000_000),
]


@pytest.mark.parametrize("name", INVALID, ids=lambda name: ascii(name)[:40])
async def test_what_cannot_be_a_name_is_refused_without_looking(finder: DeviceFinder, tree: Tree, name: str) -> None:
    with pytest.raises(InvalidSpec, match="^device: ") as caught:
        await finder.find(name)
    assert (tree.asked, tree.listed) == (0, 0)
    assert str(caught.value).isprintable()


ABSENT = [
    *("/dev/video9", "/dev/dri/card9", "/dev/dri/video0", "/dev/video4linux/video0", "/dev/shm/x", "/dev/sda"),
    *("/dev/fd/0", "/dev/stdin", "/dev/log", "/dev/dri/by-path/absent", "/dev/null", "/dev/card1", "/dev/mqueue/x"),
    *("drm:card9", "nothing:card1", "mem:video0", "subsystem:drm", "drivers:pci:amdgpu", "module:vivid", "drm: "),
    *("/sys/class/drm/card9", "/sys/bus/pci", "/sys/devices/x", "/dev/" + "x" * (NAME_MAX - 5), "mem:" + "x" * 252),
]


@pytest.mark.parametrize("name", ABSENT, ids=lambda name: ascii(name)[:40])
@pytest.mark.parametrize("real", [False, True], ids=["made-up", "real"])
async def test_what_udev_does_not_know_is_no_such_device(
    finder: DeviceFinder, workers: Workers, monitor: FakeMonitor, name: str, real: bool
) -> None:
    if real:
        finder = DeviceFinder(workers.submit, Database([], (6, 12)), monitor)
    with pytest.raises(NoSuchDevice) as caught:
        await finder.find(name)
    assert str(caught.value).startswith(f"{name}: udev knows no such device")


async def test_a_device_whose_path_is_too_long_for_a_record_is_none(finder: DeviceFinder, tree: Tree) -> None:
    tree.add(f"virtual/{'x' * 200}/{'y' * 200}/{'z' * 200}/long", "misc", node="/dev/long")
    with pytest.raises(NoSuchDevice):
        await finder.find("/dev/long")


async def test_a_link_is_the_one_that_udev_has_now(finder: DeviceFinder, tree: Tree, monitor: FakeMonitor) -> None:
    camera = tree.devices[str(tree.sysfs / "devices" / CAMERA / "video4linux/video0")]
    assert (await finder.find("/dev/front")).sysname == "video0"
    # Gone, though the monitor has not heard of it yet; then its news come.
    camera.device_links = ()
    with pytest.raises(NoSuchDevice):
        await finder.find("/dev/front")
    other = tree.devices[str(tree.sysfs / "devices/platform/vivid.0/video4linux/video3")]
    other.device_links = ("/dev/front",)
    monitor.generation = 2
    assert (await finder.find("/dev/front")).sysname == "video3"


async def test_of_several_devices_that_claim_a_link_it_is_the_one_that_has_it(
    finder: DeviceFinder, tree: Tree, tmp_path: Path, monitor: FakeMonitor
) -> None:
    link = tmp_path / "dev/v4l/by-path/one"
    link.parent.mkdir(parents=True)
    for name in ("video3", "video0", "video9"):
        found = tree.by_name("video4linux", name)
        if found is None:
            found = tree.add("platform/a/video9", "video4linux")
        found.device_links = (str(link),)
        found.device_node = f"{tmp_path}/dev/{name}"
    # Names in /dev are all that clients may give; here it is another folder.
    look_up = finder._by_node
    for name in ("video0", "video3", "video9"):
        link.symlink_to(f"../../{name}")
        one = look_up(str(link), link.name)
        assert one is not None
        assert one.sys_name == name
        link.unlink()
    assert look_up(str(link), link.name) is None


async def test_names_that_nobody_has_list_devices_only_once_and_again_after_news(
    finder: DeviceFinder, tree: Tree, monitor: FakeMonitor
) -> None:
    async def ask(count: int) -> int:
        before = tree.listed
        for number in range(count):
            with pytest.raises(NoSuchDevice):
                await finder.find(f"/dev/nothing/{number}")
        return tree.listed - before

    once = await ask(1)
    assert once == len(device_finder.NODE_SUBSYSTEMS)
    assert await ask(50) == 0
    monitor.generation = 2
    assert await ask(50) == once
    # While it does not listen, nothing may be remembered.
    monitor.generation = None
    assert await ask(3) == 3 * once


async def test_names_of_other_subsystems_list_none(finder: DeviceFinder, tree: Tree) -> None:
    for name in ("nothing:x", "/sys/class/nothing/x", "drm:card1"):
        await asyncio.gather(finder.find(name), return_exceptions=True)
    assert tree.listed == 0


# ---- the real sysfs -------------------------------------------------------------------------------------------------


@pytest.fixture
def real(workers: Workers, monitor: FakeMonitor) -> DeviceFinder:
    return DeviceFinder(workers.submit, Database([], (6, 12)), monitor)


@pytest.mark.parametrize(
    "name", ["mem:null", "/sys/class/mem/null", "/sys/devices/virtual/mem/null", "/sys/dev/char/1:3"]
)
async def test_real_names_of_a_virtual_device(real: DeviceFinder, name: str) -> None:
    device = await real.find(name)
    path = "/sys/devices/virtual/mem/null"
    assert (device.name, device.node, device.path, device.dma_path) == (name, "/dev/null", path, path)
    assert (device.subsystem, device.sysname, device.label, device.drivers) == ("mem", "null", "null", ())
    real.watch(device)


async def test_real_pci_devices_are_their_own_and_say_what_sysfs_says(real: DeviceFinder) -> None:
    found = 0
    for link in sorted(Path("/sys/bus/pci/devices").glob("*"))[:8]:
        device = await real.find(f"pci:{link.name}")
        assert replace(await real.find(str(link)), name=device.name) == device
        assert device.path == device.dma_path == str(link.resolve())
        driver = (link / "driver").resolve().name if (link / "driver").exists() else None
        assert device.driver == driver
        mask = int((link / "dma_mask_bits").read_text())
        assert device.dma_mask_bits == (None if driver is None else mask)
        found += 1
    assert found == min(8, len(list(Path("/sys/bus/pci/devices").glob("*"))))


async def test_a_name_costs_little(real: DeviceFinder) -> None:
    async def cost(name: str) -> float:
        costs = []
        for _ in range(50):
            start = time.perf_counter()
            await asyncio.gather(real.find(name), return_exceptions=True)
            costs.append(time.perf_counter() - start)
        return min(costs)

    device = await cost("mem:null")
    assert await cost("nothing:x") < 2 * device
    # The list of links has been made: what is left are five looks into sysfs.
    assert await cost("/dev/nothing/x") < 3 * device


@pytest.mark.root
async def test_a_path_is_not_asked_of_its_file_system(real: DeviceFinder) -> None:
    """Below /dev/shm any user can mount a FUSE file system whose server keeps whoever asks it waiting for ever."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        with silent_file(folder) as file:
            async with asyncio.timeout(10):
                for name in (str(file), f"{file.parent}/other", str(file.parent)):
                    with pytest.raises(NoSuchDevice):
                        await real.find(name)
    finally:
        shutil.rmtree(folder)


async def test_look_ups_run_in_the_thread_that_they_are_given(
    finder: DeviceFinder, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = threading.Lock()

    def by_name(subsystem: str, sysname: str) -> StandIn | None:
        assert threading.current_thread().name.startswith("devices"), "looked up in another thread"
        with_us = inside.acquire(blocking=False)
        assert with_us, "two threads look up at the same time"
        time.sleep(0.002)  # long enough for another thread to come in
        inside.release()
        return Tree.by_name(tree, subsystem, sysname)

    monkeypatch.setattr(tree, "by_name", by_name)
    devices = await asyncio.gather(*[finder.find("drm:card1") for _ in range(20)], finder.all())
    assert len(devices) == 21


async def test_many_at_once(real: DeviceFinder) -> None:
    devices = await asyncio.gather(*[real.find(name) for name in ("mem:null", "mem:zero") * 200])
    assert [device.sysname for device in devices] == ["null", "zero"] * 200


async def test_a_sysfs_path_may_be_as_long_as_those_that_are_recorded(real: DeviceFinder) -> None:
    """By it the device of an attachment is found again after a restart, however it was named by the client."""
    for length in (NAME_MAX, NAME_MAX + 1, PATH_MAX):
        with pytest.raises(NoSuchDevice):
            await real.find(("/sys/devices/" + "hub/" * 200)[: length - 1] + "x")
    with pytest.raises(InvalidSpec, match=f"must be 1 to {PATH_MAX} printable"):
        await real.find(("/sys/devices/" + "hub/" * 200)[:PATH_MAX] + "x")
    with pytest.raises(InvalidSpec, match=f"must be 1 to {NAME_MAX} printable"):
        await real.find("/dev/" + "x" * NAME_MAX)
