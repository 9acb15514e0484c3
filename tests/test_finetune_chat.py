"""Chat templates, held to what transformers renders and counts; and what is read of a tokenizer's files."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers as tiny
import tokenizers

from lora_jax.finetune.data.chat import spans
from lora_jax.finetune.data.rendering import _inside
from lora_jax.finetune.data.template import Template
from lora_jax.finetune.data.tokenizer import Tokenizer

REFERENCES = json.loads((Path(__file__).parent / "fixtures/chat_references.json").read_text())
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def tokenizer():
    return tokenizers.Tokenizer.from_str(json.dumps(REFERENCES["tokenizer"]))


@functools.cache
def template(family, generation):
    """A family's template, with generation blocks or without."""
    marks = ("{% generation %}", "{% endgeneration %}") if generation else ("", "")
    source = REFERENCES["templates"][family].replace("«", marks[0]).replace("»", marks[1])
    special = [token.content for token in tokenizer().get_added_tokens_decoder().values() if token.special]
    return Template(source, family, VARIABLES, special)


@pytest.mark.parametrize("family", REFERENCES["templates"])
def test_text_and_what_counts_are_those_of_transformers(family):
    cases = [case for case in REFERENCES["cases"] if case["family"] == family]
    assert len(cases) >= 7
    for case in cases:
        chat = REFERENCES["chats"][case["chat"]]
        messages, tools = chat["messages"], {"tools": chat["tools"]} if "tools" in chat else {}
        for generation in (False, True):
            its = template(family, generation)
            assert its.render(messages, "a:1", prompt=True, **tools) == case["prompt"]
            text, found = spans(its, messages, "a:1", **tools)
            assert text == case["text"], case["chat"]
            encoding = tokenizer().encode(text, add_special_tokens=False)
            assert encoding.ids == case["ids"]
            counts = "".join(map(str, _inside(encoding, found).astype(int)))
            assert counts == case["mask"], (case["chat"], generation, [text[start:end] for start, end in found])


def test_the_day_is_that_of_the_run():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert Template(source, "chat.jinja", {}, date="2025-01-31").render([], "a:1") == "31 Jan 2025"
    with pytest.raises(ValueError, match="--date 2025-02-30: it is no day"):
        Template(source, "chat.jinja", {}, date="2025-02-30")


def turns(source, chat, first=0, **options):
    text, found = spans(
        Template(source, "chat.jinja", VARIABLES, ["<|end|>", "<|endoftext|>"]), chat, "a:1", first, **options
    )
    return [text[start:end] for start, end in found]


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def test_turns_before_the_first_that_counts_do_not():
    for generation in (False, True):
        text, found = spans(template("chatml", generation), CHAT, "a:1", first=2)
        assert [text[start:end] for start, end in found] == ["d<|im_end|>"]


def test_options_reach_the_template():
    source = "{% for m in messages %}<{{ m.name }}>{{ m.content }}{% if thinking %}~{% endif %}</s>{% endfor %}"
    chat = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "name": "y"}]
    assert turns(source, chat) == ["b</s>"]
    assert turns(source, chat, thinking=True) == ["b~</s>"]


def test_content_in_parts():
    source = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    assert turns(source, chat) == ["b</s>", "d</s>"]


