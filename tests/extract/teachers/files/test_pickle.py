"""Pickles made to run code: each kind of call that the format has is refused, and nothing runs."""

from __future__ import annotations

import copyreg
import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtpipe.extract.teachers.files.pickle import Record, Symbol, numpy_array, read_pickle, read_pickles
from dtpipe.extract.teachers.stylegan2.files import NAMES, read_checkpoint
from dtpipe.manifests.errors import TeacherError


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that a payload would create."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def payloads(trap: Path) -> dict[str, bytes]:
    """One pickle per way to run something."""
    shell = f"touch {trap}"
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    argument = text(shell) + b"\x85"  # a tuple of one
    evaluate = named("builtins", "eval") + text(code) + b"\x85R"
    return {
        "GLOBAL": b"cos\nsystem\n" + argument + b"R.",
        "GLOBAL of protocol 0": b"cposix\nsystem\n(S'" + shell.encode() + b"'\ntR.",
        "STACK_GLOBAL": b"\x80\x04" + named("os", "system") + argument + b"R.",
        "eval": b"\x80\x04" + evaluate + b".",
        "exec": b"\x80\x04" + named("builtins", "exec") + text(code) + b"\x85R.",
        "dotted name": b"\x80\x04"
        + named("collections", "OrderedDict.fromkeys.__class__.__base__")
        + b")R"
        + evaluate
        + b".",
        "attribute of an allowed module": b"\x80\x04"
        + named("torch", "storage._load_from_bytes")
        + evaluate
        + b"\x85R.",
        "getattr": b"\x80\x04"
        + named("builtins", "getattr")
        + named("os", "system")
        + text("__call__")
        + b"\x86R"
        + argument
        + b"R.",
        "importlib": b"\x80\x04" + named("importlib", "import_module") + text("os") + b"\x85R.",
        "torch.load": b"\x80\x04" + named("torch.serialization", "load") + argument + b"R.",
        "INST": b"(" + text(shell) + b"ios\nsystem\n.",
        "OBJ": b"(" + named("os", "system") + text(shell) + b"o.",
        "NEWOBJ": b"\x80\x04" + named("subprocess", "Popen") + argument + b"\x81.",
        "NEWOBJ_EX": b"\x80\x04" + named("subprocess", "Popen") + argument + b"}\x92.",
        "NEWOBJ_EX of an allowed class": b"\x80\x04"
        + named("collections", "OrderedDict")
        + b")}\x92"
        + evaluate
        + b"0.",
        "BUILD": b"\x80\x04" + named("collections", "OrderedDict") + b")R" + evaluate + b"b.",
        "BUILD of a class": b"\x80\x04"
        + named("collections", "OrderedDict")
        + b"N}"
        + text("__init__")
        + evaluate
        + b"s\x86b.",
        "persistent id": b"\x80\x04" + text(shell) + b"Q.",
        "persistent id of protocol 0": b"P" + shell.encode() + b"\n.",
        "EXT1": b"\x80\x04\x82\xf1" + argument + b"R.",
        "EXT2": b"\x80\x04\x83\xf1\x00" + argument + b"R.",
        "EXT4": b"\x80\x04\x84\xf1\x00\x00\x00" + argument + b"R.",
        "a value that is called": b"\x80\x04" + text("os.system") + argument + b"R.",
        "a call of what a call gave": b"\x80\x04"
        + named("torch_utils.persistence", "_reconstruct_persistent_obj")
        + b"}\x85R"
        + argument
        + b"R.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "in the arguments of an allowed call": b"\x80\x04" + named("builtins", "set") + evaluate + b"\x85R.",
        "module source": b"\x80\x04" + named("types", "ModuleType") + text(code) + b"\x85R.",
    }


CASES = sorted(payloads(Path("x")))
NEEDS_MORE = {  # what pickle alone does not run: it needs a loader's hook, a package, or a class with such a __new__
    "NEWOBJ",
    "NEWOBJ_EX",
    "a call of what a call gave",
    "a value that is called",
    "importlib",
    "module source",
    "out-of-band buffer",
    "persistent id",
    "persistent id of protocol 0",
    "torch.load",
}


@pytest.fixture
def extension() -> Iterator[None]:
    """A registered extension code, which pickle looks up without asking for a class."""
    copyreg.add_extension("os", "system", 0xF1)
    yield
    copyreg.remove_extension("os", "system", 0xF1)


@pytest.mark.parametrize("case", CASES)
def test_a_payload_is_refused_and_not_run(case: str, trap: Path, tmp_path: Path, extension: None) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(payloads(trap)[case])
    with pytest.raises(TeacherError, match=r"evil.pkl: the pickle .* nothing in it was run") as refused:
        read_pickle(path, NAMES)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("case", sorted(set(CASES) - NEEDS_MORE))
