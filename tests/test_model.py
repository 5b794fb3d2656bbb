"""
model.py against a naive twin (two matmuls a stage, full logits, one backward over K losses), brute-force products and hand counts.

Run: python -m pytest tests/test_model.py
Sizes are distinct primes or near, so that swapped dimensions cannot pass; float64, so that tolerances are rounding alone.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import model as M
from model import PRESETS, KVCache, Linear, ModelConfig, PoE, combine, count_parameters, flops_per_token, norm

CONFIG = dict(sequence_len=13, vocab_size=23, n_layer=5, n_embd=12, n_head=6, n_kv_head=3, mlp_hidden=17, stage_layers=(2, 1, 2))


def make(dtype=torch.float64, **changes):
    """A small model with random weights everywhere: zero projections would hide mistakes."""
    model = PoE(ModelConfig(**{**CONFIG, **changes}), dtype).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def tokens(B=3, T=11, vocab_size=23):
    generator = torch.Generator().manual_seed(2)
    idx = torch.randint(vocab_size, (B, T + 1), generator=generator)
    return idx[:, :-1], idx[:, 1:]


def naive_losses(model, idx, targets, detach):
    """K losses the obvious way: two matmuls a stage, all logits, autograd through everything."""
    x = x0 = model.embed(idx)
    losses = []
    for k in range(model.config.n_stage):
        x = model.stage(k, x, x0, idx)
        logits = F.linear(norm(x), model.lm_head.weight) + (F.linear(norm(x), model.lm_head_stages[k].weight) if model.lm_head_stages else 0)
        losses.append(F.cross_entropy(15 * torch.tanh(logits / 15).flatten(0, 1), targets.flatten()))
        if detach:
            x, x0 = x.detach(), x0.detach()
    return losses


@pytest.mark.parametrize("objective", ["poe", "joint", "bp"])
def test_merged_chunked_per_stage_backward_equals_naive_twin(objective, monkeypatch):
    monkeypatch.setitem(M.LOSS_CHUNK_LOGITS, "cpu", 7 * 23)     # chunks of 7 tokens: a row of 11 makes a whole one and a rest
    changes = {"stage_layers": (5,)} if objective == "bp" else {}
    ours, twin = make(objective=objective, **changes), make(objective=objective, **changes)
    idx, targets = tokens()
    expected = naive_losses(twin, idx, targets, detach=objective == "poe")
    sum(expected).backward()
    losses = [loss for half in range(3)                         # three micro-batches of one row each
              for loss in ours.backward_by_stage(idx[half:half + 1], targets[half:half + 1], 1 / targets.numel(), last=half == 2)]
    for k, loss in enumerate(expected):
        assert abs(sum(value for j, value in losses if j == k).item() - loss.item()) < 1e-12
    for (name, p), (_, q) in zip(ours.named_parameters(), twin.named_parameters()):
        error = (p.grad - q.grad).abs().max().item()
        assert error < 1e-12, f"{name}: gradients differ by {error:.1e}"


def test_no_gradient_of_a_stage_reaches_another_stages_parameters():
    model = make()
    idx, targets = tokens()
    for j, loss in enumerate(naive_losses(model, idx, targets, detach=True)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, p in model.named_parameters():
            own = name in (*model.names_of_stage(j), "lm_head.weight")
            reached = p.grad is not None and bool(p.grad.any())
            assert reached == own, f"loss {j} {'misses' if own else 'reaches'} {name}"


def test_without_the_detach_the_top_loss_reaches_stage_zero():     # the negative control of the test above
    model = make(objective="joint")
    naive_losses(model, *tokens(), detach=False)[-1].backward()
    assert model.blocks[0].mlp.c_fc.weight.grad.abs().max() > 1e-6


def test_wte_is_trained_by_stage_zero_alone():
    model = make()
    after = []
    for k, _ in model.backward_by_stage(*tokens(), 1 / 33):
        after.append(model.wte.weight.grad.clone())
    assert after[0].abs().max() > 0
    assert all(torch.equal(after[0], grad) for grad in after[1:])


def test_backward_by_stage_holds_one_stages_activations():
    """Bytes that autograd saves for backward, at their peak: one of four equal stages under poe, all of them under joint."""
    def peak(objective):
        model, live, most = make(torch.float32, n_layer=4, stage_layers=(1, 1, 1, 1), objective=objective), [0], [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                live[0] += tensor.nbytes
                most[0] = max(most[0], live[0])

            def __del__(self):
                live[0] -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            for _ in model.backward_by_stage(*tokens(), 1.0):
                pass
        assert live[0] == 0
        return most[0]
    poe, joint = peak("poe"), peak("joint")
    assert 0.2 < poe / joint < 0.35, poe / joint


def test_later_stages_still_run_when_their_loss_is_asked_one_at_a_time():
    model = make()
    assert [k for k, _ in model.backward_by_stage(*tokens(), 1.0)] == [0, 1, 2]


@pytest.mark.parametrize("objective", ["poe", "joint"])
def test_gradients_of_two_whole_steps_add_up_in_the_shared_head_too(objective):
    idx, targets = tokens()
    once, twice = make(objective=objective), make(objective=objective)
    for model, n in ((once, 1), (twice, 2)):
        for _ in range(n):
            list(model.backward_by_stage(idx, targets, 1 / targets.numel()))
    for (name, p), (_, q) in zip(once.named_parameters(), twice.named_parameters()):
        assert torch.allclose(2 * p.grad, q.grad, rtol=1e-12, atol=1e-15), name


def test_future_tokens_never_change_earlier_log_probs():
    model = make()
    idx, _ = tokens()
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 23
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_combine_equals_brute_force_product_of_probabilities(alpha):
    generator = torch.Generator().manual_seed(3)
    p = torch.softmax(torch.randn(4, 2, 7, generator=generator, dtype=torch.float64), dim=-1)      # (K, n, V)
    product = p.prod(dim=0) ** (4 ** alpha / 4)                 # exp(K^alpha (1/K) sum log p)
    expected = (product / product.sum(dim=-1, keepdim=True)).log()
    assert (combine(p.log().sum(dim=0), 4, alpha) - expected).abs().max() < 1e-12


def test_prefix_of_all_stages_is_the_full_model_and_of_one_is_stage_zero():
    model = make()
    idx, _ = tokens()
    singles = [model.log_probs(k, x) for k, x in enumerate(model.boundaries(idx))]
    assert torch.equal(combine(sum(singles), 3), model(idx))
    assert torch.equal(combine(singles[0], 1), singles[0])
    assert (model(idx).exp().sum(dim=-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("n_kv_head", [3, 6])
def test_cached_decoding_equals_the_uncached_forward(n_kv_head):
    model = make(n_kv_head=n_kv_head)
    idx, _ = tokens(B=2, T=12)
    expected = model(idx)
    cache = KVCache(model.config, 2, 13, "cpu", torch.float64)
    cache.keys.fill_(1e9), cache.values.fill_(1e9)              # garbage in every slot that no query may read
    got = []
    for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):        # a prompt, then one token, then several
        positions = torch.arange(start, end).expand(2, -1)
        cache.place(positions, end)
        x = x0 = model.embed(idx[:, start:end])
        total = 0
        for k in range(3):
            x = model.stage(k, x, x0, idx[:, start:end], cache)
            total = total + model.log_probs(k, x)
        got.append(combine(total, 3))
    error = (torch.cat(got, dim=1) - expected).abs().max().item()
    assert error < 1e-12, error


def test_rows_at_different_positions_share_a_cache():
    model = make()
    idx, _ = tokens(B=2, T=12)
    expected = model(idx)
    cache = KVCache(model.config, 2, 13, "cpu", torch.float64)

    def step(token_idx, positions, end):
        cache.place(positions, end)
        x = x0 = model.embed(token_idx)
        total = 0
        for k in range(3):
            x = model.stage(k, x, x0, token_idx, cache)
            total = total + model.log_probs(k, x)
        return combine(total, 3)

    step(idx[:, :6], torch.arange(6).expand(2, -1), 6)          # both rows to position 5
    ragged = torch.stack([idx[0, 6:8], idx[1, 3:5]])            # row 0 goes on, row 1 goes back and overwrites 3 and 4
    out = step(ragged, torch.tensor([[6, 7], [3, 4]]), 8)
    assert (out[0] - expected[0, 6:8]).abs().max() < 1e-12
    assert (out[1] - expected[1, 3:5]).abs().max() < 1e-12


def test_frozen_model_gives_the_training_forwards_outputs():
    model = make()
    idx, _ = tokens()
    before = model(idx)
    assert torch.equal(model.freeze_for_inference()(idx), before)


@pytest.mark.parametrize("objective", ["poe", "joint"])
def test_casting_once_a_step_changes_no_loss_and_gradients_by_their_rounding_alone(objective):
    def train(keep):
        model = make(torch.float32, objective=objective)
        model.compute_dtype, (idx, targets), exact, rounded = torch.bfloat16, tokens(), [], []
        for _ in range(2):
            if keep:
                model.cast_weights()
            exact += [loss for half in range(3) for _, loss in model.backward_by_stage(idx[half:half + 1], targets[half:half + 1], 1 / 33, last=half == 2)]
            with torch.no_grad():
                exact.append(model(idx))                        # validation too
                for name, p in model.named_parameters():
                    (rounded if name.startswith("blocks.") and p.dim() == 2 else exact).append(p.grad)
                    p.mul_(0.9)                                 # the casts of the first step are stale now
                    p.grad = None
        return exact, rounded
    (exact, sums), (exact_too, rounded_sums) = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(exact, exact_too, strict=True))
    assert all((a - b).abs().max() <= 2 ** -7 * b.abs().max() for a, b in zip(sums, rounded_sums, strict=True))


def test_gradients_of_kept_casts_are_summed_in_float32():
    def gradients(keep):
        linear = Linear(24, 40)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)))
            if keep:
                linear.keep_cast(torch.bfloat16)
        generator, expected = torch.Generator().manual_seed(1), torch.zeros(40, 24, dtype=torch.float64)
        for number in range(3):
            x = torch.randn(2, 9, 24, generator=generator).bfloat16().requires_grad_(number > 0)    # the first one needs no gradient of its own
            upstream = torch.randn(2, 9, 40, generator=generator).bfloat16()
            linear(x).backward(upstream)
            expected += upstream.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
        return x.grad, (linear.weight.grad - expected).abs().max() / expected.abs().max()
    (x_grad, error), (plain_x_grad, plain_error) = gradients(True), gradients(False)
    assert torch.equal(x_grad, plain_x_grad) and error < 1e-6 and plain_error > 1e-4


def test_bfloat16_frozen_model_equals_the_unfrozen_one_bit_for_bit():
    model = make(torch.float32)
    model.compute_dtype = torch.bfloat16
    idx, _ = tokens()
    before = model(idx)
    assert before.dtype == torch.float32
    assert torch.equal(model.freeze_for_inference()(idx), before)


def test_no_kind_of_a_block_is_left_uncompiled(monkeypatch):
    """Training, then validation with a last batch of fewer rows: dynamo raises where it would run a block without compiling it."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **{**options, "backend": "eager"}))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)                     # its own
    torch._dynamo.utils.counters.clear()
    model = PoE(ModelConfig(**{**CONFIG, "n_layer": 12, "stage_layers": (4, 3, 3, 2)}), torch.bfloat16)
    model.init_weights(0)
    model.compile_regions()
    model.cast_weights()
    for _ in model.backward_by_stage(*tokens(), 1 / 33):
        pass
    with torch.no_grad():
        for rows in (3, 1):
            list(model.boundaries(tokens(rows)[0]))
    # training: the first block, whose x is x0; then gradients of both, of none or of x alone, with a value embedding and without; the loss.
    # Then of each batch: the first block, a value embedding or none.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (1 + 3 * 2) + 1 + 2 * 3, graphs
    torch._dynamo.reset()


