"""Which of vLLM's engine arguments a profile may pass through (`engine.vllm.arguments`), and why not the others."""

from __future__ import annotations

_OURS = {
    "model": "groups[].model",
    "tokenizer": "groups[].model",
    "served_model_name": "models[].id",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "block_size": "engine.block_size",
    "enable_prefix_caching": "engine.prefix_caching",
    "quantization": "engine.quantization",
    "kv_cache_dtype": "engine.kv_cache_dtype",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "gpu_memory_utilization": "engine.vllm.gpu_memory_utilization",
    "tensor_parallel_size": "engine.vllm.tensor_parallel_size",
    "pipeline_parallel_size": "engine.vllm.pipeline_parallel_size",
    "enforce_eager": "engine.vllm.enforce_eager",
    "scheduling_policy": "engine.order",
    "speculative_config": "engine.speculative",
    "enable_lora": "engine.max_adapters",
    "max_loras": "engine.max_adapters",
    "max_cpu_loras": "engine.max_adapters",
    "max_lora_rank": "engine.max_lora_rank",
    "lora_dtype": "engine.lora_dtype",
    "max_logprobs": "nothing: clients may ask for 20",
    "seed": "nothing: every request has its own",
    "disable_log_stats": "nothing: routing needs them",
    "enable_logging_iteration_details": "nothing: routing needs them",
    "kv_events_config": "nothing: routing needs them",
    "structured_outputs_config": "nothing: grammars are compiled one way",
    "logprobs_mode": "nothing: logprobs are the model's own",
    "generation_config": "nothing: the gateway knows the defaults",
    "skip_tokenizer_init": "nothing: grammars need the tokenizer",
}
_DANGEROUS = {
    "trust_remote_code": "it runs code that comes with a model",
    "hf_token": "it would be written into a file; models are on this machine before vLLM starts",
    "allowed_local_media_path": "it lets clients read files of this machine",
    "allowed_media_domains": "it lets clients make this machine fetch addresses",
    "logits_processors": "it imports what it names",
    "worker_cls": "it imports what it names",
    "worker_extension_cls": "it imports what it names",
    "scheduler_cls": "it imports what it names",
    "reasoning_parser_plugin": "it imports what it names",
    "io_processor_plugin": "it imports what it names",
    "kv_transfer_config": "it opens connections to other machines and can import what it names",
    "ec_transfer_config": "it opens connections to other machines and can import what it names",
    "weight_transfer_config": "it opens connections to other machines",
    "enable_sleep_mode": "an engine asleep looks dead",
    "enable_prompt_embeds": "a wrong shape ends the engine",
    "enable_return_routed_experts": "answers have no place for them",
    "disable_frontend_multiprocessing": "the engine would step on the event loop",
    "collect_detailed_traces": "it stops the engine for each of them",
    "fail_on_environ_validation": "our own variables are no mistakes",
    "data_parallel_size": "replicas are what is parallel here: groups[].replicas",
    "node_rank": "a replica has one engine, on one node or on Ray's",
    "nnodes": "a replica has one engine, on one node or on Ray's",
    "master_addr": "a replica has one engine, on one node or on Ray's",
    "master_port": "a replica has one engine, on one node or on Ray's",
}


def refused(name: str) -> str:
    """Why a profile must not pass this argument; empty when it may."""
    plain = name.replace("-", "_")
    if plain in _OURS:
        return f"set {_OURS[plain]} instead" if "nothing" not in _OURS[plain] else f"cannot be set, {_OURS[plain][9:]}"
    if plain.startswith("data_parallel_"):
        return _DANGEROUS["data_parallel_size"]
    return _DANGEROUS.get(plain, "")
