"""Kernels for CUDA tensors: Triton's, and torch's own 2:4 operators."""
