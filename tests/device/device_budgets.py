"""What the device is asked for, per unit of work: the one table, which may only go down.

Measured by device_costs.py on the tiny model (6 layers, exits after 1, 3 and 4), everything included that happens
in the unit. A test fails where a number rises, and warns where one fell: lower it here then.

- decode: per token-round, in which every one of 8 rows advances by a token; by exit rule
- read prompts, load policy: per layer
- score, learn: per layer and micro-batch of about 3 sequences; `learn` is a whole update, optimizer included
- syncs: the host waits for the device; copies: from host to device, which block; kernels: launches
- duplicates: the most often one element is hit by one accumulating index, in the whole unit
"""

from __future__ import annotations

KINDS = ("syncs", "copies", "kernels", "duplicates")
# Kernels are what this version of PyTorch makes of an operation; with another one they are not compared.
MEASURED_WITH = "2.13.0"

_TABLE = {
    # what                              syncs  copies kernels duplicates
    "decode off":                      (     4,     10, 478.22,      0),
    "decode sample":                   (     7,   9.78, 510.67,      0),
    "decode threshold":                (     7,   9.78, 507.22,      0),
    "decode confidence":               (     7,     10, 563.11,      0),
    "decode patience":                 (     7,     10, 560.33,      0),
    # 541.11 while rows that end were written to the cache like the others, which needed no choice of rows.
    "decode sample, top-p":            (     7,   9.89, 543.11,      0),
    # 62.33 before keys and values were written where they stay, which halves the memory at the end of a read.
    "read prompts":                    (     0,      0,  64.67,      0),
    "load policy":                     (     0,     16,  10.83,      0),
    # Attention counts by its parts, sequence by sequence, for compiled kernels don't run here: 8 kernels forward and 17
    # backward where CUDA has 1 and 2. The reference's states are made micro-batch by micro-batch, one transfer more.
    "score":                          (  0.08,   0.33, 151.25,      0),
    "score reference":                (  0.08,   0.33, 103.58,      0),
    "learn likelihood":               (  0.42,   0.33, 451.92,      2),
    "learn likelihood, recompute":    (  0.42,   0.33, 580.92,      2),
    "learn likelihood, whole model":  (  0.42,   0.33, 381.58,      2),
    "learn distill":                  (  0.42,   0.33, 457.92,      2),
    # 548.67 while it left out the label's likelihood, which exact_kl, at 556.0, then read out by itself.
    "learn distill_full":             (  0.42,      1, 554.33,      2),
    "learn exact_kl":                 (  0.42,      1, 554.33,      2),
}  # fmt: skip
BUDGETS = {name: dict(zip(KINDS, row, strict=True)) for name, row in _TABLE.items()}
