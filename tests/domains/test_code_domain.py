"""The code domain: idioms do the same in every form, probabilities are exact, and tasks have no way round."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain as joined
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from internalrl.domains.code.grammar import (
    END,
    PROMPT,
    CodeConfig,
    entropy,
    log_prob,
    parse,
    sample_programs,
    transitions,
    write_jsonl,
)
from internalrl.domains.code.idioms import DEFAULT, HELPERS, IDIOMS, LARGE, variants
from internalrl.domains.code.sandbox.sandbox import Sandbox
from internalrl.domains.code.tasks import evaluate, fewest_unseen, make_task, passes_tests, returned, reward, tasks
from internalrl.domains.code.tokenizer import boundaries, build_tokenizer, check_tokenizer, load_tokenizer
from internalrl.errors import InternalRLError

CONFIG, LARGE_CONFIG = CodeConfig(), CodeConfig.large()
TINY = CodeConfig(idioms=("tail", "total", "reverse", "mod"), min_idioms=1, max_idioms=2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def run(program: str) -> Callable[[list[int]], list[int]]:
    namespace: dict[str, Callable[[list[int]], list[int]]] = {}
    exec(program, namespace)
    return namespace["f"]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as sandbox:
        yield sandbox


# -------------------------------------------------------------------------------------------------------- idioms

MEANINGS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda x: [x[-i - 1] for i in range(len(x))],
    "total": lambda x: [*x, sum(x)],
    "accumulate": lambda x: np.cumsum(x).tolist(),
    "index": lambda x: (np.array(x) + np.arange(len(x))).tolist(),
    "halve": lambda x: [v if v & 1 else v >> 1 for v in x],
    "sort": lambda x: np.sort(x).tolist(),
    "unique": lambda x: [x[i] for i in sorted(x.index(v) for v in set(x))],
    "rotate": lambda x: np.roll(x, -1).tolist(),
    "peak": lambda x: np.maximum.accumulate(np.array(x, int)).tolist(),
    "mirror": lambda x: [*x, *reversed(x)],
    "mod": lambda x: [v - 7 * math.floor(v / 7) for v in x],
    "fold": lambda x: (np.array(x) + np.flip(x)).tolist(),
    "positive": lambda x: [*filter((0).__lt__, x)],
    "difference": lambda x: np.diff(x, prepend=0).tolist(),
    "swap": lambda x: [x[1], x[0], *x[2:]] if len(x) > 1 else list(x),
    "tail": lambda x: list(x)[1:],
}
"""What each idiom does, said once more and in other words."""


@pytest.mark.parametrize("name", IDIOMS)
def test_every_form_of_an_idiom_does_what_it_should(name: str) -> None:
    generator = rng()
    inputs = [[], [4], [-3, 5], [5, -3], [2, 2, 2]]
    inputs += [generator.integers(-9, 10, generator.integers(1, 9)).tolist() for _ in range(40)]
    expected = [MEANINGS[name](x) for x in inputs]
    forms = variants(name)
    assert len(forms) >= 3
    for variant in joined.from_iterable(forms):
        function = run(PROMPT + variant.text + END)
        assert [function(list(x)) for x in inputs] == expected, variant


def test_there_are_enough_idioms_with_helpers_and_nested_blocks() -> None:
    assert len(DEFAULT) >= 8
    assert len(LARGE) >= 16
    for idioms in (DEFAULT, LARGE):
        assert all(any(helper in form for form in IDIOMS[name] for helper in HELPERS) for name in idioms)
        trees = [ast.parse(PROMPT + v.text + END) for name in idioms for form in variants(name) for v in form]
        nested = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.For | ast.While | ast.If)]
        kinds = {type(node) for node in nested}
        assert kinds == {ast.For, ast.While, ast.If}
        assert any(isinstance(inner, ast.If) for node in nested if isinstance(node, ast.For) for inner in node.body)


def test_no_variant_begins_another() -> None:
    """So a program can be read in one way only."""
    texts = [v.text for name in IDIOMS for form in variants(name) for v in form]
    assert len(set(texts)) == len(texts)
    assert not [(a, b) for a, b in product([*texts, END], repeat=2) if a is not b and a.startswith(b)]
    assert all(text.endswith("\n    ") for text in texts)


# --------------------------------------------------------------------------------------------------- probability


def all_programs(config: CodeConfig) -> list[str]:
    """Every program of the corpus, and of the compositions that it leaves out."""
    texts = [v.text for name in config.idioms for form in variants(name) for v in form]
    lengths = range(config.min_idioms, config.max_idioms + 1)
    return [PROMPT + "".join(row) + END for length in lengths for row in product(texts, repeat=length)]


def test_probabilities_sum_to_one_and_give_the_entropy() -> None:
    logs = np.array([log_prob(TINY, program) for program in all_programs(TINY)])
    assert np.isinf(logs).any()
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-12)
    finite = logs[np.isfinite(logs)]
    assert -(np.exp(finite) * finite).sum() == pytest.approx(entropy(TINY), abs=1e-12)


def test_programs_are_drawn_with_their_probabilities() -> None:
    count = 60_000
    drawn = Counter(sample_programs(TINY, count, rng()).texts)
    expected = {program: count * math.exp(log_prob(TINY, program)) for program in all_programs(TINY)}
    expected = {program: number for program, number in expected.items() if number}
    assert set(drawn) <= set(expected)
    statistic = sum((drawn[program] - number) ** 2 / number for program, number in expected.items())
    assert abs(statistic - (len(expected) - 1)) < 4 * math.sqrt(2 * len(expected))


@pytest.mark.parametrize("config", [CONFIG, LARGE_CONFIG], ids=["default", "large"])
def test_the_entropy_is_the_mean_surprise(config: CodeConfig) -> None:
    surprise = -np.array([log_prob(config, text) for text in sample_programs(config, 20_000, rng(1)).texts])
    assert surprise.mean() == pytest.approx(entropy(config), abs=4 * surprise.std() / math.sqrt(len(surprise)))


def test_sampling_repeats_with_the_seed() -> None:
    first, second, other = (sample_programs(CONFIG, 50, rng(seed)) for seed in (3, 3, 4))
    assert first.texts == second.texts != other.texts


@pytest.mark.parametrize("config", [CONFIG, LARGE_CONFIG, TINY], ids=["default", "large", "tiny"])
def test_the_corpus_shows_all_transitions_but_the_unseen_ones(config: CodeConfig) -> None:
    programs = sample_programs(config, 40_000, rng())
    np.testing.assert_array_equal(transitions(config, programs.idioms) == 0, config.unseen)
    np.testing.assert_array_equal(config.unseen, config.withheld | np.eye(len(config.idioms), dtype=bool))
    assert set(programs.lengths) == set(range(config.min_idioms, config.max_idioms + 1))


def test_withheld_are_the_next_three_of_eight() -> None:
    assert {(i, j) for i, j in np.argwhere(CONFIG.withheld)} == {(i, (i + s) % 8) for i in range(8) for s in (1, 2, 3)}


def test_transitions_are_counted_within_chains() -> None:
    counts = transitions(TINY, np.array([[0, 1, 2], [0, 1, -1], [3, -1, -1]]))
    assert {(i, j): counts[i, j] for i, j in np.argwhere(counts)} == {(0, 1): 2, (1, 2): 1}
    assert transitions(TINY, [(3, 3), (), (1,)]).sum() == 1


# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("config", [CONFIG, LARGE_CONFIG], ids=["default", "large"])
def test_programs_read_back(config: CodeConfig) -> None:
    programs = sample_programs(config, 500, rng())
    rows = zip(programs.texts, programs.idioms, programs.forms, programs.lengths, strict=True)
    for text, idioms, forms, length in rows:
        reading = parse(config, text)
        assert reading.complete
        assert (reading.idioms, reading.forms) == (tuple(idioms[:length]), tuple(forms[:length]))
        assert text[: reading.ends[-1]] + END == text


def test_programs_of_a_given_chain() -> None:
    programs = sample_programs(CONFIG, 200, rng(), chain=("sort", "sort", "total"))
    assert {parse(CONFIG, text).idioms for text in programs.texts} == {(5, 5, 1)}
    assert len(set(programs.texts)) > 50
    with pytest.raises(InternalRLError, match="names 'peak'; choose among reverse"):
        sample_programs(CONFIG, 1, rng(), chain=("sort", "peak"))
    with pytest.raises(InternalRLError, match="chain is empty"):
        sample_programs(CONFIG, 1, rng(), chain=())


SORT, TOTAL = variants("sort")[0][0].text, variants("total")[0][0].text


@pytest.mark.parametrize(
    ("program", "idioms"),
    [
        (PROMPT + SORT + TOTAL + "x = 5\n    " + END, (5, 1)),
        (PROMPT + SORT + TOTAL[:-3], (5,)),
        (PROMPT + SORT + TOTAL + END + "\n", (5, 1)),
        (PROMPT + SORT + TOTAL, (5, 1)),
        (PROMPT + END, ()),
        ("def g(x):\n    " + SORT + END, ()),
        (PROMPT + variants("peak")[0][0].text + END, ()),
        ("", ()),
    ],
)
def test_what_is_no_program_is_read_as_far_as_it_goes(program: str, idioms: tuple[int, ...]) -> None:
    reading = parse(CONFIG, program)
    assert (reading.idioms, reading.complete) == (idioms, False)
    assert log_prob(CONFIG, program) == -math.inf


def test_compositions_outside_the_corpus_have_no_probability() -> None:
    def written(*chain: str) -> str:
        return sample_programs(CONFIG, 1, rng(), chain).texts[0]

    assert log_prob(CONFIG, written("sort", "total")) > -math.inf
    for chain in (("total", "sort", "unique"), ("sort", "sort"), ("sort",), ("sort", "total") * 4):
        assert parse(CONFIG, written(*chain)).complete
        assert log_prob(CONFIG, written(*chain)) == -math.inf


# ------------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize("config", [CONFIG, LARGE_CONFIG], ids=["default", "large"])
def test_tokens_are_the_text(config: CodeConfig, tmp_path: Path) -> None:
    built = build_tokenizer(config)
    built.save_pretrained(tmp_path)
    texts = sample_programs(config, 500, rng()).texts
    for tokenizer in (built, load_tokenizer(tmp_path, config)):
        numbers = tokenizer(texts)["input_ids"]
        assert tokenizer.batch_decode(numbers, skip_special_tokens=True) == texts
        assert tokenizer.unk_token_id not in set(joined.from_iterable(numbers))
    assert len(built) <= 100
    assert set(built.get_vocab().values()) == set(range(len(built)))
    assert numbers == built(texts)["input_ids"]


def test_prompt_and_completion_are_tokenised_apart_as_together() -> None:
    tokenizer = build_tokenizer(CONFIG)
    for completion in sample_programs(CONFIG, 100, rng()).completions:
        apart = tokenizer(PROMPT)["input_ids"] + tokenizer(completion)["input_ids"]
        assert apart == tokenizer(PROMPT + completion)["input_ids"]


def test_four_idioms_take_eighty_tokens() -> None:
    tokenizer = build_tokenizer(CONFIG)
    programs = sample_programs(CONFIG, 2000, rng())
    four = [text for text, length in zip(programs.texts, programs.lengths, strict=True) if length == 4]
    assert 60 < np.mean([len(numbers) for numbers in tokenizer(four)["input_ids"]]) <= 80


def test_boundaries_are_the_line_breaks_that_end_idioms() -> None:
    tokenizer = build_tokenizer(CONFIG)
    programs = sample_programs(CONFIG, 100, rng())
    texts = {v.text: CONFIG.idioms.index(name) for name in DEFAULT for form in variants(name) for v in form}
    ends = boundaries(CONFIG, tokenizer, programs.texts)
    for text, idioms, found in zip(programs.texts, programs.idioms, ends, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        begin = len(tokenizer.tokenize(PROMPT))
        segments = [texts["".join(tokens[a:b])] for a, b in pairwise([begin, *(end + 1 for end in found)])]
        assert segments == idioms[idioms >= 0].tolist()
        assert {tokens[end] for end in found} == {"\n    "}
        assert "".join(tokens[found[-1] + 1 :]) == END


def test_a_tokenizer_that_does_not_match_is_refused(tmp_path: Path) -> None:
    small = build_tokenizer(CONFIG)
    with pytest.raises(InternalRLError, match=r"does not match these programs: .*; use the one that build"):
        check_tokenizer(small, LARGE_CONFIG)
    small.save_pretrained(tmp_path)
    with pytest.raises(InternalRLError, match="does not match"):
        load_tokenizer(tmp_path, LARGE_CONFIG)
    check_tokenizer(build_tokenizer(LARGE_CONFIG), CONFIG)


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "model": {"ty', b"{}", b"\xff\xfe", b"[]"])
def test_a_damaged_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    build_tokenizer(CONFIG).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InternalRLError, match=r"is damaged \(.*\); build and save it again\.$"):
        load_tokenizer(tmp_path, CONFIG)


def test_a_damaged_tokenizer_config_is_refused(tmp_path: Path) -> None:
    build_tokenizer(CONFIG).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InternalRLError, match="is damaged"):
        load_tokenizer(tmp_path, CONFIG)
    with pytest.raises(InternalRLError, match="There is no tokenizer in"):
        load_tokenizer(tmp_path / "nowhere", CONFIG)


# ---------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("config", [CONFIG, LARGE_CONFIG], ids=["default", "large"])
def test_default_tasks_are_made_of_withheld_transitions(config: CodeConfig) -> None:
    found = tasks(config)
    assert list(found) == [2, 3, 4, 5, 6]
    for length, task in found.items():
        numbers = [config.idioms.index(name) for name in task.chain]
        assert len(numbers) == length
        assert all(config.withheld[pair] for pair in pairwise(numbers))
        assert len(task.inputs) == len(task.outputs) == 8


@pytest.mark.parametrize("length", range(2, 7))
def test_default_tasks_have_no_way_round(length: int) -> None:
    assert fewest_unseen(CONFIG, tasks(CONFIG)[length]) == length - 1


@pytest.mark.parametrize("length", [2, 3, 4, 5, pytest.param(6, marks=pytest.mark.learning)])
def test_large_tasks_have_no_way_round_of_their_own_length(length: int) -> None:
    assert fewest_unseen(LARGE_CONFIG, tasks(LARGE_CONFIG)[length], tests=2, longest=length) == length - 1


def test_a_way_round_may_be_longer_than_the_task() -> None:
    """Halving backwards is halving, and the corpus goes from halving to reversing."""
    task = make_task(CONFIG, ("total", "index", "halve"))
    assert fewest_unseen(CONFIG, task, longest=3) == 2
    assert fewest_unseen(CONFIG, task) == 1


def test_ways_round_are_found() -> None:
    """Against all compositions written out, for every chain of three withheld transitions' worth of idioms."""
    functions = {name: MEANINGS[name] for name in DEFAULT}
    inputs = tasks(CONFIG)[2].inputs

    def outputs(chain: tuple[int, ...]) -> str:
        state = [list(x) for x in inputs]
        for number in chain:
            state = [functions[DEFAULT[number]](x) for x in state]
        return json.dumps(state)

    best: dict[str, int] = {}
    compositions = [c for length in (1, 2, 3) for c in product(range(8), repeat=length)]
    for composition in compositions:
        unseen = sum(bool(CONFIG.unseen[pair]) for pair in pairwise(composition))
        best[outputs(composition)] = min(unseen, best.get(outputs(composition), 9))
    withheld = [c for c in compositions if len(c) == 3 and all(CONFIG.withheld[pair] for pair in pairwise(c))]
    found = {c: fewest_unseen(CONFIG, make_task(CONFIG, [DEFAULT[n] for n in c]), longest=3) for c in withheld}
    assert found == {c: best[outputs(c)] for c in withheld}
    assert set(found.values()) == {0, 1, 2}


