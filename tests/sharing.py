"""What takes long is done once for all test processes."""

import os
import time


def filled_once(tmp_path_factory, name, fill):
    """The folder that `fill(folder)` left something in; a process that comes later waits for the first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the parent is that of all workers
    folder, done = base / name, base / f"{name}.done"
    try:
        folder.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.2)
        return folder
    try:
        fill(folder)
    finally:
        done.touch()
    return folder
