# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""nm.lower on five real architectures: every planned weight reaches a product as a constant, and the numbers stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import read_operators_once

import nm_compiler as nm
from nm_compiler.graph import getattr_path

pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'").declare_missing_operators()
nets = pytest.importorskip("nets", reason="the zoo is an extra: pip install -e '.[zoo]'", exc_type=ImportError)
pytestmark = pytest.mark.required


@pytest.mark.ci(here=["resnet18"])
@pytest.mark.parametrize("net", nets.NETS, ids=lambda net: net.__name__)
def test_every_planned_weight_is_an_n_m_constant_of_a_product_and_the_numbers_stay(net: Any) -> None:
    model, x, sites = nets.frozen_net(net)
    for dtype in (torch.float32, torch.bfloat16):
        lowered = nm.lower(model, (x,), backend="dense", dtype=dtype)
        assert not lowered.unread
        assert {product.site.name for product in lowered.result.products} == set(sites), "all that was planned, nothing else"
        for product in lowered.result.products:
            groups = (getattr_path(lowered.run, product.read) != 0).movedim(1, -1).unflatten(-1, (-1, 4))
            assert int(groups.sum(-1).max()) <= 2, product
        assert lowered.error < (1e-5 if dtype == torch.float32 else 6e-2)
        targets = {str(node.target) for node in lowered.run.graph.nodes}
        assert not any("batch_norm" in target for target in targets), "all of them stand behind a convolution here"
        many = torch.cat([x, x, x])
        torch.testing.assert_close(
            lowered(many).float(), model(many).float(), rtol=0.1, atol=1e-4 if dtype == torch.float32 else 0.15
        )


@pytest.mark.ci
@pytest.mark.parametrize(
    "net", [pytest.param(nets.mobilenet_v2, marks=pytest.mark.slow), nets.bert], ids=lambda net: net.__name__
)
def test_the_file_that_onnx_lowering_writes_verifies(net: Any, tmp_path: Path) -> None:
    read_operators_once()
    model, x, sites = nets.frozen_net(net)
    lowered = nm.lower(model, (x,), backend="onnx", dtype=torch.float16, options={"path": tmp_path / "net.onnx"})
    assert set(nm.verify(tmp_path / "net.onnx").satisfied) >= set(sites)
    assert {weight.name for weight in lowered.result.artifact.weights} == set(sites)
    assert not lowered.result.artifact.refusals
