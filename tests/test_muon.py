"""
muon.py against torch.optim, singular values, and itself on several ranks (gloo).

Run: python -m pytest tests/test_muon.py
"""
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import muon
from conftest import same, unused_port
from muon import MuonAdamW, adamw_update, muon_update, orthogonalize, polar, polar_by_gram, polar_flops


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_orthogonalized_gaussians_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(randn(50, 32, 64).float()))
    # the polynomial's band for inputs >= 0.002
    assert 0.858 < values.min() and values.max() < 1.142, (values.min(), values.max())


def test_orthogonalize_equals_the_iteration_on_singular_values():
    """Each iteration maps a singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone."""
    G = randn(7, 11)
    U, s, Vt = torch.linalg.svd(G, full_matrices=False)
    s = s / (s.norm() * 1.02 + 1e-6)
    for a, b, c in muon.POLAR_EXPRESS:
        s = a * s + b * s ** 3 + c * s ** 5
    assert (orthogonalize(G) - U * s @ Vt).abs().max() < 1e-10
    assert (orthogonalize(G.mT) - (U * s @ Vt).mT).abs().max() < 1e-10


@pytest.mark.parametrize("X", [
    randn(64, 400), randn(64, 4) @ randn(4, 400, seed=3),
    # singular values from 1 down to 1e-6
    torch.linalg.qr(randn(64, 64))[0] * torch.logspace(0, -6, 64) @ torch.linalg.qr(randn(400, 64))[0].T
], ids=["gaussian", "low rank", "ill-conditioned"])
def test_the_gram_form_is_the_plain_iteration(X):
    X = X[None] / (1.02 * X.norm())
    exact = polar(X)

    def error(Y):
        return ((Y.double() - exact).norm() / exact.norm()).item()
    assert error(polar_by_gram(X)) < 1e-9
    # more exact than what it takes the place of
    assert error(polar_by_gram(X.half())) < 0.5 * error(polar(X.bfloat16()))


@pytest.mark.parametrize("shape, function", [((64, 400), polar_by_gram), ((64, 128), polar)])
def test_the_flops_by_which_matrices_are_dealt_are_those_done(shape, function):
    with FlopCounterMode(display=False) as counter:
        function(randn(1, *shape))
    assert counter.get_total_flops() == polar_flops(shape) == polar_flops(shape[::-1])


@pytest.mark.parametrize("m, n", [(13, 5), (5, 13), (7, 7)])
def test_muon_is_momentum_a_mean_square_of_each_neuron_and_decay(m, n):
    """Written out: Nesterov, orthogonalised; NorMuon; a shape factor; decay."""
    params = [randn(m, n, seed=i) for i in range(2)]
    twins = [p.clone() for p in params]
    buffers, neurons, _ = zip(*(muon.new_state("muon", p).values() for p in params))
    averages = [0, 0]
    squares = [0, 0]
    for step in range(3):
        grads = [randn(m, n, seed=10 + 2 * step + i) for i in range(2)]
        muon_update(params, grads, buffers, neurons, lr=0.1, momentum=0.8, weight_decay=0.5)
        for i, (p, grad) in enumerate(zip(twins, grads)):
            averages[i] = 0.8 * averages[i] + 0.2 * grad
            update = orthogonalize(0.2 * grad + 0.8 * averages[i])
            # each row of a tall matrix has a mean square of its own, each column of a wide one
            squares[i] = 0.9 * squares[i] + 0.1 * (update ** 2).mean(1 if m >= n else 0, keepdim=True)
            scaled = update / squares[i] ** 0.5
            scaled *= update.norm() / scaled.norm()
            twins[i] = p * (1 - 0.1 * 0.5) - 0.1 * max(1, m / n) ** 0.5 * scaled
        assert all((p - twin).abs().max() < 1e-8 for p, twin in zip(params, twins))


