"""`dtpipe distill` as a user runs it with a live teacher: without a dataset, resumed, with broken images, refused."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import yaml
from click.testing import CliRunner, Result

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_manifest
from dtpipe.pipeline.cli.main import main
from parts.extractions import Extract
from parts.teachers import write_ddpm

TRAIN = [
    "--student",
    "test_resnet",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--timesteps",
    "50",
    "-s",
    "extract.batch_size=4",
    "-s",
    "distill.regressor.width=8",
    "-s",
    "distill.run.log_every=1",
]


def distill(*args: object) -> Result:
    return CliRunner().invoke(main, ["distill", *map(str, (*args, *TRAIN))])


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


def error(result: Result, code: int) -> str:
    """The one line that a refusal is."""
    shown = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(shown)) == (code, 1), result.output
    assert "Traceback" not in result.output
    return shown[0]


def test_a_run_without_a_dataset_is_reproduced_by_its_config_and_resumes_to_the_same(
    image_folder: Path, ddpm: Path, tmp_path: Path
) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    result = distill("--images", image_folder, "--teacher", ddpm, "--out", run)
    assert result.exit_code == 0, result.output
    assert "2 epochs of 8 samples" in result.stdout
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["distill"]["datasets"], settings["distill"]["reencode"]) == ([], 1.0)
    assert settings["extract"]["noise"]["timesteps"] == [50]
    result = CliRunner().invoke(main, ["distill", "-c", str(run / "config.yaml"), "--out", str(again)])
    assert result.exit_code == 0, result.output
    assert losses(again) == losses(run) and len(losses(run)) == 4
    (run / "last.pt").unlink()
    (run / "last.pt").hardlink_to(next(run.glob("checkpoints/*1.pt")))  # as a run that stopped after its first epoch
    result = distill("--images", image_folder, "--teacher", ddpm, "--out", run)
    assert "from step 2" in result.stdout
    assert losses(run) == losses(again)
    page = CliRunner().invoke(main, ["report", str(run)])
    assert page.exit_code == 0, page.output
    html = (run / "report.html").read_text()
    assert "encoded live over" in html and "a new draw in each epoch, timestep 50" in html
    assert "Feature maps" in html and "left out" not in html


def test_resume_refuses_another_teacher_transform_or_listing_naming_it(
    image_folder: Path, ddpm: Path, other_ddpm: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "run"]
    assert distill("--images", image_folder, "--teacher", ddpm, *out).exit_code == 0
    images = ["--images", image_folder]
    assert "live.teacher.weights_blake3: " in error(distill(*images, "--teacher", other_ddpm, *out), 2)
    schedule = write_ddpm(tmp_path / "schedule", beta_end=0.03)
    assert "live.teacher.options.scheduler.beta_end: 0.02 -> 0.03" in error(
        distill(*images, "--teacher", schedule, *out), 2
    )
    stretched = [*images, "--teacher", ddpm, *out, "-s", "extract.transform.resize=stretch"]
    assert 'live.transform.resize: "center_crop" -> "stretch"' in error(distill(*stretched), 2)
    next(image_folder.rglob("*.png")).unlink()
    assert "listing.num: 8 -> 7" in error(distill(*images, "--teacher", ddpm, *out), 2)


def test_broken_images_are_named_once_and_stay_out(image_folder: Path, ddpm: Path, tmp_path: Path) -> None:
    (image_folder / "cat" / "broken.png").write_bytes(b"junk")
    (image_folder / "dog" / "empty.jpg").write_bytes(b"")
    command = ["--images", image_folder, "--teacher", ddpm, "--out", tmp_path / "run"]
    said = error(distill(*command), 7)
    assert "2 bad samples, extract.run.max_bad allows 0" in said and "cat/broken.png: not a readable image" in said
    assert not (tmp_path / "run" / "checked_images.json").exists()  # mended images are looked at again
    result = distill(*command, "--max-bad", 2)
    assert result.exit_code == 0, result.output
    assert "images: bad: dog/empty.jpg: empty file" in result.stderr
    assert "epochs of 8 samples" in result.stdout
    assert json.loads((tmp_path / "run" / "checked_images.json").read_text())["bad"].keys() == {
        "cat/broken.png",
        "dog/empty.jpg",
    }
    (image_folder / "dog" / "empty.jpg").write_bytes(next((image_folder / "dog").glob("*.png")).read_bytes())
    result = distill(*command, "--max-bad", 2)  # the run keeps to what it began with, and does not look again
    assert result.exit_code == 0 and "looked at" not in result.stderr


def test_an_image_that_breaks_after_it_was_looked_at_stops_the_run_naming_it(
    image_folder: Path, ddpm: Path, tmp_path: Path
) -> None:
    command = ["--images", image_folder, "--teacher", ddpm, "--out", tmp_path / "run"]
    assert distill(*command).exit_code == 0
    for file in (*(tmp_path / "run").rglob("*.pt"), tmp_path / "run" / "metrics.jsonl"):
        file.unlink()
    victim = next(image_folder.rglob("*.png"))
    victim.write_bytes(b"junk")
    assert (
        f"{victim.name}: not a readable image" in (said := error(distill(*command), 3))
        and "was good when the run began" in said
    )


def test_selection_works_without_a_dataset(image_folder: Path, ddpm: Path, tmp_path: Path) -> None:
    result = distill(
        "--images", image_folder, "--teacher", ddpm, "--out", tmp_path / "run", "--include", "cat/*", "--json"
    )
    assert json.loads(result.stdout)["num_samples"] == 4


def test_a_gan_trains_a_student_without_images(gan: dict[str, str], tmp_path: Path) -> None:
    teacher = ["--teacher", gan["path"], "-s", f"extract.teacher.kind={gan['kind']}", "--out", tmp_path / "run"]
    result = distill("--num-samples", 9, *teacher)
    assert result.exit_code == 0, result.output
    assert "2 epochs of 9 samples" in result.stdout
    assert CliRunner().invoke(main, ["report", str(tmp_path / "run")]).exit_code == 0
    assert "9 images of its own in each epoch" in (tmp_path / "run" / "report.html").read_text()
    assert "listing.num: 9 -> 8" in error(distill("--num-samples", 8, *teacher), 2)


def test_a_dry_run_says_what_the_teacher_costs_and_writes_nothing(
    image_folder: Path, ddpm: Path, extract: Extract, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for command in (["--images", image_folder, "--teacher", ddpm], [extract("features"), "--reencode", 0.5]):
        result = distill(*command, "--out", out, "--dry-run", "--json")
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert plan["num_samples"] == 8 and plan["teacher_s"] > 0
        assert not out.exists()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ("--images IMAGES", 2, "--teacher (extract.teacher.path) must be given"),
        ("--images nowhere --teacher DDPM", 3, "nowhere"),
        ("--images IMAGES --teacher IMAGES", 3, "no teacher family recognises"),
        ("--images IMAGES --teacher DDPM --reencode 0.5", 2, "distill.reencode is 0.5, and without a dataset"),
        ("--images IMAGES --teacher DDPM --join", 2, "distill.join is about feature datasets"),
        ("--images IMAGES --teacher DDPM --sample-weights 1,1", 2, "has 2 values for 0 datasets"),
        ("--images IMAGES --teacher DDPM --include bird/*", 2, "matches no key"),
        ("--num-samples 4 --teacher DDPM", 3, "give --images instead of --num-samples"),
        ("--teacher DDPM", 2, "to train without a dataset, --images"),
        (
            "FEATURES --reencode 0.5 --teacher OTHER",
            3,
            "cannot be encoded live: OTHER is not the teacher that made the dataset (weights have digest",
        ),
        ("FEATURES --reencode 1 -s extract.teacher.dtype=bfloat16", 3, 'teacher.dtype: "float32" -> "bfloat16"'),
        ("FEATURES --reencode 1 -s extract.teacher.options.ensemble=2", 3, "teacher.options.ensemble: not set -> 2"),
        ("FEATURES --keys nowhere.txt", 3, "nowhere.txt: there is no such file"),
        ("FEATURES -s distill.flip=true", 2, "no flipped view is stored"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    args: str,
    code: int,
    said: str,
    image_folder: Path,
    ddpm: Path,
    other_ddpm: Path,
    extract: Extract,
    tmp_path: Path,
) -> None:
    places = {"IMAGES": image_folder, "DDPM": ddpm, "OTHER": other_ddpm}
    if "FEATURES" in args:
        places["FEATURES"] = Path(extract("features"))
    found = error(distill(*(places.get(arg, arg) for arg in args.split()), "--out", tmp_path / "run"), code)
    for name, path in places.items():
        said = said.replace(name, str(path))
    assert said in found


def test_what_a_run_on_a_dataset_does_not_read_is_said(extract: Extract, image_folder: Path, tmp_path: Path) -> None:
    unread = ("--images", image_folder, "-s", "distill.labels.temperature=2", "-s", "distill.labels.width=16")
    result = distill(extract("features"), *unread, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "extract.images is not read: the dataset that is given has images" in result.stderr
    assert "distill.labels.temperature and distill.labels.width are not read: there are no soft labels" in result.stderr


def test_a_plan_counts_reading_and_decoding_of_what_is_stored(extract: Extract, tmp_path: Path) -> None:
    url = extract("coded", codec={"max_error": 0.1, "coder": "rans"})
    for reencode, reads in (("0", True), ("1", False)):
        result = distill(url, "--reencode", reencode, "--out", tmp_path / "run", "-n", "--json")
        assert result.exit_code == 0, result.output
        plan = json.loads(result.stdout)
        assert (plan["decode_s"] > 0) == reads
        (cores,) = [rate for name, rate in plan["limits"]["img_s"].items() if name == "cores"]
        assert (cores < 0.999 * plan["throughput_img_s"]) == reads


def test_remote_datasets_that_exceed_the_cache_are_said_once(extract: Extract, tmp_path: Path) -> None:
    root = Path(extract("features"))
    files = fsspec.filesystem("memory")
    for path in filter(Path.is_file, root.rglob("*")):
        files.pipe_file(f"/small-cache/{path.relative_to(root)}", path.read_bytes())
    size_bytes, cache = load_manifest(Store(root)).totals.size_bytes, f"distill.run.cache={tmp_path / 'cache'}"
    for cache_bytes, num_said in ((size_bytes - 1, 1), (size_bytes, 0)):
        cache_gb = f"distill.run.cache_gb={cache_bytes / 1e9:.9f}"
        result = distill("memory://small-cache", "--out", tmp_path / "run", "-s", cache, "-s", cache_gb)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("read from the store in every epoch; raise it") == num_said
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= cache_bytes


def test_equivariant_training_warns_once(extract: Extract, tmp_path: Path) -> None:
    url = extract("features")
    result = distill(url, "--equivariant", "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["flips"] is True
    assert [line for line in result.stderr.splitlines() if "warning" in line] == [
        f"warning: {url} stores no flipped views, and --equivariant mirrors its features instead: how far that is from "
        f"true is not measured yet; `dtpipe verify {url} --level recompute` does"
    ]
