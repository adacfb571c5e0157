"""`python -m openwork.cli`: the command `openwork`."""

import sys

from openwork.cli.main import main

sys.exit(main())
