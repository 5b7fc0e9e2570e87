"""One file, one pass: ``GraphModule -> GraphModule``; its docstring is the graph before and after.

Training, in the order that a method says in its ``passes`` (`nm_compiler.recipe.pipeline`):
insert_scores       LBC's mask, through which scores learn
insert_srste        SR-STE's mask, and Bi-Mask's forward one
insert_fixed_masks  masks that were chosen before
insert_op           the op of a method of one's own
insert_bimask       Bi-Mask's second weight, for input gradients
insert_backward_op  a second weight of one's own
train_cusparselt    Bi-Mask's products on packed weights
check_masked        no planned weight was left dense

When it is trained (`nm_compiler.recipe.freezing`):
freeze_masks        masks into weights, products plain
check_pattern       every weight is N:M

Lowering, for every backend (`nm_compiler.lowering`):
spell_out_autocast  casts in the place of autocast; for planning, permuting and calibrating as well
bias_apart          biases that are none are added
fold_batchnorm      into the convolution before it
einsum_to_linear    an einsum that is one
fold_weights        what is computed from weights alone
products_to_linear  every product that can be one
flatten_tokens      linears of two axes
batch_of_one        convolutions of one image without a batch

Lowering, for one (`nm_compiler.runtime.backends`):
lower_cpu           cpu: packed products
unflatten_tokens    cpu: linears take data as it lies
turned_linears      cpu: packed linears of turned data as convolutions
left_products       cpu, dense: products that stay dense with their weight on the left, as they were
fuse_epilogues      cpu: packed products add and activate
fuse_dense          cpu: dense convolutions activate
channels_last       cpu: images with their channels innermost
pool_channels_last  cpu: poolings alone so
lower_cusparselt    cusparselt: packed products
lower_int8          cusparselt: those in 8 bits
linear_as_conv      tensorrt: linears as 1x1 convolutions

By themselves:
permute             channels in another order, for `nm.permute`
gather_masks        mask ops of many weights as one call, in eager execution
"""

if __name__ != "nm_compiler.passes":
    raise ImportError("import nm_compiler.passes: a second copy would register every op twice")
