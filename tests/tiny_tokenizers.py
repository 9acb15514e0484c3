"""Tokenizers of three kinds, small enough to know their tokens by heart."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BOS, EOS, START, END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(trim_offsets=False, special=False):
    """Bytes, and a few merges: "he", "ll", "hell", " w"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [BOS, EOS, START, END, *alphabet, "he", "ll", "hell", "Ġw"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")]
    fast = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if special:
        around = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
        fast.post_processor = processors.Sequence([fast.post_processor, around])
    fast.add_special_tokens([BOS, EOS, START, END])
    return fast


def metaspace():
    """As SentencePiece has it, with bytes for what it lacks: Llama 2's kind."""
    words = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdeq:", "▁a", "▁b", "ab", "▁ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    vocabulary = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    fast.add_special_tokens([BOS, EOS])
    return fast


def word_piece():
    """BERT's kind, which sets padding and truncation, as published ones do."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmno")]
    fast = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*words, "good", "bad"])}, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    fast.enable_padding(length=12)
    fast.enable_truncation(8)
    return fast


def save(directory, fast, tokenizer_config=None, **files):
    """A model's directory without the model: tokenizer.json, tokenizer_config.json, and others by their stem."""
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    for name, content in {"tokenizer_config": tokenizer_config or {}, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory
