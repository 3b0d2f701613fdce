"""Names of soft labels, which are those of levels; which views they have, and which go with a view of features."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelName, LevelSpec, ViewSpec
from dtpipe.manifests.soft_labels import (
    interpreter_recipe,
    label_view_of,
    label_views,
    live_features_of,
    recipe_of_live,
    soft_label_name,
    soft_labels_of,
)
from parts.datasets import make_recipe


@pytest.mark.parametrize(("stride", "name"), [(1, "l0.labels"), (4, "l2.labels"), (512, "l9.labels")])
def test_soft_labels_are_named_by_their_stride(stride: int, name: str) -> None:
    assert TypeAdapter(LevelName).validate_python(soft_label_name(stride)) == name


def test_the_teacher_of_soft_labels_is_the_interpreter() -> None:
    recipe = interpreter_recipe("0" * 64, ["sky", "sea"], {"dataset": "1" * 64}, num_views=2)
    assert (recipe.kind, recipe.weights_blake3) == ("interpreter", "0" * 64)
    assert recipe.options == {"classes": ["sky", "sea"], "features": {"dataset": "1" * 64}, "num_views": 2}


def views(*of: tuple[int, int | None, bool]) -> list[ViewSpec]:
    return [ViewSpec(draw=draw, timestep=timestep, flip=flip) for draw, timestep, flip in of]


BOTH = views((0, 50, False), (0, 50, True), (0, 150, False), (0, 150, True), (1, 50, False), (1, 150, False))


def test_views_read_one_by_one_are_those_of_the_features() -> None:
    assert [(label.view, label.reads) for label in label_views(BOTH, 1)] == [
        (view, (idx,)) for idx, view in enumerate(BOTH)
    ]
    assert label_views(BOTH, 1, [250, 150, 50]) == label_views(BOTH, 1)  # a head that learned of all of them


def test_views_read_together_are_one_for_each_draw_and_flip_in_the_order_asked_for() -> None:
    stored = [(label.view, label.reads) for label in label_views(BOTH, 2)]
    assert stored == list(
        zip(views((0, None, False), (0, None, True), (1, None, False)), [(0, 2), (1, 3), (4, 5)], strict=True)
    )
    assert [label.reads for label in label_views(BOTH, 2, [150, 50])] == [(2, 0), (3, 1), (5, 4)]


@pytest.mark.parametrize(
    ("num", "timesteps", "message"),
    [
        (3, None, "reads 3 views together, and draw 0 has timesteps 50, 150"),
        (1, [50], "trained on features of timestep 50, and there are views of 150, of which it learned nothing"),
        (1, [None], "trained on features of timestep none, and there are views of 50, 150"),
        (2, [50, 250], "reads 2 views together of timesteps 50, 250, and draw 0 has timesteps 50, 150"),
    ],
)
def test_views_that_are_not_there_are_named(num: int, timesteps: list[int | None] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        label_views(BOTH, num, timesteps)


def test_a_view_gets_the_same_else_that_of_its_draw_else_that_of_its_flip_where_there_is_one() -> None:
    assert [label_view_of(view, BOTH) for view in BOTH] == list(range(6))
    grouped = views((0, None, False), (0, None, True), (1, None, False))
    assert [label_view_of(view, grouped) for view in BOTH] == [0, 1, 0, 1, 2, 2]
    (later,) = views((7, 50, True))
    assert label_view_of(later, grouped) == 1  # of its flip alone there is one
    assert label_view_of(ViewSpec(draw=7, timestep=50), grouped) is None  # two draws, and neither is its own
    assert label_view_of(ViewSpec(draw=0, timestep=7), BOTH) is None  # two timesteps, and neither is its own
    assert label_view_of(later, views((0, 50, False))) is None  # another image


def test_features_that_were_made_live_can_be_told_from_the_recipe() -> None:
    features = make_recipe()
    level = LevelSpec(name="l2.labels", stride=4, channels=3, height=8, width=8, tap="logits", role="soft_labels")
    teacher = interpreter_recipe("ab" * 32, ("a", "b", "c"), recipe_of_live(features))
    labels = features.model_copy(update={"teacher": teacher, "levels": (level,), "views": features.views[:1]})
    assert live_features_of(labels) == features
    said = soft_labels_of(labels)
    assert said is not None and (said.classes, said.level) == (("a", "b", "c"), level)
    stored = interpreter_recipe("ab" * 32, ("a",), {"dataset": "cd" * 32})
    assert live_features_of(labels.model_copy(update={"teacher": stored})) is None
    assert live_features_of(features) is None and soft_labels_of(features) is None
