# SPDX-License-Identifier: Apache-2.0
"""Flag, defaults and refusals on SGLang's own ServerArgs, resolved as a launch resolves them."""

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish, restore_context, snapshot_context
from sglang.srt.server_args import ServerArgs, prepare_server_args
from torch import nn

from sglang_diffxkv.config import ENV_VAR, DiffXKVConfig
from sglang_diffxkv.kernels.cpu import build
from sglang_diffxkv.patches.model_validation import check_disk, check_layers
from sglang_diffxkv.patches.server_args import fraction_is_given, get_config, is_active
from sglang_diffxkv.patches.validation import WORKER_APP
from tests.support.demo_model import write_demo_model

OURS = ("--attention-backend", "diffxkv")
GPU = ("--device", "cuda")
SPECULATIVE = ("--speculative-algorithm",)
NGRAM = (*SPECULATIVE, "NGRAM")
STANDALONE = (*SPECULATIVE, "STANDALONE")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    load_plugins()
    return str(write_demo_model(tmp_path_factory.mktemp("model"), layers=2))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_VAR, raising=False)
    # The CPU platform would set these for good.
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def own_context() -> Iterator[None]:
    state = snapshot_context()
    yield
    restore_context(state)


def resolve(model: str, *argv: str) -> Any:
    server_args = prepare_server_args(["--model-path", model, "--device", "cpu", *argv])
    server_args.resolve_once()
    return server_args


def refusal(model: str, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        resolve(model, *argv)
    message = str(caught.value)
    assert message.startswith("sglang_diffxkv: ")
    assert "\n" not in message
    return message


def test_choosing_the_backend_sets_what_it_needs(model: str) -> None:
    view = resolving_view(resolve(model, *OURS))
    assert view.attention_backend == "diffxkv"
    assert view.page_size == 64
    assert view.cuda_graph_config.prefill.backend == "disabled"
    assert view.cuda_graph_config.decode.backend == "disabled"


def test_a_gpu_captures_decode_steps(model: str) -> None:
    graphs = resolving_view(resolve(model, *OURS, *GPU)).cuda_graph_config
    assert (graphs.decode.backend, graphs.prefill.backend) == ("full", "disabled")
    graphs = resolving_view(resolve(model, *OURS, *GPU, "--disable-cuda-graph")).cuda_graph_config
    assert (graphs.decode.backend, graphs.prefill.backend) == ("disabled", "disabled")


def test_rocm_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in refusal(model, *OURS, *GPU)


def test_a_cpu_without_a_compiler_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.find_compiler.cache_clear()
    try:
        assert "install g++" in refusal(model, *OURS)
        resolve(model, *OURS, *GPU)
        resolve(model, "--attention-backend", "torch_native")
    finally:
        build.find_compiler.cache_clear()


def test_an_instruction_set_that_the_cpu_lacks_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.ISA_VARIABLE, "none")
    assert f"{build.ISA_VARIABLE}=none: this CPU offers" in refusal(model, *OURS)


def test_both_phase_flags_choose_it_too(model: str) -> None:
    phases = ("--prefill-attention-backend", "diffxkv", "--decode-attention-backend", "diffxkv")
    view = resolving_view(resolve(model, *phases))
    assert (view.attention_backend, view.page_size) == ("diffxkv", 64)


def test_other_backends_are_left_alone(model: str) -> None:
    server_args = resolve(model, "--attention-backend", "torch_native", "--page-size", "16")
    assert resolving_view(server_args).page_size == 16
    assert not hasattr(server_args, "_diffxkv")
    resolve(model, "--kv-cache-dtype", "bfloat16", "--chunked-prefill-size", "-1")


@pytest.mark.parametrize(
    "flags",
    [
        ("--page-size", "64"),
        ("--disable-radix-cache",),
        ("--kv-cache-dtype", "bf16", "--dtype", "bfloat16"),
        ("--chunked-prefill-size", "128", "--enable-mixed-chunk"),
        ("--tokenizer-worker-num", "2"),
        ("--cuda-graph-backend-decode", "disabled"),
        ("--tp-size", "2", "--diffxkv-config", '{"save_plan": "plan-{rank}.json"}'),
    ],
)
def test_what_goes_with_it(model: str, flags: tuple[str, ...]) -> None:
    assert resolving_view(resolve(model, *OURS, *flags)).attention_backend == "diffxkv"


