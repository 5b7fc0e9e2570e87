"""calibrate: what every N:M weight is multiplied with, over batches of data, measured in the captured graph.

A product is linear in its weight, so the gradient of the sum of ``product(x ** 2, W)`` is, for every weight, the sum of
squares of all that it is multiplied with: exactly, whatever the product is (linear, convolution with stride and padding,
experts). In float32 where the model is in half precision: squares of a few thousand tokens are beyond float16.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from nm_compiler.calibration import Calibration, sums_of
from nm_compiler.capture.export import in_mode
from nm_compiler.capture.exported import Exported
from nm_compiler.capture.preparing import captured, globs
from nm_compiler.capture.signature import Misfit
from nm_compiler.capture.turns import in_turn
from nm_compiler.errors import NMError
from nm_compiler.graph import reads
from nm_compiler.padding import Padding, padded
from nm_compiler.pattern import PatternMap, PatternSpec
from nm_compiler.sites.plan import Site, find
from nm_compiler.sites.uses import Use, constants, uses
from nm_compiler.sites.views import is_copy, is_rounding, is_sum
from nm_compiler.wording import several

_log = logging.getLogger(__name__)
_MISFIT = (
    "The graph has the sizes of the first batch, all but axis 0. Give all batches one length, or say which sizes vary, as in "
    'nm.calibrate(model, batches, dynamic_shapes={"input_ids": {0: AUTO, 1: AUTO}, ...}) with AUTO = torch.export.Dim.AUTO'
)


@in_turn
def calibrate(
    model: nn.Module, batches: Iterable[Any], *, most: int | None = None, pattern: PatternSpec = "2:4",
    include: Any = ("*",), exclude: Any = (), dynamic_shapes: Any = None,
) -> Calibration:  # fmt: skip
    """Run ``model`` in evaluation mode over batches and measure the inputs of every weight that can be N:M.

    batches: such as a DataLoader; a batch is a tensor, a mapping of keyword inputs, or a tuple of positional inputs, of which
    as many are taken as ``forward`` has parameters (labels behind them are left). Inputs are moved to the model's device.
    Positions where an input ``attention_mask`` is zero are not measured (`nm_compiler.padding`).
    dynamic_shapes: as in `nm_compiler.compile`, for batches that differ in other sizes than axis 0.
    most: batches to take, all of them if None. pattern, include, exclude: which weights, as in `nm_compiler.compile`, stem and
    head included. One product more for every weight and batch; memory for sums, not for the batches.

    The model's parameters, buffers and mode stay as they are. Raises NMError if there is no batch, if the model cannot be
    captured as one graph in evaluation mode, or if a batch does not fit the first.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stream = (_inputs(model, batch, device) for batch in batches)
    first = next(stream, None)
    if first is None or most == 0:
        raise NMError("nm.calibrate(model, batches): there is no batch to run the model on")
    args, kwargs = first
    route = captured(model, args, kwargs, dynamic_shapes, what="nm.calibrate", modes=(False,), whole=True)[False]
    assert isinstance(route, Exported)
    whole = route.whole
    plan = find(model, [whole], PatternMap.parse(pattern), include=globs(include), exclude=globs(exclude))
    order = list(inspect.signature(model.forward).parameters)
    meter, count = _Meter(whole, plan.sites), 0
    with in_mode(model, False), torch.no_grad():
        for count, (args, kwargs) in enumerate(_all(first, stream), 1):
            try:
                flat = route.signature.flatten(args, kwargs)
            except Misfit as misfit:
                raise NMError(f"batch {count} of nm.calibrate: {misfit.facts}\n{_MISFIT}") from None
            meter.pad(dict(zip(route.signature.paths, flat, strict=True)), order)
            meter.run(*flat)
            if count == most:
                break
    _warn_of_unseen(plan.sites, meter.squares, count)
    if meter.padded:
        _log.warning(
            "%s: measured with padding among the tokens, which could not be followed there: measure sequences without padding",
            several(list(meter.padded), 3),
        )
    sums = {site.name: sums_of(site, model.get_parameter(site.name)) for site in plan.sites if site.name in meter.squares}
    return Calibration(meter.squares, count, sums)


def _warn_of_unseen(sites: Iterable[Site], squares: Mapping[str, Tensor], count: int) -> None:
    """Log which experts had no token, and which weights no input but zeros: importances say nothing about them."""
    for site in sites:
        found, batch = squares.get(site.name), site.layout.batch
        if found is None or not found.numel():
            continue
        seen = found.amax([axis for axis in range(found.ndim) if axis not in batch])
        unseen = int((seen == 0).sum())
        if unseen:
            which = f"{unseen} of its {seen.numel()} experts met" if batch else "met"
            _log.warning("%s: %s nothing but zeros in %d batches, so magnitude decides there", site.name, which, count)


