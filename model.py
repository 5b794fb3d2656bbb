"""
The per-stage Product-of-Experts (PoE) transformer, all of it in this file.

A decoder-only transformer is cut into K consecutive stages. Each stage has its own head and is a complete
next-token predictor. At inference the stages' log-probabilities are averaged and renormalised. With
x0 = norm(wte[token]), which enters stage 0 as x_{-1} and every block as a second input,

    x_k      = stage_k(x_{k-1}, x0)                                     residual stream after stage k
    logits_k = 15 tanh((W + W_k) norm(x_k) / 15)                        W: lm_head, W_k: lm_head_stages[k]
    log p_k  = log_softmax(logits_k)                                    one expert, "single s_k"
    log p    = log_softmax(K^(alpha-1) * sum_k log p_k)                 alpha = 0: geometric mean, "full"

Prefix K' is the same over the first K' stages. Training is local: each stage has its own cross-entropy, and
both x_k and x0 are detached at every stage boundary. So a parameter belongs to one stage: wte to stage 0, and
only W receives the gradients of all.

Three callers: training runs `backward_by_stage` (forward and backward of one stage at a time), evaluation
takes `boundaries` and then `log_probs` for a chunk of tokens, decoding runs `stage` over a `KVCache`.
`forward` is the whole equation for small inputs.

Not here: learning rates, optimizer groups, tokenizers, flags, sampling.

Sources: architecture after nanochat's GPT (github.com/karpathy/nanochat, MIT), with stages, per-stage heads
and stage-local scalars added and without its smear, backout and sliding windows; products of experts: Hinton
2002; per-stage training: Jeong 2026 (doi 10.5281/zenodo.19547653) and the Cognica-PoE-v1.0-3B model cards.

Shapes: B batch, T time, C channels, H attention heads, D head dim, K stages, V vocabulary, N = B * T tokens.
"""
import copy
import math
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import init
from torch.nn.attention import SDPBackend, sdpa_kernel

SOFTCAP = 15.0          # logits are squashed into (-15, 15)
QK_SCALE = 1.2 * 1.2    # sharper attention after QK-norm: 1.2 on each side, as in nanochat
GATE_CHANNELS = 12      # the value-embedding gate reads the first 12 channels, as in nanochat
ROPE_BASE = 100_000
# (token, vocabulary) pairs whose logits the loss holds at once. Measured: 2^20 fits a CPU's cache (1.35x the
# speed of one chunk); 4,096 tokens of 32,768 take 10.3 ms per 16,384 tokens and 0.8 GiB on an H100, all
# 16,384 at once 9.9 ms and 2.1 GiB.
LOSS_CHUNK_LOGITS = {"cpu": 2 ** 20, "cuda": 4096 * 32768}
OBJECTIVES = ("poe", "joint", "bp")
# floating point in 8 bits: 3 of mantissa for activations and weights, 2 and a wider range for gradients
E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
TINY = torch.finfo(torch.float32).tiny


# --------------------------------------------------------------------------------------------------
# Config

@dataclass(frozen=True)
class ModelConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    mlp_hidden: int
    # layers per stage, in order
    stage_layers: tuple
    # poe: local losses; joint: the same losses without the detach; bp: one loss at the top
    objective: str = "poe"

    def __post_init__(self):
        # a checkpoint's JSON has a list
        object.__setattr__(self, "stage_layers", tuple(self.stage_layers))
        if sum(self.stage_layers) != self.n_layer or min(self.stage_layers) < 1:
            raise ValueError(f"stage_layers {self.stage_layers} must be positive and sum to n_layer = "
                             f"{self.n_layer}")
        if self.objective == "bp" and self.n_stage != 1:
            raise ValueError(f"objective bp has one stage of all layers, not stage_layers "
                             f"{self.stage_layers}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd = {self.n_embd} must be an even multiple of n_head = {self.n_head}: "
                             f"rotary positions pair the channels of an attention head")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}")

    @property
    def n_stage(self):
        return len(self.stage_layers)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


