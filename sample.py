"""
Generate text from a checkpoint: from the full product, one stage, a prefix, with early exit (WAND, routing) or by self-speculation.

    python sample.py runs/tiny --prompt "The capital of France is" --max-new-tokens 32 --temperature 0
    python sample.py runs/tiny --mode speculative --draft-len 8 --prompt-file prompts.txt --json
    python sample.py runs/3b --mode routing --compile
    python sample.py runs/3b --bench                            # every mode, interleaved, with speeds and bytes

A prompt is always encoded as bos + ordinary text; an empty one is bos alone. Generation stops at bos, which begins the next document.

One engine serves all modes: a cursor per stage. Stage 0 runs ahead; when the product's word is needed, the stages above it run over the
positions that wait, in one pass if they can. Rolling back is moving cursors; what lies beyond a cursor is garbage that nothing
reads. Plain decoding is speculation with a draft of nothing:

    cycle(n): n passes of stage 0, each but the last choosing the next token from stage 0 alone; one pass of stages 1 .. K-1 over the n
              positions; the product chooses a token after each; the first that differs from its draft replaces it, the rest is dropped.

So n stage-0 passes and one pass of the rest give 1 to n tokens. A pass consists of tiles of the same number of rows, some of them unused,
and every row is computed by itself: a position's bits do not depend on what is computed beside it. That is why speculation writes the
very tokens of plain decoding, in bfloat16 too. Noise is a function of (seed, row, position, token), added to log-probabilities (Gumbel;
coupled drafts after Daliri, Musco and Suresh, arXiv 2408.07978), so the same holds at any temperature.

Speculative decoding: arXiv 2211.17192; with one's own lower layers: LayerSkip, arXiv 2404.16710; run-ahead until unsure: arXiv 2309.08168;
catching up skipped layers with later tokens: FREE, arXiv 2310.05424; WAND: Broder et al., CIKM 2003.
"""
import codecs
import functools
import json
import math
import sys
import time
from collections import deque, namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dataloader import Tokenizer, clean_text
from flags import flag, parse_flags, run, spelled
from model import (BOUNDS_KEY, PRESETS, QK_SCALE, SOFTCAP, KVCache, attention_backends, choose_device, combine, get, load_checkpoint,
                   read_object, resolve_checkpoint)

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    jit = triton.jit
except ImportError:             # it comes with torch's CUDA builds; nothing else needs it
    triton, jit = None, lambda function: function

    class tl:
        constexpr = None

MODES = ("full", "single", "prefix", "wand", "routing", "speculative")
ROWS = 16                       # rows of a tile, of the tensor cores; every pass of an upper stage has whole ones
WIDEST = 4 * ROWS               # rows of the kernels' widest pass: so many tiles read the weights together
SLOTS = WIDEST                  # positions whose sum of log-probabilities is kept
CHOSEN = 2 * ROWS               # positions after which tokens are chosen at once, at most
SLACK = CHOSEN + WIDEST         # cache slots past the context: two cycles in flight and unused rows reach there
PREFILL = 256                   # positions of a prompt in one pass
CHUNK = 32                      # cache slots that one program of `attend` reads


# ---------------------------------------------------------------------------------------------------------------
# Choosing a token

