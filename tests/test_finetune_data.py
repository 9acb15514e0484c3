"""Data to fine-tune on: files, tokens and which of them count, rows, batches, and what is held out."""

import csv
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet
import pytest
import tiny_tokenizers as tiny

import lora_jax as lora
from lora_jax import training
from lora_jax.finetune.data import dataset, documents, preview, sources
from lora_jax.finetune.data.fitting import fitted
from lora_jax.finetune.data.holding import held_out
from lora_jax.finetune.data.rendering import Example
from lora_jax.finetune.data.rows import Batches, packed, padded
from lora_jax.finetune.data.tokenizer import Tokenizer
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.task import LanguageModel
from lora_jax.models import names
from lora_jax.models.llama import Config, Llama

CHATML = {"bos_token": tiny.BOS, "eos_token": {"content": tiny.EOS}, "chat_template": tiny.CHATML}


@pytest.fixture(scope="module")
def of(tmp_path_factory):
    """Tokenizers by name, as read from a directory."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {
        "bytes": (tiny.byte_level(), CHATML),
        "trimmed": (tiny.byte_level(trim_offsets=True), CHATML),
        "special": (tiny.byte_level(trim_offsets=True, special=True), CHATML),
        "metaspace": (tiny.metaspace(), {"bos_token": tiny.BOS, "eos_token": tiny.EOS}),
        "word_piece": (tiny.word_piece(), {"pad_token": "[PAD]"}),
    }
    return {name: Tokenizer.of(tiny.save(root / name, *parts), 300) for name, parts in made.items()}


def write(file, records):
    """Records as a file of the format that its name says."""
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        file.write_text("\n\n".join(record["text"] for record in records))
    return str(file)


def built(file, tokenizer, task="lm", classes=(), positions=64, **settings):
    settings = {"eval_share": 0, "length": 64, **settings}
    files = (file,) if isinstance(file, str) else tuple(file)
    return dataset.of(Settings(data=files, **settings), tokenizer, task, positions=positions, classes=classes)


def one(tmp_path, tokenizer, record, **options):
    """A record's tokens, and those that count."""
    found = built(write(tmp_path / "one.jsonl", [record]), tokenizer, **options).first
    tokens = [tokenizer.fast.id_to_token(i) for i in found.ids]
    return tokens, [token for token, counts in zip(tokens, found.mask, strict=True) if counts]


# Files


TEXTS = [{"text": 'hello\nworld, "é" 日本 \u2028 x', "n": 1}, {"text": "second", "n": 2}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_record_is_the_same_from_every_format(suffix, tmp_path):
    file = write(tmp_path / f"a.{suffix}", TEXTS)
    found = list(sources.read(file))
    assert [record.fields["text"] for record in found] == [record["text"] for record in TEXTS]
    places = {"jsonl": [1, 2], "csv": [2, 4], "parquet": [1, 2]}[suffix]  # a csv's first record has two lines
    assert [record.where for record in found] == [f"{file}:{place}" for place in places]


def test_text_is_one_document_and_a_byte_order_mark_is_none_of_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "two"}')
    assert [record.fields["text"] for record in sources.read(tmp_path / "a.txt")] == ["one\ntwo\n"]
    assert [(record.fields["text"], record.line) for record in sources.read(tmp_path / "a.jsonl")] == [
        ("one", 1),
        ("two", 4),
    ]


def test_fields_of_a_csv_may_be_long_and_the_limit_is_as_it_was(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(sources.read(tmp_path / "a.csv")).fields["text"]) == 200_000
    list(sources.read(tmp_path / "a.csv"))
    assert csv.field_size_limit() == limit


def test_structs_of_parquet_lack_what_no_one_gave_them(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "c"}]
    file = write(tmp_path / "a.parquet", [{"messages": chat}])
    assert next(sources.read(file)).fields == {"messages": chat}


def test_without_pyarrow_an_error_says_how_to_get_it(tmp_path, monkeypatch):
    file = write(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"reading it needs pyarrow: pip install 'lora-jax\[parquet\]'"):
        list(sources.read(file))