# The matrices and one head of d12 hold 122 M parameters, of 1b 1.00 G, of 3b (the card's) 2.15 G.
#                        sequence   vocab  layers  width  heads  kv    mlp    stages
PRESETS = {
    "tiny": ModelConfig(      256,   1024,      5,    96,     3,  1,   384, (2, 1, 1, 1)),
    "d12":  ModelConfig(     2048,  32768,     12,   768,     6,  3,  4096, (6, 2, 2, 2)),
    "1b":   ModelConfig(     2048,  32768,     26,  1536,    12,  6,  9600, (13, 5, 4, 4)),
    "3b":   ModelConfig(     2048,  32768,     32,  2048,    16,  8, 12800, (16, 6, 5, 5)),
}


# --------------------------------------------------------------------------------------------------
# Pure functions: normalisation, rotary positions, heads, the product of experts

def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(config):
    """Return cos and sin, float32 (sequence_len, D / 2), of RoFormer's angles (arXiv 2104.09864).

    Computed on the CPU, so that training and decoding have the same bits on every device.
    """
    with torch.device("cpu"):
        inv_freq = ROPE_BASE ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        angles = torch.outer(torch.arange(config.sequence_len, dtype=torch.float32), inv_freq)
        return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by tables (T, 1, D/2) or (B, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


def softcap(logits):
    """15 tanh(z / 15) in float32 (float64 stays float64)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def combine(sum_log_probs, n_experts, alpha=0.0):
    """Combine experts: log p_alpha from the sum of their log-probabilities.

    sum_log_probs: float (..., V), nats, the sum over `n_experts` experts. alpha 0 is the geometric mean (the
    default everywhere), 0.5 the Bayesian square-root rule, 1 the pure sum (Log-OP).
    Returns float (..., V): S_alpha = K^alpha (1/K) sum_k log p_k, renormalised by logsumexp.
    """
    if n_experts == 1:
        # one expert is normalised already: prefix 1 is stage 0, to the last bit
        return sum_log_probs
    return F.log_softmax(sum_log_probs * n_experts ** (alpha - 1.0), dim=-1)


def cross_entropy_chunk(logits, targets, scale):
    """Return (sum of nats, d loss / d logits) of logits (n, V) before the softcap.

    The gradient is of the mean loss, that is of `scale` times the nats; the nats come without it.
    The softcap bounds exp() by e^15, so the softmax needs no maximum subtracted, in float32 too.
    """
    targets = targets[:, None]                                              # (n, 1)
    tanh = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)
    # (n, V), unnormalised probabilities
    weight = torch.exp(SOFTCAP * tanh)
    total = weight.sum(dim=-1, keepdim=True)                                # (n, 1)
    tanh_y = tanh.gather(1, targets)
    prob_y = weight.gather(1, targets) / total
    prob = weight * (scale / total)
    # p (1 - tanh^2): through the softcap
    grad = torch.addcmul(prob, prob * tanh, tanh, value=-1.0).to(logits.dtype)
    grad.scatter_(1, targets, ((prob_y - 1.0) * (1.0 - tanh_y ** 2) * scale).to(logits.dtype))
    return (total.log() - SOFTCAP * tanh_y).sum(), grad


def head_cross_entropy(x, weight, targets, weight_grad, scale, chunk_loss):
    """Softcapped cross-entropy of a head with its gradients, chunk by chunk, never holding all logits.

    The gradient is computed in the forward (as Liger's fused linear cross-entropy, arXiv 2410.10989, does),
    so there are three matrix products and no recomputation.
    x: (N, C), whose graph is not used. weight: (V, C), dtype of x. targets: int64 (N,). weight_grad: float32
    (V, C), mutated: the gradient is added to it in float32, since a sum over chunks in bf16 drifts. scale:
    factor on loss and gradients. chunk_loss: `cross_entropy_chunk` or its compiled form.
    Returns (loss, x_grad): 0-d tensor, scale * summed nats; (N, C) in the dtype of x.
    """
    x_grad = torch.empty_like(x)
    loss = 0.0
    step = max(1, LOSS_CHUNK_LOGITS[x.device.type] // len(weight))
    for i in range(0, len(x), step):
        x_chunk = x[i:i + step]
        nats, grad = chunk_loss(x_chunk @ weight.T, targets[i:i + step], scale)    # grad (n, V)
        loss += nats
        torch.mm(grad, weight, out=x_grad[i:i + step])
        add_weight_grad(weight_grad, grad, x_chunk)
    return loss * scale, x_grad


def attention_backends(device):
    """Context in which attention prefers cuDNN's kernel on CUDA, and is left alone elsewhere.

    Forward + backward on an H100 at (B, H / H_kv, T, D) = (8, 16 / 8, 2048, 128), torch 2.11: cuDNN 1.32 ms,
    flash 2.33 ms.
    """
    if torch.device(device).type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                        SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


# --------------------------------------------------------------------------------------------------
# Linear maps whose float32 weights are multiplied in the compute dtype

def add_weight_grad(weight_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """weight_grad (O, C) += grad^T x, summed in weight_grad's dtype by the product itself.

    grad: (n, O), x: (n, C), of one dtype.
    """
    if x.is_cuda and x.dtype != weight_grad.dtype:
        torch.addmm(weight_grad, grad.T, x, out_dtype=weight_grad.dtype, out=weight_grad)
    else:
        weight_grad.addmm_(grad.T.to(weight_grad.dtype), x.to(weight_grad.dtype))


# The same as an operator, through which alone a compiled backward may change weight_grad.
# `head_cross_entropy`, which is not compiled, calls the function itself: the operator's first call imports
# the compiler (2 s).
add_weight_grad_op = torch.library.custom_op("poe::add_weight_grad", add_weight_grad,
                                             mutates_args=("weight_grad",))


class Linear(nn.Linear):
    """A linear map without bias whose float32 master weight is cast to the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        # the weight in the compute dtype, or what `quantize` makes of it, kept by `PoE.cast_weights`
        self.cast = None

    def reset_parameters(self):
        """Do nothing: PoE.init_weights or a checkpoint sets every weight."""

    def forward(self, x):
        if not isinstance(self.cast, torch.Tensor):
            return F.linear(x, self.weight.to(x.dtype))
        return LinearByCast.apply(x, self.weight, self.cast, self.weight.grad)

    def keep_cast(self, dtype, cast=torch.Tensor.to):
        """Cast the weight for all passes until the next call, and make sure that it has a gradient.

        cast: a function of the weight and dtype.
        """
        self.cast = cast(self.weight, dtype)
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)


class LinearByCast(torch.autograd.Function):
    """x cast^T, whose backward adds to weight_grad in float32.

    Autograd alone would first round the gradient to the dtype of x. The weight itself is an argument so that
    there is a backward where x needs no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, cast, weight_grad):
        ctx.save_for_backward(x, cast, weight_grad)
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx, grad):
        x, cast, weight_grad = ctx.saved_tensors
        add_weight_grad_op(weight_grad, grad.flatten(0, -2), x.flatten(0, -2))
        return grad @ cast, None, None, None


# --------------------------------------------------------------------------------------------------
# Training the MLP in 8 bits (fp8)

def quantize(x, dtype):
    """Round a matrix to float8 with one scale, its largest magnitude over the largest number of the type.

    x: (n, c). dtype: E4M3 or E5M2. Returns (x8 (n, c), its transpose (c, n), scale: float32, 0-d); x is about
    x8 * scale. Two passes over x where compiled: one for the scale, one that writes both layouts.
    """
    largest = x.abs().amax().float()
    scale = (largest / torch.finfo(dtype).max).clamp(min=TINY)
    # on a GPU a division, or a root below, would take longer than the memory does
    x8 = (x.float() * scale.reciprocal()).to(dtype)
    return x8, x8.T.contiguous(), scale


def scaled_product(a, a_scale, b, b_scale, dtype):
    """a b^T of float8 numbers times their scales, in `dtype`. a: (n, c), b: (m, c).

    Unless for a result in float32, a GPU sums with some 14 bits of mantissa: over 12,800 terms that is off by
    0.3 % in norm, the rounded factors by 4 %.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=dtype,
                                use_fast_accum=dtype != torch.float32)
    return (a.float() @ b.float().T * (a_scale * b_scale)).to(dtype)


