// GPT-2 in plain JavaScript, for the pages of `tools.playground` and `tools.lesson_page`: Python
// puts this file into both. A page has its settings in the script element "data" and each model's
// weights in an element of their own.
"use strict";
const $ = (selector, parent = document) => parent.querySelector(selector);
const DATA = JSON.parse($("#data").textContent);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)}%`;

// All text enters the page here, as textContent: typed text can never become markup.
function add(parent, tag, className = "", text = "") {
  const node = parent.appendChild(document.createElement(tag));
  node.className = className;
  node.textContent = text;
  return node;
}

// ----- the model: GPT-2's forward pass, one token at a time --------------------------------------
// model.py does the same for batches of rows. A token is a vector of C = n_embd numbers on its
// way through the layers; each head works on hs of them.

const { block_size, n_layer, n_head, n_embd: C, n_vocab } = DATA.config;
const hs = C / n_head;

// Half precision has 1 bit for the sign, 5 for the exponent, and 10 for the fraction.
const HALF = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
});

const models = []; // unpacked when first used
const modelOf = (i) => (models[i] ??= unpack($(`[data-weights="${i}"]`).textContent));

// Base64 -> the weights, with about the names of model.py and in its order.
function unpack(base64) {
  const bytes = atob(base64), all = new Float32Array(bytes.length / 2);
  for (let i = 0; i < all.length; i++)
    all[i] = HALF[bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8)];
  let at = 0;
  const take = (n) => all.subarray(at, (at += n));
  const norm = () => ({ weight: take(C), bias: take(C) });
  const linear = (from, to) => ({ weight: take(to * from), bias: take(to) });
  return {
    wte: take(n_vocab * C), // (n_vocab, C), one row for each token
    wpe: take(block_size * C), // (block_size, C), one row for each position
    h: Array.from({ length: n_layer }, () => ({
      ln_1: norm(), c_attn: linear(C, 3 * C), attn_proj: linear(C, C),
      ln_2: norm(), c_fc: linear(C, 4 * C), mlp_proj: linear(4 * C, C),
    })),
    ln_f: norm(),
  };
}

// x (in) -> (out): each output is the dot product of x with one row of the weight.
function linear(x, { weight, bias }) {
  const y = new Float32Array(weight.length / x.length);
  for (let row = 0, at = 0; row < y.length; row++) {
    let sum = bias ? bias[row] : 0;
    for (let i = 0; i < x.length; i++, at++) sum += weight[at] * x[i];
    y[row] = sum;
  }
  return y;
}

// LayerNorm: mean 0 and variance 1, then a learned scale and shift.
function norm(x, { weight, bias }) {
  const mean = x.reduce((sum, v) => sum + v, 0) / C;
  const variance = x.reduce((sum, v) => sum + (v - mean) ** 2, 0) / C;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  return x.map((v, i) => (v - mean) * scale * weight[i] + bias[i]);
}

function softmax(x) { // any numbers -> probabilities, which add up to 1
  const largest = x.reduce((a, b) => Math.max(a, b));
  const powers = x.map((v) => Math.exp(v - largest)); // at most 1: no overflow
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((v) => v / sum);
}

// The token looks back: its query is compared with the keys of all tokens from `start` on, its own
// included, and the better a key fits, the more of that token's value is added to the sum.
function attention(x, layer, { keys, values, shares }, t, start) {
  const qkv = linear(x, layer.c_attn); // (3C): query, key, and value, each (n_head, hs)
  keys.set(qkv.subarray(C, 2 * C), t * C); // the cache: no later token computes these again
  values.set(qkv.subarray(2 * C), t * C);
  const y = new Float32Array(C);
  for (let head = 0; head < C; head += hs) { // where the numbers of a head start
    const scores = new Float32Array(t + 1 - start);
    for (let s = start; s <= t; s++)
      for (let i = head; i < head + hs; i++)
        scores[s - start] += (qkv[i] * keys[s * C + i]) / Math.sqrt(hs);
    const parts = softmax(scores);
    for (let s = start; s <= t; s++)
      for (let i = head; i < head + hs; i++) y[i] += parts[s - start] * values[s * C + i];
    shares?.push(parts);
  }
  return linear(y, layer.attn_proj);
}

const GELU = Math.sqrt(2 / Math.PI); // its tanh form, as in GPT-2
const gelu = (v) => 0.5 * v * (1 + Math.tanh(GELU * (v + 0.044715 * v ** 3)));
const mlp = (x, layer) => linear(linear(x, layer.c_fc).map(gelu), layer.mlp_proj);
const plus = (x, y) => x.map((v, i) => v + y[i]);

// The whole network: a token id -> the logits (n_vocab) of the token that follows it. In a row of
// several texts, `start` is the column where the token's own begins: it sees nothing before it, and
// its position counts from there.
function forward(model, id, cache, start = 0) {
  const row = (table, i) => table.subarray(i * C, (i + 1) * C);
  const t = cache.length++; // the token's column
  let x = plus(row(model.wte, id), row(model.wpe, t - start));
  model.h.forEach((layer, i) => {
    x = plus(x, attention(norm(x, layer.ln_1), layer, cache.layers[i], t, start));
    x = plus(x, mlp(norm(x, layer.ln_2), layer));
  });
  return linear(norm(x, model.ln_f), { weight: model.wte }); // the head is the embedding again
}

// withShares: keep what each token pays to which, head by head, in layers[i].shares
function emptyCache(withShares = false) {
  const table = () => new Float32Array(block_size * C);
  const layers = Array.from({ length: n_layer }, () => ({ keys: table(), values: table(),
    shares: withShares ? [] : undefined }));
  return { length: 0, layers };
}

// Greedy at temperature 0, else drawn at random.
function choose(logits, temperature) {
  if (temperature === 0) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  const probabilities = softmax(logits.map((v) => v / temperature));
  let left = Math.random();
  const id = probabilities.findIndex((p) => (left -= p) < 0);
  return id < 0 ? logits.length - 1 : id; // rounding: they may add up to a little less than 1
}

// ----- tokens: a byte each, and five special ones that typed text never becomes ------------------

const toBytes = (text) => [...new TextEncoder().encode(text)];
const toText = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
const bytesOf = (id) => (id < 256 ? [id] : toBytes(DATA.specials[id - 256]));
const decode = (ids) => toText(new Uint8Array(ids.flatMap(bytesOf)));
const GLYPHS = { 9: "⇥", 10: "↵", 13: "␍", 32: "·" }; // white space has to be seen

function tokenText(id) {
  if (id in GLYPHS) return GLYPHS[id];
  if (id > 32 && id < 127) return String.fromCharCode(id);
  return DATA.specials[id - 256] ?? `\\x${id.toString(16).padStart(2, "0")}`;
}

function promptOf(question, as) { // exactly the ids of tokenizer.render_prompt
  const { before, after } = DATA.template;
  return as === "chat" ? [...before, ...toBytes(question), ...after] : toBytes(question);
}

