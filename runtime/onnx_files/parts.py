"""Run an ONNX file part by part, so that no more than a part of its weights is in memory.

    nodes   ....w1...w2.. | ..w3....w4..w5 | ....w6...      cut where the weights or nodes since the last cut are many
    values  x ----------> a, b ----------> c ---------> y   what crosses a cut goes from session to session

Each part is a model of its own over the same bytes of the same file: every node and every weight is run as the file has it.
A session for all of it would hold the weights once more, and what onnxruntime casts of half precision twice as much again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nm_compiler.memory import give_back
from nm_compiler.runtime.onnx_files.reading import load

AT_ONCE = 1 << 23  # bytes of weights in a part, unless a single product has more
MOST_NODES = 4  # of a part: what one computes is given back only when it is done


@dataclass(frozen=True, slots=True)
class Part:
    """A ModelProto whose large weights are external data. made: the values it gives; alive: all that are read after it."""

    model: Any
    takes: tuple[str, ...]
    made: tuple[str, ...]
    alive: tuple[str, ...]


class PartError(Exception):
    """onnxruntime could not run a part, as its cause says. args: which set of inputs it was."""


def run_in_parts(
    outline: Path, feeds: Sequence[dict[str, Any]], options: Any, *, at_once: int = AT_ONCE, most_nodes: int = MOST_NODES
) -> list[dict[str, Any]]:
    """The outputs of the model at ``outline`` by name, as numpy arrays, for each of ``feeds``: its inputs by name.

    outline: its large weights are external data, in files beside it; options: `onnxruntime.SessionOptions`.
    What onnxruntime raises when it loads a part comes as it is; what it raises when it runs one is the cause of a PartError.
    """
    import onnxruntime

    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(outline.parent))
    values = [{name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()} for feed in feeds]
    for part in parts(outline, at_once, most_nodes):
        if not part.made:
            continue
        session = onnxruntime.InferenceSession(part.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for number, known in enumerate(values):
            try:
                found = session.run_with_ort_values(list(part.made), {name: known[name] for name in part.takes})
            except Exception as error:
                raise PartError(number) from error
            known.update(zip(part.made, found, strict=True))
            values[number] = {name: known[name] for name in part.alive}
            del found, known
            give_back()
        del session
    return [{name: value.numpy() for name, value in known.items()} for known in values]


def parts(outline: Path, at_once: int = AT_ONCE, most_nodes: int = MOST_NODES) -> Iterator[Part]:
    """Cut a model into parts of about ``at_once`` bytes of weights and at most ``most_nodes`` nodes.

    A cut waits until the types of all that crosses it are known, so a part can be larger.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(load(outline))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {value.name: value.type for value in (*graph.value_info, *graph.input, *graph.output) if value.HasField("type")}
    last = {name: index for index, node in enumerate(graph.node) for name in _reads(node)}
    last |= {value.name: len(graph.node) for value in graph.output}
    known = [value.name for value in graph.input if value.name not in weights]
    begin, held, before = 0, dict[str, int](), tuple(known)
    for index, node in enumerate(graph.node):
        more = {name: _bytes(weights[name]) for name in _reads(node) if name in weights}
        full = bool(held) and sum((held | more).values()) > at_once
        if full or index - begin >= most_nodes:
            alive = tuple(name for name in known if last.get(name, -1) >= index)
            if all(name in types for name in alive):
                yield _part(model, range(begin, index), before, alive, weights, types)
                begin, held, before = index, {}, alive
        held |= more
        known += [name for name in node.output if name]
    alive = tuple(value.name for value in graph.output)
    yield _part(model, range(begin, len(graph.node)), before, alive, weights, types)


def _part(
    model: Any, span: range, before: Sequence[str], alive: tuple[str, ...], weights: dict[str, Any], types: dict[str, Any]
) -> Part:
    import onnx

    nodes = [model.graph.node[index] for index in span]
    made = {name for node in nodes for name in node.output}
    given = tuple(name for name in alive if name in made or name in weights)
    read = dict.fromkeys([*(name for node in nodes for name in _reads(node)), *given])
    takes = tuple(name for name in before if name in read)
    graph = onnx.GraphProto(name=model.graph.name, node=nodes)
    graph.initializer.extend(weights[name] for name in read if name in weights)
    graph.input.extend(_value(name, types[name]) for name in takes)
    graph.output.extend(_value(name, types.get(name)) for name in given)
    whole = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, graph=graph)
    return Part(whole, takes, given, alive)


def _value(name: str, kind: Any) -> Any:
    """A ValueInfoProto without sizes: the batch of the example is not the only one that is run.

    A vector keeps a length that is fixed: onnxruntime takes that of a Resize's sizes for 0 where it is not told.
    """
    import onnx

    told = onnx.ValueInfoProto(name=name)
    if kind is not None:
        told.type.CopyFrom(kind)
        sizes = told.type.tensor_type.shape.dim if told.type.HasField("tensor_type") else ()
        for size in sizes:
            if len(sizes) > 1 or not size.HasField("dim_value"):
                size.Clear()
    return told


def _reads(node: Any) -> list[str]:
    """The values that a node reads, those of its bodies included, whether they are made inside or outside of them."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            found += [name for inner in body.node for name in _reads(inner)] + [value.name for value in body.output]
    return found


def _bytes(tensor: Any) -> int:
    """Of the data of a TensorProto, wherever it lies."""
    length = next((entry.value for entry in tensor.external_data if entry.key == "length"), None)
    return int(length) if length is not None else len(tensor.raw_data)
