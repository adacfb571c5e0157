"""Files and checkpoints of other libraries."""
