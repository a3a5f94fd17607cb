"""The manners of the Python module: imports, warnings, interrupts, threads, help; and the notebook."""
import inspect
import json
import os
import pydoc
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import nbclient
import nbformat
import numpy as np
import pytest

from conftest import MODULE, ROOT

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import veloxquant_mlx
import mlx.core as mx
from veloxquant_mlx import Plan
from veloxquant_mlx.allocators import ratequant, vecinfer
from veloxquant_mlx.allocators.ratequant import DistortionCurve, DistortionPoint, SensitivityResult, calibrate_layer_sensitivities


def python(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(MODULE)}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120, **options)


IMPORTS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {first}
    import veloxquant_mlx
    import mlx.core as mx
before = veloxquant_mlx._load.core.gemm_calls()
x = mx.ones((64, 64))
mx.eval(x @ x)
print(len([w for w in caught if "veloxquant_mlx" in str(w.message)]), veloxquant_mlx._load.core.gemm_calls() > before)
print(*[w.filename for w in caught if "veloxquant_mlx" in str(w.message)])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX brings another BLAS here")
@pytest.mark.parametrize("first, warned", [
    ("", 0), ("import mlx.core as mx", 0), ("import mlx.core as mx; mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))", 1),
], ids=["first", "after mlx", "after a product"])
def test_order_of_imports(first, warned):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("products are the GPU's")
    done = python(IMPORTS.format(first=first))
    assert done.returncode == 0, done.stderr
    counts, files = done.stdout.splitlines()
    assert counts in ("0 True", f"{warned} {not warned}")
    assert set(files.split()) <= {"<string>"}  # where the import stands, not inside the module


def test_no_gpu_is_said_once(demo_model):
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("there is a GPU")
    done = python("""
import sys, warnings
import veloxquant_mlx
from veloxquant_mlx.allocators import vecinfer
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    vecinfer.calibrate_smooth_factors(sys.argv[1], None, 2, 8, device="cpu")
    assert not caught, [str(w.message) for w in caught]
    for _ in range(2):
        vecinfer.calibrate_smooth_factors(sys.argv[1], None, 2, 8)
print([(str(w.message), w.category.__name__) for w in caught])
""", demo_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("UserWarning") == 1 and "GPU" in done.stdout


INTERRUPTED = """
import sys, time, warnings
import veloxquant_mlx
import mlx_lm
from veloxquant_mlx.allocators import ratequant
warnings.simplefilter("ignore")
model, tokenizer = mlx_lm.load(sys.argv[1])
if sys.argv[3] == "own code":
    veloxquant_mlx._sources.engine_model = lambda *_, **__: None
print("ready", flush=True)
try:
    if sys.argv[3] == "own code":
        ratequant.calibrate_layer_sensitivities(model, tokenizer, 20, 512, text=sys.argv[2] * 8)
    else:
        veloxquant_mlx.calibrate(model, tokenizer, 3.0, num_samples=20, sequence_length=512, text=sys.argv[2] * 8).save("made.plan")
except KeyboardInterrupt:
    print(time.time(), flush=True)
"""


@pytest.mark.parametrize("what, after", [("plan", 1.5), pytest.param("plan", 5, marks=pytest.mark.slow), ("own code", 1.5)])
def test_interrupt_ends_a_calibration(what, after, demo_model, words, tmp_path):
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    work.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-c", INTERRUPTED, demo_model, words, what]
    environment = {**os.environ, "PYTHONPATH": str(MODULE), "TMPDIR": str(scratch)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=work, env=environment)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(after)
        sent = time.time()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert float(out) - sent < 2  # about one, where the machine has nothing else to do
    assert list(work.iterdir()) == [] and [path.name for path in scratch.iterdir() if path.name != "mlx"] == []  # mlx: what MLX compiled


def test_other_threads_go_on(demo, words):
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    try:
        calibrate_layer_sensitivities(*demo, 4, 256, text=words)
    finally:
        elapsed = time.monotonic() - begin
        ended.set()
        thread.join()
    assert elapsed > 0.3
    assert len(ticks) > 50 * elapsed and np.max(np.diff(ticks)) < max(0.2, elapsed / 4)


def test_progress_is_shown_where_asked(demo, words, capfd):
    calibrate_layer_sensitivities(*demo, 2, 32, text=words)
    assert capfd.readouterr() == ("", "")
    calibrate_layer_sensitivities(*demo, 2, 32, text=words, progress=True)
    shown = capfd.readouterr()
    assert "perturbing layers" in shown.err and shown.out == ""


def public_functions():
    functions = [getattr(module, name) for module in (veloxquant_mlx, ratequant, vecinfer) for name in module.__all__]
    return [f for f in functions if inspect.isfunction(f)]


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__name__)
def test_functions_have_help(function):
    """What every parameter is, what comes back, and what goes wrong."""
    help = pydoc.render_doc(function, renderer=pydoc.plaintext)
    assert function.__name__ in help
    documentation = inspect.getdoc(function)
    elsewhere = "those of" in documentation or "as in" in documentation
    for name in inspect.signature(function).parameters:
        assert elsewhere or re.search(rf"\b{name}\b|\b{name[0].upper()}\b", documentation), name
    assert re.search(r"\bReturns?\b|→|\[", documentation)  # a shape
    assert "Raises" in documentation


@pytest.mark.parametrize(
    "thing", [veloxquant_mlx, ratequant, vecinfer, Plan, SensitivityResult, DistortionCurve, DistortionPoint, veloxquant_mlx.Tokenizer], ids=lambda t: t.__name__
)


def test_modules_and_classes_have_help(thing):
    documentation = inspect.getdoc(thing)
    assert len(documentation) > 40 and documentation.splitlines()[0] in pydoc.render_doc(thing, renderer=pydoc.plaintext)
    for name, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not name.startswith("_") and (callable(member) or isinstance(member, (property, staticmethod))):
            assert inspect.getdoc(getattr(thing, name)) or name in documentation, name


# The notebook -----------------------------------------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_notebook_is_clean():
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert str(ROOT) not in NOTEBOOK.read_text()


def test_notebook_runs(tmp_path, demo_model, monkeypatch):
    shutil.copy(NOTEBOOK, tmp_path)
    (tmp_path / "demo").symlink_to(demo_model)
    monkeypatch.setenv("PYTHONPATH", str(MODULE))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in one for one in data) >= 3 and any("text/html" in one for one in data)
