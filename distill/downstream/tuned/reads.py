"""Which settings of `eval.tune` each kind of task reads below `augment`, `head` and `inference`; it declares them.

What a task does not read is refused, so that nobody believes in a setting that changes nothing.
"""

from __future__ import annotations

_LOOK = ("inference.short_px", "inference.long_px")
_LOOKS = ("inference.flips", "inference.scales", "inference.window_px", "inference.stride_px")
_VIEWS = ("augment.crop_px", "augment.scale", "augment.flip", "augment.photometric", "augment.repeats")
_SIZES = ("augment.short_px", "augment.long_px")
_MIX = ("augment.policy", "augment.erasing", "augment.mixup", "augment.cutmix", "augment.smoothing")
_FINETUNED = ("backbone_lr", "layer_decay", "layer_groups", "drop_path", "frozen_norms")

_CLASSIFIER = ("head.dropout", "head.pooled_norm", "head.loss", "inference.short_px", "inference.flips")
_SEGMENTER = ("augment.max_class_share", "head.width", "head.norm", "head.dropout", "head.level_norms")
_DETECTOR = ("head.width", "head.norm", "head.cascade", "head.convs", "head.masks", "head.anchor_scale")
_FOUND = ("head.samples", "head.max_detections")

FROM_DECODER = "from_decoder"
"""Start from the decoder of label distillation, where the arm has one."""
CLASSES_FROZEN_READ = frozenset((*_VIEWS, *_MIX, *_CLASSIFIER))
CLASSES_READ = CLASSES_FROZEN_READ.union(_FINETUNED, {FROM_DECODER})
_MASKS = frozenset((*_FINETUNED, *_VIEWS, *_SIZES, *_SEGMENTER, *_LOOK, *_LOOKS))
UPERNET_READ = _MASKS | {"head.aux_weight", "head.ppm_scales", FROM_DECODER}
FCN_READ = _MASKS | {"head.stride"}
OBJECTS_READ = frozenset((*_FINETUNED, *_VIEWS, *_SIZES, *_DETECTOR, *_FOUND, *_LOOK))
PANOPTIC_READ = OBJECTS_READ | {"head.semantic_weight", "head.min_stuff_px"}
