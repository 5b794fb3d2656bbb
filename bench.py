"""
Benchmarks: what a training step costs, and how fast decoding is.

    python bench.py --preset 3b                                 # forward + backward of every variant side by side, then the optimizers
    NANOCHAT_DIR=../nanochat python bench.py --preset 3b        # nanochat's model and optimizer at the same shape beside them
    python bench.py --preset 3b --largest --variants poe,bp     # the largest micro-batch that fits
    python bench.py --preset 3b --variants poe,poe:8,bp,bp:8    # micro-batches of 4 sequences (--device-batch-size) and of 8
    python sample.py runs/tiny --bench                          # decoding: a trained checkpoint, in every mode that it has what it needs for
    python sample.py --bench --preset 3b --forced-acceptance 0.985 --forced-lifts 0.05      # decoding: random weights, speed alone

Variants are interleaved in one process, round by round, and told as medians with their spread; ratios compare times of the same round.
The last line is JSON. Nothing here decides a test.

Variants of training share one set of weights. poe: model.backward_by_stage. bp: one loss at the top. Then poe without one idea each:
two-matmuls (W x + W_k x, and both gradients, instead of the merged head), whole-logits (the loss by autograd, all logits at once),
one-backward (all stages' activations are kept), cast-each-pass (weights are cast in each micro-batch, not once per step); naive is all
four; stage-major runs each stage over all micro-batches before the next begins.
"""
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import model as model_file
from dataloader import Loader, open_data
from evaluate import markdown
from flags import flag, parse_flags, run, spelled
from model import (PRESETS, Linear, LinearByCast, ModelConfig, PoE, add_weight_grad, attention_backends, attention_kernel, choose_device,
                   flops_per_token, get, head_cross_entropy, norm, softcap, stage_bytes)
from muon import MuonAdamW
from sample import Engine, Plan, clock, count_new_tokens, decode_timed, kernels_fit, make_plan
from train import RECIPES, optimizer_groups


# ---------------------------------------------------------------------------------------------------------------
# Training

NOMINAL_FLOPS = 989e12          # bf16 of an H100 or H200 SXM, dense, by its data sheet
VARIANTS = ("poe", "bp", "naive", "two-matmuls", "whole-logits", "one-backward", "cast-each-pass", "stage-major")
WITH_OPTIMIZER = ("poe", "bp", "nanochat")      # the others have poe's


def head_gradient(model, k, normed, targets, scale, merged, chunked, casts):
    """(loss, d loss / d normed) of stage k; adds the heads' gradients. normed: (B, T, C), detached from the trunk. casts: of the heads, by module."""
    own, shared = model.lm_head_stages[k], model.lm_head
    x, targets = normed.flatten(0, 1), targets.flatten()
    if chunked:
        with torch.no_grad():
            if merged:
                loss, grad = head_cross_entropy(x, model.head_weight(k), targets, own.weight.grad, scale, model.chunk_loss)
            else:
                loss, grad = two_matmuls(x, {head: casts[head] for head in (own, shared)}, targets, scale, model.chunk_loss)
        return loss, grad.view_as(normed)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = LinearByCast.apply(x, own.weight, model.head_weight(k).detach(), own.weight.grad) if merged else shared(x) + own(x)
        loss = F.cross_entropy(softcap(logits), targets, reduction="sum") * scale
    loss.backward()
    return loss.detach(), x.grad.view_as(normed)


