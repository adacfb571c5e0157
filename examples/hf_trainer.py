"""Hugging Face's Trainer: one callback. A small BERT learns which of two words stands in a sentence more often.

pip install openwork transformers accelerate
python hf_trainer.py
"""

import torch
from openwork.integrations.hf_trainer import SparseCallback  # before transformers: it repairs a broken torchvision
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import openwork as ow


class Sentences(Dataset):
    """Yours: tokenized text."""

    def __init__(self, count: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, 20, (count, 15), generator=draw)
        self.labels = ((self.words == 1).sum(1) > (self.words == 2).sum(1)).long()

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        return {"input_ids": self.words[i], "labels": self.labels[i]}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


torch.manual_seed(0)
config = BertConfig(vocab_size=20, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
model = BertForSequenceClassification(config)  # or .from_pretrained("your/model")
print(ow.sparsify(model, "2:4", ow.SRSTE(decay=2, decoupled=True), exclude=["classifier", "*embeddings*"]))

arguments = TrainingArguments(
    "out", num_train_epochs=3, per_device_train_batch_size=50, learning_rate=2e-3, use_cpu=True, report_to="none"
)
trainer = Trainer(model, arguments, train_dataset=Sentences(1500, 0), compute_metrics=accuracy)
trainer.add_callback(SparseCallback(trainer))
trainer.train()  # at its end the model is verified, saved compressed into "out", and plain again
print(trainer.evaluate(Sentences(500, 1)))

trainer.save_model("out")  # the usual files, with exact zeros
again = BertForSequenceClassification.from_pretrained("out")
print(ow.verify(again, pattern=ow.Selection("2:4", exclude=["classifier", "*embeddings*"])))
