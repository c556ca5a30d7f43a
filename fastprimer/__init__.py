"""fastprimer: every building block of a modern LLM, once as readable mathematics and once at the speed of the hardware."""

from fastprimer import layers, reference
from fastprimer.backends import BackendError, backends, explain, use_backend
from fastprimer.config import Config
from fastprimer.memory import keep_freed_memory
from fastprimer.model import Model
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
    "Config",
    "Model",
    "attention",
    "attention_with_kv_cache",
    "backends",
    "cross_entropy",
    "explain",
    "keep_freed_memory",
    "layers",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe",
    "reference",
    "rms_norm",
    "rope",
    "route",
    "router_z_loss",
    "swiglu",
    "use_backend",
]
