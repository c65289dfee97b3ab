"""Provenance says where a file came from, and nothing about anybody's folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bozzetto.evaluate import provenance
from bozzetto.evaluate.provenance import command, commit, machine, versions


def test_the_command_names_the_program_without_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/bozzetto", "generate", "tulip", "--out", "a b"])
    assert command() == "bozzetto generate tulip --out 'a b'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bozzetto/__main__.py", "sample"])
    assert command() == "bozzetto sample"
    monkeypatch.setattr(sys, "argv", ["/somewhere/examples/same_bytes.py"])
    assert command() == "same_bytes.py"


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git repository that holds provenance.py, committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    source = tmp_path / "provenance.py"
    source.write_text("1\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(source))
    return source


def test_the_commit_is_marked_where_files_differ_from_it(checkout):
    clean = commit()
    assert clean is not None and len(clean) == 40
    checkout.write_text("2\n")
    assert commit() == clean + "+"


def test_there_is_no_commit_in_somebody_elses_repository(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(checkout.parent / "untracked.py"))
    assert commit() is None


def test_there_is_no_commit_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None


def test_versions_and_machine_are_named():
    assert set(versions()) == {"bozzetto", "torch", "python", "platform"}
    found = machine()
    assert found["processor"] and found["cores"] and found["threads"]
