"""The command line: `internalrl SUBCOMMAND [options]`.

Subcommands name their function and config as "module:attribute"; both are imported only when needed, so that
`--help` is instant. A stage is a function `main(config, run: RunFolder) -> dict`; the dict is its summary. A tool has
no run folder: `main(config) -> dict`, where the config may be a union of dataclasses, one for each action.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from internalrl.errors import InternalRLError, OptionError
from internalrl.run.files import is_full
from internalrl.tables import print_results, printing

if TYPE_CHECKING:
    from internalrl.settings.options import ReadOptions, RunOptions, ToolOptions


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand's function and config are, and what it does."""

    target: str
    config: str
    help: str
    check: str | None = None
    """A function of the config that raises where the stage could not begin; it runs before a folder is made."""
    reads: bool = False
    """True: it reads a run folder given as its argument; False: it makes a new one (`--run`)."""
    tool: bool = False
    """True: it has no run folder, and neither presets nor YAML files."""


SUBCOMMANDS: dict[str, Subcommand] = {
    "pretrain": Subcommand(
        "internalrl.base.pretrain:main",
        "internalrl.settings.stages:PretrainConfig",
        "stage 1: train the base model on demonstrations",
        check="internalrl.base.pretrain:check",
    ),
    "discover": Subcommand(
        "internalrl.discovery.train:main",
        "internalrl.settings.stages:DiscoverConfig",
        "stage 2: find codes and switches in the frozen base, then consolidate",
        check="internalrl.discovery.train:check",
    ),
    "reinforce": Subcommand(
        "internalrl.reinforce.command:main",
        "internalrl.settings.stages:ReinforceConfig",
        "stage 3: reinforcement learning on the codes",
        check="internalrl.reinforce.command:check",
    ),
    "evaluate": Subcommand(
        "internalrl.analysis.evaluate:main",
        "internalrl.settings.stages:EvaluateConfig",
        "success of a run's model on any task",
        reads=True,
    ),
    "report": Subcommand(
        "internalrl.analysis.report.report:main",
        "internalrl.settings.stages:ReportConfig",
        "write a run's report.html, one offline file",
        reads=True,
    ),
    "demo": Subcommand(
        "internalrl.demo:main",
        "internalrl.settings.demos:DemoConfig",
        "all three stages on the grid world, then the report; `internalrl demo code` is the same on programs",
        check="internalrl.demo:check",
    ),
    "demo code": Subcommand(
        "internalrl.demo_code:main",
        "internalrl.settings.demos:CodeDemoConfig",
        "all three stages on programs, then the report",
        check="internalrl.demo_code:check",
    ),
    "serve": Subcommand(
        "internalrl.serving.main:main",
        "internalrl.serving.main:ServeConfig",
        "serve a base and its adapters behind the OpenAI API",
        tool=True,
    ),
    "adapters": Subcommand(
        "internalrl.serving.registry.cli:main",
        "internalrl.serving.registry.cli:AdaptersConfig",
        "versions of adapters: list, add, promote, rollback, split, remove, compare, move",
        tool=True,
    ),
    "strategies": Subcommand(
        "internalrl.strategies.cli:main",
        "internalrl.strategies.cli:StrategiesConfig",
        "libraries of an adapter's strategies: fit, list, name",
        tool=True,
    ),
    "audit": Subcommand(
        "internalrl.serving.audit.cli:main",
        "internalrl.serving.audit.cli:AuditConfig",
        "what the served models decided",
        tool=True,
    ),
    "keys": Subcommand(
        "internalrl.serving.keys:main",
        "internalrl.serving.keys:KeysConfig",
        "keys of the API: create, list, revoke",
        tool=True,
    ),
}


