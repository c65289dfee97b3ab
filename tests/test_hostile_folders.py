"""Whatever a model folder holds, loading it is one error that names the file, and costs little."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALLOWED = r"""(?x)
    rope_base\ =\ '(2.5|1000000000)' | name\ =\ '../flow' | drift/.*(largest|heat)\ =\ '2.5' | tuned\ =\ '0'
    | text/.*(classes\ =\ '0'|class_names) | codes/.*caption_dim\ =\ '0' | sampler\ (last_)?steps\ =\ '0'
    | sampler\ shift\ =\ '2.5' | more\ bytes"""
Outcomes = list[list[str]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of hundreds of spoilt folders, loaded in one process that may take 1 GiB beyond its imports."""
    work = tmp_path_factory.mktemp("hostile")
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "BOZZETTO_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "hostile_folders.py"), str(work / "models")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_spoilt_folder_is_refused_and_never_a_traceback(outcomes: Outcomes) -> None:
    assert len(outcomes) > 500
    assert [outcome for outcome in outcomes if outcome[1] not in ("refused", "loaded")] == []


def test_the_error_names_the_file(outcomes: Outcomes) -> None:
    for what, end, said in outcomes:
        place = Path(what.split(":")[0])
        folder = place.parent if place.name != "captions.safetensors" else place
        assert end != "refused" or str(folder) in said, (what, said)


def test_only_what_may_be_so_is_loaded(outcomes: Outcomes) -> None:
    """Values within their ranges that the weights say nothing against; missing ones that have a default."""
    loaded = {what for what, end, _ in outcomes if end == "loaded" and "without" not in what}
    assert {what for what in loaded if not re.search(ALLOWED, what)} == set()
