"""From a trained network: which weights to keep, chosen once from calibration data, and what makes up for the rest."""
