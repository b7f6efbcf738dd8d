"""Bodies that nobody should send: large, deep, of many parts, of the wrong types, or no JSON at all."""

from __future__ import annotations

import json
from collections.abc import Iterator

CHAT, TEXT, FEEDBACK, SPLIT = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/feedback",
    "/v1/admin/adapters/code/split",
)


def filled(before: str, unit: str, after: str, size: int) -> bytes:
    """As many units, with commas between them, as `size` bytes hold."""
    count = max((size - len(before) - len(after)) // (len(unit) + 1), 1)
    return (before + ",".join([unit] * count) + after).encode()


def keyed(before: str, value: str, after: str, size: int) -> bytes:
    """As many members with different names as `size` bytes hold."""
    count = (size - len(before) - len(after)) // (len(value) + 10)
    return (before + ",".join(f'"k{i:05}":{value}' for i in range(count)) + after).encode()


def hostile(size: int) -> Iterator[tuple[str, str, bytes]]:
    """What it is, the address to send it to, and the body, which has about `size` bytes or fewer."""
    user = '{"model":"code","max_tokens":1,"messages":[{"role":"user","content":'
    for unit in ("{}", "0", "[]", '""', "null", '{"role":"user"}', '{"role":"user","content":""}', '{"a":{"b":[]}}'):
        yield f"messages of {unit}", CHAT, filled('{"model":"code","max_tokens":1,"messages":[', unit, "]}", size)
        yield f"content of {unit}", CHAT, filled(f"{user}[", unit, "]}]}", size)
    part = '{"type":"text","text":""}'
    yield "empty parts", CHAT, filled(f"{user}[", part, "]}]}", size)
    call = '{"id":"x","type":"function","function":{"name":"f","arguments":"[]"}}'
    yield (
        "calls of tools",
        CHAT,
        filled('{"model":"code","messages":[{"role":"assistant","tool_calls":[', call, "]}]}", size),
    )
    for unit in ('"a"', "0", "[0]", "[]", "{}", '"a",0', "-1", "1e5", '[0],"a"', "4294967296"):
        yield f"prompt of {unit}", TEXT, filled('{"model":"code","max_tokens":1,"prompt":[', unit, "]}", size)
        yield (
            f"one prompt of {unit}",
            TEXT,
            filled('{"model":"code","max_tokens":1,"n":16,"prompt":[[', unit, "]]}", size),
        )
    for unit in ("0.5", "[]", "[0.5]", "{}", '"a"', "1e400", "[0.5,0.5,0.5]"):
        yield f"codes of {unit}", TEXT, filled('{"model":"code","n":16,"prompt":"a","codes":[', unit, "]}", size)
        yield f"a code of {unit}", TEXT, filled('{"model":"code","n":16,"prompt":"a","codes":[[', unit, "]]}", size)
    for name in ("stop", "tools", "logit_bias", "modalities", "metadata", "functions", "x" * 50, "<script>"):
        yield f"a list as {name}", CHAT, filled(f'{{"model":"code","messages":[],"{name}":[', "0", "]}", size)
        yield f"an object as {name}", CHAT, keyed(f'{{"model":"code","messages":[],"{name}":{{', "{}", "}}", size)
    for value in ("0", "null", "[]", '""'):
        for path in (CHAT, TEXT, FEEDBACK, SPLIT):
            yield f"names that are not known: {value}, {path}", path, keyed("{", value, "}", size)
        yield f"weights: {value}", SPLIT, keyed('{"weights":{', value, "}}", size)
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        for depth in (100, size // (len(opening) + 1)):
            nested = opening * depth + "0" + closing * depth
            yield f"{depth} deep in {opening}", CHAT, f'{{"metadata":{nested}}}'.encode()[: size + 1000]
            yield f"{depth} deep in {opening}, alone", TEXT, nested.encode()
        yield f"never closed: {opening}", CHAT, (opening * (size // len(opening))).encode()
    yield "one long text", TEXT, json.dumps({"model": "code", "prompt": "a, " * (size // 3 - 20)}).encode()
    yield "one long text of quotes", TEXT, json.dumps({"model": "code", "prompt": '"' * (size // 2 - 40)}).encode()
    yield "one long text of escapes", TEXT, json.dumps({"model": "code", "prompt": "é" * (size // 6 - 40)}).encode()
    yield "a long text in a message", CHAT, f'{user}"{"<end>" * (size // 5 - 20)}"}}]}}'.encode()
    yield "a long name of a model", TEXT, json.dumps({"model": "x" * (size - 50), "prompt": "a"}).encode()
    yield "a number without end", TEXT, b'{"seed":' + b"9" * (size - 10) + b"}"
    yield "a fraction without end", TEXT, b'{"temperature":0.' + b"9" * (size - 20) + b"}"
    yield "half a text", TEXT, b'{"prompt":"' + b'\\"a' * (size // 3 - 10)
    yield "quotes", TEXT, b'"a' * (size // 2)
    yield "white space", TEXT, b" " * size
    yield "zeros", TEXT, bytes(size)
    yield "no UTF-8", TEXT, b"\xff" * size
    yield "surrogates", TEXT, b'{"prompt":"' + b"\\ud800" * (size // 6 - 10) + b'"}'
    yield "commas", TEXT, b"[" + b"," * (size - 1)
