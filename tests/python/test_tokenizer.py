"""Tokens and decoded text against Hugging Face's tokenizers, which reads the same files."""
import json
import random
import subprocess

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT4O = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEEPSEEK = [r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")]

CORPUS = ["The quick brown fox doesn't jump over 1234567 lazy dogs; they'll see.\n\n  It's naïve — 日本語のテキスト, and Ελληνικά.",
          "Привет, мир! مرحبا بالعالم 🙂🙂 for (int i = 0; i < 100; ++i) {\n\treturn x[i];\r\n}", "a b c ab abc hello world " * 20]

# What single characters and their neighbours can do wrong.
HOSTILE = [
    "", " ", "  ", "\n", "a", "\0", "a\0b\0\0", "\r\n\r\n", " \n \n  x", "\t\t x", "it's IT'S It'ſ we'LL 'K 'ʼ ŉ", "\u2028\u2029\u0085\u180e\u200b\ufeff",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽", "e\u0301 é E\u0301\u0323 \u1e69 s\u0323\u0307 s\u0307\u0323", "\u1112\u1161\u11ab 한글 \u1100\u1161",
    "\u0345\u0301\u0300 \u0301", "a\u0301\u0300\u0334\u0323", "\u212b \u2126 \uf900 \ufb01 \u0958", "שלום עולם \u202eabc\u202c", "٣٤٥ ²³ ½ Ⅷ ① 十二 ๓",
    "x²y", "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> ", "<|endoftext|><|endoftext|>", "<|endoftext", "<|endoftext|>>|>", "\ufffd\ufffe\uffff\U0010ffff",
    "".join(map(chr, range(128))), "".join(map(chr, range(128, 1024))), "Ġhello Ġ ĊĊ", "foo\u00a0bar\u3000baz\u2003", "१२३ 𝟘𝟙𝟚 𒐀", "𐐀𐐨 ǅ ʰ ª",
    "▁", "▁▁ ▁a ▁ b▁", " ▁hello▁ world ", "_a _ b_", "<0x41><0x0A> <0x>", "<s>", "<s>hello", " <s> hello</s> </s>x", "<unk> <unk>", "x\u0301\ue000\u0301\ue000a\ue000é\ue000",
    "<|assistant|>\n hi<|end|> \n<|end|>", "<|placeholder|> <|placeholder|>", "<start_of_turn>user\n\n\n<table> [@BOS@]", " " * 100, "\n" * 100, "\t" * 31,
    "supercalifragilistic" * 50, "ab", "abab", " ab", "a", "aa", "A\u0301B", "\u0301a", "\u0130İstanbul ΣΑΣ", "ﬁ ㈱ ㍿ ｶﾞ ½ \ufdfa", "日本語ひらがなカタカナ한국어ไทยไทย",
    "\u31350\U00031350\U0002ebf0 \U00011f50\U00011f04 \u1c89\u0897 \U00011de0", "a\u08d3\u0301 a\U0001e4ec\u0301 \U00011935\U00011930",
]
BROKEN = [b"\xff", b"a\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82a", b"\xf0\x9f\x98", b"\xed\xa0\x80\xed\xb0\x80", b"\xc0\xaf", b"\xf8\x88\x80\x80\x80",
          b"\xf4\x90\x80\x80", b"\x80\x80a\xbf", b"ok\xe2\x28\xa1ok", b"\xf0\x9f\x98\x80\xf0\x9f", b"\xe0\x80\x80", b"\xef\xbf"]

ADDED = [("<plain>", {}), ("<left>", dict(lstrip=True)), ("<right>", dict(rstrip=True)), ("<both>", dict(lstrip=True, rstrip=True)),
         ("word", dict(single_word=True)), ("ünï", dict(normalized=True)), ("e\u0301x", dict(normalized=True)), ("<plain>more", {}), ("<pl", {}), ("ain>", {}), ("  ", dict(normalized=True)),
         ("wide", dict(single_word=True, normalized=True, lstrip=True))]


def train(pre_tokenizer, normalizer=None, added=ADDED, vocabulary=600, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|begin|>"],
                                                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens([AddedToken(content, **{"normalized": False, **flags}) for content, flags in added])
    tokenizer.add_special_tokens([AddedToken("<|special|>", rstrip=True), AddedToken("<|two words|>", lstrip=True)])
    return tokenizer


def split(*patterns, behavior="isolated", invert=False, visible=False):
    """visible: every word starts with a space, so that each cut shows in the tokens, whatever the merges."""
    parts = [pre_tokenizers.Split(Regex(p), behavior, invert) for p in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=visible, use_regex=False)])