def test_loss_gradient_of_a_confident_head_is_exact_in_float32():
    """At the softcap's end, p - 1 cancels; the target's gradient is written, not subtracted in low precision."""
    logits = torch.tensor([[40.0, -3.0, 0.5]])
    loss, grad = M.cross_entropy_chunk(logits, torch.tensor([0]), 1.0)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(15 * torch.tanh(wide / 15), torch.tensor([0]))
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-6
    assert (grad.double() - wide.grad).abs().max() < 1e-8


def test_3b_has_the_cards_parameter_counts():
    groups = count_parameters(PRESETS["3b"])
    assert groups["matrices"] == 2_080_374_784
    assert groups["value_embeds"] == 536_870_912
    assert groups["heads"] == 335_544_320
    assert groups["wte"] == 67_108_864
    assert sum(groups[g] for g in ("matrices", "value_embeds", "heads", "wte")) == 3_019_898_880
    assert groups["gates"] + groups["scalars"] < 1e-4 * 3_019_898_880
    assert [r[-1] for r in PoE_on_meta("3b").layers_of_stage] == [15, 21, 26, 31]


def PoE_on_meta(preset):
    with torch.device("meta"):
        return PoE(PRESETS[preset])


def test_3b_flops_per_token_are_15_70_g():
    assert abs(flops_per_token(PRESETS["3b"]) / 1e9 - 15.70) < 0.005


