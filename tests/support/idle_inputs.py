"""Command lines that would work, and what must be said where an option is added to them that would do nothing."""

from __future__ import annotations

TRAIN = "train tiny --data DIR/doc.jsonl --batch-size 4 --experts 3 --steps 2 --out NEW"
COMPARE = "compare tiny --data DIR/doc.jsonl --steps 2 --experts 3 --batch-size 4 --out NEW"
FEDERATE = "federate tiny --data DIR/doc.jsonl --clients 4 --clients-per-round 2 --out NEW"
OWN = FEDERATE.replace("--clients 4", "--clients-data DIR/tasks")
SERVER = "federate-server tiny --data DIR/doc.jsonl --clients 2 --clients-per-round 2 --keys DIR/keys --out NEW"
GENERATE = "generate DIR/done"
EXPORT = "export DIR/done --out NEW"
ADD = "experts DIR/done add --out NEW"
COMPRESS = "compress tiny --out NEW --sparsity 0.5"
IDLE: list[tuple[str, str]] = [
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
    (f"{TRAIN} --lora-rank 5", "--lora-rank 5 is of LoRA, which is not trained here: choose that method"),
    (f"{TRAIN} --answer-tokens 5", "--answer-tokens 5 is of scored answers, and there are none"),
    (f"{TRAIN} --warmup 0.1 --warmup-steps 3", "--warmup 0.1 gives way to --warmup-steps: leave one of them away"),
    (f"{TRAIN} --clip 1 --max-grad-norm 1", "--clip 1.0 gives way to --max-grad-norm: leave one of them away"),
    (f"{FEDERATE} --method fedlora --gate-lr 0.1", "--gate-lr 0.1 is of a gate, and this adapter has none"),
    (f"{FEDERATE} --method fedprompt --share-above 0.1", "--share-above 0.1 is of a gate, and this adapter has none"),
    (f"{FEDERATE} --relative-gate-lr 0.1", "--relative-gate-lr 0.1 does not reach the clients: give --gate-lr"),
    (f"{FEDERATE} --partition dirichlet --skew 3", "--skew 3.0 is of --partition skewed: choose that"),
    (f"{FEDERATE} --dirichlet-alpha 3", "--dirichlet-alpha 3.0 is of --partition dirichlet: choose that"),
    (f"{OWN} --partition source", "--partition source is of DATA that are shared out"),
    (f"{OWN} --clients 4", "--clients 4 is of DATA that are shared out"),
    (f"{TRAIN} --eval-every 5 --validation-share 0", "--eval-every 5 is of validation data, and there are none"),
    ("data DIR/doc.jsonl --max-length 5", "--max-length 5 is of tokens, which a model makes: give --model"),
    ("evaluate DIR/done --columns response=answer", "--columns response=answer is of --data"),
    (f"{FEDERATE} --trim 0.2", "--trim 0.2 is of --aggregation trimmed-mean: choose that"),
    (f"{FEDERATE} --noise-multiplier 1 --quorum 2", "--quorum 2 makes something hang on how many answered"),
    (f"{FEDERATE} --noise-multiplier 1 --attempts 5", "--attempts 5 makes something hang on how many answered"),
    (f"{FEDERATE} --noise-multiplier 1 --norm-limit 5", "--norm-limit 5.0 makes something hang on how many"),
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
