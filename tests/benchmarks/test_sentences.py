"""What benchmarks/pretrained/sentences.py computes, without the network that it is about."""

import argparse
import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "pretrained"


@pytest.fixture(scope="module")
def sentences():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("sentences", FOLDER / "sentences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def corpus(sentences, tmp_path):
    """A few groups of paraphrases, in files laid out as the real ones."""
    data, test_data = tmp_path / "tatoeba-en-de", tmp_path / "gensim" / "test" / "test_data"
    data.mkdir()
    test_data.mkdir(parents=True)
    pairs = [(f"version {v} of {g}", f"satz {g}") for g in range(2500) for v in "ab"]
    pairs += [("Same!", "gleich"), ("same", "gleich")] + [(f"alone {i}", f"einzeln {i}") for i in range(5000)]
    for i, name in enumerate(("train.en.gz", "train.de.gz")):
        with gzip.open(data / name, "wt", encoding="utf-8") as file:
            file.write("\n".join(pair[i] for pair in pairs))
    for name in ("lee.cor", "lee_background.cor"):
        (test_data / name).write_text("\n".join(f"document {i}" for i in range(80)), encoding="latin-1")
    np.savetxt(test_data / "similarities0-1.txt", np.eye(80))
    return sentences.read_corpus(tmp_path, tmp_path)


def test_nothing_of_the_queries_is_trained_or_calibrated_on(corpus):
    assert len(corpus.groups) == 2500  # twins but for letters are no paraphrases
    assert len(corpus.test.queries) == len(corpus.validation.queries) == 1000
    assert not {*corpus.test.queries} & {*corpus.validation.queries}
    for task in (corpus.test, corpus.validation):
        assert all({*found} < {*task.gallery} for found in task.relevant)
        assert not {*task.gallery} & {*corpus.training}
    calibration = corpus.calibration(1)
    assert len(calibration) == 60 + 1500
    assert {*calibration[60:]} < {*corpus.training}
    assert calibration != corpus.calibration(2)


def test_ranks_count_what_is_nearer_than_the_nearest_paraphrase(sentences, monkeypatch):
    places = {"q": 0.0, "r": 0.3, "near": 0.1, "nearer": -0.05, "far": 2.0, "r2": 2.5}

    def embed(model, asked, texts):
        return torch.tensor([[np.cos(places[text]), np.sin(places[text])] for text in texts])

    monkeypatch.setattr(sentences, "embed", embed)
    task = sentences.Retrieval(["q", "r"], [["r", "r2"], ["q"]], [*places])
    assert sentences.ranks(nn.Identity(), argparse.Namespace(), task).tolist() == [2, 1]


def test_the_difference_is_paired(sentences):
    dense, other = {"hits": [1] * 8 + [0] * 2}, {"hits": [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]}
    found = sentences.against(dense, other)
    assert found["difference"] == pytest.approx(-0.3)
    assert found["p"] == pytest.approx(2 * (1 + 5) / 2**5)
    assert sentences.against(dense, dense) == {"difference": 0.0, "error": 0.0, "p": 1.0}


def test_batches(sentences):
    rows = [[1] * (1 + i % 3) for i in range(10)]
    batches = sentences.of_equal_length(rows, size=3)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 1), (1, 1), (3, 2), (3, 3)]
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    rows = [[i] * (1 + i % 3) for i in range(1, 11)]
    stream = sentences.shuffled(rows, 4, seed=0)
    for _ in range(2):  # epochs
        seen = [int(row[0]) for _ in range(3) for row in next(stream)["input_ids"]]
        assert sorted(seen) == list(range(1, 11))
    padded = sentences.padded([[5], [6, 7]])
    assert padded["attention_mask"].tolist() == [[1, 0], [1, 1]]
    states = torch.tensor([[[3.0, 4.0], [9.0, 9.0]], [[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(
        sentences.pooled(states, padded["attention_mask"]), torch.tensor([[0.6, 0.8], [0.5**0.5, 0.5**0.5]])
    )
