"""What the presets' headers count with: operations and bytes per image of the paper's teachers and students.

Operations are counted by torch, two per multiply-add, on networks of full size without trained weights: a teacher up
to its last tap, a student with its regressor three times forward, as forward and backward cost. Bytes are those of one
stored sample. What a training step keeps for its backward pass is measured on the CPU, in bfloat16 as on a GPU. Hours
in the headers are these figures over assumed rates.

    python benchmarks/preset_costs.py [--out-json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, publish
from full_size import ADM_IMAGENET, SD_UNET, SD_VAE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dtpipe.distill.config import DistillRecipeConfig, RegressorConfig, StudentConfig
from dtpipe.distill.losses.features import feature_loss
from dtpipe.distill.student.distiller import build_distiller
from dtpipe.extract.recipe import stored_levels
from dtpipe.extract.teachers.base import TapSpec
from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, TapReader, decoder_layers, find_levels
from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.write.plan import bytes_per_sample

GIGA = 1e9
BACKWARD = (
    3  # operations of forward and backward over those of forward; torch miscounts the backward of grouped convolutions
)
Px = tuple[int, int]


@dataclass(frozen=True)
class TeacherCost:
    """One teacher at the size of a preset."""

    image_px: Px
    student_px: Px
    levels: tuple[LevelSpec, ...]
    gflop: Mapping[str, float]
    """Per image and view: to the last tap, and what else there is."""

    def to_json(self) -> dict[str, Any]:
        stored = {f"bytes_{views}": bytes_per_sample(self.levels, views, self.image_px) for views in (1, 2)}
        levels = {level.name: [level.channels, level.height, level.width] for level in self.levels}
        return {
            "image_px": self.image_px,
            "student_px": self.student_px,
            "levels": levels,
            "gflop": dict(self.gflop),
            **stored,
        }


def gflop_of(run: Callable[[], object]) -> float:
    """Billions of operations of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return round(int(counter.get_total_flops()) / GIGA, 1)


def unet_cost(
    unet: Any, inputs: Sequence[Any], image_px: Px, student_px: Px
) -> tuple[tuple[TapSpec, ...], float, float]:
    """Taps by stride of the student's image, operations to the last of them, and of the whole pass."""
    scale = image_px[0] // student_px[0]
    strides = [stride * scale for stride in DEFAULT_STRIDES]

    def forward() -> object:
        return unet(*inputs)

    with torch.inference_mode():
        taps = find_levels(unet, forward, image_px[1], decoder_layers(unet), strides)
        reader = TapReader(unet, {name: tap.tap for name, tap in taps.items()})
        return tuple(taps.values()), gflop_of(lambda: reader.read(forward)), gflop_of(forward)


def adm(widths: Sequence[int], attention: Sequence[bool], head_channels: int, px: Px) -> TeacherCost:
    """A guided-diffusion network in the options of the published 256 px ones."""
    from dtpipe.extract.teachers.diffusion.adm.layout import AdmLayout, AdmSettings
    from dtpipe.extract.teachers.diffusion.adm.network import AdmNetwork

    layout = AdmLayout(**{**ADM_IMAGENET, "widths": tuple(widths), "attention": tuple(attention)})  # type: ignore[arg-type]
    with torch.device("meta"):
        unet = AdmNetwork(layout, AdmSettings(head_channels, False, "linear", px))
        taps, tapped, whole = unet_cost(unet.eval(), (torch.zeros(1, 3, *px), 0), px, px)
    return TeacherCost(px, px, stored_levels(taps, px, px, "float16"), {"tapped": tapped, "whole": whole})


