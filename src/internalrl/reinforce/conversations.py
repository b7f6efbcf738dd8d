"""Conversations as episodes: the model takes turns with an environment whose methods it calls, in TRL's form.

    class Shop:
        def reset(self, **row) -> str | None:       # the columns of the dataset; what it returns ends the prompt
            ...

        def price(self, item: str) -> str:          # a tool, as is every public method
            '''What an item costs.

            Args:
                item: its name.
            '''

        def get_reward(self) -> float:              # optional: a reward function of its own
            ...

A turn ends where the model ends its text. If it calls tools there, their answers follow, which the model reads as it
does a prompt, and then its next turn, in which a new segment opens. An answer for which there is no room is left out,
and with it what would follow.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from internalrl.errors import InternalRLError
from internalrl.reinforce.completions import Completions, pad_prompts
from internalrl.reinforce.rewards import Reward, await_now

Message = dict[str, Any]
Factories = Callable[[], Any] | Mapping[str, Callable[[], Any]]

_tools = threading.Lock()
"""Parts of a batch are played side by side, but whoever wrote a tool need not know."""


@dataclass
class Conversation:
    """One of them, as far as it is.

    environment: whose methods are the tools; prompt: its messages; read: every token of prompt and completion;
    turn: those of the model's present turn; answer: tokens that come next, whatever the model would say; completion:
    messages of model and tools; calls, failures: how many tools were called, and how many of them raised.
    """

    environment: Any
    prompt: list[Message]
    read: list[int]
    turn: list[int] = field(default_factory=list)
    answer: deque[int] = field(default_factory=deque)
    completion: list[Message] = field(default_factory=list)
    calls: int = 0
    failures: int = 0


class Host:
    """Makes environments, shows the model their tools, and calls them for it.

    Args:
        factory: makes an environment, or several by name, of which the `environment` column of a row chooses. Instances
            are used again: each is made once and reset often.
        tokenizer: with a chat template for tools, and a `response_template` to tell their calls from text.
        ends: tokens that end a turn.

    Raises:
        InternalRLError: environments without `reset`, tools that cannot be described, a tokenizer that lacks something.
    """

    def __init__(self, factory: Factories, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]):
        several = factory.items() if isinstance(factory, Mapping) else [(None, factory)]
        self.factories: dict[str | None, Callable[[], Any]] = dict(several)
        self.named = isinstance(factory, Mapping)
        self.tokenizer, self.ends = tokenizer, set(ends)
        self.pools: dict[str | None, list[Any]] = {name: [make()] for name, make in self.factories.items()}
        for (first,) in self.pools.values():
            if not callable(getattr(first, "reset", None)):
                raise InternalRLError(f"The environment {type(first).__name__} has no method `reset`; give it one.")
            self.prompt_tokens([{"role": "user", "content": ""}], first)
        if getattr(tokenizer, "response_template", None) is None:
            raise InternalRLError(
                "The tokenizer has no response_template, which tells tool calls from text; set it as transformers' "
                "pages on response parsing show, or let trl.chat_template_utils.add_response_schema do so."
            )
        if "nothing" not in tokenizer.decode(self.answer_tokens([{"role": "tool", "name": "a", "content": "nothing"}])):
            raise InternalRLError("The chat template leaves out what tools answer; use one that is made for tools.")

    @property
    def judges(self) -> list[Reward]:
        """A reward function for every kind of environment with a `get_reward`, None about the others."""
        kinds = dict.fromkeys(type(first) for first, *_ in self.pools.values())
        return [_judge(kind) for kind in kinds if hasattr(kind, "get_reward")]

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> list[Conversation]:
        """A conversation for each row of a dataset; they are over when this is called again."""
        used = dict.fromkeys(self.pools, 0)
        return [self._begin(row, used) for row in rows]

    def _begin(self, row: Mapping[str, Any], used: dict[str | None, int]) -> Conversation:
        name = row.get("environment") if self.named else None
        if name not in self.factories:
            known = ", ".join(map(str, self.factories))
            raise InternalRLError(f"A row of the dataset asks for the environment {name!r}; known are {known}.")
        if used[name] == len(self.pools[name]):
            self.pools[name].append(self.factories[name]())
        environment = self.pools[name][used[name]]
        used[name] += 1
        prompt = [dict(message) for message in row.get("prompt") or [{"role": "user", "content": ""}]]
        columns = {key: value for key, value in row.items() if not (self.named and key == "environment")}
        try:
            observation = environment.reset(**columns)
            prompt[-1]["content"] += observation or ""
        except Exception as error:  # of someone else's code
            raise InternalRLError(
                f"The environment {type(environment).__name__} could not be reset ({type(error).__name__}: {error}); "
                "nothing is lost: correct it and resume."
            ) from error
        return Conversation(environment, prompt, self.prompt_tokens(prompt, environment))

    def prompt_tokens(self, messages: list[Message], environment: Any) -> list[int]:
        """`messages`, after a description of the tools, up to the model's turn."""
        try:
            return self._tokens(self._render(messages, tools=list(tools_of(environment).values()) or None))
        except Exception as error:  # of templates, and of tools that transformers cannot describe
            raise InternalRLError(
                f"The tools of {type(environment).__name__} cannot be shown to the model ({error}); give each type "
                "hints and a docstring with `Args:`, and use a tokenizer whose chat template takes tools."
            ) from error

    def end_turn(self, talk: Conversation, room: int) -> bool:
        """Put down the turn that has ended and call its tools; whether the conversation goes on.

        Args:
            room: how many tokens may still follow.
        """
        self.put_down(talk)
        calls = talk.completion[-1].get("tool_calls")
        if not calls:
            return False
        with _tools:
            answers = [self._call(talk, call) for call in calls]
        tokens = self.answer_tokens(answers)
        if len(tokens) >= room:
            return False
        talk.completion += answers
        talk.answer.extend(tokens)
        return True

    def answer_tokens(self, answers: list[Message]) -> list[int]:
        """What stands between a turn's last token and the model's next turn: `answers`, as the template writes them."""
        call = {"type": "function", "function": {"name": answers[0]["name"], "arguments": {}}}
        turn: list[Message] = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            before, after = self._render(turn, answer=False), self._render([*turn, *answers])
        except Exception as error:  # templates raise what they like
            raise InternalRLError(f"The chat template takes no tool calls ({error}); use one that does.") from error
        known = [str(self.tokenizer.decode(end)) for end in self.ends]
        ends = [before.rfind(end) + len(end) for end in known if end in before]
        return self._tokens(after[max(ends, default=len(before)) :])

    def put_down(self, talk: Conversation) -> None:
        """Make the model's present turn, if there is one, a message."""
        if talk.turn:
            talk.completion.append(self._parse(talk))
            talk.turn = []

    def _parse(self, talk: Conversation) -> Message:
        """The model's turn as a message; as text alone where it makes no sense."""
        before = talk.read[: len(talk.read) - len(talk.turn)]
        try:
            message = self.tokenizer.parse_response(
                talk.turn, prefix=before, tools=list(tools_of(talk.environment).values()) or None
            )
            message["content"] = message.get("content") or ""
            if all(isinstance(call["function"]["arguments"], dict) for call in message.get("tool_calls", ())):
                return dict(message)
        except (ValueError, TypeError, KeyError, AttributeError):  # a model may write anything
            pass
        return {"role": "assistant", "content": self.tokenizer.decode(talk.turn, skip_special_tokens=True)}

    def _call(self, talk: Conversation, call: Message) -> Message:
        """What a tool answers; an error is an answer, too."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        talk.calls += 1
        try:
            tools = tools_of(talk.environment)
            if name not in tools:
                raise ValueError(f"Tool {name} not found.")
            answer = tools[name](**arguments)
            if inspect.isawaitable(answer):
                answer = await_now(answer)
        except Exception as error:  # of someone else's code
            talk.failures += 1
            answer = {"error": str(error)}
        return {"role": "tool", "name": name, "content": str(answer)}

    def _render(self, messages: list[Message], answer: bool = True, tools: list[Any] | None = None) -> str:
        text = self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
        return str(text)

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


class Conversations(Completions):
    """N conversations that are being held; see `Completions` of the arguments that both have."""

    def __init__(self, talks: Sequence[Conversation], host: Host, horizon: int, numbers: NDArray[np.int64]):
        super().__init__(pad_prompts([talk.read for talk in talks]), host.ends, horizon, numbers)
        self.talks, self.host, self.steps = list(talks), host, 0

    @property
    def given(self) -> NDArray[np.bool_]:
        """(N,): conversations in which a tool answers."""
        return np.array([bool(talk.answer) for talk in self.talks])

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Append to each conversation the next token of an answer, or else the one chosen (N,); no reward."""
        self.steps += 1
        tokens = actions.copy()
        for row in np.flatnonzero(self._alive):
            talk = self.talks[row]
            if talk.answer:
                tokens[row] = talk.answer.popleft()
                talk.read.append(int(tokens[row]))
                continue
            talk.read.append(int(tokens[row]))
            talk.turn.append(int(tokens[row]))
            if talk.turn[-1] in self.host.ends:
                self._alive[row] = self.host.end_turn(talk, self.config.horizon - self.steps)
        self.tokens = tokens[:, None]
        return np.zeros(len(self), np.float32), ~self._alive, np.zeros(len(self), bool)

    def select(self, rows: NDArray[np.int64]) -> Self:
        """The conversations numbered `rows`, as far as they are."""
        kept = super().select(rows)
        kept.talks = [self.talks[row] for row in rows.tolist()]
        return kept


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an environment but `reset` and `get_reward`."""
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    own = ("reset", "get_reward")
    return {name: getattr(environment, name) for name in names if name not in own and not name.startswith("_")}


def _judge(kind: type[Any]) -> Reward:
    """`get_reward` of the environments of this kind, as a reward function of that name."""

    async def judge(environments: list[Any]) -> list[float | None]:
        scores = []
        for environment in environments:
            score = environment.get_reward() if type(environment) is kind else None
            scores.append(await score if inspect.isawaitable(score) else score)
        return scores

    judge.__name__ = kind.__name__
    return judge
