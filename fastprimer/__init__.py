"""fastprimer: every building block of a modern LLM, once as readable mathematics and once at the speed of the hardware."""

from fastprimer.backends import BackendError, backends, explain, use_backend
from fastprimer.ops import (
    attention,
    attention_with_kv_cache,
    cross_entropy,
    linear_cross_entropy,
    load_balancing_loss,
    moe,
    rms_norm,
    rope,
    route,
    router_z_loss,
    swiglu,
)

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "attention",
    "attention_with_kv_cache",
    "backends",
    "cross_entropy",
    "explain",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe",
    "rms_norm",
    "rope",
    "route",
    "router_z_loss",
    "swiglu",
    "use_backend",
]
