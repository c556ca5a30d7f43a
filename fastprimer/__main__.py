"""python -m fastprimer: the command line."""

import sys

from fastprimer.cli import main

sys.exit(main())
