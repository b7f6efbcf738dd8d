"""Adapters: what was learned on top of a base model, as a folder that names the base it belongs to.

    adapter_config.json          sizes, the base's fingerprint, how it was trained, the SHA-256 of the tensors
    adapter_model.safetensors    the metacontroller and, once there is one, the policy

Nothing is pickled, and loading reads both files whole and checks them before it builds anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.configio import from_dict, to_dict
from internalrl.errors import InternalRLError
from internalrl.files import write_errors, write_together
from internalrl.stages import MetacontrollerConfig

if TYPE_CHECKING:
    from internalrl.metacontroller.steered import SteeredModel

METHOD = "internal-rl-1"
"""Version of the equations and of this format: it changes when old adapters would act differently."""
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# What a config says of its file or of the library, not of the function that the model computes.
_CIRCUMSTANCES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class AdapterConfig:
    """Content of adapter_config.json."""

    method: str
    """Always `METHOD`; another value is refused."""
    metacontroller: MetacontrollerConfig
    """The layer of the tap, as a number, and all sizes."""
    policy_hidden: int | None
    """Width of the policy's recurrent layer; null without a policy."""
    base_fingerprint: str
    """See `base_fingerprint`."""
    tensors_sha256: str
    """SHA-256 of the tensor file."""
    library_version: str
    """Version of this library that wrote it."""
    provenance: dict[str, Any]
    """How it was trained: stage -> whatever the stage wants remembered."""


_fingerprints: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def base_fingerprint(base: PreTrainedModel) -> str:
    """SHA-256 (64 hexadecimal digits) of a model's configuration and tensors: names, types, shapes, bytes.

    Where it was loaded from and library versions do not count. Remembered until a tensor changes.
    """
    tensors = sorted(base.state_dict().items())
    versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]
    known, fingerprint = _fingerprints.get(base, (None, ""))
    if versions == known:
        return fingerprint
    config = {k: v for k, v in base.config.to_diff_dict().items() if k not in _CIRCUMSTANCES}
    digest = hashlib.sha256(json.dumps([type(base).__name__, config], sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    _fingerprints[base] = versions, digest.hexdigest()
    return digest.hexdigest()


def save_adapter(steered: SteeredModel, folder: str | Path) -> None:
    """Write the metacontroller, the policy if there is one, and the provenance of `steered` to `folder`.

    An older adapter there is replaced when both new files are on the disk; a full disk raises InternalRLError
    and leaves it as it was.
    """
    folder = Path(folder)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _adapter_tensors(steered).items()}
    data = safetensors.torch.save(tensors)
    config = AdapterConfig(
        method=METHOD,
        metacontroller=dataclasses.replace(steered.metacontroller.config, layer=steered.tap.layer),
        policy_hidden=steered.policy.hidden if steered.policy is not None else None,
        base_fingerprint=base_fingerprint(steered.base),
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        library_version=importlib.metadata.version("internalrl"),
        provenance=steered.provenance,
    )
    text = json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / TENSOR_FILE: data, folder / CONFIG_FILE: text.encode()})


def load_adapter(base: PreTrainedModel, folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read the adapter in `folder`; the names of its tensors begin with `metacontroller.` and `policy.`.

    Raises InternalRLError, naming the file, when it is missing, truncated, changed, of another version or
    library, or was trained on a base other than `base`; the message then holds both fingerprints.
    """
    config = _read_config(Path(folder) / CONFIG_FILE)
    fingerprint = base_fingerprint(base)
    if config.base_fingerprint != fingerprint:
        raise InternalRLError(
            f"Adapter {folder} was trained on the base with fingerprint {config.base_fingerprint[:16]}, but "
            f"this {type(base).__name__} has {fingerprint[:16]}; load the base that it was trained on."
        )
    file = Path(folder) / TENSOR_FILE
    data = _read(file)
    if hashlib.sha256(data).hexdigest() != config.tensors_sha256:
        raise InternalRLError(
            f"{file} is not the file that {CONFIG_FILE} was written with (the SHA-256 differ): it is "
            "truncated, or was changed or exchanged; copy the adapter again or train it again."
        )
    try:
        return config, safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise InternalRLError(f"{file} is no safetensors file ({error}); train the adapter again.") from error


def put_tensors(steered: SteeredModel, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Give `steered` the tensors that `load_adapter` read: all of them, or InternalRLError and none."""
    own = _adapter_tensors(steered)
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        name for name, t in own.items() if (t.shape, t.dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if wrong:
        raise InternalRLError(
            f"The tensors of adapter {folder} do not have the sizes in its {CONFIG_FILE} ({len(wrong)} "
            f"differ, the first is {wrong[0]}); restore the file as it was saved."
        )
    steered.load_state_dict(dict(tensors), strict=False, assign=True)


def _adapter_tensors(steered: SteeredModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in steered.state_dict().items() if not name.startswith("base.")}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InternalRLError(
            f"{file} cannot be read ({error.strerror}); an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}."
        ) from error


def _read_config(file: Path) -> AdapterConfig:
    try:
        values = json.loads(_read(file))
    except ValueError as error:
        raise InternalRLError(f"{file} is no JSON ({error}); copy or train the adapter again.") from error
    method = values.get("method") if isinstance(values, dict) else None
    if method != METHOD:
        raise InternalRLError(
            f"{file} is no adapter that this version can read: its method is {method!r}, expected "
            f"{METHOD!r}; use an adapter of this library, or the version that wrote it."
        )
    config = from_dict(AdapterConfig, values, where=str(file))
    sizes = {**dataclasses.asdict(config.metacontroller), "policy_hidden": config.policy_hidden}
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise InternalRLError(f"{file}: {name} is {size}, expected 1 or more; restore the file as saved.")
    return config
