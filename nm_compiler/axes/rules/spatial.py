"""Ops that slide over positions: those keep their order, before and after; channels go through."""

from __future__ import annotations

from nm_compiler.axes.analysis import Analysis, Call, Rule, Value, named
from nm_compiler.axes.rules.parts import renewed


def windows(a: Analysis, call: Call) -> Value:
    """Pooling and resizing over the last one, two or three axes (as many as the name says, or all after the channels)."""
    x = a.dims(call.node.args[0])
    val = call.node.meta["val"]
    several = isinstance(val, (tuple, list))
    sizes = a.sizes(val[0] if several else val)
    rank = next((int(c) for c in call.name if c in "123"), len(x) - 2)
    result = renewed(a, x, range(len(x) - rank, len(x)), sizes, f"{call.name} slides over it")
    return (result, result) if several else result


def fourier(a: Analysis, call: Call) -> Value:
    """Fourier transforms along some axes."""
    x = a.dims(call["self"])
    axes = call.get("dim")
    axes = [axes] if isinstance(axes, int) else range(len(x)) if axes is None else axes
    return renewed(a, x, list(axes), a.shape(call.node), f"{call.name} mixes it")


def patches(a: Analysis, call: Call) -> Value:
    """``im2col``: ``[*, c, h, w] -> [*, c taps, positions]``."""
    *batch, channels, height, width = a.dims(call["self"])
    why = "patches read positions"
    a.pin((height, width), why)
    a.mixed((*batch, channels, height, width), (len(batch) + 1, len(batch) + 2))
    *_, columns, positions = a.shape(call.node)
    return (
        *batch, a.terms.product((channels, a.terms.leaf(columns // channels.size, why))), a.terms.leaf(positions, why)
    )  # fmt: skip


def overlaid(a: Analysis, call: Call) -> Value:
    """``col2im``: ``[*, c taps, positions] -> [*, c, h, w]``."""
    *batch, columns, positions = a.dims(call["self"])
    why = "patches are laid out by position"
    *_, count, height, width = a.shape(call.node)
    channels, taps = a.regroup((columns,), (count, columns.size // count), why)
    a.pin((taps, positions), why)
    a.mixed((*batch, channels, taps, positions), (len(batch) + 1, len(batch) + 2))
    return (*batch, channels, a.terms.leaf(height, why), a.terms.leaf(width, why))


def shifted(a: Analysis, call: Call) -> Value:
    """``fftshift``: halves change places."""
    x = a.dims(call["self"])
    return renewed(a, x, range(len(x)) if call["dim"] is None else call["dim"], a.shape(call.node), "halves change places")


def grid_sample(a: Analysis, call: Call) -> Value:
    """Values at coordinates."""
    x, grid = a.dims(call["input"]), a.dims(call["grid"])
    a.pin((*x[2:], *grid[1:]), "positions are looked up")
    a.unify(x[0], grid[0], "grid_sampler aligns the batch")
    a.spaces.append(x[:2])
    return (*x[:2], *grid[1:-1])


_POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"
)
_RESIZES = (
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa"
)
_FFT = (
    "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn "
    "fft_hfft fft_ihfft"
)

RULES: dict[str, Rule] = {
    **named(_POOLS, windows),
    **named(_RESIZES, windows),
    **named(_FFT, fourier),
    "im2col": patches,
    "col2im": overlaid,
    **named("fft_fftshift fft_ifftshift", shifted),
    **named("grid_sampler grid_sampler_2d grid_sampler_3d", grid_sample),
}
