"""
MuonAdamW: Muon for the blocks' matrices, AdamW for everything else, sharded over ranks.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) is SGD with Nesterov momentum whose update, per
matrix, is replaced by its nearest semi-orthogonal matrix. Orthogonalisation is five iterations of Polar
Express (arXiv 2505.16932). Then every neuron's part of the update is divided by its own root mean square over
steps, and the whole is scaled back to the norm that it had (NorMuon, arXiv 2510.05491): `lr` stays in units
of an orthogonal matrix per update (docs/optimizer.md: what that is worth). Weight decay is decoupled in
both (AdamW, arXiv 1711.05101).

Ownership (ZeRO-2, arXiv 1910.02054). Every parameter has one owner rank. Only the owner holds its optimizer
state and does its update, so state (8 bytes a parameter under AdamW, 4 under Muon, in float32) and work are
divided by the world size; weights and gradients are whole on every rank. Muon's matrices are dealt out by
their FLOPs and AdamW's parameters by size, each costliest first. There is no padding and no divisibility
rule. Ranks add up: the gradients that a rank brings are its share of the whole batch's. A step is

    1. reduce      each gradient is summed onto its owner; `start_reduce` may have begun, stage by stage
    2. update      each rank updates what it owns, unit by unit, and waits for the gradients of one at a time
    3. send back   the owner broadcasts a unit's new weights while it updates the next

An owner's small parameters travel in one message. All ranks issue the same collectives in the same order.
World size 1 is the same path without them. A parameter without a gradient is an error on every rank: skipping
it on some would hang the others. Not here: the parameters' names and groups, schedules, logging.
"""
import functools
from itertools import zip_longest

import torch
import torch.distributed as dist

# Polar Express, 5 iterations, safety factor 2e-2, cushion 2 (arXiv 2505.16932; the table of its authors'
# code, as in nanochat)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# `polar_by_gram` serves matrices of more than 1 : 2, and forms X anew after two iterations
GRAM_RATIO = 2
GRAM_RESTART = 2
# matrices of one shape are orthogonalised together, up to this many elements at once
STACK_ELEMENTS = 2 ** 26
# how much of a neuron's mean square is of earlier steps, and what is added to it (both as in nanochat)
NEURON_BETA = 0.9
TINY = 1e-10
# parameters up to this size travel in one message with others of their owner
SMALL_ELEMENTS = 2 ** 10


def orthogonalize(G):
    """Replace the singular values of G (..., m, n) by values near 1: the polar factor, approximately.

    Returns the dtype of G. Runs in the dtype of G on a CPU and in 16 bits on CUDA, where matrices of more
    than 1 : GRAM_RATIO go through `polar_by_gram`.
    """
    tall = G.size(-2) > G.size(-1)
    # (B, m, n), m <= n: the smaller Gram matrix
    X = (G.mT if tall else G).reshape(-1, *sorted(G.shape[-2:]))
    norm = X.norm(dim=(-2, -1), keepdim=True, dtype=torch.promote_types(X.dtype, torch.float32))
    X = X / (norm * 1.02 + 1e-6)                                            # spectral norm <= 1
    if not G.is_cuda:
        X = polar(X)
    elif X.size(-1) > GRAM_RATIO * X.size(-2):
        X = polar_by_gram(X.half())
    else:
        X = polar(X.bfloat16())
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def polar(X):
    """Iterate X <- a X + (b A + c A^2) X, A = X X^T, on X (B, m, n): only its singular values move."""
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT                                                        # (B, m, m)
        # b A + c A^2, without a pass of its own over A
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def polar_by_gram(X):
    """`polar` by way of the Gram matrix.

    Zhang, Amsel, Chen, Dao: Gram Newton-Schulz, dao-lab.ai/blog/2026/gram-newton-schulz. An iteration
    multiplies X from the left by P = a I + b A + c A^2, and A = X X^T by P from both sides, so it can run on
    (m, m) matrices alone, which takes fewer FLOPs (`polar_flops`). A drifts from the X X^T of which it takes
    the place, so X is formed anew after GRAM_RESTART iterations. It must be float16: in bfloat16 the loss of
    one d12 run in two jumped by 2 nats.
    """
    for part in (POLAR_EXPRESS[:GRAM_RESTART], POLAR_EXPRESS[GRAM_RESTART:]):
        A = X @ X.mT
        # the product of this part's P
        Q = None
        for i, (a, b, c) in enumerate(part):
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)                     # P = a I + B
            if Q is None:
                Q = B.clone()
                Q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                Q = torch.baddbmm(Q, B, Q, beta=a)
            for _ in range(2 if i + 1 < len(part) else 0):
                # from the left, then from the right: all of them commute
                A = torch.baddbmm(A, B, A, beta=a)
        X = Q @ X
    return X


def polar_flops(shape):
    """FLOPs of orthogonalising one matrix on CUDA."""
    m, n = sorted(shape)
    return 8 * m * m * n + 28 * m ** 3 if n > GRAM_RATIO * m else 20 * m * m * n + 10 * m ** 3


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=True)


