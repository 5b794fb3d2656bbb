"""
Benchmarks: what a training step costs, and how fast decoding is. Nothing here decides a test.

    python bench.py train                               # the 3b shape: a step of each variant
    python bench.py train --variants poe,poe:8,bp,bp:8  # micro-batches of 4 (--device-batch-size) and of 8
    NANOCHAT_DIR=../nanochat python bench.py train --variants poe,bp,naive,nanochat
    python bench.py decode runs/tiny                    # every mode that this checkpoint can decode in
    python bench.py decode --preset 3b                  # random weights: what does not depend on acceptance

Whatever is compared is measured in one process, in rounds that take every variant in turn. A figure is the
median of the rounds; a ratio is the median of the rounds' ratios. The columns of the tables are keys of the
JSON in the last line.
"""
import gc
import json
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from checkpoint import BOUNDS_KEY, load_checkpoint, read_json, resolve_checkpoint
from common import DeviceFlags, choose_device, flag, parse_command, run
from dataloader import Tokenizer
from model import PRESETS, Linear, PoE, attention_backends, flops_per_token, norm, softcap, stage_bytes
from muon import MuonAdamW
from report import markdown
from sample import (
    Engine,
    Plan,
    clock,
    count_new_tokens,
    decode_timed,
    decoding_threads,
    kernels_fit,
    make_plan,
)
from train import PEAK_FLOPS, RECIPES, device_name, optimizer_groups

# --------------------------------------------------------------------------------------------------
# What both commands need

@dataclass(frozen=True)
class Bench(DeviceFlags):
    """Flags of both commands."""
    bench_repeats: int = flag(5, "timed rounds", low=1)


def fill_zeros(model):
    """Give the matrices that begin as zeros (output projections, stages' heads) random values.

    A GPU at its power limit multiplies zeros faster, and after its first steps training has none.
    """
    for p in model.parameters():
        if p.ndim == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.02)


def random_model(preset, device, dtype):
    """A model of a preset's shape with random weights, every matrix of the order of a trained one's."""
    torch.manual_seed(0)
    with torch.device(device):
        model = PoE(PRESETS[preset], dtype)
    model.init_weights(0)
    fill_zeros(model)
    return model


def in_rounds(measures, n_rounds):
    """Call functions {name: function} in turn, round by round: {name: [what it returned in each round]}.

    A first round, in which kernels are compiled and captured, does not count. What runs out of memory is left
    out, with a line on stderr.
    """
    results = {name: [] for name in measures}
    for number in range(n_rounds + 1):
        for name in list(results):
            try:
                results[name].append(measures[name]())
            except torch.OutOfMemoryError:
                print(f"{name} is left out: it runs out of memory", file=sys.stderr)
                del results[name]
        print(f"round {number} of {n_rounds}", file=sys.stderr)
    return {name: values[1:] for name, values in results.items()}


def spread(key, values):
    """Median, minimum and maximum of the rounds' values."""
    return {key: median(values), f"{key}_min": min(values), f"{key}_max": max(values)}


