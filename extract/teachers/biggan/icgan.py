"""IC-GAN teachers: kind `icgan` is a BigGAN conditioned on the features of a real image, the instance.

The instances are a file of features of unit length, as the authors publish them (`stored_instances`). Each image sees
one, always the same or sampled by the `label` noise; a class-conditional network sees a class too.
Source: Casanova et al., arXiv 2109.05070.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dtpipe.extract.teachers.base import Generator, TeacherKind, parse_options
from dtpipe.extract.teachers.biggan.initial import initial_biggan_weight
from dtpipe.extract.teachers.biggan.keys import infer_biggan_layout, plain_weight
from dtpipe.extract.teachers.biggan.origin import say_what_is_assumed
from dtpipe.extract.teachers.biggan.teacher import (
    INSTANCE_MARK,
    MARKS,
    BigGanTeacher,
    SamplingOptions,
    build_network,
    class_embeddings,
    make_biggan_teacher,
    read_generator,
    with_epsilons,
)
from dtpipe.extract.teachers.files.names import names_tensors
from dtpipe.extract.teachers.files.npy import read_arrays
from dtpipe.extract.teachers.files.untrained import redrawn
from dtpipe.extract.teachers.files.weights import weights_digest
from dtpipe.extract.teachers.gan import Table
from dtpipe.manifests.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.config import TeacherConfig

FEATURES, LABELS = "instance_features", "labels"  # in the file of instances
STORED_INSTANCES = "https://dl.fbaipublicfiles.com/ic_gan/stored_instances.tar.gz"
INSTANCE, BOTH = "an instance", "an instance and a class"


class IcGanOptions(SamplingOptions):
    """What `extract.teacher.options` may hold."""

    instances: str | None = Field(
        default=None, description=".npy file of instance features: an array (n, 2048), or the authors' dict."
    )
    instance: int | Literal["sampled"] = Field(
        default="sampled", description="One instance for all images, or sampled for each."
    )
    class_label: int | Literal["sampled", "of_instance"] = Field(
        default="of_instance",
        description="For a class-conditional network: the instance's class, one for all images, or sampled.",
    )
    class_conditional: bool | None = Field(
        default=None, description="Needed where the shapes do not tell whether it takes a class."
    )


@dataclass(frozen=True)
class InstanceFeatures:
    """Real images as the generator sees them."""

    features: Tensor  # (n, 2048) float32, rows of unit length
    labels: Tensor | None  # (n,) int64


def is_icgan_path(path: str) -> bool:
    """True for a generator with BigGAN's tensor names and an embedding of instances."""
    return names_tensors(Path(path), (*MARKS, INSTANCE_MARK))