def gpt2():
    return train(pre_tokenizers.ByteLevel(add_prefix_space=True))


def gpt2_without_prefix():
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False))


def qwen2():
    return train(split(QWEN2), normalizers.NFC())


def llama3():
    tokenizer = train(split(LLAMA3))
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin|> $A <|endoftext|>", special_tokens=[("<|begin|>", 1), ("<|endoftext|>", 0)])])
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    # words that merges alone do not make
    content["model"]["merges"] = content["model"]["merges"][:150]
    return Tokenizer.from_str(json.dumps(content))


def gpt4o():
    return train(split(GPT4O), normalizers.Sequence([normalizers.NFC()]))


def deepseek():
    tokenizer = train(split(*DEEPSEEK))
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    return tokenizer


def digits():
    return train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]))


def digits_together():
    return train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def thousands():
    """Empty matches cut, too."""
    return train(split(r"(?=(\p{Nd}{3})+(?!\p{Nd}))", r"^\s", r"\b", r"[^\S\n-]$", r"a{,2}b", r"(?m:x.)"))


def unknown_characters(fuse=False):
    """Without the byte level: characters that the vocabulary has not."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, " ": 4, "é": 5, "aé": 6, "<unk>a": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("a", "é"), ("<unk>", "a")], unk_token="<unk>", fuse_unk=fuse))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def fused_unknown_characters():
    return unknown_characters(fuse=True)


def dropped_unknown_characters():
    content = json.loads(unknown_characters().to_str())
    content["model"]["unk_token"] = None
    content["model"]["merges"] = ["a b", "a é"]  # as older files write them
    return Tokenizer.from_str(json.dumps(content))


def normalised_special():
    """An added token that is special and has another normal form; ids in the file that are not those it gets."""
    tokenizer = qwen2()
    content = json.loads(tokenizer.to_str())
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    content["added_tokens"] += [dict(id=5000, content="s\u0307\u0323", special=True, normalized=True, **flags),
                                dict(id=4000, content="\n", special=False, normalized=False, **flags),
                                dict(id=4001, content="the", special=True, normalized=False, **flags)]
    return Tokenizer.from_str(json.dumps(content))


def phi2():
    """Runs of white space as added tokens, which are looked for in the normalised text."""
    return train(pre_tokenizers.ByteLevel(add_prefix_space=False),
                 added=[(c * n, dict(normalized=True)) for c, n in [(" ", 31), (" ", 5), (" ", 3), (" ", 2), ("\t", 4), ("\t", 2)]])


def punctuation():
    parts = [pre_tokenizers.Punctuation("merged_with_previous"), pre_tokenizers.Digits(), pre_tokenizers.Split("e", "merged_with_next"),
             pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    return train(pre_tokenizers.Sequence(parts), normalizers.NFKC())


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
GEMMA_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
CHAT = ["<|assistant|>", "<|end|>"]


def sentence_piece(normalizer, pre_tokenizer, decoder, added=ADDED, lacks=(), corpus=CORPUS, words=(pre_tokenizers.Metaspace(),), vocabulary=700, **model):
    """SentencePiece's kind of BPE: characters that the vocabulary has not are tokens of their bytes, which are no added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), *words])
    tokenizer.train_from_iterator([*corpus, "a    b        c", "▁▁▁"], trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["model"].update(dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True), **model)
    for token in lacks:
        content["model"]["vocab"][f"not {token}"] = content["model"]["vocab"].pop(token)
    tokenizer = Tokenizer.from_str(json.dumps({**content, "pre_tokenizer": None}))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken(text, **{"normalized": False, **flags}) for text, flags in added])
    tokenizer.add_special_tokens([AddedToken("<|special|>", rstrip=True), AddedToken("<|two words|>", lstrip=True)])
    return tokenizer


def llama2():
    return sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER)


def phi3():
    added = [*((text, dict(special=True, rstrip=True)) for text in CHAT), ("<|placeholder|>", dict(special=True, normalized=True)), ("</s>", dict(rstrip=True))]
    return sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER, added=added)


