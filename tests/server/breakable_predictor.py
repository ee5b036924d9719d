"""predict.Predictor on the real service, whose next step fails according to the file in $BREAK_FOLDER.

kill-engine    the engine's thread ends
lose-device    the device is lost, as torch reports it
hang           the step lasts as long as the file exists
fail-step      one step fails
kill-loop      the health check ends the event loop
"""

import os
import time
from pathlib import Path
from typing import Any

import torch

import predict
from starling.engine.runner import Step
from starling.engine.scheduler import Work
from starling.service import Service
from starling.settings import Settings


class BreakableModel:
    """The real model, until its device is lost."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *args: Any) -> Any:
        if (self._folder / "lose-device").exists():
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return self._model.forward(*args)


class BreakableRunner:
    def __init__(self, runner: Any, folder: Path) -> None:
        runner._model = BreakableModel(runner._model, folder)
        self._runner = runner
        self._folder = folder
        self.overlaps = runner.overlaps

    def start(self, plan: list[Work]) -> Step:
        if (self._folder / "kill-engine").exists():
            raise SystemExit
        if (self._folder / "fail-step").exists():
            (self._folder / "fail-step").unlink()
            raise RuntimeError("a secret of the step")
        while (self._folder / "hang").exists():
            time.sleep(0.002)
        return self._runner.start(plan)


class Predictor(predict.Predictor):
    def load_service(self, settings: Settings) -> Service:
        self.folder = Path(os.environ["BREAK_FOLDER"])
        service = super().load_service(settings)
        service._engine._runner = BreakableRunner(service._engine._runner, self.folder)
        return service

    async def healthcheck(self) -> bool:
        if (self.folder / "kill-loop").exists():
            raise SystemExit
        return await super().healthcheck()
