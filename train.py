"""
Train a per-stage Product-of-Experts language model, on one process or on any number of ranks.

    python train.py                                    # embedded sample, tiny preset, CPU, minutes
    python train.py --preset d12 --data DATA --out runs/d12
    torchrun --standalone --nproc_per_node 8 train.py --preset 3b --data DATA --out runs/3b
    torchrun ... train.py --resume runs/3b             # after an interruption, on any number of ranks
    torchrun ... train.py --continue-from runs/3b/step-83923 --num-steps 50800 --warmup-steps 1000 \\
        --peak-lrm 0.5 --warmdown-ratio 0.55 --final-lrm 0.0 --out runs/3b-continual    # a new phase
    python train.py --preset 3b --dry-run              # sizes, FLOPs, phases, memory; nothing is trained

A step's batch is cut into micro-batches that are dealt to the ranks, so the batch is the same on any number
of them. Each micro-batch runs one stage at a time, forward and backward (model.py). In the last one, a
stage's gradients travel to the ranks that own its parameters while the next stage runs; parameters are
updated after the last stage (muon.py). A new phase restores weights and optimizer state from the checkpoint
that it continues, and warms the learning rate up again (schedule.py); steps count on.

What a run leaves on disk is in checkpoint.py. Training time excludes validation and saving. Ctrl-C or SIGTERM
saves at the next step boundary and exits; a second Ctrl-C stops at once (under torchrun it is ignored).
torchrun's own restarts resume. Order of precedence: defaults < preset < checkpoint < flags.
"""
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
from collections import namedtuple
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# GNU OpenMP's threads spin at barriers, for a thread that may not be running. Spin briefly, then sleep: a
# step of `tiny` on two cores took 0.26 to 0.34 s with 1,000 turns or 30,000, and beside one busy program
# 0.49 s against 1.37 s. It is read when torch is imported. Decoding, whose products are short, is 20 to 30 %
# faster spinning, so only this script sets it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch.nn.utils import get_total_norm

from checkpoint import (
    RunLog,
    checkpoint_steps,
    drop_optimizer_state,
    newest_whole,
    place_seed,
    read_json,
    read_record,
    recorded_in,
    restore,
    save_checkpoint,
    verify_checkpoint,
    write_json,
)
from common import (
    DeviceFlags,
    Ranks,
    SharedError,
    choose_device,
    discard_stdout,
    flag,
    lock,
    parse_flags,
    run,
    spelled,
)
from dataloader import Loader, Tokenizer, open_data, validation_windows
from evaluate import score, slice_text, summarize
from model import (
    LOSS_CHUNK_LOGITS,
    OBJECTIVES,
    PRESETS,
    ModelConfig,
    PoE,
    attention_backends,
    count_parameters,
    flops_per_token,
    parameter_group,
)
from muon import MuonAdamW
from sample import Plan, Sampling, complete, decoding_threads
from schedule import Phase, learning_rate, muon_momentum, phase_of, weight_decay_factor

COMPRESSORS_UP_TO = 8_000_000       # bytes of validation text; xz -9 takes about a second a megabyte
# dense operations a second in bfloat16 by the data sheet, by a part of the GPU's name; the first that fits
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
SAMPLE_PROMPTS = ("The capital of France is", "He looked at the sea and", "def ")


# --------------------------------------------------------------------------------------------------
# Config

# How a preset is optimised: values of flags. Rates are effective peak values at lrm = 1; nothing rescales
# them.
Recipe = namedtuple("Recipe", """
    total_batch_tokens device_batch_size num_steps warmup_steps warmdown_ratio final_lrm matrix_lr
    embedding_lr unembedding_lr scalar_lr weight_decay eval_every eval_tokens save_every""")

# The card gives 3b's batch, steps, schedule, first three rates, and save and eval sizes. d12's rates are
# nanochat's at its reference width, but for scalar_lr, where 0.5 was worse than 0.05 to 0.1 here; weight
# decay follows nanochat's rule, 0.28 sqrt(batch / 524,288) 1.3 G / tokens, rounded; d12 and 1b train 20
# tokens per parameter of trunk + head; tiny was tuned for two minutes on two CPU cores.
#
#               batch   seqs  steps  warmup down final matrix embed unemb scal decay  eval  tokens      save
RECIPES = {
    "tiny": Recipe(2_048,    8,    400,    10, .65, .05, .060, .30, .008, .05, .150,  -1,     36_864,   200),
    "d12":  Recipe(524_288, 32,  4_600,   100, .65, .05, .020, .30, .008, .10, .150, 250, 10_485_760,   500),
    "1b":   Recipe(786_432,  8, 25_600,   500, .65, .05, .015, .30, .008, .10, .020, 500, 41_943_040, 2_000),
    "3b":   Recipe(786_432,  8, 83_923, 1_000, .65, .05, .015, .30, .008, .10, .007, 500, 41_943_040, 2_000),
}


