"""``python -m emalgam``: the command line."""

from __future__ import annotations

import sys

from emalgam.cli import main

sys.exit(main())
