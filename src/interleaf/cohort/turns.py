"""Pieces of work in threads that take turns: one runs at a time, until it needs what only all together can give."""

from __future__ import annotations

import random
from collections.abc import Callable
from threading import Semaphore, Thread
from typing import Any

import numpy as np
import torch


class Stopped(Exception):
    """The work is not wanted any more."""


class Member:
    """A piece of work with a thread and random numbers of its own; it runs only while `advance` waits for it.

    Args:
        work: what is to be done.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.wants: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._answer: Any = None
        self._stopped = False
        self._go, self._back = Semaphore(0), Semaphore(0)
        self._random: Any = None
        self._thread = Thread(target=self._run, name="cohort", daemon=True)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                self.result = self._work()
        except BaseException as error:
            self.error = error
        self._back.release()

    def ask(self, wants: Any) -> Any:
        """Wait for an answer; called by the work itself. An answer that is an exception is raised."""
        self.wants = wants
        self._back.release()
        self._go.acquire()
        if self._stopped:
            raise Stopped
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def advance(self, answer: Any = None) -> None:
        """Let the work run, with an answer to what it asked, until it asks again or ends."""
        self.wants, self._answer = None, answer
        outer = _random_state()
        _set_random_state(self._random or outer)
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._back.acquire()
        self._random = _random_state()
        _set_random_state(outer)

    def stop(self) -> None:
        """End the work where it waits."""
        self._stopped = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()


def _random_state() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: Any) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
