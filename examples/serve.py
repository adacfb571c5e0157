"""Serve a compressed ResNet-50 over HTTP, deployed. Any server that calls a function will do: it is a plain nn.Module.

pip install fastapi uvicorn
NET=net.safetensors uvicorn --app-dir examples serve:app
curl -X POST --data-binary @image.f32 http://127.0.0.1:8000/classify     # 3 x 224 x 224 floats, normalized
"""

import json
import os

import torch
from fastapi import FastAPI, Request
from torchvision.models import resnet50

import openwork as ow

SHAPE = (1, 3, 224, 224)


def network() -> torch.nn.Module:
    """What is served. Times every layer at the start, unless CHOSEN has the `deployment.chosen` of an earlier one."""
    with torch.device("meta"):
        empty = resnet50()
    chosen = json.loads(os.environ.get("CHOSEN", "null"))
    return ow.load_deployed(os.environ["NET"], empty, torch.zeros(SHAPE), chosen=chosen)


app, model = FastAPI(), network()


@app.post("/classify")
async def classify(request: Request) -> dict[str, int]:
    image = torch.frombuffer(bytearray(await request.body()), dtype=torch.float32).reshape(SHAPE)
    with torch.inference_mode():
        return {"class": int(model(image).argmax())}
