"""How much memory a piece of code takes at its peak, in a process of its own: what is not a view of a file."""

import os
import subprocess
import sys

PROGRAM = """
import gc, sys, threading
import torch

torch.set_num_threads(1)


def anonymous():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) << 10


class Peak:
    def __enter__(self):
        self.first = self.peak = anonymous()
        self.done, self.thread = threading.Event(), threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.0005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_):
        self.peak = max(self.peak, anonymous())
        self.done.set()
        self.thread.join()


{first}
for arg in sys.argv[1:]:
    with Peak() as taken:
        code({code!r}, arg)
    gc.collect()
    print(taken.peak - taken.first)
"""
CODE = "def code(text, arg):\n    exec(text, {**globals(), 'arg': arg})\n"


def peaks_of(code, args, first="pass"):
    """Bytes for each of the args, which the code has as the string `arg`; what `first` does isn't counted."""
    program = PROGRAM.format(first=f"{first}\n{CODE}", code=code)
    # large tensors then go back to the system at once, as large arrays do
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [int(line) for line in done.stdout.split()]
