"""Directories of tiny models with a tokenizer, as transformers would have them, and adapters of theirs."""

import json

import jax
import numpy as np
import tokenizers
from tokenizers import models as kinds
from tokenizers import pre_tokenizers, processors

import lora_jax as lora
from lora_jax import models, tree
from lora_jax.finetune import task
from lora_jax.finetune.base import open_base
from lora_jax.models import bert, llama

WORDS = ("<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz", "good", "bad", "film", "list")
CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %} list{% endif %}"


def tokenizer():
    """One token for each word; with one before each text, and for BERT one behind it."""
    made = tokenizers.Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    return made


def random(shapes, seed=0):
    """Variables of these shapes, no two of which are alike."""
    leaves, treedef = jax.tree.flatten(shapes)
    draws = np.random.default_rng(seed)
    return treedef.unflatten([jax.numpy.asarray(draws.normal(0, 0.4, x.shape), "float32") for x in leaves])


def decoder(directory, chat=True):
    """A Llama of two layers."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = llama.Llama(llama.Config(**sizes, intermediate_size=24, max_position_embeddings=24))
    save(directory, model)
    one = tokenizer()
    one.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    one.save(str(directory / "tokenizer.json"))
    beside = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | ({"chat_template": CHAT} if chat else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(beside))
    return directory


def encoder(directory, pooler=True):
    """A BERT of one layer."""
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = bert.Config(**sizes, intermediate_size=24, max_position_embeddings=16, pooler=pooler)
    save(directory, bert.Bert(config))
    one = tokenizer()
    ends = [("<s>", 0), ("</s>", 1)]
    one.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", special_tokens=ends)
    one.enable_truncation(6)  # as sentence encoders' files have it, and padding
    one.enable_padding(length=6)
    one.save(str(directory / "tokenizer.json"))
    return directory


def save(directory, model):
    params = random(jax.eval_shape(model.init, jax.random.key(0), jax.numpy.ones((1, 1), int)))
    models.save(directory, model, params)


def adapter(file, directory, rules, labels=None, seed=1):
    """A native adapter with random factors, and labels.json beside it where it classifies."""
    base = open_base(directory, labels=labels)
    batch = {name: np.ones((1, 4), np.int32) for name in ("input_ids", "attention_mask", "mask", "segment_ids")}
    batch |= {"labels": np.zeros(1, np.int32)}
    rules = {**rules, **{path: lora.Full() for path in base.whole}}
    sites = lora.sites(task.of(base.model).loss, base.params, batch)
    # Not drawn by split, whose programs would be compiled for nothing.
    shapes = jax.eval_shape(lambda params: lora.split(jax.random.key(0), params, rules, sites=sites)[1], base.params)
    lora_params = random(shapes, seed)
    file.parent.mkdir(exist_ok=True)
    lora.save(file, lora_params, base.params)
    return base, lora_params


def same(left, right):
    """Whether two trees hold the same bits."""
    left, right = tree.flatten(left)[0], tree.flatten(right)[0]
    return left.keys() == right.keys() and all(np.array_equal(left[path], right[path]) for path in left)
