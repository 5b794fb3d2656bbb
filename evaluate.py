"""
Measure checkpoints: every table of the model card, all but generated text from one pass of the trunk, for one checkpoint, a run or two.

    python evaluate.py runs/tiny/step-00400                     # one checkpoint
    python evaluate.py runs/tiny                                # every checkpoint of a run: TRAJECTORY.md and trajectory.png beside them
    python evaluate.py runs/poe runs/bp                         # two runs side by side, with the gap in percent
    torchrun --standalone --nproc_per_node 8 evaluate.py runs/3b

The slice is the first `--split-tokens` of the validation windows, which are fixed for ever (dataloader.py). Its first `--wand-tokens`
calibrate bounds and thresholds; rates are reported on positions of later windows whose document has no position in the calibration part
(`Slice`). bpb, accuracy and alpha use all of it. Targets that are special tokens count nowhere.

Every rate is a ratio of float64 sums, kept per block of documents, so every rate has a standard error that knows that the positions of
a document are alike, and every difference of bpb or accuracy between two checkpoints has a paired one (`ratio`, `change`). A run's ranks
share the windows and add up their sums. Memory is bounded by a chunk of tokens, and a few bytes per token of the slice.

Written, inside the run that is given and nowhere else: metrics.json and timings.json of each step, `poe_wand_*` in its config.json,
TRAJECTORY.md, trajectory.png. Definitions are in the docstrings and in README's "Measuring". WAND: after Broder et al., CIKM 2003.
"""
import contextlib
import functools
import hashlib
import io
import json
import math
import sys
import time
import traceback
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataloader import VAL_SEED, open_data, validation_windows, write_whole
from flags import Ranks, flag, parse_flags, run, spelled
from model import (BOUNDS_KEY, attention_backends, checkpoint_steps, choose_device, get, load_checkpoint, norm, read_object, read_record, softcap,
                   stage_bytes)
from sample import Engine, Plan, complete, decode_timed, kernels_fit
from schedule import learning_rate, phase_index, phase_of, position

FORMAT = 1                      # of metrics.json
SPLIT_TOKENS = 1_048_576        # the card's slice; an eighth of a slice calibrates
CHUNK_LOGITS = {"cpu": 2 ** 20, "cuda": 2 ** 26}        # (token, vocabulary) pairs of one array held at once: a CPU's cache; 128 MiB in bfloat16
N_BLOCKS = 128                  # blocks of documents that carry the standard errors
ALPHAS = (0.25, 0.5, 0.75, 1.0)                         # alpha = 0 is the full prefix
MARGIN_CAP = 0.001              # of disagreement with full, per stage, for WAND's margin form
CURVE_SHARES = tuple(s / 20 for s in range(1, 21))      # shares of calibration positions that leave at s0: the routing curve
SUMMED = ("nats_single", "nats_prefix", "hits_single", "hits_prefix", "nats_alpha", "tokens", "bytes")      # columns of the whole slice
CALIBRATING = ("range", "margin", "agree", "confidence", "regret", "tokens")            # columns kept of the calibration part
DRAFT_LEN, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 256       # of the speculative table
SPECULATIVE_PROMPTS = {"cpu": 8, "cuda": 64}
PROBE_TOKENS = 60
PROBE = ("The capital of France is", "The chemical symbol of gold is", "If yesterday was Friday, then tomorrow will be",
         "The opposite of hot is", "The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is")
FACTS = ("Paris", "Au", "79", "planets", "2")
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")


# ---------------------------------------------------------------------------------------------------------------
# One pass

def token_statistics(logits, targets, full):
    """What the tables need of n positions: a dict of float tensors (n, w). The one place that reads the vocabulary.

    logits: K tensors (n, V), the heads' outputs before the softcap. targets: int64 (n,). full: with alpha, ranges, margins and agreement.
    With z_k = softcap(logits_k), log p_k is z_k less a constant of the position, so the score of a prefix is the mean of its z_k, up
    to a constant: argmaxes, margins and ranges need no normalisation, and logsumexp is taken of the mean itself (|z| < 15, so exp()
    needs no maximum subtracted). Equal to model.combine by test; written so that it compiles into one kernel that reads the logits twice
    and keeps no (n, V) array but the K means.
    nats_single, nats_prefix, hits_single, hits_prefix: (n, K). nats_alpha: (n, 4). range, margin: nats (n, K - 1): of prefix k + 1 to
    k + 2, and top-1 less top-2 of prefix k + 1. agree: prefix k + 1 has full's argmax. confidence: (n, 1), s0's top probability.
    regret: (n, 1), log p_full(y) - log p_0(y). Ties of an argmax go to the lowest id.
    """
    K, y = len(logits), targets[:, None]                                    # (n, 1)
    columns = {name: [] for name in ("nats_single", "nats_prefix", "hits_single", "hits_prefix")}
    total, total_y, means, tops = 0.0, 0.0, [], []
    for k in range(K):
        z, z_y = softcap(logits[k]), softcap(logits[k].gather(1, y))        # (n, V), (n, 1)
        total, total_y = total + z, total_y + z_y
        mean, top = total / (k + 1), (total / (k + 1)).argmax(dim=-1, keepdim=True)
        normaliser = z.exp().sum(dim=-1, keepdim=True).log()                # (n, 1)
        columns["nats_single"].append(normaliser - z_y)
        columns["nats_prefix"].append(mean.exp().sum(dim=-1, keepdim=True).log() - total_y / (k + 1) if k else normaliser - z_y)
        columns["hits_single"].append((z.argmax(dim=-1, keepdim=True) == y).to(z.dtype))
        columns["hits_prefix"].append((top == y).to(z.dtype))
        means.append(mean)
        tops.append(top)
        if full and k == 0:
            columns["confidence"] = [(z.amax(dim=-1, keepdim=True) - normaliser).exp()]
    if full:
        ids, best = torch.arange(mean.size(1), device=mean.device), mean.amax(dim=-1, keepdim=True)
        columns["nats_alpha"] = [((mean - best) * K ** alpha).exp().sum(dim=-1, keepdim=True).log() - (total_y / K - best) * K ** alpha
                                 for alpha in ALPHAS]                       # S_alpha = K^alpha x the mean
        columns["regret"] = [columns["nats_single"][0] - columns["nats_prefix"][-1]]
        if K > 1:
            deltas = [after - before for before, after in zip(means, means[1:])]
            columns["range"] = [d.amax(dim=-1, keepdim=True) - d.amin(dim=-1, keepdim=True) for d in deltas]
            columns["margin"] = [mean.amax(dim=-1, keepdim=True) - mean.masked_fill(ids == top, -torch.inf).amax(dim=-1, keepdim=True)
                                 for mean, top in zip(means[:-1], tops)]
            columns["agree"] = [(top == tops[-1]).to(mean.dtype) for top in tops[:-1]]
    return {name: torch.cat(parts, dim=1) for name, parts in columns.items()}


@functools.cache
def fused_token_statistics():
    return torch.compile(token_statistics, dynamic=False)


def send(tensor, device):
    """Copy a CPU tensor to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def one_pass(model, mix, windows, tokenizer, batch_size, full):
    """Run the trunk once over `windows` of `mix`; yield (windows of the batch, columns): `token_statistics` of its B T positions.

    Two columns are added: tokens (1 where the target counts, 0 for special tokens) and bytes. Nothing here waits for the device.
    """
    device, K = model.cos.device, model.config.n_stage
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    heads = [model.head_weight(k) for k in range(K)]
    statistics = fused_token_statistics() if device.type == "cuda" else token_statistics
    step = max(1, CHUNK_LOGITS[device.type] // model.config.vocab_size)
    for first in range(0, len(windows), batch_size):
        rows = windows[first:first + batch_size]
        idx, targets = (send(t, device) for t in mix.batch(rows))
        y = targets.flatten()
        stages = [norm(x).flatten(0, 1) for x in model.boundaries(idx)]     # K x (B T, C)
        chunks = [statistics([F.linear(x[i:i + step], head) for x, head in zip(stages, heads)], y[i:i + step], full)
                  for i in range(0, len(y), step)]
        columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        columns["bytes"] = token_bytes[y][:, None]
        columns["tokens"] = (columns["bytes"] > 0).double()
        yield rows, columns


def add(sums, columns, weight, blocks=None):
    """Add columns (N, w) times weight (N, 1) to the float64 `sums`, {name: (w,)}; per block {name: (G, w)} where blocks (N,) is given.

    Per block by a matrix product and not by atomic additions, whose order, and so the last digit, would change from run to run.
    """
    select = None if blocks is None else F.one_hot(blocks, N_BLOCKS).double().T                     # (G, N)
    for name, column in columns.items():
        column = column.double() * weight
        sums[name] = sums.get(name, 0.0) + (column.sum(dim=0) if select is None else select @ column)


def all_reduce(tensors, world_size):
    """Sum a dict of tensors over the ranks, in place."""
    for name in sorted(tensors) if world_size > 1 else ():
        torch.distributed.all_reduce(tensors[name])


def share(first, last, rank, world_size):
    """This rank's windows of range(first, last), an array."""
    if last - first < world_size:
        raise ValueError(f"{last - first} windows cannot be shared by {world_size} ranks; take fewer ranks or more tokens")
    return np.arange(first, last)[rank::world_size]


