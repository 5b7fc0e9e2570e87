"""A graph over a model's own state: it reads what the model holds now.

The bound GraphModule shares the model's ``_parameters``, ``_buffers`` and ``_modules`` dicts, so whatever is loaded,
moved or registered on the model is what the graph reads. Constants and subgraphs of the graph lie beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def flat_copy(graph: Graph) -> Graph:
    """A copy of ``graph`` without pytree code: flat positional inputs, a flat tuple of outputs."""
    copy = Graph()
    output = copy.graph_copy(graph, {})
    copy.output(output)
    copy.output_node().meta.update(graph.output_node().meta)
    return copy


def bind(graph: Graph, model: nn.Module, extras: Mapping[str, Any]) -> GraphModule:
    """A GraphModule that is its own ``self`` and shares the model's children, parameters and buffers.

    extras: constants and subgraphs of the export, reached by attribute and invisible to ``state_dict``.
    """
    gm = GraphModule(nn.Module(), Graph(), class_name=type(model).__name__)
    for name in _SHARED:
        gm.__dict__[name] = getattr(model, name)
    gm.__dict__.update(extras)
    gm.__dict__["extras"] = dict(extras)
    gm.__dict__["training"] = model.training
    gm.graph = graph
    return gm


def is_state(model: nn.Module, path: str) -> bool:
    """Whether ``path`` names a parameter or a buffer of the model."""
    owner, _, leaf = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False
    return leaf in module._parameters or leaf in module._buffers
