"""A finished model, as fast as this machine allows: each layer dense or sparse, whichever is measured faster."""