def mistral():
    return sentence_piece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), LLAMA_DECODER)


def metaspace_always():
    return sentence_piece(None, pre_tokenizers.Metaspace(), decoders.Metaspace())


def metaspace_first():
    return sentence_piece(None, pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first"), ignore_merges=True)


def metaspace_never():
    return sentence_piece(None, pre_tokenizers.Metaspace(replacement="_", prepend_scheme="never"), decoders.Metaspace(replacement="_", prepend_scheme="never"))


def metaspace_of_older_files():
    content = json.loads(metaspace_always().to_str())
    for part in ("pre_tokenizer", "decoder"):
        content[part] = dict(type="Metaspace", replacement="▁", add_prefix_space=True)
    return Tokenizer.from_str(json.dumps(content))


def gemma():
    runs = [(c * n, {}) for c, n in [("\n", 2), ("\n", 3), ("\t", 2), ("▁", 2), ("▁", 4), ("▁", 16)]]
    return sentence_piece(normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), GEMMA_DECODER,
                          added=[*runs, ("<table>", {}), ("[@BOS@]", {}), ("<start_of_turn>", dict(special=True))])


def gemma_without_pre_tokenizer():
    return sentence_piece(normalizers.Replace(" ", "▁"), None, GEMMA_DECODER)


def bytes_in_part():
    """Unknown tokens wait for the next known character, bytes between do not."""
    lacks = [token for token in BYTES[0x80:] if token not in ("<0xCC>", "<0x81>", "<0xC3>")]
    return sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER, lacks=lacks)


def bytes_in_part_not_fused():
    lacks = [token for token in BYTES[0x80:] if token not in ("<0xCC>", "<0x81>", "<0xC3>")]
    return sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER, lacks=lacks, fuse_unk=False)


def every_normalizer():
    """What may come before a Metaspace that prepends where the text begins."""
    parts = [normalizers.Strip(left=True, right=False), normalizers.NFD(), normalizers.Replace("\u0301", ""), normalizers.Lowercase(),
             normalizers.Replace(Regex(r"[ \t]{2,}"), " "), normalizers.NFKC(), normalizers.Replace("ab", "x"), normalizers.Replace("a", "bb")]
    return sentence_piece(normalizers.Sequence(parts), pre_tokenizers.Metaspace(prepend_scheme="first"),
                          decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Replace(Regex("[bx]+"), "ab")]), added=[token for token in ADDED if token[0] != "  "])


