"""What was decided before `labels.py` was run: arms, controls, contrasts, scores."""

from __future__ import annotations

from contrasts import Question
from label_arms import FEATURE, LABEL, LABELLED, MIX, PRIMARY

from dtpipe.distill.downstream.extractors import POSITION, RANDOM_INIT

UNTRAINED, MISMATCHED, MASKS = "untrained teacher", "mismatched pairs", "all masks"
FROZEN, TUNED, SCRATCH, DIGITS, PERMUTED = "frozen", "tuned", "scratch", "digits", "permuted"
"""Kinds of tables."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
QUESTIONS = (
    Question("feature - random, frozen", FEATURE, RANDOM_INIT, FROZEN, "+0.05 to +0.15"),
    Question(
        "feature - untrained teacher, frozen", FEATURE, UNTRAINED, FROZEN, "+0.02 to +0.10: the teacher's training"
    ),
    Question("label - feature, frozen", LABEL, FEATURE, FROZEN, "0 to +0.05"),
    Question("mix - label, frozen", MIX, LABEL, FROZEN, "0 to +0.05"),
    Question("feature - scratch, tuned", FEATURE, RANDOM_INIT, TUNED, "+0.01 to +0.04"),
)
UNPLANNED = (
    Question("feature - mismatched pairs, frozen", FEATURE, MISMATCHED, FROZEN, "not asked beforehand"),
    Question("mix - feature, frozen", MIX, FEATURE, FROZEN, "not asked beforehand"),
    Question("label - scratch, tuned", LABEL, RANDOM_INIT, TUNED, "not asked beforehand"),
    Question("label - feature, tuned", LABEL, FEATURE, TUNED, "not asked beforehand"),
    Question("mix - scratch, tuned", MIX, RANDOM_INIT, TUNED, "not asked beforehand"),
)
"""Seen in the means of the first four seeds."""
PROTOCOL = {
    "arms": {
        FEATURE: "equation (3) on features of the trained teacher",
        LABEL: f"equation (5) on soft labels of an interpreter that learned from {PRIMARY} masks; fine-tuned with its "
        "decoder, as appendix G.4 does",
        MIX: "equation (6), both; fine-tuned as label",
        RANDOM_INIT: "no pre-training",
        UNTRAINED: "as feature, from the teacher's network with weights as drawn",
        "teacher 1, teacher 2": "as feature, with teachers of other training seeds",
    },
    "controls": {
        MASKS: "a student that learned the masks of all scenes, by as many steps: must beat random by over 0.2 IoU",
        MISMATCHED: "images with the features of other images: must gain at most 0.02 IoU on random",
        "masks of other scenes": f"read-outs that learned them must not beat {POSITION!r}, which learned them too, by "
        "0.02 in AP; IoU goes by how much is guessed, and is shown",
    },
    "scores": {
        FROZEN: "held-out foreground IoU of a linear read-out of all levels at one regularisation, on cells of 4 px",
        TUNED: "the same, on pixels, of UPerNet, backbone and head trained on the labels",
    },
    "rates": "distillation: 4e-3, the paper's. Fine-tuning: one for all arms, the best mean of feature and scratch on "
    "other scenes with labels of their own; scratch's own best stands beside it",
    "seeds": "vary weights, order and noise of pre-training; in each, scores of several draws of labels are averaged; "
    "of label and mix each draw has an interpreter and students of its own, and contrasts take the draws of both arms; "
    "random has new weights in each draw, so weights pair among students alone",
    "contrasts": {question.name: f"expected {question.expected}" for question in QUESTIONS},
    "primary": f"IoU from {PRIMARY} labelled scenes; {LABELLED[-1]} and AP stand beside it. Interpreters learn from "
    f"{PRIMARY} everywhere",
    "verdict": "95 % intervals of differences paired by seed; p of Student's t, adjusted by Holm over the contrasts",
}
