"""
bench.py: what it times are true twins, and its tables hold what they should.

Run: python -m pytest tests/test_bench.py
"""
import json

import pytest
import torch
import torch.nn.functional as F

import bench
from conftest import ROOT
from test_model import make, tokens


def printed(capsys):
    """(the lines of the table, {name: row} of the JSON in the last line)."""
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    return lines, {row["name"]: row for row in result.get("variants") or result["modes"]}


def test_no_matrix_of_a_benchmark_is_zeros_and_the_others_keep_their_values():
    model = make()
    model.init_weights(3)
    before = model.wte.weight.detach().clone()
    bench.fill_zeros(model)
    assert torch.equal(model.wte.weight, before)
    assert all(p.any() for p in model.parameters() if p.ndim == 2)


def test_the_naive_step_has_the_gradients_of_the_real_one():
    idx, targets = tokens()
    batches = list(zip(idx.split(1), targets.split(1)))
    ours = make()
    naive = make()
    # what another variant cast must not be used
    naive.blocks[0].mlp.c_fc.cast = torch.zeros_like(naive.blocks[0].mlp.c_fc.weight)
    bench.real_step(ours, batches, 1 / targets.numel())
    bench.naive_step(naive, batches, 1 / targets.numel())
    theirs = dict(naive.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.allclose(theirs[name].grad, p.grad, rtol=1e-9, atol=1e-12), name


def test_the_backprop_twin_is_a_backprop_model_of_the_same_weights():
    model = make()
    twin = bench.backprop_twin(model)
    idx, targets = tokens()
    (_, loss), = twin.backward_by_stage(idx, targets, 1 / targets.numel())
    logits = F.linear(bench.norm(list(model.boundaries(idx))[-1]), model.lm_head.weight)
    expected = F.cross_entropy(bench.softcap(logits).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert twin.blocks[0] is model.blocks[0]


TRAIN = ["train", "--preset", "tiny", "--total-batch-tokens", "512", "--device-batch-size", "1",
         "--bench-repeats", "1", "--device", "cpu"]


def test_train_times_every_variant(capsys):
    bench.main([*TRAIN, "--variants", "poe,bp,naive,poe:2"])
    (_, _, first, *_), rows = printed(capsys)
    assert list(rows) == ["poe", "bp", "naive", "poe:2"] and rows["bp"]["of_bp"] == 1.0
    assert first.startswith("| poe | 1 | ")
    for name, row in rows.items():
        assert row["device_batch_size"] == (2 if name == "poe:2" else 1) and row["optimizer_ms"] > 0
        assert row["fwdbwd_ms_min"] <= row["fwdbwd_ms"] <= row["fwdbwd_ms_max"]
        assert row["tokens_per_s"] == pytest.approx(512e3 / row["fwdbwd_ms"])


@pytest.mark.parametrize("argv, told", [
    (["--variants", "bp,poe:x"], "--variants has 'poe:x'"), (["--variants", "poe:3"], "poe:3"),
    (["--variants", "nanochat"], "NANOCHAT_DIR"),
    (["--bench-repeats", "0"], "--bench-repeats: 0")])
def test_train_refuses_odd_flags(argv, told, refused, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DIR", "nowhere")
    assert told in refused(bench.main, *TRAIN, *argv)


def test_decode_measures_every_mode_of_a_checkpoint(trained, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", ("a",))
    monkeypatch.setattr(bench, "DRAFT_LENGTHS", (1, 2))
    bench.main(["decode", str(trained), "--bench-repeats", "1", "--max-new-tokens", "3", "--dtype", "float64",
                "--device", "cpu", "--acceptance", "0.9"])
    _, rows = printed(capsys)
    assert list(rows) == ["full", "s0 alone", "speculative 1", "speculative 2", "lift"]
    # stage 0 reads 2 layers of 2 x 12 x (12 + 4 + 20) weights of 8 bytes, and a head of 12 x 300
    s0 = rows["s0 alone"]
    assert s0["gigabytes_per_s"] == pytest.approx(8 * (2 * 864 + 3600) * s0["tokens_per_s"] / 1e9)
    # one draft: two tokens if it is accepted, else one. Of two, each needs the one before
    for name, n_tokens in (("full", 1), ("speculative 1", 1.9), ("speculative 2", 2.71), ("lift", 20)):
        speed = 1e3 * n_tokens / rows[name]["cycle_ms"]
        assert rows[name]["tokens_per_s_at_acceptance"] == pytest.approx(speed)


def test_decode_of_random_weights_tells_nothing_of_acceptance(capsys, refused, monkeypatch):
    monkeypatch.setattr(bench, "DRAFT_LENGTHS", (4,))
    argv = ["decode", "--preset", "tiny", "--device", "cpu"]
    bench.main([*argv, "--bench-repeats", "1", "--max-new-tokens", "2"])
    _, rows = printed(capsys)
    assert "tokens_per_s" in rows["full"]
    assert list(rows["speculative 4"]) == ["name", "cycle_ms", "tokens_per_s_at_acceptance"]
    assert "--preset" in refused(bench.main, *argv, "runs/nowhere")
    assert "--max-new-tokens" in refused(bench.main, *argv, "--max-new-tokens", "0")


def test_what_runs_out_of_memory_is_left_out(capsys):
    def fail():
        raise torch.OutOfMemoryError
    assert bench.in_rounds({"big": fail, "small": lambda: 7}, 2) == {"small": [7, 7]}
    assert capsys.readouterr().err.count("big is left out") == 1


def test_a_lift_leaves_no_stage_behind():
    model = make(sequence_len=64).freeze_for_inference()
    engine = bench.Engine(model, bench.Plan(range(3), exits=(-float("inf"),) * 2))
    bench.time_cycle(engine, [0])
    # the prompt's token and 20 more are known; every stage has run over the first 20
    assert engine.cursors[:, 0].tolist() == [21, 20, 20, 20]
