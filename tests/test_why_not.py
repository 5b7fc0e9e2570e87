# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Every reason for a dense weight: it can be triggered, docs/why-not-sparse.md says what to do about it, and none is left out.

A new reason without a row here or a sentence there fails: `written` reads them out of the source.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import refused
import torch
from models import MLP, example
from test_no_silent_density import FusedHead
from test_routers import Mixture
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace

import nm_compiler as nm
from nm_compiler.capture.export import capture_mode
from nm_compiler.fragments.dynamo import Fragments
from nm_compiler.layout import Layout
from nm_compiler.live.growing import added, loaded_dense, not_yet, too_late
from nm_compiler.lowering import _sparse_sites
from nm_compiler.methods import bimask as bimask_method
from nm_compiler.pattern import Pattern, PatternMap
from nm_compiler.runtime.backends import cpu as cpu_backend
from nm_compiler.runtime.backends import cusparselt as cusparselt_backend
from nm_compiler.runtime.backends.base import Job
from nm_compiler.runtime.backends.choosing import _hint, _short, choose_backend
from nm_compiler.runtime.backends.dense import Dense
from nm_compiler.runtime.backends.tensorrt import _decided
from nm_compiler.runtime.choose import Timing
from nm_compiler.runtime.cusparselt.candidates import candidates
from nm_compiler.runtime.cusparselt.eligible import Machine, Product, int8_reasons, reasons
from nm_compiler.runtime.cusparselt.unfold import Geometry
from nm_compiler.runtime.native import library as native
from nm_compiler.runtime.native.eligible import reasons as of_cpu
from nm_compiler.runtime.native.whole import Whole
from nm_compiler.runtime.products import Decision, unread
from nm_compiler.runtime.products import Product as Planned
from nm_compiler.runtime.tensorrt.eligible import reasons as of_tensorrt
from nm_compiler.runtime.tensorrt.log import SparsityLog
from nm_compiler.sites.equations import equation_of
from nm_compiler.sites.plan import Plan, Site, find
from nm_compiler.streaming.planning import plan_tensors
from nm_compiler.streaming.tensor_file import Entry

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "why-not-sparse.md"

# --- how to trigger them


def site(*shape: int, pattern: str = "2:4", conv_groups: int = 1, blocks: int = 1) -> Site:
    return Site("w", "linear", shape or (256, 256), Layout(1, 0), Pattern.parse(pattern), conv_groups, blocks)


def unpruned(name: str, *shape: int, dtype: str = "BF16", **options: Any) -> str:
    """Why nm-compiler prune leaves a tensor dense, beside one that it prunes."""
    entries = {"last.weight": Entry("last.weight", "F32", (8, 8), 0, 0), name: Entry(name, dtype, shape or (8, 8), 0, 0)}
    model = options.get("model")
    if model is not None:
        model.last = nn.Linear(8, 8, bias=False)
    elif "model_type" in options:  # of such a model only a tensor that the built model has is pruned
        with pytest.raises(nm.NMError, match="can be 2:4") as error:
            plan_tensors(entries, PatternMap.parse("2:4"), **options)
        return str(error.value).splitlines()[2].partition(": ")[2]
    plan = plan_tensors(entries, PatternMap.parse("2:4"), **options)
    return next(refusal.reason for refusal in plan.refusals if refusal.where == name)


def matrix_of_a_bilinear() -> nn.Module:
    model = nn.Sequential(nn.Bilinear(8, 8, 1))
    model[0].weight = nn.Parameter(torch.zeros(8, 8))
    return model


@functools.cache
def mlp(dtype: torch.dtype) -> tuple[nn.Module, GraphModule]:
    model = MLP().to(dtype)
    return model, capture_mode(model, (example(model).to(dtype),), {}, training=False)[0]


def plan(pattern: Any = "2:4", **options: Any) -> Plan:
    model, gm = mlp(torch.float32)
    return find(model, [gm], PatternMap.parse(pattern), **options)


def refusal(name: str, pattern: Any = "2:4", **options: Any) -> str:
    return next(each.reason for each in plan(pattern, **options).refusals if each.where == name)


