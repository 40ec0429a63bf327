"""One machine with one GPU, looked at in ten minutes, without a network: `make gpu-check`.

__main__.py   runs every part in a process of its own, each with a deadline; writes result.json and index.html
registry.py   the parts, their order and deadlines
findings.py   what a part found: checks, figures, tables
child.py      the process of one part
shapes.py     sizes, random models and policies, the settings that `plan` is asked with
machine.py    the card: memory bandwidth, products, TF32; NCCL in a world of one
parity.py     decoder, learner and export against float32 on the CPU
resuming.py   going on from a checkpoint, and after SIGKILL; trainee.py is the run that is killed
decoding.py   tokens/s, memory, kernels;  learning.py   seconds of a step, memory, kernels
profiling.py  the largest kernels, launches and host syncs
"""
