"""The grammar of arms, what an arm's student of a seed is, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dtpipe.distill.downstream.extractors import random_student
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.student.student import Student, StudentSpec, spec_to_dict
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.pipeline.arms import (
    Arm,
    ArmMember,
    ArmSpec,
    open_comparison,
    parse_arm,
    random_arm,
    run_notes,
    runs_of,
    seeds_of,
)
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.rivals.weights import read_weights_file

SPEC = StudentSpec("test_resnet", 4, (32, 32))


def write_run(folder: Path, seed: int, spec: StudentSpec = SPEC) -> str:
    folder.mkdir()
    state = random_student(spec, seed).state_dict()
    content = {"student_spec": spec_to_dict(spec), "student": state, "ema": None}
    save_checkpoint(folder / "last.pt", "distill", content)
    return str(folder)


def config(checkpoint: str | list[str], *compare: str, **more: Any) -> EvalConfig:
    values = {"checkpoint": checkpoint, "task": "probe", "images": "images", "compare": compare, **more}
    return EvalConfig.model_validate(values)


def weights(student: Student) -> list[float]:
    first = next(student.net.parameters())
    return list(first.detach().flatten()[:4].tolist())


def is_of(student: Student, seed: int) -> bool:
    return weights(student) == weights(random_student(SPEC, seed))


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("runs/a", ArmSpec("runs/a", (ArmMember("runs/a"),))),
        ("old=runs/a", ArmSpec("old", (ArmMember("runs/a"),))),
        ("old=runs/a,runs/b", ArmSpec("old", (ArmMember("runs/a"), ArmMember("runs/b")))),
        ("runs/lr=1e-3", ArmSpec("runs/lr=1e-3", (ArmMember("runs/lr=1e-3"),))),
        ("resnet50@w/r50.pth", ArmSpec("resnet50@w/r50.pth", (ArmMember("w/r50.pth", "resnet50"),))),
        ("dino=timm:resnet50@r50.pth", ArmSpec("dino", (ArmMember("r50.pth", "resnet50"),))),
        ("timm:resnet50.a1_in1k", ArmSpec("timm:resnet50.a1_in1k", (ArmMember(None, "resnet50.a1_in1k"),))),
    ],
)
def test_an_arm_is_read_as_it_is_documented(text: str, spec: ArmSpec) -> None:
    assert parse_arm(text) == spec


def test_a_path_that_is_there_is_one_member_whatever_is_in_its_name(tmp_path: Path) -> None:
    for name in ("a,b", "x=y@z"):
        run = write_run(tmp_path / name, 0)
        assert parse_arm(run).members == (ArmMember(run),)


def test_a_pattern_stands_for_the_runs_that_match_in_order(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed) for seed in (2, 0, 1)]
    assert [member.path for member in parse_arm(f"seeds={tmp_path}/s*").members] == sorted(runs)
    with pytest.raises(InputError, match="nothing matches; give run folders"):
        parse_arm(f"{tmp_path}/none*")


@pytest.mark.parametrize("text", ["a=", "=runs/a", "a=runs/a,", "runs/a,,runs/b"])
def test_half_an_arm_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write"):
        parse_arm(text)


def test_seed_i_of_an_arm_takes_run_i_and_one_run_serves_all(tmp_path: Path) -> None:
    several = [write_run(tmp_path / f"s{seed}", seed) for seed in (10, 11)]
    one = write_run(tmp_path / "one", 5)
    comparison = open_comparison(config(several, f"old={one}", seed=3), print)
    assert comparison.seeds == range(3, 5)
    distilled, old = comparison.arms
    assert (distilled.name, old.name) == ("distilled", "old")
    assert [is_of(distilled.student_for(seed), made) for seed, made in ((3, 10), (4, 11))] == [True, True]
    assert is_of(old.student_for(3), 5) and is_of(old.student_for(4), 5)
    assert comparison.spec == SPEC


def test_one_run_at_several_seeds_is_said_not_to_hold_the_spread_of_pre_training(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed) for seed in range(2)]
    (note,) = run_notes(open_comparison(config(runs[0]), print))
    assert note.startswith("distilled is one run at all 3 seeds: spread and intervals hold that of labels")
    assert run_notes(open_comparison(config(runs), print)) == []
    assert run_notes(open_comparison(config(runs[0], seeds=1), print)) == []


def test_random_arms_are_drawn_from_the_seed() -> None:
    arm: Arm = random_arm(SPEC)
    assert weights(arm.student_for(0)) == weights(arm.student_for(0)) != weights(arm.student_for(1))


def test_weights_of_a_file_stand_beside_the_run_in_its_size(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", 0), random_student(SPEC, 7)
    torch.save({"state_dict": other.net.state_dict()}, tmp_path / "w.pth")
    save_file(other.net.state_dict(), tmp_path / "w.safetensors")
    vit = random_student(StudentSpec("test_vit", 4, (32, 32)), 1)
    torch.save({"model": vit.net.state_dict()}, tmp_path / "vit.pt")
    said: list[str] = []
    arms = [str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"), f"vit=timm:test_vit@{tmp_path / 'vit.pt'}"]
    comparison = open_comparison(config(run, *arms), said.append)
    first, second, third = (arm.student_for(0) for arm in comparison.arms[1:])
    assert is_of(first, 7) and is_of(second, 7)
    assert third.spec == StudentSpec("test_vit", 4, (32, 32)) and weights(third) == weights(vit)
    assert len(said) == 3 and "vit.pt: 76 tensors of test_vit under 'model" in said[2]


def test_runs_given_one_by_one_are_one_arm() -> None:
    assert config(["a", "b"]).checkpoint == "a,b"
    assert runs_of(config(["a", "b"])) == ("a", "b") and runs_of(config("a")) == ("a",)


@pytest.mark.parametrize(("asked", "nums", "seeds"), [(None, [1, 1], 3), (None, [5, 1, 5], 5), (2, [2, 1], 2)])
def test_there_are_as_many_seeds_as_runs(asked: int | None, nums: list[int], seeds: int) -> None:
    assert len(seeds_of(config("a", seeds=asked), nums)) == seeds


@pytest.mark.parametrize(("asked", "nums"), [(3, [2, 1]), (None, [2, 3])])
def test_runs_that_do_not_pair_are_refused(asked: int | None, nums: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"an arm has 2 runs and there are 3 seeds; seed i takes run i"):
        seeds_of(config("a", seeds=asked), nums)


def test_runs_of_different_students_are_no_seeds_of_one_arm(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 0, StudentSpec("test_resnet", 4, (64, 64)))]
    with pytest.raises(ConfigError, match="runs of one arm differ in their seed alone"):
        open_comparison(config(runs), print)


def test_two_arms_of_one_name_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0)
    with pytest.raises(ConfigError, match="two arms have one name"):
        open_comparison(config(run, f"x={run}", f"x={run}"), print)


def test_the_first_arm_must_be_a_run(tmp_path: Path) -> None:
    torch.save(random_student(SPEC, 7).net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="the first arm is a run of dtpipe; give other weights with --compare"):
        open_comparison(config(str(tmp_path / "w.pth")), print)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_files_that_would_run_code_are_refused_unread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.pkl", "a.pth"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"model": Attack()}))
        with pytest.raises(InputError):
            read_weights_file(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.pth", None, "there is no such file; give a file of weights"),
        ("w.onnx", b"x", r"weights are read from files named \.safetensors"),
        ("w.safetensors", bytes(range(256)), "not readable as weights .*; download the file again"),
        ("w.pth", b"<html><title>Sign in</title>", "is a web page"),
        ("w.pkl", pickle.dumps([1]), "holds a list in place of tensors by name"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_in_a_sentence(
    name: str, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_weights_file(tmp_path / name)


def test_detectron2s_pickle_of_arrays_is_read(tmp_path: Path) -> None:
    arrays = {"stem.conv1.weight": torch.arange(6.0).reshape(2, 3).numpy()}
    (tmp_path / "d2.pkl").write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    content = read_weights_file(tmp_path / "d2.pkl")
    assert torch.equal(content["model"]["stem.conv1.weight"], torch.arange(6.0).reshape(2, 3))
    assert content["matching_heuristics"] is True
