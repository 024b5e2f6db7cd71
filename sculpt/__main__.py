"""`python -m sculpt` is the command `sculpt`."""

import sys

from sculpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
