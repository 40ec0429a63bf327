"""One machine with one GPU, looked at in ten minutes, without a network: `make gpu-check`.

__main__.py   the parts, each in a process of its own with a deadline; writes result.json and index.html
bench.py      what a part runs on (sizes, random models and policies) and what it found
parity.py     decoder, learner and export against float32 on the CPU
resuming.py   resuming from a checkpoint, and after SIGKILL
speed.py      bandwidth, products, collectives; decoding and a learner's step: speed, memory, kernels
"""
