"""Images for classification: values of the augmentation, files good and bad."""

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openwork.recipes.draws import batch_indices
from openwork.recipes.images import cifar10, digits, fashion_mnist, imagefolder, shift_and_flip


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def some(*shape, high=256):
    return np.random.default_rng(len(shape)).integers(0, high, shape).astype(np.uint8)


def one_batch(batches):
    (batch,) = batches
    return batch


def test_digits_split_is_fixed_and_stratified():
    data = digits()
    assert (data.train_count, data.val_count, data.info.channels, data.info.classes) == (1437, 360, 1, 10)
    assert torch.equal(data.val.labels, digits().val.labels)
    assert data.val.labels.bincount().max() - data.val.labels.bincount().min() <= 2


def test_held_out_samples_are_validated_on_and_not_trained_on():
    whole, data = digits(), digits(hold_out=200)
    assert (data.train_count, data.val_count) == (1237, 200)
    for part, kept in ((data.train, whole.train.images[:1237]), (data.val, whole.train.images[1237:])):
        assert torch.equal(part.images, kept)
    assert not data.val.pad  # no augmentation
    limited = digits(limit=100, limit_val=50, hold_out=200)
    assert torch.equal(limited.train.images, digits(limit=100).train.images)
    assert torch.equal(limited.val.images, data.val.images[:50])
    with pytest.raises(ValueError, match="hold_out is 1437, and there are 1437 training samples"):
        digits(hold_out=1437)


def test_training_images_are_a_pure_function_of_seed_epoch_and_index():
    data = digits()
    batches = batch_indices(0, 3, data.train_count, 64)
    whole = list(data.train_batches(batches, 0, 3))
    again = one_batch(data.train_batches(batches[5:6], 0, 3))
    assert torch.equal(whole[5][0], again[0])
    other_epoch = one_batch(data.train_batches(batches[5:6], 0, 4))
    assert torch.equal(other_epoch[1], again[1])
    assert not torch.equal(other_epoch[0], again[0])


def test_images_are_normalized():
    images, _ = one_batch(digits().val_batches([np.arange(360)]))
    assert images.mean().abs() < 0.05
    assert (images.std() - 1).abs() < 0.05


def test_a_process_without_a_sample_has_an_empty_batch():
    images, labels = one_batch(digits().val_batches([np.arange(0)]))
    assert (images.shape, labels.shape) == ((0, 1, 8, 8), (0,))


@pytest.fixture
def images():
    return torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


def test_the_middle_draw_changes_nothing(images):
    assert torch.equal(shift_and_flip(images, np.full((2, 3), 0.5), 1, True), images)


def test_a_shift_moves_each_image_by_its_own_draw(images):
    draws = np.array([[0.0, 0.5, 0.9], [0.99, 0.0, 0.9]])
    shifted = shift_and_flip(images, draws, 1, False)
    assert torch.equal(shifted[0, :, 1:], images[0, :, :-1])
    assert not shifted[0, :, 0].any()
    assert torch.equal(shifted[1, :, :-1, 1:], images[1, :, 1:, :-1])


def test_a_low_draw_mirrors_only_if_asked(images):
    draws = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9]])
    mirrored = shift_and_flip(images, draws, 1, True)
    assert torch.equal(mirrored[0], images[0].flip(-1))
    assert torch.equal(mirrored[1], images[1])
    assert torch.equal(shift_and_flip(images, draws, 1, False), images)


def test_fashion_mnist_files(tmp_path):
    arrays = {"train-images-idx3": some(6, 28, 28), "t10k-images-idx3": some(4, 28, 28)}
    arrays |= {"train-labels-idx1": some(6, high=10), "t10k-labels-idx1": some(4, high=10)}
    for name, array in arrays.items():
        write_idx(tmp_path / f"{name}-ubyte.gz", array)
    data = fashion_mnist(tmp_path)
    assert np.array_equal(data.train.images[:, 0].numpy(), arrays["train-images-idx3"])
    assert np.array_equal(data.val.labels.numpy(), arrays["t10k-labels-idx1"])


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


def test_cifar_is_read_only_where_its_checksums_are_right(tmp_path, monkeypatch):
    """A pickle can run code, so none is opened that torchvision does not know."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows, labels = np.random.default_rng(i).integers(0, 256, (3, 3072)).astype(np.uint8), [i, 1, 2]
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}, protocol=2))
    with pytest.raises(FileNotFoundError, match=r"cifar10: .* must hold cifar-10-batches-py with data_batch_1"):
        cifar10(tmp_path)
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    data = cifar10(tmp_path)
    assert (data.train_count, data.val_count, data.info.channels) == (15, 3, 3)
    first = np.random.default_rng(0).integers(0, 256, (3, 3072)).astype(np.uint8).reshape(3, 3, 32, 32)
    assert np.array_equal(data.train.images[:3].numpy(), first)


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
    assert (data.train_count, data.val_count, data.info.classes) == (6, 4, 2)
    images, labels = one_batch(data.val_batches([np.arange(4)]))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]
    assert imagefolder(folder, 32, workers=0, limit=2).train.files == [data.train.files[i] for i in (0, 3)]


def test_held_out_files_are_of_all_classes(folder):
    whole, data = (imagefolder(folder, 32, workers=0, hold_out=count) for count in (0, 2))
    assert data.val.files == [whole.train.files[i] for i in (0, 3)]
    assert data.train.files == [whole.train.files[i] for i in (1, 2, 4, 5)]
    images, labels = one_batch(data.val_batches([np.arange(2)]))
    assert labels.tolist() == [0, 1]
    assert torch.equal(images, one_batch(data.val_batches([np.arange(2)]))[0])  # cut out of the middle
    with pytest.raises(ValueError, match="hold_out is 6, and there are 6"):
        imagefolder(folder, 32, workers=0, hold_out=6)


def test_image_folder_draws_depend_on_the_sample_and_leave_torchs_generator_alone(folder):
    data = imagefolder(folder, 32, workers=0)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    together, _ = one_batch(data.train_batches([np.array([1, 4])], 0, 0))
    assert torch.rand(1) == expected
    alone, _ = one_batch(data.train_batches([np.array([4])], 0, 0))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(alone, one_batch(data.train_batches([np.array([4])], 0, 1))[0])


def test_image_folder_says_which_layout_it_needs(folder):
    with pytest.raises(FileNotFoundError, match=r"train is missing; needed are .*train/CLASS"):
        imagefolder(folder / "train", 32, workers=0)
    (folder / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"only one of .*/train and .*/val has bird"):
        imagefolder(folder, 32, workers=0)


@pytest.mark.skipif("OPENWORK_DATA" not in os.environ, reason="OPENWORK_DATA, the folder of test data, is not set")
def test_the_real_fashion_mnist():
    data = fashion_mnist(Path(os.environ["OPENWORK_DATA"]) / "fashion-mnist")
    assert (data.train_count, data.val_count, data.info) == (60_000, 10_000, type(data.info)(10, 1))
    assert data.train.mean[0] / 255 == pytest.approx(0.2860, abs=1e-4)  # the value that everyone quotes
