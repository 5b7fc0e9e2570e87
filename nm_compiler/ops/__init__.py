"""The ``nm::`` custom ops: what the rewritten graphs are made of.

They live in `torch.library`, with fake kernels and autograd, so they survive export, AOTAutograd and inductor.
Importing this package registers them, once per process.

torch.compile is told what the products and the selections are made of (made_of), so they fuse and get its layouts.

When the backward of an op changes, its schema must change too: torch.compile's disk cache keys on the schema alone and
would go on using the old backward.

    live_mask, unpack_mask   state -> bool mask                     (masks)
    score_weight             LBC: masked weight, scores learn       (weights)
    masked_weight            a fixed mask                           (weights)
    srste_weight             top-N by magnitude, decay on the rest  (weights)
    backward_weight          Bi-Mask: the weight seen by d/dx       (weights)
    backward_groups          the same, rows in order already        (weights)
    two_masks                Bi-Mask: both weights at once          (two_masks)
    linear, conv             products with two weights              (products)
    einsum                   any other product of two tensors       (einsum)
    grouped_mm               experts, rows sorted by expert         (grouped_mm)
"""

from nm_compiler.ops import einsum, grouped_mm, masks, products, two_masks, weights

__all__ = ["einsum", "grouped_mm", "masks", "products", "two_masks", "weights"]
