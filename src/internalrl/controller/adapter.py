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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from internalrl.base.fingerprint import base_fingerprint, same_base
from internalrl.base.residual import ResidualTap
from internalrl.controller.metacontroller import Metacontroller
from internalrl.controller.policy import Policy
from internalrl.errors import InternalRLError, OptionError
from internalrl.run.files import read_file, write_errors, write_together
from internalrl.settings.ranges import Checked, Range
from internalrl.settings.schema import from_dict, to_dict
from internalrl.settings.stages import MetacontrollerConfig

METHOD = "internal-rl-2"
"""Version of the equations and of this format: it changes when old adapters would act differently."""
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
LARGEST_CONFIG, LARGEST_TENSORS = 2**20, 2**30
"""Bytes of the largest files that are read."""


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
    """Of the base that it was first trained on; see `base.fingerprint`."""
    tensors_sha256: str
    """SHA-256 of the tensor file."""
    library_version: str
    """Version of this library that wrote it."""
    provenance: dict[str, Any]
    """How it was trained: stage -> whatever the stage wants remembered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch("[0-9a-f]{64}", self.base_fingerprint):
            raise OptionError("base_fingerprint", "must be 64 hexadecimal digits.")


class Adapter(nn.Module):
    """What is learned on top of a base: the metacontroller and, after internal RL, a policy; `tap` is where they act.

    `provenance` tells how it was learned: stage -> whatever the stage wants remembered. `base_fingerprint` is that of
    the base that it was loaded for, as its file names it; None of a new adapter.
    """

    def __init__(self, base: PreTrainedModel, config: MetacontrollerConfig):
        super().__init__()
        self.tap = ResidualTap(base, config.layer)
        self.metacontroller = Metacontroller(config, base.config.get_text_config().hidden_size)
        self.policy: Policy | None = None
        self.provenance: dict[str, Any] = {}
        self.base_fingerprint: str | None = None


def save_adapter(adapter: Adapter, base: PreTrainedModel, folder: str | Path) -> None:
    """Write `adapter`, which belongs to `base`, to `folder`, in float32 whatever it computes in.

    An older adapter there is replaced when both new files are on the disk; a full disk raises InternalRLError
    and leaves it as it was. So does an adapter that could not be loaded again.
    """
    folder = Path(folder)
    fingerprint = base_fingerprint(base)
    if adapter.base_fingerprint is not None and same_base(adapter.base_fingerprint, fingerprint):
        fingerprint = adapter.base_fingerprint  # as it was before the base's precision changed
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in adapter.state_dict().items()}
    data = safetensors.torch.save(tensors)
    config = AdapterConfig(
        method=METHOD,
        metacontroller=dataclasses.replace(adapter.metacontroller.config, layer=adapter.tap.layer),
        policy_hidden=adapter.policy.hidden if adapter.policy is not None else None,
        base_fingerprint=fingerprint,
        tensors_sha256=hashlib.sha256(data).hexdigest(),
        library_version=importlib.metadata.version("internalrl"),
        provenance=adapter.provenance,
    )
    try:
        text = json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"
        if len(text) > LARGEST_CONFIG or len(data) > LARGEST_TENSORS:
            raise ValueError(
                f"it has more than {LARGEST_CONFIG:,} bytes of provenance or {LARGEST_TENSORS:,} of tensors"
            )
        _assembled(base, _config(text.encode(), folder / CONFIG_FILE), _tensors(data, folder / TENSOR_FILE), folder)
    except (InternalRLError, TypeError, ValueError) as error:
        raise InternalRLError(f"The adapter is not saved, as it could not be loaded again: {error}") from error
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_together({folder / TENSOR_FILE: data, folder / CONFIG_FILE: text.encode()})


def load_adapter(base: PreTrainedModel, folder: str | Path) -> Adapter:
    """The adapter in `folder`, which must have been trained on `base`, in whatever precision.

    Raises InternalRLError, naming the file, when it is missing, truncated, changed, not of the sizes or the base
    that its config tells, of another version, or of another library.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE)
    fingerprint = base_fingerprint(base)
    if not same_base(config.base_fingerprint, fingerprint):
        raise InternalRLError(
            f"Adapter {folder} was trained on the base with fingerprint {config.base_fingerprint[:16]}, but "
            f"this {type(base).__name__} has {fingerprint[:16]}; load the base that it was trained on."
        )
    return _assembled(base, config, read_tensors(folder / TENSOR_FILE, config.tensors_sha256), folder)


