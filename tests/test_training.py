# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""What training scripts do around a sparse model: groups, mixed precision, clipping, averaging, compiling, saving."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, ConvNet, example
from precompiled import precompiled
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nm_compiler as nm

METHODS = [nm.LBC(), nm.LBC(scores="combination"), nm.BiMask(interval=2, moves=40), nm.SRSTE(), nm.Magnitude()]
each_method = pytest.mark.parametrize("method", METHODS, ids=["LBC", "LBC-combination", "BiMask", "SRSTE", "Magnitude"])
SPARSE = {"conv1.weight", "conv2.weight"}


def compiled(method: Any, **options: Any) -> tuple[nm.SparseModule, nn.Module]:
    torch.manual_seed(0)
    return precompiled(ConvNet(**options), method, **options)


def batch(model: nn.Module, step: int) -> Tensor:
    return example(model, batch=4, seed=step)


def loss_of(sparse: nn.Module, x: Tensor) -> Tensor:
    return sparse(x).float().square().mean()


# -- parameter groups ------------------------------------------------------------------------------------------------------


def test_groups_decay_weights_but_not_biases_and_norms_and_give_scores_their_own_rate() -> None:
    sparse, model = compiled(nm.LBC())
    groups = {group["name"]: group for group in nm.parameter_groups(sparse, weight_decay=1e-3, score_lr=0.5)}
    names = {id(parameter): name for name, parameter in sparse.named_parameters()}
    found = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert found["scores"] == {"conv1.weight_scores", "conv2.weight_scores"}
    assert found["weights"] == {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("_scores")}
    assert found["others"] == set(names.values()) - found["weights"] - found["scores"]
    assert {key: group["weight_decay"] for key, group in groups.items()} == {"weights": 1e-3, "others": 0.0, "scores": 1e-3}
    assert groups["scores"]["lr"] == 0.5
    assert "lr" not in groups["weights"]
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse, score_weight_decay=0.0, weight_decay=1.0), lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0, 0.0, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1]


def test_groups_of_a_method_without_scores_are_the_models_own_and_leave_out_what_is_frozen() -> None:
    sparse, model = compiled(nm.SRSTE())
    model.conv1.weight.requires_grad_(False)
    groups = nm.parameter_groups(nn.parallel.DataParallel(sparse), weight_decay=0.1)
    assert [group["name"] for group in groups] == ["weights", "others"]
    assert not any(p is model.conv1.weight for p in groups[0]["params"])


@pytest.mark.parametrize("wrong", [{"weight_decay": -1.0}, {"score_lr": float("inf")}, {"score_weight_decay": "x"}])
def test_a_decay_or_rate_that_is_no_number_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(nm.NMError, match=r"parameter_groups\(\w+=.*\): needs a finite number >= 0"):
        nm.parameter_groups(compiled(nm.LBC())[0], **wrong)


def test_an_optimizer_without_the_scores_is_refused_when_it_is_given() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    early = torch.optim.AdamW(model.parameters())
    sparse = nm.compile(model, example(model), method=nm.LBC())
    message = r"AdamW does not hold conv1.weight_scores of shape \[8, 8, 3, 3\] and 1 more. Build it after nm.compile"
    with pytest.raises(nm.NMError, match=message):
        nm.SparsityScheduler(sparse, total_steps=4, optimizer=early)


@pytest.mark.parametrize("method", [nm.LBC(), nm.LBC(scores="combination")])
def test_an_optimizer_without_the_scores_is_found_out_in_its_first_step(method: Any) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = nm.compile(model, example(model), method=method)
    scheduler = nm.SparsityScheduler(sparse, total_steps=4)
    loss_of(sparse, batch(model, 0)).backward()
    early.step()
    with pytest.raises(nm.NMError, match=r"changed the weights, but not conv1.weight_scores of shape .* and 1 more"):
        scheduler.step()
    assert scheduler.last_step == 0


