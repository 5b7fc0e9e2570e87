"""Fragments of models that were compiled by name: TorchDynamo keeps them with the code of a class, for every model of it.

    one = torch.compile(Net(), backend="nm_compiler")      its first call compiles a fragment
    other = torch.compile(Net(), backend="nm_compiler")    its calls bring weights of its own to the same fragment

Each model has the fragment over again: its own plan, its own programs, and what was compiled for the first one where the forms
are equal. Models that `nm.compile` has prepared run code of their own, and do not meet here.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from nm_compiler.errors import NMError
from nm_compiler.live.pieces import LiveFragment

if TYPE_CHECKING:
    from nm_compiler.backend import Options


class ByName:
    """What TorchDynamo's cache holds; it keeps no model alive.

    wanted: the options of the `torch.compile`.
    """

    def __init__(self, fragment: LiveFragment, wanted: Options) -> None:
        self._wanted = wanted
        self._form = fragment.for_another(None)
        self._known = [weakref.ref(fragment)]

    def __call__(self, *args: Any) -> Any:
        """Run the fragment of the model whose weights these are. Raises NMError if none that is being called has them."""
        known = [fragment for each in self._known if (fragment := each()) is not None]
        found = next((fragment for fragment in known if fragment.fits(args)), None)
        found = found or next((fragment for fragment in known if fragment.holds(args)), None)
        return (found or self._of_another(args))(*args)

    def _of_another(self, args: tuple[Any, ...]) -> LiveFragment:
        from nm_compiler.backend import prepared_by_name, root_on_stack

        root = root_on_stack()
        if root is None:
            raise _strangers(args)
        live = prepared_by_name(root, self._wanted).live
        fragment = self._form.for_another(live)
        if not fragment.holds(args):
            raise _strangers(args)
        live.pieces.append(fragment)
        self._known = [known for known in self._known if known() is not None] + [weakref.ref(fragment)]
        return fragment


def _strangers(args: tuple[Any, ...]) -> NMError:
    shapes = ", ".join(str(list(value.shape)) for value in args if isinstance(value, nn.Parameter))
    return NMError(
        f"weights of {shapes} came to code that backend 'nm_compiler' had compiled for another model, and no model that is "
        "being called has them: nm.compile(model) instead of torch.compile"
    )