def score(model, mix, n_windows, tokenizer, batch_size, rank=0, world_size=1):
    """Sum nats and hits of every stage and prefix over the first `n_windows` windows of `mix`, in one pass of the trunk.

    Ranks take disjoint windows; every rank returns the sums of all.
    Returns a dict: tokens, bytes (counted targets), and float64 lists nats_single, nats_prefix, hits_single, hits_prefix of length K.
    """
    sums = {}
    for _, columns in one_pass(model, mix, share(0, n_windows, rank, world_size), tokenizer, batch_size, False):
        add(sums, columns, columns["tokens"])
    all_reduce(sums, world_size)
    sums = {name: value.tolist() for name, value in sums.items()}
    return {**sums, "tokens": int(sums["tokens"][0]), "bytes": int(sums["bytes"][0])}


def summarize(sums):
    """The metrics of one checkpoint from the sums of `score`: bpb, accuracy, crossover gap, in metrics.json's keys."""
    unit = math.log(2) * sums["bytes"]                                     # nats of one bit per byte
    single, prefix = ([nats / unit for nats in sums[name]] for name in ("nats_single", "nats_prefix"))
    return {
        "tokens": sums["tokens"], "bytes": sums["bytes"],
        "bpb": {"full": prefix[-1], "single": single, "prefix": prefix},
        "accuracy": {"full": sums["hits_prefix"][-1] / sums["tokens"], "single": [h / sums["tokens"] for h in sums["hits_single"]]},
        "crossover_gap": prefix[-1] - single[-1],
    }


# ---------------------------------------------------------------------------------------------------------------
# The slice and its documents

def slice_text(mix, n_windows, tokenizer):
    """The slice's target text as bytes, in the order of the corpus, which is the kindest to a compressor, and its sha256."""
    source, _, window = mix.locate(np.arange(n_windows))
    order = np.lexsort((window, source))
    text = b"".join(tokenizer.decode_bytes(mix.window(source[i], window[i])[1:].tolist()) for i in order)
    return text, hashlib.sha256(text).hexdigest()


def slice_documents(mix, n_windows, bos):
    """The document of each target: int64 (n_windows, T), numbered from 0 in the order of the sources and their streams.

    A document is a source and the place of its bos: the last one at or before the target, looked for in earlier windows where the
    window's own beginning lies inside a document. So windows that hold pieces of one document name the same number.
    """
    T, (source, _, window) = mix.T, mix.locate(np.arange(n_windows))
    begins = np.empty((n_windows, T), dtype=np.int64)                       # place of the document's bos in the source's stream
    for i in range(n_windows):
        stream, w = mix.sources[source[i]], int(window[i])
        place = np.where(mix.window(source[i], w) == bos, w * T + np.arange(T + 1), -1)
        earlier = w
        while place[0] < 0:
            earlier -= 1
            found = np.flatnonzero(stream.window(earlier, T)[:T] == bos) if earlier >= 0 else [0]
            if len(found):
                place[0] = max(earlier, 0) * T + found[-1]
        begins[i] = np.maximum.accumulate(place)[1:]
    _, number = np.unique(begins + (source[:, None].astype(np.int64) << 48), return_inverse=True)
    return number.reshape(n_windows, T)


class Slice:
    """The text that is measured: the first windows of a validation mix. A pure function of the mix and the two sizes.

    The first `n_calibration` windows calibrate. Rates are reported on `in_report`, bool (n_windows, T): positions of the other windows
    whose target's document has no target in a calibration window, because windows cut documents and both parts may hold pieces of one.
    """

    def __init__(self, mix, n_windows, n_calibration, tokenizer):
        self.mix, self.n_windows, self.n_calibration, self.tokenizer = mix, n_windows, n_calibration, tokenizer
        self.documents = slice_documents(mix, n_windows, tokenizer.bos)
        self.in_report = ~np.isin(self.documents, self.documents[:n_calibration])
        if not self.in_report.any():
            raise ValueError(f"every document of the slice has tokens among the {n_calibration * mix.T:,} that calibrate, so none is left to report "
                             f"on; lower --wand-tokens or raise --split-tokens")
        self.sha256 = slice_text(mix, n_windows, tokenizer)[1]


# ---------------------------------------------------------------------------------------------------------------
# Calibration