def test_scores_that_are_written_past_torchs_count_of_changes_raise_no_alarm() -> None:
    class FromOtherRanks(torch.optim.SGD):
        """As ZeroRedundancyOptimizer: some parameters are updated here, the others arrive in their ``.data``."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                arrived = p - 0.1 * p.grad
                p.data.copy_(arrived.detach()) if p is scores else p.detach().copy_(arrived)

    torch.manual_seed(0)
    sparse = nm.compile(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), (torch.randn(4, 8),), method=nm.LBC())
    scores = sparse.weights[0]["scores"]
    optimizer = FromOtherRanks(sparse.parameters())
    scheduler = nm.SparsityScheduler(sparse, total_steps=2)
    before = scores.detach().clone(), scores._version
    sparse(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert scores._version == before[1]
    assert not torch.equal(scores, before[0])


def test_steps_that_change_nothing_and_parameters_that_were_replaced_raise_no_alarm() -> None:
    sparse, model = compiled(nm.LBC())
    scheduler = nm.SparsityScheduler(sparse, total_steps=8)
    scheduler.step()
    sparse.load_state_dict({name: value.clone() for name, value in sparse.state_dict().items()}, assign=True)
    scheduler.step()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.0)
    for step in range(3):
        loss_of(sparse, batch(model, step)).backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.last_step == 5


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_an_optimizer_remembers_of_scores_is_dropped_at_t_f_and_the_weights_train_on(kind: Any) -> None:
    sparse, model = compiled(nm.LBC(t_f=0.5))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(nm.parameter_groups(sparse, weight_decay=1e-4), lr=0.01, **options)
    scheduler = nm.SparsityScheduler(sparse, total_steps=6, optimizer=optimizer)
    for step in range(6):
        loss_of(sparse, batch(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert (model.conv1.weight_scores in optimizer.state) == (step < 2)
        assert model.conv1.weight in optimizer.state
    frozen = model.conv1.weight_scores.clone()
    again = kind(nm.parameter_groups(sparse), lr=0.01, **options)
    again.load_state_dict(optimizer.state_dict())
    loss_of(sparse, batch(model, 9)).backward()
    again.step()
    assert torch.equal(model.conv1.weight_scores, frozen)


# -- precision, accumulation, clipping --------------------------------------------------------------------------------------


@pytest.mark.ci(here=["bf16-LBC]", "fp16-BiMask"])
@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_mixed_precision_trains_close_to_float32_with_a_scaler_and_clipping(method: Any, dtype: torch.dtype) -> None:
    finals = []
    for mixed in (False, True):
        sparse, model = compiled(method)
        optimizer = torch.optim.SGD(nm.parameter_groups(sparse, weight_decay=1e-4), lr=0.05, momentum=0.9)
        scheduler = nm.SparsityScheduler(sparse, total_steps=8, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=mixed and dtype == torch.float16, init_scale=256.0)
        for step in range(8):
            with torch.autocast("cpu", dtype, enabled=mixed):
                loss = loss_of(sparse, batch(model, step))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
        assert all(p.dtype == torch.float32 for p in sparse.parameters())
        finals.append(float(loss.detach()))
        assert set(nm.verify(nm.freeze(sparse)).satisfied) == SPARSE
    assert finals[1] == pytest.approx(finals[0], rel=0.1)


def test_a_step_that_the_scaler_skips_leaves_live_sets_and_scores_as_they_were() -> None:
    sparse, model = compiled(nm.LBC())
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=100, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: value.clone() for name, value in sparse.state_dict().items() if "running" not in name}
    scaler.scale(loss_of(sparse, batch(model, 0)) * float("nan")).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()
    assert scaler.get_scale() == 2.0
    after = sparse.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if "num_batches" not in name)


@each_method
def test_gradients_of_four_quarters_are_those_of_the_whole_batch(method: Any) -> None:
    torch.manual_seed(0)
    model = MLP().double()
    sparse = nm.compile(model, example(model).double(), method=method)
    x = torch.randn(16, 8, dtype=torch.float64)
    sparse(x).square().mean().backward()
    whole = {name: p.grad.clone() for name, p in sparse.named_parameters()}
    sparse.zero_grad()
    for quarter in x.split(4):
        (sparse(quarter).square().mean() / 4).backward()
    decayed = {f"{w.site.name}" for w in sparse.weights} if isinstance(method, (nm.SRSTE, nm.BiMask)) else set()
    for name, parameter in sparse.named_parameters():
        if name not in decayed:
            torch.testing.assert_close(parameter.grad, whole[name], msg=name)
    for name in decayed:  # the pull on pruned weights comes with every backward pass
        weight = sparse.get_parameter(name)
        pull = 3 * method.decay * (weight - sparse.masked(name)[0])
        torch.testing.assert_close(weight.grad, whole[name] + pull.detach())


# -- other losses, other starts ---------------------------------------------------------------------------------------------


@pytest.mark.ci(here=["BiMask", "LBC]"])
@each_method
def test_a_dense_teacher_teaches_its_own_sparse_copy(method: Any) -> None:
    """Distillation: the student starts from the teacher's weights, follows its logits and a hidden layer, and ends N:M."""
    torch.manual_seed(0)
    teacher = MLP(width=32).eval()
    student = copy.deepcopy(teacher)
    sparse = nm.compile(student, example(student), method=method)
    optimizer = torch.optim.AdamW(nm.parameter_groups(sparse), lr=3e-3)
    scheduler = nm.SparsityScheduler(sparse, total_steps=60, optimizer=optimizer)
    distances = []
    for step in range(60):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            wanted = (teacher(x) / 2).softmax(-1)
        loss = nn.functional.kl_div((sparse(x) / 2).log_softmax(-1), wanted, reduction="batchmean") * 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        distances.append(float(loss.detach()))
    assert all(p.grad is None for p in teacher.parameters())
    assert set(nm.verify(nm.freeze(sparse)).satisfied) >= {"fc2.weight"}
    once = nm.freeze(nm.compile(copy.deepcopy(teacher), example(teacher), method=nm.Magnitude()))
    x = torch.randn(256, 8)
    far, near = (float((model(x) - teacher(x)).square().mean()) for model in (once, student))
    assert near < far, "distilling brings the student nearer to its teacher than pruning alone"


