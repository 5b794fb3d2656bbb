"""
The per-stage Product-of-Experts (PoE) transformer, all of it in this file.

A decoder-only transformer is cut into K consecutive stages. Each stage has its own head and is a complete
next-token predictor, trained by its own cross-entropy: the residual stream is detached at every stage boundary,
so no gradient crosses it. At inference the stages' log-probabilities are averaged and renormalised.

    x_k      = stage_k(x_{k-1}, x0)                                         residual stream after stage k
    logits_k = 15 tanh((W + W_k) norm(x_k) / 15),   log p_k = log_softmax(logits_k)
    log p    = log_softmax(K^(alpha-1) * sum_k log p_k)                     alpha = 0: geometric mean, "full"

Three callers, one forward: training runs `backward_by_stage` (forward and backward of one stage at a time),
evaluation takes `boundaries` and then `log_probs` for a chunk of tokens, decoding runs `stage` over a `KVCache`.

Not here: learning rates, optimizer groups, tokenizers, flags, sampling.

Sources: architecture after nanochat's GPT (github.com/karpathy/nanochat, MIT), with stages, per-stage heads and
stage-local scalars added and without its smear, backout and sliding windows; products of experts: Hinton 2002;
per-stage training: Jeong 2026 (doi 10.5281/zenodo.19547653) and the Cognica-PoE-v1.0-3B model cards.

Shapes: B batch, T time, C channels, H attention heads, D head dim, K stages, V vocabulary, N = B * T tokens.
"""
import copy
import hashlib
import json
import math
import pickle
import re
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.backends import cuda as cuda_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

SOFTCAP = 15.0          # logits are squashed into (-15, 15)
QK_SCALE = 1.2 * 1.2    # sharper attention after QK-norm: 1.2 on each side, as in nanochat
GATE_CHANNELS = 12      # the value-embedding gate reads the first 12 channels, as in nanochat
ROPE_BASE = 100_000
# (token, vocabulary) pairs whose logits the loss holds at once. Measured: 2^20 fits a CPU's cache (1.35x the speed of one chunk); 4,096 tokens
# of 32,768 take 10.3 ms per 16,384 tokens and 0.8 GiB on an H100, all 16,384 at once 9.9 ms and 2.1 GiB.
LOSS_CHUNK_LOGITS = {"cpu": 2 ** 20, "cuda": 4096 * 32768}
OBJECTIVES = ("poe", "joint", "bp")
BOUNDS_KEY = "poe_wand_p99_bounds_per_stage_head"       # in a calibrated checkpoint's config.json


# ---------------------------------------------------------------------------------------------------------------
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
    stage_layers: tuple          # layers per stage, in order
    objective: str = "poe"       # poe: local losses; joint: the same losses without the detach; bp: one loss at the top

    def __post_init__(self):
        object.__setattr__(self, "stage_layers", tuple(self.stage_layers))
        for name in ("sequence_len", "vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "mlp_hidden"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= 10 ** 7:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be from 1 to 10,000,000")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        if any(type(n) is not int or n < 1 for n in self.stage_layers) or sum(self.stage_layers) != self.n_layer:
            raise ValueError(f"stage_layers {self.stage_layers} must be positive and sum to n_layer = {self.n_layer}; "
                             f"change --stage-layers or --n-layer")
        if self.objective == "bp" and len(self.stage_layers) != 1:
            raise ValueError(f"objective bp has one stage of all layers, not stage_layers {self.stage_layers}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd = {self.n_embd} must be an even multiple of n_head = {self.n_head} "
                             f"(rotary positions pair the channels of a head); change --n-embd or --n-head")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head = {self.n_head} must be a multiple of n_kv_head = {self.n_kv_head}; "
                             f"change --n-head or --n-kv-head")

    @property
    def n_stage(self):
        return len(self.stage_layers)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    def has_value_embed(self, layer):
        """Every second layer has a value embedding, the last one included (nanochat)."""
        return layer % 2 == (self.n_layer - 1) % 2


