"""
Generate text from a checkpoint: by the full product, one stage, a prefix, with early exit, or speculatively.

    python sample.py runs/tiny --prompt "The capital of France is" --max-new-tokens 32 --temperature 0
    python sample.py runs/tiny --mode speculative --draft-len 8 --prompt-file prompts.txt --json
    python sample.py runs/3b --mode routing --compile

A prompt is encoded as bos + ordinary text; an empty one is bos alone. Generation stops at bos, which begins
the next document. How fast each mode is: bench.py decode RUN.

One engine serves all modes: it keeps a cursor per stage, and a stage may lag behind the one below it. Here
five tokens are known, stage 0 has run over all of them, and two positions wait for stages 1 and 2:

    position     0     1     2     3     4     5
    tokens      bos   The   sea   was  calm          cursors[0] = 5: so many tokens are known
    stage 0      x     x     x     x     x           cursors[1] = 5: so many positions stage 0 has run
    stage 1      x     x     x     .     .           cursors[2] = 3
    stage 2      x     x     x     .     .           cursors[3] = 3

Plain decoding runs every stage over the newest position, then the product chooses a token. Speculative
decoding lets stage 0 run ahead and choose drafts; the other stages then run over all waiting positions in one
pass, for the price of one position, and the product's choices replace the drafts from the first that differs.
Stage 0 may draft by weights rounded to int8, half as many bytes: then its cursor goes back, too, and it runs
over the drafts again by its own weights, in one pass that overwrites all that was approximate. Early exit
(WAND, routing) takes the token of a prefix that is sure, and leaves the position waiting for the stages
above. Rolling back is lowering cursors: what lies beyond a cursor is garbage that nothing reads.

Lossless modes write the same text, greedily and sampled. Noise is a function of (seed, row, position, token),
added to log-probabilities (Gumbel; coupled drafts after Daliri, Musco and Suresh, arXiv 2408.07978). And a
position's bits do not depend on what is computed beside it: passes have a fixed number of rows, some of them
unused, and every row is computed by itself. So this holds in bfloat16 too, where prompts are taken one at a
time unless kernels decode them. Several prompts at once in float32 are rounded a little differently than one:
there only tokens whose scores agree to six digits may change places.

Speculative decoding: arXiv 2211.17192; with one's own lower layers: LayerSkip, arXiv 2404.16710; catching up
skipped layers with later tokens: FREE, arXiv 2310.05424; WAND: Broder et al., CIKM 2003.
"""
import codecs
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import sys
import time
from collections import deque, namedtuple
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from checkpoint import BOUNDS_KEY, load_checkpoint, read_json, resolve_checkpoint
from common import DeviceFlags, choose_device, flag, parse_flags, run, spelled
from dataloader import Tokenizer, clean_text
from model import KVCache, attention_backends, combine

# the modes, and the flags that go with each
MODES = {"full": "", "single": "stage", "prefix": "prefix", "wand": "wand_margin",
         "routing": "routing_threshold", "speculative": "draft_len draft_weights"}
ROWS = 16                   # rows of a tile, as tensor cores want; upper stages run whole tiles
WIDEST = 4 * ROWS           # rows of the kernels' widest pass; sums of log p_k are kept for as many positions
CHOSEN = 2 * ROWS           # positions after which tokens are chosen at once, at most
SLACK = CHOSEN + WIDEST     # cache slots past the context: two cycles in flight and unused rows reach there
PREFILL = 256               # positions of a prompt in one pass
ONE_THREAD_UP_TO = 256      # n_embd of a model that decodes on one thread of a CPU


# --------------------------------------------------------------------------------------------------
# Choosing a token

