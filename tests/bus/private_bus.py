# SPDX-License-Identifier: MIT
"""PrivateBus: a dbus-daemon of a test's own, with the rules and the compiled-in limits of a system bus.

The policy file of the project is taken as it is; what a test adds to it is in plain sight. Who connects to the
bus is left to the test.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self
from xml.sax.saxutils import escape

PROJECT_POLICY: Final = Path(__file__).parents[2] / "systemd" / "dbus" / "org.udmabufd.Allocator1.conf"

# The default policy of /usr/share/dbus-1/system.conf. Without a <limit>, those that its comments name hold.
_CONFIG: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
    <deny send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"
          send_member="UpdateActivationEnvironment"/>
    <deny send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Debug.Stats"/>
  </policy>
  <policy user="root">
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Monitoring"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Debug.Stats"/>
  </policy>
{includes}
  <policy user="root">
    <allow own="org.udmabufd.Allocator1"/>
  </policy>
{extra_policy}
</busconfig>
"""


OPEN_POLICY: Final = """\
  <policy context="default">
    <allow own="*"/>
    <allow send_type="method_call"/>
  </policy>
"""
"""Anybody may own any name and call anybody."""


class PrivateBus:
    """A running dbus-daemon; a context manager. `address` is where it listens, `pid` its process.

    `policies` are busconfig files to include, by default that of the project. `extra_policy` is busconfig XML put
    after them, such as OPEN_POLICY for a test of connections rather than of policy.
    """

    def __init__(self, policies: Sequence[Path] | None = None, extra_policy: str = "") -> None:
        if policies is None:
            policies = [PROJECT_POLICY] if PROJECT_POLICY.exists() else []
        self._directory = Path(tempfile.mkdtemp(prefix="udmabufd-bus-"))
        # Clients of other users must reach the socket.
        self._directory.chmod(0o755)
        config = self._directory / "bus.conf"
        config.write_text(
            _CONFIG.format(
                socket=escape(str(self._directory / "socket")),
                includes="\n".join(f"  <include>{escape(str(path.resolve()))}</include>" for path in policies),
                extra_policy=extra_policy,
            )
        )
        self._log = (self._directory / "log").open("w+")
        self._config = config
        self.address = self._start()

    def _start(self) -> str:
        """Start the daemon; return where it listens."""
        ready, announce = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    "dbus-daemon",
                    f"--config-file={self._config}",
                    "--nofork",
                    "--nopidfile",
                    f"--print-address={announce}",
                ],
                pass_fds=[announce],
                stderr=self._log,
            )
        except BaseException:
            os.close(ready)
            self._remove()
            raise
        finally:
            os.close(announce)
        with open(ready) as announcement:
            address = announcement.readline().strip()
        if not address:
            status = self._process.wait()
            text = self.log()
            self._remove()
            raise RuntimeError(f"dbus-daemon exited with {status}: {text}")
        return address

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self._process.pid

    def log(self) -> str:
        """What the daemon has written to its standard error."""
        self._log.flush()
        return (self._directory / "log").read_text()

    def stop(self) -> None:
        """Freeze the daemon (SIGSTOP); returns once it has stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def cont(self) -> None:
        """Let a frozen daemon go on."""
        self._process.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, self.pid, os.WCONTINUED)

    def kill(self) -> None:
        """Kill the daemon (SIGKILL) and wait for its end."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill the daemon and start another that listens at the same path: to clients a bus with another id."""
        self.kill()
        (self._directory / "socket").unlink(missing_ok=True)
        self._start()

    def close(self) -> None:
        """Kill the daemon and remove its files; harmless a second time."""
        self.kill()
        self._remove()

    def _remove(self) -> None:
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
