"""Translation end to end on a slice of the generated sentences, and its parts."""

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import openwork as ow
from openwork.cli.main import main
from openwork.recipes import text, translation
from openwork.recipes.draws import batch_indices
from openwork.recipes.recipe import prepare, train
from openwork.recipes.rundir import read_lines
from openwork.recipes.text import collate
from openwork.recipes.trained import read_run
from openwork.recipes.translation import TASK, bleu, marked, translate
from openwork.recipes.translation import TranslationConfig as Config
from openwork.recipes.weights import load_weights, read_weights

SMALL = {
    "limit": 640,
    "limit_val": 40,
    "batch_size": 32,
    "epochs": 2,
    "warmup": 1.0,
    "beams": 1,
    "vocabulary": 320,
    "topology_every": 10,
    "log_every": 5,
    "progress": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(Config(**SMALL, out=str(out)))


def test_the_loss_falls(trained):
    losses = [r["train_loss"] for r in read_lines(trained[0] / "metrics.jsonl") if "train_loss" in r]
    assert len(losses) == 8
    assert losses[-1] < 0.7 * losses[0]


def test_the_run_ends_sparse_and_is_scored_as_the_result_says(trained):
    out, result = trained
    assert result["density"] == 0.5
    task, config = read_run(out)
    data, net, report = prepare(task, config)
    ow.finalize(net)
    load_weights(net, out)
    ow.verify(net, pattern=dict.fromkeys(report.sparse, "2:4"))
    net.eval()
    batches = data.val_batches(np.array_split(np.arange(data.val_count), 3))
    with torch.no_grad():
        predictions = [one for batch in batches for one in task.predictions(net, batch)]
    scores = task.compute_metrics(predictions, data)
    assert scores == {key: pytest.approx(result[key]) for key in ("val_loss", "val_bleu", "val_exact")}


def test_every_linear_layer_is_sparse_and_what_is_not_has_a_reason(trained):
    layers = {layer["name"]: layer for layer in trained[1]["layers"]}
    left = {name: layer["reason"] for name, layer in layers.items() if not layer["pattern"]}
    assert set(left) == {
        "model.shared.weight",
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
    }
    assert "lm_head.weight" in left["model.shared.weight"]
    assert len(layers) - len(left) == 2 * (4 + 2) + 2 * (8 + 2)


def test_the_report_shows_sentences_and_the_signature(trained):
    out, result = trained
    assert re.fullmatch(r"nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:[\d.]+", result["notes"]["BLEU"])
    page = (out / "report.html").read_text()
    assert result["notes"]["BLEU"] in page
    assert page.count('<div class="view">') == 4 * 3
    assert page.count("<figcaption>Validation loss") == 1
    bare = re.sub(r"base64,[\s\w+/=]+", "", page).replace("</", "<")
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\((?!#)", bare)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_run_is_exported(trained, tmp_path, capsys):
    assert main(["export", str(trained[0]), "--out", str(tmp_path / "net.onnx"), "--dynamic-batch"]) == 0
    assert "ONNX Runtime gives the model's outputs" in capsys.readouterr().out


def test_the_vocabulary_is_kept_and_learned_alike_by_any_number_of_threads(trained):
    kept = (trained[0] / "vocabulary.json").read_text()
    program = (
        "from openwork.recipes.translation import TASK, TranslationConfig as C;"
        f"print(TASK.load_data(C(**{ {**SMALL, 'out': 'nowhere'} })).info.tokenizer.to_str())"
    )
    for threads in ("1", "2"):
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(Path(translation.__file__).parents[2])}
        made = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        assert made.stdout.decode().strip() == kept


def test_asp_takes_the_vocabulary_of_its_dense_network(trained, tmp_path):
    """Equal sizes would let weights load whose rows stand for other words."""
    asp = Config(**{**SMALL, "limit": 64}, method="asp", init=str(trained[0]), out=str(tmp_path / "asp"))
    assert TASK.load_data(asp).info.tokenizer.to_str() == (trained[0] / "vocabulary.json").read_text()
    other = Config(**{**SMALL, "limit": 64}, out=str(tmp_path / "asp"))
    assert TASK.load_data(other).info.tokenizer.to_str() != (trained[0] / "vocabulary.json").read_text()


def resume(out, kill_after, again):
    config = {**SMALL, "limit": 128, "limit_val": 8, "accumulate": 2, "checkpoint_every": 3, "log_every": 1}
    config |= {"out": str(out), "resume": again}
    script = Path(__file__).with_name("run_and_kill.py")
    return subprocess.run([sys.executable, script, "translation", json.dumps(config), str(kill_after)], check=False)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """Four steps of two micro-batches an epoch; killed in the second epoch, whose batches are other ones."""
    assert resume(tmp_path / "whole", 0, False).returncode == 0
    assert resume(tmp_path / "cut", 11, False).returncode == -signal.SIGKILL
    assert resume(tmp_path / "cut", 0, True).returncode == 0
    a, b = (read_weights(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return TASK.load_data(Config(**SMALL, out="nowhere"))


def test_any_text_survives_the_vocabulary(data):
    texts = ["Ein  Text, 3,50 € & 'Größe' — 日本語 \u2028 🙂", "a"]
    encoded = text.encode(data.info.tokenizer, texts)
    assert encoded[1][-1] == text.END
    assert text.decode(data.info.tokenizer, [encoded[0].tolist(), [*encoded[1].tolist(), 7, 8]]) == texts


def batch_of(part, indices):
    return collate([part[i] for i in indices])


def test_a_batch_shifts_targets_and_masks_padding():
    batch = collate([(np.array([7, 1]), np.array([9, 10, 1])), (np.array([5, 6, 1]), np.array([8, 1]))])
    assert {key: part.tolist() for key, part in batch.items()} == {
        "input_ids": [[7, 1, 0], [5, 6, 1]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "decoder_input_ids": [[0, 9, 10], [0, 8, 1]],
        "labels": [[9, 10, 1], [8, 1, 0]],
    }


def test_what_else_is_in_a_batch_changes_neither_loss_nor_translation(data):
    torch.manual_seed(0)
    net = TASK.build(Config(**SMALL), data).eval()
    alone, together = (batch_of(data.val, chosen) for chosen in ([0], [0, data.val_count - 1]))
    with torch.no_grad():
        first, second = (TASK.predictions(net, batch)[0] for batch in (alone, together))
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[2] == second[2]
    assert 0 < len(first[2]) <= 2 * len(data.val[0][0]) + 10


def test_the_loss_is_the_smoothed_cross_entropy(data):
    torch.manual_seed(0)
    net = TASK.build(Config(**SMALL, label_smoothing=0.3), data).eval()
    batch = batch_of(data.train, range(3))
    with torch.no_grad():
        logs = net(**translation.inputs(batch)).logits.log_softmax(-1)
        found = TASK.loss(net, batch)
    each = [
        -0.7 * logs[i, j, word] - 0.3 * logs[i, j].mean()
        for i, row in enumerate(batch["labels"].tolist())
        for j, word in enumerate(row)
        if word != text.PAD
    ]
    assert float(found) == pytest.approx(float(sum(each)) / len(each), rel=1e-5)


def test_batches_hold_sentences_of_like_length(data):
    sizes = data.sizes
    batches = batch_indices(0, 0, data.train_count, 32, sizes=sizes)
    random = batch_indices(0, 0, data.train_count, 32)
    waste = [1 - np.mean([sizes[each].mean() / sizes[each].max() for each in kind]) for kind in (batches, random)]
    assert waste[0] < 0.1 < 0.3 < waste[1]
    assert sorted(np.concatenate(batches)) == list(range(data.train_count))
    assert not np.array_equal(sizes[batches[0]], np.sort(sizes)[:32])  # the batches are not in order of length
    assert not np.array_equal(batches[0], batch_indices(0, 1, data.train_count, 32, sizes=sizes)[0])


def test_the_last_validation_searches_with_beams(data):
    """Greedy before it; and of what beam search finds, the sum of log-probabilities is at least greedy's."""
    torch.manual_seed(1)
    config = Config(**{**SMALL, "beams": 4})
    net = TASK.build(config, data).eval()
    batch = batch_of(data.val, range(6))
    greedy = translate(net, batch)
    TASK.before_last_validation(config, net)
    best = translate(net, batch)
    assert greedy != best
    with torch.no_grad():
        assert (likelihood(net, batch, best) >= likelihood(net, batch, greedy)).all()


def likelihood(net, batch, found):
    """Mean log-probability of each translation: what beam search with penalty 1 ranks by."""
    made = collate([(np.array([1]), np.array(ids)) for ids in found])
    labels, started = made["labels"], made["decoder_input_ids"]
    logits = net(**{**translation.inputs(batch), "decoder_input_ids": started}).logits
    logits[..., text.PAD] = -torch.inf
    logs = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    real = labels != text.PAD
    return logs.where(real, 0).sum(1) / real.sum(1)


def test_bleu_by_hand():
    """One sentence of five words, four right: precisions 4/5, 3/4, 2/3 and 1/2, no penalty for brevity."""
    score, _ = bleu(["a b c d x"], ["a b c d e"])
    assert score == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    shorter, _ = bleu(["a b c d"], ["a b c d e"])
    assert shorter == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_words_that_the_reference_lacks_are_marked():
    assert marked("um halb acht Uhr", "um halb sieben Uhr") == [("um halb", False), ("acht", True), ("Uhr", False)]
    assert marked("", "um") == []
    sample = translation.text_visualization(0, ("<a>", "b & c"), "b & <d>")
    assert sample.predicted[0].text == [("b &", False), ("<d>", True)]
    assert [view.text for view in sample.truth] == [[("<a>", False)], [("b & c", False)]]


def write_pairs(folder, **files):
    for name, lines in files.items():
        (folder / name.replace("_", ".")).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_files_are_read_by_language_and_name(tmp_path):
    english, german = ["one two"] * 20, ["eins zwei"] * 20
    write_pairs(tmp_path, train_en=english, train_de=german, dev_en=["two", "one two one"], dev_de=["zwei", "ein"])
    config = Config(data=f"pairs={tmp_path}", languages=["de", "en"], validation="dev", limit=15, out="nowhere")
    data = TASK.load_data(config)
    assert (data.train_count, data.val_count, data.skipped) == (15, 2, 0)
    assert sorted(data.info.val_pairs) == [("ein", "one two one"), ("zwei", "two")]


def test_a_limit_takes_pairs_from_all_over_the_files(tmp_path):
    """They are often sorted by length."""
    lines = [f"line {i}" for i in range(12)]
    write_pairs(tmp_path, train_en=lines, train_de=lines, val_en=lines, val_de=lines)
    data = TASK.load_data(Config(data=f"pairs={tmp_path}", limit_val=5, out="nowhere"))
    assert {source for source, _ in data.info.val_pairs} == {f"line {i}" for i in (0, 2, 4, 6, 8)}
    assert data.train_count == 12


def test_bad_pairs_are_counted_and_long_ones_noted(tmp_path):
    long = " ".join(["wort"] * 20)
    write_pairs(tmp_path, train_en=["a b", "", "c d", long, "x"], train_de=["A B", "B", "C D", "E", "X", "Y"])
    write_pairs(tmp_path, val_en=["a", long], val_de=["A", "B"])
    flags = {"data": f"pairs={tmp_path}", "max_length": 8, "out": "nowhere"}
    with pytest.raises(ValueError, match=r"train.en, line 2 is empty"):
        TASK.load_data(Config(**flags))
    data = TASK.load_data(Config(**flags, skip_bad=True))
    assert (data.train_count, data.skipped) == (3, 2)
    assert data.info.notes["training pairs"] == "3, without 1 of more than 8 subwords"
    assert data.info.notes["validation pairs"] == "2, 1 of them cut to 8 subwords"
    assert max(len(ids) for pair in (data.val[0], data.val[1]) for ids in pair) == 8
    assert data.val[1][0][-1] == text.END


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet8"}, "model 'resnet8' is not known; use one of transformer-tiny"),
        ({"languages": ["en"]}, "needed are two, source and target"),
        ({"languages": ["en", "fr"]}, "numbers are generated; give files"),
        ({"vocabulary": 100}, "it must be at least 300"),
        ({"beams": 0}, "must be at least 1 and 8"),
    ],
)
def test_bad_values_say_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_the_command_line_names_bad_files(tmp_path, capsys):
    write_pairs(tmp_path, train_en=["a"], train_de=["A", "B"], val_en=["a"], val_de=["A"])
    assert main(["train", "translation", "--data", f"wmt14={tmp_path}", "--out", str(tmp_path / "run")]) == 2
    assert "train.en ends after line 1, but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_multi30k_and_tatoeba(openwork_data):
    for name, counts, stem in (("multi30k", (500, 1000), "test_2016_flickr"), ("tatoeba-en-de", (500, 2168), "test")):
        source = f"{name.split('-')[0]}={openwork_data / name}"
        data = TASK.load_data(Config(data=source, limit=500, validation=stem, out="nowhere"))
        assert (data.train_count, data.val_count) == counts
        assert data.skipped == 0
