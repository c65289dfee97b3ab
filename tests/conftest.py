"""Make the package importable from a checkout that is not installed."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("bozzetto") is None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "src"))