def elementwise(compile, function, tensors, numbers):
    """function(*tensors, *numbers); with `compile` as one kernel for all shapes."""
    if compile:
        # numbers as 0-d tensors: a float would be a constant of the kernel
        function = compiled(function)
        numbers = [torch.tensor(x, dtype=tensors[0].dtype) for x in numbers]
    return function(*tensors, *numbers)


def look_ahead(buffer, grad, out, momentum, rest):
    """Nesterov momentum: `buffer` moves to `grad` by rest = 1 - momentum; `out` lies that much further."""
    buffer.lerp_(grad, rest)
    out.copy_(torch.lerp(grad, buffer, momentum))


def neuron_scale(updates, neuron_squares):
    """NorMuon's factor of each neuron: of updates (B, m, n), rows where m >= n, else columns.

    neuron_squares: averages over steps of a neuron's sum of squares, (B, m, 1) or (B, 1, n), mutated; returns
    that shape. The factors keep each matrix's norm, so a sum serves as well as a mean.
    """
    tall = neuron_squares.size(-1) == 1
    square = torch.linalg.vector_norm(updates, dim=-1 if tall else -2, keepdim=True,
                                      dtype=neuron_squares.dtype).square()
    neuron_squares.lerp_(square, 1 - NEURON_BETA)
    factor = (neuron_squares + TINY).rsqrt()
    before = square.sum((-2, -1), keepdim=True)
    after = (square * factor.square()).sum((-2, -1), keepdim=True)
    return factor * (before / (after + TINY)).sqrt()


def decay_and_subtract(p, update, scale, decay, size):
    p.mul_(decay).sub_(update * scale * size)


def muon_update(params, grads, momentum_buffers, neuron_squares, lr, momentum, weight_decay, compile=False):
    """One Muon step on matrices of one shape (m, n).

    Lists of tensors; all but `grads` are mutated. The update's norm is about lr sqrt(max(1, m / n)), Muon's
    shape factor, times that of a semi-orthogonal matrix.
    """
    m, n = params[0].shape
    nesterov = params[0].new_empty(len(params), m, n, dtype=torch.bfloat16 if params[0].is_cuda else None)
    for buffer, grad, out in zip(momentum_buffers, grads, nesterov):
        elementwise(compile, look_ahead, (buffer, grad, out), (momentum, 1 - momentum))
    updates = orthogonalize(nesterov)
    squares = torch.stack(neuron_squares)
    scales = neuron_scale(updates, squares)
    torch._foreach_copy_(neuron_squares, list(squares))
    for p, update, scale in zip(params, updates, scales):                   # (m, n) each
        elementwise(compile, decay_and_subtract, (p, update, scale),
                    (1 - lr * weight_decay, lr * max(1, m / n) ** 0.5))


def new_state(kind, p):
    """What an owner keeps of a parameter, at zero."""
    if kind == "adamw":
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": 0}
    m, n = p.shape
    neurons = p.new_zeros((m, 1) if m >= n else (1, n))
    return {"momentum_buffer": torch.zeros_like(p), "neuron_square": neurons, "step": 0}


def adam_moments_and_step(p, grad, exp_avg, exp_avg_sq, rest1, rest2, correction2, eps, decay, size):
    exp_avg.lerp_(grad, rest1)
    exp_avg_sq.lerp_(grad.square(), rest2)
    p.mul_(decay).sub_(exp_avg * size / ((exp_avg_sq / correction2).sqrt() + eps))


def adamw_update(p, grad, exp_avg, exp_avg_sq, step, lr, betas, eps, weight_decay, compile=False):
    """One AdamW step; p, exp_avg and exp_avg_sq are mutated. step counts from 1."""
    elementwise(compile, adam_moments_and_step, (p, grad, exp_avg, exp_avg_sq),
                (1 - betas[0], 1 - betas[1], 1 - betas[1] ** step, eps, 1 - lr * weight_decay,
                 lr / (1 - betas[0] ** step)))


# --------------------------------------------------------------------------------------------------
# Who owns what, and in which order it is updated and sent

def assign_owners(groups, world_size):
    """Deal the parameters of `groups` out to ranks, costliest first: {name: rank}. The same on every rank."""
    owner = {}
    for kind in ("muon", "adamw"):
        cost = {name: polar_flops(p.shape) if kind == "muon" else p.numel()
                for group in groups if group["kind"] == kind for name, p in group["params"].items()}
        load = [0] * world_size
        for name in sorted(cost, key=lambda name: (-cost[name], name)):
            owner[name] = load.index(min(load))
            load[owner[name]] += cost[name]
    return owner


