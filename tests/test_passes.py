# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Golden graphs: what each pass makes of a tiny model. A person reads the diff when one changes."""

import copy
from collections.abc import Callable

import pytest
import torch
from models import Attention, ConvNet, Grouped, Matmuls, by_keyword, example
from torch import nn
from torch.fx import GraphModule

import nm_compiler as nm
from nm_compiler.capture.export import capture
from nm_compiler.graph import Pass, run, show_graph
from nm_compiler.passes.check_pattern import check_pattern
from nm_compiler.passes.flatten_tokens import flatten_tokens
from nm_compiler.passes.fold_batchnorm import fold_batchnorm
from nm_compiler.passes.freeze_masks import freeze_masks
from nm_compiler.passes.insert_fixed_masks import insert_fixed_masks
from nm_compiler.passes.insert_scores import insert_scores
from nm_compiler.passes.insert_srste import insert_srste
from nm_compiler.passes.linear_as_conv import linear_as_conv
from nm_compiler.pattern import PatternMap
from nm_compiler.recipe import pipeline
from nm_compiler.sites.plan import Plan, find
from nm_compiler.state.attaching import attach_state

Golden = Callable[[str, str], None]


def prepared(model: nn.Module, method: nm.Method, training: bool = True) -> tuple[GraphModule, Plan]:
    """A captured graph with the state registered, before any pass."""
    captured = capture(model, (example(model),), {})
    plan = find(model, [gm for gm, _ in captured.values()], PatternMap.parse("2:4"))
    attach_state(model, plan, method)
    return captured[training][0], plan


@pytest.mark.ci(here=["ConvNet", "lbc-Matmuls"])
@pytest.mark.parametrize("kind", [ConvNet, Matmuls, Grouped])
@pytest.mark.parametrize(
    "method",
    [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(), nm.SRSTE(), nm.Magnitude()],
    ids=["lbc", "lbc_combination", "bimask", "srste", "magnitude"],
)
def test_the_inserted_graph_is_as_read(kind: type[nn.Module], method: nm.Method, golden: Golden) -> None:
    gm, plan = prepared(kind(), method)
    run(gm, pipeline(method, plan.sites))
    name = method.name.lower() + ("_combination" if getattr(method, "scores", "") == "combination" else "")
    golden(f"insert_{name}_{kind.__name__.lower()}", show_graph(gm))


@pytest.mark.parametrize("method", [nm.LBC(t_f=0.01), nm.BiMask(), nm.Magnitude()], ids=["lbc", "bimask", "magnitude"])
def test_freezing_leaves_a_plain_aten_graph_that_computes_the_same(method: nm.Method, golden: Golden) -> None:
    model = Grouped()
    gm, plan = prepared(model, method)
    plain = show_graph(gm)
    run(gm, pipeline(method, plan.sites))
    x = example(model)
    expected = gm(x)[0]
    run(gm, [freeze_masks])
    torch.testing.assert_close(gm(x)[0], expected)
    assert "nm." not in show_graph(gm)
    golden(f"freeze_{method.name.lower()}_grouped", show_graph(gm))
    assert "nm." not in plain


def test_folding_batch_norm_keeps_the_function_and_the_zeros(golden: Golden) -> None:
    model = ConvNet().double()
    for norm in (model.norm, model.norm1):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.uniform_(0.5, 2.0)
    captured = capture(model, (example(model).double(),), {})
    gm, plan = captured[False][0], find(model, [captured[False][0]], PatternMap.parse("2:4"))
    run(gm, [lambda g: insert_srste(g, sites=plan.sites, decay=0.0), freeze_masks])
    x = example(model, batch=3).double()
    expected, before = gm(x)[0], copy.deepcopy(model.state_dict())
    run(gm, [fold_batchnorm])
    torch.testing.assert_close(gm(x)[0], expected, rtol=1e-12, atol=1e-12)
    golden("fold_batchnorm_convnet", show_graph(gm))
    folded = gm.conv1_weight_folded
    assert torch.equal(folded == 0, model.conv1.weight == 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model was touched"


def test_batch_norm_in_training_mode_or_behind_a_shared_convolution_is_not_folded() -> None:
    model = ConvNet()
    gm = capture(model, (example(model),), {})[True][0]
    before = show_graph(gm)
    run(gm, [fold_batchnorm])
    assert show_graph(gm) == before


def test_check_pattern_names_the_weight_its_shape_and_its_fullest_group() -> None:
    model = ConvNet()
    gm, plan = prepared(model, nm.SRSTE())
    with pytest.raises(nm.NMError, match=r"conv1.weight of shape \[8, 8, 3, 3\] is not 2:4.*4 non-zeros"):
        check_pattern(gm, sites=plan.sites)


def test_a_pass_on_a_graph_without_sites_changes_nothing() -> None:
    model = ConvNet()
    gm = capture(model, (example(model),), {})[True][0]
    before = show_graph(gm)
    run(gm, [lambda g: insert_scores(g, sites=(), by_position=True), lambda g: insert_fixed_masks(g, sites=()), freeze_masks])
    assert show_graph(gm) == before


@pytest.mark.ci(here=["ConvNet"])
@pytest.mark.parametrize("pass_", [fold_batchnorm, flatten_tokens, linear_as_conv], ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", [ConvNet, Attention])
def test_arguments_that_a_graph_gives_by_keyword_are_read_too(kind: type[nn.Module], pass_: Pass) -> None:
    model = kind().eval()
    gm = by_keyword(capture(model, (example(model),), {})[False][0])
    x = example(model)
    expected = gm(x)[0]
    assert any(node.kwargs.get("bias") is not None for node in gm.graph.nodes)
    torch.testing.assert_close(run(gm, [pass_])(x)[0], expected)


def test_bi_mask_reads_arguments_that_a_graph_gives_by_keyword() -> None:
    model = Grouped()
    gm, plan = prepared(model, nm.BiMask())
    x = example(model)
    expected = run(copy.deepcopy(gm), pipeline(nm.SRSTE(), plan.sites))(x)[0]
    torch.testing.assert_close(run(by_keyword(gm), pipeline(nm.BiMask(), plan.sites))(x)[0], expected)


def test_dead_code_goes_and_what_writes_a_buffer_stays() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _ = self.fc(x) * 3  # dead
            self.norm(x)  # its result is dead, its statistics are not
            with torch.no_grad():
                self.calls.add_(1)
            return self.fc(x)

    model = Counter()
    sparse = nm.compile(model, torch.randn(4, 8), include="*")
    assert "aten.mul" not in nm.show(sparse, training=True)
    sparse(torch.randn(4, 8) + 3)
    assert float(model.calls) == 1
    assert float(model.norm.running_mean.mean()) > 0.1


def test_shapes_of_new_nodes_leave_the_batch_free_behind_a_padding() -> None:
    gm, _ = capture(nn.Conv2d(4, 4, 3), (torch.randn(3, 4, 5, 5),), {})[False]
    (conv,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)

    def padded(gm: GraphModule) -> GraphModule:
        with gm.graph.inserting_before(conv):
            data = gm.graph.call_function(torch.ops.aten.constant_pad_nd.default, (conv.args[0], [1, 1, 1, 1]))
        conv.args = (data, *conv.args[1:])
        del conv.meta["val"]
        return gm

    run(gm, [padded])
    sizes = [str(size) for size in conv.meta["val"].shape]
    assert sizes[1:] == ["4", "5", "5"]
    assert sizes[0] != "3"
