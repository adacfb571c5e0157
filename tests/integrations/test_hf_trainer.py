"""A small GPT-2 in Hugging Face's Trainer takes the steps of the equations, and what leaves the Trainer is sparse."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from integrations import hf
from integrations.reference import STEPS, Gemms, plain_steps
from plain_loop import LR, distance
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

import openwork as ow
from openwork.integrations import projected_state_dict
from openwork.integrations.hf_trainer import SparseCallback
from openwork.integrations.shared import FILE

HALVES = {"per_device_train_batch_size": hf.BATCH // 2, "gradient_accumulation_steps": 2}
CLIP = {"max_grad_norm": 0.2}  # below the norm of every step's gradient
SGD = {"optim": "sgd", "weight_decay": 0.0}


def sgd(w, g, state, t):
    return w - LR * g


# Trainer arguments, the update, and the tolerance: measured 4e-7 for fp32 (AdamW), 2e-4 for bf16 (SGD). Without the
# term AdamW ends 0.25 away or more, SGD 0.01.
WAYS = {
    "plain": ({}, hf.adamw, 5e-6),
    "sgd": (SGD, sgd, 1e-7),
    "2 micro-batches": (HALVES, hf.adamw, 5e-6),
    "clipped": (CLIP, hf.adamw, 5e-6),
    "clipped, 2 micro-batches": (HALVES | CLIP, hf.adamw, 5e-6),
    "bf16": (SGD | {"bf16": True}, sgd, 1e-3),
    "bf16, clipped, 2 micro-batches": (SGD | HALVES | CLIP | {"bf16": True}, sgd, 1e-3),
}
every_way = pytest.mark.parametrize(("arguments", "update", "tolerance"), WAYS.values(), ids=WAYS)


class Last(TrainerCallback):
    """Keeps the dense weights after each step: the model is finalized when `train` returns."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights = {name: w.clone() for name, w in model.state_dict().items() if name != "lm_head.weight"}


def train(trainer, **more):
    """The dense weights after the last step, and what every product read."""
    trainer.add_callback(last := Last())
    with Gemms((weight.shape, hf.DIMS[n]) for n, weight in hf.gpt2().named_parameters() if n in hf.DIMS) as gemms:
        trainer.train(**more)
    return last.weights, gemms


def reference(arguments, update, **more):
    clip = arguments.get("max_grad_norm")
    return plain_steps(hf.gpt2(), hf.batches(STEPS), hf.loss_of, hf.DIMS, update, clip=clip, **more)


@every_way
def test_the_trainer_takes_the_steps_of_the_equations(tmp_path, arguments, update, tolerance):
    weights, gemms = train(hf.sparse_trainer(hf.arguments(tmp_path, **arguments), steps=STEPS))
    assert distance(weights, reference(arguments, update)) < tolerance
    assert gemms.dense == []
    micro_batches = arguments.get("gradient_accumulation_steps", 1)
    assert gemms.seen == STEPS * micro_batches * len(hf.DIMS) * 2  # forward, and backward to the input


@pytest.mark.for_the_page
def test_twelve_blocks_take_the_steps_of_the_equations(row, tmp_path):
    """With AdamW, clipping and two micro-batches."""
    arguments, dims = HALVES | CLIP, hf.dims_of(12)
    trainer = hf.sparse_trainer(hf.arguments(tmp_path, **arguments), steps=STEPS, layers=12)
    weights, gemms = train(trainer)
    plain, clip = hf.gpt2(layers=12), CLIP["max_grad_norm"]
    wanted = plain_steps(plain, hf.batches(STEPS), hf.loss_of, dims, hf.adamw, clip=clip)
    assert distance(weights, wanted) < 1e-4
    assert gemms.dense == []
    assert gemms.seen == STEPS * 2 * len(dims) * 2
    what = "transformers' `Trainer`, `SparseCallback`: GPT-2, AdamW, clipped, 2 micro-batches"
    row("Trainers", what, difference={"GPT2": distance(weights, wanted)}, tolerance=1e-4, packages=("transformers",))


@every_way
def test_without_the_callback_it_ends_elsewhere_and_warns(tmp_path, arguments, update, tolerance):
    trainer = hf.sparse_trainer(hf.arguments(tmp_path, **arguments), steps=STEPS, attached=False)
    with pytest.warns(UserWarning, match="nobody attached it"):
        weights, _ = train(trainer)
    assert distance(weights, reference(arguments, update)) > 0.009
    assert distance(weights, reference(arguments, update, decay=0.0)) < tolerance


