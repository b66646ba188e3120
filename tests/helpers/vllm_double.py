"""An engine without vLLM, used by the real host and connection, to test the code around it."""

import contextlib
import os
import socket
import sys
import threading
import types
import zlib
from multiprocessing.connection import Listener
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from nemo_care.process.environment import VLLM_KEY
from nemo_care.rollouts.vllm import host as hosts
from nemo_care.rollouts.vllm.messages import Reply, Sampled, SampleReply

KEY = "a secret of the tests"
TOKENS = [8, 28, 9, 2]
MERGED, FRAMES = 28, 2


class Dead(Exception):
    """The error of the double when its engine dies."""


class DoubleEngine:
    """Replies with fixed completions, and keeps the weights that it received."""

    made: ClassVar["list[DoubleEngine]"] = []
    vision = (7, 6)  # video and image token of the tiny checkpoint

    def __init__(self, settings):
        if settings.folder == "unreadable":
            raise OSError("no such model")
        self.settings = settings
        self.pending = []
        self.requests = []
        self.weights = {}
        self.calls = []
        self.dies = False
        self.lies = False
        type(self).made.append(self)

    @property
    def is_busy(self):
        return bool(self.pending)

    def submit(self, client, number, requests):
        self.requests += requests
        self.pending.append((client, number, requests))

    def step(self):
        if self.dies:
            raise Dead("the worker was killed")
        client, number, requests = self.pending.pop(0)
        return [(client, Reply(number, [self._reply(request) for request in requests]))]

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
        return SampleReply(prompt, [Sampled(TOKENS, log_probs)] * request.count)

    def init_weight_transfer_engine(self, init_info):
        self.calls.append("init")

    def start_weight_update(self):
        if self.is_busy:
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
        return {"lm_head.weight": str(self.calls.count("finish") if self.lies else 0)}

    @staticmethod
    def is_fatal(error):
        return isinstance(error, Dead)

    def close(self):
        self.calls.append("close")


class HostThread:
    """A host in this process with the double as its engine."""

    def __init__(self, monkeypatch):
        module = types.ModuleType("nemo_care.rollouts.vllm.llm")
        module.Engine = DoubleEngine
        monkeypatch.setitem(sys.modules, "nemo_care.rollouts.vllm.llm", module)
        monkeypatch.setenv(VLLM_KEY.name, KEY)
        DoubleEngine.made.clear()
        self.listener = Listener(("127.0.0.1", 0), backlog=64)
        node, port = self.listener.address
        self.address = f"{node}:{port}"
        self.status = None
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        host = hosts.Host(self.listener, KEY.encode())
        self.status = host.serve()
        # As the end of the process would.
        for client in host.clients:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(client.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    @property
    def engine(self):
        (made,) = DoubleEngine.made
        return made

    def end(self):
        self.thread.join(10)
        self.listener.close()
        return self.status
