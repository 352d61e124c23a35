"""Command lines that cannot work, each with what must be said of it: for the suite, and for scripts/sweep_wrong_inputs.

`DIR` stands for a folder that `prepare` filled; `NEW` for a name in it where nothing is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from idle_inputs import ADD, COMPARE, COMPRESS, EXPORT, FEDERATE, GENERATE, IDLE, LORA, TRAIN

WRONG: list[tuple[str, str]] = [
    *IDLE,
    # sizes, rates and shares of training
    (f"{TRAIN} --batch-size 1000000", "--batch-size 1000000, but there are 48 training examples: choose 1 to 48"),
    (f"{TRAIN} --batch-size 0", "--batch-size 0: choose 1 or more"),
    (f"{TRAIN} --batch-size 99999999999", "--batch-size 99999999999: choose at most 2147483647"),
    (f"{TRAIN} --batch-size 4.5", "--batch-size"),
    (f"{TRAIN} --steps -5", "--steps -5: choose 0 or more"),
    (f"{TRAIN} --prompt-lr -1", "--prompt-lr -1.0: choose a finite rate of 0 or more"),
    (f"{TRAIN} --prompt-lr nan", "--prompt-lr nan: choose a finite rate"),
    (f"{TRAIN} --prompt-lr inf", "--prompt-lr inf: choose a finite rate"),
    (f"{TRAIN} --gate-lr -0.1", "--gate-lr -0.1: choose a finite rate"),
    (f"{TRAIN} --relative-gate-lr nan", "--relative-gate-lr nan: choose a finite rate"),
    (f"{TRAIN} --recovery-lr nan", "--recovery-lr nan: choose a finite rate"),
    (f"{TRAIN} --relative-lr inf", "--relative-lr inf: choose a finite rate"),
    (f"{TRAIN} --warmup-steps -1", "--warmup-steps -1: choose 0 or more"),
    (f"{TRAIN} --warmup 1", "--warmup 1.0: choose a share of the steps"),
    (f"{TRAIN} --clip 0", "--clip 0.0: choose a finite number above 0"),
    (f"{TRAIN} --max-grad-norm nan", "--max-grad-norm nan: choose a finite number above 0"),
    (f"{TRAIN} --log-every 0", "--log-every 0: choose 1 or more"),
    (f"{TRAIN} --save-every 0", "--save-every 0: choose 1 or more"),
    (f"{TRAIN} --eval-every 0", "--eval-every 0: choose 1 or more"),
    (f"{TRAIN} --patience 0", "--patience 0: choose 1 or more"),
    (f"{TRAIN} --patience 2 --validation-share 0", "--patience 2 waits for evaluations on validation data"),
    (f"{TRAIN} --gate-pretraining-steps -1", "--gate-pretraining-steps -1: choose 0 or more"),
    (f"{TRAIN} --recovery-prompts -1", "--recovery-prompts -1: choose 0 or more"),
    (f"{TRAIN} --recovery-steps -1", "--recovery-steps -1: choose 0 or more"),
    (f"{TRAIN} --max-length 0", "--max-length 0: choose 1 or more"),
    (f"{TRAIN} --limit 0", "--limit 0: choose 1 or more"),
    (f"{TRAIN} --limit 900", "--limit 900, but there are 60 examples: choose 1 to 60"),
    (f"{TRAIN} --test-share 1", "--test-share 1.0: choose a share between 0 and 1"),
    (f"{TRAIN} --test-share nan", "--test-share nan: choose a share between 0 and 1"),
    (f"{TRAIN} --validation-share -0.1", "--validation-share -0.1: choose a share from 0"),
    (f"{TRAIN} --seed -1", "--seed -1: choose 0 to 4294967295"),
    (f"{TRAIN} --data-seed -3", "--data-seed -3: choose 0 to 4294967295"),
    (f"{TRAIN} --answers-per-task -1", "--answers-per-task -1: choose 0 or more"),
    (f"{TRAIN} --answer-tokens 0", "--answer-tokens 0: choose 1 or more"),
    (f"{TRAIN} --samples-per-task -2", "--samples-per-task -2: choose 0 or more"),
    # the method
    (f"{TRAIN} --method mop", "'mop'"),
    (f"{TRAIN} --experts 0", "--experts 0: choose 1 or more"),
    (f"{TRAIN} --experts 2", "--experts 2, but there are 3 tasks: choose 3, or --gate-pretraining clusters"),
    ("train tiny --data DIR/tasks --experts 2 --out NEW", "--experts 2, but there are 3 tasks: choose 3"),
    (f"{FEDERATE} --epsilon-budget 1", "--epsilon-budget 1.0 goes with --noise-multiplier, without which nothing is clipped"),
    (f"{FEDERATE} --aggregation expert-weighted --experts 1",
     "--aggregation expert-weighted goes by how much each client uses which expert, and --experts 1 is one alone"),
    (f"{FEDERATE} --aggregation expert-weighted --method fedlora", "and --method fedlora has none to choose from"),
    (f"{FEDERATE} --delta 0.01", "--delta 0.01 goes with --noise-multiplier"),
    (f"{FEDERATE} --clip-norm 0.5", "--clip-norm 0.5 goes with --noise-multiplier"),
    (f"{FEDERATE} --noise-multiplier 0.05", "--noise-multiplier 0.05: choose 0.1 or more"),
    (f"{COMPARE} --methods mops prompt-tuning", "--methods: every name takes its learning rate after it, such as NAME 0.03"),
    ("compare tiny --data DIR/tasks --experts 2 --out NEW", "--experts 2, but there are 3 tasks: choose 3"),
    (f"{TRAIN} --prompts-per-expert 0", "--prompts-per-expert 0: choose 1 or more"),
    (f"{TRAIN} --prompts-per-expert 2000000", "choose 1000000 at most"),
    (f"{TRAIN} --expert-names a b", "lack category"),
    (f"{TRAIN} --expert-names a a b", "is named twice"),
    (f"{TRAIN} --expert-names a b c d", "are 4 names, but there are --experts 3"),
    (f"{TRAIN} --injection-layer 99", "--injection-layer 99, but this model has 8 layers: choose 0 to 7"),
    (f"{TRAIN} --injection-layer -1", "--injection-layer -1: choose 0 or more"),
    (f"{TRAIN} --gate-layer 99", "--gate-layer 99, but this model has 8 layers: choose 0 to 8"),
    (f"{TRAIN} --gate-top-k 9", "--gate-top-k 9, but there are 3 gate weights: choose 1 to 3"),
    (f"{TRAIN} --gate-temperature 0", "--gate-temperature 0.0: choose a finite number above 0"),
    (f"{TRAIN} --gate-hidden-size 0", "--gate-hidden-size 0: choose 1 or more"),
    (f"{TRAIN} --null-threshold -1", "--null-threshold -1.0: choose a weight from 0"),
    (f"{TRAIN} --unrelated DIR/nowhere.txt", "nowhere.txt cannot be read"),
    (f"{TRAIN} --unrelated DIR/doc.jsonl", "holds 1 texts: give 20 or more"),
    (f"{TRAIN} --gate-target hidden_states", "--gate-target hidden_states scales prompts"),
    (f"{LORA} --lora-rank 0", "--lora-rank 0: choose 1 or more"),
    (f"{LORA} --lora-from 99", "--lora-from 99, but this model has 8 layers: choose 0 to 7"),
    (f"{LORA} --shared-prompts 4", "--shared-prompts 4 is of experts, and there are none"),
    (f"{TRAIN} --dtype float16", "'float16'"),
    (f"{TRAIN} --template caht", "--template caht: choose auto, chat, plain, or a file"),
    # files and folders
    (f"{TRAIN} --activations memroy", "--activations memroy: choose auto, memory, off, or a folder such as ./memroy"),
    (f"{TRAIN} --rows disk", "--rows disk: choose memory, or a folder such as ./disk"),
    (f"{TRAIN} --activations DIR/doc.jsonl", "doc.jsonl is a file: choose a folder"),
    (f"{TRAIN} --out /proc/x", "--out /proc/x cannot be made"),
    (f"{TRAIN} --out DIR/doc.jsonl/x", "doc.jsonl is a file"),
    (f"{TRAIN} --out DIR/doc.jsonl", "doc.jsonl is a file: choose a folder"),
    (f"{TRAIN} --out DIR/begun", "begun exists and holds an unfinished run: choose another folder, or resume"),
    (f"{TRAIN} --out DIR/notes", "notes exists and holds files of something else (thesis.tex)"),
    (f"{TRAIN} --out DIR/notes --resume", "is no run, it holds thesis.tex but no config.json"),
    (f"{TRAIN} --out DIR/begum --resume", "begum does not exist, so there is nothing to go on with: mend the name"),
    (f"{TRAIN} --data DIR/missing.jsonl", "missing.jsonl"),
    (f"{TRAIN} --data DIR/single.jsonl", "5 training and 0 test examples"),
    (f"{TRAIN} --data DIR/torn.jsonl", "torn.jsonl, line 2"),
    (f"{TRAIN} --data DIR/bare.jsonl --method oracle", "--method oracle is told the category, but no example has one"),
    (f"{TRAIN} --hold-out z", "--hold-out z is no category of the training split"),
    (f"{TRAIN.replace(' tiny ', ' DIR/doc.jsonl ')}", "MODEL"),
    (f"{TRAIN.replace(' tiny ', ' ./nosuch ')}", "MODEL ./nosuch does not exist"),
    (f"{TRAIN.replace(' tiny ', ' DIR/notes ')}", "has no config.json and no *.gguf file"),
    # how a command is typed
    (f"{TRAIN} --stepz 3", "--stepz"),
    (f"{TRAIN} --steps three", "--steps"),
    (f"{TRAIN} --steps", "--steps"),
    ("train tiny --out NEW", "--data"),
    ("trian tiny", "trian"),
    # the other commands
    (f"{COMPARE} --methods mops -1", "--methods mops -1.0: choose a finite rate"),
    (f"{COMPARE} --seeds", "--seeds"),
    (f"{COMPARE} --seeds 1 1", "--seeds 1 1: 1 is named twice"),
    (f"{COMPARE} --sparsity 1", "--sparsity 1.0: choose a share of zeros between 0 and 1"),
    (f"{COMPARE} --shots -1", "--shots -1: choose 0 or more"),
    (f"{COMPARE} --answers-per-task 2", "--answers-per-task 2, but compare does not measure that"),
    ("quickstart --out NEW --steps -1", "--steps -1: choose 0 or more"),
    (f"{COMPRESS} --sparsity 1.5", "--sparsity 1.5: choose a share of zeros between 0 and 1"),
    (f"{COMPRESS} --pattern 7:8", "--sparsity 0.5 and --pattern 7:8 are both asked for"),
    ("compress tiny --out NEW", "nothing to do: give --sparsity 0.75 or --pattern 7:8"),
    ("compress tiny --out NEW --pattern 4:7", "has 256 inputs, which 7 does not divide"),
    (f"{COMPRESS} --damping -1", "--damping -1.0: choose a finite number of 0 or more"),
    (f"{COMPRESS} --damping nan", "--damping nan: choose a finite number"),
    (f"{COMPRESS} --device gpu", "--device gpu: choose cpu, cuda, cuda:N, xpu or mps"),
    (f"{COMPRESS} --int8 --nf4", "--int8 and --nf4 are both asked for"),
    (f"{COMPRESS} --sequences 0", "--sequences 0: choose 1 or more"),
    (f"{COMPRESS} --sequence-length 99999", "positions: choose that at most"),
    (f"{COMPRESS} --resume", "does not exist, so there is nothing to go on with"),
    (f"{FEDERATE} --rounds 0", "--rounds 0: choose 1 or more"),
    (f"{FEDERATE} --clients-per-round 9", "--clients-per-round 9, but there are 4 clients: choose 1 to 4"),
    (f"{FEDERATE} --quorum 3", "--quorum 3, but 2 clients are asked in a round: choose 1 to 2"),
    (f"{FEDERATE} --clients 900", "--clients 900, but there are 54 training examples"),
    (f"{FEDERATE} --clients 50 --hold-out a", "--clients 50, but there are 36 training examples: choose 1 to 36"),
    (f"{FEDERATE} --skew 0.5", "--skew 0.5: choose 1 or more"),
    (f"{FEDERATE} --dirichlet-alpha 0", "--dirichlet-alpha 0.0: choose a number above 0"),
    (f"{FEDERATE} --trim 0.5", "--trim 0.5: choose a share from 0 up to, but not, 0.5"),
    (f"{FEDERATE} --timeout nan", "--timeout nan: choose a finite number above 0"),
    (f"{FEDERATE} --delta 2", "--delta 2.0: choose a chance between 0 and 1"),
    (f"{FEDERATE} --clients-data DIR/nowhere", "nowhere does not exist"),
    ("federate-keys --out NEW --clients", "--clients"),
    ("federate-keys --out NEW --clients ../a", "is no file name"),
    ("federate-keys --out NEW --clients a --days 0", "--days 0: choose 1 to 36500 days"),
    ("federate-server tiny --data DIR/doc.jsonl --clients 2 --clients-per-round 2 --keys DIR/nokeys --out NEW",
     "nokeys does not exist"),
    ("federate-client tiny --data DIR/doc.jsonl --server nowhere --keys DIR/notes", "--server nowhere: give HOST:PORT"),
    ("data DIR/nowhere.jsonl", "nowhere.jsonl"),
    ("data DIR/doc.jsonl --model DIR/nowhere", "nowhere does not exist: give a model folder"),
    ("data DIR/doc.jsonl --max-length 0", "--max-length 0: choose 1 or more"),
    ("data DIR/doc.jsonl --shown -1", "--shown -1: choose 0 or more"),
    ("data DIR/doc.jsonl --columns answer", "--columns answer: write FIELD=COLUMN"),
    ("data DIR/doc.jsonl --template nowhere.jinja", "nowhere.jinja"),
    ("data DIR/doc.jsonl --limit 900", "--limit 900, but there are 60 examples: choose 1 to 60"),
    ("evaluate DIR/nowhere", "nowhere does not exist: give a run folder"),
    ("evaluate DIR/begun", "begun is unfinished"),
    ("inspect DIR/notes --text x", "has no config.json, so it is no run folder"),
    (f"{GENERATE}", "neither TEXT nor --file is given: give one of them"),
    (f"{GENERATE} hello --file DIR/doc.jsonl", "doc.jsonl are both given: give one of them"),
    (f"{GENERATE} --file DIR/missing.jsonl", "missing.jsonl does not exist: give a JSONL file"),
    (f"{GENERATE} --file DIR/doc.jsonl --context x", "--context goes with TEXT"),
    (f"{GENERATE} hello --out NEW", "is for the answers of --file: give that, or leave --out away"),
    (f"{GENERATE} --file DIR/doc.jsonl --out DIR/notes", "notes is a folder: name a file in it"),
    (f"{GENERATE} --file DIR/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    (f"{GENERATE} --file DIR/silent.jsonl", "silent.jsonl, lines 1 and 3: `instruction` is null: give a text"),
    (f"{GENERATE} hello --expert c", "--expert c is no expert of"),
    (f"{GENERATE} hello --expert c", "done: choose a or b"),
    (f"{GENERATE} hello --expert a --base", "--expert a and --base are both asked for: choose one"),
    (f"{GENERATE} hello --temperature -1", "--temperature -1.0: choose a finite number of 0 or more"),
    (f"{GENERATE} hello --top-p 0", "--top-p 0.0: choose a share above 0 and at most 1"),
    (f"{GENERATE} hello --top-p 1.5", "--top-p 1.5: choose a share above 0 and at most 1"),
    (f"{GENERATE} hello --max-new-tokens 0", "--max-new-tokens 0: choose 1 or more"),
    (f"{GENERATE} hello --seed -1", "--seed -1: choose 0 to 4294967295"),
    (f"{GENERATE} --file DIR/doc.jsonl --batch-size 0", "--batch-size 0: choose 1 or more"),
    ("generate DIR/begun hello", "begun is unfinished"),
    ("chat DIR/nowhere", "nowhere does not exist: give a run folder"),
    ("chat DIR/done --temperature nan", "--temperature nan: choose a finite number"),
    ("serve DIR/notes", "has no config.json, so it is no run folder"),
    ("serve DIR/done --port 70000", "--port 70000: choose 0 to 65535"),
    ("serve DIR/done --queue 0", "--queue 0: choose 1 or more"),
    ("serve DIR/done --max-tokens 0", "--max-tokens 0: choose 1 or more"),
    ("serve DIR/done --api-key-file DIR/nowhere", "nowhere does not exist: give a file with one key a line"),
    ("serve DIR/done --api-key-file DIR/empty.txt", "empty.txt holds no key: give a file with one key a line"),
    ("serve DIR/done --host 203.0.113.7", "--host 203.0.113.7 --port 8000 cannot be had"),
    ("report DIR/nowhere", "nowhere does not exist"),
    ("report", "0 run folders given"),
    ("reproduce table2 --bases tiny% --out NEW", "--bases tiny%: choose dense"),
    ("reproduce table2 --rates mops -1 --out NEW", "--rates mops -1.0: choose a finite rate"),
    ("reproduce table2 --budget 0 --out NEW", "--budget 0.0: choose a finite number above 0"),
    ("bench --out NEW --only speed", "--only speed: choose train_vs_prompt_tuning"),
    ("bench --out NEW --injection-layer 16", "--injection-layer 16, but the model is given --layers 16"),
    ("bench --out NEW --hidden 30", "cannot be shared out in pairs"),
    # data, and finished runs
    ("data", "DATA is given nothing: name at least one"),
    ("data DIR/doc.jsonl --test-share 0", "--test-share 0.0: choose a share between 0 and 1"),
    ("data DIR/doc.jsonl --validation-share 1", "--validation-share 1.0: choose a share from 0"),
    ("data DIR/doc.jsonl --data-seed -1", "--data-seed -1: choose 0 to 4294967295"),
    ("data DIR/doc.jsonl --columns foo=bar", "--columns foo=bar: write FIELD=COLUMN"),
    ("data DIR/doc.jsonl --columns response=answer", "--columns response=answer: no such column (found: instruction,"),
    ("data DIR/doc.jsonl --shown three", "--shown: invalid literal for int() with base 10: 'three'"),
    ("data DIR/doc.jsonl --template caht", "--template caht: choose auto, chat, plain, or a file"),
    ("data DIR/doc.jsonl --model DIR/doc.jsonl", "MODEL DIR/doc.jsonl is a file"),
    ("data DIR/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    ("data DIR/empty.txt", "a file ending in '.txt' cannot be read"),
    ("evaluate", "Missing from smartmops evaluate: RUN"),
    ("evaluate DIR/doc.jsonl", "doc.jsonl is a file: give a run folder"),
    ("evaluate DIR/pruned", "pruned is no run folder, its config.json is no run's"),
    ("evaluate DIR/done --data DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    ("evaluate DIR/done --data DIR/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    ("evaluate DIR/done --data DIR/doc.jsonl --columns response=answer", "--columns response=answer: no such column"),
    ("evaluate DIR/done --batch-size 0", "--batch-size 0: choose 1 or more"),
    ("evaluate DIR/done --max-length 0", "--max-length 0: choose 1 or more"),
    ("evaluate DIR/done --answers -1", "--answers -1: choose 0 or more"),
    ("evaluate DIR/done --answer-tokens 0", "--answer-tokens 0: choose 1 or more"),
    ("inspect DIR/done", "Missing from smartmops inspect: --text"),
    ("inspect DIR/done --text x --max-new-tokens 0", "--max-new-tokens 0: choose 1 or more"),
    ("report DIR/begun", "begun is unfinished"),
    ("report DIR/done --out DIR/notes", "notes is a folder: name a file in it"),
    ("report DIR/done --out DIR/doc.jsonl/x", "x cannot be made, DIR/doc.jsonl is a file: choose another folder"),
    ("report DIR/done --out /proc/x", "--out /proc/x cannot be made"),
    # answers
    ("generate", "Missing from smartmops generate: RUN"),
    ("generate DIR/pruned hello", "pruned is no run folder"),
    (f"{GENERATE} hello --temperature warm", "--temperature: could not convert string to float: 'warm'"),
    (f"{GENERATE} hello --temperature inf", "--temperature inf: choose a finite number of 0 or more"),
    (f"{GENERATE} hello --top-p nan", "--top-p nan: choose a share above 0 and at most 1"),
    (f"{GENERATE} --file DIR/notes", "notes is a folder: give a JSONL file"),
    (f"{GENERATE} --file DIR/doc.jsonl --out DIR/doc.jsonl", "doc.jsonl is the file that is answered: choose another"),
    (f"{GENERATE} --file DIR/doc.jsonl --out DIR/doc.jsonl/x", "x cannot be made, DIR/doc.jsonl is a file"),
    (f"{GENERATE} --file DIR/doc.jsonl --out /proc/x", "--out /proc/x cannot be made"),
    ("chat DIR/begun", "begun is unfinished"),
    ("chat DIR/done --top-p 0", "--top-p 0.0: choose a share above 0 and at most 1"),
    ("chat DIR/done --max-new-tokens 0", "--max-new-tokens 0: choose 1 or more"),
    ("chat DIR/done --seed -1", "--seed -1: choose 0 to 4294967295"),
    ("serve DIR/begun", "begun is unfinished"),
    ("serve DIR/done --port eighty", "--port: invalid literal for int() with base 10: 'eighty'"),
    ("serve DIR/done --port -1", "--port -1: choose 0 to 65535"),
    ("serve DIR/done --batch-size 0", "--batch-size 0: choose 1 or more"),
    ("serve DIR/done --max-tokens 99999999999", "--max-tokens 99999999999: choose at most 2147483647"),
    ("serve DIR/done --api-key-file DIR/comment.txt", "comment.txt holds no key: give a file with one key a line"),
    ("serve DIR/done --api-key-file DIR/notes", "notes is a folder: give a file with one key a line"),
    # runs that are handed on
    (f"{EXPORT.replace('done', 'nowhere')} --format kv", "nowhere does not exist: give a run folder"),
    (f"{EXPORT.replace('done', 'begun')} --format kv", "begun is unfinished"),
    (f"{EXPORT.replace('done', 'pruned')} --format kv", "pruned is no run folder"),
    (f"{EXPORT.replace('done', 'lone')} --format router", "this run has one alone: there is nothing to route"),
    (EXPORT, "Missing from smartmops export: --format"),
    (f"{EXPORT} --format gguf", "'gguf'"),
    (f"{EXPORT} --format peft-prefix", "this run's experts begin at layer 4"),
    (f"{EXPORT} --format cartridge", "this run's experts begin at layer 4"),
    (f"{EXPORT} --format kv --experts a c", "--experts c is no expert of DIR/done: choose a or b"),
    ("export DIR/done --format kv", "Missing from smartmops export: --out"),
    ("export DIR/done --format kv --out DIR/notes", "notes holds thesis.tex: choose another folder"),
    ("export DIR/done --format kv --out DIR/doc.jsonl", "doc.jsonl is a file: choose a folder"),
    ("export DIR/done --format kv --out /proc/x", "--out /proc/x cannot be made"),
    ("push DIR/nowhere me/it", "nowhere does not exist: give a run folder"),
    ("push DIR/begun me/it", "begun is unfinished"),
    ("push DIR/done", "Missing from smartmops push: REPO"),
    ("push DIR/done it", "REPO it: give owner/name"),
    ("push DIR/done me/it/too --dry-run", "REPO me/it/too: give owner/name"),
    ("push DIR/done me/it --privat", "--privat"),
    # experts that come and go
    ("experts DIR/nowhere list", "nowhere does not exist: give a run folder"),
    ("experts DIR/pruned list", "pruned is no run folder"),
    ("experts DIR/done", "{list, add, drop, merge, rename, freeze, calibrate}"),
    ("experts DIR/done lits", "lits"),
    ("experts DIR/done list --rows 0", "--rows 0: choose 1 or more"),
    ("experts DIR/done list --old DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    ("experts DIR/done list --columns answer", "--columns answer: write FIELD=COLUMN"),
    ("experts DIR/done add --out NEW", "nothing given: give --data, --from OTHER_RUN:NAME or --prompt"),
    ("experts DIR/done add --data DIR/doc.jsonl", "--out DIR or --in-place: give one of them"),
    (f"{ADD} --data DIR/doc.jsonl --in-place", "--out DIR or --in-place: give one of them"),
    (f"{ADD} --data DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    (f"{ADD} --data DIR/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    (f"{ADD} --data DIR/doc.jsonl --name a", "'a' is an expert of DIR/done already: give another name"),
    (f"{ADD} --data DIR/doc.jsonl --steps -1", "--steps -1: choose 0 or more"),
    (f"{ADD} --data DIR/doc.jsonl --batch-size 0", "--batch-size 0: choose 1 or more"),
    (f"{ADD} --data DIR/doc.jsonl --relative-lr nan", "--relative-lr nan: choose a finite rate"),
    (f"{ADD} --data DIR/doc.jsonl --test-share 1", "--test-share 1.0: choose a share between 0 and 1"),
    (f"{ADD} --data DIR/doc.jsonl --seed -1", "--seed -1: choose 0 to 4294967295"),
    (f"{ADD} --data DIR/doc.jsonl --inputs DIR/doc.jsonl", "doc.jsonl are questions for --prompt"),
    (f"{ADD} --prompt DIR/nowhere.txt", "nowhere.txt does not exist: give a text file with a system prompt"),
    (f"{ADD} --prompt DIR/empty.txt", "empty.txt is blank: write a system prompt"),
    (f"{ADD} --prompt DIR/doc.jsonl --inputs DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    (f"{ADD} --prompt DIR/doc.jsonl --questions 0", "--questions 0: choose 1 or more"),
    (f"{ADD} --prompt DIR/doc.jsonl --answer-tokens 0", "--answer-tokens 0: choose 1 or more"),
    (f"{ADD} --from a", "--from a: give OTHER_RUN:NAME"),
    (f"{ADD} --from DIR/nowhere:a", "--from DIR/nowhere:a: DIR/nowhere does not exist: give a run folder"),
    (f"{ADD} --from DIR/done:c", "--from DIR/done:c: 'c' is no expert of DIR/done: choose a or b"),
    ("experts DIR/done add --data DIR/doc.jsonl --out DIR/notes", "holds files of something else (thesis.tex)"),
    ("experts DIR/done drop --out NEW", "Missing from smartmops experts drop: NAME"),
    ("experts DIR/done drop c --out NEW", "'c' is no expert of DIR/done: choose one of a, b"),
    ("experts DIR/done drop a", "--out DIR or --in-place: give one of them"),
    ("experts DIR/done merge a --out NEW", "Missing from smartmops experts merge: B"),
    ("experts DIR/done merge a c --out NEW", "'c' is no expert of DIR/done"),
    ("experts DIR/done merge a a --out NEW", "'a' cannot be merged with itself: name two experts"),
    ("experts DIR/done rename a --out NEW", "Missing from smartmops experts rename:"),
    ("experts DIR/done rename a b --out NEW", "'b' is an expert of DIR/done already: give another name"),
    ("experts DIR/done rename a b:c --out NEW", "b:c holds ':', by which names could not be told from what stands"),
    ("experts DIR/done rename a b/c --out NEW", "b/c holds '/', by which names"),
    (f"experts DIR/done rename a {'x' * 101} --out NEW", " has 101 characters: choose 100 at most"),
    (f"{ADD} --data DIR/doc.jsonl --name {'x' * 101}", " has 101 characters: choose 100 at most"),
    ("experts DIR/done rename c d --out NEW", "'c' is no expert of DIR/done"),
    ("experts DIR/done freeze c --out NEW", "'c' is no expert of DIR/done"),
    ("experts DIR/done calibrate --out NEW", "Missing from smartmops experts calibrate: --unrelated"),
    ("experts DIR/done calibrate --unrelated DIR/nowhere.txt --out NEW", "nowhere.txt cannot be read"),
    ("experts DIR/done calibrate --unrelated DIR/doc.jsonl --out NEW", "holds 1 texts: give 20 or more"),
    ("advise DIR/nowhere --data DIR/doc.jsonl", "nowhere does not exist: give a run folder"),
    ("advise DIR/done", "Missing from smartmops advise: --data"),
    ("advise DIR/done --data DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    ("advise DIR/done --data DIR/torn.jsonl", "torn.jsonl, line 2: not JSON"),
    ("advise DIR/done --data DIR/doc.jsonl --old DIR/missing.jsonl", "missing.jsonl': no such file or folder"),
    ("advise DIR/done --data DIR/doc.jsonl --steps -1", "--steps -1: choose 0 or more"),
    ("advise DIR/done --data DIR/doc.jsonl --part 0", "--part 0: choose 1 or more"),
    ("advise DIR/done --data DIR/doc.jsonl --rows 0", "--rows 0: choose 1 or more"),
    ("advise DIR/done --data DIR/doc.jsonl --test-share 0", "--test-share 0.0: choose a share between 0 and 1"),
    ("advise DIR/done --data DIR/doc.jsonl --relative-lr -1", "--relative-lr -1.0: choose a finite rate"),
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Good and bad data, a run that was killed, the outside of finished ones, a model's, and a folder of something else."""

    def rows(*categories: str) -> str:
        return "".join(json.dumps({"instruction": f"Say {i}.", "response": f"It is {i}."}
                                  | ({"category": name} if name else {})) + "\n"
                       for i, name in enumerate(categories))  # fmt: skip

    (folder / "doc.jsonl").write_text(rows(*"abc" * 20))
    (folder / "tasks").mkdir()
    for name in "abc":
        (folder / f"tasks/{name}.jsonl").write_text(rows(*[""] * 20))
    (folder / "single.jsonl").write_text(rows(*"abcde"))
    (folder / "bare.jsonl").write_text(rows(*[""] * 60))
    (folder / "torn.jsonl").write_text(rows("a") + '{"instruction": "x", "resp\n' + rows("a"))
    (folder / "silent.jsonl").write_text('{"instruction": null}\n{"instruction": "x"}\n{}\n')
    (folder / "empty.txt").write_text("\n")
    (folder / "comment.txt").write_text("# of whom\n")
    (folder / "texts.txt").write_text("\n\n".join(f"Text {number} is about nothing." for number in range(20)))
    for name in ("ca.crt", "server.crt", "server.key", "clients/a.pub", "clients/b.pub"):
        (folder / "keys" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "keys" / name).touch()
    run = {"command": "train", "arguments": {"method": "mops", "model": "tiny", "data": "office"}, "seed": 0}
    for name in ("begun", "notes", "done/adapter", "lone/adapter", "pruned"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "notes/thesis.tex").write_text("{}")
    (folder / "pruned/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 8}')
    for name in ("begun", "done", "lone"):
        (folder / name / "config.json").write_text(json.dumps(run))
    for name in ("done", "lone", "pruned"):
        (folder / name / "metrics.json").write_text("{}")
    two = {"num_experts": 2, "expert_names": ["a", "b"]}
    (folder / "done/adapter/adapter_config.json").write_text(json.dumps(two | {"injection_layer": 4}))
    (folder / "lone/adapter/adapter_config.json").write_text(json.dumps({"num_experts": 1, "null_threshold": 0.0}))


def words(line: str, folder: Path) -> list[str]:
    """The arguments of a command line of the table."""
    return spelled(line, folder).split()


def spelled(text: str, folder: Path) -> str:
    """With the paths that `DIR` and `NEW` stand for."""
    return re.sub(r"\bDIR\b(?=/)", str(folder), text).replace(" NEW", f" {folder / 'new'}")


def there(folder: Path) -> list[str]:
    """All that lies in a folder, to see whether anything was written."""
    return sorted(str(path) for path in folder.rglob("*"))
