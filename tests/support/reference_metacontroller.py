"""The metacontroller's equations (arXiv 2512.20605, Eq 11–18 and E.1), one number at a time.

Everything is a nested list of 0-dimensional float64 tensors, so that autograd gives the gradients. Slow,
obvious, and without any tensor operation that the real metacontroller could share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internalrl.controller.metacontroller import Metacontroller
from internalrl.discovery.objective import Coefficients

Vector = list[Tensor]
Matrix = list[Vector]


def numbers(tensor: Tensor) -> Any:
    """A tensor as nested lists of its numbers, through which gradients flow back to it."""
    return tensor if tensor.ndim == 0 else [numbers(part) for part in tensor.unbind()]


def array(nested: Any) -> Tensor:
    """The inverse of `numbers`."""
    return nested if isinstance(nested, Tensor) else torch.stack([array(part) for part in nested])


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def zeros(count: int) -> Vector:
    return [number(0.0) for _ in range(count)]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    total = number(0.0)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def affine(weight: Matrix, bias: Vector | None, x: Vector) -> Vector:
    return [dot(row, x) + (bias[i] if bias else 0.0) for i, row in enumerate(weight)]


def relu(x: Vector) -> Vector:
    return [value if value > 0 else 0.0 * value for value in x]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def normalise(x: Vector) -> Vector:
    """Zero mean and unit variance over the units."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return [(value - mean) / torch.sqrt(variance + 1e-5) for value in x]


