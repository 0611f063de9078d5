"""The Triton kernels of the head; `triton_` launches them.

    mask_weights_kernel    masks       -> weights, counts      pooling, forward and backward
    pool_kernel            weights, F  -> prototypes           (gather)
    pool_backward_kernel   weights, dp -> dF                   (scatter)
    dots_kernel            F, p        -> dots, Gram maps      matching, forward
    scores_kernel          dots        -> scores, winners
    match_weights_kernel   dS          -> weights              matching, backward
    match_backward_kernel  weights, F  -> dF, dp               (gather and scatter)

Every sum is taken by one program in a fixed order; there are no atomics. Letters beyond the usual
ones: G the geometry (`triton_geometry.Geometry`), M locations of a block, N or BN windows (times
classes) of a block, P places of a window among those over a pixel, T_Y x T_X pixels of a block.
Offsets within an image are of 32 bits; `triton_plans.fits` asks for that.
"""

from .matching import dots_kernel, scores_kernel
from .matching_backward import match_backward_kernel, match_weights_kernel
from .pooling import mask_weights_kernel, pool_backward_kernel, pool_kernel

__all__ = [
    "dots_kernel",
    "mask_weights_kernel",
    "match_backward_kernel",
    "match_weights_kernel",
    "pool_backward_kernel",
    "pool_kernel",
    "scores_kernel",
]
