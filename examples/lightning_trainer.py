"""Lightning: one callback attaches the optimizer, logs SAD and flip rate, verifies, and writes the compressed file.

pip install openwork lightning scikit-learn
python lightning_trainer.py
"""

from openwork.integrations.lightning import SparseCallback  # isort: skip  (first: it repairs a broken torchvision)
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import openwork as ow


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


pl.seed_everything(0)
x, y = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
train, validation = torch.utils.data.random_split(data, [1400, len(data) - 1400])

module = Classifier()
print(ow.sparsify(module.net, "2:4", ow.SRSTE(decay=2, decoupled=True), exclude=["4"]))
callbacks = [SparseCallback(), ModelCheckpoint(dirpath="checkpoints")]
trainer = pl.Trainer(max_epochs=8, accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False)
trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(validation, 400))
trainer.validate(module, DataLoader(validation, 400))

ow.finalize(module)
print(ow.verify(module.net, pattern=ow.Selection("2:4", exclude=["4"])))
print("saved:", *ow.load_state_dict("checkpoints"))  # the folder's model.openwork.safetensors
