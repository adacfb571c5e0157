"""What a measured number belongs to: the processor."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """The processor's name: /proc/cpuinfo knows more than the standard library does."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """The processor's name, family and model."""
    info = _cpuinfo()
    if not info:
        return cpu_name()
    name, family, model = (info.get(key, "?") for key in ("model name", "cpu family", "model"))
    return f"{name} family {family} model {model}"


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
