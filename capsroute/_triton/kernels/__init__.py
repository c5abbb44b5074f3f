"""The kernels. They take their arguments in one order: what they read of the call, what other kernels left, what they
write, sizes, strides, and what they are compiled for. A name means the same in all of them:

    u, weight, bias, logits, mask   of the call, as `problem.Problem` has them; weight is None where a kernel needs none
    V, query, queries               V as the streams read it, W_j^T V_j for keys; of one pass, or of each
    s, ds; slopes                   before squash, and its gradient; ds as the streams read it, W_j^T ds_j for keys
    tops, totals, means             of a softmax: its maximum m, the sum of exp(a - m), the mean T of t
    parts, sums, online             what each group of input capsules adds; over i also its m and sum
    left, coupling                  the logits and the coupling of the last pass, where they are wanted
    du, dweight, dlogits            gradients, or the parts of them that programs leave to be added
    B, I, R, k, groups, N, share    sizes, the pass from 0, parts to add, rows, and those that one program takes
    strides                         of mask (b, i), logits (b, i, j) and u (b, i, j); between streams those of weight
                                    (j, o, d), and of a gradient of v (b, j, o)
    P                               `stream.Static`, the layer's sizes and options, and the tile

Inside, b, i, j, o, x, d are indices, `row` and `allowed` say which of them are there and take part.
"""
