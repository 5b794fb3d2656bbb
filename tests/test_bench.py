"""
bench.py: what it times are true twins, and its tables hold what they should.

Run: python -m pytest tests/test_bench.py
"""
import json

import pytest
import torch
import torch.nn.functional as F

import bench
from test_model import make, tokens

TRAIN = "train --preset tiny --total-batch-tokens 512 --device-batch-size 1 --bench-repeats 1 --device cpu"


def printed(capsys):
    """{name: row} of the JSON in the last line."""
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row["name"]: row for row in result.get("variants") or result["modes"]}


def test_no_matrix_of_a_benchmark_is_zeros_and_the_others_keep_their_values():
    model = make()
    model.init_weights(3)
    before = model.wte.weight.clone()
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
    bench.free_memory({"naive": bench.Variant(naive, None, None, None)})
    bench.real_step(ours, batches, 1 / 33)
    bench.naive_step(naive, batches, 1 / 33)
    for (name, p), q in zip(ours.named_parameters(), naive.parameters()):
        assert torch.allclose(q.grad, p.grad, rtol=1e-9, atol=1e-12), name


def test_the_backprop_twin_is_a_backprop_model_of_the_same_weights():
    model = make()
    idx, targets = tokens()
    (_, loss), = bench.backprop_twin(model).backward_by_stage(idx, targets, 1 / 33)
    logits = F.linear(bench.norm(list(model.boundaries(idx))[-1]), model.lm_head.weight)
    expected = F.cross_entropy(bench.softcap(logits).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert model.blocks[0].mlp.c_fc.weight.grad is not None


def test_train_times_every_variant(capsys):
    bench.main([*TRAIN.split(), "--variants", "bp,naive,poe:2"])
    rows = printed(capsys)
    assert list(rows) == ["bp", "naive", "poe:2"] and rows["bp"]["of_bp"] == 1.0
    for name, row in rows.items():
        assert row["device_batch_size"] == (2 if name == "poe:2" else 1) and row["optimizer_ms"] > 0
        assert row["fwdbwd_ms_min"] <= row["fwdbwd_ms"] <= row["fwdbwd_ms_max"]
        assert row["tokens_per_s"] == pytest.approx(512e3 / row["fwdbwd_ms"])


@pytest.mark.parametrize("argv, told", [
    (f"{TRAIN} --variants bp,poe:x", "'poe:x'"), (f"{TRAIN} --variants poe:3", "poe:3"),
    (f"{TRAIN} --variants nanochat", "NANOCHAT_DIR"), ("decode", "--preset"),
    ("decode --preset tiny runs/nowhere", "--preset")])
def test_odd_flags_are_refused(argv, told, refused, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DIR", "nowhere")
    assert told in refused(bench.main, *argv.split())


def test_decode_measures_every_mode_of_a_checkpoint(trained, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", ("a",))
    monkeypatch.setattr(bench, "DRAFT_LENGTHS", (1, 2))
    rounded = []
    monkeypatch.setattr(bench.Engine, "round_weights", rounded.append)
    argv = "--bench-repeats 1 --max-new-tokens 3 --dtype float64 --device cpu --acceptance 0.9"
    bench.main(["decode", str(trained), *argv.split(), "--draft-weights", "int8"])
    assert len(rounded) == 2
    rows = printed(capsys)
    assert list(rows) == ["full", "s0 alone", "speculative 1", "speculative 2"]
    # stage 0 reads 2 layers of 2 x 12 x (12 + 4 + 20) weights of 8 bytes, and a head of 12 x 300
    s0 = rows["s0 alone"]
    assert s0["gigabytes_per_s"] == pytest.approx(8 * (2 * 864 + 3600) * s0["tokens_per_s"] / 1e9)
    # one draft: two tokens if it is accepted, else one. Of two, each needs the one before
    for name, n_tokens in (("full", 1), ("speculative 1", 1.9), ("speculative 2", 2.71)):
        speed = 1e3 * n_tokens / rows[name]["cycle_ms"]
        assert rows[name]["tokens_per_s_at_acceptance"] == pytest.approx(speed)
        speed /= rows["full"]["tokens_per_s_at_acceptance"]
        assert rows[name]["speedup_at_acceptance"] == pytest.approx(speed)


def test_decode_of_random_weights_tells_nothing_of_acceptance(capsys, monkeypatch):
    monkeypatch.setattr(bench, "DRAFT_LENGTHS", (4,))
    bench.main("decode --preset tiny --device cpu --bench-repeats 1 --max-new-tokens 2".split())
    rows = printed(capsys)
    assert "tokens_per_s" in rows["full"]
    assert list(rows["speculative 4"]) == ["name", "cycle_ms", "tokens_per_s_at_acceptance",
                                           "speedup_at_acceptance"]


def test_what_runs_out_of_memory_is_left_out():
    def fail():
        raise torch.OutOfMemoryError
    assert bench.in_rounds({"big": fail, "small": lambda: 7}, 2) == {"small": [7, 7]}