@dataclass(frozen=True)
class TrainConfig(DeviceFlags):
    preset: str = flag("tiny", "model and recipe to start from", choices=tuple(PRESETS))
    data: str = flag("", "folder of token shards (data/prepare.py); empty is the embedded sample", path=True)
    out: str = flag(None, "run directory (default: runs/<preset>)", path=True)
    resume: str = flag("", "run directory to go on with, from its newest whole checkpoint", path=True)
    continue_from: str = flag("", "checkpoint (RUN/step-XXXXX) to begin a new phase from, in a new "
                                  "--out", path=True)
    reset_optimizer: bool = flag(False, "with --continue-from: start from the weights alone, with a fresh "
                                        "optimizer")
    seed: int = flag(0, "of the initial weights and of the order of the data", low=0, high=2 ** 63 - 1)
    compile: bool = flag(None, "compile the blocks, the loss and the optimizer's elementwise work (default: "
                               "on cuda only)")
    fp8: bool = flag(False, "multiply in 8 bits in the blocks' MLPs, on GPUs from an H100 on; a CPU emulates "
                            "it")
    dry_run: bool = flag(False, "print sizes, FLOPs, schedule and memory, and exit")
    # model
    objective: str = flag("poe", "poe: local losses; joint: the same losses without the detach; bp: one loss "
                                 "at the top",
                          choices=OBJECTIVES)
    n_layer: int = flag(None, "blocks (default: preset)", low=1)
    n_embd: int = flag(None, "channels of the residual stream (default: preset)", low=1)
    n_head: int = flag(None, "query heads (default: preset)", low=1)
    n_kv_head: int = flag(None, "key and value heads, a divisor of n_head (default: preset)", low=1)
    mlp_hidden: int = flag(None, "channels inside the MLP (default: preset)", low=1)
    stage_layers: str = flag(None, "layers per stage, such as 16,6,5,5; they sum to n_layer (default: "
                                   "preset)")
    sequence_len: int = flag(None, "context, tokens (default: preset)", low=1)
    vocab_size: int = flag(None, "token ids, bos included; with --data those of its shards, else up to "
                                 "32768: the first merges of the embedded tokenizer (default: preset)", low=1)
    # optimizer
    total_batch_tokens: int = flag(None, "tokens per optimizer step, over all micro-batches and ranks "
                                         "(default: preset)", low=1)
    device_batch_size: int = flag(None, "sequences per micro-batch of a rank; lower it when memory runs out "
                                        "(default: preset)", low=1)
    matrix_lr: float = flag(None, "peak rate of Muon, the blocks' matrices (default: preset)", low=0)
    embedding_lr: float = flag(None, "peak rate of the token embedding; value embeddings take half (default: "
                                     "preset)", low=0)
    unembedding_lr: float = flag(None, "peak rate of the heads (default: preset)", low=0)
    scalar_lr: float = flag(None, "peak rate of x0_lambda; resid_lambda takes a hundredth, gates a fiftieth "
                                  "(default: preset)", low=0)
    weight_decay: float = flag(None, "of Muon's matrices, decoupled, times the rate; falls to 0 over the "
                                     "phase (default: preset)", low=0)
    # schedule
    num_steps: int = flag(None, "optimizer steps of the phase (default: preset)", low=1)
    warmup_steps: int = flag(None, "linear warmup, steps (default: preset)", low=0)
    peak_lrm: float = flag(1.0, "learning-rate multiplier between warmup and warmdown", low=0)
    warmdown_ratio: float = flag(None, "share of the phase in linear warmdown, 0 to 1 (default: "
                                       "preset)", low=0, high=1)
    final_lrm: float = flag(None, "learning-rate multiplier at the end of the phase (default: preset)", low=0)
    # evaluation and output
    eval_every: int = flag(None, "steps between validations beside those at saves (-1 or 0 = off; default: "
                                 "preset)")
    eval_tokens: int = flag(None, "tokens of a validation (default: preset)", low=1)
    save_every: int = flag(None, "steps between checkpoints, beside the last (-1 or 0 = off; default: "
                                 "preset)")
    keep_optim: int = flag(2, "newest checkpoints that keep their optimizer state, beside those at the ends "
                              "of phases (-1 or 0 = all)", low=-1)

    def __post_init__(self):
        # raises where the schedule is impossible
        Phase(0, *(getattr(self, name) for name in SCHEDULE_FLAGS))
        if self.reset_optimizer and not self.continue_from:
            raise ValueError("--reset-optimizer needs --continue-from, the checkpoint whose weights to start "
                             "from")
        micro_batch_tokens = self.device_batch_size * self.sequence_len
        if self.total_batch_tokens % micro_batch_tokens:
            raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} is not a multiple of "
                             f"--device-batch-size x --sequence-len = {micro_batch_tokens}")

    @property
    def batch(self):
        """Sequences per optimizer step."""
        return self.total_batch_tokens // self.sequence_len

    def model_config(self):
        shape = {f.name: getattr(self, f.name) for f in fields(ModelConfig)}
        try:
            shape["stage_layers"] = tuple(int(n) for n in self.stage_layers.split(","))
        except ValueError:
            raise ValueError(f"--stage-layers {self.stage_layers!r} is not a list of layer counts such as "
                             f"16,6,5,5") from None
        return ModelConfig(**shape)


