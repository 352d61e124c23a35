"""What became of every argument of PEFT and of trainers that reaches a model with our adapter: data for its tests."""

from __future__ import annotations

from argument_tables import Try


def trains(value, **beside) -> Try:
    """The first loss is that of a plain pass; the gate reads instructions alone; nothing but the adapter moves."""
    return Try(value, beside, equal="loss")


def moves(value, **beside) -> Try:
    """The same, but that the loss is another by intention (smoothed, noised, in half precision)."""
    return Try(value, beside, equal="moves")


EVAL = dict(eval_strategy="steps", eval_steps=1)
NOT_HERE = "not installed here"
TRAINING_ARGUMENTS = {
    "per_device_train_batch_size": [trains(4)],
    "num_train_epochs": [trains(1, max_steps=-1)],
    "max_steps": [trains(1)],
    "learning_rate": [trains(0.5)],
    "lr_scheduler_type": [trains("cosine", max_steps=2)],
    "lr_scheduler_kwargs": [trains(dict(num_cycles=2), lr_scheduler_type="cosine_with_restarts")],
    "warmup_steps": [trains(1, max_steps=2)],
    "optim": [trains("adafactor"), trains("sgd"), trains("adamw_torch_fused"), Try("galore_adamw", dict(optim_target_modules=["mops"]), alike="galore_torch")],
    "weight_decay": [trains(0.1)],
    "adam_beta1": [trains(0.5)],
    "adam_beta2": [trains(0.5)],
    "adam_epsilon": [trains(1e-3)],
    "gradient_accumulation_steps": [trains(2, per_device_train_batch_size=2)],
    "average_tokens_across_devices": [trains(False)],
    "max_grad_norm": [trains(0.01)],
    "label_smoothing_factor": [moves(0.1)],
    "bf16": [moves(True)],
    "fp16": [moves(True)],
    "bf16_full_eval": [trains(True, **EVAL)],
    "fp16_full_eval": [trains(True, **EVAL)],
    "activation_checkpointing": [trains(True)],
    "activation_checkpointing_kwargs": [trains(dict(use_reentrant=False), activation_checkpointing=True)],
    "gradient_checkpointing": [trains(True)],
    "gradient_checkpointing_kwargs": [
        trains(dict(use_reentrant=False), gradient_checkpointing=True),
        Try(dict(use_reentrant=True), dict(gradient_checkpointing=True), refused="use_reentrant=True loses"),
    ],
    "use_liger_kernel": [Try(True, alike="liger-kernel")],
    "use_cache": [trains(True)],
    "neftune_noise_alpha": [moves(5)],
    "auto_find_batch_size": [trains(True)],
    "include_num_input_tokens_seen": [trains("all")],
    "eval_strategy": [trains("steps", eval_steps=1)],
    "eval_on_start": [trains(True, **EVAL)],
    "per_device_eval_batch_size": [trains(3, **EVAL)],
    "prediction_loss_only": [trains(True, **EVAL)],
    "eval_accumulation_steps": [trains(1, **EVAL)],
    "include_for_metrics": [trains(["inputs", "loss"], **EVAL)],
    "save_only_model": [trains(True, save_strategy="steps", save_steps=1)],
    "load_best_model_at_end": [trains(True, save_strategy="steps", save_steps=1, **EVAL)],
    "full_determinism": [trains(True)],
    "dataloader_drop_last": [trains(True)],
    "remove_unused_columns": [trains(False), Try(True, dict(column="gate_mask"), refused="gate_mask is a column of the data"),
                              Try(False, dict(column="gate_mask"), equal="masked")],
    "label_names": [trains(["labels"])],
    "train_sampling_strategy": [trains("sequential"), trains("group_by_length")],
    "debug": [trains("underflow_overflow")],
    "compute_loss_func": [moves("logits alone"), Try("logits alone", dict(column="no labels"), equal="warned")],
    "fsdp": [Try("full_shard", alike="distributed training")],
}  # fmt: skip
TRAINING_ARGUMENTS_APART = {
    "files, logs and the hub": (
        "output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
        "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token",
        "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "skip_memory_metrics"),
    "when something is saved or evaluated, not how": (
        "eval_steps", "eval_delay", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
        "enable_jit_checkpoint", "metric_for_best_model", "greater_is_better", "do_train", "do_eval", "do_predict"),
    "what is done with logits after the pass": (
        "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics"),
    "resuming is tested in test_peft_contract.py": (
        "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    "how batches are fetched, which does not change them": (
        "seed", "data_seed", "accelerator_config", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order", "length_column_name"),
    "read with optimisers that are not installed here": ("optim_args", "optim_target_modules"),
    "read with Liger alone, which is not installed here": ("liger_kernel_config",),
    "of an accelerator": ("tf32", "torch_empty_cache_steps", "use_cpu"),
    "several processes: tests/fitting/test_parallel.py has those that are served": (
        "local_rank", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
        "ddp_backend", "ddp_timeout", "fsdp_config", "deepspeed", "parallelism_config"),
    "compiling takes a minute; tried by hand with backend=\"eager\": the same losses": (
        "torch_compile", "torch_compile_backend", "torch_compile_mode"),
}  # fmt: skip
SFT = {
    "max_length": [trains(200)],
    "shuffle_dataset": [trains(True)],
    "packing": [Try(True, refused="several examples are packed")],
    "packing_strategy": [
        Try("wrapped", dict(packing=True), refused="several examples are packed"),
        Try("bfd_split", dict(packing=True), refused="several examples are packed"),
    ],
    "padding_free": [Try(True, dict(max_length=None), refused="several examples are packed")],
    "eval_packing": [Try(True, EVAL, refused="several examples are packed")],
    "pad_to_multiple_of": [trains(16)],
    "completion_only_loss": [trains(True), Try(False, equal="warned")],
    "assistant_only_loss": [trains(True, data="chat")],
    "loss_type": [moves("dft"), trains("nll")],
    "label_smoothing_factor": [moves(0.1)],
    "compute_loss_func": [moves("logits alone")],
    "eos_token": [trains("<eos>")],
    "pad_token": [trains("<pad>")],
    "dataset_text_field": [Try("said", dict(data="text"), equal="warned")],
    "dataset_kwargs": [trains(dict(skip_prepare_dataset=True), data="prepared")],
    "router_aux_loss_coef": [Try(0.1, alike="oE|xperts")],
    "activation_offloading": [Try(True, alike="no attribute 'type'")],
    "gradient_checkpointing": [trains(True)],
    "neftune_noise_alpha": [moves(5)],
    "remove_unused_columns": [Try(True, dict(column="gate_mask"), refused="gate_mask is a column of the data")],
}  # fmt: skip
SFT_APART = {
    "read where the model is given by name": ("model_init_kwargs", "trust_remote_code"),
    "how the text is made before it is a batch": ("dataset_num_proc", "chat_template_path", "truncation_mode"),
}

ADAPTER_NAMES = [Try("other", equal="same"), Try("a.b", refused=r"adapter_name='a\.b' cannot name parameters"),
                 Try("items", refused="adapter_name='items' cannot"), Try("", refused="adapter_name='' cannot")]  # fmt: skip
MODEL = {
    "adapter_name": ADAPTER_NAMES,
    "mixed": [Try(True, refused="not compatible with the `PeftMixedModel`")],
    "autocast_adapter_dtype": [Try(False, equal="same")],
    "revision": [Try("main", equal="same")],
    "low_cpu_mem_usage": [Try(True, refused="made with low_cpu_mem_usage=True and its weights were not loaded")],
}
MODEL_APART = {"the subject itself": ("model", "peft_config", "self")}
LOADED = {
    "adapter_name": [Try("other", equal="same")],
    "is_trainable": [Try(True, equal="same")],
    "config": [Try("own", equal="same"), Try("another temperature", equal="changed")],
    "autocast_adapter_dtype": [Try(False, equal="same")],
    "ephemeral_gpu_offload": [Try(True, equal="same")],
    "low_cpu_mem_usage": [Try(True, equal="same")],
    "torch_device": [Try("cpu", equal="same")],
    "key_mapping": [Try({"mops_prompts": "mops_keys"}, refused="the adapter's file lacks mops_prompts")],
}
LOADED_APART = {"the subject itself": ("model", "model_id", "self", "kwargs")}
SAVED = {
    "safe_serialization": [Try(False, equal="same"), Try(True, equal="same")],
    "selected_adapters": [Try(["default"], equal="same"), Try(["x"], refused="invalid `selected_adapters`")],
    "save_embedding_layers": [Try(True, equal="same"), Try(False, equal="same")],
    "path_initial_model_for_weight_conversion": [Try("x", refused="not supported for MoPsModel")],
}
SAVED_APART = {"the subject itself": ("self", "save_directory", "kwargs"), "writes nothing": ("is_main_process",)}
