"""Which tensors of a checkpoint become N:M, from names, shapes and, where it can be built, the model on the meta device.

With the model, a linear is a module: ``nn.Linear`` ([out, in]) or transformers' ``Conv1D`` ([in, out]). Without it, and
for tensors that it does not have, a linear is a floating tensor of two axes called ``*.weight``, taken as [out, in]. Either
way names keep embeddings, heads, routers, norms and biases dense:

    a part of the name contains    embed, norm
    or is one of                   lm_head, head, score, classifier, ... (`HEADS`), wte, wpe, shared, ... (`EMBEDDINGS`),
                                   gate, router (`ROUTERS`)

``include`` takes in what names keep dense, never what cannot be N:M; ``exclude`` wins over it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from nm_compiler.errors import NMError, Refusal
from nm_compiler.layout import Layout
from nm_compiler.pattern import PatternMap, matches
from nm_compiler.sites.plan import Plan, Site
from nm_compiler.streaming.tensor_file import FLOATING, Entry

HEADS = ("lm_head", "head", "heads", "score", "classifier", "embed_out", "qa_outputs", "cls", "predictions", "output_layer")
EMBEDDINGS = ("wte", "wpe", "shared", "tok_embeddings", "relative_attention_bias")
ROUTERS = ("gate", "router", "shared_expert_gate")
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types whose linears are all Conv1D


def plan_tensors(
    entries: Mapping[str, Entry], patterns: PatternMap, *, model: nn.Module | None = None, model_type: str = "",
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> Plan:  # fmt: skip
    """A site, or a refusal with its reason, for every tensor of two or more axes.

    model: on any device, its parameters called like the tensors. model_type: of config.json, for models that cannot be built.
    Raises NMError if the model has another shape for a tensor, if a glob matches no tensor, and if nothing is left.
    """
    wide = {name: entry for name, entry in entries.items() if len(entry.shape) >= 2}
    for option, globs in (("include", include), ("exclude", exclude), ("pattern", [glob for glob, _ in patterns.rules])):
        for glob in globs:
            if glob != "*" and not any(matches(name, (glob,)) for name in wide):
                known = ", ".join(list(wide)[:4]) + (", ..." if len(wide) > 4 else "")
                raise NMError(f"{option}={glob!r} matches no tensor of two axes; globs run over names such as {known or '-'}")
    owners = _owners(model)
    sites, refusals = list[Site](), list[Refusal]()
    for name, entry in wide.items():
        owner = owners.get(name)
        if model is not None and owner is not None:
            _check_shape(model, name, entry)
        axis = 0 if owner is not None and type(owner).__name__ == "Conv1D" else 1
        reason = _impossible(entry, owner) or _by_globs(name, patterns, include, exclude)
        if not reason and owner is None and model_type in _TRANSPOSED:
            reason = f"linears of {model_type} lie as [in, out], which only the model can tell: pip install 'nm_compiler[hf]'"
        pattern = patterns.of(name)
        if not reason and pattern is not None and entry.shape[axis] % pattern.m:
            reason = f"{entry.shape[axis]} input features, groups of {pattern} need a multiple of {pattern.m}"
        if reason or pattern is None:
            refusals.append(Refusal(name, reason))
        else:
            sites.append(Site(name, "linear", entry.shape, Layout(axis, 1 - axis), pattern))
    if not sites:
        lines = "\n  ".join(f"{r.where} {list(wide[r.where].shape)}: {r.reason}" for r in refusals[:8])
        raise NMError(f"no tensor of this checkpoint can be {patterns}:\n  {lines or 'none has two axes'}")
    return Plan(tuple(sites), tuple(refusals), {n: e.shape for n, e in wide.items()}, dict.fromkeys(wide, "linear"))


def _owners(model: nn.Module | None) -> dict[str, nn.Module]:
    """The module that a tensor belongs to; the embedding where one is shared with it."""
    if model is None:
        return {}
    embedded = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners[f"{path}{'.' if path else ''}{leaf}"] = embedded.get(id(parameter), module)
    return owners


def _check_shape(model: nn.Module, name: str, entry: Entry) -> None:
    shape = tuple(model.get_parameter(name).shape)
    if shape != entry.shape:
        raise NMError(
            f"{name} has shape {list(entry.shape)} in the checkpoint, {list(shape)} in the {type(model).__name__} that "
            "config.json describes: use the config.json that belongs to it"
        )


def _impossible(entry: Entry, owner: nn.Module | None) -> str:
    """Why no option can make it N:M, or nothing."""
    if len(entry.shape) != 2:
        return f"{len(entry.shape)} axes: only linears are pruned here; nm.compile(method=nm.Magnitude()) takes the others"
    if entry.dtype not in FLOATING:
        return f"{entry.dtype}: only F16, BF16, F32 and F64 can be pruned; dequantise it first"
    if not entry.name.endswith(".weight"):
        return "not called *.weight"
    if owner is not None and isinstance(owner, nn.Embedding):
        return "an embedding"
    if owner is not None and not isinstance(owner, nn.Linear) and type(owner).__name__ != "Conv1D":
        return f"of a {type(owner).__name__}, which is no linear"
    return ""


def _by_globs(name: str, patterns: PatternMap, include: Sequence[str], exclude: Sequence[str]) -> str:
    excluded = matches(name, exclude)
    if excluded:
        return f"excluded by {excluded!r}"
    if patterns.of(name) is None:
        return f"no rule of pattern={patterns} matches it: add one"
    return "" if matches(name, include) else _by_name(name)


def _by_name(name: str) -> str:
    """Why a name keeps a tensor dense, or nothing."""
    for part in name.split(".")[:-1]:
        if part in EMBEDDINGS or ("embed" in part and part != "embed_out"):
            return "an embedding, by its name (include= takes it in)"
        if part in HEADS:
            return "a head, by its name (include= takes it in)"
        if part in ROUTERS:
            return "a router, by its name (include= takes it in)"
        if "norm" in part:
            return "a norm, by its name (include= takes it in)"
    return ""
