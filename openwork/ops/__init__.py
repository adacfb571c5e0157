"""Operators: schema, reference and fake kernel together. Devices register faster kernels of the same name."""

from openwork.ops.mask_stats import pack_list as pack_list
from openwork.ops.mask_stats import packed_sad_list as packed_sad_list
from openwork.ops.masks import add_decayed as add_decayed
from openwork.ops.masks import add_decayed_list as add_decayed_list
from openwork.ops.masks import keep_largest as keep_largest
from openwork.ops.masks import keep_largest_list as keep_largest_list
from openwork.ops.masks import prune as prune
from openwork.ops.masks import prune_list as prune_list
from openwork.ops.transposable import keep_transposable as keep_transposable