def test_without_neurons_and_decay_it_steps_as_torch_optim_does():
    p = randn(13, 5)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.1, momentum=0.8, weight_decay=0, nesterov=True,
                                 adjust_lr_fn="original")
    buffer = torch.zeros_like(p)
    for step in range(3):
        grad = randn(13, 5, seed=step)
        theirs.grad = grad.clone()
        optimizer.step()
        # neurons so large that what one step adds is nothing: all factors are the same
        muon_update([p], [grad], [buffer], [torch.full((13, 1), 1e6).double()], 0.1, 0.8, 0)
    # torch's polynomial is another one, in bfloat16
    ours, theirs = ((end - randn(13, 5)).flatten() for end in (p, theirs))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98


def test_a_gradient_of_zeros_moves_nothing():
    p = randn(5, 7)
    muon_update([p], [0 * p], [0 * p], [0 * p[:1]], 0.1, 0.8, 0)
    assert torch.equal(p, randn(5, 7))


def test_adamw_matches_torch_optim_adamw():
    ours = randn(7, 3)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.3)
    m = torch.zeros_like(ours)
    v = torch.zeros_like(ours)
    for step in range(1, 6):
        theirs.grad = randn(7, 3, seed=step)
        optimizer.step()
        adamw_update(ours, randn(7, 3, seed=step), m, v, step, 0.02, (0.8, 0.95), 1e-10, 0.3)
        assert (ours - theirs).abs().max() < 1e-12


def groups_of(params):
    matrices = {name: p for name, p in params.items() if p.dim() == 2}
    others = {name: p for name, p in params.items() if p.dim() < 2}
    return [dict(kind="muon", params=matrices, lr=0.1, momentum=0.9, weight_decay=0.1),
            dict(kind="adamw", params=others, lr=0.1, betas=(0.8, 0.9), eps=1e-10, weight_decay=0.1)]


def test_a_missing_gradient_is_an_error():
    with pytest.raises(AssertionError, match="gradient.*v"):
        MuonAdamW(groups_of({"v": randn(3)})).step()


def train_on_ranks(rank, world, port, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # one rank updates each matrix alone, the others stacks of up to two
    muon.STACK_ELEMENTS = 1 if world == 1 else 2 * 35
    params = {f"w{i}": randn(5, 7, seed=i) for i in range(4)} | {f"v{i}": randn(3 + i) for i in range(3)}
    # a large matrix and vector, a tall one, a scalar
    params |= {"w4": randn(29, 37), "w5": randn(7, 5), "v3": randn(1031), "v4": randn(1)[0]}
    optimizer = MuonAdamW(groups_of(params), rank, world)
    for step in range(4):
        for i, p in enumerate(params.values()):
            # six micro-batches, dealt to the ranks
            parts = [randn(*p.shape, seed=100 * step + 10 * part + i) for part in range(6)]
            p.grad = sum(parts[rank::world]) / 6
        # some begun early, as a stage's are
        optimizer.start_reduce(["w1", "w4", "v0", "v4"])
        optimizer.step()
    torch.save(params, path)
    assert len(optimizer.state_dict()) < len(params) or world == 1
    dist.destroy_process_group()


def test_two_and_three_ranks_and_stacked_matrices_equal_one_rank_with_each_alone(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = []
    for world in (1, 2, 3):
        port = unused_port()
        for rank in range(world):
            args = (rank, world, port, tmp_path / f"{world}-{rank}")
            processes.append(fork.Process(target=train_on_ranks, args=args))
            processes[-1].start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 6
    one = torch.load(tmp_path / "1-0", weights_only=True)
    for world in (2, 3):
        first, *others = [torch.load(path, weights_only=True) for path in tmp_path.glob(f"{world}-*")]
        assert len(others) == world - 1
        error = max((one[name] - first[name]).abs().max().item() for name in one)
        assert error < 1e-10, f"{world} ranks differ from one by {error:.1e}"
        assert all(same(first, other) for other in others)
