"""Groups that several tests send."""

from __future__ import annotations

from reward_actor import Group
from reward_actor.groups import Whole

GROUPS: list[Group | Whole] = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer."]),
    Group([{"role": "user", "content": "Hi."}], ["Hello!"]),
    Group(prompt_ids=[5, 6], completion_ids=[[7], [8, 9]]),
    Whole(["An apple.", "A hammer, and more."]),
]
IDS = [Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10], []])]
USER = [{"role": "user", "content": "Name two fruits."}]
