"""The stages at sizes that take a second, for the tests that run them whole."""

from __future__ import annotations

from pathlib import Path

from internalrl.domains.grid.world import GridConfig
from internalrl.settings.stages import (
    BaseConfig,
    ConsolidateConfig,
    DiscoverConfig,
    MetacontrollerConfig,
    PretrainConfig,
    RehearseConfig,
    ReinforceConfig,
)

GRID = GridConfig(size=5, colors=6, walls=1, horizon=40)
PRETRAIN = PretrainConfig(grid=GRID, base=BaseConfig(layers=2, width=16, heads=2, mlp=16), steps=5, batch_size=8)
SIZES = MetacontrollerConfig(
    n_z=3, n_h=5, n_s=8, encoder_hidden=6, switch_hidden=7, controller_hidden=4, rank=2,
    slow_features=2, horizon=3, controller_init=0.4, switch_bias=0.3,  # it switches, and what it does shows
)  # fmt: skip


def discover(base: Path) -> DiscoverConfig:
    """Three steps in every phase, the last two on crops at learned switches; then consolidation."""
    return DiscoverConfig(
        base=base,
        metacontroller=SIZES,
        consolidate=ConsolidateConfig(
            rehearse=RehearseConfig(steps=5, batch_size=8, batches=2), episodes=16, steps=5, batch_size=8
        ),
        form_steps=3,
        squeeze_steps=3,
        switch_steps=3,
        recrop_steps=1,
        batch_size=8,
        batches=4,
    )


def reinforce(discovered: Path, agent: str = "internal") -> ReinforceConfig:
    """A task that random play solves now and then."""
    return ReinforceConfig(
        discovered=discovered, agent=agent, task="0", episodes=5 * 16, batch_size=16, policy_hidden=4, epochs=2
    )
