"""Files of other libraries: masks of pruning libraries, and compressed-tensors' 2:4 files (which `ow.load` reads)."""

from openwork.files.foreign.pruning_masks import dense_state_dict as dense_state_dict