def test_ngram_drafts_chains(model: str) -> None:
    view = resolving_view(resolve(model, *OURS, *NGRAM))
    assert view.speculative_ngram_max_bfs_breadth == view.speculative_eagle_topk == 1
    assert view.speculative_num_draft_tokens == 12
    assert view.speculative_draft_attention_backend is None
    resolve(model, *OURS, "--speculative-algorithm", "ngram")
    resolve(model, *OURS, *NGRAM, "--speculative-num-draft-tokens", "16")
    stock = resolving_view(resolve(model, "--page-size", "1", *NGRAM))
    assert stock.speculative_ngram_max_bfs_breadth == 10


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "STANDALONE"])
@pytest.mark.parametrize(
    ("flags", "nodes"),
    [
        ((), 4),
        (("--speculative-eagle-topk", "1"), 4),
        (("--speculative-num-draft-tokens", "8"), 8),
        (("--speculative-num-steps", "5"), 6),
        (("--speculative-num-steps", "15", "--speculative-eagle-topk", "1"), 16),
    ],
)
def test_models_draft_chains(
    model: str, algorithm: str, flags: tuple[str, ...], nodes: int
) -> None:
    draft = (*SPECULATIVE, algorithm, "--speculative-draft-model-path", model)
    view = resolving_view(resolve(model, *OURS, *draft, *flags))
    assert view.speculative_eagle_topk == 1
    assert (view.speculative_num_steps, view.speculative_num_draft_tokens) == (nodes - 1, nodes)
    assert view.speculative_draft_attention_backend == "torch_native"
    assert view.attention_backend == "diffxkv"


