"""Language models end to end on a slice of the generated text, and the parts of the recipe."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

import openwork as ow
from openwork.cli.main import main
from openwork.recipes.language import TASK, marked_words, numbers, pieces_of, tokenizer_at
from openwork.recipes.language import LanguageConfig as Config
from openwork.recipes.recipe import prepare, train
from openwork.recipes.rundir import read_lines
from openwork.recipes.text import learn
from openwork.recipes.trained import load_run, load_teacher, read_run
from openwork.recipes.weights import load_weights, read_weights

SMALL = {
    "limit": 400,
    "limit_val": 20,
    "length": 32,
    "batch_size": 20,
    "epochs": 2,
    "warmup": 0.2,
    "lr": 0.01,
    "vocabulary": 320,
    "topology_every": 10,
    "log_every": 5,
    "progress": False,
    "threads": 1,
}
PLACE = {"progress": False, "threads": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(Config(**SMALL, out=str(out)))


def test_it_learns_more_than_how_often_tokens_come(trained):
    alone = float(trained[1]["notes"]["perplexity without context"].partition(":")[0])
    assert trained[1]["val_perplexity"] < alone / 3


def test_a_run_that_was_moved_knows_the_same_words(trained, tmp_path, capsys):
    out, result = trained
    shutil.copytree(out, tmp_path / "moved")
    out.rename(out.with_name("elsewhere"))
    try:
        assert main(["evaluate", str(tmp_path / "moved"), "--limit", "10", "--json"]) == 0  # from 10 lines: other words
    finally:
        out.with_name("elsewhere").rename(out)
    assert json.loads(capsys.readouterr().out)["val_perplexity"] == pytest.approx(result["val_perplexity"])


def test_the_run_ends_sparse_and_is_scored_as_the_result_says(trained):
    out, result = trained
    assert result["density"] == 0.5
    task, config = read_run(out)
    data, net, report = prepare(task, config)
    ow.finalize(net)
    load_weights(net, out)
    ow.verify(net, pattern=dict.fromkeys(report.sparse, "2:4"))
    net.eval()
    total, count = 0.0, 0
    for i in range(data.val_count):
        window = torch.from_numpy(data.val[i]).long()
        with torch.no_grad():
            logs = net(window[None, :-1]).logits[0].log_softmax(-1)
        total -= float(logs.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    text = numbers(600, validation=True)
    tokens = len(data.info.tokenizer.encode(text).ids)
    assert result["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result["val_nats_per_byte"] == pytest.approx(total / count * tokens / len(text.encode()), rel=1e-5)


def test_every_linear_layer_is_sparse_but_the_tied_head(trained):
    left = {layer["name"]: layer["reason"] for layer in trained[1]["layers"] if not layer["pattern"]}
    assert left == {"model.embed_tokens.weight": "tied to lm_head.weight"}
    assert len(trained[1]["layers"]) == 1 + 2 * 7


def test_the_report_marks_what_surprised_and_loads_nothing(trained):
    page = (trained[0] / "report.html").read_text()
    assert page.count('<div class="view">') == 2 * 2
    assert page.count("<mark>") >= 4
    assert "perplexity without context" in page
    assert "Validation perplexity" in page
    bare = re.sub(r"base64,[\s\w+/=]+", "", page).replace("</", "<")
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\((?!#)", bare)


def test_commands_take_the_run(trained, tmp_path, capsys):
    net, example, *_ = load_run(trained[0])
    assert net(**example).logits.shape == (1, 32, net.config.vocab_size)
    assert main(["verify", str(trained[0])]) == 0
    assert main(["export", str(trained[0]), "--out", str(tmp_path / "hf")]) == 0
    again = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(**example).logits, net(**example).logits)
    capsys.readouterr()


def test_a_run_may_start_from_another_and_takes_its_vocabulary(trained, tmp_path):
    asp = Config(**{**SMALL, "limit": 40}, method="asp", init=str(trained[0]), out=str(tmp_path / "asp"))
    data, net, _ = prepare(TASK, asp)
    assert data.info.tokenizer.to_str() == (trained[0] / "vocabulary.json").read_text()
    weight = read_weights(trained[0] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(net.model.layers[0].mlp.up_proj.weight, weight)  # 2:4 already


def resume(out, kill_after, more):
    config = {**SMALL, "limit": 40, "batch_size": 10, "accumulate": 2, "checkpoint_every": 3, "log_every": 1, **more}
    script = Path(__file__).with_name("run_and_kill.py")
    words = [sys.executable, script, "language", json.dumps({**config, "out": str(out)}), str(kill_after)]
    return subprocess.run(words, check=False).returncode


@pytest.mark.slow
def test_a_killed_run_with_a_teacher_and_dropout_resumes_bit_for_bit(trained, tmp_path):
    """Four steps of two micro-batches an epoch; killed in the second epoch, whose windows are other ones."""
    small_llama(tmp_path, 320, attention_dropout=0.3)
    how = {"model": str(tmp_path / "config.json"), "teacher": str(trained[0])}
    assert resume(tmp_path / "whole", 0, how) == 0
    assert resume(tmp_path / "cut", 11, how) == -signal.SIGKILL
    assert resume(tmp_path / "cut", 0, {**how, "resume": True}) == 0
    a, b = (read_weights(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "cut/metrics.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_learn_sharded_from_a_whole_teacher(trained, tmp_path):
    """The same steps as one process takes."""
    flags = {**SMALL, "limit": 40, "epochs": 1, "teacher": str(trained[0]), "accelerator": "cpu"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value).lower())]
    command = ["-m", "openwork.cli", "train", "language", *words, "--devices", "2", "--strategy", "fsdp2"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*run, *command, "--out", str(tmp_path / "two")], check=True)
    one = train(Config(**flags, out=str(tmp_path / "one")))
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two["val_perplexity"] == pytest.approx(one["val_perplexity"], rel=1e-4)
    kept, other = (read_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert kept.keys() == other.keys()


# --- folders of transformers -----------------------------------------------------------------------------------------


def small_llama(folder, words, **more):
    """A configuration in a folder."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = LlamaConfig(vocab_size=words, **sizes, max_position_embeddings=64, **more)
    shape.save_pretrained(folder)
    return shape