def routed() -> str:
    model = Mixture("argmax")
    gm = capture_mode(model, (torch.randn(2, 8),), {}, training=False)[0]
    found = find(model, [gm], PatternMap.parse("2:4"))
    return next(each.reason for each in found.refusals if each.where == "gate.weight")


def between() -> str:
    model = nm.compile(FusedHead(tied=False), method=nm.SRSTE(), then="eager")
    model(torch.arange(4))
    return next(row.reason for row in nm.report(model).rows if row.name == "head.weight")


class Normed(nn.Module):
    """Divides by the norm of a parameter, in a function that TorchDynamo does not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.base = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)) / torch._dynamo.disable(torch.linalg.norm)(self.base.detach()))
        return y


def handed_over() -> str:
    model = nm.compile(Normed(), method=nm.SRSTE(), then="eager", include=["*"])
    model(torch.randn(4, 8))
    return next(row.reason for row in nm.report(model).rows if row.name == "base")


class State(dict[str, Tensor]):
    """A weight as a method has it at its first step."""

    def __init__(self, method: nm.Method, at: Site) -> None:
        super().__init__(method.state(at, torch.randn(at.shape)))
        self.site = at

    def read(self, suffix: str) -> Tensor:
        return self[suffix]


def remark(method: nm.Method, at: Site) -> str | None:
    return method.remark(State(method, at))


def untrained() -> str | None:
    """Of LBC, combinations retired, scores as they were made."""
    state = State(nm.LBC(), site(8, 8))
    state["live"] = torch.ones_like(state["live"])
    return nm.LBC().remark(state)


def trained_on(at: Site, machine: Machine | None = None) -> str | None:
    method = nm.BiMask(products="cusparselt")
    state: Any = State(method, at)
    state.param = torch.zeros(1)
    with patch.object(bimask_method, "machine_of", lambda device: machine):
        return method.remark(state)


def late() -> str:
    carrier = Fragments(nn.Linear(8, 8), {})
    carrier.passes, carrier.unread = [], frozenset({"weight"})
    carrier.note_outside("weight", torch.matmul)
    return carrier.late["weight"]


def no_tensors(target: Any, *args: Any) -> Any:
    graph = Graph()
    return equation_of(graph.call_function(target, (graph.placeholder("x"), *args)))


def not_frozen() -> str:
    model, _ = mlp(torch.float32)
    return _sparse_sites(model, plan(include=["*"]))[1]["fc2.weight"]


def unread_by(name: str) -> str:
    root, graph = nn.Module(), Graph()
    root.w = nn.Parameter(torch.randn(4, 4))
    read = graph.get_attr("w")
    read.meta["weight"] = "w"
    graph.output(graph.call_function(torch.ops.aten.bmm.default, (graph.placeholder("x"), read)))
    return unread(GraphModule(root, graph), {"w": site(), "v": site()})[name]


def of_dense(backend: Any) -> Decision:
    given = SimpleNamespace(
        options={}, products=[Planned("linear", "w", site(), torch.float16)], gm=symbolic_trace(nn.Identity())
    )
    return backend.lower(given).decisions["linear"]


LINEAR = Product("linear", (32, 64), torch.float16, Pattern(2, 4), 4096)
CONV = Product("conv2d", (32, 64, 1, 1), torch.float16, Pattern(2, 4), geometry=Geometry())
GPU = Machine("cuda", (9, 0), 802)


def packed(product: Product, machine: Machine = GPU, **change: Any) -> str:
    (found,) = reasons(replace(product, **change), machine)
    return found


def measured(*, graph: bool = False) -> Decision:
    job = SimpleNamespace(gm=mlp(torch.float32)[0], force=())
    candidate = SimpleNamespace(reasons=(), product=replace(LINEAR, tokens=30))
    each = Planned("linear", "fc2.weight", site(), torch.float16)
    with patch.object(cusparselt_backend, "_timed", return_value=Timing(1e-3, 2e-3)):
        return cusparselt_backend.CuSPARSELt()._decide(job, each, candidate, SimpleNamespace(graph=graph))


def unfrozen_candidate() -> str:
    _, gm = mlp(torch.bfloat16)
    (found,) = candidates(gm, {"fc2.weight": site(16, 16)}, machine=GPU, min_tokens=0)
    return found.reasons[0]


def on_cpu(
    op: Any = torch.ops.aten.linear.default, axes: int = 0, dtype: torch.dtype = torch.float32, pattern: str = "2:4"
) -> str:
    value = SimpleNamespace(meta={"val": torch.empty([4] * (axes + 2), device="meta")})
    name = "conv2d" if axes else "linear"
    node = SimpleNamespace(target=op, args=(value, value, None, 1, "same"), kwargs={})
    (found,) = of_cpu(Planned(name, "w", replace(site(pattern=pattern), op=name), dtype), node)
    return found


def measured_on_cpu(model: nn.Module, x: Tensor, name: str) -> Decision:
    """Of a product that was twice as slow sparse."""
    gm, signature = capture_mode(model, (x,), {}, training=False)
    node = next(each for each in gm.graph.nodes if len(each.args) > 1 and getattr(each.args[1], "target", None) == name)
    at = site(*model.get_parameter(name).shape)
    each = Planned(node.name, name, replace(at, op="linear" if len(at.shape) == 2 else "conv2d"), torch.float32)
    job = Job(gm, signature, {}, (x,))
    choices = SimpleNamespace(find=lambda key, measure: Timing(1e-3, 2e-3))
    with patch.object(cpu_backend, "pack", lambda *_, **__: SimpleNamespace(nbytes=1)):
        return cpu_backend._decide(job, each, node, cpu_backend.Wish(choices=choices))


def kernels(*files: str, handle: Any = None, off: str = "") -> str:
    """Why there are no kernels in a folder that holds ``files``. handle: what loading gives, an error by default."""

    def loaded(path: str) -> Any:
        if handle is None:
            raise OSError("file too short")
        return handle

    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            Path(folder, file).touch()
        there = patch.object(native, "__file__", str(Path(folder, "library.py")))
        with there, patch.object(ctypes, "CDLL", loaded), patch.dict(os.environ, {"NM_COMPILER_NATIVE": off}):
            found = native.load.__wrapped__()
        return found.replace(folder, "native")


def processor(*sets: int, isa: str | None = None) -> str:
    with patch.object(platform, "machine", lambda: "x86_64"):
        return native._chosen(SimpleNamespace(nm_isa_name=lambda number: b"" if number in sets else None), isa)


OTHER: Any = SimpleNamespace(nm_version=lambda: 0)  # an older library lacks functions, too


def tensorrt(at: Site, dtype: torch.dtype = torch.float16) -> tuple[str, str]:
    """(reason, hint); no reason where it may be sparse."""
    found, hint = of_tensorrt(Planned("linear", "w", at, dtype))
    return "".join(found), hint


def built(log: SparsityLog) -> Decision:
    return _decided(Planned("linear", "w", site(), torch.float16), log)


def onnx_reason(*nodes: tuple[str, list[str], list[str], dict[str, Any]]) -> str:
    onnx = pytest.importorskip("onnx", reason="pip install 'nm_compiler[onnx]'")
    from nm_compiler.runtime.onnx_files import found, reading

    made = [onnx.helper.make_node(op, inputs, outputs, **options) for op, inputs, outputs, options in nodes]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    weights = [onnx.numpy_helper.from_array(torch.ones(4, 4).numpy(), name) for name in "wv"]
    graph = onnx.helper.make_graph(made, "g", ends[:1], ends[1:], weights)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    with patch.object(found, "load", lambda _: model), patch.object(reading, "load", lambda _: model):
        (only,) = found.planned_constants(Path("model.onnx"), None, {"w": site(4, 4)}, {})[1]
    return only.reason


TRANSPOSED: Any = ("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["y"], {})
A_PARAMETER = "not a parameter: make it an nn.Parameter(requires_grad=False) to make it sparse"
MEASURED = "this is done only where it is measured (choose=True), and TensorRT needs no copy (backend='tensorrt')"

PLANNING: list[tuple[str, Callable[[], Any]]] = [
    *((text, lambda name=f"w{number}": refused.reasons()[name]) for number, (text, _, _) in enumerate(refused.READERS)),
    ("inside a fused LSTM, GRU or RNN op: write the cell with linear layers to make it sparse", lambda: refused.reasons()["lstm.weight_hh_l0"]),
    ("not floating point (torch.int64): dequantise it to make it sparse", lambda: refused.reasons()["counts"]),
    ("not read by the captured graph: give example inputs that use it", lambda: refused.reasons()["unread"]),
    (f"a buffer, {A_PARAMETER}", lambda: refused.reasons()["basis"]),
    (f"a plain tensor, {A_PARAMETER}", lambda: refused.reasons()["table"]),
    ("its operands are no tensors", lambda: no_tensors(torch.ops.aten.mm.default, 2.0)),
    ("its operands are no tensors", lambda: no_tensors(torch.ops.aten.inner.default, 2.0)),
    ("multiplied by Python that TorchDynamo does not compile, where no mask reaches it", between),
    ("handed to Python that TorchDynamo does not compile, which may do anything with it", handed_over),
    ("stem: no other weight comes before it (include= makes it sparse)", lambda: refusal("fc1.weight")),
    ("head: no other weight comes after it (include= makes it sparse)", lambda: refusal("fc3.weight")),
    ("router: its result chooses what weights come next (include= makes it sparse)", routed),
    ("excluded by 'fc2.*'", lambda: refusal("fc2.weight", exclude=["fc2.*"], include=["*"])),
    ("no rule of pattern=fc1.* 2:4 matches it: add one", lambda: refusal("fc2.weight", {"fc1.*": "2:4"}, include=["*"])),
]  # fmt: skip
TRAINING: list[tuple[str, Callable[[], Any]]] = [
    ("first used after nm.compile, on a path that the example inputs did not take: give inputs that take it", late),
    ("not read by any call so far", lambda: not_yet("w").reason),
    ("its scores were needed before the optimizer: name it in include=['w'] of nm.compile", lambda: too_late("w").reason),
    ("added after nm.compile: change layers before it, or nm.freeze first and nm.compile again", lambda: added("w").reason),
    ("dense in the state_dict that was loaded before the first call", lambda: loaded_dense("w").reason),
    ("backward mask = forward mask: 6 output channels, not a multiple of 4", lambda: remark(nm.BiMask(), site(6, 8))),
    ("backward mask = forward mask: 6 output channels in each conv group, not a multiple of 4", lambda: remark(nm.BiMask(), site(12, 8, 1, conv_groups=2, blocks=2))),
    ("backward mask = forward mask: 6 output channels in each slice that a product reads, not a multiple of 4", lambda: remark(nm.BiMask(), site(12, 8, blocks=2))),
    ("cuSPARSELt products from 16384 tokens on, in float16 or bfloat16", lambda: trained_on(site(32, 64), Machine("cuda", (9, 0), 800))),
    ("masked dense products: the weight is on cpu: move the model to an NVIDIA GPU first", lambda: trained_on(site(32, 64), Machine("cpu"))),
    ("masked dense products: conv2d is not trained on packed weights, only linears are: write it as torch.nn.functional.linear", lambda: trained_on(replace(site(32, 64), op="conv2d"))),
    ("masked dense products: its product reads it transposed: keep it as [out, in]", lambda: trained_on(replace(site(32, 64), layout=Layout(0, 1)))),
    ("masked dense products: its products read slices of it: give each a weight of its own", lambda: trained_on(site(32, 64, blocks=2))),
    ("N:M forward only: 6 output channels in a block, not a multiple of 4", lambda: remark(nm.Transposable(), site(6, 8))),
    ("training: combinations are still live", lambda: remark(nm.LBC(), site(8, 8))),
    ("training: combinations are still live", lambda: remark(nm.LBCBiMask(), site(8, 8))),
    ("kept by magnitude: its scores never moved", lambda: untrained()),
    ("training: more than N of a group are still kept", lambda: remark(nm.Gradual(), site(8, 8))),
]  # fmt: skip
LOWERING: list[tuple[str, Callable[[], Any]]] = [
    ("not 2:4 along any axis", lambda: nm.report(MLP()).rows[0].reason),
    ("not 2:4: a group of 4 along axis 1 has 4 non-zeros", not_frozen),
    ("read by bmm, for which no runtime here has sparse kernels: write the product as a linear, of experts as one for each", lambda: unread_by("w")),
    ("no product reads it in evaluation mode, so nothing would get faster", lambda: unread_by("v")),
    ('backend="dense" was asked for', lambda: of_dense(Dense()).reasons[0]),
    ("no sparse kernels for mps in this release", lambda: _short(torch.float16, torch.device("mps"))),
    ("no CPU kernels here", lambda: of_dense(choose_backend("auto", torch.float16, torch.device("cpu"))).reasons[0]),
    ("what the notes say about the CPU kernels, or an NVIDIA GPU", lambda: _hint(torch.device("cpu"))),
    ("an NVIDIA GPU, and dtype=torch.float16 or bfloat16", lambda: of_dense(choose_backend("auto", torch.float16, torch.device("mps"))).hint),
    ("float32: sparse kernels need float16 or bfloat16", lambda: _short(torch.float32, torch.device("cuda"))),
    ("neither TensorRT nor cuSPARSELt works here", lambda: _short(torch.float16, torch.device("cuda"))),
]  # fmt: skip
CPU: list[tuple[str, Callable[[], Any]]] = [
    ("M = 64, and the CPU kernels take M up to 32: choose a pattern with a smaller M", lambda: on_cpu(pattern="2:64")),
    ("float64, and the CPU kernels take float32 and bfloat16: say dtype=torch.float32", lambda: on_cpu(dtype=torch.float64)),
    ("conv2d with this padding or number of axes, and the CPU kernels take one to three, padded evenly: pad the data first, or write it as a linear", lambda: on_cpu(torch.ops.aten.conv2d.padding, 2)),
    ("measured 0.50x of dense at 2 tokens", lambda: measured_on_cpu(MLP(), example(MLP()), "fc2.weight").reasons[0]),
    ("measured 0.50x of dense at inputs of [2, 4, 3, 3]", lambda: measured_on_cpu(nn.Conv2d(4, 8, 1), torch.randn(2, 4, 3, 3), "weight").reasons[0]),
    ("measured 0.50x of dense in the whole graph", lambda: cpu_backend._undone(Decision("CPU packed 2:4"), Whole({"eager": 1.0, "packed": 2.0})).reasons[0]),
    ("fewer kept weights (1:4, 1:8), a larger layer, or force=[...]", lambda: measured_on_cpu(MLP(), example(MLP()), "fc2.weight").hint),
    ("the model is on cuda: model.cpu()", lambda: cpu_backend.Cpu().missing(torch.float32, torch.device("cuda"))),
    ("float16, and the CPU kernels take float32 and bfloat16: say dtype=torch.float32", lambda: cpu_backend.Cpu().missing(torch.float16, torch.device("cpu"))),
    ("switched off by NM_COMPILER_NATIVE=0", lambda: kernels(off="0")),
    ("the CPU kernels were not built: pip install nm_compiler, with a C compiler at hand", kernels),
    ("the CPU kernels were not built: the compiler's words are in native/_kernels.log", lambda: kernels("_kernels.log")),
    ("the CPU kernels cannot be loaded (file too short): reinstall nm_compiler", lambda: kernels("_kernels.so")),
    ("the CPU kernels were built from another version: reinstall nm_compiler", lambda: kernels("_kernels.so", handle=OTHER)),
    ("the processor has no avx512", lambda: processor(0, 1, isa="avx512")),
    ("the processor has no AVX2: dense kernels are faster there", lambda: processor(0)),
]  # fmt: skip
TENSORRT: list[tuple[str, Callable[[], Any]]] = [
    ("1:4: sparse tensor cores multiply 2:4", lambda: tensorrt(site(pattern="1:4"))[0]),
    ("train with pattern='2:4'", lambda: tensorrt(site(pattern="1:4"))[1]),
    ("2 conv groups: TensorRT has no sparse kernel for grouped convolutions", lambda: tensorrt(site(256, 256, 3, 3, conv_groups=2))[0]),
    ("float32: sparse kernels exist for float16, bfloat16 and 8 bits", lambda: tensorrt(site(), torch.float32)[0]),
    ("cast: nm.lower(..., dtype=torch.float16)", lambda: tensorrt(site(), torch.float32)[1]),
    ("12 x 40 channels: output channels must be a multiple of 8, input channels of 16", lambda: tensorrt(site(12, 40))[0]),
    ("pad to 16 x 48", lambda: tensorrt(site(12, 40))[1]),
    ("below 256 channels sparse kernels seldom win", lambda: tensorrt(site(64, 64))[1]),
    ("TensorRT measured a dense kernel as faster", lambda: built(SparsityLog(eligible=("[linear]",))).reasons[0]),
    ("larger batch", lambda: built(SparsityLog(eligible=("[linear]",))).hint),
    ("TensorRT's log does not name this layer", lambda: built(SparsityLog()).reasons[0]),
]  # fmt: skip
CUSPARSELT: list[tuple[str, Callable[[], Any]]] = [
    ("matmul is not lowered, only linears and 2-D convolutions are: write it as torch.nn.functional.linear", lambda: packed(LINEAR, op="matmul")),
    ("4:8 can keep more than 2 of 4 neighbours, and sparse tensor cores have 2:4 only: use pattern='2:4'", lambda: packed(LINEAR, pattern=Pattern(4, 8))),
    ("int8 without its scales: leave the weight in float16 or bfloat16, options={'int8': ['*']} rounds it", lambda: packed(LINEAR, dtype=torch.int8)),
    ("conv2d stays in 16 bits: only linears are packed in int8", lambda: int8_reasons(CONV)[0]),
    ("no sparse product is built for float32: cast the model to float16 or bfloat16", lambda: packed(LINEAR, dtype=torch.float32)),
    (f"3x3 taps, a matrix product only by a copy of 9 times the input: {MEASURED}", lambda: packed(CONV, geometry=Geometry((3, 3)))),
    (f"stride 2x2, a matrix product only by a copy of the input: {MEASURED}", lambda: packed(CONV, geometry=Geometry(stride=(2, 2)))),
    (f"a padded 1x1 convolution, a matrix product only by a copy of the input: {MEASURED}", lambda: packed(CONV, geometry=Geometry(sides=(1, 1, 1, 1)))),
    ("2 conv groups are as many small products, for which nothing has sparse kernels: use groups=1", lambda: packed(CONV, groups=2)),
    ("40 output channels are no multiple of 16: make them 48", lambda: packed(LINEAR, shape=(40, 64))),
    ("30 tokens, and packed products tend to be slower below 1024: use a larger batch, or lower min_tokens", lambda: packed(LINEAR, tokens=30)),
    ("the weight has more than 2 non-zeros in some group of 4 along its inputs: freeze the model first", unfrozen_candidate),
    ("measured 0.50x of dense at 30 tokens", lambda: measured().reasons[0]),
    ("more tokens a call, or force=[...]", lambda: measured(graph=True).hint),
    ("options={'graph': True} if it runs in a CUDA graph, more tokens a call, or force=[...]", lambda: measured().hint),
    ("the weight is on cpu: move the model to an NVIDIA GPU first", lambda: packed(LINEAR, Machine("cpu"))),
    ("torch finds no NVIDIA GPU: work on the machine that runs the model", lambda: packed(LINEAR, Machine("cuda", None, 802))),
    ("compute capability 7.5 has no sparse tensor cores: they came with 8.0 (Ampere)", lambda: packed(LINEAR, Machine("cuda", (7, 5), 802))),
    ("this torch was built without cuSPARSELt: install one of the CUDA wheels of pytorch.org", lambda: packed(LINEAR, Machine("cuda", (9, 0)))),
]  # fmt: skip
ONNX: list[tuple[str, Callable[[], Any]]] = [
    ("the file moves it before its MatMul, which hides its zeros", lambda: onnx_reason(*TRANSPOSED)),
    ("the file reads it with Add, for which no runtime has N:M kernels", lambda: onnx_reason(("Add", ["x", "w"], ["y"], {}))),
    ("the file computes another constant from it: no Conv, MatMul or Gemm reads it as it is", lambda: onnx_reason(("MatMul", ["x", "v"], ["y"], {}))),
]  # fmt: skip
PRUNE: list[tuple[str, Callable[[], Any]]] = [
    ("3 axes: only linears are pruned here; nm.compile(method=nm.Magnitude()) takes the others", lambda: unpruned("up.weight", 8, 8, 8)),
    ("I8: only F16, BF16, F32 and F64 can be pruned; dequantise it first", lambda: unpruned("up.weight", dtype="I8")),
    ("not called *.weight", lambda: unpruned("up.qweight")),
    ("an embedding", lambda: unpruned("0.weight", model=nn.Sequential(nn.Embedding(8, 8)))),
    ("of a Bilinear, which is no linear", lambda: unpruned("0.weight", 8, 8, model=matrix_of_a_bilinear())),
    ("linears of gpt2 lie as [in, out], which only the model can tell: pip install 'nm_compiler[hf]'", lambda: unpruned("up.weight", model_type="gpt2")),
    ("an embedding, by its name (include= takes it in)", lambda: unpruned("embed_tokens.weight")),
    ("a head, by its name (include= takes it in)", lambda: unpruned("lm_head.weight")),
    ("a router, by its name (include= takes it in)", lambda: unpruned("mlp.gate.weight")),
    ("a norm, by its name (include= takes it in)", lambda: unpruned("input_layernorm.weight")),
]  # fmt: skip
REASONS = [*PLANNING, *TRAINING, *LOWERING, *CPU, *TENSORRT, *CUSPARSELT, *ONNX, *PRUNE]


@pytest.mark.parametrize(("words", "trigger"), REASONS, ids=[words for words, _ in REASONS])
def test_a_reason_appears_in_these_words(words: str, trigger: Callable[[], Any]) -> None:
    assert trigger() == words


# --- the page has a sentence for each


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def entries() -> tuple[tuple[str, ...], ...]:
    """The rows of the page's tables: the words as the report has them, why, and the way out."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return tuple(tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in lines)


