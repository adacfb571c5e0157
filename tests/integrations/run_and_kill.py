"""`run_and_kill.py TRAINER FOLDER AFTER`: a training that ends by SIGKILL after AFTER batches or steps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: F401

if __name__ == "__main__":
    which, folder, after = sys.argv[1:]
    if which == "transformers":
        from integrations import hf

        hf.resumable(folder, int(after)).train()
    elif which == "lightning":
        from integrations import lit

        run, module, loader = lit.resumable(folder, int(after))
        run.fit(module, loader)
    else:
        from integrations import loop

        loop.resumable(folder, int(after))
