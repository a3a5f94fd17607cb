"""docs/add_a_model.md, followed to the letter on a copy of the sources that it names, with the installed library as the rest."""
import os
import re
import shutil
import subprocess
import sys
import textwrap

from conftest import ROOT

# By where the page says that its line goes: the end of the line after which it stands.
PLACES = {
    "after the other `configure_` functions": r"void configure_\w+\(.*\);\n",
    "at the end of the table `kTable`": r"kTable\[\] = \{\n(?:.*\},\n)+",
    "at the end of `CONFIGS`": r"CONFIGS = \{\n(?:.*\n)*?(?=\})",
}

# The test programs again, where files of ours come before those of the library.
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(toy LANGUAGES CXX)
find_package(veloxquant REQUIRED)
file(GLOB_RECURSE sources veloxquant/*.cpp)
add_executable(logits_tool {root}/tests/tools/logits_tool.cpp ${{sources}})
target_include_directories(logits_tool BEFORE PRIVATE ${{PROJECT_SOURCE_DIR}})
target_link_libraries(logits_tool PRIVATE veloxquant::veloxquant)
"""

# mlx_lm has no toy: it is qwen2 by another name.
REFERENCE = """
import importlib, sys
sys.modules["mlx_lm.models.toy"] = importlib.import_module("mlx_lm.models.qwen2")
"""


def steps():
    """(what a step says, the code block in it) of every step that has one."""
    for step in re.split(r"^\d+\. ", (ROOT / "docs" / "add_a_model.md").read_text(), flags=re.M)[1:]:
        if block := re.search(r"\n\n((?: {7}.*\n|\n)+)", step):
            yield step[:block.start()], textwrap.dedent(block[1]).strip("\n") + "\n"


def follow(folder):
    for says, code in steps():
        file = re.search(r"`([\w/]+/[\w.]+)`", says)[1]
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if says.startswith("Write "):
            assert not (ROOT / file).exists()
            path.write_text(code)
            continue
        place = next(pattern for words, pattern in PLACES.items() if words in " ".join(says.split()))
        text = (ROOT / file).read_text()
        last = list(re.finditer(place, text))[-1].end()
        path.write_text(text[:last] + code + text[last:])


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_add_a_model(installed, tmp_path):
    follow(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["families.cpp", "families.h", "tiny_models.py", "toy.cpp"]
    (tmp_path / "CMakeLists.txt").write_text(PROJECT.format(root=ROOT))
    build = tmp_path / "build"
    run("cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", build)

    tests = tmp_path / "tests" / "python"
    shutil.copy(ROOT / "tests" / "python" / "test_models.py", tests)
    (tests / "conftest.py").write_text(REFERENCE + (ROOT / "tests" / "python" / "conftest.py").read_text())
    said = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy or llama_tied", tests / "test_models.py",
               env={**os.environ, "VELOXQUANT_TOOLS": str(build)})
    assert re.search(r"^4 passed", said, re.M)  # at batch 1 and 4, and llama's as they were
