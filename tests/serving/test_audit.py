"""The audit: nothing acknowledged is lost, nothing is twice, nothing is written that must not be."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from internalrl import cli
from internalrl.errors import InternalRLError, OptionError
from internalrl.serving.audit import audit as audit_module
from internalrl.serving.audit import journal as journal_module
from internalrl.serving.audit.audit import Audit, AuditSettings
from internalrl.serving.audit.journal import Journal
from internalrl.serving.audit.redaction import MARK, replace_matches
from internalrl.serving.audit.store import AuditStore, Query
from tests.support.auditing import SEGMENTS, answer, record, request
from tests.support.postgres import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def audit(tmp_path: Path, database: str | None) -> Iterator[Audit]:
    with closing(Audit(tmp_path / "audit", database)) as audit:
        yield audit


def stored(folder: Path, url: str | None = None, **query: object) -> list[tuple[str, int, str | None]]:
    with closing(AuditStore(folder, url)) as store:
        found = store.find(Query(limit=100_000, **query))  # type: ignore[arg-type]
    return [(segment.request, segment.index, segment.text) for segment in reversed(found)]


def everything_on_disk(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def until(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_segment_is_stored_as_it_was(audit: Audit) -> None:
    before = time.time()
    hostile = "\N{WAVING HAND SIGN} \ud800 a\0b"
    audit.segment(request("r1"), record(0, hostile, violation="denied", strategy=None))
    audit.segment(
        request("r1"), record(1, code=(math.nan, 1.0), switch_probability=math.inf, log_probability=-math.inf)
    )
    audit.segment(request("r1"), record(2, code=()))
    audit.wait("r1")
    until(lambda: audit.counts() == {"written": 3, "stored": 3})
    first, second, third = audit.store.find(Query(request="r1"))
    assert (first.request, first.adapter, first.index, first.start, first.stop) == ("r1", "support@3", 0, 0, 3)
    assert (first.code, first.switch_probability, first.log_probability) == ((0.0, -0.5), 0.75, -1.5)
    assert (first.strategy, first.violation) == (None, "denied")
    assert first.text == "\N{WAVING HAND SIGN} ? a\N{SYMBOL FOR NULL}b", "what databases refuse does not stop it"
    assert before <= first.time <= time.time()
    assert (second.code, second.switch_probability, second.log_probability) == ((None, 1.0), None, None)
    assert (third.code, third.strategy, third.violation) == ((), "greet", None)


def test_queries(audit: Audit) -> None:
    for i in range(6):
        adapter = ["support@3", "support@4", "supporting@1"][i % 3]
        violation = {2: "denied: 50% off", 3: "needs review"}.get(i)
        audit.segment(request(f"r{i}", adapter), record(0, strategy=["greet", "ask"][i % 2], violation=violation))
        audit.segment(request(f"r{i}", adapter), record(1, strategy=None))
    audit.close()
    store = audit.store

    def ids(**options: object) -> list[str]:
        return [segment.request for segment in store.find(Query(**options)) if segment.index == 0]  # type: ignore[arg-type]

    assert ids() == ["r5", "r4", "r3", "r2", "r1", "r0"]
    assert ids(request="r4") == ["r4"]
    assert ids(adapter="support@4") == ["r4", "r1"]
    assert ids(adapter="support") == ["r4", "r3", "r1", "r0"]
    assert ids(strategy="ask") == ["r5", "r3", "r1"]
    assert ids(violation="") == ["r3", "r2"]
    assert ids(violation="DENIED") == ["r2"]
    assert ids(violation="%") == ["r2"], "a sign that means something in SQL means itself"
    moment = store.find(Query(request="r3"))[0].time
    assert ids(since=moment) == ["r5", "r4", "r3"]
    assert ids(until=moment) == ["r2", "r1", "r0"]
    assert len(store.find(Query(limit=3))) == 3
    answers = store.requests(Query(strategy="ask", limit=2))
    assert [[(s.request, s.index) for s in segments] for segments in answers] == [
        [("r5", 0), ("r5", 1)],
        [("r3", 0), ("r3", 1)],
    ]
    store.close()


@pytest.mark.parametrize("kind", ["plain", "redact"])
def test_kill_in_mid_load_loses_no_acknowledged_answer(tmp_path: Path, database: str | None, kind: str) -> None:
    command = [sys.executable, "-m", "tests.support.auditing", kind, str(tmp_path), database or ""]
    for _ in range(2):  # the second one also finds what the first one left
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            acknowledged = [process.stdout.readline().decode().strip() for _ in range(1500)]
            process.kill()
            acknowledged += process.stdout.read().decode().split("\n")[:-1]  # the last one may be torn
        assert [*(tmp_path / "journal").glob("*.jsonl")], "it was killed before all was in the database"
        Audit(tmp_path, database).close()
        rows = stored(tmp_path, database)
        assert len({row[:2] for row in rows}) == len(rows)
        found = set(rows)
        for name in acknowledged:
            assert {(name, k, f"{name} part {k} ") for k in range(SEGMENTS)} <= found
        assert not [*(tmp_path / "journal").glob("*.jsonl")]


def test_replay_tolerates_torn_lines_and_repeats_nothing(tmp_path: Path) -> None:
    with closing(Audit(tmp_path)) as audit:
        answer(audit, "r1", ["a", "b"])
        until(lambda: audit.counts()["stored"] == 2)
        [file] = (tmp_path / "journal").glob("*.jsonl")
        lines = file.read_bytes()
    assert not file.exists()
    other = lines.replace(b'"r1"', b'"r2"')
    (tmp_path / "journal" / "1-1.jsonl").write_bytes(lines + other + other[:40])
    (tmp_path / "journal" / "2-1.jsonl").write_bytes(b'{"request"')
    (tmp_path / "journal" / "3-1.jsonl").write_bytes(b"\0\0\0\n[1]\n" + lines.replace(b'"r1"', b'"r3"'))
    Audit(tmp_path).close()
    assert stored(tmp_path) == [(f"r{i}", k, "ab"[k]) for i in (1, 2, 3) for k in (0, 1)]
    assert not [*(tmp_path / "journal").glob("*.jsonl")]


def test_the_journal_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    mine, other = Journal(tmp_path), Journal(tmp_path)
    mine.append(b"1\n")
    assert [*other.take()] == []
    mine.append(b"2\n")
    assert [*mine.take()] == [b"1\n2\n"]
    assert [*mine.take()] == []
    mine.append(b"3\n")
    mine.close()
    assert [*other.take()] == [b"1\n2\n3\n"], "whoever has not taken them does"
    assert [*other.take()] == []
    assert not [*tmp_path.iterdir()]


def test_what_was_not_stored_is_taken_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(b"1\n")
    taken = journal.take()
    assert next(taken) == b"1\n"
    taken.close()  # as when storing it fails
    assert [*journal.take()] == [b"1\n"]


def test_journal_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LARGEST", 100)
    journal = Journal(tmp_path)
    lines = [b"%040d\n" % i for i in range(10)]
    for line in lines:
        journal.append(line)
    assert len([*tmp_path.iterdir()]) == 4
    assert b"".join(journal.take()) == b"".join(lines)
    [left] = tmp_path.iterdir()
    monkeypatch.setattr(journal_module, "LONGEST", 0.0)
    assert [*journal.take()] == []
    assert not left.exists(), "no text stays here for longer than in the database"
    journal.append(b"new\n")
    assert [*journal.take()] == [b"new\n"]


def test_full_disk_ends_answers_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; the operating system refuses both alike."""
    command = [sys.executable, "-m", "tests.support.auditing", "full", str(tmp_path), ""]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    refused, written = result.stdout.splitlines()
    assert refused.startswith("refused 5 at ")
    last = int(refused.split()[-1])
    count = (last + 2) * SEGMENTS
    assert written == f"written {count} stored {count} None None"
    rows = stored(tmp_path)
    assert sorted(rows) == sorted(
        (name, k, "some words ") for name in [f"r{i}" for i in range(last + 1)] + ["after"] for k in range(SEGMENTS)
    )


