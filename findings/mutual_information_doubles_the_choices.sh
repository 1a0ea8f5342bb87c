#!/usr/bin/env bash
# lm-eval 0.4.13: if a multiple-choice task names the metric acc_mutual_info, each sample that is logged (log_samples) has twice as
# many arguments and filtered_resps as choices: the choices after the question, then the choices by themselves. Nothing in the
# sample says so, and its "doc" and "target" are as without the metric.
# Why it matters here: predictions, ranks and margins are taken from these logs, both of our own runs and of others' (kc take). The
# likelihoods without the question are larger, so they were taken for the answers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 lm-eval[hf]==0.4.13
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/home"
echo '{"question": "The sky is", "choices": ["blue", "loud", "square"], "gold": 0}' > items.jsonl
cat > look.py <<'PYTHON'
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

task = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
}
for metrics in (["acc"], ["acc", "acc_mutual_info"]):
    asked = task | {"metric_list": [{"metric": metric} for metric in metrics]}
    told = simple_evaluate(model="dummy", tasks=[asked], log_samples=True, bootstrap_iters=0, task_manager=TaskManager())
    (sample,) = told["samples"]["colours"]
    contexts = [argument[0] for argument in sample["arguments"]]
    print(f"{'+'.join(metrics)}: {len(sample['filtered_resps'])} answers to 3 choices, after {contexts}")
PYTHON
"$folder/env/bin/python" -W ignore look.py > log.txt 2> errors.txt || { tail -5 errors.txt; exit 1; }
grep " answers to " log.txt | tee found.txt
diff found.txt - <<FOUND
acc: 3 answers to 3 choices, after ['The sky is', 'The sky is', 'The sky is']
acc+acc_mutual_info: 6 answers to 3 choices, after ['The sky is', 'The sky is', 'The sky is', '', '', '']
FOUND
echo "as found"
