"""
What only a GPU can show: compiled bfloat16 training against float32, the memory of per-stage backward, decoding over a cache.

Run: python -m pytest tests/test_gpu.py            (skipped without CUDA; what a CPU can show of it is in the other files)
"""
import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from dataloader import open_data
from evaluate import Slice, measure, score, summarize
from model import LOSS_CHUNK_LOGITS, ModelConfig, PoE, attention_backends
from muon import MuonAdamW, orthogonalize, polar
from sample import Engine, Plan, Sampling, generate
from test_sample import read_along
from train import RECIPES, optimizer_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPE = dict(sequence_len=256, vocab_size=2048, n_layer=8, n_embd=256, n_head=4, n_kv_head=2, mlp_hidden=1024, stage_layers=(2, 2, 2, 2))


def make(dtype, objective="poe"):
    with torch.device("cuda"):
        model = PoE(ModelConfig(**SHAPE, objective=objective), dtype)
    model.init_weights(0)
    generator = torch.Generator("cuda").manual_seed(1)
    for block in model.blocks:                                  # zero projections would hide the blocks
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            torch.nn.init.normal_(linear.weight, std=0.02, generator=generator)
    return model


def batch(B=8):
    tokens = torch.randint(2048, (B, 257), generator=torch.Generator().manual_seed(0)).cuda()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def losses_and_gradients(model, B=8):
    with attention_backends("cuda"):
        losses = [loss.item() for _, loss in model.backward_by_stage(*batch(B), 1 / (B * 256))]
    return losses, {name: p.grad for name, p in model.named_parameters()}


def test_compiled_bfloat16_training_is_float32_training_within_bfloat16():
    reference, wide = losses_and_gradients(make(torch.float32))
    model = make(torch.bfloat16)
    model.compile_regions()
    losses, grads = losses_and_gradients(model)
    assert max(abs(a - b) for a, b in zip(losses, reference)) < 0.01, (losses, reference)      # nats; bfloat16 has 8 bits
    for name, grad in grads.items():
        if grad.dim() == 2 and "value_gate" not in name:        # sums of many terms: their direction is well determined
            cosine = torch.nn.functional.cosine_similarity(grad.flatten().double(), wide[name].flatten().double(), dim=0).item()
            assert cosine > 0.99, f"{name}: {cosine:.4f}"


def test_kept_casts_sum_gradients_in_float32_when_compiled():
    reference, once = losses_and_gradients(make(torch.bfloat16))
    model = make(torch.bfloat16)
    model.compile_regions()
    model.cast_weights()
    losses, grads = losses_and_gradients(model)
    first = {name: grad.clone() for name, grad in grads.items()}
    assert max(abs(a - b) for a, b in zip(losses, reference)) < 0.01, (losses, reference)
    losses_and_gradients(model)                                 # the same micro-batch again
    for name, grad in first.items():
        if grad.dim() == 2 and "value_gate" not in name:
            assert torch.nn.functional.cosine_similarity(grad.flatten(), once[name].flatten(), dim=0) > 0.99, name
        if name.endswith((".c_fc.weight", ".c_proj.weight", ".c_q.weight", ".c_k.weight", ".c_v.weight")):
            assert (grads[name] - 2 * grad).abs().max() <= 0.02 * grad.abs().max(), name       # attention's backward may differ in order
            assert torch.equal(once[name], once[name].bfloat16().float()) and not torch.equal(grad, grad.bfloat16().float()), name


def test_backward_by_stage_holds_one_stages_activations(monkeypatch):
    monkeypatch.setitem(LOSS_CHUNK_LOGITS, "cuda", 2 ** 20)     # a loss small beside the activations, as in a large model

    def peak(objective):
        model = make(torch.bfloat16, objective)
        losses_and_gradients(model, B=32)                       # gradients are allocated by now
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in model.backward_by_stage(*batch(32), 1.0):
            pass
        return torch.cuda.max_memory_allocated() - before
    poe, joint = peak("poe"), peak("joint")
    assert poe < 0.5 * joint, (poe, joint)                      # four equal stages: about a quarter


