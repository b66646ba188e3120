"""The plan as tables in the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_care.planning.counts import micro_batches_of
from nemo_care.planning.engines import EnginePlan
from nemo_care.planning.flops import busiest_vision_flops
from nemo_care.planning.gpus import GIB, gib
from nemo_care.planning.measured import PHASES
from nemo_care.planning.plan import GRANULARITIES, Plan
from nemo_care.planning.precision import precision_in_words
from nemo_care.process.screen import console
from nemo_care.recipe.schema import Recipe, replicas_of

_FOOTNOTE = (
    "Counted by running the step's own code for its shapes, without memory or values, in a "
    "fake world; nothing here was run on a GPU. Attention is counted as torch's flash "
    "kernel. {allowance:.0f} GiB of each total is an allowance for CUDA's context, cuBLAS and "
    "NCCL; the margin of {margin:.0%} is for fragmentation. Times assume: matrix products at "
    "{flops:.0%} of the peak, decoding at {bandwidth:.0%} of the memory bandwidth and "
    "{layer_microseconds:.0f} microseconds per layer and token, {nvlink_gb_s:.0f} GB/s inside a "
    "machine, {network_gb_s:.0f} GB/s between machines, {host_gb_s:.0f} GB/s to the CPU's memory "
    "(--assume changes them)."
)

_FP8_FOOTNOTE = (
    " *An estimate of the copies of the weights that TransformerEngine keeps (two, one of them "
    "transposed; of one layer with full recomputation); activations are counted as in bf16. The "
    "layers' products in 8 bits are taken at {fp8_flops:.0%} of the GPU's dense 8-bit peak."
)


def markdown_table(columns: Sequence[str]) -> Table:
    """Return an empty table that can be pasted into Markdown."""
    table = Table(box=box.MARKDOWN)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def plan_report(plan: Plan, remedies: Sequence[str]) -> RenderableType:
    """Report everything from top to bottom: configuration, memory, time, verdict."""
    question, beside = plan.question, ""
    if plan.seconds.asynchronous:
        beside = "; the rollout is the next step's, beside scoring and update"
    return Group(
        Text(_headline(plan)),
        "",
        Text("Held by a GPU of each stage, GiB"),
        _held_table(plan),
        Text(
            f"Peak of each phase on a GPU, GiB, everything included; {gib(question.gpu.memory)} "
            f"are available, {gib(question.budget)} with the margin"
        ),
        _phase_table(plan),
        *([Text(_engine_line(plan.engine, plan.recipe))] if plan.engine is not None else []),
        Text("Buffers, GiB; and the update's peak under each model.recompute_granularity"),
        _detail_table(plan),
        Text("CPU memory of a machine, GiB, at most"),
        _host_table(plan),
        Text(f"One step: FLOPs of all GPUs together, and estimated time{beside}"),
        _time_table(plan),
        Text(_sharing(plan)),
        Text(_verdict(plan)),
        *(Text(f"  - {line}") for line in remedies),
        "",
        Text(_footnote(plan)),
    )


def _engine_line(engine: EnginePlan, recipe: Recipe) -> str:
    vllm = recipe.rollout.vllm
    where, awake = "on the training GPUs", " while it is awake"
    asleep = f" and {gib(engine.asleep)} during training"
    if engine.placement == "separate":
        elsewhere = "elsewhere" if vllm.ray_address is not None else "that do not train"
        where, awake, asleep = f"on GPUs {elsewhere}, taken to be of the same kind", "", ""
    left = (
        f"the {gib(engine.cache)} GiB that are left, less what activations and CUDA graphs take, "
        "hold"
    )
    if vllm.kv_cache_gib is not None:
        left = f"a cache of rollout.vllm.kv_cache_gib={vllm.kv_cache_gib:g} holds"
    return (
        f"vLLM samples, in {engine.engines} engine(s) of {engine.tensor_parallel_size} GPU(s) "
        f"each {where}. An engine takes {gib(engine.share)} GiB of each GPU{awake} "
        f"(rollout.vllm.gpu_memory_utilization={vllm.gpu_memory_utilization:g}){asleep}. "
        f"{gib(engine.weights)} GiB are weights; {left} {engine.cache_tokens} tokens, "
        f"{engine.cache_sequences} full-length sequence(s) of {engine.sequence_tokens}"
    )


def _headline(plan: Plan) -> str:
    recipe, longest, typical = plan.recipe, plan.longest, plan.typical
    model, trainer = recipe.model, recipe.trainer
    ranks = trainer.devices * trainer.num_nodes
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    experts = plan.shape.architecture.experts
    shared = f", EP {model.expert_model_parallel_size}" if experts is not None else ""
    return (
        f"{plan.parameters / 1e9:.2f} billion parameters ({plan.shape.source})\n"
        f"{ranks} x {plan.question.gpu.name}, {trainer.num_nodes} machine(s): TP {tensor}"
        f"{' with sequence parallelism' if model.sequence_parallel else ''}, "
        f"PP {pipeline}{shared}, DP {replicas_of(recipe)}; "
        f"recomputation {model.recompute_granularity}; "
        f"{precision_in_words(recipe)}; "
        f"{micro_batches_of(recipe)} micro-batch(es) per step and replica\n"
        f"memory at the longest lengths: prompt {longest.prompt} tokens ({longest.vision} of "
        f"videos), {recipe.algorithm.group_size} completions of {longest.completion}\n"
        f"time at typical lengths: prompt {typical.prompt} ({typical.vision} of videos), "
        f"completions of {typical.completion}"
    )


def _held_table(plan: Plan) -> Table:
    offload = plan.recipe.algorithm.reference.offload
    waiting = plan.recipe.optimizer.offload
    quantised = plan.recipe.model.precision.fp8.enabled
    table = markdown_table(
        [
            "stage",
            "parameters",
            "weights",
            "gradients",
            f"optimizer{' (step)' if waiting else ''}",
            f"EMA float32{' (CPU)' if offload else ''}",
            f"reference copy{' (scoring)' if offload else ''}",
            *(["8-bit copies*"] if quantised else []),
            "held",
        ],
    )
    for stage in plan.stages:
        build = stage.build
        table.add_row(
            str(stage.stage),
            f"{build.parameters / 1e9:.2f} B",
            *map(gib, (build.weights, build.gradients, build.optimizer)),
            *map(gib, (build.reference_average, build.reference_weights)),
            *([gib(build.fp8_copies)] if quantised else []),
            gib(stage.held),
        )
    return table


def _phase_table(plan: Plan) -> Table:
    shown = [phase for phase in PHASES if any(phase in stage.peaks for stage in plan.stages)]
    question = plan.question
    table = markdown_table(["stage", *shown, "largest", "fits"])
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            *(gib(stage.peaks.get(phase, 0)) for phase in shown),
            gib(stage.peak),
            "yes" if stage.peak <= question.budget else "NO",
        )
    return table


def _detail_table(plan: Plan) -> Table:
    own = plan.recipe.model.recompute_granularity
    table = markdown_table(
        ["stage", "in flight", "micro-batch", "of it vision", "KV cache", "output layer"]
        + [f"{'*' if name == own else ''}{name}" for name in GRANULARITIES],
    )
    for stage in plan.stages:
        use, updates = stage.use, stage.update_by_recomputation
        table.add_row(
            str(stage.stage),
            str(stage.in_flight),
            *map(gib, (use.micro_batch, use.vision, use.key_value_cache, use.output_layer)),
            *(gib(updates.get(name, 0)) for name in GRANULARITIES),
        )
    return table


def _host_table(plan: Plan) -> Table:
    table = markdown_table([*plan.host, "together"])
    table.add_row(*(gib(size) for size in plan.host.values()), gib(sum(plan.host.values())))
    return table


def _time_table(plan: Plan) -> Table:
    seconds, flops = plan.seconds.as_json(), plan.flops.values()
    table = markdown_table(["", *seconds])
    table.add_row("PFLOP", *(f"{value / 1e15:.1f}" for value in (*flops, sum(flops))))
    table.add_row("seconds", *(f"{value:.1f}" for value in seconds.values()))
    return table


def _sharing(plan: Plan) -> str:
    tokens = plan.tokens()
    saved = 1 - tokens["shared"] / tokens["separate"]
    config = plan.recipe.checkpoint
    kept = f"the last {config.keep_last} are kept" if config.keep_last else "all are kept"
    if config.keep_last and config.keep_every:
        kept += f", and each of a multiple of {config.keep_every} steps"
    size = plan.recipe.algorithm.group_size
    forward = plan.shape.family.vision_flops(plan.typical.grids)
    busiest = busiest_vision_flops(plan.recipe, plan.shape.family, plan.typical, 1)
    used = "" if plan.recipe.algorithm.shared_prompt else " (this recipe has shared_prompt=false)"
    return (
        f"prompt sharing{used}: {tokens['shared']} tokens per group instead of "
        f"{tokens['separate']}, {saved:.0%} saved; the vision tower runs once instead of {size} "
        f"times\nvision tower: at most {busiest / 1e12:.1f} of the {forward / 1e12:.1f} TFLOP of a "
        "typical prompt's forward pass on a GPU of the first stage\n"
        f"checkpoint: {gib(plan.checkpoint_bytes)} GiB each, {kept}"
    )


def _verdict(plan: Plan) -> str:
    worst, budget, engine = plan.worst, plan.question.budget, plan.engine
    what = f"stage {worst.stage} needs {gib(worst.peak)} GiB in {worst.peak_phase}"
    if plan.fits:
        return f"It fits: {what}, {gib(budget)} are available with the margin."
    reasons = [] if engine is None or engine.fits else [f"{engine.problem}."]
    if not plan.stages_fit:
        reasons.insert(0, f"{what}, {gib(budget)} are available with the margin.")
    return f"It does NOT fit: {' Also: '.join(reasons)} What helps:"


def _footnote(plan: Plan) -> str:
    question = plan.question
    fp8 = _FP8_FOOTNOTE if plan.recipe.model.precision.fp8.enabled else ""
    rollout = plan.recipe.rollout
    graphs = rollout.cuda_graphs if plan.engine is None else not rollout.vllm.enforce_eager
    footnote = _FOOTNOTE.replace("{layer_", "{graph_layer_") if graphs else _FOOTNOTE
    return (footnote + fp8).format(
        allowance=plan.allowance / GIB, margin=question.margin, **vars(question.efficiency)
    )


def print_report(report: RenderableType) -> None:
    """Print to the terminal; in a file, lines are as long as needed."""
    screen = console()
    (screen if screen.is_terminal else console(width=160)).print(report)