#                        sequence   vocab  layers  width  heads  kv    mlp    stages
PRESETS = {
    "tiny": ModelConfig(      256,   1024,      5,    96,     3,  1,   384, (2, 1, 1, 1)),
    "d12":  ModelConfig(     2048,  32768,     12,   768,     6,  3,  4096, (6, 2, 2, 2)),      # 122 M in matrices + one head
    "1b":   ModelConfig(     2048,  32768,     26,  1536,    12,  6,  9600, (13, 5, 4, 4)),     # 1.00 G
    "3b":   ModelConfig(     2048,  32768,     32,  2048,    16,  8, 12800, (16, 6, 5, 5)),     # the card's, 3.02 G in all
}


# ---------------------------------------------------------------------------------------------------------------
# Pure functions: normalisation, rotary positions, heads, the product of experts

def norm(x):
    """RMSNorm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(sequence_len, head_dim):
    """Return cos and sin, float32 (sequence_len, head_dim / 2), of RoFormer's angles (arXiv 2104.09864).

    Computed on the CPU, so that training and decoding have the same bits on every device.
    """
    with torch.device("cpu"):
        inv_freq = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(sequence_len, dtype=torch.float32), inv_freq)
        return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the channel pairs (i, i + D/2) of x (B, T, H, D) by tables that broadcast to (B, T, 1, D/2)."""
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
        return sum_log_probs            # one expert is normalised already: prefix 1 is stage 0, to the last bit
    return F.log_softmax(sum_log_probs * n_experts ** (alpha - 1.0), dim=-1)


def cross_entropy_chunk(logits, targets, scale):
    """Return (sum of nats, d loss / d logits) of softcapped logits (n, V); the gradient carries `scale`.

    The softcap bounds exp() by e^15, so the softmax needs no maximum subtracted, in float32 too.
    """
    targets = targets[:, None]                                              # (n, 1)
    tanh = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)
    weight = torch.exp(SOFTCAP * tanh)                                      # (n, V), unnormalised probabilities
    total = weight.sum(dim=-1, keepdim=True)                                # (n, 1)
    tanh_y = tanh.gather(1, targets)
    prob_y = weight.gather(1, targets) / total
    prob = weight * (scale / total)
    grad = torch.addcmul(prob, prob * tanh, tanh, value=-1.0).to(logits.dtype)      # p (1 - tanh^2): through the softcap
    grad.scatter_(1, targets, ((prob_y - 1.0) * (1.0 - tanh_y ** 2) * scale).to(logits.dtype))
    return (total.log() - SOFTCAP * tanh_y).sum(), grad


