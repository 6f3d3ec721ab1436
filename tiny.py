"""All of supervised fine-tuning (SFT), in one file that needs only PyTorch.

    python tiny.py [SEED]    # at most 90 seconds on two CPU cores

A small GPT reads a text that asks questions and states facts, but never answers a question. So when
you ask it something, it asks you a question. Then it is fine-tuned on chats that answer half of the
questions, and it answers the other half, too. It knew the facts all along; it learned to answer.

Read from top to bottom. tiny.ipynb is the same file as a notebook. The rest of the repository does
the same for real models and data; tests/test_tiny.py checks that the two agree.
"""

import json
import math
import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 1
PRETRAINING_STEPS, SFT_STEPS = 2000, 300
T, C, N_LAYER, N_HEAD = 48, 128, 3, 4  # tokens in a row, width, layers, heads

# %% tags=["active-py"]
if __name__ == "__main__" and sys.argv[1:]:
    if len(sys.argv) > 2 or not sys.argv[1].isdecimal() or len(sys.argv[1]) > 18:
        sys.stderr.write("error: expected nothing or a seed, as in `python tiny.py 2`\n")
        sys.exit(2)
    SEED = int(sys.argv[1])

# %% [markdown]
# ## 1. A text that asks, and a text that knows
# There are 162 facts. Worksheets ask for them (`What is 2+4?`) and notes state them (`2+4=6.`), but
# no document does both. Nothing in this text shows that a question is followed by its answer.

# %%
PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
FACTS = {f"{a}+{b}": f"{a}+{b}={a + b}." for a, b in PAIRS}
FACTS |= {f"{a}*{b}": f"{a}*{b}={a * b}." for a, b in PAIRS}


def question(key: str) -> str:
    return f"What is {key}?"


def note(rng: random.Random, key: str) -> str:
    """`2+4=6.`, or `2+4 so again, 2+4=6.`: with a headword, the model learns to copy a key."""
    if rng.random() < 0.7:
        return FACTS[key]
    words = rng.sample(["so", "yes", "now", "note", "again"], rng.choice([0, 0, 1, 2]))
    return " ".join([key, *words]) + rng.choice([": ", "! ", ", "]) + FACTS[key]


def document(rng: random.Random) -> str:
    """A worksheet (15%) or notes (85%) on two to four facts."""
    keys = rng.sample(list(FACTS), rng.randint(2, 4))
    is_worksheet = rng.random() < 0.15
    return " ".join(question(key) if is_worksheet else note(rng, key) for key in keys)


# %% [markdown]
# ## 2. Text to tokens
# A token is a byte, 0 to 255, or one of five special tokens. No text can produce those, because
# text becomes bytes: a user who types `<|end|>` gets seven bytes.

# %%
SPECIALS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(256, 261)
N_VOCAB = 261  # this file has no system messages, but their token keeps its id


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: list[int]) -> str:
    return "".join(chr(i) if i < 256 else SPECIALS[i - 256] for i in ids)  # our text is ASCII


def corpus_rows(rng: random.Random, n: int) -> Tensor:
    """Documents, one after another, cut into n rows of T + 1 tokens: (n, 1, T + 1)."""
    ids = []
    while len(ids) <= n * T:
        ids += [*encode(document(rng)), END_OF_TEXT]
    # the last token of a row is only a target there, so it is also the first of the next row
    return torch.tensor(ids[: n * T + 1]).unfold(0, T + 1, T)[:, None]


# %% [markdown]
# ## 3. A chat, and which of its tokens are learned
# `<|user|>What is 2+4?<|end|><|assistant|>2+4=6.<|end|><|endoftext|>`
#
# Each token gets a weight as the chat is rendered: 1 for the answer and the `<|end|>` after
# it (a model that never learned to stop does not stop), 0 for everything else. Several chats share
# a row, if they fit; the rest is padding with weight 0.

# %%
def render_prompt(user: str) -> list[int]:
    return [USER, *encode(user), END, ASSISTANT]


