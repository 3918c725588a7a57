# SPDX-License-Identifier: MIT
"""Names of applications from control groups: those that launchers make, and those that somebody hostile makes."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from udmabufd.core.application import MAX_NAME, application_of

USER = "/user.slice/user-1000.slice/user@1000.service"
UUID = "4706fe54-7802-4808-aa7e-ae8b567239e0"


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        # Flatpak
        (f"{USER}/app.slice/app-flatpak-org.telegram.desktop-12345.scope", "flatpak:org.telegram.desktop"),
        (f"{USER}/app.slice/app-flatpak-org.telegram.desktop@12345.service", "flatpak:org.telegram.desktop"),
        (f"{USER}/app.slice/app-flatpak-org.example.My\\x2dApp-1.scope", "flatpak:org.example.My-App"),
        # Snap
        (f"{USER}/app.slice/snap.firefox.firefox-{UUID}.scope", "snap:firefox"),
        (f"{USER}/app.slice/snap.foo_two.bar.{UUID}.scope", "snap:foo_two"),
        ("/system.slice/snap.lxd.daemon.service", "snap:lxd"),
        # systemd.io/DESKTOP_ENVIRONMENTS, its own examples and the earlier draft's
        (f"{USER}/app.slice/app-gnome-org.gnome.Evince@12345.service", "org.gnome.Evince"),
        (f"{USER}/app.slice/app-KDE-org.kde.okular@12345.service", "org.kde.okular"),
        (f"{USER}/app.slice/app-org.kde.amarok.service", "org.kde.amarok"),
        (f"{USER}/app.slice/app-org.gnome.Evince-12345.scope", "org.gnome.Evince"),
        (f"{USER}/app.slice/app-gnome-org.gnome.Evince-12345.service", "org.gnome.Evince"),
        (f"{USER}/app.slice/app-org.kde.okular-{UUID.replace('-', '')}.service", "org.kde.okular"),
        (f"{USER}/app.slice/app-gnome-firefox\\x2desr-4711.scope", "firefox-esr"),
        (f"{USER}/app.slice/app-gnome-firefox-esr-4711.scope", "firefox-esr"),
        (f"{USER}/app.slice/app-gnome-caf\\x2dbar@autostart.service", "caf-bar"),
        (f"{USER}/app.slice/app-KDE-foo.slice/app-KDE-foo-1.scope/sub/group", "foo"),
        # Started by dbus-broker
        (f"{USER}/app.slice/a.slice/dbus-:1.2-org.gnome.Nautilus@0.service", "org.gnome.Nautilus"),
        # Other services keep their names
        ("/system.slice/foo@1.service", "foo@1.service"),
        ("/system.slice/system-foo.slice/foo@1.service", "foo@1.service"),
        ("/system.slice/pipewire.service/sub", "pipewire.service"),
        (f"{USER}/session.slice/org.gnome.Shell@wayland.service", "org.gnome.Shell@wayland.service"),
        (f"{USER}/init.scope", "init"),
        (USER, "user@1000.service"),
        # Other scopes lose their numbers
        ("/user.slice/user-1000.slice/session-3.scope", "session"),
        ("/user.slice/user-120.slice/session-c1.scope", "session"),
        (f"{USER}/app.slice/vte-spawn-{UUID}.scope", "vte-spawn"),
        (f"{USER}/app.slice/run-u12.scope", "run"),
        (f"{USER}/app.slice/run-r{UUID.replace('-', '')}.scope", "run"),
        (f"{USER}/app.slice/run-p1234-i5678.scope", "run"),
        ("/machine.slice/machine-debian.scope/payload/system.slice/x.service", "machine-debian"),
        # A part that has the name of one of the kernel's files
        ("/system.slice/_memory.service", "memory.service"),
        # Not of systemd's making, or nothing at all
        ("/", ""),
        ("", ""),
        ("/system.slice", ""),
        ("/docker/0123456789abcdef", ""),
        ("/../../foo", ""),
        (f"{USER}/app.slice/app with blanks.scope", ""),
    ],
)
def test_names(cgroup: str, name: str) -> None:
    assert application_of(cgroup) == name


def test_a_container_keeps_its_id_as_far_as_it_fits() -> None:
    names = {application_of(f"/system.slice/docker-{'0' * 63}{digit}.scope") for digit in "ab"}
    assert len(names) == 2
    assert {len(name) for name in names} == {MAX_NAME}


@pytest.mark.parametrize(
    "escaped", [r"\x0a", r"\x1b", r"\x20", r"\x7f", r"\x00", r"\xc3\xa9", r"\xff", r"\xe2\x80\xae"]
)
def test_what_is_not_printable_is_replaced(escaped: str) -> None:
    name = application_of(f"{USER}/app.slice/app-gnome-a{escaped}b-1.scope")
    assert re.fullmatch(r"a\?+b~[0-9a-f]{8}", name)


def test_two_that_look_alike_stay_two() -> None:
    names = {application_of(f"{USER}/app.slice/app-gnome-a\\x0{digit}b-1.scope") for digit in range(8)}
    assert len(names) == 8


UNITS = st.from_regex(r"\A(app-|app-flatpak-|snap\.|dbus-:1\.2-|user@|_)?.{0,100}\.(scope|service|slice|socket)\Z")


@given(
    st.one_of(
        st.text(),
        st.lists(UNITS, max_size=5).map("/".join),
        st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")),
    )
)
@example("/\ud800.service")
@example("/app-.scope")
@example("/app--.service")
@example("/-1.scope")
@example("/.service")
@example("/" + "\\x41" * 10_000 + ".service")
def test_any_path_has_a_short_printable_name(cgroup: str) -> None:
    name = application_of(cgroup)
    assert len(name) <= MAX_NAME
    assert all("\x21" <= char <= "\x7e" for char in name)
    assert application_of(cgroup) == name
