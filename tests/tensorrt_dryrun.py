# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Run Torch-TensorRT's lowering and partitioner over frozen models, without TensorRT, and write down what would be built.

    python tests/tensorrt_dryrun.py OUT.json resnet50 bert ...

test_tensorrt.py runs it in a process of its own, because the stand-in (tensorrt_standin.py) changes the process for good.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tensorrt_standin
import torch
from models import ConvNet
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from zoo.shim import declare_missing_operators

import nm_compiler as nm
from nm_compiler.graph import getattr_path
from nm_compiler.runtime.backends import Job, Result, tensorrt
from nm_compiler.runtime.backends.tensorrt import TensorRT
from nm_compiler.solvers.check import worst_group

aten = torch.ops.aten
# Of every product: which argument is the weight, and the axis it is reduced along.
PRODUCTS = {
    aten.convolution.default: (1, 1), aten.linear.default: (1, 1), aten.addmm.default: (2, 0), aten.mm.default: (1, 0),
}  # fmt: skip
Found = dict[str, Any]


def frozen(
    model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.half, include: tuple[str, ...] = (), **kwargs: Any
) -> tuple[nn.Module, list[str]]:
    """The model with 2:4 weights by magnitude, in ``dtype``, and the names of the weights that are sparse."""
    sparse = nm.compile(model.eval(), inputs, kwargs or None, method=nm.Magnitude(), include=include)
    names = [site.name for site in sparse.plan.sites]
    return nm.freeze(sparse).to(dtype), names


def found(compiled: nn.Module, weights: Mapping[str, Tensor]) -> Found:
    """What would be built.

    engines; ops left to PyTorch; and for every planned weight of ``weights`` that reaches a product of an engine as a constant: the
    product, and the most non-zeros in a group of 4 along its reduction axis.
    """
    engines = [(name, child) for name, child in compiled.named_children() if name.startswith("_run_on_acc")]
    left = [str(node.target) for node in compiled.graph.nodes if node.op == "call_function"]
    arrived = {key: value for _, engine in engines for key, value in constants(engine)}
    parameters = {name: fingerprint(weight) for name, weight in weights.items()}
    return {
        "engines": [name for name, _ in engines],
        "others": [name for name, child in compiled.named_children() if not name.startswith("_run_on_acc")],
        "left": [target for target in left if "getitem" not in target],
        "planned": list(weights),
        "weights": {name: arrived[key] for name, key in parameters.items() if key in arrived},
    }


def constants(engine: GraphModule) -> Iterator[tuple[str, list[Any]]]:
    """Fingerprint, op and fullest group of the weight of every product that is a constant of the engine."""
    for node in engine.graph.nodes:
        if node.target not in PRODUCTS:
            continue
        place, axis = PRODUCTS[node.target]
        weight = node.args[place]
        if isinstance(weight, Node) and weight.op == "get_attr":
            value = getattr_path(engine, weight.target).detach()
            groups = worst_group(value, 4, axis) if value.shape[axis] % 4 == 0 else 4
            yield fingerprint(value if axis == 1 else value.T), [str(node.target), groups]


def fingerprint(weight: Tensor) -> str:
    """Equal for equal ``[out, in * taps]`` matrices, whichever rank they are written in."""
    matrix = weight.detach().flatten(1).contiguous()
    return hashlib.sha1(matrix.view(torch.uint8).numpy().tobytes() + str(tuple(matrix.shape)).encode()).hexdigest()


def lowered(
    model: nn.Module, *inputs: Any, dtype: torch.dtype = torch.half, options: Found | None = None, **kwargs: Any
) -> tuple[Found, nn.Module]:
    """What `nm.lower` hands over, as if there were a GPU: engines, and the constants that its graph had before."""
    model, names = frozen(model, *inputs, dtype=torch.float32, **kwargs)
    before: dict[str, Tensor] = {}

    class Watched(TensorRT):
        def lower(self, job: Job) -> Result:
            before.update({each.site.name: getattr_path(job.gm, each.read) for each in job.products})
            return TensorRT.lower(self, job)

        def missing(self, dtype: torch.dtype, device: torch.device) -> None:
            return None  # there is no GPU, and none is needed up to the engine

    vars(tensorrt)["TensorRT"] = Watched
    given = {"dryrun": True, **(options or {})}
    made = nm.lower(model, inputs or None, kwargs or None, backend="tensorrt", dtype=dtype, options=given, check=False)
    assert set(before) >= set(names), set(names) - set(before)
    return found(made.run, {name: before[name] for name in names}), made.run


