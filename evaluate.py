"""
Measure checkpoints: every table of the model card, all but generated text from one pass of the trunk.

    python evaluate.py runs/tiny/step-00400     # one checkpoint: its tables
    python evaluate.py runs/tiny                # every checkpoint of a run: TRAJECTORY.md, trajectory.png
    python evaluate.py runs/poe runs/bp ...     # the final checkpoints of runs side by side
    torchrun --standalone --nproc_per_node 8 evaluate.py runs/3b

The slice is the first `--split-tokens` of the validation windows, which never change (dataloader.py). Its
first `--wand-tokens` calibrate bounds and thresholds; rates are reported on positions of later windows whose
document has no position in the calibration part (`Slice`). bpb, accuracy and alpha use all of it. Targets
that are special tokens count nowhere.

Every rate is a ratio of float64 sums, kept per block of documents, so that standard errors are clustered by
document, and differences between two checkpoints have paired ones (report.py). Ranks share the windows and
add up their sums. Memory is bounded by a chunk of tokens, a few bytes per token of the slice and one per
token of a validation shard.

A checkpoint that was measured with equal settings is not measured again. Written, inside the run that is
given and nowhere else: metrics.json and timings.json of each step, `poe_wand_*` in its config.json,
TRAJECTORY.md, trajectory.png. Definitions are in the docstrings and in README's "Measuring". WAND: after
Broder et al., CIKM 2003.
"""
import hashlib
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import (BOUNDS_KEY, checkpoint_steps, load_checkpoint, read_json, read_log,
                        resolve_checkpoint, write_json)
from common import DeviceFlags, Ranks, SharedError, choose_device, flag, parse_flags, run
from dataloader import VAL_SEED, open_data, validation_windows
from model import attention_backends, norm, softcap, stage_bytes
from report import compare, phase_position, ratio, tables_of, write_report
from sample import Engine, Plan, decode_timed, kernels_fit
from schedule import phase_of

FORMAT = 1                      # of metrics.json
SPLIT_TOKENS = 1_048_576        # the card's slice; an eighth of a slice calibrates
# (token, vocabulary) pairs of one array held at once: a CPU's cache; 128 MiB in bfloat16
CHUNK_LOGITS = {"cpu": 2 ** 20, "cuda": 2 ** 26}
N_BLOCKS = 128                  # blocks of documents that carry the standard errors
ALPHAS = (0.25, 0.5, 0.75, 1.0)         # alpha = 0 is the full prefix
MARGIN_CAP = 0.001              # of disagreement with full, per stage, for WAND's margin form
DRAFT_LEN = 4                   # of the speculative table
PROMPT_TOKENS = 32
NEW_TOKENS = 256
SPECULATIVE_PROMPTS = {"cpu": 8, "cuda": 64}
PROBE_TOKENS = 60
PROBE = ("The capital of France is", "The chemical symbol of gold is",
         "If yesterday was Friday, then tomorrow will be", "The opposite of hot is",
         "The planets of the solar system are:", "My favorite color is", "If 5*x + 3 = 13, then x is")
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")


# --------------------------------------------------------------------------------------------------
# One pass

