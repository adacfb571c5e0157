"""`forked.py JOBS`: trainings on two processes each, one job after the other, forked so that libraries load once.

A job is {"task", "flags", "kill"}: the command line of `openwork train`, and after how many batches the second process
kills itself (0: never). Prints what became of the two processes of each job: their exit codes, as JSON.
"""

import json
import os
import signal
import socket
import sys
import time

import torch

from openwork.recipes import find, recipe
from openwork.recipes.module import pl
from openwork.recipes.parser import parse

PATIENCE = 60  # seconds for the other process to end by itself


class Kill(pl.Callback):
    def __init__(self, batch):
        self.left = batch

    def on_train_batch_end(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def rank(number, port, job, config):
    """What torchrun gives a process, and the training."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}
    recipe.write_report = lambda _: None  # most of the time of so short a run, and tested elsewhere
    recipe.train(config, [Kill(job["kill"])] if job["kill"] and number == 1 else [])


def forked(function, *arguments):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def run(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = parse(find(job["task"]).config, job["flags"], "openwork train", "")
    children = [forked(rank, number, port, job, config) for number in (0, 1)]
    codes, until = {}, float("inf")
    while len(codes) < 2:
        for number, child in enumerate(children):
            if number in codes:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[number] = os.waitstatus_to_exitcode(status)
                if codes[number]:
                    until = min(until, time.monotonic() + PATIENCE)
            elif time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[0], codes[1]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
