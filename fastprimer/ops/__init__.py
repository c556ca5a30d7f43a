"""One chapter per operation: mathematics, reference, autograd, public function. This file is the table of contents."""

from fastprimer.backends import register
from fastprimer.ops import attention as _attention
from fastprimer.ops import cross_entropy as _cross_entropy
from fastprimer.ops import decoding as _decoding
from fastprimer.ops import moe as _moe
from fastprimer.ops import rms_norm as _rms_norm
from fastprimer.ops import rope as _rope
from fastprimer.ops import routing as _routing
from fastprimer.ops import swiglu as _swiglu

for _chapter in (_rms_norm, _rope, _swiglu, _attention, _decoding, _routing, _moe, _cross_entropy):
    register(_chapter)

from fastprimer.ops.attention import attention  # noqa: E402
from fastprimer.ops.cross_entropy import cross_entropy, linear_cross_entropy  # noqa: E402
from fastprimer.ops.decoding import attention_with_kv_cache  # noqa: E402
from fastprimer.ops.moe import moe  # noqa: E402
from fastprimer.ops.rms_norm import rms_norm  # noqa: E402
from fastprimer.ops.rope import rope  # noqa: E402
from fastprimer.ops.routing import load_balancing_loss, route, router_z_loss  # noqa: E402
from fastprimer.ops.swiglu import swiglu  # noqa: E402

__all__ = [
    "attention",
    "attention_with_kv_cache",
    "cross_entropy",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe",
    "rms_norm",
    "rope",
    "route",
    "router_z_loss",
    "swiglu",
]
