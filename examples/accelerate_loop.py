"""Accelerate: your own loop, with one object that attaches, logs, verifies and saves.

pip install openwork accelerate scikit-learn
accelerate launch accelerate_loop.py        # or: python accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from openwork.integrations.hf_accelerate import SparseRun
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import openwork as ow

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=25, shuffle=True)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
report = ow.sparsify(model, "1:4", ow.SRSTE(decay=0.02), exclude=["4"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
sparse = SparseRun(accelerator, model, optimizer, topology=ow.Topology(every=28))
accelerator.print(report)

for epoch in range(8):
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(inputs), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()  # the decay is added here, once for both micro-batches
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: {sparse.topology.scalars()}")

model = sparse.finish("out")  # verified, plain, and compressed in out/model.openwork.safetensors
if accelerator.is_main_process:
    print(f"accuracy {float((model(x[1400:]).argmax(1) == y[1400:]).float().mean()):.3f}")
    print(ow.verify(model, x[:1], pattern=ow.Selection("1:4", exclude=["4"])).products)
    print({name: weight.shape for name, weight in ow.load_state_dict("out").items()})
