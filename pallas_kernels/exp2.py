"""Exponentials by the one instruction that a GPU has for them, to the base 2: exp(x) = exp2(LOG2E x).

Kernels fold the factor into the scale of their logits: a weight of a softmax is a fused multiply-add and an exponential.
"""

import math

LOG2E = math.log2(math.e)