@pytest.mark.parametrize("asked", ["fp8_e4m3", "fp8_e5m2"])
def test_raw_pages_keep_the_models_dtype(
    model: str, asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server_args = resolve(model, *OURS, "--kv-cache-dtype", asked)
    assert resolving_view(server_args).kv_cache_dtype == "auto"
    printed = "".join(capsys.readouterr()).splitlines()
    said = [line for line in printed if f"--kv-cache-dtype {asked}" in line]
    assert len(said) == 1 and "raw pages stay in the model's dtype" in said[0]
    stock = resolve(model, "--kv-cache-dtype", asked)
    assert resolving_view(stock).kv_cache_dtype == asked


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--page-size", "16"), ["--page-size 16", "use 64"]),
        ((*SPECULATIVE, "DFLASH"), ["--speculative-algorithm DFLASH", "chains", "or NGRAM"]),
        ((*SPECULATIVE, "frozen_kv_mtp"), ["--speculative-algorithm FROZEN_KV_MTP"]),
        ((*NGRAM, "--speculative-ngram-max-bfs-breadth", "2"), ["bfs-breadth 2", "not trees"]),
        ((*NGRAM, "--speculative-num-draft-tokens", "17"), ["draft-tokens 17", "verifies 16"]),
        ((*STANDALONE, "--speculative-eagle-topk", "4"), ["topk 4", "not trees", "use 1"]),
        ((*STANDALONE, "--speculative-adaptive"), ["--speculative-adaptive", "leave it out"]),
        ((*STANDALONE, "--speculative-num-steps", "16"), ["draft-tokens 17", "verifies 16"]),
        ((*STANDALONE, "--speculative-use-rejection-sampling"), ["needs a GPU"]),
        ((*STANDALONE, "--enable-multi-layer-eagle"), ["--enable-multi-layer-eagle"]),
        (("--enable-hierarchical-cache",), ["--enable-hierarchical-cache", "leave it out"]),
        (("--enable-lmcache",), ["--enable-lmcache"]),
        (("--enable-flexkv",), ["--enable-flexkv"]),
        (("--disaggregation-mode", "prefill"), ["--disaggregation-mode prefill"]),
        (("--kv-cache-dtype", "nvfp4"), ["--kv-cache-dtype nvfp4", "use auto"]),
        (("--kv-cache-dtype", "bf16", "--dtype", "float32"), ["bf16", "a model in float32"]),
        (("--chunked-prefill-size", "-1"), ["--chunked-prefill-size -1", "multiple of 64"]),
        (("--chunked-prefill-size", "100"), ["--chunked-prefill-size 100", "multiple of 64"]),
        (("--pp-size", "2"), ["--pp-size 2", "only tensor-parallel ranks", "use 1"]),
        (("--tp-size", "2", "--attn-dp-size", "2"), ["--attn-dp-size 2"]),
        (("--tp-size", "2", "--attn-cp-size", "2"), ["--attn-cp-size 2"]),
        (("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"), ["attn-dp-size 2"]),
        (
            ("--tp-size", "2", "--diffxkv-config", '{"save_plan": "plan.json"}'),
            ["plan.json", "2 ranks", "'plan-{rank}.json'"],
        ),
        (("--dcp-size", "2"), ["--dcp-size 2"]),
        (("--enable-unified-memory",), ["--enable-unified-memory"]),
        (("--enable-kv-cache-sharding",), ["--enable-kv-cache-sharding"]),
        (("--enable-hisparse",), ["--enable-hisparse"]),
        (("--enable-two-batch-overlap",), ["--enable-two-batch-overlap"]),
        (("--enable-pdmux",), ["--enable-pdmux"]),
        (("--use-ray",), ["--use-ray", "load no plugins"]),
        (("--kv-canary", "log"), ["--kv-canary log"]),
        (("--decode-attention-backend", "triton"), ["diffxkv for prefill", "triton for decode"]),
        (("--cuda-graph-backend-decode", "full"), ["CUDA graphs for decode (full)", "on cpu"]),
        (("--cuda-graph-config", '{"prefill":{"backend":"breakable"}}'), ["graphs for prefill"]),
        ((*GPU, "--cuda-graph-backend-prefill", "full"), ["graphs for prefill (full)", "on cuda"]),
        ((*GPU, "--cuda-graph-backend-decode", "breakable"), ["for decode (breakable)"]),
        ((*GPU, "--enable-torch-compile"), ["--enable-torch-compile", "leave it out"]),
        (("--diffxkv-config", '{"windo": 3}'), ["windo", "did you mean 'window'"]),
        (("--diffxkv-config", '{"policy": "difkv"}'), ["difkv", "did you mean 'diffkv'"]),
        (("--diffxkv-config", '{"layer_caps": [1, 1, 1]}'), ["3 shares", "has 2 layers"]),
        (
            ("--diffxkv-config", '{"policy": "lossless", "layer_caps": 0.5}'),
            ["lossless", "layer_caps below 1"],
        ),
        (("--diffxkv-config", '{"policy": "snapkv"}'), ["snapkv", "layer_caps below 1"]),
    ],
)
def test_what_does_not_is_refused_in_one_line(
    model: str, flags: tuple[str, ...], parts: list[str]
) -> None:
    message = refusal(model, *OURS, *flags)
    for part in parts:
        assert part in message


def test_one_phase_alone_is_refused(model: str) -> None:
    assert "give --attention-backend diffxkv" in refusal(
        model, "--prefill-attention-backend", "diffxkv"
    )


def test_flag_without_the_backend_is_refused(model: str) -> None:
    assert "needs --attention-backend diffxkv" in refusal(model, "--diffxkv-config", "{}")


