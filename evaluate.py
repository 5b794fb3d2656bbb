"""
Measure checkpoints: every table of the model card, all but generated text from one pass of the trunk.

    python evaluate.py runs/tiny/step-00400     # one checkpoint: its tables
    python evaluate.py runs/tiny                # every checkpoint of a run: TRAJECTORY.md, trajectory.png
    python evaluate.py runs/poe runs/bp ...     # the final checkpoints of runs side by side
    torchrun --standalone --nproc_per_node 8 evaluate.py runs/3b

The slice is the first `--split-tokens` of the validation windows, which never change (dataloader.py). Its
first `--wand-tokens` calibrate bounds and thresholds; rates are reported on positions of later windows whose
document calibrates nothing (`Slice`). bpb, accuracy and alpha use all of it. Targets that are special tokens
count nowhere.

Every figure is a ratio of float64 sums. Its standard error is its spread over a bootstrap of blocks of
documents (`block_weights`), because positions of a document are alike; thresholds are fitted anew in each
resample. Differences between two checkpoints have paired ones (report.py). Ranks share the windows and
add up their sums. Memory is bounded by a chunk of tokens, a few bytes per token of the slice and one per
token of a validation shard; a token that calibrates takes some 500 bytes of K = 4.

A checkpoint that was measured with equal settings is not measured again. Written, inside the run that is
given and nowhere else: metrics.json and timings.json of each step, `poe_wand_*` in its config.json,
TRAJECTORY.md, trajectory.png. Definitions are in the docstrings and in docs/measuring.md. WAND: after
Broder et al., CIKM 2003.
"""
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import (
    BOUNDS_KEY,
    checkpoint_steps,
    load_checkpoint,
    read_json,
    read_log,
    read_record,
    resolve_checkpoint,
    write_json,
)
from common import (
    DeviceFlags,
    Progress,
    Ranks,
    SharedError,
    choose_device,
    flag,
    parse_flags,
    run,
)
from dataloader import VAL_SEED, open_data, validation_windows
from model import attention_backends, norm, softcap, stage_bytes
from report import compare, phase_position, read_row, read_tasks, summary, task_table, write_report
from sample import Engine, Plan, decode_timed, decoding_threads, kernels_fit
from schedule import phase_of

FORMAT = 3                      # of metrics.json
SPLIT_TOKENS = 1_048_576        # the card's slice; an eighth of a slice calibrates
# (token, vocabulary) pairs of one array held at once: a CPU's cache; 128 MiB in bfloat16
CHUNK_LOGITS = {"cpu": 2 ** 20, "cuda": 2 ** 26}
N_BLOCKS = 128                  # blocks of documents that carry the standard errors
N_RESAMPLES = 100               # of the blocks: errors known to 7 %
N_CANDIDATES = 2048             # thresholds to choose from
CONFIDENCE = 1.645              # standard errors: 5 % of a normal distribution lie above
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
FACTS = {"Paris": 0, "Au": 1, "79": 1, "2": 6}          # and the number of the prompt
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()


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


