"""
What only a GPU can show: compiled bfloat16 training against float32, the memory of per-stage backward,
decoding over a cache.

Run: python -m pytest tests/test_gpu.py     (skipped without CUDA; what a CPU can show is in the other files)
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from dataloader import open_data
from evaluate import Slice, measure, score, summarize
from model import LOSS_CHUNK_LOGITS, ModelConfig, PoE, attention_backends
from muon import MuonAdamW, orthogonalize, polar
from sample import Engine, Plan, Sampling, generate
from test_sample import decode, decode_over_garbage, ids, read_along
from train import RECIPES, optimizer_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = dict(sequence_len=256, vocab_size=2048, n_layer=8, n_embd=256, n_head=4, n_kv_head=2, mlp_hidden=1024,
             stage_layers=(2, 2, 2, 2))
FULL = Plan(range(4))


@pytest.fixture(autouse=True)
def backends():
    with attention_backends("cuda"):
        yield
    # else its blocks' guards are compared with the next model's, which fails where one has a layer more
    torch._dynamo.reset()


def make(dtype, objective="poe"):
    with torch.device("cuda"):
        model = PoE(ModelConfig(**SHAPE, objective=objective), dtype)
    model.init_weights(0)
    generator = torch.Generator("cuda").manual_seed(1)
    # zero projections would hide the blocks
    for block in model.blocks:
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.normal_(linear.weight, std=0.02, generator=generator)
    return model


def batch(B=8):
    tokens = torch.randint(2048, (B, 257), generator=torch.Generator().manual_seed(0)).cuda()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def losses_and_gradients(model, B=8):
    losses = [loss.item() for _, loss in model.backward_by_stage(*batch(B), 1 / (B * 256))]
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_close(ours, theirs):
    """Losses within bfloat16's 8 bits, nats; gradients that sum many terms point the same way."""
    assert max(abs(a - b) for a, b in zip(ours[0], theirs[0])) < 0.01, (ours[0], theirs[0])
    for name, grad in ours[1].items():
        if grad.dim() == 2 and "value_gate" not in name:
            other = theirs[1][name].flatten().double()
            cosine = F.cosine_similarity(grad.flatten().double(), other, dim=0).item()
            assert cosine > 0.99, f"{name}: {cosine:.4f}"


def test_compiled_bfloat16_training_is_float32_training_within_bfloat16():
    model = make(torch.bfloat16)
    model.compile_regions()
    assert_close(losses_and_gradients(model), losses_and_gradients(make(torch.float32)))


def test_compiled_training_in_fp8_is_float32_training_within_its_rounding():
    model = make(torch.bfloat16)
    model.fp8 = True
    model.compile_regions()
    model.cast_weights()
    assert_close(losses_and_gradients(model), losses_and_gradients(make(torch.float32)))


def test_kept_casts_sum_gradients_in_float32_when_compiled():
    once = losses_and_gradients(make(torch.bfloat16))
    model = make(torch.bfloat16)
    model.compile_regions()
    model.cast_weights()
    losses, grads = losses_and_gradients(model)
    first = {name: grad.clone() for name, grad in grads.items()}
    assert_close((losses, first), once)
    # the same micro-batch again
    losses_and_gradients(model)
    for name, grad in first.items():
        if name.endswith((".c_fc.weight", ".c_proj.weight", ".c_q.weight", ".c_k.weight", ".c_v.weight")):
            # attention's backward may differ in order
            assert (grads[name] - 2 * grad).abs().max() <= 0.02 * grad.abs().max(), name
            assert torch.equal(once[1][name], once[1][name].bfloat16().float()), name
            assert not torch.equal(grad, grad.bfloat16().float()), name


def test_backward_by_stage_holds_one_stages_activations(monkeypatch):
    # a loss small beside the activations, as in a large model
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cuda", 2 ** 20)

    def peak(objective):
        model = make(torch.bfloat16, objective)
        # gradients are allocated by now
        losses_and_gradients(model, B=32)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in model.backward_by_stage(*batch(32), 1.0):
            pass
        return torch.cuda.max_memory_allocated() - before
    poe = peak("poe")
    joint = peak("joint")
    # four equal stages: about a quarter
    assert poe < 0.5 * joint, (poe, joint)


