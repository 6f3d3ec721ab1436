"""The files beside a model's weights that let transformers, TRL, vLLM, llama.cpp, and MLX open it.

- tokenizer.json: a tiktoken encoding as a byte-level BPE, with the specials as added tokens
- tokenizer_config.json: end and padding tokens, and the chat template
- chat_template_generation.jinja: the same template with `{% generation %}` around what is in the
  loss, for trainers that want assistant masks; some engines cannot read the mark
- generation_config.json: every id that ends an answer

Two things differ from nanosft, because other programs tokenize the rendered chat as one string: a
user who types `<|end|>` gets the token (the model card says what to do), and in `alpaca` and `raw`
the end of a message may merge with the start of the next; single-turn prompts are not affected.
"""

import functools
import itertools
import json
import math
from pathlib import Path

import tiktoken

from nanosft.errors import write_json


def byte_symbols() -> dict[int, str]:
    """byte -> the printable character that stands for it in tokenizer.json: b" " -> "Ġ".

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, in the order of their ranks.

    tiktoken keeps only the result of each merge. Applying the lower-ranked merges to its bytes
    leaves the two halves. A token that they cannot reduce to two halves occurs in no text.
    """
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(pieces)]
            first = pairs.index(min(pairs))
            if pairs[first] == math.inf:
                break
            pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
        if len(pieces) == 2:
            merges.append(tuple(pieces))
    return merges


@functools.cache  # GPT-2's 50,000 merges take a second to recover
def tokenizer_json(encoding: tiktoken.Encoding, n_vocab: int) -> str:
    """The encoding in the format of the `tokenizers` library, without specials from n_vocab on."""
    symbols, ranks = byte_symbols(), encoding._mergeable_ranks

    def spell(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    specials = sorted((i, text) for text, i in encoding._special_tokens.items() if i < n_vocab)
    # use_regex: split with GPT-2's pattern, where bytes merge at all
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": encoding.name != "bytes"}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
        "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {spell(token): rank for token, rank in ranks.items()},
        "merges": [[spell(a), spell(b)] for a, b in recover_merges(ranks)],
    }
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags, "special": True}
                         for i, text in specials],
        "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": model,
    }, ensure_ascii=False) + "\n"


# Jinja, the language of chat templates. The tokens are spelled out, never built from a role, so
# transformers can tell them from the same characters in a message.
START = r"""
{%- set n_system = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages -%}
{%- set role = 'system' if loop.index0 < n_system else
               ('user' if (loop.index0 - n_system) % 2 == 0 else 'assistant') -%}
{%- if message['role'] != role -%}
{{- raise_exception('the order is: system (optional), then user and assistant alternating') -}}
{%- endif -%}
{%- if message['content'] is not string -%}
{{- raise_exception('the content of each message must be a string') -}}
{%- endif -%}
{%- set text = message['content'] -%}
{%- if message['input'] -%}
{%- set text = text ~ '\n\n' ~ message['input'] if text else message['input'] -%}
{%- endif -%}
{%- if role == 'assistant' -%}
"""
CHAT_CONTEXT = "{{- ('<|system|>' if role == 'system' else '<|user|>') ~ text ~ '<|end|>' -}}"
CHAT_PROMPT_END = """
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""
SINGLE_TURN = """
{%- if n_system or messages | length > 2 -%}
{{- raise_exception('the alpaca template takes one user message and one answer') -}}
{%- endif -%}
"""


def chat_template(template: str, alpaca: tuple[str, str], marks: bool = False) -> str:
    """A template of tokenizer.py in Jinja; marks: with `{% generation %}` around what is in the
    loss. alpaca: its two texts, without input and with.

    It gives the ids of `render` and, with add_generation_prompt, those of `render_prompt`, but for
    the two things at the top of this file, and refuses messages out of order as they do.
    """
    context, end = "{{- text -}}", ""
    answer = supervised("text ~ ('<|endoftext|>' if loop.last else '')", marks)
    if template == "chat":
        context, end = CHAT_CONTEXT, CHAT_PROMPT_END
        answer = ("{{- '<|assistant|>' -}}" + supervised("text ~ '<|end|>'", marks)
                  + "{{- '<|endoftext|>' if loop.last else '' -}}")
    elif template == "alpaca":
        without, with_input = (text.replace("{content}", "{{ message['content'] }}")
                               .replace("{input}", "{{ message['input'] }}") for text in alpaca)
        context = (SINGLE_TURN + "{%- if message['input'] -%}\n" + with_input
                   + "\n{%- else -%}\n" + without + "\n{%- endif -%}")
    parts = [START, answer, "\n{%- else -%}\n", context, "\n{%- endif -%}\n{%- endfor -%}\n", end]
    return "".join(parts).strip()


def supervised(expression: str, marks: bool) -> str:
    """Jinja that prints an expression; marks: with a generation mark, unless its weight is 0."""
    shown = "{{- " + expression + " -}}"
    if not marks:
        return shown
    return ("{%- if message['weight'] is defined and message['weight'] == 0 -%}" + shown
            + "{%- else -%}{%- generation -%}" + shown + "{%- endgeneration -%}{%- endif -%}")


def special_ids(encoding: tiktoken.Encoding, stops: list[int]) -> dict[str, int]:
    """Keys of config.json; stops: the ids that end an answer, the template's end token first."""
    eot = encoding.eot_token
    return {"bos_token_id": eot, "eos_token_id": stops[0], "pad_token_id": eot}


def write_files(folder: Path, sizes, encoding: tiktoken.Encoding, stops: list[int],
                template: str | None, alpaca: tuple[str, str]) -> None:
    """Write the files listed at the top. sizes: model.GPTConfig; template None: no chat template.
    """
    vocabulary = tokenizer_json(encoding, sizes.n_vocab)
    (folder / "tokenizer.json").write_text(vocabulary, encoding="utf-8")
    ids = special_ids(encoding, stops)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast",
                 **{key.removesuffix("_id"): encoding.decode([i]) for key, i in ids.items()},
                 "add_bos_token": False, "clean_up_tokenization_spaces": False,
                 "model_max_length": sizes.block_size}
    if template is not None:
        tokenizer["chat_template"] = chat_template(template, alpaca)
        marked = chat_template(template, alpaca, marks=True) + "\n"
        (folder / "chat_template_generation.jinja").write_text(marked, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "generation_config.json", ids | {"eos_token_id": stops})
