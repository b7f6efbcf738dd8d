"""Observation encoders: what stands between an environment's observation and the backbone's embeddings.

An encoder maps observations (B, T, observation_size) to embeddings (B, T, n_e). What it can work out once per
episode, and what it must remember of the step before, live in an `EncoderState`, so that decoding one step at a
time equals encoding the whole sequence. Every encoder also names the part of the next observation that is worth
predicting, as a class index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internalrl.domains.grid.layouts import GridConfig

GAIN = 10.0
"""Factor on what the planner learns: Adam moves a parameter by a learning rate per step at most, and entry costs have
far to go. Without it forbidden cells stay cheap for the colours that are sought first (docs/log.md)."""

UNREACHED = 30.0
"""A path cost above any that occurs on a grid of at most 64 cells, whatever costs are learned."""


@dataclass
class EncoderState:
    """What an encoder carries from step to step, all with the batch as first axis."""

    plan: Tensor  # computed once per episode, from its first observation
    previous: Tensor  # (B, features): the features of the last step seen

    def select(self, rows: Tensor) -> EncoderState:
        return EncoderState(self.plan[rows], self.previous[rows])


class GridEncoder(nn.Module):
    """Base of the grid encoders: reads (cell contents, agent's cell) back from the one-hot observation."""

    def __init__(self, grid: GridConfig):
        super().__init__()
        self.size, self.colors, self.cells = grid.size, grid.colors, grid.cells
        self.contents = grid.channels  # as many as an observed cell has channels: "empty" in place of the agent
        self.observation_size = grid.observation_size
        self.target_size = self.cells

    def position(self, observations: Tensor) -> Tensor:
        """Agent's cell (B, T) of one-hot observations (B, T, cells · contents)."""
        return observations.unflatten(-1, (self.cells, self.contents))[..., -1].argmax(-1)

    def target(self, observations: Tensor) -> Tensor:
        """Class index (B, T) of what next-observation prediction predicts: only the agent moves."""
        return self.position(observations)


class OneHotEncoder(GridEncoder):
    """The paper's path: the one-hot observation through one hidden layer."""

    def __init__(self, grid: GridConfig, width: int, hidden: int = 256):
        super().__init__(grid)
        self.mlp = nn.Sequential(nn.Linear(self.observation_size, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(
        self, observations: Tensor, state: EncoderState | None = None, fresh: Tensor | None = None
    ) -> tuple[Tensor, EncoderState]:
        nothing = observations.new_zeros(len(observations), 0, dtype=torch.float32)
        return self.mlp(observations.float()), EncoderState(nothing, nothing)


class PlanningEncoder(GridEncoder):
    """Shortest paths with learned entry costs: a differentiable planner as the observation encoder.

    For each colour c, distances to its cell come from `rounds` sweeps of min over the four neighbours, with a
    learned cost exp(GAIN · w[c, content]) of entering a cell. What the agent sees at its cell: for each colour and
    move how much worse the move is than the best one, exp(sharpness · (best − q)); the distances; its
    coordinates; the cell's content. Trained through the action loss alone. It is a strong prior (moves go to
    neighbours, colours can be goals), so every result says which encoder it used.
    """

    def __init__(self, grid: GridConfig, width: int, hidden: int = 256, rounds: int = 16):
        super().__init__(grid)
        self.rounds = rounds
        self.log_cost = nn.Parameter(torch.zeros(grid.colors, self.contents))
        self.log_sharpness = nn.Parameter(torch.tensor(1.0 / GAIN))
        self.features = 5 * grid.colors + 2 + self.contents
        self.mlp = nn.Sequential(nn.Linear(self.features, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.linear = nn.Linear(self.features, width)
        self.shift = nn.Linear(self.features, width, bias=False)

    def plan(self, first_observation: Tensor) -> Tensor:
        """Features of every cell (B, cells, features) of the layout in (B, observation_size)."""
        size, batch = self.size, len(first_observation)
        objects = first_observation.unflatten(-1, (self.cells, self.contents))[..., :-1].float()
        content = torch.cat([objects, 1 - objects.sum(-1, keepdim=True)], -1)  # the last content is "empty"
        entry = (
            (content @ (GAIN * self.log_cost).exp().T).transpose(1, 2).unflatten(-1, (size, size))
        )  # (B, C, size, size)
        goal = objects[..., : self.colors].transpose(1, 2).unflatten(-1, (size, size)).bool()
        edge = (1, 1, 1, 1)
        distance = torch.where(goal, 0.0, UNREACHED).expand(batch, -1, -1, -1)
        for _ in range(self.rounds):
            # q of a move is the cost of entering the neighbour plus the distance from there
            onward = F.pad((entry + distance).clamp(max=UNREACHED), edge, value=UNREACHED)
            q = torch.stack(
                [
                    onward[..., :-2, 1:-1],
                    onward[..., 1:-1, 2:],
                    onward[..., 2:, 1:-1],
                    onward[..., 1:-1, :-2],
                ],
                2,
            )
            distance = torch.where(goal, 0.0, q.amin(2))
        best = q.amin(2, keepdim=True)
        advantage = torch.exp((GAIN * self.log_sharpness).exp() * (best - q)).flatten(1, 2)
        grid = torch.linspace(-1, 1, size, device=entry.device)
        y, x = (axis.expand(batch, 1, -1, -1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
        table = torch.cat([advantage, distance / size, y, x], 1).flatten(2).transpose(1, 2)
        return torch.cat([table, content], -1)

    def forward(
        self, observations: Tensor, state: EncoderState | None = None, fresh: Tensor | None = None
    ) -> tuple[Tensor, EncoderState]:
        """Embeddings (B, T, width); `fresh` (B, T) marks steps that must not look at the step before."""
        if state is None:
            plan = self.plan(observations[:, 0])
            state = EncoderState(plan, plan.new_zeros(len(plan), self.features))
        rows = torch.arange(len(observations), device=observations.device)[:, None]
        here = state.plan[rows, self.position(observations)]
        before = torch.cat([state.previous[:, None], here[:, :-1]], 1)
        if fresh is not None:
            before = before.masked_fill(fresh[..., None], 0.0)
        embeddings = self.mlp(here) + self.linear(here) + self.shift(before)
        return embeddings, EncoderState(state.plan, here[:, -1])


ENCODERS: dict[str, Callable[..., GridEncoder]] = {"one-hot": OneHotEncoder, "planner": PlanningEncoder}
