"""Damage: what may become of an adapter file, on a disk or on purpose, drawn at random."""

from __future__ import annotations

import copy
import json
import struct

VALUES = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x", "LoKr", "shared",
    "float16", "a\nb", [], [0], [0, 0], [-1], [1, 99], [True], [2**62, 2**62], [[]], {}, {"x": {}}, {"format": 2},
)  # fmt: skip


def damaged(rng, content):
    """A file's bytes changed in one of five ways.

    Args:
      rng: A `random.Random`.
      content: The file's bytes.
    """
    kind = rng.randrange(6)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    size = int.from_bytes(content[:8], "little")
    if kind == 1:  # some bits, more often in the header than in the tensors
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(rng.choice((8, 8 + size, len(content))))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:  # a part that is lost, or there twice
        begin, length = rng.randrange(len(content)), rng.randrange(1, 40)
        return content[:begin] + rng.choice((b"", 2 * content[begin : begin + length])) + content[begin + length :]
    header = json.loads(content[8 : 8 + size])
    if kind == 3:
        _change(rng, header)
    else:
        described = json.loads(header["__metadata__"]["lora_jax"])
        for _ in range(rng.choice((1, 1, 2))):
            _change(rng, described)
        header["__metadata__"]["lora_jax"] = json.dumps(described)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _change(rng, tree):
    """Changes one node of a JSON document, drawn so that deep ones are as likely as others."""
    places = [*_places(tree)]
    node, key = rng.choice(places)
    other_node, other_key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        node[key] = copy.deepcopy(rng.choice(VALUES))
    elif how == 1:
        del node[key]
    elif how == 2:
        node[key] = copy.deepcopy(other_node[other_key])
    elif isinstance(node, dict):
        node[rng.choice(("x", "", key + "x", "dtype", "base"))] = node.pop(key)
    else:
        node.append(copy.deepcopy(rng.choice(VALUES)))


def _places(tree):
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def damaged_folder(rng, files):
    """Those of an adapter folder's two files that changed, as PEFT names them.

    Args:
      rng: A `random.Random`.
      files: The bytes of adapter_config.json and adapter_model.safetensors by name.
    """
    config, weights = files
    if rng.randrange(2):
        if rng.randrange(3) == 0:
            return {**files, config: _torn(rng, files[config])}
        fields = json.loads(files[config])
        for _ in range(rng.choice((1, 1, 2))):
            _change(rng, fields)
        return {**files, config: json.dumps(fields).encode()}
    content = files[weights]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    kind = rng.randrange(5)
    if kind == 0:
        return {**files, weights: _torn(rng, content)}
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)
    if kind == 1:  # renamed, moved, or there for another
        new = rng.choice((other, one + "x", one.removeprefix("base_model."), one.replace("lora_A", "lora_B"), ""))
        header[new] = header.pop(one)
    elif kind == 2:
        header[one], header[other] = header[other], header[one]
    elif kind == 3:
        _change(rng, header)
    else:  # numbers that are none
        begin, end = header[one]["data_offsets"]
        at = 8 + size + rng.randrange(begin, max(end, begin + 1), 4)
        content = (
            content[:at] + struct.pack("<f", rng.choice((float("nan"), float("inf"), 0.0, 1e38))) + content[at + 4 :]
        )
    entries = [*header.items()]
    rng.shuffle(entries)
    text = json.dumps(dict(entries)).encode()
    return {**files, weights: struct.pack("<Q", len(text)) + text + content[8 + size :]}


def _torn(rng, content):
    """Bytes that are cut off, have some bits turned, or a part lost or there twice."""
    kind, begin = rng.randrange(3), rng.randrange(len(content))
    if kind == 0:
        return content[:begin]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    length = rng.randrange(1, 40)
    return content[:begin] + rng.choice((b"", 2 * content[begin : begin + length])) + content[begin + length :]
