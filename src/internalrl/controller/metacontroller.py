"""Metacontroller: every equation of the method (arXiv 2512.20605, Eq 11–18 and appendix E), in one file.

Departures from the paper, each measured in docs/log.md: the residual is normalised before the metacontroller
reads it (the controller still acts on the raw residual); the encoder reads slow features of what the base has
inferred instead of the whole residual; the first step always opens a segment; the controller is quadratic in the
features of the code, so that U is never built, and may add an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internalrl.errors import InternalRLError
from internalrl.settings.stages import MetacontrollerConfig

SwitchMode = Literal["soft", "gumbel", "straight-through", "hard"]


@dataclass
class Proposals:
    """Diagonal Gaussians over codes, `mean` and `std` (B, T, n_z), and a `sample` of them."""

    mean: Tensor
    std: Tensor
    sample: Tensor

    def kl(self) -> Tensor:
        """KL(N(mean, std²) ‖ N(0, I)) in nats, (B, T)."""
        return 0.5 * (self.mean**2 + self.std**2 - 1 - 2 * self.std.log()).sum(-1)


@dataclass
class Segmentation:
    """What the switch made of a sequence: `code` (B, T, n_z), `switch` β (B, T) and its `logit` (B, T)."""

    code: Tensor
    switch: Tensor
    logit: Tensor


@dataclass
class MetacontrollerState:
    """State of one decoding batch: `history` (B, n_h), `code` (B, n_z), `started` (B,) False before the first step."""

    history: Tensor
    code: Tensor
    started: Tensor

    def select(self, rows: Tensor) -> MetacontrollerState:
        return MetacontrollerState(self.history[rows], self.code[rows], self.started[rows])

    def join(self, other: MetacontrollerState) -> MetacontrollerState:
        """The rows of both, those of `other` last."""
        pairs = (self.history, other.history), (self.code, other.code), (self.started, other.started)
        return MetacontrollerState(*(torch.cat(pair) for pair in pairs))


@dataclass
class Controller:
    """U(z) of B codes, as factors `down` (B, n_e, r) and `up` (B, r, n_e) with an `offset` (B, 1, r) between them.

    They are the metacontroller's weights contracted with a code each, and far smaller: where codes are kept for
    several steps, to read these costs less than to read the weights at every step.
    """

    down: Tensor
    offset: Tensor
    up: Tensor

    def __call__(self, residual: Tensor) -> Tensor:
        """Write-back e + U(z) e for one step or several, (B, T, n_e)."""
        inner = torch.baddbmm(self.offset, residual.to(self.down.dtype), self.down)
        return residual + (inner @ self.up).to(residual.dtype)

    def put(self, rows: Tensor, other: Controller) -> None:
        """Replace `rows` (S,) by those of `other`, in place."""
        self.down[rows], self.offset[rows], self.up[rows] = other.down, other.offset, other.up

    def select(self, rows: Tensor) -> Controller:
        return Controller(self.down[rows], self.offset[rows], self.up[rows])

    def join(self, other: Controller) -> Controller:
        """The rows of both, those of `other` last."""
        pairs = (self.down, other.down), (self.offset, other.offset), (self.up, other.up)
        return Controller(*(torch.cat(pair) for pair in pairs))


class Metacontroller(nn.Module):
    """Reads the residual stream e (B, T, n_e), decides when to switch to a new code, and steers with the code.

    Args:
        config: sizes; see `MetacontrollerConfig`.
        width: n_e, the width of the residual stream.

    Raises:
        InternalRLError: more slow features are asked for than the stream has dimensions.
    """

    def __init__(self, config: MetacontrollerConfig, width: int):
        super().__init__()
        if config.slow_features > width:
            raise InternalRLError(
                f"slow_features is {config.slow_features}, but the residual stream has {width} dimensions; give fewer."
            )
        self.config, self.width = config, width
        # f_enc and the sequence embedding s_t of the slow features from t on [Eq 12-15]
        self.slow: Tensor
        self.slow_mean: Tensor
        self.register_buffer("slow", torch.zeros(width, config.slow_features))
        self.register_buffer("slow_mean", torch.zeros(width))
        self.future = nn.Linear(config.horizon * (config.slow_features + 1), config.n_s)
        into = nn.Linear(config.n_s, config.encoder_hidden)
        out = nn.Linear(config.encoder_hidden, 2 * config.n_z)
        self.encoder = nn.Sequential(into, nn.ReLU(), out)
        # f_switch(e_t, h_{t-1}, z_{t-1}) with the history h_t of e_1:t [Eq 16]
        self.history = nn.GRU(width, config.n_h, batch_first=True)
        self.switch_context = nn.Linear(width + config.n_h, config.switch_hidden)
        self.switch_code = nn.Linear(config.n_z, config.switch_hidden, bias=False)
        self.switch_head = nn.Linear(config.switch_hidden, 1)
        # f_hyp: U(z) = up(f) · down(f) with f = [relu(W z + b), 1], both factors linear in f [Eq 17]
        self.features = nn.Linear(config.n_z, config.controller_hidden)
        k = config.controller_hidden + 1
        self.down = nn.Parameter(config.controller_init * torch.randn(width, config.rank * k))
        self.offset = nn.Parameter(torch.randn(config.rank * k))
        self.up = nn.Parameter(0.1 * config.controller_init * torch.randn(config.rank * k, width))
        with torch.no_grad():  # codes that differ, and say so clearly: small or noisy ones collapse onto the prior
            out.weight[: config.n_z] *= config.encoder_gain
            out.bias[config.n_z :] = config.encoder_log_std
        self.reset_switch()

    def reset_switch(self) -> None:
        """Make the switch ignorant: the same small probability at every step."""
        nn.init.zeros_(self.switch_head.weight)
        nn.init.constant_(self.switch_head.bias, self.config.switch_bias)

    def parameters_of(self, *parts: str) -> list[nn.Parameter]:
        """Parameters of the named parts: "history", "encoder", "switch", "controller"."""
        prefixes = {
            "history": ("history",),
            "encoder": ("encoder", "future"),
            "switch": ("switch",),
            "controller": ("features", "down", "offset", "up"),
        }
        wanted = tuple(prefix for part in parts for prefix in prefixes[part])
        return [parameter for name, parameter in self.named_parameters() if name.startswith(wanted)]

    # -- what it reads ------------------------------------------------------------------------------------

    def read(self, residual: Tensor) -> Tensor:
        """The residual as the metacontroller's networks see it: their precision, unit scale, any depth (…, n_e)."""
        return F.layer_norm(residual.to(self.down.dtype), (self.width,))

    def remember(self, x: Tensor, before: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """h_t for every t, (B, T, n_h).

        Args:
            x: (B, T, n_e) from `read`; before: (B, n_h), the history before the first step, zero by default.
            mask: (B, T), True at real steps; the others leave the history as it was.
        """
        if before is None:
            before = x.new_zeros(len(x), self.config.n_h)
        if mask is None:
            return self.history(x, before[None])[0]
        real_first = (~mask).byte().argsort(stable=True, dim=1)  # then the GRU need not know of the others
        history, _ = self.history(x.gather(1, real_first[..., None].expand_as(x)), before[None])
        history = torch.cat([before[:, None], history], 1)
        return history.gather(1, mask.cumsum(1)[..., None].expand(-1, -1, self.config.n_h))

    def summarise(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """h_{t-1} for every t: (B, T, n_h), zero at the first real step; `mask` as in `remember`."""
        return F.pad(self.remember(x, mask=mask)[:, :-1], (0, 0, 1, 0))

    def summarise_segments(self, x: Tensor, segments: Tensor) -> Tensor:
        """`summarise` for a history that begins anew where the segment numbers (B, T) change."""
        history, before = x.new_zeros(len(x), self.config.n_h), []
        for t in range(x.shape[1]):
            if t:
                history = history * (segments[:, t] == segments[:, t - 1])[:, None]
            before.append(history)
            history = gru_step(self.history, x[:, t], history)
        return torch.stack(before, 1)

    def slow_features(self, inferred: Tensor) -> Tensor:
        """What persists of what the base has inferred: (B, T, n_e) from `SteeredModel.inferred` -> (B, T, k).

        The projection is found without labels, before discovery, by `discovery.slow`.
        """
        return (self.read(inferred) - self.slow_mean) @ self.slow

    def embed_future(self, slow: Tensor, mask: Tensor) -> Tensor:
        """Sequence embedding s (B, T, n_s) of the slow features (B, T, k) at t and the next `horizon` − 1 steps."""
        real = mask.to(slow.dtype)[..., None]
        ahead = F.pad(torch.cat([slow * real, real], -1), (0, 0, 0, self.config.horizon - 1))
        return F.relu(self.future(ahead.unfold(1, self.config.horizon, 1).flatten(2)))

    def propose(self, slow: Tensor, mask: Tensor, noise: bool = True) -> Proposals:
        """Acausal posterior over codes at every step [Eq 12–15].

        It sees the slow features of the present and the future, and nothing else: a code can then say what the base
        will come to believe, but neither what it believed before nor which moves lead there. It means the same after
        every history, and a rate spent on anything but the subgoal buys nothing.

        Args:
            slow: (B, T, k) from `slow_features`; mask: (B, T), True at real steps.
            noise: False samples the means, and draws no random number.
        """
        mean, log_std = self.encoder(self.embed_future(slow, mask)).chunk(2, -1)
        std = log_std.clamp(-5, 2).exp()
        return Proposals(mean, std, mean + std * torch.randn_like(std) if noise else mean)

    # -- when it switches ---------------------------------------------------------------------------------

    def switch_logit(self, context: Tensor, code: Tensor) -> Tensor:
        """Logit of β from the context part of its first layer (…, switch_hidden) and the code held so far."""
        return self.switch_head(F.relu(context + self.switch_code(code))).squeeze(-1)

    def segment(
        self,
        x: Tensor,
        before: Tensor,
        proposal: Tensor,
        mode: SwitchMode,
        temperature: float = 1.0,
        mask: Tensor | None = None,
    ) -> Segmentation:
        """Temporal integration z_t = β_t z̃_t + (1 − β_t) z_{t−1}, with β_1 = 1 [Eq 16].

        β is sigmoid(logit) ("soft"), a Gumbel-sigmoid sample ("gumbel"), a Bernoulli sample with the sigmoid's
        gradient ("straight-through"), or logit > 0 ("hard").

        Args:
            mask: (B, T), True at real steps: the first of them opens a segment, and none before it does. By default
                the first step is real.
        """
        context = self.switch_context(torch.cat([x, before], -1))
        noise = torch.zeros_like(context[..., 0])
        if mode in ("gumbel", "straight-through"):
            uniform = torch.rand_like(noise).clamp(1e-6, 1 - 1e-6)
            noise = uniform.log() - (-uniform).log1p()  # logistic noise
        real = torch.ones_like(noise, dtype=torch.bool) if mask is None else mask
        begun, late = real.cumsum(1), not real[:, 0].all()
        opens = real & (begun == 1)
        codes, switches, logits = [proposal[:, 0]], [real[:, 0].to(noise.dtype)], []
        logits.append(self.switch_logit(context[:, 0], torch.zeros_like(proposal[:, 0])))
        for t in range(1, x.shape[1]):
            logit = self.switch_logit(context[:, t], codes[-1])
            switch = gate(logit, noise[:, t], mode, temperature)
            if late:
                switch = torch.where(begun[:, t] == 0, 0, torch.where(opens[:, t], 1, switch))
            codes.append(torch.lerp(codes[-1], proposal[:, t], switch[:, None]))
            switches.append(switch)
            logits.append(logit)
        return Segmentation(torch.stack(codes, 1), torch.stack(switches, 1), torch.stack(logits, 1))

    def parse(self, residual: Tensor, slow: Tensor, mask: Tensor) -> tuple[Segmentation, Proposals]:
        """Sequences as the metacontroller itself cuts and codes them: hard switches, the posterior's mean codes.

        Args:
            residual: (B, T, n_e); slow: (B, T, k) from `slow_features`; mask: (B, T), True at real steps.
        """
        x, proposals = self.read(residual), self.propose(slow, mask, noise=False)
        return self.segment(x, self.summarise(x), proposals.sample, "hard", mask=mask), proposals

    def hold(self, x: Tensor, before: Tensor, proposal: Tensor, switch: Tensor) -> Segmentation:
        """`segment` for a switch that is given, (B, T) of zeros and ones: no loop over time is needed."""
        code = held_code(proposal, switch)
        context = self.switch_context(torch.cat([x, before], -1))
        previous = F.pad(code[:, :-1], (0, 0, 1, 0))
        return Segmentation(code, switch, self.switch_logit(context, previous))

    # -- how it steers ------------------------------------------------------------------------------------

    def control(self, residual: Tensor, code: Tensor) -> Tensor:
        """Write-back e + U(z) e with U = up · down of rank r; no (n_e, n_e) matrix is built [Eq 17, 18].

        Args:
            residual: (…, n_e); code: (…, n_z). Returns (…, n_e) of the residual's type; what is added is computed
            in the metacontroller's own precision.
        """
        f = self._code_features(code)
        inner = (residual.to(self.down.dtype) @ self.down + self.offset).unflatten(-1, (self.config.rank, -1))
        inner = inner @ f[..., None]
        change = (inner * f[..., None, :]).flatten(-2) @ self.up
        return residual + change.to(residual.dtype)

    def controller(self, code: Tensor) -> Controller:
        """U(z) of codes (B, n_z) that stay in force for many steps; it does what `control` does."""
        f = self._code_features(code)
        rank, k = self.config.rank, f.shape[-1]
        return Controller(
            down=(self.down.view(-1, k) @ f.mT).mT.view(-1, self.width, rank),
            offset=(f @ self.offset.view(rank, k).mT)[:, None],
            up=(f @ self.up.view(rank, k, -1)).transpose(0, 1),
        )

    def _code_features(self, code: Tensor) -> Tensor:
        """f = [relu(W z + b), 1] of codes (…, n_z)."""
        return F.pad(F.relu(self.features(code)), (0, 1), value=1.0)

    # -- one step at a time -------------------------------------------------------------------------------

    def start(self, batch: int, device: torch.device | str = "cpu") -> MetacontrollerState:
        """State before the first step of `batch` sequences."""
        return MetacontrollerState(
            torch.zeros(batch, self.config.n_h, dtype=self.down.dtype, device=device),
            torch.zeros(batch, self.config.n_z, dtype=self.down.dtype, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def advance(self, x: Tensor, state: MetacontrollerState) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the switch: β (B,) bool, its logit (B,) and the history that includes this step.

        Args:
            x: (B, n_e) from `read`. The caller puts new codes into the rows that switch.
        """
        context = self.switch_context(torch.cat([x, state.history], -1))
        logit = self.switch_logit(context, state.code)
        return (logit > 0) | ~state.started, logit, gru_step(self.history, x, state.history)


def held_code(proposal: Tensor, switch: Tensor) -> Tensor:
    """The code in force at every step: the proposal (B, T, n_z) of the last step whose switch (B, T) is 1."""
    steps = torch.arange(switch.shape[1], device=switch.device).expand_as(switch)
    opened = torch.where(switch > 0.5, steps, 0).cummax(1).values
    return proposal.gather(1, opened[..., None].expand_as(proposal))


def gru_step(gru: nn.GRU, x: Tensor, hidden: Tensor) -> Tensor:
    """One step of a single-layer GRU: x (B, n) and the hidden state (B, n_h) -> the next hidden state (B, n_h)."""
    return torch.gru_cell(x, hidden, *gru.all_weights[0])


def gate(logit: Tensor, noise: Tensor, mode: SwitchMode, temperature: float = 1.0) -> Tensor:
    """β from its logit and logistic noise, both (…); see `Metacontroller.segment`."""
    if mode == "soft":
        return torch.sigmoid(logit)
    if mode == "gumbel":
        return torch.sigmoid((logit + noise) / temperature)
    hard = (logit + temperature * noise > 0).to(logit.dtype)
    if mode == "hard":
        return hard
    probability = torch.sigmoid(logit / temperature)
    return hard + (probability - probability.detach())  # exactly 0 or 1
