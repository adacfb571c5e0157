"""A small GPT-2 with tied embeddings and what trains it, for tests and for the process that is killed."""

import os
import signal

import torch
from plain_loop import BETAS, DECAY, LR, WEIGHT_DECAY
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import openwork as ow
from openwork.integrations.hf_trainer import SparseCallback

VOCABULARY, LENGTH, BATCH = 40, 7, 8
EPS = 1e-3  # a key's bias has no gradient but rounding, which Adam with 1e-8 would blow up to whole steps
PARTS = {"attn.c_attn": 0, "attn.c_proj": 0, "mlp.c_fc": 0, "mlp.c_proj": 0}  # Conv1D: (in, out)
LAYERS = 2


def dims_of(layers):
    return {f"transformer.h.{i}.{part}.weight": dim for i in range(layers) for part, dim in PARTS.items()}


DIMS = dims_of(LAYERS)


def gpt2(dropout=0.0, layers=LAYERS):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_inner": 32, "n_layer": layers, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=1, pad_token_id=1))


def texts(count):
    """`Trainer` divides the loss by the number of labels; the first of a text is never predicted."""
    draw = torch.Generator().manual_seed(1)
    drawn = torch.randint(VOCABULARY, (count, LENGTH), generator=draw)
    return [{"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])} for ids in drawn]


def batches(steps):
    ids = torch.stack([each["input_ids"] for each in texts(steps * BATCH)])
    return ids.split(BATCH)


def loss_of(call, ids):
    logits = call(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def adamw(w, g, state, t):
    """As `Trainer` groups the parameters: no weight decay on biases and norms."""
    (beta1, beta2), shrunk = BETAS, w * (1 - LR * WEIGHT_DECAY if w.ndim > 1 else 1)
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return shrunk - LR * m / (v.sqrt() + EPS)


def arguments(out, **more):
    beta1, beta2 = BETAS
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "weight_decay": WEIGHT_DECAY,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": EPS,
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **more,
        }
    )


class Kill(TrainerCallback):
    """Ends the process as a power cut would, after `step` steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def sparse_trainer(args, *, steps, dropout=0.0, topology=None, attached=True, layers=LAYERS, **more):
    model = gpt2(dropout, layers)
    ow.sparsify(model, "2:4", ow.SRSTE(DECAY))
    trainer = Trainer(model, args, train_dataset=texts(steps * BATCH), **more)
    if attached:
        trainer.add_callback(SparseCallback(trainer, topology))
    return trainer


def resumable(out, kill_after=0):
    """12 steps in two epochs of 6, with dropout, a falling rate, shuffled; a checkpoint after each fourth."""
    settings = arguments(
        out,
        num_train_epochs=2,
        lr_scheduler_type="linear",
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=4,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
    )
    trainer = sparse_trainer(settings, steps=6, dropout=0.2, topology=ow.Topology(every=1))
    if kill_after:
        trainer.add_callback(Kill(kill_after))
    return trainer
