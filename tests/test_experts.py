# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Mixtures of experts: grouped matmuls by their formulas, and which weights of Hugging Face's models are found."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.shim import declare_missing_operators

import nm_compiler as nm
from nm_compiler.graph import show_graph

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "intermediate_size": 24,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "decoder_sparse_step": 1},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"]},
    "DeepseekV3": {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                   "num_hidden_layers": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                   "qk_nope_head_dim": 4, "v_head_dim": 8},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}  # fmt: skip


def family(name: str) -> nn.Module:
    declare_missing_operators()
    transformers = pytest.importorskip("transformers", reason="the zoo is an extra: pip install -e '.[zoo]'")
    make = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**(({"vocab_size": 32} if name == "GPT2" else SMALL) | FAMILIES[name]))
    return make(config)


def offsets(rows: int, experts: int) -> Tensor:
    """Uneven shares, the second expert without any."""
    return torch.tensor([rows // 2, *[rows // 2] * (experts - 2), rows], dtype=torch.int32)


class Grouped(nn.Module):
    """Two grouped matmuls, [expert, out, in] and [expert, in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 16)), nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        offs = offsets(x.shape[0], 3)
        return F.grouped_mm(F.grouped_mm(x, self.up.mT, offs=offs), self.down, offs=offs)


def by_hand(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    parts, begin = [], 0
    for expert, end in enumerate(offsets(len(x), 3).tolist()):
        parts.append(x[begin:end] @ up[expert].T @ down[expert])
        begin = end
    return torch.cat(parts)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
def test_a_grouped_matmul_has_the_papers_gradients(compiled: bool) -> None:
    model, x = Grouped().bfloat16(), torch.randn(8, 16, dtype=torch.bfloat16)  # torch captures no other dtype
    sparse, x = nm.compile(model, x, method=nm.BiMask(decay=0.0), include="*").double(), torch.randn(8, 16).double()
    assert [site.layout.rows(3) for site in sparse.plan.sites] == [(0, 1, 2), (0, 2, 1)]
    for weight in sparse.weights:
        weight["order"].copy_(torch.stack([torch.randperm(weight.site.out) for _ in range(3)]))
    (up, up_back), (down, down_back) = sparse.masked("up"), sparse.masked("down")
    x.requires_grad_()
    y = (torch.compile(sparse, backend="aot_eager", fullgraph=True) if compiled else sparse)(x)
    g = torch.randn_like(y)
    y.backward(g)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, by_hand(x, up, down), **exact)
    begin = 0
    for expert, end in enumerate(offsets(8, 3).tolist()):
        rows = slice(begin, end)
        begin = end
        inner = g[rows] @ down_back[expert].T
        torch.testing.assert_close(x.grad[rows], inner @ up_back[expert], **exact)
        torch.testing.assert_close(model.up.grad[expert], inner.T @ x.detach()[rows], **exact)
        torch.testing.assert_close(model.down.grad[expert], (x.detach()[rows] @ up[expert].T).T @ g[rows], **exact)
    assert model.up.grad.stride() == model.up.stride()


def test_a_frozen_grouped_matmul_is_torchs_own_again() -> None:
    model, x = Grouped().bfloat16(), torch.randn(8, 16, dtype=torch.bfloat16)
    sparse = nm.compile(model, x, method=nm.BiMask(), include="*")
    expected = sparse(x)
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen(x), expected, rtol=0.02, atol=0.1)
    assert "aten._grouped_mm" in show_graph(sparse.graph(False))
    assert {"up": (2,), "down": (1,)}.items() <= {k: v[-1:] for k, v in nm.verify(frozen).satisfied.items()}.items()


@pytest.mark.ci
@pytest.mark.required
@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_a_language_model_is_planned_or_refused_for_a_good_reason(name: str) -> None:
    model = family(name)
    tokens = torch.randint(0, 32, (2, 6))
    sparse = nm.compile(model, tokens, method=nm.BiMask(interval=1))
    dense = {refusal.where: refusal.reason for refusal in sparse.plan.refusals}
    allowed = ("an embedding", "shared with an embedding", "head: ", "router: ", "read by aten.add_")
    assert all(reason.startswith(allowed) for reason in dense.values()), dense
    routers = [where for where, reason in dense.items() if reason.startswith("router: ")]
    assert len(routers) == (0 if name == "GPT2" else 1), routers
    assert all("bias" in where for where, reason in dense.items() if reason.startswith("read by"))
    planned = {site.name: site for site in sparse.plan.sites}
    assert planned.keys() | dense.keys() == {
        name for name, p in model.named_parameters() if p.ndim >= 2 and "_order" not in name
    }
    for site in planned.values():
        if len(site.shape) == 3:
            assert site.op == "grouped_mm"
            assert site.leading[0] == site.shape[0]
            assert site.in_axis == (1 if name == "GptOss" else 2)
    assert len([site for site in planned.values() if len(site.shape) == 3]) == (0 if name == "GPT2" else 2)

    scheduler = nm.SparsityScheduler(sparse, total_steps=2)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for _ in range(2):
        sparse(tokens).logits.square().mean().backward()
        assert all(weight.param.grad is not None for weight in sparse.weights)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    sparse.eval()
    expected = sparse(tokens).logits
    frozen = nm.freeze(sparse)
    torch.testing.assert_close(frozen(tokens, use_cache=False).logits, expected)
    assert planned.keys() <= nm.verify(frozen).satisfied.keys()


class Encoder(nn.Module):
    """Attention as torch writes it: to itself, or to a memory of the same or another width."""

    def __init__(self, memory: int, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        self.attention, self.memory = nn.MultiheadAttention(16, 2, batch_first=True, **options), memory

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        other = x if not self.memory else x[..., : self.memory].flip(1)
        return self.head(self.attention(x, other, other)[0])


@pytest.mark.ci
@pytest.mark.parametrize(
    ("memory", "options", "blocks"),
    [(0, {}, {"in_proj_weight": 1}), (16, {}, {"in_proj_weight": 3}), (8, {"kdim": 8, "vdim": 8}, {})],
    ids=["self", "cross", "cross, other widths"],
)
def test_every_weight_of_multihead_attention_is_planned(memory: int, options: dict[str, Any], blocks: dict[str, int]) -> None:
    sparse = nm.compile(Encoder(memory, **options), torch.randn(2, 3, 8), method=nm.BiMask())
    found = {site.name.removeprefix("attention."): site.blocks for site in sparse.plan.sites}
    names = blocks or {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}
    assert found == {**names, "out_proj.weight": 1}
    x = torch.randn(4, 3, 8)
    sparse(x).sum().backward()
    expected = sparse(x)
    torch.testing.assert_close(nm.freeze(sparse)(x), expected)
