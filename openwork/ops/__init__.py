"""Operators: schema, reference and fake kernel together. Devices register faster kernels of the same name."""

from openwork.ops.mask_stats import foreach_pack as foreach_pack
from openwork.ops.mask_stats import foreach_packed_sad as foreach_packed_sad
from openwork.ops.masks import foreach_decay as foreach_decay
from openwork.ops.masks import foreach_mask as foreach_mask
from openwork.ops.masks import foreach_prune as foreach_prune
from openwork.ops.slots import slots_reference as slots_reference
from openwork.ops.transposable import foreach_transposable_mask as foreach_transposable_mask
