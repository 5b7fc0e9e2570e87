# mypy: disable-error-code="arg-type,assignment,attr-defined,call-overload,index,no-any-return,no-untyped-call,operator,return-value,union-attr"
"""Compile the Triton kernels to PTX, for an NVIDIA GPU that need not be there, and print it as JSON, case by case.

As a launch would: tensors begin at multiples of 16 bytes, sizes that are 1 are compiled in. Assembling PTX and running it is
left to a GPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from nm_compiler.runtime.cusparselt import pack_triton
from nm_compiler.solvers import (
    live_triton,
    masks_triton,
    order_launch,
    order_triton,
    rows_triton,
    select_triton,
    two_masks_triton,
)

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {"float16": "*fp16", "bfloat16": "*i16", "float32": "*fp32", "float64": "*fp64"}


def ptx(kernel: Any, given: dict[str, Any], multiples: Sequence[str] = (), **options: Any) -> str:
    """given: the type of every argument, or the number that it is; multiples: names of arguments that are such of 16."""
    backend = make_backend(HOPPER)
    kinds = {name: given[name] if isinstance(given[name], str) else "constexpr" for name in kernel.arg_names}
    fixed = {(at,): given[name] for at, name in enumerate(kinds) if kinds[name] == "constexpr"}
    whole = [kind.startswith("*") or name in multiples for name, kind in kinds.items()]
    aligned = {(at,): [["tt.divisibility", 16]] for at, known in enumerate(whole) if known}
    source = ASTSource(kernel, kinds, fixed, aligned)
    chosen = backend.parse_options({"ptx_version": 84, **options})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, chosen, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        HOPPER, chosen, backend.get_codegen_implementation(chosen), backend.get_module_map(), context
    )  # fmt: skip
    for name in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[name](module, {"target": HOPPER, **chosen.__dict__})
    return str(module)


def cases() -> Iterator[tuple[str, str]]:
    whole = {"total": "i32", "groups": "i32", "inner": "i32", "length": "i32"}
    beside = {"total": "i32", "groups": "i32", "inner": 1, "length": 1}
    for name, kind in TYPES.items():
        rest: dict[str, Any] = {"total": "i32", "block": 1024, "decay": 2e-4, "brain": name == "bfloat16"}
        pull: dict[str, Any] = {**dict.fromkeys(("grad", "weight", "masked", "out"), kind), **rest}
        yield f"decay {name}", ptx(select_triton._pull, pull, enable_fp_fusion=False)
    for kind, m, width, sizes in (("*i16", 4, 4, beside), ("*fp32", 5, 8, whole)):
        tensors = dict.fromkeys(("grad", "weight", "first", "second"), kind) | dict.fromkeys(("live", "table"), "*u8")
        given: dict[str, Any] = {**tensors, **sizes, "m": m, "width": width, "block": 256, "brain": kind == "*i16"}
        yield f"gradients {kind}", ptx(live_triton._differentiate, given)
    for values, kind in ((True, "*i16"), (False, "*u8")):
        given = {"source": kind, "target": kind, "live": "*u8", "table": "*u8", "values": values, **whole}
        yield f"cover {kind}", ptx(live_triton._cover, {**given, "m": 16, "width": 16, "block": 128})
    yield "keep", ptx(select_triton._keep, {"values": "*i32", "mask": "*u8", "out": "*i32", "total": "i32", "block": 1024})
    for kind, m in (("*i16", 4), ("*i64", 5)):
        sizes = dict.fromkeys(("rows", "inner", "n"), "i32") | {
            "outer": 1,
            "parts": "i32",
            "largest": kind[1:].replace("16", "32"),
        }
        given = {"source": kind, "target": kind, "order": "*i64", **sizes, "m": m, "width": 8 if m == 5 else 4, "block": 128}
        yield f"rows {kind}", ptx(rows_triton._rank_rows, given)


def orders() -> Iterator[tuple[str, str]]:
    """The search of backward orders, with few groups, with many, and a round at a time."""
    where = {"values": "*fp32", "members": "*i32", "places": "*i32"}
    scratch = {"worth": "*fp32", "dealt": "*i32"}
    sizes = dict.fromkeys(("patience", "columns", "length", "count", "number"), "i32") | {"idle": "*i32", "parts": "*fp32"}
    for n, m, block in ((1, 16, 16), (2, 4, 32)):
        shape = order_launch._summing(block) | order_launch._dealing(block)
        given = {**where, **scratch, "tasks": "*i64", "n": n, "m": m, **shape}
        yield f"orders {n}:{m}", ptx(order_triton.all_rounds, given, **order_launch._WARPS)
    given = {**where, **sizes, "n": 3, "m": 8, **order_launch._summing(128)}
    yield "part of a round", ptx(order_triton.part_of_round, given, **order_launch._WARPS)
    given = {**where, **scratch, **sizes, **order_launch._dealing(64)}
    yield "end of a round", ptx(order_triton.end_of_round, given, **order_launch._WARPS)
    given = {"values": "*fp64", "orders": "*i64", "sums": "*fp64", "rows": "i32", "columns": "i32"}
    yield "kept", ptx(order_triton.kept, {**given, "n": 2, "m": 4, "tall": 4, "width": 512})


def in_registers() -> Iterator[tuple[str, str]]:
    """Masks and packing, groups ranked by a thread each."""
    sizes = ("units", "groups", "inner", "out", "inputs")
    whole: dict[str, Any] = dict.fromkeys(sizes, "i32")
    tensors = dict.fromkeys(("source", "order", "target", "masked", "turned", "values"), "*i64")
    for n, m, size, target in (
        (2, 4, 2, "*i32"),
        (2, 4, 4, "*i64"),
        (4, 8, 2, "*i64"),
        (1, 16, 4, "*i64"),
        (5, 16, 2, "*i64"),
    ):
        given = {**whole, **tensors, "n": n, "m": m, "width": m, "size": size, "block": 16384 // (m * size)}
        given |= {"target": target, "keep_weight": target == "*i64" and size == 4}
        yield f"neighbours {n}:{m} {size}", ptx(masks_triton._rank_neighbours, given, multiples=sizes)
    apart = {**whole, "source": "*i16", "target": "*u8", "n": 2, "m": 4, "size": 2, "block": 1024, "keep_weight": False}
    yield "apart 2:4", ptx(masks_triton._rank_apart, apart, multiples=sizes)
    for size in (2, 4):
        given = {**whole, **tensors, "n": 2, "m": 4, "size": size, "ordered": True, "width": 4, "down": 16, "across": 8}
        yield f"two masks {size}", ptx(two_masks_triton._mask_and_turn_blocks, given, multiples=sizes)
    given = {**whole, **tensors, "places": "*i32", "down": 16, "across": 8}
    yield "packed rows", ptx(pack_triton._pack_rows, given, multiples=sizes)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(chain(cases(), orders(), in_registers()))))
