"""What `nm.lower` can hand a graph to, one file a backend: each says whether it works here, and lowers a `Job`.

base         Backend, Job, Result
dense        the graph as it is, no sparse kernels
onnx         a file for other runtimes
tensorrt     engines through Torch-TensorRT
cusparselt   sparse products of NVIDIA GPUs inside PyTorch
cpu          packed products on the CPU inside PyTorch
choosing     from a name, or "auto", to a backend
"""

from nm_compiler.runtime.backends.base import Backend, Job, Result
from nm_compiler.runtime.backends.choosing import choose_backend

__all__ = ["Backend", "Job", "Result", "choose_backend"]