def print_result(rows, config, device, dtype, **more):
    """Print rows as a table with the rows' keys as columns, then all that is known as one line of JSON."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = []
    for row in rows:
        values = [row.get(key, "") for key in keys]
        cells.append([f"{value:.6g}" if isinstance(value, float) else str(value) for value in values])
    print(markdown(keys, cells))
    print(json.dumps({**vars(config), "device": device_name(device), "dtype": str(dtype), **more}))


# --------------------------------------------------------------------------------------------------
# Training: the variants

@dataclass(frozen=True)
class TrainBench(Bench):
    preset: str = flag("3b", "shape of the model", choices=tuple(PRESETS))
    variants: str = flag("poe,bp,naive", "which of poe, bp, naive and nanochat, in this order; poe-fp8 and "
                         "nanochat-fp8 multiply in 8 bits, poe:8 takes micro-batches of 8 sequences, "
                         "nanochat the checkout in $NANOCHAT_DIR")
    total_batch_tokens: int = flag(65536, "tokens of an optimizer step", low=1)
    device_batch_size: int = flag(4, "sequences in a forward and backward pass", low=1)
    compile: bool = flag(None, "compile (default: on cuda)")


def parse_variants(config):
    """{label: (variant's name, sequences in a micro-batch)} of --variants. Raises ValueError."""
    found = {}
    for label in config.variants.split(","):
        if not re.fullmatch(r"((poe|nanochat)(-fp8)?|bp|naive)(:[1-9]\d*)?", label):
            raise ValueError(f"--variants has {label!r}; choose from poe, bp, naive, nanochat, poe-fp8, "
                             f"nanochat-fp8, or poe:8")
        name, _, n_rows = label.partition(":")
        n_rows = int(n_rows or config.device_batch_size)
        tokens = n_rows * PRESETS[config.preset].sequence_len
        if config.total_batch_tokens % tokens:
            raise ValueError(f"--total-batch-tokens {config.total_batch_tokens} is no multiple of "
                             f"{tokens}, a micro-batch of {label}")
        found[label] = (name, n_rows)
    return found


# A way to train. step(model, batches, scale): casts of weights, then forward and backward of micro-batches
# (idx, targets), int64 (B, T), with the loss times scale. flops: of a token, forward and backward.
Variant = namedtuple("Variant", "model step flops make_optimizer")


def real_step(model, batches, scale, fp8=False):
    """Forward and backward as train.py makes them."""
    model.fp8 = fp8
    model.cast_weights()
    for number, (idx, targets) in enumerate(batches):
        for _ in model.backward_by_stage(idx, targets, scale, number == len(batches) - 1):
            pass


def naive_step(model, batches, scale):
    """The same gradients the obvious way: two matmuls a head, all logits, one backward over all stages, and
    weights cast in every micro-batch. `free_memory` has let go the casts of other variants.
    """
    for idx, targets in batches:
        x = x0 = model.embed(idx)
        nats = 0.0
        for k, own_head in enumerate(model.lm_head_stages):
            x = model.stage(k, x, x0, idx)
            logits = softcap(model.lm_head(norm(x)) + own_head(norm(x)))    # (B, T, V)
            nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            x = x.detach()
            x0 = x0.detach()
        (nats * scale).backward()


def nanochat_step(model, batches, scale):
    """Forward and backward of nanochat's model, whose loss is the mean over a micro-batch."""
    for idx, targets in batches:
        (model(idx, targets) / len(batches)).backward()


def backprop_twin(model):
    """The model trained by one loss at the top, around the same weights."""
    config = replace(model.config, objective="bp", stage_layers=(model.config.n_layer,))
    with torch.device("meta"):
        twin = PoE(config, model.compute_dtype)
    for name in ("wte", "blocks", "lm_head", "cos", "sin", "chunk_loss"):
        setattr(twin, name, getattr(model, name))
    return twin


def nanochat_variant(config, device, compile, fp8):
    """nanochat's model at this shape: full windows, n_kv_head and MLP width as ours, PyTorch's attention.

    Its smear, backout, value embeddings and scalars stay as they are; it casts its weights at every forward
    and holds all logits.
    """
    folder = os.environ.get("NANOCHAT_DIR", "")
    if not Path(folder, "nanochat", "gpt.py").exists():
        raise ValueError(f"--variants nanochat needs a checkout of nanochat; NANOCHAT_DIR={folder} is none")
    sys.path.insert(0, folder)
    from nanochat import flash_attention, gpt
    flash_attention._override_impl = "sdpa"
    flash_attention.USE_FA3 = False
    names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    shape = {name: getattr(config, name) for name in names}
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**shape, window_pattern="L"))
        for block in model.transformer.h:
            # its own width is 4 n_embd
            block.mlp.c_fc = gpt.Linear(config.n_embd, config.mlp_hidden, bias=False)
            block.mlp.c_proj = gpt.Linear(config.mlp_hidden, config.n_embd, bias=False)
    model.to_empty(device=device)
    model.init_weights()
    fill_zeros(model)
    if fp8:
        from nanochat.fp8 import convert_to_float8_training
        # as its base_train.py: all but the gates
        convert_to_float8_training(model, module_filter_fn=lambda m, _: min(m.weight.shape) >= 128)
    if compile:
        model.compile(dynamic=False)
    return Variant(model, nanochat_step, model.estimate_flops(), model.setup_optimizer)


