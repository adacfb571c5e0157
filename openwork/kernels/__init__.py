"""Faster versions of the operators. Everything works without them."""

from openwork.kernels import masks as _masks
from openwork.kernels import products as _products
from openwork.kernels import transposable as _transposable
from openwork.kernels.masks import in_one_pass as in_one_pass
from openwork.kernels.native import Status as Status
from openwork.kernels.native import status as status
from openwork.kernels.native import use_isa as use_isa
from openwork.kernels.products import lanes as lanes
from openwork.kernels.products import panel_columns as panel_columns
from openwork.ops.masks import library as _operators

_masks.register(_operators)
_products.register(_operators)
_transposable.register(_operators)
