"""The model: Hugging Face's numbers, examples that do not see each other, a loss without logits."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers_training import gradients, plain_loss_sum, sft_folder, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import GPT, GPTConfig, Looped, Masked, SummedCrossEntropy, isolate
from sft_data import SFTDataset, iterate_batches

# ----- Hugging Face's weights in and out ---------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """{vocabulary: (folder, model)} of two of Hugging Face's GPT-2s with random weights."""
    import transformers

    found = {}
    for vocab in (100, 128):
        torch.manual_seed(vocab)
        config = transformers.GPT2Config(
            vocab_size=vocab, n_positions=24, n_embd=32, n_layer=2, n_head=4
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        folder = tmp_path_factory.mktemp(f"hugging_face_{vocab}")
        model.save_pretrained(folder)
        found[vocab] = folder, model
    return found


IDX = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab", [100, 128])
def test_our_logits_equal_hugging_faces_in_both_directions(theirs, vocab, tmp_path):
    import transformers

    folder, their_model = theirs[vocab]
    want = their_model(IDX).logits
    assert want.std() > 0.5  # so that 1e-4 says something

    ours = GPT.from_pretrained(folder)
    torch.testing.assert_close(ours(IDX)[..., :vocab], want, atol=1e-4, rtol=0)

    ours.save_pretrained(tmp_path, encoding="bytes")
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(IDX).logits, ours(IDX), atol=1e-4, rtol=0)
    assert back.config.attn_pdrop == back.config.resid_pdrop == back.config.embd_pdrop == 0


def test_rows_beyond_the_loaded_vocabulary_start_at_the_mean_embedding(theirs):
    folder, their_model = theirs[100]
    ours = GPT.from_pretrained(folder)
    wte = their_model.transformer.wte.weight
    assert ours.transformer.wte.weight.shape == (128, 32)  # 100 -> the next multiple of 64
    assert torch.equal(ours.transformer.wte.weight[:100], wte)
    torch.testing.assert_close(ours.lm_head.weight[100:], wte.mean(0).expand(28, -1))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert ours.config.n_vocab == 100


def test_weights_without_the_transformer_prefix_load_like_the_first_ones_on_the_hub(
    theirs, tmp_path
):
    folder, _ = theirs[128]
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    assert "wte.weight" in bare
    bare["h.0.attn.bias"] = torch.ones(24, 24).tril()[None, None]  # their masks came along, too
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX), GPT.from_pretrained(folder)(IDX))


def test_weights_in_several_files_load_as_from_one(theirs, tmp_path):
    folder, their_model = theirs[100]
    their_model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(GPT.from_pretrained(tmp_path)(IDX), GPT.from_pretrained(folder)(IDX))