def quantile_index(n, percent):
    """Place, in ascending order, of the smallest of n values that has at least `percent` % of them at or below it."""
    return max(0, -(-n * percent // 100) - 1)


def fit_threshold(score, cost, cap):
    """The smallest score threshold t for which the mean cost of the positions with score >= t is at most `cap`; inf where none is.

    score, cost: float64 (n,). Equal scores stay together. The one rule behind routing and WAND's margin form.
    """
    order = np.argsort(-score, kind="stable")
    ordered, mean = score[order], np.cumsum(cost[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.append(ordered[1:] != ordered[:-1], True)[:len(order)]
    allowed = np.flatnonzero(last_of_equals & (mean <= cap))
    return float(ordered[allowed[-1]]) if len(allowed) else math.inf


def calibrate(columns, blocks, cap):
    """Fit everything adaptive on the calibration positions: a dict of float64 arrays. columns: float64 (n, w) by `token_statistics`' names.

    bounds (K - 1,): p99 of each range, exact: an observed value. bounds_stderr: half the distance between the observed values whose ranks lie
    one standard error above and below the bound's, that of the share of positions above it, by blocks (n,) of documents. remaining: what
    the stages not yet run may still move, the sum of their bounds. margins (K - 1,): `fit_threshold` of the positions that have not left
    earlier, on disagreement, so that violations stay within MARGIN_CAP in sum too. tau (1,): routing. levels (20,): s0's confidence at
    CURVE_SHARES.
    """
    n, sizes = len(columns["range"]), np.bincount(blocks, minlength=N_BLOCKS).astype(np.float64)
    ranges, at = np.sort(columns["range"], axis=0), quantile_index(n, 99)
    bounds, bounds_stderr, stays, margins = ranges[at], [], np.ones(n, dtype=bool), []
    for ordered, over in zip(ranges.T, (columns["range"] > bounds).T):
        deviation = round(n * (ratio(np.bincount(blocks, over, N_BLOCKS), sizes)[1] or 0.0))
        bounds_stderr.append((ordered[min(n - 1, at + deviation)] - ordered[max(0, at - deviation)]) / 2)
    for margin, agree in zip(columns["margin"].T, columns["agree"].T):
        margins.append(fit_threshold(margin[stays], 1 - agree[stays], MARGIN_CAP))
        stays &= margin < margins[-1]
    confidence = columns["confidence"][:, 0]
    return {"bounds": bounds, "remaining": np.cumsum(bounds[::-1])[::-1].copy(), "margins": np.array(margins),
            "bounds_stderr": np.array(bounds_stderr),
            "tau": np.array([fit_threshold(confidence, np.maximum(columns["regret"][:, 0], 0), cap)]),
            "levels": np.sort(confidence)[[n - 1 - quantile_index(n, round(100 * share)) for share in CURVE_SHARES]]}


def adaptive_statistics(columns, fitted, cap):
    """What adaptive decoding would do at each position, under fitted thresholds: a dict of float64 columns (N, w), summed later.

    WAND stops after stage k where margin > the bounds that remain; its margin form where margin >= the stage's threshold; routing takes
    s0 where its confidence >= tau. exit: one-hot (N, K). violation: it stopped early and full's argmax differs. cost: max(regret, 0).
    """
    agree, confidence, regret = columns["agree"], columns["confidence"], columns["regret"]
    out = {"tokens": torch.ones_like(regret), "exceedance": columns["range"] > fitted["bounds"], "base_agree": agree[:, :1]}
    for name, decided in (("wand", columns["margin"] > fitted["remaining"]), ("margin", columns["margin"] >= fitted["margins"])):
        stage = F.pad(decided.int(), (0, 1), value=1).argmax(dim=1, keepdim=True)                   # the first that decides; else the last
        out[f"{name}_exit"] = F.one_hot(stage[:, 0], agree.size(1) + 1)
        out[f"{name}_violation"] = 1 - F.pad(agree, (0, 1), value=1).gather(1, stage)
    routed, leaves = confidence >= fitted["tau"], confidence >= fitted["levels"]                    # (N, 1), (N, 20)
    return out | {"routed": routed, "routed_agree": routed * agree[:, :1], "cost": routed * regret.clamp(min=0), "oracle": regret <= cap,
                  "curve": leaves, "curve_agree": leaves * agree[:, :1]}


def ratio(numerator, denominator):
    """(R, standard error) of R = sum(numerator) / sum(denominator), from sums per block of documents, float64 (G,).

    The usual linearisation of a ratio: with e = numerator - R denominator, se^2 = G / (G - 1) sum(e^2) / sum(denominator)^2 over the G
    blocks that hold something. Documents are taken as independent, positions of one are not. None where nothing was counted.
    """
    total, G = denominator.sum(), int((denominator != 0).sum())
    if total == 0:
        return None, None
    value = numerator.sum() / total
    residual = numerator - value * denominator
    return float(value), float(math.sqrt(G / (G - 1) * (residual ** 2).sum()) / total) if G > 1 else None


def put(metrics, name, numerators, denominator):
    """Set metrics[name] and metrics[name_stderr] to the ratio of sums per block: numerators (G,), or (G, w) for lists of w."""
    if numerators.ndim == 1:
        metrics[name], metrics[f"{name}_stderr"] = ratio(numerators, denominator)
    else:
        metrics[name], metrics[f"{name}_stderr"] = map(list, zip(*(ratio(column, denominator) for column in numerators.T)))


def measure(model, part, batch_size, cap, rank=0, world_size=1, progress=None):
    """Every table but speculation and samples, in one pass of the trunk over a `Slice`: metrics.json's keys, in memory of a chunk.

    The calibration windows run first; their few columns are kept, fitted, and the rest of the slice runs under what was fitted.
    progress: called with (windows done, of), this rank's.
    """
    device, K, T = model.cos.device, model.config.n_stage, part.mix.T
    blocks, in_report = torch.from_numpy(part.documents % N_BLOCKS), torch.from_numpy(part.in_report)
    calibrating = share(0, part.n_calibration, rank, world_size)
    reported = share(part.n_calibration, part.n_windows, rank, world_size)
    sums, report, kept, done = {}, {}, {}, 0

    def summed(windows):
        """As `one_pass`, after adding up what all of the slice adds up; and the block of each position."""
        nonlocal done
        for rows, columns in one_pass(model, part.mix, windows, part.tokenizer, batch_size, True):
            block = send(blocks[rows].flatten(), device)
            add(sums, {name: columns[name] for name in SUMMED}, columns["tokens"], block)
            yield rows, columns, block
            done += len(rows)
            if progress:
                progress(done, len(calibrating) + len(reported))

    for rows, columns, _ in summed(calibrating):
        for name in CALIBRATING if K > 1 else ():
            value = columns[name].view(len(rows), T, -1)
            if name not in kept:
                kept[name] = value.new_zeros(part.n_calibration, T, value.size(2))
            kept[name][rows] = value
    if K > 1:
        all_reduce(kept, world_size)
        counted = kept.pop("tokens")[..., 0] > 0
        found = calibrate({name: value[counted].double().cpu().numpy() for name, value in kept.items()},
                          blocks[:part.n_calibration][counted.cpu()].numpy(), cap)
        fitted = {name: torch.from_numpy(value).to(device) for name, value in found.items()}
    for rows, columns, block in summed(reported):
        if K > 1:
            weight = columns["tokens"] * send(in_report[rows].flatten()[:, None], device)
            add(report, adaptive_statistics(columns, fitted, cap), weight, block)
    all_reduce(sums, world_size)
    all_reduce(report, world_size)
    sums, report = ({name: value.cpu().numpy() for name, value in d.items()} for d in (sums, report))
    if K > 1 and not report["tokens"].any():
        raise ValueError("the documents that do not calibrate hold nothing but special tokens; raise --split-tokens")
    metrics = slice_metrics(sums) | {"documents": int(part.documents.max()) + 1, "wand": None, "routing": None, "speculative": None}
    if K > 1:
        metrics |= adaptive_metrics(report, found, cap, stage_bytes(model))
        metrics["wand"]["tokens"] = int(counted.sum())
    return metrics


def slice_metrics(sums):
    """bpb, accuracy, alpha and the gap from sums per block, numpy (G, w), with standard errors; and the blocks' sums for paired ones."""
    n_bytes, tokens = sums["bytes"][:, 0], sums["tokens"][:, 0]
    totals = {name: value.sum(axis=0).tolist() for name, value in sums.items()}
    metrics = summarize({**totals, "tokens": int(tokens.sum()), "bytes": int(n_bytes.sum())})
    full, hits = sums["nats_prefix"][:, -1], sums["hits_prefix"][:, -1]
    blocks = {"bytes": n_bytes, "tokens": tokens,
              "bpb": {"full": full, "single": [*sums["nats_single"].T], "prefix": [*sums["nats_prefix"].T]},
              "alpha_sweep": {"0": full, **{f"{a:g}": column for a, column in zip(ALPHAS, sums["nats_alpha"].T)}},
              "crossover_gap": full - sums["nats_single"][:, -1],
              "accuracy": {"full": hits, "single": [*sums["hits_single"].T]}}
    metrics["alpha_sweep"] = {name: nats.sum() / (math.log(2) * n_bytes.sum()) for name, nats in blocks["alpha_sweep"].items()}
    metrics["bpb"]["full_stderr"] = ratio(full / math.log(2), n_bytes)[1]
    metrics["crossover_gap_stderr"] = ratio(blocks["crossover_gap"] / math.log(2), n_bytes)[1]
    put(metrics["accuracy"], "single", sums["hits_single"], tokens)
    put(metrics["accuracy"], "full", hits, tokens)

    def text(value):
        """A list of numbers as one string: a line of the file, not one per number."""
        if isinstance(value, dict):
            return {name: text(v) for name, v in value.items()}
        return [text(v) for v in value] if isinstance(value, list) else " ".join(f"{v:.4f}".rstrip("0").rstrip(".") for v in value)
    return metrics | {"blocks": text(blocks)}


def adaptive_metrics(report, found, cap, read_bytes):
    """WAND and routing from the sums of `adaptive_statistics` per block, numpy (G, w).

    violation_rate: among the positions that stopped early. agreement: of all positions, those that ran to the end included; so
    1 - agreement = violation_rate (1 - exit_fraction[K - 1]). projected_speedup: full's bytes over the mean bytes read.
    """
    tokens, routed = report["tokens"][:, 0], report["routed"][:, 0]
    *thresholds, tau = [None if math.isinf(t) else t for t in (*found["margins"].tolist(), *found["tau"].tolist())]
    wand = {"p99_bounds": found["bounds"].tolist(), "p99_bounds_stderr": found["bounds_stderr"].tolist(), "report_tokens": int(tokens.sum())}
    margin, routing = {"cap": MARGIN_CAP, "thresholds": thresholds}, {"cap": cap, "threshold": tau}
    for name, form in (("wand", wand), ("margin", margin)):
        exits, violation = report[f"{name}_exit"], report[f"{name}_violation"][:, 0]
        put(form, "violation_rate", violation, tokens - exits[:, -1])
        put(form, "exit_fraction", exits, tokens)
        put(form, "agreement", tokens - violation, tokens)
        form["projected_speedup"] = read_bytes[-1] / float(np.dot(form["exit_fraction"], read_bytes))
    put(wand, "exceedance", report["exceedance"], tokens)
    wand["margin"] = margin
    put(routing, "fraction", routed, tokens)
    put(routing, "oracle_fraction", report["oracle"][:, 0], tokens)
    put(routing, "agreement", report["routed_agree"][:, 0], routed)
    put(routing, "base_agreement", report["base_agree"][:, 0], tokens)
    put(routing, "mean_cost", report["cost"][:, 0], routed)
    f = routing["fraction"]
    routing["projected_speedup"] = read_bytes[-1] / (f * read_bytes[0] + (1 - f) * read_bytes[-1])
    routing["projected_speedup_card"] = 1 / (1 - 0.49 * f)                  # the stage-0 cost of 0.51 that fits the card's first rows
    routing["curve"] = [{"threshold": float(t)} for t in found["levels"]]
    for point, leaving, agreeing in zip(routing["curve"], report["curve"].T, report["curve_agree"].T):
        put(point, "fraction", leaving, tokens)
        put(point, "agreement", agreeing, leaving)
    return {"wand": wand, "routing": routing}


def probe(model, tokenizer):
    """The sample-mode probe: greedy continuations by the full product, and what they know: (samples, facts), graded by substring.

    A context too short for a prompt gives no completion, and one too short for 60 tokens a shorter one.
    """
    texts = []
    for prompt in PROBE:
        room = min(PROBE_TOKENS, model.config.sequence_len + 1 - len(tokenizer.encode(prompt)))
        texts.append(next(complete(model, tokenizer, [prompt], room, Plan(range(model.config.n_stage))))["completion"] if room > 0 else "")
    france, gold, _, _, solar_system, _, algebra = texts
    planets = [planet in solar_system for planet in PLANETS]
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(PROBE, texts)], {
        "Paris": "Paris" in france, "Au": "Au" in gold, "79": "79" in gold,
        "planets": all(planets), "planets_named": sum(planets), "2": "2" in algebra}


def document_prompts(part, n_prompts, length):
    """The first `length` tokens, bos included, of the first documents of the report part that begin in a window and are as long there."""
    prompts, (source, _, window) = [], part.mix.locate(np.arange(part.n_windows))
    for i in range(part.n_calibration, part.n_windows):
        if len(prompts) >= n_prompts:
            break
        tokens = part.mix.window(source[i], window[i])
        begins = np.flatnonzero(tokens == part.tokenizer.bos)
        for begin, end in zip(begins, [*begins[1:], len(tokens)]):
            if end - begin >= length and begin < part.mix.T and part.in_report[i, begin]:
                prompts.append(tokens[begin:begin + length].tolist())
    return prompts[:n_prompts]


def speculation(model, part, n_prompts, fast):
    """Self-speculative decoding with drafts of 4, greedy, one row, against plain decoding of the same: (metrics, timings).

    acceptance: accepted drafts over judged ones (the accepted and the first rejected of each cycle); mean_accepted: per cycle; standard errors
    by prompt. card_prompts: the same on the card's 7 prompts of 60 tokens. timings: tokens/s, of s0 alone too; plain and drafted in turns.
    """
    K, context = model.config.n_stage, model.config.sequence_len
    length = min(PROMPT_TOKENS, context // 2)
    prompts = document_prompts(part, n_prompts, length)
    probes = [ids for ids in map(part.tokenizer.encode, PROBE) if len(ids) <= context]
    if K == 1 or not prompts or not probes:
        return None, None
    engines = {name: Engine(model, plan, fast=fast) for name, plan in (
        ("plain", Plan(range(K))), ("speculative", Plan(range(K), draft_len=DRAFT_LEN)), ("s0", Plan(range(1))))}
    for engine in engines.values():
        decode_timed(engine, probes[0], 1)                                  # compile and capture
    jobs = [(ids, min(NEW_TOKENS, context + 1 - length)) for ids in prompts] + [(ids, min(PROBE_TOKENS, context + 1 - len(ids))) for ids in probes]
    made = [{name: decode_timed(engine, ids, n) for name, engine in engines.items()} for ids, n in jobs]
    identical = all(of["plain"].ids[:n] == of["speculative"].ids[:n] for of, (_, n) in zip(made, jobs))
    drafted = [of["speculative"] for of in made]
    accepted, judged, cycles = np.array([(of.accepted, of.judged, of.cycles) for of in drafted], dtype=np.float64).T
    metrics = {"draft_len": DRAFT_LEN, "prompts": len(prompts), "new_tokens": jobs[0][1], "judged": int(judged[:len(prompts)].sum()),
               "identical_to_plain": identical, "card_prompts": {}}
    for into, rows in ((metrics, slice(len(prompts))), (metrics["card_prompts"], slice(len(prompts), None))):
        put(into, "acceptance", accepted[rows], judged[rows])
        put(into, "mean_accepted", accepted[rows], cycles[rows])
    speed = {name: sum(len(of[name].ids) for of in made) / sum(of[name].seconds for of in made) for name in engines}
    return metrics, {"speedup": speed["speculative"] / speed["plain"], "s0_speedup": speed["s0"] / speed["plain"],
                     **{f"{name}_tokens_per_s": value for name, value in speed.items()}, "kernels": fast}


# ---------------------------------------------------------------------------------------------------------------
# Files of a checkpoint and of a run

def write_json(path, value):
    """Write a JSON file whole or not at all. A hard link to the old file elsewhere keeps the old content."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_log(path):
    """The entries of a run's log.jsonl, dicts with `kind` and `step`; lines that are not (one half-written by a killed run) are left out."""
    entries = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry:
            entries.append(entry)
    return entries


def train_log_bpb(run, step):
    """Full bpb that the run's own log has at `step`, with its token count; None where it has none."""
    found = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "val" and entry["step"] == step]
    full, tokens = get(found, (-1, "bpb", "full")), get(found, (-1, "tokens"))
    return {"full": full, "tokens": tokens} if isinstance(full, float) and isinstance(tokens, int) else None


def run_record(path):
    """config.json of the run of a step directory or, where it has none, the step's own. {} where neither is there."""
    return read_object(path.parent / "config.json") or read_object(path / "config.json")


def phases_of(record, run):
    """The phases of a run from its `run_record`; [] where that is empty."""
    try:
        return [phase_of(row) for row in record["phases"]] if record else []
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{run / 'config.json'} holds no phase table ({e!r}); restore it from a copy") from None


def phase_position(phases, step):
    """metrics.json's `phase` of a step, or None where no phase is known."""
    if not phases or step < phases[0].anchor:
        return None
    phase = phases[phase_index(phases, step)]
    name, offset = position(phase, step)
    return {"rel_it": step - phase.anchor, "lrm": learning_rate(phase, step), "position": name, "offset": offset}


def write_bounds(path, bounds):
    """Set the calibrated bounds in a step's config.json, atomically and nothing else; a run that shares the file keeps its own."""
    record = json.loads((path / "config.json").read_text())
    if record.get(BOUNDS_KEY) != bounds:
        write_json(path / "config.json", {**record, BOUNDS_KEY: bounds})


def whole(metrics):
    """Whether this is what `evaluate_checkpoint` writes, by a few of its figures."""
    figures = ("step",), ("bpb", "full"), ("bpb", "single", 0), ("accuracy", "full"), ("crossover_gap",)
    return metrics.get("format") == FORMAT and all(isinstance(get(metrics, path), (int, float)) for path in figures)


def read_metrics(path):
    """metrics.json of a step directory. Raises FileNotFoundError or ValueError where there is none, or one of another format."""
    file, metrics = path / "metrics.json", read_object(path / "metrics.json")
    if not file.exists():
        raise FileNotFoundError(f"{path} has no metrics.json; measure it: leave --no-measure out")
    if not whole(metrics):
        raise ValueError(f"{file} is of an older or foreign format; measure it again: leave --no-measure out")
    return {**metrics, "timings": read_object(path / "timings.json")}


def open_slice(path, record, config, slices):
    """The `Slice` that `config` asks for, over the data of the checkpoint `path` or of --data. slices: a dict that keeps what was opened."""
    run_data = get(read_object(path.parent / "config.json"), ("train", "data"))     # of a run that continues another on other data: one for all rows
    folder, model = next(d for d in (config.data, run_data, record["train"]["data"]) if d is not None), record["model"]
    key = (folder, model["vocab_size"], model["sequence_len"], record["tokenizer"]["sha256"])
    if key not in slices:
        data = open_data(folder, model["vocab_size"])
        if data.tokenizer.sha256 != record["tokenizer"]["sha256"]:
            raise ValueError(f"{folder or 'the embedded sample'} was tokenised with another tokenizer than {path}; use --data with its own")
        mix = data.val(model["sequence_len"])
        split = config.split_tokens or (SPLIT_TOKENS if data.path else mix.n_in_first_epoch() * mix.T)
        n_windows = validation_windows(mix, split, "--split-tokens")
        wand_tokens = config.wand_tokens or max(1, n_windows // 8) * mix.T
        n_calibration = wand_tokens // mix.T
        if not 1 <= n_calibration < n_windows:
            raise ValueError(f"--wand-tokens {wand_tokens} must leave text on both sides of a slice of {n_windows * mix.T:,} tokens: give from "
                             f"{mix.T} (one window) to {(n_windows - 1) * mix.T:,}, or raise --split-tokens")
        slices[key] = Slice(mix, n_windows, n_calibration, data.tokenizer)
    return slices[key]


def evaluate_checkpoint(path, config, ranks, slices, progress):
    """Measure one step directory unless its metrics.json has the same settings; write metrics.json, timings.json and the bounds."""
    device, dtype = choose_device(ranks.device_name(config.device), config.dtype)
    if path.name.startswith(".tmp-step-"):
        raise ValueError(f"{path} is a checkpoint being written right now; wait until it is step-XXXXX")
    metrics = ranks.gather(read_object(path / "metrics.json"))[0]           # rank 0's: it may be writing one that was named twice
    start = time.time()
    n_prompts = SPECULATIVE_PROMPTS[device.type] if config.speculative_prompts is None else config.speculative_prompts
    with ranks.agree():
        record, phases = read_record(path), phases_of(run_record(path), path.parent)
        part = open_slice(path, record, config, slices)
        settings = {"split_tokens": part.n_windows * part.mix.T, "wand_tokens": part.n_calibration * part.mix.T, "seed": VAL_SEED,
                    "slice_sha256": part.sha256, "routing_cap": config.routing_cap, "dtype": str(dtype).removeprefix("torch."),
                    "samples": config.samples, "speculative_prompts": n_prompts if config.samples else 0,
                    "weights_sha256": get(read_object(path / "manifest.json"), ("files", "model.pt"))}
        done = whole(metrics) and metrics.get("settings") == settings
        if not done:
            model = load_checkpoint(path, device, dtype)[0]
            if config.compile:
                model.compile_regions()
    if not done:
        loaded, on_cuda = time.time(), device.type == "cuda"
        weight_bytes = torch.cuda.memory_allocated(device) if on_cuda else None
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with attention_backends(device), torch.compiler.set_stance("force_eager") if config.compile is False else contextlib.nullcontext():
            measured = measure(model, part, config.device_batch_size, config.routing_cap, ranks.rank, ranks.world_size, progress)
            seconds, peak_bytes = time.time() - loaded, torch.cuda.max_memory_allocated(device) if on_cuda else None
            if not math.isfinite(measured["bpb"]["full"]):
                raise ValueError(f"the log-probabilities of {path} are not finite: its weights are damaged; use another step")
            samples = facts = drafted = speeds = None
            with ranks.agree():
                if config.samples and ranks.rank == 0:
                    fast = on_cuda and config.compile is not False and kernels_fit(model)
                    samples, facts = probe(model, part.tokenizer)
                    drafted, speeds = speculation(model, part, n_prompts, fast)
    with ranks.agree():
        if not done and ranks.rank == 0:
            metrics = {"format": FORMAT, "settings": settings, "step": record["step"],
                       "phase": phase_position(phases, record["step"]), **measured, "speculative": drafted,
                       "train_log_bpb": train_log_bpb(path.parent, record["step"]), "samples": samples, "facts": facts}
            write_json(path / "metrics.json", metrics)
            write_json(path / "timings.json", read_object(path / "timings.json") | {"evaluate": {
                "load_seconds": round(loaded - start, 2), "pass_seconds": round(seconds, 2), "world_size": ranks.world_size,
                "weight_bytes": weight_bytes, "peak_bytes": peak_bytes}, "speculative": speeds})
        if ranks.rank == 0 and (bounds := get(metrics, ("wand", "p99_bounds"))):
            write_bounds(path, bounds)
    return {**metrics, "timings": read_object(path / "timings.json")}


# ---------------------------------------------------------------------------------------------------------------
# Tables

# better: -1 lower, +1 higher, 0 neither. unit: "", %, x, + (signed). read: the figures that the reading speaks of; None: no changes either
Column = namedtuple("Column", "header path decimals better unit", defaults=(4, 0, ""))
Table = namedtuple("Table", "title columns read")
BPB, SHARE, SPEEDUP = (6, -1, ""), (2, 0, "%"), (3, 1, "x")                 # decimals, better and unit of columns


def make_tables(rows):
    """The card's tables of numbers for rows with the same number of stages, in its order; then two for what its protocol lacks."""
    last, K = rows[-1], len(rows[0]["bpb"]["single"])
    stages, steps = [f"s{k}" for k in range(K)], [f"{k} → {k + 1}" for k in range(K - 1)]
    sizes = [f" ({scaled(n)} tokens)" if n else "" for n in (get(last, ("train_log_bpb", "tokens")), last.get("tokens"))]
    alphas = {"0": "α=0 (geom-mean)", "0.25": "α=0.25", "0.5": "α=0.5 (Bayesian √K)", "0.75": "α=0.75", "1": "α=1.0 (pure sum / Log-OP)"}
    curve = [(i, leaving) for i, leaving in enumerate(CURVE_SHARES) if i % 4 == 3 and get(last, ("routing", "curve"))]
    exits = []
    for name, form in (("p99", ("wand",)), ("margin", ("wand", "margin"))):
        exits += [*(Column(f"{name} exits {s}", (*form, "exit_fraction", k), *SHARE) for k, s in enumerate(stages)),
                  Column(f"{name} violations", (*form, "violation_rate"), 6, -1),
                  Column(f"{name} agreement", (*form, "agreement"), 6, 1),
                  Column(f"{name} speedup", (*form, "projected_speedup"), *SPEEDUP)]
    return [
        Table("Per-checkpoint val BPB", [
            Column("Phase rel_it", ("phase", "rel_it"), 0),
            Column(f"Training-log val BPB{sizes[0]}", ("train_log_bpb", "full"), *BPB),
            Column(f"Local-slice full K={K} BPB{sizes[1]}", ("bpb", "full"), *BPB)], slice(None)),
        Table("Per-stage BPB", [
            Column(f"full K={K}", ("bpb", "full"), *BPB),
            *(Column(f"single {s}", ("bpb", "single", k), *BPB) for k, s in enumerate(stages)),
            *(Column(f"prefix K'={k}", ("bpb", "prefix", k - 1), *BPB) for k in range(1, K))], slice(1, K + 1)),
        Table("Per-stage standalone target accuracy", [
            *(Column(s, ("accuracy", "single", k), 4, 1) for k, s in enumerate(stages)),
            Column("full", ("accuracy", "full"), 4, 1)], slice(None)),
        Table(f"Self-speculative decoding (m=4 stage-0 draft, full K={K} verify)", [
            Column("acceptance α", ("speculative", "acceptance"), 4, 1),
            Column("mean accepted / 4", ("speculative", "mean_accepted"), 2, 1),
            Column("end-to-end speedup", ("timings", "speculative", "speedup"), 2, 1, "x")], slice(1)),
        Table(f"Confidence-aware routing (target_regression cap = {get(last, ('routing', 'cap')) or 0.02:.3f})", [
            Column("fraction routed to stage 0", ("routing", "fraction"), 2, 1, "%"),
            Column("projected speedup", ("routing", "projected_speedup"), *SPEEDUP),
            Column("base s0=full agreement", ("routing", "base_agreement"), 4, 1)], slice(None)),
        Table("WAND p99 bounds (cumulative-PoE delta range, constant-shift invariant)", [
            Column(f"bound {s}", ("wand", "p99_bounds", k)) for k, s in enumerate(steps)], slice(None)),
        Table("Bayesian PoE α-sweep (renormed BPB at α=0)", [
            *(Column(header, ("alpha_sweep", a), *BPB) for a, header in alphas.items()),
            Column(f"crossover gap (α=0 vs single s{K - 1})", ("crossover_gap",), 6, 0, "+")], slice(5, None)),
        Table("Self-speculative decoding: the card's 7 prompts, and speeds beside s0 alone", [
            Column("acceptance, 7 prompts", ("speculative", "card_prompts", "acceptance")),
            Column("mean accepted / 4, 7 prompts", ("speculative", "card_prompts", "mean_accepted"), 2),
            *(Column(f"tokens/s, {name}", ("timings", "speculative", f"{key}_tokens_per_s"), 1)
              for name, key in (("plain", "plain"), ("speculative", "speculative"), ("s0 alone", "s0"))),
            Column("bpb of s0 alone", ("bpb", "single", 0), *BPB)], None),
        Table("Adaptive depth, on other text than calibrated it", [
            *(Column(f"exceedance {s}", ("wand", "exceedance", k)) for k, s in enumerate(steps)), *exits], None),
        Table("Routing, on other text than calibrated it", [
            Column("threshold", ("routing", "threshold")),
            Column("oracle fraction", ("routing", "oracle_fraction"), *SHARE),
            Column("agreement of the routed", ("routing", "agreement")),
            Column("mean cost of the routed, nats", ("routing", "mean_cost")),
            Column("speedup at the card's cost 0.51", ("routing", "projected_speedup_card"), *SPEEDUP),
            *(Column(f"agreement with {leaving:.0%} leaving", ("routing", "curve", i, "agreement")) for i, leaving in curve)], None),
    ]


def scaled(n):
    """A count of tokens in short: 65.999e9 -> 66 B."""
    unit, name = next(((u, s) for u, s in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if n >= u), (1, ""))
    return f"{float(f'{n / unit:.3g}'):g} {name}".strip()


def shown(column, value, change=False):
    """A value, or a change of one, as the table prints it; a dash for what was not measured."""
    if value is None:
        return "—"
    sign = "+" if change or column.unit == "+" else ""
    if column.unit == "%":
        return f"{100 * value:{sign}.{column.decimals}f}{' pp' if change else '%'}"
    return f"{value:{sign},.{column.decimals}f}{'x' if column.unit == 'x' and not change else ''}"


def change(column, row, base):
    """(value of `row` - value of `base`, its standard error): None where not measured, or no error known.

    bpb and accuracy on the same slice: paired, per block of documents. Other rates: the root of the sum of squares, which is too large
    rather than too small, because both come from the same text.
    """
    value, other = get(row, column.path), get(base, column.path)
    if value is None or other is None:
        return None, None
    blocks = [get(r, ("blocks", *column.path)) for r in (row, base)]
    if None not in blocks and row["settings"]["slice_sha256"] == base["settings"]["slice_sha256"]:
        counted, unit = ("tokens", 1.0) if column.path[0] == "accuracy" else ("bytes", math.log(2))
        sums, other_sums, n = (np.array(text.split(), dtype=np.float64) for text in (*blocks, row["blocks"][counted]))
        return value - other, ratio((sums - other_sums) / unit, n)[1]
    named = max(i for i, key in enumerate(column.path) if isinstance(key, str))
    errors = [get(r, [f"{key}_stderr" if i == named else key for i, key in enumerate(column.path)]) for r in (row, base)]
    return value - other, math.hypot(*errors) if None not in errors else None


def judged(column, delta, stderr):
    """A change in a word: better, worse, up or down; noise where it is within two standard errors or nothing; None where not measured."""
    if delta is None:
        return None
    if abs(delta) <= 2 * (stderr or 0.0):
        return "noise"
    return {1: "better", -1: "worse"}[column.better * (1 if delta > 0 else -1)] if column.better else "up" if delta > 0 else "down"


def step_name(step):
    return f"`step-{step:05d}`"


def step_names(steps):
    return ", ".join(map(step_name, steps)) if steps else "none"


def figures(table):
    """The columns that are measured: without the phase, which is known beforehand."""
    return [column for column in table.columns if column.path[0] != "phase"]


def has_values(table, rows):
    return any(get(row, column.path) is not None for row in rows for column in figures(table))


def markdown(header, rows):
    """A Markdown table, its first column left-aligned and the others right-aligned."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def branch(row):
    """The first two cells of a checkpoint's row in a table: its name, with what is written behind it (`mark`), and its step."""
    return [step_name(row["step"]) + row.get("mark", ""), f"{row['step']:,}"]


def value_table(table, rows):
    """The card's form of a table: a row per checkpoint, without changes."""
    return markdown(["Branch", "Step", *(c.header for c in table.columns)],
                    [[*branch(r), *(shown(c, get(r, c.path)) for c in table.columns)] for r in rows])


# ---------------------------------------------------------------------------------------------------------------
# The trajectory, read by rule

def path_name(column):
    """A column's key in the reading: bpb.single.0."""
    return ".".join(map(str, column.path))


def series(column, rows, after_warmup):
    """What the rows say of one column, as JSON, or None where none has it. after_warmup: steps that make envelope and records.

    A record is a row after the warmup that is better than every earlier such row (lower, where neither is better). in_a_row: how many
    changes up to the last row went the better way. setback: the largest change the other way between two of these rows.
    """
    measured = [row for row in rows if get(row, column.path) is not None]
    if not measured:
        return None
    last, sign, found = measured[-1], column.better or -1, {}
    for name, base in (("reference", rows[0]), ("previous", measured[-2] if len(measured) > 1 else rows[0])):
        delta, stderr = change(column, last, base) if base is not last else (None, None)
        found[f"vs_{name}"] = {"step": base["step"], "change": delta, "stderr": stderr, "judged": judged(column, delta, stderr)}
    points = [(row["step"], get(row, column.path)) for row in measured if row["step"] in after_warmup]
    changes = [(b[0], b[1] - a[1]) for a, b in zip(points, points[1:])]
    setback = min(changes, key=lambda c: sign * c[1], default=(None, 0.0))
    return {"step": last["step"], "last": get(last, column.path), **found,
            "low": min(points, key=lambda p: p[1], default=None), "high": max(points, key=lambda p: p[1], default=None),
            "records": [p[0] for i, p in enumerate(points) if i and all(sign * p[1] > sign * q[1] for q in points[:i])],
            "in_a_row": next((i for i, (_, delta) in enumerate(reversed(changes)) if sign * delta <= 0), len(changes)),
            "setback": setback if sign * setback[1] < 0 else None}


def read_trajectory(rows, phases):
    """Everything that the report says of a run's rows, as JSON: computed by fixed rules, nothing judged by eye.

    The reference is the first row: the seed (rel 0) where the run continues another. Rows after the warmup of the last phase make
    envelopes and records; the first of them is the entry. rate and projection: the least-squares line through the last three of them,
    drawn on from the last row. Verdict: win where full bpb and at least one other of stage bpb, accuracy, routing and acceptance are better
    than the reference beyond two standard errors (by sign alone where none are given) and more are better than worse; regression where
    the same holds of worse; else null.
    """
    phase, K = phases[-1] if phases else None, len(rows[0]["bpb"]["single"])
    after = [row for row in rows if phase is None or row["step"] - phase.anchor >= phase.warmup_steps]
    found = {path_name(c): series(c, rows, {row["step"] for row in after}) for table in make_tables(rows) for c in table.columns}
    curve, gaps = [(row["step"], row["bpb"]["full"]) for row in after], [(row["step"], row["crossover_gap"]) for row in rows]
    levels, lowest = {}, math.inf                                           # {step: the lowest 0.01 that it was the first to go below}
    for step, value in curve:
        level = (math.floor(100 * value) + 1) / 100
        if value < level <= lowest < math.inf:
            levels[step] = level
        lowest = min(lowest, value)
    reading = {"kind": "trajectory", "reference": rows[0]["step"], "seed": get(rows[0], ("phase", "rel_it")) == 0, "last": rows[-1]["step"],
               "entry": get(curve, (0, 0)), "below_entry": next((step for step, b in curve if b < curve[0][1]), None),
               "below_reference": next((step for step, b in curve if b < rows[0]["bpb"]["full"]), None), "levels": levels,
               "negative_gaps": [step for step, gap in gaps if gap < 0],
               "gap_changes_sign": [b[0] for a, b in zip(gaps, gaps[1:]) if (a[1] < 0) != (b[1] < 0)],
               "noise_known": get(rows[-1], ("blocks", "bytes")) is not None, "series": found}

    def against_reference(*names):
        return [get(found, (name, "vs_reference", "judged")) for name in names]

    full, accuracy, routing, acceptance = against_reference("bpb.full", "accuracy.full", "routing.fraction", "speculative.acceptance")
    stages, bounds = (against_reference(*(f"{name}.{k}" for k in range(n))) for name, n in (("bpb.single", K), ("wand.p99_bounds", K - 1)))
    reading["questions"] = {"descent": full, "stages": stages, "accuracy": accuracy, "routing": routing, "acceptance": acceptance,
                            "bounds": [{"up": "wider", "down": "narrower"}.get(bound, bound) for bound in bounds],
                            "facts": {fact: [row["facts"][fact] for row in rows if row.get("facts")] for fact in FACTS}}
    together = None if K == 1 else stages[0] if len(set(stages)) == 1 else "noise"
    votes = [full, together, accuracy, routing, acceptance]
    better, worse, noise = (votes.count(word) for word in ("better", "worse", "noise"))
    won, lost = full == "better" and better > max(1, worse), full == "worse" and worse > max(1, better)
    reading |= {"votes": {"better": better, "worse": worse, "noise": noise},
                "verdict": None if full is None else "win" if won else "regression" if lost else "null"}
    if phase and len(after) > 1:
        steps, values = np.array(curve[-3:]).T
        slope, remaining = float(np.polyfit(steps - steps[-1], values, 1)[0]), max(0, phase.end - rows[-1]["step"])
        reading |= {"rate_per_2000_steps": 2000 * slope, "rate_since": curve[-3:][0][0], "remaining_steps": remaining, "end": phase.end,
                    "projection": rows[-1]["bpb"]["full"] + slope * remaining}
    return reading


def told(column, found, seed):
    """One line of a table's reading, from its `series`."""
    if found is None:
        return f"- {column.header}: not measured."
    text = f"{shown(column, found['last'])} at {step_name(found['step'])}"
    reference, previous = found["vs_reference"], found["vs_previous"]
    bases = [(seed, reference)]
    if previous["step"] != reference["step"]:
        bases.append((step_name(previous["step"]), previous))
    for name, of in bases:
        if of["change"] is not None:
            doubt = "no standard error given" if of["stderr"] is None else \
                f"s.e. {shown(column, of['stderr']).lstrip('+')}, {'noise' if of['judged'] == 'noise' else 'beyond noise'}"
            text += f"; {shown(column, of['change'], True)} against {name} ({doubt})"
    text += "."
    word, way, back = ("high", "rises", "drop") if column.better > 0 else ("low", "descents", "rise")
    if found["low"] and found["low"] != found["high"]:
        low, high = (f"{shown(column, found[end][1])} ({step_name(found[end][0])})" for end in ("low", "high"))
        text += f" Envelope {low} to {high}."
        text += f" New {word}s: {step_names(found['records'])}." if found["records"] else ""
        text += f" {found['in_a_row']} {way} in a row." if found["in_a_row"] > 1 else ""
        if found["setback"] and column.better:
            text += f" Largest {back}: {shown(column, found['setback'][1], True)} at {step_name(found['setback'][0])}."
    return f"- {column.header}: {text}"


def answers(rows, reading, seed):
    """The six questions of the card, the verdict and the projection: Markdown paragraphs."""
    asked, vote, columns = reading["questions"], reading["votes"], {path_name(c): c for table in make_tables(rows) for c in table.columns}
    words = {"better": "yes", "worse": "no", "noise": "no, within noise", None: "not measured"}

    def answer(verdict, name):
        found = reading["series"].get(name)
        delta = get(found, ("vs_reference", "change"))
        return words[verdict] + (f" ({shown(columns[name], delta, True)} at {step_name(found['step'])})" if delta is not None else "")

    def known(graded):
        if not graded:
            return "not graded"
        return "always" if all(graded) else f"in {sum(graded)} of {len(graded)} rows" if any(graded) else "never"
    paragraphs = ["\n".join([
        f"1. **BPB descent**, full bpb below {seed}: {answer(asked['descent'], 'bpb.full')}.",
        f"2. **Per-stage refinement**, each stage's own bpb below {seed}: {', '.join(f's{k} {words[v]}' for k, v in enumerate(asked['stages']))}.",
        f"3. **Routing margin**, more positions left to s0: {answer(asked['routing'], 'routing.fraction')}.",
        f"4. **Acceptance** of s0's drafts grown: {answer(asked['acceptance'], 'speculative.acceptance')}.",
        f"5. **WAND bounds**: {', '.join(f'{k} → {k + 1} {v}' for k, v in enumerate(asked['bounds']) if v) or 'not measured'}.",
        f"6. **Facts** (by substring): {'; '.join(f'{fact} {known(graded)}' for fact, graded in asked['facts'].items())}."])]
    if reading["verdict"] and len(rows) > 1:
        paragraphs.append(
            f"**Verdict: {reading['verdict']}** against {seed}{' so far' if reading.get('remaining_steps') else ''}. "
            f"Of full bpb, stage bpb, accuracy, routing and acceptance, {vote['better']} are better, {vote['worse']} worse, "
            f"{vote['noise']} within noise or mixed."
            f"{'' if reading['noise_known'] else ' No standard errors were given: signs alone decide.'} A win or a regression needs full bpb, at "
            f"least one more, and more on its side than against it; everything else is null.")
    if "projection" in reading:
        end = ": the phase is complete."
        if reading["remaining_steps"]:
            end = f"; drawn on in a straight line, which knows nothing of the schedule, it ends at {reading['projection']:.4f}, " \
                  f"{reading['projection'] - rows[0]['bpb']['full']:+.4f} against {seed}."
        paragraphs.append(f"**Projection**: full bpb changes by {reading['rate_per_2000_steps']:+.6f} per 2,000 steps "
                          f"(line through {step_name(reading['rate_since'])} to {step_name(reading['last'])}). "
                          f"{reading['remaining_steps']:,} steps remain to {reading['end']:,}{end}")
    return paragraphs


def notes(rows, reading):
    """What stands out at each step, {step: text}, from the reading."""
    found, negative, turns = {row["step"]: [] for row in rows}, reading["negative_gaps"], reading["gap_changes_sign"]
    for steps, text in (([reading["reference"]] if reading["seed"] else [], "seed: the last checkpoint of the phase before"),
                        ([reading["entry"]], "first after the warmup"), (reading["series"]["bpb.full"]["records"], "new low of full bpb"),
                        (reading["series"]["accuracy.full"]["records"], "new high of full accuracy"),
                        ([reading["below_entry"]], "first below the entry"), ([s for s in turns if s in negative], "crossover gap negative"),
                        ([s for s in turns if s not in negative], "crossover gap positive again")):
        for step in steps:
            if step is not None:
                found[step].append(text)
    for step, level in reading["levels"].items():
        found[step].append(f"first below {level:.2f}")
    return {step: "; ".join(texts) or "—" for step, texts in found.items()}


def schedule_table(phases, record):
    """The card's table of the schedule's parameters, newest phase first."""
    T, phases, table = get(record, ("model", "sequence_len")), phases[::-1], record["phases"][::-1]
    batches = [row.get("batch") for row in table]
    rows = [["token budget", *(scaled(p.num_steps * batch * T) if isinstance(batch, int) and isinstance(T, int) else "—"
                               for p, batch in zip(phases, batches))]]
    for text, name, form in (("total steps in phase", "num_steps", ","), ("warmup steps", "warmup_steps", ","), ("peak `lrm`", "peak_lrm", "g"),
                             ("warmdown ratio", "warmdown_ratio", "g"), ("final `lrm`", "final_lrm", "g"), ("anchor step", "anchor", ",")):
        rows.append([text, *(f"{getattr(p, name):{form}}" for p in phases)])
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr"):
        rates = [row.get(name, get(record, ("train", name))) for row in table]
        if all(isinstance(rate, (int, float)) for rate in rates):
            rows.append([f"effective `{name}` peak", *(f"{rate * p.peak_lrm:g}" for rate, p in zip(rates, phases))])
    return markdown(["param", *(f"phase {n}" for n in range(len(phases), 0, -1))], rows)


def sample_table(rows):
    """The card's table of the sample-mode probe, graded by substring; pending where it was not run."""
    def grade(row, *facts):
        return " ".join(f"{fact} {'✓' if row['facts'][fact] else '✗'}" for fact in facts) if row.get("facts") else "pending"

    def planets(row):
        named = get(row, ("facts", "planets_named"))
        return grade(row, "planets") + (f" ({named} of 8)" if named is not None else "")
    return markdown(["Branch", "Step", "France", "Gold (Au + atomic # 79)", "Planets list", "Algebra `5x+3=13` (correct: 2)"], [
        [*branch(r), grade(r, "Paris"), grade(r, "Au", "79"), planets(r), grade(r, "2")] for r in rows])


def report(name, rows, phases, record, reading):
    """TRAJECTORY.md of a run as text: the card's ten tables, the changes of each figure, and their reading in plain words."""
    K, settings, noted = len(rows[0]["bpb"]["single"]), rows[-1].get("settings") or {}, notes(rows, reading)
    seed = "the seed" if reading["seed"] else f"the first row ({step_name(rows[0]['step'])})"
    rows = [{**row, "mark": " (seed)" if reading["seed"] and row is rows[0] else ""} for row in rows]

    def where(phase):
        return f"rel_it = {phase['rel_it']:,} ({phase['position']} +{phase['offset']:,}, lrm = {phase['lrm']:.3f})" if phase else "—"

    def cell(column, row, base):
        delta, stderr = change(column, row, base)
        return shown(column, delta, True) + ("≈" if stderr is not None and judged(column, delta, stderr) == "noise" else "")
    measured_on = "." if not settings.get("slice_sha256") else f" on {settings['split_tokens']:,} tokens of validation text (sha256 " \
        f"{settings['slice_sha256'][:12]}), of which {settings['wand_tokens']:,} calibrate bounds and thresholds."
    lines = [f"# Trajectory of {name}",
             f"{len(rows)} checkpoint{'s'[:len(rows) > 1]}, {step_name(rows[0]['step'])} to {step_name(rows[-1]['step'])}, "
             f"{K} stage{'s'[:K > 1]}, measured by `python evaluate.py`{measured_on}",
             f"Below a table: the change of each figure against the previous row / against {seed}; then its reading, in which envelopes, "
             f"records, rises and drops are of the rows after the phase's warmup. " + (
                 "≈ marks a change within two standard errors: noise. Those of bpb and accuracy are paired by document; end-to-end speedups are "
                 "timings and have none." if reading["noise_known"] else
                 "No standard error is given in these measurements, so none of the changes can be told from noise."),
             "![bits per byte, accuracy, routing and bounds over the steps](trajectory.png)",
             "## Schedule", schedule_table(phases, record) if phases else "No phase table was found.", "## Branches",
             markdown(["Branch", "Step", "Phase position", "Notes"], [[*branch(r), where(r["phase"]), noted[r["step"]]] for r in rows]),
             "## Trajectory measurements"]
    for table in make_tables(rows):
        if not has_values(table, rows):
            lines += [f"### {table.title}", "Not measured." if K > 1 else "One stage: nothing to measure."] if table.read else []
            continue
        lines += [f"### {table.title}", value_table(table, rows)]
        if table.read is None:
            continue
        columns = figures(table)
        if len(rows) > 1:
            lines.append(markdown(["Change", "Step", *(c.header for c in columns)], [
                [*branch(r), *(f"{cell(c, r, before)} / {cell(c, r, rows[0])}" for c in columns)] for before, r in zip(rows, rows[1:])]))
        lines.append("\n".join(told(c, reading["series"][path_name(c)], seed) for c in columns[table.read]))
        if K > 1 and columns[-1].path == ("crossover_gap",):
            lines.append(f"The product is better than the last stage alone, a negative gap, at: {step_names(reading['negative_gaps'])}. "
                         f"The gap changes sign at: {step_names(reading['gap_changes_sign'])}.")
    lines += [f"### Sample-mode probe (FULL K={K}, greedy, {PROBE_TOKENS} tokens, 7-prompt fixed set)", sample_table(rows),
              "## Reading the table", *answers(rows, reading, seed)]
    return "\n\n".join(lines) + "\n"


def draw(file, rows, phases):
    """trajectory.png: bpb with lrm behind it, accuracy, routing and acceptance, WAND bounds, in grey. Raises ImportError without matplotlib."""
    import matplotlib.figure
    K, steps = len(rows[0]["bpb"]["single"]), [row["step"] for row in rows]
    styles = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1)), "v"), ("--", "x")]
    panels = [                                                              # title, unit, lines: label, path, number of its style, grey
        ("bits per byte", "bpb", [
            (f"full K={K}, local slice", ("bpb", "full"), 0, 0.0),
            ("training log", ("train_log_bpb", "full"), 1, 0.35),
            ("single s0", ("bpb", "single", 0), 2, 0.2)]),
        ("top-1 accuracy", "share of targets", [
            *((f"s{k}", ("accuracy", "single", k), k + 1, 0.6 * (1 - k / K)) for k in range(K) if K > 1),
            ("full", ("accuracy", "full"), 0, 0.0)]),
        ("confidence routing and acceptance", "share of positions", [
            ("routed to s0", ("routing", "fraction"), 0, 0.0),
            ("s0 = full (base agreement)", ("routing", "base_agreement"), 1, 0.35),
            ("acceptance of 4 drafts", ("speculative", "acceptance"), 2, 0.0)]),
        ("WAND p99 bounds", "nats", [(f"{k} → {k + 1}", ("wand", "p99_bounds", k), k, 0.25 * k / K) for k in range(K - 1)])]
    figure = matplotlib.figure.Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (title, unit, lines) in zip(axes.flat, panels):
        for label, path, number, grey in lines:
            points = [(row["step"], get(row, path)) for row in rows if get(row, path) is not None]
            dash, marker = styles[number % len(styles)]
            if points:
                axis.plot(*zip(*points), color=str(grey), linestyle=dash, marker=marker, markersize=4, linewidth=1.2, label=label)
        axis.set(title=title, ylabel=unit)
        if axis.lines:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.5")
    for axis in axes[1]:
        axis.set_xlabel("step")
    if phases:
        bpb, behind = axes[0, 0], axes[0, 0].twinx()
        grid = [int(s) for s in np.unique(np.linspace(steps[0], steps[-1], 400).round()) if s >= phases[0].anchor]
        lrm = [learning_rate(phases[phase_index(phases, s)], s) for s in grid]
        behind.fill_between(grid, lrm, color="0.9", linewidth=0)
        behind.set(ylabel="lrm (shaded)", ylim=(0, 1.6 * max([*lrm, 1e-9])), yticks=[0, round(max(lrm, default=0), 3)])
        bpb.set_zorder(behind.get_zorder() + 1)
        bpb.patch.set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, format="png")
    write_whole(file, image.getvalue())


