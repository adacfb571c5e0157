"""From a trained network: choose which weights to keep once, from calibration batches, and compensate for the others."""