def head_cross_entropy(x, weight, targets, weight_grad, scale, chunk_loss=cross_entropy_chunk):
    """Softcapped cross-entropy of a head with its gradients, chunk by chunk, never holding all logits.

    The gradient is computed in the forward (as Liger's fused linear cross-entropy, arXiv 2410.10989, does), so
    there are three matrix products and no recomputation.
    x: (N, C), detached. weight: (V, C), dtype of x. targets: int64 (N,). weight_grad: float32 (V, C), mutated:
    the gradient is added to it in float32, since a sum over chunks in bf16 drifts. scale: factor on loss
    and gradients. chunk_loss: `cross_entropy_chunk` or its compiled form.
    Returns (loss, x_grad): 0-d tensor, scale * summed nats; (N, C) in the dtype of x.
    """
    x_grad = torch.empty_like(x)
    loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    step = max(1, LOSS_CHUNK_LOGITS[x.device.type] // weight.size(0))
    for i in range(0, x.size(0), step):
        x_chunk = x[i:i + step]
        nats, grad = chunk_loss(x_chunk @ weight.T, targets[i:i + step], scale)    # grad (n, V)
        loss += nats
        torch.mm(grad, weight, out=x_grad[i:i + step])
        add_weight_grad(weight_grad, grad, x_chunk)
    return loss * scale, x_grad


def add_weight_grad(weight_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """weight_grad (O, C) += grad^T x, summed in the dtype of weight_grad by the product itself. grad: (n, O), x: (n, C), of one dtype."""
    if weight_grad.dtype == x.dtype:
        weight_grad.addmm_(grad.T, x)
    elif x.is_cuda:
        torch.addmm(weight_grad, grad.T, x, out_dtype=weight_grad.dtype, out=weight_grad)
    else:
        weight_grad.addmm_(grad.T.to(weight_grad.dtype), x.to(weight_grad.dtype))


# A compiled backward may change weight_grad only through an operator. Where nothing is compiled, its first call would import the compiler: 2 s.
add_weight_grad_op = torch.library.custom_op("poe::add_weight_grad", add_weight_grad, mutates_args=("weight_grad",))


def choose_device(device=None, dtype=None):
    """(torch.device, torch.dtype) from their names; None takes cuda where there is one, and bfloat16 there or float32 elsewhere."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device or "cpu"):
        raise ValueError(f"--device {device} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device} is not there: this machine shows {torch.cuda.device_count()} CUDA devices")
    return chosen, getattr(torch, dtype or ("bfloat16" if chosen.type == "cuda" else "float32"))


def attention_backends(device):
    """Context in which attention prefers cuDNN's kernel on CUDA, and is left alone elsewhere.

    Forward + backward on an H100 at (B, H / H_kv, T, D) = (8, 16 / 8, 2048, 128), torch 2.11: cuDNN 1.32 ms, flash 2.33 ms.
    """
    if torch.device(device).type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def attention_kernel(config, device, dtype):
    """The kernel that attention runs by in training under `attention_backends`: cudnn, flash, efficient or math; elsewhere the device's name."""
    if device.type != "cuda":
        return device.type
    q, kv = (torch.empty(1, n, config.sequence_len, config.head_dim, device=device, dtype=dtype, requires_grad=True)
             for n in (config.n_head, config.n_kv_head))
    params = cuda_backend.SDPAParams(q, kv, kv, None, 0.0, True, config.n_head != config.n_kv_head)
    usable = {"cudnn": cuda_backend.can_use_cudnn_attention, "flash": cuda_backend.can_use_flash_attention,
              "efficient": cuda_backend.can_use_efficient_attention}
    return next((name for name, can_use in usable.items() if can_use(params)), "math")


# ---------------------------------------------------------------------------------------------------------------
# Layers

class Linear(nn.Linear):
    """A linear map without bias whose float32 master weight is cast to the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.cast = None                                                    # the weight in the compute dtype, kept by `PoE.cast_weights`

    def reset_parameters(self):
        """Do nothing: PoE.init_weights or a checkpoint sets every weight."""

    def forward(self, x):
        if self.cast is None:
            return F.linear(x, self.weight.to(x.dtype))
        return LinearByCast.apply(x, self.weight, self.cast, self.weight.grad)

    def keep_cast(self, dtype):
        """Cast the weight for all passes until the next call, and make sure that there is a gradient to add to."""
        self.cast = self.weight.to(dtype) if self.cast is None else self.cast.copy_(self.weight)
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Do nothing, as `Linear`. (On the meta device the default's random numbers would import the compiler, which takes 1.7 s.)"""


class LinearByCast(torch.autograd.Function):
    """x cast^T, whose backward adds the weight's gradient to weight_grad in float32, where autograd would first round it to the dtype of x.

    The weight itself is an argument so that there is a backward where x needs no gradient.
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


class KVCache:
    """Keys and values of every layer by absolute position, for decoding.

    Slots at or beyond a row's position are garbage that no query reads: a query at position p attends to the
    slots <= p, and every slot is written before a query reaches it. Rolling back is writing from an earlier
    position. Call `place` with the positions of the next tokens, then `PoE.stage` for each stage to run.
    """

    def __init__(self, config, batch_size, length, device, dtype):
        shape = (config.n_layer, batch_size, length, config.n_kv_head, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)       # zeros: 0 * garbage must not be NaN
        self.values = torch.zeros(shape, device=device, dtype=dtype)
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
        view.keys, view.values, view.rows = self.keys[:, row:row + 1], self.values[:, row:row + 1], self.rows[:1]
        return view

    def update(self, layer, k, v):
        """Write k and v (B, T, H_kv, D) of `layer` at `positions`; return all keys and values (B, end, H_kv, D)."""
        self.keys[layer, self.rows, self.positions] = k
        self.values[layer, self.rows, self.positions] = v
        return self.keys[layer, :, :self.end], self.values[layer, :, :self.end]


class Attention(nn.Module):
    """Causal grouped-query attention with QK-norm, rotary positions and, on some layers, a value embedding."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_embed = Embedding(config.vocab_size, kv_dim) if config.has_value_embed(layer) else None
        self.value_gate = Linear(min(GATE_CHANNELS, config.n_embd), config.n_kv_head) if config.has_value_embed(layer) else None

    def forward(self, x, idx, cos, sin, cache=None):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.value_embed is not None:
            embed = self.value_embed(idx).to(x.dtype).view(v.shape)
            gate = self.value_gate(x[..., :self.value_gate.in_features])                        # (B, T, H_kv)
            if cache is not None:
                # a CPU's vector code and its code for the remainder differ in the last bit; rounding from float64 hides that, so that
                # a decoded row does not depend on its place in the pass
                gate = gate.double()
            v = v + (3 * torch.sigmoid(gate)).to(x.dtype)[..., None] * embed
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        mask = None
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                           # (B, end, H_kv, D)
            mask = cache.mask
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            scale=QK_SCALE / math.sqrt(self.head_dim), enable_gqa=self.n_head != self.n_kv_head)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_hidden)
        self.c_proj = Linear(config.mlp_hidden, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


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


# ---------------------------------------------------------------------------------------------------------------
# The model

class PoE(nn.Module):
    """K stages, each with its own next-token distribution. `from_record` builds a checkpoint's; else build on a device, then `init_weights`.

    compute_dtype: dtype of activations and matrix products; parameters stay in their own (float32 in training).
    """

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.vocab_size)             # shared by all stages
        n_own = config.n_stage if config.n_stage > 1 else 0                 # a single stage needs no head beside the shared one
        self.lm_head_stages = nn.ModuleList(Linear(config.n_embd, config.vocab_size) for _ in range(n_own))
        ends = [sum(config.stage_layers[:k + 1]) for k in range(config.n_stage)]
        self.layers_of_stage = [range(end - n, end) for end, n in zip(ends, config.stage_layers)]
        self.merged_heads = None                                            # kept by `cast_weights` and `freeze_for_inference`
        self.chunk_loss = cross_entropy_chunk                               # its compiled form after `compile_regions`
        for name, table in zip(("cos", "sin"), rotary_tables(config.sequence_len, config.head_dim)):
            self.register_buffer(name, table.to(self.wte.weight.device), persistent=False)          # (sequence_len, D / 2)

    @classmethod
    def from_record(cls, record, weights, compute_dtype=torch.float32):
        """Build the model of a checkpoint's config.json around its weights (name -> tensor), without copying them."""
        with torch.device("meta"):
            model = cls(ModelConfig(**record["model"]), compute_dtype)
        model.cos, model.sin = rotary_tables(model.config.sequence_len, model.config.head_dim)
        model.check_weights(weights)
        model.load_state_dict(weights, assign=True)
        return model

    def check_weights(self, weights):
        """Raise ValueError, naming one parameter, unless `weights` is a dict of exactly this model's names and shapes."""
        expected = {name: tuple(p.shape) for name, p in self.named_parameters()}
        found = {str(name): tuple(getattr(p, "shape", ())) for name, p in weights.items()} if isinstance(weights, dict) else {}
        if expected != found:
            name = min(set(expected.items()) ^ set(found.items()))[0]
            raise ValueError(f"weights and config disagree on {name}: the config says {expected.get(name, 'absent')}, "
                             f"model.pt has {found.get(name, 'absent')}")

    @torch.no_grad()
    def init_weights(self, seed):
        """Initialise every parameter, listed one by one (values after nanochat). Reproducible per device type.

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
        bound = math.sqrt(3.0 / self.config.n_embd)                         # a uniform on [-bound, bound] has std 1/sqrt(n_embd)
        nn.init.normal_(self.wte.weight, std=0.8, generator=generator)
        nn.init.normal_(self.lm_head.weight, std=0.001, generator=generator)
        for head in self.lm_head_stages:
            nn.init.zeros_(head.weight)
        for layer, block in enumerate(self.blocks):
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.zeros_(block.attn.c_proj.weight)
            if block.attn.value_embed is not None:
                nn.init.uniform_(block.attn.value_embed.weight, -bound, bound, generator=generator)
                nn.init.uniform_(block.attn.value_gate.weight, 0.0, 0.02, generator=generator)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound, generator=generator)
            nn.init.zeros_(block.mlp.c_proj.weight)
            depth = layer / max(self.config.n_layer - 1, 1)
            nn.init.constant_(block.resid_lambda, 1.15 - 0.10 * depth)
            nn.init.constant_(block.x0_lambda, 0.20 - 0.15 * depth)

    # -- forward ------------------------------------------------------------------------------------------------

    def embed(self, idx):
        """x0: token embedding, then RMSNorm. idx: int64 (B, T). Returns (B, T, C) in the compute dtype."""
        return norm(self.wte(idx).to(self.compute_dtype))

    def stage(self, k, x, x0, idx, cache=None):
        """Run the layers of stage k. x, x0: (B, T, C); idx: int64 (B, T), read by value embeddings. Returns x_k (B, T, C).

        Without a cache, positions are 0..T-1; with one, they are those last given to `cache.place`.
        """
        if cache is None:
            cos, sin = self.cos[None, :idx.size(1), None], self.sin[None, :idx.size(1), None]    # (1, T, 1, D/2)
        else:
            positions = cache.positions.clamp(max=len(self.cos) - 1)        # unused rows may lie beyond the context
            cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]                 # (B, T, 1, D/2)
        for layer in self.layers_of_stage[k]:
            x = self.blocks[layer](x, x0, idx, cos, sin, cache)
        return x

    def head_weight(self, k):
        """The merged head of stage k, W + W_k: (V, C), summed in the parameters' dtype and rounded once to the compute dtype."""
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
        """Yield the residual stream after each stage, x_0 .. x_{K-1}, each (B, T, C): the one pass that evaluation needs."""
        x = x0 = self.embed(idx)
        for k in range(self.config.n_stage):
            x = self.stage(k, x, x0, idx)
            yield x

    def forward(self, idx, alpha=0.0):
        """Log-probabilities of the full product, float32 (B, T, V). Holds all logits: for small inputs and for reading."""
        stages = [self.log_probs(k, x) for k, x in enumerate(self.boundaries(idx))]
        return combine(sum(stages), self.config.n_stage, alpha)

    # -- training -----------------------------------------------------------------------------------------------

    def backward_by_stage(self, idx, targets, scale, last=True):
        """Forward and backward of one micro-batch; yield (k, loss_k) as soon as the gradients of stage k are there.

        idx, targets: int64 (B, T). scale: 1 / tokens of the whole optimizer step, so that gradients and losses
        summed over micro-batches are means. loss_k: 0-d tensor, nats, detached. Gradients are added to `.grad`.
        Under `poe`, stage k's activations are freed before stage k + 1 runs: peak memory is one stage's.
        last: whether this is the last micro-batch of the step. Only then is the shared head's gradient formed: the merged weight
        is W + W_k, so dW = sum_k dW_k. What has been yielded is complete then, but for the shared head, complete after the last stage.
        """
        pending = []
        x = x0 = self.embed(idx)
        for k in range(self.config.n_stage):
            x = self.stage(k, x, x0, idx)
            normed = norm(x)                                                # (B, T, C)
            head = self.lm_head_stages[k] if self.lm_head_stages else self.lm_head
            if head.weight.grad is None:
                head.weight.grad = torch.zeros_like(head.weight)
            with torch.no_grad():
                loss, normed_grad = head_cross_entropy(
                    normed.flatten(0, 1), self.head_weight(k), targets.flatten(), head.weight.grad, scale, self.chunk_loss)
            if self.config.objective == "poe":
                normed.backward(normed_grad.view_as(normed))
                x, x0 = x.detach(), x0.detach()                             # the locality contract
                if last and self.lm_head_stages:
                    self._add_to_shared_head(k)
                yield k, loss
            else:
                pending.append((normed, normed_grad.view_as(normed), loss))
        if pending:
            tops, grads, losses = zip(*pending)
            torch.autograd.backward(tops, grads)
            for k in range(len(self.lm_head_stages)) if last else ():
                self._add_to_shared_head(k)
            yield from enumerate(losses)

    @torch.no_grad()
    def _add_to_shared_head(self, k):
        """Add the gradient of stage k's own head to the shared head's, which begins as that of stage 0."""
        shared, grad = self.lm_head.weight, self.lm_head_stages[k].weight.grad
        shared.grad = grad.clone() if k == 0 else shared.grad.add_(grad)

    def stage_of(self, name):
        """The stage that trains parameter `name`, or None for the shared head, which all stages train."""
        if name == "lm_head.weight":
            return 0 if self.config.n_stage == 1 else None
        if name == "wte.weight":
            return 0
        number = int(name.split(".")[1])
        if name.startswith("lm_head_stages."):
            return number
        return next(k for k, layers in enumerate(self.layers_of_stage) if number in layers)

    def compile_regions(self):
        """Compile a block (the same code serves all layers) and the loss's elementwise part, not the whole model."""
        # 13 kinds of a block at most: a value embedding or none, x and x0 with gradients or without, training or not, a last batch of fewer
        # rows. By its own limit of 8 dynamo would leave validation uncompiled.
        torch._dynamo.config.recompile_limit = 64
        self.chunk_loss = torch.compile(cross_entropy_chunk, dynamic=False)
        for block in self.blocks:
            block.compile(dynamic=False)

    @torch.no_grad()
    def cast_weights(self):
        """Keep matrices and merged heads in the compute dtype; call it again after every change of the weights. Nothing to do where they are.

        Without it each micro-batch casts them anew, and rounds its gradients of matrices to bfloat16 before they are summed; losses are
        the same to the bit. 2 bytes a matrix element in bfloat16.
        """
        if self.compute_dtype == self.lm_head.weight.dtype:
            return
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, Linear):
                    module.keep_cast(self.compute_dtype)
        self.merged_heads = None                                            # of the old weights
        self.merged_heads = [self.head_weight(k) for k in range(self.config.n_stage)]

    # -- inference ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze_for_inference(self):
        """Merge the heads once and cast matrices and tables to the compute dtype, in place.

        The merged heads are rounded once from the float32 sum, as in training; scalars keep their dtype: so the
        outputs equal the training forward's. The model can no longer be trained.
        """
        self.merged_heads = [self.head_weight(k) for k in range(self.config.n_stage)]
        self.lm_head = self.lm_head_stages = None
        for p in self.parameters():
            p.requires_grad_(False)
            if p.dim() == 2:
                p.data = p.data.to(self.compute_dtype)
        return self.eval()