@torch.library.custom_op("poe::add_scaled_product", mutates_args=("weight_grad",))
def add_scaled_product(weight_grad: torch.Tensor, a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor,
                       b_scale: torch.Tensor) -> None:
    """weight_grad (n, m) += a b^T, as an operator for the same reason as `add_weight_grad_op`."""
    weight_grad += scaled_product(a, a_scale, b, b_scale, weight_grad.dtype)


class MLPByFloat8(torch.autograd.Function):
    """The MLP with all its products in float8; the backward adds to the weights' gradients in float32.

    product             types           result
    a   = x W1^T        E4M3, E4M3      dtype of x
    y   = h W2^T        E4M3, E4M3      dtype of x; h = relu(a)^2
    dh  = dy W2         E5M2, E4M3      dtype of x
    dW2 = dy^T h        E5M2, E4M3      float32
    dx  = da W1         E5M2, E4M3      dtype of x; da = dh 2 relu(a)
    dW1 = da^T x        E5M2, E4M3      float32

    Types after Micikevicius et al. 2022 (arXiv 2209.05433); a tensor's scale is of that very tensor, as in
    nanochat's fp8.py. The tensor cores read both sides along the dimension that is summed over, hence the
    transposes. The backward takes relu(a) from h, so that it needs no 16-bit tensor; where compiled, h alone
    is kept, and transposed again.
    """

    @staticmethod
    def forward(ctx, x, *kept):
        # gradients of both weights, then of each what `quantize` returned
        _, _, fc, _, fc_scale, proj, _, proj_scale = kept
        x8, x_t, x_scale = quantize(x.flatten(0, -2), E4M3)
        a = scaled_product(x8, x_scale, fc, fc_scale, x.dtype)
        h, h_t, h_scale = quantize(F.relu(a).square(), E4M3)
        ctx.save_for_backward(x_t, x_scale, h, h_t, h_scale, *kept)
        return scaled_product(h, h_scale, proj, proj_scale, x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x_t, x_scale, h, h_t, h_scale, *kept = ctx.saved_tensors
        fc_grad, proj_grad, _, fc_t, fc_scale, _, proj_t, proj_scale = kept
        dy, dy_t, dy_scale = quantize(grad.flatten(0, -2), E5M2)
        add_scaled_product(proj_grad, dy_t, dy_scale, h_t, h_scale)
        dh = scaled_product(dy, dy_scale, proj_t, proj_scale, grad.dtype)
        square = h.float() * h_scale
        da, da_t, da_scale = quantize(dh * 2 * square * (square + TINY).rsqrt(), E5M2)
        add_scaled_product(fc_grad, da_t, da_scale, x_t, x_scale)
        dx = scaled_product(da, da_scale, fc_t, fc_scale, grad.dtype)
        return dx.view(grad.shape), *[None] * len(kept)


# --------------------------------------------------------------------------------------------------
# Layers

class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Do nothing, as `Linear`."""


class KVCache:
    """Keys and values of every layer by absolute position, for decoding.

    Slots at or beyond a row's position are garbage that no query reads: a query at position p attends to the
    slots <= p, and every slot is written before a query reaches it. Rolling back is writing from an earlier
    position. Call `place` with the positions of the next tokens, then `PoE.stage` for each stage to run.
    """

    def __init__(self, config, batch_size, length, device, dtype):
        shape = (config.n_layer, batch_size, length, config.n_kv_head, config.head_dim)
        # zeros, since masked slots are multiplied by 0, and 0 * NaN is NaN
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.rows = torch.arange(batch_size, device=device)[:, None]     # (B, 1)

    def place(self, positions, end):
        """Set where the next tokens go. positions: int64 (B, T); end: int, more than every position."""
        self.positions = positions
        self.end = end
        slots = torch.arange(end, device=positions.device)
        self.mask = (slots <= positions[:, :, None])[:, None]            # (B, 1, T, end)

    def of_row(self, row):
        """The cache of one row, sharing its memory."""
        view = copy.copy(self)
        view.keys = self.keys[:, row:row + 1]
        view.values = self.values[:, row:row + 1]
        view.rows = self.rows[:1]
        return view

    def update(self, layer, k, v):
        """Write k, v (B, T, H_kv, D) of `layer` at `positions`; return all slots' (B, end, H_kv, D)."""
        self.keys[layer, self.rows, self.positions] = k
        self.values[layer, self.rows, self.positions] = v
        return self.keys[layer, :, :self.end], self.values[layer, :, :self.end]


class Attention(nn.Module):
    """Causal grouped-query attention: QK-norm, rotary positions and, on some layers, a value embedding."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_embed = None
        self.value_gate = None
        # every second layer has one, the last layer included (nanochat)
        if (config.n_layer - layer) % 2 == 1:
            self.value_embed = Embedding(config.vocab_size, kv_dim)
            self.value_gate = Linear(min(GATE_CHANNELS, config.n_embd), config.n_kv_head)

    def forward(self, x, idx, cos, sin, cache=None):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, -1, self.head_dim)                                   # (B, T, H, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)                                   # (B, T, H_kv, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)
        if self.value_embed is not None:
            embed = self.value_embed(idx).to(x.dtype).view(v.shape)
            gate = self.value_gate(x[..., :self.value_gate.in_features])                # (B, T, H_kv)
            if cache is not None:
                # a CPU's vector code and its code for the remainder differ in the last bit; rounding from
                # float64 hides that, so that a decoded row does not depend on its place in the pass
                gate = gate.double()
            v = v + (3 * torch.sigmoid(gate)).to(x.dtype)[..., None] * embed
        q = norm(rotate(q, cos, sin))
        k = norm(rotate(k, cos, sin))
        mask = None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                       # (B, end, H_kv, D)
            mask = cache.mask
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            scale=QK_SCALE / math.sqrt(self.head_dim), enable_gqa=q.size(2) != k.size(2))
        # y: (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_hidden)
        self.c_proj = Linear(config.mlp_hidden, config.n_embd)

    def forward(self, x):
        fc = self.c_fc
        proj = self.c_proj
        # validation multiplies in the dtype of x
        if isinstance(fc.cast, tuple) and torch.is_grad_enabled():
            return MLPByFloat8.apply(x, fc.weight.grad, proj.weight.grad, *fc.cast, *proj.cast)
        return proj(F.relu(fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        # scalars on the residual stream and on x0; they live in the block so that each belongs to one stage
        self.resid_lambda = nn.Parameter(torch.empty(()))
        self.x0_lambda = nn.Parameter(torch.empty(()))

    def forward(self, x, x0, idx, cos, sin, cache=None):
        x = self.resid_lambda * x + self.x0_lambda * x0
        x = x + self.attn(norm(x), idx, cos, sin, cache)
        x = x + self.mlp(norm(x))
        return x


# --------------------------------------------------------------------------------------------------
# The model

class PoE(nn.Module):
    """K stages, each with its own next-token distribution.

    `from_config` builds a checkpoint's model; else build on a device, then `init_weights`.
    compute_dtype: dtype of activations and matrix products; parameters stay float32 in training.
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)             # shared by all stages
        # a single stage needs no head beside the shared one
        n_own = config.n_stage if config.n_stage > 1 else 0
        self.lm_head_stages = nn.ModuleList(Linear(config.n_embd, config.vocab_size) for _ in range(n_own))
        ends = accumulate(config.stage_layers)
        self.layers_of_stage = [range(end - n, end) for end, n in zip(ends, config.stage_layers)]
        # kept by `cast_weights` and `freeze_for_inference`
        self.merged_heads = None
        # whether `cast_weights` makes the MLPs' casts for 8 bits
        self.fp8 = False
        # after `compile_regions`, their compiled forms
        self.chunk_loss = cross_entropy_chunk
        self.quantize = quantize
        for name, table in zip(("cos", "sin"), rotary_tables(config)):
            self.register_buffer(name, table.to(self.wte.weight.device), persistent=False)

    @classmethod
    def from_config(cls, config, weights, compute_dtype):
        """Build a model around its weights, {name: tensor}, without a copy. config: ModelConfig's fields."""
        with torch.device("meta"):
            model = cls(ModelConfig(**config), compute_dtype)
        model.cos, model.sin = rotary_tables(model.config)
        model.load_state_dict(weights, assign=True)
        return model

    @torch.no_grad()
    def init_weights(self, seed):
        """Initialise every parameter, listed one by one (values after nanochat).

        wte                normal, std 0.8
        lm_head            normal, std 0.001
        lm_head_stages     zero: at step 0 every stage speaks through the shared head alone
        attn.c_q c_k c_v   uniform, std 1/sqrt(n_embd)
        attn.c_proj        zero
        attn.value_embed   uniform, std 1/sqrt(n_embd), as the c_v that it is added to
        attn.value_gate    uniform in [0, 0.02]: gates start just above their middle
        mlp.c_fc           uniform, std 0.4/sqrt(n_embd)
        mlp.c_proj         zero: with attn.c_proj, every block starts as the identity on its input mix
        resid_lambda       1.15 at the first layer, falling linearly to 1.05
        x0_lambda          0.20 at the first layer, falling linearly to 0.05
        """
        generator = torch.Generator(self.wte.weight.device).manual_seed(seed)
        normal = partial(init.normal_, generator=generator)
        uniform = partial(init.uniform_, generator=generator)
        # a uniform on [-bound, bound] has std 1/sqrt(n_embd)
        bound = math.sqrt(3.0 / self.config.n_embd)
        normal(self.wte.weight, std=0.8)
        normal(self.lm_head.weight, std=0.001)
        for head in self.lm_head_stages:
            init.zeros_(head.weight)
        for layer, block in enumerate(self.blocks):
            attn = block.attn
            for linear in (attn.c_q, attn.c_k, attn.c_v):
                uniform(linear.weight, -bound, bound)
            init.zeros_(attn.c_proj.weight)
            if attn.value_embed is not None:
                uniform(attn.value_embed.weight, -bound, bound)
                uniform(attn.value_gate.weight, 0.0, 0.02)
            uniform(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            init.zeros_(block.mlp.c_proj.weight)
            depth = layer / max(self.config.n_layer - 1, 1)
            init.constant_(block.resid_lambda, 1.15 - 0.10 * depth)
            init.constant_(block.x0_lambda, 0.20 - 0.15 * depth)

    # -- forward -----------------------------------------------------------------------------------

    def embed(self, idx):
        """x0: token embedding, then RMSNorm. idx: int64 (B, T). Returns (B, T, C) in the compute dtype."""
        return norm(self.wte(idx).to(self.compute_dtype))

    def stage(self, k, x, x0, idx, cache=None):
        """Run the layers of stage k: x_k (B, T, C) from x = x_{k-1} and x0, (B, T, C).

        idx: int64 (B, T), read by value embeddings. Without a cache, positions are 0..T-1; with one, they are
        those last given to `cache.place`.
        """
        positions = slice(idx.size(1))
        if cache is not None:
            # unused rows may lie beyond the context
            positions = cache.positions.clamp(max=len(self.cos) - 1)
        cos = self.cos[positions][..., None, :]                 # (T, 1, D/2), with a cache (B, T, 1, D/2)
        sin = self.sin[positions][..., None, :]
        for layer in self.layers_of_stage[k]:
            x = self.blocks[layer](x, x0, idx, cos, sin, cache)
        return x

    def head_weight(self, k):
        """The merged head W + W_k of stage k: (V, C), summed in the parameters' dtype, then rounded once."""
        if self.merged_heads is not None:
            return self.merged_heads[k]
        weight = self.lm_head.weight
        if self.lm_head_stages:
            weight = weight + self.lm_head_stages[k].weight
        return weight.to(self.compute_dtype)

    def log_probs(self, k, x):
        """log p_k of stage k from its boundary activations x (..., C). Returns float32 (..., V), nats."""
        return F.log_softmax(softcap(F.linear(norm(x), self.head_weight(k))), dim=-1)

    def boundaries(self, idx):
        """Yield the residual stream after each stage, x_0 .. x_{K-1}, each (B, T, C), in one pass."""
        x = x0 = self.embed(idx)
        for k in range(self.config.n_stage):
            x = self.stage(k, x, x0, idx)
            yield x

    def forward(self, idx, alpha=0.0):
        """Log-probabilities of the full product, float32 (B, T, V). Holds all logits: for small inputs."""
        stages = [self.log_probs(k, x) for k, x in enumerate(self.boundaries(idx))]
        return combine(sum(stages), self.config.n_stage, alpha)

    # -- training ----------------------------------------------------------------------------------

    def backward_by_stage(self, idx, targets, scale, last=True):
        """Forward and backward of one micro-batch; yield (k, loss_k) when the gradients of stage k are there.

        idx, targets: int64 (B, T). scale: 1 / tokens of the whole optimizer step, so that gradients and
        losses summed over micro-batches are means. loss_k: 0-d tensor, nats, detached. Gradients are added to
        `.grad`. Under `poe`, stage k's activations are freed before stage k + 1 runs: peak memory is one
        stage's.
        last: whether this is the last micro-batch of the step. Only then is the shared head's gradient
        formed: the merged weight is W + W_k, so dW = sum_k dW_k. When stage k is yielded its gradients are
        final; the shared head's are final only after the last stage.
        """
        pending = []
        x = x0 = self.embed(idx)
        for k in range(self.config.n_stage):
            x = self.stage(k, x, x0, idx)
            normed = norm(x).flatten(0, 1)                                  # (N, C)
            shared = self.lm_head.weight
            own = self.lm_head_stages[k].weight if self.lm_head_stages else shared
            if own.grad is None:
                own.grad = torch.zeros_like(own)
            with torch.no_grad():
                loss, normed_grad = head_cross_entropy(normed, self.head_weight(k), targets.flatten(),
                                                       own.grad, scale, self.chunk_loss)
            if self.config.objective == "poe":
                normed.backward(normed_grad)
                # no gradient crosses the boundary, nor reaches wte through x0
                x = x.detach()
                x0 = x0.detach()
            else:
                pending.append((normed, normed_grad, loss))
            if last and own is not shared:
                shared.grad = own.grad.clone() if k == 0 else shared.grad.add_(own.grad)
            if not pending:
                yield k, loss
        if pending:
            tops, grads, losses = zip(*pending)
            torch.autograd.backward(tops, grads)
            yield from enumerate(losses)

    def names_of_stage(self, k):
        """Names of the parameters that stage k alone trains: the shared head's only where K = 1."""
        prefixes = [f"blocks.{layer}." for layer in self.layers_of_stage[k]]
        prefixes.append(f"lm_head_stages.{k}." if self.lm_head_stages else "lm_head.")
        if k == 0:
            prefixes.append("wte.")
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(prefixes))]

    def compile_regions(self):
        """Compile a block (one compilation serves all layers) and elementwise parts beside it."""
        # A block is compiled for each kind of call: a value embedding or none, x and x0 with gradients or
        # without, training or not, a last batch of fewer rows. Beyond its limit of 8 dynamo runs uncompiled.
        torch._dynamo.config.recompile_limit = 64
        self.chunk_loss = torch.compile(cross_entropy_chunk, dynamic=False)
        self.quantize = torch.compile(quantize, dynamic=False)
        for block in self.blocks:
            block.compile(dynamic=False)

    @torch.no_grad()
    def cast_weights(self):
        """Keep matrices and merged heads in the compute dtype, with `fp8` the MLPs' in 8 bits; call it after
        every change of the weights.

        Without it each micro-batch casts them anew, and rounds its gradients of matrices to bfloat16 before
        they are summed, and nothing is in 8 bits; bfloat16's losses are the same to the bit. 2 bytes a matrix
        element: in bfloat16, or in 8 bits with its transpose.
        """
        rounds = self.compute_dtype != self.lm_head.weight.dtype
        for name, module in self.blocks.named_modules():
            if isinstance(module, Linear):
                if self.fp8 and ".mlp." in name:
                    module.keep_cast(E4M3, self.quantize)
                elif rounds:
                    module.keep_cast(self.compute_dtype)
        if rounds:
            # without this, `head_weight` would return those of the old weights
            self.merged_heads = None
            self.merged_heads = [self.head_weight(k) for k in range(self.config.n_stage)]

    # -- inference ---------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze_for_inference(self):
        """Merge the heads once and cast matrices and tables to the compute dtype, in place.

        The merged heads are rounded once from the float32 sum, as in training; scalars keep their dtype: so
        the outputs equal the training forward's. The model can no longer be trained.
        """
        self.merged_heads = [self.head_weight(k) for k in range(self.config.n_stage)]
        self.lm_head = None
        self.lm_head_stages = None
        for p in self.parameters():
            p.requires_grad_(False)
            if p.dim() == 2:
                p.data = p.data.to(self.compute_dtype)
        return self.eval()