def two_matmuls(x, heads, targets, scale, chunk_loss):
    """`head_cross_entropy` of the sum of two heads, {module: its weight in the dtype of x}, with every product made twice."""
    x_grad, loss = torch.empty_like(x), 0.0
    own, shared = heads.values()
    step = max(1, model_file.LOSS_CHUNK_LOGITS[x.device.type] // own.size(0))
    for i in range(0, len(x), step):
        part = x[i:i + step]
        nats, grad = chunk_loss(part @ own.T + part @ shared.T, targets[i:i + step], scale)
        loss += nats
        torch.add(grad @ own, grad @ shared, out=x_grad[i:i + step])
        for head in heads:
            add_weight_grad(head.weight.grad, grad, part)
    return loss * scale, x_grad


def trial_step(model, batches, scale, merged=True, chunked=True, per_stage=True, stage_major=False):
    """Forward and backward of a step's micro-batches, as `PoE.backward_by_stage` but for what is switched off; the losses by stage.

    stage_major: keep x_k and x0 of every micro-batch, (n_micro, B, T, C) each, and run a stage over all of them.
    """
    losses, K = [0.0] * model.config.n_stage, model.config.n_stage
    heads = *model.lm_head_stages, model.lm_head
    for head in heads:
        if head.weight.grad is None:
            head.weight.grad = torch.zeros_like(head.weight)
    casts = {head: head.weight.detach().to(model.compute_dtype) for head in heads} if chunked and not merged else None

    def one(k, x, x0, idx, targets):
        x = model.stage(k, x, x0, idx)
        normed = norm(x)
        loss, grad = head_gradient(model, k, normed.detach(), targets, scale, merged, chunked, casts)
        losses[k] += loss
        if per_stage:
            normed.backward(grad)
        return x.detach(), (normed, grad)
    if stage_major:
        state = [(x0, x0) for x0 in (model.embed(idx) for idx, _ in batches)]
        for k in range(K):
            state = [(one(k, x, x0, idx, targets)[0], x0.detach()) for (x, x0), (idx, targets) in zip(state, batches)]
    else:
        for idx, targets in batches:
            x = x0 = model.embed(idx)
            kept = []
            for k in range(K):
                x, pair = one(k, x, x0, idx, targets)
                x0 = x0.detach()
                kept += [] if per_stage else [pair]
            if kept:
                torch.autograd.backward([normed for normed, _ in kept], [grad for _, grad in kept])
    if merged:
        for head in model.lm_head_stages:
            model.lm_head.weight.grad += head.weight.grad
    return losses


def real_step(model, batches, scale):
    """The same by the model's own `backward_by_stage`."""
    losses = [0.0] * model.config.n_stage
    for number, (idx, targets) in enumerate(batches):
        for k, loss in model.backward_by_stage(idx, targets, scale, number == len(batches) - 1):
            losses[k] += loss
    return losses


def drop_casts(model):
    """Undo `PoE.cast_weights`."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.cast = None
    model.merged_heads = None


def fill_zeros(model, seed):
    """Random values for the matrices of a model that begin as zeros (output projections, stages' heads), as its first steps of training give them.

    A GPU at its power limit multiplies zeros faster: a step on initial weights is no step of training.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2 and not p.any():
            torch.nn.init.normal_(p, std=0.02, generator=generator)


def backprop_twin(model):
    """The model trained by one loss at the top, around the same weights."""
    config = model.config
    with torch.device("meta"):
        twin = PoE(ModelConfig(**{**asdict(config), "objective": "bp", "stage_layers": (config.n_layer,)}), model.compute_dtype)
    for name in ("wte", "blocks", "lm_head", "cos", "sin", "chunk_loss"):
        setattr(twin, name, getattr(model, name))
    return twin


def nanochat_model(folder, config, device, compile, seed):
    """(model, optimizer, FLOPs per token) of a nanochat checkout at this shape: full windows, n_kv_head and MLP width as ours, PyTorch's attention.

    Its smear, backout, value embeddings and scalars stay as they are; it casts its weights at every forward and holds all logits.
    """
    sys.path.insert(0, folder)
    shape = {name: getattr(config, name) for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")}
    try:
        from nanochat import flash_attention, gpt
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(**shape, window_pattern="L"))
    except Exception as e:                                                  # whatever a foreign checkout may raise
        raise ValueError(f"NANOCHAT_DIR {folder} gives no model ({type(e).__name__}: {e}); point it at a checkout of nanochat") from None
    flash_attention._override_impl = "sdpa"
    flash_attention.USE_FA3 = False
    with torch.device("meta"):
        for block in model.transformer.h:                                   # its width is 4 n_embd
            block.mlp.c_fc = gpt.Linear(config.n_embd, config.mlp_hidden, bias=False)
            block.mlp.c_proj = gpt.Linear(config.mlp_hidden, config.n_embd, bias=False)
    model.to_empty(device=device)
    model.init_weights()
    fill_zeros(model, seed)
    compiled = torch.compile(model, dynamic=False) if compile else model
    return compiled, model.setup_optimizer(), model.estimate_flops()


@dataclass(frozen=True)
class BenchConfig:
    preset: str = flag("3b", "shape of the model", choices=tuple(PRESETS))
    variants: str = flag(",".join(VARIANTS + ("nanochat",) * bool(os.environ.get("NANOCHAT_DIR"))),
                         "which ones, in this order, with :N in micro-batches of N sequences; nanochat, the last by default, needs NANOCHAT_DIR")
    total_batch_tokens: int = flag(65536, "tokens of an optimizer step")
    device_batch_size: int = flag(4, "sequences in a forward and backward pass")
    bench_repeats: int = flag(5, "timed rounds")
    largest: bool = flag(False, "also look for the largest micro-batch of poe and bp that fits beside the optimizer's state, in sequences")
    optimizer: bool = flag(True, "also time the optimizers, one after the other")
    seed: int = flag(0, "of weights and tokens")
    device: str = flag(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    dtype: str = flag(None, "compute dtype (default: bfloat16 on cuda, else float32)", choices=("float32", "bfloat16"))
    compile: bool = flag(None, "compile (default: on cuda)")

    def __post_init__(self):
        for label, (name, size) in self.labels().items():
            if name not in (*VARIANTS, "nanochat"):
                raise ValueError(f"--variants {self.variants} has {name!r}; choose from {', '.join(VARIANTS)}, nanochat")
            tokens = size * PRESETS[self.preset].sequence_len
            if ":" in label and size < 1:
                raise ValueError(f"--variants {self.variants}: a number of sequences, 1 or more, goes behind the colon of {label!r}")
            if size and (self.total_batch_tokens < tokens or self.total_batch_tokens % tokens):
                raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} must be a multiple of a micro-batch's {tokens} tokens "
                                 f"(--device-batch-size {self.device_batch_size}, or :N in --variants {self.variants}, "
                                 f"x {PRESETS[self.preset].sequence_len})")
        names = [name for name, _ in self.labels().values()]
        if len({*self.labels().values()}) < len(self.variants.split(",")):
            raise ValueError(f"--variants {self.variants} has one twice; name each once")
        if self.total_batch_tokens > 2 ** 30:
            raise ValueError(f"--total-batch-tokens {self.total_batch_tokens} must be at most 2^30")
        if "nanochat" in names and not os.environ.get("NANOCHAT_DIR"):
            raise ValueError("--variants nanochat needs the environment variable NANOCHAT_DIR: a checkout of nanochat")
        if "nanochat" in names and self.largest:
            raise ValueError("--largest fills the memory, of which nanochat's weights would take their part; leave it out of --variants")
        if self.largest and not (self.optimizer and {"poe", "bp"} & set(names)):
            raise ValueError("--largest looks beside the optimizer's state of poe or bp; leave --no-optimizer out and have one of them in --variants")
        for name in ("bench_repeats", "device_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{spelled(name)} {getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"--seed {self.seed} must be at least 0 and below 2^63")
        if self.largest and choose_device(self.device)[0].type != "cuda":
            raise ValueError("--largest fills the memory of a CUDA device; leave it out on a CPU")

    def labels(self):
        """{label: (variant, sequences in a micro-batch)} of --variants; 0 sequences where there is no number behind the colon."""
        labels = {}
        for label in self.variants.split(","):
            name, colon, size = label.partition(":")
            labels[label] = name, (int(size) if re.fullmatch("[0-9]{1,6}", size) else 0) if colon else self.device_batch_size
        return labels


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here and now."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * n ** 3 / statistics.median(times)


def cell(value, form, unit=""):
    """A table's cell: empty for None."""
    return "" if value is None else format(value, form) + unit


def say(line):
    """Progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def largest_batch(measure, clear, guess):
    """The most sequences with which `measure(n)` does not run out of memory: from a guess, one by one. 0: not even one."""
    def fits(n):
        clear()
        try:
            measure(n)
            fit = True
        except torch.OutOfMemoryError:
            fit = False
        say(f"a micro-batch of {n}: {'fits' if fit else 'too large'}")
        return fit
    n = max(1, guess)
    if fits(n):
        while fits(n + 1):
            n += 1
    else:
        n -= 1
        while n and not fits(n):
            n -= 1
    clear()
    return n


def loader_rate(mix, rows, n=64):
    """Tokens per second of the data loader alone, by its thread."""
    loader = Loader(mix, 0, rows, rows)
    next(loader)
    start = time.perf_counter()
    for _ in range(n):
        next(loader)
    seconds = time.perf_counter() - start
    loader.close()
    return n * rows * mix.T / seconds


def bench_training(config):
    """Forward + backward of each variant interleaved, then optimizers, then the largest micro-batches: a JSON-ready dict.

    activation_bytes: the most that a step allocates above what it finds: weights, gradients, kept casts (None for a step of one micro-batch,
    which makes its gradients while its activations go). A variant that casts in each pass keeps those casts for its backward, so there they
    count. peak_bytes: of all that is on the device, other variants' weights too. MFU is of an H100's or H200's nominal bfloat16 rate; None
    elsewhere.
    """
    device, dtype = choose_device(config.device, config.dtype)
    if device.index is not None:
        torch.cuda.set_device(device)
    on_cuda, shape = device.type == "cuda", PRESETS[config.preset]
    device_name = torch.cuda.get_device_name() if on_cuda else "cpu"
    nominal = NOMINAL_FLOPS if re.search("H100|H200", device_name) and dtype == torch.bfloat16 else None
    compile = on_cuda if config.compile is None else config.compile
    torch.manual_seed(config.seed)
    with torch.device(device):
        model = PoE(shape, dtype)
    model.init_weights(config.seed)
    fill_zeros(model, config.seed)
    if compile:
        model.compile_regions()
    twin = backprop_twin(model)
    steps = {"poe": (model, real_step, {}), "bp": (twin, real_step, {}),
             "naive": (model, trial_step, dict(merged=False, chunked=False, per_stage=False)), "two-matmuls": (model, trial_step, dict(merged=False)),
             "whole-logits": (model, trial_step, dict(chunked=False)), "one-backward": (model, trial_step, dict(per_stage=False)),
             "cast-each-pass": (model, real_step, {}), "stage-major": (model, trial_step, dict(stage_major=True))}
    flops = {name: flops_per_token(m.config) for name, (m, _, _) in steps.items()}
    labels = config.labels()
    if "nanochat" in (name for name, _ in labels.values()):
        nanochat, nanochat_optimizer, flops["nanochat"] = nanochat_model(os.environ["NANOCHAT_DIR"], shape, device, compile, config.seed)

        def nanochat_step(m, batches, scale):
            for idx, targets in batches:
                (m(idx, targets) / len(batches)).backward()
        steps["nanochat"] = (nanochat, nanochat_step, {})
    draw = torch.Generator().manual_seed(config.seed)

    def batches(rows, tokens):
        data = torch.randint(shape.vocab_size, (tokens // (rows * shape.sequence_len), rows, shape.sequence_len + 1), generator=draw).to(device)
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in data]

    def clear():
        for m, _, _ in steps.values():
            m.zero_grad(set_to_none=True)
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()

    def measure(label, data):
        """(seconds, activation bytes, peak bytes) of one step; gradients and kept casts are there before it and do not count as activations."""
        name, _ = labels[label]
        m, step, switches = steps[name]
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = clock(device)
        m.zero_grad(set_to_none=True)                                       # as an optimizer's step leaves it
        if name != "nanochat":
            (drop_casts if name in ("naive", "cast-each-pass") else PoE.cast_weights)(m)
        step(m, data, 1 / config.total_batch_tokens, **switches)
        seconds = clock(device) - start
        peak = torch.cuda.max_memory_allocated() if on_cuda else None
        return seconds, peak - before if on_cuda and len(data) > 1 else None, peak
    rows = {label: SimpleNamespace(times=[]) for label in labels}
    data = {size: batches(size, config.total_batch_tokens) for _, size in labels.values()}
    for number in range(config.bench_repeats + 1):
        for label, (_, size) in list(labels.items()):
            row = rows[label]
            clear()
            warm = clock(device)
            try:
                measure(label, data[size][:1])                              # gradients exist, kernels are compiled
                if number == 0:
                    row.compile_seconds = clock(device) - warm
                seconds, row.activation_bytes, row.peak_bytes = measure(label, data[size])
            except torch.OutOfMemoryError:
                say(f"{label} is left out: its micro-batches of {size} do not fit into memory")
                del labels[label], rows[label]
                continue
            row.times += [seconds] if number else []
            say(f"round {number} of {config.bench_repeats}, {label}: {1e3 * seconds:.0f} ms"
                + f", first micro-batch {row.compile_seconds:.1f} s" * (number == 0))
    if not labels:
        raise ValueError(f"none of --variants {config.variants} fits into memory; choose smaller micro-batches or a smaller --preset")
    for name in WITH_OPTIMIZER if config.optimizer else ():
        of_name = {label: rows[label] for label, (variant, _) in labels.items() if variant == name}
        if not of_name:
            continue
        m, _, _ = steps[name]
        clear()
        optimizer = nanochat_optimizer if name == "nanochat" else MuonAdamW(optimizer_groups(m, RECIPES[config.preset]), compile=compile)
        times = []
        for _ in range(config.bench_repeats + 2):
            for p in m.parameters():
                p.grad = torch.randn_like(p).mul_(1e-3)
            start = clock(device)
            optimizer.step()
            times.append(clock(device) - start)
        say(f"optimizer of {name}: {', '.join(f'{1e3 * seconds:.0f}' for seconds in times)} ms")
        for row in of_name.values():
            row.optimizer_seconds = statistics.median(times[2:])            # the first ones compile and make the state
        if config.largest and on_cuda:                                      # beside weights, gradients and the optimizer's state, as in training
            clear()
            if name == "bp":                                                # what poe alone needs takes no room from it
                model.merged_heads, model.lm_head_stages = None, torch.nn.ModuleList()
            free = torch.cuda.mem_get_info()[1] - torch.cuda.memory_allocated() - sum(4 * p.numel() for p in m.parameters())
            label, row = next(iter(of_name.items()))

            def one_step(n):
                torch.compiler.reset()                                      # a new size compiles anew
                measure(label, batches(n, 2 * n * shape.sequence_len))      # the second micro-batch runs beside all gradients of the first
            row.largest = largest_batch(one_step, clear, int(labels[label][1] * free / (row.activation_bytes or free)))
        del optimizer
    clear()
    ceiling, tokens, out = matmul_rate(device, dtype), config.total_batch_tokens, []
    for label, row in rows.items():
        name, size = labels[label]
        seconds = statistics.median(row.times)
        whole = seconds + getattr(row, "optimizer_seconds", math.nan)
        out.append({"name": label, "device_batch_size": size, "fwdbwd_ms": 1e3 * seconds,
                    "fwdbwd_ms_min": 1e3 * min(row.times), "fwdbwd_ms_max": 1e3 * max(row.times),
                    "of_bp": statistics.median(a / b for a, b in zip(row.times, rows["bp"].times)) if "bp" in rows else None,
                    "optimizer_ms": 1e3 * row.optimizer_seconds if hasattr(row, "optimizer_seconds") else None,
                    "tokens_per_s": tokens / seconds, "tokens_per_s_with_optimizer": None if math.isnan(whole) else tokens / whole,
                    "gflops_per_token": flops[name] / 1e9,
                    "gflops_per_token_causal": (flops[name] - 6 * shape.n_embd * shape.sequence_len * shape.n_layer) / 1e9,
                    "mfu_nominal": flops[name] * tokens / seconds / nominal if nominal else None,
                    "mfu_nominal_with_optimizer": None if math.isnan(whole) or not nominal else flops[name] * tokens / whole / nominal,
                    "mfu_matmul": flops[name] * tokens / seconds / ceiling, "activation_bytes": row.activation_bytes, "peak_bytes": row.peak_bytes,
                    "largest_micro_batch": getattr(row, "largest", None), "first_step_s": row.compile_seconds})
    return {"preset": config.preset, "device": device_name, "torch": torch.__version__, "dtype": str(dtype).removeprefix("torch."),
            "attention": attention_kernel(shape, device, dtype), "compile": compile, "total_batch_tokens": tokens,
            "device_batch_size": config.device_batch_size, "repeats": config.bench_repeats,
            "loader_tokens_per_s": loader_rate(open_data("", shape.vocab_size).train(shape.sequence_len, config.seed), min(data)),
            "matmul_flops_per_s": ceiling, "nominal_flops_per_s": nominal, "variants": out}


def training_table(result):
    """The benchmark of training as a table for people."""
    header = ["variant", "micro-batch", "forward + backward", "min to max", "of bp", "optimizer", "tokens/s", "with optimizer", "MFU",
              "with optimizer", "of matmul", "activations", "peak", "largest micro-batch"]
    return markdown(header, [
        [row["name"], f"{row['device_batch_size']}", f"{row['fwdbwd_ms']:.1f} ms", f"{row['fwdbwd_ms_min']:.1f} to {row['fwdbwd_ms_max']:.1f}",
         cell(row["of_bp"], ".3f"), cell(row["optimizer_ms"], ".1f", " ms"), f"{row['tokens_per_s']:,.0f}",
         cell(row["tokens_per_s_with_optimizer"], ",.0f"), cell(row["mfu_nominal"], ".1%"), cell(row["mfu_nominal_with_optimizer"], ".1%"),
         f"{row['mfu_matmul']:.1%}", *(cell(row[name] and row[name] / 2 ** 30, ".2f", " GiB") for name in ("activation_bytes", "peak_bytes")),
         cell(row["largest_micro_batch"], "d")]
        for row in result["variants"]])


# ---------------------------------------------------------------------------------------------------------------
# Decoding: sample.py --bench

BENCH_PROMPTS = ("The sea was calm that morning, and the old man went down to the harbour because",
                 "def read_lines(path):\n    \"\"\"Return the lines of a text file",
                 "1, 2, 4, 8, 16, 32, 64, 128, 256,")


def bandwidths(device):
    """(nominal, measured) bytes/s of a GPU's memory: by its clock and bus, and by copying 1 GiB. None where unknown."""
    if device.type != "cuda":
        return None, None
    about = torch.cuda.get_device_properties(device)
    clock, bus = getattr(about, "memory_clock_rate", 0), getattr(about, "memory_bus_width", 0)       # kHz, bits
    source, times = torch.zeros(2 ** 29, dtype=torch.int16, device=device), []
    target = torch.empty_like(source)
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2e3 * clock * bus / 8 or None, 2 * source.nbytes / statistics.median(times)


def bench_plans(model_config, config, bounds, metrics):
    """The variants of a benchmark, {name: Plan}: every mode that this checkpoint has what it needs for, and the curves of early exit."""
    K = model_config.n_stage
    plans = {"full": Plan(range(K))}
    if K == 1:
        return plans
    plans["s0 alone"] = Plan(range(1))
    plans |= {f"prefix {n}": Plan(range(n)) for n in range(2, K)}
    plans |= {f"speculative {m}": Plan(range(K), draft_len=m, forced_acceptance=config.forced_acceptance)
              for m in sorted({1, 2, 4, 8, 12, 16, config.draft_len})}
    if config.forced_lifts is not None:
        plans[f"s0, {100 * config.forced_lifts:g}% lifted"] = Plan(range(K), forced_lifts=config.forced_lifts)
    if config.forced_acceptance is None and config.forced_lifts is None:
        plans |= {f"speculative 16, gate {gate:g}": Plan(range(K), draft_len=16, draft_gate=gate) for gate in (0.3, 0.6)}
        for name, mode, margin in (("wand", "wand", False), ("wand, margins", "wand", True), ("routing", "routing", False)):
            try:
                plans[name] = make_plan(model_config, mode, wand_margin=margin, bounds=bounds, metrics=metrics)
            except ValueError as e:
                if not config.preset:                                       # random weights have no bounds
                    say(f"not measured: {e}")
        plans |= {f"curve: margin {t:g}": Plan(range(K), exits=(t,) * (K - 1)) for t in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)}
        plans |= {f"curve: top-1 {t:g}": Plan(range(K), exits=(t, *[math.inf] * (K - 2)), score="probability")
                  for t in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)}
    return plans


