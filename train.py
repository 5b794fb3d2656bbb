"""
Train a per-stage Product-of-Experts language model, on one process or on any number of ranks.

    python train.py                                              # embedded sample, tiny preset, CPU, minutes
    python train.py --preset d12 --data DATA --out runs/d12
    torchrun --standalone --nproc_per_node 8 train.py --preset 3b --data DATA --out runs/3b
    torchrun ... train.py --resume runs/3b                       # after an interruption, on any number of ranks
    torchrun ... train.py --continue-from runs/3b/step-83923 --num-steps 50800 --peak-lrm 0.5 --warmup-steps 1000 \\
        --warmdown-ratio 0.55 --final-lrm 0.0 --out runs/3b-continual    # a new phase: optimizer restored, rate re-warmed
    python train.py --preset 3b --dry-run                        # sizes, FLOPs, phase table, memory; nothing is trained

A step's batch is cut into micro-batches that are dealt to the ranks, so the batch is the same on any number of them. Each micro-batch
runs one stage at a time, forward and backward (model.py); in the last one, a stage's gradients travel to their owners while the next
stage runs; parameters are updated after the last stage (muon.py).

RUN/log.jsonl holds every step and every validation; RUN/step-XXXXX/ are the checkpoints: config.json, model.pt, optim/rank-XXXXX.pt,
state.json, the tokenizer, and manifest.json with the sha256 of each. A checkpoint appears whole or not at all. RUN must be on a file
system that all ranks share.

Training time excludes validation and saving. Ctrl-C or SIGTERM saves at the next step boundary and exits; a second Ctrl-C stops at once
(under torchrun it is ignored). torchrun's own restarts resume. Order of precedence: defaults < preset < checkpoint < flags.
"""
import fcntl
import gzip
import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# GNU OpenMP's threads spin at barriers, for a thread that may not be running. Spin briefly, then sleep: a step of tiny on two cores took
# 0.26 to 0.34 s with 1,000 turns or 30,000, and beside one busy program 0.49 s against 1.37 s. It must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch.nn.utils import get_total_norm

from dataloader import Loader, open_data, validation_windows, write_whole
from evaluate import read_log, score, slice_text, summarize, write_json
from flags import Ranks, check_types, discard_stdout, flag, parse_flags, run, spelled
from model import (LOSS_CHUNK_LOGITS, OBJECTIVES, PRESETS, ModelConfig, PoE, attention_backends, attention_kernel, checkpoint_steps,
                   choose_device, count_parameters, flops_per_token, load_tensors, parameter_group, read_json, read_object, read_record,
                   sha256_of, verify_checkpoint)
from muon import MuonAdamW, assign_owners
from schedule import Phase, learning_rate, muon_momentum, phase_of, position, weight_decay_factor

COMPRESSORS_UP_TO = 8_000_000       # bytes of validation text; xz -9 takes about a second a megabyte
CHECK_RANKS_EVERY = 100             # steps between checks that all ranks hold the same parameters
SAMPLE_PROMPTS = ("The capital of France is", "He looked at the sea and", "def ")


# ---------------------------------------------------------------------------------------------------------------
# Config

@dataclass(frozen=True)
class Recipe:
    """How a preset is optimised. Rates are effective peak values at lrm = 1; nothing rescales them."""
    total_batch_tokens: int
    device_batch_size: int
    num_steps: int
    warmup_steps: int
    warmdown_ratio: float
    final_lrm: float
    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    weight_decay: float
    eval_every: int
    eval_tokens: int
    save_every: int


# The card gives 3b's batch, steps, schedule, first three rates, and save and eval sizes. d12's rates are nanochat's at its reference
# width, but for scalar_lr, where 0.5 was worse than 0.05 to 0.1 here; weight decay follows nanochat's rule, 0.28 sqrt(batch / 524,288)
# 1.3 G / tokens, rounded; d12 and 1b train 20 tokens per parameter of trunk + head; tiny was tuned for two minutes on two CPU cores.
#                   batch tokens  seqs   steps  warmup  down final | matrix embed unembed scalar  decay | eval every, tokens  save
RECIPES = {
    "tiny": Recipe(        2_048,    8,    400,     10, 0.65, 0.05,  0.030, 0.30,  0.008,  0.05, 0.000,   -1,     36_864,   200),
    "d12":  Recipe(      524_288,   32,  4_600,    100, 0.65, 0.05,  0.020, 0.30,  0.008,  0.10, 0.150,  250, 10_485_760,   500),
    "1b":   Recipe(      786_432,    8, 25_600,    500, 0.65, 0.05,  0.015, 0.30,  0.008,  0.10, 0.020,  500, 41_943_040, 2_000),
    "3b":   Recipe(      786_432,    8, 83_923,  1_000, 0.65, 0.05,  0.015, 0.30,  0.008,  0.10, 0.007,  500, 41_943_040, 2_000),
}


