"""Feature pyramid network as it is. Source: Lin et al., arXiv 1612.03144."""

from dtpipe.distill.student.regressors.base import RegressorKind, lateral

REGRESSOR = RegressorKind("fpn", "feature pyramid network: laterals, top-down path, output convolutions", lateral)
