# SPDX-License-Identifier: MIT
"""Command line of the daemon: arguments, logging, configuration, and how it ends."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from udmabufd.app import App, BusLost
from udmabufd.config import Config, ConfigError, load
from udmabufd.core.events import Event, emit
from udmabufd.system import hardening, logcontrol
from udmabufd.system.store_capacity import StoreError
from udmabufd.system.watchdog import WatchdogError
from udmabufd_base.errors import BusError

log = logging.getLogger("udmabufd")

EXIT_FAILURE = 1
EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h, which systemd shows as CONFIG."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; udmabufd(8) is made from it."""
    parser = argparse.ArgumentParser(
        prog="udmabufd",
        description="Allocate dma-bufs for the programs of this machine: create sealed memfds, export them through "
        "/dev/udmabuf, and hand out the file descriptors over D-Bus.",
        epilog="Usually started by systemd or, through its bus name org.udmabufd.Allocator1, by its first client. "
        "Without /dev/udmabuf it serves kind=memfd and waits for the device.",
    )
    parser.add_argument(
        "--bus",
        metavar="ADDRESS",
        default="system",
        help="bus to serve on: 'system' (default), 'session', or a D-Bus address, for development",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="read this file alone instead of udmabufd.toml and its drop-ins; see udmabufd.toml(5)",
    )
    parser.add_argument(
        "--log-level",
        metavar="LEVEL",
        choices=logcontrol.LEVELS,
        help="emerg, alert, crit, err, warning, notice, info (default) or debug; $SYSTEMD_LOG_LEVEL does the same",
    )
    return parser


def main() -> int:
    """Run the daemon; return its exit status."""
    arguments = make_parser().parse_args()
    log_control = logcontrol.LogControl(arguments.log_level)
    for line in hardening.apply():
        log.info("%s", line)
    try:
        config = load(arguments.config)
    except ConfigError as error:
        log.critical("%s", error)
        return EXIT_CONFIG
    try:
        asyncio.run(_run(config, log_control, arguments.bus))
    except StoreError as error:
        emit(log, Event.CONFIGURATION_TOO_LARGE, reason=str(error))
        return EXIT_CONFIG
    except (BusLost, BusError, OSError, ValueError, WatchdogError) as error:
        log.critical("%s", error)
        return EXIT_FAILURE
    return 0


async def _run(config: Config, log_control: logcontrol.LogControl, address: str) -> None:
    await App(config, log_control).run(address)


if __name__ == "__main__":
    sys.exit(main())
