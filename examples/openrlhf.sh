#!/usr/bin/env bash
# Trains a policy by GRPO with OpenRLHF 0.11 on the rewards of a running service. It needs a Ray
# cluster with 8 GPUs, OpenRLHF with vLLM, and `pip install rayward` in its environment.
#
#     rayward serve outputs/my-model/export        # here, or on another machine
#     ray start --head --num-gpus 8
#     RAYWARD_URL=http://127.0.0.1:8000 examples/openrlhf.sh prompts.jsonl
#
# The rows hold the messages of a prompt as `messages`. OpenRLHF puts them into the policy's
# template, which the reward model must share. Further arguments are options of OpenRLHF's.
set -euo pipefail
: "${RAYWARD_URL:?the address of the service}"
prompts=${1:?a .jsonl file}
shift

# A sample without a reward ends the training; with RAYWARD_ERROR_REWARD it gets that reward.
variables="\"RAYWARD_URL\": \"$RAYWARD_URL\""
for name in RAYWARD_TOKEN RAYWARD_ERROR_REWARD; do
    [ -z "${!name:-}" ] || variables+=", \"$name\": \"${!name}\""
done
function_file=$(python3 -c 'import reward_actor.integrations.openrlhf as f; print(f.__file__)')

exec ray job submit --runtime-env-json "{\"env_vars\": {$variables}}" -- \
    python3 -m openrlhf.cli.train_ppo_ray \
    --reward.remote_url "$function_file" \
    --actor.model_name_or_path Qwen/Qwen3-8B \
    --data.prompt_dataset "$(realpath "$prompts")" \
    --data.input_key messages \
    --data.apply_chat_template \
    --data.max_len 2048 \
    --rollout.max_new_tokens 1024 \
    --rollout.batch_size 128 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.micro_batch_size 8 \
    --train.batch_size 256 \
    --train.micro_batch_size 4 \
    --train.max_epochs 1 \
    --algo.advantage.estimator group_norm \
    --algo.kl.init_coef 1e-3 \
    --algo.kl.use_loss \
    --algo.kl.estimator k2 \
    --actor.adam.lr 1e-6 \
    --actor.gradient_checkpointing_enable \
    --actor.num_nodes 1 \
    --actor.num_gpus_per_node 8 \
    --ref.num_nodes 1 \
    --ref.num_gpus_per_node 8 \
    --vllm.num_engines 4 \
    --vllm.tensor_parallel_size 2 \
    --vllm.gpu_memory_utilization 0.6 \
    --vllm.enable_sleep \
    --vllm.sync_backend nccl \
    --train.colocate_all \
    --ds.enable_sleep \
    --ds.zero_stage 3 \
    --ds.param_dtype bf16 \
    --ds.packing_samples \
    --ckpt.output_dir outputs/openrlhf-policy \
    "$@"