def test_idioms_that_commute_are_a_way_round() -> None:
    """Sorting and dropping repetitions commute, and the corpus shows them the other way round."""
    assert fewest_unseen(CONFIG, make_task(CONFIG, ("sort", "unique"))) == 0


def test_tasks_that_are_none_are_refused() -> None:
    with pytest.raises(InternalRLError, match="transition sort → total is not withheld"):
        make_task(CONFIG, ("sort", "total"))
    with pytest.raises(InternalRLError, match="transition sort → sort is not withheld"):
        make_task(CONFIG, ("sort", "sort"))
    with pytest.raises(InternalRLError, match="names 'peak'"):
        make_task(CONFIG, ("peak",))
    with pytest.raises(InternalRLError, match="two presets' idioms only; use make_task"):
        tasks(TINY)


# --------------------------------------------------------------------------------------------------------- reward


@pytest.mark.parametrize("length", [2, 4, 6])
def test_solutions_are_rewarded_in_every_form(sandbox: Sandbox, length: int) -> None:
    task = tasks(CONFIG)[length]
    solutions = sample_programs(CONFIG, 40, rng(), task.chain).completions
    assert reward(solutions, task, sandbox) == [1.0] * 40
    assert sum(reward(sample_programs(CONFIG, 200, rng(1)).completions, task, sandbox)) == 0