SHAPE_FLAGS = ("preset", "seed", *(f.name for f in fields(ModelConfig)))
SCHEDULE_FLAGS = tuple(f.name for f in fields(Phase) if f.name != "anchor")


def resolve_config(given, restarted=False):
    """Lay the given flags over a preset, or over what a run or a checkpoint recorded.

    restarted: torchrun started the same command again, which then goes on with what it had begun.
    Returns (TrainConfig, phase table): rows of config.json's "phases"; the last is completed by `phase_row`.
    """
    if "resume" in given:
        return resumed_config(given)
    config, rows = continued_config(given) if "continue_from" in given else new_config(given)
    exists = (Path(config.out) / "config.json").exists()
    if restarted and exists:
        # `train` of a new run records resume "", as its own config has it; data is told by its hash
        recorded = asdict(TrainConfig(**read_record(config.out)["train"]))
        if recorded | {"data": config.data, "out": config.out} == asdict(config):
            return resumed_config({"resume": config.out})
    if (exists or checkpoint_steps(config.out)) and not config.dry_run:
        raise ValueError(f"{config.out} already holds a run: go on with --resume {config.out}, or choose "
                         f"another --out")
    return config, rows


def with_short_warmup(values, given):
    """TrainConfig's `values`; a warmup that nobody asked for is cut to what the phase has room for. The run's
    first lines tell how long it is.
    """
    room = values["num_steps"] - round(values["warmdown_ratio"] * values["num_steps"])
    return values | {"warmup_steps": given.get("warmup_steps", min(room, values["warmup_steps"]))}


def new_config(given):
    preset = given.get("preset", "tiny")
    shape = asdict(PRESETS[preset])
    shape["stage_layers"] = ",".join(map(str, shape["stage_layers"]))
    if given.get("objective") == "bp":
        shape["stage_layers"] = str(given.get("n_layer", shape["n_layer"]))
    values = {**shape, **RECIPES[preset]._asdict(), "out": f"runs/{preset}", **given}
    return TrainConfig(**with_short_warmup(values, given)), [{"anchor_step": 0, "anchor_sample": 0}]


def resumed_config(given):
    out = Path(given["resume"])
    if not (out / "config.json").exists() or (out / "manifest.json").exists():
        raise ValueError(f"--resume {out} is not a run, a folder with config.json and step-XXXXX in it; "
                         f"give one, or start one with --out")
    fixed = (*SHAPE_FLAGS, "total_batch_tokens", "continue_from", "reset_optimizer", "out")
    refuse(given, fixed, f"--resume {out}, which has its own")
    record = read_record(out)
    return TrainConfig(**{**record["train"], **given, "out": str(out)}), record["phases"]


def continued_config(given):
    parent = Path(given["continue_from"])
    if not (parent / "manifest.json").exists():
        raise ValueError(f"--continue-from {parent} is not a checkpoint; give a RUN/step-XXXXX")
    refuse(given, SHAPE_FLAGS, f"--continue-from {parent}, which has its own")
    if "out" not in given:
        raise ValueError(f"--continue-from {parent} needs --out, a folder for the new run")
    record = read_record(parent)
    state = read_json(parent / "state.json")
    # found from anywhere by a resume
    given = given | {"continue_from": str(parent.resolve())}
    values = {**record["train"], "reset_optimizer": False, **given}
    config = TrainConfig(**with_short_warmup(values, given))
    row = {"anchor_step": state["step"], "anchor_sample": state["sample"]}
    if "data" not in given:
        row["mix_sha256"] = record["phases"][-1]["mix_sha256"]
    return config, [*record["phases"], row]


def refuse(given, names, beside):
    """Raise ValueError where one of these flags is given."""
    found = [spelled(name) for name in names if name in given]
    if found:
        raise ValueError(f"{', '.join(found)} cannot be given with {beside}")


# --------------------------------------------------------------------------------------------------
# Phases. config.json's "phases" is the phase table: a row for each phase of the run, the last being trained,
# with the step and the sample at which it starts, its batch, data ("mix", "mix_sha256"), schedule (the fields
# of schedule.Phase) and the card's rates.

def phase_row(config, row, data):
    """Complete a row that holds only its anchors, or redo one whose schedule the flags of a resume change."""
    names = (*SCHEDULE_FLAGS, "reset_optimizer", "matrix_lr", "embedding_lr", "unembedding_lr")
    return {"anchor_step": row["anchor_step"], "anchor_sample": row["anchor_sample"], "batch": config.batch,
            "mix": config.data, "mix_sha256": data.sha256 if data else None,
            **{name: getattr(config, name) for name in names}}


def samples_of_earlier_phases(rows):
    """Samples already taken from the last phase's mix by earlier phases, where its stream resumes."""
    return sum(after["anchor_sample"] - row["anchor_sample"] for row, after in zip(rows, rows[1:])
               if row["mix_sha256"] == rows[-1]["mix_sha256"])


