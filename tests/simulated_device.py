"""A device and a host on one simulated clock, in place of a GPU: work is issued by the one and done by the other."""

import contextlib

import torch

from vitfast.measure.device import NotCaptured
from vitfast.measure.timing import EventSampler

LAUNCH_S = 5e-6


class Event:
    def __init__(self, place):
        self.place = place

    def record(self):
        self.at = max(self.place.now, self.place.busy_until)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class SimulatedDevice:
    """What `vitfast.measure.device.Cuda` offers. Seconds pass only by `work` and by waiting for it."""

    graphs = True
    most_sets = 8

    def __init__(self, cache_bytes=0):
        self.device = torch.device("cpu")
        self.now = self.busy_until = 0.0
        self.captured_s = None
        self.captures = []
        self.cache = cache_bytes
        self.lost = False

    def work(self, issue_s, device_s, can_be_captured=True):
        """What a call does: keep the host busy for `issue_s`, and then the device."""
        if self.captured_s is not None:
            if not can_be_captured:
                raise NotCaptured("it synchronises")
            self.captured_s += device_s
        else:
            self.now += issue_s
            self.busy_until = max(self.busy_until, self.now) + device_s

    def clock(self):
        return self.now

    def current(self):
        return contextlib.nullcontext()

    def event(self):
        return Event(self)

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.now = max(self.now, self.busy_until)

    def sampler(self):
        return EventSampler(self.event, self.synchronize)

    def cache_bytes(self):
        return self.cache

    def free_bytes(self):
        return 2**40

    def release(self):
        pass

    def warm_up(self, call):
        call()

    def state(self):
        return {"busy": self.busy_until > self.now}

    def state_under(self, call, ms):
        call()
        found = self.state()
        self.synchronize()
        return found

    def peak_mib(self, call):
        call()
        self.synchronize()
        return {"peak_allocated_mib": 1.0, "peak_reserved_mib": 2.0}

    def capture(self, call, count):
        self.captured_s = 0.0
        try:
            for _ in range(count):
                call()
            seconds = self.captured_s
        finally:
            self.captured_s = None
        self.captures.append(count)
        return lambda: self.work(LAUNCH_S, seconds)
