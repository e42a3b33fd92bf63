"""``python -m megnorm``: the same as the command ``megnorm``."""

import sys

from megnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
