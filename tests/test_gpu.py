"""
What only a GPU can show: compiled bfloat16 training against float32, the memory of per-stage backward, decoding over a cache.

Run: python -m pytest tests/test_gpu.py            (skipped without CUDA; every claim has a CPU form in the other files)
"""
import pytest
import torch

from dataloader import open_data
from evaluate import Slice, measure, score, summarize
from model import LOSS_CHUNK_LOGITS, ModelConfig, PoE, attention_backends
from sample import generate

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


def test_cached_decoding_equals_the_uncached_forward():
    model, (idx, _) = make(torch.float32), batch(1)
    prompt = idx[0, :40].tolist()
    with attention_backends("cuda"):
        tokens = [int(t) for t in generate(model, prompt, 30, range(4), temperature=0.0)]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens], device="cuda"))[0, 39:-1]
    margin = expected.max(dim=-1).values - expected.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    assert margin.max().item() < 1e-4, margin                   # the chosen token is the best one up to float32 rounding


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
