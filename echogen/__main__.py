"""Make ``python -m echogen`` work like the ``echogen`` command."""

import sys

from echogen.cli import main

sys.exit(main())
