"""Hugging Face's GPT-2 format in and out: the same logits both ways, and what is refused."""

import json

import pytest
import torch
from helpers_training import tiny_model
from safetensors.torch import load_file, save_file

from model import GPT
from nanosft.errors import UserError

IDX = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """{vocabulary size: (folder, model)}: two of Hugging Face's GPT-2s with random weights."""
    import transformers

    models = {}
    for n_vocab in (100, 128):
        torch.manual_seed(n_vocab)
        sizes = {"vocab_size": n_vocab, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        folder = tmp_path_factory.mktemp(f"hugging_face_{n_vocab}")
        model.save_pretrained(folder)
        models[n_vocab] = folder, model
    return models


# ----- the same model ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_vocab", [100, 128])  # padded to 128, and a multiple of 64 already
def test_logits_equal_those_of_hugging_face_in_both_directions(hugging_face, n_vocab, tmp_path):
    import transformers

    folder, theirs = hugging_face[n_vocab]
    want = theirs(IDX).logits
    assert want.std() > 0.5  # so that a tolerance of 1e-4 says something

    ours = GPT.from_pretrained(folder)
    torch.testing.assert_close(ours(IDX)[..., :n_vocab], want, atol=1e-4, rtol=0)

    ours.save_pretrained(tmp_path, encoding="bytes")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(IDX).logits[..., :n_vocab], want, atol=1e-4, rtol=0)
    assert back.config.attn_pdrop == back.config.resid_pdrop == back.config.embd_pdrop == 0


def test_rows_beyond_the_loaded_vocabulary_start_at_the_mean_embedding(hugging_face):
    folder, theirs = hugging_face[100]
    ours, wte = GPT.from_pretrained(folder), theirs.transformer.wte.weight
    assert ours.transformer.wte.weight.shape == (128, 32)  # 100 -> the next multiple of 64
    assert torch.equal(ours.transformer.wte.weight[:100], wte)
    torch.testing.assert_close(ours.lm_head.weight[100:], wte.mean(0).expand(28, -1))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert ours.config.n_vocab == 100


def test_saved_model_loads_bitwise_equal_with_its_settings(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, encoding="bytes", template="chat")
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    for a, b in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(a[:261], b[:261])  # the ids in use; no other matrix has 261 rows
        assert a.requires_grad
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["encoding"], settings["template"]) == ("bytes", "chat")


# ----- what else is on the hub -------------------------------------------------------------------


def test_weights_without_the_transformer_prefix_load_the_same(hugging_face, tmp_path):
    """The first GPT-2s on the hub are saved so, together with their attention masks."""
    folder, _ = hugging_face[128]
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in bare
    bare["h.0.attn.bias"] = torch.ones(24, 24).tril()[None, None]
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX), GPT.from_pretrained(folder)(IDX))


def test_weights_in_several_files_load_as_from_one(hugging_face, tmp_path):
    folder, theirs = hugging_face[100]
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX), GPT.from_pretrained(folder)(IDX))


