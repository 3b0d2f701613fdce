"""Chunks of rans decoded by Triton: the symbols of the compiled loops. On a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dtpipe.distill.stream import decode
from dtpipe.distill.stream.decode import SentLevels, keep_packed, unpacks_rans
from dtpipe.distill.stream.transfer import DeviceCopies
from dtpipe.distill.trainer import train
from dtpipe.manifests.codecs import rans_tables
from dtpipe.manifests.codecs.rans import compress, decompress
from dtpipe.manifests.codecs.rans_tables import fit_tables
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import ConcatDataset
from parts import golden
from parts.extractions import Extract
from parts.fits import fit_levels
from parts.memory import tiny_config
from parts.paths import REPO
from parts.runs import assert_equal_checkpoints

INTERPRETED = "TRITON_INTERPRET"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")
of_the_kernel = pytest.mark.skipif(
    DEVICE.type == "cpu" and INTERPRETED not in os.environ,
    reason="Triton has no device here; the last test runs this one in its interpreter",
)


def write(root: Path) -> FeatureDataset:
    levels, files = fit_levels(golden.LEVELS[::2])
    golden.write_shards(root, golden.Settings(num_rows=5, samples=3, levels=levels, fitted=files))
    return FeatureDataset.open(root)


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device takes chunks as they are stored, whatever it is."""
    monkeypatch.setattr(decode, "unpacks_rans", lambda _device: True)
    yield


