"""From a trained network: which weights to keep, chosen once from calibration data, and what makes up for the rest."""

from openwork.pruning.alps import ALPS as ALPS
from openwork.pruning.magnitude import Magnitude as Magnitude
from openwork.pruning.refit import Refit as Refit
from openwork.pruning.solver import Solver as Solver
from openwork.pruning.sparsegpt import SparseGPT as SparseGPT
from openwork.pruning.wanda import Wanda as Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "refit": Refit,
    "alps": ALPS,
}
"""Every solver by its name on the command line, the quickest first."""