def test_weights_are_named_as_in_gpt2_on_the_hub(tmp_path):
    """Without `transformer.`; and a saved model is opened by those who look for `n_ctx`."""
    tiny_model().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"wte.weight", "wpe.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"} <= names
    assert not any("transformer" in name or "lm_head" in name for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 32


@pytest.mark.parametrize("change", ["bfloat16", "several files", "more ids", "fewer ids"])
def test_model_changed_and_saved_by_transformers_loads_again(change, tmp_path):
    """Its 261 ids become 300 or 258: both round up to 320, so it fits the same data."""
    import transformers

    ours = tiny_model()
    ours.save_pretrained(tmp_path / "ours", encoding="bytes", template="chat")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    n_vocab = {"more ids": 300, "fewer ids": 258}.get(change, 261)
    theirs.resize_token_embeddings(n_vocab, mean_resizing=False)
    if change == "bfloat16":
        theirs.bfloat16()
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias += 1
    files = {"max_shard_size": "40KB"} if change == "several files" else {}
    theirs.save_pretrained(tmp_path / "theirs", **files)
    n_files = len(list((tmp_path / "theirs").glob("*.safetensors")))
    assert n_files > 1 if change == "several files" else n_files == 1

    back = GPT.from_pretrained(tmp_path / "theirs")
    assert (back.config.n_vocab, back.config.vocab_size) == (n_vocab, 320)
    assert all(p.dtype == torch.float32 for p in back.parameters())
    want = theirs.float()(IDX).logits  # (3, 24, n_vocab)
    torch.testing.assert_close(back(IDX)[..., :n_vocab], want, atol=1e-4, rtol=0)
    assert (back(IDX) - ours(IDX))[..., :258].abs().max() > 0.1  # the change has arrived
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (settings["encoding"], settings["template"]) == ("bytes", "chat")


@pytest.mark.parametrize("name, hub_id", [("gpt2", "openai-community/gpt2"), ("me/my", "me/my")])
def test_hub_name_is_downloaded(hugging_face, monkeypatch, tmp_path, name, hub_id):
    folder, asked = hugging_face[128][0], []

    def download(repo, allow_patterns, local_files_only):
        asked.append((repo, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained(name)(IDX), GPT.from_pretrained(folder)(IDX))
    (repo, files), = asked
    assert repo == hub_id and {"config.json", "model*.safetensors"} < {*files}
    assert {"tokenizer.json", "vocab.json", "merges.txt", "spiece.model"} < {*files}


# ----- what is refused, in one line --------------------------------------------------------------


def assert_refused(name, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GPT.from_pretrained(str(name))
    assert "\n" not in str(error.value)


def test_name_that_is_not_on_the_hub_is_refused(monkeypatch, tmp_path):
    def download(repo, allow_patterns, local_files_only):
        raise OSError("404 Client Error.\nRepository not found\nfor url")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert_refused("gpt7", r"gpt7: neither a local folder nor a model on the hub \(404 Client")


def edited(key, value):
    return lambda config: json.dumps(config | {key: value})


@pytest.mark.parametrize("edit, message", [
    (edited("model_type", "llama"), "model_type is 'llama', but nanosft only supports .* 'gpt2'"),
    (edited("model_type", "gpt_neo"), "model_type is 'gpt_neo'"),
    (edited("activation_function", "relu"), "activation_function is 'relu'"),
    (edited("activation_function", "gelu"), "activation_function is 'gelu', .* 'gelu_new'"),
    (edited("scale_attn_weights", False), "scale_attn_weights is False, .* supports GPT-2's True"),
    (edited("add_cross_attention", True), "add_cross_attention is True"),
    (edited("layer_norm_epsilon", 1e-6), "layer_norm_epsilon is 1e-06"),
    (edited("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx is True"),
    (edited("n_inner", 64), "n_inner is 64"),
    (edited("tie_word_embeddings", False), "tie_word_embeddings is False"),
    (edited("n_head", 5), "n_embd 32 is not a multiple of n_head 5"),
    (edited("n_positions", 48), r"wpe.weight has shape \(24, 32\), .*json says \(48, 32\)"),
    (edited("vocab_size", 60), r"wte.weight has shape \(100, 32\), .*json says \(64, 32\)"),
    (edited("n_layer", 3), "the weights have no h.2.ln_1.weight; is this a GPT-2"),
    (lambda config: json.dumps({"model_type": "gpt2"}), "n_layer is None, not a size; is this a"),
    (lambda config: json.dumps([config]), "config.json: not a JSON object"),
    (lambda config: "{half a fi", "config.json: not a JSON object"),
])
def test_config_that_is_not_of_a_gpt2_is_refused(hugging_face, tmp_path, edit, message):
    folder, _ = hugging_face[100]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(edit(json.loads((folder / "config.json").read_text())))
    assert_refused(tmp_path, message)


def test_missing_and_damaged_weights_are_refused(hugging_face, tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: no model found")
    folder, _ = hugging_face[100]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_refused(tmp_path, r"no \*.safetensors file; save the model as safetensors")
    half = (folder / "model.safetensors").read_bytes()[:5000]
    (tmp_path / "model.safetensors").write_bytes(half)
    assert_refused(tmp_path, "model.safetensors: not a complete safetensors file")