def image_model(model: nn.Module, **options: Any) -> Found:
    return lowered(model, torch.randn(2, 3, 64, 64), options=options)[0]


def small_resnet() -> nn.Module:
    """ResNet-50 with five of its sixteen blocks: its stem and head, every width, blocks with and without a convolution beside."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 1, 1, 1])


def small_mobilenet() -> nn.Module:
    """MobileNetV2 with three of its seventeen blocks: its stem and head, blocks with and without expansion, stride and sum."""
    import torchvision

    blocks = [[1, 16, 1, 1], [6, 24, 2, 2]]  # expansion, channels, how many, stride
    return torchvision.models.mobilenet_v2(inverted_residual_setting=blocks)


def small_vit() -> nn.Module:
    """A narrow ViT of one layer for small images."""
    import torchvision

    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=1, num_heads=4, hidden_dim=128, mlp_dim=512
    )


def bert() -> Found:
    """A narrow BERT of one layer, padded inputs by keyword, and a batch of 1 to 8, tuned for 3."""
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=1000
    )
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    kwargs = {"input_ids": torch.randint(0, 1000, (2, 16)), "attention_mask": mask}
    facts, module = lowered(transformers.BertModel(config), options={"batch": (1, 3, 8)}, **kwargs)
    return {**facts, "profiles": profiles(module)}


def llama() -> Found:
    """A narrow Llama of one layer in bfloat16."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    tokens = torch.randint(0, 1000, (2, 16))
    return lowered(transformers.LlamaForCausalLM(config), tokens, dtype=torch.bfloat16)[0]


def compiled(freezing: bool) -> Found:
    """``torch.compile(model, backend="tensorrt")``, with and without Dynamo keeping parameters as constants."""
    from torch._dynamo.backends.registry import lookup_backend

    backend, kept = lookup_backend("tensorrt"), []

    def keeping(gm: GraphModule, inputs: list[Tensor], **kwargs: Any) -> Callable[..., Any]:
        kept.append(backend(gm, inputs, **kwargs))
        return kept[-1]

    x = torch.randn(2, 3, 8, 8)
    model, names = frozen(ConvNet(channels=16), x, include=("head.weight",))
    options = {"dryrun": True, "sparse_weights": True, "min_block_size": 1, "pass_through_build_failures": True}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(prepare_freezing=freezing), torch.no_grad():
        result = torch.compile(model, backend=keeping, options=options)(x.half())
        torch.testing.assert_close(result, model(x.half()), atol=1e-2, rtol=1e-2)
    return found(kept[0], {name: model.get_parameter(name) for name in names})


def profiles(module: nn.Module) -> list[list[list[int]]]:
    """Smallest, usual and largest shape of every input of the first engine, as Torch-TensorRT would hand them to TensorRT."""
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs

    inputs = construct_submodule_inputs(module._run_on_acc_0)
    return [[list(x.shape[key]) for key in ("min_shape", "opt_shape", "max_shape")] for x in inputs]


MODELS: dict[str, Callable[[], Found]] = {
    "resnet50": lambda: image_model(small_resnet()),
    "mobilenet_v2": lambda: image_model(small_mobilenet()),
    "vit": lambda: image_model(small_vit(), linear_as_conv=["encoder.*mlp*"]),
    "bert": bert,
    "llama": llama,
    "compile": partial(compiled, False),
    "compile_freezing": partial(compiled, True),
}


def main(out: str, names: list[str]) -> None:
    torch.manual_seed(0)
    tensorrt_standin.install()
    declare_missing_operators()  # before torchvision, which transformers imports as well
    with contextlib.redirect_stdout(io.StringIO()):
        import torch_tensorrt

        logging.getLogger("torch_tensorrt").setLevel(logging.ERROR)
        results = {name: MODELS[name]() for name in names}
    results["torch_tensorrt"] = {
        "version": torch_tensorrt.__version__,
        "keywords": list(inspect.signature(torch_tensorrt.dynamo.compile).parameters),
        "logger": torch_tensorrt.logging._LOGGER.name,
    }
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