def test_answers_go_on_without_the_database(postgres: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = postgres.database()
    with closing(Audit(tmp_path, url)) as audit:
        answer(audit, "before", ["a"])
        until(lambda: audit.counts()["stored"] == 1)
        postgres.stop()
        try:
            answer(audit, "while", ["b"])
            until(lambda: audit.database_failure is not None)
            answer(audit, "longer", ["c"])
            assert audit.failure is None
            assert audit.counts() == {"written": 3, "stored": 1}
            with pytest.raises(InternalRLError, match=r"Database postgresql.* failed"):
                Audit(tmp_path / "other", url)
        finally:
            postgres.start()
        until(lambda: audit.counts()["stored"] == 3)
        assert audit.database_failure is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert stored(tmp_path, url) == [("before", 0, "a"), ("while", 0, "b"), ("longer", 0, "c")]


def test_a_segment_that_cannot_be_written_down_stops_answers(tmp_path: Path) -> None:
    with closing(Audit(tmp_path)) as audit:
        audit.segment(request("bad"), record(0, log_probability=None))
        with pytest.raises(InternalRLError, match="could not write a segment down"):
            audit.wait("bad")
        with pytest.raises(InternalRLError):
            audit.wait("next")
        assert audit.failure


def test_waiting_in_an_event_loop(tmp_path: Path) -> None:
    async def main() -> None:
        with closing(Audit(tmp_path)) as audit:
            audit.segment(request("r1"), record(0))
            gone = asyncio.ensure_future(audit.written("r1"))
            await asyncio.sleep(0)
            gone.cancel()  # a client that left
            await asyncio.gather(*(audit.written("r1") for _ in range(100)))
            assert audit.counts()["written"] == 1
        with pytest.raises(InternalRLError, match="closed"):
            await audit.written("r1")

    asyncio.run(main())


def test_taking_a_segment_is_quick(tmp_path: Path) -> None:
    """The engine's thread pays a few microseconds, whatever the disk and the database do."""
    with closing(Audit(tmp_path)) as audit:
        r, s, seconds = request("r"), [record(i) for i in range(100)], []
        for _ in range(20):  # one garbage collection of a large process takes longer than all of them
            begin = time.thread_time()
            for segment in s:
                audit.segment(r, segment)
            seconds.append(time.thread_time() - begin)
        assert statistics.median(seconds) / len(s) < 50e-6


def test_redaction_sees_the_whole_answer(tmp_path: Path) -> None:
    settings = AuditSettings(redact=("quokka wombat", "[a-z]+@[a-z.]+"))
    with closing(Audit(tmp_path, None, settings)) as audit:
        for index, part in enumerate(["Card quok", "ka wom", "bat, mail ma", "ria@ex.org", "!"]):
            audit.segment(request("r1"), record(index, part))
        time.sleep(3 * audit_module.FLUSH)
        assert audit.counts()["written"] == 0, "nothing is written before all of it is known"
        audit.wait("r1")
        until(lambda: audit.counts()["stored"] == 5)
        on_disk = everything_on_disk(tmp_path)
    assert [row[2] for row in stored(tmp_path)] == [f"Card {MARK}", "", f", mail {MARK}", "", "!"]
    for part in (b"quok", b"ka wom", b"bat,", b"ria@", b"ex.org"):
        assert part not in on_disk


def test_answers_that_nobody_ends_are_written_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "HOLD", 0.1)
    with closing(Audit(tmp_path, None, AuditSettings(redact=("secret",)))) as audit:
        audit.segment(request("r1"), record(0, "a secret"))
        until(lambda: audit.counts()["written"] == 1)
        audit.segment(request("r2"), record(0, "no secret"))
    assert [row[2] for row in stored(tmp_path)] == [f"a {MARK}", f"no {MARK}"]