def head_statistics(model, stages, targets, full=False, statistics=token_statistics):
    """`token_statistics` of n positions, a chunk of them at a time. stages: K tensors (n, C), normed."""
    heads = [model.head_weight(k) for k in range(len(stages))]
    step = max(1, CHUNK_LOGITS[targets.device.type] // len(heads[0]))
    chunks = []
    for y, *x_chunks in zip(targets.split(step), *[x.split(step) for x in stages]):
        chunks.append(statistics([F.linear(x, head) for x, head in zip(x_chunks, heads)], y, full))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def send(tensor, device):
    """Copy a CPU tensor to a device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def one_pass(model, mix, first, last, tokenizer, batch_size, full, rank=0, world_size=1):
    """Run the trunk once over this rank's share of the windows of `mix` from `first` up to `last`; yield
    (windows of the batch, columns): `token_statistics` of its B T positions.

    Two columns are added: tokens (1 where the target counts, 0 for special tokens) and bytes. Nothing here
    waits for the device.
    """
    if last - first < world_size:
        raise ValueError(f"{last - first} windows cannot be shared by {world_size} ranks; "
                         f"take fewer ranks or more tokens")
    windows = np.arange(first + rank, last, world_size)
    device = model.cos.device
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    # a graph that was compiled in an earlier pass is used again
    statistics = torch.compile(token_statistics, dynamic=False) if device.type == "cuda" else token_statistics
    for begin in range(0, len(windows), batch_size):
        rows = windows[begin:begin + batch_size]
        idx, targets = mix.batch(rows)
        y = send(targets, device).flatten()
        stages = [norm(x).flatten(0, 1) for x in model.boundaries(send(idx, device))]       # K x (B T, C)
        columns = head_statistics(model, stages, y, full, statistics)
        columns["bytes"] = token_bytes[y][:, None]
        columns["tokens"] = (columns["bytes"] > 0).double()
        yield rows, columns


def accumulate(sums, columns, weights):
    """Add the sums of columns (N, w) under weights (N,) to the float64 `sums`, {name: (w,)}; under several
    (G, N), {name: (G, w)}.

    By a matrix product and not by atomic additions, whose order, and so the last digit, would change from run
    to run.
    """
    for name, column in columns.items():
        sums[name] = sums.get(name, 0.0) + weights @ column.double()


def sum_over_ranks(sums, world_size):
    """Sum a dict of tensors over the ranks, in place; return them as numpy arrays."""
    if world_size > 1:
        for value in sums.values():
            torch.distributed.all_reduce(value)
    return {name: value.cpu().numpy() for name, value in sums.items()}


def score(model, mix, n_windows, tokenizer, batch_size, rank=0, world_size=1):
    """Sum nats and hits of every stage and prefix over the first `n_windows` windows of `mix`, in one pass of
    the trunk.

    Ranks take disjoint windows; every rank returns the sums of all.
    Returns a dict of float64 arrays: tokens and bytes (1,) of counted targets; nats_single, nats_prefix,
    hits_single, hits_prefix (K,).
    """
    sums = {}
    for _, columns in one_pass(model, mix, 0, n_windows, tokenizer, batch_size, False, rank, world_size):
        accumulate(sums, columns, columns["tokens"][:, 0])
    return sum_over_ranks(sums, world_size)


def quotients(denominator, **numerators):
    """{name: the numerator, a float64 array, divided by the denominator}, for JSON."""
    return {name: (sums / denominator).tolist() for name, sums in numerators.items()}


def summarize(sums, divide=quotients):
    """The metrics of one checkpoint from the sums of `score`: bpb, accuracy, crossover gap, in metrics.json's
    keys. divide: what makes figures of sums, `quotients` or `ratios`.
    """
    bits = math.log(2) * sums["bytes"][0]           # nats of one bit per byte
    single = sums["nats_single"]
    prefix = sums["nats_prefix"]
    return {
        "tokens": int(sums["tokens"].flat[0]), "bytes": int(sums["bytes"].flat[0]),
        "bpb": divide(bits, full=prefix[-1], single=single, prefix=prefix),
        "accuracy": divide(sums["tokens"][0], full=sums["hits_prefix"][-1], single=sums["hits_single"]),
        **divide(bits, crossover_gap=prefix[-1] - single[-1])}


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
    windows cut documents and both parts may hold pieces of one. Where that leaves few, because documents are
    long or few, every second document reports, and what calibration windows hold of it calibrates nothing.
    """

    def __init__(self, mix, n_windows, n_calibration, tokenizer, mix_sha256=None):
        self.mix = mix
        self.n_windows = n_windows
        self.n_calibration = n_calibration
        self.tokenizer = tokenizer
        self.mix_sha256 = mix_sha256
        self.documents = slice_documents(mix, n_windows, tokenizer.bos)
        self.in_report = ~np.isin(self.documents, self.documents[:n_calibration])
        if 4 * self.in_report.sum() < self.documents[n_calibration:].size:
            self.in_report = self.documents % 2 == 1
        # the second holds too where there is no calibration window
        if not self.in_report[n_calibration:].any() or self.in_report[:n_calibration].all():
            raise ValueError(f"--wand-tokens must be a window of {mix.T} tokens or more and leave whole "
                             f"documents to report on; change it, or raise --split-tokens")
        self.sha256 = slice_text(mix, n_windows, tokenizer)[1]


# --------------------------------------------------------------------------------------------------
# Early exit: calibration and rates

def block_weights(blocks, seed):
    """How often each block of documents counts, float64 (R, N_BLOCKS), R = N_RESAMPLES + 1: once in the first
    row; in each other as often as a bootstrap of those in `blocks` draws it. It draws one fewer than there
    are, so that the spread of a mean over the resamples is its standard error.

    Calibration and report are both resampled, so that the spread of a rate holds the error of its thresholds
    too. All checkpoints share the resamples, so that differences are paired.
    """
    present = np.unique(blocks)
    drawn = np.random.default_rng(seed).choice(present, (N_RESAMPLES, len(present) - 1))
    return np.array([np.ones(N_BLOCKS), *(np.bincount(row, minlength=N_BLOCKS) for row in drawn)])


def fit_threshold(score, cost, cap, blocks, weights, stays):
    """The smallest score threshold t for which the mean cost of the positions with score >= t keeps `cap` at
    its upper confidence limit, so that it holds on other text; inf where none does: (R,), one a resample.

    score, cost: float64 (n,). blocks: (n,). weights: see `block_weights`. stays: bool (R, n), the positions
    that count in each resample. The one rule behind routing and WAND's margin form. Candidates are
    N_CANDIDATES quantiles of the scores, all of them where there are fewer.

    The limit is a score test's: with e the sum of cost - cap over a block's positions,
    sum(e) + CONFIDENCE sqrt(sum(e^2)) <= 0 over the blocks and one more, a single position of cost 1. So n
    positions without a loss have the limit 2.65 / n, near the rule of three.
    """
    # the candidates' negatives, rising, and the first that each position reaches, as a cell of a table of
    # blocks x candidates
    falling = np.unique(-np.quantile(score, np.linspace(0, 1, N_CANDIDATES), method="nearest"))
    cell = np.searchsorted(falling, -score) + blocks * len(falling)
    found = []
    for weight, staying in zip(weights, stays):
        table = np.bincount(cell, (cost - cap) * staying, N_BLOCKS * len(falling))
        excess = table.reshape(N_BLOCKS, -1).cumsum(axis=1)
        limit = 1 - cap + weight @ excess + CONFIDENCE * np.sqrt((1 - cap) ** 2 + weight @ excess ** 2)
        allowed = np.flatnonzero(limit <= 0)
        found.append(-falling[allowed[-1]] if len(allowed) else math.inf)
    return np.array(found)


def fit_bound(ranges, blocks, weights):
    """p99 of ranges, float64 (n,), in each resample: (R,), observed values. blocks: (n,)."""
    order = np.argsort(ranges)
    found = []
    for weight in weights:
        # the smallest value that has at least 99 % of all at or below it
        at_or_below = np.cumsum(weight[blocks[order]])
        found.append(ranges[order[np.searchsorted(100 * at_or_below, 99 * at_or_below[-1])]])
    return np.array(found)


def calibrate(columns, blocks, cap):
    """Fit early exit on the calibration positions, in each resample: a dict of float64 arrays (w, R).
    columns: float64 (n, w) by `token_statistics`' names; blocks (n,).

    A rule leaves after the first stage k whose score reaches the rule's threshold k, else it runs to the end.
    Thresholds of three rules:
    wand (K - 1, R): the margin, against more than what the later stages may still move, the sum of their
    bounds (K - 1, R), see `fit_bound`.
    margin (K - 1, R): the margin, fitted stage by stage on disagreement of the positions that have not left
    earlier, so that violations stay within MARGIN_CAP in sum too.
    routing (1, R): s0's top probability, fitted on max(regret, 0).
    """
    weights = block_weights(blocks, 0)
    bounds = np.array([fit_bound(ranges, blocks, weights) for ranges in columns["range"].T])
    remaining = np.cumsum(bounds[::-1], axis=0)[::-1]
    stays = np.ones((len(weights), len(blocks)), dtype=bool)
    routing = fit_threshold(columns["confidence"][:, 0], np.maximum(columns["regret"][:, 0], 0), cap, blocks,
                            weights, stays)
    margins = []
    for margin, agree in zip(columns["margin"].T, columns["agree"].T):
        margins.append(fit_threshold(margin, 1 - agree, MARGIN_CAP, blocks, weights, stays))
        stays &= margin < margins[-1][:, None]
    return {"bounds": bounds, "wand": np.nextafter(remaining, np.inf), "margin": np.array(margins),
            "routing": routing[None]}


def exit_statistics(columns, fits, counts, cap):
    """What early exit would do at N positions under the thresholds `fits`: a dict of sums in each resample.
    counts: float64 (N, R), how often each position counts. All tensors on one device.

    all (3, R): positions, those where s0 has full's argmax, those that a router which knew the target would
    let out. exceedance (K - 1, R). Each rule (3, stages, R): the positions that leave after each stage, those
    among them where full's argmax differs, and their max(regret, 0); the rest runs to the end.
    """
    regret = columns["regret"][:, 0].double()
    agree = columns["agree"].double()
    one = torch.ones_like(regret)
    found = {"all": torch.stack([one, agree[:, 0], (regret <= cap).double()]) @ counts,
             "exceedance": ((columns["range"][..., None] > fits["bounds"]) * counts[:, None]).sum(0)}
    for rule, score in (("wand", "margin"), ("margin", "margin"), ("routing", "confidence")):
        stays = counts
        sums = []
        for k, thresholds in enumerate(fits[rule]):
            leaves = (columns[score][:, k, None] >= thresholds) * stays
            stays = stays - leaves
            sums.append(torch.stack([one, 1 - agree[:, k], regret.clamp(min=0)]) @ leaves)
        found[rule] = torch.stack(sums, dim=1)
    return found


def known(values):
    """An array for JSON, as a number or lists; None for what is not finite."""
    return np.where(np.isfinite(values), values, None).tolist()


def ratios(denominator, **numerators):
    """{name: ratio, name_stderr: its standard error, name_resamples: see `take_resamples`} from sums in each
    resample: numerators (R,), or (w, R) for lists of w; denominator (R,).

    A ratio is None where nothing was counted. Its error is the spread over the resamples. Where none or all
    of n positions hit, the error would be 0. Half the upper limit by the rule of three stands in for it: of
    hits that come with probability 3 / n, none is seen in one of twenty texts. Positions count there, and not
    documents, because hits so rare seldom share one.
    """
    text = np.vectorize(lambda row: " ".join(f"{rate:.8g}" for rate in row), otypes=[object],
                        signature="(n)->()")
    found = {}
    for name, sums in numerators.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = sums / denominator
            limit = 1.5 / denominator[0]
        values = rates[..., 0]
        spread = np.ma.filled(np.ma.masked_invalid(rates[..., 1:]).std(axis=-1, ddof=1), np.nan)
        errors = np.where((spread == 0) & np.isin(values, (0, 1)), limit, spread)
        found |= {name: known(values), f"{name}_stderr": known(errors),
                  f"{name}_resamples": text(rates[..., 1:]).tolist()}
    return found


def take_resamples(figures):
    """Take the ratios in each resample out of nested figures; return them, nested alike, as texts.

    Errors of differences need them (report.py); beside the figures nobody could read these.
    """
    taken = {}
    for name, value in list(figures.items()):
        if name.endswith("_resamples"):
            taken[name.removesuffix("_resamples")] = figures.pop(name)
        elif isinstance(value, dict) and (inner := take_resamples(value)):
            taken[name] = inner
    return taken


def exit_metrics(sums, fits, cap, read_bytes):
    """WAND and routing from the sums of `exit_statistics`, as numpy arrays.

    violation_rate: among the positions that stopped early. agreement: of all positions, those that ran to the
    end included; so 1 - agreement = violation_rate (1 - exit_fraction[K - 1]). In routing, of the routed.
    projected_speedup: full's bytes over the mean bytes read.
    """
    tokens, base_agree, oracle = sums["all"]
    margin = {"cap": MARGIN_CAP, "thresholds": known(fits["margin"][:, 0])}
    wand = {"report_tokens": int(tokens[0]), "margin": margin,
            **ratios(np.ones_like(tokens), p99_bounds=fits["bounds"]),
            **ratios(tokens, exceedance=sums["exceedance"])}
    routing = {"cap": cap, "threshold": known(fits["routing"][0, 0]),
               **ratios(tokens, oracle_fraction=oracle, base_agreement=base_agree)}
    for rule, form in (("wand", wand), ("margin", margin), ("routing", routing)):
        leaves, wrong, cost = sums[rule]
        early = leaves.sum(axis=0)
        violations = wrong.sum(axis=0)
        exits = np.vstack([leaves, tokens - early])
        bytes_read = [*read_bytes[:len(leaves)], read_bytes[-1]] @ exits
        form |= ratios(bytes_read, projected_speedup=read_bytes[-1] * tokens)
        if rule == "routing":
            form |= ratios(tokens, fraction=early)
            form |= ratios(early, agreement=early - violations, mean_cost=cost[0])
        else:
            form |= ratios(tokens, exit_fraction=exits, agreement=tokens - violations)
            form |= ratios(early, violation_rate=violations)
    return {"wand": wand, "routing": routing}


# --------------------------------------------------------------------------------------------------
# From one pass to metrics

def measure(model, text_slice, batch_size, cap, rank=0, world_size=1, progress=lambda *_: None):
    """Every table but those of generated text, in one pass of the trunk over a `Slice`: metrics.json's keys,
    in memory of a chunk and of the calibration part. progress: called with (label, windows done, windows in
    all).
    """
    device = model.cos.device
    K = model.config.n_stage
    mix = text_slice.mix
    n_calibration = text_slice.n_calibration
    blocks = text_slice.documents % N_BLOCKS
    source = mix.locate(range(text_slice.n_windows))[0]
    n_sources = len(mix.sources)
    cells = blocks + N_BLOCKS * source[:, None]
    sums = {}                   # per cell, a block of a source, of every window
    kept = {}                   # all columns of the calibration part
    exit_sums = {}              # in each resample, of the positions that are reported on

    def pass_over(first, last):
        for rows, columns in one_pass(model, mix, first, last, text_slice.tokenizer, batch_size, True, rank,
                                      world_size):
            cell = send(torch.from_numpy(cells[rows]), device).flatten()
            accumulate(sums, columns, (F.one_hot(cell, n_sources * N_BLOCKS) * columns["tokens"]).T)
            progress("pass", rows[-1] + 1, text_slice.n_windows)
            yield rows, columns, cell % N_BLOCKS

    for rows, columns, _ in pass_over(0, n_calibration):
        for name, column in columns.items():
            if name not in kept:
                kept[name] = torch.zeros(n_calibration, mix.T, column.size(1), dtype=torch.float64,
                                         device=device)
            kept[name][rows] = column.view(len(rows), mix.T, -1).double()
    if K > 1:
        kept = sum_over_ranks(kept, world_size)
        counted = (kept["tokens"][..., 0] > 0) & ~text_slice.in_report[:n_calibration]
        fits = calibrate({name: values[counted] for name, values in kept.items()},
                         blocks[:n_calibration][counted], cap)
        fits_there = {name: torch.from_numpy(values).to(device) for name, values in fits.items()}
        # (G, R)
        weights = torch.from_numpy(block_weights(blocks[text_slice.in_report], 1).T).to(device)

    # the others run under the thresholds
    for rows, columns, block in pass_over(n_calibration, text_slice.n_windows):
        if K > 1:
            in_report = send(torch.from_numpy(text_slice.in_report[rows]), device).view(-1, 1)
            counts = weights[block] * columns["tokens"] * in_report
            for name, found in exit_statistics(columns, fits_there, counts, cap).items():
                exit_sums[name] = exit_sums.get(name, 0.0) + found

    sums = sum_over_ranks(sums, world_size)
    metrics = slice_metrics(sums, blocks, np.ones(n_sources))
    metrics |= {"documents": int(text_slice.documents.max()) + 1, "wand": None, "routing": None,
                "sources": {mix.sources[s].name: slice_metrics(sums, blocks[source == s],
                                                               np.eye(n_sources)[s])
                            for s in np.unique(source)}}
    if K > 1:
        metrics |= exit_metrics(sum_over_ranks(exit_sums, world_size), fits, cap, stage_bytes(model))
        metrics["wand"]["tokens"] = int(counted.sum())
    return metrics


def slice_metrics(sums, blocks, shares):
    """`summarize` with standard errors, and the alpha sweep, from sums per cell, numpy (sources G, w).

    blocks: of every position that counts, any shape. shares: 1 for each source that counts, 0 for the others.
    """
    weights = np.kron(shares, block_weights(blocks, 2))
    sums = {name: (weights @ value).T for name, value in sums.items()}              # (w, R)
    sweep = np.array([sums["nats_prefix"][-1], *sums["nats_alpha"]])
    names = [f"{alpha:g}" for alpha in (0, *ALPHAS)]
    alphas = ratios(math.log(2) * sums["bytes"][0], alpha_sweep=sweep)
    return summarize(sums, ratios) | {
        key: dict(zip(names, values)) for key, values in alphas.items()}


# --------------------------------------------------------------------------------------------------
# Generated text

def document_prompts(text_slice, n_prompts, length):
    """The first `length` tokens, bos included, of the first documents of the report part that begin in a
    window and are as long there.
    """
    mix = text_slice.mix
    bos = text_slice.tokenizer.bos
    source, _, window = mix.locate(np.arange(text_slice.n_windows))
    prompts = []
    for i in range(text_slice.n_calibration, text_slice.n_windows):
        tokens = mix.window(source[i], window[i])
        for begin in np.flatnonzero(tokens[:mix.T + 2 - length] == bos):
            prompt = tokens[begin:begin + length].tolist()
            if text_slice.in_report[i, begin] and prompt.count(bos) == 1:
                prompts.append(prompt)
    return prompts[:n_prompts]


def stands_alone(word, text):
    """Whether a text holds a word or a number that is no part of another: 2 is neither in 12 nor in -2.5."""
    return re.search(rf"(?<![\w-])(?<!\d[.,]){word}(?!\w|[.,]\d)", text) is not None


def probe(texts):
    """(samples, facts) of the sample-mode probe: continuations of PROBE, graded by words standing alone."""
    samples = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROBE, texts)]
    facts = {fact: stands_alone(fact, texts[number]) for fact, number in FACTS.items()}
    return samples, facts | {"planets": all(stands_alone(planet, texts[4]) for planet in PLANETS)}


