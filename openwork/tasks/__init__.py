"""Training recipes: what `openwork train TASK` and `openwork compare TASK` run. Nothing in the core imports them."""
