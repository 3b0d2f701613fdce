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


def test_the_library_imports_nothing_heavy_until_it_is_used() -> None:
    code = (
        "import sys, dtpipe\n"
        "assert not [name for name in sys.modules if name.startswith('dtpipe.pipeline')]\n"
        "assert {'open', 'extract', 'distill', 'evaluate', 'load_backbone', '__version__'} <= set(dir(dtpipe))\n"
        "dtpipe.open, dtpipe.evaluate, dtpipe.load_backbone, dtpipe.DtpipeError, dtpipe.__version__\n"
        "import dtpipe.extract.config\n"
        "assert callable(dtpipe.extract) and callable(dtpipe.distill) and dtpipe.extract.config.ExtractConfig\n"
        "print([name for name in ('torch', 'ray', 'timm', 'diffusers', 'torchvision') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert eval(done.stdout) == []


def test_importing_the_library_takes_under_three_tenths_of_a_second() -> None:
    """CPU seconds of the child, best of five, interpreter included."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import dtpipe"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.3


def test_a_name_that_the_library_has_not_is_answered_with_those_it_has() -> None:
    import dtpipe

    with pytest.raises(AttributeError, match="no attribute 'opne'; it has Dataset, DtpipeError"):
        dtpipe.opne  # noqa: B018
