"""Whole programs that write text with a real model: ours with and without plans, mlx_lm's generate, llama.cpp; same prompt, same number of
tokens, same threads, in turns.  run.py calls it on the CPU; by itself it measures a GPU.

usage: end_to_end.py BUILD_FOLDER --device cpu|gpu [--turns N] [--8b]     --8b: also a model of random weights of that shape (16 GB on disk)

Models and plans are made once and kept in BUILD_FOLDER/bench.
"""
import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLANS = {"2.2 bits plane": ["--bits", "2.2", "--keys", "plane"], "1.15 bits": ["--bits", "1.15"]}
PLANE = "2.2 bits plane"
FULL = "without a plan"
TOKENS = 64       # that are written after each prompt
PROMPTS = (512, 6144)
LONG_PROMPTS = (32 << 10, 128 << 10)  # of the 8 B shape

# (prompt, plan, peer) → least ratio of tokens/s; most of the time to the first token.
CPU_GOALS = {**{(512, plan, FULL): 0.95 for plan in PLANS}, (6144, PLANE, FULL): 1.3, (6144, PLANE, "llama.cpp, F16"): 1.5,
             (6144, PLANE, "llama.cpp, Q8_0"): 2}
GPU_GOALS = {**{(512, plan, FULL): 0.95 for plan in PLANS}, **{(6144, plan, FULL): 1 for plan in PLANS},
             (LONG_PROMPTS[0], PLANE, "mlx_lm"): 1.1, (LONG_PROMPTS[1], PLANE, "mlx_lm"): 1.5}
FIRST_TOKEN_GOALS = {"cpu": 1.2, "gpu": 1.3}  # against FULL, after 6144 tokens


class Ours:
    """One run of the program a turn."""

    def __init__(self, program, model, prompt, device, plan=None):
        self.command = [program, "generate", model, "--prompt-file", prompt, "--max-tokens", str(TOKENS), "--ignore-eos", "--json", "--device", device]
        if plan:
            self.command += ["--plan", plan]
        self.prompt_tokens = None

    def write(self):
        out = subprocess.run(list(map(str, self.command)), check=True, stdout=subprocess.PIPE, text=True).stdout
        run = json.loads(out)
        self.prompt_tokens = run["prompt_tokens"]
        return run

    def close(self):
        pass