def compare(names, runs, records):
    """Two runs side by side, Markdown: the card's tables at the steps that both have (else at the last of each) and A's gap to B in percent.

    names, runs, records: of A and B: text, rows, RUN/config.json. The gap is 100 (A / B - 1), with its standard error where one is known.
    """
    vocabularies = [(get(record, ("model", "vocab_size")), get(record, ("tokenizer", "sha256"))) for record in records]
    if vocabularies[0] != vocabularies[1]:
        texts = [f"{name} ({size} ids, tokenizer {str(sha256)[:12]})" for name, (size, sha256) in zip(names, vocabularies)]
        raise ValueError(f"{' and '.join(texts)} cannot stand side by side; compare runs of one vocabulary")
    if len({get(rows[-1], ("settings", "slice_sha256")) for rows in runs}) > 1:
        raise ValueError(f"{names[0]} and {names[1]} were measured on different text; give both one --data and one --split-tokens")
    stages = [len(rows[0]["bpb"]["single"]) for rows in runs]
    widest = runs[int(stages[1] > stages[0])]
    if stages[0] != stages[1]:                                              # stage k is not the same part of both: only the products compare
        runs = [rows if rows is widest else [{**row, **{name: {"full": row[name]["full"]} for name in ("bpb", "accuracy")}} for row in rows]
                for rows in runs]
    by_step = [{row["step"]: row for row in rows} for rows in runs]
    common = sorted(by_step[0].keys() & by_step[1].keys())
    pairs = [(by_step[0][s], by_step[1][s]) for s in common] or [(runs[0][-1], runs[1][-1])]

    def gap(column, a, b):
        delta, stderr = change(column, a, b)
        if delta is None or not get(b, column.path) or column.unit == "+":  # a percentage of a difference around zero says nothing
            return "—"
        scale = 100 / abs(get(b, column.path))
        return f"{scale * delta:+.2f} %" + (f" ±{scale * stderr:.2f}" if stderr is not None else "")
    left_out = sum(map(len, by_step)) - 2 * len(pairs)
    rows_are = "the steps that both have" if common else "the last step of each: they have none in common"
    lines = [f"# {names[0]} (A) against {names[1]} (B)"] + [f"Rows are {rows_are}. Checkpoints left out: {left_out}."] * (left_out > 0)
    for table in make_tables(widest):
        if has_values(table, [row for pair in pairs for row in pair]):
            columns, cells = figures(table), []
            for a, b in pairs:
                for name, row in (("A", a), ("B", b)):
                    cells.append([f"{name} {step_name(row['step'])}", f"{row['step']:,}", *(shown(c, get(row, c.path)) for c in columns)])
                cells.append(["gap", "", *(gap(c, a, b) for c in columns)])
            lines += [f"### {table.title}", markdown(["Branch", "Step", *(c.header for c in columns)], cells)]
    return "\n\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class EvalConfig:
    data: str = flag(None, "folder of token shards with validation shards (default: the checkpoint's own)")
    split_tokens: int = flag(None, f"tokens of the slice (default: {SPLIT_TOKENS:,}, or all of the embedded sample's)")
    wand_tokens: int = flag(None, "tokens at the beginning of the slice that calibrate bounds and thresholds (default: an eighth of the slice)")
    routing_cap: float = flag(0.02, "most that routing may cost on average where it takes s0, nats of the target")
    samples: bool = flag(True, "generate text too: the sample-mode probe (7 prompts, 60 greedy tokens) and speculative decoding")
    speculative_prompts: int = flag(None, f"documents whose first {PROMPT_TOKENS} tokens are continued for {NEW_TOKENS} to measure "
                                          f"speculative decoding (default: {SPECULATIVE_PROMPTS['cuda']} on cuda, {SPECULATIVE_PROMPTS['cpu']} "
                                          f"on the CPU; 0: not measured)")
    measure: bool = flag(True, "measure what is not measured yet with these settings; --no-measure reports from the metrics.json there are")
    device_batch_size: int = flag(8, "sequences in a forward pass")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float64"))
    compile: bool = flag(None, "compile the blocks too (default on cuda: the vocabulary's statistics alone; --no-compile: nothing)")
    json: bool = flag(False, "print JSON instead of tables: one object per checkpoint, one per trajectory")

    def __post_init__(self):
        for name in ("device_batch_size", "split_tokens", "wand_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{spelled(name)} {getattr(self, name)} must be at least 1")
        if self.speculative_prompts is not None and self.speculative_prompts < 0:
            raise ValueError(f"--speculative-prompts {self.speculative_prompts} must be 0 or more")
        if not 0 <= self.routing_cap < math.inf:
            raise ValueError(f"--routing-cap {self.routing_cap} must be 0 or more nats")


