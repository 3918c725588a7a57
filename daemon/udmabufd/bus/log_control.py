# SPDX-License-Identifier: MIT
"""org.freedesktop.LogControl1: what `systemctl service-log-level udmabufd debug` talks to."""

from __future__ import annotations

from typing import Protocol

from udmabufd.bus.objects import Exported
from udmabufd_client.contract import LOG_CONTROL_INTERFACE


class LogSettings(Protocol):
    """Level and target of the log, by systemd's names; setting one raises ValueError for another name."""

    level: str
    target: str

    @property
    def identifier(self) -> str:
        """What the log calls this program."""


def log_control(settings: LogSettings) -> Exported:
    """Return the interface for these settings."""

    def set_level(value: str) -> None:
        settings.level = value

    def set_target(value: str) -> None:
        settings.target = value

    return Exported(
        LOG_CONTROL_INTERFACE,
        getters={
            "LogLevel": lambda _: settings.level,
            "LogTarget": lambda _: settings.target,
            "SyslogIdentifier": lambda _: settings.identifier,
        },
        setters={"LogLevel": set_level, "LogTarget": set_target},
    )
