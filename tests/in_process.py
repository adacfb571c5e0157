"""An engine for tests of benchmarks: it prepares and runs in this process, which is quicker than one of its own."""

from __future__ import annotations

import torch

from openwork.engines import worker


class InProcess:
    """A worker that prepares and runs in this process, which is quicker."""

    def __init__(self, target, case, seconds=0):
        self.prepared, self.difference = worker._ready(target, case)
        self.version, self.about, self.names = self.prepared.version, self.prepared.about, list(self.difference)

    def turn(self, name, seconds):
        with torch.inference_mode():
            return worker.timed(self.prepared.calls[name], seconds)

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