def shaped(words: str) -> re.Pattern[str]:
    """The page's words with <anything>, N:M and M in the place of what differs."""
    text = re.sub(r"<\w[\w ]*>", "(.+)", re.escape(words).replace(r"\ ", " "))
    return re.compile(re.sub(r"\bM\b", r"(?:M|\\d+)", re.sub("N:M", r"(?:N:X|\\d+:\\d+)", text)).replace("N:X", "N:M"))


def test_every_reason_has_a_row_on_the_page_with_why_and_the_way_out() -> None:
    assert all(len(row) == 3 and all(row) for row in entries()), [row for row in entries() if len(row) != 3 or not all(row)]
    known = [shaped(words) for row in entries() for cell in row for words in spans(cell)]
    missing = [words for words, _ in REASONS if not any(each.fullmatch(words) for each in known)]
    assert not missing, f"docs/why-not-sparse.md says nothing of {missing}"


def test_the_page_has_no_row_for_words_that_no_report_holds() -> None:
    stale = [w for row in entries() for w in spans(row[0]) if not any(shaped(w).fullmatch(words) for words, _ in REASONS)]
    assert not stale


# --- and none is left out

EVERYTHING = ("*",)
SOURCES: dict[str, tuple[str, ...]] = {
    "nm_compiler/sites/plan.py": EVERYTHING,
    "nm_compiler/sites/uses.py": EVERYTHING,
    "nm_compiler/sites/views.py": EVERYTHING,
    "nm_compiler/sites/equations.py": EVERYTHING,
    "nm_compiler/fragments/dynamo.py": ("_tell",),
    "nm_compiler/live/growing.py": ("not_yet", "too_late", "added", "loaded_dense"),
    "nm_compiler/lowering.py": ("_sparse_sites",),
    "nm_compiler/reporting.py": ("_plain",),
    "nm_compiler/streaming/planning.py": ("plan_tensors", "_impossible", "_by_globs", "_by_name"),
    "runtime/products.py": ("_unread",),
    "runtime/backends/choosing.py": ("_auto", "_short", "_hint"),
    "runtime/backends/cpu.py": ("missing", "_decide"),
    "runtime/backends/cusparselt.py": ("_decide",),
    "runtime/backends/dense.py": ("__init__", "lower"),
    "runtime/backends/onnx.py": ("_decided",),
    "runtime/backends/tensorrt.py": ("_decided",),
    "runtime/cusparselt/candidates.py": ("_judged",),
    "runtime/cusparselt/eligible.py": EVERYTHING,
    "runtime/native/eligible.py": EVERYTHING,
    "runtime/native/library.py": ("load", "_chosen"),
    "runtime/onnx_files/found.py": EVERYTHING,
    "runtime/tensorrt/eligible.py": EVERYTHING,
    "passes/train_cusparselt.py": ("reasons_of",),
    **{
        f"nm_compiler/methods/{path.name}": ("remark", "_runs_on")
        for path in sorted((ROOT / "nm_compiler" / "methods").glob("*.py"))
    },
}
NO_REASON = {" along axis ", ", checked for ", "Not used, ", "%s stays dense: %s"}  # of a sparse row, titles, notes, the log
_SKIPPED = (ast.Raise, ast.Assert)