def shows_rewarming(rows, step):
    """Whether to validate here to show what re-warming costs: 0, 1, 2, 4, ... 1,024 steps into a phase."""
    rel = step - rows[-1]["anchor_step"]
    return len(rows) > 1 and rel <= 1024 and rel & (rel - 1) == 0


def is_due(step, every):
    return step > 0 and every > 0 and step % every == 0


# --------------------------------------------------------------------------------------------------
# Setup

def say(ranks, text):
    """Print on rank 0; where that fails (Ctrl-C ends a `| tee` too, a disk is full), go on without."""
    if ranks.rank == 0:
        try:
            print(text, flush=True)
        except OSError:
            discard_stdout()


def optimizer_groups(model, config):
    """Every parameter's optimizer and peak rate. AdamW's values are nanochat's for the same kinds."""
    params = {}
    for name, p in model.named_parameters():
        kind = parameter_group(name)
        if kind == "scalars":
            kind = name.split(".")[-1]
        params.setdefault(kind, {})[name] = p
    groups = [dict(kind="muon", params=params["matrices"], lr=config.matrix_lr,
                   weight_decay=config.weight_decay, momentum=0.95)]
    for kind, lr, betas, weight_decay in (
            ("heads", config.unembedding_lr, (0.8, 0.96), 0.01),
            ("wte", config.embedding_lr, (0.8, 0.995), 0.001),
            ("value_embeds", config.embedding_lr / 2, (0.8, 0.995), 0.01),
            ("gates", config.scalar_lr / 50, (0.8, 0.95), 0.0),
            ("resid_lambda", config.scalar_lr / 100, (0.8, 0.95), 0.0),
            ("x0_lambda", config.scalar_lr, (0.96, 0.95), 0.0)):
        groups.append(dict(kind="adamw", params=params[kind], lr=lr, betas=betas, eps=1e-10,
                           weight_decay=weight_decay))
    for group in groups:
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    grouped = sorted(name for group in groups for name in group["params"])
    assert grouped == sorted(dict(model.named_parameters())), "the groups must partition the parameters"
    return groups


def build_model(config, model_config, device, dtype):
    """The model with its initial weights, float32 (float64 where everything is)."""
    with torch.device(device):
        model = PoE(model_config, dtype)
    if dtype == torch.float64:
        model.double()
    model.init_weights(config.seed)
    model.fp8 = config.fp8
    return model


def check_fp8(config, device):
    """Raise ValueError where a GPU cannot multiply this model in 8 bits; a CPU emulates it."""
    sizes = (config.n_embd, config.mlp_hidden, config.device_batch_size * config.sequence_len)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    if old or any(size % 16 for size in sizes):
        raise ValueError(f"--fp8 needs a GPU from an H100 (compute capability 9.0) on, or a CPU, which is "
                         f"{device_name(device)}, and multiples of 16 as --n-embd, --mlp-hidden and tokens "
                         f"of a micro-batch, which are {sizes}; --no-fp8 trains without")


def open_training_data(config, rows, ranks):
    """Open the data and complete the phase table's last row.

    Returns (data, training mix, stream start: what to add to the sample cursor to find this phase's samples
    in the mix).
    """
    with ranks.together():
        n_micro_batches = config.batch // config.device_batch_size
        if ranks.world_size > n_micro_batches:
            raise ValueError(f"a step's {n_micro_batches} micro-batches leave some of {ranks.world_size} "
                             f"ranks without work; lower --device-batch-size or start fewer ranks")
        data = open_data(config.data, config.vocab_size)
        if rows[-1].get("mix_sha256", data.sha256) != data.sha256:
            raise ValueError(f"{data.path or 'the embedded sample'} is not the data that was trained on; "
                             f"give that with --data, or other data on purpose with --continue-from and "
                             f"--data")
        rows[-1] = phase_row(config, rows[-1], data)
        train_mix = data.train(config.sequence_len, config.seed)
    return data, train_mix, samples_of_earlier_phases(rows) - rows[-1]["anchor_sample"]


def validation_slices(data, rows, config, ranks):
    """[(log kind, data path, mix, windows)] to validate on: the present data, then earlier phases'."""
    def open_slice(kind, data):
        mix = data.val(config.sequence_len)
        return kind, data.path, mix, validation_windows(mix, config.eval_tokens, "--eval-tokens")

    with ranks.together():
        slices = [open_slice("val", data)]
        if ranks.world_size > slices[0][3]:
            raise ValueError(f"--eval-tokens {config.eval_tokens} are {slices[0][3]} windows for "
                             f"{ranks.world_size} ranks; raise it or start fewer ranks")
    # of data that moved, the path that was named last
    earlier_mixes = {row["mix_sha256"]: row["mix"] for row in rows}
    del earlier_mixes[data.sha256]
    for sha256, path in earlier_mixes.items():
        try:
            with ranks.together():
                earlier = open_data(path, config.vocab_size)
                if earlier.sha256 != sha256:
                    raise ValueError(f"{path or 'the embedded sample'} is not the data that it was")
                earlier_slice = open_slice("val_old", earlier)
        except (ValueError, OSError) as e:
            say(ranks, f"the validation slice of the earlier data is left out: {e}")
        else:
            slices.append(earlier_slice)
    return slices


