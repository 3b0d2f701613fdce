"""`dtpipe --help` answers at once: under half a second, with neither torch nor ray imported."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from dtpipe.pipeline.cli.main import COMMANDS

HEAVY = ("torch", "ray", "timm", "diffusers", "torchvision", "pyarrow", "zarr", "matplotlib", "sklearn")
LIMIT_S = 0.5


def run_help(*args: str) -> tuple[str, list[str]]:
    """Help text, and which heavy packages were imported to print it, in a fresh interpreter."""
    code = (
        "import sys\n"
        "from dtpipe.pipeline.cli.main import main\n"
        f"try: main({[*args, '--help']!r})\n"
        "except SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, _, heavy = done.stdout.partition("HEAVY ")
    return text, eval(heavy)


@pytest.mark.parametrize("args", [(), *((name,) for name in COMMANDS)], ids=lambda args: args[0] if args else "dtpipe")
def test_help_imports_nothing_heavy(args: tuple[str, ...]) -> None:
    text, heavy = run_help(*args)
    assert text.startswith("Usage: ")
    assert heavy == []


def test_help_takes_under_half_a_second() -> None:
    """CPU seconds of the child, best of five: the machine may be busy with something else."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "dtpipe.pipeline.cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < LIMIT_S
