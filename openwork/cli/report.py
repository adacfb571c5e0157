"""The command `openwork report`: report.html of a run or a comparison, built again."""

from __future__ import annotations

from pathlib import Path


def report(words: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: openwork report RUN\n\nRebuild report.html of a run directory or of a comparison's directory.")
        return 0 if words and words[0] in ("-h", "--help") else 2
    from openwork.recipes.report import write_report

    print(f"report: {write_report(Path(words[0])).resolve()}")
    return 0