def test_d12_and_1b_are_near_their_names():
    for preset, size in (("d12", 125e6), ("1b", 1e9)):
        config = PRESETS[preset]
        trunk_and_head = count_parameters(config)["matrices"] + config.vocab_size * config.n_embd
        assert abs(trunk_and_head / size - 1) < 0.05, f"{preset}: {trunk_and_head:,}"


def test_every_parameter_has_one_stage_and_one_group():
    for preset in PRESETS:
        model = PoE_on_meta(preset)
        owned = [name for k in range(4) for name in model.names_of_stage(k)]
        assert sorted([*owned, "lm_head.weight"]) == sorted(name for name, _ in model.named_parameters())
        assert sum(count_parameters(PRESETS[preset]).values()) == sum(p.numel() for p in model.parameters())


def test_bp_has_one_head_and_a_value_embedding_on_the_last_layer():
    model = make(objective="bp", stage_layers=(5,))
    assert len(model.lm_head_stages) == 0
    assert [block.attn.value_embed is not None for block in model.blocks] == [True, False, True, False, True]


def test_init_is_reproducible_and_starts_every_stage_at_the_uniform_distribution():
    a, b = (PoE(ModelConfig(**CONFIG)) for _ in range(2))
    a.init_weights(5), b.init_weights(5)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    b.init_weights(6)
    assert not torch.equal(a.wte.weight, b.wte.weight)
    idx, targets = tokens()
    for _, loss in a.backward_by_stage(idx, targets, 1 / targets.numel()):
        assert abs(loss.item() - math.log(23)) < 0.02           # lm_head has std 0.001


@pytest.mark.parametrize("changes, word", [
    (dict(stage_layers=(2, 2, 2)), "sum"), (dict(stage_layers=()), "sum"), (dict(stage_layers=(6, -1)), "positive"), (dict(n_embd=14), "n_head"),
    (dict(n_head=12), "even"), (dict(n_kv_head=4), "n_kv_head"), 
    (dict(objective="bp"), "one stage")])
def test_a_wrong_shape_is_named(changes, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig(**{**CONFIG, **changes})
