"""How much of the prompts is read while answers are written: a running one waits at most twice as long as alone."""

from __future__ import annotations

FIRST = 4
"""Tokens of prompts that are read beside answers before it is known how long they take."""
SHARE = 0.75
"""Of a step's time, so much is added to it for prompts."""
FORGET = 0.2
"""Weight of the newest pass among all of them."""
LOOK = 32
"""Passes with prompts after which one without them is timed."""


class Pace:
    """Learns from the passes how long a step and a prompt's token take.

    Args:
        most: tokens of prompts that a pass reads at most.
    """

    def __init__(self, most: int):
        self.most = most
        self._step: float | None = None
        self._token: float | None = None
        self._running = 0  # when a step was timed
        self._mixed = 0

    def tokens(self, running: int) -> int:
        """Most tokens of prompts that the next pass should read, while so many answers are `running`."""
        if not running:
            return self.most
        if self._step is None or not self._alike(running) or self._mixed >= LOOK:
            return 0
        if self._token is None:
            return min(FIRST, self.most)
        return min(self.most, max(1, int(SHARE * self._step / self._token)))

    def passed(self, seconds: float, running: int, read: int) -> None:
        """A pass gave `running` answers a token each and read so many tokens of prompts."""
        if not running:
            return
        if not read:
            self._step = _mean(self._step if self._alike(running) else None, seconds)
            self._running, self._mixed = running, 0
        else:
            self._mixed += 1
            if self._step is not None:
                least = self._step / (8 * self.most)
                self._token = _mean(self._token, max((seconds - self._step) / read, least))

    def _alike(self, running: int) -> bool:
        """Whether a step of so many takes about as long as the one that was timed last."""
        return self._running <= 2 * running and running <= 2 * self._running


def _mean(before: float | None, new: float) -> float:
    return new if before is None else before + FORGET * (new - before)