def over_prompts(values):
    """Sums of (prompts, w) values in each resample of the prompts: (w, R)."""
    blocks = np.arange(len(values)) % N_BLOCKS
    return (block_weights(blocks, 3)[:, blocks] @ values).T


def acceptance(drafted):
    """Judged drafts, those that were accepted and the first rejected one of each cycle; accepted ones over
    judged ones, and per cycle, with standard errors by prompt.
    """
    accepted, judged, cycles = over_prompts([(text.accepted, text.judged, text.cycles) for text in drafted])
    return {"judged": int(judged[0]), **ratios(judged, acceptance=accepted),
            **ratios(cycles, mean_accepted=accepted)}


def speculation(plain, drafted, n_documents, draft_weights):
    """Self-speculative decoding against plain decoding of the same: (metrics, timings).

    plain, drafted: the `Run` of each prompt, of `n_documents` documents and then of the card's 7 prompts,
    whose acceptance is card_prompts. draft_weights: what stage 0 drafted by, "int8" or the "same".
    """
    metrics = {
        "draft_len": DRAFT_LEN, "draft_weights": draft_weights, "prompts": n_documents,
        **acceptance(drafted[:n_documents]),
        "card_prompts": acceptance(drafted[n_documents:]),
        "identical_to_plain": all(ours.ids[:len(theirs.ids)] == theirs.ids
                                  for ours, theirs in zip(drafted, plain))}
    # of a token
    seconds = [[text.seconds / len(text.ids) for text in of_prompt] for of_prompt in zip(plain, drafted)]
    plain_seconds, drafted_seconds = over_prompts(seconds)
    timings = ratios(drafted_seconds, speedup=plain_seconds)
    take_resamples(timings)
    return metrics, timings