def decode_all(engine, prompts, n_new, weight_bytes):
    """Decode every prompt: the `Run`s, and the bytes of weights and cache that the passes read."""
    model, runs, read = engine.model, [], 0.0
    slot_bytes = 2 * model.compute_dtype.itemsize * model.config.n_kv_head * model.config.head_dim      # of one layer's cache
    for prompt in prompts:
        before = list(engine.passes)
        runs.append(decode_timed(engine, prompt, n_new))
        for k, (n, n_before) in enumerate(zip(engine.passes, before)):
            cached = len(model.layers_of_stage[k]) * slot_bytes * (len(prompt) + len(runs[-1].ids) / 2)
            read += (n - n_before) * (weight_bytes[k] - (weight_bytes[k - 1] if k else 0) + cached)
    return runs, read


def bench(model, prompts, config, plans):
    """Measure plans side by side, a JSON-ready dict. Greedy, one row at a time; a round is every plan over every prompt; the first warms up.

    speedup: the median over rounds of the time of "full" over this one's. bytes_per_token: weights and cache that the passes read.
    identical: the very tokens of "full". agreement: share of tokens that the full product would have chosen after the same text.
    "full, no graphs" is the first prompt's first 64 tokens, once.
    """
    device, on_cuda = model.cos.device, model.cos.device.type == "cuda"
    kernels = on_cuda and kernels_fit(model)
    variants = ({"full, no graphs": (plans["full"], False)} if kernels else {}) | {name: (plan, kernels) for name, plan in plans.items()}
    engines, rounds, n_new, weight_bytes = {}, {name: [] for name in variants}, config.max_new_tokens, stage_bytes(model)
    for number in range(config.bench_repeats + 1):
        for name, (plan, fast) in variants.items():
            if name.startswith(("curve", "full, no")) and number > 1:       # one timed round is enough there
                continue
            if sys.stderr.isatty():
                print(f"\rround {number} of {config.bench_repeats}: {name:40}", end="", file=sys.stderr)
            if name not in engines:
                engines[name] = Engine(model, plan, fast=fast)
            slow = kernels and not fast
            rounds[name].append(decode_all(engines[name], prompts[:1] if slow else prompts, min(n_new, 64) if slow else n_new, weight_bytes))
    nominal, copied = bandwidths(device)
    times = {name: [sum(run.seconds for run in runs) / sum(len(run.ids) for run in runs) for runs, _ in of[1:]] for name, of in rounds.items()}
    rows = []
    for name, (plan, _) in variants.items():
        (runs, read), speed = rounds[name][-1], 1 / statistics.median(times[name])
        made, agreement = sum(len(run.ids) for run in runs), None
        identical = all(a.ids[:n_new] == b.ids[:len(a.ids[:n_new])] for a, b in zip(runs, rounds["full"][-1][0]))
        if identical or (config.forced_acceptance is None and config.forced_lifts is None):
            same = [True] if identical else [a == b for prompt, run in zip(prompts, runs)
                                             for a, b in zip(engines["full"].choices(prompt, run.ids[:n_new]), run.ids)]
            agreement = sum(same) / len(same)
        judged = sum(run.judged for run in runs)
        rows.append({
            "name": name, "tokens_per_s": speed, "tokens_per_s_min": 1 / max(times[name]), "tokens_per_s_max": 1 / min(times[name]),
            "ms_per_token": 1e3 / speed, "speedup": statistics.median(a / b for a, b in zip(times["full"], times[name])),
            "tokens_per_cycle": made / sum(run.cycles for run in runs),
            "acceptance": sum(run.accepted for run in runs) / judged if judged else None,
            "exits": [sum(run.depths.count(k + 1) for run in runs) / made for k in range(model.config.n_stage)],
            "identical": identical, "agreement": agreement,
            "bytes_per_token": read / made, "share_of_nominal": nominal and read / made * speed / nominal,
            "share_of_copy": copied and read / made * speed / copied,
            "first_token_s": statistics.median(run.first for of, _ in rounds[name][1:] for run in of)})
    return {"device": torch.cuda.get_device_name() if on_cuda else "cpu", "torch": torch.__version__,
            "dtype": str(model.compute_dtype).removeprefix("torch."), "prompts": len(prompts), "max_new_tokens": n_new,
            "repeats": config.bench_repeats, "forced_acceptance": config.forced_acceptance, "forced_lifts": config.forced_lifts,
            "nominal_bytes_per_s": nominal, "copy_bytes_per_s": copied, "capture_s": sum(engine.capture_seconds for engine in engines.values()),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None, "modes": rows}