def load_icgan_teacher(config: TeacherConfig, device: str = "cpu") -> BigGanTeacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when a file is missing, damaged or does not fit; ConfigError for an option that does not fit.
    """
    given = parse_options(config, IcGanOptions)
    if given.instances is None:
        raise ConfigError(
            f"an icgan teacher needs -s extract.teacher.options.instances=FILE.npy; "
            f"its authors' are in {STORED_INSTANCES}"
        )
    tensors = read_generator(config.path)
    options = with_epsilons(given, tensors)
    tensors = redrawn(tensors, initial_biggan_weight, config.untrained)
    instances = read_instances(Path(given.instances))
    assert options.sn_eps  # `with_epsilons`
    embedded = embed_instances(tensors, instances.features, options.sn_eps, config.path)
    sizes = {INSTANCE: embedded.shape[1]}
    if "shared.weight" in tensors and tensors["shared.weight"].ndim == 2:
        sizes[BOTH] = embedded.shape[1] + tensors["shared.weight"].shape[1]
    asked = {None: sizes, True: {BOTH: sizes.get(BOTH, 0)}, False: {INSTANCE: sizes[INSTANCE]}}[
        options.class_conditional
    ]
    condition, layout = infer_biggan_layout(tensors, asked, config.path)
    tables = make_tables(tensors, instances, embedded, options, condition == BOTH, config.path)
    say_what_is_assumed(tensors, layout, given.model_fields_set, config.path)
    network = build_network(tensors, layout, options, config.path)
    return make_biggan_teacher(
        "icgan",
        config,
        options,
        network,
        tables,
        _recorded(options, instances, condition == BOTH),
        weights_digest(tensors),
        device,
    )


def read_instances(path: Path) -> InstanceFeatures:
    """The features of a file, scaled to unit length as the generator was trained with, and classes where it has them.

    Raises: TeacherError when it is missing, damaged, or holds no features.
    """
    import numpy as np
    import torch

    arrays = read_arrays(path, (FEATURES, LABELS))
    features = arrays.get(FEATURES)
    if features is None or features.ndim != 2 or features.dtype.kind != "f" or 0 in features.shape:
        raise TeacherError(
            f"{path}: has no table of {FEATURES}; give one of the authors' stored_instances, or an array (n, 2048)"
        )
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        row = int(np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))[0])
        raise TeacherError(f"{path}: {FEATURES} of instance {row} are zero or not finite; make the file again")
    labels = arrays.get(LABELS)
    if labels is not None and (labels.shape != features.shape[:1] or labels.dtype.kind not in "iu"):
        raise TeacherError(
            f"{path}: {LABELS} are {labels.dtype} {labels.shape}, not one class for each of {len(features)} instances"
        )
    unit = (features / lengths).astype(np.float32)
    return InstanceFeatures(
        torch.from_numpy(unit), None if labels is None else torch.from_numpy(labels.astype(np.int64))
    )


def embed_instances(tensors: Mapping[str, Tensor], features: Tensor, sn_eps: float, where: str) -> Tensor:
    """What blocks see of each instance: a linear embedding, or (G_shared_feat false) the features themselves.

    Shapes: (n, 2048) -> (n, size) float32. Raises: TeacherError when they do not fit.
    """
    from torch.nn.functional import linear

    if INSTANCE_MARK not in tensors:
        return features
    weight, bias = plain_weight(tensors, "shared_feat", sn_eps, where), tensors.get("shared_feat.bias")
    if weight.ndim != 2 or weight.shape[1] != features.shape[1] or bias is None or bias.shape != weight.shape[:1]:
        raise TeacherError(
            f"{where}: shared_feat has shape {tuple(weight.shape)}, instances have {features.shape[1]} features; "
            f"give a file of instances that belongs to this network"
        )
    embedded = linear(features, weight, bias.float())
    if not bool(embedded.isfinite().all()):
        raise TeacherError(f"{where}: shared_feat holds values that are not finite; download it again")
    return embedded


def make_tables(
    tensors: Mapping[str, Tensor],
    instances: InstanceFeatures,
    embedded: Tensor,
    options: IcGanOptions,
    with_class: bool,
    where: str,
) -> tuple[Table, ...]:
    """What is chosen for each image, in the condition's order: class, then instance; one table where they go together.

    Raises: ConfigError for an instance or a class that there is not.
    """
    import torch

    instance = None if options.instance == "sampled" else options.instance
    if instance is not None and not 0 <= instance < len(embedded):
        raise ConfigError(
            f"extract.teacher.options.instance is {instance}; {options.instances} has 0 to {len(embedded) - 1}"
        )
    if not with_class:
        if options.class_label != "of_instance":
            raise ConfigError(f"{where}: the network takes no class; leave out extract.teacher.options.class_label")
        return (Table(embedded, instance),)
    if options.class_label != "of_instance":
        label = None if options.class_label == "sampled" else options.class_label
        return class_embeddings(tensors, label, where), Table(embedded, instance)
    classes = class_embeddings(tensors, None, where).rows
    labels = instances.labels
    if labels is None or bool((labels < 0).any()) or bool((labels >= len(classes)).any()):
        raise ConfigError(
            f"{options.instances}: does not give each instance a class from 0 to {len(classes) - 1}; "
            f"set extract.teacher.options.class_label to a class, or to sampled"
        )
    return (Table(torch.cat([classes[labels], embedded], dim=1), instance),)


def _recorded(options: IcGanOptions, instances: InstanceFeatures, with_class: bool) -> dict[str, Any]:
    """What the dataset's recipe says of the condition: the instances by their content, not by their file's name."""
    used = {FEATURES: instances.features}
    if with_class and options.class_label == "of_instance" and instances.labels is not None:
        used[LABELS] = instances.labels
    return {
        "instances_blake3": weights_digest(used),
        "instance": options.instance,
        **({"class_label": options.class_label} if with_class else {}),
    }


KIND = TeacherKind(
    kind="icgan",
    reads="A G_ema_best file of an IC-GAN with a BigGAN backbone, with its stored instance features as option "
    "`instances`.",
    protocol=Generator,
    matches=is_icgan_path,
    load=load_icgan_teacher,
    options=IcGanOptions,
    untrained=True,
)
