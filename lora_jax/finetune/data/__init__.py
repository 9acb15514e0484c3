"""Data: files as batches of tokens, and which of these the loss predicts.

In the order that data flows: `sources` (files to records) → `kinds` (which columns are meant, and whether they hold
what they should) → `rendering` (a record to tokens, and which of them count; by `tokenizer`; of messages by `template`
and `chat`; by `documents` where text is long) → `holding` (a part is held out) → `fitting` (what is longer than a row)
→ `rows` (examples to arrays, and these to batches) → `dataset` (all of that; `preview` shows an example).
"""
