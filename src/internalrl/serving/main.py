"""`internalrl serve`: a base and its adapters behind OpenAI's API.

The dataclasses are the command's options; nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import gc
import ipaddress
import itertools
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction

from internalrl.errors import InternalRLError, OptionError
from internalrl.settings.ranges import Checked, Count, Natural, Positive, Range

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from internalrl.serving.api.guard import Guard
    from internalrl.serving.registry.registry import Registry

Pairs = Annotated[tuple[str, ...], UseAppendAction]


@dataclass(frozen=True)
class Bounds(Checked):
    """Most that one request may take."""

    body_bytes: Annotated[int, Range(1024)] = 1 << 20
    """Size of a request's body."""
    body_seconds: Positive = 10.0
    """Time in which a request's head, and then its body, must arrive."""
    request_seconds: Positive = 300.0
    """Time from there to the end of the answer, however slowly it is read."""
    requests: Count = 256
    """Requests that are open at a time."""
    key_requests: Count = 128
    """Requests of one key that are open at a time."""
    prompt_tokens: Annotated[int | None, Range(1)] = None
    """Tokens of a prompt; by default what the base's context leaves."""
    answer_tokens: Count = 1024
    """Tokens of an answer; a chat that does not say how many it wants gets so many."""


@dataclass(frozen=True)
class AuditOptions(Checked):
    """The record of every segment of every steered answer."""

    enabled: bool = True
    """Off: nothing is recorded."""
    folder: Path = Path("runs/audit")
    """Folder for the journal and, without --database, an SQLite file."""
    texts: Literal["keep", "hash", "drop"] = "keep"
    """Texts of segments: as they are, as a hash under a key in the folder, or not at all."""
    redact: Pairs = ()
    """Regular expression whose finds are replaced by a mark before anything is written; give several one by one."""
    retention_days: Annotated[float | None, Range(0, above=True)] = None
    """Older segments are deleted."""
    max_segments: Annotated[int | None, Range(1)] = None
    """The oldest segments beyond this number are deleted."""


