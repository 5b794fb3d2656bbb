"""
Triton kernels of decoding on CUDA: fast twins of the steps of `Stages` in sample.py, six kernels a layer.

Decoding one token reads every weight once and computes next to nothing, so its time is that of reading. A
pass of a stage therefore takes a tile of 16 rows, the fewest that the tensor cores multiply, for the price of
one.

Rows. A pass has T positions of each batch row b. Its row r = b * T + t is position begin[b] + t, where
`begin` is the stage's cursor and `end` that of the stage below. A row is live, that is has work, while its
position is before end[b]; the others are skipped or masked, and what they leave is never read. The kernels
read both cursors from the device, so one CUDA graph serves every state. Cursors stand still from a stage's
first kernel to its last; `advance` moves the stage's own.

    one batch row:  T = 16, 32, 48 or 64 (1 to 4 tiles, which read the weights together); row r is position t
    several:        T = 1 and one tile; row r is batch row r

Drafts need no exact products, since all stages judge them by tiles. So stage 0 drafts by weights of one byte,
one position at a time, which needs no tensor cores: `draft_matvec` in place of `skinny_matmul`.

Layouts. Activations inside a stage lie by row, (rows, width). What outlives a pass lies by place: the
boundary activations of a stage, the tokens and the cache have `S` slots a batch row, and a row's place is b *
S + position.

Sums have a fixed order that does not know how many rows are live, so a position's bits do not depend on what
is computed beside it. `skinny_matmul` may cut the inner dimension into SPLIT parts that are multiplied at
once and then added. RMS norm needs the sum of squares of a whole row before a product: every block of columns
of the product before leaves its own partial sum, and the factor is applied to the result of the product.

Programmatic dependent launch. A kernel is started while the one before it still runs: the earlier one says so
by `gdc_launch_dependents`, and the later one must not read its results before `gdc_wait`. Between the two a
matrix product asks for its first weights, which no kernel changes. So a kernel calls `gdc_wait` before it
returns in every case, and kernels end in order.
"""
import functools
import math
import weakref

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model import QK_SCALE, SOFTCAP

CHUNK = 64              # cache slots that one program of `attend` reads
PART = 16               # chunks that `add_chunks` reads at once
EPS = tl.constexpr(torch.finfo(torch.float32).eps)


# --------------------------------------------------------------------------------------------------
# Kernels