def test_attached_there_is_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*openwork|.*attach")
        hf.sparse_trainer(hf.arguments(tmp_path), steps=2).train()


def test_a_dense_product_would_be_found(tmp_path):
    trainer = Trainer(hf.gpt2(), hf.arguments(tmp_path), train_dataset=hf.texts(2 * hf.BATCH))
    _, gemms = train(trainer)
    assert len(gemms.dense) == gemms.seen == 2 * len(hf.DIMS) * 2


# --- what leaves the Trainer -------------------------------------------------------------------------------------

IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_topology_goes_to_the_trainers_log(tmp_path):
    trainer = hf.sparse_trainer(hf.arguments(tmp_path), steps=6, topology=ow.Topology(every=2))
    trainer.train()
    logged = [each for each in trainer.state.log_history if "sad/start" in each]
    assert [each["step"] for each in logged] == [2, 4, 6]
    assert logged[-1]["flip_rate/start"] > 0


def test_what_leaves_training_is_sparse(row, tmp_path):
    trainer = hf.sparse_trainer(hf.arguments(tmp_path, save_strategy="steps", save_steps=3), steps=6)
    model = trainer.model
    trainer.train()
    trainer.save_model(tmp_path / "out")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert ow.verify(loaded, pattern="2:4").sparse.keys() == hf.DIMS.keys()
    assert torch.equal(logits(loaded), logits(model))
    files = [tmp_path / FILE, tmp_path / "checkpoint-3" / FILE, tmp_path / "checkpoint-6" / FILE]
    assert all(file.exists() for file in files)
    latent = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-6")  # for resuming
    with pytest.raises(ow.NotSparse):
        ow.verify(latent, pattern="2:4")
    what = "`from_pretrained(save_pretrained(model))` of a finalized GPT-2: dense names, 2:4 weights, equal logits"
    row("Export", what, packages=("transformers",))


def test_a_broken_promise_is_found_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("openwork.integrations.hf_trainer.save_compressed", lambda *_: None)  # verifies, too
    trainer = hf.sparse_trainer(hf.arguments(tmp_path), steps=2)
    trainer.model.transformer.h[1].mlp.c_fc = hf.gpt2().transformer.h[1].mlp.c_fc  # and its mask is gone
    with pytest.raises(ow.NotSparse, match=r"h\.1\.mlp\.c_fc"):
        trainer.train()


def test_the_compressed_file_holds_the_final_model(tmp_path):
    trainer = hf.sparse_trainer(hf.arguments(tmp_path), steps=2)
    trainer.train()
    assert torch.equal(logits(ow.load(tmp_path / FILE, into=hf.gpt2())), logits(trainer.model))


def test_a_model_in_training_is_saved_projected(tmp_path):
    model = hf.gpt2()
    ow.sparsify(model, "2:4")
    model.save_pretrained(tmp_path, state_dict=projected_state_dict(model))
    loaded, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert loaded.state_dict().keys() == hf.gpt2().state_dict().keys()
    assert ow.verify(loaded, pattern="2:4").sparse.keys() == hf.DIMS.keys()
    assert torch.equal(logits(loaded), logits(model))
    assert ow.masks(model).keys() == hf.DIMS.keys()  # it goes on training


def test_fixed_masks_leave_no_trace_in_what_is_saved(tmp_path):
    model = hf.gpt2()
    ow.sparsify(model, "2:4", ow.ASP())
    assert projected_state_dict(model).keys() == hf.gpt2().state_dict().keys()


def test_tied_embeddings_stay_tied_and_dense(row, tmp_path):
    model = hf.gpt2()
    report = ow.sparsify(model, "2:4")
    assert "tied to" in report.skipped["transformer.wte.weight"]
    model.save_pretrained(tmp_path, state_dict=projected_state_dict(model))
    for each in (model, ow.finalize(model), GPT2LMHeadModel.from_pretrained(tmp_path)):
        assert each.lm_head.weight is each.transformer.wte.weight
        assert bool((each.lm_head.weight != 0).all())
    row("Export", "tied embeddings of GPT-2: stay tied, and dense", packages=("transformers",))


