# SPDX-License-Identifier: MIT
"""Shows the service manager that the event loop turns and that the service can still serve.

A pulse at half the time that WatchdogSec= allows, sent from the loop after a check. What the check looks at is left to
the caller; that the service is killed and started again when the pulse stays out is the service manager's part.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .notify import Notifier

    Check = Callable[[], str | None]

log = logging.getLogger(__name__)

MIN_USEC: Final = 2_000_000
"""Least WatchdogSec= that is taken: below it a short stall of a busy machine would kill a healthy service."""


class WatchdogError(ValueError):
    """WatchdogSec= cannot be served; the message says what to change."""


def timeout_from_environment(environ: Mapping[str, str] | None = None) -> float | None:
    """Return the seconds after which the service manager loses patience, None when it does not watch this process.

    From $WATCHDOG_USEC and $WATCHDOG_PID, see sd_watchdog_enabled(3). Raises WatchdogError.
    """
    variables = os.environ if environ is None else environ
    text = variables.get("WATCHDOG_USEC", "")
    if not text:
        return None
    if variables.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for another process of the service
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise WatchdogError(f"WATCHDOG_USEC is not a number of microseconds: {text!r}")
    usec = int(text)
    if usec < MIN_USEC:
        raise WatchdogError(
            f"WatchdogSec= is {usec / 1_000_000:g} s; set it to {MIN_USEC // 1_000_000} s or more, or to 0"
        )
    return usec / 1_000_000


class Watchdog:
    """Pulses as long as the check finds nothing wrong; a context manager, to be entered on the event loop."""

    def __init__(self, notifier: Notifier, check: Check, timeout: float | None) -> None:
        """`timeout`: seconds, as the service manager has it (timeout_from_environment); None: it does not watch.

        `check` answers None, or one sentence on what is wrong. It runs on the loop and must not wait for anything.
        """
        self._notifier = notifier
        self._check = check
        self._pulse_every = None if timeout is None else timeout / 2
        self._timer: asyncio.TimerHandle | None = None
        self._complaint: str | None = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def start(self) -> None:
        """Pulse now and from now on. Harmless when repeated."""
        if self._pulse_every is not None and self._timer is None:
            log.info("Watchdog enabled, a pulse every %g s", self._pulse_every)
            self._pulse(asyncio.get_running_loop(), self._pulse_every)

    def stop(self) -> None:
        """Pulse no more. Harmless when repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _pulse(self, loop: asyncio.AbstractEventLoop, every: float) -> None:
        # First of all: a check that raises must not end the pulses of a service that recovers.
        self._timer = loop.call_later(every, self._pulse, loop, every)
        try:
            complaint = self._check()
        except Exception as error:
            log.exception("The watchdog's check failed")
            complaint = f"the check failed: {type(error).__name__}"
        if complaint is None:
            if self._complaint is not None:
                log.info("The watchdog's check passes again")
            self._notifier.watchdog()
        elif complaint != self._complaint:
            log.error("No watchdog pulse: %s", complaint)
        self._complaint = complaint
