"""The student of what holds one, other than the run that made it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtpipe.distill.downstream.tuned.load import load_tuned
from dtpipe.distill.downstream.tuned.run import tune
from dtpipe.distill.student.load import load_student
from dtpipe.distill.student.student import Student
from parts.tuning import bright_halves, tune_config, tune_job


@pytest.mark.parametrize("decay", [None, 0.5])
def test_the_backbone_of_a_tuned_training_is_a_student_to_start_from(decay: float | None, tmp_path: Path) -> None:
    """So that a backbone that was trained on other labels can be tuned again, compared and exported."""
    job = tune_job(tune_config(ema_decay=decay, steps=2))
    tune(job, bright_halves(4, 1), tmp_path)
    for where in (tmp_path, tmp_path / "last.pt"):
        student, tuned = load_student(where), load_tuned(tmp_path).network.student
        assert student.spec == job.student.spec and not student.training
        for name, weight in tuned.state_dict().items():
            assert torch.equal(student.state_dict()[name], weight), name

    def first(student: Student) -> torch.Tensor:
        return next(student.parameters())

    assert not torch.equal(first(load_student(tmp_path)), first(job.student))
    assert torch.equal(first(load_student(tmp_path, ema=False)), first(load_student(tmp_path))) == (decay is None)
