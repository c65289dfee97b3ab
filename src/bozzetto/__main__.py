"""python -m bozzetto"""

import sys

from bozzetto.cli import main

if __name__ == "__main__":
    sys.exit(main())
