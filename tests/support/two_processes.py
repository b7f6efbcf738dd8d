"""Run by `accelerate launch`, or alone: two iterations of internal RL, or of raw-token RL, on text.

python two_processes.py AGENT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))

from internalrl.reinforce.trainer import InternalRLTrainer
from internalrl.settings.stages import InternalRLConfig
from tests.support.language import language_model, steered_language_model
from tests.support.written import letters

SEEN: list[int] = []
"""How many completions the reward function was shown, call by call."""


def early(completions: list[str], weight: list[float]) -> list[float]:
    SEEN.append(len(completions))
    return [w * sum(letter < "h" for letter in text) for text, w in zip(completions, weight, strict=True)]


def main(agent: Any, folder: str) -> None:
    torch.set_num_threads(1)
    args = InternalRLConfig(
        agent=agent, temperature=1.0, output_dir=Path(folder), episodes=32, batch_size=16, num_generations=4,
        max_completion_length=6, policy_hidden=6, lr=1e-2,
    )  # fmt: skip
    dataset = [{"prompt": prompt, "weight": 1 + len(prompt)} for prompt in ("a", "bcd", "ef", "ghi", "k")]
    model = steered_language_model() if agent == "internal" else language_model()
    InternalRLTrainer(model, early, args, dataset, letters()).train()
    (Path(folder) / f"seen{os.environ.get('RANK', '')}.json").write_text(json.dumps(SEEN))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
