"""Files between our reader and writer and those of the safetensors package and of MLX."""
import json
import struct
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file


@pytest.fixture
def rewrite(tools, tmp_path):
    """Reads and writes a file with our code; returns the finished process and the new file."""

    def rewrite(source):
        result = tmp_path / "ours.safetensors"
        return subprocess.run([tools / "safetensors_tool", source, result], capture_output=True, text=True, timeout=60), result

    return rewrite


def some_tensors(dtype=np.float32):
    random = np.random.default_rng(1)
    return {
        "matrix": random.normal(size=(7, 5)).astype(dtype),
        "scalar": np.array(3.5, dtype),
        "empty": np.zeros((0, 4), dtype),
        "größe \"x\"": random.normal(size=(1, 2, 3)).astype(dtype),
    }


def metadata_of(path):
    with safe_open(path, "np") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_with_the_reference(dtype, rewrite, tmp_path):
    tensors, metadata = some_tensors(dtype), {"plan": json.dumps({"a": "ü\n"}), "format": "x"}
    source = tmp_path / "source.safetensors"
    save_file(tensors, source, metadata)
    done, result = rewrite(source)
    assert done.returncode == 0, done.stderr
    loaded = load_file(result)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == np.float32 and loaded[name].shape == tensor.shape
        np.testing.assert_array_equal(loaded[name], tensor.astype(np.float32))
    assert metadata_of(result) == metadata
    assert mx.load(str(result)).keys() == tensors.keys()


def test_data_is_aligned_and_bytes_are_the_same_again(rewrite, tmp_path):
    save_file(some_tensors(), tmp_path / "source.safetensors")
    done, result = rewrite(tmp_path / "source.safetensors")
    assert done.returncode == 0, done.stderr
    first = result.read_bytes()
    assert (8 + struct.unpack("<Q", first[:8])[0]) % 64 == 0
    result.rename(tmp_path / "first.safetensors")
    done, result = rewrite(tmp_path / "first.safetensors")
    assert done.returncode == 0, done.stderr
    assert result.read_bytes() == first


def test_files_of_mlx(rewrite, tmp_path):
    source = tmp_path / "mlx.safetensors"
    brain = mx.random.normal((20, 3)).astype(mx.bfloat16)
    mx.save_safetensors(str(source), {"a": brain})
    done, result = rewrite(source)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(load_file(result)["a"], np.array(brain.astype(mx.float32)))


def test_refuses_what_the_reference_refuses(rewrite, tmp_path):
    """Whatever one byte of the header is changed to: what the safetensors package refuses, we refuse."""
    source, random = tmp_path / "source.safetensors", np.random.default_rng(2)
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, source, {"k": "v"})
    whole = bytearray(source.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = tmp_path / "damaged.safetensors"
    refused = 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[random.integers(0, header)] = random.integers(0, 256)
        damaged.write_bytes(changed)
        try:
            load_file(damaged)
        except (SafetensorError, UnicodeDecodeError):
            done, _ = rewrite(damaged)
            assert done.returncode == 1 and "damaged.safetensors" in done.stderr, bytes(changed[:header])
            assert done.stderr.count("\n") == 1
            refused += 1
        except (KeyError, TypeError, ValueError):
            continue  # a type that the package knows and numpy does not
    assert refused > 100
