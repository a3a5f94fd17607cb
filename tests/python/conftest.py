import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The Python module as it is in the build folder.
MODULE = pathlib.Path(os.environ.get("VELOXQUANT_TOOLS", ROOT / "build" / "tools")).resolve().parent / "python"
sys.path.insert(0, str(MODULE))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(scope="session")
def tools():
    """Folder of the small test programs."""
    return pathlib.Path(os.environ.get("VELOXQUANT_TOOLS", ROOT / "build" / "tools"))


@pytest.fixture(scope="session")
def program():
    return pathlib.Path(os.environ.get("VELOXQUANT_PROGRAM", ROOT / "build" / "bin" / "veloxquant"))


@pytest.fixture(scope="session")
def installed(tools, tmp_path_factory):
    """Where the build was installed."""
    prefix = tmp_path_factory.mktemp("installed")
    subprocess.run(["cmake", "--install", tools.parent, "--prefix", prefix], check=True, capture_output=True)
    return prefix


@pytest.fixture(scope="session")
def demo_model():
    return ROOT / "examples" / "demo"


@pytest.fixture(scope="session")
def shared():
    """Texts and models beside the project, where there are any."""
    folder = os.environ.get("VELOXQUANT_SHARED")
    if not folder:
        pytest.skip("no VELOXQUANT_SHARED folder here")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def run(program):
    """Runs the program; returns the finished process."""

    def run(*arguments, **options):
        return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, **{"timeout": 900, **options})

    return run
