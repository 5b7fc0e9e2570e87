"""A copy of a compiled model whose masks were averaged, as ``AveragedModel(use_buffers=True)`` does with all buffers.

The mean of two masks' bits is no mask. A copy is looked at before it is evaluated, whenever its state was written since it
was looked at last; a model that is no copy never is.
"""

from __future__ import annotations

from nm_compiler.carrier import Carrier
from nm_compiler.errors import NMError
from nm_compiler.state.beside import learns

WAY_OUT = (
    "AveragedModel(use_buffers=True) averages whole numbers too: set averaged.use_buffers = False and call "
    "averaged.update_parameters(sparse) once more, which then copies them"
)

Versions = tuple[int, ...]  # how often each piece of state had been written


def checked_copy(carrier: Carrier, known: Versions) -> Versions:
    """How often the state was written by now. known: what this gave last. Raises NMError if it cannot be the method's."""
    kept = [weight[suffix] for weight in carrier.weights for suffix in carrier.method.suffixes(weight.site)]
    versions = tuple(-1 if value.is_inference() else value._version for value in kept if not learns(value))
    if versions == known:
        return known
    for weight in carrier.weights:
        state = {suffix: weight.read(suffix) for suffix in carrier.method.suffixes(weight.site)}
        if set(state) <= {"order"}:  # of backward masks, which no evaluation asks for
            continue
        problem = carrier.method.problem(weight.site, state)
        if problem is not None:
            raise NMError(f"{weight.site.name} of shape {list(weight.site.shape)}: {problem}. {WAY_OUT}")
    return versions
