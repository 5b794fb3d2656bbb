"""
muon.py against torch.optim, singular values, and itself on several ranks (gloo).

Run: python -m pytest tests/test_muon.py
"""
import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from model import PRESETS, PoE, parameter_group
from muon import POLAR_EXPRESS, MuonAdamW, adamw_update, assign_owners, muon_update, orthogonalize, polar, polar_by_gram, polar_flops


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (5, 32, 64)])
def test_orthogonalized_gaussians_have_singular_values_near_one(shape):
    values = torch.stack([torch.linalg.svdvals(orthogonalize(randn(*shape, seed=s).float())) for s in range(50)])
    assert 0.858 < values.min() and values.max() < 1.142, (values.min(), values.max())   # the polynomial's band for inputs >= 0.002


def test_orthogonalize_equals_the_iteration_on_singular_values():
    """Each iteration maps a singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone."""
    G = randn(7, 11)
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / (s.square().sum().sqrt() * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s ** 3 + c * s ** 5
    assert (orthogonalize(G) - U * s @ Vt).abs().max() < 1e-10
    assert (orthogonalize(G.mT) - (U * s @ Vt).mT).abs().max() < 1e-10


def spectra(m, n):
    """{name: (m, n) float64 of norm 1 / 1.02}: a gaussian, one of rank m / 16, and singular values from 1 down to 1e-3 and to 1e-6."""
    U, V = torch.linalg.qr(randn(m, m, seed=1))[0], torch.linalg.qr(randn(n, m, seed=2))[0]
    matrices = {"gaussian": randn(m, n), "low rank": randn(m, m // 16) @ randn(m // 16, n, seed=3)}
    matrices |= {f"1e-{k}": U * torch.logspace(0, -k, m, dtype=torch.float64) @ V.T for k in (3, 6)}
    return {name: X / (1.02 * X.norm()) for name, X in matrices.items()}


@pytest.mark.parametrize("name", ["gaussian", "low rank", "1e-3", "1e-6"])
def test_the_gram_form_is_the_plain_iteration(name):
    X = spectra(64, 400)[name][None]
    exact = polar(X)
    def error(Y):
        return ((Y.double() - exact).norm() / exact.norm()).item()
    assert error(polar_by_gram(X)) < 1e-9
    assert error(polar_by_gram(X.half())) < 0.5 * error(polar(X.bfloat16())), "less exact than what it takes the place of"


@pytest.mark.parametrize("shape, function", [((64, 400), polar_by_gram), ((64, 128), polar)])
def test_the_flops_by_which_matrices_are_dealt_are_those_done(shape, function):
    with FlopCounterMode(display=False) as counter:
        function(randn(1, *shape))
    assert counter.get_total_flops() == polar_flops(shape) == polar_flops(shape[::-1])


def test_muon_matches_torch_optim_muon_up_to_the_orthogonalisation():
    """torch's Muon with our polynomial replaced by its own: compare momentum, Nesterov, decay and shape factor on an orthogonal gradient.

    For a momentum whose singular values are all equal both polynomials return a multiple of it: each update is divided by its norm.
    """
    p_ours, p_torch = randn(13, 5), randn(13, 5)
    reference = torch.nn.Parameter(p_torch.clone())
    lr, momentum, decay = 0.05, 0.9, 0.1
    optimizer = torch.optim.Muon([reference], lr=lr, momentum=momentum, weight_decay=decay, nesterov=True, adjust_lr_fn="original")
    ours, buffer = p_torch.clone(), torch.zeros_like(p_ours)
    Q = torch.linalg.qr(randn(13, 5, seed=3))[0]
    for step in range(3):
        before_ours, before_torch = ours.clone(), reference.detach().clone()
        grad = Q * (step + 1)
        reference.grad = grad.clone()
        optimizer.step()
        muon_update([ours], [grad], [buffer], lr, momentum, decay)
        update_ours, update_torch = ours - before_ours * (1 - lr * decay), reference.detach() - before_torch * (1 - lr * decay)
        assert abs(update_ours.norm() / (lr * (13 / 5) ** 0.5 * 5 ** 0.5) - 1) < 0.142       # singular values in the band
        cosine = torch.nn.functional.cosine_similarity(update_ours.flatten(), update_torch.flatten(), dim=0)
        assert cosine > 0.9999, cosine                                                      # torch orthogonalises in bfloat16


def test_muon_momentum_is_nesterov_on_an_exponential_average():
    p, buffer, m = randn(3, 4), torch.zeros(3, 4, dtype=torch.float64), 0.8
    expected_buffer = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(3):
        g, before = randn(3, 4, seed=step), p.clone()
        muon_update([p], [g], [buffer], lr=0.1, momentum=m, weight_decay=0.5)
        expected_buffer = m * expected_buffer + (1 - m) * g
        expected = before * (1 - 0.1 * 0.5) - 0.1 * orthogonalize((1 - m) * g + m * expected_buffer)
        assert (buffer - expected_buffer).abs().max() < 1e-14
        assert (p - expected).abs().max() < 1e-14


def test_adamw_matches_torch_optim_adamw():
    ours, reference = randn(7, 3), torch.nn.Parameter(randn(7, 3))
    optimizer = torch.optim.AdamW([reference], lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.3)
    m, v = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 6):
        grad = randn(7, 3, seed=step)
        reference.grad = grad.clone()
        optimizer.step()
        adamw_update(ours, grad, m, v, step, 0.02, (0.8, 0.95), 1e-10, 0.3)
        assert (ours - reference).abs().max() < 1e-12


def groups_of(params):
    return [dict(kind="muon", params={n: p for n, p in params.items() if p.dim() == 2}, lr=0.1, momentum=0.9, weight_decay=0.1),
            dict(kind="adamw", params={n: p for n, p in params.items() if p.dim() < 2}, lr=0.1, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.1)]


def test_stacked_matrices_are_updated_as_they_would_be_alone(monkeypatch):
    def train(at_once):
        monkeypatch.setattr("muon.STACK_ELEMENTS", at_once)
        params = {f"w{i}": randn(5, 7, seed=i) for i in range(5)} | {"tall": randn(7, 5), "v": randn(3)}
        optimizer = MuonAdamW(groups_of(params))
        for step in range(3):
            for i, p in enumerate(params.values()):
                p.grad = randn(*p.shape, seed=10 * step + i)
            optimizer.step()
        return params
    alone, stacked = train(1), train(2 * 35)
    assert max((alone[n] - stacked[n]).abs().max().item() for n in alone) < 1e-14


def test_state_of_other_ranks_is_left_out_of_a_round_trip():
    params = {"w": randn(5, 7), "v": randn(3)}
    a, b = MuonAdamW(groups_of(params)), MuonAdamW(groups_of({n: p.clone() for n, p in params.items()}))
    for p in params.values():
        p.grad = torch.ones_like(p)
    a.step()
    b.load_state_dict({**a.state_dict(), "another": {}})
    assert b.state["v"]["step"] == 1 and torch.equal(b.state["w"]["momentum_buffer"], a.state["w"]["momentum_buffer"])


def test_a_missing_gradient_is_an_error():
    params = {"w": randn(5, 7), "v": randn(3)}
    params["w"].grad = randn(5, 7)
    with pytest.raises(AssertionError, match="without a gradient.*v"):
        MuonAdamW(groups_of(params)).step()


def test_owners_of_3b_on_12_ranks_are_balanced():
    with torch.device("meta"):
        params = dict(PoE(PRESETS["3b"]).named_parameters())
    groups = [dict(kind="muon", params={n: p for n, p in params.items() if parameter_group(n) == "matrices"}),
              dict(kind="adamw", params={n: p for n, p in params.items() if parameter_group(n) != "matrices"})]
    owner = assign_owners(groups, 12)
    assert set(owner) == set(params) and set(owner.values()) == set(range(12))
    load = [sum(polar_flops(p.shape) for n, p in groups[0]["params"].items() if owner[n] == r) for r in range(12)]
    assert max(load) / (sum(load) / 12) < 1.02


def train_on_ranks(rank, world, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    params = {f"w{i}": randn(5, 7, seed=i) for i in range(4)} | {f"v{i}": randn(3 + i, seed=i) for i in range(3)}
    params |= {"w4": randn(29, 37, seed=4), "v3": randn(1031, seed=5), "v4": randn(1, seed=6)[0]}     # large ones; a scalar
    optimizer = MuonAdamW(groups_of(params), rank, world)
    for step in range(4):
        for i, p in enumerate(params.values()):
            parts = [randn(*p.shape, seed=100 * step + 10 * part + i) for part in range(6)]     # six micro-batches, dealt to the ranks
            p.grad = sum(parts[rank::world]) / 6
        optimizer.start_reduce(["w1", "w4", "v0", "v4"])                                                    # some begun early, as a stage's are
        optimizer.step()
    torch.save(params, path)
    assert len(optimizer.state_dict()) < len(params) or world == 1
    dist.destroy_process_group()


def test_two_and_three_ranks_equal_one(tmp_path):
    processes = []
    for world in (1, 2, 3):                 # 4 matrices and 3 vectors: multiples of neither; two large parameters
        port = unused_port()
        processes += [multiprocessing.get_context("fork").Process(target=train_on_ranks, args=(rank, world, port, tmp_path / f"{world}-{rank}.pt"))
                      for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 6
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for world in (2, 3):
        ranks = [torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        error = max((one[n] - ranks[0][n]).abs().max().item() for n in one)
        assert error < 1e-10, f"{world} ranks differ from one by {error:.1e}"
        assert all(torch.equal(ranks[0][n], other[n]) for other in ranks for n in one)


def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
