"""Faster versions of the operators. Everything works without them."""

from openwork.kernels import masks as _masks
from openwork.kernels import products as _products
from openwork.kernels.masks import in_one_pass as in_one_pass
from openwork.kernels.masks import takes_lists as takes_lists
from openwork.kernels.native import Status as Status
from openwork.kernels.native import status as status
from openwork.kernels.native import use_isa as use_isa
from openwork.kernels.products import has_dots as has_dots
from openwork.kernels.products import lanes as lanes
from openwork.kernels.products import panel_columns as panel_columns
from openwork.kernels.triton import status as gpu_status  # noqa: F401
from openwork.ops.masks import library as _operators

_masks.register(_operators)
_products.register(_operators)
