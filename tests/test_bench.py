"""
bench.py: what it times are true twins: every variant's losses and gradients are those of `PoE.backward_by_stage`.

Run: python -m pytest tests/test_bench.py
"""
import json

import pytest
import torch

import bench
from test_model import make, tokens


def test_no_matrix_of_a_benchmark_is_zeros_and_the_others_keep_their_values():
    model = make()
    model.init_weights(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    zeros = {name for name, p in before.items() if p.ndim == 2 and not p.any()}
    bench.fill_zeros(model, 0)
    assert {name.split(".")[-2] for name in zeros} == {"c_proj", *(str(k) for k in range(model.config.n_stage))}
    for name, p in model.named_parameters():
        assert 0.01 < p.std() < 0.04 if name in zeros else torch.equal(p, before[name]), name


@pytest.mark.parametrize("switches", [dict(), dict(merged=False), dict(chunked=False), dict(per_stage=False), dict(stage_major=True),
                                      dict(merged=False, chunked=False, per_stage=False)])
def test_every_variant_has_the_gradients_of_the_real_step(switches, monkeypatch):
    monkeypatch.setitem(bench.model_file.LOSS_CHUNK_LOGITS, "cpu", 7 * 23)
    idx, targets = tokens()
    batches = [(idx[i:i + 1], targets[i:i + 1]) for i in range(3)]
    ours, trial = make(), make()
    expected = bench.real_step(ours, batches, 1 / targets.numel())
    losses = bench.trial_step(trial, batches, 1 / targets.numel(), **switches)
    assert [float(x) for x in losses] == pytest.approx([float(x) for x in expected], rel=1e-12)
    theirs = dict(trial.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(theirs[name].grad, p.grad, rtol=1e-9, atol=1e-12), name


def test_casts_in_each_pass_give_the_gradients_of_kept_casts():
    idx, targets = tokens()
    kept, dropped = make(torch.float32), make(torch.float32)
    for model in (kept, dropped):
        model.compute_dtype = torch.bfloat16
        model.cast_weights()
    with torch.no_grad():
        for block in dropped.blocks:                            # what is kept is stale from here on, and must not be used
            block.mlp.c_fc.cast.zero_()
    bench.drop_casts(dropped)
    assert dropped.merged_heads is None and all(m.cast is None for m in dropped.modules() if isinstance(m, bench.Linear))
    losses = [[float(x) for x in bench.real_step(model, [(idx, targets)], 1 / targets.numel())] for model in (kept, dropped)]
    assert losses[0] == losses[1]
    for name, p in kept.named_parameters():                     # what is not kept is rounded to bfloat16
        assert (p.grad - dict(dropped.named_parameters())[name].grad).abs().max() <= 2 ** -8 * p.grad.abs().max(), name


def test_gradients_in_bfloat16_are_as_near_to_those_in_float64_as_the_naive_steps():
    idx, targets = tokens()
    batches = [(idx[i:i + 1], targets[i:i + 1]) for i in range(3)]

    def gradients(dtype, step, **switches):
        model = make().float() if dtype == torch.bfloat16 else make()
        model.compute_dtype = dtype
        if not switches:
            model.cast_weights()
        step(model, batches, 1 / targets.numel(), **switches)
        return {name: p.grad.double() for name, p in model.named_parameters() if p.dim() == 2}
    exact = gradients(torch.float64, bench.real_step)
    narrow = gradients(torch.bfloat16, bench.real_step), gradients(torch.bfloat16, bench.trial_step, merged=False, chunked=False, per_stage=False)
    ours, naive = (sum((grads[name] - grad).norm() / grad.norm() for name, grad in exact.items()) / len(exact) for grads in narrow)
    assert 0.001 < ours < 1.1 * naive < 0.1, (ours, naive)


@pytest.mark.parametrize("guess", [0, 1, 5, 7, 8, 20])
def test_the_largest_micro_batch_is_found_from_any_guess(guess):
    def measure(n):
        if n > 7:
            raise torch.OutOfMemoryError
    assert bench.largest_batch(measure, lambda: None, guess) == 7


def test_the_backprop_twin_is_a_backprop_model_of_the_same_weights():
    model = make()
    twin, (idx, targets) = bench.backprop_twin(model), tokens()
    loss, = bench.real_step(twin, [(idx, targets)], 1 / targets.numel())
    logits = torch.nn.functional.linear(bench.norm(list(model.boundaries(idx))[-1]), model.lm_head.weight)
    expected = torch.nn.functional.cross_entropy(bench.softcap(logits).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and twin.blocks[0] is model.blocks[0]


def test_the_script_times_every_variant_and_refuses_odd_ones(capsys, refused, monkeypatch):
    monkeypatch.delenv("NANOCHAT_DIR", raising=False)
    argv = ["--preset", "tiny", "--total-batch-tokens", "512", "--device-batch-size", "1", "--bench-repeats", "1", "--device", "cpu"]
    bench.main([*argv, "--variants", "poe,bp,stage-major,poe:2"])
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {row["name"]: row for row in json.loads(last)["variants"]}
    assert list(rows) == ["poe", "bp", "stage-major", "poe:2"] and sum(line.startswith("| ") for line in lines) == 6
    assert rows["poe"]["of_bp"] > 0 and rows["bp"]["of_bp"] == 1.0 and rows["poe"]["optimizer_ms"] > 0 and rows["stage-major"]["optimizer_ms"] is None
    assert rows["poe"]["device_batch_size"] == 1 and rows["poe:2"]["device_batch_size"] == 2 and rows["poe:2"]["optimizer_ms"] == rows["poe"]["optimizer_ms"]
    assert "turbo" in refused(bench.main, *argv, "--variants", "poe,turbo")
    assert "NANOCHAT_DIR" in refused(bench.main, *argv, "--variants", "nanochat")
    assert all("twice" in refused(bench.main, *argv, "--variants", twice) for twice in ("poe,poe", "poe:1,poe:01", "poe,poe:1"))
    monkeypatch.setenv("NANOCHAT_DIR", "nowhere")
    assert "NANOCHAT_DIR nowhere" in refused(bench.main, *argv, "--variants", "nanochat")
    for size in ("0", "3", "x", "", "-1", "1:1", "9" * 5000):
        assert f"poe:{size}" in refused(bench.main, *argv, "--variants", f"poe:{size}")
    assert "--device-batch-size 0" in refused(bench.main, *argv, "--variants", "bp:1", "--device-batch-size", "0")
    assert "--seed -1" in refused(bench.main, *argv, "--seed", "-1")
    assert "--largest" in refused(bench.main, *argv, "--largest")
    assert "--total-batch-tokens 100" in refused(bench.main, *argv[:2], "--total-batch-tokens", "100")


def test_a_variant_that_does_not_fit_is_left_out_and_the_others_go_on(capsys, monkeypatch):
    def full(*args, **switches):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bench, "trial_step", full)
    argv = ["--preset", "tiny", "--total-batch-tokens", "512", "--device-batch-size", "1", "--bench-repeats", "1", "--device", "cpu", "--no-optimizer"]
    bench.main([*argv, "--variants", "naive,poe"])
    told = capsys.readouterr()
    assert [row["name"] for row in json.loads(told.out.splitlines()[-1])["variants"]] == ["poe"] and "naive is left out" in told.err
    with pytest.raises(ValueError, match="none of --variants naive,one-backward fits"):
        bench.main([*argv, "--variants", "naive,one-backward"])


def test_early_exits_are_not_given_the_bpb_of_full_for_having_written_its_text():
    row = {"tokens_per_s": 1.0, "tokens_per_s_min": 1.0, "tokens_per_s_max": 1.0, "ms_per_token": 1.0, "speedup": 1.0, "tokens_per_cycle": 1.0, "acceptance": None,
           "exits": [1.0], "identical": True, "agreement": 1.0, "bytes_per_token": 1.0, "share_of_nominal": None, "share_of_copy": None, "first_token_s": 1.0}
    names = ["full", "speculative 4", "s0 alone", "curve: margin 1", "wand", "routing"]
    lines = bench.bench_table({"modes": [{**row, "name": name} for name in names]}, {"full": 1.25, "s0 alone": 1.5}).splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["1.2500", "1.2500", "1.5000", "", "", ""]