@triton.jit
def live_rows(begin, end, r, S, T):
    """(bool, int64) of rows r: whether they are live, and their places."""
    # from L2: L1 may hold cursors from before this kernel's start
    first = tl.load(begin + r // T, cache_modifier=".cg")
    live = first + r % T < tl.load(end + r // T, cache_modifier=".cg")
    return live, (r // T) * S + first + r % T


@triton.jit
def enter_stage(tokens, embedding, before, x0, out, out_squares, begin, end, a, b, S, C: tl.constexpr,
                C2: tl.constexpr, T, PARTS: tl.constexpr, FIRST: tl.constexpr):
    """out = a before + b x0 of each row, and its sum of squares: the entry of a stage's first layer.

    before, x0: by place; out: by row. FIRST (stage 0): make x0, the normalised embedding, which is `before`
    too.
    """
    gdc_wait()
    # only after the wait: then the cursors stand still for all kernels of the stage
    gdc_launch_dependents()
    r = tl.program_id(0)
    c = tl.arange(0, C2)
    parts = tl.arange(0, PARTS)
    # unused rows are computed too: what they leave lies beyond the cursor
    _, place = live_rows(begin, end, r, S, T)
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
    tl.store(out_squares + r * PARTS + parts, tl.where(parts == 0, square, 0.0))


@triton.jit
def finish(y, residual, first, a, b, dtype: tl.constexpr, RELU2: tl.constexpr, CAP: tl.constexpr):
    """f of `skinny_matmul`, from RELU2 to x0. residual, first: of the same places, or None."""
    if RELU2:
        y = tl.maximum(y, 0.0) * tl.maximum(y, 0.0)
    if CAP > 0:
        y = CAP - 2 * CAP / (tl.exp(y * (2 / CAP)) + 1.0)                   # CAP tanh(y / CAP)
    if residual is not None:
        y += residual.to(tl.float32)
    if first is not None:
        y = a * y.to(dtype).to(tl.float32) + b * first.to(tl.float32)
    return y


@triton.jit
def skinny_matmul(x, weight, out, x_squares, residual, x0, out_sums, begin, end, a, b, S, N,
                  K: tl.constexpr, T, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                  SPLIT: tl.constexpr, PARTS: tl.constexpr, OUT_PARTS: tl.constexpr,
                  RELU2: tl.constexpr, CAP: tl.constexpr, OUT_PLACED: tl.constexpr):
    """out = f(x @ weight.T) for a tile of ROWS rows and BLOCK_N columns. x (rows, K); weight (N, K); out
    (rows, N).

    f, in this order, where what it needs is given (None is left out at compile time):
      x_squares (rows, PARTS)     RMS-normalise x by these partial sums of squares
      RELU2                       relu^2
      CAP                         softcap; for a head, whose x lies by place
      residual (rows, N)          add it
      x0 (by place)               a out + b x0: the entry of the next layer
      out_sums (rows, OUT_PARTS)  leave each block's sum of out^2 there, or with CAP of exp(out)
    OUT_PLACED: out lies by place, not by row.
    """
    # tiles of one block of columns are neighbours: its weights come from memory once, then from L2
    tile = tl.program_id(0)
    block = tl.program_id(1)
    r = tile * ROWS + tl.arange(0, ROWS)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    gdc_launch_dependents()
    # ask for the first weights, 8 lines of 128 bytes a row, while the kernel before this one still runs
    lines = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + (tl.arange(0, 8) * 64)[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32,
                              is_pure=False, pack=1)
    live, place = live_rows(begin, end, r, S, T)
    gdc_wait()
    # no live rows in this tile: an earlier draft was rejected
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return

    # what f will need
    mask = live[:, None] & (n < N)[None, :]
    by_row = r[:, None] * N + n[None, :]
    by_place = tl.where(live, place, 0)[:, None] * N + n[None, :]
    if x_squares is not None:
        squares = tl.load(x_squares + r[:, None] * PARTS + tl.arange(0, PARTS)[None, :])
    if residual is not None:
        residual = tl.load(residual + by_row, mask=mask, other=0.0)
    if x0 is not None:
        x0 = tl.load(x0 + by_place, mask=mask, other=0.0)

    # the product, in float32
    x += tl.where(live, place if CAP > 0 else r, 0) * K                    # (ROWS,) pointers
    weight += n.to(tl.int64) * K                                            # (BLOCK_N,)
    if SPLIT > 1:
        part = tl.arange(0, SPLIT)[:, None, None] * (K // SPLIT)
        acc = tl.zeros((SPLIT, ROWS, BLOCK_N), tl.float32)
        for i in range(0, K // SPLIT, BLOCK_K):
            x_tile = tl.load(x[None, :, None] + part + (i + k)[None, None, :], mask=live[None, :, None],
                             other=0.0)
            w_tile = tl.load(weight[None, None, :] + part + (i + k)[None, :, None],
                             mask=(n < N)[None, None, :], other=0.0)
            acc = tl.dot(x_tile, w_tile, acc)
        y = tl.sum(acc, axis=0)
    else:
        # the weights on the left, where the tensor cores want 64 rows
        acc = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for i in range(0, K, BLOCK_K):
            x_tile = tl.load(x[None, :] + (i + k)[:, None], mask=live[None, :], other=0.0)
            w_tile = tl.load(weight[:, None] + (i + k)[None, :], mask=(n < N)[:, None], other=0.0)
            acc = tl.dot(w_tile, x_tile, acc)
        y = tl.trans(acc)

    # f
    if x_squares is not None:
        y *= tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)[:, None]
    y = finish(y, residual, x0, a, b, out.dtype.element_ty, RELU2, CAP)
    if CAP > 0:
        tl.store(out_sums + r * OUT_PARTS + block, tl.sum(tl.where(mask, tl.exp(y), 0.0), axis=1))
    elif out_sums is not None:
        # of the numbers as they are stored
        y = tl.where(mask, y, 0.0).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out_sums + r * OUT_PARTS + block, tl.sum(y * y, axis=1))
    tl.store(out + (by_place if OUT_PLACED else by_row), y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def draft_matvec(x, weight, scales, out, residual, x0, begin, a, b, N, K: tl.constexpr, SLOTS: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, RELU2: tl.constexpr,
                 CAP: tl.constexpr, OUT_PLACED: tl.constexpr):
    """As `skinny_matmul`, for drafts: the next position of one row alone, and weights of one byte.

    weight: int8 (N, K), whose rows are to be multiplied by scales (N, 1). NORM: RMS-normalise x, of which a
    program reads all. A head's out lies by position modulo SLOTS.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    gdc_launch_dependents()
    # the first weights, while the kernel before this one still runs
    is_row = (n < N)[:, None]
    weight += n.to(tl.int64)[:, None] * K + k
    tile = tl.load(weight, mask=is_row & (k < K), other=0)
    scale = tl.load(scales + n, mask=n < N, other=0.0)
    gdc_wait()

    place = tl.load(begin, cache_modifier=".cg")
    by_place = place * N + n
    if CAP > 0:
        x += place * K
    if residual is not None:
        residual = tl.load(residual + n, mask=n < N)
    if x0 is not None:
        x0 = tl.load(x0 + by_place, mask=n < N)
    # x as often as there are rows, so that every thread loads what it multiplies
    x += tl.zeros((BLOCK_N, 1), tl.int32) + k
    acc = 0.0
    squares = 0.0
    for i in tl.static_range(0, K, BLOCK_K):
        now = tile
        if i + BLOCK_K < K:
            tile = tl.load(weight + i + BLOCK_K, mask=is_row & (k < K - i - BLOCK_K), other=0)
        piece = tl.load(x + i, mask=k < K - i, other=0.0).to(tl.float32)
        # words become floating-point numbers faster than bytes do
        products = (now.to(tl.int32) << 24).to(tl.float32) * piece
        # no sum with 0.0: it would cost registers, and so loads in flight
        acc = products if i == 0 else acc + products
        squares = piece * piece if i == 0 else squares + piece * piece
    y = tl.sum(acc, axis=1) * (scale / 2 ** 24)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=1) / K + EPS)
    y = finish(y, residual, x0, a, b, out.dtype.element_ty, RELU2, CAP)
    at = (place % SLOTS) * N + n if CAP > 0 else by_place if OUT_PLACED else n
    tl.store(out + at, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def rotated(vector, cos, sin, mask, D: tl.constexpr, dtype: tl.constexpr):
    """Load float32 vectors as two halves; give them rotary position and QK-norm."""
    first = tl.load(vector, mask=mask, other=0.0)
    second = tl.load(vector + D // 2, mask=mask, other=0.0)
    c = tl.load(cos, mask=mask, other=0.0)
    s = tl.load(sin, mask=mask, other=0.0)
    one = first * c + second * s
    two = second * c - first * s
    scale = tl.rsqrt((tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)) / D + EPS)[:, None]
    return (one * scale).to(dtype), (two * scale).to(dtype)


@triton.jit
def attend(qkv, keys, values, value_embed, tokens, cos, sin, begin, end, partial, total, scale, S, NQ, T,
           M: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr,
           CHUNK: tl.constexpr):
    """Attention of a tile's queries to one chunk of cache slots, for one key-value head of one batch row.

    qkv: (rows, NQ), by row, holds queries, keys, values and gate logits. Keys and values of this pass's own
    positions are computed in the chunk where they belong, and cached there. M: queries of a tile, G2 (G
    rounded up to a power of two) for each of its positions. partial: sum of exp(score) v of the chunk; total:
    sum of exp(score). QK-norm bounds |score| (16.3 at D = 128), so no maximum is subtracted and chunks just
    add up.
    """
    gdc_launch_dependents()
    HALF: tl.constexpr = D // 2
    pair = tl.program_id(0)
    chunk = tl.program_id(1)
    tile = tl.program_id(2)
    b = pair // H_KV
    h = pair % H_KV
    # the cursors stand still, and the slots before them were written before the stage's first kernel
    start = tl.load(begin + b, cache_modifier=".cg")
    n_live = tl.minimum(tl.load(end + b, cache_modifier=".cg") - start, T)
    # a chunk that no live query can see, or a tile without live rows
    if (chunk * CHUNK >= start + n_live) | (tile * (M // G2) >= n_live):
        gdc_wait()
        return
    half = tl.arange(0, HALF)[None, :]
    whole = tl.arange(0, D)[None, :]

    # keys and values of earlier passes, from the cache
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    is_cached = (slot < start)[:, None]
    place = ((b * S + slot) * H_KV + h)[:, None] * D
    key_1 = tl.load(keys + place + half, mask=is_cached, other=0.0)
    key_2 = tl.load(keys + place + HALF + half, mask=is_cached, other=0.0)
    value = tl.load(values + place + whole, mask=is_cached, other=0.0)
    gdc_wait()

    # queries: position t of the pass, attention head g of the group
    m = tl.arange(0, M)
    t = tile * (M // G2) + m // G2
    g = m % G2
    is_query = ((t < n_live) & (g < G))[:, None]
    query = qkv + (b * T + t)[:, None] * NQ + (h * G + g)[:, None] * D + half
    angle = (start + t)[:, None] * HALF + half
    query_1, query_2 = rotated(query, cos + angle, sin + angle, is_query, D, keys.dtype.element_ty)

    # keys and values of this pass, where the chunk holds some
    if chunk * CHUNK + CHUNK > start:
        slot_is_new = (slot >= start) & (slot < start + n_live)
        is_new = slot_is_new[:, None]
        row = qkv + (b * T + slot - start)[:, None] * NQ
        new_key = row + (G * H_KV + h) * D + half
        new_angle = slot[:, None] * HALF + half
        new_key_1, new_key_2 = rotated(new_key, cos + new_angle, sin + new_angle, is_new, D,
                                       keys.dtype.element_ty)
        new_value = tl.load(row + (G * H_KV + H_KV + h) * D + whole, mask=is_new, other=0.0)
        if value_embed is not None:
            token = tl.load(tokens + b * S + slot, mask=slot_is_new, other=0)
            gate = tl.load(row + (G + 2) * H_KV * D + h, mask=is_new, other=0.0)
            embed = tl.load(value_embed + (token * H_KV + h)[:, None] * D + whole, mask=is_new, other=0.0)
            new_value += 3.0 / (1.0 + tl.exp(-gate)) * embed.to(tl.float32)
        key_1 = tl.where(is_new, new_key_1, key_1)
        key_2 = tl.where(is_new, new_key_2, key_2)
        value = tl.where(is_new, new_value.to(value.dtype), value)
        tl.store(keys + place + half, key_1, mask=is_new)
        tl.store(keys + place + HALF + half, key_2, mask=is_new)
        tl.store(values + place + whole, value, mask=is_new)

    # slots after a query's position weigh 0
    score = (tl.dot(query_1, tl.trans(key_1)) + tl.dot(query_2, tl.trans(key_2))) * scale
    weight = tl.where((slot[None, :] <= (start + t)[:, None]) & is_query, tl.exp(score), 0.0)
    at = (((pair * tl.num_programs(1) + chunk) * tl.num_programs(2) + tile) * M + m)[:, None]
    tl.store(partial + at * D + whole, tl.dot(weight.to(value.dtype), value), mask=is_query)
    tl.store(total + at, tl.sum(weight, axis=1)[:, None], mask=is_query)


@triton.jit
def add_chunks(partial, total, out, begin, end, S, CHUNKS, TILES, T, M: tl.constexpr, G: tl.constexpr,
               G2: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
               PART: tl.constexpr):
    """Attention's output for one row and attention head, from its chunks: (rows, H, D)."""
    gdc_launch_dependents()
    r = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    live, place = live_rows(begin, end, r, S, T)
    b = r // T
    query = (r % T) * G2 + head % G
    # none for an unused row: 0 / 0, which nothing reads
    n_chunks = tl.where(live, (place - b * S) // CHUNK + 1, 0)
    gdc_wait()
    y = tl.zeros((D,), tl.float32)
    weight = 0.0
    for first in range(0, n_chunks, PART):
        chunk = first + tl.arange(0, PART)
        reached = chunk < n_chunks
        at = (((b * H_KV + head // G) * CHUNKS + chunk) * TILES + query // M) * M + query % M
        y += tl.sum(tl.load(partial + at[:, None] * D + d[None, :], mask=reached[:, None], other=0.0), axis=0)
        weight += tl.sum(tl.load(total + at, mask=reached, other=0.0), axis=0)
    tl.store(out + (r * H_KV * G + head) * D + d, (y / weight).to(out.dtype.element_ty))


@triton.jit
def add_log_probs(logits, exp_sums, sums, begin, end, S, V: tl.constexpr, T, ROWS: tl.constexpr,
                  SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    """sums += logits - log(sum of exp(logits)) for the live rows; FIRST: = instead.

    sums: (., V); a row's is at its place modulo SLOTS, or at its number where SLOTS is 0.
    """
    gdc_launch_dependents()
    gdc_wait()
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live, place = live_rows(begin, end, r, S, T)
    slot = place % SLOTS if SLOTS else r
    parts = exp_sums + r[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    total = tl.sum(tl.load(parts, mask=live[:, None], other=1.0), axis=1)
    mask = live[:, None] & (v < V)[None, :]
    at = slot[:, None] * V + v[None, :]
    y = tl.load(logits + r[:, None] * V + v[None, :], mask=mask, other=0.0) - tl.log(total)[:, None]
    if not FIRST:
        y += tl.load(sums + at, mask=mask, other=0.0)
    tl.store(sums + at, y, mask=mask)


@triton.jit
def advance(begin, end, T):
    """Move a stage's cursor past the rows that it has run."""
    gdc_launch_dependents()
    gdc_wait()
    b = tl.program_id(0)
    tl.store(begin + b, tl.minimum(tl.load(begin + b) + T, tl.load(end + b)))


@triton.jit
def best_tokens(sums, positions, tokens, log_probs, margins, outcome, n_experts, WIDTH: tl.constexpr,
                V: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """By the product of each row's sum: the best token, its log-probability, and top-1 less top-2.

    Among equals the lowest id. The first two go into rows 1 and 2 of `outcome` (3, WIDTH) as well.
    """
    gdc_launch_dependents()
    gdc_wait()
    r = tl.program_id(0)
    row = sums + (tl.load(positions + r) % SLOTS if SLOTS else r) * V
    best = -float("inf")
    second = -float("inf")
    token = 0
    total = 0.0
    for i in range(0, V, BLOCK):
        v = i + tl.arange(0, BLOCK)
        y = tl.load(row + v, mask=v < V, other=-float("inf")) / n_experts
        total += tl.sum(tl.exp(y))
        top, where = tl.max(y, axis=0, return_indices=True, return_indices_tie_break_left=True)
        other = tl.max(tl.where(v == i + where, -float("inf"), y))
        second = tl.maximum(tl.maximum(second, other), tl.minimum(best, top))
        token = tl.where(top > best, i + where, token)
        best = tl.maximum(best, top)
    log_prob = best - tl.log(total)
    tl.store(tokens + r, token.to(tl.int64))
    tl.store(log_probs + r, log_prob)
    tl.store(margins + r, best - second)
    tl.store(outcome + WIDTH + r, token.to(tl.float64))
    tl.store(outcome + 2 * WIDTH + r, log_prob.to(tl.float64))


# --------------------------------------------------------------------------------------------------
# Launching

def block_sizes(N, K):
    """Sizes of a product's blocks and pipeline, by measurement at the shapes of `3b` (H100, H200)."""
    if N <= 3 * K and K % 256 == 0:
        # few columns: 16 a block, and K in four parts
        return dict(BLOCK_N=16, BLOCK_K=math.gcd(K // 4, 128), SPLIT=4, num_stages=6 if K > N else 4)
    return dict(BLOCK_N=64, BLOCK_K=math.gcd(K, 128), SPLIT=1, num_stages=4)


def pack(attn):
    """q, k, v (and gate logits, 16 rows with zeros beyond the gate's channels) as one matrix (NQ, C).

    The weights of the module itself become views of it.
    """
    linears = [attn.c_q, attn.c_k, attn.c_v]
    weights = [linear.weight for linear in linears]
    if attn.value_gate is not None:
        gate = attn.value_gate.weight                                       # (H_kv, gate channels)
        weights.append(F.pad(gate, (0, attn.c_q.weight.size(1) - gate.size(1), 0, 16 - gate.size(0))))
    packed = torch.cat(weights)
    for linear, rows in zip(linears, packed.split([len(weight) for weight in weights])):
        linear.weight.data = rows
    return packed


# by model, for all its engines: the four matrices of each layer, and its pair (resid_lambda, x0_lambda)
_packed = weakref.WeakKeyDictionary()


class StageKernels:
    """Launches the kernels: the methods and arguments of `Stages`, over the tensors of an engine.

    tokens: int64 (B, S). cursors: int64 (stages + 1, B), of which the kernels read `tile_rows` columns, so
    that many must be allocated. stream: (stages + 1, B, S, C). sums: float32; (slots, V) by position modulo
    slots for one batch row, which has as many rows in its widest pass, and (B, V) for several. outcome:
    float64 (3, n). cache: a KVCache of S slots. tile_rows: 16. The model must be one that `kernels_fit`
    accepts.
    """

    def __init__(self, model, tokens, cursors, stream, sums, outcome, cache, tile_rows):
        config = model.config
        C = config.n_embd
        self.model = model
        self.tokens = tokens
        self.cursors = cursors
        self.stream = stream
        self.sums = sums
        self.outcome = outcome
        self.cache = cache
        self.tile_rows = tile_rows
        self.is_rounded = False
        self.n_rows, self.n_slots = tokens.shape
        self.sum_slots = len(sums) if self.n_rows == 1 else 0
        max_rows = self.sum_slots or tile_rows
        if model not in _packed:
            _packed[model] = (
                [(pack(block.attn), block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
                 for block in model.blocks],
                [(block.resid_lambda.item(), block.x0_lambda.item()) for block in model.blocks])
        self.matrices, self.mixes = _packed[model]
        self.heads = model.merged_heads
        self.qkv_widths = [len(qkv_gate) for qkv_gate, *_ in self.matrices]

        # activations of a pass, by row; partial sums of each block of columns
        new = functools.partial(torch.zeros, device=tokens.device, dtype=model.compute_dtype)
        new_wide = functools.partial(torch.zeros, device=tokens.device, dtype=torch.float32)
        self.x = new(max_rows, C)
        self.middle = new(max_rows, C)
        self.attended = new(max_rows, C)
        self.hidden = new(max_rows, config.mlp_hidden)
        self.qkv = new_wide(max_rows, max(self.qkv_widths))
        self.logits = new_wide(max_rows, config.vocab_size)
        self.parts = triton.next_power_of_2(C // 16)
        self.x_squares = new_wide(max_rows, self.parts)
        self.middle_squares = new_wide(max_rows, self.parts)
        head_blocks = triton.cdiv(config.vocab_size, block_sizes(config.vocab_size, C)["BLOCK_N"])
        self.exp_sums = new_wide(max_rows, triton.next_power_of_2(head_blocks))

        # attention's sums over chunks, for the queries of every tile
        self.group = config.n_head // config.n_kv_head
        self.group2 = triton.next_power_of_2(self.group)
        self.chunks = triton.cdiv(self.n_slots, CHUNK)
        # as many for several rows, which need fewer: M decides in which order a query's sums are added up
        self.M = tile_rows * self.group2
        self.partial = new_wide(self.n_rows * config.n_kv_head, self.chunks, max_rows // tile_rows, self.M,
                                config.head_dim)
        self.total = torch.zeros_like(self.partial[..., 0])
        positions = torch.arange(self.n_slots, device=tokens.device).clamp(max=config.sequence_len - 1)
        self.cos = model.cos[positions].contiguous()
        self.sin = model.sin[positions].contiguous()

        # what `best` found
        self.best_token = torch.zeros(outcome.size(1), dtype=torch.int64, device=tokens.device)
        self.best_log_prob = new_wide(outcome.size(1))
        self.margin = new_wide(outcome.size(1))

    def round_weights(self, quantize):
        """As `Stages.round_weights`; then passes are of one position, and T is ignored."""
        self.is_rounded = True
        self.matrices = [[quantize(matrix) for matrix in self.matrices[layer]]
                         for layer in self.model.layers_of_stage[0]]
        self.heads = [quantize(self.heads[0])]

    def multiply(self, k, T, x, weight, out, x_squares=None, residual=None, mix=None, out_sums=None,
                 relu2=False, cap=0.0, out_placed=False):
        """Launch `skinny_matmul` for the next T positions of stage k. mix: (a, b) of the next layer.

        weight: rounded, a pair of integers and scales, which takes `draft_matvec`.
        """
        a, b = mix or (0.0, 0.0)
        x0 = self.stream[0] if mix else None
        if self.is_rounded:
            integers, scales = weight
            N, K = integers.shape
            # by measurement on an H200 at the shapes of `3b`
            rows, columns = (2, 1024) if N == K else (8, 512)
            draft_matvec[(triton.cdiv(N, rows),)](
                x, integers, scales, out, residual, x0, self.cursors[k + 1], a, b, N, K, SLOTS=self.sum_slots,
                BLOCK_N=rows, BLOCK_K=columns, NORM=x_squares is not None, RELU2=relu2, CAP=cap,
                OUT_PLACED=out_placed, num_warps=8 if N < K else 4, launch_pdl=True)
            return
        N, K = weight.shape
        blocks = block_sizes(N, K)
        skinny_matmul[(triton.cdiv(T, self.tile_rows), triton.cdiv(N, blocks["BLOCK_N"]))](
            x, weight, out, x_squares, residual, x0, out_sums,
            self.cursors[k + 1], self.cursors[k], a, b, self.n_slots, N, K, T=T, ROWS=self.tile_rows,
            PARTS=self.parts, OUT_PARTS=0 if out_sums is None else out_sums.size(1), RELU2=relu2, CAP=cap,
            OUT_PLACED=out_placed, **blocks, num_warps=4, launch_pdl=True)

    def run_layers(self, k, T):
        """As `Stages.run_layers`."""
        if self.is_rounded:
            T = 1
        model = self.model
        config = model.config
        begin = self.cursors[k + 1]
        end = self.cursors[k]
        layers = model.layers_of_stage[k]
        tiles = triton.cdiv(T, self.tile_rows)
        enter_stage[(self.n_rows * T,)](
            self.tokens, model.wte.weight, self.stream[k], self.stream[0], self.x, self.x_squares, begin, end,
            *self.mixes[layers[0]], self.n_slots, C=config.n_embd, C2=triton.next_power_of_2(config.n_embd),
            T=T, PARTS=self.parts, FIRST=k == 0, launch_pdl=True)
        for layer in layers:
            block = model.blocks[layer]
            qkv_gate, projection, fc, mlp_projection = self.matrices[layer]
            is_last = layer == layers[-1]
            # attention: queries, keys and values; chunks of the cache; their sum; the projection
            self.multiply(k, T, self.x, qkv_gate, self.qkv, x_squares=self.x_squares)
            embed = block.attn.value_embed
            shape = dict(T=T, M=self.M, G=self.group, G2=self.group2, H_KV=config.n_kv_head,
                         D=config.head_dim, CHUNK=CHUNK, launch_pdl=True)
            attend[(self.n_rows * config.n_kv_head, self.chunks, tiles)](
                self.qkv, self.cache.keys[layer], self.cache.values[layer],
                None if embed is None else embed.weight, self.tokens, self.cos, self.sin, begin, end,
                self.partial, self.total, QK_SCALE / math.sqrt(config.head_dim), self.n_slots,
                self.qkv_widths[layer], num_warps=8, **shape)
            add_chunks[(self.n_rows * T, config.n_head)](
                self.partial, self.total, self.attended, begin, end, self.n_slots, self.chunks, tiles,
                PART=PART, **shape)
            self.multiply(k, T, self.attended, projection, self.middle, residual=self.x,
                          out_sums=self.middle_squares)
            # MLP; the last layer's result is the boundary, any other's is mixed for the next layer
            self.multiply(k, T, self.middle, fc, self.hidden,
                          x_squares=self.middle_squares, relu2=True)
            self.multiply(k, T, self.hidden, mlp_projection,
                          self.stream[k + 1] if is_last else self.x, residual=self.middle,
                          mix=None if is_last else self.mixes[layer + 1], out_sums=self.x_squares,
                          out_placed=is_last)

    def add_log_probs(self, k, T, first):
        """As `Stages.add_log_probs`. By rounded weights logits are their sum: a draft is not normalised."""
        V = self.model.config.vocab_size
        self.multiply(k, T, self.stream[k + 1], self.heads[k], self.sums if self.is_rounded else self.logits,
                      x_squares=self.x_squares, cap=SOFTCAP, out_sums=self.exp_sums)
        if self.is_rounded:
            return
        add_log_probs[(triton.cdiv(V, 512), triton.cdiv(T, self.tile_rows))](
            self.logits, self.exp_sums, self.sums, self.cursors[k + 1], self.cursors[k], self.n_slots, V=V,
            T=T, ROWS=self.tile_rows, SLOTS=self.sum_slots, PARTS=self.exp_sums.size(1), BLOCK=512,
            FIRST=first, num_warps=4, launch_pdl=True)

    def advance(self, k, T):
        """As `Stages.advance`."""
        advance[(self.n_rows,)](self.cursors[k + 1], self.cursors[k], T=T, num_warps=1, launch_pdl=True)

    def best(self, positions, n_experts):
        """As `Stages.best`."""
        n = len(positions)
        best_tokens[(n,)](
            self.sums, positions, self.best_token, self.best_log_prob, self.margin, self.outcome, n_experts,
            WIDTH=self.outcome.size(1), V=self.model.config.vocab_size, SLOTS=self.sum_slots, BLOCK=2 ** 15,
            num_warps=32, launch_pdl=True)
        return self.best_token[:n], self.best_log_prob[:n], self.margin[:n]
