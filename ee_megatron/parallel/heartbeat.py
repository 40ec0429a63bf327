"""Wait for rank 0 as long as it gives signs of life, however long its work takes.

What rank 0 does alone (rollouts, verdicts, checkpoints read and written) has deadlines of its own, which a collective's
deadline must not contradict. So before a collective that follows such work all ranks `meet`; the collective itself then
starts together.
"""

from __future__ import annotations

import logging
import threading
import time

import torch.distributed as dist

BEATS = 4
"""Signs of life in the time without one after which the leader is given up."""
SHORTEST_S, LONGEST_S = 0.001, 0.25
"""Between two looks for the leader: the longer it has been away, the longer."""
log = logging.getLogger(__name__)


class Heartbeat:
    """One per rank of the default process group, over its store. `silence_s`: longest time without a sign of life."""

    def __init__(self, silence_s: float):
        self._leads, self._silence_s = dist.get_rank() == 0, silence_s
        self._store = dist.PrefixStore("leader", dist.distributed_c10d._get_default_store())
        self._meetings = 0
        self._heard = 0
        self._lost: Exception | None = None
        self._ended = threading.Event()
        if self._leads:
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def meet(self) -> None:
        """Return on every rank once rank 0 has called this, too; all ranks call it equally often.

        Raises RuntimeError if the leader is silent for too long, or has taken the store along."""
        self._meetings += 1
        place, came = f"meeting/{self._meetings}", threading.Event()
        if self._leads:
            self._store.set(place, "")
            return
        # The store may be the leader's own process and stop answering with it, which only a thread can be left in.
        threading.Thread(target=self._listen, args=(place, came), name="heartbeat", daemon=True).start()
        heard = -1
        while not came.wait(self._silence_s):
            if self._heard == heard:
                raise RuntimeError(
                    f"rank 0 has given no sign of life for {self._silence_s:g} s (parallel.timeout_s); see what its "
                    "own log ends with"
                )
            heard = self._heard
        if self._lost is not None:
            raise RuntimeError(f"rank 0 is gone: {self._lost}") from self._lost

    def close(self) -> None:
        """Stop the signs of life."""
        self._ended.set()

    def _listen(self, place: str, came: threading.Event) -> None:
        # Asked again and again, because torch warns of every wait in a store that comes to an end.
        pause = SHORTEST_S
        try:
            while not self._store.check([place]):
                self._heard = self._store.add("beats", 0)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_S)
        except Exception as error:
            self._lost = error
        finally:
            came.set()

    def _beat(self) -> None:
        while not self._ended.wait(self._silence_s / BEATS):
            try:
                self._store.add("beats", 1)
            except RuntimeError as error:
                log.warning("no more signs of life: %s", error)
                return