def build_variants(config, device, dtype, compile):
    """{name: Variant}; poe, bp, naive and poe-fp8 share one set of weights."""
    model = random_model(config.preset, device, dtype)
    if compile:
        model.compile_regions()

    def ours(model, step):
        groups = optimizer_groups(model, RECIPES[config.preset])
        make_optimizer = partial(MuonAdamW, groups, compile=compile)
        return Variant(model, step, flops_per_token(model.config), make_optimizer)

    variants = {"poe": ours(model, real_step), "bp": ours(backprop_twin(model), real_step),
                "naive": ours(model, naive_step), "poe-fp8": ours(model, partial(real_step, fp8=True))}
    for name in set(re.findall("nanochat(?:-fp8)?", config.variants)):
        variants[name] = nanochat_variant(model.config, device, compile, name == "nanochat-fp8")
    return variants


# --------------------------------------------------------------------------------------------------
# Training: measuring

def free_memory(variants):
    """Let gradients and casts go, and what the allocator keeps of them."""
    for variant in variants.values():
        variant.model.zero_grad()
        variant.model.merged_heads = None
        for module in variant.model.modules():
            if isinstance(module, Linear):
                module.cast = None
    gc.collect()
    torch.cuda.empty_cache()


def time_step(variant, batches, scale, device):
    """Time one step: (seconds, {"activation_bytes", "peak_bytes"}); bytes are 0 on a CPU.

    activation_bytes: the most that it allocates above weights, gradients and kept casts. A variant that casts
    in each pass keeps those casts for its backward, so there they count. peak_bytes: of all on the device.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = clock(device)
    # as an optimizer's step leaves it
    variant.model.zero_grad()
    variant.step(variant.model, batches, scale)
    seconds = clock(device) - start
    peak = torch.cuda.max_memory_allocated()
    return seconds, {"activation_bytes": peak - before, "peak_bytes": peak}


def time_steps(config, labels, variants, device):
    """{label: [(seconds, bytes) of each round]} of forward and backward. labels: of `parse_variants`."""
    shape = PRESETS[config.preset]
    size = (2, config.total_batch_tokens // shape.sequence_len, shape.sequence_len)
    inputs, targets = torch.randint(shape.vocab_size, size, device=device)
    scale = 1 / config.total_batch_tokens

    def measure(name, n_rows):
        batches = list(zip(inputs.split(n_rows), targets.split(n_rows)))
        free_memory(variants)
        # one micro-batch first, so that the step finds gradients and kernels
        time_step(variants[name], batches[:1], scale, device)
        return time_step(variants[name], batches, scale, device)

    measures = {label: partial(measure, *what) for label, what in labels.items()}
    with attention_backends(device):
        return in_rounds(measures, config.bench_repeats)


def time_optimizer(variant, repeats, device):
    """Milliseconds of a step of this variant's optimizer."""
    optimizer = variant.make_optimizer()
    times = []
    for _ in range(repeats + 2):
        for p in variant.model.parameters():
            p.grad = torch.randn_like(p).mul_(1e-3)
        start = clock(device)
        optimizer.step()
        times.append(1e3 * (clock(device) - start))
    # the first ones compile and make the state
    return median(times[2:])