def token_statistics(logits, targets, full):
    """What the tables need of n positions, {name: (n, w)}: the one place that reads the vocabulary.

    logits: K tensors (n, V), the heads' outputs before the softcap. targets: int64 (n,). full: with alpha,
    confidence, regret, ranges, margins and agreement. It compiles into one kernel that reads the logits twice
    and keeps no (n, V) array but the K means.

    nats_single, nats_prefix, hits_single, hits_prefix: (n, K). nats_alpha: (n, 4).
    range: (n, K - 1), nats, largest less smallest change of a score from prefix k + 1 to k + 2.
    margin: (n, K - 1), nats, top-1 less top-2 of prefix k + 1. agree: prefix k + 1 has full's argmax.
    confidence: (n, 1), s0's top probability. regret: (n, 1), log p_full(y) - log p_0(y).
    Ties of an argmax go to the lowest id.
    """
    # With z_k = softcap(logits_k), log p_k(v) = z_k(v) - c_k, where c_k depends on the position alone. So the
    # score of a prefix is the mean of its z_k less a constant: its argmax, margins and ranges need no c_k.
    # c_k = log sum_v exp z_k(v), and |z| < 15, so that exp() needs no maximum subtracted.
    K = len(logits)
    total = 0.0                         # z_0 + ... + z_k (n, V)
    total_y = 0.0                       # the same at the target (n,)
    means = []                          # of each prefix (n, V)
    tops = []                           # argmax of each prefix (n,)
    found = defaultdict(list)
    for k in range(K):
        z = softcap(logits[k])
        z_y = softcap(logits[k].gather(1, targets[:, None]))[:, 0]
        total = total + z
        total_y = total_y + z_y
        mean = total / (k + 1)
        top = mean.argmax(-1)
        means.append(mean)
        tops.append(top)
        # -log p_k(y) = c_k - z_k(y), and the same of the mean; a prefix of one stage is exactly that stage
        c = z.exp().sum(-1).log()
        found["nats_single"].append(c - z_y)
        found["nats_prefix"].append(mean.exp().sum(-1).log() - total_y / (k + 1) if k else c - z_y)
        found["hits_single"].append(z.argmax(-1) == targets)
        found["hits_prefix"].append(top == targets)
        if full and k == 0:
            found["confidence"].append((z.amax(-1) - c).exp())
    if full:
        found["regret"].append(found["nats_single"][0] - found["nats_prefix"][-1])
        # S_alpha = K^alpha times the mean of all stages, which may be large: its maximum is subtracted
        best = mean.amax(-1)
        for alpha in ALPHAS:
            scale = K ** alpha
            c = ((mean - best[:, None]) * scale).exp().sum(-1).log()
            found["nats_alpha"].append(c - (total_y / K - best) * scale)
        ids = torch.arange(mean.size(1), device=mean.device)
        for k in range(K - 1):
            change = means[k + 1] - means[k]
            found["range"].append(change.amax(-1) - change.amin(-1))
            second = means[k].masked_fill(ids == tops[k][:, None], -torch.inf).amax(-1)
            found["margin"].append(means[k].amax(-1) - second)
            found["agree"].append(tops[k] == tops[-1])
    return {name: torch.stack(columns, dim=1) for name, columns in found.items()}


def send(tensor, device):
    """Copy a CPU tensor to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def one_pass(model, mix, windows, tokenizer, batch_size, full):
    """Run the trunk once over `windows` of `mix`; yield (windows of the batch, columns): `token_statistics`
    of its B T positions.

    Two columns are added: tokens (1 where the target counts, 0 for special tokens) and bytes. Nothing here
    waits for the device.
    """
    device = model.cos.device
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    heads = [model.head_weight(k) for k in range(model.config.n_stage)]
    # a graph that was compiled in an earlier pass is used again
    statistics = torch.compile(token_statistics, dynamic=False) if device.type == "cuda" else token_statistics
    step = max(1, CHUNK_LOGITS[device.type] // model.config.vocab_size)
    for first in range(0, len(windows), batch_size):
        rows = windows[first:first + batch_size]
        idx, targets = mix.batch(rows)
        y = send(targets, device).flatten()
        stages = [norm(x).flatten(0, 1) for x in model.boundaries(send(idx, device))]       # K x (B T, C)
        chunks = []
        for y_chunk, *x_chunks in zip(y.split(step), *[x.split(step) for x in stages]):
            logits = [F.linear(x, head) for x, head in zip(x_chunks, heads)]
            chunks.append(statistics(logits, y_chunk, full))
        columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        columns["bytes"] = token_bytes[y][:, None]
        columns["tokens"] = (columns["bytes"] > 0).double()
        yield rows, columns


def accumulate(sums, columns, weight, blocks=None):
    """Add columns (N, w) times weight (N, 1) to the float64 `sums`, {name: (w,)}; where blocks (N,) is given
    per block, {name: (G, w)}.

    Per block by a matrix product and not by atomic additions, whose order, and so the last digit, would
    change from run to run.
    """
    select = None if blocks is None else F.one_hot(blocks, N_BLOCKS).double().T             # (G, N)
    for name, column in columns.items():
        column = column.double() * weight
        sums[name] = sums.get(name, 0.0) + (column.sum(dim=0) if select is None else select @ column)


def sum_over_ranks(sums, world_size):
    """Sum a dict of tensors over the ranks, in place; return them as numpy arrays."""
    if world_size > 1:
        for value in sums.values():
            torch.distributed.all_reduce(value)
    return {name: value.cpu().numpy() for name, value in sums.items()}


def windows_of_rank(first, last, rank, world_size):
    """This rank's windows of range(first, last), an array."""
    if last - first < world_size:
        raise ValueError(f"{last - first} windows cannot be shared by {world_size} ranks; "
                         f"take fewer ranks or more tokens")
    return np.arange(first, last)[rank::world_size]


def score(model, mix, n_windows, tokenizer, batch_size, rank=0, world_size=1):
    """Sum nats and hits of every stage and prefix over the first `n_windows` windows of `mix`, in one pass of
    the trunk.

    Ranks take disjoint windows; every rank returns the sums of all.
    Returns a dict of float64 arrays: tokens and bytes (1,) of counted targets; nats_single, nats_prefix,
    hits_single, hits_prefix (K,).
    """
    sums = {}
    windows = windows_of_rank(0, n_windows, rank, world_size)
    for _, columns in one_pass(model, mix, windows, tokenizer, batch_size, False):
        accumulate(sums, columns, columns["tokens"])
    return sum_over_ranks(sums, world_size)


