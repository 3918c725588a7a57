# SPDX-License-Identifier: MIT
"""What the service decides: layouts, limits, allocators, buffers, holders. Knows neither D-Bus nor systemd."""