@dataclass(frozen=True)
class TrainConfig:
    preset: str = flag("tiny", f"model and recipe to start from: {', '.join(PRESETS)}", choices=tuple(PRESETS))
    data: str = flag("", "folder of token shards (data/prepare.py); empty is the embedded sample")
    out: str = flag(None, "run directory (default: runs/<preset>)")
    resume: str = flag("", "run directory to go on with, from its newest whole checkpoint")
    continue_from: str = flag("", "checkpoint (RUN/step-XXXXX) to begin a new phase from, in a new --out")
    reset_optimizer: bool = flag(False, "with --continue-from: start from the weights alone, with a fresh optimizer")
    seed: int = flag(0, "of the initial weights and of the order of the data")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one; under torchrun each rank takes its own)")
    dtype: str = flag(None, "compute dtype; master weights are float32 (default: bfloat16 on cuda, else float32)",
                      choices=("float32", "bfloat16", "float64"))
    compile: bool = flag(None, "compile the blocks, the loss and the optimizer's elementwise work (default: on cuda only)")
    dry_run: bool = flag(False, "print sizes, FLOPs, schedule and memory, and exit")
    # model
    objective: str = flag("poe", "poe: local losses; joint: the same losses without the detach; bp: one loss at the top", choices=OBJECTIVES)
    n_layer: int = flag(None, "blocks (default: preset)")
    n_embd: int = flag(None, "channels of the residual stream (default: preset)")
    n_head: int = flag(None, "query heads (default: preset)")
    n_kv_head: int = flag(None, "key and value heads, a divisor of n_head (default: preset)")
    mlp_hidden: int = flag(None, "channels inside the MLP (default: preset)")
    stage_layers: str = flag(None, "layers per stage, such as 16,6,5,5; they sum to n_layer (default: preset)")
    sequence_len: int = flag(None, "context, tokens (default: preset)")
    vocab_size: int = flag(None, "token ids, bos included; with --data those of its shards, else up to 32768: the first merges of the "
                                 "embedded tokenizer (default: preset)")
    # optimizer
    total_batch_tokens: int = flag(None, "tokens per optimizer step, over all micro-batches and ranks (default: preset)")
    device_batch_size: int = flag(None, "sequences per micro-batch of a rank; lower it when memory runs out (default: preset)")
    matrix_lr: float = flag(None, "peak rate of Muon, the blocks' matrices (default: preset)")
    embedding_lr: float = flag(None, "peak rate of the token embedding; value embeddings take half (default: preset)")
    unembedding_lr: float = flag(None, "peak rate of the heads (default: preset)")
    scalar_lr: float = flag(None, "peak rate of x0_lambda; resid_lambda takes a hundredth, gates a fiftieth (default: preset)")
    weight_decay: float = flag(None, "of Muon's matrices, decoupled, times the rate; falls to 0 over the phase (default: preset)")
    # schedule
    num_steps: int = flag(None, "optimizer steps of the phase (default: preset)")
    warmup_steps: int = flag(None, "linear warmup, steps (default: preset)")
    peak_lrm: float = flag(1.0, "learning-rate multiplier between warmup and warmdown")
    warmdown_ratio: float = flag(None, "share of the phase in linear warmdown, 0 to 1 (default: preset)")
    final_lrm: float = flag(None, "learning-rate multiplier at the end of the phase (default: preset)")
    # evaluation and output
    eval_every: int = flag(None, "steps between validations beside those at saves (-1 or 0 = off; default: preset)")
    eval_tokens: int = flag(None, "tokens of a validation (default: preset)")
    save_every: int = flag(None, "steps between checkpoints, beside the last (-1 or 0 = off; default: preset)")
    keep_optim: int = flag(2, "newest checkpoints that keep their optimizer state, beside those at the ends of phases (-1 = all)")

    def __post_init__(self):
        sizes = "total_batch_tokens", "device_batch_size", "num_steps", "eval_tokens", "sequence_len"
        rates = "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"
        for names, low, end, must in ((sizes, 1, 2 ** 62, "be at least 1, and below 2^62"),
                                      (("seed",), 0, 2 ** 63, "not be negative, and below 2^63"),
                                      (rates, 0, 1000, "not be negative, and below 1000")):
            for name in names:
                if not low <= getattr(self, name) < end:
                    raise ValueError(f"{spelled(name)} {getattr(self, name)} must {must}")
        if self.keep_optim < 1 and self.keep_optim != -1:
            raise ValueError(f"--keep-optim {self.keep_optim} must be at least 1, or -1 to keep all")
        if self.reset_optimizer and not self.continue_from:
            raise ValueError("--reset-optimizer needs --continue-from, the checkpoint whose weights to start from")
        if self.total_batch_tokens % self.sequence_len:
            raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} is not a multiple of --sequence-len {self.sequence_len}")
        if self.batch > 10 ** 7:
            raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} / --sequence-len {self.sequence_len} are {self.batch} sequences "
                             f"a step; 10,000,000 are the most")
        if self.batch % self.device_batch_size:
            raise ValueError(f"--device-batch-size {self.device_batch_size} does not divide a step's {self.batch} sequences "
                             f"(--total-batch-tokens {self.total_batch_tokens} / --sequence-len {self.sequence_len})")

    @property
    def batch(self):
        return self.total_batch_tokens // self.sequence_len      # sequences per optimizer step

    @property
    def n_micro(self):
        return self.batch // self.device_batch_size              # micro-batches per optimizer step, over all ranks

    def model_config(self):
        try:
            stages = tuple(int(n) for n in self.stage_layers.split(","))
        except (ValueError, AttributeError):
            raise ValueError(f"--stage-layers {self.stage_layers!r} is not a list of layer counts such as 16,6,5,5") from None
        return ModelConfig(stage_layers=stages, **{f.name: getattr(self, f.name) for f in fields(ModelConfig) if f.name != "stage_layers"})


SHAPE_FLAGS = ("preset", "seed", "objective", "n_layer", "n_embd", "n_head", "n_kv_head", "mlp_hidden", "stage_layers", "sequence_len",
               "vocab_size")
SCHEDULE_FLAGS = tuple(f.name for f in fields(Phase))[1:]        # without its anchor


