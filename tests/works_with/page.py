"""`page.py RESULTS.json... > docs/works-with.md`: the page from what the tests wrote (`make works-with`)."""

import json
import sys
from collections import defaultdict
from pathlib import Path

GROUPS = (
    *("Loop", "Optimizer", "Precision", "Memory and functions", "Compilation", "Two processes", "Trainers"),
    *("Experts", "Averages", "Adapters", "Quantization", "Export"),
)
HEAD = """# Works with

Made by `make works-with` from the results of tests; nothing here that no test ran. A line of "What works" is a test
that passed: a transformer of 12 blocks and a small residual network are trained for 20 steps with SR-STE at a decay of
0.5, so that a lost or multiplied term shows, and

- the weights end where the equations lead, written out in plain torch and run in fp32 in one process (the column
  *difference*: the largest of any weight, and the limit of the test; without the term the nets end at least ten times
  that limit away);
- each operand of each product, forward and backward, that has the shape of a sparse weight is 2:4;
- where *resumes* says exactly, a run stopped in the middle and resumed ends bit for bit as one that was not stopped.

Averages are compared with the same average of the dense weights written out; one or two layers, with the same in one
process. Lines without a difference test something else, which they name.
"""


def page(rows, versions):
    """The page, in Markdown."""
    works, fails = ([each for each in rows if ("error" in each) == failing] for failing in (False, True))
    parts = [HEAD, f"Run with {versions}.\n", "## What works\n"]
    for group, lines in by_group(works).items():
        head = "| | difference (limit) | resumes | test |\n|---|---|---|---|"
        parts += [f"### {group}\n", head, *map(line, lines), ""]
    parts += ["## What does not, and what it says\n", "| | error or warning | test |\n|---|---|---|"]
    parts += [f"| {each['what']} | {each['error'].replace('|', '/')} | {place(each)} |" for each in fails]
    return "\n".join(parts) + "\n"


def by_group(rows):
    """Each row once, under its group: every process of a test reports the same."""
    groups = defaultdict(dict)
    for each in rows:
        groups[each["group"]].setdefault(each["what"], each)
    order = [name for name in GROUPS if name in groups] + [name for name in groups if name not in GROUPS]
    return {name: list(groups[name].values()) for name in order}


def line(row):
    note = f": {row['note']}" if row.get("note") else ""
    found = "; ".join(f"{net} {value:.0e}" if value else f"{net} 0" for net, value in row.get("difference", {}).items())
    limit = f" ({row['tolerance']:.0e})" if found else ""
    return f"| {row['what']}{note} | {found}{limit} | {'exactly' if row.get('resumes') else ''} | {place(row)} |"


def place(row):
    """The test's file and name, without the folder and the ending: narrow columns."""
    file, _, name = row["test"].partition("::")
    return f"`{file.removeprefix('tests/').removesuffix('.py')}` `{name}`"


def run_with(files):
    """The packages and machines of all results, each once."""
    packages = sorted({package for file in files for package in file["packages"]})
    return "; ".join([", ".join(packages), *dict.fromkeys(file["machine"] for file in files)])


if __name__ == "__main__":
    files = [json.loads(Path(each).read_text()) for each in sys.argv[1:]]
    for each in [what for file in files for what in file["left out"]]:
        print(each, file=sys.stderr)
    print(page([row for file in files for row in file["rows"]], run_with(files)), end="")