def gather_rows(paths, config, ranks, slices):
    """{path: row}, the metrics of each step directory, measured or read; a bad one is told and left out."""
    rows, start, terminal = {}, time.time(), sys.stderr.isatty() and ranks.rank == 0
    for number, path in enumerate(paths):
        def progress(done, of):
            part = (number + done / of) / len(paths)
            print(f"\r{path.name} ({number + 1}/{len(paths)}) {done}/{of} windows eta:{(time.time() - start) * (1 / part - 1):.0f}s  ",
                  end="", file=sys.stderr)
        try:
            rows[path] = evaluate_checkpoint(path, config, ranks, slices, progress if terminal else None) if config.measure else read_metrics(path)
        except (ValueError, OSError) as e:
            if len(paths) == 1:
                raise
            if ranks.rank == 0:
                print(f"skipping {path}: {' '.join(str(e).split())}", file=sys.stderr)
        if terminal:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
        if config.json and ranks.rank == 0 and path in rows:
            print(json.dumps(rows[path]), flush=True)
    return rows


def report_run(run, rows):
    """Write TRAJECTORY.md and trajectory.png of a run; return (text, reading)."""
    record = run_record(run / f"step-{rows[-1]['step']:05d}")
    phases = phases_of(record, run)
    rows = [{**row, "phase": phase_position(phases, row["step"]) or row.get("phase"),
             "train_log_bpb": train_log_bpb(run, row["step"]) or row.get("train_log_bpb")} for row in rows]
    slices = {get(row, ("settings", "slice_sha256")) for row in rows}
    if len(slices) > 1:
        raise ValueError(f"the checkpoints of {run} were measured on {len(slices)} different slices; measure them again with one --data")
    reading = read_trajectory(rows, phases)
    text = report(run.resolve().name, rows, phases, record, reading)
    try:
        try:
            draw(run / "trajectory.png", rows, phases)
        except ImportError:
            text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("!["))
            print("matplotlib is missing, so there is no trajectory.png; pip install matplotlib draws it", file=sys.stderr)
        write_whole(run / "TRAJECTORY.md", text.encode())
    except OSError as e:
        print(f"TRAJECTORY.md and trajectory.png are not written, only printed: {e}", file=sys.stderr)
    return text, reading


