"""Packed caches in mlx_lm's own functions: copies, trimming, files, batches."""
import copy
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("veloxquant_mlx", reason="the Python module is not built", exc_type=ModuleNotFoundError)

import veloxquant_mlx
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from veloxquant_mlx._attention import know_our_caches

from conftest import MODULE
from live_models import live_model

# Logits in bfloat16, summed in another order: relative to the largest.
ROUNDING = 0.02


@pytest.fixture(autouse=True)
def on_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module", autouse=True)
def attention_is_put_back(demo):
    undo = know_our_caches(demo[0])
    yield
    undo()


@pytest.fixture(scope="module")
def plan(demo, words):
    return veloxquant_mlx.calibrate(*demo, bits=2.2, text=words, num_samples=2, sequence_length=128, window=8, sinks=2)


@pytest.fixture(scope="module")
def tokens(demo, words):
    return demo[1].encode(words)


@pytest.fixture
def filled(demo, plan, tokens):
    caches = veloxquant_mlx.make_cache(demo[0], plan)
    demo[0](mx.array([tokens[:300]]), cache=caches)
    return caches


def go_on(demo, caches, tokens):
    return demo[0](mx.array([tokens]), cache=caches)


def difference(a, b):
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def test_a_saved_cache_goes_on(demo, plan, tokens, filled, tmp_path):
    file = str(tmp_path / "c.safetensors")
    save_prompt_cache(file, filled, {"model": "demo"})
    loaded, metadata = load_prompt_cache(file, return_metadata=True)
    others = [loaded, veloxquant_mlx.load_cache(file, demo[0], plan), copy.deepcopy(filled)]
    assert metadata == {"model": "demo"} == veloxquant_mlx.load_cache(tmp_path / "c.safetensors", *(demo[0], plan), return_metadata=True)[1]
    assert [c.nbytes for c in loaded] == [c.nbytes for c in filled]
    expected = go_on(demo, filled, tokens[300:320])
    for caches in others:
        assert [c.offset for c in caches] == [300] * 12
        assert mx.array_equal(go_on(demo, caches, tokens[300:320]), expected)
    # Files of caches that no token has come to.
    save_prompt_cache(file, veloxquant_mlx.make_cache(demo[0], plan))
    assert all(c.empty() and c.size() == 0 for c in veloxquant_mlx.load_cache(file, demo[0], plan))


def test_generation_goes_on_from_a_file(demo, plan, tokens, tmp_path):
    def text(prompt, caches, count):
        return [x.token for x in mlx_lm.stream_generate(*demo, prompt, max_tokens=count, prompt_cache=caches)]

    whole = text(tokens[:200], veloxquant_mlx.make_cache(demo[0], plan), 24)
    caches = veloxquant_mlx.make_cache(demo[0], plan)
    first = text(tokens[:200], caches, 12)
    save_prompt_cache(str(tmp_path / "c.safetensors"), caches)
    loaded = veloxquant_mlx.load_cache(tmp_path / "c.safetensors", demo[0], plan)
    read = loaded[0].offset - 200  # mlx_lm may have read the last one, too
    assert first == whole[:12] and text(whole[read : read + 1], loaded, 23 - read) == whole[read + 1 :]


def test_trimming(demo, plan, tokens, filled):
    assert can_trim_prompt_cache(filled)
    assert trim_prompt_cache(filled, 100) == 100
    assert [c.offset for c in filled] == [200] * 12
    shorter = veloxquant_mlx.make_cache(demo[0], plan)
    go_on(demo, shorter, tokens[:200])
    assert [c.nbytes for c in filled] == [c.nbytes for c in shorter]
    # The window is full again, of the same tokens: what is read of codes and 8 bits is what it would have been.
    outs = [go_on(demo, caches, tokens[200:240])[:, -20:] for caches in (filled, shorter)]
    assert mx.isfinite(outs[0]).all()
    assert trim_prompt_cache(filled, 1000) == 240 and filled[0].empty()


def test_mlx_lm_keeps_prompts(demo, plan, tokens, filled):
    kept = LRUPromptCache()
    kept.insert_cache("demo", tokens[:300], filled)
    assert kept.nbytes == sum(c.nbytes for c in filled)
    same, rest = kept.fetch_nearest_cache("demo", tokens[:310])
    assert rest == tokens[300:310] and same[0].offset == 300 and same[0] is not filled[0]
    trimmed, rest = kept.fetch_nearest_cache("demo", tokens[:150])
    assert len(rest) == 1 and trimmed[0].offset == 149 and filled[0].offset == 300


