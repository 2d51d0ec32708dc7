#!/usr/bin/env bash
# Trains a policy by GRPO with verl 0.9 on the rewards of a running service. It needs a machine with
# 8 GPUs, verl with vLLM, and `pip install rayward` in its environment.
#
#     rayward serve outputs/my-model/export        # here, or on another machine
#     RAYWARD_URL=http://127.0.0.1:8000 examples/verl.sh train.parquet heldout.parquet
#
# The rows of both files have the prompt twice: as `prompt`, and in `extra_info`, where the reward
# function finds it (docs/integrations.md). Further arguments are options of verl's.
set -euo pipefail
: "${RAYWARD_URL:?the address of the service}"
train=${1:?a parquet file}
heldout=${2:?another one}
shift 2

exec python3 -m verl.trainer.main_ppo \
    reward.custom_reward_function.path=pkg://reward_actor.integrations.verl \
    reward.custom_reward_function.name=compute_score_async \
    +reward.custom_reward_function.reward_kwargs.url="'$RAYWARD_URL'" \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    data.train_files="$train" \
    data.val_files="$heldout" \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    data.truncation=error \
    actor_rollout_ref.model.path=Qwen/Qwen3-8B \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=1 \
    trainer.total_epochs=1 \
    trainer.save_freq=50 \
    trainer.test_freq=10 \
    trainer.logger=console \
    "$@"
