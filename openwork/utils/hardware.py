"""What a measured number belongs to: the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name, family and model: /proc/cpuinfo knows more than the standard library does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in known.items()}
    name, family, model = (values.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} family {family} model {model}"