@pytest.fixture
def folder(tmp_path):
    """A network of transformers in several files, with its tokenizer."""
    path = tmp_path / "hf"
    tokenizer = learn(["to be or not to be"] * 3, 270, ["<|endoftext|>"], False)
    torch.manual_seed(1)
    net = LlamaForCausalLM(small_llama(path, 280, tie_word_embeddings=True))
    net.save_pretrained(path, max_shard_size="10KB")
    tokenizer.save(str(path / "tokenizer.json"))
    return path, net, tokenizer


def test_a_folder_gives_shape_and_tokenizer_and_where_asked_its_weights(folder):
    path, net, tokenizer = folder
    assert len(list(path.glob("*.safetensors"))) > 1
    data, random, _ = prepare(TASK, Config(**SMALL, model=str(path), out="nowhere"))
    assert data.info.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not torch.equal(random.lm_head.weight, net.lm_head.weight)
    _, started, report = prepare(TASK, Config(**SMALL, model=str(path), init=str(path), method="dense", out="nowhere"))
    ow.finalize(started)
    assert all(torch.equal(w, net.state_dict()[name]) for name, w in started.state_dict().items())
    assert started.lm_head.weight is started.model.embed_tokens.weight
    assert "model.layers.1.mlp.down_proj.weight" in report.sparse


def test_a_folder_can_be_the_teacher_of_another_shape(folder, tmp_path):
    path, _, tokenizer = folder
    config = Config(**SMALL, teacher=str(path), out=str(tmp_path / "run"))
    data, student, _ = prepare(TASK, config)
    teacher = load_teacher(TASK, config, data)
    assert data.info.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (student.vocab_size, teacher.vocab_size) == (len(tokenizer.get_vocab()), 280)  # a few rows are no words
    assert not teacher.training
    (batch,) = data.train_batches([np.arange(3)], 0, 0)
    TASK.taught_loss(student, teacher, batch, 0.5).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_a_tokenizer_of_an_older_form_is_converted(folder):
    path, _, tokenizer = folder
    (path / "tokenizer.json").unlink()
    tokenizer.model.save(str(path))  # vocab.json and merges.txt
    GPT2Config(vocab_size=280).save_pretrained(path)
    assert {"vocab.json", "merges.txt"} <= {file.name for file in path.iterdir()}
    text = "not to be: 7"
    assert tokenizer_at(str(path)).encode(text).ids == tokenizer.encode(text).ids


