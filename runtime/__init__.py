"""What happens after training: frozen weights are checked, reported on, and lowered to a runtime that skips their zeros.

report            a line a weight: sparse or dense, and why
report_page       the same as HTML
verify            which weights satisfy a pattern, along which axis
tensors_of        the tensors of whatever `verify` is given
quantized_graphs  those of a graph that torchao has quantised

lowered           what `nm.lower` returns
no_gradient       its results, which say so when a gradient is asked of kernels that have none
facts             what it knows of the model: `config`, sizes, names
products          the products of a lowered graph
choose            measured both ways, the faster kept
memory_format     how a batch of images lies in memory

One backend is one file in ``backends/``, and stands on a folder of its own: ``native/`` (C kernels for CPUs), ``cusparselt/``,
``tensorrt/``, ``onnx_files/``.
"""

if __name__ != "nm_compiler.runtime":
    raise ImportError("import nm_compiler.runtime: a second copy would register every op twice")
