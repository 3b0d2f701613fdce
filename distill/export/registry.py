"""All formats of export, by name. A new one is a file that declares `FORMAT`, and its name here."""

from __future__ import annotations

from dtpipe.distill.export import timm, torchvision

EXPORTS = {entry.name: entry for entry in (timm.FORMAT, torchvision.FORMAT)}
