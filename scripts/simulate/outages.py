"""Hosts that fail and come back, and links that are cut, drawn by chance."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SILENCE = 5.0  # seconds until a host that has fallen silent is missed
REJOIN = 0.5  # seconds from a link's healing until workers that were missed have joined again
RESTART = 40.0  # seconds from a host's return until its workers stand ready: imports, checkpoints read from its disk


@dataclass(frozen=True, slots=True)
class Outage:
    host: int
    begin: float  # seconds
    end: float
    kind: Literal["down", "cut"]  # all that ran on it is gone; or it goes on, and is not reached

    @property
    def noticed(self) -> bool:
        return self.kind == "down" or self.end - self.begin > SILENCE

    @property
    def back(self) -> float:
        """Seconds when its workers take tasks again."""
        return self.end + (RESTART if self.kind == "down" else REJOIN) if self.noticed else self.end


def draw(hosts: int, seconds: float, downs: float, cuts: float, seed: int) -> list[Outage]:
    """Return outages in order: `downs` and `cuts` for each host in 24 hours, on average; one at a time on a host.

    A host is away for 2 to 30 minutes, a link for 1 to 90 seconds.
    """
    chance = random.Random(seed)
    found: list[Outage] = []
    for host in range(hosts):
        at = 0.0
        while downs + cuts > 0:
            at += chance.expovariate((downs + cuts) / 86400)
            if at >= seconds:
                break
            down = chance.random() < downs / (downs + cuts)
            length = chance.uniform(120, 1800) if down else chance.uniform(1, 90)
            found.append(Outage(host, at, at + length, "down" if down else "cut"))
            at = found[-1].back
    return sorted(found, key=lambda outage: outage.begin)


def losses(outages: Sequence[Outage], gpus: int) -> list[tuple[float, int]]:
    """Return the moments at which GPUs go (negative) and come back, `gpus` of each host."""
    noticed = [outage for outage in outages if outage.noticed]  # through others work goes on
    return sorted([(outage.begin, -gpus) for outage in noticed] + [(outage.back, gpus) for outage in noticed])
