"""python -m bozzetto"""

import sys

from bozzetto.cli.main import main

if __name__ == "__main__":
    code = main()
    exec("")  # one raised, if caught, in source run as text makes -m end by SIGINT; this is a later one
    sys.exit(code)
