"""The paper's runs as its tables have them, by preset; written down apart from the presets, to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parts.paths import PRESETS


@dataclass(frozen=True)
class Run:
    """One pre-training run as the paper has it: a column of table 17, or that with an ablation's change.

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
BASE = Run(epochs=100, warmup=15)
GAN = replace(BASE, timestep=None, costs="biggan_256")
ROWS = {
    "table6_adm": BASE,
    "table6_sd14": replace(
        BASE, teacher="stable-diffusion-1.4", px=(512, 512), family="stable_diffusion", costs="sd_1_4"
    ),
    "table6_biggan": replace(GAN, teacher="biggan-deepmind256", family="biggan"),
    "table6_icgan": replace(GAN, teacher="icgan-imagenet256", family="icgan", costs="icgan_256"),
    "table8_fpn": replace(BASE, regressor="fpn"),
    "table8_fpn_attention": replace(BASE, regressor="fpn_attention"),
    "table8_pafpn": replace(BASE, regressor="pafpn"),
    "table8_fpn_ppm": BASE,
    "table9_mse": replace(BASE, at=0),
    "table9_at": replace(BASE, mse=0),
    "table9_mse_at": BASE,
    "table10_stochastic": BASE,
    "table10_deterministic": replace(BASE, encoding="ddim_inversion"),
    "table11_t50": replace(BASE, timestep=50),
    "table11_t150": BASE,
    "table11_t250": replace(BASE, timestep=250),
    "table11_t350": replace(BASE, timestep=350),
}
PAPER = {  # box mAP on BDD100K of each row
    "table8_fpn": 23.6,
    "table8_fpn_attention": 23.9,
    "table8_pafpn": 24.0,
    "table8_fpn_ppm": 25.1,
    "table9_mse": 23.6,
    "table9_at": 22.3,
    "table9_mse_at": 25.0,
    "table10_stochastic": 24.3,
    "table10_deterministic": 23.4,
    "table11_t50": 23.8,
    "table11_t150": 23.9,
    "table11_t250": 24.4,
    "table11_t350": 23.4,
}
RUNS = TABLE_17 | {"ablation": BASE} | ROWS
OTHERS = ("adm_teacher", "bdd100k_teacher", "demo_teacher", "digits", "small_teacher")


def configs(name: str) -> list[str]:
    """The preset, over its base where it is a row."""
    return ["ablation", name] if name in ROWS else [name]


def header(name: str) -> list[str]:
    """The comment that opens a preset, line by line without its marks; a line that begins with two blanks goes on."""
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#")]
