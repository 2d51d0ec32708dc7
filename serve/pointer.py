"""Which model is the current one, remembered by the cluster: what starts later must load it, too.

Lies in the key-value store of Ray's head (as Ray Serve's own state does), so it outlives every
process of the service.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

NAMESPACE = "rayward"


@dataclass(frozen=True)
class Pointer:
    """generation: 0 for the model that the service was started with, one more with every swap;
    name: that of the registry, empty for the first."""

    generation: int
    directory: str
    name: str = ""

    def set(self, app_name: str) -> bool:
        """Remember this one; False when another swap has taken its generation already."""
        key = f"{app_name}:swap:{self.generation}"
        value = json.dumps(asdict(self))
        existed = _internal_kv_put(key, value, overwrite=False, namespace=NAMESPACE)
        if existed:
            return False
        _internal_kv_put(f"{app_name}:model", value, namespace=NAMESPACE)
        return True

    @classmethod
    def get(cls, app_name: str) -> Pointer | None:
        found = _internal_kv_get(f"{app_name}:model", namespace=NAMESPACE)
        return None if found is None else cls(**json.loads(found))


def forget(app_name: str) -> None:
    """Begin anew: a service that is started serves the model that it is given."""
    _internal_kv_del(f"{app_name}:", del_by_prefix=True, namespace=NAMESPACE)
