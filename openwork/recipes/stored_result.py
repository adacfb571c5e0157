"""The result of a run as a reader may rely on it: result.json and network.json may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openwork.nm.pattern import Pattern
from openwork.recipes.method_flags import check_methods
from openwork.recipes.rundir import RunDir

_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_COUNT = (int, type(None))
# A dict: these keys at least. A list: items of that form. A tuple: one of these types.
_LAYER = {
    **dict.fromkeys(("name", "reason"), (str,)),
    **dict.fromkeys(("weights", "macs_dense", "macs_sparse"), _COUNT),
    **dict.fromkeys(("density", "retained"), _MAYBE),
    "shape": [(int,)],
    "pattern": (str, type(None)),
}
_RESULT = {
    "config": {**dict.fromkeys(("method", "pattern", "model", "data"), (str,)), "seed": (int,), "epochs": (int,)},
    "environment": {"device": (str,)},
    "metrics": [
        {
            **dict.fromkeys(("key", "label", "unit"), (str,)),
            "scale": _NUMBER,
            "digits": (int,),
            "higher_is_better": (bool,),
        }
    ],
    "mask": {"layer": (str,), "start": [(str,)], "end": [(str,)]},
    "layers": [_LAYER],
    "summary": (str,),
    "steps": (int,),
    "macs": _COUNT,
    **dict.fromkeys(("density", "sad_start", "flip_rate", "seconds_per_step", "seconds"), _MAYBE),
}
_VIEW = {"caption": (str,), "image": (str,), "text": [[(str, bool)]]}
_SAMPLE = {"name": (str,), "truth": [_VIEW], "predicted": [_VIEW]}
_IMAGES = ("data:image/jpeg;base64,", "data:image/png;base64,")
_ADVICE = "it was changed, or another version wrote it: restore it, or train again"


def read_finished(path: Path) -> dict[str, Any]:
    """The result of a finished run, checked; ValueError names the file and the field that is wrong."""
    run = RunDir(path)
    result = run.read_result()
    if result is None:
        raise FileNotFoundError(f"{path} holds no finished run: there is no {run.result.name}")
    try:
        _check(result)
    except ValueError as error:
        raise ValueError(f"{run.result}: {error}; {_ADVICE}") from error
    return result


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples that a run shows in its report, checked; none where it has no file of them."""
    samples = RunDir(path).read_visualizations()
    fault = fault_of(samples, [_SAMPLE], "")
    views = (
        [view for sample in samples for part in ("truth", "predicted") for view in sample[part]] if not fault else []
    )
    if any(view["image"] and not view["image"].startswith(_IMAGES) for view in views):
        fault = "an image is not in the file itself, as a data: URI of a JPEG or PNG"
    if fault:
        raise ValueError(f"{RunDir(path).visualizations}: {fault}; {_ADVICE}")
    return samples


def _check(result: dict[str, Any]) -> None:
    if fault := fault_of(result, {"config": _RESULT["config"]}, ""):
        raise ValueError(fault)
    check_methods([result["config"]["method"]])  # before the rest, which another version may write otherwise
    if fault := fault_of(result, _RESULT, ""):
        raise ValueError(fault)
    Pattern.parse(result["config"]["pattern"])
    if not result["metrics"]:
        raise ValueError("metrics is empty")
    for metric in result["metrics"]:
        if fault := fault_of(result, {metric["key"]: _MAYBE}, ""):
            raise ValueError(fault)
        if not 0 <= metric["digits"] <= 20:
            raise ValueError(f"metrics asks for {metric['digits']} digits")
    rows = {len(row) for when in ("start", "end") for row in result["mask"][when]}
    if len(rows) != 1 or len(result["mask"]["start"]) != len(result["mask"]["end"]):
        raise ValueError("the rows of its mask differ in length, or there are none")


def check_facts(folder: Path | str, facts: Mapping[str, Any], form: Any) -> None:
    """ValueError where the network.json of a run directory has not the form."""
    if fault := fault_of(facts, form, ""):
        raise ValueError(f"{RunDir(Path(folder)).network}: {fault}; {_ADVICE}")


def fault_of(value: Any, form: Any, where: str) -> str:
    """What is wrong with a piece of JSON; "" where it has the form.

    >>> fault_of({"steps": [1, "2"]}, {"steps": [(int,)]}, "")
    "steps[1] is '2', not int"
    """
    kind = dict if isinstance(form, dict) else list if isinstance(form, list) else form
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in form):
        names = (kind,) if isinstance(kind, type) else kind
        return f"{where or 'the whole'} is {str(value)[:40]!r}, not {' or '.join(name.__name__ for name in names)}"
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(form, dict):
        if lacks := [key for key in form if key not in value]:
            return f"{where or 'it'} lacks {', '.join(lacks)}"
        parts = [(f"{where}.{key}" if where else key, value[key], each) for key, each in form.items()]
    elif isinstance(form, list):
        parts = [(f"{where}[{i}]", item, form[0]) for i, item in enumerate(value)]
    return next((fault for name, item, each in parts if (fault := fault_of(item, each, name))), "")