def summarize(sums):
    """The metrics of one checkpoint from the sums of `score`: bpb, accuracy, crossover gap, in metrics.json's
    keys.
    """
    tokens = int(sums["tokens"][0])
    n_bytes = int(sums["bytes"][0])
    nats = math.log(2) * n_bytes            # of one bit per byte
    single = (sums["nats_single"] / nats).tolist()
    prefix = (sums["nats_prefix"] / nats).tolist()
    hits = (sums["hits_prefix"] / tokens).tolist()
    return {
        "tokens": tokens, "bytes": n_bytes,
        "bpb": {"full": prefix[-1], "single": single, "prefix": prefix},
        "accuracy": {"full": hits[-1], "single": (sums["hits_single"] / tokens).tolist()},
        "crossover_gap": prefix[-1] - single[-1]}


# --------------------------------------------------------------------------------------------------
# The slice and its documents

def slice_text(mix, n_windows, tokenizer):
    """The slice's target text as bytes, in the order of the corpus, which is the kindest to a compressor, and
    its sha256.
    """
    source, _, window = mix.locate(np.arange(n_windows))
    order = np.lexsort((window, source))
    text = b"".join(tokenizer.decode_bytes(mix.window(source[i], window[i])[1:].tolist()) for i in order)
    return text, hashlib.sha256(text).hexdigest()


def slice_documents(mix, n_windows, bos):
    """The document of each target: int64 (n_windows, T), numbered from 0 in the order of the streams.

    A document is a source and the last bos at or before the target. So windows that hold pieces of one
    document name the same number.
    """
    source, _, window = mix.locate(np.arange(n_windows))
    # of the targets, in their streams
    places = window[:, None].astype(np.int64) * mix.T + np.arange(1, mix.T + 1)
    documents = np.empty_like(places)
    for s, stream in enumerate(mix.sources):
        begins = np.concatenate([start + np.flatnonzero(shard == bos)
                                 for start, shard in zip(stream.starts, stream.shards)])
        # the number of documents that begin at or before the target
        here = source == s
        documents[here] = np.searchsorted(begins, places[here], side="right") + (s << 48)
    _, number = np.unique(documents, return_inverse=True)
    return number.reshape(places.shape)


class Slice:
    """The text that is measured: the first windows of a validation mix. A pure function of the mix and the
    two sizes.

    The first `n_calibration` windows calibrate. Rates are reported on `in_report`, bool (n_windows, T):
    positions of the other windows whose target's document has no target in a calibration window, because
    windows cut documents and both parts may hold pieces of one.
    """

    def __init__(self, mix, n_windows, n_calibration, tokenizer):
        self.mix = mix
        self.n_windows = n_windows
        self.n_calibration = n_calibration
        self.tokenizer = tokenizer
        self.documents = slice_documents(mix, n_windows, tokenizer.bos)
        self.in_report = ~np.isin(self.documents, self.documents[:n_calibration])
        if n_calibration < 1 or not self.in_report.any():
            raise ValueError(f"--wand-tokens must be a window of {mix.T} tokens or more and leave whole "
                             f"documents to report on; change it, or raise --split-tokens")
        self.sha256 = slice_text(mix, n_windows, tokenizer)[1]


# --------------------------------------------------------------------------------------------------
# Early exit: calibration and rates

def fit_threshold(score, cost, cap):
    """The smallest score threshold t for which the mean cost of the positions with score >= t is at most
    `cap`; inf where none is.

    score, cost: float64 (n,). Equal scores stay together. The one rule behind routing and WAND's margin form.
    """
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    mean = np.cumsum(cost[order]) / np.arange(1, len(order) + 1)
    last_of_equals = np.diff(ordered, append=-np.inf) != 0
    allowed = np.flatnonzero(last_of_equals & (mean <= cap))
    return float(ordered[allowed[-1]]) if len(allowed) else math.inf


