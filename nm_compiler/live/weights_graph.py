"""A graph of nothing but weights, each behind what its method puts there: what a weight is multiplied with, without data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

from nm_compiler.capture.binding import bind
from nm_compiler.graph import fake_of, propagate_shapes
from nm_compiler.methods.base import Method
from nm_compiler.recipe import pipeline
from nm_compiler.sites.plan import Site
from nm_compiler.state.beside import Weight


def weights_graph(model: nn.Module, method: Method, sites: Sequence[Site]) -> GraphModule:
    """Reads of the weights, each behind what the method puts there. Not tidied: nobody reads backward weights here.

    Raises NMError for a weight that is no parameter of its layer any more.
    """
    gm = bind(Graph(), model, {})
    results, mode = [], FakeTensorMode()
    for site in sites:
        node = gm.graph.create_node("get_attr", site.name, name=site.name.replace(".", "_"))
        node.meta["val"] = fake_of(mode, Weight(site, model).param.detach())
        results.append(node)
    gm.graph.output(tuple(results))
    for each in pipeline(method, sites):
        gm = each(gm)
        propagate_shapes(gm)
    return gm
