"""The cascade: what each stage adds to the loss, and what the stages together say."""

from __future__ import annotations

import math

import pytest
import torch

from dtpipe.distill.downstream.tuned.heads.cascade import CascadeHeads
from dtpipe.distill.downstream.tuned.heads.detector import Detector
from dtpipe.distill.student.student import StudentSpec, build_student
from parts.objects import learned, rectangles, small_config

NUM_CLASSES = 2


@pytest.fixture
def network() -> Detector:
    """Three stages that move no box and are sure of what their biases say."""
    torch.manual_seed(0)
    student = build_student(StudentSpec("test_resnet", 4, (64, 64)))
    network = Detector(student, NUM_CLASSES, small_config({"cascade": True}))
    for stage in network.branch.roi_heads.stages:
        for parameter in stage.box_predictor.parameters():
            torch.nn.init.zeros_(parameter)
    return network


def test_stages_count_one_a_half_and_a_quarter(network) -> None:
    """Logits of zero cost log(K + 1) whatever the labels are."""
    losses = network.train()([torch.rand(3, 64, 64)], [learned(rectangles((64, 64), [(8, 8, 40, 40)], [1]))])
    found = [losses[f"classifier_{idx}"].item() for idx in range(3)]
    assert found == pytest.approx([weight * math.log(NUM_CLASSES + 1) for weight in (1, 0.5, 0.25)])
    assert {"objectness", "rpn_box_reg", "mask", "box_reg_0", "box_reg_1", "box_reg_2", "loss"} <= losses.keys()


def test_scores_are_the_mean_of_all_stages_and_boxes_those_of_the_last(network) -> None:
    heads = network.branch.roi_heads.eval()
    biases = [[0.0, 1.0, 2.0], [0.0, 0.5, -1.0], [1.0, 3.0, 0.0]]
    for stage, bias in zip(heads.stages, biases, strict=True):
        stage.box_predictor.head.cls_score.bias.data = torch.tensor(bias)
    moves = heads.stages[1].box_predictor.head.bbox_pred.bias.data
    moves[0] = 20 * 0.25  # a quarter of the width to the right, in the second stage's unit of 1/20
    features = {str(idx): torch.rand(1, 32, 16 >> idx, 16 >> idx) for idx in range(4)}
    (result,), losses = heads(features, [torch.tensor([[8.0, 8.0, 28.0, 48.0]])], [(64, 64)])
    expected = torch.tensor(biases).softmax(dim=1).mean(dim=0)
    order = result["labels"].argsort()
    assert losses == {} and result["labels"][order].tolist() == [1, 2]
    torch.testing.assert_close(result["scores"][order], expected[1:])
    torch.testing.assert_close(result["boxes"], torch.tensor([[13.0, 8.0, 33.0, 48.0]] * 2))
    assert result["masks"].shape == (2, 1, 28, 28)


def test_each_stage_asks_for_closer_boxes(network) -> None:
    heads = network.branch.roi_heads
    assert isinstance(heads, CascadeHeads)
    proposal = [torch.tensor([[10.0, 10.0, 30.0, 30.0]])]
    for overlap, stages in ((0.55, 1), (0.65, 2), (0.75, 3)):
        true = [torch.tensor([[10.0, 10.0, 30.0, 10.0 + 20 * overlap]])]
        labels = [stage.assign_targets_to_proposals(proposal, true, [torch.tensor([2])])[1] for stage in heads.stages]
        assert [int(label[0]) for label in labels] == [2] * stages + [0] * (3 - stages)
