"""The page about datasets: one, joined, with soft labels, made by a teacher, unfinished; bad samples."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.run import run_extraction
from dtpipe.manifests.schema import SYNTHESIZED, SourceRecipe
from parts import planted
from parts.command_line import RefusedError, dtpipe, said
from parts.extractions import extract_config
from parts.images import png, write_images
from parts.memory import write_dataset
from parts.planted import Planted, write_planted
from parts.soft_labels import CLASSES, write_labels


def titles(page: Path) -> list[str]:
    return [html.unescape(title) for title in re.findall("<h2>(.*?)</h2>", page.read_text())]


def test_the_verdict_stands_on_the_page_in_the_answer_and_in_json(tmp_path: Path) -> None:
    features = write_planted(tmp_path / "features", planted.shifted_shard, bad=(3,))
    page = tmp_path / "page.html"
    words = ("report", features, "--out", page, "--num-images", 2)
    answer = dtpipe(*words)
    assert answer["verdict"] == "2 things are wrong in 47 of 47 good samples."
    assert [finding["code"] for finding in answer["findings"]] == ["bad samples", "drift"]
    assert answer["bad"] == [{"row": 3, "key": "images/003.png", "reason": "broken"}]
    assert answer["samples"] == {"num": 48, "num_ok": 47, "looked_at": 47}
    assert answer["path"] == str(page)
    (stored, _) = answer["stored"]
    assert stored["raw_bytes"] == 48 * 2 * 12 * 8 * 8 * 4 and stored["codec"] == "cast"
    text = html.unescape(page.read_text())
    assert answer["verdict"] in text and all(finding["text"] in text for finding in answer["findings"])
    assert titles(page) == [
        *("Verdict", "Labels", "Levels", "Levels from each other", "Drift over shards", "Segmentation maps"),
        *("Bad samples", "How it was made"),
    ]
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text
    lines = said("report", f"{features}/", *words[2:]).splitlines()  # as a shell completes it
    assert lines[0].startswith("wrong: 1 of 48 samples (2.1%) are bad") and lines[2] == answer["verdict"]


def test_joined_soft_labels_stand_beside_the_features_and_lie_in_shards_of_their_own(tmp_path: Path) -> None:
    source = Planted()
    features = write_planted(tmp_path / "features")
    labels = write_labels(tmp_path / "labels", source, features)
    answer = dtpipe("report", features, labels, "--join", "--out", tmp_path / "page.html", "--num-images", 1)
    assert [level["level"] for level in answer["levels"]] == ["l2", "l3", "l3.labels"]
    assert not [finding for finding in answer["findings"] if finding["severity"] == "wrong"]
    assert "Soft labels l3.labels" in titles(tmp_path / "page.html")
    shares = answer["soft_labels"]["l3.labels"]["class_shares"]
    assert len(shares) == len(CLASSES) and sum(shares) == pytest.approx(1)
    assert answer["between_levels"][0] | {"r2": None} == {"from": "l2", "to": "l3", "r2": None}
    alone = dtpipe("report", labels, "--out", tmp_path / "alone.html")  # it stores no images
    assert alone["soft_labels"]["l3.labels"]["class_shares"] == pytest.approx(shares)
    assert "Segmentation maps" in titles(tmp_path / "alone.html")


def test_datasets_one_after_the_other_have_their_shards_counted_through(tmp_path: Path) -> None:
    first = write_planted(tmp_path / "first")
    other = write_dataset(tmp_path / "other", Planted(), "more", source=SourceRecipe(kind="folder", order="container"))
    answer = dtpipe("report", first, other, "--out", tmp_path / "page.html", "--samples", 24, "--num-images", 1)
    assert [shard["shard"] for shard in answer["shards"]["l2"]] == list(range(12))
    assert answer["samples"]["num"] == 96 and answer["samples"]["looked_at"] == 24


def test_a_synthesized_and_an_unfinished_dataset_are_looked_at_as_far_as_they_are(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "made", Planted(), source=SourceRecipe(kind=SYNTHESIZED))
    answer = dtpipe("report", made, "--out", tmp_path / "made.html", "--num-images", 1)
    assert answer["verdict"].startswith("Nothing is wrong in 48 of 48")
    begun = write_dataset(tmp_path / "begun", Planted(), merged=False)
    answer = dtpipe("report", begun, "--out", tmp_path / "begun.html", "--num-images", 1)
    assert answer["samples"]["num_ok"] == 40 and answer["digests"] == [None]
    assert "unfinished" in (tmp_path / "begun.html").read_text()


def test_a_bad_image_is_shown_as_far_as_it_can_be_decoded(tmp_path: Path, ddpm: Path) -> None:
    images = write_images(tmp_path / "images", num=6)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (images / "dog" / "torn.png").write_bytes(png(noise)[:2000])  # of about 3 kB
    (images / "dog" / "text.png").write_bytes(b"no image at all")
    config = extract_config(images, ddpm, tmp_path / "features", max_bad=5)
    url = run_extraction(config).url
    dtpipe("report", url, "--out", tmp_path / "page.html", "--num-images", 1)
    (section,) = re.findall("<h2>Bad samples</h2>(.*?)</section>", (tmp_path / "page.html").read_text(), re.DOTALL)
    assert section.count("data:image/png") == 1 and "dog/torn.png" in section and "dog/text.png" in section


@pytest.mark.parametrize(
    ("words", "said_of_it"),
    [
        (("run",), "run is no feature dataset, and .* is; make a page of runs or of datasets"),
        (("--teacher", "x"), "report.teacher draws samples for the page of a run"),
    ],
)
def test_settings_of_a_run_beside_a_dataset_are_refused(
    tmp_path: Path, words: tuple[str, ...], said_of_it: str
) -> None:
    features = write_planted(tmp_path / "features")
    with pytest.raises(RefusedError, match=said_of_it) as refused:
        said("report", features, *words)
    assert refused.value.exit_code == 2


def test_a_folder_that_is_neither_is_said_to_be_neither(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no run of `dtpipe distill` is here .* and no feature dataset"):
        said("report", tmp_path)
    with pytest.raises(RefusedError, match="join is for feature datasets"):
        said("report", tmp_path, "--join")


def test_a_page_that_is_not_ours_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    features = write_planted(tmp_path / "features")
    (tmp_path / "features-report.html").write_text("mine")
    with pytest.raises(RefusedError, match=r"features-report\.html"):
        said("report", features)
    assert (tmp_path / "features-report.html").read_text() == "mine"
