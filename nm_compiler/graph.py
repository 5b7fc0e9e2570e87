"""Run passes over a graph, and print a graph as a program.

A pass is a function ``GraphModule -> GraphModule`` that edits the graph. `run` does what every pass would otherwise
repeat: dead code, lint, recompile, and shapes for the new nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from nm_compiler.errors import NMError
from nm_compiler.scaled import Scaled
from nm_compiler.state.sharding import is_sharded

Pass = Callable[[GraphModule], GraphModule]

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "b8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def run(gm: GraphModule, passes: Iterable[Pass]) -> GraphModule:
    """Apply ``passes`` in order; after each one remove dead code, lint, recompile and fill in missing shapes."""
    for each in passes:
        gm = rewritten(each, gm)
        tidy(gm)
    return gm


def rewritten(each: Pass, gm: GraphModule) -> GraphModule:
    """What a pass makes of a graph. Raises NMError for what returns none."""
    found: Any = each(gm)
    if not isinstance(found, GraphModule):
        name = getattr(getattr(each, "func", each), "__name__", repr(each))
        raise NMError(f"the pass {name} returned {type(found).__name__}: let it return the graph that it was given")
    return found


def tidy(gm: GraphModule) -> None:
    """Dead code out, lint, recompile, shapes of new nodes. Changes no result."""
    gm.graph.eliminate_dead_code(is_impure_node=has_side_effect)
    gm.graph.lint()
    gm.recompile()
    propagate_shapes(gm)


def has_side_effect(node: Node) -> bool:
    """Whether a node matters even if nobody reads its result.

    Batch norm in training writes its running statistics although its schema does not say so; an op that takes a
    subgraph is impure when a node of the subgraph is.
    """
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    bodies = [body for arg in node.all_input_nodes if (body := body_of(arg)) is not None]
    if bodies or isinstance(node.target, torch._ops.HigherOrderOperator):
        return any(has_side_effect(inner) for body in bodies for inner in body.graph.nodes if inner.op == "call_function")
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._opname
        trains = name in ("batch_norm", "instance_norm", "_native_batch_norm_legit", "native_batch_norm", "cudnn_batch_norm")
        return node.target._schema.is_mutable or trains or name.startswith("_assert")
    return node.is_impure()


def body_of(node: Node) -> GraphModule | None:
    """The subgraph that a node reads; None if it reads none."""
    if node.op != "get_attr":
        return None
    value = getattr_path(node.graph.owning_module, node.target)
    return value if isinstance(value, GraphModule) else None


def getattr_path(owner: Any, path: Any) -> Any:
    """``getattr`` along a dotted path. Raises AttributeError."""
    for atom in str(path).split("."):
        owner = getattr(owner, atom)
    return owner


Copies = dict[Node, Any]
"""What stands for the nodes of a program that `inline` has come by."""


def inline(program: GraphModule, inputs: Iterable[Any], copy: Callable[[Node, Copies], Any]) -> Any:
    """Make what stands for the nodes of ``program`` in another graph, one by one. Returns what stands for its outputs.

    inputs: what stands for its placeholders; copy: puts what stands for a node into that graph, given what stands for those
    before.
    """
    given, copies = iter(inputs), Copies()
    for node in program.graph.nodes:
        if node.op == "output":
            return map_arg(node.args[0], copies.__getitem__)
        copies[node] = next(given) if node.op == "placeholder" else copy(node, copies)
    raise AssertionError("a graph without an output")


def reads(gm: GraphModule, name: str) -> list[Node]:
    """All nodes that read the parameter or buffer ``name``."""
    return [node for node in gm.graph.nodes if node.op == "get_attr" and node.target == name]


def arguments_of(node: Node) -> dict[str, Any]:
    """A call's arguments by the names in the op's schema, given or by default; by position for what has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): arg for i, arg in enumerate(node.args)} | node.kwargs
    bound = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = node.kwargs.get(
                argument.name, argument.default_value if argument.has_default_value() else None
            )
    return bound


def per_axis(value: Any, axes: int) -> list[int]:
    """A number for each axis of space, as a convolution is given them: 1, [1] and [1, 1] mean the same."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers * axes if len(numbers) == 1 else numbers


def base_of(value: Any) -> Any:
    """The node whose memory a node may show, by what the schemas of ops say of views: itself if it is none."""
    while isinstance(value, Node) and value.op == "call_function":
        if value.target is not operator.getitem:
            returned = value.target._schema.returns if isinstance(value.target, torch._ops.OpOverload) else ()
            if not returned or returned[0].alias_info is None:
                break
        if not value.args or not isinstance(value.args[0], Node):
            break
        value = value.args[0]
    return value


def written_args(node: Node) -> list[Any]:
    """Those of the positional arguments that an op writes to, by its schema."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = zip(node.args, node.target._schema.arguments, strict=False)
    return [arg for arg, said in given if said.alias_info is not None and said.alias_info.is_write]


