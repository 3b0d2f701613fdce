"""What binds is what lets through the fewest images, by numbers that can be checked in the head."""

from __future__ import annotations

from typing import Any

import pytest

from dtpipe.pipeline.plan.limits import extraction_limits, training_limits

EXTRACTION: dict[str, Any] = {
    "on_gpu": True,
    "workers": 2,
    "cpus": 16,
    "decode_threads": 4,
    "code_threads": 4,
    "teacher_s": 0.01,
    "prepare_s": 0.02,
    "code_s": 0.03,
    "stored_bytes": 1e6,
    "store": ("disk", 1000.0),
}


def test_extraction_on_gpus_is_bound_by_them_by_cores_by_threads_or_by_the_store() -> None:
    limits = extraction_limits(**EXTRACTION)
    assert limits.img_s == pytest.approx(
        {"GPU": 200, "cores": 320, "decode threads": 400, "code threads": 8 / 0.03, "disk": 1000}
    )
    assert (limits.binding, limits.rate) == ("GPU", 200)
    assert limits.text() == (
        "bound by GPU, at 200 img/s; the others would allow, in img/s: "
        "code threads 267, cores 320, decode threads 400, disk 1,000"
    )
    assert extraction_limits(**EXTRACTION | {"cpus": 4}).binding == "cores"
    assert extraction_limits(**EXTRACTION | {"code_threads": 2}).binding == "code threads"
    assert extraction_limits(**EXTRACTION | {"store": ("network", 100.0)}).binding == "network"


def test_without_a_gpu_the_teacher_shares_the_cores() -> None:
    limits = extraction_limits(**EXTRACTION | {"on_gpu": False, "cpus": 2, "teacher_s": 0.05})
    assert limits.img_s["cores"] == pytest.approx(2 / 0.1)
    assert limits.img_s["one core per worker"] == pytest.approx(40)
    assert limits.binding == "cores"


def test_training_is_bound_by_steps_by_decoding_or_by_what_it_reads() -> None:
    values: dict[str, Any] = {"on_gpu": True, "cpus": 8, "step_img_s": 2000.0, "decode_s": 0.002, "restore_s": 0.0}
    values["read_bytes"] = 0.4e6
    fast, slow = ("disk", 1000.0), ("network", 250.0)
    assert training_limits(**values, store=fast).img_s == {"GPU": 2000, "cores": 4000, "disk": 2500}
    assert training_limits(**values, store=slow).binding == "network"
    assert training_limits(**values | {"decode_s": 0.008}, store=fast).binding == "cores"
    restored = training_limits(**values | {"restore_s": 0.0015}, store=fast)  # by the GPU, between its steps
    assert restored.img_s["GPU"] == pytest.approx(500)
    on_cpu = training_limits(**values | {"on_gpu": False, "cpus": 2, "step_img_s": 10.0, "decode_s": 0.2}, store=fast)
    assert on_cpu.img_s["cores"] == pytest.approx(1 / (0.1 + 0.1))
    on_cpu = training_limits(
        **values | {"on_gpu": False, "cpus": 2, "step_img_s": 10.0, "decode_s": 0.2, "restore_s": 0.3}, store=fast
    )
    assert on_cpu.img_s["cores"] == pytest.approx(1 / (0.1 + 0.1 + 0.3))
    live = training_limits(**values | {"decode_s": 0.0, "read_bytes": 0.0}, store=fast)
    assert live.img_s == {"GPU": 2000}
