"""Compiled teachers: the same features, taps and early stop; what does not fit runs as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers.diffusion.ddpm import load_ddpm_teacher
from dtpipe.extract.teachers.diffusion.unet import DiffusionTeacher
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import ViewSpec

PX = 32
VIEWS = [ViewSpec(draw=0, timestep=50)]
Load = Callable[..., DiffusionTeacher]
pytestmark = pytest.mark.usefixtures("dynamo")


@pytest.fixture
def load(ddpm: Path) -> Load:
    def loaded(dtype: str = "float32", taps: dict[str, str] | None = None, **options: Any) -> DiffusionTeacher:
        config = {"path": str(ddpm), "dtype": dtype, "taps": taps, "options": options}
        return load_ddpm_teacher(TeacherConfig.model_validate(config))

    return loaded


def inputs(batch: int = 2, px: int = PX) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, 3, px, px), generator=generator) * 2 - 1, {
        "forward": torch.randn((batch, 1, 3, px, px), generator=generator)
    }


def encode(teacher: DiffusionTeacher, batch: int = 2, px: int = PX) -> dict[str, torch.Tensor]:
    images, noise = inputs(batch, px)
    return teacher.encode(images, noise, VIEWS)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, level in wanted.items():
        torch.testing.assert_close(found[name], level, rtol=0, atol=tolerance * float(level.float().abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_features_are_those_of_the_plain_network(load: Load, graphs: list[Any], dtype: str) -> None:
    teacher = load(dtype, compile=True)
    wanted = encode(load(dtype))
    for _ in range(2):
        assert_close(encode(teacher), wanted)
    assert len(graphs) >= 5


def test_the_pass_still_stops_at_the_last_tap(load: Load, graphs: list[Any]) -> None:
    run: list[str] = []
    teacher = load(compile=True, taps={"l3": "up_blocks.0.resnets.1"})
    for path, module in teacher.unet.named_modules():
        if path.startswith("up_blocks.") and path.count(".") == 3:
            module.register_forward_hook(lambda _m, _i, _o, path=path: run.append(path))
    assert_close(encode(teacher), encode(load(taps={"l3": "up_blocks.0.resnets.1"})))
    assert run == ["up_blocks.0.resnets.0", "up_blocks.0.resnets.1"]


def test_a_layer_with_a_tap_inside_is_left_alone(load: Load, graphs: list[Any]) -> None:
    """A hook inside a compiled layer would not be seen in the second pass."""
    taps = {"l3": "up_blocks.0.resnets.1.conv1", "l2": "up_blocks.1.resnets.1"}
    teacher, wanted = load(compile=True, taps=taps), encode(load(taps=taps))
    for _ in range(3):
        assert_close(encode(teacher), wanted)
    changed = [path for path, module in teacher.unet.named_modules() if "forward" in vars(module)]
    assert "up_blocks.0.resnets.1" not in changed and "up_blocks.1.resnets.1" in changed


def test_batches_of_another_size_compile_nothing(load: Load, graphs: list[Any]) -> None:
    teacher, plain = load(compile=True), load()
    encode(teacher)
    num = len(graphs)
    for batch, px in ((1, PX), (3, PX), (2, 2 * PX)):
        assert_close(encode(teacher, batch, px), encode(plain, batch, px), 1e-6)
    encode(teacher)
    assert len(graphs) == num


def test_no_layer_falls_back_because_there_are_many(load: Load, graphs: list[Any]) -> None:
    """torch gives up on a function after some recompilations; layers of one class are one function to it."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        encode(load(compile=True))
    assert len(graphs) > 1


def test_the_recipe_says_so(load: Load) -> None:
    assert load(compile=True).spec.options == load().spec.options | {"compile": True}


def test_a_compiler_that_fails_is_one_sentence(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand more")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiler(forward, backend=broken, **options))
    with pytest.raises(
        TeacherError, match=r"torch.compile fails here \(.*\); leave out extract\.teacher\.options\.compile"
    ) as caught:
        encode(load(compile=True))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_compiled_for_good_it_gives_the_same_dataset_twice(
    load: Load, make_config: Any, ddpm: Path, tmp_path: Path
) -> None:
    """With the real compiler; 1e-5 covers sums in another order."""
    assert_close(encode(load(compile=True)), encode(load()))
    teacher = {"path": str(ddpm), "options": {"compile": True}, "taps": {"l2": "down_blocks.2.resnets.0"}}
    digests = {run_extraction(make_config(teacher=teacher, out=str(tmp_path / name))).digest for name in "ab"}
    assert len(digests) == 1
