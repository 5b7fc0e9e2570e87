"""What to run on a machine with TensorRT: text to copy, nothing here is executed.

Sparse kernels exist for float16 and bfloat16 (and integers), not for float32, so the file should have been cast. TensorRT 11
takes every dtype from the file; TensorRT 10 does so with ``--stronglyTyped``, which 11 accepts and ignores.
Ref: NVIDIA, "Migrating trtexec Usage from TensorRT 10.x to 11.x"; ONNX Runtime, "TensorRT Execution Provider".
"""

from __future__ import annotations

import shlex

from nm_compiler.runtime.onnx_files.export import Input, Written


def trtexec(written: Written, *, tensorrt: int = 11, batch: int | None = None) -> str:
    """The ``trtexec`` line that builds an engine with sparse kernels where they are faster, and times it.

    tensorrt: the major version; batch: the size of every dynamic axis to tune for, by default that of the example.
    """
    words = ["trtexec", f"--onnx={written.path}", f"--saveEngine={written.path.with_suffix('.plan')}", "--sparsity=enable"]
    if tensorrt < 11:
        words.append("--stronglyTyped")
    if any(isinstance(size, str) for value in written.inputs for size in value.shape):
        words += [f"--{bound}Shapes={_profile(written.inputs, bound, batch)}" for bound in ("min", "opt", "max")]
    words.append("--verbose")  # its log says which layers are eligible for sparse kernels, and which got one
    return shlex.join(words)


def onnxruntime(written: Written, *, tensorrt: int = 11, batch: int | None = None) -> str:
    """Python lines that run the file with ONNX Runtime's TensorRT execution provider, sparse kernels allowed.

    tensorrt, batch: as for `trtexec`. ONNX Runtime 1.27 is the first for TensorRT 11.
    """
    options: dict[str, bool | str] = {"trt_sparsity_enable": True, "trt_engine_cache_enable": True}
    if tensorrt < 11 and written.dtype in ("float16", "bfloat16"):
        options["trt_fp16_enable" if written.dtype == "float16" else "trt_bf16_enable"] = True
    if any(isinstance(size, str) for value in written.inputs for size in value.shape):
        options |= {f"trt_profile_{bound}_shapes": _profile(written.inputs, bound, batch) for bound in ("min", "opt", "max")}
    lines = [f'    "{name}": {value!r},' for name, value in options.items()]
    return "\n".join(
        [
            "import onnxruntime",
            "",
            "options = {",
            *lines,
            "}",
            'providers = [("TensorrtExecutionProvider", options), "CUDAExecutionProvider"]',
            f"session = onnxruntime.InferenceSession({str(written.path)!r}, providers=providers)",
        ]
    )


def _profile(inputs: tuple[Input, ...], bound: str, batch: int | None) -> str:
    """``x:1x3x224x224,y:1x4``: one size for each axis, of every input that has a dynamic one."""
    shown = []
    for value in inputs:
        if not any(isinstance(size, str) for size in value.shape):
            continue
        sizes = [
            size if isinstance(size, int) else 1 if bound == "min" else batch or example
            for size, example in zip(value.shape, value.example, strict=True)
        ]
        shown.append(f"{value.name}:{'x'.join(map(str, sizes))}")
    return ",".join(shown)
