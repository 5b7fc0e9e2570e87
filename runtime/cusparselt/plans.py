"""The plans of one thread, kept by what they depend on: making one takes the host most of a millisecond."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict

import torch

from nm_compiler.runtime.cusparselt.library import Library, Refused, Structs
from nm_compiler.runtime.cusparselt.plan import Plan, Problem

MOST = 512


class Plans:
    """Handles by device and plans by problem; beyond ``most``, the one that was used longest ago is destroyed.

    Handles of the library belong to one thread, so this does as well.
    """

    def __init__(self, library: Library, most: int = MOST) -> None:
        self._library, self._most = library, most
        self._handles: dict[int, Structs] = {}
        self._plans: OrderedDict[Problem, Plan | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, problem: Problem) -> Plan | None:
        """The plan; None if the library refuses, which is remembered as well. ``problem.device`` is the current one."""
        try:
            plan = self._plans[problem]
        except KeyError:
            return self._new(problem)
        self._plans.move_to_end(problem)
        return plan

    def _new(self, problem: Problem) -> Plan | None:
        plan = None
        try:
            plan = Plan(self._library, self._handle(problem.device), problem)
        except Refused as why:
            logging.getLogger(__name__).info("cuSPARSELt has no plan for %s: %s", problem, why)
        self._plans[problem] = plan
        while len(self._plans) > self._most:
            oldest = self._plans.popitem(last=False)[1]
            if oldest is not None:
                oldest.close()
        return plan

    def _handle(self, device: int) -> int:
        if device not in self._handles:
            if device >= 0:
                torch.cuda.set_device(device)  # which makes its context the thread's, where nothing else has yet
            made = Structs(self._library.struct, 1)
            self._library.call("cusparseLtInit", made.addresses[0])
            self._handles[device] = made
        return self._handles[device].addresses[0]

    def close(self) -> None:
        """Destroy all plans, then all handles."""
        while self._plans:
            plan = self._plans.popitem()[1]
            if plan is not None:
                plan.close()
        while self._handles:
            handle = self._handles.popitem()[1]  # in a name: its memory has to live until it is destroyed
            self._library.drop("cusparseLtDestroy", handle.addresses[0])

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the driver may be gone, and all of it goes anyway
            self.close()
