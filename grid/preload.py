"""What a worker process imports before it has anything to do, while the driver is still busy."""

import gc

gc.disable()  # a million objects come and none goes: to look for garbage among them is a quarter of the time

import torch._dynamo  # noqa: E402, F401  (every optimizer imports it at its first step)

import grid.tuner  # noqa: E402, F401

gc.freeze()
gc.enable()
