"""Who acts in internal RL: the policy over codes, or, as the baseline, the base model's own action distribution.

An agent plays a batch of episodes and can say how likely its decisions were; `train.reinforce` needs no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internalrl.controller.policy import Policy, PolicyActor
from internalrl.controller.steered import SteeredModel
from internalrl.players.stepwise import BatchEnvironment, Rollout, RowChance, rollout, stack_padded
from internalrl.players.threads import side_by_side
from internalrl.reinforce.recording import Recording
from internalrl.strategies.limits import Limits

SCORED_TOGETHER = 128
"""Texts whose tokens are scored, with gradients, at once."""


@dataclass
class Decisions:
    """What was `seen` (N, S, …) and `chosen` (N, S, …) at S decisions of each episode; `mask` (N, S): real ones.

    `together` is how many episodes can be scored at once, None for all: what the memory holds.
    """

    seen: Tensor
    chosen: Tensor
    mask: Tensor
    together: int | None = None

    def parts(self) -> Iterator[tuple[slice, Decisions]]:
        """Which episodes, and their decisions: as many at a time as can be scored."""
        size = self.together or len(self.mask)
        for rows in (slice(begin, begin + size) for begin in range(0, len(self.mask), size)):
            yield rows, Decisions(self.seen[rows], self.chosen[rows], self.mask[rows])

    @classmethod
    def join(cls, parts: Sequence[Decisions]) -> Decisions:
        """Those of parts of a batch, one after the other."""
        seen, chosen, mask = (
            stack_padded([getattr(part, name) for part in parts]) for name in ("seen", "chosen", "mask")
        )
        return cls(seen, chosen, mask, parts[0].together)


class Agent(Protocol):
    """Who decides in an episode."""

    @property
    def module(self) -> nn.Module:
        """Holds the parameters that learn."""

    def play(
        self, environment: BatchEnvironment, generator: torch.Generator | RowChance
    ) -> tuple[Rollout, Decisions]: ...

    def log_prob(self, decisions: Decisions) -> Tensor: ...


class InternalAgent:
    """Chooses a code at every switch; the steered base model, at `temperature`, does the rest.

    With `forget` the base model sees the present segment alone. With `limits` no code that they deny is ever in force:
    what they make of the policy's choice is part of the environment, just as what the base makes of the code is. So
    the policy gradient, of the choice's own log-probability, is that of the limited agent's success, without the
    normaliser of a truncated Gaussian, which for a union of cells no formula gives.
    """

    def __init__(
        self,
        steered: SteeredModel,
        policy: Policy,
        temperature: float = 0.0,
        deterministic: bool = False,
        forget: bool = False,
        limits: Limits | None = None,
    ):
        self.steered, self.module, self.temperature = steered, policy, temperature
        self.deterministic, self.forget, self.limits = deterministic, forget, limits

    def play(self, environment: BatchEnvironment, generator: torch.Generator | RowChance) -> tuple[Rollout, Decisions]:
        if self.limits is not None:  # they count what they see, one at a time
            return self._play(self.steered, environment, generator)
        results, decisions = zip(*side_by_side(self._play, self.steered, environment, generator), strict=True)
        return Rollout.join(results), Decisions.join(decisions)

    def _play(
        self, steered: SteeredModel, environment: BatchEnvironment, generator: torch.Generator | RowChance
    ) -> tuple[Rollout, Decisions]:
        noise = generator.codes if isinstance(generator, RowChance) else generator
        actor = PolicyActor(self.module, len(environment), noise, self.deterministic, self.limits)
        result = rollout(steered, environment, actor, self.temperature, self.forget, generator)
        return result, Decisions(*actor.segments())

    def log_prob(self, decisions: Decisions) -> Tensor:
        """(N, S); touches the policy only, no base forward."""
        return self.module.log_prob(decisions.seen, decisions.chosen)


class RawActionAgent:
    """Token-level RL: the base model itself is the policy over actions, all of it trained.

    With a metacontroller whose controller is zero this is the bare base; with a consolidated one, the code is
    zero throughout.
    """

    def __init__(self, steered: SteeredModel, temperature: float = 1.0):
        self.steered, self.module, self.temperature = steered, steered.base, temperature
        self.module.requires_grad_(True)
        steered.metacontroller.requires_grad_(False)

    def play(self, environment: BatchEnvironment, generator: torch.Generator | RowChance) -> tuple[Rollout, Decisions]:
        results, decisions = zip(*side_by_side(self._play, self.steered, environment, generator), strict=True)
        return Rollout.join(results), Decisions.join(decisions)

    def _play(
        self, steered: SteeredModel, environment: BatchEnvironment, generator: torch.Generator | RowChance
    ) -> tuple[Rollout, Decisions]:
        recording = Recording(environment)
        result = rollout(steered, recording, self._zero_code, self.temperature, generator=generator)
        return result, Decisions(recording.observations(result.actions.shape[1]), result.actions, result.mask)

    def log_prob(self, decisions: Decisions) -> Tensor:
        """(N, T): a full forward of the base over every step."""
        meta = self.steered.metacontroller
        zero = torch.zeros(*decisions.mask.shape, meta.config.n_z)
        with self.steered.tap.steering(lambda residual: meta.control(residual, zero)):
            logits = self.module(decisions.seen).logits
        log_probs = torch.log_softmax(logits / self.temperature, -1)
        return log_probs.gather(-1, decisions.chosen[..., None]).squeeze(-1)

    def _zero_code(self, rows: Tensor, x: Tensor) -> Tensor:
        return torch.zeros(len(rows), self.steered.metacontroller.config.n_z)


class RawTokenAgent(RawActionAgent):
    """The same for texts, as `Completions` writes them."""

    def _play(
        self, steered: SteeredModel, environment: BatchEnvironment, generator: torch.Generator | RowChance
    ) -> tuple[Rollout, Decisions]:
        prompts = torch.from_numpy(environment.observe())
        result = rollout(steered, environment, self._zero_code, self.temperature, generator=generator)
        seen = torch.cat([prompts, result.actions[:, :-1]], 1)
        return result, Decisions(seen, result.actions, result.mask & ~result.given, SCORED_TOGETHER)

    def log_prob(self, decisions: Decisions) -> Tensor:
        """(N, T): a full forward of the base over prompts and completions."""
        prompt = decisions.seen.shape[1] - decisions.chosen.shape[1]  # tokens before the first that decides
        real = decisions.seen >= 0
        inputs: dict[str, Tensor] = {"input_ids": decisions.seen.clamp(min=0)}
        if not real.all():
            inputs |= {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        code = torch.zeros(self.steered.metacontroller.config.n_z)
        where = F.pad(decisions.mask, (prompt, 0))
        logits = self.steered(code=code, where=where, use_cache=False, **inputs).logits[:, prompt:]
        log_probs = torch.log_softmax(logits.float() / self.temperature, -1)
        return log_probs.gather(-1, decisions.chosen[..., None]).squeeze(-1)