def open_folder(config, record):
    """Make the run's folder, beginning with the checkpoint that it continues; return what holds its lock."""
    out = Path(config.out)
    parent = Path(config.continue_from)
    # not again on --resume, whose config names the parent too
    places_seed = config.continue_from and not checkpoint_steps(out)
    if places_seed:
        if read_json(parent / "config.json")["tokenizer"]["sha256"] != record["tokenizer"]["sha256"]:
            raise ValueError(f"{config.data or 'the embedded sample'} was tokenised with another tokenizer "
                             f"than {parent} was trained with")
        files = verify_checkpoint(parent)
        if not config.reset_optimizer and "optim/rank-00000.pt" not in files:
            raise ValueError(f"{parent} holds no optimizer state (see --keep-optim): choose another "
                             f"checkpoint, or --reset-optimizer")
    held = lock(out)
    for leftover in out.glob(".tmp-step-*"):
        shutil.rmtree(leftover)
    if places_seed:
        # the config first: a run that is killed between the two can --resume, and places it then
        write_json(out / "config.json", record)
        place_seed(parent, files, out)
    return held


def keep_history(newest, step, config, phase):
    """Raise ValueError where a resume's flags would change a rate, or the weight decay, of a step that the
    phase has trained, or of its next one.

    So no rate jumps, and the phase table states what was used.
    """
    record = read_json(newest / "config.json")
    before = phase_of(record["phases"][-1])
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay"):
        factor = weight_decay_factor if name == "weight_decay" else learning_rate
        for at in range(phase.anchor, step + 1):
            old = record["train"][name] * factor(before, at)
            new = getattr(config, name) * factor(phase, at)
            if old != new:
                raise ValueError(f"--resume {config.out} would change the schedule of steps already trained: "
                                 f"the {name} of step {at} from {old:.4g} to {new:.4g}; for other rates or "
                                 f"more steps open a new phase: --continue-from {newest}")


def restore_newest(config, phase, ranks, model, optimizer):
    """Load the run's newest whole checkpoint, where it has one. Returns its state.json, or that of step 0."""
    reset_at = phase.anchor if config.reset_optimizer else None
    newest = newest_whole(Path(config.out), ranks, reset_at)
    if newest is None:
        return {"step": 0, "sample": 0, "train_time": 0.0}
    state = read_json(newest / "state.json")
    say(ranks, f"{'resuming' if state['step'] > phase.anchor else 'a new phase from'} {newest}")
    with ranks.together():
        if state["step"] > phase.end:
            raise ValueError(f"{newest} is past the run's end, step {phase.end}; raise --num-steps")
        if state["step"] > phase.anchor:
            keep_history(newest, state["step"], config, phase)
        restore(newest, model, None if state["step"] == reset_at else optimizer)
    return state


def catch_signals(ranks):
    """Return a list that SIGINT and SIGTERM are added to; without torchrun a second Ctrl-C stops at once."""
    caught = []

    def on_signal(number, frame):
        caught.append(number)
        if ranks.rank == 0:
            # not by print, which must not be entered twice
            with suppress(OSError):
                os.write(2, b"saving at the next step boundary\n")
        if number == signal.SIGINT and ranks.world_size == 1:
            signal.signal(number, signal.default_int_handler)
        if "torch._inductor.config" in sys.modules:
            # Inductor's workers may have died of the same signal, and the next compilation would wait for
            # them for ever (pytorch #189290)
            sys.modules["torch._inductor.config"].compile_threads = 1
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return caught


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"


def git_commit():
    """The commit of this code, or "unknown" where it is no git checkout of its own."""
    if not shutil.which("git"):
        return "unknown"
    here = Path(__file__).resolve().parent
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    found = subprocess.run(command, cwd=here, capture_output=True, text=True)
    top, _, commit = found.stdout.strip().partition("\n")
    # not of another repository that this code was copied into
    return commit if found.returncode == 0 and Path(top) == here else "unknown"


# --------------------------------------------------------------------------------------------------
# --dry-run: what a run would be

def memory_estimate(model_config, config, world_size):
    """Estimated bytes per rank in training, by kind; optimizer state as if dealt out evenly."""
    params = count_parameters(model_config)
    layers = max(model_config.stage_layers) if model_config.objective == "poe" else model_config.n_layer
    kv_dim = model_config.n_kv_head * model_config.head_dim
    # a compiled block keeps 2 MLP-wide tensors a token in bfloat16 (with --fp8 one of 8 bits), 6 stream-wide
    # and 6 KV-wide ones (d12 on an H100: 16.7 GiB estimated in all, 16.9 measured)
    mlp_bytes = 1 if config.fp8 else 4
    kept = mlp_bytes * model_config.mlp_hidden + 2 * 6 * (model_config.n_embd + kv_dim)
    tokens = config.device_batch_size * config.sequence_len
    logits = min(tokens * model_config.vocab_size, LOSS_CHUNK_LOGITS["cuda"])
    heads = model_config.n_stage * model_config.vocab_size * model_config.n_embd
    weights = 4 * sum(params.values())
    # Muon keeps one float32 number a weight, AdamW two
    return {"parameters": weights, "gradients": weights, "casts": 2 * (params["matrices"] + heads),
            "optimizer_state": (2 * weights - 4 * params["matrices"]) // world_size,
            "activations": layers * tokens * kept, "loss": 6 * logits}


