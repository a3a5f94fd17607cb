"""The scripts behind `make`, in a tree and on a PATH of stand-ins."""
import os
import shutil
import subprocess

import pytest

from conftest import ROOT


@pytest.fixture
def tree(tmp_path):
    """A copy of scripts/ and the beginnings of a PATH; returns a function that adds a stand-in to it."""
    shutil.copytree(ROOT / "scripts", tmp_path / "tree" / "scripts")

    def program(name, body=None, folder=tmp_path / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
        if body is None:
            (folder / name).symlink_to(shutil.which(name))
        else:
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)

    return program


def call(tmp_path, *command):
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}
    return subprocess.run(list(map(str, command)), cwd=tmp_path / "tree", env=environment, capture_output=True, text=True, timeout=60)


def test_setup_names_what_is_missing(tree, tmp_path):
    for name in ("bash", "sh", "grep", "dirname", "id"):
        tree(name)
    for name in ("cmake", "c++", "ninja", "python3"):
        tree(name, "exit 0")
    tree("pkg-config", '[ "$2" != libhwy ] && [ "$2" != fmt ]')
    done = call(tmp_path, "bash", "scripts/setup.sh")
    assert done.returncode == 1
    assert done.stderr.split("\n", 1)[1].split() == ["libfmt-dev", "libhwy-dev"]


@pytest.mark.parametrize("absolute", [True, False])
def test_build_folders_anywhere(tree, tmp_path, absolute):
    for name in ("bash", "sh", "dirname", "mktemp", "rm", "nproc", "tee", "grep", "sed", "tail"):
        tree(name)
    tree("ctest", "echo '100% tests passed, 0 tests failed out of 3'")
    tree("python", 'echo "$VELOXQUANT_PROGRAM $VELOXQUANT_TOOLS"; echo "2 passed in 1s"', tmp_path / "tree" / ".venv" / "bin")
    build = tmp_path / "elsewhere" if absolute else tmp_path / "tree" / "build"
    build.mkdir()
    done = call(tmp_path, "bash", "scripts/test.sh", build if absolute else "build")
    assert done.returncode == 0, done.stderr
    assert f"{build}/bin/veloxquant {build}/tools" in done.stdout
    assert done.stdout.strip().endswith("5 passed, 0 failed, 0 skipped")