@dataclass(frozen=True)
class ServeConfig(Checked):
    """Options of `internalrl serve`."""

    base: Positional[str]
    """Folder of the base model and its tokenizer, or its name in Hugging Face's cache."""
    adapter: Pairs = ()
    """NAME=FOLDER of an adapter to add to the registry and promote; give several one by one. What the registry has
    already is served without being named here."""
    limits: Pairs = ()
    """NAME=FILE of the limits of an adapter, a YAML file, instead of those it was trained with; give several one by
    one."""
    name: str | None = None
    """What requests call the base; by default as it is given here."""
    host: str = "127.0.0.1"
    """Address to serve on. All but this machine's own need keys: `internalrl keys create`."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to serve on; 0 takes a free one."""
    registry: Path = Path("runs/registry")
    """Folder of the registry: the adapters and, without --database, an SQLite file."""
    database: str | None = None
    """URL of a database instead of SQLite files, also for the audit: postgresql://USER@HOST/NAME."""
    slots: Count = 64
    """Sequences that are decoded together."""
    queue: Natural = 192
    """Requests that may wait for a slot; more are answered with 429."""
    memory: Positive | None = None
    """GiB for keys and values; by default half of what is free at the start. Requests wait until theirs fit."""
    context: Annotated[int | None, Range(1)] = None
    """Most tokens of a sequence, prompt and answer; by default, and at most, the base's context."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the base runs; by default on a GPU if there is one."""
    threads: Annotated[int | None, Range(1)] = None
    """CPU threads of the base; by default all cores."""
    drain_seconds: Annotated[float, Range(0)] = 10.0
    """Time that running answers have to end when the server is stopped; then they are cut off."""
    bounds: Bounds = field(default_factory=Bounds)
    """Most that one request may take."""
    audit: AuditOptions = field(default_factory=AuditOptions)
    """The record of what was decided."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("adapter", "limits"):
            _pairs(getattr(self, option), option)

    @property
    def called(self) -> str:
        """What requests call the base."""
        return self.name or self.base


def main(config: ServeConfig) -> dict[str, Any]:
    """Serve until interrupted; the summary says how much was done."""
    listener = listen(config.host, config.port)
    address = url(config.host, listener.getsockname()[1])
    with ExitStack() as stack:
        stack.callback(listener.close)
        app = build(config, stack)
        from internalrl.serving.api.process import Process  # what it needs is known to be there

        server = Process(app, config.bounds, config.drain_seconds)
        gc.collect()
        gc.freeze()  # what is loaded stays; looking through it again and again would hold everyone up for 0.2 s
        who = "whoever sends a key" if app.service.keys.needed else "this machine only, as there are no keys"
        print(f"Serving {app.service.name} at {address}/v1 for {who}; Ctrl-C stops it.", file=sys.stderr, flush=True)
        server.run([listener])
        stats = app.service.engine.stats()
        return {"requests": stats.requests, "tokens": stats.tokens, "segments": stats.segments}


def build(config: ServeConfig, stack: ExitStack) -> Guard:
    """The application with all it needs, which `stack` closes."""
    from internalrl.players.engine.engine import Engine, EngineConfig
    from internalrl.serving.api.security import Keys
    from internalrl.serving.api.server import application
    from internalrl.serving.api.service import Service
    from internalrl.serving.audit.audit import Audit, AuditSettings
    from internalrl.serving.registry.live import Live
    from internalrl.serving.registry.registry import Registry

    registry = Registry(config.registry, config.database)
    stack.callback(registry.close)
    keys = Keys(config.registry, config.database)
    stack.callback(keys.close)
    if not keys.needed and not _is_loopback(config.host):
        raise InternalRLError(
            f"Without keys only this machine is served, and {config.host} is more; make a key with "
            "`internalrl keys create`, or leave --host out."
        )
    base, tokenizer = _load(config)
    limits = _bind(config, registry, base)
    audit = None
    if (options := config.audit).enabled:
        settings = AuditSettings(options.texts, options.redact, options.retention_days, options.max_segments)
        audit = Audit(options.folder, config.database, settings)
        stack.callback(audit.close)
    engine = Engine(
        base,
        tokenizer,
        EngineConfig(slots=config.slots, queue=config.queue, context=config.context, memory=config.memory),
        audit.segment if audit else None,
    )
    stack.callback(engine.close)
    live = Live(engine, registry, limits, config.called)
    service = Service(config.called, engine, live, registry, keys, audit, config.bounds)
    return application(service)


def _load(config: ServeConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from internalrl.base.loading import load_base, load_tokenizer

    if config.threads:
        torch.set_num_threads(config.threads)
    base = load_base(config.base)
    if base.main_input_name != "input_ids":
        raise InternalRLError(f"{config.base} is no language model; only those can be served.")
    tokenizer = load_tokenizer(config.base)
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return base.to("cuda" if cuda else "cpu"), tokenizer  # type: ignore[arg-type]


def _bind(config: ServeConfig, registry: Registry, base: PreTrainedModel) -> Mapping[str, Path]:
    """Promote the adapters that the options name; returns the files of limits by adapter.

    Before anything is promoted, every name must stand for one thing, and that must work.
    """
    from internalrl.base.fingerprint import base_fingerprint
    from internalrl.serving.registry.versions import require_other_name
    from internalrl.strategies.limits import limits_of

    added = {name: registry.add(name, folder) for name, folder in _pairs(config.adapter, "adapter").items()}
    for version in added.values():
        registry.load(base, version)
    routing = registry.routing(base_fingerprint(base))
    live = {name: [arm.version for arm in arms] for name, arms in routing.arms.items()}
    live |= {name: [version] for name, version in added.items()}
    for version in itertools.chain(*live.values()):
        require_other_name(version, config.called)
    limits = {name: Path(file) for name, file in _pairs(config.limits, "limits").items()}
    for name, file in limits.items():
        if name not in live:
            known = ", ".join(sorted(live)) or "none"
            raise InternalRLError(f"--limits names {name!r}, but no such adapter is live; live are: {known}.")
        for version in live[name]:
            limits_of(version.folder, file)
    for version in added.values():
        registry.promote(version.key)
    return limits


def _pairs(given: Sequence[str], option: str) -> Mapping[str, str]:
    """NAME=VALUE options by name."""
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise OptionError(option, f"is {text!r}; give NAME=PATH.")
        if name in pairs:
            raise OptionError(option, f"names {name!r} twice; give every name once.")
        pairs[name] = value
    return pairs


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            raise InternalRLError(
                f"Cannot serve on {host} port {port} ({error.strerror}); choose another --host or --port."
            ) from error
        stack.pop_all()
    return listener


def url(host: str, port: int) -> str:
    """The address of a server; that of an IPv6 host has brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in map(str, addresses))
