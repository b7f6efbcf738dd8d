"""Adapters: what was learned on top of a base model, as a folder that names the base it belongs to.

    adapter_config.json          sizes, the base's fingerprint, how it was trained, the SHA-256 of the tensors
    adapter_model.safetensors    the metacontroller and, once there is one, the policy

Nothing is pickled, and loading reads both files whole and checks them before it makes use of anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.base.residual import ResidualTap
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.policy import Policy
from internalrl.errors import InternalRLError
from internalrl.run.files import write_errors, write_together
from internalrl.settings.ranges import Checked, Range
from internalrl.settings.schema import from_dict, to_dict
from internalrl.settings.stages import MetacontrollerConfig

METHOD = "internal-rl-1"
"""Version of the equations and of this format: it changes when old adapters would act differently."""
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"

# What a config says of its file or of the library, not of the function that the model computes.
_CIRCUMSTANCES = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "base_model_name_or_path", "inference_mode", "peft_version", "revision",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig(Checked):
    """Content of adapter_config.json."""

    method: str
    """Always `METHOD`; another value is refused."""
    metacontroller: MetacontrollerConfig
    """The layer of the tap, as a number, and all sizes."""
    policy_hidden: Annotated[int | None, Range(1)]
    """Width of the policy's recurrent layer; null without a policy."""
    base_fingerprint: str
    """See `base_fingerprint`."""
    tensors_sha256: str
    """SHA-256 of the tensor file."""
    library_version: str
    """Version of this library that wrote it."""
    provenance: dict[str, Any]
    """How it was trained: stage -> whatever the stage wants remembered."""


class Adapter(nn.Module):
    """What is learned on top of a base: the metacontroller and, after internal RL, a policy; `tap` is where they act.

    `provenance` tells how it was learned: stage -> whatever the stage wants remembered.
    """

    def __init__(self, base: PreTrainedModel, config: MetacontrollerConfig):
        super().__init__()
        self.tap = ResidualTap(base, config.layer)
        self.metacontroller = Metacontroller(config, base.config.get_text_config().hidden_size)
        self.policy: Policy | None = None
        self.provenance: dict[str, Any] = {}


_fingerprints: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def base_fingerprint(base: PreTrainedModel) -> str:
    """SHA-256 (64 hexadecimal digits) of a model's configuration and tensors: names, types, shapes, bytes.

    PEFT adapters that are loaded into it count; where it was loaded from and library versions do not. Remembered
    until a tensor changes.
    """
    tensors = sorted(base.state_dict().items())
    versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors]
    known, fingerprint = _fingerprints.get(base, (None, ""))
    if versions == known:
        return fingerprint
    configs = [base.config.to_diff_dict(), *(peft.to_dict() for peft in getattr(base, "peft_config", {}).values())]
    configs = [{k: v for k, v in config.items() if k not in _CIRCUMSTANCES} for config in configs]
    text = json.dumps([type(base).__name__, *configs], sort_keys=True, default=_plain)
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    _fingerprints[base] = versions, digest.hexdigest()
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON does not know: sets in a fixed order, the rest as text."""
    return sorted(value) if isinstance(value, set) else str(value)


def save_adapter(adapter: Adapter, base: PreTrainedModel, folder: str | Path) -> None:
    """Write `adapter`, which belongs to `base`, to `folder`.

    An older adapter there is replaced when both new files are on the disk; a full disk raises InternalRLError
    and leaves it as it was.
    """
    folder = Path(folder)
    data = safetensors.torch.save({name: t.cpu().contiguous() for name, t in adapter.state_dict().items()})
    config = AdapterConfig(
        method=METHOD,
        metacontroller=dataclasses.replace(adapter.metacontroller.config, layer=adapter.tap.layer),
        policy_hidden=adapter.policy.hidden if adapter.policy is not None else None,
        base_fingerprint=base_fingerprint(base),
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        library_version=importlib.metadata.version("internalrl"),
        provenance=adapter.provenance,
    )
    text = json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / TENSOR_FILE: data, folder / CONFIG_FILE: text.encode()})


def load_adapter(base: PreTrainedModel, folder: str | Path) -> Adapter:
    """The adapter in `folder`, which must have been trained on `base`.

    Raises InternalRLError, naming the file, when it is missing, truncated, changed, not of the sizes or the base
    that its config tells, of another version, or of another library.
    """
    config = read_config(Path(folder) / CONFIG_FILE)
    fingerprint = base_fingerprint(base)
    if config.base_fingerprint != fingerprint:
        raise InternalRLError(
            f"Adapter {folder} was trained on the base with fingerprint {config.base_fingerprint[:16]}, but "
            f"this {type(base).__name__} has {fingerprint[:16]}; load the base that it was trained on."
        )
    tensors = read_tensors(Path(folder) / TENSOR_FILE, config.tensors_sha256)
    with torch.device("meta"):  # shapes alone: the tensors come from the file, no random number is drawn
        adapter = Adapter(base, config.metacontroller)
        if config.policy_hidden is not None:
            sizes = adapter.metacontroller.width, config.metacontroller.n_z, config.policy_hidden
            adapter.policy = Policy(*sizes, initial_std=1.0)
    own = adapter.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        name for name, t in own.items() if (t.shape, t.dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if wrong:
        raise InternalRLError(
            f"The tensors of adapter {folder} do not have the sizes in its {CONFIG_FILE} ({len(wrong)} "
            f"differ, the first is {wrong[0]}); restore the file as it was saved."
        )
    adapter.load_state_dict(tensors, assign=True)
    adapter.provenance = config.provenance
    return adapter


def read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of an adapter; InternalRLError unless they are whole, finite and of that SHA-256."""
    data = _read(file)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InternalRLError(
            f"{file} is not the file that {CONFIG_FILE} was written with (the SHA-256 differ): it is "
            "truncated, or was changed or exchanged; copy the adapter again or train it again."
        )
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise InternalRLError(f"{file} is no safetensors file ({error}); train the adapter again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InternalRLError(f"{file}: {name} holds numbers that are not finite; train the adapter again.")
    return tensors


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InternalRLError(
            f"{file} cannot be read ({error.strerror}); an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}."
        ) from error


def read_config(file: Path) -> AdapterConfig:
    """The content of an adapter_config.json; InternalRLError for one that this version cannot use."""
    try:
        values = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise InternalRLError(f"{file} is no JSON ({error}); copy or train the adapter again.") from error
    method = values.get("method") if isinstance(values, dict) else None
    if method != METHOD:
        raise InternalRLError(
            f"{file} is no adapter that this version can read: its method is {method!r}, expected "
            f"{METHOD!r}; use an adapter of this library, or the version that wrote it."
        )
    return from_dict(AdapterConfig, values, where=str(file))
