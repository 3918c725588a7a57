# SPDX-License-Identifier: MIT
"""The side towards systemd: notifications, watchdog, journal, udev's devices, what the process gives up by itself."""