def dry_run(config, rows, world_size):
    """Print what a run would be; the last line is a JSON object."""
    model_config = config.model_config()
    rows = rows[:-1] + [phase_row(config, rows[-1], None)]
    params = count_parameters(model_config)
    memory = memory_estimate(model_config, config, world_size)
    plan = {"preset": config.preset, "model": asdict(model_config), "params": params,
            "params_total": sum(params.values()), "flops_per_token": flops_per_token(model_config),
            "num_steps": config.num_steps, "total_batch_tokens": config.total_batch_tokens,
            "tokens": config.num_steps * config.total_batch_tokens, "phases": rows,
            "memory_per_rank_bytes": memory, "memory_per_rank_bytes_total": sum(memory.values()),
            "world_size": world_size}
    for kind, n in memory.items():
        print(f"{kind:<16}{n / 2**30:>8.1f} GiB on each of {world_size} ranks, estimated")
    for row in rows:
        print(phase_of(row))
    print(f"{plan['params_total']:,} parameters, {plan['tokens']:,} tokens, "
          f"{plan['flops_per_token'] / 1e9:.2f} G FLOPs a token, {sum(memory.values()) / 2**30:.1f} GiB")
    print(json.dumps(plan))


@dataclass
class Training:
    """What a run works with; `prepare` makes it."""
    config: TrainConfig
    rows: list                  # the phase table
    phase: Phase                # the one to train
    ranks: Ranks
    tokenizer: Tokenizer
    slices: list                # what to validate on, see `validation_slices`
    model: PoE
    groups: list                # of the optimizer
    optimizer: MuonAdamW
    loader: Loader
    log: RunLog
    record: dict                # config.json
    lock: object                # holds RUN while it is open
    peak_flops: float           # operations a second of all ranks' GPUs by data sheet; 0: unknown
    printed: float = -math.inf  # when a step was printed last, seconds


def prepare(config, rows, ranks):
    """Open data and folder, build or restore model and optimizer: (Training, state as in state.json).

    The first is None where the run is complete.
    """
    model_config = config.model_config()
    with ranks.together():
        device, dtype = choose_device(config.device, config.dtype, ranks)
        if config.fp8:
            check_fp8(config, device)
    compiling = device.type == "cuda" if config.compile is None else config.compile
    data, train_mix, stream_start = open_training_data(config, rows, ranks)
    slices = validation_slices(data, rows, config, ranks)
    model = build_model(config, model_config, device, dtype)
    groups = optimizer_groups(model, config)
    optimizer = MuonAdamW(groups, ranks.rank, ranks.world_size, compiling)
    tokenizer = data.tokenizer
    record = {"format": 1, "model": asdict(model_config), "train": asdict(config) | {"resume": ""},
              "tokenizer": {"vocab_size": tokenizer.vocab_size, "bos": tokenizer.bos,
                            "sha256": tokenizer.sha256},
              "phases": rows}
    record = recorded_in(config.out, record)
    with ranks.together():
        held = open_folder(config, record) if ranks.rank == 0 else None
    phase = phase_of(rows[-1])
    state = restore_newest(config, phase, ranks, model, optimizer)
    if state["step"] == phase.end:
        # nothing to train, so nothing to record
        return None, state
    with ranks.together():
        if ranks.rank == 0:
            write_json(Path(config.out) / "config.json", record)
        log = RunLog(Path(config.out) / "log.jsonl", state["step"], ranks.rank)
    model.cast_weights()
    if compiling:
        model.compile_regions()
    log.validated = ranks.gather(log.validated)[0]
    first = state["sample"] + stream_start
    loader = Loader(train_mix, first, config.batch, config.device_batch_size, device, ranks.rank,
                    ranks.world_size)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in device_name(device)), 0)
    training = Training(config, rows, phase, ranks, tokenizer, slices, model, groups, optimizer,
                        loader, log, record, held, ranks.world_size * peak)
    write_header(training, state["step"])
    return training, state


def write_header(training, step):
    """Log what this run is: config, phases, code, machine; print it in two lines."""
    config = training.config
    model = training.model
    name = device_name(training.loader.device)
    header = {"config": training.record["train"], "phases": training.record["phases"], "commit": git_commit(),
              "torch": torch.__version__, "world_size": training.ranks.world_size, "device": name}
    training.log.write("header", step, **header)
    n_parameters = sum(count_parameters(model.config).values())
    say(training.ranks, f"{config.out}: {config.objective}, {n_parameters:,} parameters in stages of "
                        f"{config.stage_layers} layers, on {training.ranks.world_size} x {name}\n"
                        f"from step {step:,}: {training.phase}, {config.total_batch_tokens:,} tokens a step; "
                        f"train_loss is the mean over stages, nats a token")


