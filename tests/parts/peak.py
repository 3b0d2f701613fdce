"""How much memory something takes at its peak, as the kernel counts it: C libraries included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

_CHILD = """
import gc, json, os, resource, sys
setup, calls = json.loads(sys.stdin.read())
scope = {}
exec(setup, scope)
gc.collect()
for call in calls:  # each in a process of its own, since memory that is freed is not given back
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            answer = repr(eval(call, scope))
        except Exception as err:
            answer = f"{type(err).__name__}: {err}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([grown * (1 if sys.platform == "darwin" else 1024), answer]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


class Peak(NamedTuple):
    """What a call took and gave."""

    size_bytes: int
    answer: str
    """Its value as text, or its error."""


def peaks(setup: str, calls: Mapping[str, str]) -> dict[str, Peak]:
    """The peak of each call by its name, over what `setup` left in memory; both are Python."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps([setup, list(calls.values())]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: Peak(*answer) for name, answer in zip(calls, answers, strict=True)}
