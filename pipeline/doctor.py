"""Checks behind `dtpipe doctor`: each says what was found and, where something is wrong, what to do.

A check never raises; what it meets becomes a finding.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dtpipe.manifests.errors import DtpipeError, MissingPackageError
from dtpipe.pipeline.cli.console import format_bytes

State = Literal["ok", "note", "wrong"]
REQUIRED = (
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    "ray",
    "zarr",
    "webdataset",
    "fsspec",
    "pyarrow",
    "safetensors",
    "pillow",
    "numpy",
)
OPTIONAL = {"s3fs": "s3:// URLs: pip install 'dtpipe[s3]'", "gcsfs": "gs:// URLs: pip install 'dtpipe[gcs]'"}
LOW_DISK = 20e9
LOW_SHARED_MEMORY = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    state: State
    found: str
    advice: str = ""
    exit_code: int = 0


def _python() -> Iterator[Finding]:
    yield Finding(
        "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(
        "cpu", "ok", f"{cpus} cores, {format_bytes(memory.total)} memory, {format_bytes(memory.available)} of it free"
    )


def _packages() -> Iterator[Finding]:
    for name in REQUIRED:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name, "wrong", "not installed", "pip install --force-reinstall dtpipe", MissingPackageError.exit_code
            )
    for name, why in OPTIONAL.items():
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "note", "not installed (optional)", f"needed for {why}")


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding(
            "gpu",
            "note",
            f"none seen; {built}",
            "fine for small teachers; else check `nvidia-smi` and the driver's version",
        )
        return
    for idx in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(idx)
        kind = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        text = f"{torch.cuda.get_device_name(idx)}, {format_bytes(free)} of {format_bytes(total)} free, {kind}"
        low = free < 0.5 * total
        yield Finding(
            f"gpu {idx}", "note" if low else "ok", text, "another process holds half of it or more" if low else ""
        )


def _disk() -> Iterator[Finding]:
    for name, folder in {"disk here": Path.cwd(), "disk tmp": Path(os.environ.get("TMPDIR", "/tmp"))}.items():
        free = shutil.disk_usage(folder).free
        low = free < LOW_DISK
        yield Finding(
            name,
            "note" if low else "ok",
            f"{format_bytes(free)} free in {folder}",
            "`dtpipe plan` says what an extraction takes" if low else "",
        )
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < LOW_SHARED_MEMORY:
        yield Finding(
            "shared memory",
            "note",
            f"{format_bytes(free)} free in {shared}",
            "Ray will use slower files; in Docker, give --shm-size=2g",
        )


def _ray_address(address: str | None) -> Iterator[Finding]:
    from dtpipe.extract.cluster.connection import ENVIRONMENT, connect, disconnect, joined
    from dtpipe.extract.cluster.obstacles import check_local

    named_by = "--ray-address" if address else ENVIRONMENT
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if not address:
            check_local(os.environ)
            yield Finding("ray cluster", "ok", "no address set: extract starts Ray on this machine")
            return
        connect(address, tell=False)
        yield Finding("ray cluster", "ok", joined(address, named_by))
        disconnect()
    except DtpipeError as err:
        yield Finding("ray cluster", "wrong", _line(err), exit_code=err.exit_code)


def _store(url: str) -> Iterator[Finding]:
    from dtpipe.manifests.store.store import Store

    try:
        store = Store(url)
        is_new = store.local is not None and not store.local.exists()
        store.probe()
        if is_new and store.local is not None:
            store.local.rmdir()  # leave things as they were
        yield Finding("store", "ok", f"{url}: wrote, read back and deleted a probe")
    except DtpipeError as err:
        yield Finding("store", "wrong", _line(err), exit_code=err.exit_code)


def _teacher(path: str, device: str) -> Iterator[Finding]:
    from dtpipe.extract.config import TeacherConfig
    from dtpipe.extract.teachers.registry import load_teacher

    try:
        spec = load_teacher(TeacherConfig(path=path), device).spec
    except DtpipeError as err:
        yield Finding("teacher", "wrong", _line(err), exit_code=err.exit_code)
        return
    levels = ", ".join(f"{tap.name} ({tap.channels} channels)" for tap in spec.levels)
    yield Finding("teacher", "ok", f"{path}: {spec.kind}, {spec.image_px[0]}x{spec.image_px[1]} px, {levels}")


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:300] or type(err).__name__


def examine(store: str | None = None, teacher: str | None = None, ray_address: str | None = None) -> list[Finding]:
    """Everything that is asked for, in order of the table."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("gpu", _devices),
        ("disk", _disk),
    ]
    checks.append(("ray cluster", lambda: _ray_address(ray_address)))
    if store:
        checks.append(("store", lambda: _store(store)))
    if teacher:
        checks.append(("teacher", lambda: _teacher(teacher, "cpu")))
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as err:
            findings.append(
                Finding(
                    name, "wrong", f"{type(err).__name__}: {_line(err)}", "the check itself failed; please report it", 1
                )
            )
    return findings
