"""Faster versions of the operators. Everything works without them."""

from openwork.kernels import registry as _registry
from openwork.kernels.cpu.native import Status as Status
from openwork.kernels.cpu.native import use_isa as use_isa
from openwork.kernels.cpu.native import vectors as vectors
from openwork.kernels.cpu.native import warn_without_library as warn_without_library
from openwork.kernels.cuda import semi_structured as _semi_structured  # noqa: F401 - its kinds are registered
from openwork.kernels.foreach import batches as batches
from openwork.kernels.foreach import fuses as fuses
from openwork.kernels.registry import status as status

_registry.register_all()