# bfloat16, and float16 by way of the Gram matrix
@pytest.mark.parametrize("shape, most", [((128, 800), 0.01), ((800, 128), 0.01), ((128, 128), 0.03)])
def test_orthogonalisation_in_16_bits_is_the_exact_iteration(shape, most):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    tall = shape[0] > shape[1]
    X = G.double() / (1.02 * G.double().norm(dim=(-2, -1), keepdim=True))
    exact = polar(X.mT).mT if tall else polar(X)
    error = ((orthogonalize(G.cuda()).cpu().double() - exact).norm() / exact.norm()).item()
    assert error < most, error


def test_the_compiled_optimizer_moves_weights_as_the_plain_one():
    def moved(compile):
        model = make(torch.float32)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = MuonAdamW(optimizer_groups(model, RECIPES["d12"]), compile=compile)
        generator = torch.Generator("cuda").manual_seed(3)
        for _ in range(3):
            for p in model.parameters():
                p.grad = 1e-3 * torch.randn(p.shape, device="cuda", generator=generator)
            optimizer.step()
        return {name: (p.detach() - before[name]).double().flatten() for name, p in model.named_parameters()}
    plain = moved(False)
    compiled = moved(True)
    for name in plain:
        # Newton-Schulz in bfloat16 turns rounding into angles
        cosine = F.cosine_similarity(plain[name], compiled[name], dim=0).item()
        assert cosine > 0.999, f"{name}: {cosine:.5f}"
        assert abs(compiled[name].norm() / plain[name].norm() - 1) < 1e-3, name


STOPPED = """
import os, signal, sys, train
from muon import MuonAdamW
step = MuonAdamW.step
def terminated(self):
    step(self)
    if next(iter(self.state.values()))["step"] == 3:
        os.killpg(0, signal.SIGTERM), os.killpg(0, signal.SIGTERM)
MuonAdamW.step = terminated
train.main(sys.argv[1:])
"""


def test_sigterm_to_the_process_group_does_not_hang_what_is_still_to_compile(tmp_path):
    """`timeout` and schedulers signal the group, and Inductor's workers die of it; the last validation is yet
    to be compiled.
    """
    argv = ["--out", tmp_path / "run", *"--num-steps 3 --warmup-steps 1 --eval-every -1".split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", STOPPED, *argv], capture_output=True, text=True,
                            start_new_session=True, timeout=300, env=environment)
    assert result.returncode == 0 and "saving at the next" in result.stderr, result
    assert "val_bpb" in result.stdout, result


@pytest.fixture(scope="module")
def decoder():
    """A bfloat16 model whose stage 0 often agrees with the product, and a prompt."""
    model = make(torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(2)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1, generator=generator)
    for head in model.lm_head_stages:
        torch.nn.init.normal_(head.weight, std=0.02, generator=generator)
    for block in model.blocks[2:]:
        block.attn.c_proj.weight.data.mul_(0.5)
        block.mlp.c_proj.weight.data.mul_(0.5)
    return model.freeze_for_inference(), batch(1)[0][0, :20].tolist()


@pytest.mark.parametrize("fast", [False, True])
def test_cached_decoding_says_what_the_uncached_forward_says(decoder, fast):
    model, prompt = decoder
    tokens = decode(Engine(model, FULL, fast=fast), prompt, 60)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + ids(tokens)], device="cuda"))[0, len(prompt) - 1:-1].cpu()
    chosen = expected.gather(1, torch.tensor(ids(tokens))[:, None])[:, 0]
    # a near tie in bfloat16 may fall either way
    assert (expected.max(dim=-1).values - chosen).max().item() < 0.1
    assert (chosen - torch.tensor([t.log_prob for t in tokens])).abs().max().item() < 0.1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 50, 0.95, seed=3)])
