"""The wheel, as someone has it who installs it and has none of this machine's libraries in mind."""
import os
import re
import signal
import subprocess
import sys
import zipfile

import pytest

from conftest import ROOT

CARRIED = ["fmt", "hwy", "pcre2", "utf8proc", "crypto"]
USE = """
import re
import veloxquant_mlx
import mlx.core as mx
from veloxquant_mlx.allocators import ratequant

calls = veloxquant_mlx.core.gemm_calls()
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
assert veloxquant_mlx.core.gemm_calls() == calls + 1, "MLX multiplies with another BLAS"
found = ratequant.calibrate_layer_sensitivities(FOLDER, None, num_samples=2, sequence_length=32, device="cpu")
assert list(found) == [f"layer_{i}" for i in range(12)] and all(s.mean_sensitivity > 0 for s in found.values())
with open("/proc/self/maps") as maps:
    print(veloxquant_mlx.__version__, *sorted(set(re.findall(r"/.*", maps.read()))), sep="\\n")
"""


def output(*command, status=0, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tools, tmp_path_factory):
    """Of what the build folder has compiled; developers' options stay, so that nothing is compiled again there."""
    folder = tmp_path_factory.mktemp("wheel")
    output("bash", ROOT / "scripts" / "wheel.sh", folder, "--no-build-isolation", "-C", f"build-dir={tools.parent}",
           "-C", "cmake.define.VELOXQUANT_DEVELOPER=ON")
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """Folder of the programs of a virtual environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("clean")
    output(sys.executable, "-m", "venv", folder)
    output(folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    return folder / "bin"


def test_what_the_wheel_carries(wheel):
    assert re.fullmatch(r"veloxquant-[\d.]+-cp3\d+-cp3\d+-manylinux_\d+_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    carried = [name for name in names if re.match(r"veloxquant\.libs/.", name)]
    assert [sum(f"/lib{name}" in file for file in carried) for name in CARRIED] == [1] * len(CARRIED) == [1] * len(carried)
    assert {f"veloxquant_mlx/{name}" for name in ["__init__.py", "_core.pyi", "py.typed", "bin/veloxquant"]} <= set(names)
    assert not any("mlx/lib/" in name or "openblas" in name or name.endswith((".h", ".a", ".cmake")) for name in names)
    stubs = zipfile.ZipFile(wheel).read("veloxquant_mlx/_core.pyi").decode()
    assert "mlx.core.array" in stubs and "::" not in stubs
    compile(stubs, "_core.pyi", "exec")


def test_the_module_in_a_clean_environment(clean, demo_model, tmp_path):
    use = USE.replace("FOLDER", repr(str(demo_model)))
    version, *files = output(clean / "python", "-W", "error", "-c", use, cwd=tmp_path).splitlines()
    assert f"-{version}.dist-info" in " ".join(os.listdir(next(clean.parent.glob("lib/python*/site-packages"))))
    for name in CARRIED:
        assert any(f"/veloxquant.libs/lib{name}" in file for file in files), name
    assert any("/scipy_openblas32/lib/libscipy_openblas" in file for file in files)
    assert not any("/usr/" in file for file in files if re.search("openblas|fmt|hwy|pcre2|utf8proc", file))


def test_the_program_in_a_clean_environment(clean, demo_model, tmp_path):
    assert re.match(r"veloxquant [\d.]+, OpenBLAS ", output("veloxquant", "--version", env={"PATH": str(clean)}))
    said = output(clean / "veloxquant", "sensitivity", tmp_path, "-o", tmp_path / "s.json", status=1)
    assert str(tmp_path) in said
    long = ["sensitivity", demo_model, "--samples", "1000", "--device", "cpu"]
    process = subprocess.Popen([clean / "veloxquant", *long], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert os.readlink(f"/proc/{process.pid}/exe").endswith("veloxquant_mlx/bin/veloxquant")
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_a_missing_debian_package_is_named(tmp_path):
    said = output(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT, "-C",
                  "cmake.define.CMAKE_DISABLE_FIND_PACKAGE_fmt=ON", env={**os.environ, "PKG_CONFIG_LIBDIR": str(tmp_path)}, status=1)
    assert "apt-get install libfmt-dev libhwy-dev libpcre2-dev libutf8proc-dev\n" in said


def test_versions_are_those_of_the_scripts():
    pins = re.findall(r'"([\w\[\]-]+==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    lines = "".join(path.read_text() for path in (ROOT / "scripts").glob("requirements*.txt")).replace("_", "-").splitlines()
    assert len(pins) >= 5 and set(pins) <= set(lines)


def test_setup_knows_the_debian_packages():
    named = set(re.findall(r"veloxquant_needs\((\S+) ", (ROOT / "CMakeLists.txt").read_text())) - {"package"}
    listed = {line.split()[0] for line in (ROOT / "scripts" / "debian-packages.txt").read_text().splitlines()}
    assert len(named) >= 9 and named <= listed
