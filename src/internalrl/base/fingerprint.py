"""Which base a model is: a fingerprint of the function that it computes, whatever precision it computes in.

The weights of a base come in float32, bfloat16 and float16, and an adapter of one acts on the others. No rounding is
the same for all of them: one number in sixteen, rounded to float16 and then to bfloat16, is not what bfloat16 makes of
it at once. So a fingerprint has two halves, of the weights as bfloat16 and as float16. A conversion from float32, or
from the precision that the weights were trained in, leaves one of the halves as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Comparing fingerprints needs no torch: the registry only does that.

HALF = 32
"""Hexadecimal digits of each half of a fingerprint: 128 bits."""

# What a config says of its file or of the library, not of the function that the model computes.
_CIRCUMSTANCES = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "base_model_name_or_path", "inference_mode", "peft_version", "revision",
}  # fmt: skip

_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def base_fingerprint(base: PreTrainedModel) -> str:
    """64 hexadecimal digits of a model's configuration and tensors; compare them with `same_base`.

    The first 32 are of SHA-256 over names, shapes and numbers rounded to bfloat16, the last 32 over the same rounded to
    float16. PEFT adapters that are loaded into the model count; its precision, where it was loaded from and library
    versions do not. Remembered until a tensor changes.
    """
    import torch

    tensors = sorted(base.state_dict().items())
    versions = [(name, tensor.data_ptr(), _version(tensor)) for name, tensor in tensors]
    known, fingerprint = _known.get(base, (None, ""))
    if versions != known:
        configs = [base.config.to_diff_dict(), *(peft.to_dict() for peft in getattr(base, "peft_config", {}).values())]
        text = json.dumps([type(base).__name__, *map(_function, configs)], sort_keys=True, default=_plain)
        with ThreadPoolExecutor(2) as pool:  # both in the time of one
            halves = pool.map(lambda precision: _half(text, tensors, precision), (torch.bfloat16, torch.float16))
            fingerprint = "".join(halves)
        _known[base] = versions, fingerprint
    return fingerprint


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, in precisions that may differ."""
    return one[:HALF] == other[:HALF] or one[HALF:] == other[HALF:]


def _half(configuration: str, tensors: Sequence[tuple[str, Tensor]], precision: torch.dtype) -> str:
    import torch

    digest = hashlib.sha256(configuration.encode())
    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.to(precision)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:HALF]


def _version(tensor: Tensor) -> object:
    """What differs after a change; tensors made in inference mode count none, and are never taken for unchanged."""
    return object() if tensor.is_inference() else tensor._version


def _function(config: Any) -> Any:
    """A config, and those within it, without its circumstances."""
    if isinstance(config, Mapping):
        return {key: _function(value) for key, value in config.items() if key not in _CIRCUMSTANCES}
    return config


def _plain(value: Any) -> Any:
    """What JSON does not know: sets in a fixed order, the rest as text."""
    return sorted(value) if isinstance(value, set) else str(value)
