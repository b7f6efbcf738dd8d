"""Requests that are generated from a server's own description of its API."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, response_schema_conformance, status_code_conformance]


def send_generated(url: str, headers: dict[str, str], requests: int) -> Counter[str]:
    """Send so many requests or a few more, half of which fit the description; returns how often each status came.

    Raises schemathesis' exception where an answer is a failure of the server, or not as the description says.
    """
    described = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations = [result.ok() for result in described.get_all_operations()]
    statuses: Counter[str] = Counter()

    def send(case: Any) -> None:
        answer = case.call(headers=headers, timeout=60)
        statuses[str(answer.status_code)] += 1
        case.validate_response(answer, checks=CHECKS)

    # What takes a body comes last: of the others some have only a few requests, or none that does not fit.
    operations.sort(key=lambda operation: bool(operation.body))
    modes = (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE)
    pairs = [(operation, mode) for operation in operations for mode in modes]
    for number, (operation, mode) in enumerate(pairs):
        chosen = settings(
            max_examples=-(-max(requests - statuses.total(), 1) // (len(pairs) - number)),
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        with suppress(Unsatisfiable):
            chosen(given(case=operation.as_strategy(generation_mode=mode))(send))()
    return statuses
