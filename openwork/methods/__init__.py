"""Sparse training methods: one small frozen object each, in a file of its own, its paper and equation on top."""

from openwork.methods.asp import ASP as ASP
from openwork.methods.dense import Dense as Dense
from openwork.methods.maxq import MaxQ as MaxQ
from openwork.methods.mdgf import MdGf as MdGf
from openwork.methods.method import Method as Method
from openwork.methods.schedule import Phase as Phase
from openwork.methods.schedule import Schedule as Schedule
from openwork.methods.schedules import DenseTail as DenseTail
from openwork.methods.schedules import DenseWarmup as DenseWarmup
from openwork.methods.schedules import MaskDecay as MaskDecay
from openwork.methods.schedules import Ramp as Ramp
from openwork.methods.schedules import StructureDecay as StructureDecay
from openwork.methods.sdgf import SdGf as SdGf
from openwork.methods.srste import SRSTE as SRSTE
from openwork.methods.sste import SSTE as SSTE
from openwork.methods.ste import STE as STE
from openwork.methods.step import STEP as STEP
from openwork.methods.transposable import TransposableSRSTE as TransposableSRSTE

_ALL: tuple[type[Method], ...] = (
    Dense,
    ASP,
    STE,
    SRSTE,
    TransposableSRSTE,
    SSTE,
    MdGf,
    SdGf,
    MaxQ,
    STEP,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
"""Every method by its name, in the order in which tables list them."""
