"""Domains: environments, their experts and exact references. They know nothing of the method."""


def register_environments() -> None:
    """Register the domains' environments with Gymnasium; imports nothing but Gymnasium's registry."""
    from gymnasium.envs.registration import register, registry

    if "internalrl/Grid-v0" not in registry:
        register(
            id="internalrl/Grid-v0",
            entry_point="internalrl.domains.grid.gym:GridEnv",
            vector_entry_point="internalrl.domains.grid.gym:GridVectorEnv",
        )
