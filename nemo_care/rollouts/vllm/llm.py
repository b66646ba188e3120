"""vLLM's engine as `server.py` uses it; this module imports vLLM."""

import json
import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# vLLM's workers get weights' handles pickled, from this process only.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
# vLLM's core in this process: nothing of an engine survives it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# Otherwise every vLLM process loads plugins of other packages, such as NeMo's.
os.environ.setdefault("VLLM_PLUGINS", "")

import vllm
from vllm.config import WeightTransferConfig
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from nemo_care.rollouts.vllm.messages import (
    EngineSettings,
    Sampled,
    SampleReply,
    SampleRequest,
    split_routing,
)

_CPU_BATCH_TOKENS = 4096
_EXTENSION = "nemo_care.rollouts.vllm.worker.WorkerExtension"


@dataclass
class _Batch:
    """The requests of one call, and their results."""

    answer: Future = field(default_factory=Future)
    missing: set[str] = field(default_factory=set)
    replies: dict[str, SampleReply] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


class Engine:
    """One vLLM engine, and the batches that it is generating."""

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model; takes seconds to minutes."""
        self._folder = tempfile.TemporaryDirectory(prefix="nemo-care-vllm-")
        make_model_folder(Path(settings.folder), Path(self._folder.name), settings.processor_files)
        options: dict[str, Any] = {}
        if settings.kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(settings.kv_cache_gib * 2**30)
        if current_platform.is_cpu():
            # It reserves GPU memory for the largest item; here it would only cost time.
            options["skip_mm_profiling"] = True
            # vLLM 0.32 can't resume a seeded request whose prompt was cut: it restores the random
            # numbers in a way that CPUs do not support.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(settings.max_tokens, _CPU_BATCH_TOKENS)
        self.llm = vllm.LLM(
            model=self._folder.name,
            hf_overrides=dict(settings.config),
            dtype=settings.dtype,
            tensor_parallel_size=settings.tensor_parallel_size,
            max_model_len=settings.max_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            enable_sleep_mode=settings.sleeps,
            # Not "dummy", although weights are sent before any sampling: it also fills buffers with
            # random numbers, such as those for the pixels' normalisation, which are never sent.
            load_format=settings.load_format,
            # The model's own log-probabilities: before temperature and top-p.
            logprobs_mode="raw_logprobs",
            # The recipe defines the sampling, not the checkpoint's recommendations.
            generation_config="vllm",
            weight_transfer_config=WeightTransferConfig(backend=settings.backend),
            distributed_executor_backend=settings.executor,
            worker_extension_cls=_EXTENSION,
            enable_return_routed_experts=settings.returns_routing,
            disable_log_stats=True,
            **options,
        )
        self.engine = self.llm.llm_engine
        self.batches: dict[str, _Batch] = {}
        self._count = 0

    # ------------------------------------------------------------------ generation

    @property
    def is_busy(self) -> bool:
        """Whether any completion is being generated."""
        return bool(self.batches)

    def submit(self, requests: list[SampleRequest]) -> Future:
        """Start to generate; `step` sets the replies when all requests are complete.

        Raises:
            ValueError: vLLM refuses a request; then none is started.
        """
        batch = _Batch()
        try:
            for request in requests:
                name = str(self._count)
                self._count += 1
                try:
                    self.engine.add_request(name, engine_prompt(request), sampling_params(request))
                except ValueError as error:
                    raise ValueError(f"sample {request.name}: {error}") from error
                batch.missing.add(name)
                batch.order.append(name)
                self.batches[name] = batch
        except Exception:
            self.engine.abort_request(sorted(batch.missing))
            for name in batch.missing:
                del self.batches[name]
            raise
        return batch.answer

    def step(self) -> None:
        """Generate one more token of every completion, and answer the batches that are complete."""
        if not self.is_busy:
            return
        for output in self.engine.step():
            if not output.finished:
                continue
            batch = self.batches.pop(output.request_id)
            batch.missing.remove(output.request_id)
            batch.replies[output.request_id] = sampled(output)
            if not batch.missing:
                batch.answer.set_result([batch.replies[name] for name in batch.order])

    # ------------------------------------------------------------------ weights and memory

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands with the sender of weights, as vLLM requires."""
        self._rpc("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Prepare for the first piece of new weights.

        Raises:
            RuntimeError: a completion is being generated with the old weights.
        """
        if self.is_busy:
            raise RuntimeError("weights can't change while completions are generated: collect them")
        self._rpc("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Load one piece of new weights."""
        self._rpc("update_weights", update_info=update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish after the last piece, and discard everything computed with the old weights:
        prefixes of the key-value cache and vision features, as the vision tower is trained too."""
        self._rpc("finish_weight_update")
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not discard the prefixes of the old weights")
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each parameter of each worker."""
        return {
            name: digest
            for worker in self._rpc("nemo_care_digests")
            for name, digest in worker.items()
        }

    def sleep(self, level: int) -> None:
        """Free GPU memory."""
        self.engine.sleep(level=level)

    def wake_up(self, tags: list[str]) -> None:
        """Allocate the memory of weights or of the key-value cache again."""
        self.engine.wake_up(tags)

    def close(self) -> None:
        """End vLLM's processes."""
        self.engine.engine_core.shutdown()
        self._folder.cleanup()

    def is_dead(self, error: Exception) -> bool:
        """Whether the engine is unusable after this error, such as a worker's death."""
        executor = getattr(self.llm.llm_engine, "model_executor", None)
        return isinstance(error, EngineDeadError) or bool(getattr(executor, "is_failed", False))

    def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        return self.engine.collective_rpc(method, kwargs=arguments)


def engine_prompt(request: SampleRequest) -> dict[str, Any]:
    """Return a request's tokens and media in vLLM's format."""
    from PIL import Image

    media: dict[str, Any] = {}
    if request.videos:
        media["video"] = [
            (
                video.frames,
                {
                    "fps": video.fps,
                    "duration": len(video.frames) / video.fps,
                    "total_num_frames": len(video.frames),
                    "frames_indices": video.numbers,
                    "video_backend": "nemo_care",
                    "do_sample_frames": False,
                },
            )
            for video in request.videos
        ]
    if request.images:
        media["image"] = [Image.fromarray(image) for image in request.images]
    prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
    if media:
        prompt["multi_modal_data"] = media
        # The frames have already been chosen and resized.
        prompt["mm_processor_kwargs"] = {"do_sample_frames": False}
    return prompt


def sampling_params(request: SampleRequest) -> SamplingParams:
    """Return vLLM's sampling parameters of a request; temperature 0 is greedy."""
    return SamplingParams(
        n=request.count,
        temperature=request.temperature,
        top_p=request.top_p if request.temperature > 0 else 1.0,
        seed=request.seed if request.temperature > 0 else None,
        max_tokens=request.max_tokens,
        stop_token_ids=request.eos_ids,
        # Only those of the sampled token.
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sampled(output: Any) -> SampleReply:
    """Convert the finished output of a request."""
    prompt = list(output.prompt_token_ids)
    completions, of_prompt = [], None
    for completion in sorted(output.outputs, key=lambda one: one.index):
        ids = list(completion.token_ids)
        log_probs = [at[token].logprob for token, at in zip(ids, completion.logprobs, strict=True)]
        routing = None
        if completion.routed_experts is not None:
            of_prompt, routing = split_routing(completion.routed_experts, len(prompt))
        completions.append(Sampled(ids, np.array(log_probs, dtype=np.float32), routing))
    return SampleReply(prompt, completions, of_prompt)


def make_model_folder(
    source: Path, folder: Path, processor_files: dict[str, dict[str, Any]]
) -> None:
    """Create a checkpoint's directory for vLLM, of links to its files.

    The processor's settings are written anew: frames have their final size, so none may be
    resized, whatever limits the checkpoint sets.
    """
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    for name, content in processor_files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    # It would override these settings.
    (folder / "processor_config.json").unlink(missing_ok=True)
