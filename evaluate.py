"""
Measure checkpoints: bits per byte and accuracy of every stage, every prefix and the full product, from one pass of the trunk.

    python evaluate.py runs/tiny/step-00300           # one checkpoint
    python evaluate.py runs/tiny                      # every checkpoint of a run, in order of its steps

The slice is the first `--split-tokens` of the validation windows, which are fixed for ever (dataloader.py). Sums are kept in
float64 and divided once: bpb = summed nats / (ln 2 x summed UTF-8 bytes of the targets), never a mean of means. Targets that are
special tokens count no nats, no bytes and no accuracy. Results go to metrics.json inside each checkpoint and, as the model card's
tables, to the terminal. Nothing else is written. Definitions: SPEC 2 and 7 of the model card's system (README).
"""
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataloader import VAL_SEED, open_data, validation_windows
from flags import flag, parse_flags, run
from model import attention_backends, checkpoint_steps, choose_device, combine, load_checkpoint

SPLIT_TOKENS = 1_048_576        # the card's slice
CHUNK_LOGITS = 2 ** 26          # (token, vocabulary) pairs held at once per array: 256 MiB in float32


# ---------------------------------------------------------------------------------------------------------------
# One pass

@torch.no_grad()
def score(model, mix, n_windows, tokenizer, batch_size, rank=0, world_size=1, progress=None):
    """Sum nats and hits of every stage and prefix over the first `n_windows` windows of `mix`, in one pass of the trunk.

    Memory is bounded by `batch_size` windows of activations and CHUNK_LOGITS of log-probabilities. progress: called with (done, of).
    Returns a dict: tokens, bytes (counted targets), and float64 lists nats_single, nats_prefix, hits_single, hits_prefix of length K.
    """
    K, device = model.config.n_stage, model.cos.device
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(device)
    chunk = max(1, CHUNK_LOGITS // model.config.vocab_size)
    sums = torch.zeros(4, K, dtype=torch.float64, device=device)        # nats single, nats prefix, hits single, hits prefix
    n_tokens = n_bytes = 0
    for first in range(rank * batch_size, n_windows, world_size * batch_size):
        idx, targets = (t.to(device) for t in mix.batch(np.arange(first, min(first + batch_size, n_windows))))
        stages = [x.flatten(0, 1) for x in model.boundaries(idx)]       # K x (B T, C)
        targets = targets.flatten()
        counted = (token_bytes[targets] > 0).double()                   # 0 for special tokens
        n_tokens += int(counted.sum())
        n_bytes += int(token_bytes[targets].sum())
        for i in range(0, len(targets), chunk):
            y, weight = targets[i:i + chunk, None], counted[i:i + chunk]        # (n, 1), (n,)
            total = 0.0
            for k in range(K):
                single = model.log_probs(k, stages[k][i:i + chunk])             # (n, V)
                total = total + single
                prefix = combine(total, k + 1)
                for row, log_probs in ((0, single), (1, prefix)):
                    sums[row, k] -= (log_probs.gather(1, y)[:, 0].double() * weight).sum()
                    sums[row + 2, k] += ((log_probs.argmax(dim=-1) == y[:, 0]) * weight).sum()
        if progress:
            progress(min(first + batch_size, n_windows), n_windows)
    if world_size > 1:
        counts = torch.tensor([n_tokens, n_bytes], device=device)
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(counts)
        n_tokens, n_bytes = counts.tolist()
    names = ("nats_single", "nats_prefix", "hits_single", "hits_prefix")
    return {"tokens": n_tokens, "bytes": n_bytes, **dict(zip(names, sums.tolist()))}


def summarize(sums):
    """The metrics of one checkpoint from the sums of `score`: bpb, accuracy, crossover gap, in metrics.json's keys."""
    def bpb(nats):
        return nats / (math.log(2) * sums["bytes"])

    def accuracy_stderr(hits):
        rate = hits / sums["tokens"]
        return math.sqrt(rate * (1 - rate) / sums["tokens"])            # binomial, tokens taken as independent

    full, single = bpb(sums["nats_prefix"][-1]), [bpb(n) for n in sums["nats_single"]]
    return {
        "tokens": sums["tokens"], "bytes": sums["bytes"],
        "bpb": {"full": full, "single": single, "prefix": [bpb(n) for n in sums["nats_prefix"]]},
        "accuracy": {"full": sums["hits_prefix"][-1] / sums["tokens"], "single": [h / sums["tokens"] for h in sums["hits_single"]],
                     "full_stderr": accuracy_stderr(sums["hits_prefix"][-1]),
                     "single_stderr": [accuracy_stderr(h) for h in sums["hits_single"]]},
        "crossover_gap": full - single[-1],
    }


def slice_text(mix, n_windows, tokenizer):
    """The slice's target text as bytes, in the order of the corpus, which is the kindest to a compressor, and its sha256."""
    source, _, window = mix.locate(np.arange(n_windows))
    order = np.lexsort((window, source))
    text = b"".join(tokenizer.decode_bytes(mix.sources[source[i]].window(int(window[i]), mix.T)[1:].tolist()) for i in order)
    return text, hashlib.sha256(text).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints and tables

def evaluate_checkpoint(path, config, progress):
    """Measure one step directory; write its metrics.json; return the metrics."""
    device, dtype = choose_device(config.device, config.dtype)
    model, record, weights_sha256 = load_checkpoint(path, device, dtype)
    data = open_data(config.data if config.data is not None else record["train"]["data"], record["model"]["vocab_size"])
    if data.tokenizer.sha256 != record["tokenizer"]["sha256"]:
        raise ValueError(f"{data.path or 'the embedded sample'} was tokenised with another tokenizer than {path}; use --data with its own")
    mix = data.val(model.config.sequence_len)
    split_tokens = config.split_tokens or (mix.n_in_first_epoch() * mix.T if not data.path else SPLIT_TOKENS)
    n_windows = validation_windows(mix, split_tokens)
    with attention_backends(device):
        sums = score(model, mix, n_windows, data.tokenizer, config.device_batch_size, progress=progress)
    if not math.isfinite(sums["nats_prefix"][-1]):
        raise ValueError(f"the log-probabilities of {path} are not finite: its weights are damaged; use another step")
    metrics = {"format": 1, "settings": {"split_tokens": n_windows * mix.T, "seed": VAL_SEED, "weights_sha256": weights_sha256,
                                         "slice_sha256": slice_text(mix, n_windows, data.tokenizer)[1]},
               "step": record["step"], **summarize(sums), "train_log_bpb": train_log_bpb(path.parent, record["step"])}
    write_json(path / "metrics.json", metrics)
    return metrics


def read_log(path):
    """The entries of a run's log.jsonl, dicts with `kind` and `step`; lines that are not (one half-written by a killed run) are left out."""
    entries = []
    for line in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "kind" in entry:
            entries.append(entry)
    return entries


def train_log_bpb(run, step):
    """Full bpb that the run's own log has at `step`, with its token count; None where it has none."""
    found = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "val" and entry["step"] == step]
    return {"full": found[-1]["bpb"]["full"], "tokens": found[-1]["tokens"]} if found else None


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def tables(rows):
    """The card's tables 2 and 3 as Markdown; rows: metrics of checkpoints with the same number of stages."""
    K = len(rows[0]["bpb"]["single"])
    stages = [f"s{k}" for k in range(K)]
    bpb = [[f"`step-{m['step']:05d}`", f"{m['step']:,}"] + [f"{v:.6f}" for v in
           [m["bpb"]["full"], *m["bpb"]["single"], *m["bpb"]["prefix"][:-1]]] for m in rows]
    accuracy = [[f"`step-{m['step']:05d}`", f"{m['step']:,}"] + [f"{v:.4f}" for v in
                [*m["accuracy"]["single"], m["accuracy"]["full"]]] for m in rows]
    return "\n\n".join([
        "### Per-stage BPB\n\n" + markdown(["Branch", "Step", f"full K={K}", *(f"single {s}" for s in stages),
                                            *(f"prefix K'={k}" for k in range(1, K))], bpb),
        "### Per-stage standalone target accuracy\n\n" + markdown(["Branch", "Step", *stages, "full"], accuracy)])


