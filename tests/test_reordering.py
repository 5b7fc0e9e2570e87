"""`compile(permute=)` and `permute` as a user meets them: the function stays, masks keep more, mistakes change nothing."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nm_compiler as nm
from nm_compiler.permuting import Permutation


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Linear(16, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.Linear(64, 8),
    ]
    return nn.Sequential(*layers).double()


def fingerprint(model: nn.Module) -> str:
    parts = (f"{name}{value.tolist() if isinstance(value, Tensor) else value}" for name, value in model.state_dict().items())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


X = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.ci
@pytest.mark.parametrize("method", [nm.LBC(), nm.BiMask(), nm.SRSTE(), nm.Magnitude()], ids=lambda m: type(m).__name__)
def test_compiling_with_a_search_keeps_the_function_and_more_of_each_weight(method: Any) -> None:
    model = net().eval()
    plain = copy.deepcopy(model)
    before = nm.report(nm.compile(copy.deepcopy(model), (X,), method=nm.Magnitude()))
    sparse = nm.compile(model, (X,), method=method, permute="search", budget_s=0.2)
    assert "axis classes were permuted" in str(nm.report(sparse))
    frozen = nm.freeze(nm.compile(nm.freeze(sparse, finish=True), (X,), method=nm.Magnitude()))
    assert nm.verify(frozen, "2:4").satisfied
    permuted = copy.deepcopy(plain)
    permutation = nm.permute(permuted, (X,), budget_s=0.2)
    torch.testing.assert_close(permuted(X), plain(X), rtol=1e-11, atol=1e-11)
    assert all(after >= was for was, after in permutation.retained.values())
    assert sum(after - was for was, after in permutation.retained.values()) > 0.02
    was = {row.name: row.retained for row in before.rows}
    assert {name: pytest.approx(share) for name, (share, _) in permutation.retained.items()} == {
        name: share for name, share in was.items() if name in permutation.retained
    }


def test_a_search_is_the_same_for_the_same_seed_and_its_inverse_restores_every_bit() -> None:
    first, second = net(), net()
    one, two = (nm.permute(model, (X,), seed=3) for model in (first, second))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert fingerprint(first) == fingerprint(second) != fingerprint(net())
    nm.permute(first, (X,), order=one.inverse())
    assert fingerprint(first) == fingerprint(net())


def test_a_permuted_compiled_model_copies_and_pickles_with_its_notes() -> None:
    sparse = nm.compile(net(), (X,), permute="random", seed=5)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert nm.report(twin).notes == nm.report(sparse).notes != ()
        assert torch.equal(twin.eval()(X), sparse.eval()(X))


def test_a_failure_after_the_permutation_puts_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = fingerprint(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no graph today")

    monkeypatch.setattr("nm_compiler.api.SparseModule", fail)
    with pytest.raises(RuntimeError, match="no graph today"):
        nm.compile(model, (X,), permute="random")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: nm.compile(m, (X,), permute="best"), "order='best'"),
        (lambda m: nm.compile(m, (X,), outputs=0), 'say permute="search"'),
        (lambda m: nm.compile(m, (X,), permute="search", outputs="logits"), "outputs='logits' is none of"),
        (lambda m: nm.permute(m, (X,), order={"7.weight[0]": range(64)}), "names no axis"),
        (lambda m: nm.permute(m, (X,), order={"0.weight[1]": range(16)}), "is pinned and keeps its order: input"),
        (lambda m: nm.permute(m, (X,), order={"0.weight[0]": range(63)}), r"int64 \[63\]; it must be int64 \[64\]"),
        (lambda m: nm.permute(m, (X,), order={"0.weight[0]": [0] * 64}), "no permutation of 0 ... 63"),
        (lambda m: nm.permute(m, order="random"), "give inputs to capture the model with"),
    ],
)
def test_a_mistake_about_the_order_is_named_and_changes_nothing(
    call: Callable[[nn.Module], Permutation], message: str
) -> None:
    model = net()
    before = fingerprint(model)
    with pytest.raises(nm.NMError, match=message):
        call(model)
    assert fingerprint(model) == before


def test_a_model_on_two_devices_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, device="meta"))
    for call in (nm.compile, nm.permute, nm.show_axes):
        with pytest.raises(nm.NMError, match=r"0.weight is on cpu, 1.weight of shape \[16, 16\] on meta"):
            call(model, (torch.randn(4, 16),))


def test_a_quantised_parameter_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    coded = torch.quantize_per_tensor(torch.randn(16, 16), 0.1, 0, torch.qint8)
    model[1].weight = nn.Parameter(coded, requires_grad=False)
    with pytest.raises(nm.NMError, match=r"1.weight of shape \[16, 16\] is a torch.qint8, quantised already: nm.permute"):
        nm.permute(model, (torch.randn(4, 16),))


def test_axes_need_no_values_and_compile_takes_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)), torch.empty(4, 16)
    assert [each.size for each in nm.show_axes(model, (x,)).free] == [32, 32]
    assert [site.name for site in nm.compile(model, (x,)).plan.sites] == ["2.weight"]