def stable_diffusion(px: Px) -> TeacherCost:
    """Stable Diffusion 1.4: the VAE's encoder, and the U-Net on its latent."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    student_px = (px[0] // 2, px[1] // 2)
    with torch.device("meta"):
        unet, encoder = UNet2DConditionModel(**SD_UNET).eval(), AutoencoderKL(**SD_VAE).encoder.eval()
        inputs = (torch.zeros(1, 4, px[0] // 8, px[1] // 8), 0, torch.zeros(1, 77, 768))
        taps, tapped, _ = unet_cost(unet, inputs, px, student_px)
        vae = gflop_of(lambda: encoder(torch.zeros(1, 3, *px)))
    return TeacherCost(px, student_px, stored_levels(taps, px, student_px, "float16"), {"tapped": tapped, "vae": vae})


def biggan(condition: int, attention_px: int) -> TeacherCost:
    """BigGAN of 256 px and width 96, as DeepMind's and IC-GAN's."""
    from dtpipe.extract.teachers.biggan.network import BigGanLayout, BigGanNetwork
    from dtpipe.extract.teachers.biggan.teacher import _block_levels

    widths = tuple(96 * factor for factor in (16, 16, 8, 8, 4, 2, 1))
    layout = BigGanLayout(
        4, widths, tuple(side == attention_px for side in (8, 16, 32, 64, 128, 256)), 20, condition, True
    )
    network = BigGanNetwork(layout, 1e-5).eval().requires_grad_(False)
    with torch.inference_mode():
        cost = gflop_of(lambda: network(torch.zeros(1, layout.z_size), torch.zeros(1, condition)))
    taps = sorted(
        (level for level in _block_levels(layout) if level.stride in DEFAULT_STRIDES), key=lambda level: level.stride
    )
    return TeacherCost(
        (256, 256), (256, 256), stored_levels(tuple(taps), (256, 256), (256, 256), "float16"), {"tapped": cost}
    )


def stylegan2(px: Px) -> TeacherCost:
    """StyleGAN2's config-f, its constant as many times higher or wider than 4x4 as the image is not square."""
    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout, StyleGan2Network

    num_blocks = (min(px) // 4).bit_length()
    widths = tuple(min(512, 32768 // (4 << idx)) for idx in range(num_blocks))
    base_px = (px[0] >> num_blocks - 1, px[1] >> num_blocks - 1)
    layout = StyleGan2Layout(512, 512, 0, 0, (512,) * 8, base_px, widths)
    network = StyleGan2Network(layout).eval().requires_grad_(False)
    maps = [torch.zeros(1, 1, *side) for side in layout.noise_px]
    with torch.inference_mode():
        cost = gflop_of(lambda: network.synthesis(network.styles(torch.zeros(1, 512), None), maps))
    blocks = ((stride, num_blocks - stride.bit_length()) for stride in DEFAULT_STRIDES)
    taps = tuple(
        TapSpec(f"l{stride.bit_length() - 1}", stride, widths[idx], f"synthesis.b{4 << idx}.conv1")
        for stride, idx in blocks
    )
    return TeacherCost(px, px, stored_levels(taps, px, px, "float16"), {"tapped": cost})


TEACHERS: dict[str, Callable[[], TeacherCost]] = {
    "adm_256": lambda: adm((256, 256, 512, 512, 1024, 1024), (False,) * 3 + (True,) * 3, 64, (256, 256)),
    "adm_bdd100k": lambda: adm((128, 128, 256, 256, 384, 512), (False,) * 3 + (True,) * 2 + (False,), 32, (128, 256)),
    "sd_1_4": lambda: stable_diffusion((512, 512)),
    "biggan_256": lambda: biggan(128, 128),
    "icgan_256": lambda: biggan(512, 64),
    "stylegan2_bdd100k": lambda: stylegan2((512, 1024)),
}
STUDENTS = [
    *(("resnet50", "adm_256", kind) for kind in ("fpn_ppm", "fpn", "fpn_attention", "pafpn")),
    ("convnext_base", "adm_256", "fpn_ppm"),
    *(("resnet50", teacher, "fpn_ppm") for teacher in ("adm_bdd100k", "sd_1_4", "biggan_256", "stylegan2_bdd100k")),
]


def student_cost(name: str, teacher: TeacherCost, kind: str) -> dict[str, Any]:
    """Operations of a training step per image, and what its forward pass keeps for each image more."""
    config = DistillRecipeConfig(student=StudentConfig(name=name), regressor=RegressorConfig(kind=kind))
    network = build_distiller(config, teacher.levels, teacher.student_px).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        forward = gflop_of(lambda: network.eval()(torch.zeros(1, 3, *teacher.student_px)))
    few, more = (kept_bytes(network.train(), config, teacher, num) for num in (2, 3))  # batch norm needs two
    return {"gflop": round(BACKWARD * forward, 1), "kept_mib": round((more - few) / 2**20)}


def kept_bytes(network: nn.Module, config: DistillRecipeConfig, teacher: TeacherCost, num: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of so many images."""
    targets = {level.name: torch.randn(num, level.channels, level.height, level.width) for level in teacher.levels}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            regressed = network(torch.zeros(num, 3, *teacher.student_px))
        feature_loss(regressed, targets, config.loss)
    return sum(kept.values())


def main() -> int:
    """Count everything and write one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-json", type=Path, default=RESULTS / "preset_costs.json")
    args = parser.parse_args()
    teachers = {name: count() for name, count in TEACHERS.items()}
    students: dict[str, Any] = {}
    for student, teacher, kind in STUDENTS:
        students[f"{student}/{teacher}/{kind}"] = student_cost(student, teachers[teacher], kind)
        print(student, teacher, kind, students[f"{student}/{teacher}/{kind}"], file=sys.stderr, flush=True)
    counted = {name: cost.to_json() for name, cost in teachers.items()}
    publish("preset_costs", {"teachers": counted, "students": students}, args.out_json, teachers={})
    return 0


if __name__ == "__main__":
    sys.exit(main())
