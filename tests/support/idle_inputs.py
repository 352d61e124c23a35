"""Command lines that would work, and what must be said where an option is added to them that would do nothing."""

from __future__ import annotations

TRAIN = "train tiny --data DIR/doc.jsonl --batch-size 4 --experts 3 --steps 2 --out NEW"
ONE = TRAIN.replace("--experts 3", "--experts 1")
LORA = "train tiny --data DIR/doc.jsonl --batch-size 4 --steps 2 --out NEW --method lora"
COMPARE = "compare tiny --data DIR/doc.jsonl --steps 2 --experts 3 --batch-size 4 --out NEW"
FEDERATE = "federate tiny --data DIR/doc.jsonl --clients 4 --clients-per-round 2 --out NEW"
OWN = FEDERATE.replace("--clients 4", "--clients-data DIR/tasks")
SERVER = "federate-server tiny --data DIR/doc.jsonl --clients 2 --clients-per-round 2 --keys DIR/keys --out NEW"
GENERATE = "generate DIR/done"
EXPORT = "export DIR/done --out NEW"
ADD = "experts DIR/done add --out NEW"
COMPRESS = "compress tiny --out NEW --sparsity 0.5"
INT8 = "compress tiny --out NEW --int8"
OTHER = "compress DIR/pruned --out NEW"
BENCH, NAMED = "bench --out NEW", "bench tiny --out NEW"
REPRODUCE = "reproduce table2 --out NEW"
CHOOSE = "choose the method mops and several --experts, or leave it away"
NONE = f"and there is none: {CHOOSE}"
IDLE: list[tuple[str, str]] = [
    (f"{LORA} --gate-lr 0.1", f"--gate-lr 0.1 is of a gate that learns, {NONE}"),
    (
        f"{TRAIN} --method prompt-tuning --gate-temperature 2",
        f"--gate-temperature 2.0 is of a gate that learns, {NONE}",
    ),
    (f"{TRAIN} --method uniform-gate --relative-gate-lr 0.1", "--relative-gate-lr 0.1 is of a gate that learns"),
    (f"{TRAIN} --method oracle --gate-hidden-size 5", f"--gate-hidden-size 5 is of a gate that learns, {NONE}"),
    (
        f"{TRAIN} --gate-lr 0.1 --relative-gate-lr 0.1",
        "--relative-gate-lr 0.1 gives way to --gate-lr: leave one of them",
    ),
    (
        f"{TRAIN} --method prompt-tuning --gate-target hidden_states --expert-kind hidden_states",
        f"--gate-target hidden_states is of a gate over several experts, {NONE}",
    ),
    (
        f"{LORA[:-4]}ia3 --gate-granularity prompt",
        f"--gate-granularity prompt is of a gate that learns, {NONE}",
    ),
    (
        f"{TRAIN} --method oracle --gate-granularity prompt",
        f"--gate-granularity prompt is of a gate that learns, {NONE}",
    ),
    (f"{TRAIN} --method uniform-gate --gate-granularity prompt", "--gate-granularity prompt is of a gate that learns"),
    (f"{TRAIN} --method prompt-tuning --gate-layer 3", "--gate-layer 3 is of a gate that reads the model's own states"),
    (f"{TRAIN} --method prompt-tuning --embedder x", f"--embedder x is of a gate that reads, {NONE}"),
    (f"{TRAIN} --method top-1 --gate-top-k 2", "--gate-top-k 2 is of a gate that weighs several experts"),
    (
        f"{TRAIN} --method top-1 --null-expert False",
        "--null-expert False is of a gate that is taught, and there is none: choose the method mops, or leave it away",
    ),
    (
        f"{TRAIN} --null-expert False --null-threshold 0.2",
        "--null-threshold 0.2 is of a null expert, and there is none",
    ),
    (
        f"{TRAIN} --method oracle --gate-pretraining clusters",
        f"--gate-pretraining clusters is of a gate that learns which expert is meant, {NONE}",
    ),
    (
        f"{ONE} --gate-pretraining none --gate-layer 3",
        f"--gate-pretraining none is of a gate that learns which expert is meant, {NONE}",
    ),
    (
        f"{ONE} --null-expert False --gate-granularity prompt --prompts-per-expert 1",
        f"--gate-granularity prompt is of a gate that learns, {NONE}",
    ),
    (f"{TRAIN} --method prompt-tuning --gate-layer 0", "--gate-layer 0 is of a gate that reads the model's own states"),
    (f"{LORA} --injection-layer 0", "--injection-layer 0 is of experts, and there are none: choose the method mops"),
    (f"{LORA} --gate-start gradient", "--gate-start gradient is of a gate that is pretrained"),
    (f"{TRAIN} --expert-kind hidden_states --gate-start ridge", "--gate-start ridge needs --expert-kind keys_values"),
    (f"{LORA} --expert-names a b c", "--expert-names a b c is of a gate that learns labels"),
    (f"{LORA} --visible-to answers", "--visible-to answers is of experts, and there are none"),
    (f"{LORA} --freeze-first-column", "--freeze-first-column is of experts, and there are none"),
    (f"{LORA[:-4]}ia3 --shared-prompts 4", "--shared-prompts 4 is of experts, and there are none"),
    (f"{LORA} --init random", "--init random is of experts, and there are none"),
    (f"{LORA} --recovery-prompts 5", "--recovery-prompts 5 is of experts, and there are none"),
    (f"{LORA} --activations off", "--activations off is of experts, and there are none"),
    (f"{LORA} --lora-match memory --lora-rank 5", "--lora-rank 5 is of LoRA of a given size"),
    (f"{TRAIN} --lora-alpha 5", "--lora-alpha 5 is of LoRA, which is not trained here: choose that method"),
    (f"{LORA} --relative-lr 0.1", "--relative-lr 0.1 is of prompts without a --prompt-lr: train such"),
    (f"{TRAIN} --prompt-lr 0.1 --relative-lr 0.1", "--relative-lr 0.1 is of prompts without a --prompt-lr"),
    (f"{LORA} --interference-examples 5", "--interference-examples 5 is of prompts of ours"),
    (f"{TRAIN} --method oracle --samples-per-task 5", "--samples-per-task 5 is of answers to a text alone"),
    (f"{TRAIN} --no-keep-recovery-prompts", "--no-keep-recovery-prompts is of recovery prompts, and there are none"),
    (f"{COMPARE} --methods mops 0.1 --relative-lr 0.1", "--relative-lr 0.1 gives way to the rates of --methods"),
    (f"{FEDERATE} --relative-lr 0.1", "--relative-lr 0.1 does not reach clients with --expert-kind hidden_states"),
    (f"{FEDERATE} --noise-multiplier 1 --quorum 1", "--quorum 1 gives way to --noise-multiplier"),
    (f"{FEDERATE} --noise-multiplier 1 --norm-limit 2", "--norm-limit 2.0 gives way to --noise-multiplier"),
    (f"{FEDERATE} --allow-other-versions", "--allow-other-versions is of `smartmops federate-server`"),
    (f"{INT8} --method wanda", "--method wanda is of pruning: give --sparsity or --pattern, or leave it away"),
    (f"{INT8} --sequences 5", "--sequences 5 is of text that pruning is calibrated on, and none is"),
    (f"{COMPRESS} --method magnitude --seed 5", "--seed 5 is of text that pruning is calibrated on, and none is"),
    (f"{COMPRESS} --method wanda --damping 0.1", "--damping 0.1 is of pruning by --method sparsegpt: choose that"),
    (f"{COMPRESS} --method wanda --block-size 64", "--block-size 64 is of pruning by --method sparsegpt"),
    (f"{COMPRESS} --int8-engine torchao", "--int8-engine torchao is of --int8: give that, or leave it away"),
    (f"{COMPRESS} --calibration DIR/empty.txt --limit 5", "--limit 5 is of DATA, and none are read"),
    (f"{OTHER} --int8 --columns response=answer", "--columns response=answer is of DATA, and none are read"),
    (f"{OTHER} --sparsity 0.5 --method magnitude --sequence-length 64", "--sequence-length 64 is of text, and none is"),
    (f"{OTHER} --nf4 --device cpu", "--device cpu is of layers that are pruned or measured: give --calibration"),
    (f"{BENCH} --dtype bfloat16", "--dtype bfloat16 is of a base that is named: give MODEL, or leave it away"),
    (f"{BENCH} --growth-tokens 5", "--growth-tokens 5 is of --growth: give that, or leave it away"),
    (f"{BENCH} --quality-steps 5", "--quality-steps 5 is not of what is measured on the random Llama: choose a MODEL"),
    (
        f"{BENCH} --only train_vs_lora --gate-examples 5",
        "--gate-examples 5 is of gate_pretraining_seconds, which --only",
    ),
    (f"{BENCH} --only train_vs_lora --peak-sizes 5", "--peak-sizes 5 is of matrix_peak_share, which --only leaves out"),
    (f"{BENCH} --only prefill_vs_bare --new-tokens 5", "--new-tokens 5 is of decode_vs_bare_batch_1, decode_vs_bare"),
    (f"{NAMED} --layers 8", "--layers 8 is of the random Llama, and tiny is measured: leave one of them away"),
    (f"{NAMED} --many-experts 8", "--many-experts 8 is not of what is measured on tiny: choose the random Llama"),
    (f"{NAMED} --only quality --repeats 2", "--repeats 2 is of train, train_short"),
    (f"{REPRODUCE} --clients 20", "--clients 20 is of federated training, and table2 has none: leave it away"),
    (f"{REPRODUCE} --steps 9 --rounds 9", "--rounds 9 gives way to --steps in table2: leave one of them away"),
    ("reproduce table3 --out NEW --steps 9", "--steps 9 is of central training, and table3 has none: leave it away"),
    ("reproduce table5 --out NEW --no-tune", "--no-tune is of central training, and table5 has none"),
    ("reproduce figure6 --out NEW --seeds 1 2", "--seeds 1 2 are several, and figure6 shows one: give one"),
    (
        "reproduce ablation --out NEW --calibration DIR/empty.txt",
        "empty.txt is of bases that are compressed, and these",
    ),
    (f"{REPRODUCE} --tables-only --budget 5", "--budget 5.0 is of cells that are run, and --tables-only runs none"),
    (f"{REPRODUCE} --rates mop 0.1", "--rates mop 0.1: no line of table2 takes it, choose from mops, prompt-tuning"),
    (
        "reproduce table3 --out NEW --rates mops 0.1",
        "--rates mops 0.1: no line of table3 takes it, choose from federate:",
    ),
    (
        "reproduce table4 --out NEW --data dolly=DIR/doc.jsonl superni",
        "--data superni: table4 is of dolly where they are",
    ),
    (f"{COMPARE} --method lora", "--method lora is of one method, and compare trains several: name each with its rate"),
    (f"{COMPARE} --prompt-lr 0.1", "--prompt-lr 0.1 is of one method, and compare trains several"),
    (f"{COMPARE} --seed 7", "--seed 7 is one seed, and compare takes several: write --seeds 7"),
    (f"{TRAIN} --expert-attention causal", "--expert-attention causal is of experts that run through the layers"),
    (f"{TRAIN} --no-gate-renormalise", "--no-gate-renormalise is of the weights that --gate-top-k keeps"),
    (f"{TRAIN} --head-lr 0.1", "--head-lr 0.1 is of --prefix-attention separate: choose that"),
    (f"{TRAIN} --recovery-steps 5", "--recovery-steps 5 is of recovery prompts, and there are none"),
    (f"{TRAIN} --recovery-lr 5", "--recovery-lr 5.0 is of recovery prompts, and there are none"),
    (f"{TRAIN} --gate-pretraining-steps 5", "--gate-pretraining-steps 5 is of a gate that Adam pretrains"),
    (f"{TRAIN} --gate-pretraining-lr 5", "--gate-pretraining-lr 5.0 is of a gate that Adam pretrains"),
    (f"{TRAIN} --lora-rank 5", "--lora-rank 5 is of LoRA of a given size: choose that method"),
    (f"{TRAIN} --answer-tokens 5", "--answer-tokens 5 is of scored answers, and there are none"),
    (f"{TRAIN} --warmup 0.1 --warmup-steps 3", "--warmup 0.1 gives way to --warmup-steps: leave one of them away"),
    (f"{TRAIN} --clip 1 --max-grad-norm 1", "--clip 1.0 gives way to --max-grad-norm: leave one of them away"),
    (f"{FEDERATE} --method fedlora --gate-lr 0.1", "--gate-lr 0.1 is of a gate that learns, and there is none"),
    (f"{FEDERATE} --method fedlora --init random", "--init random is of experts, and there are none: choose the"),
    (
        f"{FEDERATE} --method fedprompt --share-above 0.1",
        f"--share-above 0.1 is of a gate over several experts, {NONE}",
    ),
    (f"{FEDERATE} --relative-lr 0.1 --prompt-lr 0.1", "--relative-lr 0.1 is of prompts without a --prompt-lr"),
    (f"{FEDERATE} --relative-gate-lr 0.1 --gate-lr 0.1", "--relative-gate-lr 0.1 gives way to --gate-lr"),
    (
        f"{COMPARE.replace(' --experts 3', '')} --methods ia3 None --init random",
        "--init random is of experts, and there are none",
    ),
    (f"{FEDERATE} --relative-gate-lr 0.1", "--relative-gate-lr 0.1 does not reach the clients: give --gate-lr"),
    (f"{FEDERATE} --partition dirichlet --skew 3", "--skew 3.0 is of --partition skewed: choose that"),
    (f"{FEDERATE} --dirichlet-alpha 3", "--dirichlet-alpha 3.0 is of --partition dirichlet: choose that"),
    (f"{OWN} --partition source", "--partition source is of DATA that are shared out"),
    (f"{OWN} --clients 4", "--clients 4 is of DATA that are shared out"),
    (f"{TRAIN} --eval-every 5 --validation-share 0", "--eval-every 5 is of validation data, and there are none"),
    ("data DIR/doc.jsonl --max-length 5", "--max-length 5 is of tokens, which a model makes: give --model"),
    ("evaluate DIR/done --columns response=answer", "--columns response=answer is of --data"),
    (f"{FEDERATE} --trim 0.2", "--trim 0.2 is of --aggregation trimmed-mean: choose that"),
    (f"{FEDERATE} --server-lr 0.2", "--server-lr 0.2 is of --aggregation fedadam: choose that"),
    (f"{FEDERATE} --actors 1", "--actors 1 is of --engine flower-simulation: choose that"),
    (f"{SERVER} --clients-data DIR/tasks", "--clients-data DIR/tasks is of `smartmops federate`"),
    (f"{SERVER} --skew 3", "--skew 3.0 is of `smartmops federate`, and this server's clients hold their data on"),
    (f"{SERVER} --skip-empty", "--skip-empty is of `smartmops federate`"),
    (f"{SERVER} --actors 1", "--actors 1 is of `smartmops federate`"),
    ("evaluate DIR/done --answer-tokens 5", "--answer-tokens 5 is of answers, and none are asked for: give --answers"),
    (f"{GENERATE} hello --batch-size 4", "--batch-size 4 is of the rows of --file: give that, or leave it away"),
    (f"{GENERATE} hello --top-p 0.5", "--top-p 0.5 is of tokens that are sampled, and at --temperature 0 none are"),
    (f"{GENERATE} hello --seed 5", "--seed 5 is of tokens that are sampled"),
    ("chat DIR/done --seed 5", "--seed 5 is of tokens that are sampled"),
    (f"{EXPORT} --format router --experts a", "--experts a is of forms that carry experts"),
    (f"{ADD} --data DIR/doc.jsonl --questions 5", "--questions 5 is of questions for --prompt: give that"),
]
ACTING = [
    f"{FEDERATE} --expert-kind keys_values --prefix-attention separate --head-lr 0.1 --relative-lr 0.1 --gate-lr 0.1",
    f"{TRAIN} --gate-lr 0.1 --gate-temperature 2 --gate-layer 3 --null-threshold 0.2 --gate-pretraining clusters",
    f"{TRAIN} --method top-1 --gate-lr 0.1 --gate-hidden-size 9 --gate-target attention --expert-names a b c",
    f"{TRAIN} --method uniform-gate --gate-top-k 2 --no-gate-renormalise --gate-granularity prompt",
    f"{TRAIN} --method nearest-cluster --gate-layer 2 --gate-input sequence",
    f"{LORA} --lora-match parameters --gate-granularity prompt --gate-hidden-size 9",
    f"{ONE} --expert-kind hidden_states --null-expert True --gate-target hidden_states",
    f"{ONE} --gate-pretraining none --null-threshold 0.2",
    f"{LORA} --lora-match memory --prompts-per-expert 5 --injection-layer 2 --shared-prompts 4",
    f"{LORA[:-4]}input-prompt-tuning --prompts-per-expert 5",
    f"{TRAIN} --expert-kind hidden_states --gate-start gradient --gate-pretraining-steps 5 --expert-attention causal",
    f"{TRAIN} --recovery-prompts 5 --visible-to all --recovery-steps 5 --no-keep-recovery-prompts",
    f"{COMPARE} --methods lora None mops None --gate-lr 0.1 --lora-rank 4 --relative-lr 0.1",
    f"{INT8} --sequence-length 64 --limit 9 --batch-size 2",
    f"{OTHER} --int8 --calibration DIR/doc.jsonl --columns response=answer --device cpu --test-share 0.2",
    f"{COMPRESS} --block-size 64 --damping 0.1 --sequences 5 --seed 5",
    f"{BENCH} --prompt-tokens 9 --new-tokens 9 --gate-examples 9 --many-experts 9 --peak-sizes 9 --layers 9",
    f"{BENCH} --only mixed_batch_vs_lora --growth --growth-tokens 9 --new-tokens 9",
    f"{NAMED} --only quality --quality-steps 5 --experts 3 --dtype bfloat16",
    "reproduce all --out NEW --clients 20 --steps 9 --rounds 9 --calibration DIR/empty.txt --seeds 1 2 --no-tune",
    "reproduce ablation --out NEW --bases 75% --calibration DIR/empty.txt",
]