@of_the_kernel
@pytest.mark.parametrize(("num", "lanes"), [(9, 1), (83, 8), (70, 32)])
def test_the_kernel_gives_the_symbols_of_the_loops(num: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtpipe.distill.stream.rans import device_tables, unpack_on_device

    monkeypatch.setattr(rans_tables, "_SYMBOLS_OF_A_LANE", max(1, num // lanes) if lanes > 1 else 2048)
    rng = np.random.default_rng(num)
    scales = np.linspace(25, 0.05, num)  # many symbols have no place in their table, and come as bytes of their own
    symbols = np.clip(np.rint(rng.laplace(0, scales, (6, num))), -128, 127).astype(np.int8)
    tables = fit_tables(symbols, (np.arange(num) * 4 // num).astype(np.uint8), 4)
    assert tables.lanes == lanes
    chunks = [compress(row, tables) for row in symbols]
    np.testing.assert_array_equal(decompress(chunks, tables), symbols)
    flipped = bytes([chunks[2][0] ^ 1]) + chunks[2][1:]
    chunks[1:5] = [chunks[1][:-1], flipped, b"", chunks[4] + b"\0"]
    data = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8).to(DEVICE)
    ends = torch.tensor(np.cumsum([len(chunk) for chunk in chunks])).to(DEVICE)
    found, whole = unpack_on_device(data, ends, device_tables(tables, DEVICE))
    assert whole.tolist() == [True, False, False, False, False, True]
    np.testing.assert_array_equal(found.cpu().numpy()[whole.cpu()], symbols[[0, 5]])


@of_the_kernel
def test_levels_that_cross_as_they_are_stored_become_the_same_features(tmp_path: Path, unpacking: None) -> None:
    dataset, copies = write(tmp_path), DeviceCopies(DEVICE)
    rows, names = dataset.columns.ok_rows, ("l2", "l4.b")
    views = np.arange(len(rows)) % 2
    plain = SentLevels.send(dataset.read(rows, names, views)[1], copies).receive(copies)
    keep_packed(dataset, DEVICE)
    sent = SentLevels.send(dataset.read(rows, names, views)[1], copies)
    sizes = [tensor.numel() for level in names for tensor in sent.pieces[level][0].parts.tensors.values()]
    assert "" not in sent.pieces["l2"][0].parts.tensors and sum(sizes) > 0
    for name, features in sent.receive(copies).items():
        assert torch.equal(features, plain[name])


@of_the_kernel
def test_a_chunk_that_is_none_gives_no_features(tmp_path: Path, unpacking: None) -> None:
    dataset, copies = write(tmp_path), DeviceCopies(DEVICE)
    keep_packed(dataset, DEVICE)
    rows = dataset.columns.ok_rows[:2]
    _, coded = dataset.read(rows, ("l2",), np.zeros_like(rows))
    coded.pieces["l2"][0].packed[""].data[0] ^= 1  # behind the checksums
    features = SentLevels.send(coded, copies).receive(copies)["l2"]
    assert features[0].isnan().all() and features[1].isfinite().all()


@of_the_kernel
def test_training_on_chunks_as_they_are_stored_takes_the_same_steps(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel and by the compiled loops: whole runs, weights and all."""
    from dtpipe.distill.stream import rans

    url = extract("coded", codec={"max_error": 0.1, "coder": "rans"}, max_bad=0)
    unpacked, runs = [], {}
    unpack = rans.unpack_on_device
    monkeypatch.setattr(rans, "unpack_on_device", lambda *args: unpacked.append(1) or unpack(*args))
    for name, packed in (("kernel", True), ("loops", False)):
        monkeypatch.setattr(decode, "unpacks_rans", lambda _device, packed=packed: packed)
        runs[name] = tiny_config(tmp_path / name, datasets=(url,), levels=("l3",), device=DEVICE.type)
        train(runs[name])
        assert bool(unpacked) == packed
        unpacked.clear()
    assert_equal_checkpoints(*(Path(config.run.out) / "last.pt" for config in runs.values()))


@of_the_kernel
def test_the_kernel_is_tried_before_it_is_relied_on():
    assert decode._builds_kernel(str(DEVICE))


def test_without_a_compiler_the_host_decodes_which_is_said_once(monkeypatch, caplog):
    """As in a container without gcc: Triton raises when it is first called."""
    from dtpipe.distill.stream import rans

    def fail(*_args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one via CC")

    monkeypatch.setattr(rans, "unpack_on_device", fail)
    decode._builds_kernel.cache_clear()
    assert not decode._builds_kernel("cpu") and not decode._builds_kernel("cpu")
    decode._builds_kernel.cache_clear()
    (said,) = caplog.messages
    assert "(Failed to find C compiler.); most often it needs a C compiler: install gcc" in said


def test_only_a_gpu_with_triton_takes_chunks_as_they_are_stored(tmp_path: Path, unpacking: None) -> None:
    assert not unpacks_rans(torch.device("cpu"))  # where the compiled loops are faster
    dataset = write(tmp_path)
    keep_packed(ConcatDataset([dataset]), torch.device("cpu"))
    assert dataset.keeps_packed
    rows = dataset.columns.ok_rows
    _, coded = dataset.read(rows, ("l2",), np.ones_like(rows))
    assert coded.pieces["l2"][0].packed
    dataset.keeps_packed = False  # whoever decodes on the host sees no difference
    _, plain = dataset.read(rows, ("l2",), np.ones_like(rows))
    np.testing.assert_array_equal(coded.decode()["l2"], plain.decode()["l2"])
    np.testing.assert_array_equal(coded.error()["l2"], plain.error()["l2"])


@pytest.mark.skipif(INTERPRETED in os.environ, reason="this is the interpreter")
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more than the compiler does."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dtpipe.distill.stream.rans import _KERNEL

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"data": "u8", "starts": "i64", "ends": "i64", "entries": "i32", "classes": "u8", "out": "i8"}
    signature = {name: f"*{kind}" for name, kind in (pointers | {"whole": "i8"}).items()}
    signature |= {"num_chunks": "i32", "num": "i32"}
    constants = {"lanes": 8, "at_once": 4, "total": 4096, "escape": 63, "reach": 31}
    names = [*signature, *constants]
    source = ASTSource(
        _KERNEL,
        signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    assert len(compiled.asm["cubin"]) > 1000


@pytest.mark.skipif(INTERPRETED in os.environ, reason="this is the interpreter")
def test_the_kernel_in_tritons_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "kernel_gives or levels_that or none_gives or training_on",
    ]
    environment = {**os.environ, INTERPRETED: "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, __file__], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