def test_generate(row, tmp_path):
    """With a key-value cache: sparsified, finalized and loaded models say the same, and dense says something else."""
    model = hf.gpt2()
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    ow.sparsify(model, "2:4")
    said = model.generate(**prompt)
    model.save_pretrained(tmp_path, state_dict=projected_state_dict(model))
    assert torch.equal(said, GPT2LMHeadModel.from_pretrained(tmp_path).generate(**prompt))
    assert torch.equal(said, ow.finalize(model).generate(**prompt))
    assert not torch.equal(said, hf.gpt2().generate(**prompt))
    row("Export", "`generate()` of GPT-2: sparsified, finalized and loaded say the same", packages=("transformers",))


def test_dense_training_is_watched_only(tmp_path):
    model = hf.gpt2()
    ow.sparsify(model, "2:4", ow.Dense())
    trainer = Trainer(model, hf.arguments(tmp_path), train_dataset=hf.texts(2 * hf.BATCH))
    trainer.add_callback(callback := SparseCallback(trainer, ow.Topology(every=1)))
    trainer.train()
    assert len(callback.topology.records) == 2
    assert not (tmp_path / FILE).exists()


# --- resuming ----------------------------------------------------------------------------------------------------


def callback_of(trainer):
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, SparseCallback))


def finished(trainer, **more):
    """The dense weights at the end, steps and topology as JSON. A dispatch mode would change how dropout draws."""
    trainer.add_callback(last := Last())
    trainer.train(**more)
    callback = callback_of(trainer)
    return last.weights, json.dumps([callback.handle.steps, callback.topology.records])


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_continues_bit_for_bit(row, tmp_path):
    weights, recorded = finished(hf.resumable(tmp_path / "whole"))
    script = Path(__file__).with_name("run_and_kill.py")
    killed = subprocess.run([sys.executable, script, "transformers", tmp_path / "run", "11"], check=False)
    assert killed.returncode == -9
    for step in (4, 8):  # in the middle of the first epoch, and of the second
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        its_weights, its_recorded = finished(hf.resumable(tmp_path / "resumed"), resume_from_checkpoint=checkpoint)
        assert distance(its_weights, weights) == 0
        assert its_recorded == recorded
    what = "transformers' `Trainer`: killed (SIGKILL) in the middle of an epoch, resumed"
    row("Trainers", what, resumes=True, packages=("transformers",))


def test_a_dense_checkpoint_can_be_continued_sparse(tmp_path):
    dense = Trainer(hf.gpt2(), hf.arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=hf.texts(16))
    dense.train()
    arguments = hf.arguments(tmp_path, save_strategy="steps", save_steps=2, num_train_epochs=2)
    trainer = hf.sparse_trainer(arguments, steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback_of(trainer).handle.steps == 2


def test_a_sparse_checkpoint_is_not_continued_dense(tmp_path):
    arguments = hf.arguments(tmp_path, save_strategy="steps", save_steps=2)
    hf.sparse_trainer(arguments, steps=2).train()
    dense = Trainer(hf.gpt2(), arguments, train_dataset=hf.texts(16))
    dense.add_callback(SparseCallback(dense))
    with pytest.raises(ValueError, match="to resume a sparse run, sparsify first"):
        dense.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_callback_that_the_trainer_rebuilt_says_what_to_do(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2}
    hf.sparse_trainer(hf.arguments(tmp_path, **more), steps=2).train()
    arguments = hf.arguments(tmp_path, restore_callback_states_from_checkpoint=True, num_train_epochs=2, **more)
    with pytest.raises(ValueError, match="set restore_callback_states_from_checkpoint=False"):
        hf.sparse_trainer(arguments, steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoints_while_a_schedule_runs_are_for_resuming(tmp_path):
    model = hf.gpt2()
    ow.sparsify(model, "2:4", ow.MdGf(3), exclude=["*wte*", "*wpe*"])
    settings = hf.arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    trainer = Trainer(model, settings, train_dataset=hf.texts(4 * hf.BATCH))
    trainer.add_callback(SparseCallback(trainer))
    with pytest.warns(UserWarning, match=r"no model\.openwork\.safetensors beside .*not yet 2:4 \(step 2 of 3\)"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2" / FILE).exists()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-4" / FILE).exists()
    assert (tmp_path / FILE).exists()
