"""Text in windows: what is read, where it is cut, and what each window holds."""

import numpy as np
import pytest

from openwork.recipes import language_data
from openwork.recipes.language_data import (
    IGNORED,
    Windows,
    blocks,
    collate,
    held_out,
    load_windows,
    read_texts,
    text_files,
    tokens_of,
    unigram_perplexity,
)
from openwork.recipes.text import learn

LINES = [f"line {i} of the text\n" + "\n" * (i % 3) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return learn(LINES, 300, ["<|endoftext|>"], False)


def test_files_are_those_of_a_folder_one_or_a_pattern(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    names = {
        place: [path.name for path in text_files(str(tmp_path / place))] for place in ("", "c.md", "*.txt", "[bc]*")
    }
    assert names == {"": ["a.txt", "b.txt"], "c.md": ["c.md"], "*.txt": ["a.txt", "b.txt"], "[bc]*": ["b.txt", "c.md"]}
    with pytest.raises(FileNotFoundError, match=r"x has no text: .* a pattern such as 'DIR/\*.txt'"):
        text_files(str(tmp_path / "x"))


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "secret").write_text("s")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link out of the folder"):
        text_files(str(tmp_path / "data"))
    assert len(text_files(str(tmp_path / "data"), follow_links=True)) == 1


def test_another_encoding_is_named_and_taken_or_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"b")
    files = text_files(str(tmp_path))
    with pytest.raises(ValueError, match=r"a.txt is not utf-8: .* at byte 2; .*--encoding latin-1.*--skip_bad"):
        read_texts(files, "utf-8")
    assert read_texts(files, "utf-8", skip_bad=True) == (["b"], 1)
    assert read_texts(files, "latin-1") == (["Größe", "b"], 0)


def test_a_tenth_of_each_text_is_held_out():
    train, val = held_out(["".join(LINES), "x" * 100, ""])
    assert [a + b for a, b in zip(train, val, strict=True)] == ["".join(LINES), "x" * 100, ""]
    assert train[0].endswith("\n")
    assert 0.09 < len(val[0]) / len("".join(LINES)) <= 0.1
    assert (len(train[1]), len(val[1])) == (90, 10)


def test_pieces_are_cut_into_the_tokens_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(language_data, "_BLOCK", 100)
    text = "".join(LINES)
    assert len([*blocks(text)]) > 10
    assert "".join(blocks(text)) == text
    assert tokens_of(tokenizer, [text], None).tolist() == tokenizer.encode(text).ids


def test_texts_are_parted_by_the_separator(tokenizer):
    a, b = (tokens_of(tokenizer, [text], None).tolist() for text in ("a", "b"))
    assert tokens_of(tokenizer, ["a", "b"], 7).tolist() == [*a, 7, *b]
    assert tokens_of(tokenizer, ["a", "b"], None).tolist() == [*a, *b]


def test_training_windows_move_with_the_epoch_and_lie_side_by_side():
    windows = Windows(np.arange(100), range(0, 90, 10), 10)
    firsts = [[int(windows[3, epoch, index][0]) for index in range(8)] for epoch in range(20)]
    assert all(np.diff(row).tolist() == [10] * 7 for row in firsts)
    assert len({row[0] for row in firsts}) > 5
    assert max(row[0] for row in firsts) < 10
    assert all(len(windows[0, epoch, index]) == 11 for epoch in range(20) for index in range(9))
    assert windows[3, 5, 2].tolist() == windows[3, 5, 2].tolist()
    assert len({int(windows[seed, 5, 2][0]) for seed in range(20)}) > 5


def test_every_validation_token_but_the_first_is_predicted_once(tokenizer):
    text = "".join(LINES)
    data = load_windows(tokenizer, [text], [text], length=16)
    row = tokenizer.encode(text).ids
    (batch,) = data.val_batches([np.arange(data.val_count)])
    labels = batch["labels"].flatten()
    assert labels[labels != IGNORED].tolist() == row[1:]
    assert data.info.bytes_per_token == pytest.approx(len(text) / len(row))
    assert (data.train_count, data.val_count) == ((len(row) - 1) // 16, -(-(len(row) - 1) // 16))


def test_a_batch_is_shifted_and_padded():
    batch = collate([np.array([3, 4, 5], np.int32), np.array([6, 7], np.int32)])
    assert {key: part.tolist() for key, part in batch.items()} == {
        "input_ids": [[3, 4], [6, 0]],
        "labels": [[4, 5], [7, IGNORED]],
    }


def test_limits_take_windows_from_all_over(tokenizer):
    text = "".join(LINES)
    data = load_windows(tokenizer, [text], [text], length=16, limits=(4, 3))
    assert (data.train_count, data.val_count) == (4, 3)
    assert data.train.starts[-1] > len(data.train.tokens) // 2


def test_too_little_text_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"training text has \d+ tokens.*needed are at least 1001.*smaller --length"):
        load_windows(tokenizer, ["short"], ["text"], length=1000)
    with pytest.raises(ValueError, match="the validation text 0; needed"):
        load_windows(tokenizer, LINES, [""], length=4)


def test_perplexity_without_context_by_hand():
    """Shares 4/6, 1/6 and 1/6, with one more of each."""
    assert unigram_perplexity(np.array([0, 0, 0]), np.array([0, 2])) == pytest.approx((4 / 6 * 1 / 6) ** -0.5)
