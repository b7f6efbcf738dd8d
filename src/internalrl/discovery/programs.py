"""Texts that are programs of the code domain: spliced ones are kept if they run, and codes are measured by idioms."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from internalrl.base.text_data import context_length
from internalrl.controller.steered import SteeredModel
from internalrl.discovery.objective import Episodes
from internalrl.domains.code.grammar import PROMPT, CodeConfig, Reading, parse
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import hidden_inputs
from internalrl.domains.code.tokenizer import boundaries
from internalrl.run.streams import Stream

if TYPE_CHECKING:
    from internalrl.discovery.text import TextMaterial

LONGEST = 256  # tokens that a program may grow to
MEASURED = 512  # programs that codes write, for each of the two measures
CHAIN = 4  # idioms of the programs that codes are forced to write
TEMPERATURE = 0.3  # of the tokens under random codes


class CodeDomain:
    """What is known of programs of `config`, which `tokenizer` writes and a sandbox really runs."""

    def __init__(self, config: CodeConfig, tokenizer: PreTrainedTokenizerFast):
        self.config, self.tokenizer = config, tokenizer

    def boundaries(self, tokens: list[int]) -> list[int]:
        return boundaries(self.config, self.tokenizer, [self.text(tokens)])[0]

    def accept(self, texts: list[list[int]]) -> list[bool]:
        """Those that parse and run on the hidden inputs, of which only the inputs are used."""
        with Sandbox() as sandbox:
            outcomes = sandbox.run([self.text(text) for text in texts], hidden_inputs()[:3])
        return [outcome.status == "ran" for outcome in outcomes]

    def measure(self, steered: SteeredModel, material: TextMaterial) -> dict[str, Any]:
        """`forced`: whether the idiom that a code stood for gets written, by kind of transition. `random_runs`: share
        of programs that run under random codes."""
        return {**self.forced(steered, material), **self.random(steered, material)}

    @torch.no_grad()
    def obey(self, steered: SteeredModel, material: TextMaterial) -> tuple[NDArray[np.int64], list[Reading]]:
        """Codes of held-out programs, one after the other in a new order: the idioms (N, CHAIN) that they stand for,
        and the N programs that get written."""
        first, later, end = self._codes(steered, material)
        rng, count = Stream.FREE_PLAY.numpy(material.seed), len(self.config.idioms)
        chains = rng.integers(count, size=(MEASURED, CHAIN))
        # among few programs an idiom may never begin one, or never go on with one: codes of the other kind stand in
        first, later = ([a or b for a, b in zip(*pair, strict=True)] for pair in ((first, later), (later, first)))
        pools = [[first[chain[0]], *(later[idiom] for idiom in chain[1:]), end] for chain in chains.tolist()]
        chosen = torch.stack([torch.stack([pool[rng.integers(len(pool))] for pool in row]) for row in pools])
        return chains, [parse(self.config, text) for text in self._write(steered, chosen)]

    def forced(self, steered: SteeredModel, material: TextMaterial) -> dict[str, float]:
        """Are the idioms that codes stand for written, in their order?

        A program is judged up to its first mistake; a switch that is missed or comes too early is one.
        """
        chains, written = self.obey(steered, material)
        passed, asked = np.zeros(2), np.zeros(2)
        first = whole = 0
        for chain, reading in zip(chains.tolist(), written, strict=True):
            for position, idiom in enumerate(chain):
                good = reading.idioms[position : position + 1] == (idiom,)
                if position:
                    kind = int(self.config.unseen[chain[position - 1], idiom])
                    asked[kind] += 1
                    passed[kind] += good
                else:
                    first += good
                if not good:
                    break
            whole += reading.complete and reading.idioms == tuple(chain)
        return {
            "forced_first": first / len(chains),
            "forced_corpus": float(passed[0] / max(asked[0], 1)),
            "forced_unseen": float(passed[1] / max(asked[1], 1)),
            "forced_whole": whole / len(chains),
        }

    @torch.no_grad()
    def random(self, steered: SteeredModel, material: TextMaterial) -> dict[str, Any]:
        """Programs under z ~ N(0, I): how many run, and which transitions they make."""
        generator = Stream.FREE_PLAY.torch(material.seed)
        codes = torch.randn(MEASURED, 16, steered.metacontroller.config.n_z, generator=generator)
        texts = self._write(steered, codes, do_sample=True, temperature=TEMPERATURE)
        with Sandbox() as sandbox:
            outcomes = sandbox.run(texts, hidden_inputs()[:3])
        readings = [parse(self.config, text) for text in texts]
        chains = [reading.idioms for reading in readings]
        steps = [(a, b) for chain in chains for a, b in pairwise(chain)]
        return {
            "random_runs": float(np.mean([outcome.status == "ran" for outcome in outcomes])),
            "random_complete": float(np.mean([reading.complete for reading in readings])),
            "random_idioms": float(np.mean([len(chain) for chain in chains])),
            "random_unseen": float(np.mean([bool(self.config.unseen[a, b]) for a, b in steps])) if steps else 0.0,
        }

    def _codes(
        self, steered: SteeredModel, material: TextMaterial
    ) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor]]:
        """The posterior's mean codes of held-out idioms that begin a program, of later ones, and of programs' ends.

        They are those that the metacontroller adopts: where it switches a token before an idiom, its codes expect that
        token, which for the first idiom is the prompt's. Where it does not switch, those where it should.
        """
        batch = material.measured
        episodes = Episodes.of(steered, batch)
        segments, proposals = steered.metacontroller.parse(episodes.residual, episodes.slow, batch.mask)
        switch, mean = (segments.switch > 0.5) & batch.mask, proposals.mean
        first: list[list[Tensor]] = [[] for _ in self.config.idioms]
        later: list[list[Tensor]] = [[] for _ in self.config.idioms]
        end: list[Tensor] = []
        parts = zip(batch.observations, batch.boundary, batch.mask, strict=True)
        for row, (tokens, boundary, mask) in enumerate(parts):
            length = int(mask.nonzero()[-1]) + 2
            positions = [int(mask.nonzero()[0]), *boundary.nonzero().squeeze(-1).tolist()]
            adopted = [next((p for p in (b, b - 1, b + 1) if switch[row, p]), b) for b in positions]
            idioms = parse(self.config, self.text(tokens[:length].tolist())).idioms
            for number, (position, idiom) in enumerate(zip(adopted, idioms, strict=False)):
                (later if number else first)[idiom].append(mean[row, position])
            end.append(mean[row, adopted[-1]])
        return first, later, end

    def _write(self, steered: SteeredModel, codes: Tensor, **options: Any) -> list[str]:
        """Programs under codes (N, S, n_z), each one held until the switch fires; greedy unless told otherwise."""
        prompt = torch.tensor(self.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
        sequences = steered.generate(
            prompt.expand(len(codes), -1),
            codes=codes,
            max_length=min(LONGEST, context_length(steered.base.config) or LONGEST),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return [self.text(tokens) for tokens in sequences.tolist()]

    def text(self, tokens: list[int]) -> str:
        """The program that `tokens` are, without its end of text and padding."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
