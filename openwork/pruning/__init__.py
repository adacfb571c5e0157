"""From a trained network: which weights to keep, chosen once from calibration batches, and what makes up for the rest."""
