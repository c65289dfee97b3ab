"""Everything that draws does so on another device than the processor, from tensors of that device alone (tests/
two_devices.py says how there comes to be one)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from torch.utils import backend_registration

import two_devices
from hostile_folders import write_families

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="came with a later torch"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("devices")
    write_families(root)
    run = [sys.executable, two_devices.__file__, str(root), str(root / "found.json")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("case", two_devices.CASES)
def test_drawing_elsewhere_mixes_no_devices_and_gives_the_same_tokens(case: str, found: dict[str, str]) -> None:
    assert not found[case], found[case]
