"""The files beside a model's weights that let transformers, TRL, vLLM, llama.cpp, and MLX open it,
and whether those beside another program's model agree with an encoding.

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
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import tiktoken

from nanosft.errors import UserError, write_json

# ----- out ---------------------------------------------------------------------------------------


@functools.cache
def byte_symbols() -> dict[int, str]:
    """byte -> the printable character that stands for it in tokenizer.json: b" " -> "Ġ".

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def spell(token: bytes) -> str:
    """A token as tokenizer.json and vocab.json write it: b" the" -> "Ġthe"."""
    return token.decode("latin-1").translate(byte_symbols())


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
    ranks = encoding._mergeable_ranks
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
        # as strings: lists need tokenizers 0.20. No token has a space, which is spelled "Ġ"
        "merges": [f"{spell(a)} {spell(b)}" for a, b in recover_merges(ranks)],
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
{%- if tools or documents -%}
{{- raise_exception('this model was not trained with tools or documents; pass none') -}}
{%- endif -%}
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
{%- if message['tool_calls'] or message['reasoning_content'] -%}
{{- raise_exception('this model was not trained with tool_calls or reasoning_content') -}}
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


# ----- in ----------------------------------------------------------------------------------------

# The files that say what a model's ids mean; from the hub they are downloaded with its weights
VOCABULARIES = ("tokenizer.json", "vocab.json", "encoder.json")  # each token with its id
MERGES = ("merges.txt", "vocab.bpe")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
OTHER_KINDS = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TOKENIZER_FILES = (*VOCABULARIES, *MERGES, "added_tokens.json", *SETTINGS, *OTHER_KINDS)
# A tokenizer_class that does not decide; without a vocabulary's file, any other one does
CLASSES = re.compile("GPT2|PreTrained|TokenizersBackend")
# No text contains an added token that has one of these roles or, if no file says so, such a name
ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
ROLE_NAME = re.compile(rf"\W+({'|'.join(ROLES)}|padding|startoftext|s)\W+", re.IGNORECASE)
# Source: huggingface/tokenizers, pre_tokenizers/byte_level.rs; tiktoken puts it in other words
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TokenizerFile(NamedTuple):
    ids: dict[str, int] = {}  # of tokens, written as `spell` does
    merges: list[str] | None = None  # the token that each makes
    roles: frozenset = frozenset()  # the tokens that have one of ROLES
    other: str = ""  # what makes it another kind of tokenizer than GPT-2's
    tokenizer_class: str = ""  # unless it matches CLASSES


def check_tokenizer(folder: Path, settings: dict, encoding: tiktoken.Encoding,
                    n_vocab: int) -> dict[str, int]:
    """UserError if a file beside a model gives ids another meaning than the encoding does.

    Returns {token: id} of added tokens that no text contains, such as [PAD]: the encoding's chat
    tokens may take these ids. settings: of config.json; n_vocab: how many ids the model has.
    """
    if (named := settings.get("encoding", encoding.name)) != encoding.name:
        raise UserError(f"{folder}/config.json: the model's encoding is {named}, not "
                        f"{encoding.name}; make the data with --encoding {named}")
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    files = {path: read_tokenizer_file(path, encoding) for path in paths}
    has_vocabulary = any(path.name in VOCABULARIES + MERGES for path in paths)
    known = {spell(token): i for token, i in encoding._mergeable_ranks.items()}
    known |= encoding._special_tokens
    is_ours = "encoding" in settings or any(
        known.get(token, 0) > encoding.eot_token for file in files.values() for token in file.ids)
    first_free = encoding.n_vocab if is_ours else encoding.eot_token + 1
    roles = {token for file in files.values() for token in file.roles}
    free = {token: i for file in files.values() for token, i in file.ids.items()
            if first_free <= i < n_vocab and (token in roles or ROLE_NAME.fullmatch(token))}
    for path, file in files.items():
        if file.tokenizer_class and not has_vocabulary:
            refuse(path, f"tokenizer_class is {file.tokenizer_class}", encoding, what="key")
        for why in differences(path.name, file, known | free, encoding.eot_token, n_vocab):
            refuse(path, why, encoding)
    return free


