"""
model.py against a naive twin (two matmuls a stage, full logits, one backward over K losses), brute-force
products and hand counts.

Run: python -m pytest tests/test_model.py
Sizes are distinct primes or near, so that swapped dimensions cannot pass; float64, so that tolerances are
rounding alone.
"""
import math

import pytest
import torch
import torch.nn.functional as F

import model as M
from model import (
    E4M3,
    E5M2,
    MLP,
    PRESETS,
    KVCache,
    Linear,
    ModelConfig,
    PoE,
    combine,
    count_parameters,
    norm,
    quantize,
)

CONFIG = dict(sequence_len=13, vocab_size=23, n_layer=5, n_embd=12, n_head=6, n_kv_head=3, mlp_hidden=17,
              stage_layers=(2, 1, 2))


def make(dtype=torch.float64, **changes):
    """A small model with random weights everywhere: zero projections would hide mistakes."""
    model = PoE(ModelConfig(**{**CONFIG, **changes}), dtype).to(dtype)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def tokens(B=3, T=11):
    idx = torch.randint(23, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return idx[:, :-1], idx[:, 1:]


def naive_losses(model, idx, targets, detach):
    """K losses the obvious way: two matmuls a stage, all logits, autograd through everything."""
    x = x0 = model.embed(idx)
    losses = []
    for k in range(model.config.n_stage):
        x = model.stage(k, x, x0, idx)
        logits = F.linear(norm(x), model.lm_head.weight)
        if model.lm_head_stages:
            logits = logits + F.linear(norm(x), model.lm_head_stages[k].weight)
        losses.append(F.cross_entropy(15 * torch.tanh(logits / 15).flatten(0, 1), targets.flatten()))
        if detach:
            x = x.detach()
            x0 = x0.detach()
    return losses


def backward_in_three(model, idx, targets):
    """Losses of every stage of three micro-batches of one row each, in order."""
    return [loss for row in range(3) for _, loss in model.backward_by_stage(
        idx[row:row + 1], targets[row:row + 1], 1 / targets.numel(), last=row == 2)]


@pytest.mark.parametrize("objective, stage_layers", [("poe", (2, 1, 2)), ("joint", (2, 1, 2)), ("bp", (5,))])
def test_merged_chunked_per_stage_backward_equals_naive_twin(objective, stage_layers, monkeypatch):
    # chunks of 7 tokens: a row of 11 makes a whole one and a rest
    monkeypatch.setitem(M.LOSS_CHUNK_LOGITS, "cpu", 7 * 23)
    ours, twin = (make(objective=objective, stage_layers=stage_layers) for _ in range(2))
    expected = naive_losses(twin, *tokens(), detach=objective == "poe")
    sum(expected).backward()
    losses = backward_in_three(ours, *tokens())
    for k, loss in enumerate(expected):
        assert abs(sum(losses[k::len(expected)]) - loss).item() < 1e-12
    for (name, p), q in zip(ours.named_parameters(), twin.parameters()):
        error = (p.grad - q.grad).abs().max().item()
        assert error < 1e-12, f"{name}: gradients differ by {error:.1e}"


@pytest.mark.parametrize("fp8", [False, True])
def test_a_stages_loss_reaches_its_own_parameters_and_the_shared_head_alone(fp8):
    """wte too is trained by stage 0 alone; each stage's gradients are there when it is yielded."""
    model = make()
    model.fp8 = fp8
    model.cast_weights()
    before = {}
    for k, _ in model.backward_by_stage(*tokens(), 1 / 33):
        # the others' are None, or zeros beside a cast
        grads = {name: p.grad.clone() for name, p in model.named_parameters()
                 if p.grad is not None and p.grad.any()}
        reached = {name for name in grads if name not in before or not torch.equal(grads[name], before[name])}
        assert reached == {*model.names_of_stage(k), "lm_head.weight"}
        before = grads
    assert len(before) == len(list(model.parameters()))


def test_backward_by_stage_holds_one_stages_activations():
    """Bytes that autograd saves for backward, at their peak: of one of four equal stages, or of all."""
    def peak(objective):
        model = make(torch.float32, n_layer=4, stage_layers=(1, 1, 1, 1), objective=objective)
        live = [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                live.append(live[-1] + tensor.nbytes)

            def __del__(self):
                live.append(live[-1] - self.tensor.nbytes)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            list(model.backward_by_stage(*tokens(), 1.0))
        return max(live)
    assert 0.2 < peak("poe") / peak("joint") < 0.35


def test_future_tokens_never_change_earlier_log_probs():
    model = make()
    idx, _ = tokens()
    changed = idx.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 23
    same = model(idx) == model(changed)
    assert same[:, :7].all() and not same[:, 7:].all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_combine_equals_brute_force_product_of_probabilities(alpha):
    # (K, n, V)
    p = torch.randn(4, 2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(dim=-1)
    # exp(K^alpha (1/K) sum log p)
    product = p.prod(dim=0) ** (4 ** alpha / 4)
    expected = (product / product.sum(dim=-1, keepdim=True)).log()
    assert (combine(p.log().sum(dim=0), 4, alpha) - expected).abs().max() < 1e-12


def test_prefix_of_all_stages_is_the_full_model_and_of_one_is_stage_zero():
    model = make()
    idx, _ = tokens()
    singles = [model.log_probs(k, x) for k, x in enumerate(model.boundaries(idx))]
    assert torch.equal(combine(sum(singles), 3), model(idx))
    assert torch.equal(combine(singles[0], 1), singles[0])


@pytest.mark.parametrize("n_kv_head", [3, 6])
def test_cached_decoding_of_ragged_rows_equals_the_uncached_forward(n_kv_head):
    model = make(n_kv_head=n_kv_head)
    idx, _ = tokens(B=2)
    expected = model(idx)
    cache = KVCache(model.config, 2, 13, "cpu", torch.float64)
    # garbage in every slot that no query may read
    cache.keys.fill_(1e9)
    cache.values.fill_(1e9)
    # a prompt, one token, then row 0 goes on and row 1 goes back and overwrites 3 to 5, then several
    for first, second, n in ((0, 0, 5), (5, 5, 1), (6, 3, 3), (9, 6, 2)):
        positions = torch.stack([torch.arange(first, first + n), torch.arange(second, second + n)])
        part = idx.gather(1, positions)
        cache.place(positions, first + n)
        x = x0 = model.embed(part)
        total = 0
        for k in range(3):
            x = model.stage(k, x, x0, part, cache)
            total = total + model.log_probs(k, x)
        error = (combine(total, 3) - expected[torch.arange(2)[:, None], positions]).abs().max().item()
        assert error < 1e-12, (first, error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_model_gives_the_bits_of_the_training_forward(dtype):
    model = make(torch.promote_types(dtype, torch.float32))
    model.compute_dtype = dtype
    before = model(tokens()[0])
    assert before.dtype == model.lm_head.weight.dtype
    assert torch.equal(model.freeze_for_inference()(tokens()[0]), before)


@pytest.mark.parametrize("objective", ["poe", "joint"])
def test_casting_once_a_step_changes_no_loss_and_gradients_by_their_rounding_alone(objective):
    def train(keep):
        model = make(torch.float32, objective=objective)
        model.compute_dtype = torch.bfloat16
        exact = []
        rounded = []
        for _ in range(2):
            if keep:
                model.cast_weights()
            exact += backward_in_three(model, *tokens())
            with torch.no_grad():
                # validation too
                exact.append(model(tokens()[0]))
                for name, p in model.named_parameters():
                    (rounded if name.startswith("blocks.") and p.dim() == 2 else exact).append(p.grad)
                    # the casts of the first step are stale now
                    p.mul_(0.9)
                    p.grad = None
        return exact, rounded
    (exact, sums), (exact_too, rounded_sums) = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(exact, exact_too, strict=True))
    for a, b in zip(sums, rounded_sums, strict=True):
        assert (a - b).abs().max() <= 2 ** -7 * b.abs().max()


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_of_kept_casts_are_summed_in_float32(keep):
    generator = torch.Generator().manual_seed(0)
    linear = Linear(24, 40)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(40, 24, generator=generator))
    if keep:
        linear.keep_cast(torch.bfloat16)
    expected = 0
    for number in range(3):
        # the first one needs no gradient of its own
        x = torch.randn(18, 24, generator=generator).bfloat16().requires_grad_(number > 0)
        upstream = torch.randn(18, 40, generator=generator).bfloat16()
        linear(x).backward(upstream)
        expected = expected + upstream.double().T @ x.detach().double()
    assert torch.equal(x.grad, upstream @ linear.weight.bfloat16())
    error = (linear.weight.grad - expected).abs().max() / expected.abs().max()
    assert error < 1e-6 if keep else error > 1e-4


def in_8_bits(x, dtype):
    """x rounded to float8 by one scale, as float64."""
    scale = x.abs().max() / torch.finfo(dtype).max
    return (x / scale).to(dtype).double() * scale


def test_an_mlp_in_fp8_is_its_twin_in_float64_whose_factors_are_rounded():
    generator = torch.Generator().manual_seed(0)
    mlp = MLP(ModelConfig(**CONFIG | {"n_embd": 48, "mlp_hidden": 160}))
    x, upstream = torch.randn(2, 3, 32, 48, generator=generator)
    grads = 0
    for number in range(2):
        for linear in (mlp.c_fc, mlp.c_proj):
            torch.nn.init.normal_(linear.weight, generator=generator)
            linear.keep_cast(E4M3, quantize)
        x.requires_grad_().grad = None
        y = mlp(x)
        y.backward(upstream)

        rows = in_8_bits(x.detach().double().flatten(0, 1), E4M3)
        fc, proj = (in_8_bits(linear.weight.detach().double(), E4M3) for linear in (mlp.c_fc, mlp.c_proj))
        h = in_8_bits(F.relu(rows @ fc.T).square(), E4M3)
        dy = in_8_bits(upstream.double().flatten(0, 1), E5M2)
        da = in_8_bits((dy @ proj) * 2 * h.sqrt(), E5M2)
        # a second pass adds to the gradients
        grads = grads + torch.cat([(da.T @ rows).flatten(), (dy.T @ h).flatten()])
        ours = torch.cat([mlp.c_fc.weight.grad.flatten(), mlp.c_proj.weight.grad.flatten()])
        for a, b in ((y.flatten(0, 1), h @ proj.T), (x.grad.flatten(0, 1), da @ fc), (ours, grads)):
            # a number between two of float8 may be rounded to the other
            assert (a - b).norm() < 1e-3 * b.norm()
    with torch.no_grad():
        # validation is not rounded
        assert torch.equal(mlp(x), F.linear(F.relu(F.linear(x, mlp.c_fc.weight)).square(), mlp.c_proj.weight))


@pytest.mark.parametrize("fp8", [False, True])
def test_no_kind_of_a_block_is_left_uncompiled(fp8, monkeypatch):
    """Training, then a last batch of one row: dynamo raises where it would run a block uncompiled."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager"))
    torch._dynamo.utils.counters.clear()
    model = PoE(ModelConfig(**{**CONFIG, "n_layer": 4, "stage_layers": (2, 2)}), torch.bfloat16)
    model.init_weights(0)
    model.fp8 = fp8
    # dynamo's own limit is 8; this model is small
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=4):
        model.compile_regions()
        model.cast_weights()
        assert isinstance(model.blocks[0].mlp.c_fc.cast, tuple) == fp8
        list(model.backward_by_stage(*tokens(), 1 / 33))
        with torch.no_grad():
            list(model.boundaries(tokens(1)[0]))
    # training: the first block, whose x is x0, then gradients of both, of none, of x alone; the loss.
    # Validation: the first block, a value embedding or none.
    # In fp8, each of the two matrices as it is rounded.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4 + 1 + 3 + 2 * fp8
    torch._dynamo.reset()


def test_loss_gradient_of_a_confident_head_is_exact_in_float32():
    """At the softcap's end, p - 1 cancels: the target's gradient is written, not subtracted."""
    logits = torch.tensor([[40.0, -3.0, 0.5]])
    loss, grad = M.cross_entropy_chunk(logits, torch.tensor([0]), 1.0)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(15 * torch.tanh(wide / 15), torch.tensor([0]))
    expected.backward()
    assert abs(loss - expected).item() < 1e-6
    assert (grad - wide.grad).abs().max() < 1e-8


def test_3b_has_the_cards_parameter_counts_and_flops():
    groups = count_parameters(PRESETS["3b"])
    small = groups.pop("gates") + groups.pop("scalars")
    assert groups == {"matrices": 2_080_374_784, "value_embeds": 536_870_912, "heads": 335_544_320,
                      "wte": 67_108_864}
    assert sum(groups.values()) == 3_019_898_880 and small < 1e-4 * 3_019_898_880
    assert abs(M.flops_per_token(PRESETS["3b"]) / 1e9 - 15.70) < 0.005


@pytest.mark.parametrize("preset, size", [("d12", 125e6), ("1b", 1e9)])
def test_d12_and_1b_are_near_their_names(preset, size):
    config = PRESETS[preset]
    trunk_and_head = count_parameters(config)["matrices"] + config.vocab_size * config.n_embd
    assert abs(trunk_and_head / size - 1) < 0.05


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_every_parameter_has_one_stage_and_one_group(config):
    with torch.device("meta"):
        model = PoE(config)
    owned = [name for k in range(4) for name in model.names_of_stage(k)]
    assert sorted([*owned, "lm_head.weight"]) == sorted(name for name, _ in model.named_parameters())
    assert sum(count_parameters(config).values()) == sum(p.numel() for p in model.parameters())


def test_bp_has_one_head_and_a_value_embedding_on_the_last_layer():
    model = make(objective="bp", stage_layers=(5,))
    assert len(model.lm_head_stages) == 0
    found = [block.attn.value_embed is not None for block in model.blocks]
    assert found == [True, False, True, False, True]


def test_init_is_reproducible_and_starts_every_stage_at_the_uniform_distribution():
    models = [PoE(ModelConfig(**CONFIG)) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6)):
        model.init_weights(seed)
    a, b, c = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(a, b) and not torch.equal(a, c)
    for _, loss in model.backward_by_stage(*tokens(), 1 / 33):
        # lm_head has std 0.001
        assert abs(loss.item() - math.log(23)) < 0.02


@pytest.mark.parametrize("changes, word", [
    (dict(stage_layers=(2, 2, 2)), "sum"), (dict(stage_layers=(6, -1)), "positive"),
    (dict(n_embd=14), "n_head"), (dict(n_head=12), "even"), (dict(n_kv_head=4), "n_kv_head"),
    (dict(objective="bp"), "one stage")])
def test_a_wrong_shape_is_named(changes, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig(**{**CONFIG, **changes})