def fit_bound(ranges, blocks):
    """(bound, standard error): p99 of ranges, float64 (n,); exact, an observed value.

    The error is half the distance between the observed values whose ranks lie one standard error above and
    below the bound's. That error is the one of the share of positions above the bound, by blocks (n,).
    """
    n = len(ranges)
    ordered = np.sort(ranges)
    # the smallest value that has at least 99 % of all at or below it
    at = -(-99 * n // 100) - 1
    above = np.bincount(blocks, ranges > ordered[at], N_BLOCKS)
    sizes = np.bincount(blocks, minlength=N_BLOCKS)
    ranks = round(n * (ratio(above, sizes)[1] or 0.0))
    return ordered[at], (ordered[min(n - 1, at + ranks)] - ordered[max(0, at - ranks)]) / 2


def calibrate(columns, blocks, cap):
    """Fit early exit on the calibration positions: a dict of float64 arrays. columns: float64 (n, w) by
    `token_statistics`' names; blocks (n,).

    A rule leaves after the first stage k whose score reaches the rule's threshold k, else it runs to the end.
    Thresholds of three rules, (K - 1,) each:
    wand: the margin, against more than what the later stages may still move, the sum of their bounds.
    margin: the margin, fitted stage by stage on disagreement of the positions that have not left earlier, so
    that violations stay within MARGIN_CAP in sum too.
    routing: s0's top probability, fitted on max(regret, 0); it never leaves after a later stage.
    bounds, bounds_stderr (K - 1,): `fit_bound`.
    """
    bounds, bounds_stderr = np.array([fit_bound(ranges, blocks) for ranges in columns["range"].T]).T
    remaining = np.cumsum(bounds[::-1])[::-1]
    stays = np.ones(len(blocks), dtype=bool)
    margins = []
    for margin, agree in zip(columns["margin"].T, columns["agree"].T):
        margins.append(fit_threshold(margin[stays], 1 - agree[stays], MARGIN_CAP))
        stays &= margin < margins[-1]
    routing = np.full(len(bounds), np.inf)
    routing[0] = fit_threshold(columns["confidence"][:, 0], np.maximum(columns["regret"][:, 0], 0), cap)
    return {"bounds": bounds, "bounds_stderr": bounds_stderr, "wand": np.nextafter(remaining, np.inf),
            "margin": np.array(margins), "routing": routing}


def exit_statistics(columns, fitted, cap):
    """What early exit would do at each position under the `fitted` thresholds: a dict of columns (N, w),
    summed later. All tensors on one device.

    X_exit of each rule X: one-hot (N, K). X_violation: it stopped early and full's argmax differs. cost:
    max(regret, 0) of what routing lets out. oracle: a router that knew the target would let it out.
    """
    regret = columns["regret"]
    agree = F.pad(columns["agree"].int(), (0, 1), value=1)          # (N, K): the last stage has full's argmax
    found = {"tokens": torch.ones_like(regret), "exceedance": columns["range"] > fitted["bounds"],
             "base_agree": agree[:, :1], "oracle": regret <= cap}
    for rule, score in (("wand", "margin"), ("margin", "margin"), ("routing", "confidence")):
        leaves = F.pad((columns[score] >= fitted[rule]).int(), (0, 1), value=1)             # (N, K)
        stage = leaves.argmax(dim=1, keepdim=True)                  # the first one
        found[f"{rule}_exit"] = F.one_hot(stage[:, 0], agree.size(1))
        found[f"{rule}_violation"] = 1 - agree.gather(1, stage)
    found["cost"] = found["routing_exit"][:, :1] * regret.clamp(min=0)
    return found


def ratios(denominator, **numerators):
    """{name: ratio, name_stderr: its standard error} from sums per block: numerators (G,), or (G, w) for
    lists of w; denominator (G,).
    """
    found = {}
    for name, sums in numerators.items():
        if sums.ndim == 1:
            value, stderr = ratio(sums, denominator)
        else:
            value, stderr = map(list, zip(*[ratio(column, denominator) for column in sums.T]))
        found |= {name: value, f"{name}_stderr": stderr}
    return found


def exit_metrics(sums, fitted, cap, read_bytes):
    """WAND and routing from the sums of `exit_statistics` per block, numpy (G, w).

    violation_rate: among the positions that stopped early. agreement: of all positions, those that ran to the
    end included; so 1 - agreement = violation_rate (1 - exit_fraction[K - 1]). In routing, of the routed.
    projected_speedup: full's bytes over the mean bytes read.
    """
    tokens = sums["tokens"][:, 0]
    thresholds = {rule: [None if math.isinf(t) else t for t in fitted[rule].tolist()]
                  for rule in ("margin", "routing")}
    margin = {"cap": MARGIN_CAP, "thresholds": thresholds["margin"]}
    wand = {"p99_bounds": fitted["bounds"].tolist(), "p99_bounds_stderr": fitted["bounds_stderr"].tolist(),
            "report_tokens": int(tokens.sum()), "margin": margin,
            **ratios(tokens, exceedance=sums["exceedance"])}
    for rule, form in (("wand", wand), ("margin", margin)):
        exits = sums[f"{rule}_exit"]
        violation = sums[f"{rule}_violation"][:, 0]
        form |= ratios(tokens, exit_fraction=exits, agreement=tokens - violation)
        form |= ratios(tokens - exits[:, -1], violation_rate=violation)
        form["projected_speedup"] = read_bytes[-1] / float(np.dot(form["exit_fraction"], read_bytes))

    routed = sums["routing_exit"][:, 0]
    routing = {
        "cap": cap, "threshold": thresholds["routing"][0],
        **ratios(tokens, fraction=routed, oracle_fraction=sums["oracle"][:, 0],
                 base_agreement=sums["base_agree"][:, 0]),
        **ratios(routed, agreement=routed - sums["routing_violation"][:, 0], mean_cost=sums["cost"][:, 0])}
    bytes_read = routing["fraction"] * read_bytes[0] + (1 - routing["fraction"]) * read_bytes[-1]
    routing["projected_speedup"] = read_bytes[-1] / bytes_read
    return {"wand": wand, "routing": routing}


# --------------------------------------------------------------------------------------------------
# From one pass to metrics

def measure(model, text_slice, batch_size, cap, rank=0, world_size=1):
    """Every table but those of generated text, in one pass of the trunk over a `Slice`: metrics.json's keys,
    in memory of a chunk.
    """
    device = model.cos.device
    K = model.config.n_stage
    mix = text_slice.mix
    n_calibration = text_slice.n_calibration
    calibrating = windows_of_rank(0, n_calibration, rank, world_size)
    reported = windows_of_rank(n_calibration, text_slice.n_windows, rank, world_size)
    blocks = text_slice.documents % N_BLOCKS
    blocks_there = torch.from_numpy(blocks).to(device)
    in_report = torch.from_numpy(text_slice.in_report).to(device)
    sums = {}                   # per block, of every window
    exit_sums = {}              # per block, of the positions that are reported on

    # the first windows calibrate: a few columns of them are kept
    widths = {"range": K - 1, "margin": K - 1, "agree": K - 1, "confidence": 1, "regret": 1, "tokens": 1}
    kept = {name: torch.zeros(n_calibration, mix.T, width, dtype=torch.float64, device=device)
            for name, width in widths.items() if K > 1}
    for rows, columns in one_pass(model, mix, calibrating, text_slice.tokenizer, batch_size, True):
        accumulate(sums, columns, columns["tokens"], blocks_there[rows].flatten())
        for name, values in kept.items():
            values[rows] = columns[name].view(len(rows), mix.T, -1).double()
    if K > 1:
        kept = sum_over_ranks(kept, world_size)
        counted = kept["tokens"][..., 0] > 0
        fitted = calibrate({name: values[counted] for name, values in kept.items()},
                           blocks[:n_calibration][counted], cap)
        thresholds = {name: torch.from_numpy(values).to(device) for name, values in fitted.items()}

    # the others run under the thresholds
    for rows, columns in one_pass(model, mix, reported, text_slice.tokenizer, batch_size, True):
        block = blocks_there[rows].flatten()
        accumulate(sums, columns, columns["tokens"], block)
        if K > 1:
            weight = columns["tokens"] * in_report[rows].view(-1, 1)
            accumulate(exit_sums, exit_statistics(columns, thresholds, cap), weight, block)

    metrics = slice_metrics(sum_over_ranks(sums, world_size))
    metrics |= {"documents": int(text_slice.documents.max()) + 1, "wand": None, "routing": None}
    if K > 1:
        metrics |= exit_metrics(sum_over_ranks(exit_sums, world_size), fitted, cap, stage_bytes(model))
        metrics["wand"]["tokens"] = int(counted.sum())
    return metrics


def in_one_line(sums):
    """Arrays (G,) or (G, w), in a dict, as strings: a line of the file for each column."""
    if isinstance(sums, dict):
        return {name: in_one_line(value) for name, value in sums.items()}
    if sums.ndim == 2:
        return [in_one_line(column) for column in sums.T]
    return " ".join(f"{v:.4f}".rstrip("0").rstrip(".") for v in sums)


def slice_metrics(sums):
    """bpb, accuracy, alpha and the gap from sums per block, numpy (G, w), with standard errors; and the
    blocks' sums for paired ones.
    """
    metrics = summarize({name: value.sum(axis=0) for name, value in sums.items()})
    n_bytes = sums["bytes"][:, 0]
    tokens = sums["tokens"][:, 0]
    single = sums["nats_single"]
    full = sums["nats_prefix"][:, -1]
    hits = sums["hits_prefix"][:, -1]
    gap = full - single[:, -1]
    alphas = {"0": full, **{f"{a:g}": column for a, column in zip(ALPHAS, sums["nats_alpha"].T)}}
    metrics["alpha_sweep"] = {a: nats.sum() / (math.log(2) * metrics["bytes"]) for a, nats in alphas.items()}
    metrics["bpb"]["full_stderr"] = ratio(full / math.log(2), n_bytes)[1]
    metrics["crossover_gap_stderr"] = ratio(gap / math.log(2), n_bytes)[1]
    metrics["accuracy"] = ratios(tokens, full=hits, single=sums["hits_single"])
    metrics["blocks"] = in_one_line({
        "bytes": n_bytes, "tokens": tokens,
        "bpb": {"full": full, "single": single, "prefix": sums["nats_prefix"]},
        "accuracy": {"full": hits, "single": sums["hits_single"]},
        "alpha_sweep": alphas, "crossover_gap": gap})
    return metrics


# --------------------------------------------------------------------------------------------------
# Generated text

def document_prompts(text_slice, n_prompts, length):
    """The first `length` tokens, bos included, of the first documents of the report part that begin in a
    window and are as long there.
    """
    mix = text_slice.mix
    source, _, window = mix.locate(np.arange(text_slice.n_windows))
    prompts = []
    for i in range(text_slice.n_calibration, text_slice.n_windows):
        tokens = mix.window(source[i], window[i])
        begins = np.flatnonzero(tokens == text_slice.tokenizer.bos)
        for begin, document in zip(begins, np.split(tokens, begins)[1:]):
            if len(document) >= length and begin < mix.T and text_slice.in_report[i, begin]:
                prompts.append(document[:length].tolist())
    return prompts[:n_prompts]


def probe(texts):
    """(samples, facts) of the sample-mode probe: continuations of PROBE, graded by substring."""
    france, gold, _, _, solar_system, _, algebra = texts
    planets = [planet in solar_system for planet in PLANETS]
    samples = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROBE, texts)]
    return samples, {"Paris": "Paris" in france, "Au": "Au" in gold, "79": "79" in gold,
                     "planets": all(planets), "planets_named": sum(planets), "2": "2" in algebra}


