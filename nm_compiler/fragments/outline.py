"""All fragments of one run as one graph, for planning: which weights are read, by what, and which come first and last.

    fragment 1:  %a = ... return %y         %y  = aten.linear(%x, %w1)
    Python:      if y.sum() > 0        ->   %c  = code_between(%y)
    fragment 2:  %z = linear(%c, %w2)       %z  = aten.linear(%c, %w2)

An input that is the very tensor which an earlier fragment returned is connected to it; any other tensor that Python brings
is taken to depend on everything before it. A weight that Python multiplies between two fragments is read there, by
`multiplied_between`, and a table by `embedding_between`, so that first and last weights are told apart. The graph is never
run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from nm_compiler.capture.binding import bind
from nm_compiler.capture.bodies import branch, checkpointed, is_body, names_read, programs
from nm_compiler.graph import Copies, getattr_path, inline
from nm_compiler.sites.ends import ends
from nm_compiler.sites.uses import code_between, constants, embedding_between, multiplied_between


@dataclass(frozen=True)
class Run:
    """One run of a fragment: its program, what went in besides the model's state, and what came out."""

    program: GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class How(IntEnum):
    """What Python did with a parameter."""

    OTHER = 0
    LOOKUP = 1
    PRODUCT = 2


@dataclass(frozen=True)
class Outside:
    """A parameter that Python computed with between two runs, itself or a view or a cast of it. line: of the user's code."""

    name: str
    line: str
    how: How


def multiplied(model: nn.Module, runs: Sequence[Run | Outside]) -> dict[str, str]:
    """The weights that Python multiplies, and its lines: those in a product, and those of layers that no run reads."""
    read = {name for run in runs if isinstance(run, Run) for name in names_read(run.program)}
    found: dict[str, str] = {}
    for each in runs:
        if isinstance(each, Outside):
            unseen = each.how is How.OTHER and each.name not in read and _is_of_layer(model, each.name)
            if unseen or each.how is How.PRODUCT:
                found.setdefault(each.name, each.line)
    return found


def _is_of_layer(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def edges(outlined: GraphModule) -> frozenset[str]:
    """The weights that Python multiplies before all other weights, or after them: the stem and the head of the outline."""
    stems, heads = ends(outlined, constants(outlined.graph))
    between = [node for node in outlined.graph.nodes if node.target is multiplied_between]
    places: dict[str, list[Node]] = {}
    for node in between:
        places.setdefault(str(node.args[0].target), []).append(node)
    return frozenset(
        name for name, nodes in places.items() if all(node in stems for node in nodes) or all(node in heads for node in nodes)
    )


def outline(model: nn.Module, runs: Sequence[Run | Outside], examples: Any) -> GraphModule:
    """One graph over ``model`` of all ``runs`` in order. examples: the inputs of the model, which depend on nothing."""
    outside = multiplied(model, runs)
    graph, extras = Graph(), dict[str, Any]()
    given = {id(leaf) for leaf in pytree.tree_leaves(examples) if isinstance(leaf, Tensor)}
    made: dict[int, Node] = {}
    earlier: list[Node] = [graph.placeholder("inputs")]
    for number, run in enumerate(runs):
        if isinstance(run, Outside):
            if run.name in outside or run.how is How.LOOKUP:
                weight = graph.create_node("get_attr", run.name)
                weight.meta["val"] = model.get_parameter(run.name)
                between = embedding_between if run.how is How.LOOKUP else multiplied_between
                earlier.append(graph.call_function(between, (weight, *earlier)))
            continue
        inputs = []
        placeholders = [node for node in run.program.graph.nodes if node.op == "placeholder"]
        for node, value in zip(placeholders, run.inputs, strict=True):
            known = made.get(id(value)) if isinstance(value, Tensor) else None
            if known is None:
                known = graph.call_function(code_between, tuple(earlier[:1] if id(value) in given else earlier))
                known.meta = dict(node.meta)
            inputs.append(known)
        results = _inline(graph, run.program, inputs, f"run{number}_", extras)
        for result, value in zip(results, run.outputs, strict=True):
            if isinstance(result, Node):
                earlier.append(result)
                if isinstance(value, Tensor):
                    made[id(value)] = result
    graph.output(tuple(earlier))
    return bind(graph, model, extras)


def _inline(graph: Graph, gm: GraphModule, inputs: Sequence[Any], prefix: str, extras: dict[str, Any]) -> Any:
    """Append the nodes of ``gm`` to ``graph``, bodies opened up. Returns what ``gm`` returns, as nodes of ``graph``."""

    def opened(body: Node, given: Any, copies: Copies, name: str) -> Any:
        return _inline(graph, getattr_path(gm, body.target), _copied(given, copies), f"{prefix}{name}_", extras)

    def copy(node: Node, copies: Copies) -> Any:
        args: Any = node.args
        if node.op == "get_attr" and node.target in gm.__dict__["extras"]:
            value = getattr_path(gm, node.target)
            if is_body(value):
                return None
            name = f"{prefix}{node.target}"
            extras[name] = value
            read = graph.create_node("get_attr", name)
            read.meta = dict(node.meta)
            return read
        if node.target is checkpointed:
            return opened(args[0], args[1:], copies, node.name)
        if node.target is branch:
            condition, yes, no, operands = args
            taken = [opened(arm, operands, copies, arm.name) for arm in (yes, no)]
            return [_either(graph, copies.get(condition), *pair) for pair in zip(*taken, strict=True)]
        if node.target is operator.getitem and not isinstance(copies[args[0]], Node):
            return copies[args[0]][args[1]]
        return graph.node_copy(node, copies.__getitem__)

    return inline(gm, inputs, copy)


def _either(graph: Graph, condition: Any, yes: Any, no: Any) -> Node:
    """What a choice between two branches gives: of the shape of either, after both."""
    node = graph.call_function(code_between, (condition, yes, no))
    node.meta = dict(yes.meta) if isinstance(yes, Node) else {}
    return node


def _copied(values: Any, copies: Copies) -> list[Any]:
    return [copies[value] if isinstance(value, Node) else value for value in values]


def opened_up(model: nn.Module, program: GraphModule) -> GraphModule:
    """A program with the bodies in it opened up, so that first and last weights are told apart inside them too."""
    if len(list(programs(program))) == 1:
        return program
    count = sum(node.op == "placeholder" for node in program.graph.nodes)
    results: Any = program.graph.output_node().args[0]
    return outline(model, [Run(program, (None,) * count, (None,) * len(results))], ())