def test_the_payloads_are_live(case: str, tmp_path: Path, extension: None) -> None:
    """Otherwise the test above would prove nothing."""
    trap = tmp_path / "live"
    with suppress(Exception):  # what comes after the call may fail
        pickle.loads(payloads(trap)[case])
    assert trap.exists()


def test_a_name_cannot_reach_through_an_attribute() -> None:
    """Even where the whole is spelt like an allowed name."""
    with pytest.raises(TeacherError, match=r"asks for torch.storage._load_from_bytes"):
        read_pickles(b"\x80\x04" + named("torch", "storage._load_from_bytes") + b".", 1, NAMES, "here")
    (found,), _ = read_pickles(b"\x80\x04" + named("torch.storage", "_load_from_bytes") + b".", 1, NAMES, "here")
    assert found == Symbol("torch.storage._load_from_bytes")


def test_every_opcode_is_known_or_refused(tmp_path: Path) -> None:
    """No opcode that finds, calls or makes something is taken, apart from the five that are recorded only."""
    from dtpipe.extract.teachers.files import pickle as module

    taken = {*module._CONSTANTS, *module._NEW, *module._GIVEN, *module._STEPS, *module._IGNORED}
    assert {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"} <= taken
    assert not taken & {
        "INST",
        "OBJ",
        "NEWOBJ_EX",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "NEXT_BUFFER",
        "READONLY_BUFFER",
        "STRING",
        "INT",
    }


class Thing:
    """Stands for a class of others."""

    def __init__(self) -> None:
        self.values = [1, 2.5, "three", b"four", None, True, {"five": (6,)}, (1, 2, 3, 4), {"a"}]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_come_back_as_pickle_gives_them(protocol: int, tmp_path: Path) -> None:
    content = {
        "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf")],
        "texts": ["", "é" * 300, "x" * 70000],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": {"a": {"b": [None, True, False]}},
        "ordered": OrderedDict([("x", 1), ("y", 2)]),
    }
    if protocol > 2:
        content["bytes"] = [b"", b"abc", b"z" * 300, b"z" * 70000]
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert read_pickle(path, NAMES) == content


def test_an_object_is_what_it_would_have_been_made_from(tmp_path: Path) -> None:
    path = tmp_path / "thing.pkl"
    path.write_bytes(pickle.dumps([Thing()] * 2, 4))
    first, second = read_pickle(path, frozenset({f"{__name__}.Thing"}))
    assert isinstance(first, Record) and first is second
    assert (first.name, first.args) == (f"{__name__}.Thing", ())
    assert first.state == vars(Thing())


def test_long_byte_strings_are_views_and_the_rest_follows() -> None:
    data = pickle.dumps(b"q" * 9000, 4) + pickle.dumps("next", 4) + b"raw"
    (first, second), rest = read_pickles(data, 2, frozenset(), "here")
    assert isinstance(first, memoryview) and bytes(first) == b"q" * 9000
    assert (second, bytes(rest)) == ("next", b"raw")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(3, dtype=">f4"),
        np.float64(2.5),
        np.zeros((0, 3), np.float32),
        np.arange(5000, dtype=np.int64),
    ],
)
def test_arrays_of_numbers_are_read(array: Any) -> None:
    (record,), _ = read_pickles(pickle.dumps(array, 4), 1, NAMES, "here")
    assert np.array_equal(numpy_array(record, "here"), array)


@pytest.mark.parametrize(
    "array", [np.array([Thing(), 1], dtype=object), np.array(["text"]), np.array([("a", 1)], dtype="U1,i4")]
)
def test_arrays_of_other_things_are_refused(array: Any) -> None:
    with pytest.raises(TeacherError, match="here: "):
        (record,), _ = read_pickles(pickle.dumps(array, 4), 1, NAMES | {f"{__name__}.Thing"}, "here")
        numpy_array(record, "here")


@pytest.mark.parametrize(
    "found", [None, "text", Symbol("numpy.ndarray"), Record("numpy.core.multiarray._reconstruct", (), ())]
)
def test_what_is_no_array_is_refused(found: object) -> None:
    with pytest.raises(TeacherError, match="no array of numbers"):
        numpy_array(found, "here")