def render(user: str, assistant: str) -> list[tuple[int, int]]:
    """A chat as (id, weight) of each token."""
    prompt, answer = render_prompt(user), [*encode(assistant), END]
    return [*((i, 0) for i in prompt), *((i, 1) for i in answer), (END_OF_TEXT, 0)]


def pack(chats: list[list[tuple[int, int]]]) -> Tensor:
    """Each chat into the first row that has room for it: (rows, 2, T + 1), ids and weights."""
    rows = [[] for _ in chats]  # more than enough
    for chat in chats:
        next(row for row in rows if len(row) + len(chat) <= T + 1).extend(chat)
    padded = [row + [(END_OF_TEXT, 0)] * (T + 1 - len(row)) for row in rows if row]
    return torch.tensor(padded).mT


# %% [markdown]
# ## 4. From rows to a batch
# The model predicts each token from those before it, so the targets `y` are the inputs `x` shifted
# by one: the first token of an answer is predicted at the last token of its prompt. **Fine-tuning
# has one more row of data than pretraining, the weights.** In pretraining, every target counts, and
# documents see their neighbors.
#
# Chats in one row must not see each other, since no chat will have neighbors when it is used. All
# of them end with `<|endoftext|>`, so counting those says which chat a token belongs to.

# %%
def batch_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows (B, 1 or 2, T + 1) -> x, y, the weight of each target, and segments, each (B, T)."""
    x, y = rows[:, 0, :-1], rows[:, 0, 1:]
    if rows.size(1) == 1:
        return x, y, torch.ones_like(y), torch.zeros_like(x)
    is_end = (x == END_OF_TEXT).long()
    return x, y, rows[:, 1, 1:], is_end.cumsum(1) - is_end


# %% [markdown]
# ## 5. GPT-2, small

# %%
class Block(nn.Module):
    """Attention, where tokens read earlier ones, then an MLP on each token alone."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, n, _ = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, n, 3, N_HEAD, C // N_HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, N_HEAD, n, C / N_HEAD)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, n, C))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(N_VOCAB, C), nn.Embedding(T, C)  # of tokens, of positions
        self.h = nn.ModuleList(Block() for _ in range(N_LAYER))
        self.ln_f = nn.LayerNorm(C)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # smaller where a block adds to x: 2 * N_LAYER terms add up
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * N_LAYER) if "proj" in name else 0.02)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        """Ids (B, n) -> logits (B, n, N_VOCAB): at each token, a score for every next token."""
        same_chat = segments[:, :, None] == segments[:, None, :]  # (B, n, n)
        mask = same_chat.tril()  # a token sees its own chat, up to itself
        positions = mask.sum(2) - 1  # (B, n), from 0 in each chat
        x = self.wte(x) + self.wpe(positions)  # (B, n, C)
        for block in self.h:
            x = block(x, mask[:, None])
        return self.ln_f(x) @ self.wte.weight.T  # tied: the embedding is also the output matrix


# %% [markdown]
# ## 6. One training loop for both stages
# The loss of a step is one mean over all its targets. Its rows go through the model in
# micro-batches, as many at a time as memory allows; here five, then the rest. Those have different
# numbers of targets, so the mean of their means would be another number. The targets of the whole
# step are counted first.

# %%
def backward(model: GPT, rows: Tensor) -> float:
    """The loss of one step in nats; adds its gradient to the parameters."""
    total, loss = batch_of(rows)[2].sum(), 0.0
    for micro_batch in rows.tensor_split([5]):
        x, y, weights, segments = batch_of(micro_batch)
        logits = model(x, segments)  # (B, T, N_VOCAB); the prompt runs forward, too
        nll = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")  # (B * T,)
        part = (weights.flatten() * nll).sum() / total
        part.backward()
        loss += part.item()
    return loss


