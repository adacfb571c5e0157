"""Flow files made by hand, whole and broken."""

import struct

import numpy as np
import pytest
from flowbytes import FLOW, flo, kitti, pfm, png

from openwork.recipes.flowfiles import read_flow


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.flo", flo()), ("a.pfm", pfm()), ("a.pfm", pfm(kind=">f4")), ("a.png", kitti())],
)
def test_each_format_gives_u_then_v_with_the_first_row_on_top(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    flow, known = read_flow(tmp_path / name)
    assert np.array_equal(flow, FLOW)
    assert flow.dtype == np.float32
    assert known.all()


def test_flow_that_is_marked_unknown_is(tmp_path):
    marked = FLOW.copy()
    marked[1, 2, 3], marked[0, 0, 1] = 1e10, np.nan
    (tmp_path / "a.flo").write_bytes(flo(marked))
    (tmp_path / "a.png").write_bytes(kitti(known=np.arange(12).reshape(3, 4) != 5))
    flow, known = read_flow(tmp_path / "a.flo")
    assert np.argwhere(~known).tolist() == [[0, 1], [2, 3]]
    assert np.isfinite(flow).all()
    assert np.argwhere(~read_flow(tmp_path / "a.png")[1]).tolist() == [[1, 1]]


@pytest.mark.parametrize("high", [65536, 3])  # of three small numbers, two are often equally near
def test_every_filter_of_png_is_undone(tmp_path, high):
    pixels = np.random.default_rng(0).integers(0, high, (10, 7, 3)).astype(np.uint16)
    pixels[:, :, 2] = 1
    (tmp_path / "a.png").write_bytes(png(pixels, filters=[4, 3, 2, 1, 0, 1, 2, 3, 4, 4]))
    flow, _ = read_flow(tmp_path / "a.png")
    assert np.array_equal(flow, (pixels[:, :, :2].transpose(2, 0, 1).astype(np.float32) - 32768) / 64)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.flo", flo(magic=b"PIEX"), r"not a .flo file: it starts with b'PIEX', not with b'PIEH'"),
        ("a.flo", flo()[:-4], r"truncated: 104 bytes, but its header says 4 x 3 pixels, which takes 108"),
        ("a.flo", flo()[:9], "truncated: 9 bytes do not hold the header"),
        ("a.flo", flo() + b"more", "longer than it should be: 112 bytes"),
        ("a.flo", b"PIEH" + struct.pack("<ii", -4, 3), "its header says -4 x 3 pixels"),
        ("a.pfm", b"P6\n4 3\n255\n", "not a .pfm file: it starts with"),
        ("a.pfm", pfm(head=b"Pf"), r"one channel \(Pf\); flow has three"),
        ("a.pfm", pfm()[:-1], "truncated: 155 bytes"),
        ("a.png", flo(), "not a .png file"),
        ("a.png", kitti(depth=8), "a .png of 8 bits"),
        ("a.png", kitti()[:-12], "bytes without an end mark"),
        ("a.png", kitti()[:50], "part b'IDAT' at byte 33 is truncated or damaged"),
        ("a.png", kitti().replace(b"IEND", b"IEMD"), "part b'IEMD'"),
        ("a.png", png(np.zeros((3, 4, 3)))[:41] + b"\xff" + png(np.zeros((3, 4, 3)))[42:], "part b'IDAT'"),
    ],
    ids=lambda each: "" if isinstance(each, bytes) else each,
)
def test_broken_files_are_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_flow(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "--skip_bad" in str(caught.value)