# --------------------------------------------------------------------------------------------------
# What the loop does: validate, save, accumulate and check, set rates, step (muon.py), log

def validate(training, state):
    """Score the validation windows of every slice, log and print; return the metrics of the first slice."""
    config = training.config
    ranks = training.ranks
    log = training.log
    step = state["step"]
    found = []
    for kind, path, mix, n_windows in training.slices:
        sums = score(training.model, mix, n_windows, training.tokenizer, config.device_batch_size, ranks.rank,
                     ranks.world_size)
        metrics = summarize(sums)
        bpb = metrics["bpb"]
        if not math.isfinite(bpb["full"]):
            raise SharedError(f"the validation loss is not finite at step {step}: nothing was saved; begin "
                              f"again with lower rates, or --continue-from the last checkpoint")
        if step not in log.validated:
            log.write(kind, step, mix=path, train_time=state["train_time"], **metrics)
        loss = bpb["full"] * math.log(2) * metrics["bytes"] / metrics["tokens"]
        say(ranks, f"step:{step:05d}/{training.phase.end:05d} "
                   f"{kind}_loss:{loss:.4f} {kind}_bpb:{bpb['full']:.4f} "
                   f"single_bpb:{','.join(f'{value:.4f}' for value in bpb['single'])} "
                   f"train_time:{state['train_time']:.1f}s")
        found.append(metrics)
    return found[0]


def save(training, state):
    """Save a checkpoint, and delete the optimizer state of those that no longer keep theirs."""
    out = Path(training.config.out)
    training.log.sync()
    path = save_checkpoint(out, training.ranks, training.model, training.optimizer, training.record, state,
                           training.tokenizer)
    say(training.ranks, f"saved {path}")
    with training.ranks.together():
        if training.ranks.rank == 0:
            phase_ends = {row["anchor_step"] for row in training.rows} | {training.phase.end}
            drop_optimizer_state(out, state["step"], training.config.keep_optim, phase_ends)


def accumulate(training):
    """Forward and backward of this rank's micro-batches of a step.

    In the last one, a stage's gradients start on their way to their owners while the next stage runs.
    Returns (losses, grad_max) by stage, floats: this rank's share of the mean loss in nats, its largest
    gradient entry.
    """
    model = training.model
    optimizer = training.optimizer
    loader = training.loader
    losses = torch.zeros(model.config.n_stage, device=loader.device, dtype=model.lm_head.weight.dtype)
    grad_max = torch.zeros_like(losses)
    for micro_step in range(loader.n_micro):
        inputs, targets = next(loader)
        last = micro_step == loader.n_micro - 1
        for k, loss in model.backward_by_stage(inputs, targets, 1 / training.config.total_batch_tokens, last):
            losses[k] += loss
            if last:
                names = model.names_of_stage(k)
                grad_max[k] = get_total_norm([optimizer.params[name].grad for name in names], math.inf)
                optimizer.start_reduce(names)
    # the one host sync of forward and backward
    return losses.tolist(), grad_max.tolist()


def check_finite(step, saved, gathered):
    """Raise SharedError where a loss or gradient is not finite. gathered: of each rank, see `main`."""
    for rank, (losses, grad_maxima, _) in enumerate(gathered):
        for stage, (loss, grad_max) in enumerate(zip(losses, grad_maxima)):
            if not math.isfinite(loss + grad_max):
                raise SharedError(f"the loss ({loss}) or the largest gradient ({grad_max}) of stage {stage} "
                                  f"on rank {rank} is not finite at step {step}: stopped before the update; "
                                  f"the last checkpoint is of step {saved}; begin again with lower rates, "
                                  f"or --continue-from it")


def set_rates(training, step):
    """Set every group's rate, weight decay and momentum for the update step -> step + 1. Returns lrm."""
    # where the momentum buffers were last zero
    ramp_start = max(row["anchor_step"] for row in training.rows if row is training.rows[0]
                     or row["reset_optimizer"])
    lrm = learning_rate(training.phase, step)
    for group in training.groups:
        group["lr"] = group["initial_lr"] * lrm
        group["weight_decay"] = group["initial_weight_decay"] * weight_decay_factor(training.phase, step)
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(training.phase, step, ramp_start)
    return lrm


def log_step(training, state, losses, lrm, seconds, fwdbwd):
    """Log the step that led to `state`; print it where the last line is two seconds old.

    losses: of all ranks, by stage, nats. seconds: of the step; fwdbwd: of its forward and backward.
    """
    phase = training.phase
    step = state["step"] - 1
    train_loss = sum(losses) / len(losses)
    training.log.write("step", step, train_loss=train_loss, losses=losses, lrm=lrm, dt=seconds, fwdbwd=fwdbwd,
                       train_time=state["train_time"])
    if time.monotonic() - training.printed > 2 or step + 1 == phase.end:
        training.printed = time.monotonic()
        tokens_per_s = training.config.total_batch_tokens / seconds
        rate = tokens_per_s * flops_per_token(training.model.config)
        mfu = f"mfu:{rate / training.peak_flops:.3f} " if training.peak_flops else ""
        eta = seconds * (phase.end - step - 1)
        say(training.ranks, f"step:{step:05d}/{phase.end:05d} phase:{len(training.rows)} "
                            f"train_loss:{train_loss:.4f} lrm:{lrm:.3f} dt:{seconds * 1000:.1f}ms "
                            f"tok_per_sec:{tokens_per_s:.0f} {mfu}"
                            f"train_time:{state['train_time']:.1f}s eta:{eta / 60:.1f}m")


