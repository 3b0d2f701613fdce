"""The benchmark of codecs by what students learn: whole in miniature, its gradients, and what it concludes."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parts.command_line import said
from parts.memory import MemorySource, tiny_config, write_dataset

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

import codec_effect  # noqa: E402
import commands  # noqa: E402
from gradients import compare_gradients  # noqa: E402

from dtpipe.distill.trainer import train  # noqa: E402

SEEN = {"transform 0.5": {"holds": True}, "shuffled": {"holds": True}}


def in_this_process(command: list[str], _work: Path, _threads: int | None) -> None:
    """As `commands.run`, without a process for each."""
    said(*command)


def test_groups_run_side_by_side_each_in_its_order_and_what_finished_does_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    met = threading.Barrier(2, timeout=60)  # passed by two groups at a time only

    def run(command: list[str], _work: Path, threads: int | None) -> None:
        name = command[-1]
        if name.endswith("1"):
            met.wait()
        if Path(name).name == broken:
            raise RuntimeError(name)
        Path(name).mkdir()
        ran.append(Path(name).name)

    monkeypatch.setattr(commands, "run", run)
    groups = [[["distill", "--out", str(tmp_path / f"{group}{idx}")] for idx in range(3)] for group in "ab"]
    broken = "b2"
    with pytest.raises(RuntimeError, match="b2"):
        commands.run_groups(groups, tmp_path, 2)
    assert [name for name in ran if name[0] == "a"] == ["a0", "a1", "a2"]
    assert [name for name in ran if name[0] == "b"] == ["b0", "b1"]
    broken = ""
    commands.run_groups(groups, tmp_path, 2)
    assert ran[5:] == ["b2"]


def test_all_settings_are_scored_and_answered_in_miniature(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, as after a stop: the second call has nothing left to run and gives the same. Then with one more seed."""
    monkeypatch.setattr(commands, "run", in_this_process)
    words = ["--teacher", ddpm, "--errors", "0.03", "--seeds", 1, "--draws", 1, "--num-images", 20, "--epochs", 1]
    words += ["--num-held-out", 4, "--batches", 1, "--work", tmp_path / "work", "--out", tmp_path]
    assert codec_effect.main(list(map(str, words))) == 0
    document = json.loads((tmp_path / "codec_effect.json").read_text())
    monkeypatch.setattr(commands, "run", pytest.fail)
    assert codec_effect.main(list(map(str, words))) == 0
    assert json.loads((tmp_path / "codec_effect.json").read_text()) == document

    settings = {"int8", "transform 0.03", "another draw"}
    assert {line["setting"] for line in document["contrasts"]} == settings
    assert {line["arm"] for line in document["gradients"]} == settings | {"transform 0.5", "shuffled"}
    errors = {line["arm"]: line["relative_mse"]["l2"] for line in document["gradients"]}
    assert errors["int8"] < 1e-3 < 0.01 < errors["transform 0.03"] < 0.06 < 0.3 < errors["transform 0.5"] < 0.7
    assert document["bytes"]["cast"] > document["bytes"]["int8"] > document["bytes"]["transform 0.5"]
    assert (
        document["default"]["max_error"] is None and "not seen" in document["default"]["why"]
    )  # one seed shows nothing
    assert [(line["n"], line["answer"]) for line in document["contrasts"]] == [(1, "undecided")] * 3
    students = [line["command"] for line in document["commands"] if line["command"].startswith("dtpipe distill")]
    assert len(students) == 6 and len({line.partition(" -c ")[2].partition(" --out ")[0] for line in students}) == 1

    monkeypatch.setattr(commands, "run", in_this_process)
    first = tmp_path / "codec_effect.json"
    assert codec_effect.main([*map(str, words[:-1]), str(tmp_path / "more"), "--add-to", str(first)]) == 0
    both = json.loads((tmp_path / "more" / "codec_effect.json").read_text())
    assert (both["seeds"], {line["n"] for line in both["contrasts"]}) == (2, {2})
    assert [line for line in both["scores"] if line["seed"] == 0] == document["scores"]
    assert both["earlier"] == [document["origin"]] and both["commands"][: len(students)] == document["commands"][:6]
    own = json.loads((tmp_path / "work" / "gradients" / "1-1.json").read_text())["int8"]["cosine_trained"]["student"]
    of_both, of_first = (
        next(line["cosine_trained"]["student"] for line in found["gradients"] if line["arm"] == "int8")
        for found in (both, document)
    )
    assert of_both == pytest.approx((of_first + own) / 2, abs=2e-5)
    with pytest.raises(SystemExit, match="other --errors"):
        codec_effect.main([*map(str, words), "--errors", "0.03,0.1", "--add-to", str(first)])


def run_on(features: Path, out: Path, **changes: Any) -> Path:
    """A tiny run on one dataset."""
    return Path(train(tiny_config(out, datasets=(str(features),), epochs=1, limit=8, **changes)).run_dir)


class Scaled(MemorySource):
    """Features that are twice as strong."""

    def features(self, *place: Any) -> np.ndarray:
        return 2 * super().features(*place)


def test_gradients_are_blind_to_strength_and_see_other_features(tmp_path: Path) -> None:
    """W and the attention maps are free of scale, so features twice as strong pull as the true ones do, while their
    squared error is that of the features themselves, E[x^2] / var(x). Features of other images pull elsewhere."""
    true, scaled = (write_dataset(tmp_path / kind.__name__, kind()) for kind in (MemorySource, Scaled))
    runs = {"cast": run_on(true, tmp_path / "a"), "scaled": run_on(scaled, tmp_path / "b")}
    runs |= {"same": run_on(true, tmp_path / "c"), "shuffled": run_on(true, tmp_path / "d", mismatch=0)}
    found = compare_gradients("cast", runs, 2)
    for when in ("cosine_initial", "cosine_trained"):
        assert found["same"][when] == pytest.approx({"regressor": 1, "student": 1}, abs=1e-12)
        assert found["scaled"][when] == pytest.approx({"regressor": 1, "student": 1}, abs=1e-4)  # eps of W
        assert max(found["shuffled"][when].values()) < 0.999
    source = MemorySource()
    strength = [
        np.square(values).mean() / values.var()
        for values in (
            source.features(source.levels[0], row).astype(np.float64) for row in range(21) if row not in source.bad
        )
    ]
    assert min(strength) < found["scaled"]["relative_mse"]["l2"] < max(strength)
    assert found["same"]["relative_mse"]["l2"] == 0 < 1 < found["shuffled"]["relative_mse"]["l2"]


@pytest.mark.parametrize(
    ("answers", "controls", "chosen", "why"),
    [
        (["equal within m"] * 3, SEEN, 0.1, "the largest that was tried"),
        (["equal within m", "undecided", "equal within m"], SEEN, 0.01, "transform 0.03 is undecided"),
        (["equal within m", "equal within m", "different, by less than m"], SEEN, 0.03, "transform 0.1 is different"),
        (["different"] * 3, SEEN, None, "transform 0.01 is different"),
        (["equal within m"] * 3, {**SEEN, "shuffled": {"holds": False}}, None, "must be: shuffled"),
    ],
)
def test_the_default_is_the_last_before_the_first_that_is_not_equal(
    answers: list[str], controls: dict[str, Any], chosen: float | None, why: str
) -> None:
    tried = (0.01, 0.03, 0.1)
    lines = [
        {"setting": f"transform {error:g}", "answer": answer} for error, answer in zip(tried, answers, strict=True)
    ]
    default = codec_effect.default_error(tried, lines, controls)
    assert default["max_error"] == chosen and why in default["why"]
