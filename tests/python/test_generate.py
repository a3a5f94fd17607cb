"""`generate`, and plans as packed caches store them, as a person meets them."""
import json
import shutil
import signal
import subprocess
import time

import pytest

from command_line import change_config, fails
from tiny_models import write_model


def test_generate_says_what_the_cache_takes(run, demo_model, tmp_path):
    path = tmp_path / "made.plan"
    made = run("calibrate", demo_model, "--method", "affine", "--units", "uniform", "--bits", 4.5, "-o", path)
    assert made.returncode == 0, made.stderr
    prompt = ["--prompt", "It was a cold evening in November, and the rain had been falling", "--max-tokens", 40, "--json"]
    full, packed = (json.loads(run("generate", demo_model, *prompt, *plan).stdout) for plan in ([], ["--plan", path]))
    assert full["tokens"] == packed["tokens"] == 40 and full["text"].startswith(" ") == packed["text"].startswith(" ")
    assert packed["tokens_in_cache"] == packed["prompt_tokens"] + 39
    # Memory grows by blocks of 256 tokens: 12 layers, 2 KV heads of 64, keys and values, 4 bits and 4 bytes a vector.
    assert packed["cache_bytes"] == 256 * 12 * 2 * 2 * (64 * 4 // 8 + 4)
    assert packed["effective_bits"] == pytest.approx(8 * packed["cache_bytes"] / (packed["tokens_in_cache"] * 12 * 2 * 2 * 64))
    assert packed["codebook_bytes"] == 0 and packed["tokens_per_second"] > 0 and packed["seconds_to_first_token"] > 0
    again = json.loads(run("generate", demo_model, *prompt, "--temperature", 0.9, "--top-p", 0.9, "--seed", 3).stdout)
    assert again["text"] == json.loads(run("generate", demo_model, *prompt, "--temperature", 0.9, "--top-p", 0.9, "--seed", 3).stdout)["text"]
    streamed = run("generate", demo_model, *prompt[:-1])
    assert streamed.stdout.rstrip("\n") == full["text"].rstrip("\n") and "tokens/s" in streamed.stderr


def test_packed_plans_are_what_restored_ones_say(run, demo_model, text, tmp_path):
    path = tmp_path / "made.plan"
    made = run("calibrate", demo_model, "--bits", 2.5, "--samples", 3, "--length", 256, "--text", text, "-o", path)
    assert made.returncode == 0, made.stderr
    rows = [json.loads(run("evaluate", demo_model, "--plan", path, "--text", text, "--windows", 2, "--length", 600, "--json", *more).stdout)[1]
            for more in ([], ["--packed"])]
    assert rows[1]["kl_mean"] == pytest.approx(rows[0]["kl_mean"], rel=0.1) and rows[0]["kl_mean"] > 1e-4
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=1e-2)


def test_generate_refuses(run, demo_model, tiny, plan, tmp_path):
    fails(run("generate", demo_model, "--prompt", ""), "prompt", "at least one token")
    fails(run("generate", tiny, "--plan", plan, "--prompt", "a"), "another model")
    assert run("generate", demo_model).returncode == 2
    assert run("generate", demo_model, "--prompt", "a", "--max-tokens", 0).returncode == 2
    assert run("generate", demo_model, "--prompt", "a", "--top-p", 0).returncode == 2
    fails(run("generate", demo_model, "--prompt", "a", "--top-p", 1.5), "top_p", "1.5")
    fails(run("generate", demo_model, "--chat", "--prompt", "a"), "chat template", "the model has none")
    kivi = tmp_path / "kivi.plan"
    assert run("calibrate", demo_model, "--method", "kivi", "--units", "uniform", "--bits", 3, "-o", kivi).returncode == 0
    fails(run("generate", demo_model, "--plan", kivi, "--prompt", "a"), "kivi groups 32 tokens")


def test_prompt_files_are_read_as_they_are(run, demo_model, tiny, tmp_path):
    file = tmp_path / "prompt.txt"
    for text in ("It was a cold evening\r\nin November.\r\n\r\n", " é\n", "a\rb", "\n"):
        file.write_bytes(text.encode())
        by_file, by_option = (json.loads(run("generate", demo_model, *prompt, "--max-tokens", 3, "--json").stdout)
                              for prompt in (["--prompt-file", file], ["--prompt", text]))
        assert {key: by_file[key] for key in ("text", "prompt_tokens")} == {key: by_option[key] for key in ("text", "prompt_tokens")}
    file.write_bytes("a\r\nb".encode())
    with_cr = json.loads(run("generate", demo_model, "--prompt-file", file, "--max-tokens", 1, "--json").stdout)["prompt_tokens"]
    file.write_bytes("a\nb".encode())
    assert with_cr > json.loads(run("generate", demo_model, "--prompt-file", file, "--max-tokens", 1, "--json").stdout)["prompt_tokens"]


