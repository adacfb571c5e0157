"""Faster versions of the operators. Everything works without them."""

from openwork.kernels.cpu import masks as _masks
from openwork.kernels.cpu import products as _products
from openwork.kernels.cpu.masks import in_one_pass as in_one_pass
from openwork.kernels.cpu.masks import takes_lists as takes_lists
from openwork.kernels.cpu.native import Status as Status
from openwork.kernels.cpu.native import status as status
from openwork.kernels.cpu.native import use_isa as use_isa
from openwork.kernels.cpu.native import warn_without_library as warn_without_library
from openwork.kernels.cpu.products import has_dots as has_dots
from openwork.kernels.cpu.products import lanes as lanes
from openwork.kernels.cpu.products import panel_columns as panel_columns
from openwork.kernels.cuda.triton import status as gpu_status  # noqa: F401
from openwork.ops.masks import library as _operators

_masks.register(_operators)
_products.register(_operators)
