"""Reading sentence pairs: good files, and what is said of bad ones."""

import gzip
from pathlib import Path

import pytest

from openwork.recipes.text import find_file, read_pairs


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder / "t.en", folder / "t.de"


def test_plain_and_compressed_files_agree(tmp_path):
    text = "Hallo!\r\nGrüß\u2028Gott,\x0bdu.\n".encode()  # other separators are part of the sentence
    plain = write(tmp_path, t_en=b"Hi!\nHow do\nyou do", t_de=text + b"x\n")
    assert list(read_pairs(*plain)) == [("Hi!", "Hallo!"), ("How do", "Grüß\u2028Gott,\x0bdu."), ("you do", "x")]
    for path in plain:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    files = [find_file(tmp_path, name) for name in ("t.en", "t.de")]
    assert [path.name for path in files] == ["t.en.gz", "t.de.gz"]
    assert list(read_pairs(*files))[2] == ("you do", "x")


@pytest.mark.parametrize(
    ("english", "german", "message", "left"),
    [
        (b"a\nb\nc\n", b"A\nB\n", "t.de ends after line 2, but the other file goes on: a line is missing", 2),
        (b"a\n", b"A\nB\nC\nD", "t.en ends after line 1, but the other file goes on: a line is missing", 1),
        (b"a\n \nc\n", b"A\nB\nC\n", "t.en, line 2 is empty; repair it", 2),
        (b"a\nb\n", b"A\nB\xff\n", r"t.de, line 2 is not UTF-8 \(byte 0xff at its position 2\); repair it", 1),
    ],
)
def test_bad_pairs_are_named_or_left_out(tmp_path, english, german, message, left):
    files = write(tmp_path, t_en=english, t_de=german)
    with pytest.raises(ValueError, match=message.format(tmp_path) + ".*add --skip_bad"):
        list(read_pairs(*files))
    read = list(read_pairs(*files, skip_bad=True))
    assert len(read) == max(english.rstrip().count(b"\n"), german.rstrip().count(b"\n")) + 1
    assert len([pair for pair in read if pair]) == left


def test_a_cut_off_file_is_named(tmp_path):
    whole = gzip.compress(b"".join(b"line %d\n" % i for i in range(9999)))
    (tmp_path / "t.en.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "t.de").write_bytes(b"x\n" * 9999)
    with pytest.raises(ValueError, match=r"t.en.gz cannot be read after line \d+ .*fetch the file again"):
        list(read_pairs(tmp_path / "t.en.gz", tmp_path / "t.de"))


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path):
    write(tmp_path, t_en=b"a\n", t_fr=b"b\n")
    with pytest.raises(FileNotFoundError, match=r"lacks t.de \(or t.de.gz\); it holds t.en, t.fr. --languages"):
        find_file(tmp_path, "t.de")