def acceptance(drafted):
    """Accepted drafts over judged ones (the accepted and the first rejected of each cycle) and per cycle,
    with standard errors by prompt.
    """
    accepted, judged, cycles = np.array([(text.accepted, text.judged, text.cycles) for text in drafted]).T
    return ratios(judged, acceptance=accepted) | ratios(cycles, mean_accepted=accepted)


def speculation(texts, n_documents):
    """Self-speculative decoding against plain decoding of the same: (metrics, timings).

    texts: {way of decoding: the `Run` of each prompt}, `n_documents` documents and then the card's 7 prompts,
    whose acceptance is card_prompts. timings: tokens/s, of s0 alone too.
    """
    plain = texts["plain"]
    drafted = texts["speculative"]
    documents = drafted[:n_documents]
    metrics = {
        "draft_len": DRAFT_LEN, "prompts": n_documents, "new_tokens": len(plain[0].ids),
        "judged": sum(text.judged for text in documents), **acceptance(documents),
        "card_prompts": acceptance(drafted[n_documents:]),
        "identical_to_plain": all(ours.ids[:len(theirs.ids)] == theirs.ids
                                  for ours, theirs in zip(drafted, plain))}
    speed = {name: sum(len(text.ids) for text in of_way) / sum(text.seconds for text in of_way)
             for name, of_way in texts.items()}
    return metrics, {"speedup": speed["speculative"] / speed["plain"],
                     **{f"{name}_tokens_per_s": value for name, value in speed.items()}}


