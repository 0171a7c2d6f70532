"""Housekeeping of the orchestrator, now and then: its files and sockets are there, old jobs go, and a copy is kept."""

import logging
import time
from dataclasses import astuple
from pathlib import Path

from orchestrator.dispatch.engine import Engine
from orchestrator.removal import Ground
from orchestrator.server.sockets import Sockets
from orchestrator.state_folder import StackFolder
from protocol.client.endpoints import PUBLISHED
from protocol.curve_keys import DoorRole
from protocol.errors import StateUnusable

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
KEEP_HOUSE_SECONDS = 60.0
BACKUP_SECONDS = 3600.0
MOST_FORGOTTEN = 1000  # jobs at a time, so that nobody waits for long


class Housekeeping:
    """`sockets` tell where the orchestrator and its doors listen."""

    def __init__(self, folder: StackFolder, engine: Engine, sockets: Sockets) -> None:
        self._folder, self._engine, self._sockets = folder, engine, sockets
        self._published: dict[DoorRole, str] = {}
        keep = engine.settings.keep
        paths = [Path(endpoint.removeprefix("ipc://")) for endpoint in astuple(sockets.local)]
        self._ground = Ground([*([folder.database] if keep else []), *paths])
        self._looked = self._kept_house = self._backed_up = 0.0  # monotonic seconds
        self._epoch = time.time() - time.monotonic()  # a clock that is set anew must not make jobs old

    def publish(self) -> None:
        """Let clients and workers find the orchestrator."""
        self._published = self._sockets.doors.remote
        self._folder.publish(self._sockets.local, {str(role): endpoint for role, endpoint in self._published.items()})

    def see_to_it(self) -> None:
        """Do what is due; StateUnusable where the orchestrator must begin anew."""
        now = time.monotonic()
        if self._sockets.doors.remote != self._published:
            self.publish()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look()
        if now - self._kept_house >= KEEP_HOUSE_SECONDS:
            self._kept_house = now
            self._keep_house(now)

    def _look(self) -> None:
        """Save what can be saved where files were removed beneath the orchestrator."""
        if not (self._folder.path / PUBLISHED).exists():
            self._folder.make_parts()
            self.publish()
        if gone := self._ground.gone():
            if self._folder.database in gone:
                self._folder.make_parts()
                self._engine.store.write_anew()
            names = ", ".join(str(path) for path in gone)
            raise StateUnusable(f"Somebody has removed {names}.", "It is made again.")

    def _keep_house(self, now: float) -> None:
        """Let go of old jobs, and keep a copy of the others."""
        settings, store = self._engine.settings, self._engine.store
        if settings.keep_jobs is not None:
            gone = self._engine.forget_old(self._epoch + now - settings.keep_jobs, MOST_FORGOTTEN)
            if gone:
                store.reclaim()
        if settings.keep and now - self._backed_up >= BACKUP_SECONDS:
            self._backed_up = now
            try:
                store.back_up(self._folder.backup)
            except (StateUnusable, OSError) as error:
                log.error("no backup could be made: %s", error)
