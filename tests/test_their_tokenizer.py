"""A model's ids mean what the tokenizer beside it says: the same as in the encoding, or the model
is refused in one line."""

import copy
import json
import shutil

import pytest
import tiktoken
import torch
from conftest import GPT2_PATTERN
from helpers_training import fine_tune, tiny_model

import chat
import evaluate
import fineweb
import sft_data
import train_gpt2
import train_sft
from answer import load_assistant, save_model
from model import GPT
from nanosft.errors import UserError, one_line
from nanosft.hf_tokenizer import GPT2_SPLIT, tokenizer_json
from nanosft.weights import newest_checkpoint, pad_vocab
from tokenizer import ENCODINGS, SPECIALS, TEMPLATES, get_encoding
from tools import export
from train_gpt2 import load_checkpoint

# 256 bytes, "th" 256, "the" 257, then <|endoftext|> 258 and, for chats, <|system|> 259 to <|end|>
RANKS = {token: i for i, token in enumerate([*(bytes([i]) for i in range(256)), b"th", b"the"])}
ENCODING = tiktoken.Encoding("tiny", pat_str=GPT2_PATTERN, mergeable_ranks=RANKS,
                             special_tokens={text: 258 + i for i, text in enumerate(SPECIALS)})
OWN = json.loads(tokenizer_json(ENCODING, 259))  # as beside GPT-2 on the hub: without chat tokens
VOCAB = OWN["model"]["vocab"] | {"<|endoftext|>": 258}
MERGES = "#version: 0.2\nt h\nth e\n"


@pytest.fixture
def model_with(tmp_path):
    """model_with(files, n_vocab, **config) writes a model and files beside it: {name: content}."""

    def write(files: dict, n_vocab: int = 259, **config) -> str:
        folder = tmp_path / "model"
        tiny_model(n_vocab=n_vocab, vocab_size=320).save_pretrained(folder, **config)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
        return str(folder)

    return write


def changed(**changes) -> dict:
    """{"tokenizer.json": ENCODING's, with some of its keys, or of its model's, changed}."""
    found = copy.deepcopy(OWN)
    for key, value in changes.items():
        (found["model"] if key in found["model"] else found)[key] = value
    return {"tokenizer.json": found}


def added(*tokens: str, first: int = 259) -> list[dict]:
    """`added_tokens` of tokenizer.json."""
    return OWN["added_tokens"] + [{"id": first + i, "content": token, "special": True}
                                  for i, token in enumerate(tokens)]


def decoder(*tokens: str, **more) -> dict:
    """tokenizer_config.json with added tokens."""
    entries = {str(token["id"]): {"content": token["content"]} for token in added(*tokens)}
    return {"added_tokens_decoder": entries, **more}


# ----- what loads --------------------------------------------------------------------------------

LEVEL = OWN["pre_tokenizer"]
SAME = {
    "no tokenizer": {},
    "tokenizer.json": {"tokenizer.json": OWN},
    "merges as strings": changed(merges=["t h", "th e"]),
    "an old file that names no type": changed(type="BPE") | {"x": 0},
    "a space before the first word": changed(pre_tokenizer=LEVEL | {"add_prefix_space": True}),
    "the pattern in a step of its own": changed(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": GPT2_SPLIT}, "behavior": "Isolated"},
            LEVEL | {"use_regex": False}]}),
    "no normalizers": changed(normalizer={"type": "Sequence", "normalizers": []}),
    "vocab.json": {"vocab.json": VOCAB, "merges.txt": MERGES},
    "vocab.json alone": {"vocab.json": VOCAB},
    "OpenAI's names": {"encoder.json": VOCAB, "vocab.bpe": MERGES.replace("\n", "\r\n")},
    "another class with this vocabulary": {"tokenizer.json": OWN, "tokenizer_config.json": decoder(
        tokenizer_class="CodeGenTokenizer", eos_token={"content": "<|endoftext|>"})},
    "GPT-2's class": {"tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast"}},
    "a token without a row": changed(added_tokens=added("<|im_start|>")),
}
del SAME["an old file that names no type"]["x"]
del SAME["an old file that names no type"]["tokenizer.json"]["model"]["type"]


@pytest.mark.parametrize("case", SAME)
def test_model_with_the_encodings_own_tokenizer_loads(case, model_with):
    folder = model_with(SAME[case])
    assert GPT.from_pretrained(folder, ENCODING).config.n_vocab == 259