def generate_texts(model, text_slice, n_prompts, fast, progress=lambda *_: None):
    """Greedy texts of documents' beginnings and of the probe's prompts, a row at a time: (metrics.json's
    samples, facts and speculative; timings.json's speculative).

    With several stages and documents, speculative decoding takes turns with plain decoding. In a short
    context a prompt is cut, and its text is as long as there is room.
    """
    K = model.config.n_stage
    context = model.config.sequence_len
    tokenizer = text_slice.tokenizer
    length = min(PROMPT_TOKENS, context // 2)
    documents = document_prompts(text_slice, n_prompts, length) if K > 1 else []
    probes = [tokenizer.encode(prompt)[:context] for prompt in PROBE]
    plans = [Plan(range(K)), Plan(range(K), draft_len=DRAFT_LEN)]
    engines = [Engine(model, plan, fast=fast) for plan in plans[:2 if documents else 1]]
    texts = [[] for _ in engines]
    for engine in engines:
        decode_timed(engine, probes[0], 1)              # compile and capture
    for label, prompts, n_new in (("speculation", documents, NEW_TOKENS), ("probe", probes, PROBE_TOKENS)):
        for number, ids in enumerate(prompts, 1):
            progress(label, number, len(prompts))
            for engine, decoded in zip(engines, texts):
                decoded.append(decode_timed(engine, ids, min(n_new, context + 1 - len(ids))))
    completions = []
    for text in texts[0][len(documents):]:
        end = [*text.ids, tokenizer.bos].index(tokenizer.bos)
        completions.append(tokenizer.decode(text.ids[:end]))
    samples, facts = probe(completions)
    speculative = timings = None
    if documents:
        draft_weights = "int8" if engines[1].drafter else "same"
        speculative, timings = speculation(*texts, len(documents), draft_weights)
    return {"speculative": speculative, "samples": samples, "facts": facts}, timings


# --------------------------------------------------------------------------------------------------
# One checkpoint

def folder_of_record(step):
    """The folder whose config.json a step directory goes by: its run's or, where that has none, its own."""
    return step.parent if (step.parent / "config.json").exists() else step


def open_slice(folder_of_run, config):
    """The `Slice` that `config` asks for, over --data or the data that config.json in a folder names."""
    record = read_record(folder_of_run)
    folder = record["train"]["data"] if config.data is None else config.data
    name = folder or "the embedded sample"
    data = open_data(folder, record["model"]["vocab_size"])
    if data.tokenizer.sha256 != record["tokenizer"]["sha256"]:
        raise ValueError(f"{name} was tokenised with another tokenizer than "
                         f"{folder_of_run}; use --data with its own")
    if config.data is None and data.sha256 != record["phases"][-1]["mix_sha256"]:
        raise ValueError(f"{name} is not the data that {folder_of_run} was "
                         f"trained on, whose held-out text it may not hold; name other data on purpose with "
                         f"--data")
    mix = data.val(record["model"]["sequence_len"])
    split_tokens = config.split_tokens or min(SPLIT_TOKENS, min(mix.first_repeats()) * mix.T)
    n_windows = validation_windows(mix, split_tokens, "--split-tokens")
    n_calibration = config.wand_tokens // mix.T if config.wand_tokens else max(1, n_windows // 8)
    return Slice(mix, n_windows, n_calibration, data.tokenizer, data.sha256)


def settings_of(step, text_slice, config, device, dtype):
    """metrics.json's `settings`: all that its figures depend on."""
    n_prompts = config.speculative_prompts
    if n_prompts is None:
        n_prompts = SPECULATIVE_PROMPTS[device.type]
    return {"split_tokens": text_slice.n_windows * text_slice.mix.T,
            "wand_tokens": text_slice.n_calibration * text_slice.mix.T,
            "seed": VAL_SEED, "data": config.data, "slice_sha256": text_slice.sha256,
            "mix_sha256": text_slice.mix_sha256, "routing_cap": config.routing_cap,
            "dtype": str(dtype).removeprefix("torch."), "samples": config.samples,
            "speculative_prompts": n_prompts,
            "weights_sha256": read_json(step / "manifest.json")["files"]["model.pt"]}


def evaluate_checkpoint(step, text_slice, config, device, dtype, ranks, rows):
    """Put the row (report.py) of one step directory into `rows`; measure it unless it was measured with equal
    settings.

    Rank 0 alone generates text. It writes the step's timings.json, the bounds in its config.json and, when
    all else is there, metrics.json. Raises ValueError on all ranks where the step is damaged, OSError where
    nothing can be written.
    """
    file = step / "metrics.json"
    with ranks.together():
        settings = settings_of(step, text_slice, config, device, dtype)
        old = read_row(step) if file.exists() else {}
    # whether to measure is rank 0's answer, for all
    old = ranks.gather(old)[0]
    if (old.get("format"), old.get("settings")) == (FORMAT, settings):
        rows[step] = old
        return

    with ranks.together():
        model, record, _ = load_checkpoint(step, device, dtype)
    if config.compile:
        model.compile_regions()
    stance = "force_eager" if config.compile is False else "default"
    texts = dict.fromkeys(("speculative", "samples", "facts"))
    speeds = None
    progress = Progress() if ranks.rank == 0 else lambda *_: None
    with attention_backends(device), torch.compiler.set_stance(stance):
        tables = measure(model, text_slice, config.device_batch_size, config.routing_cap, ranks.rank,
                         ranks.world_size, progress)
        if tables["bpb"]["full"] is None:
            raise ValueError("its log-probabilities are not finite: its weights are damaged; take another")
        with ranks.together():
            if config.samples and ranks.rank == 0:
                fast = config.compile is not False and kernels_fit(model)
                with decoding_threads(model):
                    texts, speeds = generate_texts(model, text_slice, settings["speculative_prompts"], fast,
                                                   progress)

    with ranks.together():
        if ranks.rank == 0:
            phases = list(map(phase_of, read_record(folder_of_record(step))["phases"]))
            # "val" is of the run's data, "val_old" of that of earlier phases
            logged = defaultdict(list)
            for entry in read_log(step.parent / "log.jsonl"):
                if entry["step"] == record["step"] and "bpb" in entry:
                    logged[entry["kind"]].append({"mix": entry["mix"] or "the embedded sample",
                                                  "full": entry["bpb"]["full"], "tokens": entry["tokens"]})
            figures = tables | texts
            resamples = take_resamples(figures)
            row = {"format": FORMAT, "settings": settings, "step": record["step"],
                   "phase": phase_position(phases, record["step"]),
                   "train_log_bpb": (logged["val"] or [None])[-1], "train_log_bpb_old": logged["val_old"],
                   **figures, "resamples": resamples}
            timings = {"speculative": speeds}
            # what was measured is shown where it cannot be written
            rows[step] = {**row, "timings": timings}
            write_json(step / "timings.json", timings)
            if tables["wand"]:
                bounds = {BOUNDS_KEY: tables["wand"]["p99_bounds"]}
                write_json(step / "config.json", read_json(step / "config.json") | bounds)
            write_json(file, row)


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
    json: bool = flag(False, "print JSON instead of text: one object per checkpoint, one per trajectory")


def print_report(paths, runs, rows, config):
    """Print what was measured, {step: row}; of one run also write its trajectory, of several the comparison.
    runs: those of the paths that are runs.
    """
    if config.json:
        for row in rows.values():
            print(json.dumps(row | {"resamples": None}))
    if runs and len(paths) == 1:
        write_report(paths[0], rows, config.json)
        return
    text = "\n".join(summary({**row, "name": str(step)}) for step, row in rows.items())
    if runs == paths and len(rows) > 1:
        # runs go by what tells their paths apart
        folders = [step.parent.resolve() for step in rows]
        names = [os.path.relpath(folder, os.path.commonpath(folders)) for folder in folders]
        text = compare([{"name": name, "row": row, "record": read_json(step.parent / "config.json"),
                         "log": read_log(step.parent / "log.jsonl")}
                        for name, (step, row) in zip(names, rows.items())])
        text += "\n\n" + task_table({name: read_tasks(step, "full") for name, step in zip(names, rows)})
    if not config.json:
        print(text)


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
        steps = checkpoint_steps(paths[0]) if len(paths) == 1 else []
        steps = steps or [resolve_checkpoint(path) for path in paths]
    # a run may just have saved a step: rank 0's listing is for all
    steps = ranks.gather(steps)[0]
    with ranks.together():
        slices = {folder: open_slice(folder, config)
                  for folder in dict.fromkeys(map(folder_of_record, steps))}
        if runs == paths and len({(part.tokenizer.sha256, part.sha256) for part in slices.values()}) > 1:
            raise ValueError("these runs cannot be compared: they differ in tokenizer or in the text of the "
                             "slice; take runs of one tokenizer and one context, and give one --data and "
                             "--split-tokens")

    rows = {}
    failures = []
    progress = Progress()
    progress("checkpoints", 0, len(steps))
    for number, step in enumerate(steps, 1):
        try:
            evaluate_checkpoint(step, slices[folder_of_record(step)], config, device, dtype, ranks, rows)
        except (ValueError, OSError) as e:
            failures.append(f"{step}: {e}")
        if ranks.rank == 0:
            progress("checkpoints", number, len(steps))

    try:
        with ranks.together():
            if rows and ranks.rank == 0:
                print_report(paths, runs, rows, config)
    finally:
        # where the report fails too, this is why
        if failures:
            raise SharedError(f"{len(failures)} of {len(steps)} checkpoints could not be measured, or what "
                              f"was measured not written: {'; '.join(failures)}")
    ranks.close()


if __name__ == "__main__":
    run(main)
