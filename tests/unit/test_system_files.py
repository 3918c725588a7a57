# SPDX-License-Identifier: MIT
"""The files that systemd, udev and the bus are given: checked by systemd's own tools and against the interface XML."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.tools import TOP, drop_in, needed
from udmabufd.config import OPTIONS
from udmabufd.system.store_capacity import SPARE_FDS, check_capacity, stored_fds
from udmabufd_client import contract

SYSTEMD = TOP / "systemd"
UNIT = SYSTEMD / "udmabufd.service.in"
SLICE = SYSTEMD / "udmabufd.slice"
HEAP_RULES = SYSTEMD / "00-udmabufd-heaps.rules"
POLICY = SYSTEMD / "dbus/org.udmabufd.Allocator1.conf"

EXPOSURE_LIMIT = 14
"""Of systemd-analyze security, times ten. ProtectProc=default is two of it: the daemon reads its callers' cgroups."""


def keys(text: str, section: str = "[Service]") -> dict[str, list[str]]:
    """Return the settings of a section with all their values, in order."""
    found: dict[str, list[str]] = {}
    at = ""
    for line in text.splitlines():
        if line.startswith("["):
            at = line
        elif at == section and line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit as systemd/install renders it, its executable in place."""
    executable = tmp_path / "lib/udmabufd/udmabufd"
    executable.parent.mkdir(parents=True)
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    (tmp_path / SLICE.name).write_text(SLICE.read_text())
    rendered = tmp_path / "udmabufd.service"
    rendered.write_text(UNIT.read_text().replace("@PREFIX@", str(tmp_path)))
    return rendered


def test_systemd_finds_no_fault_in_the_unit(unit: Path) -> None:
    done = subprocess.run(
        [needed("systemd-analyze"), "verify", "--man=no", unit, unit.with_name(SLICE.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_the_units_exposure(unit: Path) -> None:
    command = [needed("systemd-analyze"), "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE_LIMIT}"]
    done = subprocess.run([*command, unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The threshold is looked at: one that no unit reaches fails.
    assert subprocess.run([*command[:-1], "--threshold=0", unit], capture_output=True, check=False).returncode == 1


def test_the_drop_in_for_cards(unit: Path) -> None:
    with_cards = drop_in(UNIT, "[Unit]")
    assert keys(with_cards) == {"DeviceAllow": ["char-drm rw"], "SupplementaryGroups": ["video"]}
    # The manual page has the same one.
    in_page = drop_in(SYSTEMD / "man/udmabufd.8.md", "[Unit]")
    assert keys(in_page) == keys(with_cards)
    assert keys(in_page, "[Unit]") == keys(with_cards, "[Unit]")
    # Without PID 1 no drop-in is read: the unit file itself may have a section twice.
    unit.write_text(f"{unit.read_text()}\n{with_cards}")
    test_systemd_finds_no_fault_in_the_unit(unit)
    test_the_units_exposure(unit)


def test_settings_of_the_unit_are_sorted() -> None:
    found = list(keys(UNIT.read_text()))
    assert found == sorted(found, key=str.casefold)


def test_the_unit_can_serve_what_the_configuration_allows() -> None:
    settings = keys(UNIT.read_text())
    (max_buffers,) = (option.default for option in OPTIONS if option.key == "max_buffers")
    assert isinstance(max_buffers, int)
    # Neither a number too few, at which the daemon refuses to start, nor one that says something else than it needs.
    assert settings["FileDescriptorStoreMax"] == [str(stored_fds(max_buffers))]
    assert settings["LimitNOFILE"] == [str(stored_fds(max_buffers) + SPARE_FDS)]
    check_capacity(max_buffers, {"FDSTORE": settings["FileDescriptorStoreMax"][0]}, int(settings["LimitNOFILE"][0]))
    # /proc/meminfo, /proc/zoneinfo and /proc/cmdline, /dev/udmabuf, heaps, udev's events.
    assert "ProcSubset" not in settings
    # The ioctls of both need no more than to read; cards are for a drop-in.
    assert settings["DeviceAllow"] == ["char-dma_heap r", "char-misc r"]
    assert settings["DevicePolicy"] == ["closed"]
    assert not {"PrivateDevices", "PrivateNetwork", "PrivateUsers"} & settings.keys()
    assert settings["RestrictAddressFamilies"] == ["AF_UNIX AF_NETLINK"]
    # /proc/PID/cgroup of its callers.
    assert settings["ProtectProc"] == ["default"]


def test_the_unit_gives_nothing_up_that_is_stored() -> None:
    text = UNIT.read_text()
    settings = keys(text)
    # A service that systemd gives up loses its store.
    assert keys(text, "[Unit]")["StartLimitIntervalSec"] == ["0"]
    assert settings["Restart"] == ["always"]
    assert not settings.keys() & {"RestartPreventExitStatus", "SuccessExitStatus", "FileDescriptorStorePreserve"}
    # A child that fills memory is killed, and the service goes on.
    assert settings["OOMPolicy"] == ["continue"]


def test_the_limit_of_memory_is_the_slices() -> None:
    assert keys(UNIT.read_text())["Slice"] == [SLICE.name]
    assert keys(SLICE.read_text(), "[Slice]") == {"MemoryAccounting": ["yes"], "MemoryMax": ["50%"]}
    # In the service's own cgroup, which is made anew at each start, it would not count what survived one.
    assert not [key for key in keys(UNIT.read_text()) if key.startswith("Memory") and key.endswith(("Max", "High"))]


def test_names_agree() -> None:
    settings = keys(UNIT.read_text())
    assert settings["BusName"] == [contract.BUS_NAME]
    user = settings["User"][0]
    sysusers = [line.split() for line in (SYSTEMD / "udmabufd.sysusers").read_text().splitlines() if line[:1] != "#"]
    assert [fields[:2] for fields in sysusers] == [["u", user], ["g", settings["SupplementaryGroups"][0]]]
    rule = [line for line in (SYSTEMD / "51-udmabufd.rules").read_text().splitlines() if line[:1] != "#"]
    assert rule == [f'SUBSYSTEM=="misc", KERNEL=="udmabuf", GROUP="{settings["SupplementaryGroups"][0]}", MODE="0660"']
    # A user that sysusers makes has a group of the same name. No mode: a later rule that names a group keeps udev's.
    heaps = [line for line in HEAP_RULES.read_text().splitlines() if line[:1] != "#"]
    assert heaps == [f'SUBSYSTEM=="dma_heap", GROUP="{user}"']
    assert ElementTree.parse(POLICY).find(f"policy[@user='{user}']/allow[@own='{contract.BUS_NAME}']") is not None
    activation = configparser.ConfigParser(interpolation=None)
    activation.optionxform = str  # type: ignore[assignment,method-assign]
    activation.read(SYSTEMD / "dbus/org.udmabufd.Allocator1.service")
    service = activation["D-BUS Service"]
    assert service["Name"] == contract.BUS_NAME
    # What the bus starts is the alias that `systemctl enable` makes.
    assert f"Alias={service['SystemdService']}" in UNIT.read_text().splitlines()


def members(interface: str) -> set[tuple[str, str]]:
    document = ElementTree.fromstring(contract.interface_xml(interface))
    return {
        (element.get("name", ""), member.get("name", ""))
        for element in document.iter("interface")
        for member in element.iter("method")
    }


def test_the_policy_allows_each_member_and_no_other() -> None:
    policy = ElementTree.parse(POLICY).getroot()
    rules: dict[str, list[dict[str, str]]] = {}
    for element in policy:
        assert element.tag == "policy"
        (who,) = element.items()
        assert all(rule.tag == "allow" for rule in element)
        rules["=".join(who)] = [dict(rule.items()) for rule in element]
    assert rules.keys() == {"user=udmabufd", "context=default", "user=root"}
    # How many descriptors the bus holds for a client that does not read its replies.
    stats = {
        "send_destination": "org.freedesktop.DBus",
        "send_interface": "org.freedesktop.DBus.Debug.Stats",
        "send_member": "GetConnectionStats",
    }
    assert rules["user=udmabufd"] == [{"own": contract.BUS_NAME}, stats]

    def allowed(who: str) -> list[tuple[str, str]]:
        for rule in rules[who]:
            assert rule.keys() == {"send_destination", "send_interface", "send_member"}
            assert rule["send_destination"] == contract.BUS_NAME
        return [(rule["send_interface"], rule["send_member"]) for rule in rules[who]]

    everyone, root = allowed("context=default"), allowed("user=root")
    assert len(set(everyone)) == len(everyone)
    served = set().union(*(members(path.stem) for path in (SYSTEMD / "interfaces").glob("*.xml")))
    write = {("org.freedesktop.DBus.Properties", "Set")}
    assert set(everyone) == served - write
    assert set(root) == write


def test_each_interface_is_in_a_file_of_its_name() -> None:
    for path in (SYSTEMD / "interfaces").glob("*.xml"):
        (element,) = ElementTree.parse(path).getroot().iter("interface")
        assert element.get("name") == path.stem


def test_a_wheel_carries_the_interfaces(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    for name in ("daemon", "client", "systemd"):
        shutil.copytree(TOP / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [needed("python3"), "-m", "pip"]
    done = subprocess.run(
        [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("udmabufd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for path in (SYSTEMD / "interfaces").glob("*.xml"):
            assert archive.read(f"udmabufd_client/interfaces/{path.name}") == path.read_bytes()
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if "." not in name} == {"udmabufd", "udmabufd_base", "udmabufd_client"}
