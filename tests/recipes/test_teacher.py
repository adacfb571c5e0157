"""`--teacher`: what each task learns from another network, and what that leaves as it was."""

import pytest
import torch
import torch.nn.functional as F

from openwork.recipes import classification, flow, translation
from openwork.recipes.classification import TASK
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.compare import planned_runs
from openwork.recipes.config import comparison
from openwork.recipes.detection import DetectionConfig
from openwork.recipes.draws import batch_indices
from openwork.recipes.recipe import prepare, train
from openwork.recipes.rundir import RunDir, read_lines
from openwork.recipes.text import PAD, learn
from openwork.recipes.trained import load_run, load_teacher
from openwork.recipes.weights import read_weights

SMALL = {
    "limit": 64,
    "limit_val": 20,
    "batch_size": 32,
    "epochs": 1,
    "warmup": 0,
    "log_every": 1,
    "progress": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A deeper network than the student, trained for four steps."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(Config(**{**SMALL, "epochs": 2}, model="resnet14", method="dense", out=str(out)))
    return out


def taught(out, teacher, **more):
    train(Config(**{**SMALL, **more}, teacher=str(teacher) if teacher else "", out=str(out)))
    return out


def test_with_weight_one_and_no_rate_the_loss_is_the_divergence(teacher, tmp_path):
    config = Config(**SMALL, teacher=str(teacher), teacher_weight=1.0, lr=0.0, out=str(tmp_path / "run"))
    train(config)
    (first, *_) = (r["train_loss"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "train_loss" in r)
    data, net, _ = prepare(TASK, config)
    tutor, *_ = load_run(teacher)
    ((pixels, _),) = data.train_batches(batch_indices(0, 0, 64, 32)[:1], 0, 0)
    with torch.no_grad():  # the student in training mode, its teacher in that of evaluation
        ours, theirs = (network(pixels).log_softmax(-1) for network in (net.train(), tutor))
    assert first == pytest.approx(float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean")), rel=1e-4)


def test_a_teacher_that_hardly_counts_disturbs_nothing(teacher, tmp_path):
    """Neither the initial weights nor a single draw of dropout."""
    alone, beside = (
        taught(tmp_path / name, path, dropout=0.3, teacher_weight=1e-9)
        for name, path in (("alone", None), ("beside", teacher))
    )
    a, b = (read_weights(run / "model.safetensors") for run in (alone, beside))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_a_teacher_is_in_the_configuration_and_not_in_the_checkpoints(teacher, tmp_path):
    out = taught(tmp_path / "run", teacher, checkpoint_every=1)
    checkpoint, _ = RunDir(out).checkpoints.newest()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(name.startswith("net.") for name in state)
    assert len(state) < 100
    with pytest.raises(ValueError, match=r"another configuration \(teacher: "):
        train(Config(**SMALL, checkpoint_every=1, out=str(out), resume=True))


def test_loading_a_teacher_draws_nothing(teacher):
    data, *_ = prepare(TASK, Config(**SMALL))
    before = torch.get_rng_state()
    net = load_teacher(TASK, Config(**SMALL, teacher=str(teacher)), data)
    assert torch.equal(torch.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_teachers_that_do_not_fit_are_named(teacher, tmp_path):
    data, *_ = prepare(TASK, Config(**SMALL))
    with pytest.raises(FileNotFoundError, match=r"--teacher .*nowhere: there is no .*nowhere"):
        load_teacher(TASK, Config(teacher="nowhere"), data)
    with pytest.raises(ValueError, match=r"--teacher .*model.safetensors does not fit this model"):
        load_teacher(TASK, Config(teacher=str(teacher / "model.safetensors")), data)  # of another --model
    (tmp_path / "config.yaml").write_text("task: flow\nmethod: dense\npattern: '2:4'\n")
    with pytest.raises(ValueError, match=r"is a run of the task flow; needed one of classification"):
        load_teacher(TASK, Config(teacher=str(tmp_path)), data)


def test_detectors_take_none():
    for cls in (DetectionConfig, comparison(DetectionConfig)):
        with pytest.raises(ValueError, match="--teacher: two detectors look at different regions"):
            cls(teacher="run")


def test_a_comparison_hands_it_to_every_run(tmp_path):
    how = {"teacher": "run", "teacher_weight": 0.5, "init": "start", "seeds": [0], "out": str(tmp_path)}
    runs = planned_runs(comparison(Config)(**how, methods=["dense", "asp", "sr-ste"]))
    assert {(run.teacher, run.teacher_weight) for run in runs} == {("run", 0.5)}
    dense = str(tmp_path / "dense-seed0")  # which asp prunes, whatever it started from
    assert {run.method: run.init for run in runs} == {"dense": "start", "asp": dense, "sr-ste": "start"}


# --- the distance of each task -----------------------------------------------------------------------------------


def test_classes():
    logits, taught = torch.randn(2, 4, 10)
    wanted = F.kl_div(logits.log_softmax(1), taught.log_softmax(1), log_target=True, reduction="batchmean")
    assert torch.allclose(classification.TASK.distance(torch.nn.Identity(), logits, taught, ()), wanted)


def test_words_without_padding():
    logits, taught = torch.randn(2, 2, 3, 7)
    labels = torch.tensor([[4, 5, 1], [1, PAD, PAD]])
    real = labels != PAD
    wanted = F.kl_div(
        logits[real].log_softmax(-1), taught[real].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    found = translation.TASK.distance(torch.nn.Identity(), logits, taught, {"labels": labels})
    assert torch.allclose(found, wanted)


def test_motion_everywhere():
    """As if the teacher's last flow were the true one, also where that is not known."""
    net = type("Net", (), {"gamma": 0.5})()
    flows, taught = list(torch.randn(2, 1, 2, 4, 4)), list(torch.randn(2, 1, 2, 4, 4))
    unknown = torch.zeros(1, 4, 4, dtype=torch.bool)
    batch = flow.Pairs(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4), unknown)
    found = flow.TASK.distance(net, flows, taught, batch)
    wanted = 0.5 * (flows[0] - taught[1]).abs().mean() + (flows[1] - taught[1]).abs().mean()
    assert torch.allclose(found, wanted)


def test_a_translator_takes_its_teachers_vocabulary_or_says_that_it_differs(tmp_path):
    (tmp_path / "teacher").mkdir()
    words = learn(["one two three"], 300)
    words.save(str(tmp_path / "teacher" / "vocabulary.json"))
    small = {"limit": 40, "limit_val": 4, "teacher": str(tmp_path / "teacher")}
    data = translation.TASK.load_data(translation.TranslationConfig(**small, out=str(tmp_path / "new")))
    assert data.info.tokenizer.get_vocab() == words.get_vocab()
    (tmp_path / "old").mkdir()
    learn(["four five six"], 300).save(str(tmp_path / "old" / "vocabulary.json"))
    with pytest.raises(ValueError, match=r"--teacher .* has another vocabulary: \d+ subwords"):
        translation.TASK.load_data(translation.TranslationConfig(**small, out=str(tmp_path / "old")))
