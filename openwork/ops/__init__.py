"""Operators: schema, reference and fake kernel together. Devices register faster kernels of the same name."""

from openwork.ops.masks import add_decayed as add_decayed
from openwork.ops.masks import keep_largest as keep_largest
from openwork.ops.masks import prune as prune
from openwork.ops.transposable import keep_transposable as keep_transposable
