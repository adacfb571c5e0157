"""Openwork: N:M fine-grained structured sparse neural networks, trained from scratch.

This list is the API.
"""

from openwork.accelerate import Acceleration as Acceleration
from openwork.accelerate import accelerate as accelerate
from openwork.attach import Handle as Handle
from openwork.attach import attach as attach
from openwork.axis import Axis as Axis
from openwork.checkpoint import load as load
from openwork.checkpoint import save as save
from openwork.deploy import deploy as deploy
from openwork.deploy import plan as plan
from openwork.loading import load_deployed as load_deployed
from openwork.masks import topn as topn
from openwork.methods import ASP as ASP
from openwork.methods import SRSTE as SRSTE
from openwork.methods import STE as STE
from openwork.methods import Dense as Dense
from openwork.methods import Method as Method
from openwork.methods import TransposableSRSTE as TransposableSRSTE
from openwork.metrics import churn as churn
from openwork.metrics import sad as sad
from openwork.pattern import Pattern as Pattern
from openwork.planning import Plan as Plan
from openwork.report import Report as Report
from openwork.sparsify import finalize as finalize
from openwork.sparsify import masks as masks
from openwork.sparsify import project as project
from openwork.sparsify import sparsify as sparsify
from openwork.topology import Topology as Topology
from openwork.transposable import topn_transposable as topn_transposable
from openwork.verify import NotSparse as NotSparse
from openwork.verify import verify as verify

__version__ = "0.1.0"
