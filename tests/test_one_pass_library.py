# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Both carriers, one pass library: a live model runs the graph that the export route has, and trains as it does."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import MLP, Attention, ConvNet, Grouped, Matmuls
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

import nm_compiler as nm
from nm_compiler.graph import getattr_path, has_side_effect, target_name
from nm_compiler.unwrapping import unwrap


class SelfAttention(nn.Module):
    """Torch's own attention, whose three projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.norm(y + self.attention(y, y, y, need_weights=False)[0]))


class Encoder(nn.Module):
    """Torch's transformer layer between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x)))


class Einsums(nn.Module):
    """Experts as 3-D parameters, and a product written as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 16) / 4), nn.Parameter(torch.randn(2, 16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        hidden = torch.nn.functional.silu(torch.einsum("ti,eoi->teo", y, self.up))
        return self.head(y + torch.einsum("teo,edo->td", hidden, self.down))


class Refusals(nn.Module):
    """Weights that stay dense in the middle of a model, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.table, self.left = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(5, 5))
        self.norm = nn.LayerNorm((5, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.left @ (self.layer(self.embed(tokens)) + self.table))
        return self.head(x.mean(1))


class Shared(nn.Module):
    """One layer used twice, arguments by name, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.layer(torch.tanh(self.layer(self.stem(x)))) * (1 if scale is None else scale)
        return {"logits": self.head(y), "hidden": y}


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (MLP(), torch.randn(4, 8)),
    "convolutions": lambda: (ConvNet(), torch.randn(4, 3, 8, 8)),
    "tied_attention": lambda: (Attention(), torch.randint(0, 12, (2, 6))),
    "matmuls": lambda: (Matmuls(), torch.randn(3, 8)),
    "grouped": lambda: (Grouped(), torch.randn(2, 3, 9, 7)),
    "refusals": lambda: (Refusals(), torch.randint(0, 10, (2, 5))),
    "self_attention": lambda: (SelfAttention(), torch.randn(2, 5, 8)),
    "encoder": lambda: (Encoder(), torch.randn(2, 5, 8)),
    "einsums": lambda: (Einsums(), torch.randn(6, 8)),
    "shared": lambda: (Shared(), torch.randn(4, 8)),
}


def terms(gm: GraphModule) -> set[str]:
    """What a graph computes, as lines that are named by what they compute: those that change something or are returned, and all
    that these read.

    Left out, because they are said differently and mean the same: names, dead code, aliases and slices of everything, whether
    cuDNN may be used, and arguments at their defaults.
    """
    done: dict[Node, str] = {}
    lines: dict[Node, str] = {}
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]

    def text(value: Any) -> str:
        if isinstance(value, Node):
            return done[value]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return repr(value)

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            done[node] = f"input{inputs.index(node)}"
        elif node.op == "get_attr":
            value = getattr_path(gm, node.target)
            state = node.target not in gm.__dict__["extras"]
            done[node] = str(node.target) if state else f"constant{tuple(value.shape)} of {float(value.sum())}"
        elif node.op == "output":
            result = text(node.args[0])
        elif node.target is torch.ops.aten.alias.default or _is_everything(node):
            done[node] = done[node.args[0]]
        else:
            args, kwargs = _without_defaults(node)
            named = ", ".join(f"{key}={text(value)}" for key, value in sorted(kwargs.items()))
            lines[node] = f"{target_name(node.target)}({', '.join(map(text, args))}; {named})"
            done[node] = hashlib.sha1(lines[node].encode()).hexdigest()[:8]
    needed = {node for node in gm.graph.nodes if node.op == "output" or has_side_effect(node)}
    for node in reversed(gm.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return {result, *(f"{done[node]} = {line}" for node, line in lines.items() if node in needed)}


def _is_everything(node: Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    axis, start, end = (*node.args[1:], 0, 0, 1 << 62)[:3] if len(node.args) > 1 else (0, 0, 1 << 62)
    return start in (None, 0) and (end is None or end >= node.args[0].meta["val"].shape[axis])


def _without_defaults(node: Node) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    arguments = node.target._schema.arguments
    left = {"cudnn_enabled", "cudnn_enable"}
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    kept = {k: v for k, v in given.items() if k not in left and (isinstance(v, Node) or k not in defaults or defaults[k] != v)}
    return [], kept


def pair(name: str, method: nm.Method, double: bool = False) -> tuple[Any, nm.SparseModule, Tensor]:
    """The same model as a live one and through export, with sizes fixed in both."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # it remembers which sizes changed, in other tests
    model, x = NETS[name]()
    if double:
        model, x = model.double(), x.double() if x.is_floating_point() else x
    twin = copy.deepcopy(model)
    then = "aot_eager" if double and name in ("convolutions", "tied_attention", "einsums") else "eager"
    live = nm.compile(model, method=method, then=then)
    return live, nm.compile(twin, (x,), method=method, dynamic_shapes=pytree.tree_map(lambda _: None, (x,))), x


@pytest.mark.ci(here=["mlp", "convolutions", "encoder"])
@pytest.mark.parametrize("name", NETS)
def test_the_graph_that_a_live_model_runs_is_that_of_the_export_route(name: str) -> None:
    method = nm.BiMask() if name in ("convolutions", "matmuls", "grouped") else nm.LBC()
    live, sparse, x = pair(name, method)
    for mode in (False, True):
        live.train(mode)(x)
    carrier = unwrap(live)
    assert {site.name for site in carrier.sites.values()} == {site.name for site in sparse.plan.sites}
    assert list(sparse.plan.sites) == list(carrier.sites.values())
    programs = [terms(program) for program in carrier.live.seen.values()]
    for mode in (False, True):
        expected = terms(sparse.graph(mode))
        closest = min(programs, key=lambda found: len(found ^ expected))
        assert closest == expected


@pytest.mark.ci(here=["mlp", "tied", "einsums"])
@pytest.mark.parametrize("name", NETS)
def test_a_live_model_trains_as_the_export_route_does_in_float64(name: str) -> None:
    live, sparse, x = pair(name, nm.LBC() if name in ("mlp", "encoder", "einsums") else nm.BiMask(interval=2, moves=20), True)
    found = []
    for model in (live, sparse):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = nm.SparsityScheduler(model, total_steps=8)
        steps: list[Any] = []
        for _ in range(5):
            loss = sum(leaf.square().mean() for leaf in pytree.tree_leaves(model(x)))
            loss.backward()
            steps.append([loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        found.append(steps)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