def test_speculation_in_bfloat16_writes_the_very_tokens_of_plain_decoding(decoder, fast, sampling):
    model, prompt = decoder
    plain = ids(decode(Engine(model, FULL, sampling=sampling, fast=fast), prompt, 230))
    for plan in (Plan(range(4), 4, "same"), *(Plan(range(4), m, "int8") for m in (1, 4, 12, 16))):
        tokens = decode(Engine(model, plan, sampling=sampling, fast=fast), prompt, 230)
        assert ids(tokens) == plain, plan
        assert 10 < sum(t.stage == 0 for t in tokens)


@pytest.mark.parametrize("plan", [Plan(range(4), exits=(0.3,) * 3), Plan(range(4), exits=(0.02,) * 3),
                                  Plan(range(4), 4), Plan(range(4), 20)])
def test_stages_that_caught_up_hold_the_cache_of_a_teacher_forced_pass(decoder, plan):
    model, prompt = decoder
    engine = Engine(model, plan, fast=True)
    teacher = Engine(model, FULL, fast=True)
    text = ids(decode_over_garbage(engine, prompt, 200))
    read_along(teacher, prompt, text)
    # one more cycle was on its way
    n = min(int(engine.cursors[1]), len(prompt) + len(text) - 1)
    assert torch.equal(engine.cache.keys[:, :, :n], teacher.cache.keys[:, :, :n])
    assert torch.equal(engine.cache.values[:, :, :n], teacher.cache.values[:, :, :n])


def test_ragged_rows_by_the_kernels_are_what_they_are_alone(decoder):
    model, prompt = decoder
    prompts = [prompt, prompt[:1], prompt * 3, prompt[:7]]
    engine = Engine(model, FULL, 4, fast=True)
    alone = Engine(model, FULL, fast=True)
    engine.begin(prompts)
    steps = list(generate(engine, 40))
    for row, one in enumerate(prompts):
        expected = [(token.id, token.log_prob) for token in decode(alone, one, 40)]
        assert [(step.rows[row][0].id, step.rows[row][0].log_prob) for step in steps] == expected


@pytest.mark.parametrize("plan", [FULL, Plan(range(4), 4), Plan(range(4), exits=(0.3, 0.3, 0.3))])
def test_no_step_of_a_loop_waits_for_the_host_or_compiles_anew(decoder, plan):
    model, prompt = decoder
    engine = Engine(model, plan, fast=True)
    # captures what it needs
    decode(engine, prompt, 100)
    engine.begin([prompt])
    captured = len(engine.graphs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        n = sum(len(step.rows[0]) for step in generate(engine, 100))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert n >= 100 and len(engine.graphs) == captured


def test_the_compiled_pass_of_evaluation_is_the_float64_one_within_bfloat16():
    model = make(torch.bfloat16)
    wide = make(torch.float32)
    for m in (model, wide):
        # logits of a few nats
        torch.nn.init.normal_(m.lm_head.weight, std=0.1, generator=torch.Generator("cuda").manual_seed(3))
    wide = wide.double().cpu()
    wide.compute_dtype = torch.float64
    data = open_data("", 2048)
    part = Slice(data.val(256), 24, 8, data.tokenizer)
    found = measure(model, part, 3, 0.02)
    light = summarize(score(model, part.mix, 24, data.tokenizer, 8))
    expected = measure(wide, part, 3, 0.02)

    def figures(metrics):
        bpb = metrics["bpb"]
        return [*bpb["single"], *bpb["prefix"], bpb["full"], metrics["alpha_sweep"]["1"]]
    # bfloat16 logits err by 2^-9 of their size, either way, and average out
    assert figures(found) == pytest.approx(figures(expected), rel=2e-3)
    assert light["bpb"]["full"] == pytest.approx(expected["bpb"]["full"], rel=2e-3)
    assert found["wand"]["p99_bounds"] == pytest.approx(expected["wand"]["p99_bounds"], rel=0.05)
    assert found["bpb"]["prefix"][0] == found["bpb"]["single"][0]
    assert found["bpb"]["prefix"][-1] == found["bpb"]["full"]
    for key in ("tokens", "bytes"):
        assert found[key] == expected[key]
    agreement = expected["routing"]["base_agreement"]
    assert found["routing"]["base_agreement"] == pytest.approx(agreement, abs=0.05)
