"""Configs as data: nested dataclasses to JSON and back, and YAML files; one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from internalrl.errors import InternalRLError, OptionError
from internalrl.run.files import jsonable, read_file

Config = TypeVar("Config")

LARGEST_YAML = 2**18
"""Bytes of the largest YAML file that is read."""


def to_dict(config: Any) -> dict[str, Any]:
    """A (nested) config dataclass as JSON-able nested dicts; tuples become lists and paths strings."""
    values: dict[str, Any] = jsonable(dataclasses.asdict(config))
    return values


def from_dict(cls: type[Config], values: Mapping[str, Any], *, base: Config | None = None, where: str = "") -> Config:
    """A config of type `cls` with `values` over those of `base`, or over the defaults.

    Knows nested dataclasses, numbers, strings, booleans, paths, Literal, Optional, tuples, lists and dicts.
    `where` names the source in messages. Raises InternalRLError for an unknown key (naming the closest known
    one), a wrong type, a missing value or one that an `OptionError` of the dataclass's own checks refuses; what
    else these raise passes through.
    """
    return _build(cls, values, base, f"{where}: " if where else "", "")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; InternalRLError when it is missing, no YAML, or no mapping.

    Nothing in it may stand for something else: aliases, by which a few lines become gigabytes, are refused, and so is a
    key that is there twice.
    """
    try:
        values = yaml.load(read_file(path, LARGEST_YAML).decode(), _Loader)
    except UnicodeDecodeError as error:
        raise InternalRLError(f"Config file {path} is not UTF-8; give the path of a YAML file.") from error
    except OSError as error:
        raise InternalRLError(
            f"Config file {path} cannot be read ({error.strerror}); give the path of a YAML file."
        ) from error
    except Exception as error:  # many kinds: beside YAMLError what dates, numbers and deep nesting raise
        raise InternalRLError(f"Config file {path} is not valid YAML: {error or type(error).__name__}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InternalRLError(f"Config file {path} holds no options; write lines such as `steps: 100`.")
    return values


class _Loader(yaml.SafeLoader):
    """Plain values alone, each written out."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                None, None, f"*{event.anchor} stands for other lines; write them out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(None, None, "a key is there twice; keep one of them", node.start_mark)
        return mapping


def _build(cls: Any, values: Any, base: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise InternalRLError(f"{where}{prefix.rstrip('.')} must hold named options, found {values!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            known = _closest(key, prefix, fields)
            raise InternalRLError(f"{where}{prefix}{key} is no option of {cls.__name__}; {known}.")
    hints = get_type_hints(cls)
    result: dict[str, Any] = {}
    for name, field in fields.items():
        current = _default(field) if base is None else getattr(base, name)
        if name in values:
            result[name] = _convert(hints[name], values[name], current, where, prefix + name)
        elif current is not dataclasses.MISSING:
            result[name] = current
        else:
            raise InternalRLError(f"{where}{prefix}{name} is missing; {cls.__name__} needs it.")
    try:
        return cls(**result)
    except OptionError as error:
        raise InternalRLError(f"{where}{prefix}{error}") from error


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _closest(key: Any, prefix: str, fields: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}" if close else f"known are {', '.join(prefix + name for name in fields)}"


def _convert(hint: Any, value: Any, current: Any, where: str, name: str) -> Any:
    """`value` as the annotated type `hint`, or InternalRLError."""
    wrong = InternalRLError(f"{where}{name} must be {_describe(hint)}, found {reprlib.repr(value)}.")
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, current if isinstance(current, hint) else None, where, name + ".")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is not None and (nested := [arg for arg in args if dataclasses.is_dataclass(arg)]):
            return _convert(nested[0], value, current, where, name)  # keeps the message about the nested key
        for option in args:
            try:
                return _convert(option, value, current, where, name)
            except InternalRLError:
                continue
        raise wrong
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise wrong
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise wrong
        if origin is list or args[-1] is Ellipsis:
            kinds = [args[0]] * len(value)
        elif len(args) != len(value):
            raise wrong
        else:
            kinds = list(args)
        pairs = enumerate(zip(kinds, value, strict=True))
        return origin(_convert(kind, entry, None, where, f"{name}[{i}]") for i, (kind, entry) in pairs)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise wrong
        kind = args[1] if args else Any
        return {key: _convert(kind, entry, None, where, f"{name}.{key}") for key, entry in value.items()}
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # also of "1e-3", which YAML reads as text
        except (TypeError, ValueError):
            raise wrong from None
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    # bool is an int to Python, but not to a reader of a config
    if hint is Any or (hint in (int, str, bool, type(None)) and type(value) is hint):
        return value
    raise wrong


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    names[type(None)] = "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (tuple, list):
        inner = [_describe(arg) for arg in args if arg is not Ellipsis]
        return f"a list ({', '.join(inner)}{', ...' if Ellipsis in args or origin is list else ''})"
    return names.get(hint, "named options")