@each_method
def test_a_weight_edited_between_steps_is_what_the_next_step_masks(method: Any) -> None:
    sparse, model = compiled(method)
    train(sparse, model, steps=4, total=8)
    with torch.no_grad():
        model.conv1.weight.mul_(torch.randn_like(model.conv1.weight)).add_(0.1)
    forward, _ = sparse.masked("conv1.weight")
    kept = forward != 0
    assert torch.equal(forward[kept], model.conv1.weight[kept])
    if isinstance(method, (nm.SRSTE, nm.BiMask)):  # their masks follow the weight
        largest = model.conv1.weight.detach().abs().unflatten(1, (-1, 4)).topk(2, dim=2).values.amin(2, keepdim=True)
        assert torch.equal(forward.abs().unflatten(1, (-1, 4)).topk(2, dim=2).values.amin(2, keepdim=True), largest)
    train(sparse, model, steps=4, total=8)
    assert set(nm.verify(nm.freeze(sparse, finish=True)).satisfied) == SPARSE


@each_method
def test_steps_whose_loss_is_nan_harm_neither_masks_nor_schedule_once_good_weights_are_loaded(method: Any) -> None:
    sparse, model = compiled(method)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=8, optimizer=optimizer)

    def step(at: int, factor: float = 1.0) -> None:
        (loss_of(sparse, batch(model, at)) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    step(0)
    good = copy.deepcopy((sparse.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    step(1, float("nan"))
    step(2)
    assert scheduler.last_step == 3, "the schedule counts steps, whatever they did"
    for weight in sparse.weights:
        assert sparse.method.problem(weight.site, {s: weight[s] for s in sparse.method.suffixes(weight.site)}) is None
    with pytest.raises(nm.NMError, match="NaN or infinite"):
        nm.freeze(sparse, finish=True)
    sparse.load_state_dict(good[0])
    optimizer.load_state_dict(good[1])
    scheduler.load_state_dict(good[2])
    for at in range(1, 8):
        step(at)
    straight, its = compiled(method)
    other = torch.optim.SGD(nm.parameter_groups(straight), lr=0.05, momentum=0.9)
    clock = nm.SparsityScheduler(straight, total_steps=8, optimizer=other)
    for at in range(8):
        loss_of(straight, batch(its, at)).backward()
        other.step()
        other.zero_grad()
        clock.step()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, sparse.state_dict()[name]), name
    assert set(nm.verify(nm.freeze(sparse)).satisfied) == SPARSE


# -- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.ci(here=["[LBC]"])
@each_method
def test_training_compiles_once_and_at_most_once_more_where_scores_stop_learning(method: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    finals = []
    for fast in (True, False):
        sparse, model = compiled(method)
        running = torch.compile(sparse, backend="aot_eager") if fast else sparse
        optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05, momentum=0.9)
        scheduler = nm.SparsityScheduler(running, total_steps=12, optimizer=optimizer)
        for step in range(12):
            loss_of(running, batch(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        finals.append({name: value.clone() for name, value in sparse.state_dict().items()})
        assert set(nm.verify(nm.freeze(running)).satisfied) == SPARSE
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= (2 if isinstance(method, nm.LBC) else 1)
    for name, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][name], msg=name)


@pytest.mark.slow
@each_method
def test_inductor_trains_channels_last_in_bf16_as_eager_does(method: Any) -> None:
    sparse, model = compiled(method)
    sparse.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(sparse)
    x = batch(model, 0).to(memory_format=torch.channels_last)
    for module in (sparse, torch.compile(twin)):
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(module, x).backward()
    for (name, parameter), other in zip(sparse.named_parameters(), twin.parameters(), strict=True):
        assert float((parameter.grad - other.grad).norm()) <= 0.05 * float(parameter.grad.norm()) + 1e-4, name


# -- averaging, freezing a part ---------------------------------------------------------------------------------------------


@pytest.mark.ci(here=["captured-LBC]", "live-LBC]", "captured-Magnitude"])
@each_method
@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_a_model_whose_masks_were_averaged_is_not_evaluated(method: Any, live: bool) -> None:
    model = ConvNet()
    x = example(model)
    sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, (x,), method=method)
    sparse(x)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    averaged = torch.optim.swa_utils.AveragedModel(sparse, multi_avg_fn=ema, use_buffers=True).eval()
    scheduler = nm.SparsityScheduler(sparse, total_steps=8)
    averaged(x)  # nothing was averaged so far
    for _ in range(8):
        scheduler.step()
        averaged.update_parameters(sparse)
    ours, theirs = (dict(each.named_buffers()) for each in (sparse, averaged.module))
    spoilt = [name for name, value in ours.items() if name.endswith(("_live", "_mask")) and not theirs[name].equal(value)]
    assert spoilt or not (isinstance(method, nm.LBC) and method.by_position)
    if spoilt:
        with pytest.raises(nm.NMError, match=r"conv1.weight of shape \[.*\]: .*AveragedModel\(use_buffers=True\)"):
            averaged(x)
        averaged.use_buffers = False
        averaged.update_parameters(sparse)
    assert averaged(x).isfinite().all()


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
@pytest.mark.parametrize("masks", [False, True], ids=["weights", "masks too"])
def test_a_target_network_whose_masks_stay_behind_is_told_though_its_weights_are_written_through_data(
    live: bool, masks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = ConvNet()
    x = example(model)
    online = nm.compile(model, method=nm.LBC(), then="eager") if live else nm.compile(model, (x,), method=nm.LBC())
    online(x)
    target = copy.deepcopy(online)
    scheduler = nm.SparsityScheduler(online, total_steps=8)
    for _ in range(8):
        with torch.no_grad():
            target(x)  # in training mode, as it was copied
            for p in online.parameters():
                p.add_(0.01)
        scheduler.step()
        for ours, theirs in zip(online.parameters(), target.parameters(), strict=True):
            theirs.data.copy_(0.1 * ours.data + 0.9 * theirs.data)
        if masks:
            for ours, theirs in zip(online.buffers(), target.buffers(), strict=True):
                theirs.data.copy_(ours.data)
    said = [record.getMessage() for record in caplog.records if "whose weights move" in record.getMessage()]
    assert len(said) == (not masks)
    pickle.dumps(target)


@each_method
@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_is_exactly_n_m_when_frozen(method: Any, buffers: bool) -> None:
    sparse, model = compiled(method)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(sparse, multi_avg_fn=average, use_buffers=buffers)
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05)
    scheduler = nm.SparsityScheduler(sparse, total_steps=8)
    for step in range(8):
        loss_of(sparse, batch(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        averaged.update_parameters(sparse)
    if buffers and any(method.suffixes(weight.site) for weight in sparse.weights):
        with pytest.raises(nm.NMError, match=r"conv1.weight_\w+ is of whole numbers. AveragedModel\(use_buffers=True\)"):
            nm.freeze(averaged)
        averaged.use_buffers = False
        averaged.update_parameters(sparse)
    mean = nm.freeze(averaged)
    assert set(nm.verify(mean).satisfied) == SPARSE
    assert not torch.equal(mean.conv1.weight, model.conv1.weight)
    assert mean(batch(model, 0)).isfinite().all()
    if isinstance(method, (nm.LBC, nm.Magnitude)):
        assert torch.equal(mean.conv1.weight != 0, nm.freeze(sparse).conv1.weight != 0), "the masks are those of the model"


@pytest.mark.ci(here=["[LBC]", "[BiMask]"])
@each_method
def test_a_part_of_a_model_can_be_frozen_before_or_after_compile(method: Any) -> None:
    for early in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        if early:
            model.conv1.requires_grad_(False)
        sparse = nm.compile(model, example(model), method=method)
        model.conv1.weight.requires_grad_(False)
        before = model.conv1.weight.clone()
        optimizer = torch.optim.AdamW(nm.parameter_groups(sparse, weight_decay=0.1), lr=0.01)
        scheduler = nm.SparsityScheduler(sparse, total_steps=6, optimizer=optimizer)
        for step in range(6):
            loss_of(sparse, batch(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert torch.equal(model.conv1.weight, before)
        assert set(nm.verify(nm.freeze(sparse)).satisfied) == SPARSE


# -- saving -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_weights_that_are_written_after_their_masks_were_chosen_are_told(live: bool, caplog: pytest.LogCaptureFixture) -> None:
    def begun(method: nm.Method, write: Callable[[Any], Any]) -> str:
        torch.manual_seed(0)
        model = ConvNet()
        x = example(model)
        sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, (x,), method=method)
        sparse(x)
        write(sparse)
        caplog.clear()
        nm.SparsityScheduler(sparse, total_steps=4)
        return caplog.text

    def init(sparse: nn.Module) -> None:
        sparse.apply(lambda module: nn.init.kaiming_normal_(module.weight) if isinstance(module, nn.Conv2d) else None)

    def stepped(sparse: nn.Module) -> None:
        loss_of(sparse, batch(ConvNet(), 0)).backward()
        torch.optim.SGD(sparse.parameters(), lr=0.1).step()

    for method in (nm.Magnitude(), nm.Transposable()):
        assert re.search(
            r"conv1.weight.*: written after nm.compile, which chose what \w+ keeps of the values", begun(method, init)
        )
        assert not begun(method, lambda sparse: sparse.load_state_dict(ConvNet().state_dict()))
        assert not begun(method, lambda sparse: sparse.conv1.weight.data.mul_(2))
        assert not begun(method, stepped)
        assert not begun(method, lambda sparse: sparse.double())
    assert not begun(nm.LBC(), init)
    assert not begun(nm.BiMask(), init)


@pytest.mark.parametrize("live", [False, True], ids=["captured", "live"])
def test_what_was_frozen_trains_on_under_the_zeros_that_it_has(live: bool) -> None:
    model = ConvNet()
    x = example(model)

    def trained(method: nm.Method) -> None:
        sparse = nm.compile(model, method=method, then="eager") if live else nm.compile(model, (x,), method=method)
        sparse(x)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, weight_decay=0.01)
        scheduler = nm.SparsityScheduler(sparse, total_steps=6)
        for step in range(6):
            loss_of(sparse, batch(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert nm.freeze(sparse) is model

    trained(nm.LBC())
    before = model.conv1.weight.clone()
    assert float((before != 0).float().mean()) <= 0.5
    trained(nm.Magnitude())
    assert not torch.equal(model.conv1.weight, before)
    assert torch.equal(model.conv1.weight != 0, before != 0)


@each_method
def test_safetensors_and_distributed_checkpoints_bring_back_weights_and_state(method: Any, tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    sparse, model = compiled(method)
    train(sparse, model, steps=5, total=8)
    save_file(sparse.state_dict(), tmp_path / "sparse.safetensors")
    dcp.save({"model": sparse.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    x = batch(model, 99)
    for source in ("safetensors", "dcp"):
        other, _ = compiled(method)
        if source == "safetensors":
            other.load_state_dict(load_file(tmp_path / "sparse.safetensors"))
        else:
            state = {"model": other.state_dict()}
            dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
            other.load_state_dict(state["model"])
        assert all(torch.equal(value, sparse.state_dict()[name]) for name, value in other.state_dict().items())
        assert torch.equal(other.eval()(x), sparse.eval()(x))


@each_method
def test_the_state_dict_helpers_of_distributed_checkpoints_work(method: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    sparse, model = compiled(method)
    optimizer = train(sparse, model, steps=5, total=8)
    saved, momenta = get_state_dict(sparse, optimizer)
    saved, momenta = copy.deepcopy((saved, momenta))
    other, twin = compiled(method)
    again = torch.optim.SGD(nm.parameter_groups(other), lr=0.05, momentum=0.9)
    set_state_dict(other, again, model_state_dict=saved, optim_state_dict=momenta)
    assert torch.equal(other(batch(model, 3)), sparse(batch(model, 3)))
    assert torch.equal(
        again.state[twin.conv2.weight]["momentum_buffer"], optimizer.state[model.conv2.weight]["momentum_buffer"]
    )


@each_method
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_with_groups_and_dropped_states_resumes_to_the_bit_before_at_and_after_t_f(
    method: Any, stop: int, tmp_path: Path
) -> None:
    def run(first: int, last: int, saved: Path | None) -> dict[str, Tensor]:
        sparse, model = compiled(method)
        optimizer = torch.optim.AdamW(nm.parameter_groups(sparse, weight_decay=0.01, score_lr=0.1), lr=0.01)
        scheduler = nm.SparsityScheduler(sparse, total_steps=8, optimizer=optimizer)
        parts = {"model": sparse, "optimizer": optimizer, "scheduler": scheduler}
        if saved:
            for name, part in parts.items():
                part.load_state_dict(torch.load(saved)[name])
        for step in range(first, last):
            loss_of(sparse, batch(model, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / f"{last}.pt")
        return dict(sparse.state_dict())

    whole = run(0, 8, None)
    run(0, stop, None)
    resumed = run(stop, 8, tmp_path / f"{stop}.pt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def train(sparse: nm.SparseModule, model: nn.Module, *, steps: int, total: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(nm.parameter_groups(sparse), lr=0.05, momentum=0.9)
    scheduler = nm.SparsityScheduler(sparse, total_steps=total)
    for step in range(steps):
        loss_of(sparse, batch(model, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return optimizer
