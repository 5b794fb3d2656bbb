"""
Train a per-stage Product-of-Experts language model.

    python train.py                                              # embedded sample, tiny preset, CPU, minutes
    python train.py --preset d12 --data DATA --out runs/d12
    python train.py --resume runs/tiny                           # after an interruption
    python train.py --preset 3b --dry-run                        # sizes, FLOPs, phase table, memory; nothing is trained

Each micro-batch runs one stage at a time, forward and backward (model.py); parameters are updated after the last stage of the
last micro-batch. RUN/log.jsonl holds every step and every validation; RUN/step-XXXXX/ are the checkpoints: config.json, model.pt,
optim/rank-00000.pt, state.json, the tokenizer, and manifest.json with the sha256 of each. A checkpoint appears whole or not at all.

Training time excludes validation and saving. Ctrl-C or SIGTERM saves at the next step boundary and exits; a second one stops at once.
Order of precedence: defaults < preset < checkpoint (--resume) < flags.
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
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# GNU OpenMP's threads spin at barriers; beside another busy program that made a step up to ten times slower. Spin briefly, then sleep.
# It must be set before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch

from dataloader import Loader, open_data, validation_windows
from evaluate import read_log, score, slice_text, summarize, write_json
from flags import flag, parse_flags, run
from model import (LOSS_CHUNK_LOGITS, OBJECTIVES, PRESETS, ModelConfig, PoE, attention_backends, checkpoint_steps, choose_device, count_parameters,
                   flops_per_token, load_tensors, parameter_group, read_record, sha256_of, verify_checkpoint)
from muon import MuonAdamW
from sample import complete
from schedule import Phase, learning_rate, muon_momentum, phase_index, position, weight_decay_factor

COMPRESSORS_UP_TO = 8_000_000       # bytes of validation text; xz -9 takes about a second a megabyte
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
# width, but for scalar_lr, where 0.5 was worse than 0.05 to 0.1 here; weight decay follows nanochat's rule (0.28 at 1.3 G tokens, less in
# proportion for more); d12 and 1b train 20 tokens per parameter of trunk + head; tiny was tuned for two minutes on two CPU cores.
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
    seed: int = flag(0, "of the initial weights and of the order of the data")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype; master weights are float32 (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16", "float64"))
    compile: bool = flag(None, "compile the blocks and the loss (default: on cuda only)")
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
    vocab_size: int = flag(None, "token ids, bos included; fewer than the tokenizer has take its first merges (default: preset)")
    # optimizer
    total_batch_tokens: int = flag(None, "tokens per optimizer step, over all micro-batches (default: preset)")
    device_batch_size: int = flag(None, "sequences per micro-batch; lower it when memory runs out (default: preset)")
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

    def __post_init__(self):
        for name in ("total_batch_tokens", "device_batch_size", "num_steps", "eval_tokens", "sequence_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        for name in ("seed", "matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < (2 ** 63 if name == "seed" else 1000):
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative, and below {'2^63' if name == 'seed' else 1000}")
        if self.total_batch_tokens % self.sequence_len:
            raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} is not a multiple of --sequence-len {self.sequence_len}")
        if self.batch % self.device_batch_size:
            raise ValueError(f"--device-batch-size {self.device_batch_size} does not divide a step's {self.batch} sequences "
                             f"(--total-batch-tokens {self.total_batch_tokens} / --sequence-len {self.sequence_len})")

    @property
    def batch(self):
        return self.total_batch_tokens // self.sequence_len      # sequences per optimizer step

    def model_config(self):
        try:
            stages = tuple(int(n) for n in self.stage_layers.split(","))
        except (ValueError, AttributeError):
            raise ValueError(f"--stage-layers {self.stage_layers!r} is not a list of layer counts such as 16,6,5,5") from None
        return ModelConfig(stage_layers=stages, **{f.name: getattr(self, f.name) for f in fields(ModelConfig) if f.name != "stage_layers"})

    def phase(self):
        return Phase(0, self.num_steps, self.warmup_steps, self.peak_lrm, self.warmdown_ratio, self.final_lrm)


FIXED_BY_RESUME = ("preset", "seed", "objective", "n_layer", "n_embd", "n_head", "n_kv_head", "mlp_hidden", "stage_layers",
                   "sequence_len", "vocab_size", "total_batch_tokens")


def resolve_config(given):
    """Lay the given flags over the preset, or over the config that a run recorded. Raises ValueError or FileNotFoundError."""
    if given.get("resume"):
        out = Path(given["resume"])
        if (out / "manifest.json").exists():
            raise ValueError(f"--resume {out} is a checkpoint; give the run that it is in: --resume {out.resolve().parent}")
        try:
            recorded = json.loads((out / "config.json").read_text())["train"]
        except FileNotFoundError:
            raise FileNotFoundError(f"--resume {out}: no run there (no config.json); start one with --out {out}") from None
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{out / 'config.json'} is not readable: {e!r}") from None
        fixed = [f"--{name.replace('_', '-')}" for name in FIXED_BY_RESUME if name in given]
        if fixed:
            raise ValueError(f"{', '.join(fixed)} cannot be given with --resume: the run in {out} has its own; leave it out or start another --out")
        if Path(given.get("out") or out) != out:
            raise ValueError(f"--out {given['out']} and --resume {out} name two runs; leave --out out")
        try:
            return TrainConfig(**{**recorded, **given, "out": str(out)})
        except TypeError as e:
            raise ValueError(f"{out / 'config.json'} is not of this version ({e}); start another --out") from None
    if given.get("out") == "":
        raise ValueError("--out is empty; name a folder for the run")
    preset = given.get("preset", "tiny")
    shape = asdict(PRESETS[preset])
    shape["stage_layers"] = ",".join(map(str, shape["stage_layers"]))
    if given.get("objective") == "bp":
        shape["stage_layers"] = str(given.get("n_layer", shape["n_layer"]))
    del shape["objective"]
    recipe = asdict(RECIPES[preset])
    config = TrainConfig(**{**shape, **recipe, "out": f"runs/{preset}", **given})
    if any((Path(config.out) / name).exists() for name in ("config.json", "log.jsonl")) or checkpoint_steps(config.out):
        if not config.dry_run:
            raise ValueError(f"{config.out} already holds a run: go on with --resume {config.out}, or choose another --out")
    return config


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
    """Estimated bytes per rank in training, by kind: parameters, gradients, optimizer state (sharded), activations, loss."""
    groups = count_parameters(model_config)
    total, matrices = sum(groups.values()), groups["matrices"]
    tokens = config.device_batch_size * config.sequence_len
    layers = max(model_config.stage_layers) if model_config.objective == "poe" else model_config.n_layer
    kv_dim = model_config.n_kv_head * model_config.head_dim
    # saved for backward by a compiled block: 2 MLP-wide, 6 stream-wide and 6 KV-wide tensors a token, and its weights' casts
    # (within 3 % of the peaks measured for d12 and 3b on an H100)
    activations = 2 * layers * (tokens * (2 * model_config.mlp_hidden + 6 * model_config.n_embd + 6 * kv_dim) + matrices // model_config.n_layer)
    head, chunk = model_config.vocab_size * model_config.n_embd, min(tokens, LOSS_CHUNK_LOGITS["cuda"] // model_config.vocab_size)
    return {"parameters": 4 * total, "gradients": 4 * total, "optimizer_state": (4 * matrices + 8 * (total - matrices)) // world_size,
            "activations": activations, "loss": 6 * chunk * model_config.vocab_size + 6 * head}


def dry_run(config):
    """Print what a run would be; the last line is a JSON object."""
    model_config, phase = config.model_config(), config.phase()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    with torch.device("meta"):
        model = PoE(model_config)
    print("parameter shapes (layers 0 and last):")
    for name, p in model.named_parameters():
        if not name.startswith("blocks.") or name.split(".")[1] in ("0", str(model_config.n_layer - 1)):
            print(f"  {name:<36}{str(tuple(p.shape)):<18}{parameter_group(name):<14}stage {'all' if model.stage_of(name) is None else model.stage_of(name)}")
    params = count_parameters(model_config)
    print("parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in params.items()) + f", total {sum(params.values()):,}")
    flops = flops_per_token(model_config)
    print(f"FLOPs per token: {flops / 1e9:.2f} G (forward + backward, causal attention not halved)")
    print(f"steps: {config.num_steps:,} x {config.total_batch_tokens:,} tokens = {config.num_steps * config.total_batch_tokens:,} tokens, "
          f"micro-batches of {config.device_batch_size} x {model_config.sequence_len}")
    print("phase anchor  steps warmup  peak warmdown  final")
    print(f"{1:>5} {phase.anchor:>6} {phase.num_steps:>6} {phase.warmup_steps:>6} {phase.peak_lrm:>5} {phase.warmdown_steps:>8} {phase.final_lrm:>6}")
    memory = memory_estimate(model_config, config, world_size)
    print(f"estimated memory per rank of {world_size}: " + ", ".join(f"{kind} {n / 2**30:.1f}" for kind, n in memory.items())
          + f", total {sum(memory.values()) / 2**30:.1f} GiB")
    print(json.dumps({"preset": config.preset, "model": asdict(model_config), "params": params, "params_total": sum(params.values()),
                      "flops_per_token": flops, "num_steps": config.num_steps, "total_batch_tokens": config.total_batch_tokens,
                      "tokens": config.num_steps * config.total_batch_tokens, "phases": [phase_row(phase, config)],
                      "memory_per_rank_bytes": memory, "memory_per_rank_bytes_total": sum(memory.values()), "world_size": world_size}))


def phase_row(phase, config):
    """A phase as a row of the checkpoint's phase table."""
    row = asdict(phase)
    return {"anchor_step": row.pop("anchor"), "anchor_sample": 0, "batch": config.batch, "mix": config.data, **row}


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: writing and resuming (reading weights alone is in model.py)

