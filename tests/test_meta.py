# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""A model on the meta device is captured, planned and rewritten without values; they come later."""

from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example

import nm_compiler as nm

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(moves=40), nm.SRSTE(), nm.Magnitude()]


@pytest.mark.ci(here=["LBC(scores='position'"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_model_compiled_without_values_gets_them_later_and_is_then_like_any_other(method: Any) -> None:
    with torch.device("meta"):
        model = ConvNet()
    x = example(model, batch=3)
    sparse = nm.compile(model, x, method=method)  # inputs on the CPU stand for inputs on meta
    assert all(parameter.is_meta for parameter in sparse.parameters())
    assert "no values yet" in str(nm.report(sparse))
    dense = ConvNet()
    sparse.to_empty(device="cpu").load_state_dict(dense.state_dict())
    other = nm.compile(dense, x, method=method)
    assert nm.show(sparse) == nm.show(other)
    torch.testing.assert_close(sparse.eval()(x), other.eval()(x))
    sparse.load_state_dict(other.state_dict())
    assert nm.verify(nm.freeze(sparse, finish=True)).satisfied


def test_constants_that_never_had_values_are_named() -> None:
    class Constant(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.ones(8, device=x.device) * self.scale)

    with torch.device("meta"):
        model = Constant()
        model.scale = torch.ones(8)
    sparse = nm.compile(model, torch.randn(2, 8), method=nm.LBC())
    with pytest.raises(nm.NMError, match="scale is a constant made in forward"):
        sparse.to_empty(device="cpu")


@pytest.mark.slow
def test_a_llama_of_a_billion_parameters_is_planned_without_values() -> None:
    zoo = pytest.importorskip("zoo.shim", reason="the zoo is an extra: pip install -e '.[zoo]'")
    zoo.declare_missing_operators()
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    sparse = nm.compile(model, kwargs={"input_ids": torch.zeros(2, 16, dtype=torch.int64)}, method=nm.BiMask())
    assert sum(parameter.numel() for parameter in model.parameters()) > 1.2e9
    assert len(sparse.plan.sites) == 16 * 7
