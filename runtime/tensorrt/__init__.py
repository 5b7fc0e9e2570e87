"""TensorRT, through Torch-TensorRT: what `nm.lower(..., backend="tensorrt")` does once the program is frozen and cast.

`build.build` makes the engines, `files.save` and `files.load` keep them, `log.SparsityLog` says what TensorRT made of the
zeros. torch_tensorrt is imported when the first of them is called, never before.
"""