@pytest.mark.parametrize(
    "name",
    [
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        "SGLANG_RUST_SERVER",
    ],
)
def test_variables_it_does_not_go_with(
    model: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    message = refusal(model, *OURS)
    assert name in message and "unset it" in message


def test_tokenizer_workers_serve_our_application(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = (*OURS, "--tokenizer-worker-num", "2")
    resolve(model, *workers)
    monkeypatch.setenv("SGLANG_HTTP_SERVER_APP_PATH", WORKER_APP)
    resolve(model, *workers)
    monkeypatch.setenv("SGLANG_HTTP_SERVER_APP_PATH", "their.application:app")
    assert "SGLANG_HTTP_SERVER_APP_PATH does not go with" in refusal(model, *workers)
    resolve(model, *OURS)


@pytest.mark.slow
def test_programs_that_parse_arguments_load_plugins(model: str) -> None:
    """The program in the documentation, up to where it serves."""
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    program = docs.split("```python\n")[1].split("```")[0]
    assert program.count("    launch_server(") == 1
    run = _run(program.replace("    launch_server(", "    print("), "--model-path", model)
    assert "attention_backend='diffxkv'" in run.stdout, run.stderr


@pytest.mark.slow
def test_arguments_that_were_resolved_without_us(model: str) -> None:
    program = (
        "import sys\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "from sglang.srt.entrypoints.http_server import launch_server\n"
        "args = dict(model_path=sys.argv[1], device='cpu', attention_backend='diffxkv')\n"
        "launch_server(ServerArgs(**args))\n"
    )
    run = _run(program, model)
    assert run.returncode and "call sglang.srt.plugins.load_plugins() first" in run.stderr


def _run(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", program, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


PLAIN = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}


def write_config(folder: Path, architecture: str, config: dict[str, Any]) -> str:
    values = {**PLAIN, **config, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "config", "found"),
    [
        (
            "DeepseekV2ForCausalLM",
            {
                "model_type": "deepseek_v2",
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
                "q_lora_rank": None,
            },
            "MLA",
        ),
        (
            "Gemma3ForCausalLM",
            {"model_type": "gemma3_text", "layer_types": 4 * ["sliding_attention"]},
            "sliding windows in all layers",
        ),
        ("LlamaForCausalLM", {"model_type": "llama", "num_kv_shared_layers": 1}, "K/V of others"),
        ("Mamba2ForCausalLM", {"model_type": "mamba2", "num_heads": 8, "expand": 2}, "state-space"),
        ("WhisperForConditionalGeneration", {"model_type": "whisper"}, "encoder-decoder"),
        ("LlamaEmbeddingModel", {"model_type": "llama"}, "embedding"),
        ("LlamaForCausalLM", {"model_type": "llama", "head_dim": 72}, "head_dim 72"),
        ("LlamaForCausalLM", {"model_type": "llama", "num_key_value_heads": 3}, "3 KV heads"),
        ("LlamaForCausalLM", {"model_type": "llama", "v_head_dim": 32}, "values of 32"),
        ("LlamaForCausalLM", {"model_type": "llama", "swa_head_dim": 72}, "head_dim 72"),
        ("LlamaForCausalLM", {"model_type": "llama", "attention_chunk_size": 64}, "chunked local"),
    ],
)
@pytest.mark.usefixtures("model")
def test_models_it_cannot_serve(
    tmp_path: Path, architecture: str, config: dict[str, Any], found: str
) -> None:
    message = refusal(write_config(tmp_path, architecture, config), *OURS)
    assert found in message and architecture in message


@pytest.mark.usefixtures("model")
def test_images_of_gemma_are_refused(tmp_path: Path) -> None:
    """SGLang would not say that they are attended to as if they were text."""
    layers = ["sliding_attention", "full_attention"] * 2
    text = {**PLAIN, "model_type": "gemma3_text", "layer_types": layers, "sliding_window": 100}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    path = write_config(tmp_path, "Gemma3ForConditionalGeneration", config)
    assert "images whose tokens see each other" in refusal(path, *OURS, "--enable-multimodal")
    assert resolving_view(resolve(path, *OURS)).attention_backend == "diffxkv"


HYBRIDS: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {"model_type": "qwen3_next", "full_attention_interval": 2},
    "Qwen3_5ForCausalLM": {"model_type": "qwen3_5_text", "full_attention_interval": 2},
    "FalconH1ForCausalLM": {"model_type": "falcon_h1", "mamba_chunk_size": 64},
    "GraniteMoeHybridForCausalLM": {
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_chunk_size": 64,
        "mamba_n_heads": 8,
    },
}
LFM2 = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}


