"""What the device is asked for, per unit of work: the one table, which may only go down.

Measured by pretend_gpu_cases.py on the tiny model (6 layers, exits after 1, 3 and 4), everything included that happens
in the unit. A test fails where a number rises, and warns where one fell: lower it here then.

- decode: per token-round, in which every one of 8 rows advances by a token; by exit rule
- read prompts, load policy: per layer
- score, learn: per layer and micro-batch of 3 sequences; `learn` is a whole update, optimizer included
- syncs: the host waits for the device; copies: from host to device, which block; kernels: launches
- duplicates: the most often one element is hit by one accumulating index_put, in the whole unit
"""

from __future__ import annotations

KINDS = ("syncs", "copies", "kernels", "duplicates")
# Kernels are what this version of PyTorch makes of an operation; with another one they are not compared.
MEASURED_WITH = "2.13.0"

_TABLE = {
    # what                              syncs  copies kernels duplicates
    "decode off":                      (     4,     15, 477.56,      0),
    "decode sample":                   (     7,  17.56, 520.33,      0),
    "decode threshold":                (     7,  17.56, 516.89,      0),
    "decode confidence":               (     7,     18, 573.22,      0),
    "decode sample, top-p":            (     7,  17.78,    551,      0),
    "read prompts":                    (     0,      0,  62.33,      0),
    "load policy":                     (     0,     16,  10.83,      0),
    "score":                           (  8.08,   0.75,    168,      0),
    "score reference":                 (  7.58,   0.75, 127.83,      0),
    "learn likelihood":                (  9.58,   0.75,    433,     33),
    "learn likelihood, recompute":     ( 16.58,   0.75, 581.67,     33),
    "learn likelihood, whole model":   (  9.58,   0.75, 366.67,     33),
    "learn distill":                   (  9.92,      1, 438.17,     33),
    "learn distill_full":              (    17,    1.5, 559.67,     33),
    "learn exact_kl":                  ( 17.33,   1.67, 567.83,     33),
}  # fmt: skip
BUDGETS = {name: dict(zip(KINDS, row, strict=True)) for name, row in _TABLE.items()}
