"""How much memory the verbs take beside the model (docs/performance.md): peaks of a process, as Linux has them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import openwork as ow

SCRIPT = """
import re, tempfile, torch, openwork as ow
def now(key): return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
def peak(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    call()
    return now("VmHWM") - before
model = torch.nn.Sequential(*(torch.nn.Linear(2176, 4096, bias=False) for _ in range(4)))
small = lambda: ow.verify((lambda m: (ow.sparsify(m, "2:4"), m)[1])(torch.nn.Sequential(torch.nn.Linear(8, 8))))
small()  # what is imported on demand
print(peak(lambda: ow.sparsify(model, "2:4")))
print(peak(lambda: ow.verify(model)))
with tempfile.TemporaryDirectory() as folder:
    print(peak(lambda: ow.save(model, folder + "/sparse")))
    print(peak(lambda: ow.load(folder + "/sparse", into=model)))
ow.finalize(model)
print(peak(lambda: ow.verify(model, pattern="2:4")))
"""


@pytest.mark.skipif(ow.kernels.status().isa is None, reason="the references take more")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peaks of memory")
def test_verbs_take_less_than_a_layer_beside_the_model() -> None:
    layer = 34.0  # MiB: such pieces glibc gives back to the system at once
    file = 4 * layer * 0.5313 + 8  # at 2:4; and pages that are not full
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    sparsify, verify, save, load, verify_plain = map(float, done.stdout.split())
    assert sparsify < 0.25 * layer
    assert verify < 1.25 * layer
    assert save < layer
    assert load < file
    assert verify_plain < 0.25 * layer
