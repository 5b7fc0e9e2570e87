"""Which weights may become N:M, told from names, shapes and layers alone: what `nm.compile(model)` has before the first call.

nn.Linear, convolutions        groups along the input axis, as their layer says
transformers' Conv1D           likewise, [in, out]
parameters of other layers     a guess: the last axis that M divides is the input axis; the first graph knows better
embeddings, recurrent layers, transposed and depthwise convolutions, M does not divide    none

A candidate gets its state at once, so that an optimizer can hold it. The first graph that reads it decides: it stays, or
it is refused (stem, head, shared, ...) and its state goes again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nm_compiler.layout import Layout
from nm_compiler.pattern import Pattern, PatternMap, matches
from nm_compiler.sites.plan import Site

_NEVER = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def candidates(
    model: nn.Module, patterns: PatternMap, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Site]:
    """The candidates by parameter name, in the model's order. include: also what would not be guessed to be a weight."""
    found: dict[str, Site] = {}
    for name, parameter in model.named_parameters():
        pattern = patterns.of(name)
        if parameter.ndim < 2 or not parameter.dtype.is_floating_point or pattern is None or matches(name, exclude):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        site = _site(name, parameter, owner, pattern, wanted=matches(name, include) is not None)
        if site is not None:
            found[name] = site
    return found


def _site(name: str, weight: Tensor, owner: nn.Module, pattern: Pattern, *, wanted: bool) -> Site | None:
    shape, leaf = tuple(weight.shape), name.rpartition(".")[2]
    layout, op, groups = None, "-", 1
    if isinstance(owner, (*_NEVER, *_TRANSPOSED)) and not wanted:
        return None
    if isinstance(owner, nn.Linear) and leaf == "weight":
        layout, op = Layout(1, 0), "linear"
    elif isinstance(owner, _CONVS) and leaf == "weight":
        layout, op, groups = Layout(1, 0), f"conv{weight.ndim - 2}d", owner.groups
        if groups > 1 and shape[1] == 1:
            return None
    elif type(owner).__name__ == "Conv1D" and leaf == "weight" and weight.ndim == 2:
        layout, op = Layout(0, 1), "addmm"
    elif shape[0] > 1 or wanted:
        layout = next(iter(guesses(shape, pattern)), None)
    if layout is None or shape[layout.in_axis] % pattern.m or not weight.numel():
        return None
    return Site(name, op, shape, layout, pattern, groups, groups)


def guesses(shape: tuple[int, ...], pattern: Pattern) -> list[Layout]:
    """Rows of inputs, then columns; of three axes the first counts experts; of more, as a convolution."""
    if len(shape) == 2:
        options = [Layout(1, 0), Layout(0, 1)]
    elif len(shape) == 3:
        options = [Layout(2, 1, (0,)), Layout(1, 2, (0,))]
    else:
        options = [Layout(1, 0)]
    return [layout for layout in options if shape[layout.in_axis] and shape[layout.in_axis] % pattern.m == 0]