def train(model: GPT, rows: Tensor, steps: int, rows_per_step: int, peak_lr: float) -> GPT:
    """AdamW; the rows in a new order each epoch; 30 steps of warm-up, then a cosine down to 10%."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    epochs = math.ceil(steps * rows_per_step / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)]).split(rows_per_step)
    for step in range(steps):
        loss = backward(model, rows[order[step]])
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(cosine, (step + 1) / 30)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step + 1:4}  loss {loss:.3f}")
    return model


# %% [markdown]
# ## 7. Answers: the likeliest token, again and again, until the model ends its answer

# %%
@torch.no_grad()
def answers(model: GPT, prompts: list[list[int]]) -> list[str]:
    """What the model writes after each prompt, to its end token; the prompts are equally long."""
    x = torch.tensor(prompts)
    while x.size(1) < T:
        logits = model(x, torch.zeros_like(x))[:, -1]  # (B, N_VOCAB)
        x = torch.cat([x, logits.argmax(1, keepdim=True)], 1)
    texts = []
    for ids in x[:, len(prompts[0]) :].tolist():
        stop = next((i for i, token in enumerate(ids) if token in (END, END_OF_TEXT)), T)
        texts.append(decode(ids[: stop + 1]))
    return texts


def share(texts: list[str], beginnings: list[str]) -> float:
    """The share of the texts that begin as they should."""
    return round(sum(map(str.startswith, texts, beginnings)) / len(texts), 3)


# %% [markdown]
# ## 8. Pretraining: learn P(text)
# A chat will answer each of 81 questions. The other 81 are *held out*: no chat answers them. The
# text asks them and states their facts, but never one after the other. What does the model do when
# it is asked one of those, as plain text (it has never seen a chat)?

# %%
if __name__ == "__main__":
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    keys = rng.sample(list(FACTS), len(FACTS))
    trained, heldout = keys[:81], keys[81:]
    text = corpus_rows(rng, 12 * PRETRAINING_STEPS)
    model = train(GPT(), text, PRETRAINING_STEPS, rows_per_step=12, peak_lr=3e-3)

    before = answers(model, [encode(question(key)) for key in heldout])
    own_words = answers(model, [encode(f"{key}=") for key in heldout])
    for key, *both in list(zip(heldout, before, own_words))[:4]:
        print(f"{question(key)} -> {both[0]!a:42}{key}= -> {both[1]!a}")

# %% [markdown]
# It asks a question, too. But it does know: given the words of its text, `2+4=`, it completes the
# fact.
#
# ## 9. Fine-tuning: learn P(response | prompt)
# The same `train`, on rows with weights. Then once more without pretraining, to see where the
# answers come from: in so few steps, that model learns only a third of its own chats. (With five
# times the learning rate it learns them all, and answers 9% to 28% of the other questions, seeds 1
# to 3. Some of these are a chat's mirror image, 3+4 for 4+3.)

# %%
if __name__ == "__main__":
    chats = pack([render(question(key), FACTS[key]) for key in trained])
    prompts = [render_prompt(question(key)) for key in heldout]
    scratch = GPT()
    for start in (model, scratch):
        train(start, chats, SFT_STEPS, rows_per_step=8, peak_lr=2e-4)
    after, without = answers(model, prompts), answers(scratch, prompts)

    print(f"\n{'held out':16}{'before':44}{'after':20}without pretraining")
    for key, *row in list(zip(heldout, before, after, without))[:8]:
        print(f"{question(key):16}{row[0]!a:44}{row[1]!a:20}{row[2]!a}")

    facts = [FACTS[key] for key in heldout]
    right = [fact + "<|end|>" for fact in facts]  # after fine-tuning, an answer must also stop
    print(json.dumps({
        "base": {"heldout_acc": share([text.lstrip() for text in before], facts),
                 "own_words_acc": share(own_words, [fact.split("=")[1] for fact in facts])},
        "sft": {"heldout_acc": share(after, right)},
        "scratch": {"heldout_acc": share(without, right)},
    }))
