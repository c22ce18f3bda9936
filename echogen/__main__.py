"""Lets ``python -m echogen`` stand in for the ``echogen`` command."""

import sys

from echogen.cli import main

sys.exit(main())
