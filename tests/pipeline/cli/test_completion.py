"""What a shell completes, by click's own classes; and the scripts that it prints, checked by the shells there are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from dtpipe.pipeline.cli.main import COMMANDS, main
from parts.command_line import said
from parts.paths import GOLDEN


def completed(*words: str) -> list[str]:
    """Values that a shell would offer for the last word."""
    shell = ShellComplete(main, {}, "dtpipe", "_DTPIPE_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def kinds(*words: str) -> set[str]:
    shell = ShellComplete(main, {}, "dtpipe", "_DTPIPE_COMPLETE")
    return {item.type for item in shell.get_completions(list(words[:-1]), words[-1])}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("",), list(COMMANDS)),
        (("ex",), ["extract", "export"]),
        (("list", "pre"), ["presets"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("distill", "--student-"), ["--student-px"]),
        (("distill", "--student", "resnet50d"), ["resnet50d"]),
        (("distill", "--device", "m"), ["mps"]),
        (("distill", str(GOLDEN / "v1_zarr"), "--levels", ""), ["l2", "l3", "l4.b"]),
        (("distill", str(GOLDEN / "v1_zarr"), "--levels", "l2,l"), ["l2,l2", "l2,l3", "l2,l4.b"]),
        (("extract", "-s", "extract.noise.time"), ["extract.noise.timesteps="]),
        (("extract", "-s", "extract.noi"), ["extract.noise."]),
        (("extract", "-s", "dis"), ["distill."]),
        (("extract", "--resize", "s"), ["stretch"]),
        (("verify", "x", "--level", "d"), ["digest", "decode"]),
    ],
)
def test_names_that_are_known_complete(words, expected):
    assert completed(*words) == expected


def test_presets_and_published_teachers_complete_beside_files():
    assert completed("distill", "-c", "imagenet_r")[0] == "imagenet_r50"
    assert "adm-imagenet" in completed("extract", "--teacher", "adm-")
    for words in (
        ("distill", "-c", "x"),
        ("extract", "--teacher", "x"),
        ("extract", "--images", "x"),
        ("inspect", "x"),
    ):
        assert words[0] == "inspect" or "file" in kinds(*words)


def test_levels_of_what_cannot_be_read_complete_nothing(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere", "s3://nobody/features"):
        assert completed("distill", str(place), "--levels", "l") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_clicks_and_parses_there(shell, tmp_path):
    script = said("completion", shell)
    kind = get_completion_class(shell)
    assert kind is not None and script.strip() == kind(main, {}, "dtpipe", "_DTPIPE_COMPLETE").source().strip()
    if (program := shutil.which(shell)) is not None:
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)


def test_bash_asks_the_command_and_gets_its_names_without_a_heavy_package():
    """As bash does at a Tab: the words and the place of the cursor in the environment, answers on stdout."""
    words = "dtpipe distill --student test_res"
    environment = {**os.environ, "_DTPIPE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "3"}
    code = (
        "import atexit, sys\n"
        "heavy = lambda: [name for name in ('torch', 'timm', 'ray') if name in sys.modules]\n"
        "atexit.register(lambda: print(heavy(), file=sys.stderr))\n"
        "from dtpipe.pipeline.cli.main import main\n"
        "main(prog_name='dtpipe')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "plain,test_resnet" in done.stdout.split()
    assert done.stderr.strip() == "[]"


def test_teachers_and_keys_need_no_heavy_package():
    code = (
        "import sys\n"
        "from dtpipe.pipeline.cli.completion import complete_key, complete_setting\n"
        "assert complete_setting('extract.teacher.path', 'PATH|NAME', None, 'adm')\n"
        "assert complete_key(None, None, 'eval.tune.')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
