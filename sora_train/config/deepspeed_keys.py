"""Keys that DeepSpeed 0.18 and 0.19 read, except those derived from our own keys. DeepSpeed silently ignores others.

Doesn't import deepspeed, which takes seconds; a test compares the keys with those of the installed version.
"""

from __future__ import annotations

BUCKET = 25 << 20  # bytes of gradients that are sent together without ZeRO in fp32, as in torch's DDP

DEEPSPEED = (
    "activation_checkpointing", "aio", "amp", "autotuning", "check_overflow", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
    "eigenvalue", "elasticity", "flops_profiler", "fp32_allreduce", "gradient_allreduce_op",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level", "memory_breakdown", "nebula",
    "pipeline", "pld", "prescale_gradients", "progressive_layer_drop", "quantize_training",
    "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients", "tensor_parallel", "timers",
    "torch_autocast", "use_data_before_expert_parallelism", "use_node_local_storage", "wall_clock_breakdown",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
ZERO = (
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm",
    "contiguous_gradients", "cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint",
    "enable_sanity_checks", "gather_16bit_weights_on_model_save", "ignore_unused_parameters", "leaf_module",
    "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings", "max_live_parameters",
    "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold", "module_granularity_threshold",
    "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply", "param_persistence_threshold",
    "parameter_alignment", "pipeline_loading_checkpoint", "prefetch_bucket_size", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage",
    "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params",
    "sub_group_size", "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow",
    "zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)  # fmt: skip