def test_folders_that_do_not_fit_are_named(folder, tmp_path):
    path, *_ = folder
    with pytest.raises(ValueError, match=r"--init .*hf does not fit this model: give its folder as --model too"):
        prepare(TASK, Config(**SMALL, init=str(path), out="nowhere"))
    small_llama(path, 200)
    with pytest.raises(ValueError, match=r"tokenizer has 26\d tokens, but the model .*hf only 200"):
        TASK.load_data(Config(**SMALL, model=str(path), out="nowhere"))
    small_llama(path, 280)
    with pytest.raises(ValueError, match=r"length is 100, but the model .* has 64 positions"):
        prepare(TASK, Config(**{**SMALL, "length": 100}, model=str(path), out="nowhere"))
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--model .*hf is no configuration of transformers"):
        prepare(TASK, Config(**SMALL, model=str(path), out="nowhere"))


def test_weights_that_a_folder_lacks_are_named(folder):
    path, *_ = folder
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for part in path.glob("*.safetensors"):
        weights = read_weights(part)
        if weights.pop("model.layers.1.mlp.down_proj.weight", None) is not None:
            ow_save(weights, part)
    with pytest.raises(ValueError, match=r"it lacks model.layers.1.mlp.down_proj.weight"):
        prepare(TASK, Config(**SMALL, model=str(path), init=str(path), out="nowhere"))


def ow_save(weights, path):
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})


# --- a teacher -------------------------------------------------------------------------------------------------------


def test_a_teacher_of_another_vocabulary_is_refused(trained, folder):
    path, *_ = folder
    with pytest.raises(ValueError, match=r"--teacher .*run has another vocabulary: \d+ subwords, \d+ of them among"):
        TASK.load_data(Config(**SMALL, model=str(path), teacher=str(trained[0]), out="nowhere"))


def test_the_loss_is_the_share_of_each(trained):
    data, net, _ = prepare(TASK, Config(**SMALL, teacher=str(trained[0]), out="nowhere"))
    teacher, *_ = load_run(trained[0])
    (batch,) = data.train_batches([np.arange(3)], 0, 0)
    with torch.no_grad():
        logits, taught = (model(batch["input_ids"]).logits.flatten(0, 1) for model in (net, teacher))
        labels = F.cross_entropy(logits, batch["labels"].flatten())
        distance = F.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean")
        found = TASK.taught_loss(net, teacher, batch, 0.25)
    assert float(found) == pytest.approx(float(0.25 * distance + 0.75 * labels), rel=1e-5)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_pieces_are_the_text_whatever_the_tokens_cut():
    tokenizer = learn(["über Größe"], 300, ["<|endoftext|>"], False)
    text = "Größe 🙂\n\tüber 日本"
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert "🙂" in pieces


def test_words_are_marked_whole_and_lines_kept():
    words = ["a", " b", "\n", "c", "d", " e\n", "f"]
    assert marked_words(words, [0, 1, 0, 2, 2, 3, 0]) == [("a b\n", False), ("cd", True), ("e\nf", False)]
    assert marked_words([], []) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "llama"}, "model 'llama' is not known; use one of llama-tiny"),
        ({"vocabulary": 100}, "it must be at least 300"),
        ({"length": 1}, "a window needs at least 2 tokens"),
        ({"teacher_weight": 0.0}, "teacher_weight is 0.0; it must be greater than 0, and at most 1"),
    ],
)
def test_bad_values_say_what_to_do(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_the_command_line_names_what_is_no_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a few words, and no more\n")
    for data, message in (
        ("text=" + str(tmp_path / "missing"), "missing has no text: there is no file of that name"),
        ("text", "lacks its folder; write text=DIR"),
        (f"text={tmp_path}", "needed are at least 129, a window and one more, and 2"),
    ):
        assert main(["train", "language", "--data", data, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_has_the_lowest_perplexity_as_the_best(trained):
    assert not TASK.metrics[0].higher_is_better
    assert [r["val_perplexity"] for r in read_lines(trained[0] / "metrics.jsonl") if "val_perplexity" in r][-1] < 40


def test_tinyshakespeare(openwork_data):
    data = TASK.load_data(Config(data=f"text={openwork_data / 'tinyshakespeare'}", limit_val=3, out="nowhere"))
    assert data.val_count == 3
    assert data.train_count > 3000
