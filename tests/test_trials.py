"""The trials of muon.py, NORMUON and CAUTIOUS, against what nanochat's formulas say, written out."""
import torch

import muon
from muon import muon_update, orthogonalize
from test_muon import randn


def test_normalised_neurons_and_cautious_decay_are_the_formulas_of_each_matrix(monkeypatch):
    monkeypatch.setattr(muon, "NORMUON", 0.9)
    monkeypatch.setattr(muon, "CAUTIOUS", True)
    for m, n in ((13, 5), (5, 13), (7, 7)):
        params = [randn(m, n, seed=i) for i in range(2)]
        twins = [p.clone() for p in params]
        buffers = [torch.zeros_like(p) for p in params]
        shape = (m, 1) if m >= n else (1, n)
        squares = [p.new_zeros(shape) for p in params]
        averages = [0, 0]
        seconds = [0, 0]
        for step in range(3):
            grads = [randn(m, n, seed=10 + 2 * step + i) for i in range(2)]
            muon_update(params, grads, buffers, 0.1, 0.8, 0.5, mean_squares=squares)
            for i, (p, grad) in enumerate(zip(twins, grads)):
                averages[i] = 0.8 * averages[i] + 0.2 * grad
                g = orthogonalize(0.2 * grad + 0.8 * averages[i])
                dim = 1 if m >= n else 0
                seconds[i] = 0.9 * seconds[i] + 0.1 * (g ** 2).mean(dim, keepdim=True)
                scaled = g / seconds[i] ** 0.5
                g = scaled * (g.norm() / scaled.norm()) * max(1, m / n) ** 0.5
                twins[i] = p - 0.1 * g - 0.1 * 0.5 * p * (g * p >= 0)
            assert all((p - twin).abs().max() < 1e-12 for p, twin in zip(params, twins))
