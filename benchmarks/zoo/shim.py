"""Make torchvision importable beside a torch that cannot load its C library (a CUDA build on a CPU-only torch).

Without that library the operators it would have defined are missing, and torchvision's own registration of their fake
kernels fails at import. Declaring the operators is enough: models import and run, calling one of the operators (boxes of
detection models) still says that it has no kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import torch

_FAKES = re.compile(r"""register_fake\(\s*["']torchvision::(\w+)["']""")


@functools.cache
def declare_missing_operators() -> torch.library.Library | None:
    """Call before the first ``import torchvision``. Does nothing where torchvision's C library loads, or is not installed.

    Returns the library that holds the declarations, kept alive by the cache, or None.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _library_loads(Path(spec.origin).parent):
        return None
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(_FAKES.findall(source))):
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


def _library_loads(folder: Path) -> bool:
    found = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    try:
        for path in found:
            torch.ops.load_library(str(path))
    except OSError:
        return False
    return bool(found)