def functions(tree: ast.AST, names: tuple[str, ...]) -> Iterator[ast.AST]:
    if names == EVERYTHING:
        yield tree
    else:
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names)


def texts(node: ast.AST, module: dict[str, str]) -> Iterator[list[str]]:
    """The constant parts of every string under ``node`` but docstrings, errors, and the kernels of sparse rows.

    module: the string constants of the file, for the functions that name them.
    """
    for child in ast.iter_child_nodes(node):
        skipped = isinstance(child, ast.keyword) and child.arg == "kernel"
        if isinstance(child, _SKIPPED) or skipped or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield [child.value]
        elif isinstance(child, ast.JoinedStr):
            yield [str(part.value) if isinstance(part, ast.Constant) else "" for part in child.values]
        elif isinstance(child, ast.Name) and child.id in module:
            yield [module[child.id]]
        else:
            yield from texts(child, module)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def written() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(file, constant parts) of every string of two words or more that becomes a reason."""
    found = []
    for name, names in SOURCES.items():
        tree = parsed(ROOT / name)
        assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
        module = {
            str(ast.unparse(node.targets[0])): node.value.value for node in assigned if isinstance(node.value.value, str)
        }
        for function in functions(tree, names):
            found += [
                (name, tuple(parts))
                for parts in texts(function, module)
                if len(re.findall(r"\S*[a-z]\S*", longest(parts))) > 1
            ]
    return tuple(found)


def longest(parts: Any) -> str:
    return max(parts, key=len, default="")


def test_every_reason_in_the_source_is_triggered_above_and_has_its_words_on_the_page() -> None:
    page = " ".join(PAGE.read_text().split())
    assert len(written()) > 70, "the reader of the source has lost them"
    for name, parts in written():
        if longest(parts) in NO_REASON:
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in parts))
        assert any(pattern.search(words) for words, _ in REASONS), f"{name}: nothing in tests/test_why_not.py triggers {parts}"
        assert longest(parts).strip() in page, f"{name}: docs/why-not-sparse.md has no row for {parts}"
    assert {longest(parts) for _, parts in written()} >= NO_REASON


def test_no_other_function_makes_reasons() -> None:
    """Whatever calls Refusal, Blocked or Decision is read by `written`."""
    folders = (ROOT / "nm_compiler", ROOT / "passes", ROOT / "runtime")
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py")) if not path.is_symlink()]
    assert {path.relative_to(ROOT).parts[0] for path in paths} == {folder.name for folder in folders}
    for path in paths:
        name = str(path.relative_to(ROOT)).removeprefix("nm_compiler/")
        name = name if name.startswith(("passes/", "runtime/")) else f"nm_compiler/{name}"
        if SOURCES.get(name) == EVERYTHING:
            continue
        for function in [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]:
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
            made = {node.func.id for node in calls} & {"Refusal", "Blocked", "Decision"}
            assert not made or function.name in SOURCES.get(name, ()), (
                f"{name}: {function.name} makes a {made}: name it in SOURCES"
            )
