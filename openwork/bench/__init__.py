"""Benchmarks of the kernels and of whole models on this machine: `openwork bench`. Each row names its baseline."""