@dataclass(frozen=True)
class Command:
    """A parsed command line: the subcommand's name, its config and its options."""

    name: str
    config: Any
    options: RunOptions | ReadOptions | ToolOptions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 2 for a mistake in the input, 130 when interrupted)."""
    with printing():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] == "--version":
        from internalrl import __version__

        print(f"internalrl {__version__}")
        return 0
    command = None
    try:
        command = parse(argv)
        _print_summary(command, _run(command))
    except KeyboardInterrupt:
        print(f"\nInterrupted.{_how_to_go_on(command)}", file=sys.stderr)
        return 130
    except (InternalRLError, ValueError) as error:
        if os.environ.get("INTERNALRL_TRACEBACK"):
            raise
        hint = _how_to_go_on(command) if is_full(error) else ""
        print(f"internalrl: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return 0


def _how_to_go_on(command: Command | None) -> str:
    """The command that continues a run that has begun."""
    run = getattr(command.options, "run", None) if command else None
    if command is None or run is None or SUBCOMMANDS[command.name].reads or not (run / "config.json").exists():
        return ""
    return f" Continue with: {shlex.join(['internalrl', *command.name.split(), '--run', str(run), '--resume'])}"


def parse(argv: Sequence[str]) -> Command:
    """Parse a command line without running it; raises InternalRLError or ValueError with one sentence."""
    name = next((words for words in (" ".join(argv[:2]), argv[0]) if words in SUBCOMMANDS), argv[0])
    given = argv[1:] if name == argv[0] else argv[2:]
    if name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(SUBCOMMANDS)}."
        raise InternalRLError(f"{name!r} is no subcommand; {hint}")
    import tyro

    from internalrl.settings.options import ReadOptions, RunOptions, ToolOptions

    subcommand = SUBCOMMANDS[name]
    config_type = _load(subcommand.config)
    options: RunOptions | ReadOptions | ToolOptions
    if subcommand.tool:
        config, options = tyro.MISSING_NONPROP, ToolOptions()
    else:
        config, seed = _starting_point(name, config_type, given)
        options = ReadOptions(seed=seed) if subcommand.reads else RunOptions(seed=seed, run=_default_run(name))
    # One flat set of options from two dataclasses. A config's switches also have a --no- form: a resumed
    # run's stored values are the defaults, and the command line it was started with must still parse.
    flat, plain_switches = tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff
    both: Any = tuple[Annotated[config_type, flat], Annotated[type(options), flat, plain_switches]]  # type: ignore[valid-type,misc]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, options = tyro.cli(
                both,
                prog=f"internalrl {name}",
                description=subcommand.help,
                args=given,
                default=(config, options),
                config=(tyro.conf.CascadeSubcommandArgs,),  # so that --json may stand behind an action
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise InternalRLError(f"{_sentence(complaint.getvalue())}; see internalrl {name} --help.") from None
    except OptionError as error:  # of the outermost dataclasses: those of nested ones come through tyro's message
        raise InternalRLError(f"{_typed(error.option)} {error.complaint}") from error
    return Command(name, config, options)


def _starting_point(name: str, config_type: type, argv: Sequence[str]) -> tuple[Any, int]:
    """The config and seed under the command line's own values: defaults or stored run, preset, YAML."""
    from internalrl.run.folder import read_run
    from internalrl.settings.options import PRESETS
    from internalrl.settings.schema import from_dict, load_yaml

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--config", "--preset", "--run"):
        early.add_argument(option, nargs="?")
    early.add_argument("--resume", action="store_true")
    given, _ = early.parse_known_args(argv)

    config: Any = from_dict(config_type, {})
    seed = 0
    run = Path(given.run or _default_run(name))
    if given.resume and (run / "config.json").exists():
        stored = read_run(run)
        config, seed = from_dict(config_type, stored["config"], where=f"{run}/config.json"), stored["seed"]
    if given.preset is not None:
        if name not in PRESETS.get(given.preset, {}):
            known = ", ".join(known for known, stages in PRESETS.items() if name in stages)
            raise InternalRLError(f"{name} has no preset {given.preset!r}; known are: {known or 'none'}.")
        preset = PRESETS[given.preset][name]
        config = from_dict(config_type, preset, base=config, where=f"preset {given.preset}")
    if given.config is not None:
        config = from_dict(config_type, load_yaml(given.config), base=config, where=given.config)
    return config, seed


def _default_run(name: str) -> Path:
    """The run folder of a subcommand: runs/demo-code."""
    return Path("runs") / name.replace(" ", "-")


def _run(command: Command) -> dict[str, Any]:
    from internalrl.run.files import jsonable
    from internalrl.run.folder import RunFolder
    from internalrl.settings.options import RunOptions, ToolOptions
    from internalrl.settings.schema import to_dict

    subcommand, options = SUBCOMMANDS[command.name], command.options
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would stand between our own lines
    # With --json stdout belongs to the result alone.
    quiet = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
    if isinstance(options, ToolOptions):
        with quiet:
            answer: dict[str, Any] = jsonable(_load(subcommand.target)(command.config))
        return answer
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # Threads that spin while they wait for each other slow a busy machine down many times over; idle, they gain little.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    stage = _load(subcommand.target)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(options.seed)
        if options.threads:
            torch.set_num_threads(options.threads)

    if subcommand.check:
        _load(subcommand.check)(command.config)
    if isinstance(options, RunOptions):
        run = RunFolder.create(
            options.run,
            to_dict(command.config),
            seed=options.seed,
            resume=options.resume,
            overwrite=options.overwrite,
            track=options.track,
        )
    else:
        run = RunFolder.open(options.run, options.seed)
    with quiet:
        summary: dict[str, Any] = jsonable(stage(command.config, run))
    if not subcommand.reads:
        run.write_json("summary.json", summary)
    return summary


def _load(name: str) -> Any:
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _print_summary(command: Command, summary: Mapping[str, Any]) -> None:
    if command.options.json:
        print(json.dumps(summary))
        return
    run = getattr(command.options, "run", None)
    print_results(f"{command.name}: {run}" if run else command.name, summary)


def _typed(option: str) -> str:
    """The option of this name as it is typed: kl_coef -> --kl-coef."""
    return f"--{option.replace('_', '-')}"


def _sentence(box: str) -> str:
    """The first paragraph of tyro's framed message, and the option it suggests."""
    framed = "╭" in box  # on a terminal without UTF-8 the title is a paragraph of its own instead
    paragraphs: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip("│ ")
        if text and not text.strip("─-"):
            paragraphs.append([])
        elif not text.startswith(("╭", "╰")):
            paragraphs[-1].append(text)
    first, *others = paragraphs if framed else paragraphs[1:] or paragraphs
    # tyro numbers the two dataclasses that the options are made from; a reader knows only the option's name.
    message = re.sub(r"Error parsing \d+\.", "Error parsing --", " ".join(first)).rstrip(". ")
    if refused := re.fullmatch(r"Error parsing --(\S+): (\w+) (is .*)", message):  # by an OptionError
        message = f"{_typed('.'.join(refused.group(1, 2)))} {refused[3]}"
    similar = [text.split()[0] for paragraph in others for text in paragraph if text.startswith("--")]
    return f"{message}; did you mean {similar[0]}" if "Unrecognized" in message and similar else message


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    return "\n".join(
        [
            "usage: internalrl SUBCOMMAND [options]",
            "",
            "Discover temporally abstract actions inside a sequence model, and reinforce them.",
            "",
            *(f"  {name:{width}}  {subcommand.help}" for name, subcommand in SUBCOMMANDS.items()),
            "",
            "`internalrl SUBCOMMAND --help` lists its options; `internalrl --version` prints the version.",
            "A mistake prints one line and exits with 2; INTERNALRL_TRACEBACK=1 shows where it arose.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
