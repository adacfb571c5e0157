"""A sparse network as `ow.deploy` makes it, prepared like the engines that it is compared with."""

from __future__ import annotations

import warnings
from functools import partial

import torch

import openwork
from openwork.engines.case import Case, Prepared
from openwork.inference.deploy import deploy
from openwork.utils.example import run
from openwork.utils.timing import compile_frozen


def deployed(case: Case) -> Prepared:
    """`options`: "pattern", whether to compile it as well ("compiled"), and whether to write it to `deployed.pt`
    ("keep"). int8 is calibrated by the examples in `calibrate.pt`, where there is none by the case's own."""
    model, example = case.model()
    weight_dtype = getattr(torch, case.precision)
    batches, file = None, case.folder / "calibrate.pt"
    if case.precision == "int8":
        batches = torch.load(file, weights_only=False) if file.exists() else [example]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that dense won is told below
        fast = deploy(
            model,
            example,
            pattern=case.options["pattern"],
            weight_dtype=weight_dtype,
            calibrate=batches,
            engine_seconds=0,
        )
    calls = {"": partial(run, fast, example)}
    if case.options.get("compiled"):
        calls["compiled"] = partial(run, compile_frozen(fast, example), example)
    if case.options.get("keep"):
        torch.save((fast, example), case.folder / "deployed.pt")
    plan = fast.deployment
    told = {"sparse": len(plan.chosen), "weights": len(plan.layers), "returned": plan.returned}  # type: ignore[union-attr,arg-type]
    return Prepared(calls, f"openwork {openwork.__version__}", told)
