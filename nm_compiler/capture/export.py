"""A model becomes an aten graph: `torch.export`, once in training and once in evaluation mode.

nn.Module --export (non-strict, batch dynamic)--> ExportedProgram --bind--> GraphModule over the model's own state
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from nm_compiler.capture.binding import bind, flat_copy, is_state
from nm_compiler.capture.bodies import EXPORTED, open_bodies, programs
from nm_compiler.capture.explaining import LIBRARIES, explain
from nm_compiler.capture.lengths import lengths_as_sizes
from nm_compiler.capture.regions import checkpoints_open, masks_as_given, open_regions
from nm_compiler.capture.signature import Signature
from nm_compiler.capture.single import other_branches
from nm_compiler.capture.vmapped import open_vmap_in_regions, without_vmap
from nm_compiler.errors import NMError
from nm_compiler.graph import fake_mode_of, getattr_path, tidy
from nm_compiler.memory import free_young, own_cycles_freed

_NOISY = (
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "torch.export",
    "torch._export",
    "torch._dynamo",
)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None
) -> dict[bool, tuple[GraphModule, Signature]]:
    """Capture ``model`` in evaluation (False) and training (True) mode, each as `capture_mode` does."""
    return {training: capture_mode(model, args, kwargs, dynamic_shapes, training=training) for training in (False, True)}


def capture_mode(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any = None, *, training: bool
) -> tuple[GraphModule, Signature]:
    """Capture ``model`` in one mode.

    args, kwargs: example inputs; an example of batch 1 is repeated to 2, since export would specialise 1.
    dynamic_shapes: passed to `torch.export.export`; None makes the batch (axis 0) of every input dynamic. Where it frees that
    axis of every input, an example of batch 1 is repeated as well.
    Returns a graph with flat inputs and outputs bound to the model, and the signature it was taken with.
    Raises NMError that names the line of the user's code. The model's mode and state are as before.
    """
    for name in (*model._modules, *model._parameters, *model._buffers):
        if hasattr(GraphModule, name) or name == "extras":
            raise NMError(f"{type(model).__name__}.{name} has a name that graphs use themselves: rename it, or wrap the model")
    hidden = without_cache(model, kwargs)
    if isinstance(dynamic_shapes, torch.export.ShapesCollection):  # which knows the tensors that were given
        dynamic_shapes = dynamic_shapes.dynamic_shapes(model, args, dict(kwargs))
    args, kwargs = _apart(args, kwargs)
    with own_cycles_freed(), in_mode(model, training):  # an exported program is one large cycle: two would double the peak
        return _export(model, args, {**kwargs, **hidden}, dynamic_shapes, hidden, training)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    hidden: dict[str, Any],
    training: bool,
) -> tuple[GraphModule, Signature]:
    one = dynamic_shapes is None or _batch_is_free(model, dynamic_shapes, args, kwargs)
    given, named = _repeat_batch_of_one(args, kwargs) if one else (args, kwargs)
    try:
        with (
            by_name(model, named),
            quiet(),
            _no_hooks_left(),
            checkpoints_open(),
            masks_as_given(),
            lengths_as_sizes(),
            other_branches(LIBRARIES) as branching,
        ):
            free = dynamic_shapes is None
            shapes = _dynamic_batch(model, given, named) if free else _with_hidden(dynamic_shapes, kwargs, hidden)
            program = torch.export.export(model, given, named or None, dynamic_shapes=shapes, strict=False)
    except NMError:
        raise
    except Exception as error:
        raise NMError(explain(model, error, given, named, training)) from error
    free_young()  # of what traced it
    exported = program.module(check_guards=False)
    open_regions(exported)
    open_vmap_in_regions(exported, fake_mode_of(exported.graph))
    graph = flat_copy(exported.graph)
    extras = _extras(graph, exported, model)
    graph, constants = without_vmap(graph, "val", fake_mode_of(graph))
    gm = bind(graph, model, {**extras, **constants})
    _canonical_names(gm, model)
    open_bodies(gm, model, EXPORTED)
    for each in programs(gm):
        for node in list(each.graph.nodes):
            node.meta = {key: value for key, value in node.meta.items() if key in ("val", "stack_trace")}
            if node.target is torch.ops.aten._assert_tensor_metadata.default:  # a dtype frozen at capture breaks .double()
                each.graph.erase_node(node)
        tidy(each)
    return gm, Signature.of(program, gm, given, named, hidden, model, branching)


def _with_hidden(shapes: Any, kwargs: Mapping[str, Any], hidden: Mapping[str, Any]) -> Any:
    """The user's ``dynamic_shapes``, who knows nothing of the hidden keywords: nothing about them is dynamic."""
    if isinstance(shapes, Mapping):
        return {**shapes, **{name: None for name in hidden if name not in shapes}}
    alone = len(kwargs) == len(hidden)  # else a sequence is in the order of the signature, where they need not be last
    return (*shapes, *(None for _ in hidden)) if alone and isinstance(shapes, (tuple, list)) else shapes


