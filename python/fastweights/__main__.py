"""`python -m fastweights` is the command `fastweights`."""

import sys

from fastweights.cli import main

sys.exit(main())
