"""What became of every public argument that reaches a model with our adapter: data for test_arguments.py.

Each argument stands in a table with values and what is to come of them, or in a group that says why it cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NEVER = "forward"  # a value that a check makes for itself


@dataclass
class Try:
    """An argument's value, other arguments it needs, and what is to come of it.

    `equal` names the check of test_arguments.py that has to hold; `refused`, words of our error; `alike`, words of an
    error that the bare model gives as well.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    equal: str | None = None
    refused: str | None = None
    alike: str | None = None


def logits(value: Any, **beside: Any) -> Try:
    """Each step's logits are those of one whole pass, without a cache, over the text that came out."""
    return Try(value, beside, equal="logits")


def greedy(value: Any, **beside: Any) -> Try:
    """The tokens are those of a greedy search."""
    return Try(value, beside, equal="greedy")


BEAMS, SAMPLE, HUB = dict(num_beams=2), dict(do_sample=True), "requires `trust_remote_code=True`"
GENERATION_CONFIG = {
    "max_length": [logits(11, max_new_tokens=None)],
    "max_new_tokens": [logits(3)],
    "min_length": [logits(11, eos_token_id=list(range(3, 250)))],
    "min_new_tokens": [logits(3, eos_token_id=list(range(3, 250)))],
    "early_stopping": [logits(True, **BEAMS)],
    "max_time": [logits(1e6)],
    "stop_strings": [logits(["zz"], tokenizer="tokenizer")],
    "do_sample": [logits(True)],
    "num_beams": [logits(3)],
    "use_mtp": [Try(True, alike="num_mtp_layers")],
    "use_cache": [logits(False), logits(True)],
    "cache_implementation": [
        logits("static"), logits("dynamic"), logits("hybrid"), logits("sliding_window"),
        Try("paged", refused="cache_implementation='paged': continuous batching.*unload"),
        Try("offloaded", alike="CUDA|ccelerator"), Try("quantized", alike="optimum-quanto|quanto"),
    ],
    "max_cache_len": [logits(40, cache_implementation="static")],
    "temperature": [logits(1.7, **SAMPLE)],
    "top_k": [logits(5, **SAMPLE)],
    "top_p": [logits(0.5, **SAMPLE)],
    "min_p": [logits(0.1, **SAMPLE)],
    "top_h": [logits(0.4, **SAMPLE)],
    "typical_p": [logits(0.5, **SAMPLE)],
    "epsilon_cutoff": [logits(0.001, **SAMPLE)],
    "eta_cutoff": [logits(0.001, **SAMPLE)],
    "repetition_penalty": [logits(1.5)],
    "encoder_repetition_penalty": [logits(1.5)],
    "length_penalty": [logits(0.5, **BEAMS)],
    "no_repeat_ngram_size": [logits(1)],
    "bad_words_ids": [logits([[7], [130]])],
    "renormalize_logits": [logits(True, **SAMPLE)],
    "forced_eos_token_id": [logits(2)],
    "remove_invalid_values": [logits(True)],
    "exponential_decay_length_penalty": [logits((1, 1.5), eos_token_id=2)],
    "suppress_tokens": [logits([7])],
    "begin_suppress_tokens": [logits([7])],
    "sequence_bias": [logits([[[7], -10.0]])],
    "token_healing": [Try(True, alike="you must pass the model's tokenizer")],
    "guidance_scale": [Try(2.0, equal="guided"), Try(2.0, dict(use_cache=False), equal="guided")],
    "watermarking_config": [logits(dict(bias=2.5))],
    "num_return_sequences": [logits(2, **SAMPLE), logits(2, **BEAMS)],
    "output_attentions": [logits(True)],
    "output_hidden_states": [logits(True)],
    "output_scores": [logits(True)],
    "output_logits": [logits(True)],
    "return_dict_in_generate": [logits(True)],
    "pad_token_id": [logits(5)],
    "eos_token_id": [logits([7, 9])],
    "num_assistant_tokens": [greedy(3, assistant_model="helper")],
    "num_assistant_tokens_schedule": [greedy("constant", assistant_model="helper")],
    "assistant_confidence_threshold": [greedy(0.1, assistant_model="helper")],
    "prompt_lookup_num_tokens": [greedy(3)],
    "max_matching_ngram_size": [greedy(1, prompt_lookup_num_tokens=3)],
    "assistant_early_exit": [Try(3, refused="assistant_early_exit=3: .*leave it unset")],
    "disable_compile": [logits(True, cache_implementation="static")],
    "low_memory": [logits(True)],
    "penalty_alpha": [Try(0.6, dict(top_k=4), alike=HUB)],
    "dola_layers": [Try("high", alike=HUB)],
    "num_beam_groups": [Try(2, dict(num_beams=4, diversity_penalty=0.5), alike=HUB)],
    "constraints": [Try([None], dict(num_beams=3), alike=HUB)],
    "force_words_ids": [Try([[5]], dict(num_beams=3), alike=HUB)],
    "prefill_chunk_size": [Try(4, refused="prefill_chunk_size=4: .*leave it unset")],
}  # fmt: skip
GENERATION_CONFIG_APART = {
    "read by encoder-decoders alone, which are refused": (
        "encoder_no_repeat_ngram_size", "decoder_start_token_id", "forced_bos_token_id"),
    "only begins a text where no prompt is given": ("bos_token_id",),
    "set by transformers on a helper, not by callers": ("is_assistant",),
    "how helpers with another tokenizer look back, before any model is called": (
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    "tried with num_beam_groups": ("diversity_penalty",),
    "read by quantized caches alone, which need a library that is not here": ("cache_config",),
    "generate compiles on accelerators alone": ("compile_config",),
    "continuous batching is refused": ("continuous_batching_config",),
    "of the file, not of a call": ("transformers_version",),
}  # fmt: skip

GENERATE = {
    "inputs": [logits("positional")],
    "generation_config": [logits("positional"), Try("chunked", refused="prefill_chunk_size=4")],
    "logits_processor": [logits("ban 7")],
    "stopping_criteria": [logits("at 10")],
    "prefix_allowed_tokens_fn": [logits("below 50")],
    "synced_gpus": [Try(True, alike="process group")],
    "assistant_model": [greedy("helper"), greedy("adapted helper")],
    "streamer": [logits("streamer")],
    "negative_prompt_ids": [Try("other", dict(guidance_scale=1.5), equal="guided"),
                            Try("other", dict(guidance_scale=1.5, use_cache=False), equal="guided")],
    "negative_prompt_attention_mask": [Try("padded", dict(guidance_scale=1.5), equal="guided")],
    "custom_generate": [logits("sample")],
}  # fmt: skip

ROWS = "the logits are those of the rows with a full attention mask"
FORWARD = {
    "input_ids": [Try(NEVER, equal="plain")],
    "attention_mask": [Try("2-D", equal="plain"), Try("4-D", equal="plain"), 
                       Try("sees the answer", refused="which the gate reads, see token")],
    "position_ids": [Try("of one row", equal="plain"), Try("restarting", refused="position_ids restart")],
    "past_key_values": [Try("in two passes", equal="plain"), Try("in two passes, as tuples", equal="plain"),
                        Try("static", equal="plain")],
    "inputs_embeds": [Try("embedded", equal="plain"), Try("neither", alike="exactly one of")],
    "labels": [Try("labels", equal="loss")],
    "use_cache": [Try(False, equal="plain"), Try(True, equal="plain")],
    "logits_to_keep": [Try(2, equal="last"), Try("some", equal="last")],
    "num_items_in_batch": [Try(7, equal="loss")],
    "output_hidden_states": [Try(True, equal="hidden")],
    "output_attentions": [Try(True, equal="plain")],
    "output_router_logits": [Try(True, equal="plain")],
    "cu_seq_lens_q": [Try([0, 5, 11], refused="cu_seq_lens_q says that rows hold several examples")],
    "seq_idx": [Try([[0] * 5 + [1] * 6], refused="seq_idx says that rows hold several examples")],
    "is_causal": [Try(False, refused="is_causal=False lets tokens see later ones"), Try(True, equal="plain")],
    "return_dict": [Try(False, equal="plain")],
    "gate_mask": [Try("all", equal="plain")],
    "gate_maks": [Try("all", refused="gate_maks is no argument of the gate")],
    "adapter_names": [Try(["default"] * 3, equal="plain"), Try(["else"] * 3, refused="adapter_names has")],
    "alora_offsets": [Try([1, 1, 1], refused="alora_offsets belong to aLoRA")],
}  # fmt: skip
FORWARD_APART = {
    "of kernels that are refused (flash attention)": ("cu_seq_lens_k", "max_length_q", "max_length_k"),
    "PEFT takes it off for all methods but Poly": ("task_ids",),
    "tested where such adapters are (test_gate.py)": ("gate_embedding",),
}