def bench_table(result, bpb):
    """The benchmark as a table for people. bpb: {name: bits per byte}, as evaluate.py measured it."""
    header = ["mode", "bpb", "tokens/s", "min to max", "ms/token", "speedup", "tokens/cycle", "acceptance", "left after s0, s1, ...",
              "agrees with full", "MB/token", "of nominal", "of copy", "first token"]
    rows = []
    for row in result["modes"]:
        lossless = row["identical"] and row["name"].startswith(("full", "speculative"))      # the same text alone is not the same distribution
        rows.append([row["name"], cell(bpb.get(row["name"], bpb.get("full") if lossless else None), ".4f"), f"{row['tokens_per_s']:.1f}",
                     f"{row['tokens_per_s_min']:.1f} to {row['tokens_per_s_max']:.1f}", f"{row['ms_per_token']:.3f}", f"{row['speedup']:.2f}x",
                     f"{row['tokens_per_cycle']:.2f}", cell(row["acceptance"], ".4f"), " ".join(f"{share:.3f}" for share in row["exits"]),
                     "identical" if row["identical"] else cell(row["agreement"], ".4f"), f"{row['bytes_per_token'] / 1e6:.1f}",
                     cell(row["share_of_nominal"], ".1%"), cell(row["share_of_copy"], ".1%"), f"{row['first_token_s'] * 1e3:.1f} ms"])
    return markdown(header, rows)