@given(st.lists(st.text("ab1 ", max_size=6), max_size=6), st.sampled_from([["1+"], ["a.b", "b"], ["ab", "ba"], ["x*"]]))
def test_redacted_segments_are_those_of_the_redacted_answer(texts: list[str], patterns: list[str]) -> None:
    import re

    shown = replace_matches(texts, [re.compile(pattern) for pattern in patterns])
    assert len(shown) == len(texts)
    if len(patterns) == 1:
        whole = re.sub(patterns[0], lambda match: MARK if match[0] else "", "".join(texts))
        assert "".join(shown) == whole
    for pattern in patterns:
        for part in "".join(shown).split(MARK):
            assert not any(match[0] for match in re.finditer(pattern, part)) or len(patterns) > 1


def test_hashes_and_dropped_texts(tmp_path: Path) -> None:
    for texts in ("hash", "drop"):
        with closing(Audit(tmp_path / texts, None, AuditSettings(texts=texts))) as audit:  # type: ignore[arg-type]
            answer(audit, "r1", ["private words", "private words", "others"])
            until(lambda a=audit: a.counts()["stored"] == 3)
            assert b"private" not in everything_on_disk(tmp_path / texts)
    assert [row[2] for row in stored(tmp_path / "drop")] == [None] * 3
    first, second, third = [row[2] for row in stored(tmp_path / "hash")]
    assert first == second != third
    key = tmp_path / "hash" / "hash.key"
    assert key.stat().st_mode & 0o777 == 0o600
    with closing(Audit(tmp_path / "hash", None, AuditSettings(texts="hash"))) as audit:
        answer(audit, "r2", ["private words"])
    assert stored(tmp_path / "hash")[-1][2] == first, "the key stays"
    with closing(Audit(tmp_path / "another", None, AuditSettings(texts="hash"))) as audit:
        answer(audit, "r2", ["private words"])
    assert stored(tmp_path / "another")[-1][2] != first


