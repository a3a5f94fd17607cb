"""Memory of packed caches, as the system counts it."""
import json
import subprocess

import pytest


# 32,768 tokens take minutes.
@pytest.mark.parametrize("tokens", [6144, pytest.param(32768, marks=pytest.mark.slow)])
def test_resident_memory_grows_by_what_bits_say(tokens, run, tools, demo_model, text_file, tmp_path):
    plan = tmp_path / "made.plan"
    made = run("calibrate", demo_model, "--bits", 2.5, "--samples", 3, "--length", 256, "--text", text_file, "-o", plan)
    assert made.returncode == 0, made.stderr
    done = subprocess.run([tools / "growth_tool", plan, str(tokens)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["grew"] == pytest.approx(found["expected"], rel=0.05)
    assert found["same"] and found["difference"] == 0