def metaspace_after_split():
    parts = [pre_tokenizers.Split(Regex(r"\n|h"), "removed"), pre_tokenizers.Digits(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    return sentence_piece(normalizers.NFKD(), pre_tokenizers.Sequence(parts), decoders.Sequence([decoders.Strip("▁", 2, 0), decoders.Fuse()]))


SENTENCE_PIECE = [llama2, phi3, mistral, metaspace_always, metaspace_first, metaspace_never, metaspace_of_older_files, gemma, gemma_without_pre_tokenizer, bytes_in_part,
                  bytes_in_part_not_fused, every_normalizer, metaspace_after_split]
KINDS = [gpt2, gpt2_without_prefix, qwen2, llama3, gpt4o, deepseek, digits, digits_together, thousands, unknown_characters, fused_unknown_characters,
         dropped_unknown_characters, normalised_special, phi2, punctuation, *SENTENCE_PIECE]
BEHAVIORS = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]


class Pair:
    """The same tokenizer.json, read by both."""

    def __init__(self, tools, folder, tokenizer):
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        self.tools, self.folder, self.theirs = tools, folder, Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tool(self, lines, *flags):
        text = "".join(line + "\n" for line in lines)
        done = subprocess.run([self.tools / "tokenize_tool", self.folder, *flags], input=text, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\n")[:-1]

    def encode(self, texts, *flags):
        return [list(map(int, line.split())) for line in self.tool([text.hex() for text in texts], *flags)]

    def assert_same_tokens(self, texts):
        texts = [text if isinstance(text, bytes) else text.encode() for text in texts]
        strings = [text.decode("utf-8", errors="replace") for text in texts]
        for special in (False, True) if self.theirs.post_processor else (False,):
            ours = self.encode(texts, *(["--special"] if special else []))
            assert len(ours) == len(texts)
            for string, mine in zip(strings, ours):
                assert mine == self.theirs.encode(string, add_special_tokens=special).ids, ascii(string[:300])

    def assert_same_texts(self, sequences):
        lines = [" ".join(map(str, tokens)) for tokens in sequences]
        for keep in (False, True):
            ours = self.tool(lines, "--decode", *(["--keep"] if keep else []))
            assert len(ours) == len(sequences)
            for tokens, mine in zip(sequences, ours):
                assert bytes.fromhex(mine).decode() == self.theirs.decode(tokens, skip_special_tokens=not keep), tokens[:100]


def random_character(rng):
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(" \n\t\r'abstTLr09<>|")
    if kind < 0.5:
        return chr(rng.randrange(0x300, 0x370))
    if kind < 0.7:
        return chr(rng.randrange(0x80, 0x3100))
    code_point = rng.randrange(0x110000) if kind < 0.8 else rng.randrange(0x32400)
    return "\ufffd" if 0xD800 <= code_point < 0xE000 else chr(code_point)


def random_texts(seed, count=1500):
    rng = random.Random(seed)
    pieces = [content for content, _ in ADDED]
    pieces += ["<|endoftext|>", "<|special|>", "<|two words|>", "s\u0307\u0323", "'ll", "'S", "123456", "   ", "hello"]

    def piece():
        return rng.choice(pieces) if rng.random() < 0.2 else random_character(rng)

    return ["".join(piece() for _ in range(rng.randrange(40))) for _ in range(count)]


def random_bytes(seed, count=500):
    rng = random.Random(seed)
    telling = [0x20, 0x61, 0xC3, 0xE2, 0xED, 0xF0, 0xF4, 0x80, 0x9F, 0xA0, 0xBF]
    return [bytes(rng.choice([*telling, rng.randrange(256)]) for _ in range(rng.randrange(20))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestKinds:
    @pytest.fixture
    def pair(self, kind, tools, tmp_path):
        return Pair(tools, tmp_path / "tokenizer", kind())

    def test_hostile_texts(self, pair):
        pair.assert_same_tokens(HOSTILE + BROKEN + CORPUS)

    def test_random_texts(self, pair):
        pair.assert_same_tokens(random_texts(1) + random_bytes(2))

    def test_every_token(self, pair):
        pair.assert_same_texts([[token] for token in range(pair.theirs.get_vocab_size() + 2)])

    def test_random_tokens(self, pair):
        rng = random.Random(3)
        pair.assert_same_texts([[rng.randrange(pair.theirs.get_vocab_size() + 5) for _ in range(rng.randrange(30))] for _ in range(500)])

    def test_round_trip(self, pair):
        pair.assert_same_texts([pair.theirs.encode(text).ids for text in HOSTILE + CORPUS])


# All that Unicode has, but of the large blocks of one kind a part.
DENSE = [(0, 0x3400), (0xA000, 0xAC10), (0xD780, 0xD800), (0xE000, 0x17000), (0x18CF0, 0x20000)]
CODE_POINTS = [c for c in range(0x32400) if not 0xD800 <= c < 0xE000 and (c % 8 == 1 or any(a <= c < b for a, b in DENSE))]


def every_character(form, characters=128):
    return ["".join(form.format(chr(c)) for c in CODE_POINTS[i:i + characters]) for i in range(0, len(CODE_POINTS), characters)]


@pytest.mark.slow
@pytest.mark.parametrize("patterns", [[GPT2], [QWEN2], [LLAMA3], [GPT4O], DEEPSEEK], ids=["gpt2", "qwen2", "llama3", "gpt4o", "deepseek"])
def test_every_character_in_context(patterns, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", train(split(*patterns, visible=True), normalizers.NFC()))
    pair.assert_same_tokens(every_character("a{0}1{0}{0} {0}'{0}\n{0}e\u0301\u0323{0}\u0301") + random_texts(11))


@pytest.mark.parametrize("flags", [dict(single_word=True), dict(lstrip=True), dict(rstrip=True)], ids=str)
def test_every_character_beside_an_added_token(flags, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", train(split(QWEN2), added=[("~", flags)]))
    pair.assert_same_tokens(every_character("{0}~ ~{0} "))


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("pattern", [r"\p{Lu}", r"\s+|ab", "(?=[A-Z])", "-"])
def test_behaviors(pattern, behavior, invert, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", train(split(pattern, behavior=behavior, invert=invert, visible=True)))
    pair.assert_same_tokens(HOSTILE + CORPUS + ["the-final--countdown", "-a-", "--", "ABab AB", "-A- -A"] + random_texts(4, 200))


NORMALIZERS = [normalizers.NFC(), normalizers.NFD(), normalizers.NFKC(), normalizers.NFKD(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Strip(left=False),
               normalizers.Strip(right=False), normalizers.Prepend("\u0301x"), normalizers.Replace("ab", ""), normalizers.Replace("a", "bab"),
               normalizers.Replace(Regex(r"\s+$|(?<=\p{L})|\d"), "é"), normalizers.Sequence([])]


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda normalizer: json.loads(normalizer.__getstate__())["type"])
def test_normalizers(normalizer, tools, tmp_path):
    """Also of every character, and with a space wherever a Metaspace says that the text begins."""
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r".\p{M}*"), "isolated"), pre_tokenizers.Metaspace("~", "first", split=False),
                                             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    pair = Pair(tools, tmp_path / "t", train(pre_tokenizer, normalizer, added=[token for token in ADDED if token[0] != "  "]))
    texts = random_texts(12, 500)
    pair.assert_same_tokens(every_character("{0}a\u0301{0}\u0323\u0301") + [text[i:] for i in range(3) for text in texts] + HOSTILE + BROKEN)


@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.Punctuation(behavior) for behavior in BEHAVIORS] + [pre_tokenizers.Digits(), pre_tokenizers.Digits(True)], ids=str)
def test_classes_of_characters(pre_tokenizer, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", train(pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.ByteLevel(use_regex=False)])))
    pair.assert_same_tokens(every_character("{0}a{0}") + HOSTILE + random_texts(13, 300))


DECODERS = [decoders.ByteLevel(), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("▁", 1, 0), decoders.Strip("a", 9, 0), decoders.Metaspace(),
            decoders.Metaspace("e", "never"), decoders.Metaspace("▁", "first"), decoders.Replace("▁", " "), decoders.Replace(Regex("[a-m]|^"), "é"), decoders.Sequence([]),
            decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()]), decoders.Sequence([decoders.ByteLevel(), decoders.Strip("é", 1, 0), decoders.ByteFallback()])]


@pytest.mark.parametrize("decoder", [None, *DECODERS], ids=str)
def test_decoders(decoder, tools, tmp_path):
    bytes_in_plenty = [(f"<0x{byte}>", {}) for byte in ("F0", "9f", "+9", "-9", "99 ", "é")]
    content = json.loads(sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER, added=[*ADDED, *bytes_in_plenty]).to_str())
    content["decoder"] = decoder and json.loads(decoder.__getstate__())
    pair = Pair(tools, tmp_path / "t", Tokenizer.from_str(json.dumps(content)))
    rng = random.Random(14)
    size = pair.theirs.get_vocab_size() + 3
    valid = [[pair.theirs.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("é", "🙂", "a", "\0")]
    mixed = [sum((rng.choice([[rng.randrange(size)], [rng.randrange(3, 259)], rng.choice(valid)]) for _ in range(rng.randrange(12))), []) for _ in range(1000)]
    pair.assert_same_texts([[token] for token in range(size)] + mixed)


@pytest.mark.parametrize("literal", ["-", " ", "a.c", "\n", "[x]", "é", "#{", "\\"])
def test_literal_patterns(literal, tools, tmp_path):
    pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(literal, "removed"), pre_tokenizers.ByteLevel(use_regex=False)])
    pair = Pair(tools, tmp_path / "t", train(pre_tokenizer))
    pair.assert_same_tokens([f"x{literal}{literal}y abc a.c{literal}", literal, "axc", "#{x}[x]\\d"])