def save_checkpoint(out, step, *what):
    """Save into a temporary folder, then rename: RUN/step-XXXXX appears whole or not at all. Returns its path; raises OSError on a full disk."""
    final, temporary = out / f"step-{step:05d}", out / f".tmp-step-{step:05d}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_checkpoint(temporary, step, *what)
    except (OSError, RuntimeError) as e:            # torch.save says RuntimeError when the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be written ({str(e).splitlines()[0]}); the checkpoints before it are whole: free disk space, "
                      f"then --resume {out}") from None
    shutil.rmtree(final, ignore_errors=True)        # there only where a resume found it damaged and trained that step again
    os.rename(temporary, final)
    sync(out)
    return final


def write_checkpoint(temporary, step, model, optimizer, record, state, tokenizer):
    """Write a checkpoint's files into the folder `temporary` and sync each to disk."""
    (temporary / "optim").mkdir(parents=True)
    torch.save(model.state_dict(), temporary / "model.pt")
    torch.save(optimizer.state_dict(), temporary / "optim" / f"rank-{optimizer.rank:05d}.pt")
    texts = {"config.json": json.dumps({**record, "step": step}, indent=1).encode(), "state.json": json.dumps(state).encode(), **tokenizer.files()}
    for name, content in texts.items():
        (temporary / name).write_bytes(content)
    files = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
    manifest = {"format": 1, "files": {name: sha256_of(temporary / name) for name in files}}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in [*(temporary / name for name in files), temporary / "manifest.json", temporary / "optim", temporary]:
        sync(path)


