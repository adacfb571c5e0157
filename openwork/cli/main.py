"""The command `openwork`: finds the subcommand, and tells the user's errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from openwork import __version__
from openwork.recipes import TASKS
from openwork.utils.signals import Interrupted, interruptions

COMMANDS = ("train", "compare", "prune", "evaluate", "report", "inspect", "verify", "export", "plan", "bench")
"""Each is the function in the module of its name, which is imported when it runs."""

USAGE = f"""\
openwork: train N:M sparse networks from scratch

  openwork train TASK               one network with one method; --help shows every flag and its default
  openwork compare TASK             dense, ASP, STE and SR-STE from the same seeds: one table, one report.html
  openwork prune SOURCE --out DIR   a trained network made N:M at once, from calibration data
  openwork evaluate RUN             the scores of a trained network, on its data or on other: --data
  openwork report RUN               rebuild report.html of a run or a comparison
  openwork inspect FILE             what a compressed file holds, from its header alone
  openwork verify SOURCE            the same after reading all of it; or which N:M the weights of any other checkpoint
                                    keep, and along which axis; or every GEMM of an ONNX file; --pattern N:M holds to it
  openwork plan SOURCE              time each layer dense and sparse on this hardware; what ow.deploy would choose
  openwork bench [SOURCE ...]       time masks, GEMMs, whole models beside their dense baselines; writes CSV
  openwork export SOURCE --out OUT  as ONNX, a program of torch.export, a folder for Hugging Face, ...

SOURCE is module:factory, a run directory, a Hugging Face folder, a compressed file, or a model of torchvision by name.
TASK is one of: {", ".join(TASKS)}.
Without --data each trains on something small that needs no download.
Flags may stand in a YAML file: --config FILE; flags after it override it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status. Errors of the user come as one line on stderr, with status 2; what a
    signal ended says so, with the shell's status."""
    words = list(sys.argv[1:] if argv is None else argv)
    without_task = len(words) == 2 and words[0] in ("train", "compare") and words[1] in ("-h", "--help")
    if not words or words[0] in ("-h", "--help", "help") or without_task:
        print(USAGE, end="")
        return 0
    if words == ["--version"]:
        print(f"openwork {__version__}")
        return 0
    try:
        with interruptions():
            return _command(words[0])(words[1:])
    except Interrupted as stop:
        _tell(stop)
        return 128 + stop.signum
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"openwork: {_explain(error)}", file=sys.stderr)
        return 2


def _tell(stop: Interrupted) -> None:
    with suppress(OSError):  # a terminal that hung up
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":  # of several processes one
            print(f"openwork: {stop}", file=sys.stderr)


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name!r}; use one of {', '.join(COMMANDS)}, or --help")
    return getattr(importlib.import_module(f"openwork.cli.{name}"), name)


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("openwork"):
        extra = "export" if (error.name or "").startswith("onnx") else "train"
        return f"{error.name} is not installed; this needs the extra: pip install 'openwork[{extra}]'"
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:  # torch wraps the traceback of the process around it
        return text.rstrip().rpartition("\n")[2].partition(": ")[2]
    return text


if __name__ == "__main__":
    sys.exit(main())
