"""The installed library, as a program of somebody else finds, compiles, links and runs it."""
import json
import os
import re
import subprocess

import numpy as np
import pytest

from conftest import ROOT

HEADERS = ["base.h", "veloxquant.h"]


def output(*command, status=0, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def configure(folder, prefix, *options, status=0):
    return output("cmake", "-S", ROOT / "examples" / "embed", "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                  f"-DCMAKE_PREFIX_PATH={prefix}", *options, status=status)


@pytest.fixture(scope="session")
def base_alone(tools, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("base")
    output("cmake", "--install", tools.parent, "--prefix", prefix, "--component", "base")
    return prefix


@pytest.fixture(scope="module")
def plan(run, demo_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "demo.plan"
    done = run("calibrate", demo_model, "--method", "turboquant", "--units", "uniform", "--bits", 2.25, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def test_a_program_measures_as_ours_does(installed, run, demo_model, plan, tmp_path):
    configure(tmp_path / "build", installed)
    output("cmake", "--build", tmp_path / "build")
    measure, text = tmp_path / "build" / "measure", ROOT / "docs" / "design.md"
    done = run("evaluate", demo_model, "--plan", plan, "--peer", "mlx4", "--text", text, "--windows", 4, "--length", 256, "--json")
    ours = json.loads(done.stdout)
    lines = output(measure, demo_model, plan, text).splitlines()
    assert [line.split()[0] for line in lines] == ["full", "plan", "mlx4"]
    for line, row in zip(lines, ours, strict=True):
        bits, perplexity, kl = map(float, re.findall(r"\d+\.\d+", line))
        assert (bits, perplexity, kl) == (round(row["effective_bits"], 3), round(row["perplexity"], 3), round(row["kl_mean"], 5))
    # Our matrix product stands before the reference BLAS of MLX's wheel here too, as a system's OpenBLAS has to.
    assert re.search(r" T cblas_sgemm$", output("nm", "-D", measure), re.M)
    libraries = re.findall(r"lib\w*(?:blas|mlx)\w*", output("ldd", measure))
    assert {"libscipy_openblas", "libmlx"} <= set(libraries) or libraries[0] == "libopenblas"


def test_the_installed_program_runs(installed):
    assert output(installed / "bin" / "veloxquant", "--version").startswith("veloxquant ")


def test_base_alone_needs_no_mlx(base_alone, plan, tmp_path):
    configure(tmp_path / "build", base_alone, "-DWITH_MODELS=OFF", "-DCMAKE_DISABLE_FIND_PACKAGE_MLX=ON")
    output("cmake", "--build", tmp_path / "build")
    codec = tmp_path / "build" / "codec"
    assert "mlx" not in output("ldd", codec) and "mlx" not in output("nm", "-C", codec)
    assert not list(base_alone.rglob("*mlx*")) and not (base_alone / "bin").exists()
    assert not re.search(r'#include [<"]mlx/', "".join(path.read_text() for path in base_alone.rglob("*.h")))
    vectors = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)
    done = subprocess.run([codec, plan, "3", "keys", "1"], input=vectors.tobytes(), capture_output=True, check=True)
    restored = np.frombuffer(done.stdout, np.float32).reshape(vectors.shape)
    error = np.square(restored - vectors).sum() / np.square(vectors).sum()
    assert 0.10 < error < 0.13  # Lloyd-Max with four levels on a Gaussian: 0.1175
    assert f"256000 bytes in 18000, relative error {error:.4f}" in done.stderr.decode()


def test_base_is_configured_without_mlx(tmp_path):
    output("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DVELOXQUANT_ENGINE=OFF", "-DCMAKE_DISABLE_FIND_PACKAGE_MLX=ON")
    commands = (tmp_path / "compile_commands.json").read_text()
    assert "veloxquant/quantize/registry.cpp" in commands and "mlx" not in commands


@pytest.mark.parametrize("which, says", [("base_alone", "veloxquant::base alone"), ("installed", "there is no MLX")])
def test_what_is_missing_is_said(which, says, request, tmp_path):
    said = configure(tmp_path, request.getfixturevalue(which), "-DCMAKE_DISABLE_FIND_PACKAGE_MLX=ON", status=1)
    assert says in " ".join(said.split())


@pytest.mark.parametrize("by", ["base_alone", "ours"])
def test_a_missing_openblas_is_said(by, request, tmp_path):
    nowhere = tmp_path / "nowhere"
    option = f"-DOPENBLAS_ROOT={nowhere}"
    if by == "ours":
        said = output("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", "-DVELOXQUANT_ENGINE=OFF", option, status=1)
    else:
        said = configure(tmp_path / "build", request.getfixturevalue(by), "-DWITH_MODELS=OFF", option, status=1)
    said = " ".join(said.split())
    assert f"in OPENBLAS_ROOT, {nowhere}: OpenBLAS (libscipy_openblas" in said and "pip install scipy-openblas32" in said


@pytest.mark.parametrize("header", HEADERS)
def test_every_stable_name_is_there(header, installed, tools, tmp_path):
    """What a public header promises in backticks, its includes declare."""
    names = re.findall(r"`([\w:]+)`", (installed / "include" / "veloxquant" / header).read_text())
    assert len(names) > 20
    member = re.compile(r"[A-Z]\w*::")
    lines = [f"static_assert(requires {{ &veloxquant::{n}; }});" if member.match(n) else f"using veloxquant::{n};" for n in names]
    (tmp_path / "names.cpp").write_text(f'#include "veloxquant/{header}"\nnamespace names {{\n' + "\n".join(lines) + "\n}\n")
    options = [f"-I{installed / 'include'}"]
    if header != "base.h":
        cache = (tools.parent / "CMakeCache.txt").read_text()
        options.append(f"-I{re.search(r'^MLX_DIR:PATH=(.*)/share/cmake/MLX$', cache, re.M)[1]}/include")
    output(os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", *options, tmp_path / "names.cpp")