HUGE = struct.pack("<Q", 1 << 62)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        b"\x80\x04.",
        b"\x80\x04NN.",
        b"\x80\x04N",
        b"\x80\x04h\x05.",
        b"\x80\x04(K\x01K\x02",
        b"\x80\x04t.",
        b"\x80\x04\x85.",
        b"\x80\x04a.",
        b"\x80\x04]K\x01s.",
        b"\x80\x04}(K\x01u.",
        b"\x80\x04R.",
        b"\x80\x04K\x01K\x02\x93.",
        b"\x80\x04\x8e" + HUGE + b"x.",
        b"\x80\x04\x8d" + HUGE + b"x.",
        b"\x80\x04T\x10\x27\x00\x00" + b"s" * 10000 + b".",
        b"\x80\x04\x8b\x01\x00\x00\x00",
        b"\x80\x04}]K\x01s.",
        b"\x80\x04K\x01K\x02b.",
        b"cno newline",
        pickle.dumps({"whole": list(range(1000))}, 4)[:-7],
    ],
)
def test_nonsense_is_one_clear_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.pkl"
    path.write_bytes(data)
    with pytest.raises(TeacherError, match=r"broken.pkl: ") as refused:
        read_pickle(path, NAMES)
    assert "\n" not in str(refused.value)


DEEP = b")" + b"\x85" * 200_000
"""Tuples in tuples, which Python ends without a word for when it hashes them."""
DEEP_LIST = b"]" * 5000 + b"a" * 4999
"""Lists in lists, which Python cannot show."""


@pytest.mark.parametrize(
    "data",
    [DEEP, b"]" + DEEP + b"a", b"}" + DEEP + b"K\x01s", b")\x940" + b"(h\x00h\x00t" * 2 + b"\x86" + b"\x85" * 16],
)
def test_tuples_too_deep_to_be_hashed_are_refused(data: bytes) -> None:
    with pytest.raises(TeacherError, match="nests more than 16 tuples"):
        read_pickles(b"\x80\x04" + data + b".", 1, NAMES, "here")
    (found,), _ = read_pickles(b"\x80\x04)" + b"\x85" * 15 + b".", 1, NAMES, "here")
    assert repr(found).count("(") == 16


def test_a_key_that_holds_other_values_is_refused() -> None:
    with pytest.raises(TeacherError, match="has a tuple as a key"):
        read_pickles(b"\x80\x04})\x85K\x01s.", 1, NAMES, "here")


def _tensorflow(variables: bytes, components: bytes) -> bytes:
    """A StyleGAN2 of TensorFlow, as far as it is read before these parts."""
    settings = text("version") + b"K\x04" + text("static_kwargs") + b"}"
    state = b"}(" + settings + text("variables") + variables + text("components") + components + b"u"
    return named("dnnlib.tflib.network", "Network") + b")\x81" + state + b"b\x94h\x00h\x00\x87."


def _persistent(class_name: bytes) -> bytes:
    parts = b"}(" + b"".join(text(name) + b"}" for name in ("_parameters", "_buffers", "_modules")) + b"u"
    module = named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}("
    return b"}" + text("G_ema") + module + text("class_name") + class_name + text("state") + parts + b"u\x85Rs."


@pytest.mark.parametrize("deep", [DEEP, DEEP_LIST], ids=["tuples", "lists"])
@pytest.mark.parametrize("place", ["a class", "a variable", "a component"])
def test_a_name_too_deep_to_be_shown_is_one_clear_error(place: str, deep: bytes, tmp_path: Path) -> None:
    pair = b"](" + deep + b"K\x01\x86e"
    content = {
        "a class": lambda: _persistent(deep),
        "a variable": lambda: _tensorflow(pair, b"}"),
        "a component": lambda: _tensorflow(b"]", pair),
    }[place]()
    path = tmp_path / "deep.pkl"
    path.write_bytes(b"\x80\x04" + content)
    with pytest.raises(TeacherError, match=r"deep.pkl: ") as refused:
        read_checkpoint(path, ema=True)
    assert "\n" not in str(refused.value)


def test_numbers_of_a_type_without_a_name_are_refused() -> None:
    dtype = Record("numpy.dtype", (((),),), (3, "<"))
    with pytest.raises(TeacherError, match="numbers of type a tuple"):
        numpy_array(Record("numpy.core.multiarray.scalar", (dtype, b"")), "here")


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="cannot be read"):
        read_pickle(tmp_path / "missing.pkl", NAMES)


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_never_give_another_kind_of_error(seed: int) -> None:
    stream = io.BytesIO()
    pickle.dump({"a": OrderedDict(x=np.arange(40.0)), "b": [(1, "two", b"three" * 100)] * 3}, stream, 4)
    random = np.random.Generator(np.random.Philox(seed))
    for _ in range(150):
        data = bytearray(stream.getvalue())
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(0, 256)
        try:
            read_pickles(bytes(data), 1, NAMES, "here")
        except TeacherError as err:
            assert str(err).startswith("here: ")
