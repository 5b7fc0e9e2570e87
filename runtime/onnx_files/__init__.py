"""ONNX files: a frozen program written as one, with its zeros checked in the file, and any such file read again."""