def test_only_programs_that_pass_every_test_are_rewarded(sandbox: Sandbox) -> None:
    task = make_task(CONFIG, ("sort", "unique"))
    right = sample_programs(CONFIG, 1, rng(), task.chain).completions[0]
    completions = {
        right: ("ran", 1.0),
        "return sorted(set(x))\n": ("ran", 1.0),
        "return tuple(sorted(set(x)))\n": ("error", 0.0),
        "return [float(v) for v in sorted(set(x))]\n": ("ran", 0.0),
        "return sorted(set(x)) if len(x) > 3 else x\n": ("ran", 0.0),
        "x = sorted(x)\n    return x\n": ("ran", 0.0),
        right[:-9]: ("ran", 0.0),
        right[:-4]: ("error", 0.0),
        "x = sorted(x))\n    return x\n": ("syntax", 0.0),
        "return x[99]\n": ("error", 0.0),
        "while x: pass\n    return sorted(set(x))\n": ("timeout", 0.0),
        "": ("syntax", 0.0),
    }
    outcomes, passed = evaluate([*completions, right], task, sandbox)
    expected = [*completions.values(), completions[right]]
    assert [(o.status, float(p)) for o, p in zip(outcomes, passed, strict=True)] == expected
    assert reward([], task, sandbox) == []


