"""Workers that are forked from one process are still strangers to each other."""

from __future__ import annotations

import ray


@ray.remote(num_cpus=0)
class Drawer:
    def draw(self) -> list[str]:
        """Random ids of Ray's core: of the main thread, and of another one."""
        from concurrent.futures import ThreadPoolExecutor

        def one() -> str:
            return str(ray.WorkerID.from_random().hex())

        with ThreadPoolExecutor(1) as pool:
            return [one(), pool.submit(one).result()]


def test_no_two_workers_draw_the_same_ids(ray_cluster: None) -> None:
    drawers = [Drawer.remote() for _ in range(4)]
    drawn = [number for two in ray.get([d.draw.remote() for d in drawers]) for number in two]
    assert len(set(drawn)) == len(drawn)