class ReferenceMetacontroller:
    """The equations on nested lists; `weights` are float64 copies of a metacontroller's parameters."""

    def __init__(self, meta: Metacontroller):
        self.config, self.width = meta.config, meta.width
        self.weights = {name: p.detach().double().requires_grad_() for name, p in meta.named_parameters()}
        self.w = {name: numbers(weight) for name, weight in self.weights.items()}
        self.slow, self.slow_mean = numbers(meta.slow.double()), numbers(meta.slow_mean.double())

    # -- what it reads ------------------------------------------------------------------------------------

    def gru(self, name: str, x: Vector, h: Vector) -> Vector:
        """r, u = σ(W x + b + V h + c), n = tanh(W x + b + r (V h + c)), h' = (1 − u) n + u h."""
        from_x = affine(self.w[f"{name}.weight_ih_l0"], self.w[f"{name}.bias_ih_l0"], x)
        from_h = affine(self.w[f"{name}.weight_hh_l0"], self.w[f"{name}.bias_hh_l0"], h)
        size, new = len(h), []
        for i in range(size):
            reset = sigmoid(from_x[i] + from_h[i])
            update = sigmoid(from_x[size + i] + from_h[size + i])
            candidate = torch.tanh(from_x[2 * size + i] + reset * from_h[2 * size + i])
            new.append((1 - update) * candidate + update * h[i])
        return new

    def summarise(self, x: Matrix) -> Matrix:
        """h_{t−1} for every step t of one sequence."""
        h, before = zeros(self.config.n_h), []
        for step in x:
            before.append(h)
            h = self.gru("history", step, h)
        return before

    def slow_features(self, inferred: Vector) -> Vector:
        """(x − m) V for one step, normalised as x."""
        centred = [value - mean for value, mean in zip(normalise(inferred), self.slow_mean, strict=True)]
        return [dot(centred, [row[k] for row in self.slow]) for k in range(self.config.slow_features)]

    def embed_future(self, slow: Matrix, length: int) -> Matrix:
        """s_t: a layer that sees each feature at t, t + 1, … and then which of these steps there are."""
        embedding = []
        for t in range(length):
            steps = range(t, t + self.config.horizon)
            seen = [slow[k][i] if k < length else number(0.0) for i in range(self.config.slow_features) for k in steps]
            there = [number(1.0 if k < length else 0.0) for k in steps]
            embedding.append(relu(affine(self.w["future.weight"], self.w["future.bias"], seen + there)))
        return embedding

    def propose(self, slow: Matrix, length: int) -> tuple[Matrix, Matrix]:
        """Mean and std of the code at the first `length` steps of one sequence [Eq 12–15]."""
        means, stds = [], []
        for s in self.embed_future(slow, length):
            hidden = relu(affine(self.w["encoder.0.weight"], self.w["encoder.0.bias"], s))
            out = affine(self.w["encoder.2.weight"], self.w["encoder.2.bias"], hidden)
            means.append(out[: self.config.n_z])
            stds.append([torch.exp(min(max(v, number(-5.0)), number(2.0))) for v in out[self.config.n_z :]])
        return means, stds

    # -- when it switches ---------------------------------------------------------------------------------

    def switch_logit(self, x: Vector, h: Vector, z: Vector) -> Tensor:
        """f_switch(e_t, h_{t−1}, z_{t−1}) [Eq 16]."""
        from_context = affine(self.w["switch_context.weight"], self.w["switch_context.bias"], x + h)
        from_code = affine(self.w["switch_code.weight"], None, z)
        hidden = relu([a + b for a, b in zip(from_context, from_code, strict=True)])
        return affine(self.w["switch_head.weight"], self.w["switch_head.bias"], hidden)[0]

    def gate(self, logit: Tensor, uniform: Tensor, mode: str, temperature: float) -> Tensor:
        """β from its logit and a number drawn from U(0, 1); a sample is 1 with probability σ(logit / temperature)."""
        noise = torch.log(uniform) - torch.log(1 - uniform)
        if mode == "soft":
            return sigmoid(logit)
        if mode == "gumbel":
            return sigmoid((logit + noise) / temperature)
        if mode == "hard":
            return number(1.0 if logit > 0 else 0.0)
        sample = 1.0 if logit + temperature * noise > 0 else 0.0
        p = sigmoid(logit / temperature)
        return sample + (p - p.detach())  # the sample's value, the probability's gradient

    def segment(
        self, x: Matrix, before: Matrix, proposal: Matrix, uniform: Vector, mode: str, temperature: float
    ) -> tuple[Matrix, Vector, Vector]:
        """Codes, switches and logits of one sequence: z_t = β_t z̃_t + (1 − β_t) z_{t−1}, β_1 = 1 [Eq 16]."""
        z, found_z, found_switch, found_logit = zeros(self.config.n_z), [], [], []
        for t in range(len(x)):
            logit = self.switch_logit(x[t], before[t], z)
            switch = number(1.0) if t == 0 else self.gate(logit, uniform[t], mode, temperature)
            z = [switch * new + (1 - switch) * old for new, old in zip(proposal[t], z, strict=True)]
            found_z.append(z)
            found_switch.append(switch)
            found_logit.append(logit)
        return found_z, found_switch, found_logit

    def hold(self, x: Matrix, before: Matrix, proposal: Matrix, switch: Vector) -> tuple[Matrix, Vector]:
        """Codes and logits of one sequence whose switches, zeros and ones, are given."""
        z, found_z, found_logit = zeros(self.config.n_z), [], []
        for t in range(len(x)):
            found_logit.append(self.switch_logit(x[t], before[t], z))
            z = proposal[t] if t == 0 or switch[t] == 1 else z
            found_z.append(z)
        return found_z, found_logit

    # -- how it steers ------------------------------------------------------------------------------------

    def controller(self, z: Vector) -> Matrix:
        """U(z) whole; from e_i to e_j goes u_ij = Σ_r (Σ_k down_irk f_k) (Σ_m f_m up_rmj).

        A last row holds what is added whatever e is: there the offsets stand in the place of `down`.
        """
        f = [*relu(affine(self.w["features.weight"], self.w["features.bias"], z)), number(1.0)]
        k = len(f)
        matrix = []
        for down in [*self.w["down"], self.w["offset"]]:
            row = []
            for j in range(self.width):
                total = number(0.0)
                for r in range(self.config.rank):
                    into = dot(down[r * k : (r + 1) * k], f)
                    out = dot([self.w["up"][r * k + m][j] for m in range(k)], f)
                    total = total + into * out
                row.append(total)
            matrix.append(row)
        return matrix

    def control(self, e: Vector, z: Vector) -> Vector:
        """e + U(z) e, with a last entry 1 of e for the offsets [Eq 17, 18]."""
        u = self.controller(z)
        return [e[j] + dot([*e, number(1.0)], [row[j] for row in u]) for j in range(self.width)]

    # -- what it costs ------------------------------------------------------------------------------------

    def episode_loss(
        self,
        e: Matrix,
        actions: Sequence[int],
        readout: Matrix,
        means: Matrix,
        stds: Matrix,
        code: Matrix,
        switch: Vector,
        coefficients: Coefficients,
    ) -> Tensor:
        """−ELBO of one episode in nats, and its switches; `readout` holds a column of weights per action [E.1]."""
        total = number(0.0)
        for t, action in enumerate(actions):
            steered = self.control(e[t], code[t])
            total = total + negative_log_likelihood([dot(steered, column) for column in readout], action)
            adopted = switch[t] if coefficients.kl == "switch-weighted" else 1.0
            total = total + coefficients.kl_coef * kl(means[t], stds[t]) * adopted
            total = total + (coefficients.switch_cost * switch[t] if t > 0 else 0.0)
        return total


def kl(mean: Vector, std: Vector) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, 1)), summed over the units of a code."""
    total = number(0.0)
    for m, s in zip(mean, std, strict=True):
        total = total + 0.5 * (m**2 + s**2 - 1) - torch.log(s)
    return total


def negative_log_likelihood(logits: Vector, action: int) -> Tensor:
    return torch.log(sum(torch.exp(v) for v in logits)) - logits[action]


def kl_by_integration(mean: float, std: float) -> float:
    """The same for one unit by brute force: ∫ p log(p / q) on a fine grid."""
    total, step = 0.0, 1e-3
    for i in range(-20_000, 20_000):
        x = i * step
        log_p = -0.5 * ((x - mean) / std) ** 2 - math.log(std)
        log_q = -0.5 * x**2
        total += math.exp(log_p) / math.sqrt(2 * math.pi) * (log_p - log_q) * step
    return total