def print_results(training, state, metrics, started):
    """Print what a run has learnt: samples, bpb beside that of compressors; the last line is JSON."""
    model = training.model
    tokenizer = training.tokenizer
    # a very short context has no room for the prompts
    if model.config.sequence_len >= 64:
        sampling = Sampling(temperature=0.8, top_k=50, seed=training.config.seed)
        plan = Plan(range(model.config.n_stage))
        with decoding_threads(model):
            for sample in complete(model, tokenizer, list(SAMPLE_PROMPTS), None, plan, sampling):
                print(f"sample: {sample['prompt'] + sample['completion']!r}")
    by_gzip = by_xz = None
    if metrics["bytes"] <= COMPRESSORS_UP_TO:
        _, _, mix, n_windows = training.slices[0]
        text, _ = slice_text(mix, n_windows, tokenizer)
        by_gzip = 8 * len(gzip.compress(text)) / len(text)
        by_xz = 8 * len(lzma.compress(text)) / len(text)
        print(f"bits per byte of the validation text: model {metrics['bpb']['full']:.4f}, "
              f"gzip {by_gzip:.4f}, xz {by_xz:.4f}")
    print(json.dumps({
        "bpb": metrics["bpb"], "bpb_gzip": by_gzip, "bpb_xz": by_xz,
        "seconds": round(time.monotonic() - started, 1), "train_seconds": round(state["train_time"], 1),
        "step": state["step"], "checkpoint": str(checkpoint_steps(training.config.out)[-1]),
        "params_total": sum(count_parameters(model.config).values()),
        "flops_per_token": flops_per_token(model.config), "val_bytes": metrics["bytes"],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() or None}))


# --------------------------------------------------------------------------------------------------
# Main

def main(argv=None):
    started = time.monotonic()
    given = parse_flags(TrainConfig, __doc__, argv)
    ranks = Ranks()
    with ranks.together():
        config, rows = resolve_config(given, ranks.restarted)
        # raises where the shape is impossible
        config.model_config()
    if config.dry_run:
        if ranks.rank == 0:
            dry_run(config, rows, ranks.world_size)
        ranks.close()
        return
    caught = catch_signals(ranks)
    training, state = prepare(config, rows, ranks)
    if training is None:
        say(ranks, f"{config.out} is already complete at step {state['step']}; measure it with evaluate.py, "
                   f"or train on in a new phase with --continue-from")
        ranks.close()
        return
    stopping = False
    saved = state["step"] or None

    with attention_backends(training.loader.device):
        while True:
            # step-S is the state after S updates: validate and save before the next
            step = state["step"]
            last = step == training.phase.end
            save_due = last or stopping or is_due(step, config.save_every)
            eval_due = save_due or is_due(step, config.eval_every) or shows_rewarming(rows, step)
            # not again what is in the log of a resumed run; a run that was told to stop saves without delay
            if last or (eval_due and not stopping and step not in training.log.validated):
                metrics = validate(training, state)
            if save_due and step != saved:
                save(training, state)
                saved = step
            if last or stopping:
                break

            # one optimizer step
            start = time.monotonic()
            losses, grad_max = accumulate(training)
            fwdbwd = time.monotonic() - start
            gathered = ranks.gather((losses, grad_max, bool(caught)))
            check_finite(step, saved, gathered)
            losses = [sum(of_stage) for of_stage in zip(*(of_rank for of_rank, _, _ in gathered))]
            stopping = any(told for _, _, told in gathered)
            lrm = set_rates(training, step)
            # frees the gradients too
            training.optimizer.step()
            training.model.cast_weights()
            if training.loader.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            state = {"step": step + 1, "sample": state["sample"] + config.batch,
                     "train_time": state["train_time"] + seconds}
            log_step(training, state, losses, lrm, seconds, fwdbwd)

    training.loader.close()
    if stopping and not last:
        say(ranks, f"stopped at step {step}; go on with --resume {config.out}")
    elif ranks.rank == 0:
        # the short texts of the samples are not worth compiling for
        stance = torch.compiler.set_stance("force_eager") if training.optimizer.compile else nullcontext()
        with attention_backends(training.loader.device), stance:
            print_results(training, state, metrics, started)
    if training.lock:
        training.lock.close()
    # the other ranks wait for what rank 0 prints
    ranks.gather(None)
    ranks.close()


if __name__ == "__main__":
    run(main)
    # nothing is left to stop, and an interrupted interpreter's end prints tracebacks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