@pytest.mark.parametrize("architecture", HYBRIDS)
@pytest.mark.usefixtures("model")
def test_models_with_linear_layers(tmp_path: Path, architecture: str) -> None:
    """SGLang keeps their states at the ends of pages, unless it is told otherwise."""
    path = write_config(tmp_path, architecture, HYBRIDS[architecture])
    view = resolving_view(resolve(path, *OURS))
    assert (view.attention_backend, view.page_size) == ("diffxkv", 64)
    assert view.mamba_radix_cache_strategy == "extra_buffer"
    message = refusal(path, *OURS, "--mamba-radix-cache-strategy", "no_buffer")
    assert "pages of 64: leave it out" in message
    resolve(path, *OURS, "--disable-radix-cache")


@pytest.mark.usefixtures("model")
def test_prefixes_that_sglang_cannot_cache_in_pages(tmp_path: Path) -> None:
    path = write_config(tmp_path, "Lfm2ForCausalLM", LFM2)
    message = refusal(path, *OURS)
    assert "Lfm2ForCausalLM in pages of one token" in message
    assert message.endswith("use --disable-radix-cache")
    resolve(path, *OURS, "--disable-radix-cache")


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("LlamaForCausalLM", "llama"), ("Qwen2ForCausalLM", "qwen2"), ("Qwen3ForCausalLM", "qwen3")],
)
@pytest.mark.usefixtures("model")
def test_models_it_serves(tmp_path: Path, architecture: str, model_type: str) -> None:
    path = write_config(tmp_path, architecture, {"model_type": model_type})
    assert resolving_view(resolve(path, *OURS)).attention_backend == "diffxkv"


def attention(layer_id: int = 1, **changes: Any) -> RadixAttention:
    plain = {"num_heads": 8, "head_dim": 64, "scaling": 0.125, "num_kv_heads": 2}
    return RadixAttention(**{**plain, "layer_id": layer_id, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"logit_cap": 30.0, "logit_capping_method": "sigmoid"}, "capped by sigmoid"),
        ({"sliding_window_size": 512}, "a window of 512, unlike what its layer_types say"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"use_irope": True}, "chunked local"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "not causal"),
        ({"v_head_dim": 32}, "values of another size"),
        ({"num_kv_heads": 4}, "others of"),
    ],
)
def test_layers_it_cannot_serve(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=r"layer 1 has ") as caught:
        check_layers(nn.ModuleList([attention(0), attention(1, **changes)]))
    assert found in str(caught.value)
    check_layers(nn.ModuleList([attention(0), attention(1)]))


def test_layers_with_windows_are_alike_among_themselves() -> None:
    window = {"sliding_window_size": 99}
    plain, other = attention(0), attention(1, **window, num_kv_heads=4, logit_cap=30.0)
    check_layers(nn.ModuleList([plain, other]), windows=[1])
    for changes in ({"head_dim": 128}, {"sliding_window_size": 64}):
        odd = attention(2, **window | {"num_kv_heads": 4} | changes)
        with pytest.raises(ValueError, match=r"layer 2 has .*others of"):
            check_layers(nn.ModuleList([plain, other, odd]), windows=[1, 2])
    with pytest.raises(ValueError, match=r"layer 1 has a window of -1, unlike"):
        check_layers(nn.ModuleList([plain, attention(1)]), windows=[1])


