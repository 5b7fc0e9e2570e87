"""A file of input norms: for every weight, how large what each of its input channels is multiplied with was.

A .safetensors file: by the weight's name, float32 or float64 ``[in]``, the square root of a sum of squares over a
calibration set (a common factor does not matter). ``nm_compiler.calibrate(model, batches).save(path)`` makes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nm_compiler.errors import NMError
from nm_compiler.sites.plan import Site

HOW = (
    "statistics = nm.calibrate(model, batches); statistics.save('norms.safetensors'), then --statistics norms.safetensors. "
    "A model that does not fit into memory can be calibrated in parts"
)


def save_norms(squares: Mapping[str, Tensor], path: str | Path) -> None:
    """Write the norms of `nm_compiler.calibrate`'s sums of squares; those of one row, as linears have them, as ``[in]``."""
    from safetensors.torch import save

    from nm_compiler.streaming.whole import whole

    norms = {name: value.sqrt().float().squeeze().contiguous() for name, value in squares.items()}
    with whole(Path(path)) as file:
        file.write(save(norms))


def read_norms(path: Path, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """The norms of all sites, ``[in]``. Raises NMError for a file that cannot be read, lacks a weight or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise NMError(f"the statistics file {path} cannot be read ({error}). To make one: {HOW}") from error
    absent = [site.name for site in sites if site.name not in found]
    if absent:
        raise NMError(f"{path} has no norms for {len(absent)} weights, {absent[0]} first. To measure them: {HOW}")
    for site in sites:
        value, inputs = found[site.name], site.shape[site.in_axis]
        if tuple(value.shape) not in ((inputs,), (1, inputs)):
            raise NMError(f"{path}: norms of {site.name} have shape {list(value.shape)}, its inputs need [{inputs}]")
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise NMError(f"{path}: norms of {site.name} must be finite numbers that are not negative")
    return {site.name: found[site.name].reshape(-1) for site in sites}
