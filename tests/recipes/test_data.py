import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openwork.recipes.datasets import cifar10, digits, fashion_mnist
from openwork.recipes.draws import batch_indices
from openwork.recipes.imagefolder import imagefolder


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def some(*shape, high=256):
    return np.random.default_rng(len(shape)).integers(0, high, shape).astype(np.uint8)


def test_digits_split_is_fixed_and_stratified():
    data = digits()
    assert (data.train_count, data.val_count, data.shape, data.classes) == (1437, 360, (1, 8, 8), 10)
    assert torch.equal(data.val_y, digits().val_y)
    assert data.val_y.bincount().max() - data.val_y.bincount().min() <= 2


def test_training_images_are_a_pure_function_of_seed_epoch_and_index():
    data = digits()
    batches = batch_indices(0, 3, data.train_count, 64)
    whole = list(data.train_batches(batches, 0, 3))
    again = list(data.train_batches(batches[5:6], 0, 3))
    assert torch.equal(whole[5][0], again[0][0])
    other_epoch = next(data.train_batches(batches[5:6], 0, 4))
    assert torch.equal(other_epoch[1], again[0][1])
    assert not torch.equal(other_epoch[0], again[0][0])


def test_images_are_normalized():
    data = digits()
    images = torch.cat([x for x, _ in data.val_batches([np.arange(360)])])
    assert images.mean().abs() < 0.05
    assert (images.std() - 1).abs() < 0.05


def test_fashion_mnist_files(tmp_path):
    arrays = {"train-images-idx3": some(6, 28, 28), "t10k-images-idx3": some(4, 28, 28)}
    arrays |= {"train-labels-idx1": some(6, high=10), "t10k-labels-idx1": some(4, high=10)}
    for name, array in arrays.items():
        write_idx(tmp_path / f"{name}-ubyte.gz", array)
    data = fashion_mnist(tmp_path)
    assert np.array_equal(data.train_x[:, 0].numpy(), arrays["train-images-idx3"])
    assert np.array_equal(data.val_y.numpy(), arrays["t10k-labels-idx1"])


def test_fashion_mnist_says_what_is_missing(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", some(6, 28, 28))
    with pytest.raises(FileNotFoundError, match=r"lacks train-labels-idx1-ubyte.gz.*must hold"):
        fashion_mnist(tmp_path)


def test_a_wrong_file_is_named(tmp_path):
    for part, kind in (
        ("train", "images-idx3"),
        ("train", "labels-idx1"),
        ("t10k", "images-idx3"),
        ("t10k", "labels-idx1"),
    ):
        (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(b"not idx"))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is not an IDX file"):
        fashion_mnist(tmp_path)


CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def test_cifar_python_and_binary_files_agree(tmp_path):
    python, binary = tmp_path / "py" / "cifar-10-batches-py", tmp_path / "bin"
    python.mkdir(parents=True)
    binary.mkdir()
    for i, name in enumerate(CIFAR):
        rows, labels = np.random.default_rng(i).integers(0, 256, (3, 3072)).astype(np.uint8), [i, 1, 2]
        (python / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}, protocol=2))
        np.concatenate([np.array(labels, np.uint8)[:, None], rows], 1).tofile(binary / f"{name}.bin")
    a, b = cifar10(python.parent), cifar10(binary)
    assert a.shape == (3, 32, 32)
    assert a.train_count == 15
    assert torch.equal(a.train_x, b.train_x)
    assert torch.equal(a.val_y, b.val_y)


def test_a_cifar_pickle_cannot_run_code(tmp_path):
    for name in CIFAR:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"needs no os\.system"):
        cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(some(40, 60 + i, 3)).save(tmp_path / part / label / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    data = imagefolder(folder, 32, workers=0)
    assert (data.train_count, data.val_count, data.classes, data.shape) == (6, 4, 2, (3, 32, 32))
    images, labels = next(data.val_batches([np.arange(4)]))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]


def test_image_folder_draws_depend_on_the_sample_and_leave_torchs_generator_alone(folder):
    data = imagefolder(folder, 32, workers=0)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    together = next(data.train_batches([np.array([1, 4])], 0, 0))[0]
    assert torch.rand(1) == expected
    alone = next(data.train_batches([np.array([4])], 0, 0))[0]
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(alone, next(data.train_batches([np.array([4])], 0, 1))[0])


def test_image_folder_says_which_layout_it_needs(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"train is missing; needed are .*train/CLASS"):
        imagefolder(folder / "train", 32, workers=0)
    (folder / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match="classes that train lacks: bird"):
        imagefolder(folder, 32, workers=0)


@pytest.mark.skipif("OPENWORK_DATA" not in os.environ, reason="OPENWORK_DATA, the folder of test data, is not set")
def test_the_real_fashion_mnist():
    data = fashion_mnist(Path(os.environ["OPENWORK_DATA"]) / "fashion-mnist")
    assert (data.train_count, data.val_count, data.classes, data.shape) == (60_000, 10_000, 10, (1, 28, 28))
    assert data.mean[0] / 255 == pytest.approx(0.2860, abs=1e-4)  # the value that everyone quotes