def units_of(rank, groups, owner):
    """Cut what `rank` owns into units, lists of names in the order of their updates.

    A unit is a stack of Muon's matrices of one shape, one large parameter of AdamW, or all small ones.
    AdamW's units, which are much to send and little to compute, stand in the middle of Muon's: the last
    gradients, those of the heads, have time to arrive, and the weights' way back has work to hide behind.
    """
    stacks = []
    large = []
    small = []
    for group in groups:
        # shape -> the stack of that shape that has room
        open_stacks = {}
        for name, p in group["params"].items():
            if owner[name] != rank:
                continue
            if group["kind"] == "muon":
                stack = open_stacks.get(p.shape, [])
                if not stack or (len(stack) + 1) * p.numel() > STACK_ELEMENTS:
                    stack = open_stacks[p.shape] = []
                    stacks.append(stack)
                stack.append(name)
            elif p.numel() > SMALL_ELEMENTS:
                large.append([name])
            else:
                small.append(name)
    if small:
        large.append(small)
    middle = len(stacks) // 2
    return stacks[:middle] + large + stacks[middle:]


def pack(tensors):
    """One tensor with the elements of all; of a single tensor, that tensor itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpack(buffer, tensors):
    """Copy what `pack` made of `tensors` back into them."""
    if len(tensors) > 1:
        for tensor, part in zip(tensors, buffer.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))


# --------------------------------------------------------------------------------------------------
# The optimizer

class MuonAdamW:
    """Groups are dicts: kind ("muon" or "adamw"), params {name: tensor}, lr, weight_decay, momentum or betas
    and eps.

    The caller changes lr, weight_decay and momentum in `groups` from step to step; `state_dict` holds none of
    them. compile: elementwise work as fused kernels (CUDA).
    """

    def __init__(self, groups, rank=0, world_size=1, compile=False):
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.compile = compile
        self.params = {name: p for group in groups for name, p in group["params"].items()}
        self.group_of = {name: group for group in groups for name in group["params"]}
        self.owner = assign_owners(groups, world_size)
        self.units = [units_of(r, groups, self.owner) for r in range(world_size)]
        # name -> (work, buffer, names of the message) of its gradient on the way to its owner
        self.reducing = {}
        self.state = {}
        for unit in self.units[rank]:
            for name in unit:
                self.state[name] = new_state(self.group_of[name]["kind"], self.params[name])

    def messages(self, names):
        """Yield the names that travel together: a large parameter alone, an owner's small ones as one.

        In a world of one nothing travels.
        """
        small = {}
        for name in names if self.world_size > 1 else []:
            if self.params[name].numel() > SMALL_ELEMENTS:
                yield [name]
            else:
                small.setdefault(self.owner[name], []).append(name)
        yield from small.values()

    def start_reduce(self, names):
        """Begin to sum these parameters' gradients onto their owners; all ranks give the same names."""
        for message in self.messages(names):
            buffer = pack([self.params[name].grad for name in message])
            work = dist.reduce(buffer, self.owner[message[0]], async_op=True)
            for name in message:
                self.reducing[name] = (work, buffer, message)

    def finish_reduce(self, names):
        """Wait until the summed gradients of these parameters, which this rank owns, are there."""
        for name in names:
            if name in self.reducing:
                work, buffer, message = self.reducing[name]
                work.wait()
                unpack(buffer, [self.params[other].grad for other in message])
                for other in message:
                    del self.reducing[other]

    @torch.no_grad()
    def step(self):
        """Reduce, update, send back; gradients are freed."""
        missing = [name for name, p in self.params.items() if p.grad is None]
        assert not missing, f"parameters without a gradient: {missing}"
        self.start_reduce([name for name in self.params if name not in self.reducing])
        sending = []
        # one unit of every rank at a time
        for units in zip_longest(*self.units, fillvalue=[]):
            mine = units[self.rank]
            if mine:
                self.finish_reduce(mine)
                self.update(mine)
            for rank, names in enumerate(units):
                for message in self.messages(names):
                    weights = [self.params[name].data for name in message]
                    buffer = pack(weights)
                    sending.append((dist.broadcast(buffer, rank, async_op=True), buffer, weights))
        for work, buffer, weights in sending:
            work.wait()
            unpack(buffer, weights)
        # those left are of gradients that others own
        for work, _, _ in self.reducing.values():
            work.wait()
        self.reducing.clear()
        for p in self.params.values():
            p.grad = None

    def update(self, names):
        """Update the parameters of one unit, and free their gradients."""
        group = self.group_of[names[0]]
        if group["kind"] == "muon":
            params = [self.params[name] for name in names]
            buffers, squares = ([self.state[name][key] for name in names]
                                for key in ("momentum_buffer", "neuron_square"))
            muon_update(params, [p.grad for p in params], buffers, squares, group["lr"], group["momentum"],
                        group["weight_decay"], self.compile)
        for name in names:
            p = self.params[name]
            state = self.state[name]
            state["step"] += 1
            group = self.group_of[name]
            if group["kind"] == "adamw":
                adamw_update(p, p.grad, **state, lr=group["lr"], betas=group["betas"], eps=group["eps"],
                             weight_decay=group["weight_decay"], compile=self.compile)
            p.grad = None

    def state_dict(self):
        """State of the parameters that this rank owns, keyed by name; no hyperparameters."""
        return self.state

    def load_state_dict(self, state):
        """Copy the state of this rank's parameters from {name: state}, which may hold others' too."""
        for name, mine in self.state.items():
            for key, value in state[name].items():
                if key == "step":
                    mine[key] = value
                else:
                    mine[key].copy_(value)