# --------------------------------------------------------------------------------------------------
# Counting

def count_parameters(config):
    """Parameters by group, as integers, counted on the meta device; their sum is the model's size."""
    with torch.device("meta"):
        model = PoE(config)
    groups = Counter()
    for name, p in model.named_parameters():
        groups[parameter_group(name)] += p.numel()
    return groups


def parameter_group(name):
    """The kind of a parameter by its name: matrices, value_embeds, heads, wte, gates or scalars."""
    groups = {"value_embed": "value_embeds", "value_gate": "gates", "lambda": "scalars", "lm_head": "heads",
              "wte": "wte", "attn.c_|mlp.c_": "matrices"}
    return next(group for pattern, group in groups.items() if re.search(pattern, name))


def stage_bytes(model):
    """Weight bytes that decoding one token reads up to and including each stage, a list of length K.

    Block matrices and one merged head (V x C) per stage in the compute dtype. Embedding rows, gates and
    scalars, under 0.1 %, are left out.
    """
    config = model.config
    head = config.vocab_size * config.n_embd
    # all layers have matrices of the same shapes
    layer = count_parameters(config)["matrices"] // config.n_layer
    elements = accumulate(n_layers * layer + head for n_layers in config.stage_layers)
    return [n * model.compute_dtype.itemsize for n in elements]


def flops_per_token(config):
    """Training FLOPs per token: 6 per matrix parameter (K merged heads) + 12 H D T per layer.

    Forward and backward, by nanochat's convention (after PaLM, arXiv 2204.02311), which does not halve causal
    attention: 15.70 G for `3b`.
    """
    groups = count_parameters(config)
    matmul = groups["matrices"] + groups["gates"] + config.n_stage * config.vocab_size * config.n_embd
    return 6 * matmul + 12 * config.n_embd * config.sequence_len * config.n_layer
