"""nm.lower_parts: a copy of the model, of its own class, in which parts are lowered."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import nm_compiler as nm
from nm_compiler.lowering import lower_over
from nm_compiler.runtime.lowered import Lowered

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 64)
        self.down = nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Writer(nn.Module):
    """Writes token after token, as long as its own numbers say: no one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 50)
        self.unused = Block()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits

    def write(self, tokens: Tensor, count: int) -> Tensor:
        written = tokens
        for _ in range(count):
            tokens = self(tokens)[:, -1:].argmax(-1)
            written = torch.cat([written, tokens], 1)
            if int(tokens.sum()) == 7:
                break
        return written


def sparse(model: nn.Module, pattern: str = "2:4") -> Any:
    """The same model, all linears at a pattern."""
    kept, m = map(int, pattern.split(":"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                groups = module.weight.view(module.out_features, -1, m)
                groups.scatter_(-1, groups.abs().topk(m - kept, -1, largest=False).indices, 0.0)
    return model.eval()


@pytest.fixture
def writer() -> Writer:
    torch.manual_seed(0)
    model: Writer = sparse(Writer())
    return model


def tokens(batch: int = 1, length: int = 5) -> Tensor:
    return torch.randint(0, 50, (batch, length))


def writing(model: Writer) -> Any:
    return model.write(tokens(), 3)


def lowered_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Lowered)]


def test_the_copy_is_of_the_models_class_and_does_what_the_model_does(writer: Writer) -> None:
    given = tokens(3, 9)
    fast = nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.*"])
    assert type(fast) is Writer
    assert not fast.training
    assert lowered_in(fast) == ["blocks.0", "blocks.1"]
    assert torch.equal(fast.write(given, 6), writer.write(given, 6))
    torch.testing.assert_close(fast(given), writer(given))


def test_the_model_stays_as_it_is(writer: Writer) -> None:
    writer.train()
    writer.unused.eval()
    before, kinds, modes = copy.deepcopy(writer.state_dict()), str(writer), [m.training for m in writer.modules()]
    nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.*"])
    assert str(writer) == kinds
    assert [m.training for m in writer.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in writer.state_dict().items())
    assert not any(module._forward_pre_hooks for module in writer.modules())


def test_memory_is_shared_but_for_what_is_packed(writer: Writer) -> None:
    writer.unused.up.weight = writer.unused.down.weight
    fast = nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.*"])
    assert fast.embed.weight.data_ptr() == writer.embed.weight.data_ptr()
    assert fast.head.weight.data_ptr() == writer.head.weight.data_ptr()
    assert fast.unused.up.weight is fast.unused.down.weight
    own = {name: value for name, value in fast.state_dict().items() if name.startswith("blocks.0")}
    assert all(value.shape != writer.blocks[0].get_parameter("up.weight").shape for value in own.values())


def test_a_part_of_linears_takes_any_batch_and_length(writer: Writer) -> None:
    for run in (writing, lambda model: model(tokens(2, 4))):
        fast = nm.lower_parts(writer, "blocks.*", run, backend="cpu", force=["*"])
        for batch, length in ((1, 1), (5, 6), (2, 40)):
            given = tokens(batch, length)
            torch.testing.assert_close(fast(given), writer(given))


def images(*sizes: int) -> Callable[[nn.Module], Any]:
    return lambda model: [model(torch.randn(2, 3, size, 8)) for size in sizes]


def test_of_images_the_batch_is_free_and_sizes_in_which_calls_differ() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.ReLU()))
    with torch.no_grad():
        model[1].get_parameter("0.weight")[:, ::2] = 0.0
    fast = nm.lower_parts(model, "1", images(9), backend="cpu", force=["*"])
    fast(torch.randn(5, 3, 9, 8))
    with pytest.raises(
        nm.NMError, match=r"(?s)size 12 on axis 2, where 9 was captured.*have run= make a call like this one as well"
    ):
        fast(torch.randn(2, 3, 12, 8))
    fast = nm.lower_parts(model, "1", images(9, 10), backend="cpu", force=["*"])
    x = torch.randn(3, 3, 12, 8)
    torch.testing.assert_close(fast(x), model(x))