def _hash32(x):
    """A bijective 32-bit integer hash with low bias (C. Wellons, "hash prospector"), on int64 tensors."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(seed, rows, positions, vocab_size):
    """Standard Gumbel noise as a pure function of (seed, row, position, token): float64 (B, V).

    rows, positions: int64 (B,). argmax(log p + noise) is a draw from p, and the same draw wherever it is computed.
    """
    key = torch.full_like(rows, seed & 0xFFFFFFFF)
    for part in (torch.full_like(rows, seed >> 32 & 0xFFFFFFFF), rows, positions):
        key = _hash32(key ^ _hash32(part + 0x9E3779B9 & 0xFFFFFFFF))
    tokens = torch.arange(vocab_size, device=rows.device)
    bits = _hash32(_hash32(tokens * 0x9E3779B1 & 0xFFFFFFFF) ^ key[:, None])       # (B, V)
    uniform = (bits.double() + 0.5) / 2 ** 32                                   # in (0, 1)
    return -torch.log(-torch.log(uniform))


def draw(log_probs, temperature, top_k, top_p, seed, rows, positions):
    """Draw the next token of each row: int64 (B,). log_probs: float32 (B, V), nats, of the distribution to sample from.

    temperature: above 0. Filters: top-k, then top-p (the smallest set whose probability reaches top_p) at that temperature.
    rows, positions: int64 (B,), of the tokens chosen: the noise's coordinates.
    """
    scores = (log_probs - log_probs.max(dim=-1, keepdim=True).values) / temperature     # the best at 0: no temperature is too small
    if 0 < top_k < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        ordered, order = F.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        same = F.pad(ordered, (0, 0, 0, max(0, CHOSEN - len(ordered))))          # a GPU's order of summation may depend on how many rows there are
        beyond = same.cumsum(dim=-1)[:len(ordered)] - ordered >= top_p          # the probability before it is enough already
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return (scores.double() + gumbel_noise(seed, rows, positions, scores.size(-1))).argmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# Kernels of a stage on CUDA, six a layer. Row r is position begin[b] + t of batch row b, with b, t = divmod(r, T), and is live while
# that is before end[b]; the cursors stand still from a stage's first kernel to its last. Activations inside a stage lie by row; those at
# its boundaries, as the cache, by place: b * S + position. Each kernel starts while the one before it still runs (programmatic dependent
# launch) and waits for it; matrix products with work ask for their first weights meanwhile.

@jit
def live_rows(begin, end, r, S, T):
    """(bool, int64) of rows r: whether they have work, and their places. Read from L2: L1 may hold cursors of before this kernel's start."""
    first = tl.load(begin + r // T, cache_modifier=".cg")
    return first + r % T < tl.load(end + r // T, cache_modifier=".cg"), (r // T) * S + first + r % T


@jit
def enter_stage(tokens, embedding, before, x0, out, squares, begin, end, a, b, S, C: tl.constexpr, C2: tl.constexpr, T,
                PARTS: tl.constexpr, FIRST: tl.constexpr, EPS: tl.constexpr):
    """out = a before + b x0 of each row, and its sum of squares. Where FIRST, x0 is made here: the normalised embedding, also `before`."""
    gdc_wait()
    gdc_launch_dependents()                                                 # after the wait: the cursors stand still for all kernels of the stage
    r, c, parts = tl.program_id(0), tl.arange(0, C2), tl.arange(0, PARTS)
    _, place = live_rows(begin, end, r, S, T)                               # what an unused row leaves lies beyond the cursor
    if FIRST:
        word = tl.load(embedding + tl.load(tokens + place) * C + c, mask=c < C, other=0.0).to(tl.float32)
        first = (word * tl.rsqrt(tl.sum(word * word) / C + EPS)).to(out.dtype.element_ty)
        tl.store(x0 + place * C + c, first, mask=c < C)
        last = first
    else:
        first = tl.load(x0 + place * C + c, mask=c < C, other=0.0)
        last = tl.load(before + place * C + c, mask=c < C, other=0.0)
    mixed = (a * last.to(tl.float32) + b * first.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + r * C + c, mixed, mask=c < C)
    square = tl.sum(mixed.to(tl.float32) * mixed.to(tl.float32))
    tl.store(squares + r * PARTS + parts, tl.where(parts == 0, square, 0.0))


@jit
def skinny_matmul(x, weight, out, parts, residual, x0, out_parts, begin, end, a, b, S, N, K: tl.constexpr, T,
                  ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PREFETCH: tl.constexpr,
                  PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, NORM: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr, ADD: tl.constexpr, MIX: tl.constexpr,
                  SQUARE: tl.constexpr, X_PLACED: tl.constexpr, OUT_PLACED: tl.constexpr, EPS: tl.constexpr):
    """out = f(x @ weight.T) for ROWS rows. x (rows, K); weight (N, K), read once: the cost is its bytes; out (rows, N).

    NORM: RMS-normalise x, by the sums of squares in `parts` (the factor moves past the product). RELU2: relu^2. CAP: softcap, and leave
    the sums of exp(out) in `out_parts`. ADD: add `residual`. MIX: then a out + b x0, the entry of the next layer. SQUARE: leave the sums
    of out^2. SPLIT > 1: that many parts of K at a time. The order of every sum is fixed and knows nothing of how many rows are live.
    """
    tile, block = tl.program_id(0), tl.program_id(1)                        # tiles of one block are neighbours: its weights come once, then from L2
    r, n, k = tile * ROWS + tl.arange(0, ROWS), block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    gdc_launch_dependents()
    live, place = live_rows(begin, end, r, S, T)
    if tl.max(live.to(tl.int32), axis=0) == 0:                              # a draft after one that was not to be
        gdc_wait()                                                          # kernels still end in order
        return
    lines = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + (tl.arange(0, PREFETCH) * 64)[None, :]           # 128 bytes each
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
    gdc_wait()
    x += tl.where(live, place if X_PLACED else r, 0) * K                    # (ROWS,) pointers
    weight += n.to(tl.int64) * K                                            # (BLOCK_N,)
    if SPLIT > 1:
        part = tl.arange(0, SPLIT)[:, None, None] * (K // SPLIT)
        acc = tl.zeros((SPLIT, ROWS, BLOCK_N), tl.float32)
        for i in range(0, K // SPLIT, BLOCK_K):
            x_tile = tl.load(x[None, :, None] + part + (i + k)[None, None, :], mask=live[None, :, None], other=0.0)
            w_tile = tl.load(weight[None, None, :] + part + (i + k)[None, :, None], mask=(n < N)[None, None, :], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc)
        y = tl.sum(acc, axis=0)
    else:                                                                   # the weights on the left, where the tensor cores want 64 rows
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for i in range(0, K, BLOCK_K):
            x_tile = tl.load(x[None, :] + (i + k)[:, None], mask=live[None, :], other=0.0)
            w_tile = tl.load(weight[:, None] + (i + k)[None, :], mask=(n < N)[:, None], other=0.0)
            acc = tl.dot(w_tile, x_tile, acc)
        y = tl.trans(acc)
    if NORM:
        total = tl.sum(tl.load(parts + r[:, None] * PARTS + tl.arange(0, PARTS)[None, :]), axis=1)
        y *= tl.rsqrt(total / K + EPS)[:, None]
    if RELU2:
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    if CAP > 0:
        y = CAP - 2 * CAP / (tl.exp(y * (2 / CAP)) + 1.0)                   # CAP tanh(y / CAP)
    mask, at = live[:, None] & (n < N)[None, :], r[:, None] * N + n[None, :]
    by_place = tl.where(live, place, 0)[:, None] * N + n[None, :]
    if ADD:
        y += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if MIX:
        y = a * y.to(out.dtype.element_ty).to(tl.float32) + b * tl.load(x0 + by_place, mask=mask, other=0.0).to(tl.float32)
    if SQUARE:
        y = tl.where(mask, y, 0.0).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out_parts + r * OUT_PARTS + block, tl.sum(y * y, axis=1))
    if CAP > 0:
        tl.store(out_parts + r * OUT_PARTS + block, tl.sum(tl.where(mask, tl.exp(y), 0.0), axis=1))
    tl.store(out + (by_place if OUT_PLACED else at), y.to(out.dtype.element_ty), mask=mask)


@jit
def rotated(first, second, cos, sin, D: tl.constexpr, EPS: tl.constexpr, dtype: tl.constexpr):
    """Rotary position and QK-norm of vectors given as two halves, float32."""
    one, two = first * cos + second * sin, second * cos - first * sin
    scale = tl.rsqrt((tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)) / D + EPS)[:, None]
    return (one * scale).to(dtype), (two * scale).to(dtype)


@jit
def attend(qkv, keys, values, value_embed, tokens, cos, sin, begin, end, partial, total, scale, S, NQ, T, M: tl.constexpr,
           G: tl.constexpr, G2: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, EMBED: tl.constexpr, EPS: tl.constexpr):
    """Attention of a tile of a batch row's queries to a chunk of cache slots, for one key-value head; new keys and values are cached here.

    qkv: (rows, NQ) holds queries, keys, values and gate logits. partial: sum of exp(score) v; total: sum of exp(score). |score| is
    bounded by QK-norm (16.3 at D = 128), so no maximum is subtracted and chunks just add up. Slots of a later row weigh 0.
    """
    gdc_launch_dependents()
    gdc_wait()
    HALF: tl.constexpr = D // 2
    pair, chunk, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = pair // H_KV, pair % H_KV
    p = tl.load(begin + b)
    n = tl.minimum(tl.load(end + b) - p, T)
    if (chunk * CHUNK >= p + n) | (tile * (M // G2) >= n):
        return
    d, dv, m = tl.arange(0, HALF)[None, :], tl.arange(0, D)[None, :], tl.arange(0, M)
    t, g = tile * (M // G2) + m // G2, m % G2
    mine = ((t < n) & (g < G))[:, None]
    query = qkv + (b * T + t)[:, None] * NQ + (h * G + g)[:, None] * D + d
    angle = (p + t)[:, None] * HALF + d
    q1, q2 = rotated(tl.load(query, mask=mine, other=0.0), tl.load(query + HALF, mask=mine, other=0.0),
                     tl.load(cos + angle, mask=mine, other=0.0), tl.load(sin + angle, mask=mine, other=0.0), D, EPS, keys.dtype.element_ty)
    s = chunk * CHUNK + tl.arange(0, CHUNK)
    old, slot = (s < p)[:, None], ((b * S + s) * H_KV + h)[:, None] * D
    k1, k2 = tl.load(keys + slot + d, mask=old, other=0.0), tl.load(keys + slot + HALF + d, mask=old, other=0.0)
    v = tl.load(values + slot + dv, mask=old, other=0.0)
    if chunk * CHUNK + CHUNK > p:
        fresh = (s >= p) & (s < p + n)
        new, row, angle_k = fresh[:, None], qkv + (b * T + s - p)[:, None] * NQ, s[:, None] * HALF + d
        key = row + (G * H_KV + h) * D
        n1, n2 = rotated(tl.load(key + d, mask=new, other=0.0), tl.load(key + HALF + d, mask=new, other=0.0),
                         tl.load(cos + angle_k, mask=new, other=0.0), tl.load(sin + angle_k, mask=new, other=0.0), D, EPS, keys.dtype.element_ty)
        value = tl.load(row + (G * H_KV + H_KV + h) * D + dv, mask=new, other=0.0)
        if EMBED:
            token = tl.load(tokens + b * S + s, mask=fresh, other=0)
            gate = tl.load(row + (G + 2) * H_KV * D + h, mask=new, other=0.0)
            embed = tl.load(value_embed + (token * H_KV + h)[:, None] * D + dv, mask=new, other=0.0).to(tl.float32)
            value += 3.0 / (1.0 + tl.exp(-gate)) * embed
        k1, k2, v = tl.where(new, n1, k1), tl.where(new, n2, k2), tl.where(new, value.to(v.dtype), v)
        tl.store(keys + slot + d, k1, mask=new)
        tl.store(keys + slot + HALF + d, k2, mask=new)
        tl.store(values + slot + dv, v, mask=new)
    score = (tl.dot(q1, tl.trans(k1)) + tl.dot(q2, tl.trans(k2))) * scale
    weight = tl.where((s[None, :] <= (p + t)[:, None]) & mine, tl.exp(score), 0.0)
    at = (((pair * tl.num_programs(1) + chunk) * tl.num_programs(2) + tile) * M + m)[:, None]
    tl.store(partial + at * D + dv, tl.dot(weight.to(v.dtype), v), mask=mine)
    tl.store(total + at, tl.sum(weight, axis=1)[:, None], mask=mine)


@jit
def add_chunks(partial, total, out, begin, end, S, CHUNKS, TILES, T, M: tl.constexpr, G: tl.constexpr, G2: tl.constexpr,
               H_KV: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, CHUNKS2: tl.constexpr):
    """Attention's output for one row and attention head, from its chunks: (rows, H, D)."""
    gdc_launch_dependents()
    gdc_wait()
    r, head, chunk, d = tl.program_id(0), tl.program_id(1), tl.arange(0, CHUNKS2), tl.arange(0, D)
    live, place = live_rows(begin, end, r, S, T)
    b, row = r // T, (r % T) * G2 + head % G
    at = (((b * H_KV + head // G) * CHUNKS + chunk) * TILES + row // M) * M + row % M
    reached = chunk * CHUNK <= tl.where(live, place - b * S, -1)            # none for an unused row: 0 / 0, which nothing reads
    y = tl.sum(tl.load(partial + at[:, None] * D + d[None, :], mask=reached[:, None], other=0.0), axis=0)
    y /= tl.sum(tl.load(total + at, mask=reached, other=0.0), axis=0)
    tl.store(out + (r * H_KV * G + head) * D + d, y.to(out.dtype.element_ty))


@jit
def add_log_probs(logits, parts, sums, begin, end, S, V: tl.constexpr, T, ROWS: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
                  BLOCK: tl.constexpr, FIRST: tl.constexpr):
    """sums (+)= logits - log(sum of exp(logits)) for the live rows, each at its place modulo SLOTS, or at its row where SLOTS is 0."""
    gdc_launch_dependents()
    gdc_wait()
    r, v = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, place = live_rows(begin, end, r, S, T)
    slot = place % SLOTS if SLOTS else r
    total = tl.sum(tl.load(parts + r[:, None] * PARTS + tl.arange(0, PARTS)[None, :], mask=live[:, None], other=1.0), axis=1)
    mask, at = live[:, None] & (v < V)[None, :], slot[:, None] * V + v[None, :]
    y = tl.load(logits + r[:, None] * V + v[None, :], mask=mask, other=0.0) - tl.log(total)[:, None]
    if not FIRST:
        y += tl.load(sums + at, mask=mask, other=0.0)
    tl.store(sums + at, y, mask=mask)


@jit
def advance(begin, end, T):
    """Move a stage's cursor past the rows that it has run."""
    gdc_launch_dependents()
    gdc_wait()
    b = tl.program_id(0)
    tl.store(begin + b, tl.minimum(tl.load(begin + b) + T, tl.load(end + b)))


@jit
def best_tokens(sums, positions, tokens, log_probs, margins, report, n_experts, WIDTH: tl.constexpr, V: tl.constexpr, SLOTS: tl.constexpr,
                BLOCK: tl.constexpr):
    """Of the product of each row's sum: the best token (the lowest id among equals), its log-probability, and top-1 less top-2. Reports the first two."""
    gdc_launch_dependents()
    gdc_wait()
    r = tl.program_id(0)
    row = sums + (tl.load(positions + r) % SLOTS if SLOTS else r) * V
    best, second, token, total = -float("inf"), -float("inf"), 0, 0.0
    for i in range(0, V, BLOCK):
        v = i + tl.arange(0, BLOCK)
        y = tl.load(row + v, mask=v < V, other=-float("inf")) / n_experts
        total += tl.sum(tl.exp(y))
        top, where = tl.max(y, axis=0, return_indices=True, return_indices_tie_break_left=True)
        other = tl.max(tl.where(v == i + where, -float("inf"), y))
        second = tl.maximum(tl.maximum(second, other), tl.minimum(best, top))
        token = tl.where(top > best, i + where, token)
        best = tl.maximum(best, top)
    tl.store(tokens + r, token.to(tl.int64))
    tl.store(log_probs + r, best - tl.log(total))
    tl.store(report + WIDTH + r, token.to(tl.float64))
    tl.store(report + 2 * WIDTH + r, (best - tl.log(total)).to(tl.float64))
    tl.store(margins + r, best - second)


def kernels_fit(model):
    """Whether the kernels serve this model. (On a CPU they run in Triton's interpreter alone, for their test.)"""
    config = model.config
    return (triton is not None and config.head_dim in (32, 64, 128) and config.n_embd % 64 == 0 and config.mlp_hidden % 64 == 0
            and (model.compute_dtype == torch.bfloat16 or model.cos.device.type == "cpu"))


class StageKernels:
    """The stages of a model as these kernels, over an engine's state: the fast twins of `run_layers`, `speak`, `advance` and `best` of `Engine`.

    Weights are rearranged once: q, k, v and the gate are rows of one matrix, of which the module's own become views.
    """

    def __init__(self, model, engine):
        config, device, dtype = model.config, model.cos.device, model.compute_dtype
        C, D = config.n_embd, config.head_dim
        if not kernels_fit(model):
            raise ValueError(f"--compile needs Triton, --dtype bfloat16 (not {dtype}), head dimensions of 32, 64 or 128 (not {D}) and widths "
                             f"(n_embd {C}, mlp_hidden {config.mlp_hidden}) that are multiples of 64; leave it out to decode without")
        self.model, self.engine, self.eps = model, engine, torch.finfo(torch.float32).eps
        self.slots = SLOTS if engine.n_rows == 1 else 0
        self.group2, self.parts = triton.next_power_of_2(config.n_head // config.n_kv_head), triton.next_power_of_2(C // 16)
        self.chunks = -(-engine.slots // CHUNK)
        if not hasattr(model, "qkv_gate"):
            model.qkv_gate = [self.pack(block.attn, C) for block in model.blocks]
            model.mixes = [(block.resid_lambda.item(), block.x0_lambda.item()) for block in model.blocks]
        new, rows = functools.partial(torch.zeros, device=device, dtype=dtype), WIDEST if engine.n_rows == 1 else ROWS
        self.x, self.middle, self.attended = new(rows, C), new(rows, C), new(rows, C)
        self.hidden, self.qkv = new(rows, config.mlp_hidden), new(rows, max(map(len, model.qkv_gate)), dtype=torch.float32)
        self.logits, self.found = new(rows, config.vocab_size, dtype=torch.float32), new(2, CHOSEN, dtype=torch.float32)
        self.exp_parts = new(rows, triton.next_power_of_2(-(-config.vocab_size // self.blocks(config.vocab_size, C)[0])), dtype=torch.float32)
        self.chosen = new(CHOSEN, dtype=torch.int64)
        self.x_squares, self.middle_squares = (new(rows, self.parts, dtype=torch.float32) for _ in range(2))
        self.M = max(16, engine.width * self.group2)
        self.partial = new(engine.n_rows * config.n_kv_head, self.chunks, rows // ROWS, self.M, D, dtype=torch.float32)
        self.total = torch.zeros_like(self.partial[..., 0])
        positions = torch.arange(engine.slots, device=device).clamp(max=config.sequence_len - 1)
        self.cos, self.sin = model.cos[positions].contiguous(), model.sin[positions].contiguous()

    @staticmethod
    def pack(attn, C):
        """q, k, v (and gate logits, 16 rows with zeros beyond the gate's channels) as one matrix."""
        gate = attn.c_q.weight.new_zeros(16 if attn.value_gate is not None else 0, C)
        if attn.value_gate is not None:
            gate[:attn.value_gate.weight.size(0), :attn.value_gate.weight.size(1)] = attn.value_gate.weight
        packed, start = torch.cat([attn.c_q.weight, attn.c_k.weight, attn.c_v.weight, gate]), 0
        for linear in (attn.c_q, attn.c_k, attn.c_v):
            linear.weight.data = packed[start:start + len(linear.weight)]
            start += len(linear.weight)
        return packed

    def shape(self):
        """(positions of a batch row, tiles of ROWS rows) of this pass."""
        return self.engine.width, -(-self.engine.width // ROWS)

    def multiply(self, k, x, weight, out, squares=None, residual=None, mix=None, out_parts=None, relu2=False, cap=0.0, x_placed=False, out_placed=False):
        """Launch `skinny_matmul` for the rows of stage k."""
        engine, (N, K), (T, tiles) = self.engine, weight.shape, self.shape()
        block_n, block_k, split, num_stages, prefetch = self.blocks(N, K)
        skinny_matmul[(tiles, -(-N // block_n))](
            x, weight, out, squares, residual, engine.stream[0], out_parts, engine.cursors[k + 1], engine.cursors[k], *(mix or (0.0, 0.0)),
            engine.slots, N, K, T=T, ROWS=ROWS, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT=split, PREFETCH=prefetch, PARTS=self.parts,
            OUT_PARTS=0 if out_parts is None else out_parts.size(1), NORM=squares is not None, RELU2=relu2, CAP=cap, ADD=residual is not None,
            MIX=mix is not None, SQUARE=out_parts is not None and not cap, X_PLACED=x_placed, OUT_PLACED=out_placed, EPS=self.eps,
            num_warps=4, num_stages=num_stages, launch_pdl=True)

    @staticmethod
    def blocks(N, K):
        """(BLOCK_N, BLOCK_K, SPLIT, stages of the pipeline, PREFETCH) of a product, by measurement on an H100 at the shapes of `3b`."""
        if N <= 3 * K and K % 256 == 0:                                     # few columns: 16 a block, and K in four parts
            return 16, math.gcd(K // 4, 128), 4, 6 if K > N else 4, 32 if N <= K else 8
        return 64, math.gcd(K, 128), 1, 4, 8

    def run_layers(self, k):
        """As `Engine.run_layers`."""
        engine, config, model, layers = self.engine, self.model.config, self.model, self.model.layers_of_stage[k]
        begin, end, G, (T, tiles) = engine.cursors[k + 1], engine.cursors[k], config.n_head // config.n_kv_head, self.shape()
        enter_stage[(engine.n_rows * T,)](
            engine.tokens, model.wte.weight, engine.stream[k], engine.stream[0], self.x, self.x_squares, begin, end, *model.mixes[layers[0]],
            engine.slots, C=config.n_embd, C2=triton.next_power_of_2(config.n_embd), T=T, PARTS=self.parts, FIRST=k == 0, EPS=self.eps, launch_pdl=True)
        for layer in layers:
            block, last = model.blocks[layer], layer == layers[-1]
            embed = block.attn.value_embed
            self.multiply(k, self.x, model.qkv_gate[layer], self.qkv, squares=self.x_squares)
            shape = dict(T=T, M=self.M, G=G, G2=self.group2, H_KV=config.n_kv_head, D=config.head_dim, CHUNK=CHUNK, num_warps=4, launch_pdl=True)
            attend[(engine.n_rows * config.n_kv_head, self.chunks, tiles)](
                self.qkv, engine.cache.keys[layer], engine.cache.values[layer], None if embed is None else embed.weight, engine.tokens, self.cos, self.sin,
                begin, end, self.partial, self.total, QK_SCALE / math.sqrt(config.head_dim), engine.slots, model.qkv_gate[layer].size(0),
                EMBED=embed is not None, EPS=self.eps, **shape)
            add_chunks[(engine.n_rows * T, config.n_head)](self.partial, self.total, self.attended, begin, end, engine.slots, self.chunks, tiles,
                                                   CHUNKS2=triton.next_power_of_2(self.chunks), **shape)
            self.multiply(k, self.attended, block.attn.c_proj.weight, self.middle, residual=self.x, out_parts=self.middle_squares)
            self.multiply(k, self.middle, block.mlp.c_fc.weight, self.hidden, squares=self.middle_squares, relu2=True)
            self.multiply(k, self.hidden, block.mlp.c_proj.weight, engine.stream[k + 1] if last else self.x, residual=self.middle,
                          mix=None if last else model.mixes[layer + 1], out_parts=self.x_squares, out_placed=last)

    def speak(self, k):
        """As `Engine.speak`."""
        engine, V, (T, tiles) = self.engine, self.model.config.vocab_size, self.shape()
        self.multiply(k, engine.stream[k + 1], self.model.head_weight(k), self.logits, squares=self.x_squares, cap=SOFTCAP,
                      out_parts=self.exp_parts, x_placed=True)
        add_log_probs[(-(-V // 512), tiles)](
            self.logits, self.exp_parts, engine.sums, engine.cursors[k + 1], engine.cursors[k], engine.slots, V=V, T=T, ROWS=ROWS, SLOTS=self.slots,
            PARTS=self.exp_parts.size(1), BLOCK=512, FIRST=k == engine.heads[0], num_warps=4, launch_pdl=True)

    def advance(self, k):
        """As `Engine.advance`."""
        advance[(self.engine.n_rows,)](self.engine.cursors[k + 1], self.engine.cursors[k], T=self.shape()[0], num_warps=1, launch_pdl=True)

    def best(self, positions, n_experts):
        """As `Engine.best`."""
        n, report = len(positions), self.engine.report
        best_tokens[(n,)](self.engine.sums, positions, self.chosen, self.found[0], self.found[1], report, n_experts, WIDTH=report.size(1),
                          V=self.model.config.vocab_size, SLOTS=self.slots, BLOCK=4096, num_warps=8, launch_pdl=True)
        return self.chosen[:n], self.found[0, :n], self.found[1, :n]


# ---------------------------------------------------------------------------------------------------------------
# Engine

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from log-probabilities: the best at temperature 0, else by `draw`."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """How tokens are made. heads: the stages that speak. Drafting and early exit exclude each other and take one row at a time.

    draft_len: tokens that stage 0 drafts before the product judges them (0: none). draft_gate: draft no further after a token whose
    top-1 probability at stage 0 is below this (0: never stop). exits: after stage k leave where `score` is at least exits[k]; empty: no
    early exit. forced_acceptance, forced_lifts: for benchmarks of speed alone, chances in place of judgements: that a draft is accepted,
    that a token cannot leave after stage 0.
    """
    heads: range
    draft_len: int = 0
    draft_gate: float = 0.0
    exits: tuple = ()
    score: str = "margin"           # or "probability"
    forced_acceptance: float = None
    forced_lifts: float = None

    @property
    def adaptive(self):
        return len(self.exits) > 0 or self.forced_lifts is not None


class Engine:
    """Decoding of up to ROWS rows with one cursor per stage; all state is allocated once, on the device.

    cursors: int64 (stages + 1, B), not increasing downwards. cursors[0] counts the tokens that are known, cursors[k + 1] the positions that
    stage k has run. What a stage has written at or beyond its cursor is garbage that no query reads, and is written again before
    the cursor passes it; so rolling back is lowering cursors.
    stream: (stages + 1, B, slots, C): x0, then the boundary activations after each stage, by position. sums: the sum of log p_k so far, by
    position modulo SLOTS for one row, by row for several, which never wait.
    A pass of a stage has `width` positions a row: ROWS for one row, 1 for several; unused ones lie beyond the cursor. With kernels, more
    tiles of ROWS where more wait.

    fast: by CUDA kernels and graphs; the same steps, and no step or loop waits for the host.
    """

    def __init__(self, model, plan, n_rows=1, sampling=Sampling(), fast=False):
        config, device = model.config, model.cos.device
        self.model, self.plan, self.heads, self.n_rows, self.sampling = model, plan, plan.heads, n_rows, sampling
        self.last, self.width, self.slots = plan.heads[-1], ROWS if n_rows == 1 else 1, config.sequence_len + SLACK
        new = functools.partial(torch.zeros, device=device)                  # zeros: 0 times garbage must not be NaN
        self.tokens = new(n_rows, self.slots, dtype=torch.int64)
        self.cursors = new(self.last + 2, ROWS, dtype=torch.int64)[:, :n_rows]       # the kernels read ROWS of them: those beyond have no work
        self.stream = new(self.last + 2, n_rows, self.slots, config.n_embd, dtype=model.compute_dtype)
        self.sums = new(SLOTS if n_rows == 1 else n_rows, config.vocab_size, dtype=torch.promote_types(model.compute_dtype, torch.float32))
        self.report = new(3, max(CHOSEN, n_rows), dtype=torch.float64)       # what a step tells the host: numbers, tokens, log-probabilities
        self.noise_rows = new(n_rows, dtype=torch.int64)
        self.batch = torch.arange(n_rows, device=device)[:, None]           # (B, 1)
        self.cache = KVCache(config, n_rows, self.slots, device, model.compute_dtype)
        self.offsets = torch.arange(SLOTS, device=device)
        self.chances = chances(self.slots, device)                          # for the plan's forced_acceptance and forced_lifts
        self.kernels = StageKernels(model, self) if fast else None
        self.graphs, self.capture_seconds, self.in_flight = {}, 0.0, 2 if fast else 1
        self.passes = [0] * (self.last + 1)                                 # passes of each stage so far, for counting bytes

    @torch.no_grad()
    def begin(self, prompts, noise_rows=None):
        """Start anew with one prompt per row (lists of ids that begin with bos): run every stage over all but the last token of each."""
        assert len(prompts) == self.n_rows, f"{len(prompts)} prompts for {self.n_rows} rows"
        self.noise_rows.copy_(torch.tensor(list(noise_rows or range(self.n_rows))))
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=self.tokens.device)
            self.tokens[row, :len(prompt)] = ids[0]
            cache = self.cache.of_row(row)
            for start in range(0, len(prompt) - 1, PREFILL):
                end = min(start + PREFILL, len(prompt) - 1)
                cache.place(torch.arange(start, end, device=ids.device)[None], end)
                x = x0 = self.model.embed(ids[:, start:end])
                for k in range(self.last + 1):
                    x = self.model.stage(k, x, x0, ids[:, start:end], cache)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.cursors.copy_(torch.stack([lengths] + [lengths - 1] * (self.last + 1)))

    # -- steps: all that runs in a loop; static shapes, nothing asks the host -------------------------------------

    def places(self, k):
        """The next positions of stage k, int64 (B, T). Stage 0 never has more than one: without kernels it runs no unused rows."""
        return self.cursors[k + 1][:, None] + self.offsets[:1 if k == 0 else self.width]

    def run_layers(self, k):
        """Run stage k over its next positions, from `stream[k]` to `stream[k + 1]`. Leaves the cursors."""
        positions = self.places(k)
        tokens = self.tokens[self.batch, positions]
        if k == 0:
            self.stream[0, self.batch, positions] = self.model.embed(tokens)
        self.cache.place(positions, self.slots)
        x = self.model.stage(k, self.stream[k, self.batch, positions], self.stream[0, self.batch, positions], tokens, self.cache)
        self.stream[k + 1, self.batch, positions] = x                       # (B, T, C)

    def speak(self, k):
        """Add log p_k at the positions that `run_layers(k)` has just run to their sums."""
        positions = self.places(k)
        log_probs = self.model.log_probs(k, self.stream[k + 1, self.batch, positions]).flatten(0, 1)        # (B T, V)
        slots = self.batch[:, 0] if self.n_rows > 1 else positions[0] % SLOTS
        self.sums[slots] = log_probs if k == self.heads[0] else self.sums[slots] + log_probs

    def advance(self, k):
        """Move the cursor of stage k past the positions that it has run."""
        self.cursors[k + 1] = torch.minimum(self.cursors[k], self.cursors[k + 1] + self.width)

    def product(self, positions, n_experts):
        """Log-probabilities after each position (of one row, or one of each) by the product so far: (n, V)."""
        return combine(self.sums if self.n_rows > 1 else self.sums[positions % SLOTS], n_experts)

    def best(self, positions, n_experts):
        """The best token after each position, its log-probability, and top-1 less top-2: three (n,). Reports the first two."""
        log_probs = self.product(positions, n_experts)
        tokens = log_probs.argmax(dim=-1, keepdim=True)
        top, second = log_probs.gather(1, tokens)[:, 0], log_probs.scatter(1, tokens, -torch.inf).amax(dim=-1)
        self.report_choice(tokens[:, 0], top)
        return tokens[:, 0], top, top - second

    def report_choice(self, tokens, log_probs):
        self.report[1, :len(tokens)] = tokens
        self.report[2, :len(tokens)] = log_probs

    def stage(self, k, speak=True, width=None):
        """Run stage k over its next waiting positions, at most `width`; where it speaks, add log p_k to their sums. Moves its cursor."""
        by, usual = self.kernels or self, self.width
        self.width = width or usual
        by.run_layers(k)
        if speak and k in self.heads:
            by.speak(k)
        by.advance(k)
        self.width = usual
        self.passes[k] += 1

    def choose(self, positions, n_experts):
        """Choose and report the token after each position. Returns it, and the best one's log-probability and margin: three (n,)."""
        best, top, margin = (self.kernels or self).best(positions, n_experts)
        s = self.sampling
        if s.temperature == 0:
            return best, top, margin
        log_probs = self.product(positions, n_experts)
        tokens = draw(log_probs, s.temperature, s.top_k, s.top_p, s.seed, self.noise_rows.expand(len(positions)), positions + 1)
        self.report_choice(tokens, log_probs.gather(1, tokens[:, None])[:, 0])
        return tokens, top, margin

    def decide(self, k):
        """Choose the token after stage 0's last position by prefix k + 1; it is known from now on if prefix k + 1 is sure enough.

        Where it is not, stage 0 has nothing to run until another stage decides: a draft that is already on its way does nothing.
        Reports whether it is, the token and its log-probability.
        """
        after = self.cursors[1]                                             # (1,): where the token will stand
        token, top, margin = self.choose(after - 1, k + 1)
        if k < self.last and self.plan.forced_lifts is not None:
            sure = self.chances[after] >= self.plan.forced_lifts
        elif k < self.last and self.plan.exits:
            sure = (top.exp() if self.plan.score == "probability" else margin) >= self.plan.exits[k]
        elif self.plan.draft_gate > 0:
            sure = top.exp() >= self.plan.draft_gate
        else:
            sure = torch.ones_like(token)
        self.tokens[0, after] = token
        torch.add(after, sure, out=self.cursors[0])
        self.report[0, :1] = sure

    def judge_all(self, n):
        """Run the upper stages over n positions of each row, and choose (and report) what follows each. Returns the places, and the tokens."""
        for k in range(1, self.last + 1):
            for width in self.widths(n):
                self.stage(k, width=width)
        after = self.cursors[-1] if n == 1 else self.cursors[-1] + (self.offsets[:n] - (n - 1))
        return after, self.choose(after - 1, len(self.heads))[0]

    def verify(self, n):
        """Take the product's tokens after n positions up to the first that differs from its draft, and drop the rest. Reports how many."""
        after, tokens = self.judge_all(n)
        taken = 1
        if n > 1:
            agree = tokens[:-1] == self.tokens[0, after[:-1]]
            if self.plan.forced_acceptance is not None:
                agree = self.chances[after[:-1]] < self.plan.forced_acceptance
            taken = 1 + agree.long().cumprod(0).sum()
            self.cursors[1:] -= n - taken
        self.tokens[self.batch[:, 0], after] = tokens
        torch.add(self.cursors[1], 1, out=self.cursors[0])
        self.report[0, :1] = taken

    def follow(self, n):
        """Read n tokens that are there already, and report what the product would have chosen after each of these positions."""
        for _ in range(n):
            self.stage(0)
            self.cursors[0] += 1
        self.judge_all(n)

    def draft(self):
        """Stage 0 at the newest token, and its choice."""
        self.stage(0)
        self.decide(0)

    def cycle(self, n):
        """n passes of stage 0, then `verify`: from 1 to n tokens."""
        for _ in range(n - 1):
            self.draft()
        self.stage(0)
        self.verify(n)

    def widths(self, n):
        """Positions of a row in the passes that bring a stage up over n: as few passes as can be, each of whole tiles."""
        widest = WIDEST if self.kernels and self.n_rows == 1 else self.width
        return [min(widest, -(-left // self.width) * self.width) for left in range(n, 0, -widest)]

    def lift(self, k, width, newest, decides):
        """Stage k over waiting positions. It speaks where the `newest` is among them; prefix k + 1 may then decide."""
        self.stage(k, newest, width)
        if decides:
            self.decide(k)

    # -- the host's side -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, step, *args):
        """Start a step, by its graph where there are graphs; return a function that waits for its report, numpy (3, n)."""
        if self.kernels is None:
            getattr(self, step)(*args)
            return self.report.to("cpu", copy=True).numpy
        graph, host, passes = self.graphs.get((step, *args)) or self.capture(step, *args)
        graph.replay()
        self.passes = [a + b for a, b in zip(self.passes, passes)]
        buffer, event = host[0]
        host.rotate(-1)
        buffer.copy_(self.report, non_blocking=True)
        event.record()

        def wait():
            event.synchronize()
            return buffer.numpy().copy()
        return wait

    def capture(self, step, *args):
        """Record a step as a CUDA graph. Its first runs compile the kernels; they leave only garbage beyond the cursors."""
        began, before = time.perf_counter(), (self.tokens.clone(), self.cursors.clone(), self.sums.clone())
        counted = list(self.passes)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                getattr(self, step)(*args)
                for tensor, saved in zip((self.tokens, self.cursors, self.sums), before):
                    tensor.copy_(saved)
        torch.cuda.current_stream().wait_stream(side)
        self.passes = list(counted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            getattr(self, step)(*args)
        passes, self.passes = [a - b for a, b in zip(self.passes, counted)], counted
        host = deque((torch.zeros(self.report.shape, dtype=torch.float64, pin_memory=True), torch.cuda.Event()) for _ in range(3))
        self.graphs[step, *args] = graph, host, passes
        self.capture_seconds += time.perf_counter() - began
        return self.graphs[step, *args]

    @torch.no_grad()
    def choices(self, prompt, ids):
        """What the product would choose in the place of each of `ids`, given those before it: a list. Leaves every stage at their end."""
        self.begin([prompt])
        self.tokens[0, len(prompt):len(prompt) + len(ids)] = torch.tensor(ids, device=self.tokens.device)
        chosen = []
        for i in range(0, len(ids), ROWS):
            n = min(ROWS, len(ids) - i)
            chosen += self.start("follow", n)()[1, :n].astype(int).tolist()
        return chosen

    def flush(self):
        """Bring every stage up to stage 0."""
        for k in range(1, self.last + 1):
            for width in self.widths(int(self.cursors[1] - self.cursors[k + 1])):
                self.start("lift", k, width, False, False)


def chances(n, device):
    """n numbers in (0, 1), float64: pseudo-random, always the same, and so spread over every 200 that a share comes out as it was forced."""
    positions = torch.arange(-(-n // 200) * 200, device=device)
    rank = gumbel_noise(0, torch.zeros_like(positions), positions, 1).view(-1, 200).argsort(dim=-1).argsort(dim=-1)
    return ((rank + 0.5) / 200).flatten()[:n]


# ---------------------------------------------------------------------------------------------------------------
# Modes

Token = namedtuple("Token", "id log_prob stage depth")      # stage: that proposed it; depth: stages whose product decided it


def generate(engine, max_new_tokens):
    """Yield what each step adds, (a list of `Token`s per row, drafts judged), until rows have `max_new_tokens` or a few more. Rows do not stop here.

    The engine has begun. With graphs the next step is always on its way before the host reads the last one's report.
    """
    plan = engine.plan
    if plan.adaptive:
        yield from generate_adaptive(engine, max_new_tokens)
        return
    stage, depth, made, flying = plan.heads[-1], plan.heads[-1] + 1, 0, deque()
    while made < max_new_tokens:
        while len(flying) < engine.in_flight and made + sum(n for n, _ in flying) < max_new_tokens:    # those on their way may end the text
            n = draft_until_unsure(engine) if plan.draft_gate > 0 else plan.draft_len + 1
            flying.append((n, engine.start("verify" if plan.draft_gate > 0 else "cycle", n)))
        n, wait = flying.popleft()
        numbers, tokens, log_probs = wait()
        if engine.n_rows > 1:
            yield [[Token(int(tokens[row]), float(log_probs[row]), stage, depth)] for row in range(engine.n_rows)], 0
        else:                                                               # all but the last were stage 0's drafts
            last = int(numbers[0]) - 1
            yield [[Token(int(tokens[i]), float(log_probs[i]), stage if i == last else 0, depth) for i in range(last + 1)]], n - 1
        made += int(numbers[0])


def draft_until_unsure(engine):
    """Run stage 0 until it is not sure of a token or has drafted `draft_len`; return its passes. One that was on its way then does nothing."""
    flying, n = deque(), 0
    while n <= engine.plan.draft_len:
        while len(flying) < engine.in_flight and n + len(flying) <= engine.plan.draft_len:
            flying.append(engine.start("draft"))
        n += 1
        if not flying.popleft()()[0, 0]:
            break
    engine.passes[0] -= len(flying)
    return n


def generate_adaptive(engine, max_new_tokens):
    """As `generate`, with early exit. A token that left early leaves the upper stages behind; whoever needs them next brings them up."""
    waiting, flying = [0] * (engine.last + 1), deque()                      # positions that each stage has yet to run

    def run_ahead(left):
        while len(flying) < min(engine.in_flight, left):
            flying.append(engine.start("draft"))
    for left in range(max_new_tokens, 0, -1):
        run_ahead(left)
        sure, token, log_prob = flying.popleft()()[:, 0]
        waiting, k = [0] + [n + 1 for n in waiting[1:]], 0
        if not sure:
            engine.passes[0] -= len(flying)
            flying.clear()                                                  # they did nothing
        while not sure:
            k += 1
            decides = k == engine.last or (len(engine.plan.exits) > 0 and engine.plan.exits[k] < math.inf)     # else it cannot be sure
            widths = engine.widths(waiting[k])
            for width in widths[:-1]:
                engine.start("lift", k, width, False, False)
            wait, waiting[k] = engine.start("lift", k, widths[-1], True, decides), 0
            if k == engine.last:
                run_ahead(left - 1)                                         # it is sure
            if decides:
                sure, token, log_prob = wait()[:, 0]
        yield [[Token(int(token), float(log_prob), k, k + 1)]], 0


Run = namedtuple("Run", "ids depths seconds first cycles judged accepted")


def clock(device):
    """Seconds, by when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def decode_timed(engine, prompt, n_new):
    """Continue one prompt by at least n_new tokens: a `Run`. Seconds are of decoding alone, between two synchronisations; first: to the first token.

    judged: the accepted drafts and the first rejected one of each cycle.
    """
    device, tokens, first, cycles, judged = engine.tokens.device, [], None, 0, 0
    start = clock(device)
    engine.begin([prompt])
    begun = clock(device)
    for (new,), drafted in generate(engine, n_new):
        first = first or time.perf_counter() - start
        tokens += new
        cycles += 1
        judged += min(len(new), drafted)
    seconds = clock(device) - begun
    return Run([token.id for token in tokens], [token.depth for token in tokens], seconds, first, cycles, judged, len(tokens) - cycles)


# ---------------------------------------------------------------------------------------------------------------
# From flags to a plan

def make_plan(model_config, mode, stage=None, prefix=None, draft_len=4, draft_gate=0.0, wand_margin=False, routing_threshold=None,
              bounds=None, metrics=None):
    """The `Plan` of a mode. bounds: the checkpoint's p99 bounds, nats. metrics: its metrics.json, a dict. Raises ValueError where one lacks.

    WAND leaves after stage k where the margin exceeds the sum of the bounds of the stages that remain (or, in its margin form, where it reaches
    the stage's threshold); routing leaves after stage 0 where its top-1 probability reaches the threshold.
    """
    K = model_config.n_stage
    for name, given, its_mode in (("--stage", stage, "single"), ("--prefix", prefix, "prefix"), ("--routing-threshold", routing_threshold, "routing"),
                                   ("--draft-gate", draft_gate or None, "speculative"), ("--wand-margin", wand_margin or None, "wand")):
        if given is not None and mode != its_mode:
            raise ValueError(f"{name} {given} goes with --mode {its_mode}, not with --mode {mode}")
    stages = f"this checkpoint has {K} stage{'s'[:K > 1]}"
    if mode == "single":
        if stage is None or not 0 <= stage < K:
            raise ValueError(f"--mode single needs --stage from 0 to {K - 1}, not {stage}: {stages}")
        return Plan(range(stage, stage + 1))
    if mode == "prefix":
        if prefix is None or not 1 <= prefix <= K:
            raise ValueError(f"--mode prefix needs --prefix from 1 to {K}, not {prefix}: {stages}")
        return Plan(range(prefix))
    if mode == "full":
        return Plan(range(K))
    if K == 1:
        raise ValueError(f"--mode {mode} needs several stages: {stages}; use --mode full")
    if mode == "speculative":
        return Plan(range(K), draft_len=draft_len, draft_gate=draft_gate)
    missing = "calibrate this checkpoint first: python evaluate.py RUN"
    if mode == "wand" and not wand_margin:
        if not is_numbers(bounds, K - 1):
            raise ValueError(f"--mode wand needs {BOUNDS_KEY}, {K - 1} numbers, in config.json; {missing}")
        remaining = torch.tensor([sum(bounds[k:]) for k in range(K - 1)])
        return Plan(range(K), exits=tuple(torch.nextafter(remaining, torch.tensor(math.inf)).tolist()))     # ">" as ">=", in float32 as margins are
    if mode == "wand":
        found = get(metrics, ("wand", "margin", "thresholds"))
        if not is_numbers([0.0 if t is None else t for t in found] if isinstance(found, list) else None, K - 1):
            raise ValueError(f"--wand-margin needs wand.margin.thresholds, {K - 1} numbers, in metrics.json; {missing}")
        return Plan(range(K), exits=tuple(math.inf if t is None else t for t in found))     # null: no threshold keeps the cap
    routing = {"threshold": routing_threshold} if routing_threshold is not None else get(metrics, ("routing",))
    found = get(routing, ("threshold",))
    if not (is_numbers([found], 1) or (found is None and isinstance(routing, dict) and "threshold" in routing)):    # null: none keeps the cap
        raise ValueError(f"--mode routing needs --routing-threshold, or routing.threshold in metrics.json; {missing}")
    return Plan(range(K), exits=(math.inf if found is None else found, *[math.inf] * (K - 2)), score="probability")


def is_numbers(values, n):
    return isinstance(values, (list, tuple)) and len(values) == n and all(type(v) in (int, float) and math.isfinite(v) for v in values)


# ---------------------------------------------------------------------------------------------------------------
# Text

def count_new_tokens(config, encoded, asked, default=64):
    """How many tokens to generate after each of these prompts of ids: `asked`, or where that is None up to `default`, as far as the context goes.

    The last token is never fed back. Raises ValueError where the context has no room.
    """
    longest = max(map(len, encoded))
    left = config.sequence_len + 1 - longest
    if left < (asked or 1):
        raise ValueError(f"the prompt has {longest} tokens of a context of {config.sequence_len}: " + (
            f"{left} are left, so --max-new-tokens {asked} is too many" if left > 0 else "it is too long; shorten it"))
    return asked or min(default, left)


def complete(model, tokenizer, prompts, max_new_tokens, plan, sampling=Sampling(), n_samples=1, fast=False, on_text=None):
    """Yield the continuations of texts, `n_samples` of each in order, as dicts. on_text: called with the first one's text as it comes, the prompt's first.

    max_new_tokens: None is 64, as far as the context goes.
    prompt, completion, token_ids, log_probs (nats), stages (that proposed each token), depths (stages that decided it), stopped ("bos" or
    "length"), and for speculation cycles, drafts judged and accepted. Half a character is held back until the rest comes.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    max_new_tokens = count_new_tokens(model.config, encoded, max_new_tokens)
    if on_text:
        on_text(prompts[0])
    n, size, engine = len(prompts) * n_samples, 1 if plan.draft_len or plan.adaptive else ROWS, None
    for first in range(0, n, size):
        group = range(first, min(first + size, n))                          # number i is a sample of prompt i // n_samples
        if engine is None or engine.n_rows != len(group):
            engine = Engine(model, plan, len(group), sampling, fast)
        engine.begin([encoded[i // n_samples] for i in group], group)
        out, decoder = [[] for _ in group], codecs.getincrementaldecoder("utf-8")(errors="replace")
        for new, stopped, counts in continue_rows(engine, max_new_tokens, tokenizer.bos):
            for tokens, more in zip(out, new):
                tokens += more
            if on_text and first == 0:
                on_text(decoder.decode(tokenizer.decode_bytes([token.id for token in new[0]])))
        if on_text and first == 0:
            on_text(decoder.decode(b"", final=True))
        for i, tokens, met_bos in zip(group, out, stopped):
            ids = [token.id for token in tokens]
            yield {"prompt": prompts[i // n_samples], "completion": tokenizer.decode(ids), "token_ids": ids,
                   "log_probs": [token.log_prob for token in tokens], "stages": [token.stage for token in tokens],
                   "depths": [token.depth for token in tokens], "stopped": "bos" if met_bos else "length", **(counts if plan.draft_len else {})}


def continue_rows(engine, max_new_tokens, bos):
    """Yield (new tokens of each row, which rows have met `bos`, counts) step by step, cut at bos and at `max_new_tokens`.

    counts: cycles, drafts judged (the accepted and the first rejected of each cycle) and accepted, over the cycles that were not cut.
    """
    stopped, made, counts = [False] * engine.n_rows, 0, {"cycles": 0, "judged": 0, "accepted": 0}
    for new, drafted in generate(engine, max_new_tokens):
        whole = made + len(new[0]) <= max_new_tokens
        new = [tokens[:max_new_tokens - made] for tokens in new]
        made += len(new[0])
        kept = []
        for row, tokens in enumerate(new):
            ids = [] if stopped[row] else [token.id for token in tokens]
            if bos in ids:
                stopped[row], ids = True, ids[:ids.index(bos)]
            kept.append(tokens[:len(ids)])
        if whole and not all(stopped):
            counts["cycles"] += 1
            counts["judged"] += min(len(new[0]), drafted)
            counts["accepted"] += len(new[0]) - 1
        yield kept, stopped, counts
        if all(stopped):
            break


# ---------------------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class SampleConfig:
    prompt: str = flag("", "text to continue; empty is bos alone: a new document")
    prompt_file: str = flag(None, "continue each line of this UTF-8 file instead (- is standard input)")
    mode: str = flag("full", "which experts speak: full, single (--stage), prefix (--prefix), wand, routing or speculative", choices=MODES)
    stage: int = flag(None, "the one stage of --mode single, counted from 0")
    prefix: int = flag(None, "how many first stages --mode prefix combines, 1 to K")
    draft_len: int = flag(4, "tokens that stage 0 drafts in --mode speculative before the product judges them")
    draft_gate: float = flag(0.0, "draft no further after a token whose probability at stage 0 is below this (0: never stop early)")
    wand_margin: bool = flag(False, "in --mode wand leave by the fitted margins of metrics.json instead of the p99 bounds")
    routing_threshold: float = flag(None, "in --mode routing take stage 0 where its top-1 probability is at least this (default: from metrics.json)")
    max_new_tokens: int = flag(None, "tokens to generate at most (default: 64, or 256 with --bench, as far as the context goes)")
    temperature: float = flag(0.8, "0 is greedy; 1 samples the model's own distribution")
    top_k: int = flag(0, "sample among the k most probable tokens (0 = all)")
    top_p: float = flag(1.0, "sample among the most probable tokens that hold this probability together (1 = all)")
    num_samples: int = flag(1, "samples of each prompt")
    seed: int = flag(0, "of the noise; the same seed gives the same text in every mode that is lossless (full, speculative)")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float64"))
    compile: bool = flag(False, "decode by CUDA graphs of Triton kernels: fast, after some seconds of compilation")
    json: bool = flag(False, "print one JSON object per sample: texts, ids, log-probabilities, stages, depths, counts")
    bench: bool = flag(False, "measure the speed of every mode, greedily, on the prompts (default: three short ones); the last line is JSON")
    bench_repeats: int = flag(5, "timed rounds of --bench")
    preset: str = flag(None, "with --bench instead of a checkpoint: random weights in this preset's shape", choices=tuple(PRESETS))
    forced_acceptance: float = flag(None, "with --bench: accept this share of drafts, in steps of 0.005, whatever they are: speed alone")
    forced_lifts: float = flag(None, "with --bench: let this share of tokens, in steps of 0.005, need the upper stages: speed alone")

    def __post_init__(self):
        shares = [(name, getattr(self, name) is None or 0 <= getattr(self, name) <= 1, "be from 0 to 1")
                  for name in ("draft_gate", "routing_threshold", "forced_acceptance", "forced_lifts")]
        for name, ok, must in (("temperature", 0 <= self.temperature < float("inf"), "be a finite number, 0 or more"),
                               ("draft_len", 1 <= self.draft_len < CHOSEN, f"be from 1 to {CHOSEN - 1}; --mode full drafts nothing"),
                               ("top_k", self.top_k >= 0, "be 0 or more"), ("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1"),
                               ("num_samples", 1 <= self.num_samples <= 10 ** 6, "be from 1 to 1,000,000"),
                               ("bench_repeats", self.bench_repeats >= 1, "be at least 1"),
                               ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "be at least 1"),
                               ("seed", 0 <= self.seed < 2 ** 63, "be 0 or more and below 2^63"), *shares):
            if not ok:
                raise ValueError(f"{spelled(name)} {getattr(self, name)} must {must}")
        for name in ("preset", "forced_acceptance", "forced_lifts"):
            if getattr(self, name) is not None and not self.bench:
                raise ValueError(f"{spelled(name)} {getattr(self, name)} goes with --bench")


def read_prompts(path):
    """The lines of a UTF-8 file, or of standard input for "-". Raises ValueError where it is not UTF-8 or empty."""
    if not path or path == "-" and sys.stdin is None:
        raise ValueError(f"--prompt-file {path!r}: {'standard input is closed' if path else 'the name is empty'}; give a file, or - and "
                         f"standard input")
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"--prompt-file {path} is not UTF-8: byte {e.start} is {e.object[e.start]:#04x}; convert it first") from None
    if not text:
        raise ValueError(f"--prompt-file {path} is empty; give one prompt a line")
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")        # line ends of Windows are no part of a prompt, nor is a BOM


def main(argv=None):
    given = parse_flags(SampleConfig, __doc__, argv, positionals=[("checkpoint", "?", "a step-XXXXX directory, or a run: its newest")])
    path = given.pop("checkpoint")
    config = SampleConfig(**given)
    misplaced = ("mode", "stage", "prefix", "draft_gate", "wand_margin", "routing_threshold", "temperature", "top_k", "top_p", "num_samples",
                 "compile", "json") if config.bench else ("bench_repeats",)
    for name in misplaced:
        if name in given:
            why = "does nothing with --bench, which measures every mode, greedily" if config.bench else "goes with --bench"
            raise ValueError(f"{spelled(name)} {why}; leave it out")
    if "draft_len" in given and not config.bench and config.mode != "speculative":
        raise ValueError(f"--draft-len {config.draft_len} goes with --mode speculative, not with --mode {config.mode}; leave it out")
    if (path is None) == (config.preset is None):
        raise ValueError("give a checkpoint (a step-XXXXX directory or a run), or --bench --preset for random weights"
                         + ", not both" * (path is not None))
    device, dtype = choose_device(config.device, config.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)
    if config.compile and device.type != "cuda":
        raise ValueError(f"--compile needs a CUDA device, not {device}; leave it out")
    if config.prompt_file is not None and config.prompt:
        raise ValueError("--prompt and --prompt-file exclude each other; write the prompt into the file")
    prompts = [clean_text(config.prompt)] if config.prompt_file is None else read_prompts(config.prompt_file)       # argv may not be UTF-8
    if config.preset:
        from bench import random_model
        model, record, metrics = random_model(config.preset, device, dtype, config.seed), {}, {}
        tokenizer = Tokenizer.load(vocab_size=model.config.vocab_size)
    else:
        path = resolve_checkpoint(path)
        model, record, _ = load_checkpoint(path, device, dtype)
        tokenizer, metrics = Tokenizer.load(path), read_object(path / "metrics.json")
        if tokenizer.sha256 != record["tokenizer"]["sha256"]:
            raise ValueError(f"the tokenizer in {path} is not the one that its config.json names; use another step")
    with attention_backends(device):
        if config.bench:
            from bench import bench_decoding                                # which imports this file
            bench_decoding(model, tokenizer, prompts, config, record.get(BOUNDS_KEY), metrics, path)
            return
        plan = make_plan(model.config, config.mode, config.stage, config.prefix, config.draft_len, config.draft_gate, config.wand_margin,
                         config.routing_threshold, record.get(BOUNDS_KEY), metrics)
        streaming = not config.json and len(prompts) * config.num_samples == 1
        samples = complete(model, tokenizer, prompts, config.max_new_tokens, plan,
                           Sampling(config.temperature, config.top_k, config.top_p, config.seed), config.num_samples, config.compile,
                           on_text=(lambda text: print(text, end="", flush=True)) if streaming else None)
        for number, sample in enumerate(samples):
            if streaming:
                print()
            else:
                print(json.dumps(sample) if config.json else f"--- sample {number} ---\n{sample['prompt']}{sample['completion']}", flush=True)


if __name__ == "__main__":
    run(main)
