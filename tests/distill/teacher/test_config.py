"""Settings of `train-teacher` that cannot work are refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parts.ddpm_training import tiny_teacher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"px": 18}, "multiple of 4"),
        ({"px": (16, 18)}, r"px is \(16, 18\); 3 resolutions need a multiple of 4"),
        ({"px": 4}, "8 or more"),
        ({"channels": (8, 8)}, "at least 3 items"),
        ({"label_dropout": 0.1}, "set class_conditional too"),
        ({"max_bad": 1.5}, "share as a fraction up to 1"),
        ({"out": "s3://bucket/teacher"}, "local or mounted folder"),
        ({"channels": (8, 10, 16)}, r"\[10\]; each must be a multiple of norm_groups"),
        ({"attention_strides": (3, 8)}, r"\[3, 8\]"),
        ({"steps": 0}, "steps"),
        ({"colour": 1}, "colour"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_teacher(**changes)


def test_config_needs_no_torch():
    code = "import sys; import dtpipe.distill.teacher.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
