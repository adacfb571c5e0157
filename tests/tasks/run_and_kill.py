"""A training that kills itself: `run_and_kill.py CONFIG_JSON BATCH` ends by SIGKILL after batch BATCH (0: never)."""

import json
import os
import signal
import sys

from openwork.tasks.classification import train
from openwork.tasks.config import Config
from openwork.tasks.module import pl


class Kill(pl.Callback):
    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train(Config(**json.loads(sys.argv[1])), [Kill(int(sys.argv[2]))])