def resolve_config(given, restarted=False):
    """Lay the given flags over the preset, or over what a run or checkpoint recorded. Raises ValueError or FileNotFoundError.

    Returns (TrainConfig, phase table): rows of config.json's "phases", of which the last, the one to train, is filled in by `phase_row`.
    """
    if given.get("out") == "":
        raise ValueError("--out is empty; name a folder for the run")
    resume, parent = given.get("resume"), given.get("continue_from")
    if resume == "":
        raise ValueError("--resume is empty; name a run, or leave it out to train anew")
    if parent == "":
        raise ValueError("--continue-from is empty; name a checkpoint, or leave it out to train anew")
    if resume and parent:
        raise ValueError("--resume goes on with a run and --continue-from opens a new one: give one of them")
    if resume:
        out = Path(resume)
        if out.is_file():
            raise ValueError(f"--resume {out} is a file; give a run, which is a folder")
        if (out / "manifest.json").exists():
            raise ValueError(f"--resume {out} is a checkpoint; give the run that it is in: --resume {out.resolve().parent}")
        try:
            record = read_json(out / "config.json")
            recorded, phases = {**record["train"]}, record["phases"]
        except FileNotFoundError:
            raise FileNotFoundError(f"--resume {out}: no run there (no config.json); start one with --out {out}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--resume {out}: config.json holds no run ({e}); restore it from a copy, such as a checkpoint's config.json") from None
        refuse(given, (*SHAPE_FLAGS, "total_batch_tokens", "reset_optimizer"),
               f"--resume: the run in {out} has its own; leave it out or start another --out")
        if Path(given.get("out", out)).resolve() != out.resolve():
            raise ValueError(f"--out {given['out']} and --resume {out} name two runs; leave --out out")
        return recorded_config(out, {**recorded, **given, "resume": str(resume), "out": str(out)}), check_phases(out, phases)
    if parent:
        parent = Path(parent)
        if not (parent / "manifest.json").exists():
            steps = checkpoint_steps(parent)
            raise FileNotFoundError(f"--continue-from {parent} " + (f"is a run: name one of its checkpoints, such as {steps[-1]}" if steps else
                                    "is not a checkpoint: give a RUN/step-XXXXX"))
        refuse(given, SHAPE_FLAGS, f"--continue-from: {parent} has its own; leave it out or train anew")
        if "out" not in given:
            raise ValueError(f"--continue-from {parent} needs --out, a folder for the new run")
        record, state = read_record(parent), read_state(parent)
        config = recorded_config(parent, {**record["train"], "reset_optimizer": False, **given, "resume": ""})
        phases = check_phases(parent, record.get("phases")) + [{"anchor_step": state["step"], "anchor_sample": state["sample"]}]
    else:
        preset = given.get("preset", "tiny")
        shape = asdict(PRESETS[preset])
        shape["stage_layers"] = ",".join(map(str, shape["stage_layers"]))
        if given.get("objective") == "bp":
            shape["stage_layers"] = str(given.get("n_layer", shape["n_layer"]))
        del shape["objective"]
        config = TrainConfig(**{**shape, **asdict(RECIPES[preset]), "out": f"runs/{preset}", **given})
        phases = [{"anchor_step": 0, "anchor_sample": 0}]
    recorded = read_object(Path(config.out) / "config.json").get("train") or {}
    if restarted and {**recorded, "out": ""} == {**asdict(config), "resume": "", "out": ""}:      # torchrun started the same command again
        return resolve_config({"resume": config.out})
    holds_run = any((Path(config.out) / name).exists() for name in ("config.json", "log.jsonl")) or checkpoint_steps(config.out)
    if holds_run and not config.dry_run:
        raise ValueError(f"{config.out} already holds a run: go on with --resume {config.out}, or choose another --out")
    return config, phases


def refuse(given, names, why):
    """Raise ValueError where one of these flags is given."""
    if found := [spelled(name) for name in names if name in given]:
        raise ValueError(f"{', '.join(found)} cannot be given with {why}")


def recorded_config(path, values):
    try:
        check_types(TrainConfig, values)
        if missing := [name for name in SCHEDULE_FLAGS if values.get(name) is None]:
            raise ValueError(f"{missing[0]} is missing")
        return TrainConfig(**values)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path / 'config.json'} and the flags do not make a run ({e}); mend the value, or start another --out") from None


# ---------------------------------------------------------------------------------------------------------------
# Phases: the rows of a run's phase table

def phase_row(config, row, data):
    """Fill in the last row of the phase table: where it starts, what it reads and how its rate moves."""
    of_config = (*SCHEDULE_FLAGS, "reset_optimizer", "matrix_lr", "embedding_lr", "unembedding_lr")
    return {"anchor_step": row["anchor_step"], "anchor_sample": row["anchor_sample"], "batch": config.batch, "mix": config.data,
            "mix_sha256": data and data.sha256, **{name: getattr(config, name) for name in of_config}}


def check_phases(path, rows):
    """Return `rows`, the phase table of config.json in `path`, or raise ValueError where it is not one."""
    try:
        for row in rows:
            phase_of(row), row["mix"] + "", hash(row["mix_sha256"])
            whole = "anchor_step", "anchor_sample", "num_steps", "warmup_steps"
            if any(type(row[name]) is not int or not 0 <= row[name] < 2 ** 62 for name in whole):
                raise ValueError("anchors and steps are whole numbers")
        if rows[0]["anchor_step"] or rows[0]["anchor_sample"]:
            raise ValueError("the first phase begins at step 0 and sample 0")
        if any(not before["anchor_step"] <= after["anchor_step"] <= before["anchor_step"] + before["num_steps"]
               or before["anchor_sample"] > after["anchor_sample"] for before, after in zip(rows, rows[1:])):
            raise ValueError("each phase begins in the one before it or at its end, in steps and in samples")
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise ValueError(f"the phase table of {path / 'config.json'} is not readable ({e!r}); use another checkpoint") from None
    return rows


def samples_of_earlier_phases(rows):
    """Samples that the phases before the last took from the last one's mix: its stream goes on there. Another mix begins its own."""
    return sum(after["anchor_sample"] - row["anchor_sample"] for row, after in zip(rows, rows[1:])
               if row.get("mix_sha256") == rows[-1]["mix_sha256"])


def dense_step(rows, step):
    """Whether a continued phase is validated here for its shock to be seen: at its anchor and 1, 2, 4, ... 1,024 steps after it."""
    rel = step - rows[-1]["anchor_step"]
    return len(rows) > 1 and 0 <= rel <= 1024 and rel & (rel - 1) == 0


# ---------------------------------------------------------------------------------------------------------------
# Setup