def _assembled(base: PreTrainedModel, config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path) -> Adapter:
    """The adapter that is made of these; InternalRLError unless config, tensors and base fit each other."""
    width = base.config.get_text_config().hidden_size
    require_sizes(config, tensors, folder, width)
    with torch.device("meta"):  # the tensors come from the file, no random number is drawn
        adapter = Adapter(base, config.metacontroller)
        adapter.policy = _policy(config, width)
    adapter.load_state_dict(tensors, assign=True)
    adapter.provenance, adapter.base_fingerprint = config.provenance, config.base_fingerprint
    return adapter


def require_sizes(config: AdapterConfig, tensors: Mapping[str, Tensor], folder: Path, width: int | None = None) -> None:
    """InternalRLError unless the tensors have the sizes that the config tells; nothing is allocated.

    Args:
        width: of the base's residual stream; by default whatever the tensors say.
    """
    if width is None:
        width = tensors["metacontroller.slow_mean"].numel() if "metacontroller.slow_mean" in tensors else 1
    try:
        with torch.device("meta"):  # shapes alone
            parts = {"metacontroller": Metacontroller(config.metacontroller, width), "policy": _policy(config, width)}
    except (RuntimeError, TypeError, OverflowError) as error:  # torch counts bytes in 64 bits
        raise InternalRLError(
            f"The sizes in {folder / CONFIG_FILE} are beyond any tensor; restore the file as it was saved."
        ) from error
    own = {f"{part}.{name}": t for part, module in parts.items() if module for name, t in module.state_dict().items()}
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        name for name, t in own.items() if (t.shape, t.dtype) != (tensors[name].shape, tensors[name].dtype)
    ]
    if wrong:
        raise InternalRLError(
            f"The tensors of adapter {folder} do not have the sizes in its {CONFIG_FILE} ({len(wrong)} "
            f"differ, the first is {wrong[0]}); restore the file as it was saved."
        )


def _policy(config: AdapterConfig, width: int) -> Policy | None:
    if config.policy_hidden is None:
        return None
    return Policy(width, config.metacontroller.n_z, config.policy_hidden, initial_std=1.0)


def read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of an adapter; InternalRLError unless they are whole, finite and of that SHA-256."""
    data = _read(file, LARGEST_TENSORS)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InternalRLError(
            f"{file} is not the file that {CONFIG_FILE} was written with (the SHA-256 differ): it is "
            "truncated, or was changed or exchanged; copy the adapter again or train it again."
        )
    return _tensors(data, file)


def read_config(file: Path) -> AdapterConfig:
    """The content of an adapter_config.json; InternalRLError for one that this version cannot use."""
    return _config(_read(file, LARGEST_CONFIG), file)


def _read(file: Path, most: int) -> bytes:
    try:
        return read_file(file, most)
    except OSError as error:
        raise InternalRLError(
            f"{file} cannot be read ({error.strerror}); an adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}."
        ) from error


def _tensors(data: bytes, file: Path) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError) as error:
        raise InternalRLError(f"{file} is no safetensors file ({error}); train the adapter again.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InternalRLError(f"{file}: {name} holds numbers that are not finite; train the adapter again.")
    return tensors


def _config(data: bytes, file: Path) -> AdapterConfig:
    try:
        values = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InternalRLError(f"{file} is no JSON ({error}); copy or train the adapter again.") from error
    method = values.get("method") if isinstance(values, dict) else None
    if method != METHOD:
        raise InternalRLError(
            f"{file} is no adapter that this version can read: its method is {method!r}, expected "
            f"{METHOD!r}; use an adapter of this library, or the version that wrote it."
        )
    return from_dict(AdapterConfig, values, where=str(file))


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")
