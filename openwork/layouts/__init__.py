"""How a kernel wants a compressed weight in memory. Made from the dense weight when a layer is deployed, never stored.

One file a kernel kind; what is in `KINDS` by name is what `openwork.deploy` chooses from.
"""

from openwork.layouts.dot_product import DotProduct as DotProduct
from openwork.layouts.gemm import Gemm as Gemm
from openwork.layouts.gemv import Gemv as Gemv
from openwork.layouts.layout import KINDS as KINDS
from openwork.layouts.skinny import SkinnyExpand as SkinnyExpand
from openwork.layouts.skinny import SkinnyGather as SkinnyGather
