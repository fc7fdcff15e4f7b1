"""A broken config or more for every rule: the rule, what to change, the number of ranks, what the user is told."""

from __future__ import annotations

BROKEN: list[tuple[str, dict[str, object], int | None, str]] = [
    (
        "tensor_divides_model",
        {"parallel__tensor": 6, "model__num_heads": 32, "model__num_kv_heads": 8, "model__ffn_hidden_size": 96},
        None,
        "parallel.tensor=6 must divide model.num_heads=32 and model.num_kv_heads=8; use 1, 2, 4 or 8",
    ),
    (
        "tensor_divides_model",
        {"parallel__tensor": 8, "model__num_kv_heads": None, "model__ffn_hidden_size": 100},
        None,
        "parallel.tensor=8 must divide model.ffn_hidden_size=100; use 1, 2 or 4",
    ),
    (
        "sequence_splits_evenly",
        {"parallel__tensor": 4, "parallel__sequence": True, "data__seq_len": 62},
        None,
        "data.seq_len=62 must be a multiple of parallel.tensor=4 under parallel.sequence=true; use 52, 56, 60 or 64",
    ),
    (
        "sequence_splits_evenly",
        {"parallel__context": 4, "data__seq_len": 60},
        None,
        "data.seq_len=60 must be a multiple of 8: parallel.context=4, two chunks a rank; use 40, 48, 56 or 64",
    ),
    (
        "stages_hold_layers",
        {"parallel__pipeline": 5},
        None,
        "parallel.pipeline=5 must not exceed model.num_layers=4; use 1, 2, 3 or 4",
    ),
    (
        "stages_hold_layers",
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3, "parallel__schedule": "interleaved"},
        None,
        "parallel.virtual_pipeline=3 x parallel.pipeline=2 stages must not exceed model.num_layers=4; use 2",
    ),
    (
        "stages_hold_layers",
        {"parallel__pipeline": 6, "parallel__virtual_pipeline": 2, "parallel__schedule": "interleaved"},
        None,
        "parallel.pipeline=6 x parallel.virtual_pipeline=2 stages must not exceed model.num_layers=4; use 2",
    ),
    (
        "chunks_need_pipeline",
        {"parallel__virtual_pipeline": 2},
        None,
        "parallel.virtual_pipeline=2 must be 1 when parallel.pipeline=1; use 1",
    ),
    (
        "stages_hold_layers",
        {"parallel__pipeline": 3, "parallel__schedule": "zbv"},
        None,
        "parallel.pipeline=3 x parallel.virtual_pipeline=2 stages must not exceed model.num_layers=4; use 1 or 2",
    ),
    (
        "chunks_match_schedule",
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3, "parallel__schedule": "zbv", "model__num_layers": 8},
        None,
        "parallel.virtual_pipeline=3 must be 2 under parallel.schedule=zbv; use 2",
    ),
    (
        "chunks_match_schedule",
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__schedule": "gpipe"},
        None,
        "parallel.virtual_pipeline=2 must be 1 under parallel.schedule=gpipe; use 1",
    ),
    (
        "chunks_match_schedule",
        {"parallel__pipeline": 2, "parallel__schedule": "interleaved"},
        None,
        "parallel.virtual_pipeline=1 must be at least 2 under parallel.schedule=interleaved; use 2",
    ),
    (
        "batch_splits_evenly",
        {"data__global_batch": 7},
        None,
        "data.global_batch=7 must be a multiple of data.microbatch=2; use 4, 6, 8 or 10",
    ),
    (
        "batch_splits_evenly",
        {"data__global_batch": 16},
        3,
        "data.global_batch=16 must be a multiple of data.microbatch=2 x 3 data ranks = 6; use 6, 12, 18 or 24",
    ),
    (
        "microbatches_fill_pipeline",
        {"parallel__pipeline": 4, "data__global_batch": 4},
        None,
        "data.global_batch=4 gives a rank 2 of the 4 microbatches that fill parallel.pipeline=4 under 1f1b; "
        "use 8, 10, 12 or 14",
    ),
    (
        "microbatches_fill_pipeline",
        {"parallel__pipeline": 2, "data__global_batch": 8},
        8,
        "data.global_batch=8 gives a rank 1 of the 2 microbatches that fill parallel.pipeline=2 under 1f1b; "
        "use 16, 24, 32 or 40",
    ),
    (
        "microbatches_fill_pipeline",
        {"parallel__pipeline": 2, "parallel__schedule": "dualpipev", "data__global_batch": 6},
        None,
        "data.global_batch=6 gives a rank 3 of the 4 microbatches that fill parallel.pipeline=2 under dualpipev; "
        "use 8, 10, 12 or 14",
    ),
    (
        "microbatches_fill_rounds",
        {"parallel__pipeline": 2, "parallel__schedule": "zero_bubble", "data__global_batch": 10},
        2,
        "data.global_batch=10 gives 5 microbatches a rank, not a multiple of 2 rounds of parallel.pipeline=2; "
        "use 4, 6, 8 or 12",
    ),
    (
        "microbatches_fill_rounds",
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "parallel__schedule": "interleaved",
            "data__global_batch": 10,
        },
        2,
        "data.global_batch=10 gives 5 microbatches a rank, not a multiple of 2 rounds of parallel.pipeline=2; "
        "use 4, 6, 8 or 12",
    ),
    (
        "context_divides_heads",
        {"parallel__context": 3, "parallel__context_method": "ulysses", "data__seq_len": 24},
        None,
        "parallel.context=3 must divide the 8 heads of a tensor rank under ulysses; use 1, 2 or 4",
    ),
    (
        "context_divides_heads",
        {
            "parallel__context": 12,
            "parallel__context_method": "mixed",
            "parallel__context_heads": 3,
            "data__seq_len": 48,
        },
        None,
        "parallel.context_heads=3 must divide the 8 heads of a tensor rank under mixed; use 1, 2 or 4",
    ),
    (
        "context_heads_divide_context",
        {"parallel__context": 8, "parallel__context_method": "mixed", "parallel__context_heads": 3},
        None,
        "parallel.context_heads=3 must divide parallel.context=8; use 1, 2, 4 or 8",
    ),
    (
        "context_heads_divide_context",
        {"parallel__context": 4, "parallel__context_heads": 2},
        None,
        "parallel.context_heads=2 must be 1 under parallel.context_method=ring; use 1",
    ),
    (
        "context_without_attention_dropout",
        {"parallel__context": 2, "model__attention_dropout": 0.1},
        None,
        "model.attention_dropout=0.1 must be 0 with parallel.context above 1; use 0.0",
    ),
    (
        "expert_divides_experts",
        {"parallel__expert": 2},
        None,
        "parallel.expert=2 must be 1 without model.moe.num_experts; use 1",
    ),
    (
        "expert_divides_experts",
        {"parallel__expert": 4, "model__moe__num_experts": 6},
        4,
        "parallel.expert=4 must divide model.moe.num_experts=6; use 1 or 2",
    ),
    (
        "expert_divides_shards",
        {"parallel__expert": 4, "model__moe__num_experts": 8},
        2,
        "parallel.expert=4 must divide the 2 ranks of data x context; use 1 or 2",
    ),
    (
        "tensor_divides_experts",
        {"parallel__tensor": 2, "model__moe__num_experts": 4, "model__moe__ffn_hidden_size": 9},
        2,
        "parallel.tensor=2 must divide model.moe.ffn_hidden_size=9; use 1",
    ),
    (
        "choices_fit_experts",
        {"model__moe__num_experts": 2, "model__moe__top_k": 3},
        None,
        "model.moe.top_k=3 must not exceed model.moe.num_experts=2; use 1 or 2",
    ),
    (
        "operators_do_not_overlap",
        {"parallel__recompute": "selective", "parallel__recompute_operators": ["mlp", "norm", "activation"]},
        None,
        "parallel.recompute_operators=[mlp,norm,activation] must not name both mlp and the activation inside it; "
        "use [mlp,norm] or [norm,activation]",
    ),
    (
        "async_needs_sequence",
        {"parallel__tensor": 2, "parallel__async_tensor": True},
        None,
        "parallel.async_tensor=true must be false without parallel.sequence=true; use false",
    ),
    (
        "async_stays_whole",
        {"parallel__sequence": True, "parallel__async_tensor": True, "parallel__compile": True},
        None,
        "parallel.async_tensor=true must be false with parallel.compile=true; use false",
    ),
    (
        "layers_need_recompute",
        {"parallel__recompute_layers": 2},
        None,
        "parallel.recompute_layers=2 must be null under parallel.recompute=none; use null",
    ),
    (
        "replicas_need_shards",
        {"parallel__replicate": 2, "parallel__zero": 0, "parallel__data": 4},
        None,
        "parallel.replicate=2 must be 1 with parallel.zero=0, which replicates everything; use 1",
    ),
    (
        "offloaded_parameters_are_sharded",
        {"parallel__offload": "parameters", "parallel__zero": 0},
        None,
        "parallel.offload=parameters needs parallel.zero of 1 or more, whose shards it keeps in host memory; "
        "use optimizer or none",
    ),
    (
        "fused_sums_exist",
        {"parallel__fused_accumulation": True, "parallel__zero": 2, "precision__name": "bf16"},
        None,
        "parallel.fused_accumulation=true keeps no sum of whole gradients under parallel.zero=2; use false",
    ),
    (
        "fused_sums_exist",
        {"parallel__fused_accumulation": True},
        None,
        "parallel.fused_accumulation=true has nothing to widen under precision=fp32; use false",
    ),
    (
        "replicas_divide_data",
        {"parallel__replicate": 3},
        8,
        "parallel.replicate=3 must divide the data axis of 8 ranks; use 1, 2, 4 or 8",
    ),
    (
        "ranks_fit_layout",
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        3,
        "ranks=3 must be a multiple of 4 = parallel.pipeline=2 x parallel.tensor=2; use 4, 8 or 16",
    ),
    (
        "ranks_fit_layout",
        {"parallel__tensor": 2, "parallel__data": 4},
        4,
        "ranks=4 must be 8 = parallel.data=4 x parallel.tensor=2; use 8",
    ),
    ("ranks_fit_layout", {"parallel__data": 1}, 2, "ranks=2 must be parallel.data=1; use 1"),
    (
        "heads_divide_hidden",
        {"model__num_heads": 12, "model__ffn_hidden_size": 96},
        None,
        "model.num_heads=12 must divide model.hidden_size=64 (or set model.head_dim); use 4, 8, 16 or 32",
    ),
    (
        "kv_heads_divide_heads",
        {"model__num_kv_heads": 3},
        None,
        "model.num_kv_heads=3 must divide model.num_heads=8; use 1, 2, 4 or 8",
    ),
    (
        "rotary_heads_are_even",
        {"model__head_dim": 7},
        None,
        "model.head_dim=7 must be even under model.position=rope; use 4, 6, 8 or 10",
    ),
    (
        "rotary_heads_are_even",
        {"model__num_heads": 64, "model__num_kv_heads": None, "model__ffn_hidden_size": 64},
        None,
        "model.num_heads=64 makes heads of odd width 1 under model.position=rope; use 4, 8, 16 or 32",
    ),
    (
        "mup_needs_base_width",
        {"model__mup__output_multiplier": 2.0},
        None,
        "model.mup.output_multiplier=2.0 needs model.mup.base_width, which turns muP on; use 1.0",
    ),
    (
        "mup_needs_base_width",
        {"model__mup__base_head_width": 4},
        None,
        "model.mup.base_head_width=4 needs model.mup.base_width, which turns muP on; use null",
    ),
    (
        "base_heads_divide_base_width",
        {"model__num_heads": 2, "model__num_kv_heads": 2, "model__mup__base_width": 16},
        None,
        "model.mup.base_head_width=unset means heads of 32, as here; their width must divide model.mup.base_width=16; "
        "use 8",
    ),
    (
        "base_heads_divide_base_width",
        {"model__mup__base_width": 12, "model__mup__base_head_width": 5},
        None,
        "model.mup.base_head_width=5 must divide model.mup.base_width=12; use 2, 3, 4 or 6",
    ),
    (
        "sequence_fits_positions",
        {"data__seq_len": 65},
        None,
        "data.seq_len=65 must not exceed model.max_seq_len=64; use 40, 48, 56 or 64",
    ),
    (
        "scaling_needs_rope",
        {"model__position": "learned", "model__rope__scaling": "yarn"},
        None,
        "model.rope.scaling=yarn needs model.position=rope, not learned; use none",
    ),
    (
        "factor_needs_scaling",
        {"model__rope__factor": 8.0},
        None,
        "model.rope.factor=8.0 has no effect under model.rope.scaling=none; use 1",
    ),
    (
        "rope_bands_are_ordered",
        {"model__rope__scaling": "llama3", "model__rope__low_freq_factor": 4.0},
        None,
        "model.rope.low_freq_factor=4.0 must be below model.rope.high_freq_factor=4.0; use 1.0",
    ),
    (
        "rope_bands_are_ordered",
        {"model__rope__scaling": "yarn", "model__rope__beta_slow": 64.0},
        None,
        "model.rope.beta_slow=64.0 must be below model.rope.beta_fast=32.0; use 1.0",
    ),
    (
        "decay_ends_within_run",
        {"schedule__name": "wsd", "schedule__decay_steps": 95},
        None,
        "schedule.decay_steps=95 + schedule.warmup_steps=10 must not exceed run.steps=100; use 90",
    ),
    (
        "evaluation_has_data",
        {"telemetry__eval_interval": 5},
        None,
        "telemetry.eval_interval=5 needs data.validation_fraction above 0, such as 0.01; use 0",
    ),
    (
        "wandb_is_installed",
        {"telemetry__wandb": True},
        None,
        "telemetry.wandb=true needs the extra: pip install 'dist-llm[wandb]'; use false",
    ),
    (
        "double_precision_is_on_cpu",
        {"precision__name": "fp64", "device": "cuda"},
        None,
        "precision.name=fp64 is for verification on device=cpu; use fp32, bf16 or fp16",
    ),
    (
        "launcher_is_built",
        {"launcher__name": "mpi"},
        None,
        "launcher.name=mpi is not part of this version; start ranks with torchrun -m dist_llm train; "
        "use local or slurm",
    ),
    (
        "local_launcher_has_one_node",
        {"launcher__nodes": 2},
        None,
        "launcher.nodes=2 must be 1 under launcher=local, which starts ranks on this node; use 1",
    ),
    (
        "asynchronous_save_is_built",
        {"checkpoint__asynchronous": True},
        None,
        "checkpoint.asynchronous=true is not part of this version; use false",
    ),
]
