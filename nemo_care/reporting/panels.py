"""What the report's curves show: sheets of panels, each with the metrics that it draws."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """One set of axes: metric key -> label."""

    title: str
    lines: dict[str, str]
    unit: str = ""
    share: bool = False
    """A rate or probability: the axis is fixed to 0..1."""
    from_zero: bool = True
    smooth: bool = True
    needs_more_than_zero: bool = False
    """Left out where every value is 0, which is how it should be."""


@dataclass(frozen=True)
class Sheet:
    """One picture: panels side by side."""

    name: str
    title: str
    panels: list[Panel] = field(default_factory=list)


SHEETS = (
    Sheet(
        "reward",
        "Reward, accuracy and consistency",
        [
            Panel("Reward", {"reward/total": "total", "reward/format": "format"}, "mean reward"),
            Panel(
                "Sampled completions",
                {
                    "reward/accuracy": "accuracy",
                    "rollout/consistency_rate": "consistency",
                    "rollout/ended_rate": "ended by themselves",
                },
                "share",
                share=True,
            ),
        ],
    ),
    Sheet(
        "care",
        "Consistency bonus and reference",
        [
            Panel(
                "Answer likelihood under the reference",
                {"care/answer_likelihood": "mean"},
                "probability",
                share=True,
            ),
            Panel(
                "Completions",
                {
                    "care/bonus_rate": "with the bonus",
                    "care/clipped_rate": "likelihood at the clip",
                    "care/missing_answer_rate": "without an answer",
                    "care/unscored_answer_rate": "answer without a likelihood",
                },
                "share",
                share=True,
            ),
            Panel(
                "Groups in which the bonus selects",
                {"care/selection_rate": "share"},
                "share",
                share=True,
            ),
            Panel(
                "EMA reference",
                {"care/ema_distance": "distance"},
                "relative distance to the policy",
                smooth=False,
            ),
            Panel(
                "Answers under reference and policy",
                {"care/logprob_difference": "difference"},
                "log-probability difference",
            ),
        ],
    ),
    Sheet(
        "training",
        "Training",
        [
            Panel("Loss", {"train/loss": "loss"}, "loss", from_zero=False),
            Panel("KL to the reference", {"train/kl": "KL"}, "nats per token"),
            Panel("Gradient norm", {"train/grad_norm": "norm"}, "norm before clipping"),
            Panel("Learning rate", {"train/lr": "rate"}, "learning rate", smooth=False),
            Panel(
                "Steps left out",
                {"train/bad_steps": "so far"},
                "steps that were not finite",
                smooth=False,
                needs_more_than_zero=True,
            ),
        ],
    ),
    Sheet(
        "completions",
        "Completions and groups",
        [
            Panel("Length", {"rollout/completion_tokens": "mean"}, "tokens per completion"),
            Panel(
                "Groups",
                {
                    "rollout/groups_all_right": "all right",
                    "rollout/groups_all_wrong": "all wrong",
                    "rollout/groups_without_signal": "without signal",
                    "rollout/groups_set_aside": "set aside",
                },
                "groups per step",
            ),
            Panel(
                "Dynamic sampling",
                {"rollout/rounds": "rounds", "rollout/groups_sampled": "groups"},
                "per step",
            ),
            Panel(
                "Sampled ahead",
                {"rollout/staleness": "staleness"},
                "optimizer steps behind",
                smooth=False,
            ),
            Panel(
                "Rollout against training",
                {"rollout/logprob_difference": "difference"},
                "log-probability difference",
            ),
            Panel(
                "Importance weights",
                {
                    "rollout/importance_mean": "mean weight",
                    "rollout/importance_truncated": "share above the cap",
                },
                "per token",
            ),
        ],
    ),
    Sheet(
        "machine",
        "Memory and saving",
        [
            Panel(
                "Memory of the largest rank",
                {"memory/process_gib": "process", "memory/gpu_gib": "GPU"},
                "GiB",
                smooth=False,
            ),
            Panel(
                "Held up by saving",
                {"timing/checkpoint": "seconds"},
                "seconds",
                smooth=False,
                needs_more_than_zero=True,
            ),
        ],
    ),
)
