"""Files of weights: names that training wrapped, shards, and files that claim more memory than they can need."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.files.names import names_tensors, plain_names
from dtpipe.extract.teachers.files.torch_files import MOST_TIMES, SPARE_BYTES
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights, weights_digest
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import TeacherError
from parts.teachers import write_ddpm

Weights = dict[str, Tensor]
TENSORS: Weights = {"linear.weight": torch.arange(6.0).reshape(2, 3), "blocks.0.bias": torch.ones(2)}


def same(found: Weights, wanted: Weights) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# Names that training wrapped

WRAPPED: dict[str, Callable[[str], str]] = {
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled, then DistributedDataParallel": lambda name: f"module._orig_mod.{name}",
    "DistributedDataParallel, then compiled": lambda name: f"_orig_mod.module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "a moving average of a parallel model": lambda name: f"ema_model.module.{name}",
    "FSDP of parts": lambda name: name.replace(".", "._fsdp_wrapped_module.", 1),
    "a compiled part": lambda name: name.replace("blocks.", "blocks._orig_mod."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_wrappers_are_taken_off_names(wrapper: str, ending: str, tmp_path: Path) -> None:
    wrapped = {WRAPPED[wrapper](name): tensor for name, tensor in TENSORS.items()}
    path = tmp_path / f"x{ending}"
    save_file(wrapped, path) if ending == ".safetensors" else torch.save(wrapped, path)
    read = read_weights(path)
    assert same(read, TENSORS)
    assert weights_digest(read) == weights_digest(TENSORS)
    if wrapper not in ("FSDP of parts", "a compiled part") or ending == ".safetensors":
        assert names_tensors(path, TENSORS)


@pytest.mark.parametrize(
    "names",
    [
        ["module.a", "head.b"],  # not all
        ["module", "module.a"],  # one is the word itself
        ["modules.a", "modules.b"],
        ["first_stage_model.a", "first_stage_model.b"],
        [],
    ],
)
def test_names_that_no_wrapper_made_stay(names: list[str]) -> None:
    assert plain_names(names) == {name: name for name in names}


def test_a_word_that_the_network_has_itself_stays() -> None:
    assert plain_names(["module.model.a", "module.model.b"], ["model.a"]) == {
        "module.model.a": "model.a",
        "module.model.b": "model.b",
    }


def test_longer_names_are_not_taken_for_wrapped_ones(tmp_path: Path) -> None:
    torch.save({"xmodule.linear.weight": torch.ones(1), "module.linear.weight_g": torch.ones(1)}, tmp_path / "x.pt")
    assert not names_tensors(tmp_path / "x.pt", ["linear.weight"])


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    torch.save({"a._orig_mod.b": torch.ones(1), "a.b": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=r"holds a\.b twice, once as a\.b"):
        read_weights(tmp_path / "x.pt")


def test_a_wrapped_teacher_is_the_same_teacher(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "plain", channels=(8, 8, 8))
    path = Path(shutil.copytree(tmp_path / "plain", tmp_path / "wrapped")) / "unet"
    stored = read_weights(path / "diffusion_pytorch_model.safetensors")
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in stored.items()}, path / "w.safetensors")
    (path / "w.safetensors").replace(path / "diffusion_pytorch_model.safetensors")
    plain, wrapped = (load_teacher(TeacherConfig(path=str(tmp_path / name))).spec for name in ("plain", "wrapped"))
    assert plain == wrapped


# Shards


def write_shards(folder: Path, ending: str = "safetensors") -> Path:
    """A tensor each, every name wrapped."""
    places = {f"module.{name}": f"w-{idx}.{ending}" for idx, name in enumerate(TENSORS)}
    for (name, file), tensor in zip(places.items(), TENSORS.values(), strict=True):
        save_file({name: tensor}, folder / file) if ending == "safetensors" else torch.save(
            {name: tensor}, folder / file
        )
    index = folder / f"w.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(ending: str, tmp_path: Path) -> None:
    assert same(read_weights(write_shards(tmp_path, ending)), TENSORS)


def test_an_index_and_its_shards_must_fit(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    (tmp_path / "w-1.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"1 of 2 files that it names are not there \('w-1\.safetensors'\)"):
        read_weights(index)
    save_file({"module.other": torch.ones(1)}, tmp_path / "w-1.safetensors")
    with pytest.raises(
        TeacherError, match=r"w-1\.safetensors: .*module\.blocks\.0\.bias is missing; module\.other is un"
    ):
        read_weights(index)
    for name in ("x" * 300, "x\0"):  # no file can be called so
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(TeacherError, match="1 of 1 files that it names are not there"):
            read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(TeacherError, match="which is no file beside it"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(TeacherError, match="has no weight_map"):
        read_weights(index)


# Memory


def deflate(path: Path) -> None:
    """Pack the members of a zip archive again."""
    with zipfile.ZipFile(path) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name, data in members.items():
            packed.writestr(name, data)


def test_a_packed_file_of_weights_is_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    deflate(tmp_path / "x.pt")
    assert same(read_weights(tmp_path / "x.pt"), TENSORS)


def test_a_file_that_unpacks_to_more_than_its_size_allows_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        packed.writestr("x/data/0", bytes(SPARE_BYTES + 1))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    size = (tmp_path / "x.pt").stat().st_size
    assert size < 1 << 20
    with pytest.raises(TeacherError, match=rf"has {size:,} bytes and claims 67,.* in memory .*; at most 67,108,864"):
        read_weights(tmp_path / "x.pt")


def test_tensors_that_repeat_a_number_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(SPARE_BYTES)}, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=rf"claims 268,435,456 in memory \(its tensors repeat .*{MOST_TIMES} times"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:.*([Ss]parse|quantize)")
@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised values"),
        (lambda: torch.ones(3, device="meta"), "values on no device"),
        (lambda: torch.eye(3).to_sparse(), "a torch.sparse_coo layout"),
    ],
)
def test_tensors_that_are_no_arrays_of_numbers_are_refused(
    make: Callable[[], Tensor], problem: str, tmp_path: Path
) -> None:
    torch.save({"a": make()}, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=f"a has {problem}; save the weights as dense"):
        read_weights(tmp_path / "x.pt")


def test_a_checkpoint_of_training_is_refused_naming_what_it_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 3, "optimizer": {"lr": 1}}, tmp_path / "x.ckpt")
    with pytest.raises(TeacherError, match=r"than named tensors \(its entries 'state_dict' do: save one of them"):
        read_weights(tmp_path / "x.ckpt")
    torch.save({0: torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(TeacherError, match="holds other things than named tensors;"):
        read_weights(tmp_path / "x.ckpt")


# Into a network


def test_a_network_without_memory_gets_it_with_its_weights() -> None:
    with torch.device("meta"):
        network = nn.Linear(3, 2)
    tensors = {"weight": torch.arange(6.0).reshape(3, 2).t(), "bias": torch.ones(2, dtype=torch.float16)}
    load_strictly(network, tensors, Path("x"))
    assert torch.equal(network.weight, tensors["weight"]) and network.weight.is_contiguous()
    assert network.bias.dtype == torch.float32
    tensors["weight"].zero_()
    assert network.weight.any()  # a copy


def test_a_network_with_a_wrappers_word_of_its_own_gets_its_weights(tmp_path: Path) -> None:
    network = nn.Sequential()
    network.add_module("model", nn.Linear(3, 2))
    stored = {"module.model.weight": TENSORS["linear.weight"], "module.model.bias": torch.ones(2)}
    torch.save(stored, tmp_path / "x.pt")
    load_strictly(network, read_weights(tmp_path / "x.pt"), tmp_path / "x.pt")
    assert torch.equal(network.state_dict()["model.weight"], TENSORS["linear.weight"])
    with pytest.raises(TeacherError, match=r"model\.bias is missing"):
        load_strictly(network, {"weight": TENSORS["linear.weight"]}, Path("x"))


def test_a_vector_of_one_number_is_a_scalar_and_no_other_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.zeros(()))

    network = Scaled()
    load_strictly(network, {"gamma": torch.tensor([2.0])}, Path("x"))
    assert network.gamma == 2
    for gamma in (torch.ones(2), torch.ones(1, 1)):
        with pytest.raises(TeacherError, match=r"gamma has shape .*, the network asks for \(\)"):
            load_strictly(network, {"gamma": gamma}, Path("x"))


# Pickles that would end or fill the process


ENDLESS = b"\x80\x02}(" + b")" + b"\x85" * 10**6 + b"K\x01u."  # tuples within tuples, as a key
LARGE = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."


@pytest.mark.parametrize("form", ["zip", "torch's old format"])
@pytest.mark.parametrize(
    ("pickle", "said"), [(ENDLESS, "nests more than 16 tuples"), (LARGE, "asks for a byte array")], ids=["key", "array"]
)
def test_a_pickle_that_would_end_or_fill_the_process_is_refused(
    form: str, pickle: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    torch.save(TENSORS, tmp_path / "whole.pt", _use_new_zipfile_serialization=form == "zip")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "whole.pt") as archive, zipfile.ZipFile(path, "w") as other:
            for member in archive.infolist():
                other.writestr(member, pickle if member.filename.endswith("data.pkl") else archive.read(member))
    else:
        whole = (tmp_path / "whole.pt").read_bytes()
        heads = [whole.index(b".\x80", start) + 1 for start in (0, 20)]  # of the version and the protocol
        head = whole[: whole.index(b".\x80", heads[1] + 10) + 1]  # .. and what was said of the machine
        path.write_bytes(head + pickle + b"\x80\x02].")
    with pytest.raises(TeacherError, match=rf"x\.pt: holds a pickle that {said}.*nothing in it was run"):
        read_weights(path)
