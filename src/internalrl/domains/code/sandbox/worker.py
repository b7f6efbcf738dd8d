"""The sandbox's worker process: runs programs in confined children. Standard library only; `sandbox.py` starts it.

It runs in a fresh interpreter, which shares no memory with the caller, and never reads a program. It forks a child, and
the child takes one request from the socket, gives up every descriptor but one pipe, takes on its limits and a list
of allowed system calls, and only then looks at the programs. What it writes to the pipe goes to the caller through a
buffer that is wiped, so no later child can find it in its memory.

A request may hold several programs. They then share a child, and those that are not `harmless`, which could do
something to the others, are not run but answered with null: the caller sends them again, alone.

Messages, one per packet of the socket:
    caller → child     {"sources": [str, …], "function": str, "inputs": JSON text of a list}
    worker → caller    once {"isolation": [str, …]} or {"error": str}; then one per request, beginning with
                       M: the child's own JSON follows, T: out of time, L: wrote too much, K: ended without a message
"""

from __future__ import annotations

import ast
import builtins
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import time
from typing import Any

from internalrl.domains.code.sandbox.confine import Confinement, die_with_parent, isolate

IMPORTABLE = ("bisect", "collections", "functools", "heapq", "itertools", "math", "operator", "re", "string")
"""Modules imported beforehand: a program can import these, the built-in ones and nothing that lies in a file."""

# --------------------------------------------------------------------------------------------------- the child


def run_request(connection: socket.socket, pipe: int, confinement: Confinement, request_bytes: int) -> None:
    """What a child does: take one request and answer it into `pipe`. Does not return."""
    try:
        die_with_parent()
        request = connection.recv(request_bytes)
        if request:
            os.write(pipe, b"S")  # the worker's clock starts here
            confinement.enter(pipe)
            os.write(3, json.dumps(answers(**json.loads(request))).encode())
    finally:
        os._exit(0)


def answers(sources: list[str], function: str, inputs: str) -> list[dict[str, Any] | None]:
    """What each program answers; None where it should be asked again, alone."""
    return [answer(source, function, json.loads(inputs), shared=len(sources) > 1) for source in sources]


