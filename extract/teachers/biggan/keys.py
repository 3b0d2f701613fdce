"""BigGAN's published tensors: what they tell about the generator, and the plain weights that they stand for.

Spectral norm divides each weight by an estimate of its largest singular value: one step of power iteration from the
stored `u0`. It does not change in evaluation, so it is done once. Batch norm statistics have three spellings:
`stored_*` beside the gain, `bn.stored_*` with a counter ("standing statistics"), and `bn.running_*` (synchronised).

Differs: with synchronised batch norm, ajbrock's code multiplies by the gain in training and adds it in evaluation;
here it always multiplies, and says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from dtpipe.manifests.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.teachers.biggan.network import BigGanLayout

_UNUSED = re.compile(r".*\.(sv\d+|u[1-9]\d*|num_batches_tracked|accumulation_counter)")
_STATISTICS = re.compile(r"blocks\.\d+\.0\.bn[12](\.bn)?\.(stored|running)_(mean|var)")
_SPELLINGS = (
    (re.compile(r"^linear\.(weight|bias)$"), r"linear.0.\1"),
    (re.compile(r"^output_layer\.0\.bn\.weight$"), "output_layer.0.gain"),
    (re.compile(r"^output_layer\.0\.bn\.bias$"), "output_layer.0.bias"),
    (re.compile(r"^(.*\.(?:bn[12]|0))(?:\.bn)?\.(?:stored|running)_(mean|var)$"), r"\1.\2"),
)


RELATIVES = {
    "blocks.0.0.conv3.weight": "a BigGAN-deep generator, whose blocks are others; give a BigGAN or IC-GAN checkpoint",
    "generator.gen_z.weight_orig": "a BigGAN-deep generator of pytorch-pretrained-biggan, whose blocks are others; "
    "give a BigGAN or IC-GAN checkpoint",
    "GBlock.0.conv0.module.weight_bar": "a conversion of DeepMind's under the names of an older converter; convert it "
    "by TFHub/converter.py of BigGAN-PyTorch as it is today",
}
"""A tensor of generators that are no BigGAN in BigGAN-PyTorch's names, and what each is."""


def refuse_relatives(tensors: Iterable[str], where: str) -> None:
    """Raises: TeacherError for generators that are near a BigGAN and cannot be read, saying what they are."""
    for name in RELATIVES.keys() & set(tensors):
        raise TeacherError(f"{where}: is {RELATIVES[name]}")