def markdown(header, rows):
    """A Markdown table, its first column left-aligned and the others right-aligned."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


# ---------------------------------------------------------------------------------------------------------------
# Command line

@dataclass(frozen=True)
class EvalConfig:
    data: str = flag(None, "folder of token shards with validation shards (default: the checkpoint's own)")
    split_tokens: int = flag(None, f"tokens of the slice (default: {SPLIT_TOKENS:,}, or all of the embedded sample's)")
    device_batch_size: int = flag(8, "sequences in a forward pass")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float64"))
    json: bool = flag(False, "print one JSON object per checkpoint instead of tables")

    def __post_init__(self):
        if self.device_batch_size < 1:
            raise ValueError(f"--device-batch-size {self.device_batch_size} must be at least 1")
        if self.split_tokens is not None and self.split_tokens < 1:
            raise ValueError(f"--split-tokens {self.split_tokens} must be at least 1")


def main(argv=None):
    given = parse_flags(EvalConfig, __doc__, argv, positionals=[("checkpoints", "+", "step-XXXXX directories, or runs: all their steps")])
    paths = []
    for path in map(Path, given.pop("checkpoints")):
        steps = checkpoint_steps(path)
        if not steps and not path.name.startswith("step-"):
            raise FileNotFoundError(f"{path} holds no step-XXXXX checkpoint; train one with train.py --out {path}")
        paths += steps or [path]
    config = EvalConfig(**given)
    rows, start = [], time.time()
    for number, path in enumerate(paths):
        def progress(done, of):
            share = (number + done / of) / len(paths)
            if sys.stderr.isatty():
                print(f"\r{path.name} ({number + 1}/{len(paths)}) {done}/{of} windows eta:{(time.time() - start) * (1 / share - 1):.0f}s  ",
                      end="", file=sys.stderr)
        rows.append(evaluate_checkpoint(path, config, progress))
        if sys.stderr.isatty():
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
        if config.json:
            print(json.dumps(rows[-1]), flush=True)
    for K in sorted({len(row["bpb"]["single"]) for row in rows}) if not config.json else ():
        print(tables([row for row in rows if len(row["bpb"]["single"]) == K]))


if __name__ == "__main__":
    run(main)