# ---------------------------------------------------------------------------------------------------------------
# Counting

def count_parameters(config):
    """Parameters by group, as integers, counted on the meta device; their sum is the model's size."""
    with torch.device("meta"):
        model = PoE(config)
    groups = dict.fromkeys(("matrices", "value_embeds", "heads", "wte", "gates", "scalars"), 0)
    for name, p in model.named_parameters():
        groups[parameter_group(name)] += p.numel()
    return groups


def parameter_group(name):
    """The kind of a parameter by its name: matrices, value_embeds, heads, wte, gates or scalars."""
    for pattern, group in (("value_embed", "value_embeds"), ("value_gate", "gates"), ("lambda", "scalars"),
                           ("lm_head", "heads"), ("wte", "wte"), ("attn.c_|mlp.c_", "matrices")):
        if re.search(pattern, name):
            return group
    raise ValueError(f"no parameter group is known for {name!r}")


def stage_bytes(model):
    """Weight bytes that decoding one token reads up to and including each stage, a list of length K.

    Block matrices and one merged head (V x C) per stage in the compute dtype. Embedding rows, gates and scalars, under 0.1 %, are left out.
    """
    per_stage = [model.config.vocab_size * model.config.n_embd] * model.config.n_stage
    for name, p in model.named_parameters():
        if parameter_group(name) == "matrices":
            per_stage[model.stage_of(name)] += p.numel()
    return [sum(per_stage[:k + 1]) * model.compute_dtype.itemsize for k in range(model.config.n_stage)]


