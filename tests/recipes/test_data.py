"""Batches of samples."""

import numpy as np
import pytest
import torch

from openwork.recipes.data import Data
from openwork.recipes.flow_data import padded
from openwork.recipes.text import collate


@pytest.mark.parametrize("collate", [None, list, padded, collate])
def test_a_process_without_a_sample_has_one_empty_batch(collate):
    data = Data((), [torch.zeros(2)], collate)
    assert [*data.all_val_batches(4, rank=1, world=2)] == [()]


def test_others_have_theirs():
    data = Data((), [torch.full((1,), float(i)) for i in range(5)])
    batches = [batch.flatten().tolist() for batch in data.all_val_batches(2, rank=1, world=2)]
    assert batches == [[1, 3]]
    (batch,) = data.val_batches([np.array([4, 0])])
    assert batch.tolist() == [[4], [0]]
