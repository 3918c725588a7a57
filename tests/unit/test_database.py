# SPDX-License-Identifier: MIT
"""The device database: matching, what follows for a device, its files, and the entries that are shipped."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from udmabufd import database as loader
from udmabufd.core.constraints import NONE, Constraints
from udmabufd.core.database import Database, DumbFacts, Entry, Kernels, Match, kernel_version, parse_kernels
from udmabufd.core.device import Device
from udmabufd.core.errors import IncompatibleConstraints
from udmabufd.files import ConfigError
from udmabufd_client.contract import Cache

TOP = Path(__file__).resolve().parents[2]
SHIPPED = TOP / "systemd/constraints"

LTS = (6, 12)


def device(driver: str | None = None, bus: str = "platform", name: str = "thing.0", **facts: Any) -> Device:
    """A made-up device whose class device is a video4linux one."""
    made = Device(
        name="/dev/video0",
        node="/dev/video0",
        subsystem="video4linux",
        sysname="video0",
        path=f"/sys/devices/{bus}/{name}/video4linux/video0",
        label="Made up",
        dma_path=f"/sys/devices/{bus}/{name}",
        dma_subsystem=bus,
        dma_sysname=name,
        driver=driver,
        drivers=() if driver is None else (driver,),
    )
    return replace(made, **facts)


def describe(one: Device, *entries: Entry, kernel: tuple[int, int] = LTS) -> Device:
    return Database(entries, kernel).describe(one)


def virtio_gpu(card: str | None) -> Device:
    return device(
        "virtio-pci", "pci", "0000:00:05.0", drivers=("virtio_gpu", "virtio-pci"), card=card, dma_mask_bits=64
    )


STRIDE = Constraints(stride_alignment=256)


@pytest.mark.parametrize(
    ("match", "one", "fits"),
    [
        (Match(driver=("amdgpu",)), device("amdgpu"), True),
        (Match(driver=("amdgpu",)), device("amdgpu2"), False),
        (Match(driver=("amdgpu",)), device(), False),
        (Match(driver=("amd*", "radeon")), device("radeon"), True),
        (Match(driver=("uvcvideo",)), device("xhci_hcd", drivers=("uvcvideo", "usb", "xhci_hcd")), True),
        (Match(driver=("xhci_hcd",)), device("xhci_hcd", drivers=("uvcvideo", "usb", "xhci_hcd")), True),
        (Match(subsystem=("video4linux",)), device(), True),
        (Match(subsystem=("platform",)), device(), True),
        (Match(subsystem=("drm",)), device(), False),
        (Match(subsystem=("platform",), name=("vgem",)), device(name="vgem"), True),
        (Match(subsystem=("platform", "faux"), name=("vgem",)), device(bus="faux", name="vgem"), True),
        (Match(subsystem=("video4linux",), name=("video?",)), device(), True),
        # Both of one device: video0 is no platform device.
        (Match(subsystem=("platform",), name=("video0",)), device(), False),
        (Match(modalias=("of:*Cbrcm,bcm2711-vc5*",)), device(modalias="of:NgpuT(null)Cbrcm,bcm2711-vc5"), True),
        (Match(modalias=("of:*Cbrcm,bcm2711-vc5*",)), device(modalias="of:NgpuT(null)Cbrcm,bcm2712-vc6"), False),
        (Match(modalias=("*",)), device(), False),
        (Match(property={"ID_VENDOR_ID": ("046d",)}), device(properties={"ID_VENDOR_ID": "046d"}), True),
        (Match(property={"ID_VENDOR_ID": ("046d",)}), device(properties={"ID_VENDOR_ID": "1234"}), False),
        (Match(property={"ID_VENDOR_ID": ("*",)}), device(), False),
        (Match(driver=("a",), property={"X": ("1",)}), device("a"), False),
        (Match(driver=("a",), iommu=True), device("a", iommu_group="1", iommu_type="DMA-FQ"), True),
        (Match(driver=("a",), iommu=True), device("a", iommu_group="1", iommu_type="identity"), False),
        (Match(driver=("a",), iommu=False), device("a", iommu_group="1", iommu_type="DMA"), False),
        # What is not known does not lift a demand.
        (Match(driver=("a",), iommu=False), device("a", iommu_group="1"), True),
        (Match(driver=("a",), iommu=False), device("a"), True),
        (Match(driver=("a",), kernel=Kernels((6, 11), (6, 16))), device("a"), True),
        (Match(driver=("a",), kernel=Kernels((6, 13))), device("a"), False),
        (Match(driver=("a",), kernel=Kernels(None, LTS)), device("a"), False),
        (Match(driver=("a",), kernel=Kernels(LTS)), device("a"), True),
    ],
)
def test_an_entry_is_for_the_devices_that_fit_all_of_it(match: Match, one: Device, fits: bool) -> None:
    assert describe(one, Entry(match, "somewhere", STRIDE)).constraints == (STRIDE if fits else NONE)


@pytest.mark.parametrize(
    ("value", "label", "fits"),
    [
        ("0,1,0,0", "vivid-001-vid-cap", True),
        ("0,1,0,0", "vivid-000-vid-cap", False),
        ("0,1,0,0", "vivid-002-radio-rx", False),
        ("0,1", "vivid-007-vid-cap", False),
        ("1,1", "somebody's own name", False),
        ("1", "anything", True),
        ("0", "vivid-001-vid-cap", False),
        (None, "vivid-001-vid-cap", False),
    ],
)
def test_of_a_list_of_parameters_the_instances_counts(value: str | None, label: str, fits: bool) -> None:
    entry = read_one(
        """
        [[device]]
        match = { driver = "vivid", parameter = { allocators = "1" }, instance = "^vivid-(\\\\d+)-" }
        constraints = { contiguous = true }
        source = "x"
        """
    )
    one = device("vivid", label=label, parameters={} if value is None else {"allocators": value})
    assert describe(one, entry).constraints.contiguous is fits
    assert Database([entry], LTS).parameters == {"allocators"}


def test_what_several_entries_say_is_merged_and_each_key_has_its_source() -> None:
    entries = [
        Entry(Match(driver=("a",)), "here", Constraints(stride_alignment=64, tail_padding=64)),
        Entry(Match(subsystem=("platform",)), "there", Constraints(stride_alignment=96)),
        Entry(Match(driver=("b",)), "elsewhere", Constraints(max_segments=1)),
    ]
    described = describe(device("a"), *entries)
    assert described.constraints == Constraints(stride_alignment=192, tail_padding=64)
    assert described.sources == {"stride_alignment": "here and there", "tail_padding": "here"}
    assert replace(described, constraints=NONE, sources={}) == device("a")


def test_nothing_is_known_of_a_device_that_no_entry_is_for() -> None:
    assert describe(device("a"), Entry(Match(driver=("b",)), "here", STRIDE)) == device("a")


@pytest.mark.parametrize(
    ("facts", "bits"),
    [
        ({"dma_mask_bits": 32}, 32),
        ({"dma_mask_bits": 32, "iommu_group": "3", "iommu_type": "identity"}, 32),
        ({"dma_mask_bits": 32, "iommu_group": "3"}, 32),
        ({"dma_mask_bits": 32, "iommu_group": "3", "iommu_type": "DMA"}, None),
        ({"dma_mask_bits": 64}, None),
        ({}, None),
    ],
)
def test_a_dma_mask_counts_where_no_iommu_translates(facts: dict[str, Any], bits: int | None) -> None:
    described = describe(device("a", "pci", "0000:00:02.0", **facts))
    assert described.constraints == Constraints(address_bits=bits)
    if bits is not None:
        assert described.sources["address_bits"].startswith(f"sysfs: dma_mask_bits {bits} of pci:0000:00:02.0")


def test_it_does_not_for_a_driver_that_reaches_memory_by_the_cpu() -> None:
    camera = device("xhci_hcd", "pci", "0000:00:14.0", drivers=("uvcvideo", "xhci_hcd"), dma_mask_bits=32)
    assert describe(camera, Entry(Match(driver=("uvcvideo",)), "here", by_cpu=True)).constraints == NONE
    assert describe(camera, Entry(Match(driver=("gspca",)), "here", by_cpu=True)).constraints.address_bits == 32


def test_a_device_that_takes_only_its_own_memory_names_its_card() -> None:
    entry = Entry(Match(driver=("virtio_gpu",)), "here", own_only=True)
    described = describe(virtio_gpu("card1"), entry)
    assert described.constraints == Constraints(allocators=frozenset({"dumb:card1"}))
    assert described.sources == {"allocators": "here"}
    assert describe(virtio_gpu(None), entry).constraints == NONE


def test_entries_that_contradict_each_other_are_refused_with_both_sources() -> None:
    entries = [
        Entry(Match(driver=("a",)), "here", Constraints(allocators=frozenset({"udmabuf"}))),
        Entry(Match(driver=("a",)), "there", Constraints(allocators=frozenset({"heap:*"}))),
    ]
    with pytest.raises(IncompatibleConstraints) as caught:
        describe(device("a"), *entries)
    assert (caught.value.field, caught.value.devices) == ("allocators", ("here", "there"))
    assert "what is known of /dev/video0 contradicts itself" in str(caught.value)


def test_dumb_buffers_are_as_the_first_entry_says() -> None:
    facts = DumbFacts(Cache.WRITE_COMBINE, contiguous=False, source="here")
    database = Database([Entry(Match(driver=("a",)), "nothing"), Entry(Match(driver=("a",)), "here", dumb=facts)], LTS)
    assert database.dumb_of(device("a")) == facts
    assert database.dumb_of(device("b")) is None


def test_kernels() -> None:
    assert kernel_version("6.12.107+deb13-amd64") == (6, 12)
    assert kernel_version("7.2-rc1") == (7, 2)
    assert parse_kernels(">=6.11, <6.16") == Kernels((6, 11), (6, 16))
    assert parse_kernels("<6.2") == Kernels(None, (6, 2))
    assert (6, 9) in parse_kernels("<6.10")  # numbers, not text
    for wrong in ("", "6.12", ">6.11", ">=6", ">=6.1,>=6.2", "<6.1,", ">=6.1.2"):
        with pytest.raises(ValueError, match="is no range of kernels"):
            parse_kernels(wrong)


# ---- files --------------------------------------------------------------------------------------------------------


def read_one(text: str) -> Entry:
    return loader.entry_of(tomllib.loads(text)["device"][0])


ENTRY = """
[[device]]
match = { driver = "a" }
constraints = { stride_alignment = %d }
source = "here"
"""


def write(directory: Path, name: str, text: str) -> None:
    path = directory / "devices.d" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_files_of_all_places_count_and_one_in_etc_hides_its_namesake(tmp_path: Path) -> None:
    directories = etc, run, lib = [tmp_path / name for name in ("etc", "run", "lib")]
    assert loader.load(directories).describe(device("a")).constraints == NONE
    write(lib, "10.toml", ENTRY % 3)
    write(lib, "20.toml", ENTRY % 5)
    write(lib, "30.toml", ENTRY % 7)
    write(run, "20.toml", ENTRY % 11)
    write(run, "30.toml", ENTRY % 13)
    write(etc, "30.toml", ENTRY % 17)
    write(etc, "40.toml.bak", ENTRY % 19)
    stride = loader.load(directories).describe(device("a")).constraints.stride_alignment
    assert stride == 3 * 11 * 17
    write(etc, "30.toml", "")  # hides, and says nothing itself
    assert loader.load(directories).describe(device("a")).constraints.stride_alignment == 3 * 11


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[device]\n", "Expected"),
        ("[[devices]]\n", "'devices' is not known; each entry is a table [[device]]"),
        ("device = 3\n", "device must be tables [[device]]"),
        ("device = [3]\n", "entry 1: device: must be a table"),
        ('[[device]]\nmatch = { driver = "a" }\n', "entry 1 (a): source: must say where this is known from"),
        ('[[device]]\nmatch = { driver = "a" }\nsource = []\n', "entry 1 (a): source: must say"),
        ('[[device]]\nmatch = { driver = "a" }\nsource = " "\n', "entry 1 (a): source: must be text"),
        ('[[device]]\nsource = "x"\n', "entry 1: match: must name devices by driver, subsystem"),
        ('[[device]]\nsource = "x"\nmatch = { iommu = true }\n', "entry 1: match: must name devices"),
        ('[[device]]\nsource = "x"\nmatch = { drivers = "a" }\n', "match.drivers: is not one of the keys driver,"),
        ('[[device]]\nsource = "x"\nmatch = { driver = 3 }\n', "match.driver: must be text"),
        ('[[device]]\nsource = "x"\nmatch = { name = "b", driver = [] }\n', "entry 1 (b): match.driver: must have at"),
        ('[[device]]\nsource = "x"\nmatch = { property = "b" }\n', "match.property: must be a table"),
        ('[[device]]\nsource = "x"\nmatch = { property = { K = 1 } }\n', "match.property.K: must be text"),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a", iommu = 1 }\n', "match.iommu: must be true or false"),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a", kernel = "6" }\n', "match.kernel: '6' is no range of"),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a", instance = "(" }\n', "match.instance: missing )"),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a", instance = "a" }\n', "match.instance: must have one"),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a" }\nby_cpu = "yes"\n', "by_cpu: must be true or false"),
        (
            '[[device]]\nsource = "x"\nmatch = { driver = "a" }\nconstraint = {}\n',
            "constraint: is not one of the keys",
        ),
        ('[[device]]\nsource = "x"\nmatch = { driver = "a" }\nconstraints = 3\n', "constraints: must be a table"),
        (
            '[[device]]\nsource = "x"\nmatch = { driver = "a" }\nconstraints = { align = 3 }\n',
            "constraints.align",
        ),
        (
            '[[device]]\nsource = "x"\nmatch = { driver = "a" }\nconstraints = { segment_boundary = 3 }\n',
            "constraints.segment_boundary",
        ),
        (
            '[[device]]\nsource = "x"\nmatch = { driver = "a" }\ndumb = { cache = "cached" }\n',
            "dumb.contiguous: is missing",
        ),
        (
            '[[device]]\nsource = "x"\nmatch = { driver = "a" }\ndumb = { cache = "hot", contiguous = true }\n',
            "dumb.cache: must be one of cached,",
        ),
        (ENTRY % 2 + '[[device]]\nmatch = { name = "n" }\n', "entry 2 (n): source:"),
    ],
)
def test_what_is_wrong_is_named_with_file_entry_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    write(tmp_path, "x.toml", text)
    with pytest.raises(ConfigError) as caught:
        loader.load([tmp_path])
    assert complaint in str(caught.value)
    assert str(tmp_path / "devices.d/x.toml") in str(caught.value)


# ---- what is shipped ----------------------------------------------------------------------------------------------


@cache
def entries_shipped() -> dict[str, Entry]:
    """Every entry, by its file and number."""
    return {
        f"{path.name}, entry {number}": entry
        for path in sorted(SHIPPED.glob("*.toml"))
        for number, entry in enumerate(loader.read(path), 1)
    }


def shipped(kernel: tuple[int, int] = LTS) -> Database:
    return Database(entries_shipped().values(), kernel)


IOMMU: dict[str, Any] = {"iommu_group": "7", "iommu_type": "DMA-FQ"}
VIVID_0: dict[str, Any] = {"label": "vivid-000-vid-cap", "parameters": {"allocators": "0,1,0,0"}}
VIVID_1: dict[str, Any] = {"label": "vivid-001-vid-cap", "parameters": {"allocators": "0,1,0,0"}}
ANY: dict[str, Any] = {}
RUN: dict[str, Any] = {"max_segments": 1, "contiguous": True}
BY_CPU_6_12 = {"allocators": ["dumb:*", "heap:*", "memfd", "udmabuf", "wrapped"]}
BY_CPU_6_14 = {"allocators": ["dumb:*", "heap:*", "memfd"]}
PI_4 = "of:NgpuT(null)Cbrcm,bcm2711-vc5"
PI_5 = "of:NgpuT(null)Cbrcm,bcm2712-vc6"


CASES: list[tuple[tuple[int, int], Device, dict[str, Any]]] = [
    (LTS, device("amdgpu", "pci", dma_mask_bits=44), {"address_bits": 44, "stride": 256, "height": 16}),
    (LTS, device("amdgpu", "pci", dma_mask_bits=44, **IOMMU), {"stride": 256, "height": 16}),
    (LTS, device("i915", "pci", dma_mask_bits=39, **IOMMU), ANY),
    (LTS, device("vc4-drm", modalias=PI_4), {"address_bits": 30, **RUN}),
    (LTS, device("vc4-drm", modalias=PI_5), RUN),
    (LTS, device("vc4-drm", modalias=PI_5, **IOMMU), ANY),
    (LTS, device("v3d"), {"size_alignment": 4096, "tail_padding": 64}),
    (LTS, device("unicam"), RUN),
    (LTS, device("pispbe"), {"address_bits": 36, **RUN}),
    (LTS, device("pispbe", **IOMMU), ANY),
    (LTS, device("hantro-vpu"), {"address_bits": 32, **RUN}),
    (LTS, device("rkvdec", **IOMMU), ANY),
    (LTS, device("rkvdec"), {"address_bits": 32, **RUN}),
    (LTS, device("rkisp1", modalias="of:NispT(null)Crockchip,rk3399-cif-isp"), {"address_bits": 32, **RUN}),
    (LTS, device("rkisp1", modalias="of:NispT(null)Cfsl,imx8mp-isp"), RUN),
    (LTS, device("rockchip-rga"), {"address_bits": 32}),
    (LTS, device("rockchip-drm"), ANY),
    *[
        (LTS, device(driver), {"address_bits": 32, **RUN})
        for driver in ("imx-drm", "imx-dcss", "mxsfb", "imx-lcdc", "imx7-csi", "pxp", "dw100", "coda", "mxc-jpeg")
    ],
    (LTS, device("imx-lcdif"), {"address_bits": 36, **RUN}),
    (LTS, device("mxc-isi"), {"address_bits": 36, **RUN}),
    (LTS, device("mxc-isi", **IOMMU), ANY),
    (LTS, device(name="vgem", modalias="platform:vgem", card="card0"), ANY),
    ((6, 15), device(bus="faux", name="vgem", card="card0"), ANY),
    ((6, 10), device("vivid", name="vivid.0", **VIVID_0), ANY),
    (LTS, device("vivid", name="vivid.0", **VIVID_0), BY_CPU_6_12),
    ((6, 14), device("vivid", name="vivid.0", **VIVID_0), BY_CPU_6_14),
    ((6, 16), device("vivid", name="vivid.0", **VIVID_0), ANY),
    (LTS, device("vivid", name="vivid.0", **VIVID_1), {"address_bits": 32, **RUN, **BY_CPU_6_12}),
    ((6, 14), device("vivid", name="vivid.0", **VIVID_1), {"address_bits": 32, **RUN, **BY_CPU_6_14}),
    ((7, 2), device("vivid", name="vivid.0", **VIVID_1), {"address_bits": 32, **RUN}),
    (LTS, device("vimc", name="vimc.0", parameters={"allocator": "0"}), BY_CPU_6_12),
    ((6, 14), device("vimc", name="vimc.0", parameters={"allocator": "0"}), BY_CPU_6_14),
    ((6, 14), device("udl", "usb"), BY_CPU_6_14),
    ((6, 15), device(bus="faux", name="vkms"), BY_CPU_6_14),
    (LTS, device("vimc", name="vimc.0", parameters={"allocator": "1"}), {"address_bits": 32, **RUN}),
    (LTS, virtio_gpu("card1"), {"allocators": ["dumb:card1"]}),
    ((6, 14), virtio_gpu("card1"), ANY),
    (
        LTS,
        device("bochs-drm", "pci", "0000:00:05.0", card="card2", dma_mask_bits=32),
        {"allocators": ["dumb:card2"]},
    ),
    *[
        (
            kernel,
            device("xhci_hcd", "pci", "0000:00:14.0", drivers=("uvcvideo", "usb", "xhci_hcd"), dma_mask_bits=32),
            expected,
        )
        for kernel, expected in [
            ((6, 10), ANY),
            ((6, 11), BY_CPU_6_12),
            (LTS, BY_CPU_6_12),
            ((6, 13), BY_CPU_6_14),
            ((6, 15), BY_CPU_6_14),
            ((6, 16), ANY),
            ((7, 2), ANY),
        ]
    ],
    *[
        (LTS, device(driver), BY_CPU_6_12)
        for driver in ("vim2m", "vicodec", "visl", "simple-framebuffer", "of-display", "gud", "udl", "hyperv_drm")
    ],
    *[(LTS, device(driver, "pci", dma_mask_bits=32), BY_CPU_6_12) for driver in ("cirrus", "ast", "mgag200")],
    (LTS, device("gm12u320", "usb"), BY_CPU_6_12),
    (LTS, device(name="vkms"), BY_CPU_6_12),
]


@pytest.mark.parametrize(("kernel", "one", "expected"), CASES)
def test_what_is_shipped_is_right_for(kernel: tuple[int, int], one: Device, expected: dict[str, Any]) -> None:
    names = {"stride": "stride_alignment", "height": "height_alignment"}
    described = shipped(kernel).describe(one)
    assert described.constraints.values() == {names.get(key, key): value for key, value in expected.items()}
    assert described.sources.keys() == described.constraints.values().keys()


@pytest.mark.parametrize(
    ("one", "cache", "contiguous"),
    [
        (device(name="vgem"), "write-combine", False),
        (virtio_gpu(None), "cached", False),
        (device("vc4-drm"), "write-combine", True),
        (device("imx-drm"), "write-combine", True),
        (device("imx-lcdif"), "write-combine", True),
        (device("bochs-drm", "pci"), None, None),
        (device("amdgpu", "pci"), None, None),
    ],
)
def test_dumb_buffers_that_are_known(one: Device, cache: str | None, contiguous: bool | None) -> None:
    facts = shipped().dumb_of(one)
    assert (facts and facts.cache, facts and facts.contiguous) == (cache, contiguous)


def test_each_entry_that_is_shipped_is_met_by_a_device_above() -> None:
    for where, entry in entries_shipped().items():
        assert any(entry.match.fits(one, kernel) for kernel, one, _ in CASES), where
        assert entry.constraints != NONE or entry.by_cpu or entry.own_only or entry.dumb, where


def test_there_are_sources_that_a_person_can_look_up() -> None:
    assert len(entries_shipped()) >= 30
    for where, entry in entries_shipped().items():
        assert "https://" in entry.source or "Linux 6." in entry.source, where