def lock(out):
    """Hold RUN/.lock until this process ends, however it ends. Raises ValueError where another process holds it."""
    file = open(out / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is training into {out}; wait for it, or choose another --out") from None
    return file


def sync(path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def newest_whole_checkpoint(out):
    """The newest checkpoint of a run whose files all match their manifest, or None before its first save; says which it skips and why."""
    for path in reversed(checkpoint_steps(out)):
        try:
            verify_checkpoint(path)
            return path
        except (OSError, ValueError) as e:
            print(f"skipping {path}: {e}")
    if checkpoint_steps(out):
        raise ValueError(f"no checkpoint in {out} is whole: restore one from a copy, or start another --out")
    return None


def restore(path, model, optimizer, tokenizer):
    """Load weights and optimizer state of a checkpoint into `model` and `optimizer`; return its state.json."""
    if read_record(path)["tokenizer"]["sha256"] != tokenizer.sha256:
        raise ValueError(f"{path} was trained with another tokenizer than the data's; use --data with its own")
    weights = load_tensors(path / "model.pt")
    model.check_weights(weights)
    model.load_state_dict(weights)
    optimizer_state = {}
    for file in sorted((path / "optim").glob("rank-*.pt")):
        optimizer_state.update(load_tensors(file))
    optimizer.load_state_dict(optimizer_state)
    state = json.loads((path / "state.json").read_text())
    if not isinstance(state, dict) or not all(isinstance(state.get(key), (int, float)) and state[key] >= 0 for key in ("step", "sample", "train_time")):
        raise ValueError(f"{path / 'state.json'} is not a run's state; use another step")
    return state


def open_log(path, step):
    """Open log.jsonl for appending, without the lines at or beyond `step`, which a resumed run writes again."""
    kept = [entry for entry in read_log(path) if entry["step"] < step or (entry["step"] == step and entry["kind"] != "step")]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    return open(path, "a", buffering=1)


def git_commit():
    """The commit of this code, or "unknown" outside a git checkout."""
    found = subprocess.run(["git", "rev-parse", "--verify", "-q", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------------------------
# Main

def main(argv=None):
    started = time.time()
    stop = []                                                               # signals received

    def on_signal(number, frame):
        print(f"{signal.Signals(number).name}: saving at the next step boundary", flush=True)
        stop.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    # config
    config = resolve_config(parse_flags(TrainConfig, __doc__, argv))
    model_config, phases = config.model_config(), [config.phase()]
    if config.dry_run:
        return dry_run(config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains on one process; start it without torchrun")
    device, dtype = choose_device(config.device, config.dtype)
    on_cuda = device.type == "cuda"
    out = Path(config.out)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    # data
    data = open_data(config.data, config.vocab_size)
    tokenizer = data.tokenizer
    val_mix = data.val(config.sequence_len)
    n_val_windows = validation_windows(val_mix, config.eval_tokens)
    train_mix = data.train(config.sequence_len, config.seed)

    # model and optimizer
    with torch.device(device):
        model = PoE(model_config, dtype)
    if dtype == torch.float64:
        model.double()
    model.init_weights(config.seed)
    groups = optimizer_groups(model, config)
    optimizer = MuonAdamW(groups)
    step, state, saved = 0, {"step": 0, "sample": 0, "train_time": 0.0}, None     # saved: the newest step on disk
    if config.resume:
        locked = lock(out)
        for leftover in out.glob(".tmp-step-*"):
            shutil.rmtree(leftover)
        checkpoint = newest_whole_checkpoint(out)
        if checkpoint:
            state = restore(checkpoint, model, optimizer, tokenizer)
            step = saved = state["step"]
            if step > phases[-1].end:
                raise ValueError(f"{checkpoint} is past the run's end, step {phases[-1].end}; raise --num-steps")
        print(f"resuming {checkpoint or 'from step 0: no checkpoint yet'}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        locked = lock(out)
    first_step = step
    record = {"format": 1, "model": asdict(model_config), "train": asdict(config) | {"resume": ""},
              "tokenizer": {"vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos, "sha256": tokenizer.sha256},
              "phases": [phase_row(phase, config) for phase in phases]}
    write_json(out / "config.json", record)
    if on_cuda if config.compile is None else config.compile:
        model.compile_regions()

    # log
    log_file = open_log(out / "log.jsonl", step)

    def log(**entry):
        log_file.write(json.dumps(entry) + "\n")

    params, flops = count_parameters(model_config), flops_per_token(model_config)
    header = {"config": record["train"], "commit": git_commit(), "torch": torch.__version__, "world_size": 1,
              "device": torch.cuda.get_device_name(device) if on_cuda else f"cpu x {torch.get_num_threads()}", "params_total": sum(params.values())}
    log(kind="header", step=step, **header)
    print(json.dumps(header))
    print(f"{sum(params.values()):,} parameters, stages {model_config.stage_layers}, {config.batch} x {config.sequence_len} tokens a step, "
          f"train {sum(s.n_tokens for s in train_mix.sources):,} tokens, val {n_val_windows * config.sequence_len:,}")

    def validate():
        """Score the validation windows, log and print; return (sums, metrics)."""
        metrics = summarize(score(model, val_mix, n_val_windows, tokenizer, config.device_batch_size))
        bpb = metrics["bpb"]
        if not math.isfinite(bpb["full"]):
            raise ValueError(f"the validation loss is not finite at step {step}: nothing was saved; lower the rates and --resume {out}")
        log(kind="val", step=step, train_time=state["train_time"], **metrics)
        loss = bpb["full"] * math.log(2) * metrics["bytes"] / metrics["tokens"]
        print(f"step:{step:05d}/{phases[-1].end:05d} val_loss:{loss:.4f} val_bpb:{bpb['full']:.4f} "
              f"single_bpb:{','.join(f'{b:.4f}' for b in bpb['single'])} train_time:{state['train_time']:.1f}s", flush=True)
        return metrics

    def save():
        return save_checkpoint(out, step, model, optimizer, record, {**state, "step": step}, tokenizer)

    # loop
    loader = Loader(train_mix, state["sample"], config.batch, config.device_batch_size, device)
    n_micro, end, metrics, printed = config.batch // config.device_batch_size, phases[-1].end, None, 0.0
    dts = []
    with attention_backends(device):
        while True:
            last = step == end
            save_due = last or (step > 0 and config.save_every > 0 and step % config.save_every == 0)
            eval_due = config.eval_every > 0 and step % config.eval_every == 0
            if last or ((save_due or eval_due) and step > first_step):      # a resumed step was validated before
                metrics = validate()
            if (save_due or stop) and step != saved:
                print(f"saved {save()}", flush=True)
                saved = step
            if last or stop:
                break

            # one optimizer step
            start = time.time()
            losses = torch.zeros(model_config.n_stage, device=device, dtype=model.lm_head.weight.dtype)
            for _ in range(n_micro):
                inputs, targets = next(loader)
                for k, loss in model.backward_by_stage(inputs, targets, 1 / config.total_batch_tokens):
                    losses[k] += loss
            model.finish_gradients()
            losses = losses.tolist()                                        # the one host sync of a step
            if not all(map(math.isfinite, losses)):
                raise ValueError(f"the loss is not finite at step {step}: {losses} by stage; the last checkpoint is untouched; lower the rates")
            phase = phases[phase_index(phases, step)]
            lrm = learning_rate(phase, step)
            for group in groups:
                group["lr"] = group["initial_lr"] * lrm
                group["weight_decay"] = group["initial_weight_decay"] * weight_decay_factor(phase, step)
                if group["kind"] == "muon":
                    group["momentum"] = muon_momentum(phase, step)
            optimizer.step()
            if on_cuda:
                torch.cuda.synchronize()
            dt = time.time() - start
            state["train_time"] += dt
            state["sample"] += config.batch
            dts = dts[-19:] + [dt]
            train_loss, rate = sum(losses) / len(losses), config.total_batch_tokens / dt
            log(kind="step", step=step, train_loss=train_loss, losses=losses, lrm=lrm, position=position(phase, step)[0], dt=dt,
                train_time=state["train_time"])
            if time.time() - printed > 2 or step + 1 == end:
                printed = time.time()
                print(f"step:{step:05d}/{end:05d} phase:{len(phases)} train_loss:{train_loss:.4f} lrm:{lrm:.3f} dt:{dt * 1000:.1f}ms "
                      f"tok_per_sec:{rate:.0f} train_time:{state['train_time']:.1f}s eta:{sum(dts) / len(dts) * (end - step - 1) / 60:.1f}m", flush=True)
            step += 1
    loader.close()
    log_file.close()
    locked.close()
    if stop and not last:
        print(f"stopped at step {step}; go on with --resume {out}")
        return

    # report
    with torch.compiler.set_stance("force_eager"), attention_backends(device):
        for number, prompt in enumerate(SAMPLE_PROMPTS):
            room = config.sequence_len + 1 - len(tokenizer.encode(prompt))  # none in a very short context
            if room > 0:
                text = complete(model, tokenizer, prompt, min(60, room), range(model_config.n_stage), temperature=0.8, top_k=50,
                                seed=config.seed + number)[0]["completion"]
                print(f"sample: {(prompt + text)!r}")
    bpb = metrics["bpb"]
    report = {"bpb": bpb, "bpb_gzip": None, "bpb_xz": None}
    if metrics["bytes"] <= COMPRESSORS_UP_TO:
        text, _ = slice_text(val_mix, n_val_windows, tokenizer)
        report["bpb_gzip"] = 8 * len(gzip.compress(text, 9)) / len(text)
        report["bpb_xz"] = 8 * len(lzma.compress(text, preset=9)) / len(text)
    rows = [("full", bpb["full"]), *((f"s{k}", b) for k, b in enumerate(bpb["single"])), ("gzip -9", report["bpb_gzip"]), ("xz -9", report["bpb_xz"])]
    print(f"val bpb on {metrics['bytes']:,} bytes: " + "  ".join(f"{name} {value:.4f}" for name, value in rows if value is not None))
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    print(json.dumps({**report, "seconds": round(time.time() - started, 1), "train_seconds": round(state["train_time"], 1), "step": step,
                      "checkpoint": str(checkpoint_steps(out)[-1]), "params_total": sum(params.values()), "flops_per_token": flops,
                      "val_bytes": metrics["bytes"], "peak_memory_bytes": peak}))


if __name__ == "__main__":
    run(main)
