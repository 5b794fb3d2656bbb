"""
MuonAdamW: Muon for the blocks' matrices, AdamW for everything else, sharded over ranks (ZeRO-2, arXiv 1910.02054).

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) is SGD with Nesterov momentum whose update, per matrix, is replaced by
its nearest semi-orthogonal matrix; `lr` is therefore in units of spectral norm per update. Orthogonalisation is five
iterations of Polar Express (arXiv 2505.16932). Weight decay is decoupled in both (AdamW, arXiv 1711.05101).

Ownership. Every parameter has one owner rank. Only the owner holds its optimizer state and does its update, so state (8 bytes a
parameter under AdamW, 4 under Muon, in float32) and work are divided by the world size. Muon's matrices are dealt out by
Newton-Schulz FLOPs and AdamW's parameters by size, each longest first. There is no padding and no divisibility rule. A step is

    1. reduce      each gradient is averaged onto its owner (`start_reduce` may have begun earlier, stage by stage)
    2. update      each rank updates what it owns
    3. send back   the owner broadcasts the new weights

World size 1 is the same path without communication. A parameter without a gradient is an error on every rank: skipping it
on some would hang the others. Not here: parameter names and their groups, schedules, logging.
"""
import torch
import torch.distributed as dist

# Polar Express, 5 iterations, safety factor 2e-2, cushion 2 (arXiv 2505.16932; the table of its authors' code, as in nanochat)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
STACK_ELEMENTS = 2 ** 26    # matrices of one shape are orthogonalised together, up to this many elements at once


def orthogonalize(G):
    """Replace the singular values of G (..., m, n) by values near 1: the polar factor, approximately.

    Runs in bfloat16 on CUDA, where that is fast and enough, and in the dtype of G elsewhere. Returns the dtype of G.
    With G = U S V^T and X scaled to spectral norm <= 1, an iteration is X <- a X + (b A + c A^2) X, A = X X^T.
    """
    X = G.bfloat16() if G.is_cuda else G
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X                                                 # iterate on the smaller Gram matrix
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT                                                        # (..., m, m)
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.mT if tall else X).to(G.dtype)


def muon_update(params, grads, momentum_buffers, lr, momentum, weight_decay):
    """One Muon step on matrices of one shape (m, n): lists of tensors; `params` and `momentum_buffers` are mutated.

    The update's spectral norm is about lr sqrt(max(1, m / n)): Muon's shape factor, the only rescaling here.
    """
    for buffer, grad in zip(momentum_buffers, grads):
        buffer.lerp_(grad, 1 - momentum)
    nesterov = torch.stack([torch.lerp(grad, buffer, momentum) for grad, buffer in zip(grads, momentum_buffers)])
    m, n = nesterov.shape[-2:]
    for p, update in zip(params, orthogonalize(nesterov)):                  # (m, n) each
        p.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * max(1, m / n) ** 0.5)


def adamw_update(p, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay):
    """One AdamW step; p, exp_avg and exp_avg_sq are mutated. step counts from 1."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.lerp_(grad.square(), 1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt_().add_(eps)
    p.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))


def assign_owners(groups, world_size):
    """Deal the parameters of `groups` out to ranks, longest first: {name: rank}. The same on every rank."""
    owner = {}
    for kind in ("muon", "adamw"):
        cost = {}
        for group in groups:
            for name, p in group["params"].items() if group["kind"] == kind else ():
                cost[name] = p.numel() * (min(p.shape) if kind == "muon" else 1)    # Newton-Schulz is O(m n min(m, n))
        load = [0] * world_size
        for name in sorted(cost, key=lambda name: (-cost[name], name)):
            owner[name] = load.index(min(load))
            load[owner[name]] += cost[name]
    return owner


class MuonAdamW:
    """Groups are dicts: kind ("muon" or "adamw"), params {name: tensor}, lr, weight_decay, and momentum or betas and eps.

    The caller changes lr, weight_decay and momentum in `groups` from step to step; `state_dict` holds none of them.
    """

    def __init__(self, groups, rank=0, world_size=1):
        self.groups, self.rank, self.world_size = groups, rank, world_size
        self.params = {name: p for group in groups for name, p in group["params"].items()}
        assert len(self.params) == sum(len(group["params"]) for group in groups), "a parameter is in two groups"
        self.owner = assign_owners(groups, world_size)
        self.state, self.reducing = {}, {}
        for group in groups:
            for name, p in group["params"].items():
                if self.owner[name] == rank:
                    moments = ("momentum_buffer",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq")
                    self.state[name] = {key: torch.zeros_like(p, requires_grad=False) for key in moments}
                    self.state[name]["step"] = 0

    def start_reduce(self, names):
        """Begin averaging these parameters' gradients onto their owners, without waiting."""
        for name in names if self.world_size > 1 else ():
            grad = self.params[name].grad
            grad /= self.world_size                 # gloo has no average; dividing first is also safer in low precision
            self.reducing[name] = dist.reduce(grad, self.owner[name], async_op=True), grad      # both kept alive until waited for

    @torch.no_grad()
    def step(self):
        """Reduce, update, send back; gradients are freed."""
        missing = [name for name, p in self.params.items() if p.grad is None]
        assert not missing, f"parameters without a gradient: {missing}"
        # 1. reduce
        self.start_reduce([name for name in self.params if name not in self.reducing])
        for work, _ in self.reducing.values():
            work.wait()
        self.reducing.clear()
        # 2. update what this rank owns
        for group in self.groups:
            owned = [name for name in group["params"] if self.owner[name] == self.rank]
            for name in owned:
                self.state[name]["step"] += 1
            if group["kind"] == "muon":
                self._muon_step(group, owned)
            else:
                for name in owned:
                    adamw_update(self.params[name], self.params[name].grad, **self.state[name], lr=group["lr"],
                                 betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
        for p in self.params.values():
            p.grad = None
        # 3. send back
        if self.world_size > 1:
            for work in [dist.broadcast(p.data, self.owner[name], async_op=True) for name, p in self.params.items()]:
                work.wait()

    def _muon_step(self, group, owned):
        """Update the owned matrices of a group, in stacks of one shape."""
        by_shape = {}
        for name in owned:
            by_shape.setdefault(self.params[name].shape, []).append(name)
        for shape, names in by_shape.items():
            at_once = max(1, STACK_ELEMENTS // shape.numel())
            for i in range(0, len(names), at_once):
                stack = [self.params[name] for name in names[i:i + at_once]]
                muon_update(stack, [p.grad for p in stack], [self.state[name]["momentum_buffer"] for name in names[i:i + at_once]],
                            lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])

    def state_dict(self):
        """State of the parameters that this rank owns, keyed by name; no hyperparameters."""
        return self.state

    def load_state_dict(self, state):
        """Copy the state of this rank's parameters from {name: state}, which may hold others' too. Raises ValueError where one is missing."""
        for name, mine in self.state.items():
            if name not in state or {k: getattr(v, "shape", ()) for k, v in state[name].items()} != {k: getattr(v, "shape", ()) for k, v in mine.items()}:
                raise ValueError(f"the optimizer state of {name} is missing from the checkpoint or has another shape")
            for key, value in state[name].items():
                if key == "step":
                    mine[key] = value
                else:
                    mine[key].copy_(value)
