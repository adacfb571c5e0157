"""Data of strangers: names stay in the folder, headers and aliases do not unfold, and errors name the file."""

import gzip
import json
import os
import struct
import zlib

import numpy as np
import pytest
import yaml
from PIL import Image

from openwork.cli.main import main
from openwork.recipes import coco, flow_data
from openwork.recipes.data_files import DataFolder, check_declared_size
from openwork.recipes.images import fashion_mnist, imagefolder, open_image, read_idx
from openwork.recipes.text import find_file, read_pairs
from openwork.recipes.yaml_files import load_yaml, read_yaml


def picture(path, side=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 77, np.uint8)).save(path)
    return path


def coco_folder(tmp_path, **changes):
    """One image; `changes` are fields of its entry or of its annotation."""
    image = {"id": 0, "file_name": "a.png", "width": 64, "height": 64}
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [4, 4, 30, 30], "area": 900, "iscrowd": 0}
    for name, value in changes.items():
        (image if name in image and name != "id" else box)[name] = value
    folder = tmp_path / "data"
    picture(folder / "images" / "a.png")
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "c"}]}
    for part in ("train", "val"):
        (folder / f"instances_{part}.json").write_text(json.dumps(content))
    return folder


def read(folder, **flags):
    how = {"masks": False, "skip_bad": False, **flags}
    return coco.read_part(folder / "instances_train.json", folder / "images", **how)


@pytest.mark.parametrize("name", ["../../private.png", "../private.png", "x/../../private.png", "/tmp/private.png"])
def test_a_name_that_leaves_the_folder_is_an_error(tmp_path, name):
    picture(tmp_path / "private.png")
    picture(tmp_path / "data" / "private.png")
    with pytest.raises(ValueError, match=r"private.png leaves the folder .*images; the names of a data set must stay"):
        read(coco_folder(tmp_path, file_name=name))
    for follow_links in (False, True):
        with pytest.raises(ValueError, match="not one image with an object is left"):
            read(coco_folder(tmp_path, file_name=name), skip_bad=True, follow_links=follow_links)


def test_links_out_of_the_folder_need_a_flag(tmp_path):
    folder = coco_folder(tmp_path, file_name="b.png")
    (folder / "images" / "b.png").symlink_to(picture(tmp_path / "private.png"))
    with pytest.raises(ValueError, match=r"b.png is a link out of the folder .* add --follow_links"):
        read(folder)
    assert len(read(folder, follow_links=True)[0]) == 1
    inside = coco_folder(tmp_path, file_name="c.png")
    (folder / "images" / "c.png").symlink_to("a.png")
    assert len(read(inside)[0]) == 1
    linked = tmp_path / "linked"  # the folder itself is the user's to name
    linked.symlink_to(folder)
    assert len(read(linked)[0]) == 1


def test_a_folder_of_images_that_is_a_link_needs_the_flag_too(tmp_path):
    folder = coco_folder(tmp_path)
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="add --follow_links"):
        read(folder)
    assert len(read(folder, follow_links=True)[0]) == 1


def test_every_other_reader_refuses_links_out_of_its_folder(tmp_path):
    private = picture(tmp_path / "private.png")
    for part in ("train", "val"):
        picture(tmp_path / "f" / part / "a" / "0.png")
        (tmp_path / "f" / part / "a" / "1.png").symlink_to(private)
    data = imagefolder(tmp_path / "f", 32, workers=0)
    with pytest.raises(ValueError, match="--follow_links"):
        data.val[1]
    assert imagefolder(tmp_path / "f", 32, workers=0, skip_bad=True).skipped == 2
    imagefolder(tmp_path / "f", 32, workers=0, follow_links=True).val[1]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "p.png").symlink_to(private)
    with pytest.raises(ValueError, match="--follow_links"):
        flow_data.photos_of(DataFolder(photos), skip_bad=False)
    assert len(flow_data.photos_of(DataFolder(photos, follow_links=True), skip_bad=False)[0]) == 1
    (tmp_path / "secret").write_text("secret\n")
    (photos / "train.en").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="--follow_links"):
        find_file(photos, "train.en")
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (photos / f"{name}-ubyte.gz").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="--follow_links"):
        fashion_mnist(photos)