def test_of_nested_parts_the_outer_one_is_lowered_and_of_a_shared_one_the_only_one(writer: Writer) -> None:
    writer.blocks[1] = writer.blocks[0]
    fast = nm.lower_parts(writer, ["blocks.*"], writing, backend="cpu", force=["*"])
    assert lowered_in(fast) == ["blocks.0"]
    assert fast.blocks[0] is fast.blocks[1]
    fast = nm.lower_parts(writer, ["blocks.0.*", "head"], writing, backend="cpu", force=["*"])
    assert lowered_in(fast) == ["blocks.0.up", "blocks.0.down", "head"]


def test_a_part_without_sparse_weights_is_left_alone(writer: Writer) -> None:
    nn.init.normal_(writer.blocks[0].get_parameter("up.weight"))
    nn.init.normal_(writer.blocks[0].get_parameter("down.weight"))
    assert lowered_in(nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.1*"])) == ["blocks.1"]


def test_rules_are_about_names_of_the_whole_model(writer: Writer) -> None:
    sparse(writer.blocks[1], "1:8")
    fast = nm.lower_parts(
        writer, "blocks.*", writing, backend="cpu", pattern={"blocks.1.*": "1:8", "*": "2:4"}, exclude=["blocks.0.up.weight"],
        force=["blocks.*"],
    )  # fmt: skip
    patterns = {row.name: row.pattern for row in nm.report(fast).rows if row.status == "sparse"}
    assert patterns == {"blocks.0.down.weight": "2:4", "blocks.1.up.weight": "1:8", "blocks.1.down.weight": "1:8"}


def test_the_report_has_the_parts_where_they_stand_and_verify_names_what_is_packed(writer: Writer) -> None:
    fast = nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.*"])
    report = nm.report(fast)
    names = ["embed.weight", *(f"blocks.{at}.{layer}.weight" for at in (0, 1) for layer in ("up", "down")), "head.weight"]
    assert [row.name for row in report.rows if not row.name.startswith("unused")] == names
    assert {row.kernel for row in report.rows if row.name.startswith("blocks")} == {"CPU packed 2:4"}
    head = next(row for row in report.rows if row.name == "head.weight")
    assert (head.status, head.reason) == ("dense", "2:4 along axis 1, but in no part that was lowered")
    text = str(report)
    assert "2 parts on cpu" in text
    assert "part by part: outputs differ by up to" in text
    assert "blocks.0.run.up_weight" in str(nm.verify(fast))
    assert "packed by nm.lower" in str(nm.verify(fast))


def test_it_can_be_copied_saved_and_loaded(writer: Writer) -> None:
    fast, file = nm.lower_parts(writer, "blocks.*", writing, backend="cpu", force=["blocks.*"]), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    given = tokens(2, 3)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert torch.equal(other(given), fast(given))


class Two(nn.Module):
    """A part that takes two tensors, a number and a keyword, of which only some vary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, place: Tensor, by: float = 1.0, *, more: tuple[Tensor, bool]) -> Tensor:
        y: Tensor = self.layer(x * place) * by + more[0]
        return y


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, x: Tensor, by: float = 2.0, flag: bool = True) -> Tensor:
        place = torch.ones(1, x.shape[1], WIDTH)
        y: Tensor = self.two(x, place, by, more=(x[:1], flag))
        return y


def test_parts_of_several_inputs_and_keywords_are_watched_as_they_are_called() -> None:
    model = sparse(Around())

    def run(model: nn.Module) -> None:
        model(torch.randn(3, 7, WIDTH))
        model(torch.randn(3, 1, WIDTH))

    fast = nm.lower_parts(model, "two", run, backend="cpu", force=["*"])
    x = torch.randn(3, 12, WIDTH)
    torch.testing.assert_close(fast(x), model(x))


def calls(*several: Callable[[Any], Any]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        for call in several:
            call(model)

    return run


X = torch.randn(2, 3, WIDTH)


@pytest.mark.parametrize(("run", "difference"), [
    (calls(lambda m: m(X), lambda m: m(X, by=3.0)), r"2\.0 and 3\.0"),
    (calls(lambda m: m(X), lambda m: m(X.double())), "a float32 tensor of 3 axes and a float64 tensor of 3 axes"),
    (calls(lambda m: m(X), lambda m: m.two(X, X, 2.0, more=(X, True, X))), "arguments of another structure"),
    (calls(lambda m: m(X), lambda m: m.two(X, X, more=(X, True))), "with x, place, by, more and with x, place, more"),
], ids=["a number", "a dtype", "an element", "an argument"])  # fmt: skip
def test_a_part_that_is_called_in_several_ways_is_an_error_that_says_how_they_differ(run: Any, difference: str) -> None:
    def forgiving(model: Any) -> None:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):  # the layer itself takes no float64
            run(model)

    with pytest.raises(nm.NMError, match=rf"two is called in several ways \({difference}\).*name the layers inside it"):
        nm.lower_parts(sparse(Around()), "two", forgiving, backend="cpu")


def test_arguments_by_place_and_by_name_are_one_kind_of_call() -> None:
    model = sparse(Around())
    run = calls(lambda m: m(X), lambda m: m.two(more=(X[:1], True), by=2.0, place=X[:1], x=X))
    fast = nm.lower_parts(model, "two", run, backend="cpu", force=["*"])
    torch.testing.assert_close(fast(X), model(X))
    given = {"x": X, "place": X[:1], "by": 2.0, "more": (X[:1], True)}
    torch.testing.assert_close(fast.two(**given), model.two(**given))


class Loose(Block):
    """Takes keywords that it hands on, as the layers of Hugging Face do."""

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        y: Tensor = super().forward(x)
        return y if more["by"] is None else y * float(more["by"])


def test_sizes_are_free_beside_keywords_that_forward_has_no_names_for() -> None:
    block = sparse(nn.ModuleList([Loose()]))
    fast = nm.lower_parts(block, "0", lambda block: block[0](X, by=None, mask=None), backend="cpu", force=["*"])
    x = torch.randn(7, 2, WIDTH)
    torch.testing.assert_close(fast[0](x, by=None, mask=None), block[0](x, by=None, mask=None))


class Reading(nn.Module):
    """Uses its layer in ways beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.forward(x)
        return y

    def by_weight(self, x: Tensor) -> Tensor:
        y: Tensor = self(x.to(self.block.up.weight.dtype))
        return y

    def bare(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.block.up.weight)


def test_a_part_whose_forward_is_called_itself_is_lowered() -> None:
    model = sparse(Reading())
    fast = nm.lower_parts(model, "block", lambda model: model(X), backend="cpu", force=["*"])
    torch.testing.assert_close(fast(X), model(X))


def test_what_the_model_reads_of_a_part_beside_its_forward_is_told_to_name_the_module_around_it() -> None:
    model = sparse(Reading())
    match = "block.up is a part that run= never calls.* Where only its weights are used, .*, name the module around it"
    with pytest.raises(nm.NMError, match=match):
        nm.lower_parts(model, "block.up", lambda model: model.bare(X), backend="cpu")
    fast = nm.lower_parts(model, "block.up", lambda model: model(X), backend="cpu", force=["*"])
    match = r"block.up is a lowered part \(Linear\) and has no 'weight'.* name the module around it in parts="
    with pytest.raises(AttributeError, match=match):
        fast.by_weight(X)


def test_a_model_that_was_compiled_is_watched_without_compiling_it_anew() -> None:
    model, graphs = sparse(nn.Sequential(Block())), list[Any]()

    def backend(gm: Any, given: Any) -> Any:
        graphs.append(gm)
        return gm

    model.compile(backend=backend)
    with torch.no_grad():
        model(X)
        before = len(graphs)
        fast = nm.lower_parts(model, "0", lambda model: model(X), backend="cpu", force=["*"])
        assert len(graphs) == before
        torch.testing.assert_close(fast(X), model(X))


def test_parts_under_autocast_are_an_error_as_they_would_compute_in_another_dtype() -> None:
    model = sparse(nn.Sequential(Block(), Block()))

    def run(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(X)

    with pytest.raises(
        nm.NMError, match=r"0.up is called under torch.autocast \(bfloat16\).* parts of model.to\(torch.bfloat16\)"
    ):
        nm.lower_parts(model, "*.up", run, backend="cpu")
    fast = nm.lower_parts(model, "*.up", lambda model: model(X), backend="cpu", force=["*"])
    with pytest.raises(
        nm.NMError, match=r"0.up is a lowered part \(Linear\), which knows nothing of torch.autocast \(bfloat16\)"
    ):
        run(fast)
    with torch.autocast("cpu", enabled=False):
        torch.testing.assert_close(fast(X), model(X))


def test_examples_are_let_go_part_by_part_and_dense_weights_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = sparse(nn.Sequential(Block(), Block())), list[Any]()

    def lower(part: nn.Module, args: Any, *rest: Any, **options: Any) -> Lowered:
        assert all(each.expired() for each in seen)
        seen.append(StorageWeakRef(args[0].untyped_storage()))
        return lower_over(part, args, *rest, **options)

    monkeypatch.setattr("nm_compiler.lowering_parts.lower_over", lower)
    dense = [StorageWeakRef(layer.weight.untyped_storage()) for layer in model.modules() if isinstance(layer, nn.Linear)]
    fast = nm.lower_parts(model, ["*.up", "*.down"], lambda model: model(X), backend="cpu", force=["*"])
    assert len(seen) == 4
    del model
    gc.collect()
    assert all(each.expired() for each in dense)
    fast(X)


class Cache:
    length = 0


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.length += x.shape[0]
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize(("parts", "run", "match"), [
    ("nothing.*", writing, r"parts='nothing.\*' matches no module of this Writer; there are embed, blocks, blocks.0"),
    ("unused", writing, "unused is a part that run= never calls: leave it out of parts="),
    ("embed", writing, r"none of the 1 parts \(embed\) has a weight that is 2:4"),
    ("blocks.0", lambda model: None, "blocks.0 is a part that run= never calls"),
], ids=["no such part", "never called", "dense", "nothing runs"])  # fmt: skip
def test_parts_that_cannot_be_lowered_are_an_error(writer: Writer, parts: str, run: Any, match: str) -> None:
    with pytest.raises(nm.NMError, match=match):
        nm.lower_parts(writer, parts, run, backend="cpu")


def test_an_object_that_no_graph_takes_is_named() -> None:
    model = sparse(nn.Sequential(Cached()))
    with pytest.raises(nm.NMError, match="0 is called with a Cache, which no graph takes: name the layers inside it"):
        nm.lower_parts(model, "0", lambda model: model[0](torch.randn(2, WIDTH), Cache()), backend="cpu")
    fast = nm.lower_parts(model, "*.layer", lambda model: model[0](torch.randn(2, WIDTH), Cache()), backend="cpu", force=["*"])
    assert lowered_in(fast) == ["0.layer"]


def test_what_lower_says_of_a_part_comes_with_its_name(writer: Writer) -> None:
    class Branching(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) != 0.5 else x

    writer.blocks[1] = sparse(Branching())
    with pytest.raises(nm.NMError, match=r"(?s)^blocks\.1: Branching could not be captured.*nm\.lower_parts"):
        nm.lower_parts(writer, "blocks.*", writing, backend="cpu")


def test_models_that_train_or_are_lowered_and_backends_that_write_files_are_an_error(writer: Writer) -> None:
    with pytest.raises(nm.NMError, match="still trains"):
        nm.lower_parts(nm.compile(Writer(), (tokens(2, 4),)), "blocks.*", lambda model: model(tokens()))
    with pytest.raises(nm.NMError, match="backend='onnx' writes a file of a whole model"):
        nm.lower_parts(writer, "blocks.*", writing, backend="onnx")
    fast = nm.lower_parts(writer, "blocks.0", writing, backend="cpu", force=["*"])
    with pytest.raises(nm.NMError, match="blocks.0 is lowered already"):
        nm.lower_parts(fast, "blocks.*", writing)
    assert lowered_in(nm.lower_parts(fast, "blocks.1", writing, backend="cpu", force=["*"])) == ["blocks.0", "blocks.1"]
