"""The definition once more, for one problem: plain loops over capsules in float64, and the backward as a stream.

Nothing here is shared with the package, so that the reference is judged by something else than itself.
"""

from __future__ import annotations

import math

import numpy as np
from problems import Problem


def route(problem: Problem, grad_v: np.ndarray) -> dict[str, np.ndarray]:
    """v [B, J, O] (of a pass s), coupling [B, I, J] of the last pass, and the gradients of <v, grad_v>, by name."""
    given = {name: x.double().numpy() for name, x in problem.tensors.items()}
    batch, outputs, features = grad_v.shape
    inputs = given["votes"].shape[1] if "votes" in given else given["u"].shape[1]
    mask = np.ones(1, bool) if problem.mask is None else problem.mask.numpy()
    mask = np.broadcast_to(mask, (batch, inputs))
    logits = np.broadcast_to(given.get("logits", np.zeros(())), (batch, inputs, outputs))
    bias = np.broadcast_to(given.get("bias", np.zeros(())), (outputs, features))
    weight = None
    if "weight" in given:
        weight = np.broadcast_to(given["weight"], (inputs, outputs, features, given["u"].shape[-1]))

    v, coupling, grads = [], [], []
    for b in range(batch):
        votes = given["votes"][b] if weight is None else votes_of(given["u"][b], weight)
        active = np.flatnonzero(mask[b])
        if "query" in given:
            query = np.broadcast_to(given["query"], grad_v.shape)[b]
            sample = Pass(votes, bias, logits[b], active, query, **problem.options)
        else:
            sample = Sample(votes, bias, logits[b], active, **problem.options)
        v.append(sample.v)
        coupling.append(sample.coupling)
        grads.append(sample.backward(grad_v[b]))

    dvotes, doutputs, dlogits = (np.stack(parts) for parts in zip(*grads, strict=True))
    full = {"votes": dvotes, "bias": doutputs.sum(0), "query": doutputs, "logits": dlogits}
    if weight is not None:
        full["u"] = (dvotes[..., None] * weight).sum((2, 3))
        full["weight"] = (dvotes[..., None] * given["u"][:, :, None, None]).sum(0)
    return {
        "v": np.stack(v),
        "coupling": np.stack(coupling),
        **{name: sum_to(full[name], x.shape) for name, x in given.items()},
    }


def votes_of(u: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """h_ij = W_ij u_i."""
    inputs, outputs, features, _ = weight.shape
    h = np.zeros((inputs, outputs, features))
    for i, j, o in np.ndindex(h.shape):
        h[i, j, o] = sum(float(w) * float(x) for w, x in zip(weight[i, j, o], u[i], strict=True))
    return h


def sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of what was broadcast."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(d for d, n in enumerate(shape) if n == 1), keepdims=True)


def squash(s: np.ndarray, eps: float) -> np.ndarray:
    n2 = sum(float(x) ** 2 for x in s)
    return np.array([n2 / (1 + n2) * float(x) / math.sqrt(n2 + eps) for x in s])


def squash_vjp(s: np.ndarray, g: np.ndarray, eps: float) -> np.ndarray:
    """J_squash(s)^T g for the last dimension, in the form that is accurate at any length."""
    n2 = (s * s).sum(-1, keepdims=True)
    r = np.sqrt(n2 + eps)
    f = n2 / (1 + n2) / r
    return f * g + (2 * r / (1 + n2) / (1 + n2) - f) * (s / r * g).sum(-1, keepdims=True) * s / r


def softmax(b: list[float], leaky: bool = False) -> list[float]:
    """Shares that sum to 1, or with the leak to less; -inf, and nothing but -inf, give 0."""
    top = max([*b, 0.0] if leaky else b, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(b)
    parts = [math.exp(x - top) for x in b]
    total = sum(parts) + (math.exp(-top) if leaky else 0)
    return [part / total for part in parts]


class Sample:
    """One sample's routing: Procedure 1 when it is made, then its gradients."""

    def __init__(
        self, votes, bias, logits, active, iterations=3, coupling="out", leaky=False, detach_coupling=False, eps=1e-9
    ):
        self.votes, self.bias, self.logits, self.active = votes, bias, logits, [int(i) for i in active]
        self.direction, self.leaky, self.detached, self.eps = coupling, leaky, detach_coupling, eps
        self.s = []  # of every pass
        b = logits.copy()
        for _ in range(iterations):
            self.coupling = self.couple(b)
            self.s.append(self.weighted_sum(self.coupling))
            self.v = np.stack([squash(s, eps) for s in self.s[-1]])
            for i, j in np.ndindex(b.shape):
                if b[i, j] > -math.inf:
                    b[i, j] += sum(float(h) * float(x) for h, x in zip(votes[i, j], self.v[j], strict=True))

    def couple(self, b: np.ndarray) -> np.ndarray:
        c = np.zeros_like(b)
        if self.direction == "out":
            for i in self.active:
                c[i] = softmax(list(b[i]), self.leaky)
        else:
            for j in range(b.shape[1]):
                for i, share in zip(self.active, softmax([b[i, j] for i in self.active]), strict=True):
                    c[i, j] = share
        return c

    def weighted_sum(self, c: np.ndarray) -> np.ndarray:
        s = self.bias.copy()
        for i in self.active:
            for j in range(s.shape[0]):
                if self.logits[i, j] > -math.inf:
                    for o in range(s.shape[1]):
                        s[j, o] += c[i, j] * self.votes[i, j, o]
        return s

    def backward(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of votes, bias and logits: the streams of operator.md, last pass first."""
        h, s, eps = self.votes, self.s, self.eps
        query = [np.zeros_like(g)]  # V^0, V^1, ...: the sums of the v so far
        for s_k in s:
            query.append(query[-1] + np.stack([squash(x, eps) for x in s_k]))
        dvotes, dbias, dlogits = np.zeros_like(h), np.zeros_like(g), np.zeros_like(self.logits)
        dquery, ds = np.zeros_like(g), squash_vjp(s[-1], g, eps)
        for k in reversed(range(len(s))):
            p = self.couple(self.logits + (h * query[k]).sum(-1))
            t = (h * ds).sum(-1)
            mean = (p * t).sum(1, keepdims=True) if self.direction == "out" else ((s[k] - self.bias) * ds).sum(-1)
            db = np.zeros_like(p) if self.detached else p * (t - mean)
            dvotes += p[..., None] * ds + db[..., None] * query[k]
            dbias += ds
            dlogits += db
            if self.detached:
                break
            dquery = dquery + (db[..., None] * h).sum(0)
            ds = squash_vjp(s[k - 1], dquery, eps)
        return dvotes, dbias, dlogits


class Pass(Sample):
    """One sample's single pass from a given query: its v is s."""

    def __init__(self, votes, bias, logits, active, query, scale=1.0, coupling="out", leaky=False):
        self.votes, self.bias, self.logits, self.active = votes, bias, logits, [int(i) for i in active]
        self.direction, self.leaky, self.query = coupling, leaky, scale * query
        self.scale = scale
        self.coupling = self.couple(logits + (votes * self.query).sum(-1))
        self.v = self.weighted_sum(self.coupling)

    def backward(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of votes, query and logits."""
        p, t = self.coupling, (self.votes * g).sum(-1)
        db = p * (t - (p * t).sum(1 if self.direction == "out" else 0, keepdims=True))
        dvotes = p[..., None] * g + db[..., None] * self.query
        return dvotes, self.scale * (db[..., None] * self.votes).sum(0), db
