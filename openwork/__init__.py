"""Openwork: N:M fine-grained structured sparse neural networks, trained from scratch.

This list is the API.
"""

from openwork.files.checkpoint import load as load
from openwork.files.checkpoint import load_state_dict as load_state_dict
from openwork.files.checkpoint import save as save
from openwork.inference.deploy import deploy as deploy
from openwork.inference.deploy import plan as plan
from openwork.inference.plan import Plan as Plan
from openwork.inference.stream import load_deployed as load_deployed
from openwork.kernels.cpu.onnxruntime_operators import onnxruntime_library as onnxruntime_library
from openwork.methods import ASP as ASP
from openwork.methods import SRSTE as SRSTE
from openwork.methods import SSTE as SSTE
from openwork.methods import STE as STE
from openwork.methods import STEP as STEP
from openwork.methods import Dense as Dense
from openwork.methods import DenseTail as DenseTail
from openwork.methods import DenseWarmup as DenseWarmup
from openwork.methods import MaskDecay as MaskDecay
from openwork.methods import MaxQ as MaxQ
from openwork.methods import MdGf as MdGf
from openwork.methods import Method as Method
from openwork.methods import Ramp as Ramp
from openwork.methods import Schedule as Schedule
from openwork.methods import SdGf as SdGf
from openwork.methods import StructureDecay as StructureDecay
from openwork.methods import TransposableSRSTE as TransposableSRSTE
from openwork.nm.groups import Axis as Axis
from openwork.nm.mask_stats import flip_rate as flip_rate
from openwork.nm.mask_stats import sad as sad
from openwork.nm.masks import topn as topn
from openwork.nm.pattern import Pattern as Pattern
from openwork.nm.transposable import topn_transposable as topn_transposable
from openwork.pruning import ALPS as ALPS
from openwork.pruning import Magnitude as Magnitude
from openwork.pruning import Refit as Refit
from openwork.pruning import Solver as Solver
from openwork.pruning import SparseGPT as SparseGPT
from openwork.pruning import Wanda as Wanda
from openwork.pruning.allocate import Allocation as Allocation
from openwork.pruning.allocate import allocate as allocate
from openwork.pruning.prune import prune as prune
from openwork.pruning.report import PruneReport as PruneReport
from openwork.training.distillation import distillation_loss as distillation_loss
from openwork.training.optimizer import Handle as Handle
from openwork.training.optimizer import attach as attach
from openwork.training.repattern import change_pattern as change_pattern
from openwork.training.report import Report as Report
from openwork.training.selection import Selection as Selection
from openwork.training.sparse_tensor_cores import Acceleration as Acceleration
from openwork.training.sparse_tensor_cores import accelerate as accelerate
from openwork.training.sparsify import finalize as finalize
from openwork.training.sparsify import masks as masks
from openwork.training.sparsify import project as project
from openwork.training.sparsify import sparsify as sparsify
from openwork.training.topology import Topology as Topology
from openwork.training.verify import NotSparse as NotSparse
from openwork.training.verify import verify as verify

__version__ = "0.1.0"