def test_prompt_files_that_are_none(run, tiny, tmp_path):
    file = tmp_path / "prompt.txt"
    fails(run("generate", tiny, "--prompt-file", file), file, "No such file")
    fails(run("generate", tiny, "--prompt-file", tmp_path), tmp_path, "not a regular file")
    file.write_bytes(b"")
    fails(run("generate", tiny, "--prompt-file", file), file, "empty")
    for data, byte, at in ((b"sch\xf6n", "0xf6", 3), ("é".encode() + b"a\xc3", "0xc3", 3), ("a".encode("utf-16"), "0xff", 0)):
        file.write_bytes(data)
        fails(run("generate", tiny, "--prompt-file", file), file, f"expected UTF-8, got byte {byte} at {at}")
        fails(run("evaluate", tiny, "--text", file), file, f"expected UTF-8, got byte {byte} at {at}")
    fails(run("generate", tiny), "--prompt", "--prompt-file", "required", status=2)
    fails(run("generate", tiny, "--prompt", "a", "--prompt-file", file), "--prompt", "--prompt-file", "excludes", status=2)


def test_ignoring_the_end_writes_all_tokens(run, tiny):
    free = json.loads(run("generate", tiny, "--prompt", "a", "--max-tokens", 12, "--json").stdout)
    assert not free["stopped"] and free["kernels"] == ["cpu"] * len(free["kernels"]) and free["kernels"]
    # The first token that it writes becomes its end.
    first = run("generate", tiny, "--prompt", "a", "--max-tokens", 1, "--json")
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())["model"]["vocab"]
    written = json.loads(first.stdout)["text"].replace(" ", "Ġ")
    change_config(tiny, eos_token_id=tokenizer[written])
    assert json.loads(run("generate", tiny, "--prompt", "a", "--max-tokens", 12, "--json").stdout)["stopped"]
    kept = json.loads(run("generate", tiny, "--prompt", "a", "--max-tokens", 12, "--json", "--ignore-eos").stdout)
    assert not kept["stopped"] and kept["tokens"] == 12 and kept["text"] == free["text"]


def test_interrupt_while_a_prompt_is_read(program, demo_model, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("The rain had been falling. " * 20_000)
    process = subprocess.Popen([program, "generate", demo_model, "--prompt-file", file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(4)
    assert process.poll() is None
    asked = time.time()
    process.send_signal(signal.SIGINT)
    out, stderr = process.communicate(timeout=20)
    assert time.time() - asked < 2 and process.returncode == 130
    assert stderr.splitlines()[-1] == "veloxquant: interrupted" and stderr.count("interrupted") == 1 and out == ""


def test_output_that_cannot_be_written(run, program, tiny):
    with open("/dev/full", "w") as full:
        for more in ([], ["--json"]):
            done = subprocess.run([program, "generate", tiny, "--prompt", "a", "--max-tokens", "20", *more], stdout=full, stderr=subprocess.PIPE, text=True)
            assert done.returncode == 1 and "could not write to standard output" in done.stderr


def test_generate_refuses_a_plan_of_other_heads(run, tiny, text, tmp_path):
    path = tmp_path / "made.plan"
    assert run("calibrate", tiny, "--method", "affine", "--units", "uniform", "--bits", 4.5, "--text", text, "--length", 16, "--samples", 2, "-o", path).returncode == 0
    assert run("generate", tiny, "--plan", path, "--prompt", "a", "--max-tokens", 2).returncode == 0
    heads = json.loads((tiny / "config.json").read_text())["num_key_value_heads"]
    other = write_model(tmp_path / "other", "llama", vocab_size=8192, num_key_value_heads=1 if heads > 1 else 2)
    shutil.copy(tiny / "tokenizer.json", other)
    fails(run("generate", other, "--plan", path, "--prompt", "a"), "another model", "kv_heads")


def test_generate_goes_on_beyond_what_the_model_was_made_for(run, tiny):
    change_config(tiny, max_position_embeddings=8)
    done = run("generate", tiny, "--prompt", "It was a cold evening", "--max-tokens", 12, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] > 0
    assert "made for 8" in done.stderr and done.stderr.count("\n") == 1