def test_true_is_not_one(sandbox: Sandbox) -> None:
    task = make_task(CONFIG, ("unique",))
    ones = type(task)(task.chain, ((1,),), ((1,),))
    completions = ["return [1]\n", "return [True]\n", "return [1.0]\n", "return 1\n"]
    assert reward(completions, ones, sandbox) == [1.0, 0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------------------- export


def test_corpora_are_written_as_json_lines(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", CONFIG, 100, rng(5))
    lines = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert [line["prompt"] + line["completion"] for line in lines] == sample_programs(CONFIG, 100, rng(5)).texts
    assert {line["prompt"] for line in lines} == {PROMPT}
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_corpus_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "nowhere" / "corpus.jsonl", tmp_path / "taken"):
        with pytest.raises(InternalRLError, match=r"Cannot write .*; check the path"):
            write_jsonl(path, CONFIG, 1, rng())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"idioms": ("sort", "total", "reverse", "bubble")}, "no idiom 'bubble'; choose among reverse"),
        ({"idioms": ("sort", "total", "reverse")}, "four or more, each once"),
        ({"idioms": ("sort", "total", "reverse", "sort")}, "four or more, each once"),
        ({"min_idioms": 0}, "1 ≤ min_idioms ≤ max_idioms"),
        ({"min_idioms": 4, "max_idioms": 3}, "Programs of 4 to 3 idioms do not exist"),
    ],
)
def test_impossible_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InternalRLError, match=message):
        CodeConfig(**options)


