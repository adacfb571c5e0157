"""Sparse training methods: one small frozen object each, in a file of its own, its paper and equation on top."""

from openwork.methods.asp import ASP as ASP
from openwork.methods.dense import Dense as Dense
from openwork.methods.method import Method as Method
from openwork.methods.method import is_transposable as is_transposable
from openwork.methods.method import steps_of_a_mask as steps_of_a_mask
from openwork.methods.method import stores_mask as stores_mask
from openwork.methods.srste import SRSTE as SRSTE
from openwork.methods.ste import STE as STE
from openwork.methods.transposable import TransposableSRSTE as TransposableSRSTE

METHODS: dict[str, type] = {cls.name: cls for cls in (Dense, ASP, STE, SRSTE, TransposableSRSTE)}
"""Every method by its name, in the order of tables and charts."""
