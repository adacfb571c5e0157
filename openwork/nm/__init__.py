"""The mathematics of N:M. Tensors in, tensors out: no model, no state, no device code."""
