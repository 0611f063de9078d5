"""The Triton kernels of the head; `triton_` launches them.

    mask_weights_kernel    masks       -> weights, counts      pooling, forward and backward
    pool_kernel            weights, F  -> prototypes           (gather)
    pool_backward_kernel   weights, dp -> dF                   (scatter)
    dots_kernel            F, p        -> dots, Gram maps      matching, forward
    scores_kernel          dots        -> scores, winners
    match_weights_kernel   dS          -> weights              matching, backward
    match_backward_kernel  weights, F  -> dF, dp               (gather and scatter)

What they read and write, beside what lies between two of them:

    features, to               [B, K or Q, D, h, w], any strides; `to` is the gradient
    masks                      of one of `mask_kind`: uint8, float32 or (labels only) int64
    prototypes, to_prototypes  [B, C, Gy, Gx, D]; written as a part for each of `splits` of K or Q
    factors, inverse_lengths   [B, K, C, Gy, Gx]; [B, C, Gy, Gx], 1 / |p|
    scores, winners, grad      [B, Q, C, H, W]
    slopes, radial, labels     of the loss, see `gpu_match`

Every sum is taken by one program in a fixed order; there are no atomics. Letters beyond the usual
ones: G the geometry (`triton_geometry.Geometry`), M locations of a block, N or BN windows (times
classes) of a block, P places of a window among those over a pixel, T_Y x T_X pixels of a block.
Offsets within an image are of 32 bits; `triton_plans.fits` asks for that.
"""

from . import matching, pooling

__all__ = ["matching", "pooling"]
