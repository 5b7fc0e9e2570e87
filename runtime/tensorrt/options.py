"""What Torch-TensorRT is called with: what sparsity needs, then the user's own keywords, unless they would undo it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from nm_compiler.errors import NMError

NEEDED: Mapping[str, Any] = {
    "sparse_weights": True,  # the builder flag, off by default
    "use_fp32_acc": False,
    "immutable_weights": True,
    "min_block_size": 1,
    "attn_bias_is_causal": False,  # the default takes any attention bias for a causal mask
}

# The one value each may have, and why. The last of them are gone from newer versions, which would ignore them.
_STAYS: Mapping[str, tuple[Any, str]] = {
    "sparse_weights": (True, "without it TensorRT does not look at the zeros"),
    "use_fp32_acc": (False, "it casts the weights of every matmul to float32, for which TensorRT has no sparse kernels"),
    "immutable_weights": (True, "an engine whose weights can be refitted refuses other weights in its sparse layers"),
    "refit_identical_engine_weights": (False, "it refits, and a refitted engine refuses other weights in its sparse layers"),
    "make_refittable": (None, "an engine whose weights can be refitted refuses other weights in its sparse layers"),
    "refit": (None, "an engine whose weights can be refitted refuses other weights in its sparse layers"),
    "strip_engine_weights": (False, "TensorRT cannot find zeros in weights that were stripped"),
    "use_explicit_typing": (True, "the precision has to be that of the program, which was cast before"),
}
_ARGUMENTS = ("exported_program", "inputs", "arg_inputs", "kwarg_inputs")


def merged(options: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of ``function`` (`torch_tensorrt.dynamo.compile`): `NEEDED`, then ``options``.

    Raises NMError for an option that is unknown (Torch-TensorRT would ignore it without a word) or would undo sparsity.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("args", "kwargs", *_ARGUMENTS)]
    for name, value in options.items():
        if name == "enabled_precisions":
            raise NMError(
                f"enabled_precisions={value!r} cannot be used: TensorRT is strongly typed and takes the precision of every "
                "layer from the program. Cast the model (model.half() or model.to(torch.bfloat16)) before it is exported"
            )
        if name in _ARGUMENTS:
            raise NMError(f"{name} is no option of the tensorrt backend: it is taken from the inputs and kwargs of the call")
        if name in _STAYS and value != _STAYS[name][0]:
            raise NMError(f"{name}={value!r} undoes sparsity: {_STAYS[name][1]}. Leave it out")
        if name not in known and name not in _STAYS:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise NMError(f"{name} is no option of torch_tensorrt.dynamo.compile in the installed version{hint}")
    return {**NEEDED, **options}
