"""Kernels for CPU tensors: the native library and what calls it."""