SEVEN = '{"text": "fine"}\n' * 6
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
WRONG = {  # file, content, and what the error says after the file's name; settings
    "malformed": ("a.jsonl", SEVEN + '{"text": "a}\n', ":7: no JSON at column 10 (Unterminated string"),
    "cut off": ("a.jsonl", SEVEN + '{"text": ', ":7: no JSON at column"),
    "no object": ("a.jsonl", SEVEN + '["a"]\n', ":7: a list, not an object"),
    "huge number": ("a.jsonl", SEVEN + '{"text": "a", "n": ' + "9" * 5000 + "}\n", ":7: JSON that cannot be read"),
    "deep": ("a.jsonl", SEVEN + '{"text": ' + "[" * 200_000, ":7: JSON that cannot be read"),
    "latin-1": ("a.jsonl", SEVEN.encode() + b'{"text": "\xe9"}\n', ":7: no UTF-8 (byte 0xe9 at column 11)"),
    "utf-16": ("a.txt", "text".encode("utf-16"), ":1: a NUL byte: it is another encoding"),
    "nul": ("a.csv", "text\na\nb\0\n", ":3: a NUL byte"),
    "empty": ("a.jsonl", "", ": there is nothing in it"),
    "blank": ("a.txt", " \n\n", ": there is nothing in it"),
    "header alone": ("a.csv", "text,label\n", ": there is nothing in it"),
    "suffix": ("a.json", "[]", ": data ends with .jsonl, .txt, .csv, .parquet, not with '.json'"),
    "no suffix": ("data", "x", ": data ends with .jsonl, .txt, .csv, .parquet, not with 'nothing'"),
    "no parquet": ("a.parquet", "PAR1 or not", ": no parquet that can be read"),
    "too many fields": ("a.csv", 'text,n\n"a\nb",1\nc,2,3\n', ":4: 3 fields, and the first row names 2 (text, n)"),
    "too few fields": ("a.csv", "text,n\na\n", ":2: 1 fields, and the first row names 2"),
    "open quote": ("a.csv", 'text\na\n"b\nc\n', ":3: no row of a csv (unexpected end of data)"),
    "names twice": ("a.csv", "text,text\na,b\n", ":1: the first row names 'text' more than once"),
    "semicolons": ("a.csv", "text;n\na;1\n", ":1: its fields are separated by ';'"),
    "no column": ("a.csv", "body,n\na,1\n", ":2: it has body and n, and needs text, or prompt and completion, or"),
    "half of one": ("a.jsonl", '{"prompt": "a"}\n', ":1: it has prompt, and needs text, or prompt and completion"),
    "several kinds": ("a.jsonl", '{"text": "a", "messages": []}\n', ":1: it has text and messages: name what is meant"),
    "mixed": ("a.jsonl", SEVEN + CHAT, ":7: it has messages, and {file}:1 has text: the records of a run are of"),
    "number": ("a.jsonl", SEVEN + '{"text": 3}\n', ":7: text is a number, not a string"),
    "null": ("a.jsonl", SEVEN + '{"text": null}\n', ":7: text is null, not a string"),
    "nothing": ("a.jsonl", SEVEN + '{"text": ""}\n', ":7: text is empty"),
    "half a pair": ("a.jsonl", '{"text": "\\ud83d"}\n', ":1: text has half a surrogate pair"),
    "no completion": ("a.jsonl", '{"prompt": "a", "completion": ""}\n', ":1: completion is empty"),
    "unlike": ("a.jsonl", '{"prompt": "a", "completion": [{"role": "assistant", "content": ""}]}\n', ":1: prompt and"),
    "messages text": ("a.jsonl", '{"messages": "a"}\n', ":1: messages is a string, not a list"),
    "message text": ("a.jsonl", '{"messages": ["a"]}\n', ":1: messages, message 1 is a string, not an object"),
    "no role": ("a.jsonl", '{"messages": [{"content": "a"}]}\n', ':1: messages, message 1 has no "role"'),
    "no content": ("a.jsonl", '{"messages": [{"role": "user"}]}\n', ":1: messages, message 1 has no content"),
    "bad content": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": 1}]}\n',
        ":1: messages, message 1 has content",
    ),
    "no answer": ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ":1: messages has no message of"),
    "no messages": ("a.jsonl", '{"messages": []}\n', ":1: messages has no message of the assistant"),
    "bad tools": ("a.jsonl", CHAT.replace("}]}", '}], "tools": "x"}'), ":1: tools is a string, and no JSON"),
    "one token": ("a.jsonl", '{"text": "a"}\n', ":1: none of its 1 tokens counts", {"tokenizer": "no eos"}),
    "too long": ("a.jsonl", CHAT, ":1: it has 23 tokens, and a row has 16: raise --length to 23", {"length": 16}),
    "cut away": ("a.jsonl", CHAT, ":1: none of its first 8 tokens counts", {"length": 8, "too_long": "truncate"}),
    "one example": ("a.jsonl", CHAT, ":1: 1 example cannot be parted", {"eval_share": 0.1}),
    "all alike": ("a.jsonl", SEVEN, ":1: 6 examples, all alike, cannot be parted", {"eval_share": 0.1}),
    "one line": ("a.txt", "one line", ":1: one document of one line cannot be parted", {"eval_share": 0.1}),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_file_and_line(case, of, tmp_path):
    name, content, expected, *more = WRONG[case]
    settings = dict(more[0]) if more else {}
    tokenizer = of["bytes"]
    if settings.pop("tokenizer", None):
        tokenizer = Tokenizer.of(tiny.save(tmp_path, tiny.byte_level()), 300)
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        built(str(file), tokenizer, **settings)
    assert str(caught.value).startswith(str(file) + expected.format(file=file))
    assert re.search(r"[:;] \S.*", str(caught.value)[len(str(file)) + 4 :]), "it has no remedy"