def test_drafts_are_taken_back(demo, plan, tokens):
    caches = veloxquant_mlx.make_cache(demo[0], plan) + make_prompt_cache(demo[0])
    made = list(mlx_lm.stream_generate(*demo, tokens[:60], max_tokens=24, draft_model=demo[0], prompt_cache=caches, num_draft_tokens=3))
    assert len(made) == 24 and any(x.from_draft for x in made)


PROMPTS = [(0, 30), (100, 250), (5, 6)]
COUNTS = [5, 8, 12]


@pytest.mark.parametrize("step", [16, 2048])
def test_batches_write_what_each_would_write_alone(demo, plan, tokens, step):
    prompts = [tokens[begin:end] for begin, end in PROMPTS]
    alone = [
        [
            x.token
            for x in mlx_lm.stream_generate(
                *demo, prompt, max_tokens=count, prompt_cache=veloxquant_mlx.make_cache(demo[0], plan), prefill_step_size=step
            )
        ]
        for prompt, count in zip(prompts, COUNTS)
    ]
    for more in ({}, {"completion_batch_size": 2}):
        caches = [veloxquant_mlx.make_cache(demo[0], plan) for _ in prompts]
        made = mlx_lm.batch_generate(
            *demo, prompts, caches, max_tokens=COUNTS, prefill_step_size=step, return_token_ids=True, return_prompt_caches=True, **more
        )
        assert made.token_ids == alone
        assert all(isinstance(c, veloxquant_mlx.PackedKVCache) for caches in made.caches for c in caches)
        assert [caches[0].size() for caches in made.caches] == [len(p) + n for p, n in zip(prompts, COUNTS)]


def test_a_model_may_make_packed_caches(demo, plan, tokens):
    model = demo[0]
    model.make_cache = lambda: veloxquant_mlx.make_cache(model, plan)
    try:
        assert isinstance(make_prompt_cache(model)[0], veloxquant_mlx.PackedKVCache)
        made = mlx_lm.batch_generate(*demo, [tokens[:10], tokens[:30]], max_tokens=4, return_prompt_caches=True)
    finally:
        del model.make_cache
    assert [caches[0].size() for caches in made.caches] == [14, 34]


def test_padding_on_the_left(demo, plan, tokens):
    lengths = [50, 20, 33]
    batch = [c.merge([c] + [copy.deepcopy(c) for _ in lengths[1:]]) for c in veloxquant_mlx.make_cache(demo[0], plan)]
    padding = [50 - n for n in lengths]
    for c in batch:
        c.prepare(left_padding=padding)
    assert batch[0].offset.tolist() == [-p for p in padding]
    rows = [[0] * p + tokens[:n] for p, n in zip(padding, lengths)]
    outs = [demo[0](mx.array([row[begin:end] for row in rows]), cache=batch) for begin, end in ((0, 10), (10, 50))]
    out = mx.concatenate(outs, axis=1)
    assert batch[0].offset.tolist() == lengths
    for i, (p, n) in enumerate(zip(padding, lengths)):
        alone = veloxquant_mlx.make_cache(demo[0], plan)
        expected = [go_on(demo, alone, row) for row in (tokens[: max(10 - p, 0)], tokens[max(10 - p, 0) : n]) if row]
        assert difference(out[i : i + 1, p:], mx.concatenate(expected, axis=1)) < ROUNDING
    batch[0].filter([2, 0])
    assert batch[0].offset.tolist() == [33, 50] and batch[0].extract(0).offset == 33
    with pytest.raises(ValueError, match="left_padding: expected before the first tokens"):
        batch[0].prepare(left_padding=[1, 0])
    with pytest.raises(ValueError, match="expected caches of layer_0 and the plan qwen2 rotated_pq"):
        batch[0].extend(batch[1])


