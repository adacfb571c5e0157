"""A convolutional network on handwritten digits, 2:4 from the first step, in a plain loop.

pip install openwork scikit-learn
python plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import openwork as ow

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
labels = torch.tensor(labels)
train, test = slice(0, 1400), slice(1400, None)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


model = network()
report = ow.sparsify(model, "2:4", ow.SRSTE(decay=0.02), exclude=["9"], example=images[:1])
print(report)

EPOCHS, BATCH = 10, 100
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 14)
topology = ow.Topology(every=14)
ow.attach(optimizer, model, topology=topology)

for epoch in range(EPOCHS):
    model.train()
    for batch in torch.randperm(1400).split(BATCH):
        loss = cross_entropy(model(images[train][batch]), labels[train][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch}: accuracy {accuracy:.3f}, flip rate {topology.scalars()['flip_rate/step']:.2%} a step")

print(ow.verify(model, images[:1]).products)
ow.save(model, "digits.safetensors")
loaded = ow.load("digits.safetensors", into=network()).eval()
with torch.no_grad():
    assert torch.equal(loaded(images[test]), model(images[test]))
