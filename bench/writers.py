"""Others that write tokens after a prompt, each time they are asked to.

usage: writers.py mlx_lm FOLDER PROMPT.json TOKENS cpu|gpu [BITS]      its own cache, or its quantised one
       writers.py llama_cpp FILE.gguf PROMPT.json TOKENS F16|Q8_0|Q4_0 [CONTEXT]

PROMPT.json is a list of tokens.  For each line on stdin, prints one JSON object: tokens_per_second of the TOKENS after the first, and
seconds_to_first_token, null but for the first time, since the prompt then stays in the cache.  mlx_lm on the CPU takes the BLAS that
stands first (OPENBLAS=path) and computes in float32, which is what it is fastest in there.
"""
import ctypes
import json
import os
import sys
import time


def mlx_lm_writer(folder, prompt, tokens, device, bits=None):
    if path := os.environ.get("OPENBLAS"):
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    import pathlib

    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu if device == "cpu" else mx.gpu)
    model, _ = load_model(pathlib.Path(folder))
    if device == "cpu":
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    cache, to_read = make_prompt_cache(model), prompt

    def write():
        nonlocal to_read
        start, first = time.perf_counter(), None
        steps = generate_step(mx.array(to_read), model, max_tokens=tokens, prompt_cache=cache, quantized_kv_start=0,
                              kv_bits=int(bits) if bits else None)
        for _ in steps:
            first = first or time.perf_counter()
        end = time.perf_counter()
        whole = to_read is prompt
        trim_prompt_cache(cache, cache[0].offset - len(prompt) + 1)
        to_read = prompt[-1:]
        return {"tokens_per_second": (tokens - 1) / (end - first), "seconds_to_first_token": first - start if whole else None}

    return write


def llama_cpp_writer(file, prompt, tokens, cache_type, context=None):
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_ctx = int(context or len(prompt) + tokens + 64)
    settings.n_parallel = 1
    settings.warmup = False
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache_type}")
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(settings)
    whole = True

    def write():
        nonlocal whole
        out = server.handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True})
        timings = (json.loads(out) if isinstance(out, (str, bytes)) else out)["timings"]
        if timings["predicted_n"] != tokens or whole and timings["prompt_n"] != len(prompt):
            raise RuntimeError(f"llama.cpp read {timings['prompt_n']} of {len(prompt)} tokens and wrote {timings['predicted_n']} of {tokens}")
        first = timings["prompt_ms"] / 1000 if whole else None
        whole = False
        # Its clock starts with the first token, which it counts.
        return {"tokens_per_second": (tokens - 1) / (timings["predicted_ms"] / 1000), "seconds_to_first_token": first}

    return write


if __name__ == "__main__":
    kind, model, prompt, count, *more = sys.argv[1:]
    # What they print beside goes to stderr.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with open(prompt) as tokens_file:
        writer = {"mlx_lm": mlx_lm_writer, "llama_cpp": llama_cpp_writer}[kind](model, json.load(tokens_file), int(count), *more)
    for _ in sys.stdin:
        print(json.dumps(writer()), file=results)