def _all(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _inputs(model: nn.Module, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return (), {str(name): there(value) for name, value in batch.items()}
    if not isinstance(batch, (tuple, list)):
        return (there(batch),), {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = sum(each.kind in kinds for each in inspect.signature(model.forward).parameters.values())
    return tuple(there(value) for value in batch[:taken]), {}


def _with_inputs(node: Node) -> tuple[Node, ...]:
    return (node, *node.all_input_nodes)


def _wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


class _Meter(Interpreter):
    """Runs the graph; at every product of a weight it adds to the sums of squares of that weight.

    padded: the weights that may have met padding, in order.
    """

    def __init__(self, gm: GraphModule, sites: Iterable[Site]) -> None:
        super().__init__(gm)
        self.squares: dict[str, Tensor] = {}
        self.padded: dict[str, None] = {}
        self._padding = Padding({}, (), 0, ())
        self._products: dict[Node, list[tuple[Site, Use]]] = {}
        self._fixed = fixed = constants(gm.graph)
        for site in sites:
            for read in reads(gm, site.name):
                for use in uses(read, fixed):
                    if isinstance(use, Use):
                        self._products.setdefault(use.node, []).append((site, use))
        again = {
            arg for found in self._products.values() for _, use in found for node in use.path for arg in _with_inputs(node)
        }
        self.user_to_last_uses = {
            node: [value for value in last if value not in again] for node, last in self.user_to_last_uses.items()
        }

    def pad(self, inputs: Mapping[str, Any], order: Sequence[str]) -> None:
        """What is known of padding in the inputs of the next run. order: of the parameters of ``forward``."""
        nodes = dict(zip(inputs, self.graph.find_nodes(op="placeholder"), strict=True))
        known, lost = padded(inputs, order)
        sequences = next((len(tokens) for tokens in known.values()), 0)
        tokens = {
            nodes[name]: found.view(*found.shape, *[1] * (inputs[name].ndim - 2)).expand_as(inputs[name])
            for name, found in known.items()
        }
        self._padding = Padding(tokens, [nodes[name] for name in lost], sequences, self._fixed)

    def run_node(self, n: Node) -> Any:
        for site, use in self._products.get(n, ()):
            found = self._measured(site, use).double()
            self.squares[site.name] = self.squares[site.name] + found if site.name in self.squares else found
            if any(self._padding.hides_in(arg, self.env[arg]) for arg in use.node.all_input_nodes):
                self.padded[site.name] = None
        result = super().run_node(n)
        if self._padding.tokens or self._padding.lost:
            self._padding.follow(n, *self.fetch_args_kwargs_from_env(n), result)
            self._padding.forget(self.user_to_last_uses.get(n, ()))
        return result

    @torch.enable_grad()
    def _measured(self, site: Site, use: Use) -> Tensor:
        read, *between = use.path
        whole = self.env[read].detach()
        one_row = not between and use.conv_groups == 1 and not site.layout.batch and use.op.startswith(("linear", "conv"))
        leaf = _wide(whole.narrow(site.layout.out_axis, 0, 1) if one_row else whole).clone().requires_grad_()
        env: dict[Node, Any] = {read: leaf}
        for before, node in pairwise(use.path):
            same = is_copy(node) or is_rounding(node) or is_sum(node)  # no sum is rounded to 16 bits
            env[node] = env[before] if same else _wide(self._call(node, env))
        product = self._call(use.node, env, squared=use.path[-1], bias=not one_row)
        ones = torch.ones_like(product, memory_format=torch.contiguous_format)  # a grouped matmul takes no expanded gradient
        gradient: Tensor = torch.autograd.grad(product, leaf, ones)[0]
        return gradient

    def _call(self, node: Node, env: Mapping[Node, Any], squared: Node | None = None, bias: bool = True) -> Any:
        """A node again, on a path that starts at the weight; data operands squared where it is the product."""

        def value(arg: Node) -> Any:
            if arg in env:
                return env[arg]
            plain = self.env[arg]
            if squared is None or not isinstance(plain, Tensor) or not plain.is_floating_point():
                return plain
            square, tokens = _wide(plain).square(), self._padding.tokens.get(arg)
            return square if tokens is None else square.where(tokens, 0)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        if not bias and len(args) > 2 and isinstance(args[2], Tensor):  # a row of the weight has no use for the whole bias
            args = (*args[:2], None, *args[3:])
        return node.target(*args, **kwargs)  # type: ignore[operator]
