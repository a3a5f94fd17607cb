"""A llama with random weights in bfloat16, of the shape of 1 B or 8 B parameters: for speed and memory, not for meaning.  Its tokenizer is
that of examples/demo.

python3 bench/random_model.py 8b FOLDER
"""
import json
import os
import shutil
import struct
import sys

SHAPES = {
    "1b": dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64),
    "8b": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128),
}
VOCABULARY = 128256
TOKENIZER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples", "demo", "tokenizer.json")


def random_bytes(count=64 << 20):
    """bfloat16 of both signs between 2^-7 and 2^-6, so that no layer overflows."""
    block = bytearray(2 * count)
    block[0::2] = os.urandom(count)
    block[1::2] = os.urandom(count).translate(bytes(0x3C if b & 1 else 0xBC for b in range(256)))
    return bytes(block)


class Writer:
    def __init__(self, folder):
        self.folder, self.block, self.at, self.index = folder, random_bytes(), 0, {}

    def pieces(self, size):
        while size:
            take = min(size, len(self.block) - self.at)
            yield memoryview(self.block)[self.at:self.at + take]
            size -= take
            self.at = (self.at + take + 2 * 7919) % len(self.block) // 2 * 2  # no two tensors alike

    def shard(self, name, tensors):
        header, offset, sizes = {}, 0, {}
        for tensor, shape in tensors.items():
            size = 2
            for length in shape:
                size *= length
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            sizes[tensor] = size
            self.index[tensor] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 64)
        with open(os.path.join(self.folder, name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor, shape in tensors.items():
                if len(shape) == 1:
                    file.write(b"\x80\x3f" * shape[0])  # a norm: 1
                else:
                    for piece in self.pieces(sizes[tensor]):
                        file.write(piece)


def main(shape, folder):
    os.makedirs(folder, exist_ok=True)
    s = SHAPES[shape]
    layers, hidden, inner = s["num_hidden_layers"], s["hidden_size"], s["intermediate_size"]
    queries, keys = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    writer = Writer(folder)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        writer.shard(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", {
            p + "input_layernorm.weight": [hidden], p + "post_attention_layernorm.weight": [hidden],
            p + "self_attn.q_proj.weight": [queries, hidden], p + "self_attn.k_proj.weight": [keys, hidden],
            p + "self_attn.v_proj.weight": [keys, hidden], p + "self_attn.o_proj.weight": [hidden, queries],
            p + "mlp.gate_proj.weight": [inner, hidden], p + "mlp.up_proj.weight": [inner, hidden], p + "mlp.down_proj.weight": [hidden, inner],
        })
    writer.shard(f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", {
        "model.embed_tokens.weight": [VOCABULARY, hidden], "model.norm.weight": [hidden], "lm_head.weight": [VOCABULARY, hidden]})
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": writer.index}, file)
    shutil.copy(TOKENIZER, folder)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({**s, "model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
                   "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}, file)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    main(*sys.argv[1:])
