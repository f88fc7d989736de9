"""Which unknown frames are kept: new ones, the strangest first, so many a camera and hour.

A find waits until its camera may have a picture kept, in a list that all cameras share. Whenever
one may, the strangest that waits is put, so that a short allowance goes to what is most novel;
what is not put stays for when the allowance has grown, unless stranger things need its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from agent.finds.allowance import Allowance
from agent.finds.find import Find, Outcome, Store
from agent.finds.seen import Seen, alike
from agent.metrics import Metrics

#: Finds that wait, over all cameras: 19 MB at 224 by 224 pixels.
MAX_WAITING = 128
#: Seconds between two looks at what waits: time enough for a better view of the same thing.
SETTLE_S = 10.0


class Keeper:
    """Chooses among finds and hands them to a store. One thread calls it."""

    def __init__(
        self,
        store: Store,
        seen: Seen,
        allowance: Allowance,
        *,
        similarity: float,
        metrics: Metrics,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`similarity` is the cosine above which two finds show the same; clocks in seconds."""
        self._store = store
        self._seen = seen
        self._allowance = allowance
        self._similarity = similarity
        self._metrics = metrics
        self._monotonic = monotonic
        self._wall = wall
        self._waiting: list[Find] = []
        self._due = -np.inf

    def recall(self) -> None:
        """Remember what earlier runs kept."""
        for embedding_D, kept_at in self._store.remembered():
            self._seen.add(embedding_D, kept_at)
        self._metrics.novelty_held.set(self._store.held_bytes)

    def offer(self, finds: Sequence[Find]) -> None:
        """Consider a batch's finds. Nothing is encoded or written here."""
        now = self._wall()
        for find in finds:
            if self._seen.has(find.embedding_D, now):
                self._count(Outcome.DUPLICATE)
            else:
                self._wait(find)

    def settle(self) -> None:
        """Between batches: put at most one find, so that no batch waits for many."""
        now = self._monotonic()
        if now < self._due:
            return
        if not self._put_one():
            self._due = now + SETTLE_S
            self._store.tend()
        self._note_outcomes()

    def close(self) -> None:
        """Put what waits and is allowed, and release the store."""
        while self._put_one():
            pass
        self._count(Outcome.RATE_LIMITED, len(self._waiting))
        self._waiting.clear()
        self._store.close()
        self._note_outcomes()

    def _wait(self, find: Find) -> None:
        same = self._waiting_alike(find)
        if any(each.margin >= find.margin for each in same):
            self._count(Outcome.DUPLICATE)
            return
        self._count(Outcome.DUPLICATE, len(same))
        self._waiting = [each for each in self._waiting if each not in same]
        self._waiting.append(find)
        if len(self._waiting) > MAX_WAITING:
            # That of the camera with the most goes, lest one camera crowd the others out.
            [(camera, _)] = Counter(each.verdict.camera for each in self._waiting).most_common(1)
            rows = [row for row, f in enumerate(self._waiting) if f.verdict.camera == camera]
            del self._waiting[min(rows, key=lambda row: self._waiting[row].margin)]
            self._count(Outcome.RATE_LIMITED)

    def _waiting_alike(self, find: Find) -> list[Find]:
        if not self._waiting:
            return []
        embeddings_ND = np.stack([each.embedding_D for each in self._waiting])
        rows = np.flatnonzero(alike(embeddings_ND, find.embedding_D, self._similarity))
        return [self._waiting[row] for row in rows]

    def _put_one(self) -> bool:
        """Put the strangest find whose camera may have one kept; False if there is none."""
        refused = set()
        for find in sorted(self._waiting, key=lambda find: -find.margin):
            camera = find.verdict.camera
            if camera in refused:
                continue
            if self._allowance.take(camera):
                self._waiting.remove(find)
                self._seen.add(find.embedding_D, self._wall())
                self._store.put(find)
                return True
            refused.add(camera)
        return False

    def _note_outcomes(self) -> None:
        for find, outcome in self._store.outcomes():
            self._count(outcome)
            if outcome is Outcome.FAILED:
                self._seen.forget(find.embedding_D)
                self._allowance.give_back(find.verdict.camera)
        self._metrics.novelty_held.set(self._store.held_bytes)

    def _count(self, outcome: Outcome, finds: int = 1) -> None:
        self._metrics.novelty_frames.labels(outcome).inc(finds)
