"""`python -m capsroute` is the command `capsroute`."""

import sys

from .cli import main

sys.exit(main())
