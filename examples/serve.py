"""Serve a compressed ResNet-50 over HTTP. Any server that calls a function will do: the model is a plain nn.Module.

pip install fastapi uvicorn
NET=net.safetensors uvicorn --app-dir examples serve:app
curl -X POST --data-binary @image.f32 http://127.0.0.1:8000/classify     # 3 x 224 x 224 floats, normalized
"""

import os

import torch
from fastapi import FastAPI, Request
from torchvision.models import resnet50

import openwork as ow

SHAPE = (1, 3, 224, 224)


def network() -> torch.nn.Module:
    """What is served. A model from `ow.deploy` takes its place as it is."""
    return ow.load(os.environ["NET"], into=resnet50()).eval()


app, model = FastAPI(), network()


@app.post("/classify")
async def classify(request: Request) -> dict[str, int]:
    image = torch.frombuffer(bytearray(await request.body()), dtype=torch.float32).reshape(SHAPE)
    with torch.inference_mode():
        return {"class": int(model(image).argmax())}