def bench_train(**given):
    """Time the training step, variant beside variant, then the optimizers.

    poe: stage by stage. bp: one loss at the top. naive: poe the obvious way, by autograd through all logits,
    with every head's product made twice, one backward over all stages, and weights cast in every micro-batch.
    nanochat: its own model and optimizer at this shape. poe-fp8, nanochat-fp8: in 8 bits. Tokens/s and MFU
    are of forward and backward; MFU is of 989 TFLOP/s, an H100's or H200's rate in bfloat16, whatever the
    device and the type.
    """
    config = TrainBench(**given)
    labels = parse_variants(config)
    device, dtype = choose_device(config.device, config.dtype)
    compile = device.type == "cuda" if config.compile is None else config.compile
    variants = build_variants(config, device, dtype, compile)
    measured = time_steps(config, labels, variants, device)
    rows = []
    for label, rounds in measured.items():
        name, n_rows = labels[label]
        row = {"name": label, "device_batch_size": n_rows,
               **spread("fwdbwd_ms", [1e3 * seconds for seconds, _ in rounds])}
        if "bp" in measured:
            row["of_bp"] = median(ours / of_bp for (ours, _), (of_bp, _) in zip(rounds, measured["bp"]))
        free_memory(variants)
        row["optimizer_ms"] = time_optimizer(variants[name], config.bench_repeats, device)
        row["tokens_per_s"] = 1e3 * config.total_batch_tokens / row["fwdbwd_ms"]
        row["mfu"] = variants[name].flops * row["tokens_per_s"] / PEAK_FLOPS["H100"]
        rows.append(row | rounds[-1][1])
    print_result(rows, config, device, dtype, compile=compile, variants=rows)


# --------------------------------------------------------------------------------------------------
# Decoding: what is measured

PROMPTS = ("The sea was calm that morning, and the old man went down to the harbour because",
           "def read_lines(path):\n    \"\"\"Return the lines of a text file",
           "1, 2, 4, 8, 16, 32, 64, 128, 256,")
DRAFT_LENGTHS = (1, 2, 4, 8, 12, 16)


@dataclass(frozen=True)
class DecodeBench(Bench):
    preset: str = flag(None, "instead of a checkpoint: random weights in this shape", choices=tuple(PRESETS))
    max_new_tokens: int = flag(None, "tokens after each prompt (default: 256, as far as the context "
                                     "goes)", low=1)
    draft_weights: str = flag(None, "what stage 0 drafts by (default: int8 where kernels decode)",
                              choices=("int8", "same"))
    acceptance: float = flag(0.985, "share of drafts accepted, for tokens/s by the time of a "
                                    "cycle", low=0, high=1)


def mode_plans(model_config, calibration, draft_weights):
    """{name: Plan} of all that can be measured. calibration: a checkpoint's, for `make_plan`, or {}."""
    K = model_config.n_stage
    plans = {"full": Plan(range(K))}
    if K == 1:
        return plans
    plans["s0 alone"] = Plan(range(1))
    plans |= {f"speculative {m}": Plan(range(K), m, draft_weights) for m in DRAFT_LENGTHS}
    if calibration:
        calibrated = partial(make_plan, model_config, **calibration)
        plans["wand"] = calibrated("wand")
        plans["wand, margins"] = calibrated("wand", wand_margin=True)
        plans["routing"] = calibrated("routing")
    return plans


def time_cycle(engine, context):
    """Seconds of a cycle of the engine's plan after a context of ids, the mean of several in a row."""
    n_cycles = 1 + (engine.model.config.sequence_len - len(context)) // 128
    device = engine.tokens.device
    engine.begin([context])
    start = clock(device)
    for _ in range(n_cycles):
        engine.start(engine.cycle, engine.plan.draft_len + 1)
    return (clock(device) - start) / n_cycles