def answer(source: str, function: str, inputs: list[Any], shared: bool) -> dict[str, Any] | None:
    """Run a program and call its `function` on each input: {"outputs"}, {"syntax": why} or {"error": why}.

    If it is `shared`, None for a program that is not harmless, or for which the others may have left too little memory.
    """
    try:
        tree = ast.parse(source, "<program>")
        code = compile(tree, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return None if shared and isinstance(error, MemoryError) else {"syntax": describe(error)}
    if shared and not harmless(tree):
        return None
    try:
        namespace: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        exec(code, namespace)
        outputs = [namespace[function](value) for value in inputs]
        for output in outputs:
            require_plain(output)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too
        return None if shared and isinstance(error, MemoryError) else {"error": describe(error)}
    return {"outputs": outputs}


def require_plain(value: Any) -> None:
    """TypeError unless `value` reads back from JSON as exactly itself: no tuples, no subclasses, no NaN."""
    kind = type(value)
    if kind is list:
        for entry in value:
            require_plain(entry)
    elif kind is dict:
        for key, entry in value.items():
            if type(key) is not str:
                raise TypeError(f"a result has a key of type {type(key).__name__}")
            require_plain(entry)
    elif kind is int and value.bit_length() > 4096:
        raise TypeError("a result is a number of over 1,000 digits")
    elif not (kind in (int, str, bool, type(None)) or (kind is float and math.isfinite(value))):
        raise TypeError(f"a result is of type {kind.__name__}")


def describe(error: BaseException) -> str:
    """Type and message, however the program's own exceptions behave."""
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:
        return "an exception that cannot be shown"


_HARMLESS_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Delete, ast.Assign, ast.AugAssign, ast.For,
    ast.While, ast.If, ast.Expr, ast.Pass, ast.Break, ast.Continue, ast.BoolOp, ast.NamedExpr, ast.BinOp, ast.UnaryOp,
    ast.Lambda, ast.IfExp, ast.Dict, ast.Set, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
    ast.comprehension, ast.Compare, ast.Call, ast.keyword, ast.Constant, ast.Attribute, ast.Subscript, ast.Slice,
    ast.Starred, ast.Name, ast.List, ast.Tuple, ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_HARMLESS_METHODS = {
    "add", "append", "clear", "copy", "count", "discard", "extend", "fromkeys", "get", "index", "insert", "items",
    "keys", "pop", "remove", "reverse", "sort", "values",
}  # fmt: skip
_HARMLESS_BUILTINS = {
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "int", "len", "list", "map", "max",
    "min", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
}  # fmt: skip


def harmless(tree: ast.AST) -> bool:
    """Whether a program cannot do anything to its process but use up time and memory.

    True for plain functions over numbers and lists only. They reach no object but their own and a few built-in
    functions, none of which can be changed: attributes are only read, and only these; no name begins with two
    underscores; nothing is imported, raised, caught, declared global or kept open.
    """
    for node in ast.walk(tree):
        if not isinstance(node, _HARMLESS_NODES):
            return False
        if isinstance(node, ast.Name):
            if node.id.startswith("__") or (hasattr(builtins, node.id) and node.id not in _HARMLESS_BUILTINS):
                return False
        elif isinstance(node, ast.Attribute):
            if not (isinstance(node.ctx, ast.Load) and node.attr in _HARMLESS_METHODS):
                return False
        elif isinstance(node, ast.FunctionDef) and (node.decorator_list or node.name.startswith("__")):
            return False
    return True


# -------------------------------------------------------------------------------------------------- the worker


def serve(connection: socket.socket, confinement: Confinement, options: dict[str, Any]) -> None:
    """One child after the other, until the caller closes the connection."""
    output_bytes = int(options["output_bytes"])
    packet = memoryview(bytearray(1 + output_bytes + 1))
    while True:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_request(connection, writer, confinement, options["request_bytes"])
        os.close(writer)
        if os.read(reader, 1) != b"S":  # the connection was closed before a request came
            return
        size, late = receive(reader, packet[1:], options["wall_seconds"])
        os.close(reader)
        os.kill(pid, signal.SIGKILL)  # one that has ended keeps its status
        status = os.waitpid(pid, 0)[1]
        timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
        if late or timed_out:
            connection.send(b"T")
        elif size > output_bytes:
            connection.send(b"L")
        elif size:
            packet[:1] = b"M"
            connection.send(packet[: 1 + size])
        else:
            connection.send(b"K")
        packet[: 1 + size] = bytes(1 + size)


def receive(reader: int, buffer: memoryview, seconds: float) -> tuple[int, bool]:
    """Fill `buffer` from a pipe until its end, or until it is full; how many bytes, and whether time ran out."""
    ready = select.poll()
    ready.register(reader, select.POLLIN)
    deadline, size = time.monotonic() + seconds, 0
    while size < len(buffer):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return size, True
        count = os.readv(reader, [buffer[size:]])
        if count == 0:
            break
        size += count
    return size, False


def main(descriptor: int, options: dict[str, Any]) -> None:
    """Greet the caller on the socket `descriptor`, then serve. Options: `sandbox.Limits` and request_bytes."""
    connection = socket.socket(fileno=descriptor)
    for name in IMPORTABLE:
        importlib.import_module(name)
    try:
        confinement = Confinement(options["cpu_seconds"], options["memory_mb"])
        isolation = isolate()
        if not confinement.works():
            raise OSError("the kernel does not enforce the filter of system calls")
    except OSError as error:
        connection.send(json.dumps({"error": str(error)}).encode())
        return
    for _ in range(20):  # what the interpreter prepares at first use need not be prepared again in every child
        json.dumps(answers(["def f(x):\n    return sorted(v for v in x if len(x) > 0)\n"] * 2, "f", "[[1, 2, 3]]"))
    gc.collect()
    gc.freeze()  # fewer pages are copied after a fork, and programs do not find the worker's objects
    connection.send(json.dumps({"isolation": isolation}).encode())
    serve(connection, confinement, options)
