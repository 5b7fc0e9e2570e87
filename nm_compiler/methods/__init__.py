"""One file, one method: which state a weight gets, and what happens to it between optimizer steps.

base          what a method is: `Method`, and the `Clock` it goes by

lbc           learned combinations, from dense to N:M
bimask        a second mask for the input gradient
lbc_bimask    the one forward, the other backward
srste         the largest of every group in each forward pass
gradual       the smallest of every group go step by step
magnitude     masks chosen once
transposable  the same, N:M along both axes
sste          a soft threshold in the place of a mask

decline       the schedule of lbc and gradual: how many are left after a step
"""