def decode_texts(engine, prompts, n_new):
    """Continue every prompt: (seconds of a token, share of drafts accepted)."""
    runs = [decode_timed(engine, prompt, n_new) for prompt in prompts]
    seconds = sum(one.seconds for one in runs) / sum(len(one.ids) for one in runs)
    accepted = sum(one.accepted for one in runs) / max(1, sum(one.judged for one in runs))
    return seconds, accepted


def bench_decode(checkpoint, **given):
    """Time greedy decoding of one row, mode beside mode: whole texts, and single cycles.

    Cycles follow a quarter of the context, 512 tokens for 3b. A cycle of m drafts gives (1 - p^(m+1)) / (1 -
    p) tokens where each draft is accepted with probability p, --acceptance. Random weights accept no drafts,
    so with --preset speculation is timed by its cycles alone. Early exit (wand, routing) is measured where
    evaluate.py has calibrated the checkpoint. gigabytes_per_s: of weights read.
    """
    config = DecodeBench(**given)
    if (checkpoint is None) == (config.preset is None):
        raise ValueError("give a checkpoint (a step-XXXXX folder or a run), or --preset for random weights")
    device, dtype = choose_device(config.device, config.dtype)
    calibration = {}
    if config.preset:
        model = random_model(config.preset, device, dtype).freeze_for_inference()
        tokenizer = Tokenizer.load(vocab_size=model.config.vocab_size)
    else:
        path = resolve_checkpoint(checkpoint)
        model, record, _ = load_checkpoint(path, device, dtype)
        tokenizer = Tokenizer.load(path)
        metrics = path / "metrics.json"
        if metrics.exists():
            calibration = {"bounds": record.get(BOUNDS_KEY), "metrics": read_json(metrics)}
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    n_new = count_new_tokens(model.config, prompts, config.max_new_tokens, default=256)
    context = [tokenizer.bos] * (model.config.sequence_len // 4)
    plans = mode_plans(model.config, calibration, config.draft_weights)
    text_measures = {}
    cycle_measures = {}
    for name, plan in plans.items():
        engine = Engine(model, plan, fast=kernels_fit(model))
        if not plan.exits:
            cycle_measures[name] = partial(time_cycle, engine, context)
        if not (config.preset and plan.draft_len):
            text_measures[name] = partial(decode_texts, engine, prompts, n_new)
    with attention_backends(device), decoding_threads(model):
        texts = in_rounds(text_measures, config.bench_repeats)
        cycles = in_rounds(cycle_measures, config.bench_repeats)
    rows = []
    for name, plan in plans.items():
        row = {"name": name}
        if name in texts:
            row |= spread("tokens_per_s", [1 / seconds for seconds, _ in texts[name]])
            row["speedup"] = median(full / ours for (full, _), (ours, _) in zip(texts["full"], texts[name]))
            if plan.draft_len:
                row["acceptance"] = texts[name][-1][1]
            elif not plan.exits:
                n_bytes = stage_bytes(model)[plan.experts[-1]]
                row["gigabytes_per_s"] = n_bytes * row["tokens_per_s"] / 1e9
        if name in cycles:
            cycle = median(cycles[name])
            n_tokens = sum(config.acceptance ** n for n in range(plan.draft_len + 1))
            row["cycle_ms"] = 1e3 * cycle
            row["tokens_per_s_at_acceptance"] = n_tokens / cycle
            row["speedup_at_acceptance"] = median(
                n_tokens * full / ours for full, ours in zip(cycles["full"], cycles[name]))
        rows.append(row)
    print_result(rows, config, device, dtype, checkpoint=checkpoint, max_new_tokens=n_new, modes=rows)


def main(argv=None):
    checkpoint = ("checkpoint", "?", "a step-XXXXX directory, or a run: its newest")
    commands = {"train": (bench_train, TrainBench, []), "decode": (bench_decode, DecodeBench, [checkpoint])}
    name, given = parse_command(commands, __doc__, argv)
    commands[name][0](**given)


if __name__ == "__main__":
    run(main)
