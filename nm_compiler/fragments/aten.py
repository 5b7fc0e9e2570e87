"""A fragment of a model, as TorchDynamo hands it over, becomes the same aten dialect that export gives.

    %w = placeholder  (a Parameter)                     %w = self.fc.weight
    %x = placeholder                                    %x = input
    %y = torch.nn.functional.linear(%x, %w)     ->      %y = aten.linear(%x, %w)
    %z = tag_activation_checkpoint(%body, %y, %w)       %z = bodies.checkpointed(%body, %y)

The fragment is run once under `make_fx` in its own fake mode, before autograd, and is not changed. Parameters and buffers
of the model are recognised by identity; which of them a fragment reads may differ from call to call (Dynamo shares the
code of equal layers), so binding is a step of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree

from nm_compiler.capture.bodies import HOSTS, bound
from nm_compiler.capture.vmapped import without_vmap
from nm_compiler.errors import NMError
from nm_compiler.fragments.autocasts import Region, Regions, under
from nm_compiler.graph import getattr_path, unhooked


def to_aten(fragment: GraphModule) -> GraphModule:
    """The fragment in aten, its parameters still inputs. Bodies of checkpoint and cond are lowered in turn.

    Raises whatever its own ops raise under fake tensors, and NMError for a tensor that the tracer loses sight of.
    """
    inputs = [node.meta["example_value"] for node in fragment.graph.nodes if node.op == "placeholder"]
    known = [*inputs, *_values(fragment)]  # not what detect_fake_mode says, which is another one while a backend is called
    mode = next((m for value in known if (m := getattr(value, "fake_mode", None)) is not None), None)
    mode = mode or torch._subclasses.FakeTensorMode()
    graph, constants = without_vmap(fragment.graph, "example_value", mode)
    if graph is not fragment.graph:
        held = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
        own = {name: constants[name] if name in constants else getattr_path(fragment, name) for name in held}
        fragment = GraphModule(own, graph)
    lowering = _Lowering(fragment)
    with mode, unhooked(), lowering.regions:
        lowered = make_fx(lowering.run, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    _check_nothing_lost(lowered)
    for name, body in list(lowered.named_children()):
        if isinstance(body, GraphModule) and _host_of(lowered, name) in HOSTS:
            with under(lowering.regions_of[name]):
                inner = to_aten(body)
            inner.meta.update(body.meta)
            setattr(lowered, name, inner)
    return lowered


def _check_nothing_lost(lowered: GraphModule) -> None:
    """A value without data among the constants was computed by something that the tracer does not see."""
    for node in lowered.graph.nodes:
        value = getattr_path(lowered, node.target) if node.op == "get_attr" else None
        if isinstance(value, FakeTensor):
            raise NMError(
                f"a tensor of shape {list(value.shape)} comes from code that cannot be traced, such as torch.func.grad: "
                "move that code behind a @torch._dynamo.disable function that reads no weights"
            )


def bind_inputs(lowered: GraphModule, names: Sequence[str | None], model: nn.Module) -> GraphModule:
    """A graph over ``model`` that reads the named inputs by attribute; the others stay inputs, in their order."""
    return bound(lowered, {index: name for index, name in enumerate(names) if name is not None}, model)


def names_by_id(model: nn.Module) -> dict[int, str]:
    """Full names of all parameters and buffers by ``id``; tied ones by their first name."""
    names = {id(value): name for name, value in model.named_buffers()}
    return names | {id(value): name for name, value in model.named_parameters()}


class _Lowering(Interpreter):
    """Runs the fragment's ops; an op that takes a subgraph becomes one opaque node instead of being traced through.

    Tracing through would run custom backwards forward only and drop checkpointing. Regions of autocast are entered, as the
    fragment itself will enter them: the tracer alone would only note them, and every value in them would have another dtype.
    """

    def __init__(self, fragment: GraphModule) -> None:
        super().__init__(fragment)
        self.regions = Regions()
        self.regions_of: dict[str, tuple[Region, ...]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is torch.amp.autocast_mode._enter_autocast:
            return self.regions.enter(n.args)  # the tracer notes both by itself
        if n.target is torch.amp.autocast_mode._exit_autocast:
            return self.regions.leave()
        if n.target is torch._C._autograd._get_data_attr:  # type: ignore[attr-defined]
            return self.fetch_args_kwargs_from_env(n)[0][0].detach()  # the tracer does not see `x.data`, and would lose x
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if any(isinstance(arg, GraphModule) for arg in args):
                return _opaque(n, args, kwargs, self._note_regions)
        return super().run_node(n)

    def _note_regions(self, name: str) -> None:
        self.regions_of[name] = self.regions.open


def _opaque(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], note: Callable[[str], None]) -> Any:
    """One node for an op and its subgraphs. note: is told the name of each."""
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer

    def proxy(value: Any) -> Any:
        if isinstance(value, GraphModule):
            name = tracer.get_fresh_qualname("body_")
            tracer.root.register_module(name, value)
            note(name)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(value)

    proxies = pytree.tree_map(proxy, (args, kwargs), is_leaf=lambda value: isinstance(value, GraphModule))
    result = tracer.create_proxy("call_function", node.target, *proxies)
    value = node.meta["example_value"]
    return track_tensor_tree(value, result, constant=None, tracer=tracer)


def _host_of(gm: GraphModule, name: str) -> Any:
    readers = (user for node in gm.graph.nodes if node.op == "get_attr" and node.target == name for user in node.users)
    return next((user.target for user in readers), None)


def _values(fragment: GraphModule) -> list[Any]:
    return [node.meta["example_value"] for node in fragment.graph.nodes if "example_value" in node.meta]
