"""The figures of a look at a dataset as one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dtpipe.pipeline.report.dataset.findings import DatasetFinding, verdict_of
from dtpipe.pipeline.report.dataset.labels import LabelCounts
from dtpipe.pipeline.report.dataset.look import Looked
from dtpipe.pipeline.report.dataset.opened import OpenedDatasets
from dtpipe.pipeline.report.inspect import bad_records


def document_of(
    opened: OpenedDatasets, looked: Looked, findings: Sequence[DatasetFinding], bytes_of: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """All that the page says in figures; `bytes_of` the levels as `level_bytes` gives them."""
    columns = opened.source.columns
    labels = LabelCounts.of(columns.labels)
    return {
        "datasets": [part.url for part in opened.parts],
        "digests": [None if part.manifest is None else part.manifest.digest for part in opened.parts],
        "verdict": verdict_of(findings, looked, len(columns.ok_rows)),
        "findings": [asdict(finding) for finding in findings],
        "samples": {"num": len(columns), "num_ok": len(columns.ok_rows), "looked_at": len(looked.rows)},
        "bad": [record for part in opened.parts for record in bad_records(part)],
        "labels": {"counts": labels.counts, "num_without": labels.num_without},
        "levels": [
            {"level": name, "timestep": timestep, "r2_of_pixels": looked.of_pixels.get(name)}
            | {key: value for key, value in asdict(of).items() if key != "strengths"}
            for (name, timestep), of in looked.levels.items()
        ],
        "stored": list(bytes_of),
        "between_levels": [
            {"from": source, "to": target, "r2": value} for (source, target), value in looked.between.items()
        ],
        "shards": {name: [asdict(shard) for shard in shards] for name, shards in looked.shards.items()},
        "soft_labels": {
            name: {"class_shares": logits.class_shares.tolist(), "entropy": logits.mean_entropy}
            for name, logits in looked.soft_labels.items()
        },
    }


def level_bytes(opened: OpenedDatasets, descriptions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each level of the source, over all datasets that hold it: stored and raw bytes.

    `descriptions`: of the datasets, as `describe_dataset` gives them.
    """
    of_dataset = {
        (description["url"], level["name"]): level for description in descriptions for level in description["levels"]
    }
    rows = []
    for level in opened.source.levels:
        places = [of_dataset[part.url, own] for part, own in opened.stored_as(level.name)]
        stored, raw = (sum(place[key] for place in places) for key in ("size_bytes", "raw_bytes"))
        codecs = ", ".join(dict.fromkeys(place["codec"] for place in places))
        rows.append(
            {
                "level": level.name,
                "codec": codecs,
                "size_bytes": stored,
                "raw_bytes": raw,
                "ratio": raw / stored if stored else None,
            }
        )
    return rows