def test_flow_pairs_stay_in_their_folder(tmp_path):
    private = picture(tmp_path / "private.ppm", 128)
    data = tmp_path / "d" / "FlyingChairs" / "data"
    for number in (1, 2):
        for frame in (1, 2):
            picture(data / f"0000{number}_img{frame}.ppm", 128)
        flow = np.zeros((128, 128, 2), "<f4").tobytes()
        (data / f"0000{number}_flow.flo").write_bytes(b"PIEH" + struct.pack("<ii", 128, 128) + flow)
    (data.parent / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    how = {"workers": 0, "skip_bad": False, "limit": 0, "limit_val": 0}
    part = flow_data.flow_files("flyingchairs", DataFolder(tmp_path / "d"), (128, 128), **how)
    part.val[0]
    (data / "00002_img2.ppm").unlink()
    (data / "00002_img2.ppm").symlink_to(private)
    with pytest.raises(ValueError, match="--follow_links"):
        part.val[0]


def test_a_pipe_among_the_files_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")  # opening it would wait for a writer
    with pytest.raises(ValueError, match="not a plain file"):
        DataFolder(tmp_path).check(tmp_path / "x.png")


def png_of(path, width, height):
    """A header that claims so many pixels, and a few bytes of data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(3000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("side", [10_000, 12_000, 20_000, 2**31 - 1])
def test_headers_that_claim_too_many_pixels_are_errors(tmp_path, side):
    path = png_of(tmp_path / "x.png", side, side)
    with pytest.raises(ValueError, match=r"x.png cannot be decoded .*--skip_bad"):
        open_image(path)
    with pytest.raises(Exception, match=r"pixels|size"):
        check_declared_size(str(path))


def test_no_ghostscript(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(ValueError, match=r"cannot be decoded \(cannot identify"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("sides", [(20_000, 20_000), (-1, 4), (0, 0), (2**31 - 1, 2**31 - 1)])
def test_a_flow_file_that_claims_more_than_it_has(tmp_path, sides):
    path = tmp_path / "x.flo"
    path.write_bytes(b"PIEH" + struct.pack("<ii", *sides) + bytes(64))
    with pytest.raises(ValueError, match=r"x.flo says .* pixels, which its 76 bytes are not"):
        check_declared_size(str(path))


def test_compressed_files_unfold_as_far_as_they_claim(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes(10_000_000)))
    with pytest.raises(ValueError, match=r"x.gz is not an IDX file of bytes, or not all of one"):
        read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"x.gz cannot be read"):
        read_idx(path)
    long = tmp_path / "train.en.gz"
    long.write_bytes(gzip.compress(bytes(5_000_000)))
    with pytest.raises(ValueError, match=r"train.en.gz, line 1 is longer than 1048576 bytes"):
        list(read_pairs(long, long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 100_000, "height": 100_000}, "100000 x 100000 pixels are more than"),
        ({"width": 10**400}, "pixels are more than"),
        ({"file_name": 5}, "images.0. has '5' as its file_name; needed is str"),
        ({"image_id": [0]}, "annotations.0. has .* as its image_id; needed is int or str"),
        ({"category_id": [1]}, r"annotation 1 of a.png: its category_id \[1\] is not in the list"),
        ({"bbox": [10**400, 0, 1, 1]}, "needed are four numbers"),
        ({"area": "large"}, "its area is 'large', not a number"),
        ({"iscrowd": {}}, "its iscrowd is '{}', not 0 or 1"),
        ({"segmentation": [[0, 0, 1e8, 0, 0, 1e8]]}, "a point of its polygon is at 1.*, far outside the image"),
        ({"segmentation": {"size": 3, "counts": []}}, "its run lengths are of a mask of 3 pixels"),
        ({"segmentation": {"size": [64, 64], "counts": 5}}, "its counts are '5'; needed are run lengths"),
    ],
)
def test_what_no_coco_file_holds_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(coco_folder(tmp_path, **changes), masks="segmentation" in changes)


def test_deep_json_is_an_error(tmp_path):
    folder = coco_folder(tmp_path)
    (folder / "instances_train.json").write_text('{"images": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"instances_train.json is not JSON"):
        read(folder)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases unfold to more than"),
        ("a: &a {b: *a}", "an alias stands inside what it names"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "x" * 2_000_000, "the text has 2000003 characters"),
        ("epochs: " + "9" * 5000, ""),
        ("a: &a {x: 1}\n<<: [" + ", ".join(["*a"] * 20_000) + "]", "aliases unfold"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_yaml_that_unfolds_is_an_error_at_once(tmp_path, text, message, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(file, "")
    assert main(["train", "classification", "--config", str(file)]) == 2
    assert f"openwork: {file} is not valid YAML" in capsys.readouterr().err


def test_aliases_that_do_not_unfold_are_fine():
    assert load_yaml("a: &a [1, 2:4]\nb: *a\nc: {<<: {d: 2e-4}}") == {
        "a": [1, "2:4"],
        "b": [1, "2:4"],
        "c": {"d": 2e-4},
    }
    with pytest.raises(yaml.YAMLError):
        load_yaml("a: [")