@pytest.mark.parametrize(
    ("config", "nats", "vocabulary", "tokens"), [(CONFIG, 15.13, 63, 75.8), (LARGE_CONFIG, 18.02, 72, 80.4)]
)
def test_figures_of_the_documentation(config: CodeConfig, nats: float, vocabulary: int, tokens: float) -> None:
    """docs/code.md; the mean length is that of 4,000 programs, within four standard errors."""
    assert entropy(config) == pytest.approx(nats, abs=0.005)
    tokenizer = build_tokenizer(config)
    assert len(tokenizer) == vocabulary
    of_four = CodeConfig(idioms=config.idioms, min_idioms=4, max_idioms=4)
    lengths = np.array([len(tokenizer(text).input_ids) for text in sample_programs(of_four, 4000, rng()).texts])
    assert lengths.mean() == pytest.approx(tokens, abs=0.05 + 4 * lengths.std() / len(lengths) ** 0.5)


def test_a_dataset_of_tasks_is_rewarded_row_by_row() -> None:
    """Each row's program has to pass the tests of its own chain."""
    chains = [list(task.chain) for task in tasks(CONFIG).values()][:3]
    written = [sample_programs(CONFIG, 1, rng(), chain).completions[0] for chain in chains]
    columns = {"prompts": [PROMPT] * 6, "completion_ids": [[]] * 6}
    completions, asked = [*written, *written], [*chains, *chains[1:], chains[0]]
    assert passes_tests(completions, asked, **columns) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(InternalRLError, match="no idiom 'juggle'"):
        passes_tests(["return x\n"], [["juggle"]])


def test_programs_that_do_the_same_come_to_the_same() -> None:
    bodies = ["x = x[::-1]\n    return x\n", "x.reverse()\n    return x\n", "return x\n"]
    one, same, other = returned(bodies, prompts=[PROMPT] * 3)
    assert one == same != other
    assert returned(["return y\n", "return (\n", "while x:\n        pass\n    return x\n"]) == ["failed"] * 3