def test_retention(tmp_path: Path, database: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "PRUNE", 0.1)
    with closing(Audit(tmp_path, database)) as audit:
        for i in range(6):
            answer(audit, f"r{i}", ["a", "b"])
    old = time.time() - 3 * 86_400
    url = database and database.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url or f"sqlite:///{tmp_path}/audit.db")
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE audit_segments SET time = {old} WHERE request = 'r0'"))
    engine.dispose()
    Audit(tmp_path, database, AuditSettings(retention_days=4)).close()
    assert len(stored(tmp_path, database)) == 12
    Audit(tmp_path, database, AuditSettings(retention_days=2)).close()
    assert [row[0] for row in stored(tmp_path, database)][:2] == ["r1", "r1"]
    with closing(Audit(tmp_path, database, AuditSettings(max_segments=3))) as audit:
        assert [row[:2] for row in stored(tmp_path, database)] == [("r4", 1), ("r5", 0), ("r5", 1)]
        answer(audit, "r6", ["a", "b"])
        until(lambda: [row[:2] for row in stored(tmp_path, database)] == [("r5", 1), ("r6", 0), ("r6", 1)])


def test_settings_are_checked() -> None:
    with pytest.raises(OptionError, match="no regular expression"):
        AuditSettings(redact=("(",))
    for options in ({"retention_days": 0}, {"max_segments": 0}):
        with pytest.raises(OptionError):
            AuditSettings(**options)  # type: ignore[arg-type]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, dict[str, object], str]:
        code = cli.main(["audit", *words, "--audit", str(tmp_path / "audit"), "--json"])
        output = capsys.readouterr()
        return code, json.loads(output.out) if output.out else {}, output.err

    assert run() == (2, {}, f"internalrl: There is no audit in {tmp_path}/audit; give the folder of one as --audit.\n")
    with closing(Audit(tmp_path / "audit")) as audit:
        for i in range(3):
            answer(audit, f"r{i}", ["[/bold] words ", "b\x1b[31m"])
        [file] = (tmp_path / "audit" / "journal").glob("*.jsonl")
        left = file.read_bytes().replace(b'"r1"', b'"left"')
    (tmp_path / "audit" / "journal" / "1-1.jsonl").write_bytes(left)
    _, found, _ = run("left")
    assert found["count"] == 2, "what a killed server left is found"
    segments = found["segments"]
    assert isinstance(segments, list)
    assert [segment["text"] for segment in segments] == ["[/bold] words ", "b\x1b[31m"]
    assert segments[0]["code"] == [0.0, -0.5]
    assert run("--adapter", "support", "--strategy", "greet", "--since", "1h", "--limit", "3")[1]["count"] == 3
    assert run("--until", "1h")[1]["count"] == 0
    assert run("--since", "2020-01-01", "--until", "2020-01-02T12:00")[1]["count"] == 0
    assert run("--violation", "")[1]["count"] == 0
    code, _, error = run("--since", "yesterday")
    assert (code, error.count("\n")) == (2, 1)
    assert cli.main(["audit", "--audit", str(tmp_path / "audit")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown, "no text may speak to the terminal"