def test_where_turns_cannot_be_told_an_error_says_so():
    twice = "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    reordered = "{% for m in messages[::-1] %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for source in (twice, reordered):
        with pytest.raises(
            ValueError, match=r"a:1: where the assistant's message \d .*cannot be told .*{% generation %}"
        ):
            turns(source, CHAT)


REFUSED = {
    "raised": (
        "{{ raise_exception('Roles must alternate') }}",
        "a:1: the chat template of chat.jinja refuses .*: Roles must",
    ),
    "undefined": ("{{ messages[0].author.name }}", "a:1: .*refuses .*'dict object' has no attribute 'author'"),
    "type": ("{{ messages[0].content + 1 }}", "a:1: .*refuses .*can only concatenate str"),
    "index": ("{{ 1 // 0 }}", "a:1: .*refuses .*zero"),
    "unsafe": ("{{ messages.append(1) }}", "a:1: .*refuses .*not safely callable|a:1: .*refuses .*unsafe"),
    "syntax": ("\n{% for m in %}", r"chat.jinja: its chat template is no Jinja \(line 2: .*correct it, or give one as"),
    "mark": ("{{ '\ufdd0' }}", "a:1: a character U.FDD0, which no text has"),
    "generation mark": ("{% generation %}\ufdd1{% endgeneration %}", "a:1: a character U.FDD1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_refuses_names_the_record(case):
    source, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected):
        turns(source, CHAT)


# A tokenizer's files


def test_tokens_are_those_that_files_name_the_first_of_them_first(tmp_path):
    fast = tiny.byte_level()
    config = {"eos_token_id": [3, 1], "bos_token_id": 0, "pad_token_id": -1}
    cases = [
        ({}, {}, (None, None, 0)),
        ({"eos_token": tiny.EOS}, {"config": config}, (0, 1, 1)),
        ({"eos_token": None}, {"config": config}, (0, 3, 3)),
        ({}, {"generation_config": {"eos_token_id": 1}}, (None, 1, 1)),
        ({}, {"special_tokens_map": {"eos_token": {"content": tiny.END}}, "config": config}, (0, 3, 3)),
        ({"pad_token": {"content": tiny.START}, "eos_token": tiny.EOS}, {}, (None, 1, 2)),
    ]
    for i, (tokenizer_config, files, expected) in enumerate(cases):
        found = Tokenizer.of(tiny.save(tmp_path / str(i), fast, tokenizer_config, **files), 300)
        assert (found.bos, found.eos, found.pad) == expected


WRONG = {
    "no such token": (
        {"eos_token": "<eos>"},
        {},
        300,
        r"tokenizer_config\.json': eos_token is '<eos>', which tokenizer\.json l",
    ),
    "no such id": (
        {},
        {"config": {"eos_token_id": 290}},
        300,
        r"config\.json': eos_token_id is 290, which tokenizer\.json lac",
    ),
    "embedding": (
        {},
        {},
        100,
        r"tokenizer\.json' gives 'Ġw' the id 263, and the model's embedding has 100 rows: take the tok",
    ),
    "templates": (
        {"chat_template": [{"name": "a"}]},
        {},
        300,
        "chat_template is neither a template nor a list of named",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_disagrees_is_an_error(case, tmp_path):
    config, files, rows, expected = WRONG[case]
    with pytest.raises(ValueError, match=expected):
        Tokenizer.of(tiny.save(tmp_path, tiny.byte_level(), config, **files), rows)


def test_a_directory_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json' is missing"):
        Tokenizer.of(tmp_path, 300)
    (tmp_path / "tokenizer.json").write_text('{"version": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json' is no tokenizer"):
        Tokenizer.of(tmp_path, 300)


def test_an_added_token_without_a_row_is_an_error_where_it_comes_up(tmp_path):
    fast = tiny.byte_level()
    fast.add_special_tokens(["<image>"])  # as Gemma 3 has it, of which the text alone is trained
    found = Tokenizer.of(tiny.save(tmp_path, fast, {"eos_token": tiny.EOS}), 264)
    assert len(found.ids(["hell"], ["a:1"])[0]) == 1
    with pytest.raises(ValueError, match="a:7: .* gives '<image>' the id 264, and the model's embedding has 264 rows"):
        found.ids(["hell", "<image>"], ["a:1", "a:7"])
    with pytest.raises(ValueError, match="gives '<image>' the id 264"):
        Tokenizer.of(tiny.save(tmp_path / "pad", fast, {"pad_token": "<image>"}), 264)


def test_padding_and_truncation_of_a_published_tokenizer_are_off(tmp_path):
    found = Tokenizer.of(tiny.save(tmp_path, tiny.word_piece(), {"pad_token": "[PAD]"}), 300)
    assert [len(ids) for ids in found.ids(["a", "a " * 50], ["", ""])] == [3, 52]
    assert [len(x.ids) for x in found.encode(["a", "a " * 50], ["", ""], truncate=9)] == [3, 9]
    assert [len(x.ids) for x in found.encode(["a", "a " * 50], ["", ""])] == [3, 52]


TEMPLATES = {  # what files hold, and which template is taken: without tools, and with them
    "string": ({"chat_template": "1"}, {}, ("1", "1")),
    "named": (
        {"chat_template": [{"name": "default", "template": "1"}, {"name": "tool_use", "template": "2"}]},
        {},
        ("1", "2"),
    ),
    "json": ({}, {"chat_template": {"chat_template": "3"}}, ("3", "3")),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_are_found_where_they_are_kept(case, tmp_path):
    config, files, expected = TEMPLATES[case]
    directory = tiny.save(tmp_path, tiny.byte_level(), config, **files)
    found = Tokenizer.of(directory, 300)
    assert (found.template().source, found.template(tools=True).source) == expected
    (directory / "chat_template.jinja").write_text("é")
    assert Tokenizer.of(directory, 300).template().source == "é"
    (tmp_path / "own.jinja").write_text("{{ eos_token }}")
    own = Tokenizer.of(directory, 300, chat_template=tmp_path / "own.jinja").template()
    assert own.source == "{{ eos_token }}" and own.where == str(tmp_path / "own.jinja")


def test_without_a_template_an_error_says_how_to_give_one(tmp_path):
    found = Tokenizer.of(tiny.save(tmp_path, tiny.byte_level()), 300)
    with pytest.raises(ValueError, match=r"has no chat template: give one as --chat-template FILE\.jinja"):
        found.template()
    named = {"chat_template": [{"name": "rag", "template": "1"}]}
    with pytest.raises(ValueError, match="has chat templates called rag, and none 'default'"):
        Tokenizer.of(tiny.save(tmp_path, tiny.byte_level(), named), 300).template()
    with pytest.raises(FileNotFoundError, match=r"no\.jinja: no such file: correct --chat-template"):
        Tokenizer.of(tmp_path, 300, chat_template="no.jinja")
    (tmp_path / "bad.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=re.escape("bad.jinja: no UTF-8")):
        Tokenizer.of(tmp_path, 300, chat_template=tmp_path / "bad.jinja")


def test_a_template_knows_the_tokens_that_files_name(tmp_path):
    config = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}",
        "bos_token": "<s>",
    }
    found = Tokenizer.of(tiny.save(tmp_path, tiny.byte_level(), config, config={"eos_token_id": 1}), 300)
    assert found.template().render([{"role": "user", "content": "a"}], "a:1") == "<s>|</s>||a"
    assert np.array_equal(found.ids(["<s>"], ["a:1"])[0], [0])