def generate_texts(model, text_slice, n_prompts, fast):
    """Greedy texts of documents' beginnings and of the probe's prompts, a row at a time: (metrics.json's
    samples, facts and speculative; timings.json's speculative).

    With several stages and documents, speculative decoding and s0 alone take turns with plain decoding. In a
    short context a prompt is cut, and its text is as long as there is room.
    """
    K = model.config.n_stage
    context = model.config.sequence_len
    tokenizer = text_slice.tokenizer
    length = min(PROMPT_TOKENS, context // 2)
    documents = document_prompts(text_slice, n_prompts, length) if K > 1 else []
    probes = [tokenizer.encode(prompt)[:context] for prompt in PROBE]
    plans = {"plain": Plan(range(K))}
    if documents:
        plans |= {"speculative": Plan(range(K), draft_len=DRAFT_LEN), "s0": Plan(range(1))}
    engines = {name: Engine(model, plan, fast=fast) for name, plan in plans.items()}
    for engine in engines.values():
        decode_timed(engine, probes[0], 1)              # compile and capture
    texts = {name: [] for name in engines}
    for prompts, n_new in ((documents, NEW_TOKENS), (probes, PROBE_TOKENS)):
        for ids in prompts:
            for name, engine in engines.items():
                texts[name].append(decode_timed(engine, ids, min(n_new, context + 1 - len(ids))))
    completions = []
    for text in texts["plain"][len(documents):]:
        end = [*text.ids, tokenizer.bos].index(tokenizer.bos)
        completions.append(tokenizer.decode(text.ids[:end]))
    samples, facts = probe(completions)
    metrics = {"speculative": None, "samples": samples, "facts": facts}
    timings = None
    if documents:
        metrics["speculative"], timings = speculation(texts, len(documents))
    return metrics, timings


# --------------------------------------------------------------------------------------------------
# One checkpoint

def record_file(step):
    """config.json of the run of a step directory or, where it has none, the step's own."""
    of_run = step.parent / "config.json"
    return of_run if of_run.exists() else step / "config.json"


def open_slice(file, config):
    """The `Slice` that `config` asks for, over --data or the data that config.json `file` names."""
    record = read_json(file)
    folder = record["train"]["data"] if config.data is None else config.data
    data = open_data(folder, record["model"]["vocab_size"])
    if data.tokenizer.sha256 != record["tokenizer"]["sha256"]:
        raise ValueError(f"{folder or 'the embedded sample'} was tokenised with another tokenizer than "
                         f"{file.parent}; use --data with its own")
    if config.data is None and data.sha256 != record["phases"][-1]["mix_sha256"]:
        raise ValueError(f"{folder or 'the embedded sample'} is not the data that {file.parent} was trained "
                         f"on, whose held-out text it may not hold; name other data on purpose with --data")
    mix = data.val(record["model"]["sequence_len"])
    split_tokens = config.split_tokens or min(SPLIT_TOKENS, mix.n_in_first_epoch() * mix.T)
    n_windows = validation_windows(mix, split_tokens, "--split-tokens")
    n_calibration = config.wand_tokens // mix.T if config.wand_tokens else max(1, n_windows // 8)
    return Slice(mix, n_windows, n_calibration, data.tokenizer)


def settings_of(step, text_slice, config, device, dtype):
    """metrics.json's `settings`: all that its figures depend on."""
    n_prompts = config.speculative_prompts
    if n_prompts is None:
        n_prompts = SPECULATIVE_PROMPTS[device.type]
    return {"split_tokens": text_slice.n_windows * text_slice.mix.T,
            "wand_tokens": text_slice.n_calibration * text_slice.mix.T,
            "seed": VAL_SEED, "slice_sha256": text_slice.sha256, "routing_cap": config.routing_cap,
            "dtype": str(dtype).removeprefix("torch."), "samples": config.samples,
            "speculative_prompts": n_prompts if config.samples else 0,
            "weights_sha256": read_json(step / "manifest.json")["files"]["model.pt"]}


def evaluate_checkpoint(step, text_slice, config, device, dtype, ranks):
    """Measure one step directory, unless it was measured with equal settings.

    Rank 0 alone generates text. It writes the step's timings.json, the bounds in its config.json and, when
    all else is there, metrics.json. Raises ValueError on all ranks where the step is damaged.
    """
    file = step / "metrics.json"
    with ranks.together():
        settings = settings_of(step, text_slice, config, device, dtype)
        old = read_json(file) if file.exists() else {}
    # whether to measure is rank 0's answer, for all
    old = ranks.gather(old)[0]
    if (old.get("format"), old.get("settings")) == (FORMAT, settings):
        return

    with ranks.together():
        model, record, _ = load_checkpoint(step, device, dtype)
    if config.compile:
        model.compile_regions()
    stance = "force_eager" if config.compile is False else "default"
    texts = {"speculative": None, "samples": None, "facts": None}
    speeds = None
    with attention_backends(device), torch.compiler.set_stance(stance):
        tables = measure(model, text_slice, config.device_batch_size, config.routing_cap, ranks.rank,
                         ranks.world_size)
        if not math.isfinite(tables["bpb"]["full"]):
            raise ValueError("its log-probabilities are not finite: its weights are damaged; take another")
        with ranks.together():
            if config.samples and ranks.rank == 0:
                fast = config.compile is not False and kernels_fit(model)
                texts, speeds = generate_texts(model, text_slice, settings["speculative_prompts"], fast)

    with ranks.together():
        if ranks.rank == 0:
            phases = [phase_of(row) for row in read_json(record_file(step))["phases"]]
            logged = {entry["step"]: {"full": entry["bpb"]["full"], "tokens": entry["tokens"]}
                      for entry in read_log(step.parent / "log.jsonl") if entry["kind"] == "val"}
            write_json(step / "timings.json", {"speculative": speeds})
            if tables["wand"]:
                bounds = {BOUNDS_KEY: tables["wand"]["p99_bounds"]}
                write_json(step / "config.json", read_json(step / "config.json") | bounds)
            write_json(file, {"format": FORMAT, "settings": settings, "step": record["step"],
                              "phase": phase_position(phases, record["step"]),
                              "train_log_bpb": logged.get(record["step"]), **tables, **texts})


# --------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class EvalConfig(DeviceFlags):
    data: str = flag(None, "folder of token shards with validation shards (default: the checkpoint's "
                           "own)", path=True)
    split_tokens: int = flag(0, f"tokens of the slice (0: {SPLIT_TOKENS:,}, or all where there are "
                                f"fewer)", low=0)
    wand_tokens: int = flag(0, "tokens at the beginning of the slice that calibrate bounds and thresholds "
                               "(0: an eighth of the slice)", low=0)
    routing_cap: float = flag(0.02, "most that routing may cost on average where it takes s0, nats of the "
                                    "target", low=0)
    samples: bool = flag(True, "generate text too: the sample-mode probe (7 prompts, 60 greedy tokens) and "
                               "speculative decoding")
    speculative_prompts: int = flag(None, f"documents whose continuation measures speculative decoding "
                                          f"(default: {SPECULATIVE_PROMPTS}; 0: not measured)", low=0)
    device_batch_size: int = flag(8, "sequences in a forward pass", low=1)
    compile: bool = flag(None, "compile the blocks too (default on cuda: the vocabulary's statistics alone; "
                               "--no-compile: nothing)")
    json: bool = flag(False, "print JSON instead of tables: one object per checkpoint, one per trajectory")


def print_report(paths, runs, steps, as_json):
    """Print what was measured at `steps`; of one run also write its trajectory. runs: those of the paths that
    are runs.
    """
    rows = {step: {**read_json(step / "metrics.json"), "timings": read_json(step / "timings.json")}
            for step in steps}
    reading = None
    if runs and len(paths) == 1:
        text, reading = write_report(paths[0])
    elif runs == paths and len(rows) > 1:
        text = compare([{"name": str(step.parent), "row": row,
                         "record": read_json(step.parent / "config.json"),
                         "log": read_log(step.parent / "log.jsonl")} for step, row in rows.items()])
    else:
        text = tables_of(rows)
    if not as_json:
        print(text)
        return
    for found in filter(None, [*rows.values(), reading]):
        print(json.dumps(found))


def main(argv=None):
    given = parse_flags(EvalConfig, __doc__, argv, positionals=[
        ("checkpoints", "+", "a run: all its steps; or step-XXXXX directories; or runs: their last steps "
                             "side by side")])
    # "." has no name, and no parent whose log to read
    paths = [Path(path) if Path(path).name else Path(path).resolve() for path in given.pop("checkpoints")]
    ranks = Ranks()
    with ranks.together():
        config = EvalConfig(**given)
        device, dtype = choose_device(config.device, config.dtype, ranks)
        runs = [path for path in paths if checkpoint_steps(path)]
        if runs and len(paths) == 1:
            steps = checkpoint_steps(paths[0])
        else:
            steps = [resolve_checkpoint(path) for path in paths]
    # a run may just have saved a step: rank 0's listing is for all
    steps = ranks.gather(steps)[0]
    with ranks.together():
        slices = {file: open_slice(file, config) for file in dict.fromkeys(map(record_file, steps))}
        if runs == paths and len({(of.tokenizer.sha256, of.sha256) for of in slices.values()}) > 1:
            raise ValueError("these runs cannot be compared: they differ in tokenizer or in the text of the "
                             "slice; take runs of one tokenizer and one context, and give one --data and "
                             "--split-tokens")

    measured = []
    failures = []
    start = time.monotonic()
    for number, step in enumerate(steps, 1):
        try:
            evaluate_checkpoint(step, slices[record_file(step)], config, device, dtype, ranks)
        except (ValueError, OSError) as e:
            failures.append(f"{step}: {e}")
            continue
        measured.append(step)
        if ranks.rank == 0:
            eta = (time.monotonic() - start) / number * (len(steps) - number)
            print(f"{step.name} ({number}/{len(steps)}) eta:{eta:.0f}s", file=sys.stderr, flush=True)

    try:
        with ranks.together():
            if measured and ranks.rank == 0:
                print_report(paths, runs, measured, config.json)
    finally:
        # where the report fails too, this is why
        if failures:
            raise SharedError(f"{len(failures)} of {len(steps)} checkpoints could not be measured: "
                              f"{'; '.join(failures)}")
    ranks.close()


if __name__ == "__main__":
    run(main)
