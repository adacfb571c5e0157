"""`page.py RESULTS.json > docs/works-with.md`: the page from what the tests wrote (`make works-with`)."""

import json
import os
import platform
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ALWAYS = ("torch", "numpy")
HEAD = """# Works with

Made by `make works-with` from the results of tests; nothing here that no test ran. A line of "What works" is a test
that passed: a transformer of 12 blocks and a small residual network are trained for 20 steps with SR-STE at a decay of
0.5, so that a lost or multiplied term shows, and

- the weights end where the equations lead, written out in plain torch and run in fp32 in one process (the column
  *difference*: the largest of any weight, and the limit of the test; without the term every net ends at least ten times
  that limit away);
- each operand of each product, forward and backward, that has the shape of a sparse weight is 2:4;
- where *resumes* says exactly, a run stopped after 10 steps and resumed ends bit for bit as one that was not stopped.

Lines without a difference test something else, which they name.
"""


def page(results):
    """The page, in Markdown."""
    works = [each for each in results["rows"] if "error" not in each]
    fails = [each for each in results["rows"] if "error" in each]
    parts = [HEAD, f"Run with {versions(results['rows'])}, on {machine()}.\n", "## What works\n"]
    for group, rows in by_group(works).items():
        parts += [
            f"### {group}\n",
            "| | difference (limit) | resumes | test |\n|---|---|---|---|",
            *map(line, rows),
            "",
        ]
    parts += ["## What does not, and what it says\n", "| | error or warning | test |\n|---|---|---|"]
    parts += [f"| {each['what']} | {each['error'].replace('|', '/')} | {test_of(each)} |" for each in fails]
    return "\n".join(parts) + "\n"


def by_group(rows):
    """Each row once, under its group, in the order of the tests: all ranks of a test report the same."""
    groups = defaultdict(dict)
    for each in rows:
        groups[each["group"]].setdefault(each["what"], each)
    return {group: list(rows.values()) for group, rows in groups.items()}


def line(row):
    note = f": {row['note']}" if row.get("note") else ""
    found = "; ".join(f"{net} {value:.0e}" if value else f"{net} 0" for net, value in row.get("difference", {}).items())
    limit = f" ({row['tolerance']:.0e})" if found else ""
    return f"| {row['what']}{note} | {found}{limit} | {'exactly' if row.get('resumes') else ''} | {test_of(row)} |"


def test_of(row):
    """The test's place, without the folder and the file's ending: narrow columns."""
    file, _, name = row["test"].partition("::")
    return f"`{file.removeprefix('tests/').removesuffix('.py')}` `{name}`"


def versions(rows):
    packages = {*ALWAYS, *(name for each in rows for name in each.get("packages", ()))}
    return ", ".join(f"{name} {version(name)}" for name in sorted(packages)) + f", Python {platform.python_version()}"


def machine():
    names = [each for each in Path("/proc/cpuinfo").read_text().splitlines() if each.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0].split(':', 1)[1].strip() if names else platform.machine()}, no GPU"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    for each in results["left out"]:
        print(each, file=sys.stderr)
    print(page(results), end="")
