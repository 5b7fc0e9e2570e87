"""The model zoo: what the coverage benchmark measures and the tests sample. Random weights, no network.

torchvision's 80 classification models, one model of each of timm's 98 files, and families of Hugging Face transformers
from small random configurations. A library is imported only when one of its entries is listed or built.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: nothing of the zoo may wait for a network

from zoo import of_timm, of_torchvision, of_transformers
from zoo.entry import Built, Entry, seeded

__all__ = ["LIBRARIES", "Built", "Entry", "entries", "seeded"]

LIBRARIES = {
    "torchvision": of_torchvision.entries,
    "timm": of_timm.entries,
    "transformers": of_transformers.entries,
}


def entries(library: str | None = None) -> list[Entry]:
    """The zoo, or what it has of one library."""
    chosen = LIBRARIES if library is None else {library: LIBRARIES[library]}
    return [entry for listed in chosen.values() for entry in listed()]
