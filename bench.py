"""
Benchmarks: how fast decoding is in every mode.

    python sample.py runs/tiny --bench                          # a trained checkpoint, in every mode that it has what it needs for
    python sample.py --bench --preset 3b --forced-acceptance 0.985 --forced-lifts 0.05      # random weights: speed alone

Variants are interleaved in one process, round by round, and told as medians with their spread; ratios compare times of the same round.
Nothing here decides a test.
"""
import json
import math
import statistics
import sys
from dataclasses import replace

import torch

from model import PRESETS, PoE, stage_bytes
from sample import Engine, Plan, check_room, decode_timed, make_plan

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
    plans |= {f"speculative {m}": Plan(range(K), draft_len=m, forced_acceptance=config.forced_acceptance) for m in sorted({1, 2, 4, 8, 12, 16, config.draft_len})}
    if config.forced_lifts is not None:
        plans[f"s0, {config.forced_lifts:.0%} lifted"] = Plan(range(K), forced_lifts=config.forced_lifts)
    if config.forced_acceptance is None and config.forced_lifts is None:
        plans |= {f"speculative 16, gate {gate:g}": Plan(range(K), draft_len=16, draft_gate=gate) for gate in (0.3, 0.6)}
        for name, mode, margin in (("wand", "wand", False), ("wand, margins", "wand", True), ("routing", "routing", False)):
            try:
                plans[name] = make_plan(model_config, mode, wand_margin=margin, bounds=bounds, metrics=metrics)
            except ValueError as e:
                print(f"not measured: {e}", file=sys.stderr)
        plans |= {f"curve: margin {t:g}": Plan(range(K), exits=(t,) * (K - 1)) for t in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)}
        plans |= {f"curve: top-1 {t:g}": Plan(range(K), exits=(t, *[math.inf] * (K - 2)), score="probability")
                  for t in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)}
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
    """
    device, on_cuda = model.cos.device, model.cos.device.type == "cuda"
    variants = ({"full, no graphs": (plans["full"], False)} if on_cuda else {}) | {name: (plan, on_cuda) for name, plan in plans.items()}
    engines, rounds, n_new, weight_bytes = {}, {name: [] for name in variants}, config.max_new_tokens, stage_bytes(model)
    for number in range(config.bench_repeats + 1):
        for name, (plan, fast) in variants.items():
            if name.startswith(("curve", "full, no")) and number > 1:       # one timed round is enough there
                continue
            if sys.stderr.isatty():
                print(f"\rround {number} of {config.bench_repeats}: {name:40}", end="", file=sys.stderr)
            if name not in engines:
                engines[name] = Engine(model, plan, fast=fast)
            slow = on_cuda and not fast
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
    return {"device": torch.cuda.get_device_name() if on_cuda else "cpu", "torch": torch.__version__, "dtype": str(model.compute_dtype).removeprefix("torch."),
            "prompts": len(prompts), "max_new_tokens": n_new, "repeats": config.bench_repeats, "forced_acceptance": config.forced_acceptance,
            "forced_lifts": config.forced_lifts, "nominal_bytes_per_s": nominal, "copy_bytes_per_s": copied,
            "capture_s": sum(engine.capture_seconds for engine in engines.values()),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None, "modes": rows}


def bench_table(result, bpb):
    """The benchmark as a table for people. bpb: {name: bits per byte}, as evaluate.py measured it."""
    def cell(value, form):
        return "" if value is None else format(value, form)
    lines = ["| mode | bpb | tokens/s | min to max | ms/token | speedup | tokens/cycle | acceptance | left after s0, s1, ... | agrees with full "
             "| MB/token | of nominal | of copy | first token |", "| --- |" + " ---: |" * 13]
    for row in result["modes"]:
        cells = (row["name"], cell(bpb.get(row["name"], bpb.get("full") if row["identical"] else None), ".4f"), cell(row["tokens_per_s"], ".1f"),
                 f"{row['tokens_per_s_min']:.1f} to {row['tokens_per_s_max']:.1f}", cell(row["ms_per_token"], ".3f"), cell(row["speedup"], ".2f") + "x",
                 cell(row["tokens_per_cycle"], ".2f"), cell(row["acceptance"], ".4f"), " ".join(f"{share:.3f}" for share in row["exits"]),
                 "identical" if row["identical"] else cell(row["agreement"], ".4f"), cell(row["bytes_per_token"] / 1e6, ".1f"),
                 cell(row["share_of_nominal"], ".1%"), cell(row["share_of_copy"], ".1%"), cell(row["first_token_s"] * 1e3, ".1f") + " ms")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def random_model(preset, device, dtype, seed):
    """A model of a preset's shape with random weights, for speed alone: every matrix of the order of a trained one's."""
    with torch.device(device):
        model = PoE(PRESETS[preset], dtype)
    model.init_weights(seed)
    generator = torch.Generator(device).manual_seed(seed)
    for block in model.blocks:                                              # zero at the start of training; not here
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.normal_(linear.weight, std=0.02, generator=generator)
    for head in (model.lm_head, *model.lm_head_stages):
        torch.nn.init.normal_(head.weight, std=0.02, generator=generator)
    return model.freeze_for_inference()


def bench_decoding(model, tokenizer, prompts, config, bounds, metrics, checkpoint):
    """`sample.py --bench`: print a table for people, and one JSON line last. prompts: texts; [""] stands for three of our own."""
    plans = bench_plans(model.config, config, bounds, metrics)
    prompts = list(BENCH_PROMPTS) if prompts == [""] else prompts
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    room = model.config.sequence_len + 1 - max(map(len, encoded))
    config = replace(config, max_new_tokens=config.max_new_tokens or max(1, min(256, room)))
    for ids in encoded:
        check_room(model.config, ids, config.max_new_tokens)
    result = {"checkpoint": checkpoint and str(checkpoint), "random_weights": config.preset} | bench(model, encoded, config, plans)
    bpb = metrics.get("bpb") or {}
    known = {"full": bpb.get("full"), "s0 alone": bpb.get("single", [None])[0]}
    known |= {f"prefix {n + 1}": value for n, value in enumerate(bpb.get("prefix", []))}
    if config.preset:
        print(f"random weights in the shape of {config.preset}: speed alone")
    for name, value in (("acceptance", config.forced_acceptance), ("share of lifts", config.forced_lifts)):
        if value is not None:
            print(f"the {name} is forced to {value:g}: what is generated means nothing")
    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}; {len(prompts)} prompts, {config.max_new_tokens} tokens each, {config.bench_repeats} rounds")
    print(bench_table(result, {name: value for name, value in known.items() if value is not None}))
    print(json.dumps(result))