@pytest.mark.parametrize("name, hub_id", [("gpt2", "openai-community/gpt2"), ("me/my", "me/my")])
def test_a_hub_name_goes_through_snapshot_download(theirs, monkeypatch, tmp_path, name, hub_id):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(theirs[128][0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(GPT.from_pretrained(name)(IDX), GPT.from_pretrained(theirs[128][0])(IDX))
    assert asked == [(hub_id, ["config.json", "model*.safetensors"])]


def test_a_hub_that_has_no_such_model_is_one_line(monkeypatch, tmp_path):
    def download(repo, allow_patterns):
        raise OSError("404 Client Error.\nRepository not found\nfor url")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a folder here nor a model of the hub") as error:
        GPT.from_pretrained("gpt7")
    assert "\n" not in str(error.value)


def edited(key, value):
    return lambda config: config | {key: value}


@pytest.mark.parametrize(
    "edit, message",
    [
        (edited("model_type", "llama"), "model_type is 'llama', GPT-2 has 'gpt2'"),
        (edited("activation_function", "relu"), "activation_function is 'relu'"),
        (edited("layer_norm_epsilon", 1e-6), "layer_norm_epsilon is 1e-06"),
        (edited("scale_attn_by_inverse_layer_idx", True), "scale_attn_by_inverse_layer_idx"),
        (edited("n_inner", 64), "n_inner is 64"),
        (edited("tie_word_embeddings", False), "tie_word_embeddings is False"),
        (edited("n_head", 5), "n_embd 32 must be a multiple of n_head 5"),
        (edited("n_positions", 48), r"wpe.weight is \(24, 32\), config.json says \(48, 32\)"),
        (edited("vocab_size", 60), r"wte.weight is \(100, 32\), config.json says \(64, 32\)"),
        (edited("n_layer", 3), "the weights lack h.2.ln_1.weight; is this a GPT-2"),
        (lambda c: {k: v for k, v in c.items() if k != "n_embd"}, "no 'n_embd'; is this a GPT-2"),
        (lambda c: [c], "config.json: no JSON object"),
        (lambda c: "{half a fi", "config.json: no JSON object"),
    ],
)
def test_a_folder_that_is_no_gpt2_is_refused_in_one_line(theirs, tmp_path, edit, message):
    folder, _ = theirs[100]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = edit(json.loads((folder / "config.json").read_text()))
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_weights_are_refused_in_one_line(theirs, tmp_path):
    folder, _ = theirs[100]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"no \*.safetensors file; save the model as safetensors"):
        GPT.from_pretrained(tmp_path)
    half = (folder / "model.safetensors").read_bytes()[:5000]
    (tmp_path / "model.safetensors").write_bytes(half)
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no model there"):
        GPT.from_pretrained(str(tmp_path / "nowhere"))


def test_a_saved_model_comes_back_bit_for_bit_with_its_ids_in_use(tmp_path):
    model = tiny_model()
    assert model.config.n_vocab == 261  # of 320: 256 bytes and 5 specials
    model.save_pretrained(tmp_path, encoding="bytes", template="chat")
    back = GPT.from_pretrained(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters()))
    assert all(p.requires_grad for p in back.parameters())
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["encoding"], settings["template"]) == ("bytes", "chat")


def test_a_new_models_loss_is_near_that_of_guessing_among_all_ids():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=320, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(0, 261, (2, 4, 32))
    assert abs(model(x, y).item() / y.numel() - torch.tensor(320.0).log().item()) < 0.05


# ----- isolation: examples that share a row do not see each other --------------------------------

