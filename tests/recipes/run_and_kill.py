"""A training that kills itself: `run_and_kill.py TASK CONFIG_JSON BATCH` dies after batch BATCH (0: never)."""

import json
import os
import signal
import sys

from openwork.recipes import find
from openwork.recipes.module import pl
from openwork.recipes.recipe import train


class Kill(pl.Callback):
    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    task, config, batch = sys.argv[1:]
    train(find(task).config(**json.loads(config)), [Kill(int(batch))])