def written_by(node: Node) -> list[Node]:
    """The `base_of` what an op writes to."""
    return [base_of(arg) for arg in written_args(node) if isinstance(arg, Node)]


def tensor_outputs(gm: GraphModule) -> list[int]:
    """Which outputs of a graph with flat ones are tensors: others are numbers, strings or None."""
    leaves: Any = gm.graph.output_node().args[0]
    return [at for at, leaf in enumerate(leaves) if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)]


def propagate_shapes(gm: GraphModule) -> None:
    """Fill in ``meta["val"]`` (a fake tensor) where a pass left it out, from its inputs' values."""
    missing = [n for n in gm.graph.nodes if n.op in ("get_attr", "call_function") and "val" not in n.meta]
    mode = fake_mode_of(gm.graph)
    if not missing or mode is None:
        return
    with mode, unhooked(), enable_python_dispatcher():
        for node in missing:
            if node.op == "get_attr":
                value = getattr_path(gm, node.target)
                if isinstance(value, torch.Tensor):
                    node.meta["val"] = fake_of(mode, value)
                continue
            flat = [n for n in node.all_input_nodes if "val" not in n.meta]
            if flat or not callable(node.target):
                continue
            args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
            node.meta["val"] = node.target(*args, **kwargs)


def unhooked() -> AbstractContextManager[None]:
    """Inside, hooks on saved tensors see nothing: fake ones are none that a checkpoint around a call should count."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:  # torch.func takes none, not even these
        return nullcontext()
    return saved_tensors_hooks(lambda value: value, lambda value: value)


def fake_mode_of(graph: Graph) -> Any:
    """The mode in which the values of a graph are fake; None if none of them is."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next((mode for value in values if (mode := getattr(value, "fake_mode", None)) is not None), None)


def fake_of(mode: Any, value: torch.Tensor) -> torch.Tensor:
    """A tensor without values as ``value`` is; of a sharded one as the whole is."""
    if is_sharded(value) or isinstance(value, Scaled):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    fake: torch.Tensor = mode.from_tensor(value, static_shapes=True)
    return fake


def standalone(gm: GraphModule) -> GraphModule:
    """The graph over copies of nothing but what it reads: what was folded or packed away is free to go.

    Parameters and constants become buffers, so that ``state_dict`` and ``.to()`` know all of them; they share their memory.
    """
    values: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in values:
            value = getattr_path(gm, node.target)
            values[node.target] = value.detach() if isinstance(value, torch.Tensor) else value
    made = GraphModule(values, gm.graph, class_name=type(gm).__name__)
    made.__dict__["extras"] = {}
    return made.eval()


def show_graph(gm: GraphModule) -> str:
    """The graph as a program, one node a line with dtype and shape. Symbolic sizes are named s0, s1, ... in order."""
    symbols: dict[str, str] = {}
    return "\n".join(_line(node, symbols) for node in gm.graph.nodes)


def type_of(value: Any, symbols: dict[str, str]) -> str:
    """``f32[s0, 3, 8, 8]`` for a tensor, the symbol or value for anything else."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        return f"{_SHORT.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(type_of(item, symbols) for item in value) + ")"
    if isinstance(value, torch.SymInt):
        return _size(value, symbols)
    return "" if value is None else str(value)


def _size(size: Any, symbols: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    text = str(size)
    if text.isidentifier():
        return symbols.setdefault(text, f"s{len(symbols)}")
    for name in sorted(symbols, key=len, reverse=True):
        text = text.replace(name, symbols[name])
    return text


def _line(node: Node, symbols: dict[str, str]) -> str:
    if node.op == "output":
        return "return " + ", ".join(_argument(arg) for arg in _flat(node.args[0]))
    kind = node.meta.get("type") or type_of(node.meta.get("val"), symbols)
    head = f"%{node.name} : {kind}" if kind else f"%{node.name}"
    if node.op == "placeholder":
        return f"{head} = input"
    if node.op == "get_attr":
        return f"{head} = self.{node.target}"
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{key}={_argument(arg)}" for key, arg in node.kwargs.items()]
    return f"{head} = {target_name(node.target)}({', '.join(arguments)})"


def target_name(target: Any) -> str:
    """``nm.linear``, ``aten.relu``, ``operator.getitem``: a call's target as one would say it."""
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        return f"{target.namespace}.{target._opname}{overload}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    module = getattr(target, "__module__", "") or ""
    return f"{module.removeprefix('_')}.{getattr(target, '__name__', target)}"


def _argument(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_argument(item) for item in arg) + "]"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{key}: {_argument(item)}" for key, item in arg.items()) + "}"
    return repr(arg) if isinstance(arg, str) else str(arg)


def _flat(args: Any) -> Iterator[Any]:
    yield from args if isinstance(args, (tuple, list)) else (args,)
