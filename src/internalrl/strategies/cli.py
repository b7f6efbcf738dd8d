"""`internalrl strategies`: make a library of an adapter's strategies, look at it, give its strategies names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from internalrl.errors import InternalRLError
from internalrl.settings.ranges import Checked, Count, Natural, NotNegative, Range

if TYPE_CHECKING:
    from internalrl.controller.steered import SteeredModel
    from internalrl.strategies.fit import Sample
    from internalrl.strategies.library import Library

Source = Literal["policy", "prior", "demonstrations"]


@dataclass(frozen=True)
class Fit(Checked):
    """Let an adapter act, cluster the codes that it uses, and save the library, with examples of what they do."""

    adapter: Positional[Path]
    """Folder of the adapter."""
    base: str
    """Folder of its base, or the name of a language model in Hugging Face's cache."""
    file: Path | None = None
    """Where to save the library; by default strategies.json in the adapter's folder."""
    source: Source | None = None
    """Whose codes: the policy's, draws from N(0, I), or, on the grid, the encoder's on demonstrations. By default the
    policy's; without one, demonstrations on the grid, and the prior for language models."""
    prompts: Path | None = None
    """Text file with a prompt per line, or .jsonl with a "prompt" or "text" per line; by default the beginning of a
    text."""
    samples: Count = 256
    """Texts, or episodes."""
    max_tokens: Count = 64
    """Most tokens of a text."""
    temperature: NotNegative = 1.0
    """Of the tokens; 0 is greedy."""
    strategies: Annotated[int | None, Range(2)] = None
    """How many; by default what the codes suggest."""
    most: Annotated[int, Range(2)] = 12
    """Most strategies to consider."""
    coverage: Annotated[float, Range(0.5, 1)] = 0.99
    """Fraction of a strategy's codes within its radius; codes beyond it count as unknown."""
    seed: Natural = 0
    """Seed of all randomness."""


@dataclass(frozen=True)
class List(Checked):
    """Show the strategies of a library, with their examples."""

    library: Positional[Path]
    """The file, or the adapter's folder that it is in."""


@dataclass(frozen=True)
class Name(Checked):
    """Give a strategy a name, by which limits and the audit know it."""

    library: Positional[Path]
    """The file, or the adapter's folder that it is in."""
    number: Positional[Count]
    """Of the strategy, as `list` shows it."""
    name: Positional[str]
    """The new name."""


StrategiesConfig = (
    Annotated[Fit, subcommand("fit")] | Annotated[List, subcommand("list")] | Annotated[Name, subcommand("name")]
)


def main(config: Fit | List | Name) -> dict[str, Any]:
    """Do what the action says; returns the library as rows."""
    from internalrl.strategies.library import read_library

    match config:
        case Fit():
            return fit(config)
        case List():
            file = _file(config.library)
            return {"file": file, **_shown(read_library(file))}
        case Name():
            file = _file(config.library)
            library = read_library(file).renamed(config.number, config.name)
            library.save(file)
            return {"file": file, **_shown(library)}


def fit(config: Fit) -> dict[str, Any]:
    """Make the library that `config` describes, and save it."""
    from internalrl.controller.steered import SteeredModel
    from internalrl.strategies import fit as strategies_fit
    from internalrl.strategies.library import STRATEGIES_FILE, Library, meaning_of

    steered = SteeredModel.from_pretrained(config.base, config.adapter).eval()
    on_grid = not steered.base.can_generate()
    without_policy: Source = "demonstrations" if on_grid else "prior"
    source = config.source or (without_policy if steered.policy is None else "policy")
    if source == "policy" and steered.policy is None:
        raise InternalRLError(f"Adapter {config.adapter} has no policy; give --source prior, or train one.")
    if source == "demonstrations" and not on_grid:
        raise InternalRLError("Demonstrations exist on the grid alone; give --source policy, or prior.")
    if on_grid:
        sample = strategies_fit.from_grid(steered, source, config.samples, config.seed)
    else:
        sample = _written(steered, config, source)
    found = strategies_fit.fit(sample, config.seed, config.most, config.coverage, config.strategies)
    library = Library(meaning_of(config.adapter), source, len(sample.codes), found.silhouette, found.strategies)
    file = config.file or config.adapter / STRATEGIES_FILE
    library.save(file)
    return {"file": file, **_shown(library)}


def _written(steered: SteeredModel, config: Fit, source: Source) -> Sample:
    from internalrl.base.loading import load_tokenizer
    from internalrl.strategies import fit as strategies_fit

    tokenizer = load_tokenizer(config.base)
    prompts = _prompts(config.prompts) if config.prompts is not None else []
    return strategies_fit.from_texts(
        steered, tokenizer, prompts, source, config.samples, config.max_tokens, config.temperature, config.seed
    )


def _prompts(file: Path) -> list[str]:
    """The prompts in a text file or .jsonl, without empty lines; InternalRLError where there is none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if file.suffix == ".jsonl":
            values = [json.loads(line) for line in lines]
            lines = [value["prompt"] if "prompt" in value else value["text"] for value in values]
        if not lines or not all(isinstance(line, str) and line for line in lines):
            raise ValueError("a prompt is no text, or there is none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InternalRLError(
            f"Prompts {file} cannot be read ({type(error).__name__}: {error}); give a prompt per line, in .jsonl files "
            'as {"prompt": "..."}.'
        ) from error
    return lines


def _file(library: Path) -> Path:
    from internalrl.strategies.library import STRATEGIES_FILE

    return library / STRATEGIES_FILE if library.is_dir() else library


def _shown(library: Library) -> dict[str, Any]:
    rows = [
        {
            "number": strategy.number,
            "name": strategy.name,
            "share": strategy.share,
            "radius": strategy.radius,
            "examples": list(strategy.examples),
        }
        for strategy in library.strategies
    ]
    return {"source": library.source, "codes": library.codes, "silhouette": library.silhouette, "strategies": rows}
