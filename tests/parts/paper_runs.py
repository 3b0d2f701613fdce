"""The paper's runs as its tables have them, by preset; written down apart from the presets, to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from parts.paths import PRESETS


@dataclass(frozen=True)
class Run:
    """One pre-training run as the paper has it: a column of table 17, or that with the change of another table's row.

    num: images; family: of the teacher; costs: its name in benchmarks/results/preset_costs.json.
    """

    px: tuple[int, int] = (256, 256)
    resize: str = "center_crop"
    timestep: int | None = 150
    encoding: str = "stochastic"
    teacher: str | None = "adm-imagenet"
    student: str = "resnet50"
    regressor: str = "fpn_ppm"
    mse: float = 1
    at: float = 10
    opt: str = "lamb"
    batch: int = 2048
    epochs: int = 200
    warmup: float = 30
    num: int = 1_281_167
    family: str = "adm"
    costs: str = "adm_256"

    @property
    def flips(self) -> bool:
        return self.timestep is not None  # a GAN's images have one view


DOMAIN = Run(opt="adamw", batch=256, epochs=100, warmup=20, timestep=50, student="convnext_base")
BDD100K = replace(DOMAIN, student="resnet50", epochs=600, warmup=30, num=70_000, teacher=None)
TABLE_17 = {
    "imagenet_r50": Run(),
    "imagenet_convnext_b": Run(student="convnext_base"),
    "bdd100k_adm": replace(BDD100K, px=(128, 256), resize="stretch", family="ddpm", costs="adm_bdd100k"),
    "bdd100k_stylegan2": replace(BDD100K, px=(512, 1024), timestep=None, family="stylegan2", costs="stylegan2_bdd100k"),
    "lsun_bedroom": replace(DOMAIN, teacher="adm-lsun-bedroom", num=3_033_042),
    "lsun_cat": replace(DOMAIN, teacher="adm-lsun-cat", num=1_657_266),
    "lsun_horse": replace(DOMAIN, teacher="adm-lsun-horse", num=2_000_340),
    "ffhq": replace(DOMAIN, teacher="adm-ffhq", num=70_000),
}
LIVE, CACHED = "live", "cached"
"""The form of the paper, noise or images renewed in every epoch, and the one with stored features."""


@dataclass(frozen=True)
class Row:
    """A run by the presets that are laid over each other, and the switch of a row of its table."""

    presets: tuple[str, ...]
    run: Run
    switch: tuple[tuple[str, Any], ...] = ()
    paper: float | None = None
    """Box mAP on BDD100K."""


IMAGENET = TABLE_17["imagenet_r50"]
GAN = replace(IMAGENET, timestep=None, costs="biggan_256")
TABLE_6 = {
    "table6_sd14": replace(
        IMAGENET, teacher="stable-diffusion-1.4", px=(512, 512), family="stable_diffusion", costs="sd_1_4"
    ),
    "table6_biggan": replace(GAN, teacher="biggan-deepmind256", family="biggan"),
    "table6_icgan": replace(GAN, teacher="icgan-imagenet256", family="icgan", costs="icgan_256"),
}
KIND, ENCODING, TIMESTEPS = "distill.regressor.kind", "extract.teacher.options.encoding", "extract.noise.timesteps"
MSE, AT = "distill.loss.mse_weight", "distill.loss.at_weight"
ABLATIONS: dict[str, list[tuple[tuple[tuple[str, Any], ...], dict[str, Any], float]]] = {
    "table8": [
        (((KIND, kind),), {"regressor": kind, "at": 0}, paper)
        for kind, paper in (("fpn", 23.6), ("fpn_attention", 23.9), ("pafpn", 24.0), ("fpn_ppm", 25.1))
    ],
    "table9": [
        (((AT, 0),), {"regressor": "fpn", "at": 0}, 23.6),
        (((MSE, 0),), {"regressor": "fpn", "mse": 0}, 22.3),
        ((), {"regressor": "fpn"}, 25.0),
    ],
    "table10": [
        (((ENCODING, encoding),), {"encoding": encoding}, paper)
        for encoding, paper in (("stochastic", 24.3), ("ddim_inversion", 23.4))
    ],
    "table11": [
        (((TIMESTEPS, [timestep]),), {"timestep": timestep}, paper)
        for timestep, paper in ((50, 23.8), (150, 23.9), (250, 24.4), (350, 23.4))
    ],
}
"""By table: of each row the switch, in what it differs from the base's run of 100 epochs, and the paper's figure."""
BASES = ("imagenet_r50", "bdd100k_adm")
COLUMNS = {name: Row((name,), run) for name, run in TABLE_17.items()} | {
    name: Row(("imagenet_r50", name), run) for name, run in TABLE_6.items()
}
ROWS = {
    f"{table}-{idx}-{base}": Row(
        (base, table), replace(TABLE_17[base], epochs=100, warmup=15, **changes), switch, paper
    )
    for table, rows in ABLATIONS.items()
    for idx, (switch, changes, paper) in enumerate(rows)
    for base in BASES
}
RUNS = COLUMNS | ROWS
OVERLAYS = ("cached", *ABLATIONS)
OTHERS = ("adm_teacher", "bdd100k_teacher", "demo_teacher", "digits", "small_teacher")


def header(name: str) -> list[str]:
    """The comment that opens a preset, line by line without its marks; a line that begins with two blanks goes on."""
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