@pytest.mark.parametrize("shape", [(128, 800), (800, 128), (128, 128)])
def test_orthogonalisation_in_16_bits_is_the_exact_iteration(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = polar((G.double() if shape[0] <= shape[1] else G.double().mT) / (1.02 * G.double().norm(dim=(-2, -1), keepdim=True)))
    ours = orthogonalize(G.cuda()).cpu().double()
    error = (ours - (exact if shape[0] <= shape[1] else exact.mT)).norm() / exact.norm()
    assert error < (0.03 if shape[0] == shape[1] else 0.01), error          # bfloat16, and float16


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
    plain, compiled = moved(False), moved(True)
    for name in plain:                                          # Newton-Schulz in bfloat16 turns rounding into angles
        cosine = torch.nn.functional.cosine_similarity(plain[name], compiled[name], dim=0).item()
        assert cosine > 0.999 and abs(compiled[name].norm() / plain[name].norm() - 1) < 1e-3, f"{name}: {cosine:.5f}"


def test_sigterm_to_the_process_group_does_not_hang_what_is_still_to_compile(tmp_path):
    """`timeout` and schedulers signal the group, and Inductor's workers die of it; the last validation is yet to be compiled."""
    script = """
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
    result = subprocess.run([sys.executable, "-c", script, "--out", tmp_path / "run", "--num-steps", "3", "--warmup-steps", "1", "--eval-every", "-1"],
                            capture_output=True, text=True, start_new_session=True, timeout=300,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert result.returncode == 0 and "saving at the next" in result.stderr and "val_bpb" in result.stdout, result.stdout + result.stderr


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


def decode(engine, prompt, n):
    engine.begin([prompt])
    return [token for step in generate(engine, n) for token in step.rows[0]][:n]


@pytest.mark.parametrize("fast", [False, True])
def test_cached_decoding_says_what_the_uncached_forward_says(decoder, fast):
    model, prompt = decoder
    with attention_backends("cuda"):
        tokens = decode(Engine(model, Plan(range(4)), fast=fast), prompt, 60)
        with torch.no_grad():
            expected = model(torch.tensor([prompt + [t.id for t in tokens]], device="cuda"))[0, len(prompt) - 1:-1]
    chosen = expected.gather(1, torch.tensor([t.id for t in tokens], device="cuda")[:, None])[:, 0]
    assert (expected.max(dim=-1).values - chosen).max().item() < 0.1            # a near tie in bfloat16 may fall either way
    assert (chosen.cpu() - torch.tensor([t.log_prob for t in tokens])).abs().max().item() < 0.1


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 50, 0.95, seed=3)])
def test_speculation_in_bfloat16_writes_the_very_tokens_of_plain_decoding(decoder, fast, sampling):
    model, prompt = decoder
    with attention_backends("cuda"):
        plain = [t.id for t in decode(Engine(model, Plan(range(4)), sampling=sampling, fast=fast), prompt, 230)]
        for draft_len in (1, 4, 16):
            plan = Plan(range(4), draft_len)
            tokens = decode(Engine(model, plan, sampling=sampling, fast=fast), prompt, 230)
            assert [t.id for t in tokens] == plain, plan
            assert 10 < sum(t.stage == 0 for t in tokens)


@pytest.mark.parametrize("plan", [Plan(range(4), exits=(0.3,) * 3), Plan(range(4), exits=(0.02,) * 3),
                                  Plan(range(4), 4), Plan(range(4), 20)])
def test_stages_that_caught_up_hold_the_cache_of_a_teacher_forced_pass(decoder, plan):
    model, prompt = decoder
    with attention_backends("cuda"):
        engine, teacher = Engine(model, plan, fast=True), Engine(model, Plan(range(4)), fast=True)
        engine.begin([prompt])
        engine.cache.keys[:, :, len(prompt) - 1:] = 1e4
        engine.cache.values[:, :, len(prompt) - 1:] = 1e4
        ids = [token.id for step in generate(engine, 200) for token in step.rows[0]]
        read_along(teacher, prompt, ids)
        for k in range(1, 4):
            waiting = int(engine.cursors[1] - engine.cursors[k + 1])
            if waiting:
                engine.start_lift(k, waiting, decides=False)
    # one more cycle was on its way
    n = min(int(engine.cursors[1]), len(prompt) + len(ids) - 1)
    assert len(set(engine.cursors[1:, 0].tolist())) == 1
    for ours, theirs in ((engine.cache.keys, teacher.cache.keys),
                         (engine.cache.values, teacher.cache.values)):
        assert torch.equal(ours[:, :, :n], theirs[:, :, :n])


def test_ragged_rows_by_the_kernels_are_what_they_are_alone(decoder):
    model, prompt = decoder
    prompts = [prompt, prompt[:1], prompt * 3, prompt[:7]]
    with attention_backends("cuda"):
        engine, alone = Engine(model, Plan(range(4)), 4, fast=True), Engine(model, Plan(range(4)), fast=True)
        engine.begin(prompts)
        steps = list(generate(engine, 40))
        rows = [[step.rows[row][0].id for step in steps] for row in range(4)]
        assert rows == [[t.id for t in decode(alone, p, 40)] for p in prompts]


def test_no_step_of_a_loop_waits_for_the_host_or_compiles_anew(decoder):
    model, prompt = decoder
    with attention_backends("cuda"):
        for plan in (Plan(range(4)), Plan(range(4), 4), Plan(range(4), exits=(0.3, 0.3, 0.3))):
            engine = Engine(model, plan, fast=True)
            decode(engine, prompt, 100)                         # captures what it needs
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
    model, wide = make(torch.bfloat16), make(torch.float32)
    for m in (model, wide):
        torch.nn.init.normal_(m.lm_head.weight, std=0.1, generator=torch.Generator("cuda").manual_seed(3))     # logits of a few nats
    wide = wide.double().cpu()
    wide.compute_dtype = torch.float64
    data = open_data("", 2048)
    part = Slice(data.val(256), 24, 8, data.tokenizer)
    with attention_backends("cuda"):
        found, light = measure(model, part, 3, 0.02), summarize(score(model, part.mix, 24, data.tokenizer, 8))
    expected = measure(wide, part, 3, 0.02)
    for got, want in ((found["bpb"]["full"], expected["bpb"]["full"]), (light["bpb"]["full"], expected["bpb"]["full"]),
                      *zip(found["bpb"]["single"], expected["bpb"]["single"]), (found["alpha_sweep"]["1"], expected["alpha_sweep"]["1"])):
        assert abs(got / want - 1) < 2e-3, (found, expected)    # bfloat16 logits err by 2^-9 of their size, either way, and average out
    for got, want in zip(found["wand"]["p99_bounds"], expected["wand"]["p99_bounds"]):
        assert abs(got / want - 1) < 0.05, (found["wand"], expected["wand"])
    assert found["bpb"]["prefix"][0] == found["bpb"]["single"][0] and found["bpb"]["prefix"][-1] == found["bpb"]["full"]
    assert (found["tokens"], found["bytes"], found["wand"]["report_tokens"]) == (expected["tokens"], expected["bytes"], expected["wand"]["report_tokens"])
    assert abs(found["routing"]["base_agreement"] - expected["routing"]["base_agreement"]) < 0.05
