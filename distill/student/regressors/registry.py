"""All variants of the regressor, by name. A new one is a file that declares `REGRESSOR`, and its name here."""

from __future__ import annotations

from dtpipe.distill.student.regressors import fpn, fpn_attention, fpn_ppm, pafpn

REGRESSORS = {kind.name: kind for kind in (fpn.REGRESSOR, fpn_attention.REGRESSOR, pafpn.REGRESSOR, fpn_ppm.REGRESSOR)}