def random_model(preset, device, dtype, seed):
    """A model of a preset's shape with random weights, for speed alone: every matrix of the order of a trained one's."""
    with torch.device(device):
        model = PoE(PRESETS[preset], dtype)
    model.init_weights(seed)
    torch.nn.init.zeros_(model.lm_head.weight)                              # begins so small that no id would stand out
    fill_zeros(model, seed)
    return model.freeze_for_inference()


def bench_decoding(model, tokenizer, prompts, config, bounds, metrics, checkpoint):
    """`sample.py --bench`: print a table for people, and one JSON line last. prompts: texts; [""] stands for three of our own."""
    prompts = list(BENCH_PROMPTS) if prompts == [""] else prompts
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    config = replace(config, max_new_tokens=count_new_tokens(model.config, encoded, config.max_new_tokens, default=256))
    plans = bench_plans(model.config, config, bounds, metrics)
    result = {"checkpoint": checkpoint and str(checkpoint), "random_weights": config.preset} | bench(model, encoded, config, plans)
    known = {"full": get(metrics, ("bpb", "full")), "s0 alone": get(metrics, ("bpb", "single", 0))}
    known |= {f"prefix {n}": get(metrics, ("bpb", "prefix", n - 1)) for n in range(1, model.config.n_stage)}
    if config.preset:
        print(f"random weights in the shape of {config.preset}: speed alone")
    for name, value in (("acceptance", config.forced_acceptance), ("share of lifts", config.forced_lifts)):
        if value is not None:
            print(f"the {name} is forced to {value:g}: what is generated means nothing")
    if model.cos.device.type == "cuda" and not kernels_fit(model):
        print("the kernels do not serve this dtype or these widths: everything runs without them and without graphs")
    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}; {len(prompts)} prompts, {config.max_new_tokens} tokens each, "
          f"{config.bench_repeats} rounds")
    print(bench_table(result, {name: value for name, value in known.items() if isinstance(value, (int, float))}))
    agreeing = [row for row in result["modes"] if (row["agreement"] or 0.0) >= 0.999 and row["name"].startswith(("wand", "routing", "curve"))]
    if agreeing:
        best = max(agreeing, key=lambda row: row["tokens_per_s"])
        print(f"the fastest early exit that agrees with full in at least 99.9 %: {best['name']}, {best['speedup']:.2f}x")
    if result["peak_bytes"]:
        print(f"compiling and capturing: {result['capture_s']:.1f} s in all; peak memory {result['peak_bytes'] / 2 ** 30:.2f} GiB; memory bandwidth "
              f"{(result['nominal_bytes_per_s'] or 0) / 1e12:.2f} TB/s nominal, {result['copy_bytes_per_s'] / 1e12:.2f} by copying")
    print(json.dumps(result))


def main(argv=None):
    config = BenchConfig(**parse_flags(BenchConfig, __doc__, argv))
    with attention_backends(choose_device(config.device, config.dtype)[0]):
        result = bench_training(config)
    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}; {config.preset}, {config.total_batch_tokens:,} tokens a step; "
          f"{config.bench_repeats} rounds; a large matmul runs at {result['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s; "
          f"attention by {result['attention']}")
    print(training_table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
