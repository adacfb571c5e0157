"""Sparse training methods: one small frozen object each, in a file of its own, its paper and equation on top."""

from openwork.methods.asp import ASP as ASP
from openwork.methods.dense import Dense as Dense
from openwork.methods.method import Method as Method
from openwork.methods.srste import SRSTE as SRSTE
from openwork.methods.ste import STE as STE