def test_files_that_are_not_there(tmp_path, of):
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl: no such file: correct --data"):
        built(str(tmp_path / "a.jsonl"), of["bytes"])
    with pytest.raises(IsADirectoryError, match=r"a directory: give the files in it, as .*\*\.jsonl"):
        built(str(tmp_path), of["bytes"])


SETTINGS = {
    "longer than the model": ({"length": 65}, "--length 65: the model has 64 positions: give 2 to 64"),
    "no length": ({"length": 1}, "--length 1: the model has 64"),
    "share": ({"eval_share": 1.0}, "--eval-share 1.0: give a share"),
    "too long": ({"too_long": "cut"}, "--too-long cut: known are error, truncate, drop"),
    "column": ({"columns": {"body": "text"}}, "--columns body=...: no name for lm: known are chat_template"),
    "no such column": ({"columns": {"text": "body"}}, "it has text, and needs body: name those meant"),
    "task": ({"task": "parsing"}, "--task parsing: no task"),
    "packing": ({"task": "classification", "packing": True}, "--packing: what is to be classified has a row"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_error_names_the_setting(case, of, tmp_path):
    settings, expected = SETTINGS[case]
    (tmp_path / "a.jsonl").write_text(SEVEN)
    with pytest.raises(ValueError, match=re.escape(expected)):
        built(str(tmp_path / "a.jsonl"), of["bytes"], **settings)


# Tokens, and which of them count


def test_text_counts_whole_and_ends_once(tmp_path, of):
    assert one(tmp_path, of["bytes"], {"text": "hello w"}) == (
        ["hell", "o", "Ġw", "</s>"],
        ["o", "Ġw", "</s>"],
    )
    tokens, counted = one(tmp_path, of["special"], {"text": "hell"})
    assert (tokens, counted) == (["<s>", "hell", "</s>"], ["hell", "</s>"])
    assert one(tmp_path, of["bytes"], {"text": "hell</s>"})[0] == ["hell", "</s>"]


COMPLETIONS = {  # tokenizer, prompt, completion, tokens, those that count
    "a space of its own": ("bytes", "q ", "he", ["q", "Ġ", "he"], ["he"]),
    "a space that belongs to it": ("bytes", "q", " w", ["q", "Ġw"], ["Ġw"]),
    "a token of both": ("bytes", "he", "llo", ["hell", "o"], ["o"]),  # the first has none before it
    "a token of both, later": ("bytes", "q he", "llo", ["q", "Ġ", "hell", "o"], ["hell", "o"]),
    "a space of both": ("bytes", "q ", "w", ["q", "Ġw"], ["Ġw"]),
    "spaces, trimmed": ("trimmed", "q", "  w ", ["q", "Ġ", "Ġw", "Ġ"], ["Ġ", "Ġw", "Ġ"]),
    "spaces before it, trimmed": ("trimmed", "q  ", "he", ["q", "Ġ", "Ġ", "he"], ["he"]),
    "a line of its own": ("trimmed", "q", "\n\nw", ["q", "Ċ", "Ċ", "w"], ["Ċ", "Ċ", "w"]),
    "a character of two tokens": ("bytes", "é", "é", ["Ã", "©", "Ã", "©"], ["Ã", "©"]),
    "no prompt": ("bytes", "", "hello", ["hell", "o"], ["o"]),
    "set around": ("special", "q", "he", ["<s>", "q", "he"], ["he"]),
    "set around, no prompt": ("special", "", "he", ["<s>", "he"], ["he"]),
    "metaspace": ("metaspace", "q:", " ab", ["<s>", "▁", "q", ":", "▁ab"], ["▁ab"]),
    "metaspace, spaces before": ("metaspace", "q: ", "ab", ["<s>", "▁", "q", ":", "▁ab"], ["▁ab"]),
    "metaspace, bytes": ("metaspace", "q", "é", ["<s>", "▁", "q", "<0xC3>", "<0xA9>"], ["<0xC3>", "<0xA9>"]),
    "normalized, longer": ("metaspace", "q㎝", "d", ["<s>", "▁", "q", "c", "<0x6D>", "d"], ["d"]),
    "normalized, shorter": ("metaspace", "e\u0301", "d", ["<s>", "▁", "<0xC3>", "<0xA9>", "d"], ["d"]),
    "normalized completion": ("metaspace", "d", "㎝", ["<s>", "▁", "d", "c", "<0x6D>"], ["c", "<0x6D>"]),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_a_token_counts_if_any_of_it_is_the_completion(case, tmp_path, of):
    name, prompt, completion, tokens, counted = COMPLETIONS[case]
    found = one(tmp_path, of[name], {"prompt": prompt, "completion": completion})
    assert found == ([*tokens, "</s>"], [*counted, "</s>"])


def test_the_assistant_counts_and_what_ends_its_turns(tmp_path, of):
    chat = [
        {"role": "system", "content": "é"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " w"},
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "hell"},
    ]
    head = ["<|im_start|>", *"assistant", "Ċ"]
    tokens, counted = one(tmp_path, of["bytes"], {"messages": chat, "id": 1})
    assert tokens == [
        *("<|im_start|>", *"system", "Ċ", "Ã", "©", "<|im_end|>", "Ċ"),
        *("<|im_start|>", *"user", "Ċ", "hell", "o", "<|im_end|>", "Ċ"),
        *(*head, "Ġw", "<|im_end|>", "Ċ"),
        *("<|im_start|>", *"user", "Ċ", "w", "<|im_end|>", "Ċ"),
        *(*head, "hell", "<|im_end|>", "Ċ"),
    ]
    assert counted == ["Ġw", "<|im_end|>", "hell", "<|im_end|>"]
    # With the prompt set apart, the turns in it do not count.
    tokens_apart, counted = one(tmp_path, of["trimmed"], {"prompt": chat[:-1], "completion": chat[-1:]})
    assert (tokens_apart, counted) == (tokens, ["hell", "<|im_end|>"])
    # What begins a text is in the template, so the tokenizer sets nothing around a chat.
    assert one(tmp_path, of["special"], {"messages": chat})[0] == tokens


def test_texts_to_classify_have_what_is_set_around_them(tmp_path, of):
    tokenizer = of["word_piece"]
    records = [("good a", "b!", "yes"), ("bad", "c d", "no")]
    records = [dict(zip(("text", "text_pair", "label"), record, strict=True)) for record in records]
    found = built(write(tmp_path / "a.csv", records), tokenizer, "classification")
    assert found.labels == ("no", "yes")
    batch = found.train.take([0, 1])
    tokens = [[tokenizer.fast.id_to_token(i) for i in row] for row in batch["input_ids"]]
    assert tokens[0][:9] == ["[CLS]", "good", "a", "[SEP]", "b", "[UNK]", "[SEP]", "[PAD]", "[PAD]"]
    assert tokens[1][:7] == ["[CLS]", "bad", "[SEP]", "c", "d", "[SEP]", "[PAD]"]
    assert batch["attention_mask"][0].sum() == 7 and batch["input_ids"].shape == (2, 32)
    assert batch["token_type_ids"][0][:8].tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert batch["labels"].tolist() == [1, 0]


def test_what_is_cut_to_classify_keeps_what_is_set_around_it(tmp_path, of):
    records = [{"text": "a " * 20, "label": 0}, {"text": "good", "label": 1}]
    file = write(tmp_path / "a.jsonl", records)
    found = built(file, of["word_piece"], "classification", length=6, too_long="truncate")
    tokens = [of["word_piece"].fast.id_to_token(i) for i in found.train.take([0])["input_ids"][0]]
    assert tokens == ["[CLS]", "a", "a", "a", "a", "[SEP]"] and found.counts.cut == 1
    assert "token_type_ids" not in found.train.take([0])


LABELS = {  # labels, and their names in the order of their numbers
    "numbers": ([2, 0, 1], ("0", "1", "2")),
    "stars": ([10, 1, 5], ("1", "5", "10")),
    "words": (["b", "a", "B"], ("B", "a", "b")),
    "truth": ([True, False, True], ("false", "true")),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_classes_are_in_order(case, suffix, tmp_path, of):
    labels, expected = LABELS[case]
    file = write(tmp_path / f"a.{suffix}", [{"body": "a", "stars": x} for x in labels])
    found = built(file, of["word_piece"], "classification", columns={"text": "body", "label": "stars"})
    if (case, suffix) == ("truth", "csv"):
        expected = ("False", "True")  # as Python writes them there
    assert found.labels == expected
    assert [expected[i].lower() for i in found.train.take(range(3))["labels"]] == [str(x).lower() for x in labels]


def test_labels_of_a_model_that_has_some(tmp_path, of):
    file = write(tmp_path / "a.jsonl", [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}])
    known = built(file, of["word_piece"], "classification", classes=("pos", "neg", "other"))
    assert known.labels == ("pos", "neg", "other") and known.train.take([0, 1])["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"a\.jsonl:2: its label is 'neg', which is none of the model's: 'pos', 'x'"):
        built(file, of["word_piece"], "classification", classes=("pos", "x"))
    file = write(tmp_path / "b.csv", [{"text": "a", "label": "1"}, {"text": "b", "label": "0"}])
    numbers = built(file, of["word_piece"], "classification", classes=("pos", "neg"))
    assert numbers.labels == ("pos", "neg") and numbers.train.take([0, 1])["labels"].tolist() == [1, 0]


WRONG_LABELS = {
    "fraction": ([1, 1.5], ":2: label is a number: a label is a whole number or a string"),
    "none": ([1, None], ":2: label is null"),
    "negative": ([1, -1], ":2: label is -1, as where there is none"),
    "both": ([1, "a"], ":2: its label is 'a', and that of .*:1 is 1: write all as whole numbers"),
    "one": ([1, 1], ":1: all labels are 1: there is nothing to tell apart"),
    "empty": (["a", ""], ":2: label is empty"),
    "spaces": (["a", "b", " a"], ":3: its label ' a' and 'a' of .*:1 differ by spaces"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_wrong_labels(case, tmp_path, of):
    labels, expected = WRONG_LABELS[case]
    file = write(tmp_path / "a.jsonl", [{"text": "a", "label": x} for x in labels])
    with pytest.raises(ValueError, match=r"a\.jsonl" + expected):
        built(file, of["word_piece"], "classification")


@pytest.mark.parametrize(("text", "length"), [("  ", 6), ("good", 2)])
def test_a_row_of_nothing_but_what_the_tokenizer_sets(text, length, tmp_path, of):
    file = write(tmp_path / "a.jsonl", [{"text": "good", "label": 0}, {"text": text, "label": 1}])
    with pytest.raises(ValueError, match=r"a\.jsonl:[12]: (no token of it is left|the tokenizer makes no token)"):
        built(file, of["word_piece"], "classification", length=length, too_long="truncate")


def test_a_label_to_evaluate_on_is_one_to_train_on(tmp_path, of):
    data = write(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    test = write(tmp_path / "b.jsonl", [{"text": "c", "label": "z"}])
    with pytest.raises(ValueError, match=r"b\.jsonl:1: its label is 'z', which is none of those of --data: 'x', 'y'"):
        built(data, of["word_piece"], "classification", eval_data=(test,))


def test_long_documents_have_the_tokens_that_they_have_at_once(of):
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("hello w\né日 ab:"), 6000))
    for name in ("bytes", "special", "metaspace"):
        fast = of[name].fast
        assert documents.encode(fast, text, part=512, shared=128).tolist() == fast.encode(text).ids


# Rows


def example(size, start=4):
    return Example(np.arange(start, start + size, dtype=np.int32), np.arange(size) > 0, f"a.jsonl:{size}")


def test_packing_is_deterministic_and_wastes_little():
    sizes = np.random.default_rng(0).integers(2, 200, 500)
    examples = [example(int(size)) for size in sizes]
    rows, again = packed(examples, 256, 0), packed(examples, 256, 0)
    assert all(np.array_equal(rows.columns[name], again.columns[name]) for name in rows.columns)
    assert rows.sizes.max() <= 256 and rows.sizes.sum() == sizes.sum()
    assert len(rows) <= np.ceil(sizes.sum() / 256) * 1.02
    found = []  # every example is there, whole
    for row in range(len(rows)):
        batch = rows.take([row])
        assert batch["input_ids"].shape == (1, 256)
        for segment in range(1, batch["segment_ids"].max() + 1):
            found.append(batch["input_ids"][batch["segment_ids"] == segment].tolist())
    assert sorted(found) == sorted(example.ids.tolist() for example in examples)


@pytest.fixture(scope="module")
def llama():
    """A task, and its parameters."""
    model = Llama(Config(300, 16, 1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return LanguageModel(model, names(model)), params


@pytest.fixture(scope="module")
def trained(llama):
    """A step of training, what makes the state before the first, and what is frozen."""
    task, params = llama
    sites = lora.sites(task.model.apply, params, jnp.zeros((1, 8), jnp.int32))
    frozen, lora_params = lora.split(
        jax.random.key(1), params, {".*/(value|up)/kernel": lora.LoRA(rank=2)}, sites=sites
    )
    tx = lora.optimizer(optax.adam(0.05))
    step = training.make_step(task.loss, tx, weight=task.weight)
    return step, lambda: training.State.create(jax.random.key(0), jax.tree.map(jnp.copy, lora_params), tx), frozen


def test_documents_in_a_row_do_not_see_each_other(llama):
    task, params = llama
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(0, 300, n).astype(np.int32), np.array([False, *(rng.random(n - 1) < 0.7)]), "")
        for n in (9, 5, 12, 3, 7)
    ]
    batch = packed(examples, 20, pad=1).take([0, 1], 5)  # and rows of nothing
    assert batch["segment_ids"].tolist()[2] == [0] * 20

    @jax.jit
    def losses(ids, segments):
        logits = task.model.apply(params, ids, segments > 0, segments)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])

    found = {}
    together = np.asarray(losses(batch["input_ids"], batch["segment_ids"]))
    for row in range(5):
        for place in np.flatnonzero(batch["mask"][row]):
            segment = batch["segment_ids"][row] == batch["segment_ids"][row, place]
            found.setdefault(tuple(batch["input_ids"][row][segment]), []).append(together[row, place - 1])
    apart = [
        np.array([np.pad(x, (0, 20 - len(x))) for x in xs])
        for xs in zip(*((ids, ids * 0 + 1) for ids, *_ in examples), strict=True)
    ]
    for (ids, mask, *_), alone in zip(examples, np.asarray(losses(*apart)), strict=True):
        np.testing.assert_allclose(found[tuple(ids)], alone[np.flatnonzero(mask) - 1], rtol=1e-5, atol=1e-6)
    mean = np.mean([loss for values in found.values() for loss in values])
    np.testing.assert_allclose(jax.jit(task.loss)(params, batch), mean, rtol=1e-5)  # as training takes it
    assert int(task.weight(batch)) == sum(example.mask.sum() for example in examples)


def test_pieces_of_a_text_predict_each_of_its_tokens_once():
    for size in range(2, 20):
        pieces = fitted([example(size)], 5, "error", pieces=True)
        assert [i for piece in pieces.examples for i in piece.ids[piece.mask]] == list(range(5, 4 + size))
        assert max(len(piece.ids) for piece in pieces.examples) <= 5 and pieces.cut == (size > 5)


def test_what_becomes_of_long_examples(tmp_path, of):
    records = [{"prompt": "q:", "completion": "hello" * n} for n in (1, 2, 9)]
    file = write(tmp_path / "a.jsonl", records)
    assert built(file, of["bytes"], length=10, too_long="drop").counts[:2] == (2, 12)
    cut = built(file, of["bytes"], length=10, too_long="truncate", packing=False)
    assert (cut.counts.cut, cut.counts.examples, cut.train.sizes.tolist()) == (1, 3, [5, 7, 10])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: it has 21 tokens, and a row has 10: raise --length to 21"):
        built(file, of["bytes"], length=10)
    with pytest.raises(ValueError, match=r"each of the 3 examples is longer than 4 tokens: raise --length"):
        built(file, of["bytes"], length=4, too_long="drop")


def test_rows_of_one_example_are_padded_to_few_lengths():
    rows = padded([example(size) for size in (3, 32, 33, 100, 90)], 100, pad=9)
    widths = [rows.take(places)["input_ids"].shape for places in ([0], [0, 1], [2], [3, 0], [4])]
    assert widths == [(1, 32), (2, 32), (1, 64), (2, 100), (1, 100)]
    batch = rows.take([0])
    assert batch["input_ids"][0].tolist() == [4, 5, 6] + [9] * 29
    for name, expected in {"attention_mask": 3, "segment_ids": 3, "mask": 2}.items():
        assert batch[name].sum() == expected and not batch[name][0, 3:].any()


def test_each_row_comes_once_in_a_pass_and_a_batch_depends_on_its_step_alone():
    rows = packed([example(5, start=10 * i) for i in range(7)], 5, 0)
    batches = Batches(rows, 3, seed=1)
    firsts = [int(row[0]) for step in range(14) for row in batches.batch(step)["input_ids"]]
    passes = [firsts[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(one) == [10 * i for i in range(7)] for one in passes)
    assert len({tuple(one) for one in passes}) == 6
    for _ in range(4):
        next(batches)
    other = Batches(rows, 3, seed=1)
    other.set_state(json.loads(json.dumps(batches.get_state())))
    np.testing.assert_array_equal(next(other)["input_ids"], batches.batch(4)["input_ids"])
    assert [int(row[0]) for row in Batches(rows, 7, seed=2).batch(0)["input_ids"]] != passes[0]


def test_an_evaluation_goes_over_all_rows_once_in_batches_of_one_size():
    rows = padded([example(5) for _ in range(5)], 32, 0)
    batches = list(rows.batches(2))
    assert [batch["mask"].any(axis=1).tolist() for batch in batches] == [[True, True], [True, True], [True, False]]
    labeled = [Example(np.arange(3), np.zeros(3, bool), "", label) for label in "aba"]
    assert [x["labels"].tolist() for x in padded(labeled, 8, 0, ["a", "b"]).batches(2)] == [[0, 1], [0, -1]]


# Held out


def test_what_is_held_out_is_not_trained_on(tmp_path, of):
    texts = [f"{i % 37} hello" for i in range(100)]  # most of them more than once
    file = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = built(file, of["bytes"], eval_share=0.2, packing=False)
    train, test = (
        [tuple(row[row != 1]) for row in rows.take(range(len(rows)))["input_ids"]] for rows in (found.train, found.test)
    )
    assert not {*train} & {*test} and len(train) + len(test) == 100 and 15 <= len(test) <= 20
    again = built(file, of["bytes"], eval_share=0.2, packing=False)
    assert np.array_equal(found.test.columns["input_ids"], again.test.columns["input_ids"])
    other = built(file, of["bytes"], eval_share=0.2, packing=False, seed=1)
    assert not np.array_equal(found.test.columns["input_ids"], other.test.columns["input_ids"])
    assert built(file, of["bytes"]).test is None


def test_neither_part_is_ever_empty():
    for share in (0.001, 0.5, 0.999):
        train, test = held_out([example(size) for size in (2, 3, 3, 3)], share, seed=0)
        assert train and test and len(train) + len(test) == 4


def test_a_document_is_cut_between_its_paragraphs(tmp_path, of):
    paragraphs = [f"hello {i}\nhello {i}." for i in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    found = built(str(tmp_path / "a.txt"), of["bytes"], eval_share=0.1, length=64)
    test = of["bytes"].text(found.test.take([0])["input_ids"][0])
    assert test.startswith("hello 18\nhello 18.\n\nhello 19\nhello 19.</s>")
    assert found.first.where == f"{tmp_path / 'a.txt'}:1"


def test_files_to_evaluate_on(tmp_path, of):
    data = write(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "two", "two", "three")])
    test = write(tmp_path / "b.csv", [{"text": "two"}, {"text": "four"}])
    found = built(data, of["bytes"], eval_data=(test,))
    assert (found.counts.examples, found.counts.shared, found.test_counts.examples) == (2, 2, 2)
    with pytest.raises(ValueError, match="each example of --data is in --eval-data too"):
        built(data, of["bytes"], eval_data=(data,))
    chats = tmp_path / "c.jsonl"
    chats.write_text(CHAT)
    with pytest.raises(ValueError, match=r"c\.jsonl:1: its columns are those of chat, and --data is text"):
        built(data, of["bytes"], eval_data=(str(chats),))


def test_counts_say_what_there_is(tmp_path, of):
    file = write(tmp_path / "a.jsonl", [{"text": "hello"}, {"text": "w"}])  # 3 tokens and 2 with what ends them
    counts = built(file, of["bytes"], length=10).counts
    assert counts._asdict() == {
        "examples": 2, "tokens": 5, "counted": 3, "rows": 1, "padding": 0.5, "cut": 0, "dropped": 0, "shared": 0
    }  # fmt: skip
    assert built(file, of["bytes"], length=None, positions=4096).length == 512
    assert built(file, of["bytes"], length=None, positions=48).length == 48


# What is shown


def test_a_preview_marks_what_counts_in_80_columns(tmp_path, of):
    prompt = "word " * 30 + "\x1b[2J"
    record = {"prompt": prompt, "completion": " w\n\n  Ja " + "é" * 100}
    for name in ("trimmed", "metaspace"):
        found = built(write(tmp_path / "a.jsonl", [record]), of[name], length=512, positions=512)
        text = preview.shown(found.first._replace(where="a.jsonl:1"), of[name])
        assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text and "␛[2J⟦" in text
        body = "".join(line[2:] for line in text.splitlines() if line.startswith("  ")).replace("⏎", "")
        assert "⟦ w" in body and body.endswith("é</s>⟧") and body.count("⟦") == 1
        assert f"{int(found.first.mask.sum())} of them predicted" in text
    long = Example(np.arange(4, 260, dtype=np.int32).repeat(20), np.ones(5120, bool), "a.txt:1")
    found = built(write(tmp_path / "w.jsonl", [{"text": "a\x9b\u2028b"}]), of["bytes"])
    wild = preview.shown(found.first._replace(where="a:1"), of["bytes"])
    assert len(wild.splitlines()) == wild.count("\n") + 1 == 2 and r"\x9b\u2028" in wild
    assert len(preview.shown(long, of["bytes"], lines=10).splitlines()) <= 11


# Training


MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "w"}]
KINDS = {
    "text": {"text": "hello w"},
    "completion": {"prompt": "hello", "completion": " w"},
    "chat": {"messages": MESSAGES},
    "chat completion": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}


HOLDS = {"jsonl": [*KINDS], "parquet": [*KINDS], "csv": ["text", "completion"], "txt": ["text"]}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("suffix", "kind"), [(suffix, kind) for suffix, kinds in HOLDS.items() for kind in kinds])
def test_every_kind_of_every_format_trains(kind, suffix, trained, tmp_path, of):
    file = write(tmp_path / f"a.{suffix}", [KINDS[kind]] * 5)
    found = built(file, of["bytes"], length=64)
    step, start, frozen = trained
    state, batches, losses = start(), Batches(found.train, 2, seed=0), []
    for _ in range(3):
        state, metrics = step(state, frozen, next(batches))
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2] > 0
    each = {"text": 3, "completion": 2, "chat": 2, "chat completion": 2}[kind]
    assert found.counts.counted == 5 * each if suffix != "txt" else found.counts.counted > 5 * 3
