"""What takes long is done once for all test processes."""

import os
import time

LIMIT = 1800  # seconds


def filled_once(tmp_path_factory, name, fill):
    """The folder that `fill(folder)` left something in; a process that comes later waits for the first.

    Raises TimeoutError where that one never ends.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the parent is that of all workers
    folder, done = base / name, base / f"{name}.done"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(LIMIT):
            if done.exists():
                return folder
            time.sleep(1)
        raise TimeoutError(
            f"{done} is not there after {LIMIT} seconds: the process that should fill {folder} is gone"
        ) from None
    try:
        fill(folder)
    finally:
        done.touch()
    return folder
