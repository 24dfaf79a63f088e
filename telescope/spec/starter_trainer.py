"""Stands for your training script: prints the held-out loss of one run as a JSON line."""

import json
import math
import random
import sys

width, base_width, lr, weight_decay, seed = map(float, sys.argv[1:])
# Your training goes here. What stands for it: a loss with its optimum near lr 0.05 at every width.
noise = random.Random(f"{width} {lr} {weight_decay} {seed}").gauss(0, 0.003)
loss = 2.0 + 1.5 * (width / base_width) ** -0.5 + 0.05 * math.log2(lr / 0.05) ** 2 + noise
print(json.dumps({"loss": loss}))