def test_layers_that_slide_keep_mlx_lms_caches(own_tokenizer, tmp_path):
    model = live_model("cohere2", logit_scale=0.25, sliding_window=8, sliding_window_pattern=2)
    plan = veloxquant_mlx.calibrate(model, own_tokenizer, bits=4.5, method="affine", units="uniform")
    caches = veloxquant_mlx.make_cache(model, plan)
    assert [type(c).__name__ for c in caches] == ["RotatingKVCache", "PackedKVCache"]
    model(mx.array([list(range(20))]), cache=caches)
    save_prompt_cache(str(tmp_path / "c.safetensors"), caches)
    loaded = veloxquant_mlx.load_cache(tmp_path / "c.safetensors", model, plan)
    more = mx.array([[3, 4, 5]])
    assert mx.array_equal(model(more, cache=loaded), model(more, cache=caches))


def test_damage_is_seen(demo, plan, filled, tmp_path):
    file = tmp_path / "c.safetensors"
    save_prompt_cache(str(file), filled)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def problem(contents):
        file.write_bytes(contents)
        with pytest.raises(RuntimeError) as raised:
            veloxquant_mlx.load_cache(file, demo[0], plan)
        assert str(file) in str(raised.value)
        return str(raised.value)

    for size in (0, 7, 100, header, header + 1, len(whole) // 2, len(whole) - 1):
        problem(whole[:size])
    for at in range(0, header, header // 40):
        problem(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    for at in range(header, len(whole), len(whole) // 40):
        problem(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    assert "layer_0: expected" in problem(saved([KVCache() for _ in filled], file))
    assert "checksum" in problem(saved_with(filled, file, lambda state: {**state, "checksum": state["checksum"][::-1]}))
    assert "expected plan, layer, checksum and arrays: KeyError('plan')" in problem(
        saved_with(filled, file, lambda state: {"arrays": state["arrays"]})
    )
    assert "layer_0: got the cache of layer_1" in problem(saved(filled[1:] + filled[:1], file))


def saved(caches, file):
    for cache in caches:
        if isinstance(cache, KVCache):
            cache.update_and_fetch(mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 64)))
    save_prompt_cache(str(file), caches)
    return file.read_bytes()


def saved_with(caches, file, change):
    class Changed:
        def __init__(self, cache):
            self.state = change(cache.state)

    Changed.__name__ = "PackedKVCache"
    save_prompt_cache(str(file), [Changed(c) for c in caches])
    return file.read_bytes()


def test_another_plan_is_named(demo, filled, tmp_path):
    file = tmp_path / "c.safetensors"
    save_prompt_cache(str(file), filled)
    other = veloxquant_mlx.calibrate(*demo, bits=4.5, method="affine", units="uniform")
    with pytest.raises(RuntimeError, match="expected caches of the plan qwen2 affine 4.5 bits [0-9a-f]+, got qwen2 rotated_pq"):
        veloxquant_mlx.load_cache(file, demo[0], other)


def test_a_plan_that_this_process_does_not_know(filled, tmp_path):
    file = tmp_path / "c.safetensors"
    save_prompt_cache(str(file), filled)
    code = f"""
        import sys; sys.path.insert(0, {str(MODULE)!r})
        import veloxquant_mlx
        from mlx_lm.models.cache import load_prompt_cache
        try:
            load_prompt_cache({str(file)!r})
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "made with the plan qwen2 rotated_pq" in done.stdout and "load_cache() with it first" in done.stdout, done.stderr


def test_two_threads_are_seen(demo_model, plan, tmp_path):
    plan.save(tmp_path / "x.plan")
    code = f"""
        import os, sys, threading, time; sys.path.insert(0, {str(MODULE)!r})
        import mlx.core as mx, mlx_lm, veloxquant_mlx
        model, _ = mlx_lm.load({str(demo_model)!r})
        cache = veloxquant_mlx.make_cache(model, veloxquant_mlx.Plan.load({str(tmp_path / "x.plan")!r}))[0]
        q, k = mx.random.normal((1, 4, 8192, 64)), mx.random.normal((1, 2, 8192, 64))
        mx.eval(q, k)
        thread = threading.Thread(target=lambda: cache.attend(q, k, k, 1.0))
        thread.start()
        for _ in range(500):
            try:
                cache.trim(0)
            except RuntimeError as error:
                print(error, flush=True)
                break
            time.sleep(0.01)
        os._exit(0)  # MLX may abort at the end of a process with a second thread
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "[packed cache] used from two threads at once\n", done.stderr
