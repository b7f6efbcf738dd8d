"""What the report measures on programs: the model's own ones by segment, and how codes and switches read the corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from internalrl.analysis.measure import Codes, Coding, References, coding
from internalrl.analysis.report.material import KnownMaterial, Words
from internalrl.analysis.report.runs import find, open_steered
from internalrl.base.batches import Batch
from internalrl.base.pretrain_text import completion_nll
from internalrl.base.text_data import Examples, tokenise
from internalrl.controller.choosers import Propose
from internalrl.controller.policy import PolicyActor
from internalrl.controller.steered import SteeredModel, bare
from internalrl.discovery.programs import LONGEST, CodeDomain
from internalrl.discovery.text import TextMaterial
from internalrl.domains.code.grammar import END, PROMPT, CodeConfig, chain_log_prob, log_prob, parse, sample_programs
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import CodeTask, evaluate, solved_by, tasks
from internalrl.domains.code.tokenizer import build_tokenizer, load_tokenizer
from internalrl.players.stepwise import RowChance, prior, rollout
from internalrl.reinforce.completions import Completions, pad_prompts
from internalrl.run.folder import RunFolder
from internalrl.run.streams import Stream

NO_IDIOM = -1
"""In place of an idiom's number: a segment that is not one idiom, nor the program's end, whose number comes last."""


@dataclass(frozen=True)
class Piece:
    """What was written under one `code` (n_z,), and which idiom that is."""

    text: str
    idiom: int
    code: NDArray[np.float32]


@dataclass(frozen=True)
class Program:
    """One completion by segments; its idioms as far as it is made of them, and what became of it: `passes` all hidden
    tests, `runs`, or why it does not."""

    pieces: tuple[Piece, ...]
    idioms: tuple[int, ...]
    status: str


@dataclass(frozen=True)
class Models:
    """The base of a run on programs, its tokenizer and idioms, the demo's task, None in other runs, and, once there is
    an adapter, the steered model on that same base."""

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    code: CodeConfig
    task: CodeTask | None
    steered: SteeredModel | None


def code_of(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> CodeConfig | None:
    """The idioms that a run is about: by its settings, else by a tokenizer made of their words; None of other texts."""
    kinds = {"code": CodeConfig(), "code-large": CodeConfig.large()}
    named = kinds.get(find(config, "domain"), kinds["code"] if find(config, "idioms") else None)
    words = tokenizer.get_vocab()
    return named or next((code for code in kinds.values() if build_tokenizer(code).get_vocab() == words), None)


def open_programs(run: RunFolder, base: PreTrainedModel, config: Mapping[str, Any], code: CodeConfig) -> Models:
    """What `run` holds; InternalRLError where its tokenizer loses a part of an idiom."""
    tokenizer, steered = load_tokenizer(run.path / "base", code), open_steered(run, base)
    idioms = find(config, "idioms")
    return Models(base.eval(), tokenizer, code, tasks(code)[idioms] if idioms else None, steered)


@dataclass(frozen=True)
class ProgramMaterial(KnownMaterial):
    """Of a run on programs."""

    models: Models

    words = Words(
        episode="program",
        action="token",
        step="token",
        subgoal="idiom",
        demonstrations="programs",
        truth="the idioms",
        raw="tokens",
    )
    lead = (
        "A language model learned to continue programs, and was never told that they are made of idioms. What it "
        "worked out about them became actions of a higher order, and reinforcement learning was done on those."
    )

    @property
    def steered(self) -> SteeredModel | None:
        return self.models.steered

    @property
    def task(self) -> str:
        task = self.models.task
        if task is None:
            return "The task is what the run's own reward functions ask for."
        return (
            f"The task is a function that is known by {len(task.inputs)} hidden tests alone: "
            f"{' → '.join(task.chain)}, of which no program of the corpus shows any two in a row. A program that "
            "passes all tests is worth 1, any other nothing."
        )

    def name(self, subgoal: int) -> str:
        return (*self.models.code.idioms, "return")[subgoal]

    @cached_property
    def corpus(self) -> TextMaterial:
        """Programs for the report alone, of which a tenth are measured on."""
        programs = sample_programs(self.models.code, 10 * max(self.episodes, 50), Stream.REPORT.numpy(self.run.seed))
        domain = CodeDomain(self.models.code, self.models.tokenizer)
        return TextMaterial(self._tokens(programs.rows), self.run.seed, domain)

    @cached_property
    def references(self) -> References:
        code = self.models.code
        programs = sample_programs(code, self.episodes, Stream.REPORT.numpy(self.run.seed, 1))
        examples = self._tokens(programs.rows)
        exact = np.array([log_prob(code, text) for text in programs.texts])
        chain = np.array([chain_log_prob(code, length) for length in programs.lengths.tolist()])
        nll, tokens = completion_nll(self.models.base, examples), (examples.lengths - examples.prompts).sum()
        return References(*(float(total.sum() / tokens) for total in (nll, -exact, chain - exact)))

    @cached_property
    def coding(self) -> Coding:
        assert self.steered is not None
        return coding(self.steered, with_idioms(self.models, self.corpus.measured))

    @cached_property
    def bare(self) -> list[Program]:
        """Programs of the base alone, whose pieces are their idioms."""
        alone = bare(self.models.base)
        propose = prior(alone.metacontroller.config.n_z, self._generator(0))
        return [in_idioms(self.models.code, program) for program in self._write(alone, propose, 0, temperature=1.0)]

    @cached_property
    def random(self) -> list[Program]:
        """Programs under codes from N(0, I); none without an adapter."""
        if self.steered is None:
            return []
        return self._write(self.steered, prior(self.steered.metacontroller.config.n_z, self._generator(1)), 1)

    @cached_property
    def trained(self) -> list[Program]:
        """Programs of the trained policy; none without one."""
        if self.steered is None or self.steered.policy is None:
            return []
        return self._write(self.steered, PolicyActor(self.steered.policy, self.episodes, self._generator(2)), 2)

    def _generator(self, index: int) -> torch.Generator:
        return Stream.EVALUATE.torch(self.run.seed, index)

    def _tokens(self, rows: Sequence[Mapping[str, str]]) -> Examples:
        return tokenise(rows, self.models.tokenizer, self.models.base.config)

    def _write(
        self, steered: SteeredModel, propose: Propose, index: int, temperature: float | None = None
    ) -> list[Program]:
        if temperature is None:
            temperature = self.setting("temperature") or 0.0
        return write(
            self.models, steered, propose, self.episodes, temperature, Stream.REPORT.torch(self.run.seed, index)
        )


@torch.no_grad()
def write(
    models: Models, steered: SteeredModel, propose: Propose, count: int, temperature: float, generator: torch.Generator
) -> list[Program]:
    """`count` programs under proposed codes, cut at the switches and really run; `generator` decides the tokens."""
    tokenizer, domain = models.tokenizer, CodeDomain(models.code, models.tokenizer)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    texts = Completions(pad_prompts([prompt] * count), {tokenizer.eos_token_id}, LONGEST)
    chance = RowChance.draw(generator, range(count), count, LONGEST, steered.metacontroller.config.n_z)
    played = rollout(steered, texts, propose, temperature, generator=chance)
    found = []
    for row, length in enumerate(played.length.tolist()):
        cuts = [*played.switch[row, :length].nonzero().squeeze(-1).tolist(), length]
        parts = [
            (domain.text(played.actions[row, a:b].tolist()), played.code[row, a].numpy()) for a, b in pairwise(cuts)
        ]
        real = [(text, code) for text, code in parts if text] or parts[:1]  # the end of text alone is no text
        found.append([Piece(text, idiom_of(models.code, text), code) for text, code in real])
    completions = ["".join(piece.text for piece in pieces) for pieces in found]
    with Sandbox() as sandbox:
        outcomes, passed = evaluate(completions, models.task or solved_by(()), sandbox)
    said = [
        "passes" if won and models.task else "runs" if outcome.status == "ran" else outcome.status
        for outcome, won in zip(outcomes, passed, strict=True)
    ]
    return [
        Program(tuple(pieces), parse(models.code, PROMPT + text).idioms, status)
        for pieces, text, status in zip(found, completions, said, strict=True)
    ]


def in_idioms(code: CodeConfig, program: Program) -> Program:
    """The program cut where its idioms end, whatever the codes that it was written under."""
    text, held = PROMPT + "".join(piece.text for piece in program.pieces), program.pieces[0].code
    cuts = [len(PROMPT), *parse(code, text).ends, len(text)]
    parts = [text[a:b] for a, b in pairwise(cuts) if a < b]
    return replace(program, pieces=tuple(Piece(part, idiom_of(code, part), held) for part in parts))


def idiom_of(code: CodeConfig, text: str) -> int:
    """The number of the one idiom that a segment is, K for the program's end, or `NO_IDIOM`."""
    if text == END:
        return len(code.idioms)
    reading = parse(code, PROMPT + text)
    whole = len(reading.idioms) == 1 and reading.ends[0] == len(PROMPT + text)
    return reading.idioms[0] if whole else NO_IDIOM