class Other:
    """A process that keeps the prompt in its cache, and stands still while others run."""

    def __init__(self, python, environment, *arguments):
        command = [python, ROOT / "bench" / "writers.py", *arguments]
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **environment})
        os.set_blocking(self.process.stderr.fileno(), False)
        self.errors = ""
        self.process.send_signal(signal.SIGSTOP)

    def write(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.errors = (self.errors + (self.process.stderr.read() or ""))[-2000:]
        if not line:
            raise RuntimeError(f"{self.process.args} ended:\n{self.errors}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()


def text_of(count, tokenizer):
    """What the tokens of our documents, again and again, begin with: (text, its tokens, close to `count` of them)."""
    words = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    text = words
    while len(ids := tokenizer.encode(text).ids) < count:
        text += "\n\n" + words
    cut = tokenizer.decode(ids[:count], skip_special_tokens=False)
    return cut, tokenizer.encode(cut).ids


def plans_of(program, model, folder, device, samples):
    """A plan is as fast whatever it was calibrated on."""
    text = folder / "calibration.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
    plans = {}
    for name, options in PLANS.items():
        plans[name] = folder / f"{model.name}-{name.replace(' ', '-')}.safetensors"
        if not plans[name].exists():
            print(f"  calibrating {model.name}, {name}", flush=True)
            subprocess.run(list(map(str, [program, "calibrate", model, *options, "--text", text, "--samples", samples, "--length", 256,
                                          "--device", device, "-o", plans[name], "--json"])), check=True, stdout=subprocess.DEVNULL)
    return plans


def take_turns(writers, turns):
    """{name: median tokens/s, median seconds to the first token}."""
    runs = {name: [] for name in writers}
    for _ in range(turns):
        for name, writer in writers.items():
            runs[name].append(writer.write())
    median = lambda values: statistics.median(v for v in values if v is not None)
    return {name: (median(r["tokens_per_second"] for r in all_of), median(r["seconds_to_first_token"] for r in all_of)) for name, all_of in runs.items()}


def measure(table, model, title, prompt, results, goals, first_goal):
    for plan in PLANS:
        speed, first = results[plan]
        work = f"{title}, tokens/s after {prompt} tokens, {plan}"
        for peer, (theirs, _) in results.items():
            if peer not in PLANS:
                goal = goals.get((prompt, plan, peer))
                table.add(work, speed, theirs, peer, speed / theirs, f">= {goal}" if goal else None)
        if FULL in results:
            table.add(f"{title}, seconds to the first of {prompt} tokens, {plan}", first, results[FULL][1], FULL, first / results[FULL][1],
                      f"<= {first_goal}" if first_goal and prompt == max(PROMPTS) else None)
    if FULL in results:
        for peer, (theirs, their_first) in results.items():
            if peer not in PLANS and peer != FULL:
                table.add(f"{title}, tokens/s after {prompt} tokens, {FULL}", results[FULL][0], theirs, peer, results[FULL][0] / theirs, None)
                table.add(f"{title}, seconds to the first of {prompt} tokens, {FULL}", results[FULL][1], their_first, peer,
                          results[FULL][1] / their_first, None)


def rows(table, build, device, peer_python, blas=None, turns=3, eight_b=False):
    """`blas`: what mlx_lm multiplies with on a CPU."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from tokenizers import Tokenizer
    import real_models

    folder = build / "bench"
    folder.mkdir(exist_ok=True)
    environment = {"OPENBLAS": str(blas)} if blas else {}
    program = build / "bin" / "veloxquant"

    def compare(model, title, lengths, goals, gguf=None, samples=4):
        plans = plans_of(program, model, folder, device, samples)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        for length in lengths:
            text, ids = text_of(length, tokenizer)
            prompt, tokens = folder / f"prompt-{length}.txt", folder / f"prompt-{length}.json"
            prompt.write_text(text, newline="")
            tokens.write_text(json.dumps(ids))
            writers = {FULL: Ours(program, model, prompt, device), **{name: Ours(program, model, prompt, device, plan) for name, plan in plans.items()}}
            for name, bits in (("mlx_lm", []), ("mlx_lm, 4 bits", [4])):
                writers[name] = Other(peer_python, environment, "mlx_lm", model, tokens, TOKENS, device, *bits)
            for cache in ("F16", "Q8_0", "Q4_0") if gguf else ():
                writers[f"llama.cpp, {cache}"] = Other(peer_python, {}, "llama_cpp", gguf, tokens, TOKENS, cache)
            try:
                results = take_turns(writers, turns)
            finally:
                for writer in writers.values():
                    writer.close()
            ours = writers[FULL].prompt_tokens
            if abs(ours - len(ids)) > 2:
                raise RuntimeError(f"{model}: ours reads {ours} tokens where others read {len(ids)}")
            measure(table, model, title, length, results, goals, FIRST_TOKEN_GOALS[device])

    smollm2 = real_models.make("smollm2", folder)
    compare(smollm2, "SmolLM2", PROMPTS, CPU_GOALS if device == "cpu" else GPU_GOALS, folder / "smollm2.gguf" if device == "cpu" else None)
    if eight_b:
        model = folder / "8b"
        if not (model / "config.json").exists():
            subprocess.run([sys.executable, ROOT / "bench" / "random_model.py", "8b", model], check=True)
        compare(model, "8 B shape", LONG_PROMPTS, GPU_GOALS, samples=2)


if __name__ == "__main__":
    from run import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--8b", dest="eight_b", action="store_true")
    chosen = parser.parse_args()
    results = Table()
    rows(results, chosen.build.resolve(), chosen.device, sys.executable, turns=chosen.turns, eight_b=chosen.eight_b)
    print(f"\n{results.markdown()}")
