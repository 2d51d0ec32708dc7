"""Which model is the current one, and whether it sleeps, remembered by the cluster: what starts
later must do the same.

Kept in the key-value store of Ray's head (as Ray Serve's own state does), so it outlives every
process of the service.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields

from reward_actor.ray_internals import kv_delete, kv_get, kv_put

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class CurrentModel:
    """generation: 0 for the model that the service was started with, one more with every swap and
    when it is started with another model; name: that of the registry, empty for one that the
    service was started with; base: what it was started with before any swap, empty where that was
    not written down, which fits every start."""

    generation: int
    directory: str
    name: str = ""
    base: str = ""

    def set(self, app_name: str) -> bool:
        """Remember this one; False when another swap has taken its generation already."""
        key = f"{app_name}:swap:{self.generation}"
        value = json.dumps(asdict(self))
        if kv_put(key, value, overwrite=False):
            self._complete(app_name, key)
            return False
        kv_put(f"{app_name}:model", value)
        return True

    def _complete(self, app_name: str, key: str) -> None:
        """Who took the generation may have died before the model followed from it; without this,
        nobody could swap any more."""
        current = self.get(app_name)
        taken = kv_get(key)
        if taken is not None and (current is None or current.generation < self.generation):
            kv_put(f"{app_name}:model", taken.decode())

    @classmethod
    def get(cls, app_name: str) -> CurrentModel | None:
        found = kv_get(f"{app_name}:model")
        if found is None:
            return None
        known = {field.name for field in fields(cls)}
        try:  # another release may have written more, or less
            values = json.loads(found)
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            logger.error("what is remembered of the model is unreadable: %s", type(error).__name__)
            return None

    @classmethod
    def at_start(cls, app_name: str, model: str) -> CurrentModel:
        """What a replica that is configured with this model has to load. A swap of a service with
        another model is over, but its generation stays taken."""
        found = cls.get(app_name)
        if found is not None and found.is_of(model):
            return found
        generation = 0 if found is None else found.generation + 1
        return cls(generation, model, base=model)

    def take_over(self, app_name: str, model: str) -> CurrentModel:
        """Remember what a replica that is configured with `model` has loaded by this one, now that
        it could be loaded: what an earlier service was swapped to is superseded. What is remembered
        comes back: of a later generation where that service has taken this one meanwhile."""
        current = self
        while not current.set(app_name):
            found = self.at_start(app_name, model)
            if found == current or found.directory != current.directory:
                break  # it was remembered before, or is behind a swap that it will follow
            current = found
        return current

    def is_of(self, model: str) -> bool:
        """Whether it is of a service that was started with this model."""
        return self.base in ("", model)


@dataclass(frozen=True)
class Sleep:
    """That the service sleeps, and the version of this generation that it must wake up with; ""
    for any. It is of one start of the application: the next one is awake."""

    generation: int
    version: str

    def set(self, app_name: str, start: str) -> None:
        kv_put(f"{app_name}:asleep:{start}", json.dumps(asdict(self)))

    @classmethod
    def get(cls, app_name: str, start: str) -> Sleep | None:
        """None if it does not sleep."""
        found = kv_get(f"{app_name}:asleep:{start}")
        return None if found is None else cls(**json.loads(found))

    def version_of(self, generation: int) -> str:
        """The version that a replica of this generation must wake up with: any, where a swap was
        faster than the sleep."""
        return self.version if generation == self.generation else ""


def wake_up(app_name: str, start: str) -> None:
    kv_delete(f"{app_name}:asleep:{start}")


def forget(app_name: str) -> None:
    """Begin anew: a service that is started serves the model that it is given."""
    kv_delete(f"{app_name}:", by_prefix=True)
