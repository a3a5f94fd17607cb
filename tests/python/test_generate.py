"""`generate`, and plans as packed caches store them, as a person meets them."""
import json
import shutil

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