def segments(programs: Sequence[Program]) -> Codes:
    """All segments of `programs`: their codes, and the idioms that they are."""
    pieces = [piece for program in programs for piece in program.pieces]
    return Codes(np.stack([piece.code for piece in pieces]), np.array([piece.idiom for piece in pieces]))


def following(code: CodeConfig, programs: Sequence[Program]) -> NDArray[np.float64]:
    """(K, K): how often a segment that is idiom b comes after one that is idiom a, of all that come after it."""
    count = len(code.idioms)
    done, total = np.zeros((count, count)), np.zeros(count)
    for program in programs:
        for a, b in pairwise(piece.idiom for piece in program.pieces):
            if 0 <= a < count:
                total[a] += 1
                if 0 <= b < count:
                    done[a, b] += 1
    return done / np.maximum(total, 1)[:, None]


def obedience(steered: SteeredModel, corpus: TextMaterial) -> NDArray[np.float64]:
    """(K, K): how often idiom b gets written under a code that stands for idiom a, all having gone well before it."""
    assert isinstance(corpus.domain, CodeDomain)
    count = len(corpus.domain.config.idioms)
    done, total = np.zeros((count, count)), np.zeros(count)
    for chain, reading in zip(*corpus.domain.obey(steered, corpus), strict=True):
        for position, wanted in enumerate(chain.tolist()):
            written = reading.idioms[position] if position < len(reading.idioms) else NO_IDIOM
            total[wanted] += 1
            if written != NO_IDIOM:
                done[wanted, written] += 1
            if written != wanted:
                break
    return done / np.maximum(total, 1)[:, None]


def with_idioms(models: Models, batch: Batch) -> Batch:
    """Programs with the idiom of every token that is to be written as their subgoals, K at the end; −1 elsewhere."""
    domain = CodeDomain(models.code, models.tokenizer)
    subgoal, part = torch.full_like(batch.subgoal, -1), batch.boundary.cumsum(1)
    for row, (tokens, mask) in enumerate(zip(batch.observations, batch.mask, strict=True)):
        length = int(mask.nonzero()[-1]) + 2
        text = domain.text(tokens[:length].tolist())
        chain = torch.tensor([*parse(models.code, text).idioms, len(models.code.idioms)])
        subgoal[row, mask] = chain[part[row, mask]]
    return replace(batch, subgoal=subgoal)