def optimizer_groups(model, config):
    """Every parameter's optimizer and peak rate. AdamW's betas, eps and decay are nanochat's values for the same kinds."""
    params = {}
    for name, p in model.named_parameters():
        kind = parameter_group(name)
        params.setdefault(name.split(".")[-1] if kind == "scalars" else kind, {})[name] = p
    adamw = dict(kind="adamw", eps=1e-10)
    groups = [
        dict(kind="muon", params=params["matrices"], lr=config.matrix_lr, weight_decay=config.weight_decay, momentum=0.95),
        dict(adamw, params=params["heads"], lr=config.unembedding_lr, betas=(0.8, 0.96), weight_decay=0.01),
        dict(adamw, params=params["wte"], lr=config.embedding_lr, betas=(0.8, 0.995), weight_decay=0.001),
        dict(adamw, params=params["value_embeds"], lr=config.embedding_lr / 2, betas=(0.8, 0.995), weight_decay=0.01),
        dict(adamw, params=params["gates"], lr=config.scalar_lr / 50, betas=(0.8, 0.95), weight_decay=0.0),
        dict(adamw, params=params["resid_lambda"], lr=config.scalar_lr / 100, betas=(0.8, 0.95), weight_decay=0.0),
        dict(adamw, params=params["x0_lambda"], lr=config.scalar_lr, betas=(0.96, 0.95), weight_decay=0.0),
    ]
    for group in groups:
        group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
    grouped = [name for group in groups for name in group["params"]]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters()), "the groups must partition the parameters"
    return groups