def tables_of(rows):
    """The tables of single checkpoints, {path: row}, as text: one set for those with as many stages on the same text."""
    groups, several = {}, len({path.parent for path in rows}) > 1
    for path, row in rows.items():
        alike = len(row["bpb"]["single"]), get(row, ("settings", "slice_sha256"))
        groups.setdefault(alike, []).append({**row, "mark": f" of {path.parent}" if several else ""})
    return "\n\n".join(f"### {table.title}\n\n{value_table(table, group)}"
                       for group in groups.values() for table in make_tables(group) if has_values(table, group))


@contextlib.contextmanager
def named(what):
    """Name the files of `what` where a report cannot be made of what they hold: metrics.json may come from any hand."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        place = traceback.extract_tb(e.__traceback__)[-1]
        raise ValueError(f"no report can be made of metrics.json or timings.json of {what} "
                         f"({e!r} at {Path(place.filename).name}:{place.lineno}): where something else wrote or changed them, "
                         f"move them away and measure again; else this is a bug of evaluate.py") from e
    except ValueError as e:
        raise ValueError(f"{what}: {e}" if what not in str(e) else str(e)) from e


def evaluate(given, paths, ranks):
    """Measure and report the runs and step directories at `paths`."""
    config, singles, runs, slices = EvalConfig(**given), [], [], {}
    device = choose_device(ranks.device_name(config.device))[0]
    if device.index is not None:
        torch.cuda.set_device(device)
    for path in paths:
        if steps := checkpoint_steps(path):
            runs.append((path, steps))
        elif path.name.startswith(("step-", ".tmp-step-")):
            singles.append(path)
        else:
            raise FileNotFoundError(f"{path} holds no step-XXXXX checkpoint; train one with train.py --out {path}")
    measured, missing = [], []
    for run_path, steps in runs:
        rows = gather_rows(steps, config, ranks, slices)
        missing += [str(step) for step in steps if step not in rows]
        with ranks.together(), named(str(run_path)):
            if rows and ranks.rank == 0:
                text, reading = report_run(run_path, [*rows.values()])
                measured.append((str(run_path), [*rows.values()], read_object(run_path / "config.json")))
                if config.json or len(runs) != 2:
                    print(json.dumps(reading) if config.json else text)
    if singles:
        rows = gather_rows(singles, config, ranks, slices)
        missing += [str(step) for step in singles if step not in rows]
        with ranks.together(), named(", ".join(map(str, rows))):
            if rows and ranks.rank == 0 and not config.json:
                print(tables_of(rows))
    with ranks.together(), named(" and ".join(name for name, _, _ in measured)):
        if len(runs) == 2 and len(measured) == 2 and not config.json:
            print(compare(*zip(*measured)))
    if missing:
        raise ValueError(f"{len(missing)} of {sum(len(s) for _, s in runs) + len(singles)} checkpoints could not be reported: "
                         f"{', '.join(missing)}; the lines above say why")


def main(argv=None):
    given = parse_flags(EvalConfig, __doc__, argv, positionals=[
        ("checkpoints", "+", "step-XXXXX directories, or runs: all their steps; two runs are compared")])
    paths = [Path(path) if Path(path).name else Path(path).resolve() for path in given.pop("checkpoints")]
    ranks = Ranks()
    with ranks.alike():
        evaluate(given, paths, ranks)
    ranks.gather(None)
    ranks.close()


if __name__ == "__main__":
    run(main)