PATHS = {"looped": (0, Looped), "masked": (10**9, Masked)}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each of the two ways to attend within an example, forced."""
    loop_from, kind = PATHS[request.param]
    monkeypatch.setattr(model_file, "LOOP_FROM", loop_from)
    assert isinstance(isolate(torch.zeros(1, 4, dtype=torch.long))[1], kind)


# Three rows of 10; a repeated digit is one example, -1 is padding.
SEGMENTS = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 1, -1, -1, -1],
        [0, 1, 1, 1, 1, 1, 1, 1, -1, -1],
    ]
)
ROWS = torch.randint(0, 261, (3, 10), generator=torch.Generator().manual_seed(3))


def test_positions_start_at_0_in_each_example():
    positions, _ = isolate(SEGMENTS)
    assert positions.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 0, 1, 2],
        [0, 1, 2, 3, 4, 5, 0, 0, 1, 2],
        [0, 0, 1, 2, 3, 4, 5, 6, 0, 1],
    ]


def test_a_packed_examples_logits_are_those_of_the_example_alone(path):
    model = tiny_model()
    packed = model(ROWS, segments=SEGMENTS)
    for row in range(3):
        for number in SEGMENTS[row].unique():
            if number >= 0:
                at = SEGMENTS[row] == number
                alone = model(ROWS[row][None, at])[0]
                torch.testing.assert_close(packed[row, at], alone, atol=1e-5, rtol=0)


def test_without_segments_examples_do_see_each_other():
    model = tiny_model()
    packed, joined = model(ROWS, segments=SEGMENTS), model(ROWS)
    assert (packed[0, 3:] - joined[0, 3:]).abs().max() > 0.1
    torch.testing.assert_close(packed[0, :3], joined[0, :3], atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_changes_no_other_logit(path):
    model, other = tiny_model(), ROWS.clone()
    other[SEGMENTS < 0] = 7
    assert not torch.equal(other, ROWS)
    real = SEGMENTS >= 0
    a, b = model(ROWS, segments=SEGMENTS), model(other, segments=SEGMENTS)
    assert torch.equal(a[real], b[real])
    assert torch.isfinite(a).all()  # a padding token sees itself, so no softmax over nothing


def check_causality(model, segments):
    before = model(ROWS, segments=segments)
    for at in range(10):
        changed = ROWS.clone()
        changed[:, at] = (changed[:, at] + 1) % 261
        after = model(changed, segments=segments)
        torch.testing.assert_close(after[:, :at], before[:, :at], atol=1e-5, rtol=0)
        assert ((after[:, at] - before[:, at]).abs().amax(1) > 0.1).all()


def test_a_later_token_changes_no_earlier_logit():
    check_causality(tiny_model(), None)


def test_a_later_token_changes_no_earlier_logit_within_segments(path):
    check_causality(tiny_model(), SEGMENTS)


# 100 ids. Rows of 40 cut none of these even in `stream`: examples begin at 0, 12, 40, 65 and 80.
LENGTHS = (12, 28, 25, 15, 20)
LAYOUTS = {"pad": 40, "fit": 40, "stream": 40, "bucket": 30}  # T may differ, too


def loss_and_gradients(model, dataset, segments_of):
    """Of one pass over all rows of an epoch, two rows at once."""
    model.zero_grad()
    loss_sum = 0.0
    for batch in iterate_batches(dataset, 2, shuffle=False):
        x, y, weights, segments = batch.values()
        loss = model(x, y, weights, segments_of(segments))
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, gradients(model)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_layouts_that_cut_no_example_give_the_same_loss_and_gradients(path, tmp_path, loss_on):
    random = np.random.default_rng(0)
    examples = [
        ([*random.integers(0, 256, n - 1).tolist(), 256], ([0, 0, 0] + [7, 50, 100] * n)[:n])
        for n in LENGTHS
    ]
    data, model = sft_folder(tmp_path / "data", train=examples), tiny_model(block_size=40)

    def measure(layout, T, segments_of=lambda segments: segments):
        dataset = SFTDataset(data, "train", T, layout, seed=None, loss_on=loss_on, rows_per_step=2)
        n_trained = sum(int((row["labels"] != -100).sum()) for row in dataset)
        assert n_trained == sum(n - (1 if loss_on == "all" else 3) for n in LENGTHS)
        return loss_and_gradients(model, dataset, segments_of)

    want_loss, want = measure("pad", 40)
    assert want_loss > 100
    for layout, T in LAYOUTS.items():
        loss, grads = measure(layout, T)
        assert loss == pytest.approx(want_loss, rel=1e-6)
        for a, b in zip(grads, want):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    # padding is on the right: where a row holds one example, a causal mask is isolation enough
    loss, _ = measure("pad", 40, lambda segments: None)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    # and this is not a comparison that anything would pass
    loss, _ = measure("fit", 40, lambda segments: None)
    assert abs(loss - want_loss) > 0.1


# ----- the loss: no full logits ------------------------------------------------------------------


def a_batch(counting: str):
    """(x, y, weights, segments), 4 rows of 16, as a layout or a micro-batch may make them."""
    random = torch.Generator().manual_seed(5)
    x, y = torch.randint(0, 261, (2, 4, 16), generator=random)
    weights = torch.randint(1, 101, (4, 16), generator=random) / 100
    segments = (torch.arange(16) // 6).expand(4, 16).clone()
    if counting == "every target, as in pretraining":
        return x, y, None, None
    if counting == "one target":
        y[torch.arange(64).view(4, 16) != 37] = -100
    if counting == "some, weighted by a fraction":
        y[:, ::3], y[2] = -100, -100
    if counting == "some, padded":
        y[:, 11:], segments[:, 11:], y[:, 0] = -100, -1, -100
    if counting == "none":
        y[:] = -100
    return x, y, weights, segments


COUNTING = ("every target, as in pretraining", "some, weighted by a fraction", "some, padded",
            "one target", "none")  # fmt: skip


@pytest.mark.parametrize("chunk_bytes", [1, 7 * 4 * 320, 16 << 20])  # 1 row, 7 rows, all rows
@pytest.mark.parametrize("counting", COUNTING)
def test_the_chunked_loss_and_its_gradients_are_those_of_full_logits(
    monkeypatch, counting, chunk_bytes
):
    monkeypatch.setitem(model_file.CHUNK_BYTES, "cpu", chunk_bytes)
    model, batch = tiny_model(), a_batch(counting)
    want_loss = plain_loss_sum(model, *batch)
    (want_loss / 10).backward()
    want = gradients(model)
    model.zero_grad()
    loss = model(*batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    (loss / 10).backward()
    torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=1e-6)
    for a, b in zip(gradients(model), want):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        assert counting != "none" or (not a.any() and a.shape == b.shape)


def test_a_hand_worked_loss():
    """Two ids, so nll is ln(1 + e^-d) for a lead of d; weights 1 and 1/2, the third is ignored."""
    hidden, head = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [1.0]])
    targets, weights = torch.tensor([0, 1]), torch.tensor([1.0, 0.5])
    loss = SummedCrossEntropy.apply(hidden, head, targets, weights, False)
    # logits (3, 1) and (6, 2): the first target leads by 2, the second trails by 4
    want = math.log(1 + math.exp(-2)) + 0.5 * math.log(1 + math.exp(4))
    assert loss.item() == pytest.approx(want, rel=1e-6)


def test_the_loss_never_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setitem(model_file.CHUNK_BYTES, "cpu", 4 * 4 * 320)  # 4 rows of logits
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (320,):
                sizes.append(out.numel())
            return out

    model = tiny_model(n_embd=2, n_head=1)  # the head itself is only (320, 2)
    batch = a_batch("every target, as in pretraining")
    with Watch():
        model(*batch).backward()
    assert max(sizes) == 4 * 320  # of the 64 rows
    sizes.clear()
    with Watch():
        plain_loss_sum(model, *batch)
    assert max(sizes) == 64 * 320  # the watch does see full logits


def test_without_gradients_the_loss_is_the_same_and_keeps_nothing():
    model, batch = tiny_model(), a_batch("some, weighted by a fraction")
    with torch.no_grad():
        loss = model(*batch)
    assert not loss.requires_grad
    assert torch.equal(loss, model(*batch).detach())
    args = torch.randn(5, 8), torch.randn(320, 8), torch.arange(5), torch.ones(5)
    asked, unasked = SimpleNamespace(), SimpleNamespace()
    SummedCrossEntropy.forward(asked, *args, True)
    SummedCrossEntropy.forward(unasked, *args, False)
    assert hasattr(asked, "grads") and not hasattr(unasked, "grads")


def test_a_second_backward_raises_instead_of_scaling_twice():
    loss = tiny_model()(*a_batch("one target"))
    loss.backward(retain_graph=True)
    with pytest.raises((RuntimeError, TypeError)):
        loss.backward()


def test_the_chunked_loss_in_bfloat16_is_close_to_full_logits_in_float32(monkeypatch):
    monkeypatch.setitem(model_file.CHUNK_BYTES, "cpu", 7 * 4 * 320)
    model, batch = tiny_model(spread=0.05), a_batch("some, weighted by a fraction")
    want_loss = plain_loss_sum(model, *batch)
    want_loss.backward()
    want = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-2)
    for a, b in zip(gradients(model), want):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_the_target_of_an_ignored_place_and_its_weight_change_nothing():
    model, (x, y, weights, segments) = tiny_model(), a_batch("some, padded")
    loud = weights.masked_fill(y == -100, 1e6)
    assert torch.equal(model(x, y, loud, segments), model(x, y, weights, segments))


def test_a_row_longer_than_the_block_size_is_refused():
    with pytest.raises(ValueError, match=r"33 tokens is longer than .* block size 32"):
        tiny_model()(torch.zeros(1, 33, dtype=torch.long))
