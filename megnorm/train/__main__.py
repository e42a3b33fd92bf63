"""``torchrun -m megnorm.train --config run.yaml key=value``: the same as ``megnorm train``."""

import sys

from megnorm.train.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
