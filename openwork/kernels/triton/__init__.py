"""Triton kernels for CUDA tensors. Imported only where they run."""
