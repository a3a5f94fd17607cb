import os
import pathlib
import shutil
import subprocess
import sys
import warnings

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


# Of the Python module, which is imported only where a test asks for it.

@pytest.fixture(scope="session")
def words():
    """Some 2,500 tokens of English."""
    import numpy as np

    rng = np.random.default_rng(0)
    nouns = "storm sea letter doctor window garden horse river winter candle road stranger captain lady silence".split()
    sentence = "The captain of the ship said that the weather would change before the morning, and he was right; "
    return "".join(sentence + f"the {rng.choice(nouns)} and the {rng.choice(nouns)} of number {rng.integers(1000)}. " for _ in range(64))


@pytest.fixture(scope="session")
def text_file(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words)
    return path


@pytest.fixture(scope="session")
def demo(demo_model):
    """The bundled model alive, and its tokenizer."""
    import mlx_lm

    return mlx_lm.load(str(demo_model))


@pytest.fixture(scope="session")
def own_tokenizer(demo_model):
    import veloxquant_mlx

    return veloxquant_mlx.Tokenizer.load(demo_model)


@pytest.fixture
def own_code(monkeypatch):
    """Live models run by their own code, as if the engine had none of their families."""
    monkeypatch.setattr("veloxquant_mlx._sources.engine_model", lambda *_, **__: None)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no GPU back end")
        warnings.filterwarnings("ignore", "no facts are sown")
        warnings.filterwarnings("ignore", "own text")
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory, demo_model):
    """About 3,000 tokens of English."""
    import numpy as np

    sentence = "The captain of the ship said that the weather would change before the morning, and he was right; "
    words = "storm sea letter doctor window garden horse river winter candle road stranger captain lady silence".split()
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(sentence + f"the {rng.choice(words)} and the {rng.choice(words)} of number {rng.integers(1000)}. " for _ in range(80)))
    return path


@pytest.fixture(scope="session")
def plan(run, demo_model, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "demo.plan"
    done = run("calibrate", demo_model, "--method", "vecinfer", "--bits", 1, "--samples", 4, "--length", 128, "--text", text, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def tiny(tmp_path, demo_model):
    """A small model that fits the bundled tokenizer, to be damaged."""
    from tiny_models import write_model

    folder = write_model(tmp_path / "tiny", "llama", vocab_size=8192)
    shutil.copy(demo_model / "tokenizer.json", folder)
    return folder
