"""A model that can be made to kill its process, to hang or to wait, when its mask has a certain density; nothing else does.

FAULTS is a folder. `hold` in it: wait for as long as it is there, and say who waits in `held.PID`. `hang`: remove it, then hang.
`poison`: kill this process. `slow`: take 20 ms.
"""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

POISONED = (0.10, 0.16)  # densities of the first layer
WAITING = (0.25, 0.40)


class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 8)
        self.fc2 = nn.Linear(8, 10)

    def forward(self, x):
        density = float((self.fc1.weight != 0).float().mean())  # torch.fx cannot trace it, with faults or without
        if "FAULTS" in os.environ:
            misbehave(Path(os.environ["FAULTS"]), density)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def misbehave(faults, density):
    if POISONED[0] < density < POISONED[1] and (faults / "poison").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if WAITING[0] < density < WAITING[1]:
        if (faults / "hang").exists():
            (faults / "hang").unlink()
            time.sleep(3600)
        while (faults / "hold").exists():
            (faults / f"held.{os.getpid()}").touch()
            time.sleep(0.02)
    if (faults / "slow").exists():
        time.sleep(0.02)


def make():
    torch.manual_seed(0)
    return Faulty()
