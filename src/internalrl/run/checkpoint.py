"""Checkpoints: tensors and JSON in one safetensors file, written whole or not at all; nothing is pickled.

`optimizer_tensors` and `rng_state` turn the two other things that a bit-equal resume needs, the state of the
optimizer and of the random generators, into tensors and JSON.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from internalrl.errors import InternalRLError
from internalrl.run.files import write_atomic

_FORMAT = "internalrl-checkpoint-1"

Generator = torch.Generator | np.random.Generator


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `state` to `path`; an older file is replaced once all is on the disk.

    The tensors are copied to the CPU first; tied weights are stored once per name. Raises InternalRLError
    when the disk is full; the older file is then unharmed.
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(copies, metadata={"format": _FORMAT, "state": json.dumps(state)}))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU) and the state written by `save_checkpoint`.

    Raises InternalRLError, naming the file, when it is missing, truncated or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise InternalRLError(f"There is no checkpoint {path}; run the stage that writes it first.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise InternalRLError(
            f"Checkpoint {path} cannot be read ({error}): it is truncated or no safetensors file; "
            "delete it and run the stage again."
        ) from error
    if metadata.get("format") != _FORMAT:
        raise InternalRLError(
            f"{path} is a safetensors file but not an internalrl checkpoint (its format is "
            f"{metadata.get('format')!r}, expected {_FORMAT!r}); give the path of a checkpoint of ours."
        )
    return tensors, json.loads(metadata["state"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors named `prefix.<parameter index>.<key>` and a JSON-able rest.

    Holds for optimizers whose per-parameter state is tensors and numbers (AdamW, Muon, SGD, ...).
    """
    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in full["state"].items():
        scalars[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                scalars[str(index)][key] = value
    return tensors, {"scalars": scalars, "param_groups": full["param_groups"]}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str
) -> None:
    """Restore what `optimizer_tensors` took apart; tensors outside `prefix` are ignored.

    Raises InternalRLError when the optimizer has other parameters than the stored one had.
    """
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in state["scalars"].items()}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            number, key = name.removeprefix(prefix + ".").split(".", 1)
            entries[int(number)][key] = tensor
    # JSON knows no tuples, and the optimizers compare some options (betas, ns_coefficients) as tuples.
    groups = [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()}
              for g in state["param_groups"]]  # fmt: skip
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in entries.items():
        for key, value in values.items():
            fits = index < len(parameters) and (
                not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameters[index].shape
            )
            if not fits:
                raise InternalRLError(
                    f"The stored optimizer state {prefix}.{index}.{key} does not fit this model; "
                    "resume with the config the run was started with."
                )
    try:
        optimizer.load_state_dict({"state": entries, "param_groups": groups})
    except ValueError as error:
        raise InternalRLError(
            f"The stored optimizer {prefix!r} has other parameters than this model ({error}); "
            "resume with the config the run was started with."
        ) from error


def rng_state(**generators: Generator) -> dict[str, Any]:
    """JSON-able state of torch's global CPU generator and of the named generators.

    NumPy generators must be those of `numpy.random.default_rng` (PCG64), whose state is plain integers.
    """
    return {name: _get_state(generator) for name, generator in _with_global(generators).items()}


def set_rng_state(state: Mapping[str, Any], **generators: Generator) -> None:
    """Restore what `rng_state` returned; the names must be the same ones."""
    named = _with_global(generators)
    if set(named) != set(state):
        raise InternalRLError(
            f"The checkpoint holds the random states {sorted(state)}, expected {sorted(named)}; "
            "it was written by another stage or version, so start the stage again."
        )
    for name, generator in named.items():
        if isinstance(generator, torch.Generator):
            generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state[name])), dtype=torch.uint8))
        else:
            generator.bit_generator.state = state[name]


def _with_global(generators: Mapping[str, Generator]) -> dict[str, Generator]:
    return {"torch_global": torch.default_generator, **generators}


def _get_state(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return base64.b64encode(generator.get_state().numpy().tobytes()).decode()
    return generator.bit_generator.state
