"""python -m bozzetto"""

import sys

from bozzetto.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