@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the best at temperature 0, else by `sample_token`. top_k 0, top_p 1: all."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def _hash32(x):
    """A bijective 32-bit integer hash with low bias (C. Wellons, "hash prospector"), on int64 tensors."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def gumbel_noise(seed, rows, positions, vocab_size):
    """Standard Gumbel noise as a pure function of (seed, row, position, token): float64 (B, V).

    rows, positions: int64 (B,). argmax(log p + noise) is a sample of p, and the same wherever it is computed.
    """
    key = torch.full_like(rows, seed & 0xFFFFFFFF)
    for coordinate in (torch.full_like(rows, seed >> 32 & 0xFFFFFFFF), rows, positions):
        key = _hash32(key ^ _hash32(coordinate + 0x9E3779B9 & 0xFFFFFFFF))
    tokens = torch.arange(vocab_size, device=rows.device)
    bits = _hash32(_hash32(tokens * 0x9E3779B1 & 0xFFFFFFFF) ^ key[:, None])        # (B, V)
    uniform = (bits.double() + 0.5) / 2 ** 32                                       # in (0, 1)
    return -torch.log(-torch.log(uniform))


def sample_token(log_probs, sampling, rows, positions):
    """Sample the next token of each row: int64 (B,).

    log_probs: float32 (B, V), nats. sampling: of a temperature above 0. Filters: top-k, then top-p (the
    smallest set whose probability reaches top_p) at that temperature. rows, positions: int64 (B,), of the
    tokens chosen.
    """
    # the best at 0, so that no temperature is too small
    scores = (log_probs - log_probs.max(dim=-1, keepdim=True).values) / sampling.temperature
    if 0 < sampling.top_k < scores.size(-1):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = F.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        # always as many rows: a GPU's order of summation may depend on how many there are
        padded = F.pad(ordered, (0, 0, 0, max(0, CHOSEN - len(ordered))))
        # tokens before which the probability is enough already
        beyond = padded.cumsum(dim=-1)[:len(ordered)] - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return (scores.double() + gumbel_noise(sampling.seed, rows, positions, scores.size(-1))).argmax(dim=-1)


def count_accepted(target, draft):
    """How many drafts to keep, int64 (): those before the first that is not the target's token. (n,) each."""
    return (target == draft).long().cumprod(0).sum()


# --------------------------------------------------------------------------------------------------
# State, and the steps of one stage

class Stages:
    """The state of decoding up to ROWS rows, and the steps of one stage over it.

    All is allocated once, on the device. A pass is over the next T positions of each row after the stage's
    cursor; some may be unused. Its steps here are plain PyTorch; kernels.py has their twins.

    tokens: int64 (B, slots). cursors: int64 (stages + 1, B), not increasing downwards, as drawn above.
    stream: (stages + 1, B, slots, C), x0, then the boundary activations after each stage, by position. sums:
    sums of log p_k so far; (WIDEST, V) by position modulo WIDEST for one row, (B, V) for several, which never
    wait. outcome: float64 (3, CHOSEN), what a step tells the host: numbers, tokens, log-probabilities.
    """

    def __init__(self, model, n_rows, n_stages):
        config = model.config
        slots = config.sequence_len + SLACK
        self.model = model
        self.n_rows = n_rows
        with model.cos.device:
            # zeros, since 0 times garbage must not be NaN
            self.tokens = torch.zeros(n_rows, slots, dtype=torch.int64)
            # the kernels read ROWS of them: those beyond have no work
            self.cursors = torch.zeros(n_stages + 1, ROWS, dtype=torch.int64)[:, :n_rows]
            self.stream = torch.zeros(n_stages + 1, n_rows, slots, config.n_embd, dtype=model.compute_dtype)
            self.sums = torch.zeros(WIDEST if n_rows == 1 else n_rows, config.vocab_size,
                                    dtype=torch.promote_types(model.compute_dtype, torch.float32))
            self.outcome = torch.zeros(3, CHOSEN, dtype=torch.float64)
            self.rows = torch.arange(n_rows)[:, None]                           # (B, 1)
            self.offsets = torch.arange(WIDEST)
        self.cache = KVCache(config, n_rows, slots, model.cos.device, model.compute_dtype)

    def next_positions(self, k, T):
        """The next T positions of stage k: int64 (B, T)."""
        return self.cursors[k + 1][:, None] + self.offsets[:T]

    def run_layers(self, k, T):
        """Run stage k over its next positions, from `stream[k]` to `stream[k + 1]`. Leaves the cursors."""
        positions = self.next_positions(k, T)
        tokens = self.tokens[self.rows, positions]
        if k == 0:
            self.stream[0, self.rows, positions] = self.model.embed(tokens)
        self.cache.place(positions, self.stream.size(2))
        x = self.stream[k, self.rows, positions]                                # (B, T, C)
        x0 = self.stream[0, self.rows, positions]
        self.stream[k + 1, self.rows, positions] = self.model.stage(k, x, x0, tokens, self.cache)

    def add_log_probs(self, k, T, first):
        """Add log p_k at the positions that `run_layers` has run to their sums. first: begin the sums."""
        positions = self.next_positions(k, T)
        x = self.stream[k + 1, self.rows, positions]
        log_probs = self.model.log_probs(k, x).flatten(0, 1)                    # (B T, V)
        slots = self.rows[:, 0] if self.n_rows > 1 else positions[0] % WIDEST
        self.sums[slots] = log_probs if first else self.sums[slots] + log_probs

    def advance(self, k, T):
        """Move the cursor of stage k past the positions that it has run."""
        self.cursors[k + 1] = torch.minimum(self.cursors[k], self.cursors[k + 1] + T)

    def best(self, positions, n_experts):
        """The best token after each position, its log-probability, and top-1 less top-2: three (n,).

        The first two are the outcome.
        """
        log_probs = self.product(positions, n_experts)
        tokens = log_probs.argmax(dim=-1, keepdim=True)
        top = log_probs.gather(1, tokens)[:, 0]
        second = log_probs.scatter(1, tokens, -torch.inf).amax(dim=-1)
        self.tell(tokens[:, 0], top)
        return tokens[:, 0], top, top - second

    def product(self, positions, n_experts):
        """Log-probabilities by the product so far after each position, of one row or one of each: (n, V)."""
        return combine(self.sums if self.n_rows > 1 else self.sums[positions % WIDEST], n_experts)

    def tell(self, tokens, log_probs):
        """Make chosen tokens and their log-probabilities the outcome."""
        self.outcome[1, :len(tokens)] = tokens
        self.outcome[2, :len(tokens)] = log_probs

    def round_weights(self, quantize):
        """From now on run stage 0 by rounded weights. The model itself stays as it is."""
        def rounded(weight):
            return torch.mul(*quantize(weight)).to(weight.dtype)
        head = rounded(self.model.head_weight(0))
        # what a copy has in place of each parameter; the other stages are not run
        twins = {id(p): rounded(p) if "c_" in name or "gate" in name else p
                 for name, p in self.model.named_parameters()}
        self.model = copy.deepcopy(self.model, twins)
        self.model.merged_heads = [head]


