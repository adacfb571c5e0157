"""`python -m openwork`: the command `openwork`."""

import sys

from openwork.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