def infer_biggan_layout(
    tensors: Mapping[str, Tensor], conditions: Mapping[str, int], where: str
) -> tuple[str, BigGanLayout]:
    """The layout of a generator, and which of the possible `conditions` (their sizes by name) its blocks take.

    Raises: TeacherError when it is no BigGAN generator, or no condition fits; ConfigError when more than one does.
    """
    from dtpipe.extract.teachers.biggan.network import BigGanLayout

    convolutions = _first_convolutions(tensors, where)
    outputs, z_chunk = _shape(tensors, "linear.weight", 2, where)
    first = convolutions[0][1]
    start_px = math.isqrt(outputs // first)
    if outputs != first * start_px**2 or start_px == 0:
        raise TeacherError(
            f"{where}: the first layer's {outputs} outputs are no square map of {first} channels; "
            f"give a G or G_ema file"
        )
    name, hierarchical = _find_condition(tensors, conditions, z_chunk, where)
    return name, BigGanLayout(
        start_px=start_px,
        widths=(first, *(shape[0] for shape in convolutions)),
        attention=tuple(f"blocks.{block_idx}.1.gamma" in tensors for block_idx in range(len(convolutions))),
        z_chunk=z_chunk,
        condition=conditions[name],
        hierarchical=hierarchical,
    )


def _find_condition(
    tensors: Mapping[str, Tensor], conditions: Mapping[str, int], z_chunk: int, where: str
) -> tuple[str, bool]:
    """Which condition blocks take, and whether a chunk of the latent comes with it."""
    inputs = _shape(tensors, "blocks.0.0.bn1.gain.weight", 2, where)[1]
    fits = [(name, chunk > 0) for name, size in conditions.items() for chunk in (0, z_chunk) if size + chunk == inputs]
    if not fits:
        sizes = " or ".join(f"{name} ({size})" for name, size in conditions.items())
        raise TeacherError(
            f"{where}: blocks take {inputs} numbers, which is not {sizes}, nor that with {z_chunk} of the latent; "
            f"{_other_kind(tensors, conditions)}"
        )
    if len(fits) > 1:
        raise ConfigError(
            f"{where}: blocks take {inputs} numbers, which may be {fits[0][0]} or {fits[1][0]}; "
            f"set extract.teacher.options.class_conditional to true or false"
        )
    return fits[0]


def _other_kind(tensors: Mapping[str, Tensor], conditions: Mapping[str, int]) -> str:
    """What to do about blocks that take something else than a kind gives them."""
    sees_instances = any("instance" in name for name in conditions)
    if "shared_feat.weight" in tensors and not sees_instances:
        return "shared_feat shows an IC-GAN, which sees an instance too: set -s extract.teacher.kind=icgan"
    if sees_instances:
        return "a generator that sees classes alone needs -s extract.teacher.kind=biggan, even where it has shared_feat"
    return "an IC-GAN needs -s extract.teacher.kind=icgan; else give a whole G or G_ema file"


def _first_convolutions(tensors: Mapping[str, Tensor], where: str) -> list[tuple[int, ...]]:
    """Shape of each block's first kernel."""
    num_blocks = 1
    while f"blocks.{num_blocks}.0.conv1.weight" in tensors:
        num_blocks += 1
    return [_shape(tensors, f"blocks.{block_idx}.0.conv1.weight", 4, where) for block_idx in range(num_blocks)]


def _shape(tensors: Mapping[str, Tensor], name: str, num_sides: int, where: str) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if len(shape) != num_sides or 0 in shape:
        problem = f"has shape {shape}" if name in tensors else "is missing"
        raise TeacherError(f"{where}: {name} {problem}, so this is no BigGAN generator; give a G or G_ema file")
    return shape


def with_shared_embedding(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a network without shared embeddings (G_shared false) as one whose embedding of a class is one-hot.

    Such a network's batch norms look their gains up in tables (classes, C), each a linear layer on a one-hot class.
    Raises: TeacherError when there are no such tables.
    """
    import torch

    if "blocks.0.0.bn1.gain.u0" in tensors:
        raise TeacherError(
            f"{where}: shared.weight is missing, and no other layer holds class embeddings; download it again"
        )
    looked_up = re.compile(r"blocks\.\d+\.0\.bn[12]\.(gain|bias)\.weight")
    turned = {
        name: tensor.t() if looked_up.fullmatch(name) and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    num_classes = _shape(tensors, "blocks.0.0.bn1.gain.weight", 2, where)[0]
    return {**turned, "shared.weight": torch.eye(num_classes)}


def generator_weights(
    tensors: Mapping[str, Tensor], sn_eps: float, standing_stats: bool | None, where: str
) -> dict[str, Tensor]:
    """The generator's plain weights by the names of `biggan_network`; a name of no known spelling is kept as it is.

    Raises: TeacherError when spectral norm or statistics are not whole; ConfigError when `standing_stats` cannot be.
    """
    if not any(_STATISTICS.fullmatch(name) for name in tensors):
        raise TeacherError(
            f"{where}: its blocks' norms have no statistics, so it was trained with norm_style gn or nonorm; "
            f"kind biggan and icgan read generators with batch norm (norm_style bn or in)"
        )
    weights: dict[str, Tensor] = {}
    for published, value in _used(tensors, sn_eps, standing_stats, where):
        name = published
        for pattern, replacement in _SPELLINGS:
            name = pattern.sub(replacement, name)
        if name in weights:
            raise TeacherError(f"{where}: {published} is there in two spellings; use files of one checkpoint")
        weights[name] = value
    return weights


def _used(
    tensors: Mapping[str, Tensor], sn_eps: float, standing_stats: bool | None, where: str
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if (
            module in ("shared", "shared_feat")
            or _UNUSED.fullmatch(name)
            or (leaf == "u0" and f"{module}.weight" in tensors)
        ):
            continue
        if leaf == "weight":
            yield name, plain_weight(tensors, module, sn_eps, where)
        elif leaf in ("stored_mean", "stored_var"):
            yield name, tensor.float() / _accumulated(tensors, module, standing_stats, where)
        else:
            yield name, tensor


def plain_weight(tensors: Mapping[str, Tensor], module: str, sn_eps: float, where: str) -> Tensor:
    """A layer's weight divided by its spectral norm, or as it is where the network has none.

    Raises: TeacherError when this layer lacks the `u0` that others have, or it does not fit.
    """
    weight, start = tensors[f"{module}.weight"].float(), tensors.get(f"{module}.u0")
    if start is not None:
        if start.shape != (1, weight.shape[0]):
            raise TeacherError(
                f"{where}: {module}.u0 has shape {tuple(start.shape)}, its weight {tuple(weight.shape)}; "
                f"download it again"
            )
        return weight / spectral_norm(weight, start.float(), sn_eps)
    if weight.ndim > 1 and "linear.u0" in tensors and not _is_lookup(tensors, module):
        raise TeacherError(f"{where}: {module}.u0 is missing, though other layers have theirs; download it again")
    return weight


def _is_lookup(tensors: Mapping[str, Tensor], module: str) -> bool:
    """A table of gains or biases by class (G_shared false), which never has a spectral norm."""
    return module.endswith((".gain", ".bias")) and not any(name.endswith((".gain.u0", ".bias.u0")) for name in tensors)


def spectral_norm(weight: Tensor, start: Tensor, eps: float) -> Tensor:
    """An estimate of the largest singular value, by one step of power iteration from `start`.

    Shapes: (out, ...), (1, out) -> scalar. Source: ajbrock/BigGAN-PyTorch, layers.py, power_iteration.
    """
    from torch.nn.functional import normalize

    matrix = weight.flatten(1)
    right = normalize(start @ matrix, eps=eps)
    left = normalize(right @ matrix.t(), eps=eps)
    return (right @ matrix.t() @ left.t()).squeeze()


def _accumulated(tensors: Mapping[str, Tensor], module: str, standing_stats: bool | None, where: str) -> float:
    """By how many batches stored statistics are to be divided: standing ones are sums, others are averages already."""
    counter = tensors.get(f"{module}.accumulation_counter")
    count = float(counter) if counter is not None and counter.numel() == 1 else 0.0
    if standing_stats is False or (standing_stats is None and count == 0):
        return 1.0
    if standing_stats is None and not count.is_integer():
        raise ConfigError(
            f"{where}: {module}.accumulation_counter is {count:g}, no number of batches, so it is not clear whether "
            f"statistics are sums; set extract.teacher.options.standing_stats to true (divide) or false"
        )
    if count <= 0:
        raise ConfigError(
            f"{where}: {module} has no standing statistics; leave out extract.teacher.options.standing_stats"
        )
    return count
