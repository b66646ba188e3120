"""An engine without vLLM, in the real process of an engine, to test the code around it.

The process is forked from the test, which takes a moment; a new interpreter would take seconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import zlib
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from nemo_care.rollouts.vllm import host, local
from nemo_care.rollouts.vllm.messages import Sampled, SampleReply

TOKENS = [8, 28, 9, 2]
MERGED, FRAMES = 28, 2


class Dead(Exception):
    """The error of the double when its engine dies."""


class DoubleEngine:
    """Replies with fixed completions, and keeps the weights that it received."""

    vision = (7, 6)  # video and image token of the tiny checkpoint

    def __init__(self, settings):
        print("an engine starts", flush=True)
        if settings.folder.endswith("unreadable"):
            raise OSError("no such model")
        self.settings = settings
        self.pending = []
        self.requests = []
        self.weights = {}
        self.calls = []
        # Changed by `become`.
        self.dies = self.is_killed = self.lies = self.hangs = self.damages = False

    def seen(self):
        return {
            "pid": os.getpid(),
            "calls": self.calls,
            "requests": self.requests,
            # multiprocessing would send tensors as shared memory.
            "weights": {name: tensor.numpy() for name, tensor in self.weights.items()},
        }

    def become(self, **flags):
        self.__dict__.update(flags)

    def submit(self, requests):
        self.requests += requests
        answer = Future()
        self.pending.append((answer, requests))
        return answer

    def step(self):
        if self.dies:
            raise Dead("the worker was killed")
        if self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.hangs:
            threading.Event().wait()
        if self.pending:
            answer, requests = self.pending.pop(0)
            answer.set_result([self._reply(request) for request in requests])

    def _reply(self, request):
        sizes = {
            self.vision[0]: iter(
                len(v.frames) // FRAMES * v.frames[0, ..., 0].size // MERGED**2
                for v in request.videos
            ),
            self.vision[1]: iter(i[..., 0].size // MERGED**2 for i in request.images),
        }
        prompt = []
        for token in request.token_ids:
            prompt += [token] * (next(sizes[token]) if token in sizes else 1)
        if self.lies:
            prompt = prompt[1:]
        log_probs = np.full(len(TOKENS), -0.5, dtype=np.float32)
        routing = of_prompt = None
        if self.settings.returns_routing:
            of_prompt, routing = np.split(
                np.arange(2 * (len(prompt) + len(TOKENS)), dtype=np.int16).reshape(-1, 1, 2),
                [len(prompt)],
            )
        completions = [Sampled(TOKENS, log_probs, routing)] * request.count
        return SampleReply(prompt, completions, of_prompt)

    def init_weight_transfer_engine(self, init_info):
        self.calls.append("init")

    def start_weight_update(self):
        if self.pending:
            raise RuntimeError("busy")
        self.calls.append("start")

    def update_weights(self, update_info):
        content = Path(update_info["path"]).read_bytes()
        assert zlib.crc32(content) == update_info["checksum"]
        begin = 0
        for name, dtype, shape in zip(
            update_info["names"], update_info["dtypes"], update_info["shapes"], strict=True
        ):
            kind = getattr(torch, dtype)
            end = begin + torch.Size(shape).numel() * kind.itemsize
            part = torch.frombuffer(bytearray(content[begin:end]), dtype=torch.uint8)
            self.weights[name] = part.view(kind).view(shape)
            begin = end
        self.calls.append("update")

    def finish_weight_update(self, weight_version=None):
        self.calls.append("finish")

    def digests(self):
        # As if every parameter were damaged in transfer.
        return {"lm_head.weight": str(self.calls.count("finish") if self.damages else 0)}

    @staticmethod
    def is_dead(error):
        return isinstance(error, Dead)

    def close(self):
        print("an engine ends", flush=True)


class Forked:
    """A fork of this process instead of a new interpreter, as far as HostProcess uses it."""

    def __init__(self, program, *, stdin, stdout, stderr, env, start_new_session):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(program[-1], reading, stdout.fileno())
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")
        self.returncode = None

    @staticmethod
    def _run(address, reading, output):
        try:
            os.setsid()
            for number, target in ((reading, 0), (output, 1), (output, 2)):
                os.dup2(number, target)
            os.closerange(3, 4096)
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, mode, closefd=False)  # noqa: SIM115
                for number, mode in ((0, "r"), (1, "w"), (2, "w"))
            )
            host.main(address)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def poll(self):
        if self.returncode is None and os.waitpid(self.pid, os.WNOHANG)[0]:
            self.returncode = -1
        return self.returncode

    def wait(self, timeout=60.0):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked engine", timeout)
            time.sleep(0.01)
        return self.returncode


def use_double(monkeypatch):
    """Make engines of this machine doubles from now on."""
    module = types.ModuleType("nemo_care.rollouts.vllm.llm")
    module.Engine = DoubleEngine
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(local.subprocess, "Popen", Forked)