FREE = {
    "role in special_tokens_map.json": changed(added_tokens=added("PADDING", "[BOS]")) | {
        "special_tokens_map.json": {"pad_token": "PADDING", "bos_token": {"content": "[BOS]"}}},
    "names": changed(added_tokens=added("<|pad|>", "</s>")),
    "added_tokens.json": {"vocab.json": VOCAB, "merges.txt": MERGES,
                          "added_tokens.json": {"<PAD>": 259, "<|startoftext|>": 260}},
    "vocab.json": {"vocab.json": VOCAB | {"[PAD]": 259, "[MASK]": 260}},
    "tokenizer_config.json": {"vocab.json": VOCAB, "tokenizer_config.json": decoder(
        "$~^bos$", "$~^pad$", bos_token="$~^bos$", pad_token="$~^pad$")},
}


@pytest.mark.parametrize("case", FREE)
def test_rows_added_for_tokens_that_no_text_contains_start_at_the_mean(case, model_with, capsys):
    """Two ids more than the encoding's text has, then 55 rows that only pad the matrix."""
    folder = model_with(FREE[case], n_vocab=261)
    model, plain = GPT.from_pretrained(folder, ENCODING), GPT.from_pretrained(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{folder}: no text contains " in line and "from id 259 on start at the mean" in line
    wte, before = model.transformer.wte.weight, plain.transformer.wte.weight
    assert torch.equal(wte[:259], before[:259])
    torch.testing.assert_close(wte[259:], before[:259].mean(0).expand(61, -1))
    assert (wte[259:261] - before[259:261]).abs().max() > 0.1
    assert (model.config.n_vocab, plain.config.n_vocab) == (259, 261)


def test_chat_tokens_keep_their_rows_when_a_padding_token_follows_them(model_with, capsys):
    files = changed(added_tokens=added(*SPECIALS[1:], "[PAD]"))
    model = GPT.from_pretrained(model_with(files, n_vocab=264), ENCODING)
    assert model.config.n_vocab == 263 and "no text contains [PAD]" in capsys.readouterr().out
    want = tiny_model(n_vocab=264, vocab_size=320).transformer.wte.weight
    assert torch.equal(model.transformer.wte.weight[:263], want[:263])


# ----- what is refused ---------------------------------------------------------------------------


def swapped(vocab: dict, a: str = "a", b: str = "b") -> dict:
    return vocab | {a: vocab[b], b: vocab[a]}


WORDS = {"type": "WordLevel", "vocab": VOCAB, "unk_token": "!"}
OTHER = {  # case: (files, the file to blame, the reason)
    "two ids": (changed(vocab=swapped(OWN["model"]["vocab"])), "tokenizer.json",
                "id 98 is 'a', not 'b'"),
    "ids of vocab.json": ({"vocab.json": swapped(VOCAB), "merges.txt": MERGES}, "vocab.json",
                          "id 98 is 'a', not 'b'"),
    "one of two files": ({"tokenizer.json": OWN, "vocab.json": swapped(VOCAB)}, "vocab.json",
                         "id 98 is 'a', not 'b'"),
    "OpenAI's names": ({"encoder.json": swapped(VOCAB)}, "encoder.json", "id 98 is 'a', not 'b'"),
    "a word": ({"vocab.json": {k: i for k, i in VOCAB.items() if k != "the"} | {"der": 257}},
               "vocab.json", "id 257 is 'der', not 'the'"),
    "fewer tokens": ({"vocab.json": {k: i for k, i in VOCAB.items() if k != "the"}}, "vocab.json",
                     "it has no 'the'"),
    "end of text": ({"vocab.json": swapped(VOCAB, "<|endoftext|>", "!")}, "vocab.json",
                    "id 258 is '!', not '<|endoftext|>'"),
    "another end": (changed(added_tokens=[{"id": 258, "content": "</s>"}]), "tokenizer.json",
                    "id 258 is '</s>', not '<|endoftext|>'"),
    "a special in the words": (changed(added_tokens=[{"id": 0, "content": "[PAD]"}]),
                               "tokenizer.json", "id 0 is '[PAD]', not 'Ā'"),
    "order of merges": (changed(merges=[["th", "e"], ["t", "h"]]), "tokenizer.json", "it merges"),
    "merges.txt": ({"vocab.json": VOCAB, "merges.txt": "#version: 0.2\nt h\nh e\n"}, "merges.txt",
                   "it merges other pairs"),
    "no merges": ({"merges.txt": "#version: 0.2\n"}, "merges.txt", "it merges other pairs"),
    "kind": ({"tokenizer.json": OWN | {"model": WORDS}}, "tokenizer.json",
             "it is a WordLevel tokenizer"),
    "sentencepiece": ({"spiece.model": "\n\x0b\n"}, "spiece.model", "it is of another kind"),
    "WordPiece": ({"vocab.txt": "[PAD]\n[UNK]\n"}, "vocab.txt", "it is of another kind"),
    "lower case": (changed(normalizer={"type": "Lowercase"}), "tokenizer.json",
                   "text goes through Lowercase"),
    "digits": (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, LEVEL]}), "tokenizer.json",
        "text goes through Digits"),
    "pattern": (changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "."}}),
                "tokenizer.json", "text goes through Split"),
    "class": ({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
              "tokenizer_config.json", "tokenizer_class is T5Tokenizer"),
    "chat tokens": (changed(added_tokens=added("<|im_start|>", "<|im_end|>")), "tokenizer.json",
                    "id 259 is '<|im_start|>', not '<|system|>'"),
    "a chat token after padding": (changed(added_tokens=added("[PAD]", "<|user|>")),
                                   "tokenizer.json", "id 259 is '[PAD]', not '<|system|>'"),
    "extra chat tokens": ({"added_tokens.json": {"<pad>": 259, "<sep1>": 260}},
                          "added_tokens.json", "id 260 is '<sep1>', not '<|user|>'"),
    "a word without brackets": ({"tokenizer_config.json": decoder("pad")}, "tokenizer_config.json",
                                "id 259 is 'pad', not '<|system|>'"),
    "a word beyond the chat tokens": (changed(added_tokens=added("<think>", first=263)),
                                      "tokenizer.json", "it adds '<think>'"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_tokenizer_is_refused_by_its_file_and_a_copy_without_it_loads(
        case, model_with, tmp_path):
    files, name, why = OTHER[case]
    folder = model_with(files, n_vocab=270)
    with pytest.raises(UserError) as error:
        GPT.from_pretrained(folder, ENCODING)
    line, what = str(error.value), "key" if case == "class" else "file"
    assert line.startswith(f"{folder}/{name}: not the tokenizer of the encoding tiny ({why}")
    assert line.endswith(f"use a model that has it or, if this {what} is wrong, a copy without it")
    assert one_line(line) == line
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(name))
    GPT.from_pretrained(str(tmp_path / "copy"), ENCODING)


def test_key_of_config_json_that_names_another_class_is_refused(model_with):
    folder = model_with({}, tokenizer_class="BertTokenizer")
    with pytest.raises(UserError, match=r"config\.json: not .* is BertTokenizer.* if this key is"):
        GPT.from_pretrained(folder, ENCODING)


@pytest.mark.parametrize("content", [
    "", "{half a fi", "[1]", "\ud800".encode("utf-16", "surrogatepass").decode("latin-1"),
    {}, {"model": {"vocab": []}}, {"model": {"vocab": {"a": "b"}, "merges": []}},
    OWN | {"added_tokens": [{"id": None, "content": None}]}, OWN | {"pre_tokenizer": {"type": 3}},
    OWN | {"model": OWN["model"] | {"merges": [1]}},
    OWN | {"model": OWN["model"] | {"vocab": None}},
])
def test_damaged_tokenizer_is_refused_in_one_line(content, model_with):
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer of the encoding tiny"):
        GPT.from_pretrained(model_with({"tokenizer.json": content}), ENCODING)


# ----- in every command --------------------------------------------------------------------------

TRAIN = ["--block_size", 16, "--batch_size", 1, "--rows_per_step", 1, "--max_steps", 1,
         "--device", "cpu"]
PAIRS = [{"prompt": "hi", "response": "yo"}] * 3


@pytest.fixture
def commands(gpt2, tmp_path, monkeypatch, jsonl, command):
    """(every command that loads `model`, its flags); `model` has GPT-2's ids and tokenizer."""
    monkeypatch.chdir(tmp_path)
    sizes = {"n_layer": 1, "n_embd": 8, "vocab_size": pad_vocab(50257), "n_vocab": 50257}
    tiny_model(**sizes).save_pretrained("model")
    tokenizer = tokenizer_json(get_encoding("gpt2"), 50257)
    (tmp_path / "model/tokenizer.json").write_text(tokenizer, encoding="utf-8")
    pairs, text = jsonl("pairs.jsonl", PAIRS), jsonl("text.jsonl", [{"text": "hi " * 99}])
    for module, flags in ((sft_data, ["--source", pairs, "--val_fraction", 0]),
                          (fineweb, ["--source", text, "--val_tokens", 0])):
        made = command(module, *flags, "--workers", 1, "--out", module.__name__)
        assert made.code == 0, made.err
    return [(chat, ["--model", "model", "--prompt", "hi", "--device", "cpu"]),
            (evaluate, ["--model", "model", "--data", pairs, "--device", "cpu"]),
            (export, ["--model", "model", "--out", "copy"]),
            (sft_data, ["--show", 1, "--data", "sft_data", "--model", "model", "--block_size", 16]),
            (train_sft, ["--init", "model", "--data", "sft_data", "--out", "out", *TRAIN]),
            (train_gpt2, ["--init", "model", "--data", "fineweb", "--out", "out2", *TRAIN])]


def test_every_command_takes_gpt2s_tokenizer_and_refuses_the_same_tokens_under_other_ids(
        commands, command, tmp_path):
    for module, flags in commands:
        assert command(module, *flags).code == 0
    for folder in ("copy", "out", "out2"):
        shutil.rmtree(folder)
    path = tmp_path / "model/tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    vocab = found["model"]["vocab"]
    found["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values())))
    path.write_text(json.dumps(found))
    files = {*tmp_path.rglob("*")}
    for module, flags in commands:
        result = command(module, *flags)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert result.err.startswith("error: model/tokenizer.json: not the tokenizer of the ")
    assert {*tmp_path.rglob("*")} == files


def test_fine_tuning_a_model_with_a_padding_token_says_so_and_saves_the_chat_tokens(
        sft_shards, command, tmp_path):
    """`bytes` has 256 ids of text and <|endoftext|>; the 258th row of this model is [PAD]'s."""
    tiny_model(n_vocab=258).save_pretrained(tmp_path / "model")
    (tmp_path / "model/added_tokens.json").write_text('{"[PAD]": 257}')
    flags = ["--data", sft_shards(PAIRS), "--init", tmp_path / "model", "--out", tmp_path / "out"]
    result = command(train_sft, *flags, *TRAIN)
    assert result.code == 0 and "no text contains [PAD]; embeddings from id 257 " in result.out
    saved = newest_checkpoint(tmp_path / "out")
    assert load_assistant(str(saved)).model.config.n_vocab == 261
    assert "[PAD]" not in (saved / "tokenizer.json").read_text()


def test_data_of_another_encoding_than_the_models_names_the_encoding_to_use(
        gpt2, sft_shards, command, tmp_path):
    save_model(tmp_path / "model", tiny_model(), "bytes", "chat")
    flags = ["--init", tmp_path / "model", "--out", tmp_path / "out", *TRAIN]
    result = command(train_sft, "--data", sft_shards(PAIRS, "--encoding", "gpt2"), *flags)
    assert result.code == 2
    assert result.err.endswith("/config.json: the model's encoding is bytes, not gpt2; make the "
                               "data with --encoding bytes\n")
    data = sft_shards(PAIRS, "--encoding", "bytes", name="again")
    assert command(train_sft, "--data", data, *flags).code == 0


# ----- nanosft's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, *TEMPLATES])
@pytest.mark.parametrize("name", ENCODINGS)
def test_own_model_loads_also_exported_and_saved_again_by_transformers(
        name, template, gpt2, command, tmp_path):
    import transformers

    n_vocab = get_encoding(name).n_vocab
    model = tiny_model(n_vocab=n_vocab, vocab_size=pad_vocab(n_vocab), n_layer=1, n_embd=8)
    save_model(tmp_path / "own", model, name, template)
    result = command(export, "--model", tmp_path / "own", "--out", tmp_path / "exported")
    assert result.code == 0, result.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for saved in (tokenizer, theirs):
        saved.save_pretrained(tmp_path / "theirs")
    for folder in ("own", "exported", "theirs"):
        model, encoding, found = load_assistant(str(tmp_path / folder))
        assert (model.config.n_vocab, encoding.name, found) == (n_vocab, name, template)


def test_another_tokenizer_put_into_a_checkpoint_is_refused(sft_shards, tmp_path):
    fine_tune(sft_shards(PAIRS), tmp_path / "out", max_steps=1)
    folder = newest_checkpoint(tmp_path / "out")
    (folder / "tokenizer.json").write_text(json.dumps(OWN))
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer of the .* bytes"):
        load_assistant(str(folder))
    load_checkpoint(str(tmp_path / "out"))  # --resume goes by the sums, not by the tokenizer