def memory_estimate(model_config, config, world_size):
    """Estimated bytes per rank in training, by kind; optimizer_state is that of the rank with most, casts are bfloat16 (`PoE.cast_weights`)."""
    params, tokens = count_parameters(model_config), config.device_batch_size * config.sequence_len
    with torch.device("meta"):
        groups, state = optimizer_groups(PoE(model_config), config), [0] * world_size
    owner = assign_owners(groups, world_size)
    for group in groups:
        for name, p in group["params"].items():
            state[owner[name]] += p.numel() * (4 if group["kind"] == "muon" else 8)
    layers = max(model_config.stage_layers) if model_config.objective == "poe" else model_config.n_layer
    kv_dim = model_config.n_kv_head * model_config.head_dim
    # saved for backward by a compiled block: 2 MLP-wide, 6 stream-wide and 6 KV-wide tensors a token (d12 on an H100: 16.7 GiB
    # estimated in all, 16.9 measured)
    activations = 2 * layers * tokens * (2 * model_config.mlp_hidden + 6 * model_config.n_embd + 6 * kv_dim)
    head, chunk = model_config.vocab_size * model_config.n_embd, min(tokens, LOSS_CHUNK_LOGITS["cuda"] // model_config.vocab_size)
    weights = 4 * sum(params.values())
    return {"parameters": weights, "casts": 2 * (params["matrices"] + model_config.n_stage * head), "gradients": weights,
            "optimizer_state": max(state), "activations": activations, "loss": 6 * chunk * model_config.vocab_size + 4 * head}


def dry_run(config, rows, world_size):
    """Print what a run would be; the last line is a JSON object."""
    model_config, rows = config.model_config(), rows[:-1] + [phase_row(config, rows[-1], None)]
    phases = [phase_of(row) for row in rows]
    with torch.device("meta"):
        model = PoE(model_config)
    print("parameter shapes (layers 0 and last):")
    for name, p in model.named_parameters():
        if not name.startswith("blocks.") or name.split(".")[1] in ("0", str(model_config.n_layer - 1)):
            stage = model.stage_of(name)
            print(f"  {name:<36}{str(tuple(p.shape)):<18}{parameter_group(name):<14}stage {'all' if stage is None else stage}")
    params = count_parameters(model_config)
    print("parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in params.items()) + f", total {sum(params.values()):,}")
    flops = flops_per_token(model_config)
    print(f"FLOPs per token: {flops / 1e9:.2f} G (forward + backward, causal attention not halved)")
    tokens = config.num_steps * config.total_batch_tokens
    print(f"steps: {config.num_steps:,} x {config.total_batch_tokens:,} tokens = {tokens:,} tokens, "
          f"{config.n_micro} micro-batches of {config.device_batch_size} x {model_config.sequence_len} a step, "
          f"on {world_size} rank{'s' * (world_size > 1)}")
    print("phase anchor  steps warmup  peak warmdown  final")
    for number, phase in enumerate(phases, 1):
        print(f"{number:>5} {phase.anchor:>6} {phase.num_steps:>6} {phase.warmup_steps:>6} {phase.peak_lrm:>5} {phase.warmdown_steps:>8} "
              f"{phase.final_lrm:>6}")
    memory = memory_estimate(model_config, config, world_size)
    print(f"estimated memory per rank of {world_size}: " + ", ".join(f"{kind} {n / 2**30:.1f}" for kind, n in memory.items())
          + f", total {sum(memory.values()) / 2**30:.1f} GiB")
    print(json.dumps({"preset": config.preset, "model": asdict(model_config), "params": params, "params_total": sum(params.values()),
                      "flops_per_token": flops, "num_steps": config.num_steps, "total_batch_tokens": config.total_batch_tokens, "tokens": tokens,
                      "phases": rows, "memory_per_rank_bytes": memory, "memory_per_rank_bytes_total": sum(memory.values()),
                      "world_size": world_size}))


def validation_slices(data, rows, config, say):
    """What to validate on: [(path, mix, windows)], the present data first, then that of earlier phases where it was other data."""
    slices, seen = [(data.path, data.val(config.sequence_len))], {data.sha256}
    for row in reversed(rows[:-1]):
        if row["mix_sha256"] not in seen:
            seen.add(row["mix_sha256"])
            try:
                earlier = open_data(row["mix"], config.vocab_size)
                if earlier.sha256 != row["mix_sha256"]:
                    raise ValueError(f"{row['mix'] or 'the embedded sample'} is not the data that it was")
                slices.append((row["mix"], earlier.val(config.sequence_len)))
            except (OSError, ValueError) as e:
                say(f"the validation slice of the earlier data is left out: {e}")
    return [(path, mix, validation_windows(mix, config.eval_tokens, "--eval-tokens")) for path, mix in slices]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: writing and resuming (reading weights alone is in model.py)

def save_checkpoint(out, step, ranks, model, optimizer, record, state, tokenizer):
    """Save into a temporary folder, then rename: RUN/step-XXXXX appears whole or not at all. Returns its path.

    Each rank writes the optimizer state that it owns, rank 0 the rest. Raises OSError or ValueError, on a full disk for one, and then
    leaves everything before as it was.
    """
    final, temporary = out / f"step-{step:05d}", out / f".tmp-step-{step:05d}"
    try:
        with ranks.together():
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()                           # not its parents: a run whose folder is gone shall not go on in a part of it
                (temporary / "optim").mkdir()
        with ranks.together():
            digests = write_files(temporary, step, ranks, model, optimizer, record, state, tokenizer)
    except (OSError, ValueError) as e:                      # on rank 0
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be written ({e}); the checkpoints before it are whole: free disk space, then --resume {out}") from None
    digests = ranks.gather(digests)
    with ranks.together():
        if ranks.rank == 0:
            write_manifest(temporary, {name: sha256 for each in digests for name, sha256 in each.items()})
            sync(temporary / "optim")
            shutil.rmtree(final, ignore_errors=True)        # there only where a resume found it damaged and trained that step again
            os.rename(temporary, final)
            sync(out)
    return final


def write_files(folder, step, ranks, model, optimizer, record, state, tokenizer):
    """Write this rank's files of a checkpoint and sync them to disk; return {file: sha256}. Raises OSError."""
    written = [f"optim/rank-{ranks.rank:05d}.pt"]
    try:
        torch.save(optimizer.state_dict(), folder / written[0])
        if ranks.rank == 0:
            torch.save(model.state_dict(), folder / "model.pt")
            texts = {"config.json": json.dumps({**record, "step": step}, indent=1).encode(), "state.json": json.dumps(state).encode(),
                     **tokenizer.files()}
            for name, content in texts.items():
                (folder / name).write_bytes(content)
            written += ["model.pt", *texts]
        for name in written:
            sync(folder / name)
        return {name: sha256_of(folder / name) for name in written}
    except RuntimeError as e:                               # what torch.save raises when the disk is full
        raise OSError(f"no space is left, by what torch.save says: {str(e).splitlines()[0]}") from None


def write_manifest(path, files):
    """Write manifest.json of a checkpoint, {file: sha256}, whole or not at all."""
    write_whole(path / "manifest.json", json.dumps({"format": 1, "files": dict(sorted(files.items()))}, indent=1).encode())
    sync(path)


def drop_optimizer_state(out, step, keep, phase_ends):
    """Delete the optimizer state of the checkpoints up to `step` but the newest `keep` and those at `phase_ends`; their manifests say so first."""
    paths = [path for path in checkpoint_steps(out) if int(path.name[5:]) <= step]          # those beyond were skipped as damaged
    for path in paths[:-keep] if keep > 0 else ():
        if int(path.name[5:]) not in phase_ends and (path / "optim").exists():
            files = read_object(path / "manifest.json").get("files")
            if not isinstance(files, dict):
                continue                                    # damaged: left as it is, for its owner to look at
            write_manifest(path, {name: sha256 for name, sha256 in files.items() if not name.startswith("optim/")})
            shutil.rmtree(path / "optim")


def place_seed(parent, files, out, step):
    """Put the files of a checkpoint into the new run `out` as its first: hard links where the file system has them, else copies."""
    final, temporary = out / f"step-{step:05d}", out / f".tmp-step-{step:05d}"
    for name in [*files, "manifest.json"]:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(os.path.realpath(parent / name), temporary / name)      # not a symbolic link itself, as caches have them
        except OSError:                                     # another file system
            shutil.copyfile(parent / name, temporary / name)
            sync(temporary / name)
    for folder in {(temporary / name).parent for name in files}:
        sync(folder)
    os.rename(temporary, final)
    sync(out)


def lock(out):
    """Hold RUN/.lock until this process ends, however it ends. Raises ValueError where another process holds it."""
    file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training into {out}; wait for it, or choose another --out") from None
    return file


def open_folder(out, config, record):
    """Rank 0's: make and lock the run's folder and clear what a killed save left; where it continues another run, put its seed there first.

    Returns what holds the lock. Raises ValueError or OSError.
    """
    parent = Path(config.continue_from)
    if config.continue_from and not checkpoint_steps(out):
        if read_record(parent)["tokenizer"]["sha256"] != record["tokenizer"]["sha256"]:
            raise ValueError(f"{config.data or 'the embedded sample'} was tokenised with another tokenizer than {parent} was trained with")
        seed_files = verify_checkpoint(parent)
        if "optim/rank-00000.pt" not in seed_files and not config.reset_optimizer:
            raise ValueError(f"{parent} holds no optimizer state (see --keep-optim): choose another checkpoint, or --reset-optimizer")
    try:
        out.mkdir(parents=True, exist_ok=True)
        locked = lock(out)
    except OSError as e:
        raise ValueError(f"--out {out} is no folder that can be written to ({e}); choose another") from None
    for leftover in out.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    if config.continue_from and not checkpoint_steps(out):
        write_json(out / "config.json", record)                             # first: a run that is killed here places its seed on --resume
        place_seed(parent, seed_files, out, record["phases"][-1]["anchor_step"])
    return locked


def sync(path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_state(path):
    """state.json of a checkpoint: step, sample (the global sample cursor), train_time. Raises ValueError where it is not one."""
    try:
        state = read_json(path / "state.json")
        if any(type(state[key]) is not int or not 0 <= state[key] < 2 ** 62 for key in ("step", "sample")) or not 0 <= state["train_time"] < math.inf:
            raise ValueError("step and sample are whole numbers, train_time is seconds")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path / 'state.json'} is not a run's state ({e!r}); use another step") from None
    return state


def restore(path, model, optimizer, with_optimizer):
    """Load a checkpoint's weights and, of its optimizer state, what this rank owns (from any number of ranks' files, mapped, not read whole)."""
    weights = load_tensors(path / "model.pt")
    model.check_weights(weights)
    model.load_state_dict(weights)
    if not with_optimizer:
        return
    files, optimizer_state = [path / name for name in read_json(path / "manifest.json")["files"] if name.startswith("optim/")], {}
    if not files:
        raise ValueError(f"{path} holds no optimizer state (see --keep-optim); use another step, or --continue-from it with --reset-optimizer")
    for file in files:
        optimizer_state.update(load_tensors(file))
    optimizer.load_state_dict(optimizer_state)


def restore_newest(out, ranks, model, optimizer, with_optimizer):
    """Restore the newest checkpoint of a run that is whole, and say which are skipped and why. Returns its path, or None before the first save.

    with_optimizer: a function of the step. The ranks share the work of checking sha256 sums.
    """
    paths = ranks.gather(checkpoint_steps(out))[0]          # a shared file system may show them late elsewhere
    for path in reversed(paths):
        for attempt in (lambda: verify_checkpoint(path, share=(ranks.rank, ranks.world_size)),
                        lambda: restore(path, model, optimizer, with_optimizer(read_state(path)["step"]))):
            error = None
            try:
                attempt()
            except (OSError, ValueError, AttributeError, TypeError) as e:
                error = str(e)
            errors = [message for message in ranks.gather(error) if message]
            if errors:
                break
        if not errors:
            return path
        if ranks.rank == 0:
            print(f"skipping {path}: {errors[0]}")
    with ranks.alike():
        if paths:
            raise ValueError(f"no checkpoint in {out} is whole: restore one from a copy, or start another --out")


@torch.no_grad()
def check_ranks(ranks, model, step):
    """Raise ValueError unless all ranks hold the same parameters, by the sum of their bits (exact, in any order of summation)."""
    if ranks.world_size == 1:
        return
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    gathered = ranks.gather(torch.stack([p.view(bits[p.dtype]).sum(dtype=torch.int64) for p in model.parameters()]).tolist())
    with ranks.alike():
        for rank, other in enumerate(gathered):
            for (name, _), a, b in zip(model.named_parameters(), gathered[0], other):
                if a != b:
                    raise ValueError(f"ranks 0 and {rank} hold different weights at step {step}, first in {name}: nothing was saved; check the "
                                     f"machines (memory, GPUs of one kind, one version of torch), then --resume")


def check_finite(step, gathered, saved):
    """Raise ValueError naming stage and rank where a loss or a gradient is not finite. gathered: each rank's (losses, gradient norms, ...)."""
    for rank, values in enumerate(gathered):
        for what, numbers in zip(("loss", "gradient"), values):
            for stage, number in enumerate(numbers):
                if not math.isfinite(number):
                    raise ValueError(f"the {what} of stage {stage} is not finite ({number}) on rank {rank} at step {step}: stopped before the "
                                     f"update; the last checkpoint, {'none yet' if saved is None else f'step-{saved:05d}'}, is untouched; "
                                     f"lower the rates and --resume")


def check_log(troubles):
    """Raise OSError where the log could not be written. troubles: what each rank has to say about it, or None."""
    for trouble in filter(None, troubles):
        raise OSError(trouble)


def open_log(path, step):
    """Open log.jsonl for appending, without the lines at or beyond `step`, which a resumed run writes again."""
    kept = [entry for entry in read_log(path) if entry["step"] < step or (entry["step"] == step and entry["kind"] != "step")]
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    return open(path, "a", buffering=1), {entry["step"] for entry in kept if entry["kind"] == "val"}


def git_commit():
    """The commit of this code, or "unknown" outside a git checkout."""
    try:
        found = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    except OSError:                                                         # no git here
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------
# Main

def main(argv=None):
    started = time.time()
    given = parse_flags(TrainConfig, __doc__, argv)
    if given.get("dry_run"):
        rank, world_size, _, _ = Ranks.environment()
        if rank == 0:
            dry_run(*resolve_config(given), world_size)
        return
    ranks = Ranks()
    main_rank, stop = ranks.rank == 0, []                                   # stop: signals received

    def say(text):
        if main_rank:
            try:
                print(text, flush=True)
            except OSError as e:                                            # who read our output left: save and end, as on a signal
                discard_stdout()
                stop.append(signal.SIGPIPE)
                if not isinstance(e, BrokenPipeError):
                    print(f"train.py: standard output cannot be written ({e}): saving and ending", file=sys.stderr)

    def on_signal(number, frame):
        stop.append(number)
        if main_rank and sys.stdout:
            with suppress(OSError):                                         # not by print, which is not reentrant
                os.write(sys.stdout.fileno(), f"{signal.Signals(number).name}: saving at the next step boundary\n".encode())
        if number == signal.SIGINT and ranks.world_size == 1:               # SIGTERM comes twice by itself from `timeout` and schedulers
            signal.signal(number, signal.default_int_handler)
        if "torch._inductor.config" in sys.modules:                         # Inductor's workers may have died of the same signal, and what is
            sys.modules["torch._inductor.config"].compile_threads = 1       # still to compile would wait for them for ever (pytorch #189290)

    with ranks.together():
        # config
        config, rows = resolve_config(given, ranks.restarted)
    with ranks.together():                                                  # all ranks have looked at RUN before rank 0 writes there
        model_config, out = config.model_config(), Path(config.out)
        if ranks.world_size > config.n_micro:
            raise ValueError(f"a step's {config.n_micro} micro-batches (--total-batch-tokens {config.total_batch_tokens} / --sequence-len "
                             f"{config.sequence_len} / --device-batch-size {config.device_batch_size}) leave some of {ranks.world_size} ranks "
                             f"without work; lower --device-batch-size or start fewer ranks")
        device, dtype = choose_device(ranks.device_name(config.device), config.dtype)
        on_cuda = device.type == "cuda"
        if device.index is not None:
            torch.cuda.set_device(device)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)

        # data
        data = open_data(config.data, config.vocab_size)
        tokenizer = data.tokenizer
        mix_sha256 = rows[-1].get("mix_sha256")                             # of a resumed run
        rows[-1] = phase_row(config, rows[-1], data)
        phase = phase_of(rows[-1])
        if mix_sha256 not in (None, data.sha256):
            raise ValueError(f"{data.path or 'the embedded sample'} is not the data that {out} was trained on; give that with --data, or "
                             f"begin a phase on other data with --continue-from")
        slices = validation_slices(data, rows, config, say)
        _, val_mix, n_val_windows = slices[0]
        if ranks.world_size > n_val_windows:
            raise ValueError(f"--eval-tokens {config.eval_tokens} are {n_val_windows} windows of {config.sequence_len} tokens, fewer than the "
                             f"{ranks.world_size} ranks that share them; raise --eval-tokens or start fewer ranks")
        train_mix = data.train(config.sequence_len, config.seed)
        stream_start = samples_of_earlier_phases(rows) - rows[-1]["anchor_sample"]

        # model and optimizer
        with torch.device(device):
            model = PoE(model_config, dtype)
        if dtype == torch.float64:
            model.double()
        model.init_weights(config.seed)
        groups = optimizer_groups(model, config)
        compiling = on_cuda if config.compile is None else config.compile
        optimizer = MuonAdamW(groups, ranks.rank, ranks.world_size, compiling)
        names_of_stage = [[name for name, _ in model.named_parameters() if model.stage_of(name) == k] for k in range(model_config.n_stage)]
        n_params = sum(count_parameters(model_config).values())
        record = {"format": 1, "model": asdict(model_config), "train": asdict(config) | {"resume": ""},
                  "tokenizer": {"vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos, "sha256": tokenizer.sha256}, "phases": rows}

        # the run's folder
        if main_rank:
            locked = open_folder(out, config, record)

    paths = ranks.gather([path for path, _, _ in slices])                   # a rank may lack earlier data: then none validates on it
    for part in [part for part in slices if not all(part[0] in there for there in paths)]:
        say(f"the validation slice of the earlier data {part[0]} is left out: not every rank can read it")
        slices.remove(part)

    # where the run stands
    step, state, saved = 0, {"step": 0, "sample": 0, "train_time": 0.0}, None     # saved: the newest step on disk
    ramp_start = max(row["anchor_step"] for row in rows if row.get("reset_optimizer") or row is rows[0])   # momentum buffers were zero there
    if config.resume or config.continue_from:
        checkpoint = restore_newest(out, ranks, model, optimizer, lambda at: not (config.reset_optimizer and at == phase.anchor))
        if checkpoint:
            state = read_state(checkpoint)
            step = saved = state["step"]
        with ranks.alike():
            if step > phase.end:
                raise ValueError(f"{checkpoint} is past the run's end, step {phase.end}; raise --num-steps")
        say(f"continuing from {config.continue_from}" if not config.resume else f"resuming {checkpoint or 'step 0: no checkpoint yet'}")
        if len(rows) > 1 and phase.anchor < phase_of(rows[-2]).end:
            say(f"phase {len(rows) - 1} was to end at step {phase_of(rows[-2]).end}; phase {len(rows)} begins at step {phase.anchor}")
    model.cast_weights()
    if compiling:
        model.compile_regions()

    # log
    log_file, validated, trouble = None, None, None                         # trouble: what kept the log from being written
    with ranks.together():
        if main_rank:
            write_json(out / "config.json", record)
            log_file, validated = open_log(out / "log.jsonl", step)
    validated = ranks.gather(validated)[0]

    def log(**entry):
        nonlocal trouble
        if main_rank and not trouble:
            try:
                log_file.write(json.dumps(entry) + "\n")
            except OSError as e:                                            # told at the next place where all ranks can end together
                with suppress(OSError):
                    log_file.close()
                trouble = f"{out / 'log.jsonl'} could not be written ({e}); the checkpoints are whole: free disk space, then --resume {out}"

    header = {"config": record["train"], "phases": rows, "commit": git_commit(), "torch": torch.__version__, "world_size": ranks.world_size,
              "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu x {torch.get_num_threads()}",
              "attention": attention_kernel(model_config, device, dtype), "params_total": n_params}
    log(kind="header", step=step, **header)
    say(json.dumps(header))
    say(f"{n_params:,} parameters, stages {model_config.stage_layers}, {config.batch} x {config.sequence_len} tokens a step, "
        f"train {sum(s.n_tokens for s in train_mix.sources):,} tokens, val {n_val_windows * config.sequence_len:,}, "
        f"attention by {header['attention']}")

    def validate():
        """Score the validation windows of every slice, log and print; return the metrics of the present data's."""
        all_metrics = []
        for number, (path, mix, n_windows) in enumerate(slices):
            metrics = summarize(score(model, mix, n_windows, tokenizer, config.device_batch_size, ranks.rank, ranks.world_size))
            bpb = metrics["bpb"]
            with ranks.alike():
                if not math.isfinite(bpb["full"]):
                    raise ValueError(f"the validation loss is not finite at step {step}: nothing was saved; lower the rates and --resume {out}")
            if step not in validated:
                log(kind="val_old" if number else "val", step=step, mix=path, train_time=state["train_time"], **metrics)
            loss = bpb["full"] * math.log(2) * metrics["bytes"] / metrics["tokens"]
            say(f"step:{step:05d}/{phase.end:05d} {'old_' * bool(number)}val_loss:{loss:.4f} val_bpb:{bpb['full']:.4f} "
                f"single_bpb:{','.join(f'{b:.4f}' for b in bpb['single'])} train_time:{state['train_time']:.1f}s")
            all_metrics.append(metrics)
        return all_metrics[0]

    # loop
    loader = Loader(train_mix, state["sample"] + stream_start, config.batch, config.device_batch_size, device, ranks.rank, ranks.world_size)
    metrics, printed, dts, stopping = None, 0.0, [], False
    with attention_backends(device):
        while True:
            last = step == phase.end
            save_due = last or (step > 0 and config.save_every > 0 and step % config.save_every == 0)
            eval_due = save_due or dense_step(rows, step) or (step > 0 and config.eval_every > 0 and step % config.eval_every == 0)
            if last or (eval_due and step not in validated and not stopping):       # a resumed run validates here
                metrics = validate()
            if step % CHECK_RANKS_EVERY == 0 or save_due or stopping:
                check_ranks(ranks, model, step)
            if (save_due or stopping) and step != saved:
                with ranks.alike():
                    check_log(ranks.gather(trouble))
                with ranks.together():
                    if main_rank:
                        os.fsync(log_file.fileno())                         # a log is as long as its checkpoints say
                say(f"saved {save_checkpoint(out, step, ranks, model, optimizer, record, {**state, 'step': step}, tokenizer)}")
                saved = step
                with ranks.together():
                    if main_rank:
                        drop_optimizer_state(out, step, config.keep_optim, {row["anchor_step"] for row in rows} | {phase.end})
            if last or stopping:
                break

            # one optimizer step
            start = time.time()
            losses = torch.zeros(model_config.n_stage, device=device, dtype=model.lm_head.weight.dtype)
            norms = torch.zeros_like(losses)                                # largest gradient entry, by stage
            for micro_step in range(loader.n_micro):
                inputs, targets = next(loader)
                last_micro = micro_step == loader.n_micro - 1
                for k, loss in model.backward_by_stage(inputs, targets, 1 / config.total_batch_tokens, last_micro):
                    losses[k] += loss
                    if last_micro:
                        norms[k] = get_total_norm([optimizer.params[name].grad for name in names_of_stage[k]], math.inf)
                        optimizer.start_reduce(names_of_stage[k])           # travels while the next stage runs
            mine = losses.tolist(), norms.tolist(), bool(stop), trouble     # the one host sync of forward and backward
            fwdbwd = time.time() - start
            gathered = ranks.gather(mine)
            with ranks.alike():
                check_finite(step, gathered, saved)
                check_log(values[3] for values in gathered)
            losses = [sum(of_ranks) for of_ranks in zip(*(values[0] for values in gathered))]
            stopping = any(values[2] for values in gathered)
            lrm = learning_rate(phase, step)
            for group in groups:
                group["lr"] = group["initial_lr"] * lrm
                group["weight_decay"] = group["initial_weight_decay"] * weight_decay_factor(phase, step)
                if group["kind"] == "muon":
                    group["momentum"] = muon_momentum(phase, step, ramp_start)
            optimizer.step()
            model.cast_weights()
            if on_cuda:
                torch.cuda.synchronize()
            dt = time.time() - start
            state["train_time"] += dt
            state["sample"] += config.batch
            dts = dts[-19:] + [dt]
            train_loss, rate = sum(losses) / len(losses), config.total_batch_tokens / dt
            log(kind="step", step=step, train_loss=train_loss, losses=losses, lrm=lrm, position=position(phase, step)[0], dt=dt, fwdbwd=fwdbwd,
                train_time=state["train_time"])
            if time.time() - printed > 2 or step + 1 == phase.end:
                printed = time.time()
                say(f"step:{step:05d}/{phase.end:05d} phase:{len(rows)} train_loss:{train_loss:.4f} lrm:{lrm:.3f} dt:{dt * 1000:.1f}ms "
                    f"tok_per_sec:{rate:.0f} train_time:{state['train_time']:.1f}s eta:{sum(dts) / len(dts) * (phase.end - step - 1) / 60:.1f}m")
            step += 1
    loader.close()
    if main_rank:
        log_file.close()
        if last:
            with torch.compiler.set_stance("force_eager") if compiling else nullcontext():      # its short texts are no work to compile for
                report(config, out, state, step, model, tokenizer, val_mix, n_val_windows, metrics, started)
        else:
            print(f"stopped at step {step}; go on with --resume {out}")
        locked.close()
    ranks.gather(None)
    ranks.close()


def report(config, out, state, step, model, tokenizer, val_mix, n_val_windows, metrics, started):
    """Print what a finished run has learnt: a few samples, its bpb beside that of compressors, and a JSON object as the last line."""
    device = model.cos.device
    from sample import Plan, Sampling, complete                             # which imports Triton: the other ranks need neither
    with attention_backends(device):
        for number, prompt in enumerate(SAMPLE_PROMPTS):
            room = config.sequence_len + 1 - len(tokenizer.encode(prompt))  # none in a very short context
            if room > 0:
                sampling = Sampling(temperature=0.8, top_k=50, seed=config.seed + number)
                text = next(complete(model, tokenizer, [prompt], min(60, room), Plan(range(model.config.n_stage)), sampling))["completion"]
                print(f"sample: {(prompt + text)!r}")
    bpb = metrics["bpb"]
    result = {"bpb": bpb, "bpb_gzip": None, "bpb_xz": None}
    if metrics["bytes"] <= COMPRESSORS_UP_TO:
        text, _ = slice_text(val_mix, n_val_windows, tokenizer)
        result["bpb_gzip"] = 8 * len(gzip.compress(text, 9)) / len(text)
        result["bpb_xz"] = 8 * len(lzma.compress(text, preset=9)) / len(text)
    rows = [("full", bpb["full"]), *((f"s{k}", b) for k, b in enumerate(bpb["single"])), ("gzip -9", result["bpb_gzip"]), ("xz -9", result["bpb_xz"])]
    print(f"val bpb on {metrics['bytes']:,} bytes: " + "  ".join(f"{name} {value:.4f}" for name, value in rows if value is not None))
    print(json.dumps({**result, "seconds": round(time.time() - started, 1), "train_seconds": round(state["train_time"], 1), "step": step,
                      "checkpoint": str(checkpoint_steps(out)[-1]), "params_total": sum(count_parameters(model.config).values()),
                      "flops_per_token": flops_per_token(model.config), "val_bytes": metrics["bytes"],
                      "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None}))


if __name__ == "__main__":
    run(main)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # nothing is left to stop, and an interrupted interpreter's end prints tracebacks
