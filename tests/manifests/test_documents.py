"""Files that others wrote, and what may lie in their place: a value, or one sentence; never a traceback."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dtpipe.manifests.documents import Refusal, parse_json, parse_yaml, read_object, read_utf8
from dtpipe.manifests.errors import InputError

REFUSAL = Refusal(InputError, "give another")


def bomb() -> str:
    """Nine anchors, each nine times the one before: 3 kB that come to 9^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


def merges() -> str:
    """The same with `<<`, which PyYAML copies when it builds the mapping."""
    lines = ["a: &a {k: 1}"]
    for name, before in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10_000, "too deep"),
        ("{a: " * 10_000, "too deep"),
        ("- " * 10_000, "too deep"),
        ("\n".join(" " * depth + "a:" for depth in range(1000)), "too deep"),
        ("[" * 101 + "]" * 101, "too deep"),
        ("a: &a [*a]", "an anchor in line 1 holds itself"),
        ("b: 1\na: &a\n  b: *a", "an anchor in line 2 holds itself"),
        ("a: &a\n  <<: *a", "holds itself"),
        (bomb(), "anchors come to more than 200000 values"),
        (merges(), "anchors come to more than 200000 values"),
        ("a: " + "9" * 5000, "cannot be read .*4300 digits"),
        ("a: 0x" + "f" * 5000, "a number of 20000 bits"),
        ("a: 1" + ":59" * 3000, "a number of .* bits"),
        ("a: 2001-99-99", "cannot be read .*month"),
        ("a: !!bool x", "cannot be read"),
        ("a: !!int ''", "cannot be read"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML in line 1"),
        ("a: 1\nb: 2\na: 3", "key 'a' comes twice, again in line 3"),
        ("x:\n  a: {b: 1, b: 2}", "key 'b' comes twice, again in line 2"),
        ("a: \0", "not valid YAML"),
        ('a: "\\udce9"', "no Unicode"),
        ("a: [", "not valid YAML in line"),
        ("a: 1\n---\nb: 2", "not valid YAML in line"),
    ],
)
def test_yaml_that_nobody_means_is_refused_at_once(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError, match=rf"^the file: .*{words}.*; give another$"):
        parse_yaml(text, "the file", REFUSAL)
    assert time.process_time() - started < 2  # PyYAML takes 5 s over 10,000 brackets


@example("a: &a {b: 1}\nc: {<<: *a, d: *a}")
@example("? [a, b]\n: 1")
@given(st.text(alphabet="ab:-[]{}&*<!?|>'\" \n\t0x1._%@#,\0\\", max_size=60))
def test_yaml_reads_as_pyyaml_reads_it_or_is_refused(text: str) -> None:
    try:
        value = parse_yaml(text, "the file", REFUSAL)
    except InputError:
        return
    assert repr(value) == repr(yaml.safe_load(text))


def test_what_settings_are_made_of_is_read() -> None:
    document = parse_yaml("base: &b {lr: 4e-3, seed: 18446744073709551615}\nx: {<<: *b, on: ~}\n", "f", REFUSAL)
    assert document["x"] == {"lr": 0.004, "seed": 2**64 - 1, True: None}
    assert parse_yaml("", "f", REFUSAL) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "too deep"),
        ("[" * 101 + "]" * 101, "too deep"),
        ("9" * 5000, "not readable as JSON"),
        (str(2**64), "a number of 65 bits"),
        ('{"\\udce9": 1}', "no Unicode"),
        ("\0", "not readable as JSON"),
        ("", "not readable as JSON"),
    ],
)
def test_json_that_nobody_means_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"^the file: .*{words}.*; give another$"):
        parse_json(text, "the file", REFUSAL)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_link_into_nothing(path: Path) -> None:
    path.symlink_to("moved/away")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


def nothing(path: Path) -> None:
    """Leave the name free."""


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("x")


def latin_1(path: Path) -> None:
    path.write_bytes(b"caf\xe9")


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (a_folder, "is a folder, not a file"),
        (a_link_into_nothing, "is a link to moved/away, which is not there"),
        (a_link_to_itself, "is a link that leads back to itself"),
        (a_link_to_a_folder, "is a folder, not a file"),
        (nothing, "there is no such file"),
        (below_a_file, "there is no such file"),
        (latin_1, "is no UTF-8 text"),
    ],
)
@pytest.mark.parametrize("read", [read_utf8, read_object])
def test_what_lies_in_a_files_place_is_named(
    put: Callable[[Path], None], words: str, read: Callable[[Path, Refusal], object], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    put(path)
    with pytest.raises(InputError) as error:
        read(path, REFUSAL)
    assert str(error.value).startswith(f"{path}: {words}")
    assert str(error.value).endswith("; give another")


def test_a_name_with_a_nul_is_no_file() -> None:
    with pytest.raises(InputError, match="no file has a NUL in its name"):
        read_utf8(Path("a\0b"), REFUSAL)


def test_json_that_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]")
    with pytest.raises(InputError, match="holds a JSON list, not an object"):
        read_object(tmp_path / "file", REFUSAL)
