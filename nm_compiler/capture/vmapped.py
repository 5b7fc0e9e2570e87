"""torch.vmap in a graph becomes the batched ops that it stands for, so that passes find the weights inside it.

So do torch.func.grad, vjp, jacrev and jvp: the ops that they take, forward and backward.

    _vmap_increment_nesting(8)
    %b = _add_batch_dim(%x, 0, 1)
    %y = aten.linear(%b, %w)                    ->      %v = aten.mm(%x, aten.t(%w))
    %v = _remove_batch_dim(%y, 1, 8, 0)
    _vmap_decrement_nesting()

Each outermost region is run once on fake values under `make_fx`, below torch.vmap, and what it did takes its place. A tensor
inside the region means nothing outside of it, so the graph cannot be kept as it is and lowered op by op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from nm_compiler.capture.regions import switch_gradients
from nm_compiler.errors import NMError
from nm_compiler.graph import Copies, getattr_path, inline


def without_vmap(graph: Graph, key: str, mode: Any, casts: Sequence[Any] = ()) -> tuple[Graph, dict[str, Tensor]]:
    """A graph without torch.vmap, and the constants that it reads by name; ``graph`` itself where there is none.

    key: where nodes keep their fake value (``val`` or ``example_value``); mode: the fake mode of these values; casts: what
    each ``with torch.autocast`` around the graph was told.
    Raises whatever the ops in it raise on fake values, and NMError where this torch cannot batch sizes that it does not know.
    """
    enter, leave = _marks()
    if not any(node.target in enter for node in graph.nodes):
        return graph, {}
    made, copies, constants = Graph(), dict[Node, Node](), dict[str, Tensor]()
    region: list[Node] = []
    depth, casts = 0, list(casts)
    for node in graph.nodes:
        depth += node.target in enter
        if depth and node.op != "get_attr":
            region.append(node)
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
            casts = _open_casts(casts, node)
        depth -= node.target in leave
        if region and not depth:
            program, inputs, outputs = _batched(region, key, mode, casts)
            copies |= zip(outputs, _splice(made, program, [copies[each] for each in inputs], constants), strict=True)
            region = []
    return made, constants


def open_vmap_in_regions(exported: GraphModule, mode: Any, casts: Sequence[Any] = ()) -> None:
    """The same for the bodies of regions of autocast in an exported graph, of one within another too. In place."""
    for node in exported.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        body, told = getattr_path(exported, node.args[4].target), [*casts, node.args[:4]]
        open_vmap_in_regions(body, mode, told)
        graph, constants = without_vmap(body.graph, "val", mode, told)
        if graph is not body.graph:
            for name, value in constants.items():
                body.register_buffer(name, value)
            body.graph = graph


def _marks() -> tuple[Sequence[Any], Sequence[Any]]:
    """What opens a torch.vmap, or a gradient of torch.func, in a graph, and what closes it: in C, or as export writes it."""
    from torch._C import _functorch as plain
    from torch._functorch import predispatch as wrapped

    places = [(each, kind) for each in (plain, wrapped) for kind in ("vmap", "grad", "jvp")]
    enter = [getattr(each, f"_{kind}_increment_nesting", None) for each, kind in places]
    leave = [getattr(each, f"_{kind}_decrement_nesting", None) for each, kind in places]
    return [each for each in enter if each is not None], [each for each in leave if each is not None]


def _open_casts(casts: list[Any], node: Node) -> list[Any]:
    """The arguments of each ``with torch.autocast`` that is open after ``node``."""
    if node.target is torch.amp.autocast_mode._enter_autocast:
        return [*casts, node.args]
    return casts[:-1] if node.target is torch.amp.autocast_mode._exit_autocast else casts


def _batched(region: list[Node], key: str, mode: Any, casts: list[Any]) -> tuple[GraphModule, list[Node], list[Node]]:
    """What the region does, as a program without vmap; the nodes it reads; the nodes of it that are read later."""
    inside = set(region)
    inputs = list(dict.fromkeys(arg for node in region for arg in node.all_input_nodes if arg not in inside))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    off = False  # whether the region itself has gradients switched off there, which ops below torch.vmap would not show
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.target in (torch._C._set_grad_enabled, switch_gradients):
            off = not node.args[0]
        elif off and _opens_gradients(node):
            raise NMError(
                "torch.func.grad in torch.no_grad() in torch.vmap: take .detach() of what it returns in the place of no_grad()"
            )
        elif off and isinstance(node.meta.get(key), Tensor):
            copies[node] = graph.call_function(torch.ops.aten.detach.default, (copies[node],))
    graph.output([copies[node] for node in outputs])
    run: Callable[..., Any] = GraphModule(nn.Module(), graph)
    values = [node.meta[key] for node in inputs]
    with contextlib.ExitStack() as stack:
        for cast in casts:
            stack.enter_context(torch.autocast(*cast))
        stack.enter_context(mode)
        stack.enter_context(torch.enable_grad())  # torch.func.grad within would give zeros
        stack.enter_context(_no_levels_left())
        try:
            return make_fx(run)(*[v.detach() if isinstance(v, Tensor) else v for v in values]), inputs, outputs
        except RuntimeError as error:
            if "symbolic sizes" not in str(error):
                raise
            raise NMError(
                f"torch {torch.__version__} cannot batch an op under torch.vmap whose sizes differ from call to call, as the "
                "batch does: write it with the batch as an axis, or use torch 2.13"
            ) from error


def _opens_gradients(node: Node) -> bool:
    """Whether torch.func.grad, vjp or jacrev begins here."""
    return getattr(node.target, "__name__", "") == "_grad_increment_nesting"


@contextlib.contextmanager
def _no_levels_left() -> Iterator[None]:
    """Leave each vmap that an op has failed in: whatever came later would seem to be inside."""
    from torch._C import _functorch as plain

    before = plain.maybe_current_level() or 0
    try:
        yield
    except BaseException:
        while (plain.maybe_current_level() or 0) > before:
            plain._vmap_decrement_nesting()
        raise


def _splice(graph: Graph, program: GraphModule, inputs: Sequence[Node], constants: dict[str, Tensor]) -> Any:
    """Append ``program``, its inputs given, and note what it reads in ``constants``. Returns the nodes that it returns."""

    def copy(node: Node, copies: Copies) -> Node:
        if node.op != "get_attr":
            return graph.node_copy(node, copies.__getitem__)
        name = f"_vmap_constant{len(constants)}"
        constants[name] = getattr(program, str(node.target))
        read = graph.create_node("get_attr", name)
        read.meta = dict(node.meta)
        return read

    return inline(program, inputs, copy)
