"""What the benchmark of downstream tasks hands on from an earlier result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))

from downstream import STUDIES, parse, report, result_file, table  # noqa: E402

from dtpipe.manifests.canonical import CHECKSUM, seal  # noqa: E402
from dtpipe.pipeline.tune.earlier import EarlierTable  # noqa: E402


@pytest.mark.parametrize("old", [False, True], ids=["as it is written", "with the checksum of another text"])
def test_an_earlier_result_is_a_table_that_eval_adds_to(tmp_path: Path, old: bool) -> None:
    """A result names no folder of a machine, so it is not, byte for byte, the table that `eval` wrote."""
    study, out = STUDIES["flowers"], tmp_path / "out"
    (case,) = study.cases
    root = tmp_path / "work" / study.name
    path = result_file(case, root)
    path.parent.mkdir(parents=True)
    published = json.loads((REPO / "benchmarks" / "results" / "downstream_finetune.json").read_text())
    found = {name: value for name, value in published["results"].items() if name != CHECKSUM}
    found["config"]["images"] = str(root / "train")
    path.write_bytes(seal(found))
    given = ["--data", "flowers", "--tables", case.name, "--work", str(tmp_path / "work"), "--out", str(out)]
    report(study, case, root, parse([*given, "--seeds", str(published["seeds"])]), [])

    result = out / "downstream_finetune.json"
    assert str(tmp_path) not in json.dumps(json.loads(result.read_text())["results"])
    if old:
        document = json.loads(result.read_text())
        document["results"][CHECKSUM] = "0" * 64
        result.write_text(json.dumps(document))
    command = table(case, root, parse([*given, "--seeds", "1", "--add-to", str(result)]))
    earlier = EarlierTable.read(Path(command[command.index("--add-to") + 1]))
    assert len(earlier.result.scores) == len(found["scores"]) and len(earlier.rates()) == 6
    assert f"eval.seed={published['seeds']}" in command