def quantize(weight):
    """A matrix (N, C) as int8 and scales, float32 (N, 1): the largest weight of a row becomes 127.

    A row of zeros has scale 0.
    """
    scales = weight.float().abs().amax(dim=1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


def kernels_fit(model):
    """Whether the kernels serve this model where it is. Triton comes with torch's CUDA builds."""
    config = model.config
    return (model.cos.device.type == "cuda" and importlib.util.find_spec("triton")
            and model.compute_dtype == torch.bfloat16 and config.head_dim in (32, 64, 128)
            and config.n_embd % 64 == 0 and config.mlp_hidden % 64 == 0)


# --------------------------------------------------------------------------------------------------
# Engine

@dataclass(frozen=True)
class Plan:
    """How tokens are made. Drafting and early exit exclude each other and take one row at a time.

    experts: the stages whose product chooses. draft_len: tokens that stage 0 drafts before the product judges
    them. draft_weights: "int8" drafts by stage 0's weights rounded to int8, whose drafts every stage judges;
    "same" by the model's own, which leave stage 0 nothing to do again; None: int8 where the engine is fast.
    exits: after stage k leave where `score` is at least exits[k]; empty: no early exit. score: of a
    prefix, the "margin" (top-1 less top-2, nats) or the top-1 "probability".
    """
    experts: range
    draft_len: int = 0
    draft_weights: str = None
    exits: tuple = ()
    score: str = "margin"


class Engine(Stages):
    """Decoding by a plan: its steps, which run on the device, and `start`, which starts one.

    fast: by CUDA kernels and graphs, where `kernels_fit`; the same steps. in_flight: steps to start before
    the first is waited for.
    """

    def __init__(self, model, plan, n_rows=1, sampling=Sampling(), fast=False):
        self.last = plan.experts[-1]
        super().__init__(model, n_rows, self.last + 1)
        self.plan = plan
        self.sampling = sampling
        self.noise_rows = torch.zeros_like(self.rows[:, 0])
        self.fast = fast
        self.in_flight = 2 if fast else 1
        self.graphs = {}
        self.kernels = None
        if fast:
            from kernels import StageKernels
            self.kernels = StageKernels(model, self.tokens, self.cursors, self.stream, self.sums,
                                        self.outcome, self.cache, tile_rows=ROWS)
        # whose steps make drafts, over the same tensors, where those are not `stages`
        self.drafter = None
        if plan.draft_len and (plan.draft_weights == "int8" if plan.draft_weights else fast):
            self.drafter = copy.copy(self.stages)
            self.drafter.round_weights(quantize)

    @property
    def stages(self):
        """Whose `run_layers`, `add_log_probs`, `advance` and `best` are used."""
        return self.kernels or self

    @torch.no_grad()
    def begin(self, prompts, noise_rows=None):
        """Start anew with a prompt of ids per row: every stage runs over all but each one's last token.

        noise_rows: the number of each row for its noise (default: 0, 1, ...).
        """
        self.noise_rows.copy_(torch.tensor(list(noise_rows or range(self.n_rows))))
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=self.tokens.device)
            self.tokens[row, :len(prompt)] = ids[0]
            cache = self.cache.of_row(row)
            for start in range(0, len(prompt) - 1, PREFILL):
                piece = ids[:, start:min(start + PREFILL, len(prompt) - 1)]
                end = start + piece.size(1)
                cache.place(torch.arange(start, end, device=ids.device)[None], end)
                x = x0 = self.model.embed(piece)
                for k in range(self.last + 1):
                    x = self.model.stage(k, x, x0, piece, cache)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.cursors.copy_(torch.stack([lengths] + [lengths - 1] * (self.last + 1)))

    # -- steps: what runs on the device, in static shapes; none asks the host ------------------------------

    def cycle(self, n):
        """1 to n tokens: stage 0 drafts n - 1, then `verify`. 1 is plain decoding, of several rows too."""
        for _ in range(n - 1):
            self.draft()
        self.verify(n)

    def verify(self, n):
        """The stages run over the n newest positions of each row, then the product chooses after each.

        Stage 0 has run over all but the newest. Where that was by rounded weights, it runs again and
        overwrites what it left. The product's choices are kept up to the first that differs from its draft.
        """
        if self.drafter:
            # before the drafts every stage had run equally far
            self.cursors[1] = self.cursors[2]
        after, target = self.choose_targets(n)
        taken = 1
        if n > 1:
            taken += count_accepted(target[:-1], draft=self.tokens[0, after[:-1]])
            # roll back: what ran after a rejected draft
            self.cursors[1:] -= n - taken
        self.keep(after, target, taken)

    def draft(self):
        """Stage 0 runs over the newest position and chooses; with early exit, where it is sure."""
        self.run_stage(0, by=self.drafter)
        self.decide(0)

    def lift(self, k, T, speaks, decides):
        """Stage k runs over T waiting positions; with the newest among them it speaks, and may decide."""
        self.run_stage(k, T, speaks)
        if decides:
            self.decide(k)

    # -- parts of steps ------------------------------------------------------------------------------------

    def run_stage(self, k, T=None, speaks=True, by=None):
        """Run stage k over T positions (default: a tile) and move its cursor. speaks: add its log p_k.

        by: whose steps (default: `stages`).
        """
        T = T or self.widths(k, 1)[0]
        by = by or self.stages
        by.run_layers(k, T)
        if speaks and k in self.plan.experts:
            by.add_log_probs(k, T, first=k == self.plan.experts[0])
        by.advance(k, T)

    def widths(self, k, n):
        """Positions of a row in each pass that brings stage k up over n: whole tiles, in few passes.

        Without kernels stage 0 takes them one by one, whoever needs them: in plain decoding it has only one,
        and there the bits of a product depend on its number of rows.
        """
        tile = ROWS if self.n_rows == 1 and (k or self.fast) else 1
        widest = WIDEST if self.fast else tile
        return [min(widest, -(-left // tile) * tile) for left in range(n, 0, -widest)]

    def choose_targets(self, n):
        """Bring the stages up over n positions of each row; the product chooses after each.

        Returns where its choices belong and the choices, int64: (B,) for n = 1, else (n,) of the one row.
        """
        for k in range(self.last + 1):
            for T in self.widths(k, n if k or self.drafter else 1):
                self.run_stage(k, T)
        after = self.cursors[-1] if n == 1 else self.cursors[-1] + (self.offsets[:n] - (n - 1))
        return after, self.choose(after - 1, len(self.plan.experts))[0]

    def choose(self, positions, n_experts):
        """Choose the token after each position by the product so far, and tell it.

        Returns the token, and the log-probability and margin of the best one: three (n,).
        """
        best, top, margin = self.stages.best(positions, n_experts)
        if self.sampling.temperature == 0:
            return best, top, margin
        log_probs = self.product(positions, n_experts)
        tokens = sample_token(log_probs, self.sampling, self.noise_rows.expand(len(positions)), positions + 1)
        self.tell(tokens, log_probs.gather(1, tokens[:, None])[:, 0])
        return tokens, top, margin

    def decide(self, k):
        """Choose the token after stage 0's last position by prefix k + 1; it is known then if that is sure.

        Where it is not, stage 0 has nothing to run until a higher stage decides: a draft that was started
        already does nothing. The outcome's first number is whether it is sure.
        """
        after = self.cursors[1]                                     # (1,): where the token will stand
        token, top, margin = self.choose(after - 1, k + 1)
        if self.plan.exits and k < self.last:
            sure = (top.exp() if self.plan.score == "probability" else margin) >= self.plan.exits[k]
        else:
            sure = 1
        self.tokens[0, after] = token
        torch.add(after, sure, out=self.cursors[0])
        self.outcome[0, :1] = sure

    def keep(self, after, tokens, taken):
        """Write the product's tokens and know those up to stage 0's cursor; tell how many were taken."""
        self.tokens[self.rows[:, 0], after] = tokens
        torch.add(self.cursors[1], 1, out=self.cursors[0])
        self.outcome[0, :1] = taken

    # -- the host's side -----------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, step, *args):
        """Start a step, as `engine.start(engine.cycle, 5)`; return a function that waits for its outcome.

        The outcome is numpy (3, CHOSEN). With `fast` a step is recorded once as a CUDA graph, which then runs
        without the host; its outcome must be waited for before it is started three more times.
        """
        if not self.fast:
            step(*args)
            return self.outcome.to("cpu", copy=True).numpy
        key = (step.__name__, *args)
        if key not in self.graphs:
            self.graphs[key] = self.capture(step, *args)
        graph, host = self.graphs[key]
        graph.replay()
        buffer, event = host[0]
        host.rotate(-1)
        buffer.copy_(self.outcome, non_blocking=True)
        event.record()

        def wait():
            event.synchronize()
            return buffer.numpy().copy()
        return wait

    def capture(self, step, *args):
        """Record a step: its graph, and buffers for its outcomes on the host.

        Its first runs compile the kernels; they leave only garbage beyond the cursors.
        """
        state = (self.tokens, self.cursors, self.sums)
        saved = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(*args)
                for tensor, before in zip(state, saved):
                    tensor.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(*args)
        host = deque((torch.zeros_like(self.outcome, device="cpu", pin_memory=True), torch.cuda.Event())
                     for _ in range(3))
        return graph, host

    def start_lift(self, k, waiting, decides):
        """As `start`: bring stage k up over its waiting positions; prefix k + 1 may decide at the newest."""
        *earlier, newest = self.widths(k, waiting)
        for T in earlier:
            self.start(self.lift, k, T, False, False)
        return self.start(self.lift, k, newest, True, decides)


# --------------------------------------------------------------------------------------------------
# Loops. With graphs the host keeps two steps in flight, so that the device never waits for it:
#
#     device   [-- step 1 --][-- step 2 --][-- step 3 --][-- step 4 --]
#     host     starts 1, 2    reads 1,      reads 2,      reads 3,
#                             starts 3      starts 4      starts 5

# stage: that proposed the token; depth: the number of stages whose product decided it
Token = namedtuple("Token", "id log_prob stage depth")
# rows: the new `Token`s of each row
Step = namedtuple("Step", "rows judged accepted")


def count(steps):
    """Cycles, drafts judged (the accepted and the first rejected one of each cycle), and accepted ones."""
    return {"cycles": len(steps), "judged": sum(step.judged for step in steps),
            "accepted": sum(step.accepted for step in steps)}


def generate(engine, max_new_tokens):
    """Yield a `Step` per step of an engine that has begun, until rows have `max_new_tokens` or a few more."""
    if engine.plan.exits:
        yield from generate_adaptive(engine, max_new_tokens)
        return
    n = engine.plan.draft_len + 1
    made = 0
    flying = deque()
    while made < max_new_tokens:
        # no more than the text has room for if those in flight are accepted whole
        while len(flying) < engine.in_flight and made + n * len(flying) < max_new_tokens:
            flying.append(engine.start(engine.cycle, n))
        numbers, ids, log_probs = flying.popleft()()
        taken = int(numbers[0])
        made += taken
        # plain: one token of each row. Drafted: `taken` of one row, all but the last by stage 0
        tokens = [
            Token(int(ids[i]), float(log_probs[i]), 0 if i < taken - 1 else engine.last, engine.last + 1)
            for i in range(max(taken, engine.n_rows))]
        rows = [tokens] if engine.n_rows == 1 else [[token] for token in tokens]
        yield Step(rows, min(taken, n - 1), taken - 1)


def generate_adaptive(engine, max_new_tokens):
    """As `generate`, with early exit, one token a step."""
    # positions that each stage has yet to run: those whose token was decided before it
    waiting = [0] * (engine.last + 1)
    flying = deque()

    def draft_ahead(left):
        while len(flying) < min(engine.in_flight, left):
            flying.append(engine.start(engine.draft))

    for left in range(max_new_tokens, 0, -1):
        # stage 0 at the newest position, and beyond what the host has read
        draft_ahead(left)
        sure, token, log_prob = flying.popleft()()[:, 0]
        waiting = [n + 1 for n in waiting]
        k = 0
        if not sure:
            # the drafts in flight found no new token and did nothing
            flying.clear()
        while not sure:
            # the next stage catches up; it decides unless its prefix is never sure
            k += 1
            decides = k == engine.last or engine.plan.exits[k] < math.inf
            wait = engine.start_lift(k, waiting[k], decides)
            waiting[k] = 0
            if k == engine.last:
                # the full product is always sure: stage 0 goes on at once
                draft_ahead(left - 1)
            if decides:
                sure, token, log_prob = wait()[:, 0]
        yield Step([[Token(int(token), float(log_prob), k, k + 1)]], 0, 0)


# --------------------------------------------------------------------------------------------------
# Timing one prompt

Run = namedtuple("Run", "ids depths seconds cycles judged accepted")


@contextlib.contextmanager
def decoding_threads(model):
    """On a CPU let a small model decode on one thread: its products are so short that waiting for another
    thread costs more than it brings, and on busy cores ten times as much (`tiny`).
    """
    n_threads = torch.get_num_threads()
    if model.cos.device.type == "cpu" and model.config.n_embd <= ONE_THREAD_UP_TO:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def clock(device):
    """Seconds, by when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def decode_timed(engine, prompt, n_new):
    """Continue a prompt of ids by at least n_new tokens: a `Run`. seconds: without those of the prompt.

    Cycles count whose drafts all had room: the last ones may draft beyond the text, and beyond the context.
    """
    engine.begin([prompt])
    begun = clock(engine.tokens.device)
    steps = list(generate(engine, n_new))
    seconds = clock(engine.tokens.device) - begun
    tokens = []
    counted = []
    for step in steps:
        if len(tokens) + engine.plan.draft_len <= n_new:
            counted.append(step)
        tokens += step.rows[0]
    return Run([token.id for token in tokens], [token.depth for token in tokens], seconds, **count(counted))


# --------------------------------------------------------------------------------------------------
# From flags to a plan

def make_plan(model_config, mode, stage=None, prefix=None, draft_len=None, draft_weights=None,
              wand_margin=None, routing_threshold=None, bounds=None, metrics=None):
    """The `Plan` of a mode. bounds: the checkpoint's p99 bounds, nats. metrics: metrics.json. Or None.

    WAND leaves after stage k where the margin exceeds the sum of the bounds of the stages that remain, or
    with wand_margin where it reaches the fitted threshold of stage k. Routing leaves after stage 0 where its
    top-1 probability reaches the threshold. Raises ValueError where the checkpoint lacks the stage or the
    calibration.
    """
    K = model_config.n_stage
    if mode == "full":
        return Plan(range(K))
    if mode == "single":
        if stage is None or not 0 <= stage < K:
            raise ValueError(f"--mode single needs --stage from 0 to {K - 1}, not {stage}")
        return Plan(range(stage, stage + 1))
    if mode == "prefix":
        if prefix is None or not 1 <= prefix <= K:
            raise ValueError(f"--mode prefix needs --prefix from 1 to {K}, not {prefix}")
        return Plan(range(prefix))
    if K == 1:
        raise ValueError(f"--mode {mode} needs several stages; this checkpoint has one: use --mode full")
    if mode == "speculative":
        return Plan(range(K), draft_len or 4, draft_weights)

    # early exit: one threshold a stage but for the last. None: no threshold keeps the cap, so never leave
    if routing_threshold is not None:
        thresholds = [routing_threshold]
    elif (bounds if mode == "wand" and not wand_margin else metrics) is None:
        raise ValueError(f"--mode {mode} needs thresholds that this checkpoint lacks ({BOUNDS_KEY} in "
                         f"config.json, or metrics.json); calibrate it first: python evaluate.py RUN")
    elif mode == "routing":
        thresholds = [metrics["routing"]["threshold"]]
    elif wand_margin:
        thresholds = metrics["wand"]["margin"]["thresholds"]
    else:
        # the exit rule's ">" as ">=" of the next float32, as margins are
        remaining = torch.tensor([sum(bounds[k:]) for k in range(K - 1)])
        thresholds = torch.nextafter(remaining, torch.tensor(math.inf)).tolist()
    exits = [math.inf if threshold is None else threshold for threshold in thresholds]
    exits += [math.inf] * (K - 1 - len(exits))
    return Plan(range(K), exits=tuple(exits), score="probability" if mode == "routing" else "margin")


# --------------------------------------------------------------------------------------------------
# Text

def count_new_tokens(config, encoded, asked, default=64):
    """How many tokens to generate after each of these prompts of ids: `asked`, or None: up to `default`.

    The last token is never fed back. Raises ValueError where the context has no room.
    """
    lengths = [len(ids) for ids in encoded]
    longest = max(lengths)
    left = config.sequence_len + 1 - longest
    if left < (asked or 1):
        raise ValueError(f"prompt {lengths.index(longest) + 1}, of {longest} tokens, leaves room for "
                         f"{max(left, 0)} of {asked or 1} new tokens in a context of "
                         f"{config.sequence_len}; shorten it")
    return asked or min(default, left)


def complete(model, tokenizer, prompts, max_new_tokens, plan, sampling=Sampling(), n_samples=1, fast=False,
             on_text=None):
    """Yield the continuations of texts, `n_samples` of each in order, as dicts.

    prompts: a list, or an iterator, whose texts are taken and answered one by one. max_new_tokens: None is
    64, as far as the context goes. fast: see `Engine`; on CUDA pass kernels_fit(model). on_text: called with
    the first one's text as it comes, the prompt's first; half a character is held back until the rest comes.
    Keys: prompt, completion, token_ids, log_probs (nats), stages
    (that proposed each token), depths (stages that decided it), stopped ("bos" or "length"), and for
    speculation cycles and drafts judged and accepted, of all cycles, the last one's whole.
    """
    # in bfloat16 a matrix product's rows depend on how many there are, but in the kernels
    exact = fast or model.compute_dtype != torch.bfloat16
    batching = isinstance(prompts, list) and exact and not (plan.draft_len or plan.exits)
    if isinstance(prompts, list):
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        max_new_tokens = count_new_tokens(model.config, encoded, max_new_tokens)
    # number i is a sample of prompt i // n_samples
    waiting = enumerate(prompt for prompt in prompts for _ in range(n_samples))
    engine = None
    while group := list(itertools.islice(waiting, ROWS if batching else 1)):
        encoded = [tokenizer.encode(prompt) for _, prompt in group]
        n_new = count_new_tokens(model.config, encoded, max_new_tokens)
        if engine is None or engine.n_rows != len(group):
            engine = Engine(model, plan, len(group), sampling, fast)
        if on_text:
            on_text(group[0][1])
        engine.begin(encoded, [number for number, _ in group])
        rows = [[] for _ in group]
        met_bos = [False] * len(group)
        steps = []
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for step in generate(engine, n_new):
            steps.append(step)
            shown = len(rows[0])
            for row, new in enumerate(step.rows):
                for token in new:
                    if met_bos[row] or len(rows[row]) == n_new:
                        break
                    if token.id == tokenizer.bos:
                        met_bos[row] = True
                    else:
                        rows[row].append(token)
            if on_text:
                on_text(decoder.decode(tokenizer.decode_bytes([token.id for token in rows[0][shown:]])))
            if all(met_bos):
                break
        if on_text:
            on_text(decoder.decode(b"", final=True))
        # the first text alone
        on_text = None
        for (_, prompt), tokens, stopped in zip(group, rows, met_bos):
            ids = [token.id for token in tokens]
            yield {"prompt": prompt, "completion": tokenizer.decode(ids), "token_ids": ids,
                   "log_probs": [token.log_prob for token in tokens],
                   "stages": [token.stage for token in tokens], "depths": [token.depth for token in tokens],
                   "stopped": "bos" if stopped else "length",
                   **(count(steps) if plan.draft_len else {})}


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class SampleConfig(DeviceFlags):
    prompt: str = flag("", "text to continue; empty is bos alone: a new document")
    prompt_file: str = flag(None, "continue each line of this UTF-8 file instead; - is standard input, "
                                  "answered line by line", path=True)
    mode: str = flag("full", "full, single (--stage), prefix (--prefix), wand, routing or speculative",
                     choices=tuple(MODES))
    stage: int = flag(None, "the one stage of --mode single, counted from 0")
    prefix: int = flag(None, "how many first stages --mode prefix combines, 1 to K")
    draft_len: int = flag(None, "in --mode speculative: tokens that stage 0 drafts at a time (default: "
                                "4)", low=1, high=CHOSEN - 1)
    draft_weights: str = flag(None, "what stage 0 drafts by: int8, or the same weights as the product "
                                    "(default: int8 with --compile); the text does not depend on it",
                              choices=("int8", "same"))
    wand_margin: bool = flag(None, "in --mode wand: leave by the fitted margins of metrics.json")
    routing_threshold: float = flag(None, "in --mode routing: leave after stage 0 where its top-1 "
                                          "probability is at least this (default: from metrics.json)")
    max_new_tokens: int = flag(None, "tokens to generate at most (default: 64, as far as the context "
                                     "goes)", low=1)
    temperature: float = flag(0.8, "0 is greedy; 1 samples the model's own distribution", low=0, high=10 ** 6)
    top_k: int = flag(0, "sample among the k most probable tokens (0: all)", low=0)
    top_p: float = flag(1.0, "sample among the most probable tokens that hold this probability (1: "
                             "all)", low=1e-6, high=1)
    num_samples: int = flag(1, "samples of each prompt", low=1)
    seed: int = flag(0, "of the noise, which is a function of seed, sample, position and token alone: under "
                        "one seed lossless modes (full, speculative) write the same text, and models that "
                        "resemble each other nearly the same", low=0, high=2 ** 63 - 1)
    compile: bool = flag(False, "decode by Triton kernels in CUDA graphs: fast, after some seconds")
    json: bool = flag(False, "print a JSON object per sample: texts, ids, log-probabilities, stages, depths")

    def __post_init__(self):
        for mode, names in MODES.items():
            for name in names.split():
                if mode != self.mode and getattr(self, name) is not None:
                    raise ValueError(f"{spelled(name)} {getattr(self, name)} goes with --mode {mode}, not "
                                     f"with --mode {self.mode}")


def read_prompts(path):
    """Yield the lines of a UTF-8 file, or of standard input for "-". Raises ValueError and OSError.

    Line ends of Windows are no part of a prompt, nor is a byte order mark.
    """
    with open(0 if path == "-" else path, encoding="utf-8-sig") as file:
        try:
            for line in file:
                yield line.removesuffix("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"--prompt-file {path} is not UTF-8 ({e}); convert it first") from None


def told(sample, plan, seconds):
    """A line about how a sample was made."""
    n = len(sample["token_ids"])
    text = f"{n} tokens, {n / seconds:.1f} tokens/s, the prompt's time included"
    if plan.draft_len:
        text += f", {sample['cycles']} cycles, {sample['accepted']} of {sample['judged']} drafts accepted"
    if plan.exits:
        text += f", {sample['depths'].count(1)} of them decided by s0"
    return text


def main(argv=None):
    given = parse_flags(SampleConfig, __doc__, argv,
                        positionals=[("checkpoint", None, "a step-XXXXX directory, or a run: its newest")])
    path = resolve_checkpoint(given.pop("checkpoint"))
    config = SampleConfig(**given)
    if config.prompt_file is not None and config.prompt:
        raise ValueError("--prompt and --prompt-file exclude each other; write the prompt into the file")
    # argv may not be UTF-8
    prompts = [clean_text(config.prompt)]
    if config.prompt_file is not None:
        prompts = read_prompts(config.prompt_file)
        # a file is looked at whole before the first answer
        if config.prompt_file != "-":
            prompts = list(prompts)
    if prompts == []:
        raise ValueError(f"--prompt-file {config.prompt_file} is empty; give one prompt a line")
    device, dtype = choose_device(config.device, config.dtype)
    model, record, _ = load_checkpoint(path, device, dtype)
    if config.compile and not kernels_fit(model):
        raise ValueError("--compile needs a CUDA device, Triton, --dtype bfloat16, head dimensions of 32, 64 "
                         "or 128, n_embd and mlp_hidden that are multiples of 64; leave it out")
    metrics = path / "metrics.json"
    metrics = read_json(metrics) if metrics.exists() else None
    plan = make_plan(model.config, config.mode, config.stage, config.prefix, config.draft_len,
                     config.draft_weights, config.wand_margin, config.routing_threshold,
                     record.get(BOUNDS_KEY), metrics)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    streaming = not config.json and config.prompt_file is None and config.num_samples == 1
    start = time.monotonic()
    with attention_backends(device), decoding_threads(model):
        samples = complete(model, Tokenizer.load(path), prompts, config.max_new_tokens, plan, sampling,
                           config.num_samples, config.compile,
                           on_text=partial(print, end="", flush=True) if streaming else None)
        for number, sample in enumerate(samples):
            if streaming:
                print(flush=True)
                print(told(sample, plan, time.monotonic() - start), file=sys.stderr)
            elif config.json:
                print(json.dumps(sample), flush=True)
            else:
                print(f"--- sample {number} ---\n{sample['prompt']}{sample['completion']}", flush=True)


if __name__ == "__main__":
    run(main)