def _extras(graph: Graph, exported: GraphModule, model: nn.Module) -> dict[str, Any]:
    """What the exported graph reads and the model does not have: lifted constants and higher-order subgraphs.

    Their nodes in ``graph`` are renamed to flat names, since export puts some of them inside the user's own modules.
    """
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op != "get_attr" or is_state(model, str(node.target)):
            continue
        value = getattr_path(exported, node.target)
        name = str(node.target).replace(".", "_")
        while name in found and found[name] is not value:
            name += "_"
        node.target, found[name] = name, value
    return found


def _canonical_names(gm: GraphModule, model: nn.Module) -> None:
    """Tied parameters are read under the first of their names, the one `named_parameters` gives."""
    names = {id(p): name for name, p in model.named_parameters()}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            node.target = names.get(id(getattr_path(gm, node.target)), node.target)


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The mode as the model's own ``train()`` sets it, so that deliberately frozen layers stay frozen; then back.

    Also back through ``train()``, for models that rewrite weights there, then each module's own flag.
    """
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(before[0][1])
        for module, flag in before:
            module.training = flag


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Capture logs every specialisation it considers, and export prints what it had when it fails.

    What matters comes back as our own errors. What the model itself prints is passed on unless capture fails.
    """
    loggers = [(logger := logging.getLogger(name), logger.level) for name in _NOISY]
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


def without_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face models return caches that no pytree knows; ask for none unless the user did. Adapters pass that on."""
    adapted = getattr(model, "get_base_model", None)  # of peft's wrappers
    inner: Any = adapted() if callable(adapted) and not isinstance(adapted, nn.Module) else model
    parameters = inspect.signature(inner.forward).parameters
    rest = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    wants = "use_cache" in parameters or (rest and _generates(inner))
    return {"use_cache": False} if wants and "use_cache" not in kwargs else {}


def _generates(model: nn.Module) -> bool:
    """Whether Hugging Face's generate() passes ``use_cache`` on to a part of the model, which keeps a cache otherwise."""
    asked, of_text = getattr(model, "can_generate", None), getattr(getattr(model, "config", None), "get_text_config", None)
    return callable(asked) and callable(of_text) and bool(asked()) and bool(getattr(of_text(), "use_cache", False))


@contextlib.contextmanager
def _no_hooks_left() -> Iterator[None]:
    """torch 2.11 leaves a hook on the registration of all buffers in the process where an export fails."""
    hooks: Any = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for key in hooks.keys() - before:
            del hooks[key]


@contextlib.contextmanager
def by_name(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """``forward(**kwargs)`` with a parameter for each name that it is given: torch.export takes no dynamic sizes of others."""
    forward = model.forward
    signature = inspect.signature(forward)
    written = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = [name for name in kwargs if name not in {each.name for each in written}]
    if not extra or len(written) == len(signature.parameters):
        yield
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*written, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra)]
    )
    own = {name: value for name, value in model.__dict__.items() if name == "forward"}
    model.__dict__["forward"] = named
    try:
        yield
    finally:
        del model.__dict__["forward"]
        model.__dict__.update(own)


def _apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every tensor as one of its own. torch.export would take all inputs of one that is given twice, as ``labels=tokens``, and
    of a view, as ``tokens[:, :-1]``, ask of every call that it is one of as large a tensor, or has its strides.
    """
    seen = set[int]()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or (id(leaf) not in seen and not _is_view(leaf)):
            seen.add(id(leaf))
            return leaf
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    both: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(own, (args, dict(kwargs)))
    return both


def _is_view(leaf: Tensor) -> bool:
    """Whether a tensor is a part of another one, or lies in memory as one would."""
    if type(leaf) is not Tensor or leaf.layout is not torch.strided:
        return False
    reach = 1 + sum((size - 1) * step for size, step in zip(leaf.shape, leaf.stride(), strict=True))
    return leaf._base is not None or 0 < leaf.numel() != reach


def _repeat_batch_of_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if any(isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] != 1 for leaf in leaves):
        return args, kwargs
    both: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten([_twice(leaf) for leaf in leaves], spec)
    return both


def _twice(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1:
        return leaf.detach().repeat(2, *[1] * (leaf.ndim - 1))
    return leaf


def _batch_is_free(model: nn.Module, shapes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``dynamic_shapes`` leave axis 0 of every tensor free. Of tensors in containers this is not asked: False."""
    try:
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:  # the inputs do not fit forward(): export says so
        return False
    if isinstance(shapes, (tuple, list)):
        shapes = dict(zip(given, shapes, strict=False))
    if not isinstance(shapes, Mapping):
        return False
    for name, value in given.items():
        if isinstance(value, Tensor) and value.ndim and not _is_free(shapes.get(name)):
            return False
        if not isinstance(value, Tensor) and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return False
    return True


def _is_free(sizes: Any) -> bool:
    first = sizes.get(0) if isinstance(sizes, Mapping) else sizes[0] if isinstance(sizes, (tuple, list)) and sizes else None
    return first is not None and not isinstance(first, int) and first != torch.export.Dim.STATIC


def _dynamic_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    shapes = torch.export.ShapesCollection()
    chosen = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    for leaf in chosen.values():
        shapes[leaf] = {0: torch.export.Dim.AUTO}
    try:
        return shapes.dynamic_shapes(model, args, kwargs) if chosen else None
    except Exception:  # the arguments do not fit forward(): export says so, naming the argument
        return None
