"""Time GRPO steps of TRL. Run by versus_trl.py with the Python of an environment that has TRL.

    python trl_step.py CHECKPOINT IMAGE WORDS COMPLETION_TOKENS GROUP_SIZE BETA THREADS STEPS OUT

OUT gets a JSON list with the seconds of each step: rollout, reference (log-probabilities without
gradient), update (loss, backward and optimizer step); and the prompt's tokens.
"""

import json
import sys
import time
from pathlib import Path

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # A wheel that does not fit a CPU build of torch lacks two operators.
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from datasets import Dataset
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):
    """Records the duration of the parts of a step."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, float] = {}
        self.prompt_tokens = 0

    def _timed(self, name, call, *args, **kwargs):
        started = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    def _generate(self, *args, **kwargs):
        return self._timed("rollout", super()._generate, *args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        return self._timed("prepare", super()._prepare_inputs, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        call = super()._get_per_token_logps_and_entropies
        if torch.is_grad_enabled():
            return call(*args, **kwargs)
        return self._timed("reference", call, *args, **kwargs)

    def _generate_and_score_completions(self, *args, **kwargs):
        output = super()._generate_and_score_completions(*args, **kwargs)
        self.prompt_tokens = int(output["prompt_mask"][0].sum())
        self.completion_tokens = float(output["completion_mask"].sum(1).float().mean())
        return output


class StepTimes(TrainerCallback):
    """One record per optimizer step."""

    def __init__(self) -> None:
        self.trainer: TimedTrainer | None = None
        self.records: list[dict] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.seconds = {}
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = self.trainer.seconds
        step = time.perf_counter() - self.started
        self.records.append(
            {
                "rollout": seconds["rollout"],
                "reference": seconds.get("reference", 0.0),
                "update": step - seconds["prepare"],
                "step": step,
                "prompt_tokens": self.trainer.prompt_tokens,
                "completion_tokens": self.trainer.completion_tokens,
            }
        )


def every_other_one(completions, **kwargs) -> list[float]:
    """Made-up rewards."""
    return [float(number % 2) for number in range(len(completions))]


def main() -> None:
    checkpoint, image, words = sys.argv[1:4]
    tokens, group_size = int(sys.argv[4]), int(sys.argv[5])
    beta, threads, steps, out = float(sys.argv[6]), int(sys.argv[7]), int(sys.argv[8]), sys.argv[9]
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    pixels = {"min_pixels": 784, "max_pixels": 28 * 28 * 16384}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )
    picture = Image.open(image)
    prompt = [{"role": "user", "content": " ".join(f"w{n}" for n in range(int(words)))}]
    data = Dataset.from_list([{"prompt": prompt, "image": picture} for _ in range(steps)])
    times = StepTimes()
    trainer = TimedTrainer(
        model=Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa"
        ),
        reward_funcs=every_other_one,
        args=GRPOConfig(
            output_dir=str(Path(out).parent / "trl"),
            per_device_train_batch_size=group_size,
            num_generations=group_size,
            max_completion_length=tokens,
            max_steps=steps,
            beta=beta,
            temperature=1.0,
            loss_type="grpo",
            learning_rate=1e-6,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=processor,
        callbacks=[times],
    )
    times.trainer = trainer
    trainer.train()
    Path(out).write_text(json.dumps(times.records))


if __name__ == "__main__":
    main()