PATTERNS = [
    r"\s", r"\S+", r"\d", r"\D+", r"\w+", r"\W+", r"[\w-]+", r"[^\w\s]", r"[\S]+", r"\h+", r"\bx", r"\Bx", r"\p{Han}+", r"\p{^Lu}+", r"\P{L}+",
    r"\p{M}", r"\p{S}", r"\p{P}+", r"\p{N}", r"\p{Nd}", r"\p{Z}", r"[[:space:]a]", r"[[:punct:]]", r"^.", r".$", r"\Aa", r"a\z", r"a\Z", r"(?m).",
    r"(?i)STRASSE|ǆ|k", r"[]a]", r"[^]a]+", r"a{2}", r"a{,2}", r"a{1,2}?", r"a{,}", r"\u00e9", r"\x61", r"\x{1f642}", r"\v", r"a++b", r"(?>a+)",
    r"(?<=a)b", r"(?<!a)b", r"\R", r"[a\-z]", r"[!-/]", r"\-\/\#", r"(?i:'S|'LL|'ve)", r"(?i:[k-s]+)", r"\p{Latin}?é", r"(a|b)*c?"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", train(split(pattern, visible=True), added=[]))
    others = ["aaa\nx aab\n\n", "straße STRASSE Ǆ K", "]a]b a-z - \\ \v \f", "a{,} {2}"]
    pair.assert_same_tokens(every_character("{0}a'{0}") + HOSTILE + random_texts(5, 300) + others)


UNITS = ["a", "hello", " ", "\n", "\r\n", "7", "🙂", "\u0301", "\u0323\u0301", "e\u0301", "日", "<", "<pl", "'s", " \n", "-", "\t ", "\0"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", [gpt2, qwen2, gpt4o, deepseek, llama2, mistral, metaspace_always, gemma], ids=lambda kind: kind.__name__)
def test_a_megabyte_of_one_kind(kind, unit, tools, tmp_path):
    pair = Pair(tools, tmp_path / "t", kind())
    text = unit * (2**20 // len(unit.encode()))
    [ours] = pair.encode([text.encode()])
    assert ours == pair.theirs.encode(text, add_special_tokens=False).ids


def shared_texts(shared):
    return [path.read_bytes() for path in sorted((shared / "text").glob("*.txt"))]


# One of each sort always, the others with the slow tests.
BOOKS = [llama2, mistral, gemma, metaspace_first, llama3, phi2]
BOOKS += [pytest.param(kind, marks=pytest.mark.slow) for kind in [gpt2, qwen2, gpt4o, deepseek, digits_together, punctuation, *SENTENCE_PIECE] if kind not in BOOKS]


@pytest.mark.parametrize("kind", BOOKS, ids=lambda kind: kind.__name__)
def test_books(kind, tools, shared, tmp_path):
    pair = Pair(tools, tmp_path / "t", kind())
    pair.assert_same_tokens(shared_texts(shared))
    pair.assert_same_texts([pair.theirs.encode(text.decode()).ids for text in shared_texts(shared)])


def test_books_as_one_word(tools, shared, tmp_path):
    """Merges that were learned from lines reach over words, so that nothing cuts a text of a megabyte."""
    lines = (shared / "text" / "calibration.txt").read_text().replace(" ", "▁").splitlines()
    tokenizer = sentence_piece(LLAMA_NORMALIZER, None, LLAMA_DECODER, corpus=lines[::8], words=(), vocabulary=5000)
    assert any("▁" in token[1:].strip("▁") for token in tokenizer.get_vocab())
    pair = Pair(tools, tmp_path / "t", tokenizer)
    pair.assert_same_tokens(shared_texts(shared) + HOSTILE)
    pair.assert_same_texts([tokenizer.encode(text.decode()).ids for text in shared_texts(shared)])


@pytest.mark.parametrize("model", ["demo", "mid"])
def test_trained_models(model, tools, shared, tmp_path):
    pair = Pair(tools, tmp_path / "t", Tokenizer.from_file(str(shared / "models" / model / "tokenizer.json")))
    pair.assert_same_tokens(shared_texts(shared) + HOSTILE + BROKEN + random_texts(6) + random_bytes(7))
    pair.assert_same_texts([[token] for token in range(pair.theirs.get_vocab_size())])


def test_bundled_model(tools, demo_model, tmp_path):
    pair = Pair(tools, tmp_path / "t", Tokenizer.from_file(str(demo_model / "tokenizer.json")))
    pair.assert_same_tokens(HOSTILE + BROKEN + CORPUS + random_texts(8) + random_bytes(9))
    pair.assert_same_texts([[token] for token in range(pair.theirs.get_vocab_size())])
