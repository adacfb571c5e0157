"""A model and its optimizer while they train: what becomes sparse, what a step does, what is checked."""