def test_what_a_policy_is_not_made_for_is_logged(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """SGLang sets logging up anew while it resolves, so only what is printed can be looked at."""
    snapkv = '{"policy": "snapkv", "layer_caps": 0.5}'
    resolve(model, *OURS, "--diffxkv-config", snapkv, "--chunked-prefill-size", "512")
    printed = "".join(capfd.readouterr())
    assert "use --disable-radix-cache or policy 'diffxkv'" in printed
    assert "of longer ones than --chunked-prefill-size 512 it judges each chunk" in printed
    resolve(model, *OURS, "--diffxkv-config", snapkv, "--disable-radix-cache")
    printed = "".join(capfd.readouterr())
    assert "use --disable-radix-cache" not in printed and "made for prompts" in printed
    resolve(model, *OURS)
    assert "diffxkv: policy" not in "".join(capfd.readouterr())


@pytest.mark.usefixtures("own_context")
def test_config_reaches_the_scheduler_process(model: str) -> None:
    config = '{"policy": "lossless", "window": 128}'
    server_args = resolve(model, *OURS, "--diffxkv-config", config)
    publish(pickle.loads(pickle.dumps(server_args)), role="scheduler")
    assert is_active()
    assert get_config() == DiffXKVConfig(policy="lossless", window=128)


@pytest.mark.usefixtures("own_context")
@pytest.mark.parametrize("given", [None, 0.4])
def test_whether_the_user_gave_a_fraction_reaches_the_scheduler(
    model: str, given: float | None
) -> None:
    flags = () if given is None else ("--mem-fraction-static", str(given))
    engine = ServerArgs(
        model_path=model, device="cpu", attention_backend="diffxkv", mem_fraction_static=given
    )
    engine.resolve_once()
    for server_args in (resolve(model, *OURS, *flags), engine):
        publish(pickle.loads(pickle.dumps(server_args)), role="scheduler")
        assert fraction_is_given() is (given is not None)


def test_more_than_the_host_has_is_refused(model: str) -> None:
    config = ("--diffxkv-config", '{"memory_bytes": "900TiB"}')
    message = refusal(model, *OURS, *config, "--tp-size", "2")
    assert "memory_bytes of 921600.0 GiB on each of 2 ranks" in message
    assert "lower memory_bytes" in message
    resolve(model, *OURS, *config, *GPU)


@pytest.mark.usefixtures("own_context")
def test_it_is_inactive_with_another_backend(model: str) -> None:
    publish(resolve(model), role="scheduler")
    assert not is_active()


@pytest.mark.usefixtures("own_context")
def test_engine_reads_the_environment_and_gets_exceptions(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_VAR, '{"window": 5}')
    server_args = ServerArgs(model_path=model, device="cpu", attention_backend="diffxkv")
    server_args.resolve_once()
    publish(pickle.loads(pickle.dumps(server_args)), role="scheduler")
    assert get_config().window == 5
    refused = ServerArgs(model_path=model, device="cpu", attention_backend="diffxkv", pp_size=2)
    with pytest.raises(ValueError, match="--pp-size 2"):
        refused.resolve_once()


@pytest.mark.slow
@pytest.mark.server
def test_a_refused_launch_prints_one_line_and_no_traceback(model: str) -> None:
    sglang = str(Path(sys.executable).with_name("sglang"))
    done = subprocess.run(
        [sglang, "serve", "--model-type", "llm", "--model-path", model, *OURS, "--pp-size", "2"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert re.search(r"^sglang_diffxkv: --pp-size 2 .*; use 1$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


DISK = ("--diffxkv-config", '{"host_bytes": "1MiB", "disk_path": "pages", "disk_bytes": "1GiB"}')


def test_a_disk_goes_with_what_has_all_its_kv_in_pages(model: str, tmp_path: Path) -> None:
    resolve(model, *OURS, *DISK)
    resolve(model, *OURS, *DISK, *NGRAM)
    draft = (*STANDALONE, "--speculative-draft-model-path", model)
    assert "STANDALONE" in refusal(model, *OURS, *DISK, *draft)
    linear = write_config(tmp_path, "FalconH1ForCausalLM", HYBRIDS["FalconH1ForCausalLM"])
    assert "linear attention" in refusal(linear, *OURS, *DISK)
    resolve(linear, *OURS, "--diffxkv-config", '{"host_bytes": "1MiB"}')


def test_a_disk_does_not_go_with_window_layers(model: str) -> None:
    view = resolving_view(resolve(model, *OURS))
    config = ModelConfig(model)
    check_disk(view, config)
    config.is_hybrid_swa = True
    with pytest.raises(ValueError, match="disk_path does not go with sliding windows"):
        check_disk(view, config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ('{"disk_path": "pages", "disk_bytes": "1GiB"}', "disk_path needs host_bytes"),
        ('{"disk_path": "pages", "host_bytes": "1MiB"}', "need each other"),
        ('{"disk_bytes": "1GiB", "host_bytes": "1MiB"}', "need each other"),
    ],
)
def test_settings_of_a_disk_need_each_other(model: str, config: str, text: str) -> None:
    assert text in refusal(model, *OURS, "--diffxkv-config", config)