def differences(name: str, file: TokenizerFile, known: dict[str, int], n_base: int,
                n_vocab: int) -> Iterator[str]:
    """What a file says otherwise. known: {token: id}, ids below n_base are those of text."""
    if file.other:
        yield file.other
    names = {i: token for token, i in known.items()}
    for token, i in file.ids.items():
        if known.get(token) != i and i < n_vocab:
            yield f"id {i} is {token!r}, not {names[i]!r}" if i in names else f"it adds {token!r}"
    base = [names[i] for i in range(n_base)]
    if name in VOCABULARIES and (missing := [token for token in base if token not in file.ids]):
        yield f"it has no {missing[0]!r}"
    if file.merges not in (None, [token for token in base if len(token) > 1]):
        yield "it merges other pairs, or in another order"


def refuse(path: Path, why: str, encoding: tiktoken.Encoding, what: str = "file") -> NoReturn:
    raise UserError(f"{path}: not the tokenizer of the encoding {encoding.name} ({why}); use a "
                    f"model that has it or, if this {what} is wrong, a copy without it")


def read_tokenizer_file(path: Path, encoding: tiktoken.Encoding) -> TokenizerFile:
    if path.name in OTHER_KINDS:
        return TokenizerFile(other="it is of another kind")
    try:
        if path.name in MERGES:
            lines = path.read_text("utf-8").splitlines()
            merges = ["".join(line.split()) for line in lines if not line.startswith("#version")]
            return TokenizerFile(merges=[*filter(None, merges)])
        file = parse(path.name, dict(json.loads(path.read_bytes())), encoding)
        if not all(type(i) is int for i in file.ids.values()):
            raise ValueError("an id is not an integer")
        return file
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        refuse(path, f"it cannot be read: {error}", encoding)


def parse(name: str, found: dict, encoding: tiktoken.Encoding) -> TokenizerFile:
    """found: the content of a JSON file."""
    if name == "tokenizer.json":
        model = found["model"]
        if model.get("type", "BPE") != "BPE":
            return TokenizerFile(other=f"it is a {model['type']} tokenizer")
        added = [(token["content"], token["id"]) for token in found.get("added_tokens") or ()]
        merges = ["".join(pair).replace(" ", "") for pair in model["merges"]]
        steps = {"pretokenizers": [found.get("normalizer"), found.get("pre_tokenizer")]}
        other = other_step(steps, encoding)
        return TokenizerFile(model["vocab"] | spelled(added), merges,
                             other=other and f"text goes through {other}")
    if name in SETTINGS:
        roles = [found.get(f"{role}_token") for role in ROLES]
        roles = [role["content"] if isinstance(role, dict) else role for role in roles]
        added = found.get("added_tokens_decoder") or {}
        added = [(token["content"], int(i)) for i, token in added.items()]
        name = str(found.get("tokenizer_class") or "")
        return TokenizerFile(spelled(added), roles=frozenset(spell(r.encode()) for r in roles if r),
                             tokenizer_class="" if CLASSES.match(name) else name)
    return TokenizerFile(spelled(found.items()) if name == "added_tokens.json" else found)


def spelled(added: Iterable[tuple[str, int]]) -> dict[str, int]:
    return {spell(token.encode()): i for token, i in added}


def other_step(step: dict | None, encoding: tiktoken.Encoding) -> str:
    """The type of the first step of a tokenizer.json that is not one of the encoding's."""
    parts = (step or {}).get("pretokenizers", (step or {}).get("normalizers"))
    if parts is not None:
        return next(filter(None, (other_step(part, encoding) for part in parts)), "")
    same = ({"Regex": GPT2_SPLIT}, {"Regex": encoding._pat_str})
    is_same = not step or step["type"] == "ByteLevel" or step.get("pattern") in same
    return "" if is_same else step["type"]