def flops_per_token(config):
    """Training FLOPs per token, forward + backward: 6 per matrix parameter (K merged heads) + 12 H D T per layer.

    nanochat's convention (after PaLM, arXiv 2204.02311), which does not halve causal attention: 15.70 G for `3b`.
    """
    groups = count_parameters(config)
    matmul = groups["matrices"] + groups["gates"] + config.n_stage * config.vocab_size * config.n_embd
    return 6 * matmul + 12 * config.n_embd * config.sequence_len * config.n_layer


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: reading. RUN/step-XXXXX/ holds config.json, model.pt, optim/, the tokenizer, state.json and manifest.json.

def checkpoint_steps(run):
    """The step directories of a run, ordered by their number (step-100000 sorts before step-84000 as text)."""
    found = [(int(m[1]), p) for p in Path(run).glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path):
    """A step directory from a path that names one, or the newest of a run directory. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: give a step-XXXXX directory or a run directory that holds some")
    if (path / "model.pt").exists() or re.fullmatch(r"step-\d+", path.name):
        return path
    steps = checkpoint_steps(path)
    if not steps:
        raise FileNotFoundError(f"{path} holds no step-XXXXX checkpoint yet: train with train.py --out {path}")
    return steps[-1]


def sha256_of(path):
    """Hex sha256 of a file; of config.json without its `poe_wand_*` keys, which calibration may write later."""
    if Path(path).name == "config.json":
        config = {k: v for k, v in read_json(path).items() if not k.startswith("poe_wand_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify_checkpoint(path, skip_optimizer=False, share=(0, 1)):
    """Check a step directory against its manifest; return the manifest's {file: sha256}.

    Raises FileNotFoundError or ValueError that names the file which is missing or altered.
    skip_optimizer: leave out optim/, for readers of the weights alone. share: (i, n), check only every n-th file, from the i-th.
    """
    path = Path(path)
    try:
        files = read_json(path / "manifest.json")["files"]
        if not {"config.json", "model.pt"} <= files.keys() or any(".." in name or name.startswith("/") for name in files):
            raise ValueError("it must name config.json, model.pt and files beside them")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} has no manifest.json: it is not a whole checkpoint; use another step") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}/manifest.json is not readable ({e}); use another step") from None
    for number, (name, sha256) in enumerate(files.items()):
        if (skip_optimizer and name.startswith("optim/")) or number % share[1] != share[0]:
            continue
        try:
            altered = sha256_of(path / name) != sha256
        except FileNotFoundError:
            raise FileNotFoundError(f"checkpoint file {path / name} is missing; use another step") from None
        except ValueError:
            altered = True
        if altered:
            raise ValueError(f"checkpoint file {path / name} does not match its manifest: it was altered or cut; use another step")
    return files


def read_json(path):
    """The JSON object in a file. Raises FileNotFoundError, or ValueError where it holds something else."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not readable: {type(e).__name__}: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def read_object(path):
    """The JSON object in a file; {} where there is no file or no object in it."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def get(value, path):
    """The value at a path of keys and indices, or None where it leads nowhere."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def read_record(path):
    """config.json of a step directory, as a dict with model, train, tokenizer, phases and step. Raises ValueError where it is not one."""
    file = Path(path) / "config.json"
    record = read_json(file)
    for key, keys in (("model", {f.name for f in fields(ModelConfig)}), ("train", {"data"}), ("tokenizer", {"sha256"})):
        if not isinstance(record.get(key), dict) or not keys <= record[key].keys():
            raise ValueError(f"{file} is not a checkpoint's: it needs {key!r} with {', '.join(sorted(keys))}; use another step")
    try:
        ModelConfig(**record["model"])
        record["train"]["data"] + ""
    except (TypeError, ValueError) as e:
        raise ValueError(f"{file} is not a checkpoint's: {e}; use another step") from None
    return record


def load_tensors(path):
    """Tensors of a file that torch.save wrote, mapped on the CPU. Executes nothing (weights_only). Raises ValueError where it is not one."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is not a file of tensors: {str(e).splitlines()[0]}; use another step") from None
    values = tensors.values() if isinstance(tensors, dict) else [None]
    values = [x for value in values for x in (value.values() if isinstance(value, dict) else [value])]      # an optimizer's are dicts by name
    if not all(isinstance(x, int) or (isinstance(x, torch.Tensor) and not x.is_meta and x.layout == torch.strided) for x in values):
        raise ValueError(f"{path} holds something else than dense tensors by name; use another step")
    return tensors


def load_checkpoint(path, device="cpu", dtype=torch.float32):
    """Read a checkpoint's weights for inference: (model, config.json as a dict, sha256 of model.pt).

    path: a step or run directory. Raises as `verify_checkpoint`, and ValueError when weights and config disagree.
    """
    path = resolve_checkpoint(path)
    files = verify_checkpoint(path, skip_optimizer=True)
    record = read_record(path)
    model = PoE.from_record(record, load_tensors(path / "model.pt"), compute_dtype=dtype)
    return model.to(device).freeze_for_inference(), record, files["model.pt"]
