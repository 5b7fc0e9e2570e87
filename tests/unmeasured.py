"""torch's compilers do what is tested, and no more."""

from __future__ import annotations


def unmeasured() -> None:
    """For the rest of the process.

    TorchDynamo flushes the caches of the processor for every frame, to log how long its guards take: 50 ms each. Inductor
    compiles a dozen small programs to learn which vectors there are, and kernels for each of them.
    """
    import torch._dynamo.guards
    import torch._inductor.config

    vars(torch._dynamo.guards)["profile_guard_manager"] = lambda *_: 0.0
    torch._inductor.config.cpp.simdlen = 0
